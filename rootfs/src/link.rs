//! The ports of the console device between the guest and the host.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead, BufReader, Write};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use oriel_init::protocol::{FromGuest, FromHost};

use crate::log;

/// Where Linux lists the ports of all console devices, each with its name.
const PORTS: &str = "/sys/class/virtio-ports";

/// The driver learns of the ports in the background. It does so while the kernel boots: this is for a host
/// whose machine is very slow.
const PATIENCE: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(1);

/// A port of the console device. Linux lets a port be opened once only.
///
/// What is written has left when the host reads it, not when the call returns: the host reads everything before
/// it ends the machine.
#[derive(Debug)]
pub(crate) struct Port(File);

impl Port {
    /// Opens the port of this name, as soon as there is one.
    pub(crate) fn open(name: &str) -> Result<Self> {
        let start = Instant::now();
        let path = loop {
            if let Some(path) = find(name) {
                break path;
            }
            if start.elapsed() > PATIENCE {
                bail!("there is no console port {name}: does the kernel have VIRTIO_CONSOLE?");
            }
            thread::sleep(PAUSE);
        };
        let file = OpenOptions::new().read(true).write(true).open(&path);
        file.map(Self).with_context(|| format!("cannot open {} ({name})", path.display()))
    }

    /// The same port, for another thread.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }
}

/// The device node of the port of this name.
fn find(name: &str) -> Option<PathBuf> {
    let ports = fs::read_dir(PORTS).ok()?;
    let port = ports.flatten().find(|port| {
        let found = fs::read_to_string(port.path().join("name")).unwrap_or_default();
        found.trim_end_matches('\n') == name
    })?;
    Some(PathBuf::from("/dev").join(port.file_name()))
}

impl io::Read for Port {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Port {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Sends one message.
pub(crate) fn send(port: &mut Port, message: &FromGuest) -> Result<()> {
    let mut line = serde_json::to_vec(message).context("cannot encode a message")?;
    line.push(b'\n');
    port.write_all(&line).context("cannot send a message to the host")
}

/// Hands the host's messages to `take` for as long as the port lives. A line that is no message is logged and
/// passed over: a newer host may know more of them.
pub(crate) fn receive(port: Port, mut take: impl FnMut(FromHost)) {
    for line in BufReader::new(port).split(b'\n') {
        match line {
            Ok(line) if line.is_empty() => {}
            Ok(line) => match serde_json::from_slice(&line) {
                Ok(message) => take(message),
                Err(error) => {
                    log(&format!("no message: {error}: {}", String::from_utf8_lossy(&line)));
                }
            },
            Err(error) => return log(&format!("cannot read the host's messages: {error}")),
        }
    }
}
