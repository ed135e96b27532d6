//! The device: its features, its queues, and the life of its threads.

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use super::config::Config;
use super::input::{Pending, PortInput};
use super::output::Transmitter;
use super::worker::{PortState, Worker};
use crate::sync::lock;
use crate::threads::{self, Work};
use crate::virtio::{Activation, ActiveQueue, VirtioDevice};

/// Device type (5.3.1).
const DEVICE_ID: u16 = 3;

/// The device has ports, and a pair of queues to speak of them (5.3.3).
const VIRTIO_CONSOLE_F_MULTIPORT: u64 = 1 << 1;

/// Descriptors in each queue. Linux fills receive queues with pages, so this is what one port costs the
/// guest (256 KiB); it transmits up to 32 KiB with each.
const QUEUE_SIZE: u16 = 64;

/// What the device says of its ports, and what the driver says of them (5.3.2). The queues of port 0 are
/// before these, those of all others behind.
const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// A port to be.
pub struct Port {
    /// By which the guest finds it.
    pub name: String,
    /// Where the guest's output goes. Errors lose what was to be written. Without one the queue is not
    /// served at all: a guest that sends there waits for ever.
    pub output: Option<Box<dyn Write + Send>>,
}

/// A console device.
pub struct ConsoleDevice {
    config: Config,
    queue_sizes: Vec<u16>,
    ports: Vec<Line>,
    /// The worker's, the same over all activations: a notification that crosses a reset wakes a later worker
    /// for nothing at worst.
    doorbell: Arc<EventFd>,
    running: Mutex<Option<Running>>,
    transmitting: Mutex<Vec<JoinHandle<()>>>,
}

/// One port's two directions.
struct Line {
    name: Arc<str>,
    input: Arc<Pending>,
    output: Option<Arc<Transmitter>>,
}

struct Running {
    stopped: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl ConsoleDevice {
    /// A device with these ports.
    ///
    /// # Errors
    ///
    /// `InvalidInput` with a [`ConfigError`](super::ConfigError); the host's, when there are no file
    /// descriptors or threads left.
    pub fn new(ports: Vec<Port>) -> io::Result<Self> {
        let names: Vec<_> = ports.iter().map(|port| port.name.as_str()).collect();
        let config = Config::new(&names)
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let doorbell = Arc::new(EventFd::new(EFD_CLOEXEC)?);
        let mut device = Self {
            config,
            queue_sizes: vec![QUEUE_SIZE; 2 * ports.len() + 2],
            ports: Vec::new(),
            doorbell: doorbell.clone(),
            running: Mutex::default(),
            transmitting: Mutex::default(),
        };
        for port in ports {
            let output = match port.output {
                Some(writer) => Some(device.start_transmitter(&port.name, writer)?),
                None => None,
            };
            let input = Arc::new(Pending::new(doorbell.clone()));
            device.ports.push(Line { name: port.name.into(), input, output });
        }
        Ok(device)
    }

    /// The way into port `port`, if there is such a port.
    pub fn input(&self, port: usize) -> Option<PortInput> {
        self.ports.get(port).map(|line| PortInput(line.input.clone()))
    }

    /// Waits until the outputs have got all that the guest has put in its queues, and ends the threads that
    /// carry it: the device takes no output afterwards. For the end of a machine, when the guest sends no
    /// more. Blocks for as long as the outputs do. Idempotent.
    pub fn finish(&self) {
        self.ports
            .iter()
            .filter_map(|line| line.output.as_ref())
            .for_each(|output| output.finish());
        let threads = std::mem::take(&mut *lock(&self.transmitting));
        for thread in threads {
            if thread.join().is_err() {
                log::error!("a thread for the output of a console has panicked");
            }
        }
    }

    fn start_transmitter(
        &self,
        name: &str,
        writer: Box<dyn Write + Send>,
    ) -> io::Result<Arc<Transmitter>> {
        let transmitter = Arc::new(Transmitter::new(EventFd::new(EFD_CLOEXEC)?));
        let body = transmitter.clone();
        // The kernel keeps 15 bytes of a thread's name: the last ones tell ports apart.
        let tail = name.rsplit('.').next().unwrap_or(name);
        let name = format!("port:{tail}");
        let thread = threads::spawn(Work::Bytes, name, move || body.run(writer))?;
        lock(&self.transmitting).push(thread);
        Ok(transmitter)
    }

    /// Stops and joins the worker. The lock is held until it is gone, so that whoever comes second does not
    /// return earlier. The worker waits for nobody, so this does not take long.
    fn stop(&self) {
        let mut running = lock(&self.running);
        for output in self.ports.iter().filter_map(|line| line.output.as_ref()) {
            output.reset();
        }
        if let Some(worker) = running.take() {
            worker.stopped.store(true, Ordering::Release);
            self.ring();
            if worker.thread.join().is_err() {
                log::error!("the worker of a console has panicked");
            }
        }
    }

    fn ring(&self) {
        // The counter cannot be full: that takes 2^64 notifications that no worker reads.
        if let Err(error) = self.doorbell.write(1) {
            log::error!("a doorbell does not ring: {error}");
        }
    }
}

/// The queues of port `port` (5.3.2): receive, transmit.
fn port_queues(port: usize) -> (u16, u16) {
    // At most `MAX_PORTS`.
    let port = port as u16;
    let receive = if port == 0 { 0 } else { 2 * port + 2 };
    (receive, receive + 1)
}

impl VirtioDevice for ConsoleDevice {
    fn device_id(&self) -> u16 {
        DEVICE_ID
    }

