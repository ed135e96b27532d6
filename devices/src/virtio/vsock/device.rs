//! The device: its features, its queues, and the life of its thread.

use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::Config;
use super::host::HostSide;
use super::poll::Poll;
use super::worker::{Active, Shared};
use crate::sync::lock;
use crate::threads::{self, Work};
use crate::virtio::{Activation, ActiveQueue, VirtioDevice};

/// Device type (5.10.1).
const DEVICE_ID: u16 = 19;

/// Streams are supported (5.10.3). Datagrams and packets are not.
const VIRTIO_VSOCK_F_STREAM: u64 = 1;

/// Receive, transmit, event (5.10.2).
const RECEIVE: u16 = 0;
const TRANSMIT: u16 = 1;
const EVENT: u16 = 2;

/// Descriptors in each queue. Linux fills the receive queue with pages, so this is what it costs the guest
/// (1 MiB), and how much of a stream it gets at once.
const QUEUE_SIZE: u16 = 256;
/// Events are few.
const EVENT_QUEUE_SIZE: u16 = 8;

/// A socket device.
pub struct VsockDevice {
    config: Config,
    shared: Arc<Shared>,
    /// Wakes the thread. Its edges are events, so nobody reads it.
    doorbell: EventFd,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl VsockDevice {
    /// A device for whose guest clients connect to `listener`, which is at `path`. Programs that listen for port
    /// P of the host do so at `<path>_P`. Who gives them removes the sockets.
    ///
    /// # Errors
    ///
    /// The host's, when there are no file descriptors or threads left.
    pub fn new(config: Config, listener: UnixListener, path: &Path) -> io::Result<Self> {
        Self::with(config, Some((listener, path)))
    }

    /// A device for streams of this process's own alone.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn without_clients(config: Config) -> io::Result<Self> {
        Self::with(config, None)
    }

    /// Asks the guest for a stream to one of its ports, for this process. What is read from it first is a line, `OK`
    /// and a number, once the guest has agreed; when it does not, that is the end.
    ///
    /// # Errors
    ///
    /// `NotConnected` as long as the guest has no driver for the device; the host's.
    pub fn connect(&self, port: u32) -> io::Result<UnixStream> {
        let stream = self.shared.connect(port)?;
        self.ring();
        Ok(stream)
    }

    fn with(config: Config, listener: Option<(UnixListener, &Path)>) -> io::Result<Self> {
        let (mut poll, waiter) = Poll::new()?;
        let doorbell = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        poll.add(&doorbell, EventSet::IN)?;
        let host = HostSide::new(listener)?;
        let shared = Arc::new(Shared::new(poll, host, config.guest_cid())?);
        let body = shared.clone();
        let thread = threads::spawn(Work::Sockets, "vsock", move || body.run(waiter))?;
        Ok(Self { config, shared, doorbell, thread: Mutex::new(Some(thread)) })
    }

    /// Waits until host programs have got all that the guest has put in its queue, at most for `patience`: one
    /// that does not read may keep its data waiting for ever. For the end of a machine, when the guest sends no
    /// more.
    pub fn finish(&self, patience: Duration) {
        self.shared.finish(patience, || self.ring());
    }

    fn ring(&self) {
        // The counter cannot be full: that takes 2^64 notifications.
        if let Err(error) = self.doorbell.write(1) {
            log::error!("a doorbell does not ring: {error}");
        }
    }
}

impl VirtioDevice for VsockDevice {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        VIRTIO_VSOCK_F_STREAM
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE, EVENT_QUEUE_SIZE]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        // A driver without VIRTIO_VSOCK_F_STREAM has streams nevertheless (5.10.3).
        let Activation { memory, mut queues, interrupts, .. } = activation;
        let mut take = |index: u16| -> Option<ActiveQueue> {
            let at = queues.iter().position(|active| active.index == index)?;
            Some(queues.swap_remove(at))
        };
        let (receive, transmit, event) = (take(RECEIVE), take(TRANSMIT), take(EVENT));
        self.shared.activate(Active { receive, transmit, event, memory, interrupts });
        self.ring();
        Ok(())
    }

    fn notify(&self, _: u16) {
        self.ring();
    }

    fn reset(&self) {
        self.shared.reset();
    }
}

impl Drop for VsockDevice {
    fn drop(&mut self) {
        self.shared.stop();
        self.ring();
        if let Some(thread) = lock(&self.thread).take()
            && thread.join().is_err()
        {
            log::error!("the thread of a socket device has panicked");
        }
    }
}
