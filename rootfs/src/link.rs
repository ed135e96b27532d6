//! The serial ports between the guest and the host.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsFd, BorrowedFd};

use anyhow::{Context, Result};
use oriel_init::protocol::{FromGuest, FromHost};
use rustix::fs::{Mode, OFlags};
use rustix::termios::{ControlModes, OptionalActions};

use crate::{log, sys};

/// The baud rate decides only how often the driver looks whether the port has drained.
const SPEED: u32 = 115_200;

/// A serial port that carries bytes as they are.
#[derive(Debug)]
pub(crate) struct Port(File);

impl Port {
    /// Opens `/dev/ttyS<number>`.
    pub(crate) fn open(number: u8) -> Result<Self> {
        let path = format!("/dev/ttyS{number}");
        Self::open_raw(&path).with_context(|| format!("cannot open {path}"))
    }

    fn open_raw(path: &str) -> rustix::io::Result<Self> {
        // NONBLOCK: without it open waits for a carrier, until CLOCAL below says that there is none.
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let port = rustix::fs::open(path, flags, Mode::empty())?;
        let mut settings = rustix::termios::tcgetattr(&port)?;
        settings.make_raw();
        settings.set_speed(SPEED)?;
        settings.control_modes.insert(ControlModes::CLOCAL | ControlModes::CREAD);
        settings.control_modes.remove(ControlModes::HUPCL);
        // RTS goes away when the guest's input buffer is full, so that a host that heeds it loses no input.
        // Only where the host raises CTS, without which nothing would ever be sent.
        settings.control_modes.set(ControlModes::CRTSCTS, sys::clear_to_send(port.as_fd()));
        rustix::termios::tcsetattr(&port, OptionalActions::Now, &settings)?;
        let flags = rustix::fs::fcntl_getfl(&port)?;
        rustix::fs::fcntl_setfl(&port, flags - OFlags::NONBLOCK)?;
        Ok(Self(File::from(port)))
    }

    /// The same port, for another thread.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        self.0.try_clone().map(Self)
    }

    /// Returns when the host has taken all that was written.
    pub(crate) fn drain(&self) -> io::Result<()> {
        Ok(rustix::io::retry_on_intr(|| rustix::termios::tcdrain(&self.0))?)
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
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

/// Sends one message and waits until the host has it.
pub(crate) fn send(port: &mut Port, message: &FromGuest) -> Result<()> {
    let mut line = serde_json::to_vec(message).context("cannot encode a message")?;
    line.push(b'\n');
    port.write_all(&line).and_then(|()| port.drain()).context("cannot send a message on COM4")
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
                    log(&format!("no message on COM4: {error}: {}", String::from_utf8_lossy(&line)))
                }
            },
            Err(error) => return log(&format!("cannot read COM4: {error}")),
        }
    }
}