    fn features(&self) -> u64 {
        VIRTIO_CONSOLE_F_MULTIPORT
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn activate(&self, activation: Activation) -> io::Result<()> {
        let Activation { memory, queues, interrupts, features } = activation;
        let multiport = features & VIRTIO_CONSOLE_F_MULTIPORT != 0;
        let mut queues: Vec<Option<ActiveQueue>> = queues.into_iter().map(Some).collect();
        let mut take = |index: u16| {
            let wanted = |active: &&mut Option<ActiveQueue>| {
                active.as_ref().is_some_and(|active| active.index == index)
            };
            // Without ports there is only the pair of port 0.
            queues.iter_mut().find(wanted).filter(|_| multiport || index < 2)?.take()
        };
        let mut ports = Vec::new();
        let mut outputs = Vec::new();
        for (index, line) in self.ports.iter().enumerate() {
            let (receive, transmit) = port_queues(index);
            ports.push(PortState::new(line.name.clone(), line.input.clone(), take(receive)));
            if let (Some(output), Some(queue)) = (&line.output, take(transmit)) {
                outputs.push((output, queue));
            }
        }
        let stopped = Arc::new(AtomicBool::new(false));
        let worker = Worker {
            ports,
            control_receive: take(CONTROL_RECEIVE),
            control_transmit: take(CONTROL_TRANSMIT),
            memory: memory.clone(),
            interrupts: interrupts.clone(),
            doorbell: self.doorbell.clone(),
            stopped: stopped.clone(),
        };
        let thread = threads::spawn(Work::Bytes, "console", move || worker.run())?;
        *lock(&self.running) = Some(Running { stopped, thread });
        for (output, queue) in outputs {
            output.activate(queue, memory.clone(), interrupts.clone());
        }
        Ok(())
    }

    fn notify(&self, queue: u16) {
        let transmits = |(index, line): (usize, &Line)| {
            line.output.clone().filter(|_| port_queues(index).1 == queue)
        };
        match self.ports.iter().enumerate().find_map(transmits) {
            Some(output) => output.ring(),
            None => self.ring(),
        }
    }

    fn reset(&self) {
        self.stop();
    }
}

impl Drop for ConsoleDevice {
    /// Threads that hang in an output are left behind: they hold nothing of the guest.
    fn drop(&mut self) {
        self.stop();
        for line in &self.ports {
            // Senders shall not wait for a guest that is gone.
            line.input.close();
            if let Some(output) = &line.output {
                output.leave();
            }
        }
    }
}
