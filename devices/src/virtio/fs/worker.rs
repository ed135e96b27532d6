//! Serving one queue: by the vCPUs that ring its doorbell, and by threads.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use vm_memory::GuestAddressSpace;

use super::Server;
use super::device::HIPRIO_QUEUES;
use super::dispatch::{BATCH, Counts, DEEP, Dispatch, MOST_THREADS, PAUSES};
use super::thread::{Spawn, Thread};
use crate::complaint::complain;
use crate::fuse::{Completion, Deferral, Served};
use crate::memory::{AtomicGuestMemory, BufferPlace, GuestMemory};
use crate::sync::lock;
use crate::virtio::queue::{Chain, Queue, QueueError};
use crate::virtio::{ActiveQueue, Interrupts};

/// Why a queue cannot be served any further.
#[derive(Debug, thiserror::Error)]
enum ServiceError {
    /// The driver has broken the queue.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The server has panicked over a request.
    #[error("the server has panicked")]
    Panic,
}

/// What a queue is served with, whatever it is.
pub(super) struct Service {
    pub(super) memory: AtomicGuestMemory,
    pub(super) interrupts: Arc<dyn Interrupts>,
    pub(super) server: Arc<dyn Server>,
    pub(super) dispatch: Dispatch,
    /// How long a queue is polled that is to be.
    pub(super) polled: Duration,
    pub(super) spawn: Spawn,
}

/// One queue and all it takes to serve it, from activation to reset.
///
/// Its requests are taken by the vCPUs that [ring](Self::ring), and by threads that [run](Self::run) it. All of them
/// take from the same ring, in order; what a vCPU finds that it would have to wait for it leaves to the threads, which
/// take that first. The driver is asked to ring for the next request before a request is served by a vCPU or may have
/// to be waited for, when the ring is empty, and when a thread is needed that does not come: so there is always
/// somebody who looks, and nobody rings for a thread that looks anyway.
pub(super) struct Worker {
    index: u16,
    service: Service,
    counts: Arc<Counts>,
    /// Held for the moments a request is taken or given back, never while one is served.
    line: Mutex<Line>,
    /// Its threads; `None` when no more are to come. Held while one is started, never while one is waited for. Taken
    /// before `line`.
    threads: Mutex<Option<Vec<Thread>>>,
    /// Where threads wait for a call.
    called: Condvar,
    /// vCPUs that are serving.
    inside: AtomicUsize,
    /// Where the end of that is waited for.
    left: Condvar,
    /// The device is being reset, or the queue is broken: take no more requests and give none back.
    stopped: AtomicBool,
}

/// The queue, and who is there to serve it.
struct Line {
    queue: Queue,
    /// Heads of requests that a vCPU would have had to wait for. Never more than the queue is long.
    handed_over: VecDeque<u16>,
    threads: usize,
    /// Of the threads, such as wait for a call and were not called.
    idle: usize,
    /// Calls that no thread has heard yet.
    calls: usize,
    /// Of the threads, such as serve what they may have to wait for.
    waiting: usize,
    /// One of them looks for the next request all the time.
    polled: bool,
}

impl Line {
    /// Whether one more thread would be of use; with `deep`, because there is much to do.
    fn wants_thread(&self, deep: bool) -> bool {
        self.idle == 0
            && self.threads < MOST_THREADS
            && (deep || self.waiting >= self.threads || self.handed_over.len() > usize::from(DEEP))
    }
}

/// A request that a thread has taken.
struct Task<'m> {
    chain: Chain<'m>,
    /// A vCPU has found that it may have to be waited for.
    waits: bool,
}

impl Worker {
    pub(super) fn new(active: ActiveQueue, service: Service, counts: Arc<Counts>) -> Self {
        let line = Line {
            handed_over: VecDeque::with_capacity(active.queue.size().into()),
            queue: active.queue,
            threads: 0,
            idle: 0,
            calls: 0,
            waiting: 0,
            polled: false,
        };
        Self {
            index: active.index,
            service,
            counts,
            line: Mutex::new(line),
            threads: Mutex::new(Some(Vec::new())),
            called: Condvar::new(),
            inside: AtomicUsize::new(0),
            left: Condvar::new(),
            stopped: AtomicBool::new(false),
        }
    }

