//! Mounts of this process alone.
//!
//! The root directory is a tmpfs with nothing in it but the places where the rest is mounted:
//!
//! | path | what |
//! |---|---|
//! | `/.share/N` | the N-th shared directory with all that is mounted below it; read-only if the share is |
//! | `/proc/self/fd` | this process's descriptors: the share opens files anew by them |
//! | the places | directories of sockets and logs, under the names that they have on the host |
//!
//! `..` leads out of none of them. What the host mounts below a shared directory later appears there as well, and what
//! it unmounts goes, if the mount that the directory is on is shared (mount_namespaces(7)), as systemd makes all.
#![expect(unsafe_code, reason = "unshare(2) and mount_setattr(2)")]

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

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
    let cwd = getcwd(Vec::new()).context("working directory")?;
    let cwd = PathBuf::from(cwd.to_string_lossy().into_owned());
    // SAFETY: there is one thread, and no table of descriptors is unshared. From here on names of files mean what
    // this function makes of them, which is its purpose.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.context("unshare(CLONE_NEWNS)")?;
    // What happens to mounts here is not to happen on the host, but the other way round.
    mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC)
        .context("propagation of mounts")?;

    let mut trees = Vec::new();
    let mut inside = Vec::new();
    for (number, share) in shares.iter().enumerate() {
        let at = PathBuf::from(format!("{SHARES}/{number}"));
        trees.push((Tree::of(share.host, share.read_only)?, at.clone()));
        inside.push(at);
    }
    trees.push((Tree::of(Path::new(DESCRIPTORS), true)?, PathBuf::from(DESCRIPTORS)));
    // The shorter name first: one may be below another.
    let mut places = places.to_vec();
    places.sort();
    places.dedup();
    for place in places {
        ensure!(
            place.parent().is_some() && !place.starts_with("/proc") && !place.starts_with(SHARES),
            "{}: sockets cannot be in this directory; name one of your own",
            place.display()
        );
        trees.push((Tree::of(&place, false)?, place));
    }

    build_root()?;
    for (tree, at) in trees {
        tree.attach(&at)?;
    }
    // So that relative names of sockets mean what they meant.
    fs::create_dir_all(built(&cwd)).context("working directory")?;
    change_root()?;
    if chdir(&cwd).is_err() {
        chdir("/").context("working directory")?;
    }
    mount_remount("/", MountFlags::BIND | MountFlags::RDONLY | MountFlags::NODEV, c"")
        .context("root directory")?;
    Ok(inside)
}

/// A path of the new root, while it is built.
fn built(path: &Path) -> PathBuf {
    Path::new(BUILT_AT).join(path.strip_prefix("/").unwrap_or(path))
}

/// A copy of a directory with all that is mounted below it, mounted nowhere yet.
struct Tree {
    mount: OwnedFd,
}

impl Tree {
    fn of(path: &Path, read_only: bool) -> Result<Self> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE
            | OpenTreeFlags::OPEN_TREE_CLOEXEC
            | OpenTreeFlags::AT_RECURSIVE;
        let mount = open_tree(CWD, path, flags).with_context(|| path.display().to_string())?;
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
    change().map_err(|error| match error {
        Errno::INVAL => {
            anyhow::anyhow!("pivot_root: the root directory is no mount, or the first one")
        }
        error => error.into(),
    })
}
