//! One further command, from the host's side.
//!
//! Who writes to the sandbox waits for nobody but it: standard input is read as far as there is room for it, and
//! signals are sent whether it is read or not. So a guest that does not read, or a reader of ours that does not,
//! keeps no signal of the user's from counting.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use oriel_init::frames::{self, Decoder, Frame, Kind, MAX_DATA, MAX_TO_AGENT, MAX_TO_HOST};
use oriel_init::protocol::{Exec, FromAgent, FromHost, STDIN_WINDOW};
use rustix::process::Signal;

use crate::cli;
use crate::signals::{Patience, Signals, status_of};
use crate::stdio;
use crate::terminal::{self, RawTerminal};

/// Frames that wait to be sent: a window of input, and signals.
const QUEUE: usize = 32;

/// Where the command's streams are on the host.
pub struct Streams {
    /// Only if it is forwarded.
    pub stdin: Option<OwnedFd>,
    /// Standard output; everything, with a terminal.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
}

/// Runs a command over `stream` and returns its status. `signals` are forwarded; with a terminal and standard
/// input, the user's terminal is raw while the command runs.
///
/// # Errors
///
/// When the sandbox ends before the command does, or does not speak our language; when output cannot be written.
pub fn run(
    stream: UnixStream,
    exec: &Exec,
    streams: Streams,
    signals: Option<Signals>,
) -> Result<u8> {
    let request = request(exec)?;
    let (sender, to_send) = sync_channel(QUEUE);
    let writer = stream.try_clone().context("socket")?;
    spawn("sender", move || send_all(writer, &to_send))?;
    // It is the first.
    let _ = sender.send(request);
    let shared = Arc::new(Shared::default());
    if let Some(signals) = signals {
        let (sender, shared) = (sender.clone(), shared.clone());
        let terminal = exec.terminal;
        spawn("signals", move || forward_signals(&signals, &sender, &shared, terminal))?;
    }
    let mut session = Session {
        sender,
        shared,
        stdout: streams.stdout,
        stderr: streams.stderr,
        stdin: streams.stdin,
        stdout_closed: false,
        stderr_closed: false,
        until: Until::Ended,
    };
    if !exec.terminal {
        session.forward_input()?;
    }
    let status = session.listen(stream);
    session.shared.cook();
    status
}

/// Starts a command over `stream` and lets it run: its input is at its end, and nobody reads its output. Returns 0, or
/// the status of a refusal.
///
/// # Errors
///
/// As [`run`].
pub fn start(mut stream: UnixStream, exec: &Exec, streams: Streams) -> Result<u8> {
    stream.write_all(&request(exec)?).context("the sandbox ended")?;
    let mut session = Session {
        sender: sync_channel(QUEUE).0,
        shared: Arc::new(Shared::default()),
        stdout: streams.stdout,
        stderr: streams.stderr,
        stdin: None,
        stdout_closed: false,
        stderr_closed: false,
        until: Until::Started,
    };
    session.listen(stream)
}

fn request(exec: &Exec) -> Result<Vec<u8>> {
    let mut request = Vec::new();
    frames::put_message(&mut request, exec);
    if request.len() - frames::HEADER > MAX_TO_AGENT {
        bail!("the command and its environment are longer than {} KiB", MAX_TO_AGENT >> 10);
    }
    Ok(request)
}

/// What the threads of a session share.
struct Shared {
    /// Bytes of standard input that the guest has room for.
    room: Mutex<usize>,
    more_room: Condvar,
    terminal: Mutex<Option<RawTerminal>>,
}

impl Default for Shared {
    fn default() -> Self {
        Self {
            room: Mutex::new(STDIN_WINDOW),
            more_room: Condvar::new(),
            terminal: Mutex::new(None),
        }
    }
}

impl Shared {
    fn terminal(&self) -> MutexGuard<'_, Option<RawTerminal>> {
        self.terminal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts the user's terminal back.
    fn cook(&self) {
        drop(self.terminal().take());
    }

    /// Waits for room, and says how much there is, at most a frame's.
    fn wait_for_room(&self) -> usize {
        let room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let room = self.more_room.wait_while(room, |room| *room == 0);
        (*room.unwrap_or_else(PoisonError::into_inner)).min(MAX_DATA)
    }

    fn use_room(&self, bytes: usize) {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        *room = room.saturating_sub(bytes);
    }

