//! The host's side: clients that connect and say which port they want, and programs that listen for the guest.
//!
//! The convention is that of Firecracker, cloud-hypervisor and Dragonball: a client writes `CONNECT <port>\n`
//! and reads `OK <n>\n` once the guest has agreed; what follows is the stream. When the guest does not agree,
//! the connection is closed. A stream to port P of the host goes to the socket `<path>_P`.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SocketAddrUnix, SocketFlags, SocketType, connect, recv, socket_with,
};
use vmm_sys_util::epoll::EventSet;

use super::poll::Poll;

/// What is watched of a stream's socket.
pub(super) const SOCKET_EVENTS: EventSet =
    EventSet::IN.union(EventSet::OUT).union(EventSet::READ_HANG_UP);

/// Most clients that have not said yet which port they want. One more, and the one that has waited longest is
/// closed: whoever speaks at once is served, however many only connect.
pub(super) const MAX_HALF_OPEN: usize = 256;

/// How long a client may take to say it.
pub(super) const CONNECT_TIME: Duration = Duration::from_secs(2);

/// Longest line in bytes, with its end: twice what the word and the largest port take.
const MAX_LINE: usize = 32;

/// How long clients wait when the process has no file descriptor for them.
const PAUSE: Duration = Duration::from_millis(100);

/// Most clients taken in one go, so that the guest gets its turn.
const MAX_ACCEPTS: usize = 64;

/// The host's side of a device.
pub(super) struct HostSide {
    /// And where it is. Without, there are no clients, and no programs that listen for the guest.
    listener: Option<(UnixListener, PathBuf)>,
    half_open: BTreeMap<u64, HalfOpen>,
    /// Clients wait that could not be taken.
    retry: Option<Instant>,
}

struct HalfOpen {
    socket: UnixStream,
    deadline: Instant,
}

/// What a client has said.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Line {
    /// Not all of it yet.
    Partial,
    /// This port, in so many bytes.
    Connect { port: u32, len: usize },
    /// Nothing that has a meaning.
    Nonsense,
}

impl HostSide {
    /// With a listener and where it is.
    pub(super) fn new(listener: Option<(UnixListener, &Path)>) -> io::Result<Self> {
        if let Some((listener, _)) = &listener {
            listener.set_nonblocking(true)?;
        }
        let listener = listener.map(|(listener, path)| (listener, path.to_owned()));
        Ok(Self { listener, half_open: BTreeMap::new(), retry: None })
    }

    pub(super) fn listener(&self) -> Option<&UnixListener> {
        self.listener.as_ref().map(|(listener, _)| listener)
    }

    /// The next time to call [`expire`](Self::expire).
    pub(super) fn deadline(&self) -> Option<Instant> {
        // All have the same time, so the first has the least left.
        let first = self.half_open.first_key_value().map(|(_, client)| client.deadline);
        first.into_iter().chain(self.retry).min()
    }

    /// Closes clients that have said nothing for too long, and takes those that could not be taken.
    pub(super) fn expire(&mut self, poll: &mut Poll, now: Instant) {
        self.half_open.retain(|_, client| client.deadline > now);
        if self.retry.take_if(|retry| *retry <= now).is_some() {
            self.accept(poll, now);
        }
    }

    /// Takes the clients that have connected.
    pub(super) fn accept(&mut self, poll: &mut Poll, now: Instant) {
        let Some((listener, _)) = &self.listener else { return };
        let mut pause = Duration::ZERO;
        for _ in 0..MAX_ACCEPTS {
            let accepted = listener.accept().and_then(|(socket, _)| {
                socket.set_nonblocking(true)?;
                let id = poll.add(&socket, EventSet::IN | EventSet::READ_HANG_UP)?;
                Ok((id, socket))
            });
            match accepted {
                Ok((id, socket)) => {
                    if self.half_open.len() >= MAX_HALF_OPEN {
                        // Numbers rise.
                        self.half_open.pop_first();
                    }
                    let deadline = now + CONNECT_TIME;
                    self.half_open.insert(id, HalfOpen { socket, deadline });
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    log::warn!("vsock: a client cannot be taken: {error}");
                    pause = PAUSE;
                    break;
                }
            }
        }
        // There may be more, of which nothing will tell.
        self.retry = Some(now + pause);
    }

