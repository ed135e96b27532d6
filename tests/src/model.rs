//! Random operations on a tree of files, and what the tree looks like: for comparing what several machines see of one.

use std::fs::{self, OpenOptions};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::tree::Random;

/// Names at each level: few, so that those who work at once meet.
const DIRECTORIES: u64 = 4;
const FILES: u64 = 8;

/// The largest file in bytes: some pages.
const LARGEST: u64 = 12 << 10;

/// Does so many operations below `root`, which follow from `seed`. What fails, because somebody else was faster or
/// it was nothing that could be done, is no error.
pub fn operate(root: &Path, seed: u64, count: u64) {
    let mut random = Random::new(seed);
    for _ in 0..count {
        let _ = operation(root, &mut random);
    }
}

fn operation(root: &Path, random: &mut Random) -> io::Result<()> {
    let path = file(root, random);
    match random.below(20) {
        0..5 => fs::write(&path, content(random)),
        5..7 => OpenOptions::new().append(true).open(&path)?.write_all(&content(random)),
        7 => {
            let opened = OpenOptions::new().write(true).open(&path)?;
            opened.write_all_at(&content(random), random.below(LARGEST))
        }
        8..11 => fs::rename(&path, file(root, random)),
        11 => fs::rename(directory(root, random), directory(root, random)),
        12..14 => fs::remove_file(&path),
        14 => OpenOptions::new().write(true).open(&path)?.set_len(random.below(LARGEST)),
        15 => {
            let mode = 0o600 | random.number() as u32 & 0o177;
            fs::set_permissions(&path, fs::Permissions::from_mode(mode))
        }
        16 => std::os::unix::fs::symlink(format!("nowhere/{:x}", random.number()), &path),
        17..19 => fs::create_dir(directory(root, random)),
        _ => fs::remove_dir(directory(root, random)),
    }
}

fn directory(root: &Path, random: &mut Random) -> PathBuf {
    let mut path = root.to_owned();
    for _ in 0..=random.below(2) {
        path.push(format!("d{}", random.below(DIRECTORIES)));
    }
    path
}

fn file(root: &Path, random: &mut Random) -> PathBuf {
    let within = if random.below(3) == 0 { root.to_owned() } else { directory(root, random) };
    within.join(format!("f{}", random.below(FILES)))
}

fn content(random: &mut Random) -> Vec<u8> {
    let length = random.below(LARGEST) >> random.below(12);
    vec![random.number() as u8; length as usize]
}

/// What is below `root`: a line for each file, with its name, type, mode, size and contents.
///
/// # Errors
///
/// When something that is listed is not there, or cannot be read.
pub fn look(root: &Path) -> io::Result<Vec<String>> {
    let mut lines = Vec::new();
    look_into(root, Path::new(""), &mut lines)?;
    Ok(lines)
}

fn look_into(root: &Path, below: &Path, lines: &mut Vec<String>) -> io::Result<()> {
    let here = root.join(below);
    let mut names: Vec<_> = fs::read_dir(&here)?
        .map(|entry| entry.map(|entry| entry.file_name()))
        .collect::<io::Result<_>>()?;
    names.sort();
    for name in names {
        let path = here.join(&name);
        let inside = below.join(&name);
        let named = |error| io::Error::other(format!("{}: {error}", inside.display()));
        let metadata = fs::symlink_metadata(&path).map_err(named)?;
        let kind = metadata.file_type();
        let (size, content) = if kind.is_symlink() {
            (metadata.size(), fs::read_link(&path).map_err(named)?.display().to_string())
        } else if kind.is_file() {
            let bytes = fs::read(&path).map_err(named)?;
            (metadata.size(), format!("{} {}", bytes.len(), digest(&bytes)))
        } else {
            (0, String::new())
        };
        let name = String::from_utf8_lossy(inside.as_os_str().as_bytes()).into_owned();
        lines.push(format!("{name} {:o} {size} {content}", metadata.mode()));
        if kind.is_dir() {
            look_into(root, &inside, lines)?;
        }
    }
    // A name that is asked for, and not there, is remembered as well.
    for number in 0..FILES {
        let path = here.join(format!("f{number}"));
        let line = format!("{}f{number} ", below.join("").display());
        if path.symlink_metadata().is_ok() != lines.iter().any(|other| other.starts_with(&line)) {
            return Err(io::Error::other(format!("{line}is listed or there, and not both")));
        }
    }
    Ok(())
}

/// What differs when something differs.
pub fn digest(of: &impl Hash) -> String {
    let mut hasher = DefaultHasher::new();
    of.hash(&mut hasher);
    format!("{:016x}", hasher.finish())
}
