//! The device: its features, its queues, and the life of its workers.

use std::io;
use std::sync::{Arc, Mutex};
use std::thread;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::Server;
use super::config::Config;
use super::worker::Worker;
use crate::pci::WindowSlot;
use crate::sync::lock;
use crate::virtio::{Activation, SharedMemory, VirtioDevice};

/// Device type (5.11.1).
const DEVICE_ID: u16 = 26;

/// Descriptors in each queue: room for a request of 1 MiB in pages of 4 KiB with its headers, several times.
/// Linux fits its largest request to the size of the queue.
const QUEUE_SIZE: u16 = 1024;

/// Queues before the request queues (5.11.2): the high priority queue.
const HIPRIO_QUEUES: u16 = 1;

/// `shmid` of the DAX window (5.11.4, `VIRTIO_FS_SHMCAP_ID_CACHE`).
const WINDOW_ID: u8 = 0;

/// The DAX window, as the guest sees it.
#[derive(Clone)]
pub struct Window {
    /// Length in bytes, a multiple of 2 MiB.
    pub size: u64,
    /// Where it is visible.
    pub slot: Arc<dyn WindowSlot>,
}

/// A file system device.
pub struct FsDevice {
    config: Config,
    server: Arc<dyn Server>,
    window: Option<Window>,
    queue_sizes: Vec<u16>,
    /// One for each queue, the same over all activations: a notification needs no lock that way, and one
    /// that crosses a reset wakes a later worker for nothing at worst.
    doorbells: Vec<Arc<EventFd>>,
    running: Mutex<Vec<Running>>,
}

struct Running {
    worker: Arc<Worker>,
    thread: thread::JoinHandle<()>,
}

impl FsDevice {
    /// A device whose requests `server` answers. `window` is
    /// the DAX window, if there is one.
    ///
    /// # Errors
    ///
    /// The host's, when there are no file descriptors left.
    pub fn new(
        config: Config,
        server: Arc<dyn Server>,
        window: Option<Window>,
    ) -> io::Result<Self> {
        let count = usize::from(HIPRIO_QUEUES + config.request_queues());
        let doorbell = |_| EventFd::new(EFD_CLOEXEC).map(Arc::new);
        Ok(Self {
            config,
            server,
            window,
            queue_sizes: vec![QUEUE_SIZE; count],
            doorbells: (0..count).map(doorbell).collect::<io::Result<_>>()?,
            running: Mutex::default(),
        })
    }

    fn start(&self, activation: Activation) -> io::Result<()> {
        let mut running = lock(&self.running);
        for active in activation.queues {
            let Some(doorbell) = self.doorbells.get(usize::from(active.index)) else {
                continue;
            };
            let name = format!("virtio-fs:{}", active.index);
            let worker = Arc::new(Worker::new(
                active,
                activation.memory.clone(),
                activation.interrupts.clone(),
                self.server.clone(),
                doorbell.clone(),
            ));
            let body = worker.clone();
            let thread = thread::Builder::new().name(name).spawn(move || body.run())?;
            running.push(Running { worker, thread });
        }
        Ok(())
    }

    /// Stops and joins all workers. The lock is held until the last one is gone, so that whoever comes
    /// second does not return earlier.
    fn stop(&self) {
        let mut running = lock(&self.running);
        for one in running.iter() {
            one.worker.stop();
        }
        for one in running.drain(..) {
            if one.thread.join().is_err() {
                log::error!("a file system worker has panicked");
            }
        }
    }
}

impl VirtioDevice for FsDevice {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn shared_memory(&self) -> Option<SharedMemory> {
        let window = self.window.clone()?;
        Some(SharedMemory { id: WINDOW_ID, size: window.size, slot: window.slot })
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let started = self.start(activation);
        if started.is_err() {
            // Some workers may be running already.
            self.stop();
        }
        started
    }

    fn notify(&self, queue: u16) {
        if let Some(doorbell) = self.doorbells.get(usize::from(queue)) {
            // The counter cannot be full: that takes 2^64 notifications that no worker reads.
            if let Err(error) = doorbell.write(1) {
                log::error!("a doorbell does not ring: {error}");
            }
        }
    }

    fn reset(&self) {
        self.stop();
        self.server.reset();
    }
}

impl Drop for FsDevice {
    fn drop(&mut self) {
        self.stop();
    }
}