    /// Something has happened at a client's socket. When it has said which port it wants, it is no longer half
    /// open: here it is, and the port. `None` when the number is not that of a half-open client, or it has said
    /// less, or nonsense, for which it is closed.
    pub(super) fn event(&mut self, id: u64) -> Option<(UnixStream, u32)> {
        let client = self.half_open.get(&id)?;
        match read_line(&client.socket) {
            Line::Partial => None,
            Line::Connect { port, .. } => {
                self.half_open.remove(&id).map(|client| (client.socket, port))
            }
            Line::Nonsense => {
                self.half_open.remove(&id);
                None
            }
        }
    }

    /// Connects to what listens for port `port` of the host. Does not wait: nobody there, or too many before
    /// us, is an error.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let Some((_, path)) = &self.listener else {
            return Err(io::ErrorKind::ConnectionRefused.into());
        };
        let mut path = path.clone().into_os_string();
        path.push(format!("_{port}"));
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(&*path)?)?;
        Ok(socket.into())
    }
}

/// Reads the line when it is there in full, and not a byte more: the stream is behind it.
fn read_line(socket: &UnixStream) -> Line {
    let mut bytes = [0; MAX_LINE];
    let line = match recv(socket.as_fd(), &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        // The client has gone.
        Ok((0, _)) => Line::Nonsense,
        Ok((count, _)) => parse(bytes.get(..count).unwrap_or_default()),
        Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => Line::Partial,
        Err(_) => Line::Nonsense,
    };
    if let Line::Connect { len, .. } = line {
        // As much as was just seen there.
        let taken =
            recv(socket.as_fd(), bytes.get_mut(..len).unwrap_or_default(), RecvFlags::DONTWAIT);
        if !matches!(taken, Ok((count, _)) if count == len) {
            return Line::Nonsense;
        }
    }
    line
}

/// What the first bytes of a client mean.
pub(super) fn parse(bytes: &[u8]) -> Line {
    let Some(end) = bytes.iter().position(|byte| *byte == b'\n') else {
        return if bytes.len() < MAX_LINE { Line::Partial } else { Line::Nonsense };
    };
    let line = bytes.get(..end).and_then(|line| std::str::from_utf8(line).ok()).unwrap_or_default();
    let mut words = line.split_ascii_whitespace();
    let word = words.next().filter(|word| word.eq_ignore_ascii_case("connect"));
    // Digits alone: `u32` would take a sign.
    let digits = |word: &&str| word.bytes().all(|byte| byte.is_ascii_digit());
    let port = word.and(words.next()).filter(digits).and_then(|word| word.parse().ok());
    match (port, words.next()) {
        (Some(port), None) => Line::Connect { port, len: end + 1 },
        _ => Line::Nonsense,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_a_port_in_any_letter_case() {
        for (line, port) in [
            ("CONNECT 1024\n", 1024),
            ("connect 0\n", 0),
            ("Connect 4294967295\r\n", u32::MAX),
            ("CONNECT  52\nCONNECT 53\n", 52),
        ] {
            let len = line.find('\n').unwrap() + 1;
            assert_eq!(parse(line.as_bytes()), Line::Connect { port, len }, "{line:?}");
        }
    }

    #[test]
    fn a_line_that_has_no_end_yet_is_waited_for() {
        for line in ["", "C", "CONNECT 1024", "nonsense"] {
            assert_eq!(parse(line.as_bytes()), Line::Partial, "{line:?}");
        }
    }

    #[test]
    fn a_line_that_means_nothing_is_refused() {
        for line in [
            &b"\n"[..],
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT x\n",
            b"CONNECT +1\n",
            b"CONNECT -1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 2\n",
            b"CONNECTED 1\n",
            b"1024\n",
            b"\xff\xfe\n",
            b"CONNECT 1\0\n",
            &[b' '; MAX_LINE],
        ] {
            assert_eq!(parse(line), Line::Nonsense, "{line:?}");
        }
    }
}
