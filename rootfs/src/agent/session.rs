//! One further command: the stream to its host, its standard streams, its end. A thread waits for all of them at
//! once, and for none of them alone: a host that does not read holds back the command's output and not the signals
//! for it, and a command that does not read holds back its input alone.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use oriel_init::frames::{self, Decoder, Frame, Kind, MAX_DATA, MAX_TO_AGENT};
use oriel_init::protocol::{Exec, FromAgent, FromHost, LAST_SIGNAL, Process, STDIN_WINDOW};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::PipeFlags;

use crate::children::{Child, Children};
use crate::command::{self, Refusal, own};
use crate::users::Ids;
use crate::{terminal, users};

/// How long the host may take to say what it wants.
const FIRST_WORDS: Duration = Duration::from_secs(10);

/// Room for standard input is told once so much of it is new: half a window, and the host does not run dry.
const ROOM_TOLD: usize = STDIN_WINDOW / 2;

/// What a terminal may hold of the command's output when the command ends, in bytes: Linux keeps 64 KiB and a page.
/// A pipe says how much it holds.
const IN_A_TERMINAL: usize = 128 << 10;

/// A command and its host.
pub(super) struct Session<'a> {
    host: Host,
    children: &'a Children,
    child: Arc<Child>,
    input: Option<Input>,
    /// Bytes of input taken since the host was last told.
    taken: usize,
    outputs: Vec<Output>,
    terminal: Option<Terminal>,
    /// The command has.
    ended: bool,
    /// The last word was said.
    done: bool,
}

/// The command's terminal.
struct Terminal {
    /// Our end of it.
    screen: File,
    /// The command's, until that has ended.
    command: Option<OwnedFd>,
}

/// What the command writes.
struct Output {
    kind: Kind,
    file: File,
    /// Bytes that may be from the command yet, once it has ended. Somebody whom it has left behind may write more,
    /// for nobody.
    left: usize,
}

/// The stream.
struct Host {
    stream: UnixStream,
    decoder: Decoder,
    /// What it did not take yet. More of the command's output is taken only when it is empty.
    unsent: Vec<u8>,
    /// It is there.
    connected: bool,
}

/// The command's standard input.
struct Input {
    file: File,
    /// What it did not take yet: at most a window.
    waiting: Vec<u8>,
    /// Nothing comes behind that.
    ended: bool,
}

