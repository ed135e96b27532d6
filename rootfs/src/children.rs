//! Processes that this one has started, and all that are left to it: it is the first of its guest, so it waits for
//! everybody. Who has started a process is told of its end.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitOptions, WaitStatus};

use crate::{log, sys};

/// Everyone who was started and has not ended.
#[derive(Debug, Default)]
pub(crate) struct Children {
    state: Mutex<State>,
    /// A start is over.
    started: Condvar,
}

/// How soon the end of a process is seen while another one is being started, at the latest.
const LOOK_AGAIN: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct State {
    /// By process id, which is theirs as long as they are here.
    running: HashMap<i32, Arc<Child>>,
    /// How many are being started: there may be a process of each that is not listed yet, and never will be when it
    /// cannot execute its program.
    starting: usize,
    /// Nobody is started any more.
    closed: bool,
}

/// A process that was started, for as long as somebody wants to know of it.
#[derive(Debug)]
pub(crate) struct Child {
    pid: i32,
    /// Readable once it has ended.
    ended: OwnedFd,
    status: OnceLock<u8>,
}

impl Child {
    /// Its status as a shell has it, once it has ended.
    pub(crate) fn status(&self) -> Option<u8> {
        self.status.get().copied()
    }

    /// Waits for its end.
    pub(crate) fn wait(&self) -> io::Result<u8> {
        loop {
            if let Some(status) = self.status() {
                return Ok(status);
            }
            rustix::io::retry_on_intr(|| {
                poll(&mut [PollFd::new(&self.ended, PollFlags::IN)], None)
            })?;
        }
    }

    fn end(&self, status: u8) {
        let _ = self.status.set(status);
        if let Err(error) = rustix::io::write(&self.ended, &1u64.to_ne_bytes()) {
            log(&format!("nobody hears of the end of process {}: {error}", self.pid));
        }
    }
}

/// Readable once it has ended.
impl AsFd for Child {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ended.as_fd()
    }
}

impl Children {
    /// Nobody yet, and a thread that waits for them. There is one of it in a process: it takes the end of every
    /// child.
    pub(crate) fn start() -> io::Result<Arc<Self>> {
        let children = Arc::new(Self::default());
        let body = Arc::clone(&children);
        thread::Builder::new().name("children".into()).spawn(move || body.reap())?;
        Ok(children)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is a single call: there is no half of one to fear.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process, which leads a process group.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Arc<Child>> {
        let ended = eventfd(0, EventfdFlags::CLOEXEC)?;
        let mut state = self.state();
        if state.closed {
            return Err(io::Error::other("the sandbox ends"));
        }
        state.starting += 1;
        drop(state);
        // Without the lock: a program is executed when the file system that it is on has answered, if it ever does.
        let spawned = command.spawn();
        let mut state = self.state();
        state.starting -= 1;
        self.started.notify_all();
        let pid = spawned?.id().cast_signed();
        let child = Arc::new(Child { pid, ended, status: OnceLock::new() });
        state.running.insert(pid, Arc::clone(&child));
        Ok(child)
    }

    /// Sends a signal to the process group of `child`, if it has not ended.
    pub(crate) fn signal(&self, child: &Child, number: i32) {
        // Under the lock: once its end was taken, its number may be another's.
        let state = self.state();
        let there = state.running.get(&child.pid);
        if there.is_some_and(|there| std::ptr::eq(&**there, child))
            && let Err(error) = sys::signal_group(child.pid, number)
        {
            log(&format!("cannot send signal {number}: {error}"));
        }
    }

    /// Takes the end of everybody.
    fn reap(&self) {
        loop {
            // NOWAIT: a process keeps its number until nobody sends it signals any more.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            match rustix::process::waitid(WaitId::All, options) {
                Err(Errno::CHILD) => {
                    let state = self.state();
                    let none = |state: &mut State| state.running.is_empty();
                    drop(self.started.wait_while(state, none));
                    continue;
                }
                Err(Errno::INTR) => continue,
                Err(error) => return log(&format!("cannot wait for processes: {error}")),
                Ok(_) => {}
            }
            let mut state = self.state();
            if state.starting == 0 {
                if let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
                    state.end(pid, status);
                }
            } else if !state.reap_listed() {
                // The end of one that is being started, which the standard library takes, or of somebody's orphan.
                drop(self.started.wait_timeout(state, LOOK_AGAIN));
            }
        }
    }

    /// Starts nobody any more and ends whoever is left, at most for `patience`. Says whether all are gone.
    pub(crate) fn kill_all(&self, patience: Duration) -> bool {
        self.state().closed = true;
        if let Err(error) = sys::kill_all()
            && error.raw_os_error() != Some(libc::ESRCH)
        {
            log(&format!("cannot kill the processes left: {error}"));
        }
        let start = Instant::now();
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        while !matches!(rustix::process::waitid(WaitId::All, options), Err(Errno::CHILD)) {
            if start.elapsed() > patience {
                return false;
            }
            thread::sleep(Duration::from_millis(1));
            // One whose start had begun may be there only now.
            let _ = sys::kill_all();
        }
        true
    }
}

