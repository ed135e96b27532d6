//! `oriel stop`.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Signal, pidfd_send_signal};

use crate::control::Request;
use crate::control::client::{Connection, Refused};
use crate::sandbox::Ended;

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
    end(Connection::open(&args.sandbox)?, args)
}

fn end(mut sandbox: Connection, args: &StopArgs) -> Result<u8> {
    let process = sandbox.process()?;
    let process = process.as_fd();
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
        match answer {
            // It listens, and was asked nothing that it could not do: it is not killed for that.
            Err(error) if error.is::<Refused>() && request == (Request::Stop {}) => {
                return Err(error);
            }
            Err(error) => log::info!("{error:#}"),
            Ok(_) => {}
        }
    }
    send(process, Signal::KILL)?;
    if !has_ended(process, KILLED)? {
        bail!("sandbox {:?} was killed and does not end: see dmesg(1) of the host", args.sandbox);
    }
    Ok(0)
}

/// Wait until a sandbox ends, and print its status
///
/// The status is what `oriel run` exits with, or would have without --detach.
#[derive(Debug, Args)]
pub struct WaitArgs {
    /// The sandbox: what its `oriel run --name` says
    sandbox: String,
}

/// Waits for its end.
pub fn wait(args: &WaitArgs) -> Result<u8> {
    let mut sandbox = Connection::open(&args.sandbox)?;
    sandbox.waits(None)?;
    let Ended { status } = sandbox.ask_for(&Request::Wait {})?;
    writeln!(std::io::stdout(), "{status}").context("standard output")?;
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

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::unix::net::{UnixListener, UnixStream};
    use std::process::{Command, Stdio};

    use super::*;

    fn args(time: u32) -> StopArgs {
        StopArgs { time, sandbox: "box".into() }
    }

    /// The process at the other end is this one: a signal would end the test.
    #[test]
    fn a_sandbox_that_refuses_is_not_killed() {
        for early in [false, true] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let refusal = b"{\"error\":\"too many clients; try again later\"}\n";
            let refuse = move || {
                let mut theirs = BufReader::new(theirs);
                if !early {
                    theirs.read_line(&mut String::new()).unwrap();
                }
                theirs.get_mut().write_all(refusal).unwrap();
            };
            let refuses = std::thread::spawn(refuse);
            let error = if early {
                refuses.join().unwrap();
                end(Connection::of(ours), &args(0)).unwrap_err()
            } else {
                let error = end(Connection::of(ours), &args(0)).unwrap_err();
                refuses.join().unwrap();
                error
            };
            assert!(error.to_string().contains("too many clients"), "{error:#}");
        }
    }

    #[test]
    fn a_sandbox_that_has_gone_is_not_looked_for_by_its_number() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let ours = UnixStream::connect(&path).unwrap();
        drop(listener.accept().unwrap());
        let error = end(Connection::of(ours), &args(0)).unwrap_err();
        assert!(error.to_string().contains("ended"), "{error:#}");
    }

    #[test]
    fn a_process_that_was_asked_to_end_is_waited_for() {
        let mut child = Command::new("sleep").arg("1000").stdin(Stdio::null()).spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&child);
        let process =
            rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        assert!(!has_ended(process.as_fd(), Duration::from_millis(20)).unwrap());
        send(process.as_fd(), Signal::KILL).unwrap();
        assert!(has_ended(process.as_fd(), KILLED).unwrap());
        child.wait().unwrap();
        send(process.as_fd(), Signal::KILL).unwrap();
    }
}
