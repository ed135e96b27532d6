//! The device: its features, its queues, and the life of its workers.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use super::Server;
use super::config::{Config, VIRTIO_FS_F_WINDOW_GROWS};
use super::dispatch::{Counts, Dispatch, POLLED, Statistics};
use super::thread::{Spawn, Thread, spawn};
use super::worker::{Service, Worker};
use crate::complaint::complain;
use crate::dax::DaxWindow;
use crate::kick;
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
    dispatch: Dispatch,
    /// How long a queue is polled that is to be.
    polled: Duration,
    /// For each queue, who hears its doorbell while the device is active. No two queues have a lock in common here.
    doorbells: Vec<Mutex<Option<Arc<Worker>>>>,
    counts: Vec<Arc<Counts>>,
    spawn: Spawn,
    running: Mutex<Running>,
}

/// What serves the queues.
#[derive(Default)]
struct Running {
    /// One for each queue that is served.
    workers: Vec<Arc<Worker>>,
    /// Threads that were told to stop, and are waited for.
    ending: Vec<Thread>,
}

/// How long a request may take, once its worker is to stop, before it is kicked. Most that take longer than an
/// instant are those of a slow disk, and end well by themselves.
const GRACE: Duration = Duration::from_secs(1);
/// From one kick to the next. The first may fall just before a system call and be lost, and a request has several.
const KICK_INTERVAL: Duration = Duration::from_millis(50);

impl FsDevice {
    /// A device whose requests `server` answers. `window` is
    /// the DAX window, if there is one.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn new(
        config: Config,
        server: Arc<dyn Server>,
        window: Option<Window>,
    ) -> io::Result<Self> {
        let count = usize::from(HIPRIO_QUEUES + config.request_queues());
        kick::prepare()?;
        let grows = window.as_ref().is_some_and(|it| it.dax.size() < it.dax.max_size());
        Ok(Self {
            config,
            server,
            window,
            features: if grows { VIRTIO_FS_F_WINDOW_GROWS } else { 0 },
            told: AtomicU64::new(0),
            listener: Mutex::default(),
            queue_sizes: vec![QUEUE_SIZE; count],
            dispatch: Dispatch::default(),
            polled: POLLED,
            doorbells: (0..count).map(|_| Mutex::default()).collect(),
            counts: (0..count).map(|_| Arc::default()).collect(),
            spawn: Arc::new(spawn),
            running: Mutex::default(),
        })
    }

    /// The same, whose requests are served by those that `dispatch` says.
    #[must_use]
    pub fn with_dispatch(mut self, dispatch: Dispatch) -> Self {
        self.dispatch = dispatch;
        self
    }

    /// The same, whose queues are polled for so long where they are.
    #[cfg(test)]
    pub(super) fn with_polled(mut self, polled: Duration) -> Self {
        self.polled = polled;
        self
    }

    /// The same, whose threads are started by `spawn`.
    #[cfg(test)]
    pub(super) fn with_spawn(mut self, spawn: Spawn) -> Self {
        self.spawn = spawn;
        self
    }

    /// How requests were served.
    pub fn statistics(&self) -> Statistics {
        self.counts.iter().fold(Statistics::default(), |sum, counts| counts.add_to(sum))
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
            let index = usize::from(active.index);
            let (Some(doorbell), Some(counts)) =
                (self.doorbells.get(index), self.counts.get(index))
            else {
                continue;
            };
            let service = Service {
                memory: activation.memory.clone(),
                interrupts: activation.interrupts.clone(),
                server: self.server.clone(),
                dispatch: self.dispatch,
                polled: self.polled,
                spawn: self.spawn.clone(),
            };
            let worker = Arc::new(Worker::new(active, service, counts.clone()));
            worker.add_thread()?;
            running.workers.push(worker.clone());
            *lock(doorbell) = Some(worker);
        }
        Ok(())
    }

    /// Stops all workers and waits for them, however long the host takes for their requests. The lock is held until the
    /// last one is gone, so that whoever comes second does not return earlier.
    fn stop(&self) {
        for doorbell in &self.doorbells {
            // Who has it already finds it stopped.
            *lock(doorbell) = None;
        }
        let mut running = lock(&self.running);
        stop_within(&mut running, Duration::MAX);
    }

    /// The guest does not run any more, and will not: stops the workers, but does not wait longer than
    /// `patience`. `false` when some are left behind in the host's system calls, which end with the process at
    /// the latest, or when somebody else waits for them.
    pub fn retire(&self, patience: Duration) -> bool {
        let since = Instant::now();
        loop {
            let left = patience.saturating_sub(since.elapsed());
            match self.running.try_lock() {
                Ok(mut running) => return stop_within(&mut running, left),
                Err(TryLockError::Poisoned(poisoned)) => {
                    return stop_within(&mut poisoned.into_inner(), left);
                }
                // For a reset.
                Err(TryLockError::WouldBlock) if left.is_zero() => return false,
                Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(1)),
            }
        }
    }
}

/// Stops workers and takes those out that are at their end; `true` when that is all of them.
///
/// One whose request hangs in the host is kicked: what waits for a server that lets its clients give up, as most on
/// a network do, ends so. Where the host's kernel does not let it be ended, it goes on being waited for.
fn stop_within(running: &mut Running, patience: Duration) -> bool {
    let since = Instant::now();
    for worker in &running.workers {
        worker.stop();
    }
    let Running { workers, ending } = running;
    ending.extend(workers.drain(..).flat_map(|worker| worker.take_threads()));
    let mut next = GRACE;
    loop {
        let until = Instant::now() + next;
        ending.retain(|thread| !thread.ends_by(until));
        if ending.is_empty() {
            return true;
        }
        if since.elapsed() >= patience {
            return false;
        }
        if next == GRACE {
            complain!(host: "a request hangs in the host, whose file system does not answer it");
        }
        next = KICK_INTERVAL;
        for thread in ending.iter() {
            thread.kick();
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
        let Some(doorbell) = self.doorbells.get(usize::from(queue)) else { return };
        let worker = lock(doorbell).clone();
        if let Some(worker) = worker {
            worker.ring();
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