    /// Starts one more thread, unless it has enough or is being stopped. Also for a vCPU, which waits at most for
    /// another one that does the same.
    ///
    /// # Errors
    ///
    /// The host's: then no thread comes, and whoever has left something to it must see to that.
    pub(super) fn add_thread(self: &Arc<Self>) -> io::Result<()> {
        let mut threads = lock(&self.threads);
        let Some(threads) = threads.as_mut() else { return Ok(()) };
        {
            let mut line = lock(&self.line);
            if line.threads >= MOST_THREADS {
                return Ok(());
            }
            line.threads += 1;
        }
        let body = self.clone();
        let name = format!("virtio-fs:{}", self.index);
        let started = Thread::start(&self.service.spawn, name, move || body.run());
        threads.push(started.inspect_err(|_| lock(&self.line).threads -= 1)?);
        Ok(())
    }

    /// Its threads, which were told to [`stop`](Self::stop). None is started from now on.
    pub(super) fn take_threads(&self) -> Vec<Thread> {
        lock(&self.threads).take().unwrap_or_default()
    }

    /// The body of a thread: serves the queue until [`stop`](Self::stop). The first round is for what the driver put
    /// in the queue before it was ready.
    fn run(self: &Arc<Self>) {
        while !self.stopped() {
            let more = self.serve_next().and_then(|served| match served {
                true => Ok(()),
                false => Ok(self.wait_for_call()?),
            });
            if let Err(error) = more {
                self.give_up(&error);
            }
        }
    }

    /// The doorbell was rung, by the vCPU whose thread this is. Serves what it need not wait for, or leaves it to the
    /// threads. What goes wrong ends this queue, and the driver is told.
    pub(super) fn ring(self: &Arc<Self>) {
        let _inside = Inside::enter(self);
        let thread_wanted = match self.service.dispatch {
            Dispatch::Worker | Dispatch::Poll => {
                self.leave_to_threads().map_err(ServiceError::from)
            }
            Dispatch::Auto | Dispatch::Inline => self.serve_inline(false),
        };
        let done = match thread_wanted {
            Ok(true) if !self.get_thread() => self.do_without_thread(),
            other => other.map(drop),
        };
        if let Err(error) = done {
            self.give_up(&error);
        }
    }

