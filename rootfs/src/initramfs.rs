//! The initramfs that the VMM boots: `oriel-init`, its configuration, kernel modules, and, for a guest
//! without a root share, a busybox to live with.
//!
//! The archive is cpio in the "newc" format, as Documentation/driver-api/early-userspace/buffer-format.rst of
//! the kernel describes it, and not compressed: it is read from memory once.

use std::fs;
use std::io::{Cursor, Write};
use std::path::Path;

use anyhow::{Context, Result};
use cpio::newc;

use crate::container::FILES_DIR;
use crate::protocol::{CONFIG_PATH, Config, LOAD_ORDER_PATH, LOADER_PATH, MODULES_DIR};

/// Where busybox lies in the initramfs; `oriel-init` makes the links to it.
pub const BUSYBOX_PATH: &str = "/bin/busybox";

/// cpio's own. Zeros between archives are passed over, and each begins at a multiple of four.
const ARCHIVE_BLOCK: usize = 512;

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// What goes into an initramfs.
#[derive(Clone, Copy, Debug)]
pub struct Contents<'a> {
    /// The `oriel-init` binary, static.
    pub init: &'a Path,
    /// The host's directory with the files that [`Config::modules`] names; needed only when there are any.
    pub modules_dir: Option<&'a Path>,
    /// A static busybox: the commands of a guest whose root is the initramfs itself.
    pub busybox: Option<&'a Path>,
    /// Files of the host, for [`Container`](crate::container::Container)s.
    pub files: &'a [FileCopy],
    /// What `oriel-init` is to do.
    pub config: &'a Config,
}

/// A copy of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileCopy {
    /// Its name in [`FILES_DIR`].
    pub name: String,
    /// What is in it.
    pub bytes: Vec<u8>,
    /// Permissions.
    pub mode: u32,
    /// Whose it is.
    pub uid: u32,
    /// Whose group's.
    pub gid: u32,
}

/// The names in a `load-order` file, as `kernel-config/fetch` leaves one beside the modules: what
/// [`Config::modules`] wants.
///
/// # Errors
///
/// When the file cannot be read.
pub fn load_order(modules_dir: &Path) -> Result<Vec<String>> {
    let path = modules_dir.join("load-order");
    let names =
        fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    Ok(names.lines().filter(|name| !name.is_empty()).map(str::to_owned).collect())
}

