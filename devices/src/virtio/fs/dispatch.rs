//! Who serves a request.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

/// Which thread serves the requests of a device's queues.
///
/// A vCPU that rings a queue's doorbell is in this process anyway. When it serves the request itself, no other thread
/// has to be woken, and the reply and its interrupt are there before the guest goes on, so that it need not go idle.
/// What it must not do is wait: neither for a disk nor for another machine, nor without end for a guest that keeps the
/// queue full. What would have to wait is left to the queue's threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dispatch {
    /// The vCPU that rang, all that it need not wait for, while few requests are queued; the queue's threads what
    /// is left, and all when there are more.
    #[default]
    Auto,
    /// The same however many are queued.
    Inline,
    /// The queue's threads, always.
    Worker,
    /// The same, and for [`POLLED`] after each request one of them goes on looking for the next, so that the guest
    /// need not ring: its vCPU does not leave it for a request, and one processor of the host is kept busy for each
    /// queue as long as requests come closer than that.
    Poll,
}

/// How long a thread looks for the next request before it goes to sleep, where it is to: longer than a program thinks
/// between two system calls, and no longer than the guest's own clock lets it wait.
pub(super) const POLLED: Duration = Duration::from_millis(1);

/// Between two looks, in pauses of the processor: some hundred nanoseconds, in which others get the queue's lock.
pub(super) const PAUSES: usize = 16;

/// More requests than this in a queue are served by its threads beside the vCPUs: several processors then work on
/// them, which is worth waking one.
pub(super) const DEEP: u16 = 3;

/// So many requests a vCPU serves for one ring of a doorbell, and then leaves the rest to the queue's threads: a
/// guest whose other vCPUs keep the queue full would otherwise never get this one back. As many as a driver has
/// at a time that is not made to do harm.
pub(super) const BATCH: usize = 32;

/// The most threads of a queue. One is there from the start, the others come when all are busy with what they may have
/// to wait for, or when more is queued than they get done: so many reads of a disk are under way at a time.
pub(super) const MOST_THREADS: usize = 8;

/// What was counted of one queue since the device was made. Of each queue its own, so that queues share no cache line.
#[derive(Default)]
#[repr(align(64))]
pub(super) struct Counts {
    pub(super) inline: AtomicU64,
    pub(super) handed_over: AtomicU64,
    pub(super) by_threads: AtomicU64,
}

/// How requests were served since the device was made, all queues together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Requests that the vCPU served that rang.
    pub inline: u64,
    /// Requests that a vCPU took and left to a thread, because it would have had to wait.
    pub handed_over: u64,
    /// Requests that a thread served, those among them.
    pub by_threads: u64,
}

impl Counts {
    pub(super) fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Relaxed);
    }

    pub(super) fn add_to(&self, sum: Statistics) -> Statistics {
        Statistics {
            inline: sum.inline + self.inline.load(Relaxed),
            handed_over: sum.handed_over + self.handed_over.load(Relaxed),
            by_threads: sum.by_threads + self.by_threads.load(Relaxed),
        }
    }
}
