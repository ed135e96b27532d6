//! One run of the program.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::guest;

/// No test takes as long on the slowest machine we know; what does, hangs.
const TIMEOUT: Duration = Duration::from_secs(90);
const POLL: Duration = Duration::from_millis(20);

/// A run of `oriel` that is being described.
pub struct Oriel {
    wrapper: Vec<OsString>,
    args: Vec<OsString>,
    environment: Vec<(OsString, OsString)>,
    input: Vec<u8>,
    timeout: Duration,
    console: Console,
}

#[derive(PartialEq, Eq)]
enum Console {
    File,
    Unset,
}

impl Oriel {
    /// `oriel run ARGS`, in a place where a guest can run.
    ///
    /// # Panics
    ///
    /// Where none can.
    pub fn run(args: &[&str]) -> Self {
        guest::need_kvm();
        guest::warm_cache();
        Self::refused(args)
    }

    /// `oriel run ARGS` that is not expected to get as far as a guest.
    pub fn refused(args: &[&str]) -> Self {
        let mut run = Self::command(&["run"]);
        run.console = Console::File;
        run.args(args)
    }

    /// `oriel ARGS`.
    pub fn command(args: &[&str]) -> Self {
        Self {
            wrapper: Vec::new(),
            args: args.iter().map(OsString::from).collect(),
            environment: guest::environment(),
            input: Vec::new(),
            timeout: TIMEOUT,
            console: Console::Unset,
        }
    }

    /// More arguments.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(OsString::from));
        self
    }

    /// The command that runs in the guest: the end of the command line.
    pub fn guest(self, command: &[&str]) -> Self {
        self.args(&["--"]).args(command)
    }

    /// A script for the guest's shell: the end of the command line.
    pub fn script(self, script: &str) -> Self {
        self.guest(&["sh", "-c", script])
    }

    /// What is on standard input.
    pub fn input(mut self, bytes: &[u8]) -> Self {
        self.input = bytes.to_vec();
        self
    }

    /// A variable of the program's own environment.
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.environment.push((name.into(), value.as_ref().into()));
        self
    }

    /// How long it may take.
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// Leave the console where it goes without `--console`.
    pub fn default_console(mut self) -> Self {
        self.console = Console::Unset;
        self
    }

    /// Run it under another program, which gets the command line as its last arguments.
    pub fn under(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(OsString::from).collect();
        self
    }

    /// The command line and its environment.
    pub(crate) fn as_command(&self) -> Command {
        let mut words = self.wrapper.clone();
        words.push(program().into());
        words.extend(self.args.iter().cloned());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).envs(self.environment.iter().cloned());
        command
    }

    /// Starts it and lets it run.
    pub fn start(self) -> Running {
        let directory = tempfile::tempdir().expect("a temporary directory");
        let console = directory.path().join("console");
        let mut words = self.wrapper;
        words.push(program().into());
        let mut args = self.args.into_iter();
        words.extend(args.next());
        if self.console == Console::File {
            words.extend([OsString::from("--console"), console.clone().into()]);
        }
        words.extend(args);

        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).envs(self.environment);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let started = Instant::now();
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{words:?}: {error}"));
        let stdin = child.stdin.take();
        let stdout = Reader::lines(child.stdout.take().expect("a pipe"));
        let stderr = Reader::lines(child.stderr.take().expect("a pipe"));
        let mut running = Running {
            child,
            stdin,
            stdout,
            stderr,
            console,
            words,
            started,
            deadline: started + self.timeout,
            seen: Vec::new(),
            status: None,
            _directory: directory,
        };
        if !self.input.is_empty() {
            running.feed(self.input);
        }
        running
    }

    /// Runs it to its end; its standard input ends after what [`Oriel::input`] said.
    pub fn finish(self) -> Outcome {
        self.start().finish()
    }
}

/// `$ORIEL`, or the program beside this one's directory: the release build where there is one.
fn program() -> PathBuf {
    if let Some(program) = std::env::var_os("ORIEL") {
        return program.into();
    }
    let tests = std::env::current_exe().expect("where the tests are");
    let profiles = tests.ancestors().nth(3).expect("target directory");
    let places = ["release", "debug"].map(|profile| profiles.join(profile).join("oriel"));
    let found = places.iter().find(|path| path.is_file());
    found
        .unwrap_or_else(|| {
            panic!("no oriel in {places:?}: run `cargo build --release`, or set $ORIEL")
        })
        .clone()
}

/// Takes what a pipe brings, so that it never fills.
struct Reader {
    chunks: Receiver<Vec<u8>>,
    thread: Option<JoinHandle<()>>,
}

impl Reader {
    fn lines(pipe: impl Read + Send + 'static) -> Self {
        let (sender, chunks) = channel();
        let thread = thread::spawn(move || {
            let mut pipe = BufReader::new(pipe);
            loop {
                let mut line = Vec::new();
                match pipe.read_until(b'\n', &mut line) {
                    Ok(0) | Err(_) => break,
                    Ok(_) if sender.send(line).is_err() => break,
                    Ok(_) => {}
                }
            }
        });
        Self { chunks, thread: Some(thread) }
    }

    fn rest(&mut self) -> Vec<u8> {
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        self.chunks.try_iter().flatten().collect()
    }
}

/// A run that goes on.
pub struct Running {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: Reader,
    stderr: Reader,
    console: PathBuf,
    words: Vec<OsString>,
    started: Instant,
    deadline: Instant,
    seen: Vec<u8>,
    status: Option<ExitStatus>,
    _directory: TempDir,
}

