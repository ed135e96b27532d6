//! The few system calls that neither std nor rustix offers, each behind a safe function.
#![expect(unsafe_code, reason = "system calls through libc, and code between fork and exec")]

use std::ffi::c_int;
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::process::{Gid, Uid};

fn check(result: c_int) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Sends a signal, real-time ones included, to a process group.
pub(crate) fn signal_group(leader: i32, number: c_int) -> io::Result<()> {
    // -1 would be everyone; it is this process's own number, and no child's.
    if leader <= 1 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: kill takes no pointers.
    check(unsafe { libc::kill(-leader, number) })
}

/// Kills every process but this one and the kernel's threads.
pub(crate) fn kill_all() -> io::Result<()> {
    // SAFETY: kill takes no pointers; for PID 1, -1 means all others.
    check(unsafe { libc::kill(-1, libc::SIGKILL) })
}

/// Sets the loopback interface up. The kernel gives it 127.0.0.1 and ::1 by itself.
pub(crate) fn loopback_up() -> io::Result<()> {
    // Any socket will do to reach the interfaces; it is bound to nothing that would need one.
    let socket = UdpSocket::bind(("0.0.0.0", 0))?;
    // SAFETY: an ifreq of zeros is a valid one: all its fields are numbers.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = from.cast_signed();
    }
    // SAFETY: SIOCGIFFLAGS reads and writes one ifreq, which `request` is.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) })?;
    // SAFETY: SIOCGIFFLAGS has filled in ifru_flags; all members of the union are numbers anyway.
    let flags = unsafe { request.ifr_ifru.ifru_flags };
    request.ifr_ifru.ifru_flags = flags | libc::IFF_UP as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which `request` is.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) })
}

/// Makes `command` start in a session of its own, with its standard input as the controlling terminal if
/// asked, and as the given user.
pub(crate) fn start_as(
    command: &mut Command,
    terminal: bool,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
) {
    let prepare = move || {
        rustix::process::setsid()?;
        if terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        // The calls for one thread are enough: the child has one. Groups first, while it still may.
        rustix::thread::set_thread_groups(&groups)?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only: it neither allocates (`groups` was
    // allocated before) nor takes a lock that another thread could have held at the fork.
    unsafe { command.pre_exec(prepare) };
}
