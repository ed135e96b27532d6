//! The thread that fills buffers, from activation to reset.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use crate::complaint::complain;
use crate::memory::{AtomicGuestMemory, GuestBuffer};
use crate::virtio::queue::QueueError;
use crate::virtio::{ActiveQueue, Interrupts};

/// Most bytes for one request, however long its buffer is: several times what Linux asks for at once. The
/// driver learns how many it got.
const MAX_BYTES: usize = 4096;

/// What the thread works with.
pub(super) struct Worker {
    pub(super) requests: ActiveQueue,
    pub(super) memory: AtomicGuestMemory,
    pub(super) interrupts: Arc<dyn Interrupts>,
    /// Rung by the driver's notifications, and to stop.
    pub(super) doorbell: Arc<EventFd>,
    pub(super) stopped: Arc<AtomicBool>,
}

impl Worker {
    /// The thread's body: works whenever the doorbell rings, until stopped.
    pub(super) fn run(mut self) {
        while !self.stopped() {
            if let Err(error) = self.serve_all() {
                return self.give_up(&error);
            }
            if self.stopped() {
                return;
            }
            if let Err(error) = self.doorbell.read()
                && error.raw_os_error() != Some(libc::EINTR)
            {
                return self.give_up(&format_args!("its doorbell is broken: {error}"));
            }
        }
    }

    fn stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    fn give_up(&self, reason: &dyn std::fmt::Display) {
        complain!("an entropy device stops: {reason}");
        self.interrupts.needs_reset();
    }

    /// Serves all that is in the queue, and returns when the driver is to notify of the next request.
    fn serve_all(&mut self) -> Result<(), QueueError> {
        loop {
            // Rings are always RAM, so any snapshot has them at the same place.
            let memory = self.memory.memory();
            self.requests.queue.disable_notification(&memory)?;
            while !self.stopped() {
                let Some(chain) = self.requests.queue.pop(&memory)? else { break };
                let written = fill(&chain.writable);
                self.requests.queue.complete(&memory, chain.head, written)?;
                if self.requests.queue.interrupt_wanted(&memory)? {
                    self.interrupts.queue(self.requests.index);
                }
            }
            if self.stopped() || !self.requests.queue.enable_notification(&memory)? {
                return Ok(());
            }
        }
    }
}

/// Fills a buffer, and says with how many bytes.
fn fill(buffer: &GuestBuffer<'_>) -> u32 {
    let mut bytes = [0; MAX_BYTES];
    let wanted = bytes.get_mut(..buffer.len().min(MAX_BYTES)).unwrap_or_default();
    // The pool of a host that runs guests is seeded long since; more than 256 bytes may be cut short by a
    // signal, and what is there is good.
    let random = match getrandom(&mut *wanted, GetRandomFlags::empty()) {
        Ok(count) => wanted.get(..count).unwrap_or_default(),
        Err(error) => {
            complain!(host: "the host has no random bytes: {error}");
            return 0;
        }
    };
    match buffer.write_at(0, random) {
        // At most `MAX_BYTES`.
        Ok(()) => random.len() as u32,
        // A page of a DAX window is gone.
        Err(_) => 0,
    }
}
