//! Virtio: queues, the PCI transport, and the devices.
//!
//! A device ([`VirtioDevice`]) knows its features, its configuration and what to do with a request; the
//! [`transport`] knows registers and interrupts; a [`queue`] knows rings. Section numbers are those of the
//! virtio 1.3 specification.

pub mod console;
pub mod fs;
pub mod queue;
pub mod rng;
pub mod transport;
pub mod vsock;

#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;

use std::io;
use std::sync::Arc;

use crate::memory::AtomicGuestMemory;
use crate::pci::WindowSlot;

pub use queue::{Queue, QueueError};
pub use transport::VirtioPci;

/// The device conforms to virtio 1.0 or later (6). Always offered; a driver must accept it.
pub const VIRTIO_F_VERSION_1: u64 = 1 << 32;
/// A descriptor may stand for a table of descriptors (2.7.5.3). Always offered.
pub const VIRTIO_RING_F_INDIRECT_DESC: u64 = 1 << 28;
/// Each side says from which index on it wants to be notified (2.7.7, 2.7.10). Always offered.
pub const VIRTIO_RING_F_EVENT_IDX: u64 = 1 << 29;

/// A virtio device, seen from its transport.
///
/// Called by vCPU threads. [`activate`](Self::activate) and [`reset`](Self::reset) never run at the same
/// time; everything else may be called at any time, also while these run.
pub trait VirtioDevice: Send + Sync {
    /// The device type (section 5), for example 26 for a file system.
    fn device_id(&self) -> u16;

    /// The features of this device type that are offered. The transport adds those of the rings. Always the
    /// same answer.
    fn features(&self) -> u64 {
        0
    }

    /// The largest size of each queue: powers of two up to 32768. Always the same answer.
    fn queue_max_sizes(&self) -> &[u16];

    /// The driver reads the device configuration (4.1.4.6) at `offset`. `data` is of any length and all
    /// zeros: what lies past the end of the configuration is left alone.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// The driver writes the device configuration. Most have no writable field.
    fn write_config(&self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// The shared memory region (2.10), if the device has one. Always the same answer.
    fn shared_memory(&self) -> Option<SharedMemory> {
        None
    }

    /// The driver reads how long the shared memory region is now, in bytes: at most
    /// [`SharedMemory::size`], and never less than the last time. 0 for a device that has none.
    fn read_shared_memory_size(&self) -> u64 {
        self.shared_memory().map_or(0, |region| region.size)
    }

    /// The driver is ready (DRIVER_OK): from now on the queues are the device's. Called once, and then not
    /// again before a [`reset`](Self::reset). There may be requests in the queues already.
    ///
    /// # Errors
    ///
    /// When the host refuses what the device needs, for example a thread. The driver is told that the
    /// device needs a reset.
    fn activate(&self, activation: Activation) -> io::Result<()>;

    /// The driver has put requests in a queue. Called only after [`activate`](Self::activate) has returned,
    /// but may cross a [`reset`](Self::reset) and then has no effect. `queue` is below the number of
    /// queues, but the driver may have left that queue disabled. A vCPU is waiting: may serve what takes no longer
    /// than handing it to a thread would, and must not wait for anything else than this machine.
    fn notify(&self, queue: u16);

    /// Back to where the device was before [`activate`](Self::activate). When this returns, nothing of the
    /// device touches guest memory or interrupts, and it can be activated again. Idempotent; not called before the
    /// first `activate`. May wait for a request that is being served, as long as that takes: the driver sees the
    /// reset as unfinished until then. Called on a thread of its own.
    fn reset(&self);
}

/// Reads a device configuration (4.1.4.6) of which `config` is all: copies the bytes at `offset`, and leaves
/// alone what is past the end.
fn read_config_bytes(config: &[u8], offset: u64, data: &mut [u8]) {
    let offset = usize::try_from(offset).unwrap_or(usize::MAX);
    for (target, byte) in data.iter_mut().zip(config.iter().skip(offset)) {
        *target = *byte;
    }
}

/// A stretch of memory that a device shares with its driver, behind a BAR of its own.
#[derive(Clone)]
pub struct SharedMemory {
    /// Which one of the device's (`shmid`); each device type numbers its own.
    pub id: u8,
    /// The most bytes that it will ever be long: the BAR has room for them.
    pub size: u64,
    /// Where the guest's choice of address goes.
    pub slot: Arc<dyn WindowSlot>,
}

/// What a device works with from DRIVER_OK to reset. Dropped on reset.
pub struct Activation {
    /// Where the queues and the buffers are.
    pub memory: AtomicGuestMemory,
    /// The queues the driver has enabled, by rising index.
    pub queues: Vec<ActiveQueue>,
    /// How to reach the driver.
    pub interrupts: Arc<dyn Interrupts>,
    /// The features the driver has accepted.
    pub features: u64,
}

/// A queue that the driver has enabled.
pub struct ActiveQueue {
    /// Its number.
    pub index: u16,
    /// Its rings.
    pub queue: Queue,
}

/// How a device reaches its driver. Any thread; never blocks. Nothing happens when the driver does not
/// listen.
pub trait Interrupts: Send + Sync {
    /// The used ring of queue `queue` has something new: a used buffer notification (2.7.7).
    fn queue(&self, queue: u16);

    /// A field of the device configuration has changed: a configuration change notification (2.3).
    fn config_changed(&self);

    /// The driver has done what cannot be answered: sets DEVICE_NEEDS_RESET and tells the driver (2.1.2).
    /// Only a reset helps. Idempotent.
    fn needs_reset(&self);
}
