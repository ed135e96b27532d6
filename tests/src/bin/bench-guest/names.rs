//! What is done with names: looked at, made, changed, removed, listed.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use integration::jobs::numbered;

use super::{Count, repeat};

/// What [`create`] makes.
fn made(directory: &Path, number: u64) -> PathBuf {
    directory.join("work").join(numbered(number))
}

pub(crate) fn stat_all(directory: &Path, limit: Duration) -> Result<Count> {
    repeat(limit, |number| match rustix::fs::stat(directory.join(numbered(number))) {
        Ok(_) => Ok(true),
        // All of them were looked at.
        Err(rustix::io::Errno::NOENT) if number > 0 => Ok(false),
        Err(error) => Err(error.into()),
    })
}

pub(crate) fn stat_one(path: &Path, limit: Duration) -> Result<Count> {
    // Not std's, which asks for the birth time too: few programs do.
    rustix::fs::stat(path).with_context(|| path.display().to_string())?;
    repeat(limit, |_| Ok(rustix::fs::stat(path).map(|_| true)?))
}

pub(crate) fn create(directory: &Path, most: u64, limit: Duration) -> Result<Count> {
    let _ = fs::create_dir(directory.join("work"));
    let data = [0x5a; 1024];
    repeat(limit, |number| {
        if number == most {
            return Ok(false);
        }
        File::create(made(directory, number))?.write_all(&data)?;
        Ok(true)
    })
}

pub(crate) fn rename(directory: &Path, limit: Duration) -> Result<Count> {
    let other = directory.join("work/renamed");
    let one = made(directory, 0);
    let count = repeat(limit, |number| {
        let (from, to) = if number % 2 == 0 { (&one, &other) } else { (&other, &one) };
        Ok(fs::rename(from, to).map(|()| true)?)
    })?;
    if other.exists() {
        fs::rename(&other, &one)?;
    }
    Ok(count)
}

/// Those that time did not suffice for are removed too, and not counted.
pub(crate) fn unlink(directory: &Path, limit: Duration) -> Result<Count> {
    let count = repeat(limit, |number| match fs::remove_file(made(directory, number)) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound && number > 0 => Ok(false),
        Err(error) => Err(error.into()),
    })?;
    fs::remove_dir_all(directory.join("work"))?;
    Ok(count)
}

pub(crate) fn list(directory: &Path, limit: Duration) -> Result<Count> {
    let start = Instant::now();
    let mut names = 0;
    loop {
        for entry in fs::read_dir(directory)? {
            entry?;
            names += 1;
        }
        if start.elapsed() >= limit {
            return Ok((names, start.elapsed()));
        }
    }
}

pub(crate) fn unpack(directory: &Path, archive: &str) -> Result<Count> {
    let target = directory.join("unpacked");
    fs::create_dir(&target)?;
    let busybox =
        if Path::new("/bin/busybox").exists() { &["/bin/busybox", "tar"][..] } else { &["tar"] };
    let start = Instant::now();
    let status = Command::new(busybox[0])
        .args(&busybox[1..])
        .arg("-xf")
        .arg(directory.join(archive))
        .arg("-C")
        .arg(&target)
        .status()?;
    let time = start.elapsed();
    ensure!(status.success(), "tar: {status}");
    let mut files = 0;
    for sub in fs::read_dir(&target)? {
        files += fs::read_dir(sub?.path())?.count() as u64;
    }
    fs::remove_dir_all(&target)?;
    Ok((files, time))
}