    /// Takes no more requests and gives none back. Threads end after the request that each is busy with. Requests
    /// that were to be answered later are not any more; when this returns, neither they nor a vCPU touch guest memory
    /// or interrupts. Idempotent.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        // Waits for the request that is being answered later at this moment: see `complete_later`.
        let mut line = lock(&self.line);
        self.called.notify_all();
        while self.inside.load(Ordering::SeqCst) > 0 {
            line = self.left.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    /// Ends the queue and tells the driver, unless it has ended already: the driver may be another one by now.
    fn give_up(&self, reason: &dyn std::fmt::Display) {
        // Whoever stops it waits for this lock: see `stop`. And with it no thread goes to sleep that has not seen it.
        let _line = lock(&self.line);
        if self.stopped.swap(true, Ordering::SeqCst) {
            return;
        }
        complain!("queue {} of a file system stops: {reason}", self.index);
        self.service.interrupts.needs_reset();
        self.called.notify_all();
    }

    /// Wakes a thread that waits for a call; `false` when there is none.
    fn call(&self, line: &mut Line) -> bool {
        if line.idle == 0 {
            return false;
        }
        line.idle -= 1;
        line.calls += 1;
        self.called.notify_one();
        true
    }

    /// Looks for the next request for a while, unless another thread does. Meanwhile nobody asks the driver to ring.
    /// `true` when there is something to do.
    fn poll(&self) -> Result<bool, QueueError> {
        if std::mem::replace(&mut lock(&self.line).polled, true) {
            return Ok(false);
        }
        let found = self.look_until(Instant::now() + self.service.polled);
        lock(&self.line).polled = false;
        found
    }

    fn look_until(&self, end: Instant) -> Result<bool, QueueError> {
        while !self.stopped() {
            {
                let memory = self.service.memory.memory();
                let line = lock(&self.line);
                if !line.handed_over.is_empty() || line.queue.waiting(&memory)? > 0 {
                    return Ok(true);
                }
            }
            if Instant::now() >= end {
                break;
            }
            (0..PAUSES).for_each(|_| std::hint::spin_loop());
        }
        Ok(false)
    }

    /// Sleeps until there is something to do, or the queue stops.
    fn wait_for_call(&self) -> Result<(), QueueError> {
        if self.service.dispatch == Dispatch::Poll && !self.is_urgent() && self.poll()? {
            return Ok(());
        }
        let memory = self.service.memory.memory();
        let mut line = lock(&self.line);
        if line.queue.ask_for_next(&memory)? || !line.handed_over.is_empty() {
            return Ok(());
        }
        // Not to be kept while it sleeps: a window may move.
        drop(memory);
        line.idle += 1;
        while line.calls == 0 && !self.stopped() {
            line = self.called.wait(line).unwrap_or_else(PoisonError::into_inner);
        }
        line.calls = line.calls.saturating_sub(1);
        Ok(())
    }

    /// Has one more thread serve the queue; `false` when none could be started.
    fn get_thread(self: &Arc<Self>) -> bool {
        let added = self.add_thread();
        if let Err(error) = &added {
            log::debug!("a file system goes on with fewer threads: {error}");
        }
        added.is_ok()
    }

    /// A vCPU has left something to a thread that cannot be started. Serves what it can itself. What is left then
    /// waits for the threads that there are; with the next request the driver rings, and another thread is tried.
    fn do_without_thread(self: &Arc<Self>) -> Result<(), ServiceError> {
        if matches!(self.service.dispatch, Dispatch::Auto | Dispatch::Inline) {
            self.serve_inline(true)?;
        }
        let memory = self.service.memory.memory();
        let mut line = lock(&self.line);
        if !self.stopped() && line.queue.ask_for_next(&memory)? {
            self.call(&mut line);
        }
        Ok(())
    }

    /// Has threads serve what is in the queue. `true` when one more would be of use.
    fn leave_to_threads(&self) -> Result<bool, QueueError> {
        let memory = self.service.memory.memory();
        let mut line = lock(&self.line);
        if self.stopped() || self.call(&mut line) {
            return Ok(false);
        }
        // None looks before it is done: the next ring finds out whether that is still so.
        if line.waiting >= line.threads {
            line.queue.ask_for_next(&memory)?;
        }
        let depth = line.queue.waiting(&memory)?;
        Ok(line.wants_thread(depth > DEEP))
    }

    /// Serves what a vCPU need not wait for, `alone` also where threads would serve it better. `true` when one more
    /// thread would be of use.
    fn serve_inline(self: &Arc<Self>, alone: bool) -> Result<bool, ServiceError> {
        let mut thread_wanted = false;
        for _ in 0..BATCH {
            // A snapshot for each request: a guest that moves the window has no request in it meanwhile, and
            // one that does gets the old place.
            let memory = self.service.memory.memory();
            let Some(chain) = self.take_inline(&memory, alone, &mut thread_wanted)? else {
                return Ok(thread_wanted);
            };
            match self.serve_at_once(&chain)? {
                Some(served) => {
                    Counts::add(&self.counts.inline);
                    self.complete(&memory, &chain, served)?;
                }
                None => {
                    Counts::add(&self.counts.handed_over);
                    let mut line = lock(&self.line);
                    line.handed_over.push_back(chain.head);
                    thread_wanted |= !self.call(&mut line) && line.wants_thread(false);
                }
            }
        }
        Ok(self.leave_to_threads()? | thread_wanted)
    }

    /// The next request for a vCPU. `None` when there is none, or so many that threads serve them, of which one more
    /// may be of use, unless the vCPU is `alone`.
    fn take_inline<'m>(
        &self,
        memory: &'m GuestMemory,
        alone: bool,
        thread_wanted: &mut bool,
    ) -> Result<Option<Chain<'m>>, QueueError> {
        let mut line = lock(&self.line);
        if self.stopped() {
            return Ok(None);
        }
        // None could be started when these were left to it: tried again.
        *thread_wanted |= !line.handed_over.is_empty() && line.wants_thread(false);
        let deep = line.queue.waiting(memory)? > DEEP;
        if deep && !alone && self.service.dispatch == Dispatch::Auto {
            let one_more = line.wants_thread(true);
            *thread_wanted |= one_more;
            if self.call(&mut line) || one_more || line.waiting < line.threads {
                return Ok(None);
            }
        }
        let chain = line.queue.pop(memory)?;
        // Before this one is served: another vCPU is to ring for the next, and not to wait for this one.
        match line.queue.ask_for_next(memory)? && chain.is_none() {
            true => line.queue.pop(memory),
            false => Ok(chain),
        }
    }

    /// Serves one request on a thread; `false` when there is none.
    fn serve_next(self: &Arc<Self>) -> Result<bool, ServiceError> {
        let memory = self.service.memory.memory();
        let Some(task) = self.take(&memory)? else {
            return Ok(false);
        };
        let at_once = if task.waits { None } else { self.serve_at_once(&task.chain)? };
        Counts::add(&self.counts.by_threads);
        if let Some(served) = at_once {
            self.complete(&memory, &task.chain, served)?;
            return Ok(true);
        }
        if self.begin_to_wait(&memory)? {
            // Without one, whoever rings next looks, which the driver was asked to.
            self.get_thread();
        }
        let served = self.serve(&task.chain);
        lock(&self.line).waiting -= 1;
        self.complete(&memory, &task.chain, served?)?;
        Ok(true)
    }

    fn take<'m>(&self, memory: &'m GuestMemory) -> Result<Option<Task<'m>>, QueueError> {
        let mut line = lock(&self.line);
        if self.stopped() {
            return Ok(None);
        }
        if let Some(head) = line.handed_over.pop_front() {
            return Ok(Some(Task { chain: line.queue.again(memory, head)?, waits: true }));
        }
        if line.queue.waiting(memory)? > DEEP {
            self.call(&mut line);
        }
        let chain = line.queue.pop(memory)?;
        Ok(chain.map(|chain| Task { chain, waits: false }))
    }

    /// A thread is about to serve what may have to be waited for: somebody else is to look at the queue meanwhile.
    /// `true` when there is something to do already, and nobody for it.
    fn begin_to_wait(&self, memory: &GuestMemory) -> Result<bool, QueueError> {
        let mut line = lock(&self.line);
        line.waiting += 1;
        let more = line.queue.ask_for_next(memory)? || !line.handed_over.is_empty();
        Ok(more && !self.call(&mut line) && line.wants_thread(false))
    }

    /// Gives a request back that was served. The driver learns of it before the next one is begun, because that one may
    /// take as long as a disk does. That still makes one interrupt for a batch: the driver says with EVENT_IDX from
    /// which request on it wants the next one, and moves that on when it has looked.
    fn complete(
        &self,
        memory: &GuestMemory,
        chain: &Chain<'_>,
        served: Served,
    ) -> Result<(), QueueError> {
        match served {
            // More than there is room for was not written, whatever the server says.
            Served::Done(written) => {
                let room = u32::try_from(chain.writable.len()).unwrap_or(u32::MAX);
                self.give_back(memory, lock(&self.line), chain.head, written.min(room))
            }
            // Somebody else gives it back.
            Served::Later => Ok(()),
        }
    }

    fn give_back(
        &self,
        memory: &GuestMemory,
        mut line: MutexGuard<'_, Line>,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        if self.stopped() {
            return Ok(());
        }
        line.queue.complete(memory, head, written)?;
        if line.queue.interrupt_wanted(memory)? {
            self.service.interrupts.queue(self.index);
        }
        Ok(())
    }

    fn is_urgent(&self) -> bool {
        self.index < HIPRIO_QUEUES
    }

    fn serve(self: &Arc<Self>, chain: &Chain<'_>) -> Result<Served, ServiceError> {
        let Chain { readable, writable, .. } = chain;
        let serve = || match self.is_urgent() {
            true => Served::Done(self.service.server.serve_urgent(readable, writable)),
            false => {
                let deferral = ChainDeferral { worker: self, chain };
                self.service.server.serve(readable, writable, &deferral)
            }
        };
        catch_unwind(AssertUnwindSafe(serve)).map_err(|_| ServiceError::Panic)
    }

    /// `None` when it would have to be waited for.
    fn serve_at_once(self: &Arc<Self>, chain: &Chain<'_>) -> Result<Option<Served>, ServiceError> {
        let Chain { readable, writable, .. } = chain;
        let serve = || match self.is_urgent() {
            true => self.service.server.serve_urgent_at_once(readable, writable).map(Served::Done),
            false => {
                let deferral = ChainDeferral { worker: self, chain };
                self.service.server.serve_at_once(readable, writable, &deferral)
            }
        };
        catch_unwind(AssertUnwindSafe(serve)).map_err(|_| ServiceError::Panic)
    }

    /// Writes the reply of a request that was to be answered later, and gives the request back.
    ///
    /// All of it happens under the queue's lock, so that [`stop`](Self::stop) finds either nothing begun or
    /// all done.
    fn complete_later(&self, request: &LaterRequest, reply: &[u8]) -> Result<(), QueueError> {
        let line = lock(&self.line);
        if self.stopped() {
            return Ok(());
        }
        let memory = self.service.memory.memory();
        let write = |place: &BufferPlace| place.buffer(&memory)?.write_at(0, reply);
        // A driver that has moved the memory away under its own request gets it back without a reply.
        let written = match (write(&request.place), u32::try_from(reply.len())) {
            (Ok(()), Ok(len)) => len,
            _ => 0,
        };
        self.give_back(&memory, line, request.head, written)
    }
}