/// Builds the initramfs.
///
/// # Errors
///
/// When a file cannot be read, or when a module is named and there is no directory to take it from.
pub fn build(contents: &Contents<'_>) -> Result<Vec<u8>> {
    let mut archive = Archive::default();

    // The kernel's own root is open to everybody.
    archive.directory(".", 0o755)?;
    // Mount points, and the homes of busybox's links.
    for directory in
        ["bin", "dev", "etc", "lib", "mnt", "oriel", "proc", "run", "sbin", "sys", "usr", "var"]
    {
        archive.directory(directory, 0o755)?;
    }
    for directory in ["oriel/modules", "usr/bin", "usr/sbin"] {
        archive.directory(directory, 0o755)?;
    }
    archive.directory("root", 0o700)?;
    archive.directory("tmp", 0o1777)?;
    // Before devtmpfs is mounted the kernel opens /dev/console for the first program, and Rust's runtime
    // needs /dev/null where that failed.
    archive.character_device("dev/console", 0o600, 5, 1)?;
    archive.character_device("dev/null", 0o666, 1, 3)?;

    archive.copy("init", 0o755, contents.init)?;
    let config = serde_json::to_vec(contents.config).context("cannot encode the configuration")?;
    // The environment may hold secrets.
    archive.file(CONFIG_PATH.trim_start_matches('/'), 0o600, &config)?;
    if !contents.config.modules.is_empty() {
        let directory = contents
            .modules_dir
            .context("there are modules to load, but no directory of modules")?;
        archive.modules(directory, &contents.config.modules)?;
    }
    if let Some(busybox) = contents.busybox {
        archive.copy(BUSYBOX_PATH.trim_start_matches('/'), 0o755, busybox)?;
    }
    if !contents.files.is_empty() {
        archive.directory(FILES_DIR.trim_start_matches('/'), 0o755)?;
    }
    for FileCopy { name, bytes, mode, uid, gid } in contents.files {
        let name = format!("{}/{name}", FILES_DIR.trim_start_matches('/'));
        let entry = archive.entry(&name, REGULAR | mode).uid(*uid).gid(*gid);
        archive
            .write(entry, bytes)
            .with_context(|| format!("cannot add {name} to the initramfs"))?;
    }
    archive.file(
        "etc/passwd",
        0o644,
        b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
    )?;
    archive.file("etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    archive.finish()
}

/// Builds an archive to be put before a foreign initramfs: `init`, which is `oriel-init`, at [`LOADER_PATH`], and all
/// modules of `modules_dir`, which it loads before it makes way for the other one's `/init`. A multiple of 512 bytes
/// long, so that whatever follows is aligned as Linux wants it.
///
/// # Errors
///
/// When a file cannot be read.
pub fn build_loader(init: &Path, modules_dir: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for directory in ["oriel", "oriel/modules"] {
        archive.directory(directory, 0o755)?;
    }
    archive.copy(LOADER_PATH.trim_start_matches('/'), 0o755, init)?;
    let modules = load_order(modules_dir)?;
    archive.modules(modules_dir, &modules)?;
    archive.file(LOAD_ORDER_PATH.trim_start_matches('/'), 0o644, modules.join("\n").as_bytes())?;
    let mut bytes = archive.finish()?;
    bytes.resize(bytes.len().next_multiple_of(ARCHIVE_BLOCK), 0);
    Ok(bytes)
}

/// A cpio archive in the making. All belongs to root and to the epoch, so that equal contents make equal
/// archives. Names are without a `/` in front, and a directory comes before what is in it.
///
/// All its functions fail when it cannot hold what they are given, with the name.
#[derive(Default)]
pub struct Archive {
    bytes: Cursor<Vec<u8>>,
    inode: u32,
}

impl Archive {
    fn entry(&mut self, name: &str, mode: u32) -> newc::Builder {
        self.inode += 1;
        newc::Builder::new(name).ino(self.inode).mode(mode).nlink(1)
    }

    fn write(&mut self, entry: newc::Builder, data: &[u8]) -> std::io::Result<()> {
        let size = u32::try_from(data.len())
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::FileTooLarge))?;
        let mut writer = entry.write(&mut self.bytes, size);
        writer.write_all(data)?;
        writer.finish()?;
        Ok(())
    }

    /// Adds what `mode` says that it is (`S_IFMT` and permissions), with its content: of a link, where it leads.
    pub fn add(&mut self, name: &str, mode: u32, data: &[u8]) -> Result<()> {
        let entry = self.entry(name, mode);
        self.write(entry, data).with_context(|| format!("cannot add {name} to the initramfs"))
    }

    /// Adds a directory.
    pub fn directory(&mut self, name: &str, permissions: u32) -> Result<()> {
        self.add(name, DIRECTORY | permissions, &[])
    }

    /// Adds a device.
    pub fn character_device(
        &mut self,
        name: &str,
        permissions: u32,
        major: u32,
        minor: u32,
    ) -> Result<()> {
        let entry =
            self.entry(name, CHARACTER_DEVICE | permissions).rdev_major(major).rdev_minor(minor);
        self.write(entry, &[]).with_context(|| format!("cannot add {name} to the initramfs"))
    }

    /// Adds a regular file.
    pub fn file(&mut self, name: &str, permissions: u32, data: &[u8]) -> Result<()> {
        self.add(name, REGULAR | permissions, data)
    }

    fn modules(&mut self, directory: &Path, modules: &[String]) -> Result<()> {
        for module in modules {
            let name = format!("{}/{module}", MODULES_DIR.trim_start_matches('/'));
            self.copy(&name, 0o644, &directory.join(module))?;
        }
        Ok(())
    }

    /// Adds a copy of a file of the host's.
    pub fn copy(&mut self, name: &str, permissions: u32, source: &Path) -> Result<()> {
        let data = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        self.file(name, permissions, &data)
    }

    /// Ends it, and returns its bytes.
    pub fn finish(self) -> Result<Vec<u8>> {
        let bytes = newc::trailer(self.bytes).context("cannot end the initramfs")?;
        Ok(bytes.into_inner())
    }
}

