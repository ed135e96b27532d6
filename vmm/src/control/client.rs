//! The other end: one request to a sandbox.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{PidfdFlags, pidfd_open};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{Reply, Request, SOCKET, check_name, directory, lines, socket_path};

/// How long a sandbox may take over a request. None waits for the guest.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks the sandbox `name` of this user.
///
/// # Errors
///
/// When there is none, or it does not do what it is asked: one line that says why.
pub fn ask(name: &str, request: &Request) -> Result<Value> {
    Connection::open(name)?.ask(request)
}

/// Asks the sandbox `name` of this user, and gives it a descriptor.
///
/// # Errors
///
/// As [`ask`].
pub fn ask_giving(name: &str, request: &Request, given: BorrowedFd<'_>) -> Result<Value> {
    Connection::open(name)?.ask_giving(request, Some(given))
}

#[cfg(test)]
pub(super) fn ask_at(directory: &Path, name: &str, request: &Request) -> Result<Value> {
    Connection::open_at(directory, name)?.ask(request)
}

/// What this user's sandboxes are called, those included that were killed and left their socket.
///
/// # Errors
///
/// When the directory cannot be read.
pub fn names() -> Result<Vec<String>> {
    names_at(&directory()?)
}

fn names_at(directory: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(directory) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("{} cannot be read", directory.display()))?,
    };
    let name = |entry: fs::DirEntry| {
        let file = entry.file_name().into_string().ok()?;
        let name = file.strip_suffix(SOCKET)?;
        check_name(name).is_ok().then(|| name.to_owned())
    };
    let mut names: Vec<_> = entries.flatten().filter_map(name).collect();
    names.sort();
    Ok(names)
}

/// A sandbox has heard what was asked, and does not do it.
#[derive(Debug, thiserror::Error)]
#[error("sandbox {name:?}: {why}")]
pub struct Refused {
    name: String,
    why: String,
}

/// A connection to a sandbox that runs.
pub struct Connection {
    name: String,
    stream: BufReader<UnixStream>,
}

impl Connection {
    /// Connects to the sandbox `name` of this user.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn open(name: &str) -> Result<Self> {
        check_name(name).map_err(|error| anyhow!(error))?;
        Self::open_at(&directory()?, name)
    }

    #[cfg(test)]
    pub(crate) fn of(stream: UnixStream) -> Self {
        Self { name: "box".into(), stream: BufReader::new(stream) }
    }

    fn open_at(directory: &Path, name: &str) -> Result<Self> {
        let path = socket_path(directory, name);
        let stream = UnixStream::connect(&path).map_err(|error| match error.kind() {
            ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
                anyhow!("no sandbox {name:?} runs ({}); start one with --name", path.display())
            }
            _ => anyhow!("sandbox {name:?}: {}: {error}", path.display()),
        })?;
        let mut connection = Self { name: name.to_owned(), stream: BufReader::new(stream) };
        connection.waits(PATIENCE)?;
        Ok(connection)
    }

    /// Waits no longer for an answer, or for ever.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn waits(&mut self, patience: impl Into<Option<Duration>>) -> Result<()> {
        self.stream.get_ref().set_read_timeout(patience.into()).context("socket")
    }

    /// Asks, and hears the answer.
    ///
    /// # Errors
    ///
    /// When it does not do what it is asked: one line that says why.
    pub fn ask(&mut self, request: &Request) -> Result<Value> {
        self.ask_giving(request, None)
    }

    fn ask_giving(&mut self, request: &Request, given: Option<BorrowedFd<'_>>) -> Result<Value> {
        let name = &self.name;
        let mut line = serde_json::to_vec(request)?;
        line.push(b'\n');
        // One that does not listen may still have said why.
        let said = lines::send(self.stream.get_ref(), &line, given);
        let mut line = String::new();
        let heard = self.stream.read_line(&mut line);
        if heard.with_context(|| format!("sandbox {name:?} does not answer"))? == 0 {
            said.with_context(|| format!("sandbox {name:?}"))?;
            bail!("sandbox {name:?} ended");
        }
        match serde_json::from_str(&line).with_context(|| format!("sandbox {name:?}"))? {
            Reply::Ok(value) => Ok(value),
            Reply::Error(why) => Err(Refused { name: name.clone(), why }.into()),
        }
    }

    /// The same, for an answer of which more is known.
    ///
    /// # Errors
    ///
    /// Also when the answer is another one.
    pub fn ask_for<T: DeserializeOwned>(&mut self, request: &Request) -> Result<T> {
        let answer = self.ask(request)?;
        serde_json::from_value(answer)
            .with_context(|| format!("sandbox {:?} is of another version", self.name))
    }

    /// The process that runs it, whatever becomes of its number. To be called before anything is asked.
    ///
    /// # Errors
    ///
    /// When it has ended, or has no place for us.
    pub fn process(&self) -> Result<OwnedFd> {
        let stream = self.stream.get_ref();
        let peer = socket_peercred(stream).context("socket")?;
        let ended = || format!("sandbox {:?} ended", self.name);
        let process = pidfd_open(peer.pid, PidfdFlags::empty()).with_context(ended)?;
        // The other end is still there, and it is nobody else's: so the number was not another's yet.
        let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
        match rustix::net::recv(stream, &mut [0], flags) {
            Err(Errno::AGAIN) => Ok(process),
            // What is said without a question is why nothing is listened to.
            Ok((_, 1..)) => Err(self.refusal()),
            _ => bail!(ended()),
        }
    }

    /// Why the sandbox has spoken first.
    fn refusal(&self) -> anyhow::Error {
        let mut line = String::new();
        let heard = self.stream.get_ref().try_clone().map(BufReader::new);
        let heard = heard.and_then(|mut stream| stream.read_line(&mut line));
        let name = self.name.clone();
        match (heard, serde_json::from_str(&line)) {
            (Ok(_), Ok(Reply::Error(why))) => Refused { name, why }.into(),
            _ => anyhow!("sandbox {name:?} does not speak our language"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_sockets() {
        let directory = tempfile::tempdir().unwrap();
        assert_eq!(names_at(&directory.path().join("absent")).unwrap(), Vec::<String>::new());
        for file in
            ["b.sock", "a.sock", "a.vsock", "a.log", ".sock", "-x.sock", "a.sock.123", "c.d.sock"]
        {
            fs::write(directory.path().join(file), "").unwrap();
        }
        assert_eq!(names_at(directory.path()).unwrap(), ["a", "b", "c.d"]);
    }
}
