//! What the systems are given: initrds, the files that are shared, and a disk with the same files. Made on this
//! machine, which is quicker than the one that is emulated.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use cpio::newc;
use integration::jobs::numbered;

use crate::jobs::{BIG, FILE, LISTED, NAMES};

/// Where it is put, among the programs.
pub const DIRECTORY: &str = "input";
/// Directories of the repository and of the archive that is unpacked, and files in each.
const REPOSITORY: (usize, u64) = (20, 25);
const SMALL: (usize, u64) = (10, 20);

/// Runs a program; it must go well.
pub fn run(line: &[&str]) -> Result<()> {
    let output = Command::new(line[0])
        .args(&line[1..])
        .stdin(Stdio::null())
        .output()
        .context(line[0].to_owned())?;
    ensure!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

struct Archive(File, u32);

impl Archive {
    fn new(path: &Path) -> Result<Self> {
        let mut archive = Self(File::create(path)?, 0);
        for name in ["bin", "dev", "proc", "sys", "t", "tmpfs", "tmp", "modules", "etc"] {
            archive.add(name, 0o040_755, b"")?;
        }
        // Before /dev is mounted: where the first program's output goes. The device is the console's, 5:1.
        archive.1 += 1;
        let console = newc::Builder::new("dev/console")
            .ino(archive.1)
            .mode(0o020_600)
            .rdev_major(5)
            .rdev_minor(1);
        console.write(&mut archive.0, 0).finish()?;
        Ok(archive)
    }

    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.1 += 1;
        let entry = newc::Builder::new(name).ino(self.1).mode(mode).nlink(1);
        let mut writer = entry.write(&mut self.0, u32::try_from(content.len())?);
        writer.write_all(content)?;
        writer.finish()?;
        Ok(())
    }

    fn program(&mut self, name: &str, path: &Path) -> Result<()> {
        self.add(name, 0o100_755, &fs::read(path).with_context(|| path.display().to_string())?)
    }

    fn end(self) -> Result<()> {
        newc::trailer(self.0)?;
        Ok(())
    }
}

/// What a dynamic program is made of, as ldd(1) tells.
fn libraries(program: &str) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect())
}

fn initrds(programs: &Path, input: &Path) -> Result<()> {
    let guest = std::env::current_exe()?.with_file_name("bench-guest");
    let mut archive = Archive::new(&input.join("jobs.cpio"))?;
    archive.program("init", &guest)?;
    archive.program("bin/fio", &programs.join("fio"))?;
    archive.program("bin/busybox", &integration::busybox())?;
    let git = "/usr/bin/git";
    archive.program("bin/git", Path::new(git))?;
    let mut made = vec![String::new()];
    for library in libraries(git)? {
        let library = library.trim_start_matches('/').to_owned();
        for (at, _) in library.match_indices('/') {
            let directory = library[..at].to_owned();
            if !made.contains(&directory) {
                archive.add(&directory, 0o040_755, b"")?;
                made.push(directory);
            }
        }
        archive.program(&library, &Path::new("/").join(&library))?;
    }
    for entry in fs::read_dir(programs.join("kernel/modules"))? {
        let entry = entry?;
        let name = format!("modules/{}", entry.file_name().to_string_lossy());
        archive.add(&name, 0o100_644, &fs::read(entry.path())?)?;
    }
    archive.end()?;

    let mut archive = Archive::new(&input.join("true.cpio"))?;
    archive.program("init", &guest)?;
    archive.program("bin/busybox", &integration::busybox())?;
    archive.add("bin/true", 0o120_777, b"busybox")?;
    archive.end()
}

/// `directories` with so many `files` of so many bytes each.
fn small_files(at: &Path, (directories, files): (usize, u64), size: usize) -> Result<()> {
    for directory in 0..directories {
        let directory = at.join(format!("d{directory}"));
        fs::create_dir_all(&directory)?;
        for number in 0..files {
            fs::write(directory.join(numbered(number)), vec![b'x'; size])?;
        }
    }
    Ok(())
}

fn fill_tree(tree: &Path, scratch: &Path) -> Result<()> {
    for (name, mebibytes) in [("file", FILE), ("big", BIG)] {
        let mut file = File::create(tree.join(name))?;
        for number in 0..mebibytes as u64 * 128 {
            // No page is like another.
            file.write_all(&number.to_ne_bytes().repeat(1024))?;
        }
    }
    for (name, count) in [("names", NAMES), ("listed", LISTED)] {
        fs::create_dir(tree.join(name))?;
        for number in 0..count {
            File::create(tree.join(name).join(numbered(number)))?;
        }
    }
    let text = |path: PathBuf| path.display().to_string();
    let repository = tree.join("repository");
    small_files(&repository, REPOSITORY, 16)?;
    let at = text(repository);
    run(&["git", "init", "-q", &at])?;
    run(&["git", "-C", &at, "add", "."])?;
    let small = scratch.join("small");
    small_files(&small, SMALL, 2048)?;
    run(&["tar", "-cf", &text(tree.join("small.tar")), "-C", &text(small), "."])
}

/// Makes all of it anew.
pub fn prepare(programs: &Path) -> Result<()> {
    let input = programs.join(DIRECTORY);
    if input.exists() {
        fs::remove_dir_all(&input)?;
    }
    fs::create_dir(&input)?;
    initrds(programs, &input)?;
    let scratch = tempfile::Builder::new().prefix("work").tempdir_in(programs)?;
    let tree = scratch.path().join("tree");
    fs::create_dir(&tree)?;
    fill_tree(&tree, scratch.path())?;
    let text = |path: PathBuf| path.display().to_string();
    let (tree, raw) = (text(tree), scratch.path().join("raw"));
    run(&["tar", "-cf", &text(input.join("tree.tar")), "-C", &tree, "."])?;
    File::create(&raw)?.set_len(1 << 30)?;
    run(&["/sbin/mkfs.ext4", "-q", "-F", "-d", &tree, &text(raw.clone())])?;
    run(&["qemu-img", "convert", "-O", "qcow2", &text(raw), &text(input.join("base.qcow2"))])
}
