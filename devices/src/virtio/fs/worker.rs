//! Serving one queue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::Server;
use super::device::HIPRIO_QUEUES;
use crate::fuse::{Completion, Deferral, Served};
use crate::memory::{AtomicGuestMemory, BufferPlace};
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

/// One queue and all it takes to serve it, from activation to reset.
pub(super) struct Worker {
    index: u16,
    /// Held for the moments a request is taken or given back, never while one is served.
    queue: Mutex<Queue>,
    memory: AtomicGuestMemory,
    interrupts: Arc<dyn Interrupts>,
    server: Arc<dyn Server>,
    doorbell: Arc<EventFd>,
    /// The device is being reset, or the queue is broken: take no more requests and give none back.
    stopped: AtomicBool,
}

impl Worker {
    pub(super) fn new(
        active: ActiveQueue,
        memory: AtomicGuestMemory,
        interrupts: Arc<dyn Interrupts>,
        server: Arc<dyn Server>,
        doorbell: Arc<EventFd>,
    ) -> Self {
        Self {
            index: active.index,
            queue: Mutex::new(active.queue),
            memory,
            interrupts,
            server,
            doorbell,
            stopped: AtomicBool::new(false),
        }
    }

    /// The thread's body: serves the queue whenever the doorbell rings, until [`stop`](Self::stop).
    pub(super) fn run(self: &Arc<Self>) {
        // The first round is for what the driver put in the queue before it was ready.
        while !self.stopped() {
            self.service_queue();
            if self.stopped() {
                break;
            }
            if let Err(error) = self.doorbell.read()
                && error.raw_os_error() != Some(libc::EINTR)
            {
                self.give_up(&format_args!("its doorbell is broken: {error}"));
            }
        }
    }

    /// Ends [`run`](Self::run) after the request it is busy with. Requests that were to be answered later are
    /// not any more: when this returns, none of them touches guest memory or interrupts. Idempotent.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // Waits for the one that is being answered at this moment: see `complete_later`.
        drop(lock(&self.queue));
        if let Err(error) = self.doorbell.write(1) {
            log::error!("a doorbell does not ring: {error}");
        }
    }

    fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Serves all that is in the queue, and returns when it is empty and the driver is to notify of the
    /// next request. Any thread may call this, several at a time. What goes wrong ends this queue, and the
    /// driver is told.
    pub(super) fn service_queue(self: &Arc<Self>) {
        if let Err(error) = self.serve_all() {
            self.give_up(&error);
        }
    }

    fn give_up(&self, reason: &dyn std::fmt::Display) {
        log::warn!("queue {} of a file system stops: {reason}", self.index);
        self.stopped.store(true, Ordering::Release);
        self.interrupts.needs_reset();
    }

    fn serve_all(self: &Arc<Self>) -> Result<(), ServiceError> {
        loop {
            // Rings are always RAM, so any snapshot has them at the same place.
            lock(&self.queue).disable_notification(&self.memory.memory())?;
            while self.serve_next()? {}
            let more = lock(&self.queue).enable_notification(&self.memory.memory())?;
            if !more || self.stopped() {
                return Ok(());
            }
        }
    }

    /// Serves one request; `false` when there is none.
    fn serve_next(self: &Arc<Self>) -> Result<bool, ServiceError> {
        if self.stopped() {
            return Ok(false);
        }
        // A snapshot for each request: a guest that moves the window has no request in it meanwhile, and
        // one that does gets the old place.
        let memory = self.memory.memory();
        let Some(chain) = lock(&self.queue).pop(&memory)? else {
            return Ok(false);
        };
        let Some(written) = self.serve(&chain)? else {
            return Ok(true);
        };
        // The driver learns of this request before the next one is begun, because that one may take as
        // long as a disk does. That still makes one interrupt for a batch: the driver says with EVENT_IDX
        // from which request on it wants the next one, and moves that on when it has looked.
        let mut queue = lock(&self.queue);
        queue.complete(&memory, chain.head, written)?;
        let interrupt = queue.interrupt_wanted(&memory)?;
        drop(queue);
        if interrupt {
            self.interrupts.queue(self.index);
        }
        Ok(true)
    }

    /// Serves what was taken from the queue; `None` when it is given back later.
    fn serve(self: &Arc<Self>, chain: &Chain<'_>) -> Result<Option<u32>, ServiceError> {
        let serve = || {
            if self.index < HIPRIO_QUEUES {
                Served::Done(self.server.serve_urgent(&chain.readable, &chain.writable))
            } else {
                let deferral = ChainDeferral { worker: self, chain };
                self.server.serve(&chain.readable, &chain.writable, &deferral)
            }
        };
        let served = catch_unwind(AssertUnwindSafe(serve)).map_err(|_| ServiceError::Panic)?;
        Ok(match served {
            // More than there is room for was not written, whatever the server says.
            Served::Done(written) => {
                Some(u32::try_from(chain.writable.len()).map_or(written, |room| written.min(room)))
            }
            Served::Later => None,
        })
    }

    /// Writes the reply of a request that was to be answered later, and gives the request back.
    ///
    /// All of it happens under the queue's lock, so that [`stop`](Self::stop) finds either nothing begun or
    /// all done.
    fn complete_later(&self, request: &LaterRequest, reply: &[u8]) -> Result<(), QueueError> {
        let mut queue = lock(&self.queue);
        if self.stopped() {
            return Ok(());
        }
        let memory = self.memory.memory();
        let write = |place: &BufferPlace| place.buffer(&memory)?.write_at(0, reply);
        // A driver that has moved the memory away under its own request gets it back without a reply.
        let written = match (write(&request.place), u32::try_from(reply.len())) {
            (Ok(()), Ok(len)) => len,
            _ => 0,
        };
        queue.complete(&memory, request.head, written)?;
        if queue.interrupt_wanted(&memory)? {
            self.interrupts.queue(self.index);
        }
        Ok(())
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