#[cfg(test)]
#[allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]
mod tests {
    use std::collections::BTreeMap;
    use std::io::Read;

    use super::*;
    use crate::container::{Confinement, Container};
    use crate::protocol::{Dax, FromGuest, FromHost, Process, Root, Share};

    fn config() -> Config {
        let share =
            Share { tag: "root".into(), path: "/".into(), read_only: true, dax: Dax::Always };
        Config {
            modules: vec!["b.ko".into(), "a.ko".into()],
            root: Some(Root { share: share.clone(), overlay: true }),
            shares: vec![Share {
                tag: "src".into(),
                path: "/src".into(),
                read_only: false,
                dax: Dax::Inode,
            }],
            hostname: "sandbox".into(),
            process: Process {
                args: vec!["sh".into(), "-c".into(), "echo \"\n\"".into()],
                env: vec!["PATH=/bin".into()],
                cwd: "/".into(),
                user: Some("1000:nogroup".into()),
                terminal: false,
                stdin: true,
                confinement: Confinement::default(),
            },
            container: Some(Container::default()),
            agent: false,
        }
    }

    /// Mode, data, device number.
    type Found = (u32, Vec<u8>, (u32, u32));

    fn entries(archive: &[u8]) -> BTreeMap<String, Found> {
        let mut found = BTreeMap::new();
        let mut rest = archive;
        loop {
            let mut reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                return found;
            }
            let mut data = Vec::new();
            reader.read_to_end(&mut data).unwrap();
            let entry = reader.entry();
            let device = (entry.rdev_major(), entry.rdev_minor());
            let previous = found.insert(entry.name().to_owned(), (entry.mode(), data, device));
            assert!(previous.is_none(), "twice in the archive");
            rest = reader.finish().unwrap();
        }
    }

    #[test]
    fn an_archive_holds_what_it_was_built_from() {
        let host = tempfile::tempdir().unwrap();
        for (name, data) in [("init", "INIT"), ("a.ko", "A"), ("b.ko", "BB"), ("busybox", "BOX")] {
            fs::write(host.path().join(name), data).unwrap();
        }
        let config = config();
        let contents = Contents {
            init: &host.path().join("init"),
            modules_dir: Some(host.path()),
            busybox: Some(&host.path().join("busybox")),
            files: &[FileCopy { name: "0".into(), bytes: vec![7], mode: 0o640, uid: 1, gid: 2 }],
            config: &config,
        };
        let archive = build(&contents).unwrap();
        assert_eq!(archive, build(&contents).unwrap(), "equal contents make equal archives");

        let entries = entries(&archive);
        assert_eq!(entries["init"], (0o100_755, b"INIT".to_vec(), (0, 0)));
        assert_eq!(entries["oriel/modules/a.ko"].1, b"A");
        assert_eq!(entries["oriel/modules/b.ko"].1, b"BB");
        assert_eq!(entries["bin/busybox"], (0o100_755, b"BOX".to_vec(), (0, 0)));
        assert_eq!(entries["oriel/files/0"], (0o100_640, vec![7], (0, 0)));
        assert_eq!(entries["dev/null"], (0o020_666, vec![], (1, 3)));
        assert_eq!(entries["tmp"].0, 0o041_777);
        assert!(entries["etc/passwd"].1.starts_with(b"root:x:0:0:"));
        let read: Config = serde_json::from_slice(&entries["oriel/config.json"].1).unwrap();
        assert_eq!(read, config);
        // The kernel makes no parents: a directory comes before what is in it.
        for name in entries.keys() {
            if let Some((parent, _)) = name.rsplit_once('/') {
                assert!(entries.contains_key(parent), "{parent} of {name}");
            }
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let host = tempfile::tempdir().unwrap();
        let mut config = config();
        let init = host.path().join("init");
        let files = &[];
        let contents =
            Contents { init: &init, modules_dir: None, busybox: None, files, config: &config };
        assert!(build(&contents).unwrap_err().to_string().contains(&init.display().to_string()));

        fs::write(&init, "").unwrap();
        assert!(build(&contents).unwrap_err().to_string().contains("modules"));

        config.modules.clear();
        let files = &[];
        let contents =
            Contents { init: &init, modules_dir: None, busybox: None, files, config: &config };
        assert!(!entries(&build(&contents).unwrap()).contains_key("bin/busybox"));
    }

    #[test]
    fn the_load_order_is_a_name_a_line() {
        let host = tempfile::tempdir().unwrap();
        assert!(load_order(host.path()).is_err());
        fs::write(host.path().join("load-order"), "vsock.ko\nvirtio.ko\n").unwrap();
        assert_eq!(load_order(host.path()).unwrap(), ["vsock.ko", "virtio.ko"]);
    }

    #[test]
    fn a_loader_holds_the_modules_in_their_order_and_no_init() {
        let host = tempfile::tempdir().unwrap();
        for (name, data) in [("init", "INIT"), ("a.ko", "A"), ("b.ko", "BB")] {
            fs::write(host.path().join(name), data).unwrap();
        }
        fs::write(host.path().join("load-order"), "b.ko\na.ko\n").unwrap();
        let archive = build_loader(&host.path().join("init"), host.path()).unwrap();
        assert_eq!(archive.len() % 512, 0);
        let entries = entries(&archive);
        let data = |name: &str| entries.get(name).map(|entry| entry.1.as_slice());
        assert_eq!(data("oriel/init"), Some(&b"INIT"[..]));
        assert_eq!(data("oriel/load-order"), Some(&b"b.ko\na.ko"[..]));
        assert_eq!(data("oriel/modules/b.ko"), Some(&b"BB"[..]));
        assert!(
            entries.keys().all(|name| name.starts_with("oriel")),
            "the rest is the other one's"
        );
        fs::write(host.path().join("load-order"), "missing.ko\n").unwrap();
        assert!(build_loader(&host.path().join("init"), host.path()).is_err());
    }

    #[test]
    fn messages_are_one_line_of_json() {
        let from_host = [
            (FromHost::Signal { number: 15 }, r#"{"signal":{"number":15}}"#),
            (FromHost::Resize { rows: 24, columns: 80 }, r#"{"resize":{"rows":24,"columns":80}}"#),
        ];
        for (message, json) in from_host {
            assert_eq!(serde_json::to_string(&message).unwrap(), json);
            assert_eq!(serde_json::from_str::<FromHost>(json).unwrap(), message);
        }
        let from_guest = [
            (FromGuest::Started, r#""started""#.to_owned()),
            (FromGuest::Exited { status: 7 }, r#"{"exited":{"status":7}}"#.to_owned()),
            (
                FromGuest::Failed { message: "a\nb".into() },
                r#"{"failed":{"message":"a\nb"}}"#.to_owned(),
            ),
        ];
        for (message, json) in from_guest {
            assert_eq!(serde_json::to_string(&message).unwrap(), json);
            assert_eq!(serde_json::from_str::<FromGuest>(&json).unwrap(), message);
        }
    }
}
