//! What the guest sends from a port, on its way to a writer.
//!
//! The thread lives as long as the device and not from activation to reset, as others do: it may hang in its
//! writer for as long as nobody reads there, and neither a reset nor the end of the machine shall wait for
//! that. So it holds no guest memory while it writes: bytes are copied out, piece by piece.

use std::io::Write;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use crate::complaint::complain;
use crate::memory::AtomicGuestMemory;
use crate::sync::lock;
use crate::virtio::queue::QueueError;
use crate::virtio::{ActiveQueue, Interrupts};

/// Most bytes copied and written at once, whatever a chain's length: twice what Linux sends in one chain.
const PIECE: usize = 64 << 10;

/// How the thread goes on.
const RUN: u8 = 0;
/// Once more through the queue, then end.
const FINISH: u8 = 1;
/// End.
const LEAVE: u8 = 2;

/// One port's output.
pub(super) struct Transmitter {
    doorbell: EventFd,
    slot: Mutex<Slot>,
    orders: AtomicU8,
}

/// Guest memory is touched, and the guest interrupted, only under this lock and while there is a queue.
#[derive(Default)]
struct Slot {
    active: Option<Active>,
    /// Counts the queues, so that a request is not completed in a later one.
    generation: u64,
}

struct Active {
    queue: ActiveQueue,
    memory: AtomicGuestMemory,
    interrupts: Arc<dyn Interrupts>,
}

impl Transmitter {
    pub(super) fn new(doorbell: EventFd) -> Self {
        Self { doorbell, slot: Mutex::default(), orders: AtomicU8::new(RUN) }
    }

    /// From now on this is the queue.
    pub(super) fn activate(
        &self,
        queue: ActiveQueue,
        memory: AtomicGuestMemory,
        interrupts: Arc<dyn Interrupts>,
    ) {
        let mut slot = lock(&self.slot);
        slot.generation += 1;
        slot.active = Some(Active { queue, memory, interrupts });
        drop(slot);
        self.ring();
    }

    /// From now on there is no queue: guest memory is not touched any more when this returns. What was not
    /// taken out of the queue is lost.
    pub(super) fn reset(&self) {
        lock(&self.slot).active = None;
    }

    /// The driver has put something in the queue.
    pub(super) fn ring(&self) {
        if let Err(error) = self.doorbell.write(1) {
            log::error!("a doorbell does not ring: {error}");
        }
    }

    /// Lets the thread end once the queue is empty.
    pub(super) fn finish(&self) {
        self.order(FINISH);
    }

    /// Lets the thread end as soon as its writer lets it.
    pub(super) fn leave(&self) {
        self.reset();
        self.order(LEAVE);
    }

    fn order(&self, order: u8) {
        self.orders.fetch_max(order, Ordering::SeqCst);
        self.ring();
    }

    /// The thread's body.
    pub(super) fn run(&self, mut writer: Box<dyn Write + Send>) {
        loop {
            let order = self.orders.load(Ordering::SeqCst);
            if order == LEAVE {
                return;
            }
            if let Err(error) = self.transmit_all(&mut *writer) {
                self.give_up(&error);
            }
            if order == FINISH {
                return;
            }
            if let Err(error) = self.doorbell.read()
                && error.raw_os_error() != Some(libc::EINTR)
            {
                self.give_up(&format_args!("its doorbell is broken: {error}"));
                return;
            }
        }
    }

    fn give_up(&self, reason: &dyn std::fmt::Display) {
        if let Some(active) = lock(&self.slot).active.take() {
            complain!("queue {} of a console stops: {reason}", active.queue.index);
            active.interrupts.needs_reset();
        }
    }

    fn transmit_all(&self, writer: &mut dyn Write) -> Result<(), QueueError> {
        loop {
            // Rings are always RAM, so any snapshot has them at the same place.
            if let Some(active) = &mut lock(&self.slot).active {
                let memory = active.memory.memory();
                active.queue.queue.disable_notification(&memory)?;
            }
            while self.transmit_next(writer)? {}
            let more = match &mut lock(&self.slot).active {
                Some(active) => {
                    let memory = active.memory.memory();
                    active.queue.queue.enable_notification(&memory)?
                }
                None => false,
            };
            if !more {
                return Ok(());
            }
        }
    }

    /// Writes one request; `false` when there is none.
    fn transmit_next(&self, writer: &mut dyn Write) -> Result<bool, QueueError> {
        let mut slot = lock(&self.slot);
        let generation = slot.generation;
        let Some(active) = &mut slot.active else { return Ok(false) };
        let memory = active.memory.memory();
        let Some(chain) = active.queue.queue.pop(&memory)? else { return Ok(false) };
        let mut done = 0;
        while done < chain.readable.len() {
            let mut piece = vec![0; PIECE.min(chain.readable.len() - done)];
            if let Err(error) = chain.readable.read_at(done, &mut piece) {
                log::debug!("output of a console is lost: {error}");
                break;
            }
            done += piece.len();
            drop(slot);
            // The driver is told only now, which is how a slow reader slows the guest down.
            if let Err(error) = writer.write_all(&piece) {
                log::debug!("output of a console is lost: {error}");
            }
            slot = lock(&self.slot);
            if slot.generation != generation || slot.active.is_none() {
                // Reset meanwhile: the request is the driver's again.
                return Ok(true);
            }
        }
        if let Some(active) = &mut slot.active {
            let queue = &mut active.queue.queue;
            queue.complete(&memory, chain.head, 0)?;
            if queue.interrupt_wanted(&memory)? {
                active.interrupts.queue(active.queue.index);
            }
        }
        Ok(true)
    }
}
