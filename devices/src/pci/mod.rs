//! PCI: the root complex, configuration space, BARs and MSI-X.

pub mod configuration;
pub mod msix;
pub mod root;

#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;

use std::io;
use std::sync::{Arc, Mutex};

use vm_memory::GuestAddress;

use crate::sync::lock;

pub use configuration::{Bar, BarKind, Configuration};
pub use msix::Msix;
pub use root::{AddressWindow, AddressWindows, PciAddress, PciRoot};

/// What an MSI-X table entry says (PCI 3.0, 6.8.2): the write that the interrupt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Address written to. Only 0xFEExxxxx reaches a local APIC; anything else must interrupt nobody.
    pub address: u64,
    /// Data written.
    pub data: u32,
}

/// Where a function's interrupt vectors come from. Implemented by the machine.
pub trait InterruptController: Send + Sync {
    /// A new vector, connected to nothing. Called while the machine is built, once per MSI-X table entry.
    ///
    /// # Errors
    ///
    /// The host's error, for example when the process is out of file descriptors.
    fn allocate_vector(&self) -> io::Result<Arc<dyn MsiVector>>;
}

/// One interrupt vector, delivered by the host kernel (an irqfd) without the machine's help.
pub trait MsiVector: Send + Sync {
    /// From now on `trigger` sends `message`; with `None` (masked, or never programmed) it does nothing.
    /// Called when the guest changes a table entry or a mask, only with what is new.
    ///
    /// # Errors
    ///
    /// The host's error; the vector is then connected to nothing.
    fn connect(&self, message: Option<MsiMessage>) -> io::Result<()>;

    /// Sends the interrupt. Any thread; never blocks.
    fn trigger(&self);
}

/// The guest-physical address at which a DAX window is visible. Implemented by the machine, which owns the
/// memslot and the guest memory map; called when the guest enables, disables or moves the window's BAR.
pub trait WindowSlot: Send + Sync {
    /// Shows the window at `address` (aligned to the window's size), and nowhere else, or nowhere at all.
    /// When this returns, vCPUs and devices see the new place. Idempotent.
    ///
    /// # Errors
    ///
    /// When the range overlaps RAM or another window, or the host refuses. The window then stays where
    /// it was.
    fn place(&self, address: Option<GuestAddress>) -> io::Result<()>;
}

/// One function on the bus, as [`PciRoot`] sees it.
///
/// All methods are called by vCPU threads. Reads of the configuration space and accesses to BARs come from
/// several threads at a time; writes to the configuration space come one at a time over the whole bus.
pub trait PciFunction: Send + Sync {
    /// The registers. The root places the BARs in them once, when the function is added, and looks after
    /// every write where the guest has moved them; nobody may hold this lock while calling into the root
    /// or a device.
    fn configuration(&self) -> &Mutex<Configuration>;

    /// The guest reads its configuration space. Override it where a read has an effect.
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        lock(self.configuration()).read(offset, data);
    }

    /// The guest writes its configuration space. Override it where a write has an effect beyond the
    /// registers; decoding of BARs is the root's business.
    fn write_config(&self, offset: u16, data: &[u8]) {
        lock(self.configuration()).write(offset, data);
    }

    /// The guest reads `data.len()` bytes (1, 2, 4 or 8, not aligned in any way) at `offset` in a BAR. The
    /// access is wholly inside. `data` is all ones before.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// The guest writes to a BAR; see [`read_bar`](Self::read_bar). The BAR may just have been moved by
    /// another vCPU.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]);

    /// The window that is visible through `bar`. Such a BAR has no registers: the root tells the window
    /// where to be and routes no access to the function. Always the same answer.
    fn window(&self, bar: usize) -> Option<Arc<dyn WindowSlot>> {
        let _ = bar;
        None
    }
}
