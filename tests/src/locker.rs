//! A process that locks a file.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long is waited for what must not happen.
const MOMENT: Duration = Duration::from_millis(100);
/// How long anything may take that is expected.
const PATIENCE: Duration = Duration::from_secs(20);

/// A process on this machine that uses a file: see `guest-probe lock`. Killed when it is dropped.
///
/// All its methods panic when things are not as expected.
pub struct Locker {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
}

impl Locker {
    /// Starts one; `probe` is the program.
    pub fn start(probe: &str, file: &Path) -> Self {
        let mut child = Command::new(probe)
            .arg("lock")
            .arg(file)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the probe");
        let (sender, lines) = channel();
        let output = BufReader::new(child.stdout.take().expect("a pipe"));
        thread::spawn(move || {
            for line in output.lines().map_while(Result::ok) {
                let _ = sender.send(line);
            }
        });
        let stdin = child.stdin.take().expect("a pipe");
        let process = Self { child, stdin, lines };
        process.says("ready");
        process
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Starts a command.
    pub fn begin(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").expect("its standard input");
    }

    /// What it says next is this.
    pub fn says(&self, expected: &str) {
        let line = self.lines.recv_timeout(PATIENCE).expect("an answer");
        assert_eq!(line, expected);
    }

    /// It says nothing for a moment.
    pub fn says_nothing(&self) {
        let line = self.lines.recv_timeout(MOMENT);
        assert!(line.is_err(), "did not wait: {line:?}");
    }

    /// Has it do a command, to which it says this.
    pub fn act(&mut self, command: &str, expected: &str) {
        self.begin(command);
        let line = self.lines.recv_timeout(PATIENCE).expect("an answer");
        assert_eq!(line, expected, "{command}");
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("kill");
    }

    /// Kills it and says how long that took.
    pub fn kill(&mut self) -> Duration {
        let start = Instant::now();
        // One that has ended already is no error.
        let _ = self.child.kill();
        let _ = self.child.wait();
        start.elapsed()
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        self.kill();
    }
}
