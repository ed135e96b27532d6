//! Sockets of the address family vsock, from the guest's side: std and rustix have none.
//!
//! A stream is a [`UnixStream`], whose methods are those of any stream socket; its addresses mean nothing.
#![expect(unsafe_code, reason = "socket addresses through libc")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// The host's context id.
pub const HOST: u32 = libc::VMADDR_CID_HOST;

/// Connects to a port; the host's answer is waited for.
///
/// # Errors
///
/// `ConnectionReset` when nobody listens there; the kernel's.
pub fn connect(cid: u32, port: u32) -> io::Result<UnixStream> {
    let socket = socket()?;
    let address = address(cid, port);
    // SAFETY: the address is a `sockaddr_vm` of the length that is given, and lives across the call.
    let result =
        unsafe { libc::connect(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_SIZE) };
    check(result)?;
    Ok(socket.into())
}

/// A socket that listens on a port of the guest.
#[derive(Debug)]
pub struct Listener(OwnedFd);

impl Listener {
    /// Listens on `port`; `backlog` connections wait to be taken at most.
    ///
    /// # Errors
    ///
    /// The kernel's; `AddrInUse` when somebody listens there.
    pub fn bind(port: u32, backlog: i32) -> io::Result<Self> {
        let socket = socket()?;
        let address = address(libc::VMADDR_CID_ANY, port);
        // SAFETY: as in `connect`.
        let result =
            unsafe { libc::bind(socket.as_raw_fd(), (&raw const address).cast(), ADDRESS_SIZE) };
        check(result)?;
        // SAFETY: listen takes no pointers.
        check(unsafe { libc::listen(socket.as_raw_fd(), backlog) })?;
        Ok(Self(socket))
    }

    /// Takes the next connection, and says who is at its other end: [`HOST`], or somebody of the guest itself.
    /// Waits for one.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn accept(&self) -> io::Result<(UnixStream, u32)> {
        // Nobody's: what the kernel does not write counts as that.
        let mut peer = address(libc::VMADDR_CID_ANY, libc::VMADDR_PORT_ANY);
        let mut size = ADDRESS_SIZE;
        // SAFETY: the place for the address is a `sockaddr_vm` of the length that is given, and both live across
        // the call.
        let socket = unsafe {
            libc::accept4(
                self.0.as_raw_fd(),
                (&raw mut peer).cast(),
                &raw mut size,
                libc::SOCK_CLOEXEC,
            )
        };
        check(socket)?;
        // SAFETY: a file descriptor that was just made, and is nobody else's.
        Ok((unsafe { OwnedFd::from_raw_fd(socket) }.into(), peer.svm_cid))
    }
}

const ADDRESS_SIZE: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: a `sockaddr_vm` of zeros is a valid one: all its fields are numbers.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: socket takes no pointers.
    let socket = unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    check(socket)?;
    // SAFETY: a file descriptor that was just made, and is nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

fn check(result: i32) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
