//! The sandbox's end of the socket.
//!
//! Whoever can connect is the user who runs the sandbox, or root: the socket and its directory are theirs
//! alone. What comes is checked all the same, and a client that says nothing keeps no other from speaking.

use std::fs;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::Value;

use super::lines::Lines;
use super::{MAX_LINE, Reply, Request, hold, socket_path};
use crate::socket::{InUse, ListeningSocket};
use crate::walls::{self, Role};

/// The most clients at a time: each has a thread.
const MOST_CLIENTS: usize = 64;
/// A client may be silent for so long, and take so long to read what it is told.
const PATIENCE: Duration = Duration::from_secs(60);
/// After an `accept` that failed: the process has no file descriptor left, and perhaps soon has.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

/// Answers a request, which may have come with a descriptor. Called by a thread for each client, several at a time. One
/// that may wait for long asks now and then whether the client is gone, and gives up then.
pub type Handler =
    dyn Fn(Request, Option<OwnedFd>, &dyn Fn() -> bool) -> Result<Value, String> + Send + Sync;

/// A sandbox's socket. It is there as long as this value, whatever state the sandbox is in; dropping it takes
/// it out of the file system.
pub struct ControlSocket {
    socket: ListeningSocket,
    clients: Arc<Clients>,
}

/// Those who are connected.
#[derive(Default)]
struct Clients {
    count: AtomicUsize,
    /// How many requests have no reply yet.
    busy: Mutex<usize>,
    replied: Condvar,
}

impl Clients {
    fn busy(&self) -> MutexGuard<'_, usize> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ControlSocket {
    /// Makes the socket of the sandbox `name` in `directory`, which is made when it is not there. Who connects
    /// waits until [`serve`](Self::serve). A socket that a sandbox left when it was killed is replaced.
    ///
    /// # Errors
    ///
    /// When a sandbox of this name runs, or the directory is not this user's alone.
    pub fn new(directory: &Path, name: &str) -> Result<Self> {
        make_private(directory)?;
        let path = socket_path(directory, name);
        // Between the look at what is there and our own socket nobody else may do the same.
        let _lock = hold(directory)?;
        let socket = ListeningSocket::new(&path).map_err(|error| match error.is::<InUse>() {
            true => {
                anyhow!("a sandbox of this name runs already; choose another name, or end that one")
            }
            false => error,
        })?;
        Ok(Self { socket, clients: Arc::default() })
    }

    /// Waits until all requests have their reply, at most for `patience`.
    pub fn finish(&self, patience: Duration) {
        let busy = self.clients.busy();
        drop(self.clients.replied.wait_timeout_while(busy, patience, |busy| *busy > 0));
    }

    /// Answers whoever connects by `handler`, from threads, until the process ends.
    ///
    /// # Errors
    ///
    /// The host's, when it gives no thread.
    pub fn serve(&self, handler: Arc<Handler>) -> Result<()> {
        let listener = self.socket.listener().try_clone().context("control socket")?;
        let clients = self.clients.clone();
        let accept = move || {
            for stream in listener.incoming() {
                match stream {
                    Ok(stream) => begin(stream, &clients, &handler),
                    Err(error) => {
                        log::debug!("control socket: {error}");
                        std::thread::sleep(ACCEPT_AGAIN);
                    }
                }
            }
        };
        walls::start(Role::Control, "control", accept).context("thread")?;
        Ok(())
    }
}

/// Makes a directory that only this user can look into, unless it is there and only they can change it.
fn make_private(directory: &Path) -> Result<()> {
    let name = directory.display();
    let made = fs::DirBuilder::new().mode(0o700).create(directory);
    match made {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            let there = fs::symlink_metadata(directory).with_context(|| name.to_string())?;
            let own = there.uid() == rustix::process::geteuid().as_raw();
            if !there.is_dir() || !own || there.mode() & 0o022 != 0 {
                bail!("{name} is not a directory that this user alone can write to");
            }
            Ok(())
        }
        made => made.with_context(|| format!("{name} cannot be made")),
    }
}

/// Gives a client a thread.
fn begin(mut stream: UnixStream, clients: &Arc<Clients>, handler: &Arc<Handler>) {
    let patience = stream.set_read_timeout(Some(PATIENCE));
    if patience.and_then(|()| stream.set_write_timeout(Some(PATIENCE))).is_err() {
        return;
    }
    if clients.count.fetch_add(1, Ordering::Relaxed) >= MOST_CLIENTS {
        clients.count.fetch_sub(1, Ordering::Relaxed);
        let _ = say(&mut stream, &Reply::Error("too many clients; try again later".into()));
        return;
    }
    let (all, handler) = (clients.clone(), handler.clone());
    let body = move || {
        if let Err(error) = converse(stream, &all, handler.as_ref()) {
            log::debug!("control socket: {error}");
        }
        all.count.fetch_sub(1, Ordering::Relaxed);
    };
    if let Err(error) = walls::start(Role::Control, "control-client", body) {
        log::warn!("a client of the control socket is not heard: {error}");
        clients.count.fetch_sub(1, Ordering::Relaxed);
    }
}

