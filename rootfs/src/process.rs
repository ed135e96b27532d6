//! The first command: its standard streams, its signals, its end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use oriel_init::protocol::{FromHost, Process};
use rustix::pipe::PipeFlags;

use crate::children::{Child, Children};
use crate::command::{self, Refusal, own};
use crate::link::Port;
use crate::users::Ids;
use crate::{log, terminal};

/// How long a command with a terminal waits for the terminal's size: a program that asks for it at its start
/// should see the true one, and a host without one sends none.
const FIRST_SIZE: Duration = Duration::from_millis(300);

/// How long is waited for processes that were killed. There is one kind that does not end: whoever waits for a
/// lock of the host's, because the kernel's driver does not tell the host of signals.
const LAST_BREATH: Duration = Duration::from_secs(2);

/// How long is waited for the rest of the output when such a process has it open, in which case there is no
/// end to read.
const LAST_WORDS: Duration = Duration::from_millis(500);

const COPY_BUFFER: usize = 64 * 1024;

/// What the host has said, and whom it concerns.
#[derive(Debug)]
pub(crate) struct Control {
    children: Arc<Children>,
    state: Mutex<State>,
    size_known: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The command, once it was started.
    child: Option<Arc<Child>>,
    /// Signals that came before the command.
    early_signals: Vec<i32>,
    /// The host's end of the command's terminal.
    terminal: Option<Arc<File>>,
    size: Option<(u16, u16)>,
}

