//! Mounts of this process alone.
//!
//! The root directory is a tmpfs with nothing in it but the places where the rest is mounted:
//!
//! | path | what |
//! |---|---|
//! | `/.share/N` | the N-th shared directory with all that is mounted below it; read-only if the share is |
//! | `/proc/self/fd` | this process's descriptors: the share opens files anew by them |
//! | the places | directories of sockets and logs, under the names that they have on the host, without what is mounted below |
//!
//! `..` leads out of none of them. What the host mounts below a shared directory later appears there as well, and what
//! it unmounts goes, if the mount that the directory is on is shared (mount_namespaces(7)), as systemd makes all.
#![expect(unsafe_code, reason = "unshare(2) and mount_setattr(2)")]

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, fchdir, getcwd, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::Shared;

/// Where the new root is put together: every host has the directory, and all that is needed of it is taken before.
const BUILT_AT: &str = "/proc";
/// A name that no place has.
const SHARES: &str = "/.share";
const DESCRIPTORS: &str = "/proc/self/fd";

/// The root directory holds some empty directories and nothing else.
const ROOT_SIZE: &str = "1m";

/// Nothing on these mounts is run, and no device is opened.
const HARMLESS: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NOSUID
    .union(MountAttrFlags::MOUNT_ATTR_NODEV)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Goes into a mount namespace with the shared directories, and with the directories of `places`, which are absolute,
/// under the names they have. Says where each of the shares is.
///
/// # Errors
///
/// When there are several threads; the host's.
pub fn enter(shares: &[Shared<'_>], places: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let threads = fs::read_dir("/proc/self/task").context("/proc/self/task")?.count();
    ensure!(threads == 1, "there are {threads} threads already");
    // One that was removed has no name.
    let cwd = getcwd(Vec::new()).unwrap_or_else(|_| c"/".to_owned());
    let cwd = PathBuf::from(OsString::from_vec(cwd.into_bytes()));
    // SAFETY: there is one thread, and no table of descriptors is unshared. From here on names of files mean what
    // this function makes of them, which is its purpose.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context("unshare(CLONE_NEWNS)")?;
    // What happens to mounts here is not to happen on the host, but the other way round.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .map_err(|error| root_must_be_a_mount(error, "propagation of mounts"))?;

    let mut trees = Vec::new();
    let mut inside = Vec::new();
    for (number, share) in shares.iter().enumerate() {
        let at = PathBuf::from(format!("{SHARES}/{number}"));
        trees.push((Tree::of(share.host, share.read_only, true)?, at.clone()));
        inside.push(at);
    }
    trees.push((Tree::of(Path::new(DESCRIPTORS), true, false)?, PathBuf::from(DESCRIPTORS)));
    // The shorter name first: one may be below another.
    let mut places = places.to_vec();
    places.sort();
    places.dedup();
    for place in places {
        ensure!(
            may_be_place(&place),
            "{}: sockets cannot be in this directory; name one of your own",
            place.display()
        );
        trees.push((Tree::of(&place, false, false)?, place));
    }

    build_root()?;
    // So that relative names of sockets mean what they meant; before there is a directory of the host's in the new root.
    let _ = fs::create_dir_all(built(&cwd));
    for (tree, at) in trees {
        tree.attach(&at)?;
    }
    change_root()?;
    if chdir(&cwd).is_err() {
        chdir("/").context("working directory")?;
    }
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV, c"")
        .context("root directory")?;
    Ok(inside)
}

/// Whether a directory can be in the new root under its name: not the root itself, however it is called, and nothing that
/// would lie over what else is there.
fn may_be_place(place: &Path) -> bool {
    let real = place.canonicalize();
    let is_root = |path: &Path| path.parent().is_none();
    !(place.components().any(|part| part == Component::ParentDir)
        || place.starts_with("/proc")
        || place.starts_with(SHARES)
        || is_root(place)
        || real.is_ok_and(|real| is_root(&real)))
}

