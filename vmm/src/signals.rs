//! The user's signals, which are for the command.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::Signal;

/// As many times within so long must the user ask a command to end before it is not waited for any more.
const PATIENCE: u32 = 3;
const PATIENCE_LASTS: Duration = Duration::from_secs(10);

/// The signals that are the user's to send, each a pipe that becomes readable.
pub struct Signals(Vec<(i32, UnixStream)>);

impl Signals {
    /// Takes the signals over.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn new() -> Result<Self> {
        let watched = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::WINCH];
        let mut pipes = Vec::new();
        for signal in watched.map(Signal::as_raw) {
            let (reader, writer) = UnixStream::pair().context("signal pipe")?;
            reader.set_nonblocking(true).context("signal pipe")?;
            signal_hook::low_level::pipe::register(signal, writer).context("signal handler")?;
            pipes.push((signal, reader));
        }
        Ok(Self(pipes))
    }

    /// The descriptors to wait for.
    pub fn sources(&self) -> impl Iterator<Item = i32> {
        self.0.iter().map(|(_, pipe)| pipe.as_raw_fd())
    }

    /// The signal whose descriptor is readable. Several of one signal are one. `None`: it is not one of these.
    pub fn take(&self, source: i32) -> Option<i32> {
        let (number, pipe) = self.0.iter().find(|(_, pipe)| pipe.as_raw_fd() == source)?;
        let _ = rustix::io::read(pipe, &mut [0; 64]);
        Some(*number)
    }

    /// Waits for signals, and takes them.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn wait(&self) -> Result<Vec<i32>> {
        let mut events: Vec<_> =
            self.0.iter().map(|(_, pipe)| PollFd::new(pipe, PollFlags::IN)).collect();
        rustix::io::retry_on_intr(|| poll(&mut events, None)).context("signals")?;
        let ready = events.iter().zip(&self.0).filter(|(event, _)| !event.revents().is_empty());
        Ok(ready.filter_map(|(_, (_, pipe))| self.take(pipe.as_raw_fd())).collect())
    }
}

/// How long a user waits for a command to end that was asked to.
#[derive(Default)]
pub struct Patience {
    /// How many times in a row it was asked.
    asked: u32,
    asked_last: Option<Instant>,
}

impl Patience {
    /// The user has sent this signal. `true`: once too often.
    pub fn ends_by(&mut self, number: i32) -> bool {
        let ends = [Signal::INT, Signal::TERM, Signal::QUIT].map(Signal::as_raw).contains(&number);
        if self.asked_last.is_none_or(|last| last.elapsed() > PATIENCE_LASTS) {
            self.asked = 0;
        }
        if ends {
            self.asked += 1;
            self.asked_last = Some(Instant::now());
        }
        self.asked >= PATIENCE
    }
}

/// The exit status of what this signal ended.
pub fn status_of(number: i32) -> u8 {
    128u8.saturating_add(u8::try_from(number).unwrap_or(u8::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_third_time_is_once_too_often() {
        let mut patience = Patience::default();
        let asked = [1, 2, 28, 15, 1, 2].map(|number| patience.ends_by(number));
        assert_eq!(asked, [false, false, false, false, false, true]);
        assert_eq!((status_of(9), status_of(400)), (137, 255));
    }
}
