//! Tells the agent in the guest what has changed on the host, for shares with `cache=watch`.
//!
//! Each such share has a thread here, which waits for changes and for the agent, and a thread in the guest.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use devices::share::{Batch, Item, Watch};
use devices::threads::Work;
use devices::virtio::vsock::VsockDevice;
use oriel_init::frames::{self, Decoder, MAX_TO_HOST};
use oriel_init::watch::{Change, FromWatcher, ToWatcher, WATCH_PORT, text};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::walls::{self, Role};

/// How long the agent may take to answer. A batch takes it some milliseconds, on an emulated processor a second.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often a guest is asked for an agent, at first, while it boots, and later.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LAST_PAUSE: Duration = Duration::from_secs(5);

/// The longest first line of a stream in bytes: `OK`, a space, a number and the end.
const MAX_LINE: usize = 32;

/// Keeps the guest told of what changes in the share with this tag, as long as this process lives.
///
/// # Errors
///
/// When the host gives no thread.
pub fn keep_told(watch: Arc<Watch>, tag: String, vsock: Arc<VsockDevice>) -> Result<()> {
    let keep = move || Teller { watch, tag, vsock }.run();
    let role = Role::Device(Work::Sockets);
    walls::start(role, "watch", keep).context("thread for cache=watch")?;
    Ok(())
}

struct Teller {
    watch: Arc<Watch>,
    tag: String,
    vsock: Arc<VsockDevice>,
}

/// How far a stream has come.
enum Phase {
    /// The guest has not agreed yet; so much of the line is there.
    Line(Vec<u8>),
    /// The agent is asked whether it can.
    Asked,
    /// It has nothing to do.
    Ready,
    /// It is to answer by then. None: it is late already.
    Telling(Option<Instant>),
}

struct Link {
    stream: UnixStream,
    decoder: Decoder,
    phase: Phase,
}

impl Teller {
    fn run(self) {
        let mut link: Option<Link> = None;
        let (mut pause, mut next) = (FIRST_PAUSE, Instant::now());
        loop {
            if link.is_none() && next <= Instant::now() {
                link = self.connect().ok();
                next = Instant::now() + pause;
                pause = (pause * 2).min(LAST_PAUSE);
            }
            let until = match link.as_ref().map(|link| &link.phase) {
                None => Some(next),
                Some(Phase::Telling(until)) => *until,
                Some(_) => None,
            };
            let answered = match self.wait(link.as_ref(), until) {
                Ok(answered) => answered,
                Err(error) => return self.give_up(&error),
            };
            if let Err(error) = self.watch.gather() {
                return self.give_up(&error);
            }
            let Some(of) = &mut link else { continue };
            match self.go_on(of, answered) {
                Ok(()) if matches!(of.phase, Phase::Ready | Phase::Telling(_)) => {
                    pause = FIRST_PAUSE;
                }
                Ok(()) => {}
                Err(error) => {
                    log::info!("cache=watch: share {}: {error}", self.tag);
                    self.watch.disconnected();
                    link = None;
                }
            }
        }
    }

    fn give_up(&self, error: &io::Error) {
        log::error!("cache=watch: share {}: {error}; this is cache=auto from now on", self.tag);
        self.watch.disconnected();
    }

    fn connect(&self) -> io::Result<Link> {
        let stream = self.vsock.connect(WATCH_PORT)?;
        stream.set_nonblocking(true)?;
        let decoder = Decoder::new(MAX_TO_HOST);
        Ok(Link { stream, decoder, phase: Phase::Line(Vec::new()) })
    }

    /// Waits for a change, the agent, or that moment. `true`: the agent has said something, or is gone.
    fn wait(&self, link: Option<&Link>, until: Option<Instant>) -> io::Result<bool> {
        let timeout = until.map(|until| {
            let left = until.saturating_duration_since(Instant::now());
            // Not before it is due.
            let left = left + Duration::from_millis(1);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        let events = self.watch.events();
        let mut fds = vec![PollFd::from_borrowed_fd(events, PollFlags::IN)];
        fds.extend(link.map(|link| PollFd::new(&link.stream, PollFlags::IN)));
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(fds.get(1).is_some_and(|fd| !fd.revents().is_empty()))
    }

    fn go_on(&self, link: &mut Link, answered: bool) -> io::Result<()> {
        if answered {
            self.hear(link)?;
        }
        match link.phase {
            Phase::Telling(Some(until)) if until <= Instant::now() => {
                self.watch.is_late();
                link.phase = Phase::Telling(None);
            }
            Phase::Ready => {
                if let Some(batch) = self.watch.take() {
                    link.say(&message(&batch))?;
                    link.phase = Phase::Telling(Some(Instant::now() + PATIENCE));
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// Takes what the agent has said.
    fn hear(&self, link: &mut Link) -> io::Result<()> {
        let mut piece = [0; MAX_TO_HOST];
        let count = match link.stream.read(&mut piece) {
            Ok(0) => return Err(io::Error::other("no agent takes the stream, or it ended it")),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error),
        };
        let mut bytes = piece.get(..count).unwrap_or_default();
        if let Phase::Line(line) = &mut link.phase {
            let end = bytes.iter().position(|byte| *byte == b'\n');
            let (of_line, rest) = bytes.split_at(end.map_or(bytes.len(), |end| end + 1));
            line.extend(of_line);
            bytes = rest;
            if line.len() > MAX_LINE {
                return Err(io::Error::other("a line that is none"));
            }
            if end.is_none() {
                return Ok(());
            }
            link.phase = Phase::Asked;
            link.say(&ToWatcher::Begin { tag: self.tag.clone() })?;
        }
        link.decoder.push(bytes);
        while let Some(frame) = link.decoder.frame().map_err(io::Error::other)? {
            match (frame.message().map_err(io::Error::other)?, &link.phase) {
                (FromWatcher::Ready { thread }, Phase::Asked) => {
                    log::debug!("cache=watch: share {}: an agent is there", self.tag);
                    self.watch.connected(thread);
                    link.phase = Phase::Ready;
                }
                (FromWatcher::Refused { message }, Phase::Asked) => {
                    return Err(io::Error::other(crate::terminal::printable(&message)));
                }
                (FromWatcher::Done, Phase::Telling(_)) => {
                    self.watch.done();
                    link.phase = Phase::Ready;
                }
                _ => return Err(io::Error::other("the agent says what it was not asked")),
            }
        }
        Ok(())
    }
}

impl Link {
    fn say(&mut self, message: &ToWatcher) -> io::Result<()> {
        let mut bytes = Vec::new();
        frames::put_message(&mut bytes, message);
        // Nothing else is on its way, and the stream takes what the guest has no room for.
        self.stream.set_nonblocking(false)?;
        self.stream.set_write_timeout(Some(PATIENCE))?;
        let written = self.stream.write_all(&bytes);
        self.stream.set_nonblocking(true)?;
        written
    }
}

fn message(batch: &Batch) -> ToWatcher {
    let change = |item: &Item| match item {
        Item::Name { directory, name, happened } => {
            Change::Name { directory: *directory, name: text(name), data: happened.data }
        }
        Item::Listing { directory } => Change::Listing { directory: *directory },
        Item::Node { node } => Change::Node { node: *node },
    };
    ToWatcher::Changed(batch.items.iter().map(change).collect())
}