/// A path of the new root, while it is built.
fn built(path: &Path) -> PathBuf {
    Path::new(BUILT_AT).join(path.strip_prefix("/").unwrap_or(path))
}

/// A copy of a directory, with all that is mounted below it or without, mounted nowhere yet.
struct Tree {
    mount: OwnedFd,
}

impl Tree {
    fn of(path: &Path, read_only: bool, mut recursive: bool) -> Result<Self> {
        let mount = loop {
            let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
            flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
            match open_tree(CWD, path, flags) {
                // Who is not root on the host may not look below what is mounted there (mount_namespaces(7)).
                Err(Errno::INVAL) if !recursive => recursive = true,
                opened => break opened.with_context(|| path.display().to_string())?,
            }
        };
        let mut attributes = HARMLESS;
        attributes.set(MountAttrFlags::MOUNT_ATTR_RDONLY, read_only);
        match set_attributes(&mount, attributes) {
            // Linux 5.11 and older: the share refuses what the mount would.
            Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {}
            set => set.with_context(|| path.display().to_string())?,
        }
        Ok(Self { mount })
    }

    fn attach(&self, at: &Path) -> Result<()> {
        let target = built(at);
        let attach = || -> io::Result<()> {
            fs::create_dir_all(&target)?;
            let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
            Ok(move_mount(&self.mount, c"", CWD, &target, flags)?)
        };
        attach().with_context(|| format!("{} in the new root", at.display()))
    }
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttr {
    set: u64,
    clear: u64,
    propagation: u64,
    userns: u64,
}

/// Sets attributes of a tree and of all that is mounted below it (mount_setattr(2)).
fn set_attributes(tree: impl AsFd, attributes: MountAttrFlags) -> io::Result<()> {
    let attributes =
        MountAttr { set: attributes.bits().into(), clear: 0, propagation: 0, userns: 0 };
    // SAFETY: the kernel reads an empty path and one `struct mount_attr` of the size that it is told.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<MountAttr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Mounts an empty file system where the new root is built.
fn build_root() -> Result<()> {
    let build = || -> rustix::io::Result<()> {
        let new = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in [("size", ROOT_SIZE), ("mode", "755")] {
            fsconfig_set_string(&new, key, value)?;
        }
        fsconfig_create(&new)?;
        let root = fsmount(&new, FsMountFlags::FSMOUNT_CLOEXEC, HARMLESS)?;
        move_mount(&root, c"", CWD, BUILT_AT, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
    };
    build().context("a tmpfs for the new root")
}

/// Makes what was built the root directory, and lets go of the one before.
fn change_root() -> Result<()> {
    let change = || -> rustix::io::Result<()> {
        let flags =
            rustix::fs::OFlags::PATH | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        let before = rustix::fs::open("/", flags, rustix::fs::Mode::empty())?;
        chdir(BUILT_AT)?;
        // The old root is then mounted over the new one.
        pivot_root(".", ".")?;
        fchdir(&before)?;
        unmount(".", UnmountFlags::DETACH)?;
        chdir("/")
    };
    change().map_err(|error| root_must_be_a_mount(error, "pivot_root"))
}

/// As in a chroot it is not, and in an initramfs.
fn root_must_be_a_mount(error: Errno, what: &'static str) -> anyhow::Error {
    match error {
        Errno::INVAL => anyhow::anyhow!("{what}: the root directory is no mount, or the first one"),
        error => anyhow::Error::from(error).context(what),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::may_be_place;

    #[test]
    fn the_root_directory_is_no_place_whatever_it_is_called() {
        let directory = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/", directory.path().join("root")).unwrap();
        assert!(may_be_place(directory.path()));
        for name in ["/", "/tmp/..", "/proc/self", "/.share/0"].map(Path::new) {
            assert!(!may_be_place(name), "{}", name.display());
        }
        assert!(!may_be_place(&directory.path().join("root")));
    }
}
