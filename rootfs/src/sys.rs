//! The few system calls that neither std nor rustix offers, each behind a safe function.
#![expect(unsafe_code, reason = "system calls through libc, and code between fork and exec")]

use std::ffi::{CStr, c_int};
use std::io;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use oriel_init::container::{Capabilities, Confinement, Limit};
use rustix::process::{Gid, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

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

/// `RLIMIT_`, as libc has it in C libraries that differ about its type.
fn limit(limit: &Limit) -> io::Result<()> {
    let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
    // SAFETY: setrlimit reads one rlimit, which lives across the call.
    check(unsafe { libc::setrlimit(limit.resource as _, &raw const value) })
}

/// One call of prctl(2) that takes numbers alone.
fn prctl(option: c_int, first: u64, second: u64) -> io::Result<()> {
    // SAFETY: the options that are used here take no pointers; the kernel wants zeros for what is not used.
    check(unsafe { libc::prctl(option, first, second, 0u64, 0u64) })
}

/// Linux has some 40 capabilities, and numbers for 64.
const CAPABILITIES: u64 = 64;

/// Drops what may not be had through any program. It takes CAP_SETPCAP.
fn drop_bounding(kept: u64) -> io::Result<()> {
    for number in (0..CAPABILITIES).filter(|number| kept >> number & 1 == 0) {
        match prctl(libc::PR_CAPBSET_DROP, number, 0) {
            // The kernel has no more.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
            dropped => dropped?,
        }
    }
    Ok(())
}

fn set_capabilities(sets: &Capabilities) -> io::Result<()> {
    let set = CapabilitySet::from_bits_retain;
    rustix::thread::set_capabilities(
        None,
        CapabilitySets {
            effective: set(sets.effective),
            permitted: set(sets.permitted),
            inheritable: set(sets.inheritable),
        },
    )?;
    for number in (0..CAPABILITIES).filter(|number| sets.ambient >> number & 1 == 1) {
        prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, number)?;
    }
    Ok(())
}

/// Makes `command` start in a session of its own, with its standard input as the controlling terminal if
/// asked, as the given user, and with what it may do.
pub(crate) fn start_as(
    command: &mut Command,
    terminal: bool,
    uid: Uid,
    gid: Gid,
    groups: Vec<Gid>,
    confinement: &Confinement,
) {
    let Confinement { umask, limits, capabilities, no_new_privileges, .. } = confinement.clone();
    let prepare = move || {
        rustix::process::setsid()?;
        if terminal {
            rustix::process::ioctl_tiocsctty(rustix::stdio::stdin())?;
        }
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(umask.unwrap_or(0o022)));
        // While it may still raise them.
        limits.iter().try_for_each(limit)?;
        if let Some(sets) = &capabilities {
            drop_bounding(sets.bounding)?;
            // Another user keeps what is set below.
            prctl(libc::PR_SET_KEEPCAPS, 1, 0)?;
        }
        // The calls for one thread are enough: the child has one. Groups first, while it still may.
        rustix::thread::set_thread_groups(&groups)?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        if let Some(sets) = &capabilities {
            set_capabilities(sets)?;
        }
        if no_new_privileges {
            rustix::thread::set_no_new_privs(true)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only: it neither allocates (`groups` and `limits`
    // were allocated before) nor takes a lock that another thread could have held at the fork.
    unsafe { command.pre_exec(prepare) };
}

/// `struct mount_attr` of linux/mount.h.
#[repr(C)]
struct MountAttributes {
    set: u64,
    clear: u64,
    propagation: u64,
    user_namespace: u64,
}

/// The numbers of linux/mount.h.
const MOUNT_ATTR_RDONLY: u64 = 0x1;
const MOUNT_ATTR_NOSUID: u64 = 0x2;
const MOUNT_ATTR_NODEV: u64 = 0x4;
const MOUNT_ATTR_NOEXEC: u64 = 0x8;

/// The directory at a path, open for reading, by a mount that is nowhere and through which nothing can be changed.
///
/// # Errors
///
/// The kernel's; `ENOSYS` before Linux 5.12.
pub(crate) fn read_only_twin(path: &CStr) -> io::Result<OwnedFd> {
    use rustix::mount::OpenTreeFlags as Flags;
    let flags = Flags::OPEN_TREE_CLONE | Flags::OPEN_TREE_CLOEXEC;
    let mount = rustix::mount::open_tree(rustix::fs::CWD, path, flags)?;
    let attributes = MountAttributes {
        set: MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC | MOUNT_ATTR_RDONLY,
        clear: 0,
        propagation: 0,
        user_namespace: 0,
    };
    // SAFETY: the kernel reads an empty path and a struct of the length that is given; both live across the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<MountAttributes>(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    use rustix::fs::OFlags;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(mount, c".", flags, rustix::fs::Mode::empty())?)
}

/// `struct file_handle` of open_by_handle_at(2) as FUSE has them (`FILEID_INO64_GEN` of linux/exportfs.h): the upper and
/// the lower half of a node id, and a generation, which Oriel's nodes have none of.
#[repr(C)]
struct FuseHandle {
    bytes: u32,
    kind: i32,
    node: [u32; 2],
    generation: u32,
}

const FILEID_INO64_GEN: i32 = 0x81;

/// Opens a file of a FUSE file system by its node id, through the mount that `mount` is on, if the kernel has it in
/// memory.
///
/// # Errors
///
/// `ESTALE` when it has not; the kernel's.
pub(crate) fn open_fuse_node(
    mount: BorrowedFd<'_>,
    node: u64,
    flags: rustix::fs::OFlags,
) -> Result<OwnedFd, rustix::io::Errno> {
    let handle = FuseHandle {
        bytes: 12,
        kind: FILEID_INO64_GEN,
        node: [(node >> 32) as u32, node as u32],
        generation: 0,
    };
    let flags = flags | rustix::fs::OFlags::CLOEXEC;
    // SAFETY: the kernel reads the struct, with as many bytes behind its first two fields as it says.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            mount.as_raw_fd(),
            &raw const handle,
            flags.bits(),
        )
    };
    let fd = c_int::try_from(fd).unwrap_or(-1);
    if fd < 0 {
        return Err(rustix::io::Errno::from_io_error(&io::Error::last_os_error())
            .unwrap_or(rustix::io::Errno::IO));
    }
    // SAFETY: a file descriptor that was just made, and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