fn say(stream: &mut UnixStream, reply: &Reply) -> io::Result<()> {
    let mut line = serde_json::to_vec(reply)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Answers line by line, up to the end of what a client says.
fn converse(mut stream: UnixStream, clients: &Clients, handler: &Handler) -> io::Result<()> {
    let watched = stream.try_clone()?;
    let mut lines = Lines::new(&watched, MAX_LINE);
    let gone = || {
        // One that has said all it wants to say may still listen: only the end of both ways counts (poll(2)).
        let mut ends = [PollFd::new(&watched, PollFlags::empty())];
        let polled = poll(&mut ends, Some(&Timespec::default()));
        polled.is_ok() && ends[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    };
    loop {
        let line = match lines.next() {
            Ok(Some(line)) => line,
            Ok(None) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                // Where the next one begins is anybody's guess.
                let long = format!("a line of more than {MAX_LINE} bytes");
                return say(&mut stream, &Reply::Error(long));
            }
            Err(error) => return Err(error),
        };
        *clients.busy() += 1;
        let reply = match serde_json::from_slice(&line.bytes) {
            Ok(request) => handler(request, line.given, &gone).map_or_else(Reply::Error, Reply::Ok),
            Err(error) => Reply::Error(format!("no request: {error}")),
        };
        let said = say(&mut stream, &reply);
        *clients.busy() -= 1;
        clients.replied.notify_all();
        said?;
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use serde_json::json;

    use super::super::client;
    use super::*;

    fn started(directory: &Path) -> ControlSocket {
        let socket = ControlSocket::new(directory, "box").unwrap();
        let handler = |request, _, gone: &dyn Fn() -> bool| match request {
            Request::Wait {} => {
                while !gone() {
                    std::thread::sleep(Duration::from_millis(1));
                }
                Err("nobody listens".into())
            }
            Request::Stats {} => Ok(json!({ "all": "well" })),
            Request::ShareResize { share, .. } => Err(format!("no share {share}")),
            other => Err(format!("not here: {other:?}")),
        };
        socket.serve(Arc::new(handler)).unwrap();
        socket
    }

    /// Says something and hears one line.
    fn ask(path: &Path, words: &[u8]) -> String {
        let mut stream = UnixStream::connect(path).unwrap();
        // One too many is not listened to.
        let _ = stream.write_all(words);
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        assert_eq!(line.matches('\n').count(), 1, "{line:?}");
        line.trim_end().into()
    }

    #[test]
    fn a_request_is_a_line_and_so_is_the_reply() {
        let directory = tempfile::tempdir().unwrap();
        let socket = started(directory.path());
        let mut stream = UnixStream::connect(socket.socket.path()).unwrap();
        let mut heard = BufReader::new(stream.try_clone().unwrap()).lines();
        // Two at once, and one in pieces.
        stream.write_all(b"{\"request\":\"stats\"}\n{\"request\":\"stats\"}\n{\"req").unwrap();
        stream.write_all(b"uest\":\"share-resize\",\"share\":\"/x\",\"size\":0}\n").unwrap();
        assert_eq!(heard.next().unwrap().unwrap(), r#"{"ok":{"all":"well"}}"#);
        assert_eq!(heard.next().unwrap().unwrap(), r#"{"ok":{"all":"well"}}"#);
        assert_eq!(heard.next().unwrap().unwrap(), r#"{"error":"no share /x"}"#);
        let stats = client::ask_at(directory.path(), "box", &Request::Stats {}).unwrap();
        assert_eq!(stats, json!({ "all": "well" }));
        let resize = Request::ShareResize { share: "/y".into(), size: 1 };
        let error = client::ask_at(directory.path(), "box", &resize).unwrap_err();
        assert!(error.to_string().contains("no share /y"), "{error:#}");
    }

    #[test]
    fn what_is_no_request_is_told_in_a_line_and_the_next_one_is_answered() {
        let directory = tempfile::tempdir().unwrap();
        let socket = started(directory.path());
        for (words, hint) in [
            (&b"hello\n"[..], "no request"),
            (b"\n", "no request"),
            (b"\xff\xfe\0\n", "no request"),
            (b"[]\n", "no request"),
            (b"{}\n", "request"),
            (b"{\"request\":\"reboot\"}\n", "reboot"),
            (b"{\"request\":\"share-resize\",\"share\":\"/x\"}\n", "size"),
            (b"{\"request\":\"share-resize\",\"share\":\"/x\",\"size\":-1}\n", "size"),
            (b"{\"request\":\"share-resize\",\"share\":7,\"size\":1}\n", "string"),
            (b"{\"request\":\"stats\",\"more\":1}\n", "more"),
        ] {
            let said = ask(socket.socket.path(), words);
            let hinted = said.contains(hint) || hint == "size" && said.contains("u64");
            assert!(said.starts_with("{\"error\":\"no request: ") && hinted, "{said}");
        }
        let deep = [&b"{\"x\":"[..], &[b'['; 10_000], b"\n"].concat();
        assert!(ask(socket.socket.path(), &deep).contains("recursion"));
        let long = vec![b' '; MAX_LINE + 1];
        assert!(ask(socket.socket.path(), &long).contains("more than 65536"));
        // A client that ends in the middle of a line, and one that does not listen.
        drop(UnixStream::connect(socket.socket.path()).unwrap().write_all(b"{"));
        drop(
            UnixStream::connect(socket.socket.path())
                .unwrap()
                .write_all(b"{\"request\":\"stats\"}\n"),
        );
        assert!(ask(socket.socket.path(), b"{\"request\":\"stats\"}\n").contains("well"));
    }

    #[test]
    fn silent_clients_do_not_keep_others_from_an_answer() {
        let directory = tempfile::tempdir().unwrap();
        let socket = started(directory.path());
        let connect = || UnixStream::connect(socket.socket.path()).unwrap();
        let silent: Vec<_> = (1..MOST_CLIENTS).map(|_| connect()).collect();
        assert!(ask(socket.socket.path(), b"{\"request\":\"stats\"}\n").contains("well"));
        // One of the two finds the last place taken, unless the client before has not left it yet.
        let one_more = connect();
        let said = ask(socket.socket.path(), b"{\"request\":\"stats\"}\n");
        assert!(said.contains("too many clients") || said.contains("well"), "{said}");
        drop((silent, one_more));
        let start = std::time::Instant::now();
        while !ask(socket.socket.path(), b"{\"request\":\"stats\"}\n").contains("well") {
            assert!(start.elapsed().as_secs() < 10, "the others are gone");
        }
    }

    #[test]
    fn who_waits_and_goes_leaves_no_thread_and_replies_are_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let socket = started(directory.path());
        let mut waits = UnixStream::connect(socket.socket.path()).unwrap();
        waits.write_all(b"{\"request\":\"wait\"}\n").unwrap();
        while *socket.clients.busy() == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let start = std::time::Instant::now();
        socket.finish(Duration::from_millis(50));
        assert!(start.elapsed() >= Duration::from_millis(50) && *socket.clients.busy() == 1);
        drop(waits);
        socket.finish(Duration::from_secs(60));
        assert_eq!(*socket.clients.busy(), 0);
    }

    #[test]
    fn the_socket_is_the_users_alone_and_goes_with_the_sandbox() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("oriel");
        let socket = ControlSocket::new(&directory, "box").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&directory), mode(socket.socket.path())), (0o700, 0o600));
        let path = socket.socket.path().to_owned();
        let taken = ControlSocket::new(&directory, "box").err().unwrap();
        assert!(taken.to_string().contains("runs already"), "{taken:#}");
        assert!(ControlSocket::new(&directory, "other").is_ok());
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn what_a_killed_sandbox_left_is_replaced_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let path = socket_path(directory.path(), "box");
        // What is left of a listener that was killed.
        drop(UnixListener::bind(&path).unwrap());
        assert!(client::ask_at(directory.path(), "box", &Request::Stats {}).is_err());
        let socket = started(directory.path());
        assert!(ask(socket.socket.path(), b"{\"request\":\"stats\"}\n").contains("well"));
        drop(socket);
        fs::write(&path, "mine").unwrap();
        let error = ControlSocket::new(directory.path(), "box").err().unwrap();
        assert!(error.to_string().contains("no socket"), "{error:#}");
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn who_waits_is_gone_when_it_has_closed_and_not_when_it_has_said_all() {
        let directory = tempfile::tempdir().unwrap();
        let socket = started(directory.path());
        let busy = |count| {
            let deadline = std::time::Instant::now() + Duration::from_secs(30);
            while *socket.clients.busy() != count {
                assert!(std::time::Instant::now() < deadline, "{}", *socket.clients.busy());
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        let mut patient = UnixStream::connect(socket.socket.path()).unwrap();
        patient.write_all(b"{\"request\":\"wait\"}\n").unwrap();
        patient.shutdown(std::net::Shutdown::Write).unwrap();
        let mut talkative = UnixStream::connect(socket.socket.path()).unwrap();
        talkative.write_all(b"{\"request\":\"wait\"}\n").unwrap();
        busy(2);
        // It says more, to which nobody listens yet.
        talkative.write_all(b"{").unwrap();
        drop(talkative);
        busy(1);
        drop(patient);
        busy(0);
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        let error = ControlSocket::new(directory.path(), "box").err().unwrap();
        assert!(error.to_string().contains("this user alone"), "{error:#}");
        let file = directory.path().join("file");
        fs::write(&file, "").unwrap();
        assert!(ControlSocket::new(&file, "box").is_err());
        let deep = directory.path().join("x".repeat(120));
        let error = ControlSocket::new(&deep, "box").err().unwrap();
        assert!(error.to_string().contains("too long"), "{error:#}");
    }
}