impl Running {
    /// Writes to standard input from a thread of its own and ends it.
    fn feed(&mut self, bytes: Vec<u8>) {
        let mut stdin = self.stdin.take().expect("standard input");
        // The reader may be gone before all is written: then the test looks at something else.
        thread::spawn(move || stdin.write_all(&bytes));
    }

    /// Writes a line to standard input, which stays open.
    pub fn say(&mut self, line: &str) {
        let stdin = self.stdin.as_mut().expect("standard input");
        stdin.write_all(format!("{line}\n").as_bytes()).expect("standard input");
    }

    /// The next line of standard output.
    pub fn hear(&mut self) -> String {
        let left = self.deadline.saturating_duration_since(Instant::now());
        match self.stdout.chunks.recv_timeout(left) {
            Ok(line) => {
                self.seen.extend(&line);
                String::from_utf8_lossy(&line).trim_end().into()
            }
            Err(RecvTimeoutError::Timeout) => self.fail("the guest said nothing more in time"),
            Err(RecvTimeoutError::Disconnected) => self.fail("standard output ended"),
        }
    }

    /// Says one line and hears one.
    pub fn ask(&mut self, line: &str) -> String {
        self.say(line);
        self.hear()
    }

    /// Sends a signal to the program.
    pub fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("kill");
    }

    /// The program's process id.
    pub fn process_id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for the end.
    pub fn finish(mut self) -> Outcome {
        self.stdin = None;
        while self.status.is_none() {
            self.status = self.child.try_wait().expect("wait");
            if self.status.is_none() {
                if Instant::now() > self.deadline {
                    self.fail("it did not end in time");
                }
                thread::sleep(POLL);
            }
        }
        self.outcome()
    }

    fn fail(&mut self, why: &str) -> ! {
        let _ = self.child.kill();
        self.status = self.child.wait().ok();
        panic!("{why}\n{}", self.outcome().report())
    }

    fn outcome(&mut self) -> Outcome {
        let mut stdout = std::mem::take(&mut self.seen);
        stdout.extend(self.stdout.rest());
        let status = self.status.unwrap_or_default();
        Outcome {
            // A shell's way to put it.
            status: status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(-1),
            stdout,
            stderr: String::from_utf8_lossy(&self.stderr.rest()).into(),
            console: String::from_utf8_lossy(&fs::read(&self.console).unwrap_or_default()).into(),
            words: std::mem::take(&mut self.words),
            took: self.started.elapsed(),
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What came of a run.
pub struct Outcome {
    /// Exit status as a shell has it.
    pub status: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: String,
    /// The guest's console.
    pub console: String,
    /// How long it took.
    pub took: Duration,
    words: Vec<OsString>,
}

impl Outcome {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into()
    }

    /// Everything there is to know when something is wrong.
    pub fn report(&self) -> String {
        let words: Vec<_> = self.words.iter().map(|word| word.to_string_lossy()).collect();
        let text = self.text();
        let shown: String = text.chars().take(8192).collect();
        format!(
            "command: {words:?}\nstatus:  {} after {:.1?}\n--- standard output ---\n{shown}\n\
             --- standard error ---\n{}\n--- console ---\n{}\n---",
            self.status, self.took, self.stderr, self.console
        )
    }

    /// Fails with the report unless `condition` holds.
    #[track_caller]
    pub fn check(&self, condition: bool, what: &str) {
        assert!(condition, "{what}\n{}", self.report());
    }

    /// The exit status is this.
    #[track_caller]
    pub fn exits_with(&self, status: i32) -> &Self {
        self.check(self.status == status, &format!("the exit status should be {status}"));
        self
    }

    /// Standard error is empty.
    #[track_caller]
    pub fn says_no_error(&self) -> &Self {
        self.check(self.stderr.is_empty(), "standard error should be empty");
        self
    }

    /// Ended with this status after one line on standard error with all these words in it.
    #[track_caller]
    pub fn refuses(&self, status: i32, words: &[&str]) {
        self.exits_with(status);
        let lines: Vec<_> = self.stderr.lines().collect();
        self.check(lines.len() == 1, "one line on standard error says what is wrong");
        self.check(self.stderr.starts_with("oriel: "), "the line says who is speaking");
        for word in words {
            self.check(self.stderr.contains(word), &format!("the line names {word:?}"));
        }
        self.check(self.stdout.is_empty(), "nothing on standard output");
        self.check(self.console.is_empty(), "no guest was started");
    }

    /// The value that the guest printed as `name=value`.
    #[track_caller]
    pub fn value(&self, name: &str) -> String {
        let text = self.text();
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        match lines.find(|(key, _)| *key == name) {
            Some((_, value)) => value.trim().to_string(),
            None => panic!("the guest did not print {name}=…\n{}", self.report()),
        }
    }

    /// The number that the guest printed as `name=number`.
    #[track_caller]
    pub fn number(&self, name: &str) -> u64 {
        let value = self.value(name);
        value.parse().unwrap_or_else(|_| panic!("{name}={value} is no number\n{}", self.report()))
    }

    /// The guest printed exactly these values; each is `(name, value, what that shows)`. All that are wrong
    /// are told at once.
    #[track_caller]
    pub fn guest_says(&self, expected: &[(&str, &str, &str)]) -> &Self {
        let mut wrong = String::new();
        for (name, value, what) in expected {
            let said = self.value(name);
            if said != *value {
                wrong += &format!("{what}: {name} should be {value:?}, not {said:?}\n");
            }
        }
        self.check(wrong.is_empty(), &wrong);
        self
    }
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}
