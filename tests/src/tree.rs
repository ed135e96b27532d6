//! Host directories for guests, and what is in them.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::guest;

/// A host directory that goes away with the test.
pub struct Tree(TempDir);

impl Tree {
    /// An empty one, open to every user.
    pub fn new() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).expect("chmod");
        Self(directory)
    }

    /// One with the given program as `guest-probe`.
    pub fn with_probe(probe: &str) -> Self {
        let tree = Self::new();
        copy_executable(Path::new(probe), &tree.path("guest-probe"));
        tree
    }

    /// A root file system: busybox under every name a script may want, and /etc/passwd.
    pub fn root() -> Self {
        let tree = Self::new();
        for directory in ["bin", "sbin", "etc", "dev", "proc", "sys", "tmp", "run"] {
            fs::create_dir(tree.path(directory)).expect("mkdir");
        }
        copy_executable(&guest::busybox(), &tree.path("bin/busybox"));
        for name in [
            "cat", "echo", "ls", "mkdir", "mount", "poweroff", "reboot", "rm", "sh", "stat",
            "touch", "uname",
        ] {
            std::os::unix::fs::symlink("busybox", tree.path(&format!("bin/{name}")))
                .expect("symlink");
        }
        tree.write("etc/passwd", b"root:x:0:0:root:/:/bin/sh\n");
        tree
    }

    /// What `kernel-config/fetch` brings, where every user can read it.
    pub fn guest_data() -> Self {
        let tree = Self::new();
        copy_executable(&guest::busybox(), &tree.path("busybox"));
        copy_executable(&guest::vmlinux(), &tree.path("vmlinux"));
        fs::create_dir(tree.path("modules")).expect("mkdir");
        for file in fs::read_dir(guest::modules()).expect("modules") {
            let file = file.expect("a module");
            let to = tree.path("modules").join(file.file_name());
            fs::copy(file.path(), to).expect("copy");
        }
        tree
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The directory, as text.
    pub fn text(&self) -> &str {
        self.0.path().to_str().expect("a path in UTF-8")
    }

    /// The value of `--share` that shows it at `guest`, with options.
    pub fn at(&self, guest: &str, options: &str) -> String {
        format!("{}:{guest}:{options}", self.text())
    }

    /// Writes a file.
    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap_or_else(|error| panic!("{name}: {error}"));
    }

    /// Writes a file of `size` bytes, none of which is in a hole.
    pub fn fill(&self, name: &str, size: usize) {
        let piece = vec![7; 1 << 20];
        let mut file = fs::File::create(self.path(name)).expect("a new file");
        for at in (0..size).step_by(piece.len()) {
            file.write_all(&piece[..piece.len().min(size - at)]).expect("room for the file");
        }
    }

    /// Reads a file that must be there.
    #[track_caller]
    pub fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.path(name)).unwrap_or_else(|error| panic!("{name} on the host: {error}"))
    }

    /// Names in it, sorted.
    pub fn names(&self, directory: &str) -> Vec<String> {
        let entries = fs::read_dir(self.path(directory)).expect("a directory");
        let mut names: Vec<_> = entries
            .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into())
            .collect();
        names.sort();
        names
    }
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

/// Copies a program and makes it one.
pub fn copy_executable(from: &Path, to: &Path) {
    fs::copy(from, to).unwrap_or_else(|error| panic!("{}: {error}", from.display()));
    fs::set_permissions(to, fs::Permissions::from_mode(0o755)).expect("chmod");
}

/// Numbers without a pattern, the same every time (xorshift64*).
pub struct Random(u64);

impl Random {
    /// A sequence of its own for each seed.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// A number below `end`, which is at least 1.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }
}

/// Bytes without a pattern, the same every time.
pub fn noise(length: usize, seed: u64) -> Vec<u8> {
    let mut random = Random::new(seed);
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        bytes.extend(random.number().to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// What the host's `sha256sum` says of a file.
pub fn sha256(path: &Path) -> String {
    let output = Command::new("sha256sum").arg(path).output().expect("sha256sum");
    let text = String::from_utf8_lossy(&output.stdout).to_string();
    text.split_whitespace().next().unwrap_or_default().to_string()
}
