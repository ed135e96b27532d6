//! The device: its features, its queues, and the life of its workers.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::Server;
use super::config::{Config, VIRTIO_FS_F_WINDOW_GROWS};
use super::worker::Worker;
use crate::dax::DaxWindow;
use crate::pci::WindowSlot;
use crate::sync::lock;
use crate::virtio::{Activation, Interrupts, SharedMemory, VirtioDevice};

/// Device type (5.11.1).
const DEVICE_ID: u16 = 26;

/// Descriptors in each queue: room for a request of 1 MiB in pages of 4 KiB with its headers, several times.
/// Linux fits its largest request to the size of the queue.
pub(super) const QUEUE_SIZE: u16 = 1024;

/// Queues before the request queues (5.11.2): the high priority queue.
pub(super) const HIPRIO_QUEUES: u16 = 1;

/// `shmid` of the DAX window (5.11.4, `VIRTIO_FS_SHMCAP_ID_CACHE`).
const WINDOW_ID: u8 = 0;

/// The DAX window, as the guest sees it.
#[derive(Clone)]
pub struct Window {
    /// How long it is, and may become.
    pub dax: Arc<dyn DaxWindow>,
    /// Where it is visible.
    pub slot: Arc<dyn WindowSlot>,
}

/// A file system device.
pub struct FsDevice {
    config: Config,
    server: Arc<dyn Server>,
    window: Option<Window>,
    features: u64,
    /// The size of the window that the driver read last.
    told: AtomicU64,
    /// A driver that is up and wants to know when the window has grown.
    listener: Mutex<Option<Arc<dyn Interrupts>>>,
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
        let grows = window.as_ref().is_some_and(|it| it.dax.size() < it.dax.max_size());
        Ok(Self {
            config,
            server,
            window,
            features: if grows { VIRTIO_FS_F_WINDOW_GROWS } else { 0 },
            told: AtomicU64::new(0),
            listener: Mutex::default(),
            queue_sizes: vec![QUEUE_SIZE; count],
            doorbells: (0..count).map(doorbell).collect::<io::Result<_>>()?,
            running: Mutex::default(),
        })
    }

    /// The window has grown: tells the driver, if it is one that wants to know, and says whether it is. Any
    /// other driver finds out when it sets up the device the next time.
    pub fn window_has_grown(&self) -> bool {
        let listener = lock(&self.listener);
        if let Some(interrupts) = listener.as_ref() {
            interrupts.config_changed();
        }
        listener.is_some()
    }

    /// The driver is up.
    fn listen(&self, features: u64, interrupts: Arc<dyn Interrupts>) {
        if features & self.features & VIRTIO_FS_F_WINDOW_GROWS == 0 {
            return;
        }
        let mut listener = lock(&self.listener);
        // It may have grown since the driver looked, when there was nobody to tell.
        let present = self.window.as_ref().map_or(0, |window| window.dax.size());
        if self.told.load(Ordering::Acquire) < present {
            interrupts.config_changed();
        }
        *listener = Some(interrupts);
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

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn shared_memory(&self) -> Option<SharedMemory> {
        let window = self.window.clone()?;
        Some(SharedMemory { id: WINDOW_ID, size: window.dax.max_size(), slot: window.slot })
    }

    fn read_shared_memory_size(&self) -> u64 {
        let size = self.window.as_ref().map_or(0, |window| window.dax.size());
        if self.told.fetch_max(size, Ordering::AcqRel) < size {
            self.server.window_has_grown(size);
        }
        size
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let (features, interrupts) = (activation.features, activation.interrupts.clone());
        let started = self.start(activation);
        match started {
            Ok(()) => self.listen(features, interrupts),
            // Some workers may be running already.
            Err(_) => self.stop(),
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
        *lock(&self.listener) = None;
        self.stop();
        self.server.reset();
    }
}

impl Drop for FsDevice {
    fn drop(&mut self) {
        self.stop();
    }
}
