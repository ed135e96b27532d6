//! Requests that are answered after the call that served them: those that wait for a lock.
//!
//! A request that has to wait must not hold up the thread that serves its queue. So the file system takes a
//! [`Pending`] for it and goes on waiting on a thread of its own, the caller of
//! [`Session::serve`](super::Session::serve) is told that there is [no reply yet](Served::Later), and whoever
//! waits [finishes](Pending::finish) it. INTERRUPT and the end of the session ask it to stop by its
//! [`Interrupt`].
//!
//! All of this costs something only where a request really waits. Those that do not are served as ever,
//! without a lock or an allocation.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use vm_memory::ByteValued;

use super::abi::{OUT_HEADER, OutHeader};
use super::counters::Counters;
use super::errno::{Errno, Result};
use super::opcode::Opcode;
use crate::sync::lock;

/// How many INTERRUPTs of unknown requests are remembered. Such a one may be there before the request it
/// means, where two threads read from one queue or a guest has two queues; more than a few at a time are of
/// requests that had been answered already.
const EARLY_MAX: usize = 64;

/// What became of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It is done. So many bytes of reply were written: exactly `out.len`, 0 where no reply is due or
    /// possible.
    Done(u32),
    /// It waits, and will be answered by the [`Completion`] that [`Deferral::defer`] made.
    Later,
}

/// How the transport lets a request be answered later. One for each request that is served.
pub trait Deferral {
    /// Makes what will carry the reply. Called at most once, while the request is served, by the thread that
    /// serves it.
    fn defer(&self) -> Box<dyn Completion>;
}

/// Carries one reply to where the request came from.
pub trait Completion: Send {
    /// Sends the whole reply, header and body. Called once, from any thread. Where there is nobody left to
    /// take the reply, because the device was reset for example, nothing happens.
    fn complete(self: Box<Self>, reply: &[u8]);
}

/// Asks a waiting request to stop waiting.
#[derive(Default)]
pub struct Interrupt {
    state: Mutex<InterruptState>,
}

#[derive(Default)]
struct InterruptState {
    asked: bool,
    wake: Option<Box<dyn Fn() + Send>>,
}

impl Interrupt {
    /// Asks. Does not wait until it is done. Idempotent.
    pub fn ask(&self) {
        let mut state = lock(&self.state);
        state.asked = true;
        if let Some(wake) = &state.wake {
            wake();
        }
    }

    /// Whether that has happened.
    pub fn asked(&self) -> bool {
        lock(&self.state).asked
    }

    /// From now on, `wake` is called when somebody asks; not for those who have asked before. It is called
    /// under a lock and must not block.
    pub fn arm(&self, wake: impl Fn() + Send + 'static) {
        lock(&self.state).wake = Some(Box::new(wake));
    }

    /// Drops what [`arm`](Self::arm) was given. It is not being called any more when this returns.
    pub fn disarm(&self) {
        let wake = lock(&self.state).wake.take();
        drop(wake);
    }
}

#[derive(Default)]
struct Table {
    /// Counts the sessions that ended.
    epoch: u64,
    waiting: Vec<(u64, Arc<Interrupt>)>,
    /// `unique` of requests that were interrupted and are not known, the newest last.
    early: VecDeque<u64>,
}

/// The requests of a session that wait.
pub(super) struct Waiting {
    table: Arc<Mutex<Table>>,
    counters: Arc<Counters>,
}

impl Waiting {
    pub(super) fn new(counters: Arc<Counters>) -> Self {
        Self { table: Arc::default(), counters }
    }

    /// Which session this is. To be asked before the session is found to have begun: see [`Wait::begin`].
    pub(super) fn epoch(&self) -> u64 {
        lock(&self.table).epoch
    }

    /// INTERRUPT of request `unique`. What is not known is kept in mind for a while.
    pub(super) fn interrupt(&self, unique: u64) {
        let mut known = false;
        let mut table = lock(&self.table);
        for (_, interrupt) in table.waiting.iter().filter(|(waiting, _)| *waiting == unique) {
            interrupt.ask();
            known = true;
        }
        if !known {
            if table.early.len() >= EARLY_MAX {
                table.early.pop_front();
            }
            table.early.push_back(unique);
        }
    }

    /// The session ends: all are asked to stop, and requests of this session that begin to wait only now are
    /// refused. Does not wait for them.
    pub(super) fn clear(&self) {
        let mut table = lock(&self.table);
        table.epoch = table.epoch.wrapping_add(1);
        table.early.clear();
        for (_, interrupt) in &table.waiting {
            interrupt.ask();
        }
    }
}

/// A request that may be answered later.
#[derive(Clone, Copy)]
pub(super) struct Deferred {
    pub(super) opcode: Opcode,
    pub(super) unique: u64,
    /// When it came.
    pub(super) since: Instant,
}

/// Leave for one request to wait.
pub struct Wait<'s> {
    pub(super) waiting: &'s Waiting,
    pub(super) epoch: u64,
    pub(super) request: Deferred,
    pub(super) deferral: &'s dyn Deferral,
}

impl Wait<'_> {
    /// The request waits from now on, and is answered by what this returns and by nothing else.
    ///
    /// # Errors
    ///
    /// `EINTR` when it was interrupted already, or its session has ended.
    pub fn begin(self) -> Result<Pending> {
        let mut table = lock(&self.waiting.table);
        if table.epoch != self.epoch {
            return Err(Errno::INTR);
        }
        if let Some(at) = table.early.iter().position(|early| *early == self.request.unique) {
            table.early.remove(at);
            return Err(Errno::INTR);
        }
        let interrupt = Arc::new(Interrupt::default());
        table.waiting.push((self.request.unique, interrupt.clone()));
        drop(table);
        Ok(Pending {
            request: self.request,
            interrupt,
            completion: Some(self.deferral.defer()),
            table: self.waiting.table.clone(),
            counters: self.waiting.counters.clone(),
        })
    }
}

/// A request that waits. One that is dropped unfinished is answered with `EIO`.
pub struct Pending {
    request: Deferred,
    interrupt: Arc<Interrupt>,
    completion: Option<Box<dyn Completion>>,
    table: Arc<Mutex<Table>>,
    counters: Arc<Counters>,
}

impl Pending {
    /// By which it is asked to stop waiting. That it was asked does not mean that it must fail: what it waited
    /// for may have come at the same time.
    pub fn interrupt(&self) -> &Arc<Interrupt> {
        &self.interrupt
    }

    /// Answers the request, without a body.
    pub fn finish(mut self, result: Result<()>) {
        self.answer(result);
    }

    fn answer(&mut self, result: Result<()>) {
        let Some(completion) = self.completion.take() else {
            return;
        };
        // Before the guest knows, for then it may use the number again.
        lock(&self.table).waiting.retain(|(_, interrupt)| !Arc::ptr_eq(interrupt, &self.interrupt));
        let error = result.err().map_or(0, |errno| -errno.raw());
        let header = OutHeader { len: OUT_HEADER as u32, error, unique: self.request.unique };
        self.counters.finish(self.request.opcode, self.request.since.elapsed(), error != 0);
        completion.complete(header.as_slice());
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        self.answer(Err(Errno::IO));
    }
}
