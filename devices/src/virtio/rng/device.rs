//! The device: its queue, and the life of its thread.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::worker::Worker;
use crate::sync::lock;
use crate::threads::{self, Work};
use crate::virtio::{Activation, VirtioDevice};

/// Device type (5.4.1).
const DEVICE_ID: u16 = 4;

/// Descriptors in the queue. Linux asks for one buffer at a time.
const QUEUE_SIZE: u16 = 8;

/// An entropy device.
pub struct RngDevice {
    /// The worker's, the same over all activations: a notification that crosses a reset wakes a later worker
    /// for nothing at worst.
    doorbell: Arc<EventFd>,
    running: Mutex<Option<Running>>,
}

struct Running {
    stopped: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl RngDevice {
    /// A device.
    ///
    /// # Errors
    ///
    /// The host's, when there are no file descriptors left.
    pub fn new() -> io::Result<Self> {
        Ok(Self { doorbell: Arc::new(EventFd::new(EFD_CLOEXEC)?), running: Mutex::default() })
    }

    /// Stops and joins the worker. The lock is held until it is gone, so that whoever comes second does not
    /// return earlier. The worker waits for nobody, so this does not take long.
    fn stop(&self) {
        let mut running = lock(&self.running);
        if let Some(worker) = running.take() {
            worker.stopped.store(true, Ordering::Release);
            self.ring();
            if worker.thread.join().is_err() {
                log::error!("the worker of an entropy device has panicked");
            }
        }
    }

    fn ring(&self) {
        // The counter cannot be full: that takes 2^64 notifications that no worker reads.
        if let Err(error) = self.doorbell.write(1) {
            log::error!("a doorbell does not ring: {error}");
        }
    }
}

impl VirtioDevice for RngDevice {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn read_config(&self, _: u64, _: &mut [u8]) {}

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let Activation { memory, mut queues, interrupts, .. } = activation;
        let Some(requests) = queues.pop() else { return Ok(()) };
        let stopped = Arc::new(AtomicBool::new(false));
        let worker = Worker {
            requests,
            memory,
            interrupts,
            doorbell: self.doorbell.clone(),
            stopped: stopped.clone(),
        };
        let thread = threads::spawn(Work::Bytes, "rng", move || worker.run())?;
        *lock(&self.running) = Some(Running { stopped, thread });
        Ok(())
    }

    fn notify(&self, _: u16) {
        self.ring();
    }

    fn reset(&self) {
        self.stop();
    }
}

impl Drop for RngDevice {
    fn drop(&mut self) {
        self.stop();
    }
}
