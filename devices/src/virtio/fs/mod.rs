//! The file system device (5.11): queues and a window around a FUSE server.

pub mod config;
pub mod device;
mod dispatch;
mod thread;
mod worker;

#[cfg(test)]
mod tests;

use crate::fuse::{Deferral, Served};
use crate::memory::GuestBuffer;

pub use config::{Config, ConfigError, VIRTIO_FS_F_WINDOW_GROWS};
pub use device::{FsDevice, Window};
pub use dispatch::{Dispatch, Statistics};

/// What answers the requests. Knows nothing of virtio.
pub trait Server: Send + Sync {
    /// Serves one request of a request queue: reads a FUSE request, writes the reply, and says how many bytes
    /// it wrote; 0 for a request that has no reply. One that has to wait for what only another request can
    /// bring, such as a lock, takes a completion from `deferral` instead. Called from any thread, several at
    /// a time. May block for as long as the host's files do.
    fn serve(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        deferral: &dyn Deferral,
    ) -> Served;

    /// Serves one request of the high priority queue (5.11.6.2). Must not wait for other requests.
    fn serve_urgent(&self, request: &GuestBuffer<'_>, reply: &GuestBuffer<'_>) -> u32;

    /// As [`serve`](Self::serve), for a thread that must not wait, because it is a vCPU's. `None` when it would have
    /// to: then nothing was done, and the request is served by [`serve`](Self::serve) on another thread.
    fn serve_at_once(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        deferral: &dyn Deferral,
    ) -> Option<Served> {
        let _ = (request, reply, deferral);
        None
    }

    /// The same for the high priority queue.
    fn serve_urgent_at_once(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
    ) -> Option<u32> {
        let _ = (request, reply);
        None
    }

    /// Forgets the session: the driver has reset the device. No request is being served. Those that were to
    /// be answered later are not any more: their completions have no effect. Idempotent.
    fn reset(&self);

    /// The driver has read that its DAX window is `size` bytes long, which is more than the last time. Must not
    /// block: a vCPU is waiting.
    fn window_has_grown(&self, size: u64) {
        let _ = size;
    }
}

/// What a device usually stands in front of: one FUSE session.
impl Server for crate::fuse::Session {
    fn serve(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        deferral: &dyn Deferral,
    ) -> Served {
        self.serve(request, reply, deferral)
    }

    fn serve_urgent(&self, request: &GuestBuffer<'_>, reply: &GuestBuffer<'_>) -> u32 {
        self.serve_urgent(request, reply)
    }

    fn serve_at_once(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        deferral: &dyn Deferral,
    ) -> Option<Served> {
        self.serve_at_once(request, reply, deferral)
    }

    fn serve_urgent_at_once(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
    ) -> Option<u32> {
        self.serve_urgent_at_once(request, reply)
    }

    fn reset(&self) {
        self.reset();
    }

    fn window_has_grown(&self, size: u64) {
        self.window_has_grown(size);
    }
}