impl Control {
    /// Nothing was said yet. `children`: where the command will be started.
    pub(crate) fn new(children: Arc<Children>) -> Self {
        Self { children, state: Mutex::default(), size_known: Condvar::new() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single assignment: there is no half of one to fear.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message of the host's.
    pub(crate) fn take(&self, message: FromHost) {
        let mut state = self.state();
        match message {
            FromHost::Signal { number } => match &state.child {
                Some(child) => self.children.signal(child, number),
                None => state.early_signals.push(number),
            },
            FromHost::Resize { rows, columns } => {
                state.size = Some((rows, columns));
                if let Some(terminal) = &state.terminal {
                    terminal::set_size(terminal, rows, columns);
                }
                self.size_known.notify_all();
            }
        }
    }

    fn started(&self, child: &Arc<Child>) {
        let mut state = self.state();
        state.child = Some(Arc::clone(child));
        for number in std::mem::take(&mut state.early_signals) {
            self.children.signal(child, number);
        }
    }

    /// Gives the terminal the host's size, now and whenever it changes.
    fn attach(&self, screen: Arc<File>) {
        let state = self.state();
        let waited =
            self.size_known.wait_timeout_while(state, FIRST_SIZE, |state| state.size.is_none());
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if let Some((rows, columns)) = state.size {
            terminal::set_size(&screen, rows, columns);
        }
        state.terminal = Some(screen);
    }
}

/// The ports of the command's streams.
pub(crate) struct Ports {
    /// Only when standard input is forwarded.
    pub(crate) stdin: Option<Port>,
    /// The screen, with a terminal.
    pub(crate) stdout: Port,
    pub(crate) stderr: Port,
}

/// Runs the command to its end and returns its status, or why it was not started. `started` is called once it runs.
/// All that it and its children wrote is in the ports in the end, and none of them is left, nor of further commands.
pub(crate) fn run(
    process: &Process,
    ids: &Ids,
    control: &Arc<Control>,
    ports: Ports,
    started: impl FnOnce() -> Result<()>,
) -> Result<Result<u8, Refusal>> {
    let mut command = match command::prepare(process, ids) {
        Ok(command) => command,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let streams = if process.terminal {
        Streams::terminal(&mut command, ids, control, ports)
    } else {
        Streams::pipes(&mut command, ids, ports)
    }
    .context("cannot set up the command's standard streams")?;

    let child = control.children.spawn(&mut command);
    // It holds the command's ends of the pipes, which shall be closed when the command closes them.
    drop(command);
    let status = match child {
        Ok(child) => {
            started()?;
            control.started(&child);
            child.wait().context("cannot wait for the command")
        }
        Err(cause) => {
            streams.finish(None)?;
            return Ok(Err(Refusal::of_start(process, &cause)));
        }
    };
    // They would hold the pipes open, and the guest ends anyway.
    let mut patience = None;
    if !control.children.kill_all(LAST_BREATH) {
        log("a process cannot be ended; it may be waiting for a lock");
        patience = Some(LAST_WORDS);
    }
    let status = status?;
    streams.finish(patience)?;
    Ok(Ok(status))
}

/// The command's output on its way to the host.
struct Streams {
    /// The threads that carry it.
    threads: Vec<JoinHandle<io::Result<()>>>,
    /// The command's end of its terminal, as long as there may be more output.
    terminal: Option<OwnedFd>,
}

impl Streams {
    fn pipes(command: &mut Command, ids: &Ids, ports: Ports) -> io::Result<Self> {
        match ports.stdin {
            Some(port) => {
                let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
                own(&reader, ids)?;
                feed("stdin", port, File::from(writer))?;
                command.stdin(Stdio::from(reader));
            }
            None => {
                command.stdin(Stdio::null());
            }
        }
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        own(&writer, ids)?;
        command.stdout(Stdio::from(writer));
        let stdout = carry("stdout", File::from(reader), ports.stdout)?;
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)?;
        own(&writer, ids)?;
        command.stderr(Stdio::from(writer));
        let stderr = carry("stderr", File::from(reader), ports.stderr)?;
        Ok(Self { threads: vec![stdout, stderr], terminal: None })
    }

    /// A pseudoterminal between the command and the ports, which are no terminals.
    fn terminal(
        command: &mut Command,
        ids: &Ids,
        control: &Arc<Control>,
        ports: Ports,
    ) -> io::Result<Self> {
        let (host, guest) = terminal::give(command, ids)?;
        let host = Arc::new(host);
        control.attach(Arc::clone(&host));
        if let Some(port) = ports.stdin {
            feed("keyboard", port, host.try_clone()?)?;
        }
        let screen = carry("screen", host.try_clone()?, ports.stdout)?;
        Ok(Self { threads: vec![screen], terminal: Some(guest) })
    }

    /// Waits until all output is in the ports. Somebody may hold the other ends only with a `patience`: that is
    /// how long is waited then.
    fn finish(self, patience: Option<Duration>) -> Result<()> {
        drop(self.terminal);
        let start = Instant::now();
        for thread in self.threads {
            if let Some(patience) = patience {
                while !thread.is_finished() && start.elapsed() < patience {
                    thread::sleep(Duration::from_millis(1));
                }
                if !thread.is_finished() {
                    continue;
                }
            }
            match thread.join() {
                Ok(result) => result.context("cannot send the command's output")?,
                Err(_) => bail!("a thread for the command's output has panicked"),
            }
        }
        Ok(())
    }
}

/// Copies to the port what comes, until the end.
fn carry(name: &str, mut from: File, mut to: Port) -> io::Result<JoinHandle<io::Result<()>>> {
    thread::Builder::new().name(name.into()).spawn(move || {
        let mut buffer = vec![0; COPY_BUFFER];
        loop {
            let length = match from.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // A pseudoterminal that nobody has open on the other side, nor will.
                Err(error) if error.raw_os_error() == Some(libc::EIO) => return Ok(()),
                Err(error) => return Err(error),
            };
            to.write_all(&buffer[..length])?;
        }
    })
}

/// Copies to the command what the host sends, until the host has ended it or the command takes no more.
/// Nobody waits for this: the host may never end it.
fn feed(name: &'static str, mut from: Port, mut to: File) -> io::Result<()> {
    let copy = move || match io::copy(&mut from, &mut to) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => log(&format!("{name}: {error}")),
        _ => {}
    };
    thread::Builder::new().name(name.into()).spawn(copy)?;
    Ok(())
}
