//! What the worker waits for.

use std::io;
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// Most events taken at once.
const EVENTS: usize = 64;

/// An epoll instance whose file descriptors have numbers that never come again: an event that was on its way
/// when a descriptor was closed reaches nobody else.
///
/// All is edge-triggered: an event says that something has changed, once.
pub(super) struct Poll {
    epoll: std::sync::Arc<Epoll>,
    next: u64,
}

/// The waiting part of a [`Poll`], for the thread that waits.
pub(super) struct Waiter {
    epoll: std::sync::Arc<Epoll>,
    events: Vec<EpollEvent>,
}

impl Poll {
    pub(super) fn new() -> io::Result<(Self, Waiter)> {
        let epoll = std::sync::Arc::new(Epoll::new()?);
        let events = vec![EpollEvent::default(); EVENTS];
        Ok((Self { epoll: epoll.clone(), next: 0 }, Waiter { epoll, events }))
    }

    /// Watches `fd` until it is closed, and gives it a number. What is there already is an event, too.
    pub(super) fn add(&mut self, fd: &impl AsRawFd, events: EventSet) -> io::Result<u64> {
        let id = self.next;
        self.next += 1;
        self.control(ControlOperation::Add, fd.as_raw_fd(), events, id)?;
        Ok(id)
    }

    /// Watches `fd`, which has number `id`, for other events. What is there already is an event again.
    pub(super) fn change(&self, fd: &impl AsRawFd, events: EventSet, id: u64) -> io::Result<()> {
        self.control(ControlOperation::Modify, fd.as_raw_fd(), events, id)
    }

    fn control(
        &self,
        operation: ControlOperation,
        fd: RawFd,
        events: EventSet,
        id: u64,
    ) -> io::Result<()> {
        self.epoll.ctl(operation, fd, EpollEvent::new(events | EventSet::EDGE_TRIGGERED, id))
    }
}

impl Waiter {
    /// Waits for events, at most `milliseconds`; -1 is for ever. Each is a number and what has happened.
    pub(super) fn wait(
        &mut self,
        milliseconds: i32,
    ) -> io::Result<impl Iterator<Item = (u64, EventSet)> + '_> {
        let count = match self.epoll.wait(milliseconds, &mut self.events) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
            other => other?,
        };
        // Others than those that were asked for do not come.
        let known =
            |event: &EpollEvent| (event.data(), EventSet::from_bits_truncate(event.events()));
        Ok(self.events.iter().take(count).map(known))
    }
}
