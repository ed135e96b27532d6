//! What the host mounts below a shared directory, both where it is reached by handles and where by names. Device
//! numbers are in the tests of guests: only virtio-fs asks for mounts of its own.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use devices::share::{CachePolicy, DaxPolicy, Options};
use integration::Door;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_remount, unmount};

/// `cache=auto` keeps names for a second; the kernel counts it in ticks.
const A_SECOND_IS_OVER: Duration = Duration::from_millis(1050);

/// A file system of the host's, mounted until this is dropped.
struct Mounted(PathBuf);

impl Mounted {
    fn new(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        mount("none", &path, "tmpfs", MountFlags::empty(), c"mode=755").unwrap();
        fs::write(path.join("file"), "mounted").unwrap();
        Self(path)
    }

    /// As umount(8) does it. The guest's kernel closes files behind a process's back.
    fn unmount(self) {
        let start = Instant::now();
        while let Err(error) = unmount(&self.0, UnmountFlags::empty()) {
            assert!(start.elapsed().as_secs() < 5, "{error}");
            sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

fn door(directory: &Path, file_handles: bool) -> Door {
    let mut options = Options::new(directory);
    options.dax = DaxPolicy::Never;
    options.cache = CachePolicy::Auto;
    options.file_handles = file_handles;
    Door::mount(options).unwrap()
}

#[test]
fn each_mount_below_has_its_own_files_and_is_read_only_if_the_host_says_so() {
    for file_handles in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let sub = Mounted::new(directory.path().join("sub"));
        let inner = Mounted::new(directory.path().join("sub/inner"));
        let door = door(directory.path(), file_handles);
        let guest = |name: &str| door.path().join(name);
        // The same number in two file systems, and two files all the same.
        let number = |name| fs::metadata(guest(name)).unwrap().ino();
        assert_eq!(number("sub/file"), number("sub/inner/file"));
        fs::write(guest("sub/inner/file"), "changed").unwrap();
        assert_eq!(fs::read(guest("sub/file")).unwrap(), b"mounted");

        mount_remount(&inner.0, MountFlags::RDONLY | MountFlags::BIND, c"").unwrap();
        let refused = fs::write(guest("sub/inner/file"), "again").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
        let refused = fs::create_dir(guest("sub/inner/d")).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
        fs::write(guest("sub/file"), "again").unwrap();
        inner.unmount();
        sub.unmount();
        assert!(door.failures().is_empty());
    }
}

#[test]
fn with_auto_what_the_host_mounts_and_unmounts_is_seen_within_a_second() {
    for file_handles in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        fs::create_dir(directory.path().join("sub")).unwrap();
        fs::write(directory.path().join("sub/covered"), "covered").unwrap();
        let door = door(directory.path(), file_handles);
        let guest = |name: &str| door.path().join(name);
        for _ in 0..2 {
            assert_eq!(fs::read(guest("sub/covered")).unwrap(), b"covered");
            let sub = Mounted::new(directory.path().join("sub"));
            sleep(A_SECOND_IS_OVER);
            assert_eq!(fs::read(guest("sub/file")).unwrap(), b"mounted");
            // The guest knows files of it. The host's umount(8) works all the same.
            sub.unmount();
            sleep(A_SECOND_IS_OVER);
            let gone = fs::read(guest("sub/file")).unwrap_err();
            assert_eq!(gone.kind(), ErrorKind::NotFound);
        }
        assert!(door.failures().is_empty());
    }
}