/// A vCPU is serving, until this is dropped.
struct Inside<'w>(&'w Worker);

impl<'w> Inside<'w> {
    /// Before it looks whether the queue has stopped: whoever stops it then looks whether somebody is inside.
    fn enter(worker: &'w Worker) -> Self {
        worker.inside.fetch_add(1, Ordering::SeqCst);
        Self(worker)
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
        if self.0.stopped() {
            // Who waits has either seen it or waits already.
            drop(lock(&self.0.line));
            self.0.left.notify_all();
        }
    }
}

/// Lets the request that is being served be answered later.
struct ChainDeferral<'w, 'm> {
    worker: &'w Arc<Worker>,
    chain: &'w Chain<'m>,
}

impl Deferral for ChainDeferral<'_, '_> {
    fn defer(&self) -> Box<dyn Completion> {
        Box::new(LaterRequest {
            worker: Arc::downgrade(self.worker),
            head: self.chain.head,
            place: self.chain.writable.place(),
        })
    }
}

/// A request that is still the device's. There are never more of them than the queue has descriptors.
struct LaterRequest {
    /// Gone when the device was reset: whoever answers then must not keep the memory of an old guest.
    worker: Weak<Worker>,
    head: u16,
    place: BufferPlace,
}

impl Completion for LaterRequest {
    fn complete(self: Box<Self>, reply: &[u8]) {
        if let Some(worker) = self.worker.upgrade()
            && let Err(error) = worker.complete_later(&self, reply)
        {
            worker.give_up(&error);
        }
    }
}
