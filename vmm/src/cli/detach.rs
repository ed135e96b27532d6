//! `oriel run --detach`: the sandbox becomes a process of its own, and this one ends once its command runs.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};
use rustix::process::{
    Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal,
    set_parent_process_death_signal,
};

use super::STATUS_SANDBOX;
use crate::signals::{Signals, status_of};

/// In the environment of the process that is the sandbox: the process id of the one that has started it, which no user's
/// own environment has.
const MARK: &str = "ORIEL_DETACHED";

/// Whether this process is the sandbox, and nobody waits for it once it runs.
pub fn is_sandbox() -> bool {
    is_marked_by(std::env::var_os(MARK).as_deref(), getppid())
}

fn is_marked_by(mark: Option<&OsStr>, parent: Option<Pid>) -> bool {
    let mark = mark.and_then(OsStr::to_str).and_then(|mark| mark.parse().ok());
    mark.is_some() && mark == parent.map(Pid::as_raw_pid)
}

/// Starts this program again, to be the sandbox, and waits until its command runs: then the name is printed. The
/// user's signals are for the sandbox up to then, which they end. Returns the exit status.
///
/// # Errors
///
/// When it cannot be started.
pub fn start() -> Result<u8> {
    let mut words = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    command
        .arg0(words.next().unwrap_or_else(|| "oriel".into()))
        .args(words)
        .env(MARK, std::process::id().to_string());
    // What it says of its failure goes where we would say it.
    let mut sandbox = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("--detach: /proc/self/exe")?;
    forward_signals(&sandbox)?;
    let mut said = Vec::new();
    if let Some(stdout) = &mut sandbox.stdout {
        stdout.read_to_end(&mut said).context("--detach")?;
    }
    if !said.is_empty() {
        std::io::stdout().write_all(&said).context("standard output")?;
        return Ok(0);
    }
    let status = sandbox.wait().context("--detach")?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.or(status.signal().map(status_of)).unwrap_or(STATUS_SANDBOX))
}

/// Hands the user's signals to the sandbox, on a thread that ends with this process.
fn forward_signals(sandbox: &Child) -> Result<()> {
    let signals = Signals::new()?;
    let process = pidfd_open(Pid::from_child(sandbox), PidfdFlags::empty()).context("--detach")?;
    let forward = move || {
        while let Ok(numbers) = signals.wait() {
            let ends = numbers.into_iter().filter_map(Signal::from_named_raw);
            for signal in ends.filter(|signal| *signal != Signal::WINCH) {
                // It may have ended by itself.
                let _ = pidfd_send_signal(&process, signal);
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(forward).context("thread")?;
    Ok(())
}

/// In the sandbox: leaves the session of whoever has started it, and ends when that process ends before
/// [`release`].
///
/// # Errors
///
/// The host's.
pub fn leave_session() -> Result<()> {
    rustix::process::setsid().context("--detach")?;
    set_parent_process_death_signal(Some(Signal::TERM)).context("--detach")
}

/// In the sandbox: what it takes to leave whoever has started it.
pub struct Release {
    name: String,
    null: OwnedFd,
}

impl Release {
    /// For the sandbox `name`.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn new(name: &str) -> Result<Self> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        let null = rustix::fs::open("/dev/null", flags, Mode::empty()).context("/dev/null")?;
        Ok(Self { name: name.to_owned(), null })
    }

    /// Says that the sandbox runs, which is alone from then on.
    ///
    /// # Errors
    ///
    /// When nobody waits to hear it: then nobody wants the sandbox.
    pub fn now(self) -> Result<()> {
        let mut stdout = std::io::stdout();
        writeln!(stdout, "{}", self.name)
            .and_then(|()| stdout.flush())
            .context("standard output")?;
        set_parent_process_death_signal(None)?;
        rustix::stdio::dup2_stdin(&self.null)?;
        rustix::stdio::dup2_stdout(&self.null)?;
        rustix::stdio::dup2_stderr(&self.null)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_process_that_was_started_to_be_the_sandbox_is_it() {
        let parent = Pid::from_raw(77);
        assert!(is_marked_by(Some(OsStr::new("77")), parent));
        for mark in ["", "1", "7", "-77", "077x", "yes"] {
            assert!(!is_marked_by(Some(OsStr::new(mark)), parent), "{mark}");
        }
        assert!(!is_marked_by(None, parent));
        assert!(!is_marked_by(None, None));
        assert!(!is_marked_by(Some(OsStr::new("77")), None));
    }
}