impl State {
    /// The end of this process was taken.
    fn end(&mut self, pid: Pid, status: WaitStatus) {
        if let Some(child) = self.running.remove(&pid.as_raw_nonzero().get()) {
            child.end(shell_status(status));
        }
    }

    /// Takes the end of those that are listed. Says whether there was any.
    fn reap_listed(&mut self) -> bool {
        let listed: Vec<_> = self.running.keys().filter_map(|pid| Pid::from_raw(*pid)).collect();
        let mut found = false;
        for pid in listed {
            if let Ok(Some((pid, status))) =
                rustix::process::waitpid(Some(pid), WaitOptions::NOHANG)
            {
                self.end(pid, status);
                found = true;
            }
        }
        found
    }
}

fn shell_status(status: WaitStatus) -> u8 {
    let signal = status.terminating_signal().map(|number| 128 + number);
    let code = status.exit_status().or(signal).unwrap_or(255);
    u8::try_from(code).unwrap_or(255)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Those of all tests: the thread takes every end.
    pub(crate) fn children() -> Arc<Children> {
        static CHILDREN: OnceLock<Arc<Children>> = OnceLock::new();
        Arc::clone(CHILDREN.get_or_init(|| Children::start().unwrap()))
    }

    fn start(script: &str) -> Arc<Child> {
        use std::os::unix::process::CommandExt;
        let mut command = Command::new("/bin/sh");
        children().spawn(command.args(["-c", script]).process_group(0)).unwrap()
    }

    #[test]
    fn each_hears_of_the_end_of_its_own() {
        let all: Vec<_> =
            (0..20).map(|status| (status, start(&format!("exit {status}")))).collect();
        for (status, child) in all.iter().rev() {
            assert_eq!(child.wait().unwrap(), *status);
            assert_eq!(child.status(), Some(*status));
        }
    }

    #[test]
    fn a_signal_reaches_the_group_and_nobody_after_its_end() {
        let child = start("sleep 1000 & wait");
        children().signal(&child, libc::SIGTERM);
        assert_eq!(child.wait().unwrap(), 128 + 15);
        children().signal(&child, libc::SIGTERM);
    }

    #[test]
    fn a_program_that_cannot_be_executed_is_an_error_and_no_child() {
        for _ in 0..20 {
            let error = children().spawn(&mut Command::new("/nonexistent")).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::NotFound);
        }
    }

    #[test]
    #[expect(
        unsafe_code,
        reason = "a program whose execution hangs has to hang between fork and exec"
    )]
    fn one_whose_execution_hangs_holds_up_no_other() {
        use std::os::unix::process::CommandExt;
        let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
        let all = children();
        let hangs = |program: &str, reader: OwnedFd| {
            let mut command = Command::new(program);
            command.arg("-c").arg("exit 6").process_group(0);
            let hang = move || Ok(rustix::io::read(&reader, &mut [0; 1]).map(drop)?);
            // SAFETY: the closure makes one system call between fork and exec.
            unsafe { command.pre_exec(hang) };
            thread::spawn(move || children().spawn(&mut command))
        };
        let hung = hangs("/bin/sh", reader.try_clone().unwrap());
        let fails = hangs("/nonexistent", reader);
        while all.state().starting < 2 {
            thread::sleep(Duration::from_millis(1));
        }
        for status in 0..5 {
            assert_eq!(start(&format!("exit {status}")).wait().unwrap(), status);
        }
        let signalled = start("sleep 1000 & wait");
        all.signal(&signalled, libc::SIGTERM);
        assert_eq!(signalled.wait().unwrap(), 128 + 15);
        assert!(!hung.is_finished() && !fails.is_finished());
        rustix::io::write(&writer, b"go").unwrap();
        assert_eq!(hung.join().unwrap().unwrap().wait().unwrap(), 6);
        assert_eq!(fails.join().unwrap().unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
