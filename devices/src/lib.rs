//! Everything of an Oriel machine that the guest can touch.
//!
//! The guest is hostile from its first instruction: nothing it sends makes this crate panic, hang, or
//! reach what it should not. The crate knows nothing of KVM; what it needs from the machine it asks for
//! through traits ([`pci::MsiVector`], [`pci::WindowSlot`]), which the `oriel` crate implements.
//!
//! From the bottom up, and never the other way:
//!
//! - [`memory`]: guest memory, and the buffers that a descriptor chain or a test hands to a server;
//! - [`fuse`]: the FUSE **protocol** (wire structs, decoding, replies; knows no files);
//! - [`dax`]: the DAX **window** (a host reservation into which file pages are mapped);
//! - [`share`]: the **share** (a host directory served safely; knows no virtio);
//! - [`tree`]: many shares behind one session, that come and go;
//! - [`bus`], [`pci`]: how the guest reaches a device;
//! - [`virtio`]: queues and transport, and the devices: [`virtio::fs`], which joins all of the above,
//!   [`virtio::console`], [`virtio::vsock`] and [`virtio::rng`];
//! - [`serial`], [`power`]: the two legacy devices a guest needs;
//! - [`threads`]: what each thread of these is for, for who wants to confine them.

pub mod bus;
pub mod dax;
pub mod fuse;
pub mod memory;
pub mod pci;
pub mod power;
pub mod serial;
pub mod share;
#[cfg(any(test, feature = "testing"))]
#[doc(hidden)]
pub mod testing;
pub mod threads;
pub mod tree;
pub mod virtio;

mod budget;
mod complaint;
#[cfg(test)]
mod costs;
#[cfg(test)]
mod hostile;
mod kick;
mod sync;
