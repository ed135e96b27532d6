//! File systems for tests: those that this machine lets the test make.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A file system mounted on a directory, until this is dropped.
pub(crate) struct Mounted(PathBuf);

impl Mounted {
    /// Makes the directory and mounts a file system without a disk on it, such as tmpfs. None where that is
    /// not allowed.
    pub(crate) fn new(path: &Path, kind: &str) -> Option<Self> {
        Self::of(kind, path, kind)
    }

    fn of(source: &str, path: &Path, kind: &str) -> Option<Self> {
        std::fs::create_dir(path).unwrap();
        mount(source, path, kind, MountFlags::empty(), None).ok().map(|()| Self(path.to_owned()))
    }

    /// Makes the directory and mounts an overlay over `lower` on it, nothing of which can be written to.
    pub(crate) fn overlay(path: &Path, lower: &Path) -> Option<Self> {
        std::fs::create_dir(path).unwrap();
        let empty = lower.join("empty");
        std::fs::create_dir_all(&empty).unwrap();
        let options = format!("lowerdir={}:{}", lower.display(), empty.display());
        let options = std::ffi::CString::new(options).unwrap();
        let flags = MountFlags::empty();
        mount("overlay", path, "overlay", flags, Some(&*options)).ok().map(|()| Self(path.into()))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// A file system on a disk that is a file.
pub(crate) struct Disk {
    mounted: Option<Mounted>,
    device: String,
    // Dropped last: the disk is in it.
    directory: tempfile::TempDir,
}

impl Disk {
    /// Makes one with a program `mkfs.KIND`, on a disk with sectors of so many bytes. None where there is no
    /// such program, no loop device, or no right to use it.
    pub(crate) fn new(kind: &str, sector: u32) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let image = directory.path().join("image");
        // XFS wants 300 MiB; what is not written costs nothing.
        std::fs::File::create(&image).unwrap().set_len(512 << 20).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show", "--sector-size", &sector.to_string()])
            .arg(&image)
            .output()
            .ok()
            .filter(|output| output.status.success())?;
        let device = String::from_utf8(output.stdout).unwrap().trim().to_owned();
        let mut disk = Self { mounted: None, device, directory };
        let made =
            Command::new(format!("mkfs.{kind}")).arg("-q").arg(&disk.device).output().ok()?;
        if !made.status.success() {
            return None;
        }
        let path = disk.directory.path().join("mounted");
        disk.mounted = Some(Mounted::of(&disk.device, &path, kind)?);
        Some(disk)
    }

    pub(crate) fn path(&self) -> &Path {
        self.mounted.as_ref().unwrap().path()
    }

    /// Bytes of it that were ever written.
    pub(crate) fn reached(&self) -> u64 {
        std::fs::metadata(self.directory.path().join("image")).unwrap().blocks() * 512
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.mounted = None;
        let _ = Command::new("losetup").args(["--detach", &self.device]).output();
    }
}
