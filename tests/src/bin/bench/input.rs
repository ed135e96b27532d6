//! What the systems are given: initrds, the files that are shared, and a disk with the same files. Made on this
//! machine, which is quicker than the one that is emulated.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use integration::jobs::numbered;
use oriel_init::initramfs::Archive;

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

/// What every guest begins with.
fn archive() -> Result<Archive> {
    let mut archive = Archive::default();
    for name in ["bin", "dev", "proc", "sys", "t", "tmpfs", "tmp", "modules", "etc"] {
        archive.directory(name, 0o755)?;
    }
    // Before /dev is mounted: where the first program's output goes.
    archive.character_device("dev/console", 0o600, 5, 1)?;
    Ok(archive)
}

/// What a dynamic program is made of, as ldd(1) tells.
fn libraries(program: &str) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output().context("ldd")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.split_whitespace().filter(|word| word.starts_with('/')).map(str::to_owned).collect())
}

fn initrds(programs: &Path, input: &Path) -> Result<()> {
    let guest = std::env::current_exe()?.with_file_name("bench-guest");
    let mut archive = archive()?;
    archive.copy("init", 0o755, &guest)?;
    archive.copy("bin/fio", 0o755, &programs.join("fio"))?;
    archive.copy("bin/busybox", 0o755, &integration::busybox())?;
    let git = "/usr/bin/git";
    archive.copy("bin/git", 0o755, Path::new(git))?;
    let mut made = vec![String::new()];
    for library in libraries(git)? {
        let library = library.trim_start_matches('/').to_owned();
        for (at, _) in library.match_indices('/') {
            let directory = library[..at].to_owned();
            if !made.contains(&directory) {
                archive.directory(&directory, 0o755)?;
                made.push(directory);
            }
        }
        archive.copy(&library, 0o755, &Path::new("/").join(&library))?;
    }
    for entry in fs::read_dir(programs.join("kernel/modules"))? {
        let entry = entry?;
        let name = format!("modules/{}", entry.file_name().to_string_lossy());
        archive.copy(&name, 0o644, &entry.path())?;
    }
    fs::write(input.join("jobs.cpio"), archive.finish()?)?;

    let mut archive = self::archive()?;
    archive.copy("init", 0o755, &guest)?;
    archive.copy("bin/busybox", 0o755, &integration::busybox())?;
    archive.add("bin/true", 0o120_777, b"busybox")?;
    Ok(fs::write(input.join("true.cpio"), archive.finish()?)?)
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
    let at = text(repository.clone());
    run(&["git", "init", "-q", &at])?;
    run(&["git", "-C", &at, "add", "."])?;
    // Of files as young as the index git believes no times, and would read them.
    run(&["touch", "-d", "10 seconds", &text(repository.join(".git/index"))])?;
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
