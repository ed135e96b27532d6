//! PCI: the root complex, configuration space, BARs and MSI-X.

use std::io;
use std::sync::Arc;

use vm_memory::GuestAddress;

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
