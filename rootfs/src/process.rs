//! The command: how it is found and started, its standard streams, its end.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use oriel_init::protocol::{FromHost, Process};
use rustix::fs::{Access, AtFlags};
use rustix::pipe::PipeFlags;
use rustix::process::{Gid, Pid, Uid, WaitOptions};
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::link::Port;
use crate::users::Ids;
use crate::{log, sys};

/// Where to look when the environment has no `PATH`: what docker gives a container.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The shell's, and docker's, statuses for a command that did not start.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

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
#[derive(Debug, Default)]
pub(crate) struct Control {
    state: Mutex<State>,
    size_known: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The leader of the command's process group, while it has not been reaped.
    leader: Option<Pid>,
    /// Signals that came before the command.
    early_signals: Vec<i32>,
    /// The host's end of the command's terminal.
    terminal: Option<Arc<File>>,
    size: Option<(u16, u16)>,
}

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single assignment: there is no half of one to fear.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a message of the host's.
    pub(crate) fn take(&self, message: FromHost) {
        let mut state = self.state();
        match message {
            FromHost::Signal { number } => match state.leader {
                // Under the lock: once the leader is reaped its number may be another's.
                Some(leader) => send_signal(leader, number),
                None => state.early_signals.push(number),
            },
            FromHost::Resize { rows, columns } => {
                state.size = Some((rows, columns));
                if let Some(terminal) = &state.terminal {
                    set_size(terminal, rows, columns);
                }
                self.size_known.notify_all();
            }
        }
    }

    fn started(&self, leader: Pid) {
        let mut state = self.state();
        state.leader = Some(leader);
        for number in std::mem::take(&mut state.early_signals) {
            send_signal(leader, number);
        }
    }

    /// Gives the terminal the host's size, now and whenever it changes.
    fn attach(&self, terminal: Arc<File>) {
        let state = self.state();
        let waited =
            self.size_known.wait_timeout_while(state, FIRST_SIZE, |state| state.size.is_none());
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if let Some((rows, columns)) = state.size {
            set_size(&terminal, rows, columns);
        }
        state.terminal = Some(terminal);
    }
}

fn send_signal(leader: Pid, number: i32) {
    if let Err(error) = sys::signal_group(leader.as_raw_nonzero().get(), number) {
        log(&format!("cannot send signal {number}: {error}"));
    }
}

