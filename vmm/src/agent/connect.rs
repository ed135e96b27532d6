//! The way to the agent of a sandbox: its name, its control socket, its socket for vsock.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use oriel_init::protocol::AGENT_PORT;

use crate::control::Request;
use crate::control::client::Connection;
use crate::sandbox::{State, Status};

/// How long a sandbox that boots is waited for: an emulated machine takes its time.
const BOOT: Duration = Duration::from_secs(60);
const PAUSE: Duration = Duration::from_millis(50);

/// How long an open stream may take: the sandbox gives up before.
const ANSWER: Duration = Duration::from_secs(10);

/// The longest line of the sandbox in bytes: `OK`, a space, a number and the end.
const MAX_LINE: usize = 32;

/// A stream to the agent of the sandbox `name`, for one command. One that boots is waited for.
///
/// # Errors
///
/// When there is no such sandbox, no agent in it, or it ends.
pub fn connect(name: &str) -> Result<UnixStream> {
    let deadline = Instant::now() + BOOT;
    loop {
        // Asked first: one that has started its command has an agent that listens.
        let status: Status = Connection::open(name)?.ask_for(&Request::Status {})?;
        let path = status.vsock.with_context(|| format!("sandbox {name:?} has no vsock"))?;
        match open(&path, AGENT_PORT).with_context(|| format!("sandbox {name:?}"))? {
            Some(stream) => return Ok(stream),
            // When it will be ready, if ever, is not known.
            None if !status.agent => bail!(
                "sandbox {name:?} was started with --initrd: its init is not oriel-init, and no `oriel-init agent` \
                 listens in it"
            ),
            None => match status.state {
                State::Booting if Instant::now() < deadline => thread::sleep(PAUSE),
                State::Booting => bail!("sandbox {name:?} has not booted within {BOOT:?}"),
                State::Running => bail!(
                    "sandbox {name:?} takes no commands: does its kernel have vsock? --console shows what \
                     oriel-init says"
                ),
                State::Ending => bail!("sandbox {name:?} ended"),
            },
        }
    }
}

/// A stream to a port of the guest. `None`: nobody takes it.
fn open(path: &Path, port: u32) -> Result<Option<UnixStream>> {
    let mut stream =
        UnixStream::connect(path).with_context(|| format!("{} is gone", path.display()))?;
    stream.set_read_timeout(Some(ANSWER))?;
    let mut line = Vec::new();
    match writeln!(stream, "CONNECT {port}") {
        Err(error) if is_refusal(error.kind()) => return Ok(None),
        written => written?,
    }
    while line.last() != Some(&b'\n') {
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(1) if line.len() < MAX_LINE => line.extend(byte),
            Ok(1) => bail!("{}: that is no socket of a sandbox", path.display()),
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if is_refusal(error.kind()) => return Ok(None),
            Err(error) => return Err(error).context("it does not answer"),
        }
    }
    if !line.starts_with(b"OK ") {
        bail!("{}: that is no socket of a sandbox", path.display());
    }
    stream.set_read_timeout(None)?;
    Ok(Some(stream))
}

fn is_refusal(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::UnixListener;

    use super::*;

    /// What comes of a socket that answers so.
    fn answered(answer: &'static [u8]) -> Result<Option<UnixStream>> {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = thread::spawn(move || {
            let mut stream = BufReader::new(listener.accept().unwrap().0);
            let mut line = String::new();
            stream.read_line(&mut line).unwrap();
            let _ = stream.get_mut().write_all(answer);
            line
        });
        let stream = open(&path, 512);
        assert_eq!(thread.join().unwrap(), "CONNECT 512\n");
        stream
    }

    #[test]
    fn a_stream_begins_behind_the_line() {
        let mut rest = String::new();
        answered(b"OK 1073741824\nrest").unwrap().unwrap().read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "rest");
    }

    #[test]
    fn who_is_not_answered_is_refused() {
        assert!(answered(b"").unwrap().is_none());
        assert!(answered(b"OK").unwrap().is_none());
        for nonsense in [&b"220 mail.example ESMTP\n"[..], b"\n", &[b'O'; 100]] {
            let error = answered(nonsense).unwrap_err();
            assert!(error.to_string().contains("no socket of a sandbox"), "{error:#}");
        }
        let error = open(Path::new("/nonexistent/socket"), 1).unwrap_err();
        assert!(error.to_string().contains("gone"), "{error:#}");
    }
}
