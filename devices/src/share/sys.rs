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

/// Drops the supplementary groups of the calling thread (and of no other).
pub(super) fn drop_groups() -> io::Result<()> {
    // SAFETY: a count of 0 reads nothing through the pointer.
    let result = unsafe { libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<libc::gid_t>()) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
