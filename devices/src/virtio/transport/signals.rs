//! What a device tells its driver: interrupts, the ISR status, DEVICE_NEEDS_RESET.
//!
//! All of it is atomic, because workers come here while a vCPU may hold the lock of the registers. Each
//! value stands for itself; none guards memory, so their order does not matter.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use crate::pci::Msix;
use crate::virtio::Interrupts;

/// An event has no vector (4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// ISR status (4.1.4.5).
const ISR_QUEUE: u8 = 1;
const ISR_CONFIGURATION: u8 = 2;

/// The part of the transport that a device holds on to.
pub(super) struct Signals {
    msix: Arc<Msix>,
    isr: AtomicU8,
    generation: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    needs_reset: AtomicBool,
    /// DRIVER_OK is set: the driver may be told that the device needs a reset.
    driver_ok: AtomicBool,
    /// The device is active: it may be notified.
    running: AtomicBool,
}

impl Signals {
    pub(super) fn new(msix: Arc<Msix>, queues: usize) -> Self {
        Self {
            msix,
            isr: AtomicU8::new(0),
            generation: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queues).map(|_| AtomicU16::new(NO_VECTOR)).collect(),
            needs_reset: AtomicBool::new(false),
            driver_ok: AtomicBool::new(false),
            running: AtomicBool::new(false),
        }
    }

    /// Reads the ISR status, which clears it.
    pub(super) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::Relaxed)
    }

    /// `config_generation`: changes with the device configuration.
    pub(super) fn generation(&self) -> u8 {
        self.generation.load(Ordering::Relaxed)
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Relaxed)
    }

    /// A vector that does not exist is NO_VECTOR, which the driver reads back.
    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config_vector.store(self.existing(vector), Ordering::Relaxed);
    }

    pub(super) fn queue_vector(&self, queue: u16) -> u16 {
        self.queue_vectors
            .get(usize::from(queue))
            .map_or(NO_VECTOR, |vector| vector.load(Ordering::Relaxed))
    }

    /// As [`set_config_vector`](Self::set_config_vector), for a queue.
    pub(super) fn set_queue_vector(&self, queue: u16, vector: u16) {
        if let Some(slot) = self.queue_vectors.get(usize::from(queue)) {
            slot.store(self.existing(vector), Ordering::Relaxed);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
        if vector < self.msix.count() { vector } else { NO_VECTOR }
    }

    /// Whether the device needs a reset.
    pub(super) fn is_broken(&self) -> bool {
        self.needs_reset.load(Ordering::Relaxed)
    }

    /// The driver has set DRIVER_OK.
    pub(super) fn set_driver_ok(&self) {
        self.driver_ok.store(true, Ordering::SeqCst);
    }

    /// Whether the device may be notified.
    pub(super) fn running(&self) -> bool {
        self.running.load(Ordering::Acquire)
    }

    /// The device is active, or from now on no longer.
    pub(super) fn set_running(&self, running: bool) {
        self.running.store(running, Ordering::Release);
    }

    /// All as it was in the beginning. The device has been reset and holds no requests.
    pub(super) fn reset(&self) {
        self.set_running(false);
        self.driver_ok.store(false, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
        self.isr.store(0, Ordering::Relaxed);
        for vector in self.queue_vectors.iter().chain([&self.config_vector]) {
            vector.store(NO_VECTOR, Ordering::Relaxed);
        }
    }

    /// A configuration change notification.
    pub(super) fn notify_configuration(&self) {
        self.isr.fetch_or(ISR_CONFIGURATION, Ordering::Relaxed);
        // NO_VECTOR is above all vectors that exist.
        self.msix.trigger(self.config_vector());
    }
}

impl Interrupts for Signals {
    fn queue(&self, queue: u16) {
        // The ISR bit is for drivers without MSI-X (4.1.5.1.4), and setting it would make all queues
        // share a cache line.
        if !self.msix.trigger(self.queue_vector(queue)) {
            self.isr.fetch_or(ISR_QUEUE, Ordering::Relaxed);
        }
    }

    fn config_changed(&self) {
        self.generation.fetch_add(1, Ordering::Relaxed);
        self.notify_configuration();
    }

    fn needs_reset(&self) {
        // Only a driver that is up is told (2.1.2), and only once.
        if !self.needs_reset.swap(true, Ordering::SeqCst) && self.driver_ok.load(Ordering::SeqCst) {
            self.notify_configuration();
        }
    }
}
