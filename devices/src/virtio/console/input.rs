//! What the host sends to a port, until the guest takes it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::sync::lock;

/// Most bytes that wait in one port: enough to keep the guest busy while the sender reads more.
pub const CAPACITY: usize = 64 << 10;

/// The sender's end of a port's input.
///
/// What is sent waits until the guest has opened the port and offers buffers. Input that no buffer has taken
/// survives a reset of the device; what is in the guest's buffers then is lost with them.
#[derive(Clone)]
pub struct PortInput(pub(super) Arc<Pending>);

impl PortInput {
    /// Sends all of `bytes`; blocks while there is no room. Senders that send at the same time may be mixed.
    ///
    /// # Errors
    ///
    /// `BrokenPipe` after [`close`](Self::close), and once the device is gone.
    pub fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        while !rest.is_empty() {
            let full = |state: &mut State| !state.closed && state.bytes.len() >= CAPACITY;
            let waited = self.0.room.wait_while(lock(&self.0.state), full);
            let mut state = waited.unwrap_or_else(PoisonError::into_inner);
            if state.closed {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            let (now, later) = rest.split_at(rest.len().min(CAPACITY - state.bytes.len()));
            state.bytes.extend(now);
            rest = later;
            drop(state);
            self.0.ring();
        }
        Ok(())
    }

    /// Sends all of `bytes` or nothing, and does not block. `false`: there was no room, or the input is
    /// closed.
    pub fn try_send(&self, bytes: &[u8]) -> bool {
        let mut state = lock(&self.0.state);
        if state.closed || state.bytes.len() + bytes.len() > CAPACITY {
            return false;
        }
        state.bytes.extend(bytes);
        drop(state);
        self.0.ring();
        true
    }

    /// Ends the input: the guest reads end of file after all that was sent before. The port is closed for
    /// its output too then, as far as the guest is concerned: the device goes on taking it, but Linux lets
    /// nobody write to a port that is closed. Idempotent.
    pub fn close(&self) {
        self.0.close();
    }
}

/// The device's end of it.
pub(super) struct Pending {
    state: Mutex<State>,
    room: Condvar,
    /// Wakes the worker.
    doorbell: Arc<EventFd>,
}

#[derive(Default)]
struct State {
    /// At most [`CAPACITY`].
    bytes: VecDeque<u8>,
    closed: bool,
}

impl Pending {
    pub(super) fn new(doorbell: Arc<EventFd>) -> Self {
        Self { state: Mutex::default(), room: Condvar::new(), doorbell }
    }

    fn ring(&self) {
        if let Err(error) = self.doorbell.write(1) {
            log::error!("a doorbell does not ring: {error}");
        }
    }

    pub(super) fn close(&self) {
        lock(&self.state).closed = true;
        self.room.notify_all();
        self.ring();
    }

    /// Copies up to `count` of the first bytes, without taking them.
    pub(super) fn peek(&self, count: usize) -> Vec<u8> {
        lock(&self.state).bytes.iter().take(count).copied().collect()
    }

    /// Takes the first `count` bytes away.
    pub(super) fn consume(&self, count: usize) {
        let mut state = lock(&self.state);
        let count = count.min(state.bytes.len());
        state.bytes.drain(..count);
        drop(state);
        self.room.notify_all();
    }

    pub(super) fn is_empty(&self) -> bool {
        lock(&self.state).bytes.is_empty()
    }

    /// Closed, and nothing left in it.
    pub(super) fn at_end(&self) -> bool {
        let state = lock(&self.state);
        state.closed && state.bytes.is_empty()
    }
}
