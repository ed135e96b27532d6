//! The way to `oriel-init` and its command, and standard input's way there.

use std::io::Write;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use devices::serial::SerialPort;
use devices::threads::Work;
use devices::virtio::console::{ConsoleDevice, Port, PortInput};
use oriel_init::frames::Kind;
use oriel_init::protocol::{CONTROL_PORT, FromHost, STDERR_PORT, STDIN_PORT, STDOUT_PORT};

use super::streams::{Messages, Notifier, Output};
use crate::logs::Log;
use crate::machine::Machine;
use crate::stdio::{self, duplicate};
use crate::walls::{self, Role};

/// Input is read from the user no faster than COM1 takes it.
const INPUT_AHEAD: usize = 64 << 10;
const INPUT_PAUSE: Duration = Duration::from_millis(2);

/// The way to `oriel-init` and its command: the console device (see `oriel_init::protocol`).
#[derive(Clone)]
pub struct Link {
    /// The device.
    pub console: Arc<ConsoleDevice>,
    /// The command's standard input.
    pub stdin: PortInput,
    control: PortInput,
}

impl Link {
    /// Puts the device on `machine`. The command's output goes to the standard streams, unless this process is
    /// `detached`, and to the log.
    ///
    /// # Errors
    ///
    /// When a standard stream is closed, or the machine has no room.
    pub fn new(
        machine: &mut Machine,
        notifier: &Notifier,
        log: Option<&Arc<Log>>,
        detached: bool,
    ) -> Result<Self> {
        let output = |stream: BorrowedFd<'_>, kind| -> Result<Output> {
            let target = (!detached).then(|| duplicate(stream)).transpose()?;
            Ok(Output::new(target, log.map(|log| (log.clone(), kind)), notifier.clone()))
        };
        let stdout = output(rustix::stdio::stdout(), Kind::Stdout)?;
        let stderr = output(rustix::stdio::stderr(), Kind::Stderr)?;
        let ports: [(_, Option<Box<dyn Write + Send>>); 4] = [
            (STDIN_PORT, None),
            (STDOUT_PORT, Some(Box::new(stdout))),
            (STDERR_PORT, Some(Box::new(stderr))),
            (CONTROL_PORT, Some(Box::new(Messages::new(notifier.clone())))),
        ];
        let ports = ports.map(|(name, output)| Port { name: name.to_string(), output });
        let console = Arc::new(ConsoleDevice::new(ports.into()).context("virtio-console device")?);
        machine.add_console(console.clone())?;
        let input = |port| console.input(port).context("virtio-console device");
        let (stdin, control) = (input(0)?, input(3)?);
        Ok(Self { console, stdin, control })
    }

    /// Sends a message. Never blocks.
    pub fn tell(&self, message: &FromHost) {
        match serde_json::to_string(message) {
            // The guest reads its messages at once, unless it is up to no good.
            Ok(line) if !self.control.try_send(format!("{line}\n").as_bytes()) => {
                log::warn!("the guest does not listen: {line} is lost");
            }
            Ok(_) => {}
            Err(error) => log::error!("message not sent: {error}"),
        }
    }
}

/// Where standard input goes.
pub enum Sink {
    /// The command's.
    Port(PortInput),
    /// COM1, for a foreign init.
    Serial(Arc<SerialPort>),
}

impl Sink {
    /// Returns when there is room for more. `false`: nobody takes it any more.
    fn send(&self, bytes: &[u8]) -> bool {
        match self {
            Self::Port(port) => port.send(bytes).is_ok(),
            Self::Serial(port) => {
                port.send(bytes);
                while port.queued() > INPUT_AHEAD {
                    std::thread::sleep(INPUT_PAUSE);
                }
                true
            }
        }
    }
}

/// Reads standard input on a thread of its own: it may be a file, which epoll does not take, and it may
/// never end.
///
/// # Errors
///
/// When the host gives no thread.
pub fn forward_input(sink: Sink) -> Result<()> {
    let forward = move || {
        let mut buffer = vec![0; INPUT_AHEAD];
        loop {
            match stdio::read(rustix::stdio::stdin(), &mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    if !sink.send(buffer.get(..count).unwrap_or_default()) {
                        break;
                    }
                }
                Err(error) => {
                    log::warn!("standard input: {error}");
                    break;
                }
            }
        }
        // A serial line has no end.
        if let Sink::Port(port) = sink {
            port.close();
        }
    };
    walls::start(Role::Device(Work::Bytes), "stdin", forward).context("input thread")?;
    Ok(())
}
