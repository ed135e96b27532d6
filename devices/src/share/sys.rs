//! System calls that `rustix` has no safe form of.
#![expect(
    unsafe_code,
    reason = "raw system calls on the calling thread's identity, on descriptors and on file handles"
)]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, IntoRawFd, OwnedFd};

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

/// Gives the calling thread mounts of its own, a copy of the process's.
#[cfg(test)]
pub(super) fn unshare_mounts() -> io::Result<()> {
    // SAFETY: as above; that the thread sees other mounts than the rest does nothing to memory or descriptors.
    let result = unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) };
    Ok(result?)
}

/// Gives the host back what the allocator has of free memory, wherever it is in the heap. Takes a moment for
/// each page of it, and the allocator's locks: for when much was freed.
pub(super) fn return_free_memory() {
    // glibc keeps what is freed below something that is still used, which with many small pieces is nearly all.
    #[cfg(target_env = "gnu")]
    // SAFETY: touches nothing but free pieces of the heap, under the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
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

/// `MAX_HANDLE_SZ` of linux/exportfs.h: the longest file handle of any file system, in bytes.
pub(super) const MAX_HANDLE: usize = 128;

/// `struct file_handle` of open_by_handle_at(2) with room for the longest.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct RawHandle {
    /// Bytes of `bytes` that count.
    pub(super) len: u32,
    /// What the file system calls this form of handle.
    pub(super) kind: i32,
    pub(super) bytes: [u8; MAX_HANDLE],
}

impl RawHandle {
    /// One of these bytes, of which no file system has more than [`MAX_HANDLE`].
    pub(super) fn new(kind: i32, bytes: &[u8]) -> Self {
        let mut raw =
            Self { len: bytes.len().min(MAX_HANDLE) as u32, kind, bytes: [0; MAX_HANDLE] };
        for (to, from) in raw.bytes.iter_mut().zip(bytes) {
            *to = *from;
        }
        raw
    }
}

/// The file handle of the file behind a descriptor (name_to_handle_at(2)).
pub(super) fn name_to_handle(fd: impl AsFd) -> io::Result<RawHandle> {
    let mut handle = RawHandle { len: MAX_HANDLE as u32, kind: 0, bytes: [0; MAX_HANDLE] };
    let mut mount: libc::c_int = 0;
    // SAFETY: the kernel reads an empty path, writes at most `len` bytes to `bytes`, which has as many, the
    // two fields before it, and one int to `mount`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            fd.as_fd().as_raw_fd(),
            c"".as_ptr(),
            &raw mut handle,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if result == 0 { Ok(handle) } else { Err(io::Error::last_os_error()) }
}

/// An `O_PATH` descriptor of the file with that handle in the file system, seen through the mount, that
/// `mount` is on (open_by_handle_at(2)). `mount` must not be an `O_PATH` descriptor itself.
pub(super) fn open_by_handle(mount: impl AsFd, handle: &RawHandle) -> io::Result<OwnedFd> {
    let flags = libc::O_PATH | libc::O_CLOEXEC;
    // SAFETY: the kernel reads the struct, of whose `bytes` no more than there are: it refuses a `len` above
    // MAX_HANDLE.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_fd().as_raw_fd(),
            std::ptr::from_ref(handle),
            flags,
        )
    };
    let fd = i32::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call returned a new descriptor, which nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