fn set_size(terminal: &File, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    if let Err(error) = rustix::termios::tcsetwinsize(terminal, size) {
        log(&format!("cannot set the terminal's size: {error}"));
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

/// Runs the command to its end, in the working directory of this process, and returns its status. All that it
/// and its children wrote is in the ports then, and none of them is left.
pub(crate) fn run(process: &Process, ids: Ids, control: &Arc<Control>, ports: Ports) -> Result<u8> {
    let Some(name) = process.args.first() else { bail!("there is no command to run") };
    let mut complaints =
        if process.terminal { ports.stdout.try_clone()? } else { ports.stderr.try_clone()? };
    let mut refuse = |status: u8, reason: &str| {
        let end = if process.terminal { "\r\n" } else { "\n" };
        let line = format!("oriel: exec {name:?}: {reason}{end}");
        complaints.write_all(line.as_bytes()).context("cannot write to the host")?;
        Ok(status)
    };
    let program = match find(name, &process.env) {
        Found::Program(program) => program,
        Found::NotExecutable => return refuse(NOT_EXECUTABLE, "permission denied"),
        Found::Nothing if name.contains('/') => {
            return refuse(NOT_FOUND, "no such file or directory");
        }
        Found::Nothing => return refuse(NOT_FOUND, "executable file not found in $PATH"),
    };

    let mut command = Command::new(program);
    command.arg0(name).args(process.args.iter().skip(1)).env_clear();
    // Only here is known whose home it is.
    command.env("HOME", &ids.home);
    for variable in &process.env {
        // A name may begin with '=', but is not empty.
        match variable.char_indices().skip(1).find(|(_, character)| *character == '=') {
            Some((at, _)) => command.env(&variable[..at], &variable[at + 1..]),
            None => bail!("environment variable {variable:?} is not NAME=VALUE"),
        };
    }
    let streams = if process.terminal {
        Streams::terminal(&mut command, &ids, control, ports)
    } else {
        Streams::pipes(&mut command, &ids, ports)
    }
    .context("cannot set up the command's standard streams")?;
    let groups = ids.groups.iter().map(|group| Gid::from_raw(*group)).collect();
    sys::start_as(
        &mut command,
        process.terminal,
        Uid::from_raw(ids.uid),
        Gid::from_raw(ids.gid),
        groups,
    );

    let mut patience = None;
    let child = command.spawn();
    // It holds the command's ends of the pipes, which shall be closed when the command closes them.
    drop(command);
    let status = match child {
        Ok(child) => {
            let leader =
                i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("no process id")?;
            control.started(leader);
            let status = reap_until(control, leader);
            if !kill_rest() {
                log("a process cannot be ended; it may be waiting for a lock");
                patience = Some(LAST_WORDS);
            }
            status?
        }
        Err(cause) => {
            streams.finish(None)?;
            let status =
                if cause.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE };
            // The program is there: what is missing is the interpreter that it names.
            let reason = match cause.kind() {
                io::ErrorKind::NotFound => "its interpreter does not exist".to_owned(),
                io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
                _ if cause.raw_os_error() == Some(libc::ENOEXEC) => "exec format error".to_owned(),
                _ => cause.to_string(),
            };
            return refuse(status, &reason);
        }
    };
    streams.finish(patience)?;
    Ok(status)
}

/// Waits as the first process of the guest does: for everyone, until it was the command.
fn reap_until(control: &Control, leader: Pid) -> Result<u8> {
    loop {
        // WNOWAIT: the command keeps its process id until nobody sends it signals any more.
        let options =
            rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
        rustix::io::retry_on_intr(|| {
            rustix::process::waitid(rustix::process::WaitId::All, options)
        })
        .context("cannot wait for the command")?;
        let mut state = control.state();
        let ended =
            rustix::process::wait(WaitOptions::NOHANG).context("cannot wait for the command")?;
        if let Some((pid, status)) = ended
            && pid == leader
        {
            state.leader = None;
            // Signals to come are for nobody.
            drop(state);
            let signal = status.terminating_signal().map(|number| 128 + number);
            let code = status.exit_status().or(signal).unwrap_or(255);
            return Ok(u8::try_from(code).unwrap_or(255));
        }
    }
}

/// Ends whatever the command has left running: it would hold the pipes open, and the guest ends anyway. Says
/// whether all are gone.
fn kill_rest() -> bool {
    if let Err(error) = sys::kill_all()
        && error.raw_os_error() != Some(libc::ESRCH)
    {
        log(&format!("cannot kill the processes left: {error}"));
    }
    let start = Instant::now();
    loop {
        match rustix::io::retry_on_intr(|| rustix::process::wait(WaitOptions::NOHANG)) {
            Ok(Some(_)) => {}
            Ok(None) if start.elapsed() > LAST_BREATH => return false,
            Ok(None) => thread::sleep(Duration::from_millis(1)),
            // There is none left.
            Err(_) => return true,
        }
    }
}

/// The threads that carry the command's output to the host.
struct Streams(Vec<JoinHandle<io::Result<()>>>);

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
        Ok(Self(vec![stdout, stderr]))
    }

    /// A pseudoterminal between the command and the ports, which are no terminals.
    fn terminal(
        command: &mut Command,
        ids: &Ids,
        control: &Arc<Control>,
        ports: Ports,
    ) -> io::Result<Self> {
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let host = rustix::pty::openpt(flags)?;
        rustix::pty::unlockpt(&host)?;
        let guest = rustix::pty::ioctl_tiocgptpeer(&host, flags)?;
        own(&guest, ids)?;
        let host = Arc::new(File::from(host));
        control.attach(Arc::clone(&host));
        if let Some(port) = ports.stdin {
            feed("keyboard", port, host.try_clone()?)?;
        }
        command.stdin(guest.try_clone()?).stdout(guest.try_clone()?).stderr(guest);
        Ok(Self(vec![carry("screen", host.try_clone()?, ports.stdout)?]))
    }

    /// Waits until all output is in the ports. Somebody may hold the other ends only with a `patience`: that is
    /// how long is waited then.
    fn finish(self, patience: Option<Duration>) -> Result<()> {
        let start = Instant::now();
        for thread in self.0 {
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

/// Lets the command reopen its own streams (`/dev/stdout`), whoever it is.
fn own(stream: impl AsFd, ids: &Ids) -> io::Result<()> {
    Ok(rustix::fs::fchown(stream, Some(Uid::from_raw(ids.uid)), None)?)
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
                // A pseudoterminal that nobody has open on the other side.
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

enum Found {
    Program(PathBuf),
    NotExecutable,
    Nothing,
}

/// Looks a program up as execvp(3) does, in the command's own `PATH`.
fn find(name: &str, env: &[String]) -> Found {
    if name.contains('/') {
        return examine(name.into());
    }
    if name.is_empty() {
        return Found::Nothing;
    }
    let path =
        env.iter().find_map(|variable| variable.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH);
    let mut result = Found::Nothing;
    for directory in path.split(':') {
        // An empty entry is the working directory.
        let directory = if directory.is_empty() { "." } else { directory };
        match examine(Path::new(directory).join(name)) {
            Found::Nothing => {}
            Found::NotExecutable => result = Found::NotExecutable,
            program @ Found::Program(_) => return program,
        }
    }
    result
}

fn examine(path: PathBuf) -> Found {
    match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Found::NotExecutable,
        Err(_) => Found::Nothing,
        Ok(metadata) if metadata.is_dir() => Found::NotExecutable,
        Ok(_) => {
            match rustix::fs::accessat(rustix::fs::CWD, &path, Access::EXEC_OK, AtFlags::empty()) {
                Ok(()) => Found::Program(path),
                Err(_) => Found::NotExecutable,
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn found(result: &Found) -> &str {
        match result {
            Found::Program(path) => path.to_str().unwrap(),
            Found::NotExecutable => "not executable",
            Found::Nothing => "nothing",
        }
    }

    #[test]
    fn a_program_is_looked_up_in_the_commands_path() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
        for (name, mode) in
            [("one/data", 0o644), ("two/data", 0o755), ("two/tool", 0o755), ("one/only", 0o644)]
        {
            fs::create_dir_all(Path::new(&at(name)).parent().unwrap()).unwrap();
            fs::write(at(name), "").unwrap();
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(at("one/tool")).unwrap();
        let env = ["HOME=/".to_owned(), format!("PATH={}:{}:{}", at("none"), at("one"), at("two"))];

        assert_eq!(
            found(&find("data", &env)),
            at("two/data"),
            "what cannot be executed is passed over"
        );
        assert_eq!(found(&find("tool", &env)), at("two/tool"), "a directory is passed over");
        assert_eq!(found(&find("only", &env)), "not executable");
        assert_eq!(found(&find("absent", &env)), "nothing");
        assert_eq!(found(&find("", &env)), "nothing");
        assert_eq!(found(&find(&at("two/tool"), &env)), at("two/tool"), "a slash: not looked up");
        assert_eq!(found(&find(&at("one/data"), &env)), "not executable");
        assert_eq!(found(&find(&at("two/absent"), &env)), "nothing");
        assert!(found(&find("sh", &[])).ends_with("/sh"), "the default path");
    }
}
