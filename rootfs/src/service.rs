//! The agent alone, as a service of a guest that has a first program of its own: `oriel-init agent`, which
//! `rootfs/oriel-agent.service` starts.

use std::convert::Infallible;
use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::thread;

use anyhow::{Context, Result};
use oriel_init::container::Confinement;
use oriel_init::protocol::{AGENT_PORT, Process};

use crate::agent::Agent;
use crate::children::Children;
use crate::command::DEFAULT_PATH;
use crate::log;

/// Where a service says that it is ready (sd_notify(3)).
const NOTIFY: &str = "NOTIFY_SOCKET";

/// Runs the host's commands until somebody ends this process.
///
/// # Errors
///
/// When it cannot listen: the kernel knows no vsock, or there is another agent.
pub(crate) fn run() -> Result<Infallible> {
    let children = Children::start().context("cannot start a thread")?;
    let path = env::var("PATH").unwrap_or_else(|_| DEFAULT_PATH.into());
    let agent = Agent::new(base(&path), children);
    agent.listen().with_context(|| format!("cannot listen on port {AGENT_PORT} of vsock"))?;
    if let Some(socket) = env::var_os(NOTIFY).filter(|socket| !socket.is_empty())
        && let Err(error) = notify(&socket)
    {
        log(&format!("cannot say that the agent is ready: {error}"));
    }
    loop {
        thread::park();
    }
}

/// What commands have where the host does not say otherwise: root, at the root, and none of what systemd tells
/// this service.
fn base(path: &str) -> Process {
    Process {
        args: Vec::new(),
        env: vec![format!("PATH={path}")],
        cwd: "/".into(),
        user: None,
        terminal: false,
        stdin: false,
        confinement: Confinement::default(),
    }
}

/// Says that the agent is ready to the socket of this name, a path or, behind an `@`, an abstract name.
fn notify(socket: &OsStr) -> io::Result<()> {
    let address = match socket.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
        path => SocketAddr::from_pathname(OsStr::from_bytes(path))?,
    };
    UnixDatagram::unbound()?.send_to_addr(b"READY=1", &address)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_service_manager_hears_that_the_agent_is_ready() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let name = format!("oriel-init-test-{}", std::process::id());
        let abstract_address = SocketAddr::from_abstract_name(&name).unwrap();
        for (socket, name) in [
            (UnixDatagram::bind(&path).unwrap(), path.clone().into_os_string()),
            (UnixDatagram::bind_addr(&abstract_address).unwrap(), format!("@{name}").into()),
        ] {
            notify(&name).unwrap();
            let mut message = [0; 64];
            let length = socket.recv(&mut message).unwrap();
            assert_eq!(&message[..length], b"READY=1");
        }
        assert!(notify(OsStr::new("/nonexistent/socket")).is_err());
    }
}
