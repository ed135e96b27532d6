//! Threads that serve devices.
//!
//! Each says what it is for. A machine may have it enter its work through a gate of its own ([`set_gate`]), which takes
//! from the thread what that work does not need: this crate knows nothing of how.

use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Serving requests for the files of shares, and waiting for locks on them.
    Files,
    /// Moving bytes between guest memory and descriptors that are open.
    Bytes,
    /// Streams between the guest and sockets of the host.
    Sockets,
}

/// Called by whoever starts a thread; what it returns is called by the new thread before anything else.
pub type Gate = fn(Work) -> Box<dyn FnOnce() + Send>;

static GATE: OnceLock<Gate> = OnceLock::new();

/// From now on new threads begin with what `gate` returned to those who have started them. Once in a process: later calls
/// have no effect.
pub fn set_gate(gate: Gate) {
    let _ = GATE.set(gate);
}

/// Starts a thread that does `body`, through the gate if there is one.
///
/// # Errors
///
/// The host's, when it gives no thread.
pub(crate) fn spawn<T: Send + 'static>(
    work: Work,
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    spawn_by(Builder::new().name(name.into()), work, body)
}

/// The same, of a thread that is otherwise as `builder` says.
///
/// # Errors
///
/// The host's, when it gives no thread.
pub(crate) fn spawn_by<T: Send + 'static>(
    builder: Builder,
    work: Work,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let enter = GATE.get().map(|gate| gate(work));
    builder.spawn(move || {
        if let Some(enter) = enter {
            enter();
        }
        body()
    })
}
