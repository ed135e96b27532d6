//! What the host wants of a guest that runs: further commands, and to be asked anew for what has changed. Each
//! command and each share is a stream of vsock, and a thread.

mod session;
#[cfg(test)]
mod tests;
mod watch;

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use oriel_init::frames;
use oriel_init::protocol::{AGENT_PORT, FromAgent, MOST_EXECS, Process};
use oriel_init::vsock::{self, Listener};
use oriel_init::watch::WATCH_PORT;

use self::session::Session;
use crate::children::Children;
use crate::log;

/// Streams that wait to be taken. More at once than may run, so that those too many are told so.
const BACKLOG: i32 = 2 * MOST_EXECS as i32;

/// After an `accept` that failed: there is no file descriptor left, and perhaps soon is.
const ACCEPT_AGAIN: Duration = Duration::from_millis(200);

/// Who serves further commands.
#[derive(Debug)]
pub(crate) struct Agent {
    /// The first command, whose surroundings are those of further ones.
    base: Process,
    children: Arc<Children>,
    running: Mutex<usize>,
    one_less: Condvar,
}

impl Agent {
    pub(crate) fn new(base: Process, children: Arc<Children>) -> Arc<Self> {
        Arc::new(Self { base, children, running: Mutex::new(0), one_less: Condvar::new() })
    }

    /// Listens on [`AGENT_PORT`] and [`WATCH_PORT`] from now on.
    ///
    /// # Errors
    ///
    /// The kernel's: it may know no vsock.
    pub(crate) fn listen(self: &Arc<Self>) -> io::Result<()> {
        let agent = Arc::clone(self);
        listen("agent", AGENT_PORT, move |stream, peer| agent.admit(stream, peer))?;
        listen("watch", WATCH_PORT, watch_for)
    }

    /// Serves the host. Programs of the guest can connect as well where its kernel has vsock's loopback, and shall not
    /// become root by that.
    pub(crate) fn admit(self: &Arc<Self>, stream: UnixStream, peer: u32) {
        match peer {
            vsock::HOST => self.begin(stream),
            _ => {
                log(&format!("a stream of context id {peer}, which is not the host, is not heard"))
            }
        }
    }

    /// Serves a stream on a thread of its own. Waits for nobody.
    fn begin(self: &Arc<Self>, stream: UnixStream) {
        let mut running = self.running();
        if *running >= MOST_EXECS {
            drop(running);
            return refuse(&stream, format!("there are {MOST_EXECS} commands already, the most"));
        }
        *running += 1;
        drop(running);
        let agent = Arc::clone(self);
        // For the case that there is no thread for it.
        let spare = stream.try_clone();
        let serve = move || {
            if let Err(error) = Session::serve(stream, &agent.base, &agent.children) {
                log(&format!("a further command: {error}"));
            }
            agent.leave();
        };
        if let Err(error) = thread::Builder::new().name("exec".into()).spawn(serve) {
            self.leave();
            if let Ok(stream) = spare {
                refuse(&stream, format!("there is no thread for it: {error}"));
            }
        }
    }

    /// Waits until all have heard of the end of their commands, at most for `patience`.
    pub(crate) fn finish(&self, patience: Duration) {
        let running = self.running();
        drop(self.one_less.wait_timeout_while(running, patience, |running| *running > 0));
    }

    fn running(&self) -> MutexGuard<'_, usize> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn leave(&self) {
        *self.running() -= 1;
        self.one_less.notify_all();
    }
}

/// Takes streams to a port from now on, on a thread.
fn listen(
    name: &str,
    port: u32,
    admit: impl Fn(UnixStream, u32) + Send + 'static,
) -> io::Result<()> {
    let listener = Listener::bind(port, BACKLOG)?;
    let accept = move || {
        loop {
            match listener.accept() {
                Ok((stream, peer)) => admit(stream, peer),
                Err(error) => {
                    log(&format!("a stream cannot be taken: {error}"));
                    thread::sleep(ACCEPT_AGAIN);
                }
            }
        }
    };
    thread::Builder::new().name(name.into()).spawn(accept)?;
    Ok(())
}

/// Serves a stream about a share on a thread of its own, if it is the host's.
fn watch_for(stream: UnixStream, peer: u32) {
    let serve = || {
        if let Err(error) = watch::serve(stream) {
            log(&format!("cache=watch: {error}"));
        }
    };
    if peer != vsock::HOST {
        return log(&format!("a stream of context id {peer}, which is not the host, is not heard"));
    }
    // Without a thread the stream ends, and the host tries again.
    if let Err(error) = thread::Builder::new().name("watch".into()).spawn(serve) {
        log(&format!("cache=watch: there is no thread for it: {error}"));
    }
}

/// Says at once why there will be no command. Who does not read it finds the stream closed.
fn refuse(stream: &UnixStream, message: String) {
    let mut bytes = Vec::new();
    frames::put_message(&mut bytes, &FromAgent::Refused { status: 125, message });
    // Nothing was written before: there is room for it.
    let flags = rustix::net::SendFlags::DONTWAIT | rustix::net::SendFlags::NOSIGNAL;
    if let Err(error) = rustix::net::send(stream, &bytes, flags) {
        log(&format!("a further command is refused, and not told: {error}"));
    }
}
