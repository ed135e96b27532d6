//! The thread: waits for sockets and for the guest, and carries packets between them.
//!
//! It lives as long as the device, so that clients that come before the guest is ready hear of it.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vm_memory::GuestAddressSpace;
use vmm_sys_util::epoll::EventSet;

use super::host::{HostSide, SOCKET_EVENTS};
use super::poll::{Poll, Waiter};
use super::streams::Streams;
use crate::complaint::complain;
use crate::memory::{AtomicGuestMemory, GuestMemory};
use crate::sync::lock;
use crate::virtio::queue::QueueError;
use crate::virtio::{ActiveQueue, Interrupts};

/// Most packets carried in either direction before sockets and the other direction are looked at again.
const BURST: usize = 128;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET` (5.10.6.7): all streams are gone, and the context id may be another.
const TRANSPORT_RESET: u32 = 0;

/// What the thread and the device share.
pub(super) struct Shared {
    state: Mutex<State>,
    /// Signalled after each round.
    round: Condvar,
    stopped: AtomicBool,
}

/// Everything, locked while a round lasts. No round waits for anybody.
pub(super) struct State {
    poll: Poll,
    listener: Option<u64>,
    host: HostSide,
    streams: Streams,
    active: Option<Active>,
    /// The guest is to be told that the streams it knew are gone.
    lost: bool,
    /// The guest's queues were not done with in the last round.
    busy: bool,
    /// Counts up.
    rounds: u64,
}

/// The queues, from activation to reset.
pub(super) struct Active {
    pub(super) receive: Option<ActiveQueue>,
    pub(super) transmit: Option<ActiveQueue>,
    pub(super) event: Option<ActiveQueue>,
    pub(super) memory: AtomicGuestMemory,
    pub(super) interrupts: Arc<dyn Interrupts>,
}

impl Shared {
    pub(super) fn new(mut poll: Poll, host: HostSide, guest_cid: u64) -> io::Result<Self> {
        let listener = host.listener().map(|socket| poll.add(socket, EventSet::IN)).transpose()?;
        let streams = Streams::new(guest_cid);
        let state = State {
            poll,
            listener,
            host,
            streams,
            active: None,
            lost: false,
            busy: false,
            rounds: 0,
        };
        let stopped = AtomicBool::new(false);
        Ok(Self { state: Mutex::new(state), round: Condvar::new(), stopped })
    }

    /// From now on these are the queues.
    pub(super) fn activate(&self, active: Active) {
        lock(&self.state).active = Some(active);
    }

    /// From now on there are no queues: guest memory is not touched any more when this returns. All streams end.
    pub(super) fn reset(&self) {
        let mut state = lock(&self.state);
        state.active = None;
        state.lost |= state.streams.reset();
    }

    /// Asks the guest for a stream to a port of its own, for this process. The thread is to be woken after this.
    ///
    /// What is read first is `OK`, a number and a line end, when the guest has agreed, or else the end.
    pub(super) fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let (ours, theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let mut state = lock(&self.state);
        if state.active.is_none() || state.streams.is_full() {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let id = state.poll.add(&theirs, SOCKET_EVENTS)?;
        state.streams.request(id, theirs, port, Instant::now());
        Ok(ours)
    }

    /// Lets the thread end when it wakes up.
    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// Waits until the host has all that the guest has put in its queue, at most for `patience`. The thread is
    /// to be woken after this is called; `wake` does it.
    pub(super) fn finish(&self, patience: Duration, wake: impl Fn()) {
        let state = lock(&self.state);
        // No round is under way, so the next one sees all that is there now.
        let before = state.rounds;
        wake();
        let unfinished =
            |state: &mut State| state.rounds == before || state.busy || state.streams.has_waiting();
        let waited = self.round.wait_timeout_while(state, patience, unfinished);
        let (state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.streams.has_waiting() {
            log::warn!("vsock: a host program did not take all that the guest has sent it");
        }
    }

    /// The thread's body.
    pub(super) fn run(&self, mut waiter: Waiter) {
        let mut timeout = -1;
        while !self.stopped.load(Ordering::Acquire) {
            let events = match waiter.wait(timeout) {
                Ok(events) => events,
                Err(error) => {
                    log::error!("vsock stops: {error}");
                    return;
                }
            };
            let mut state = lock(&self.state);
            let now = Instant::now();
            for (id, events) in events {
                state.event(id, events, now);
            }
            state.expire(now);
            state.busy = state.serve(now);
            timeout = if state.busy { 0 } else { state.timeout(now) };
            state.rounds += 1;
            drop(state);
            self.round.notify_all();
        }
    }
}

impl State {
    fn event(&mut self, id: u64, events: EventSet, now: Instant) {
        if Some(id) == self.listener {
            self.host.accept(&mut self.poll, now);
        } else if let Some((socket, port)) = self.host.event(id) {
            // A client that is refused is closed here.
            if self.active.is_none() {
                log::debug!("vsock: a client wants port {port}, and the guest is not ready");
            } else if self.streams.is_full() {
                log::debug!("vsock: a client wants port {port}, and there are too many streams");
            } else if let Err(error) = self.poll.change(&socket, SOCKET_EVENTS, id) {
                log::warn!("vsock: a client cannot be watched: {error}");
            } else {
                self.streams.request(id, socket, port, now);
            }
        } else {
            self.streams.event(id, events);
        }
    }

    fn expire(&mut self, now: Instant) {
        if self.host.deadline().is_some_and(|deadline| deadline <= now) {
            self.host.expire(&mut self.poll, now);
        }
        if self.streams.deadline().is_some_and(|deadline| deadline <= now) {
            self.streams.expire(now);
        }
    }

    /// Milliseconds until something is due.
    fn timeout(&self, now: Instant) -> i32 {
        let deadlines = [self.host.deadline(), self.streams.deadline()];
        let Some(next) = deadlines.into_iter().flatten().min() else { return -1 };
        // Not before it is due.
        let left = next.saturating_duration_since(now).as_millis() + 1;
        i32::try_from(left).unwrap_or(i32::MAX)
    }

    /// Carries packets. `true`: there are more already.
    fn serve(&mut self, now: Instant) -> bool {
        let Some(active) = &mut self.active else { return false };
        let served =
            active.serve(&mut self.streams, &self.host, &mut self.poll, &mut self.lost, now);
        match served {
            Ok(more) => more,
            Err(error) => {
                complain!("vsock stops until the guest resets it: {error}");
                active.interrupts.needs_reset();
                self.active = None;
                self.lost |= self.streams.reset();
                false
            }
        }
    }
}

impl Active {
    fn serve(
        &mut self,
        streams: &mut Streams,
        host: &HostSide,
        poll: &mut Poll,
        lost: &mut bool,
        now: Instant,
    ) -> Result<bool, QueueError> {
        // Rings are always RAM, so any snapshot has them at the same place.
        let memory = self.memory.memory();
        let mut more = self.tell_loss(&memory, lost)?;
        more |= self.transmit(&memory, streams, host, poll)?;
        more |= self.receive(&memory, streams, now)?;
        Ok(more)
    }

    /// Tells the guest that its streams are gone, before it hears of new ones.
    fn tell_loss(&mut self, memory: &GuestMemory, lost: &mut bool) -> Result<bool, QueueError> {
        let Some(active) = self.event.as_mut().filter(|_| *lost) else { return Ok(false) };
        while let Some(chain) = active.queue.pop(memory)? {
            // `struct virtio_vsock_event`. One that does not fit is in the next buffer, perhaps.
            let event = TRANSPORT_RESET.to_le_bytes();
            *lost = chain.writable.write_at(0, &event).is_err();
            let written = if *lost { 0 } else { event.len() as u32 };
            active.queue.complete(memory, chain.head, written)?;
            if active.queue.interrupt_wanted(memory)? {
                self.interrupts.queue(active.index);
            }
            if !*lost {
                return Ok(false);
            }
        }
        active.queue.enable_notification(memory)
    }

    /// Takes packets of the guest. `true`: there are more.
    fn transmit(
        &mut self,
        memory: &GuestMemory,
        streams: &mut Streams,
        host: &HostSide,
        poll: &mut Poll,
    ) -> Result<bool, QueueError> {
        let Some(active) = &mut self.transmit else { return Ok(false) };
        let queue = &mut active.queue;
        queue.disable_notification(memory)?;
        let mut taken = 0;
        let mut empty = false;
        while taken < BURST && !streams.is_choked() {
            let Some(chain) = queue.pop(memory)? else {
                empty = true;
                break;
            };
            streams.take(&chain.readable, host, poll);
            queue.complete(memory, chain.head, 0)?;
            taken += 1;
        }
        if taken > 0 && queue.interrupt_wanted(memory)? {
            self.interrupts.queue(active.index);
        }
        if empty {
            return queue.enable_notification(memory);
        }
        // When it is choked, buffers of the guest set it going again.
        Ok(!streams.is_choked())
    }

    /// Gives packets to the guest. `true`: there are more.
    fn receive(
        &mut self,
        memory: &GuestMemory,
        streams: &mut Streams,
        now: Instant,
    ) -> Result<bool, QueueError> {
        let Some(active) = &mut self.receive else { return Ok(false) };
        let queue = &mut active.queue;
        queue.disable_notification(memory)?;
        let choked = streams.is_choked();
        let mut given = 0;
        let mut starved = false;
        while given < BURST && streams.has_packets() {
            let Some(chain) = queue.pop(memory)? else {
                starved = true;
                break;
            };
            let Some(len) = streams.fill(&chain.writable, now) else {
                queue.put_back(chain.head)?;
                break;
            };
            queue.complete(memory, chain.head, len)?;
            given += 1;
        }
        if given > 0 && queue.interrupt_wanted(memory)? {
            self.interrupts.queue(active.index);
        }
        if starved && queue.enable_notification(memory)? {
            return Ok(true);
        }
        let unchoked = choked && !streams.is_choked();
        Ok(unchoked || (!starved && streams.has_packets()))
    }
}
