//! A thread that serves a queue.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Instant;

use vmm_sys_util::signal::Killable;

use crate::kick;
use crate::threads::{self, Work};

/// How one is started: its name, and what it does.
pub(super) type Spawn =
    Arc<dyn Fn(String, Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> + Send + Sync>;

/// In the usual way.
pub(super) fn spawn(name: String, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
    threads::spawn(Work::Files, name, body)
}

/// One that was started.
pub(super) struct Thread {
    thread: JoinHandle<()>,
    /// Disconnected once it is at its end.
    ended: mpsc::Receiver<()>,
}

impl Thread {
    /// # Errors
    ///
    /// The host's.
    pub(super) fn start(
        spawn: &Spawn,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let (ends, ended) = mpsc::channel();
        let body = move || {
            body();
            drop(ends);
        };
        Ok(Self { thread: spawn(name, Box::new(body))?, ended })
    }

    /// Waits for its end, at most until then. A panic was printed by the thread itself.
    pub(super) fn ends_by(&self, time: Instant) -> bool {
        let left = time.saturating_duration_since(Instant::now());
        self.ended.recv_timeout(left) == Err(RecvTimeoutError::Disconnected)
    }

    /// Gets it out of a system call, where the host's kernel lets that be ended.
    pub(super) fn kick(&self) {
        // An error means that it has just ended.
        let _ = self.thread.kill(kick::signal());
    }
}
