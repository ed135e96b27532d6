//! System calls that `rustix` has no safe form of.
#![expect(unsafe_code, reason = "raw system calls on the calling thread's identity")]

use std::io;

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
