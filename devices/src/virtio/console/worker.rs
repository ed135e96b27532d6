//! Control messages, and input on its way into the guest: one thread from activation to reset.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::control::{FromDriver, HEADER_SIZE, Unsaid};
use super::input::Pending;
use crate::complaint::complain;
use crate::memory::{AtomicGuestMemory, GuestMemory};
use crate::virtio::queue::QueueError;
use crate::virtio::{ActiveQueue, Interrupts};

/// Most bytes put into one buffer of the driver's. Linux offers pages.
const PIECE: usize = 64 << 10;

/// A port, as the driver knows it since activation.
pub(super) struct PortState {
    name: Arc<str>,
    input: Arc<Pending>,
    receive: Option<ActiveQueue>,
    /// Linux throws away what comes for a port that nobody has open: input waits for that.
    guest_open: bool,
    host_open: bool,
    unsaid: Unsaid,
}

impl PortState {
    /// A port that the driver has not heard of.
    pub(super) fn new(name: Arc<str>, input: Arc<Pending>, receive: Option<ActiveQueue>) -> Self {
        Self {
            name,
            input,
            receive,
            guest_open: false,
            host_open: false,
            unsaid: Unsaid::default(),
        }
    }
}

/// What the thread works with.
pub(super) struct Worker {
    pub(super) ports: Vec<PortState>,
    /// What the device says.
    pub(super) control_receive: Option<ActiveQueue>,
    /// What the driver says.
    pub(super) control_transmit: Option<ActiveQueue>,
    pub(super) memory: AtomicGuestMemory,
    pub(super) interrupts: Arc<dyn Interrupts>,
    /// Rung by the driver's notifications, by senders of input, and to stop.
    pub(super) doorbell: Arc<EventFd>,
    pub(super) stopped: Arc<AtomicBool>,
}

impl Worker {
    /// The thread's body: works whenever the doorbell rings, until stopped.
    pub(super) fn run(mut self) {
        while !self.stopped() {
            if let Err(error) = self.service() {
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
        complain!("the input of a console stops: {reason}");
        self.interrupts.needs_reset();
    }

    /// Does all that can be done, and returns when the driver is to notify of what comes next.
    fn service(&mut self) -> Result<(), QueueError> {
        loop {
            let mut more = self.listen()?;
            for index in 0..self.ports.len() {
                more |= self.deliver(index)?;
            }
            more |= self.speak()?;
            if !more || self.stopped() {
                return Ok(());
            }
        }
    }

    /// Takes the driver's messages. `true`: there are more already.
    fn listen(&mut self) -> Result<bool, QueueError> {
        let memory = self.memory.memory();
        let Some(mut active) = self.control_transmit.take() else { return Ok(false) };
        let queue = &mut active.queue;
        queue.disable_notification(&memory)?;
        while !self.stopped() {
            let Some(chain) = queue.pop(&memory)? else { break };
            let mut header = [0; HEADER_SIZE];
            let message = match chain.readable.read_at(0, &mut header) {
                Ok(()) => FromDriver::decode(header),
                Err(_) => None,
            };
            match message {
                Some(message) => self.take(message),
                None => log::debug!("a control message of a console makes no sense: ignored"),
            }
            queue.complete(&memory, chain.head, 0)?;
            if queue.interrupt_wanted(&memory)? {
                self.interrupts.queue(active.index);
            }
        }
        let more = queue.enable_notification(&memory)?;
        self.control_transmit = Some(active);
        Ok(more)
    }

    fn take(&mut self, message: FromDriver) {
        match message {
            FromDriver::DeviceReady(true) => {
                self.ports.iter_mut().for_each(|port| port.unsaid.add = true);
            }
            FromDriver::DeviceReady(false) => complain!("a guest cannot use its console"),
            FromDriver::PortReady(id, true) => {
                if let Some(port) = self.port(id) {
                    port.host_open = true;
                    port.unsaid.open = true;
                    port.unsaid.name = true;
                }
            }
            FromDriver::PortReady(id, false) => complain!("a guest cannot use console port {id}"),
            FromDriver::PortOpen(id, open) => {
                if let Some(port) = self.port(id) {
                    port.guest_open = open;
                }
            }
        }
    }

    /// The port that the driver means. One that does not exist is nobody's business.
    fn port(&mut self, id: u32) -> Option<&mut PortState> {
        self.ports.get_mut(usize::try_from(id).ok()?)
    }

    /// Puts a port's input into the driver's buffers. `true`: there is more to do already.
    fn deliver(&mut self, index: usize) -> Result<bool, QueueError> {
        let memory = self.memory.memory();
        let Some(port) = self.ports.get_mut(index) else { return Ok(false) };
        if !port.guest_open || !port.host_open {
            return Ok(false);
        }
        let mut starved = false;
        if let Some(active) = &mut port.receive {
            let queue = &mut active.queue;
            queue.disable_notification(&memory)?;
            let mut delivered = false;
            while !port.input.is_empty() && !self.stopped.load(Ordering::Acquire) {
                let Some(chain) = queue.pop(&memory)? else {
                    starved = true;
                    break;
                };
                let bytes = port.input.peek(chain.writable.len().min(PIECE));
                let written = match chain.writable.write_at(0, &bytes) {
                    Ok(()) => bytes.len(),
                    // The buffer is gone (see `memory`): the next one gets them.
                    Err(_) => 0,
                };
                port.input.consume(written);
                // At most `PIECE`.
                queue.complete(&memory, chain.head, written as u32)?;
                delivered = true;
            }
            if delivered && queue.interrupt_wanted(&memory)? {
                self.interrupts.queue(active.index);
            }
            if starved {
                return queue.enable_notification(&memory);
            }
        }
        if port.input.at_end() {
            // Said after the last byte is in the ring, so that Linux finds that first.
            port.host_open = false;
            port.unsaid.open = true;
        }
        Ok(false)
    }

    /// Tells the driver what is unsaid. `true`: there is more to do already.
    fn speak(&mut self) -> Result<bool, QueueError> {
        let memory = self.memory.memory();
        let Some(active) = &mut self.control_receive else { return Ok(false) };
        let queue = &mut active.queue;
        queue.disable_notification(&memory)?;
        let mut said = false;
        let mut starved = false;
        for (id, port) in (0..).zip(&mut self.ports) {
            while let Some((message, rest)) = port.unsaid.next(&port.name, port.host_open) {
                if starved || self.stopped.load(Ordering::Acquire) {
                    break;
                }
                match put(queue, &memory, &message.encode(id))? {
                    Some(true) => port.unsaid = rest,
                    // Too small a buffer: it is in the next one, perhaps.
                    Some(false) => {}
                    None => starved = true,
                }
                said = true;
            }
        }
        if said && queue.interrupt_wanted(&memory)? {
            self.interrupts.queue(active.index);
        }
        if starved { queue.enable_notification(&memory) } else { Ok(false) }
    }
}

/// Puts a message into the driver's next buffer. `None` when there is no buffer, `false` when the message did
/// not fit it.
fn put(
    queue: &mut crate::virtio::Queue,
    memory: &GuestMemory,
    message: &[u8],
) -> Result<Option<bool>, QueueError> {
    let Some(chain) = queue.pop(memory)? else { return Ok(None) };
    let fits = chain.writable.write_at(0, message).is_ok();
    let written = if fits { message.len() as u32 } else { 0 };
    queue.complete(memory, chain.head, written)?;
    Ok(Some(fits))
}
