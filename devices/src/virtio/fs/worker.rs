//! Serving one queue.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::Server;
use crate::memory::AtomicGuestMemory;
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
    /// The device is being reset, or the queue is broken: take no more requests.
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
    pub(super) fn run(&self) {
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

    /// Ends [`run`](Self::run) after the request it is busy with. Idempotent.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
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
    pub(super) fn service_queue(&self) {
        if let Err(error) = self.serve_all() {
            self.give_up(&error);
        }
    }

    fn give_up(&self, reason: &dyn std::fmt::Display) {
        log::warn!("queue {} of a file system stops: {reason}", self.index);
        self.stopped.store(true, Ordering::Release);
        self.interrupts.needs_reset();
    }

    fn serve_all(&self) -> Result<(), ServiceError> {
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
    fn serve_next(&self) -> Result<bool, ServiceError> {
        if self.stopped() {
            return Ok(false);
        }
        // A snapshot for each request: a guest that moves the window has no request in it meanwhile, and
        // one that does gets the old place.
        let memory = self.memory.memory();
        let Some(chain) = lock(&self.queue).pop(&memory)? else {
            return Ok(false);
        };
        let written = self.serve(&chain)?;
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

    fn serve(&self, chain: &Chain<'_>) -> Result<u32, ServiceError> {
        let serve = || self.server.serve(&chain.readable, &chain.writable);
        let written = catch_unwind(AssertUnwindSafe(serve)).map_err(|_| ServiceError::Panic)?;
        // More than there is room for was not written, whatever the server says.
        Ok(u32::try_from(chain.writable.len()).map_or(written, |room| written.min(room)))
    }
}
