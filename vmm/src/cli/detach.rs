//! `oriel run --detach`: the sandbox becomes a process of its own, and this one ends once its command runs.

use std::io::{Read, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};

use super::STATUS_SANDBOX;
use crate::signals::status_of;

/// In the environment of the process that is the sandbox.
const MARK: &str = "ORIEL_DETACHED";

/// Whether this process is the sandbox, and nobody waits for it once it runs.
pub fn is_sandbox() -> bool {
    std::env::var_os(MARK).is_some()
}

/// Starts this program again, to be the sandbox, and waits until its command runs: then the name is printed.
/// Returns the exit status.
///
/// # Errors
///
/// When it cannot be started.
pub fn start() -> Result<u8> {
    let mut words = std::env::args_os();
    let mut command = Command::new("/proc/self/exe");
    command.arg0(words.next().unwrap_or_else(|| "oriel".into())).args(words).env(MARK, "1");
    // What it says of its failure goes where we would say it.
    let mut sandbox = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("--detach: /proc/self/exe")?;
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

/// In the sandbox: leaves the session of whoever has started it.
///
/// # Errors
///
/// The host's.
pub fn leave_session() -> Result<()> {
    rustix::process::setsid().context("--detach").map(drop)
}

/// In the sandbox: says that it runs, and is alone from then on.
pub fn release(name: &str) {
    let released = (|| -> Result<()> {
        let mut stdout = std::io::stdout();
        writeln!(stdout, "{name}").and_then(|()| stdout.flush())?;
        let null = rustix::fs::open("/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
        rustix::stdio::dup2_stdin(&null)?;
        rustix::stdio::dup2_stdout(&null)?;
        rustix::stdio::dup2_stderr(&null)?;
        Ok(())
    })();
    if let Err(error) = released {
        // Whoever waits for us waits on.
        log::error!("--detach: {error:#}");
    }
}
