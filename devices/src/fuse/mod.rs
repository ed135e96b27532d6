//! The FUSE protocol, as a virtio-fs device speaks it (virtio 1.3, section 5.11; `linux/fuse.h`).
//!
//! It knows no files: a [`Session`] takes requests from guest memory apart, calls a [`FileSystem`] and puts
//! the reply together. The way of a request is [`session`] → [`request`] → [`dispatch`](self) →
//! [`FileSystem`] → [`reply`].
//!
//! The rule for what a guest can send: a request that is wrong in any way is answered with an errno, if it
//! is one that is answered and there are 16 bytes to answer in. A reply is exactly as long as its header
//! says, which is also the used length of the descriptor chain.

pub mod abi;
mod counters;
mod dispatch;
mod errno;
mod extension;
mod filesystem;
mod init;
mod later;
mod mapping;
pub mod opcode;
pub mod reply;
pub mod request;
pub mod session;

pub use counters::{Counters, LATENCY_CLASSES, OperationCounts, latency_bound};
pub use errno::{Errno, Result};
pub use filesystem::{
    Caller, DirectorySink, FileSystem, Listing, LockReply, Placement, Preferences, XattrReply,
};
pub use later::{Completion, Deferral, Interrupt, Pending, Served, Wait};
pub use reply::Payload;
pub use session::Session;

#[cfg(test)]
pub(crate) mod testing;
