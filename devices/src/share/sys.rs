//! System calls that `rustix` has no safe form of.
#![expect(
    unsafe_code,
    reason = "raw system calls on the calling thread's identity and on descriptors"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, IntoRawFd, OwnedFd};

/// An id that no user has: asks for the current one without changing it.
const UNCHANGED: u32 = u32::MAX;

fn set_id(call: libc::c_long, id: u32) -> u32 {
    // SAFETY: setfsuid and setfsgid take one number and touch no memory. They change the calling thread
    // only, which glibc's wrappers promise as well, but not its documentation.
    let before = unsafe { libc::syscall(call, id) };
    before as u32
}

/// Sets the thread's file system user id and returns the one before. Says nothing of success: see
/// [`fsuid`].
pub(super) fn set_fsuid(id: u32) -> u32 {
    set_id(libc::SYS_setfsuid, id)
}

/// Sets the thread's file system group id and returns the one before.
pub(super) fn set_fsgid(id: u32) -> u32 {
    set_id(libc::SYS_setfsgid, id)
}

/// The thread's file system user id.
pub(super) fn fsuid() -> u32 {
    set_id(libc::SYS_setfsuid, UNCHANGED)
}

/// The thread's file system group id.
pub(super) fn fsgid() -> u32 {
    set_id(libc::SYS_setfsgid, UNCHANGED)
}

/// Gives the calling thread a umask (and a working directory) of its own, a copy of the process's.
pub(super) fn unshare_umask() -> io::Result<()> {
    // SAFETY: CLONE_FS parts working directory, root and umask from the other threads' and nothing else; no
    // descriptor, no memory. Nothing in this crate names files from the working directory, and the root is
    // never changed.
    let result = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::FS) };
    Ok(result?)
}

/// Closes a descriptor and says what the file system had to say at that: some tell of a write that failed
/// only then.
pub(super) fn close(fd: OwnedFd) -> io::Result<()> {
    // SAFETY: the descriptor is owned, and given up here. It is closed whatever the result is (close(2)).
    let result = unsafe { libc::close(fd.into_raw_fd()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// `struct fsxattr` of linux/fs.h. The fields are those of ioctl_xfs_fsgetxattr(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct FsXattr {
    pub(super) xflags: u32,
    pub(super) extsize: u32,
    pub(super) nextents: u32,
    pub(super) projid: u32,
    pub(super) cowextsize: u32,
    pub(super) pad: [u32; 2],
}

impl FsXattr {
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; size_of::<Self>()] = bytes.try_into().ok()?;
        let (words, _) = bytes.as_chunks::<4>();
        let [xflags, extsize, nextents, projid, cowextsize, pad @ ..] =
            <[[u8; 4]; 7]>::try_from(words).ok()?.map(u32::from_ne_bytes);
        Some(Self { xflags, extsize, nextents, projid, cowextsize, pad })
    }

    pub(super) fn to_bytes(self) -> [u8; size_of::<Self>()] {
        let words = [
            self.xflags,
            self.extsize,
            self.nextents,
            self.projid,
            self.cowextsize,
            self.pad[0],
            self.pad[1],
        ];
        let mut bytes = [0; size_of::<Self>()];
        for (to, word) in bytes.chunks_exact_mut(4).zip(words) {
            to.copy_from_slice(&word.to_ne_bytes());
        }
        bytes
    }
}

/// `FS_IOC_FSGETXATTR`.
pub(super) fn get_fsxattr(fd: impl AsFd) -> io::Result<FsXattr> {
    let mut attributes = FsXattr::default();
    // SAFETY: the kernel writes one `struct fsxattr` to the pointer, which is to one.
    let result =
        unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), FS_IOC_FSGETXATTR, &raw mut attributes) };
    if result == 0 { Ok(attributes) } else { Err(io::Error::last_os_error()) }
}

/// `FS_IOC_FSSETXATTR`.
pub(super) fn set_fsxattr(fd: impl AsFd, attributes: &FsXattr) -> io::Result<()> {
    // SAFETY: the kernel reads one `struct fsxattr` from the pointer, which is to one.
    let result = unsafe {
        libc::ioctl(fd.as_fd().as_raw_fd(), FS_IOC_FSSETXATTR, std::ptr::from_ref(attributes))
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// The numbers of linux/fs.h, as the system call takes them.
const FS_IOC_FSGETXATTR: libc::c_ulong = 0x801c_581f;
const FS_IOC_FSSETXATTR: libc::c_ulong = 0x401c_5820;