impl<'a> Session<'a> {
    /// Hears what the host wants, does it, and returns when all is over. `base` is the first command.
    pub(super) fn serve(
        stream: UnixStream,
        base: &Process,
        children: &'a Children,
    ) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let decoder = Decoder::new(MAX_TO_AGENT);
        let mut host = Host { stream, decoder, unsent: Vec::new(), connected: true };
        let Some(exec) = host.hear_request()? else { return Ok(()) };
        match Self::start(host, exec, base, children) {
            Ok(session) => session.run(),
            Err((mut host, Refusal { status, message })) => {
                host.say(&FromAgent::Refused { status, message });
                host.send()
            }
        }
    }

    fn start(
        mut host: Host,
        exec: Exec,
        base: &Process,
        children: &'a Children,
    ) -> Result<Self, (Host, Refusal)> {
        let size = exec.size;
        let process = merge(base, exec);
        let (child, input, outputs, terminal) = match begin(&process, size, children) {
            Ok(begun) => begun,
            Err(refusal) => return Err((host, refusal)),
        };
        host.say(&FromAgent::Started);
        Ok(Self {
            host,
            children,
            child,
            input,
            taken: 0,
            outputs,
            terminal,
            ended: false,
            done: false,
        })
    }

    fn run(mut self) -> io::Result<()> {
        // What came together with the request.
        self.obey()?;
        while !self.is_over() {
            self.wait()?;
            self.host.send()?;
            if self.host.receive()? {
                self.obey()?;
            }
            self.feed();
            self.take_output()?;
            self.say_end();
            self.host.send()?;
            if !self.host.connected {
                self.be_alone();
            }
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.done && self.host.unsent.is_empty()
    }

    /// The host is gone. The command counts until it has ended, whatever it makes of that.
    fn be_alone(&mut self) {
        self.input = None;
        self.host.unsent.clear();
        // Without its host a terminal is none: the command gets SIGHUP. Without a terminal it is heard to its end.
        if self.terminal.take().is_some() {
            self.outputs.clear();
        }
    }

    /// Waits until there is something to do.
    fn wait(&self) -> io::Result<()> {
        let mut events: Vec<PollFd<'_>> = Vec::with_capacity(5);
        if self.host.connected {
            let room =
                if self.host.unsent.is_empty() { PollFlags::empty() } else { PollFlags::OUT };
            events.push(PollFd::new(&self.host.stream, PollFlags::IN | room));
        }
        if let Some(input) = self.input.as_ref().filter(|input| !input.waiting.is_empty()) {
            events.push(PollFd::new(&input.file, PollFlags::OUT));
        }
        if self.host.unsent.is_empty() {
            let outputs = self.outputs.iter();
            events.extend(outputs.map(|output| PollFd::new(&output.file, PollFlags::IN)));
        }
        if !self.ended {
            events.push(PollFd::new(&*self.child, PollFlags::IN));
        }
        match poll(&mut events, None) {
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Does what the host has said.
    fn obey(&mut self) -> io::Result<()> {
        while let Some(frame) = self.host.next()? {
            match frame.kind {
                Kind::Message => match frame.message().map_err(invalid)? {
                    FromHost::Signal { number } if (1..=LAST_SIGNAL).contains(&number) => {
                        self.children.signal(&self.child, number);
                    }
                    FromHost::Signal { number } => return Err(invalid(format!("signal {number}"))),
                    FromHost::Resize { rows, columns } => {
                        if let Some(terminal) = &self.terminal {
                            terminal::set_size(&terminal.screen, rows, columns);
                        }
                    }
                },
                Kind::Stdin => self.take_input(&frame)?,
                Kind::Stdout | Kind::Stderr | Kind::Console => {
                    return Err(invalid("output from the host"));
                }
            }
        }
        Ok(())
    }

    fn take_input(&mut self, frame: &Frame) -> io::Result<()> {
        // A command that has closed it, or was given none: then it is nobody's.
        let Some(input) = self.input.as_mut().filter(|input| !input.ended) else { return Ok(()) };
        // What was taken and not told is room that the host does not know of.
        if input.waiting.len() + self.taken + frame.bytes.len() > STDIN_WINDOW {
            return Err(invalid("more standard input than there is room for"));
        }
        input.waiting.extend(&frame.bytes);
        input.ended = frame.bytes.is_empty();
        Ok(())
    }

    /// Gives the command what it takes of its input.
    fn feed(&mut self) {
        let Some(input) = &mut self.input else { return };
        let mut fed = 0;
        let mut broken = false;
        while fed < input.waiting.len() {
            match input.file.write(&input.waiting[fed..]) {
                Ok(count) => fed += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                // It takes no more.
                Err(_) => {
                    broken = true;
                    break;
                }
            }
        }
        input.waiting.drain(..fed);
        self.taken += fed;
        // A terminal has no end: it is read from and written to.
        if broken || (input.ended && input.waiting.is_empty() && self.terminal.is_none()) {
            self.input = None;
        } else if self.taken >= ROOM_TOLD && self.host.unsent.is_empty() {
            // At most a window.
            self.host.say(&FromAgent::Room { bytes: self.taken as u32 });
            self.taken = 0;
        }
    }

    /// Takes what the command has written, if the host has taken what was there before.
    fn take_output(&mut self) -> io::Result<()> {
        // All that the command itself has written is there when it has ended.
        if !self.ended && self.child.status().is_some() {
            self.ended = true;
            if let Some(terminal) = &mut self.terminal {
                terminal.command = None;
            }
            for output in &mut self.outputs {
                let held = rustix::io::ioctl_fionread(&output.file).unwrap_or(0);
                output.left = usize::try_from(held).unwrap_or(0);
                if self.terminal.is_some() {
                    output.left = output.left.max(IN_A_TERMINAL);
                }
            }
        }
        let mut buffer = [0; MAX_DATA];
        let mut at = 0;
        while at < self.outputs.len() && self.host.unsent.is_empty() {
            let output = &mut self.outputs[at];
            let most = if self.ended { output.left.min(MAX_DATA) } else { MAX_DATA };
            match output.file.read(&mut buffer[..most]) {
                // The end of a pipe, of what counts, and of a terminal.
                Ok(0) => drop(self.outputs.remove(at)),
                Err(error) if error.raw_os_error() == Some(libc::EIO) => {
                    drop(self.outputs.remove(at));
                }
                Ok(count) => {
                    if self.host.connected {
                        frames::put(&mut self.host.unsent, output.kind, &buffer[..count]);
                        self.host.send()?;
                    }
                    if self.ended {
                        output.left -= count;
                    } else {
                        // The other one's turn.
                        at += 1;
                    }
                }
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock && self.ended => {
                    drop(self.outputs.remove(at));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => at += 1,
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn say_end(&mut self) {
        if let Some(status) = self.child.status()
            && self.ended
            && self.outputs.is_empty()
            && !self.done
        {
            self.host.say(&FromAgent::Exited { status });
            self.done = true;
        }
    }
}

impl Host {
    /// What it wants. `None`: it has gone before it said it.
    fn hear_request(&mut self) -> io::Result<Option<Exec>> {
        let deadline = Instant::now() + FIRST_WORDS;
        loop {
            if let Some(frame) = self.next()? {
                return frame.message().map(Some).map_err(invalid);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(invalid("the host does not say what it wants"));
            }
            let left =
                Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            match poll(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            self.receive()?;
            if !self.connected {
                return Ok(None);
            }
        }
    }

    /// Reads a piece of what it has sent. Says whether there was any.
    fn receive(&mut self) -> io::Result<bool> {
        let mut buffer = [0; MAX_DATA];
        if !self.connected {
            return Ok(false);
        }
        match self.stream.read(&mut buffer) {
            Ok(count) => {
                self.connected = count > 0;
                self.decoder.push(&buffer[..count]);
                Ok(count > 0)
            }
            Err(error) if is_later(&error) => Ok(false),
            // However it has gone.
            Err(_) => {
                self.connected = false;
                Ok(false)
            }
        }
    }

    fn next(&mut self) -> io::Result<Option<Frame>> {
        self.decoder.frame().map_err(invalid)
    }

    /// What is said goes behind what was not sent yet: at most a frame of output and two messages.
    fn say(&mut self, message: &FromAgent) {
        frames::put_message(&mut self.unsent, message);
    }

    /// Sends what the stream takes.
    fn send(&mut self) -> io::Result<()> {
        let mut sent = 0;
        while self.connected && sent < self.unsent.len() {
            match self.stream.write(&self.unsent[sent..]) {
                Ok(count) => sent += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(_) => self.connected = false,
            }
        }
        self.unsent.drain(..sent);
        Ok(())
    }
}

fn is_later(error: &io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}

fn invalid(what: impl ToString) -> io::Error {
    io::Error::new(ErrorKind::InvalidData, what.to_string())
}

/// What the host asks for, in the surroundings of the first command.
fn merge(base: &Process, exec: Exec) -> Process {
    Process {
        args: exec.args,
        // The last value of a name counts.
        env: [base.env.as_slice(), &exec.env].concat(),
        cwd: exec.cwd.unwrap_or_else(|| base.cwd.clone()),
        user: exec.user.or_else(|| base.user.clone()),
        terminal: exec.terminal,
        stdin: exec.stdin,
        confinement: base.confinement.clone(),
    }
}

type Begun = (Arc<Child>, Option<Input>, Vec<Output>, Option<Terminal>);

/// Starts a command and returns its streams, none of which ever blocks.
fn begin(
    process: &Process,
    size: Option<(u16, u16)>,
    children: &Children,
) -> Result<Begun, Refusal> {
    let ids = users::of(process).map_err(|error| Refusal::ours(format!("{error:#}")))?;
    let mut command = command::prepare(process, &ids)?;
    let host = |error: io::Error| Refusal::ours(format!("the command's streams: {error}"));
    let mut terminal = None;
    let mut outputs = Vec::new();
    let mut input = None;
    if process.terminal {
        let (screen, end) = terminal::give(&mut command, &ids).map_err(host)?;
        if let Some((rows, columns)) = size {
            terminal::set_size(&screen, rows, columns);
        }
        unblock(&screen).map_err(host)?;
        if process.stdin {
            input = Some(screen.try_clone().map_err(host)?);
        }
        let file = screen.try_clone().map_err(host)?;
        outputs.push(Output { kind: Kind::Stdout, file, left: 0 });
        terminal = Some(Terminal { screen, command: Some(end) });
    } else {
        let (stdout, writer) = pipe_out(Kind::Stdout, &ids).map_err(host)?;
        command.stdout(writer);
        let (stderr, writer) = pipe_out(Kind::Stderr, &ids).map_err(host)?;
        command.stderr(writer);
        outputs.extend([stdout, stderr]);
        if process.stdin {
            let (reader, writer) = pipe_in(&ids).map_err(host)?;
            command.stdin(reader);
            input = Some(writer);
        } else {
            command.stdin(Stdio::null());
        }
    }
    let child = children.spawn(&mut command);
    let child = child.map_err(|cause| Refusal::of_start(process, &cause))?;
    let input = input.map(|file| Input { file, waiting: Vec::new(), ended: false });
    Ok((child, input, outputs, terminal))
}

fn pipe_out(kind: Kind, ids: &Ids) -> io::Result<(Output, Stdio)> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    own(&writer, ids)?;
    unblock(&reader)?;
    Ok((Output { kind, file: File::from(reader), left: 0 }, Stdio::from(writer)))
}

fn pipe_in(ids: &Ids) -> io::Result<(Stdio, File)> {
    let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
    own(&reader, ids)?;
    unblock(&writer)?;
    Ok((Stdio::from(reader), File::from(writer)))
}

fn unblock(fd: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::fcntl_setfl(&fd, rustix::fs::fcntl_getfl(&fd)? | rustix::fs::OFlags::NONBLOCK)?)
}
