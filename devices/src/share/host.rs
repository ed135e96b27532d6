//! The few ways in which host files are found and opened. There are no others in the share.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{
    AtFlags, CWD, Mode, OFlags, ResolveFlags, Statx, StatxFlags, openat, openat2, statx,
};
use rustix::path::DecInt;

use super::ITSELF;
use crate::fuse::{Errno, Result};

/// How a name is resolved: to an entry of the directory, or not at all. The decoder lets only single
/// components through; this is the second wall.
const RESOLVE: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_MAGICLINKS).union(ResolveFlags::NO_SYMLINKS);

/// `openat2` with `RESOLVE_BENEATH` answers `EAGAIN` when a rename on the host raced with it. So many tries,
/// then the guest is told.
const TRIES: usize = 16;

/// `/proc/self/fd`, through which a descriptor is opened anew or named where only a path will do.
pub(super) struct Host {
    proc_fd: OwnedFd,
}

/// `STATX_MNT_ID_UNIQUE` of linux/stat.h (Linux 6.8): `stx_mnt_id` is then a number that no other mount ever
/// gets. Older kernels give the one that is used again after an unmount.
const MNT_ID_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// Attributes, birth time and mount of the file behind a descriptor.
pub(super) fn stat(fd: impl AsFd) -> Result<Statx> {
    let mask =
        StatxFlags::BASIC_STATS | StatxFlags::BTIME | StatxFlags::MNT_ID.union(MNT_ID_UNIQUE);
    Ok(statx(fd, c"", ITSELF, mask)?)
}

/// Opens `name` in `directory`.
fn open_beneath(directory: impl AsFd, name: &CStr, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    resolve(directory, name, flags, mode, RESOLVE)
}

fn resolve(
    directory: impl AsFd,
    name: &CStr,
    flags: OFlags,
    mode: Mode,
    resolve: ResolveFlags,
) -> Result<OwnedFd> {
    again(|| openat2(&directory, name, flags | OFlags::CLOEXEC, mode, resolve))
}

/// Opens a file, and does so again when a rename or a signal came between.
fn again(open: impl Fn() -> rustix::io::Result<OwnedFd>) -> Result<OwnedFd> {
    let mut tries = 0;
    loop {
        tries += 1;
        match open() {
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) if tries < TRIES => {}
            other => return Ok(other?),
        }
    }
}

/// Finds `name` in `directory`: an `O_PATH` descriptor of the entry itself, be it a symlink or a device.
pub(super) fn find(directory: impl AsFd, name: &CStr) -> Result<OwnedFd> {
    open_beneath(directory, name, OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())
}

/// The same, but neither what is mounted there nor, when it is a path, through what is mounted on the way.
///
/// # Errors
///
/// `EXDEV` for what is mounted.
fn find_within(directory: impl AsFd, path: &CStr) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW;
    resolve(directory, path, flags, Mode::empty(), RESOLVE.union(ResolveFlags::NO_XDEV))
}

/// Finds `name` in `directory` for who must not wait: the file systems of mounts need not answer soon.
///
/// # Errors
///
/// [`Errno::WOULD_WAIT`] for what is mounted.
pub(super) fn find_unmounted(directory: impl AsFd, name: &CStr) -> Result<OwnedFd> {
    find_within(directory, name).map_err(|errno| match errno {
        Errno::XDEV => Errno::WOULD_WAIT,
        other => other,
    })
}

/// Finds a file by the names that lead to it from `directory`: like [`find`], at each step, but within one mount.
///
/// # Errors
///
/// `EXDEV` when something is mounted on the way.
pub(super) fn find_path(directory: impl AsFd, names: &[u8]) -> Result<OwnedFd> {
    find_within(directory, &CString::new(names).map_err(|_| Errno::INVAL)?)
}

/// A path of the file behind a descriptor, for system calls on attributes, which take no directory. None opens
/// the file, so that it may be of any kind. It is to be followed.
pub(super) fn path(fd: impl AsFd) -> Result<CString> {
    let number = DecInt::from_fd(&fd);
    CString::new([b"/proc/self/fd/", number.as_bytes()].concat()).map_err(|_| Errno::INVAL)
}

/// Opens the directory `name` in `directory` for reading.
pub(super) fn open_directory(directory: impl AsFd, name: &CStr) -> Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
    open_beneath(directory, name, flags, Mode::empty())
}

/// Makes the regular file `name` in `directory` and opens it; never opens one that is there.
pub(super) fn create(
    directory: impl AsFd,
    name: &CStr,
    flags: OFlags,
    mode: Mode,
) -> Result<OwnedFd> {
    let flags = flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::NOCTTY;
    open_beneath(directory, name, flags, mode)
}

/// Makes a file without a name in `directory`.
pub(super) fn create_unnamed(directory: impl AsFd, flags: OFlags, mode: Mode) -> Result<OwnedFd> {
    open_beneath(directory, c".", flags | OFlags::TMPFILE, mode)
}

impl Host {
    pub(super) fn new() -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { proc_fd: openat(CWD, c"/proc/self/fd", flags, Mode::empty())? })
    }

    /// Opens the file behind a descriptor once more, with other flags. The file is that very one, wherever
    /// its name went in the meantime.
    ///
    /// The caller has checked that it is a regular file or a directory, unless `flags` has `O_PATH`.
    pub(super) fn reopen(&self, fd: impl AsFd, flags: OFlags) -> Result<OwnedFd> {
        let flags = (flags - OFlags::NOFOLLOW) | OFlags::CLOEXEC | OFlags::NOCTTY;
        again(|| openat(&self.proc_fd, DecInt::from_fd(&fd), flags, Mode::empty()))
    }

    /// Calls `operation` with the directory and the name in it that stand for the descriptor, for system
    /// calls that take only a path. The last component is to be followed.
    pub(super) fn by_path<T>(
        &self,
        fd: impl AsFd,
        operation: impl FnOnce(&OwnedFd, &CStr) -> rustix::io::Result<T>,
    ) -> Result<T> {
        Ok(operation(&self.proc_fd, DecInt::from_fd(&fd).as_c_str())?)
    }

    /// Gives the file behind `fd` another name.
    pub(super) fn link(&self, fd: impl AsFd, directory: impl AsFd, name: &CStr) -> Result<()> {
        self.by_path(fd, |proc_fd, path| {
            rustix::fs::linkat(proc_fd, path, directory, name, AtFlags::SYMLINK_FOLLOW)
        })
    }
}