    fn add_room(&self, bytes: u32) -> Result<()> {
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let more = usize::try_from(bytes).ok().and_then(|bytes| room.checked_add(bytes));
        *room = more
            .filter(|room| *room <= STDIN_WINDOW)
            .context("the sandbox has taken more input than it was given")?;
        self.more_room.notify_all();
        Ok(())
    }
}

/// For how long the guest is heard.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Until {
    /// The command runs.
    Started,
    /// It has ended.
    Ended,
}

/// The thread that hears the guest.
struct Session {
    sender: SyncSender<Vec<u8>>,
    shared: Arc<Shared>,
    stdout: OwnedFd,
    stderr: OwnedFd,
    /// Standard input that is not forwarded yet: keys that are typed before the user's terminal is raw mean something
    /// else, as Ctrl-D does.
    stdin: Option<OwnedFd>,
    until: Until,
    /// Nobody reads this output any more, and the command was told.
    stdout_closed: bool,
    stderr_closed: bool,
}

impl Session {
    fn listen(&mut self, mut stream: UnixStream) -> Result<u8> {
        let mut decoder = Decoder::new(MAX_TO_HOST);
        let mut buffer = vec![0; MAX_DATA];
        loop {
            let count = match stream.read(&mut buffer) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                // However it has gone.
                Ok(0) | Err(_) => {
                    bail!("the sandbox ended, or broke the connection, before the command did")
                }
                Ok(count) => count,
            };
            decoder.push(buffer.get(..count).unwrap_or_default());
            while let Some(frame) = decoder.frame().context("the sandbox sends")? {
                if let Some(status) = self.take(&frame)? {
                    return Ok(status);
                }
            }
        }
    }

    /// Takes a frame. The last one brings the status.
    fn take(&mut self, frame: &Frame) -> Result<Option<u8>> {
        match frame.kind {
            Kind::Stdout => self.write(&frame.bytes, false)?,
            Kind::Stderr => self.write(&frame.bytes, true)?,
            Kind::Message => match frame.message().context("the sandbox sends")? {
                FromAgent::Started if self.until == Until::Started => return Ok(Some(0)),
                FromAgent::Started => self.started()?,
                FromAgent::Room { bytes } => self.shared.add_room(bytes)?,
                FromAgent::Exited { status } => return Ok(Some(status)),
                FromAgent::Refused { status, message } => {
                    self.shared.cook();
                    return Ok(Some(cli::refused(status, &message)));
                }
            },
            Kind::Stdin | Kind::Console => bail!("the sandbox sends what is no output"),
        }
        Ok(None)
    }

    /// The command runs, and what is typed from now on is for it.
    fn started(&mut self) -> Result<()> {
        if self.stdin.is_some() {
            match RawTerminal::enter() {
                Ok(raw) => *self.shared.terminal() = Some(raw),
                Err(error) => log::warn!("{error:#}"),
            }
        }
        self.forward_input()
    }

    fn forward_input(&mut self) -> Result<()> {
        let Some(stdin) = self.stdin.take() else { return Ok(()) };
        let (sender, shared) = (self.sender.clone(), self.shared.clone());
        spawn("stdin", move || forward_input(&stdin, &sender, &shared))
    }

    fn write(&mut self, bytes: &[u8], error: bool) -> Result<()> {
        let (target, closed) = match error {
            true => (&self.stderr, &mut self.stderr_closed),
            false => (&self.stdout, &mut self.stdout_closed),
        };
        if *closed {
            return Ok(());
        }
        match stdio::write_all(target, bytes) {
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {
                *closed = true;
                tell(&self.sender, &FromHost::Signal { number: Signal::PIPE.as_raw() });
                Ok(())
            }
            written => written.context("the command's output cannot be written"),
        }
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<()> {
    thread::Builder::new().name(name.into()).spawn(body).context("thread")?;
    Ok(())
}

/// Sends a message, unless so much waits already that the guest cannot be listening.
fn tell(sender: &SyncSender<Vec<u8>>, message: &FromHost) {
    let mut bytes = Vec::new();
    frames::put_message(&mut bytes, message);
    if let Err(TrySendError::Full(_)) = sender.try_send(bytes) {
        log::warn!("the sandbox does not listen: {message:?} is lost");
    }
}

fn send_all(mut stream: UnixStream, frames: &Receiver<Vec<u8>>) {
    for bytes in frames {
        if stream.write_all(&bytes).is_err() {
            // Whoever listens hears of it.
            return;
        }
    }
}

fn forward_input(stdin: &OwnedFd, sender: &SyncSender<Vec<u8>>, shared: &Shared) {
    let mut buffer = vec![0; MAX_DATA];
    loop {
        let room = shared.wait_for_room();
        let count = match stdio::read(stdin, buffer.get_mut(..room).unwrap_or_default()) {
            Ok(count) => count,
            Err(error) => {
                log::warn!("standard input: {error}");
                0
            }
        };
        shared.use_room(count);
        let mut bytes = Vec::new();
        frames::put(&mut bytes, Kind::Stdin, buffer.get(..count).unwrap_or_default());
        // An empty frame is the end.
        if sender.send(bytes).is_err() || count == 0 {
            return;
        }
    }
}

/// Forwards signals until the user has had enough, which ends this process.
fn forward_signals(
    signals: &Signals,
    sender: &SyncSender<Vec<u8>>,
    shared: &Shared,
    has_terminal: bool,
) {
    let mut patience = Patience::default();
    loop {
        let numbers = match signals.wait() {
            Ok(numbers) => numbers,
            Err(error) => return log::warn!("{error:#}"),
        };
        for number in numbers {
            if number == Signal::WINCH.as_raw() {
                if let (true, Some((rows, columns))) = (has_terminal, terminal::size()) {
                    tell(sender, &FromHost::Resize { rows, columns });
                }
            } else if patience.ends_by(number) {
                shared.cook();
                std::process::exit(status_of(number).into());
            } else {
                tell(sender, &FromHost::Signal { number });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::net::Shutdown;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    /// A session with an agent that does what `agent` does with its end.
    struct Run {
        status: Result<u8>,
        stdout: Vec<u8>,
        stderr: Vec<u8>,
    }

    fn pipe() -> (OwnedFd, OwnedFd) {
        pipe_with(PipeFlags::CLOEXEC).unwrap()
    }

    fn read_all(from: OwnedFd) -> thread::JoinHandle<Vec<u8>> {
        thread::spawn(move || {
            let mut bytes = Vec::new();
            File::from(from).read_to_end(&mut bytes).unwrap();
            bytes
        })
    }

    fn run_with(input: Option<Vec<u8>>, agent: impl FnOnce(Agent) + Send + 'static) -> Run {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let agent = thread::spawn(move || {
            let mut stream = Agent { stream: theirs, decoder: Decoder::new(MAX_TO_AGENT) };
            let exec: Exec = stream.hear().unwrap().message().unwrap();
            assert_eq!(exec.args, ["x"]);
            agent(stream);
        });
        let ((out, stdout), (err, stderr)) = (pipe(), pipe());
        let (out, err) = (read_all(out), read_all(err));
        let stdin = input.map(|bytes| {
            let (reader, writer) = pipe();
            thread::spawn(move || File::from(writer).write_all(&bytes));
            reader
        });
        let exec = Exec { args: vec!["x".into()], stdin: stdin.is_some(), ..Exec::default() };
        let status = run(ours, &exec, Streams { stdin, stdout, stderr }, None);
        agent.join().unwrap();
        Run { status, stdout: out.join().unwrap(), stderr: err.join().unwrap() }
    }

    /// The other end.
    struct Agent {
        stream: UnixStream,
        decoder: Decoder,
    }

    impl Agent {
        fn hear(&mut self) -> Option<Frame> {
            let mut piece = [0; 1000];
            loop {
                if let Some(frame) = self.decoder.frame().unwrap() {
                    return Some(frame);
                }
                match self.stream.read(&mut piece).unwrap() {
                    0 => return None,
                    count => self.decoder.push(&piece[..count]),
                }
            }
        }

        fn say(&mut self, message: &FromAgent) {
            let mut bytes = Vec::new();
            frames::put_message(&mut bytes, message);
            self.stream.write_all(&bytes).unwrap();
        }

        fn send(&mut self, kind: Kind, data: &[u8]) {
            let mut bytes = Vec::new();
            frames::put(&mut bytes, kind, data);
            self.stream.write_all(&bytes).unwrap();
        }
    }

    #[test]
    fn output_is_apart_and_the_last_word_is_the_status() {
        let run = run_with(None, |mut agent| {
            agent.say(&FromAgent::Started);
            for _ in 0..50 {
                agent.send(Kind::Stdout, &[1; MAX_DATA]);
                agent.send(Kind::Stderr, b"\0\xff\n");
            }
            agent.say(&FromAgent::Exited { status: 42 });
        });
        assert_eq!(run.status.unwrap(), 42);
        assert!(run.stdout == vec![1; 50 * MAX_DATA]);
        assert_eq!(run.stderr, b"\0\xff\n".repeat(50));
    }

    #[test]
    fn input_is_sent_as_far_as_there_is_room_and_then_its_end() {
        let input: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        let expected = input.clone();
        let run = run_with(Some(input), move |mut agent| {
            let (mut heard, mut room) = (Vec::new(), STDIN_WINDOW);
            loop {
                let frame = agent.hear().unwrap();
                assert_eq!(frame.kind, Kind::Stdin);
                if frame.bytes.is_empty() {
                    break;
                }
                room = room.checked_sub(frame.bytes.len()).expect("no more than there is room for");
                heard.extend(frame.bytes);
                if room == 0 {
                    room += 100_000;
                    agent.say(&FromAgent::Room { bytes: 100_000 });
                }
            }
            assert!(heard == expected);
            agent.say(&FromAgent::Exited { status: 0 });
        });
        assert_eq!(run.status.unwrap(), 0);
    }

    #[test]
    fn a_reader_that_goes_is_told_to_the_command_once() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let ((out, stdout), (_err, stderr)) = (pipe(), pipe());
        drop(out);
        let agent = thread::spawn(move || {
            let mut agent = Agent { stream: theirs, decoder: Decoder::new(MAX_TO_AGENT) };
            agent.hear().unwrap();
            agent.send(Kind::Stdout, b"one");
            agent.send(Kind::Stdout, b"two");
            let told = agent.hear().unwrap().message();
            assert_eq!(told, Ok(FromHost::Signal { number: libc::SIGPIPE }));
            agent.say(&FromAgent::Exited { status: 141 });
            agent.stream.shutdown(Shutdown::Write).unwrap();
            assert!(agent.hear().is_none());
        });
        let exec = Exec::default();
        let status = run(ours, &exec, Streams { stdin: None, stdout, stderr }, None);
        assert_eq!(status.unwrap(), 141);
        agent.join().unwrap();
    }

    type Say = &'static (dyn Fn(&mut Agent) + Sync);

    #[test]
    fn a_guest_that_talks_nonsense_is_left() {
        let said = |say: Say| {
            let run = run_with(None, move |mut agent| {
                say(&mut agent);
                // It would go on for ever.
                let _ = agent.stream.read_to_end(&mut Vec::new());
            });
            format!("{:#}", run.status.unwrap_err())
        };
        let cases: [(Say, &str); 9] = [
            (&|agent| agent.stream.write_all(&[77; 5]).unwrap(), "unknown kind 77"),
            (
                &|agent| agent.stream.write_all(&[2, 255, 255, 255, 255]).unwrap(),
                "4294967295 bytes",
            ),
            (&|agent| agent.stream.write_all(&[0, 0, 0, 1, 0]).unwrap(), "65536 bytes"),
            (&|agent| agent.send(Kind::Message, b"{\"exited\":{\"status\":-1}}"), "no message"),
            (&|agent| agent.send(Kind::Message, &[b'['; 9000]), "no message"),
            (&|agent| agent.send(Kind::Message, b"\xff"), "no message"),
            (&|agent| agent.send(Kind::Stdin, b"x"), "no output"),
            (&|agent| agent.say(&FromAgent::Room { bytes: 1 }), "more input"),
            (&|agent| agent.stream.shutdown(Shutdown::Write).unwrap(), "ended"),
        ];
        for (say, hint) in cases {
            let error = said(say);
            assert!(error.contains(hint) && !error.contains('\n'), "{hint}: {error}");
        }
    }

    #[test]
    fn a_refusal_has_a_status_that_means_one() {
        for (status, expected) in [(125, 125), (126, 126), (127, 127), (0, 125), (3, 125)] {
            let run = run_with(None, move |mut agent| {
                agent.say(&FromAgent::Refused { status, message: "no".into() });
            });
            assert_eq!(run.status.unwrap(), expected);
        }
    }
}
