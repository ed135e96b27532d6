//! Locks of open file descriptions, and the alarm that gets a thread out of waiting for one.
#![expect(unsafe_code, reason = "fcntl(2) with a struct, timers, and a signal mask")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use super::ranges::{Kind, OFFSET_MAX, Span};
use crate::fuse::{Errno, Result};
use crate::kick;

/// How often an alarm rings until it is heard. The first may come just before the thread goes to sleep and
/// then wakes nobody.
const ALARM_INTERVAL_NS: i64 = 1_000_000;

fn record(span: Span) -> libc::flock {
    let kind = match span.kind {
        Some(Kind::Read) => libc::F_RDLCK,
        Some(Kind::Write) => libc::F_WRLCK,
        None => libc::F_UNLCK,
    };
    // Both fit: a span ends at `i64::MAX` at most. A length of 0 is "to the end".
    let len = if span.last >= OFFSET_MAX { 0 } else { span.last - span.first + 1 };
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: span.first as libc::off_t,
        l_len: len as libc::off_t,
        // Must be 0 for locks of a description.
        l_pid: 0,
    }
}

fn lock(fd: BorrowedFd<'_>, command: libc::c_int, span: Span) -> Result<()> {
    let record = record(span);
    // SAFETY: both commands read one `struct flock`, which lives until the call returns.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), command, &record) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error().into()) }
}

/// Sets or takes away a lock of the open file description.
///
/// # Errors
///
/// `EAGAIN` when another one has a lock that is against it; the host's.
pub(super) fn set(fd: BorrowedFd<'_>, span: Span) -> Result<()> {
    lock(fd, libc::F_OFD_SETLK, span)
}

/// The same, and waits for it.
///
/// # Errors
///
/// `EINTR` after a signal; the host's.
pub(super) fn wait(fd: BorrowedFd<'_>, span: Span) -> Result<()> {
    lock(fd, libc::F_OFD_SETLKW, span)
}

/// The first lock of anybody else that is against `span`. The host's process id is with it where the lock is
/// one of a process, and not of a description.
///
/// # Errors
///
/// The host's.
pub(super) fn test(fd: BorrowedFd<'_>, span: Span) -> Result<Option<(Span, Option<i32>)>> {
    let mut record = record(span);
    // SAFETY: the command reads and writes one `struct flock`.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &mut record) };
    if result != 0 {
        return Err(io::Error::last_os_error().into());
    }
    let kind = match i32::from(record.l_type) {
        libc::F_UNLCK => return Ok(None),
        libc::F_RDLCK => Kind::Read,
        libc::F_WRLCK => Kind::Write,
        _ => return Err(Errno::IO),
    };
    let number = |number: libc::off_t| u64::try_from(number).map_err(|_| Errno::IO);
    let first = number(record.l_start)?;
    let last = match number(record.l_len)? {
        0 => OFFSET_MAX,
        len => first.checked_add(len - 1).ok_or(Errno::IO)?,
    };
    let holder = (record.l_pid > 0).then_some(record.l_pid);
    Ok(Some((Span { first, last, kind: Some(kind) }, holder)))
}

/// Interrupts the system call that the thread which made it is in, or is about to enter.
pub(super) struct Alarm(libc::timer_t);

// SAFETY: a timer is a number of the process's; the system calls on it may be made by any thread.
unsafe impl Send for Alarm {}

impl Alarm {
    /// An alarm for the calling thread, silent at first. Call [`kick::prepare`] before.
    ///
    /// # Errors
    ///
    /// The host's; `EAGAIN` when the user has too many timers and pending signals (`RLIMIT_SIGPENDING`).
    pub(super) fn new() -> io::Result<Self> {
        // SAFETY: plain integers and a pointer that is not used; all zeros is a value of it.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = kick::signal();
        event.sigev_notify_thread_id = rustix::thread::gettid().as_raw_nonzero().get();
        let mut timer = std::ptr::null_mut();
        // SAFETY: both point to values that live until the calls return; the signal set is made by
        // `sigemptyset` before it is read. The mask is the calling thread's own.
        unsafe {
            let mut signals = std::mem::zeroed();
            libc::sigemptyset(&mut signals);
            libc::sigaddset(&mut signals, kick::signal());
            let masked = libc::pthread_sigmask(libc::SIG_UNBLOCK, &signals, std::ptr::null_mut());
            if masked != 0 {
                return Err(io::Error::from_raw_os_error(masked));
            }
            if libc::timer_create(libc::CLOCK_MONOTONIC, &mut event, &mut timer) != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(Self(timer))
    }

    /// Rings at once, and again and again until the alarm is dropped.
    pub(super) fn ring(&self) {
        let time = libc::itimerspec {
            it_interval: libc::timespec { tv_sec: 0, tv_nsec: ALARM_INTERVAL_NS },
            it_value: libc::timespec { tv_sec: 0, tv_nsec: 1 },
        };
        // SAFETY: the timer is there until `drop`, and the time is read only.
        let result = unsafe { libc::timer_settime(self.0, 0, &time, std::ptr::null_mut()) };
        if result != 0 {
            log::error!("an alarm does not ring: {}", io::Error::last_os_error());
        }
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: made by `new` and deleted only here.
        unsafe { libc::timer_delete(self.0) };
    }
}
