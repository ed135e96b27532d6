//! What the serial port and the console device are connected to.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use oriel_init::frames::Kind;
use oriel_init::protocol::FromGuest;
use vmm_sys_util::eventfd::EventFd;

use super::Event;
use crate::logs::Log;
use crate::stdio::write_all;

/// How much of the kernel's console is kept to be shown when something goes wrong.
const TAIL: usize = 16 << 10;
/// A longer line of the console comes into the log in pieces.
const LINE_MAX: usize = 1 << 10;
/// No message of the guest is longer; what is, is dropped up to its end.
const MESSAGE_MAX: usize = 64 << 10;

/// Tells the main thread of an event. Any thread.
#[derive(Clone)]
pub struct Notifier {
    events: Sender<Event>,
    wake: Arc<EventFd>,
}

impl Notifier {
    /// Events go through `events`, and `wake` is made readable.
    pub fn new(events: Sender<Event>, wake: Arc<EventFd>) -> Self {
        Self { events, wake }
    }

    /// Sends `event`. Lost only when the main thread is gone already.
    pub fn send(&self, event: Event) {
        if self.events.send(event).is_ok()
            && let Err(error) = self.wake.write(1)
        {
            log::debug!("main thread not woken: {error}");
        }
    }
}

/// The end of the kernel's console.
#[derive(Clone, Default)]
pub struct Tail(Arc<Mutex<VecDeque<u8>>>);

impl Tail {
    /// As text, with line ends as the host has them.
    pub fn text(&self) -> String {
        let bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (front, back) = bytes.as_slices();
        String::from_utf8_lossy(&[front, back].concat()).replace('\r', "")
    }
}

/// COM1: the console goes to a file and into the tail.
pub struct Console {
    /// Where it goes besides.
    pub target: Option<OwnedFd>,
    /// Where lines of it are kept besides.
    pub log: Option<Arc<Log>>,
    /// The beginning of a line for the log.
    pub line: Vec<u8>,
    /// What is kept.
    pub tail: Tail,
}

impl Write for Console {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let mut tail = self.tail.0.lock().unwrap_or_else(PoisonError::into_inner);
        for byte in bytes {
            if tail.len() == TAIL {
                tail.pop_front();
            }
            tail.push_back(*byte);
        }
        drop(tail);
        if let Some(log) = &self.log {
            // COM1 comes byte by byte.
            self.line.extend(bytes);
            if bytes.contains(&b'\n') || self.line.len() >= LINE_MAX {
                log.write(Kind::Console, &self.line);
                self.line.clear();
            }
        }
        if let Some(target) = &self.target {
            write_all(target, bytes)?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The ports of the command's output. The first time that nobody reads it any more, the main thread is
/// told, which tells the command.
pub struct Output {
    /// None when nobody is there.
    target: Option<OwnedFd>,
    log: Option<(Arc<Log>, Kind)>,
    broken: Option<Notifier>,
}

impl Output {
    /// Output to `target`, and of this kind to a log.
    pub fn new(target: Option<OwnedFd>, log: Option<(Arc<Log>, Kind)>, notifier: Notifier) -> Self {
        Self { target, log, broken: Some(notifier) }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some((log, kind)) = &self.log {
            log.write(*kind, bytes);
        }
        if let Some(target) = &self.target
            && let Err(error) = write_all(target, bytes)
            && let Some(notifier) = self.broken.take()
        {
            notifier.send(match error.kind() {
                io::ErrorKind::BrokenPipe => Event::OutputClosed,
                _ => Event::OutputFailed(error.to_string()),
            });
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The control port: lines of JSON.
pub struct Messages {
    line: Vec<u8>,
    notifier: Notifier,
}

impl Messages {
    /// Each message becomes an event.
    pub fn new(notifier: Notifier) -> Self {
        Self { line: Vec::new(), notifier }
    }
}

impl Write for Messages {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            if *byte != b'\n' {
                if self.line.len() < MESSAGE_MAX {
                    self.line.push(*byte);
                }
                continue;
            }
            match serde_json::from_slice::<FromGuest>(&self.line) {
                Ok(message) => self.notifier.send(Event::Guest(message)),
                Err(error) => log::warn!("the guest sent what is no message: {error}"),
            }
            self.line.clear();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, channel};

    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;

    fn notifier() -> (Notifier, Receiver<Event>) {
        let (sender, receiver) = channel();
        (Notifier::new(sender, Arc::new(EventFd::new(EFD_NONBLOCK).unwrap())), receiver)
    }

    #[test]
    fn the_tail_keeps_the_end() {
        let tail = Tail::default();
        let mut console = Console { target: None, log: None, line: Vec::new(), tail: tail.clone() };
        console.write_all(&vec![b'a'; TAIL]).unwrap();
        console.write_all(b"the\r\nend").unwrap();
        assert!(tail.text().ends_with("athe\nend"));
        assert_eq!(tail.text().len(), TAIL - 1);
    }

    #[test]
    fn messages_are_lines_and_nonsense_is_skipped() {
        let (notifier, events) = notifier();
        let mut messages = Messages::new(notifier);
        messages.write_all(b"\xff\xff\n{\"exited\":{\"status\":300}}\n").unwrap();
        messages.write_all(&vec![b'{'; 1 << 20]).unwrap();
        assert!(messages.line.len() <= MESSAGE_MAX);
        messages.write_all(b"\n\"started\"\n{\"exited\":").unwrap();
        messages.write_all(b"{\"status\":7}}\n").unwrap();
        let received: Vec<_> = events.try_iter().collect();
        let expected = [FromGuest::Started, FromGuest::Exited { status: 7 }].map(Event::Guest);
        assert_eq!(received, expected);
    }

    #[test]
    fn a_closed_pipe_is_told_once() {
        let (notifier, events) = notifier();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let mut output = Output::new(Some(writer), None, notifier);
        output.write_all(b"one").unwrap();
        output.write_all(b"two").unwrap();
        assert_eq!(events.try_iter().collect::<Vec<_>>(), [Event::OutputClosed]);
    }
}
