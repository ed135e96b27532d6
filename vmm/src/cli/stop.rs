//! `oriel stop`.

use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};

use crate::control::Request;
use crate::control::client::Connection;

/// How long a guest may take to end after its command was killed: its shares are unmounted.
const POWER_OFF: Duration = Duration::from_secs(5);
/// A process that was killed ends, unless the host's kernel is stuck.
const KILLED: Duration = Duration::from_secs(10);

/// End a sandbox that runs
///
/// Its command gets SIGTERM, and with its end the sandbox ends. After the time the command gets SIGKILL, and a
/// sandbox that does not end by that is killed. One that boots, or was started with --initrd, ends at once.
#[derive(Debug, Args)]
pub struct StopArgs {
    /// Seconds to wait before the command is killed
    #[arg(short, long, default_value_t = 10, value_name = "SECONDS")]
    time: u32,

    /// The sandbox: what its `oriel run --name` says
    sandbox: String,
}

/// Ends it.
pub fn stop(args: &StopArgs) -> Result<u8> {
    let mut sandbox = Connection::open(&args.sandbox)?;
    let process = sandbox.process()?;
    let process = process.as_fd();
    // Its first answer says that the process is this one, and no later one with its number.
    let asked = [
        (Request::Stop {}, Duration::from_secs(args.time.into())),
        (Request::Signal { number: Signal::KILL.as_raw() }, POWER_OFF),
    ];
    for (request, time) in asked {
        let answer = sandbox.ask(&request);
        let patience = if answer.is_ok() { time } else { Duration::ZERO };
        if has_ended(process, patience)? {
            return Ok(0);
        }
        if let Err(error) = answer {
            log::info!("{error:#}");
        }
    }
    send(process, Signal::KILL)?;
    if !has_ended(process, KILLED)? {
        bail!("sandbox {:?} was killed and does not end: see dmesg(1) of the host", args.sandbox);
    }
    Ok(0)
}

fn send(process: BorrowedFd<'_>, signal: Signal) -> Result<()> {
    match pidfd_send_signal(process, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error).context("the sandbox's process cannot be ended"),
    }
}

/// Whether a process ends within `time`.
///
/// # Errors
///
/// The host's.
pub fn has_ended(process: BorrowedFd<'_>, time: Duration) -> Result<bool> {
    let deadline = Instant::now() + time;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let left = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::from_borrowed_fd(process, PollFlags::IN)], Some(&left)) {
            Ok(count) => return Ok(count > 0),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error).context("the sandbox's process"),
        }
    }
}
