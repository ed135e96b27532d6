//! 16550A serial ports (the register model is `vm-superio`'s).

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};

use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, Serial};
use vmm_sys_util::eventfd::EventFd;

use crate::bus::BusDevice;

/// Number of I/O ports of a 16550.
pub const PORTS: u64 = 8;

/// Modem control register.
const MCR: u8 = 4;
/// Request to send: the guest is ready to receive. Linux drops it when its buffers are full.
const MCR_RTS: u8 = 1 << 1;

/// An interrupt line: an eventfd that the machine has bound to an I/O APIC pin.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

struct State {
    uart: Serial<Line, NoEvents, Box<dyn Write + Send>>,
    /// Input that the 16550's FIFO had no room for yet.
    pending: VecDeque<u8>,
    request_to_send: bool,
}

impl State {
    /// Moves pending input into the FIFO, which raises the interrupt, while the guest asks for it.
    fn fill(&mut self) {
        if !self.request_to_send {
            return;
        }
        let room = self.uart.fifo_capacity().min(self.pending.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.pending.drain(..room).collect();
        if let Err(error) = self.uart.enqueue_raw_bytes(&bytes) {
            // Only in loopback mode, in which a real line is cut off too: the input is lost.
            log::debug!("serial input dropped: {error:?}");
        }
    }
}

/// One port. What the guest sends goes to a writer, byte by byte, on the vCPU's thread: a writer that blocks
/// holds the guest back, which is the flow control.
pub struct SerialPort {
    state: Mutex<State>,
}

impl SerialPort {
    /// A port that interrupts through `line` and sends to `output`. Errors of `output` lose the byte.
    pub fn new(line: EventFd, output: Box<dyn Write + Send>) -> Self {
        let uart = Serial::new(Line(line), output);
        Self { state: Mutex::new(State { uart, pending: VecDeque::new(), request_to_send: false }) }
    }

    /// Queues bytes for the guest to read. The caller bounds what it queues by what [`queued`](Self::queued)
    /// says.
    pub fn send(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.pending.extend(bytes);
        state.fill();
    }

    /// Bytes that wait for room in the guest's FIFO.
    pub fn queued(&self) -> usize {
        self.lock().pending.len()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        // The registers are a byte wide; wider accesses read as nobody there.
        let (Ok(register), [byte]) = (u8::try_from(offset), data) else { return };
        let mut state = self.lock();
        *byte = state.uart.read(register);
        state.fill();
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let (Ok(register), [byte]) = (u8::try_from(offset), data) else { return };
        let mut state = self.lock();
        if let Err(error) = state.uart.write(register, *byte) {
            log::debug!("serial output lost: {error:?}");
        }
        if register == MCR {
            state.request_to_send = *byte & MCR_RTS != 0;
            state.fill();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn what_the_guest_sends_reaches_the_writer() {
        let log = Log::default();
        let port = SerialPort::new(EventFd::new(EFD_NONBLOCK).unwrap(), Box::new(log.clone()));
        for byte in b"hello" {
            port.write(0, &[*byte]);
        }
        port.write(0, b"no");
        port.write(9, b"n");
        assert_eq!(*log.0.lock().unwrap(), b"hello");
    }

    #[test]
    fn input_longer_than_the_fifo_arrives_whole() {
        let line = EventFd::new(EFD_NONBLOCK).unwrap();
        let port = SerialPort::new(line.try_clone().unwrap(), Box::new(Log::default()));
        port.write(1, &[1]); // IER: received data available
        let input: Vec<u8> = (0..1000).map(|n| n as u8).collect();
        port.send(&input);
        assert_eq!(port.queued(), input.len(), "the guest has not asked for it");
        port.write(MCR.into(), &[MCR_RTS]);
        assert!(port.queued() < input.len());
        assert!(port.queued() > 0);
        assert!(line.read().is_ok(), "interrupts");
        let mut received = Vec::new();
        loop {
            let mut status = [0];
            port.read(5, &mut status);
            if status[0] & 1 == 0 {
                break;
            }
            let mut byte = [0];
            port.read(0, &mut byte);
            received.push(byte[0]);
        }
        assert_eq!(received, input);
    }
}
