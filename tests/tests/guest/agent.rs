//! Further commands in a sandbox that runs, and what else is done with one by its name.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use integration::{Oriel, Outcome, Running, Tree, noise, sha256};
use rustix::process::Signal;

/// Each of many commands takes its time where KVM is emulated.
const SLOW: Duration = Duration::from_secs(240);

/// A sandbox with a name, whose sockets are where this test says if it is not root's.
pub(super) struct Sandbox {
    name: String,
    runtime: tempfile::TempDir,
    pub(super) oriel: Running,
}

impl Sandbox {
    /// A sandbox that runs a command, or with none what the arguments say.
    pub(super) fn start(of: &str, arguments: &[&str], command: &[&str]) -> Self {
        let name = format!("test-{of}-{}", std::process::id());
        let runtime = tempfile::tempdir().unwrap();
        let run = Oriel::run(&["--name", &name]).env("XDG_RUNTIME_DIR", runtime.path());
        let run = run.args(arguments).timeout(SLOW);
        let run = if command.is_empty() { run } else { run.guest(command) };
        let sandbox = Self { oriel: run.start(), name, runtime };
        let socket = sandbox.socket("sock");
        let deadline = Instant::now() + SLOW;
        while !socket.exists() {
            assert!(Instant::now() < deadline, "its socket is there before the guest is");
            thread::sleep(Duration::from_millis(10));
        }
        sandbox
    }

    /// `oriel COMMAND OPTIONS NAME WORDS`.
    pub(super) fn describe(&self, command: &str, options: &[&str], words: &[&str]) -> Oriel {
        let oriel = Oriel::command(&[command]).env("XDG_RUNTIME_DIR", self.runtime.path());
        oriel.args(options).args(&[&self.name]).args(words).timeout(SLOW)
    }

    pub(super) fn exec(&self, options: &[&str], words: &[&str]) -> Outcome {
        self.describe("exec", options, words).finish()
    }

    pub(super) fn script(&self, options: &[&str], script: &str) -> Outcome {
        self.exec(options, &["sh", "-c", script])
    }

    /// One of its sockets, by the end of its name.
    pub(super) fn socket(&self, kind: &str) -> PathBuf {
        self.directory().join(format!("{}.{kind}", self.name))
    }

    fn directory(&self) -> PathBuf {
        match rustix::process::geteuid().is_root() {
            true => "/run/oriel".into(),
            false => self.runtime.path().join("oriel"),
        }
    }

    /// What of this sandbox is in the sockets' directory.
    fn files(&self) -> Vec<String> {
        let entries = fs::read_dir(self.directory()).unwrap().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|name| name.starts_with(&self.name)).collect()
    }

    fn ps(&self) -> Option<String> {
        let outcome = Oriel::command(&["ps"]).env("XDG_RUNTIME_DIR", self.runtime.path()).finish();
        outcome.exits_with(0).says_no_error();
        outcome.check(outcome.text().starts_with("NAME"), "it has a head");
        outcome.text().lines().find(|line| line.starts_with(&self.name)).map(String::from)
    }
}

#[test]
fn further_commands_run_beside_the_first_with_streams_status_and_terminal_of_their_own() {
    let tree = Tree::new();
    let script = "trap 'echo stopped; exit 7' TERM; echo first; while :; do sleep 0.1; done";
    let arguments = ["-v", &tree.at("/s", ""), "-e", "FIRST=first", "-w", "/s"];
    let mut sandbox = Sandbox::start("exec", &arguments, &["sh", "-c", script]);

    // One that boots is waited for.
    let outcome =
        sandbox.script(&["-e", "OWN=a=b"], "echo $FIRST $OWN $PWD; echo error >&2; exit 42");
    outcome.exits_with(42);
    assert_eq!((outcome.text().as_str(), outcome.stderr.as_str()), ("first a=b /s\n", "error\n"));
    assert_eq!(sandbox.oriel.hear(), "first");
    let row = sandbox.ps().expect("ps lists it");
    let pid = sandbox.oriel.process_id().to_string();
    for word in [&pid, "running", "sh -c trap"] {
        assert!(row.contains(word), "{row}");
    }

    // Bytes are bytes, in all three streams.
    let bytes = noise(3 << 20, 3);
    tree.write("bytes", &bytes);
    tree.write("error", b"");
    let piped = sandbox.describe("exec", &["-i"], &["sh", "-c", "tee /dev/stderr | tee /s/copy"]);
    let apart = format!("exec \"$@\" 2>{}", tree.path("error").display());
    let piped = piped.under(&["sh", "-c", &apart, "sh"]).input(&bytes).finish();
    piped.exits_with(0);
    piped.check(piped.stdout == bytes, "standard output is what went in");
    for name in ["copy", "error"] {
        assert_eq!(sha256(&tree.path(name)), sha256(&tree.path("bytes")), "{name}");
    }

    // Statuses, as docker's.
    sandbox.script(&[], "kill -9 $$").exits_with(137).says_no_error();
    let outcome = sandbox.exec(&[], &["no-such-command"]);
    outcome.exits_with(127);
    outcome.check(outcome.stderr.contains("\"no-such-command\""), "it is named");
    sandbox.exec(&[], &["/etc"]).exits_with(126);
    let outcome = sandbox.exec(&["-u", "nobody-here"], &["true"]);
    outcome.refuses(125, &["nobody-here"]);
    sandbox.exec(&["-w", "/no/where"], &["true"]).refuses(126, &["/no/where"]);
    let outcome = sandbox.script(&["-u", "1000:1001", "-w", "/"], "id -u; id -g; pwd");
    assert_eq!(outcome.text(), "1000\n1001\n/\n");

    // Signals, also for one whose input nobody reads; and a reader that goes.
    let trap = "trap 'echo got it; exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let waits = sandbox.describe("exec", &["-i"], &["sh", "-c", trap]);
    let mut waits = waits.input(&noise(2 << 20, 4)).start();
    assert_eq!(waits.hear(), "ready");
    waits.signal(Signal::INT);
    assert_eq!(waits.hear(), "got it");
    waits.finish().exits_with(9);
    let oriel =
        sandbox.describe("exec", &[], &["yes"]).under(&["sh", "-c", "\"$@\" | head -n 1", "sh"]);
    assert_eq!(oriel.finish().text(), "y\n");

    // A terminal: its size and its changes, job control, and that it is the user's while it lasts.
    let mut screen = sandbox.describe("exec", &["-it"], &["sh"]).on_terminal(33, 101);
    screen.hear("# ");
    screen.say("echo size $(stty size); tty; echo my$((6*7))\n");
    for text in ["size 33 101", "/dev/pts/", "my42"] {
        screen.hear(text);
    }
    screen.resize(50, 77);
    // The size goes beside the keys.
    thread::sleep(Duration::from_secs(1));
    screen.say("echo size $(stty size)\n");
    screen.hear("size 50 77");
    // Ctrl-C ends what is in the foreground, and neither the shell nor what is in the background.
    screen.say("sleep 300 & sleep 0.1; echo in the $((1))st; sleep 200\n");
    screen.hear("in the 1st");
    thread::sleep(Duration::from_millis(500));
    screen.say("\x03");
    thread::sleep(Duration::from_millis(500));
    screen.say("echo there is $(ps | grep -c '[s]leep 300') and $(ps | grep -c '[s]leep 200')\n");
    screen.hear("there is 1 and 0");
    // Ctrl-Z stops it, and leaves the shell.
    screen.say("sleep 400\n");
    thread::sleep(Duration::from_millis(500));
    screen.say("\x1a");
    screen.hear("Stopped");
    screen.say("kill %1 %2; exit 5\n");
    // The shell warns once of jobs that are stopped.
    thread::sleep(Duration::from_millis(500));
    screen.say("exit 5\n");
    assert_eq!(screen.finish(), 5);

    // Many at once.
    let start = Instant::now();
    let many: Vec<_> = (0..20)
        .map(|number| {
            let script = format!("cat; echo {number} >&2; exit {number}");
            let run = sandbox.describe("exec", &["-i"], &["sh", "-c", &script]);
            run.input(format!("in {number}").as_bytes()).start()
        })
        .collect();
    for (number, run) in many.into_iter().enumerate() {
        let outcome = run.finish();
        outcome.exits_with(number as i32);
        assert_eq!(outcome.text(), format!("in {number}"));
        assert_eq!(outcome.stderr, format!("{number}\n"));
    }
    println!("20 commands at once: {:.1?}", start.elapsed());

    // A client that goes leaves its command, and one that talks nonsense leaves the agent, as they are.
    let gone = sandbox.describe(
        "exec",
        &[],
        &["sh", "-c", "echo ready; sleep 1; head -c 300000 /dev/zero; touch /s/went-on"],
    );
    let mut gone = gone.start();
    assert_eq!(gone.hear(), "ready");
    gone.signal(Signal::KILL);
    gone.finish();
    let mut hostile = UnixStream::connect(sandbox.socket("vsock")).unwrap();
    hostile.write_all(b"CONNECT 512\n").unwrap();
    hostile.write_all(&[0xff; 5000]).unwrap();
    let _ = hostile.read_to_end(&mut Vec::new());
    let outcome = sandbox
        .script(&[], "while ! [ -e /s/went-on ]; do sleep 0.1; done; ps | grep -c '[h]ead -c'");
    assert_eq!(outcome.text(), "0\n", "it has gone on to its end, and is reaped");

    // One that is not waited for.
    let outcome = sandbox.script(&["-d"], "sleep 1; echo said; touch /s/alone");
    outcome.exits_with(0).says_no_error();
    outcome.check(outcome.stdout.is_empty() && !tree.path("alone").exists(), "it goes on alone");
    sandbox.script(&[], "while ! [ -e /s/alone ]; do sleep 0.1; done").exits_with(0);
    sandbox.exec(&["-d"], &["no-such-command"]).refuses(127, &["no-such-command"]);

    // Its end.
    let mut follows = sandbox.describe("logs", &["-f"], &[]).start();
    assert_eq!(follows.hear(), "first");
    let lasting = sandbox.describe("exec", &[], &["sleep", "1000"]).start();
    let listed = |sandbox: &Sandbox| sandbox.script(&[], "ps | grep -c '[s]leep 1000'").text();
    while listed(&sandbox) != "1\n" {
        thread::sleep(Duration::from_millis(50));
    }
    let waits = sandbox.describe("wait", &[], &[]).start();
    let stop = sandbox.describe("stop", &["-t", "60"], &[]).finish();
    stop.exits_with(0).says_no_error();
    let waited = waits.finish();
    waited.exits_with(0).says_no_error();
    assert_eq!(waited.text(), "7\n");
    assert_eq!(lasting.finish().status, 137, "what still runs is killed, and that is heard");
    assert_eq!(follows.hear(), "stopped");
    let followed = follows.finish();
    followed.exits_with(0);
    // The guest's shell says so of its sleep.
    assert_eq!(followed.stderr, "Terminated\n", "standard error is apart");
    assert_eq!(sandbox.ps(), None);
    assert_eq!(sandbox.files(), [""; 0], "nothing is left");
    sandbox.exec(&[], &["true"]).refuses(125, &["no sandbox", &sandbox.name]);
    let Sandbox { oriel, .. } = sandbox;
    oriel.finish().exits_with(7);
}

#[test]
fn a_detached_sandbox_has_logs_and_one_that_does_not_listen_is_killed() {
    let name = format!("test-detached-{}", std::process::id());
    let runtime = tempfile::tempdir().unwrap();
    let describe =
        |args: &[&str]| Oriel::command(args).env("XDG_RUNTIME_DIR", runtime.path()).timeout(SLOW);
    let oriel = |args: &[&str]| describe(args).finish();
    let script =
        "trap 'echo no' TERM; echo out; echo error >&2; head -c 3000000 /dev/zero; echo end
        while :; do sleep 0.1; done";
    let started = Oriel::run(&["-d", "--name", &name]).default_console();
    let started = started.env("XDG_RUNTIME_DIR", runtime.path()).script(script).finish();
    started.exits_with(0).says_no_error();
    assert_eq!(started.text(), format!("{name}\n"));
    oriel(&["rm", &name]).refuses(125, &["runs", "oriel stop"]);
    let deadline = Instant::now() + SLOW;
    while !oriel(&["logs", &name]).stdout.ends_with(b"end\n") {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(100));
    }
    let waits = describe(&["wait", &name]).start();
    thread::sleep(Duration::from_millis(500));
    let start = Instant::now();
    oriel(&["stop", "-t", "1", &name]).exits_with(0).says_no_error();
    assert!(start.elapsed() > Duration::from_secs(1), "it was asked first");
    let waited = waits.finish();
    waited.exits_with(0).says_no_error();
    assert_eq!(waited.text(), "137\n");
    let logs = oriel(&["logs", &name]);
    logs.exits_with(0);
    assert!((900_000..2_200_000).contains(&logs.stdout.len()), "{}", logs.stdout.len());
    logs.check(logs.stdout.ends_with(b"end\nno\n"), "the end is kept");
    oriel(&["exec", &name, "true"]).refuses(125, &["no sandbox"]);
    oriel(&["rm", &name]).exits_with(0).says_no_error();
    oriel(&["logs", &name]).refuses(125, &["no logs", &name]);
    oriel(&["rm", &name]).refuses(125, &["nothing left", &name]);
}

#[test]
fn a_detached_sandbox_whose_command_never_starts_is_told_and_leaves_nothing() {
    let name = format!("test-never-{}", std::process::id());
    let runtime = tempfile::tempdir().unwrap();
    let directory = match rustix::process::geteuid().is_root() {
        true => PathBuf::from("/run/oriel"),
        false => runtime.path().join("oriel"),
    };
    let files = || -> Vec<String> {
        let entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        let names = entries.map(|entry| entry.file_name().into_string().unwrap());
        names.filter(|file| file.starts_with(&name)).collect()
    };
    let detached = || {
        let run = Oriel::run(&["-d", "--name", &name]).default_console().timeout(SLOW);
        run.env("XDG_RUNTIME_DIR", runtime.path())
    };
    let outcome = detached().guest(&["no-such-command"]).finish();
    outcome.refuses(127, &["\"no-such-command\"", "not found"]);
    assert_eq!(files(), [""; 0]);
    let outcome = detached().args(&["-u", "nobody-here"]).guest(&["true"]).finish();
    outcome.refuses(125, &["nobody-here"]);
    assert_eq!(files(), [""; 0]);

    // Whoever interrupts it, or the one who waits for it, ends it.
    let there = || {
        let deadline = Instant::now() + SLOW;
        while !files().iter().any(|file| file.ends_with(".log")) {
            assert!(Instant::now() < deadline, "its files are there before the guest is");
            thread::sleep(Duration::from_millis(5));
        }
    };
    let start = detached().guest(&["sleep", "1000"]).start();
    there();
    start.signal(Signal::TERM);
    let outcome = start.finish();
    outcome.exits_with(143);
    outcome.check(outcome.stdout.is_empty(), "its name is not told");
    assert_eq!(files(), [""; 0]);
    let start = detached().guest(&["sleep", "1000"]).start();
    there();
    // The sandbox has its signals in hand a moment after its files are there.
    thread::sleep(Duration::from_millis(500));
    start.signal(Signal::KILL);
    start.finish();
    let deadline = Instant::now() + SLOW;
    while !files().is_empty() {
        assert!(Instant::now() < deadline, "it ends by itself");
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn statistics_that_a_detached_sandbox_cannot_write_are_told_in_its_logs() {
    let name = format!("test-full-{}", std::process::id());
    let runtime = tempfile::tempdir().unwrap();
    let oriel = |args: &[&str]| {
        Oriel::command(args).env("XDG_RUNTIME_DIR", runtime.path()).timeout(SLOW).finish()
    };
    let run = Oriel::run(&["-d", "--name", &name, "--stats", "/dev/full"]).default_console();
    let run = run.env("XDG_RUNTIME_DIR", runtime.path()).script("sleep 1; echo said").finish();
    run.exits_with(0).says_no_error();
    let waited = oriel(&["wait", &name]);
    waited.refuses(125, &["--stats /dev/full"]);
    let logs = oriel(&["logs", "-f", &name]);
    assert_eq!(logs.text(), "said\n");
    logs.check(logs.stderr.contains("oriel: --stats /dev/full"), "the logs say why");
    oriel(&["rm", &name]).exits_with(0);
}

#[test]
fn keys_that_are_typed_before_the_command_runs_end_nothing() {
    let mut screen = Oriel::run(&["-it"]).guest(&["sh"]).on_terminal(24, 80);
    // Ctrl-D, while the terminal still cooks.
    screen.say("\x04");
    screen.hear("# ");
    screen.say("echo my$((6*7)); exit 3\n");
    screen.hear("my42");
    assert_eq!(screen.finish(), 3);
    let sandbox = Sandbox::start("keys", &[], &["sleep", "1000"]);
    let mut screen = sandbox.describe("exec", &["-it"], &["sh"]).on_terminal(24, 80);
    screen.say("\x04");
    screen.hear("# ");
    screen.say("echo my$((6*7)); exit 4\n");
    screen.hear("my42");
    assert_eq!(screen.finish(), 4);
    sandbox.describe("stop", &["-t", "0"], &[]).finish().exits_with(0);
}

#[test]
fn a_sandbox_with_another_init_says_that_it_takes_no_commands() {
    let sandbox = Sandbox::start("foreign", &["--initrd", "none", "--cmdline", "panic=0"], &[]);
    let deadline = Instant::now() + SLOW;
    while sandbox.ps().is_none() {
        assert!(Instant::now() < deadline);
        thread::sleep(Duration::from_millis(50));
    }
    sandbox.exec(&[], &["true"]).refuses(125, &["--initrd", "oriel-init agent"]);
    sandbox.describe("stop", &[], &[]).finish().exits_with(0).says_no_error();
    assert_eq!(sandbox.oriel.finish().status, 143);
}

#[test]
fn what_names_no_sandbox_is_refused() {
    for command in [&["exec"][..], &["stop"], &["wait"], &["logs"], &["rm"]] {
        let words: &[&str] = if command == ["exec"] { &["true"] } else { &[] };
        let run = |name: &str| Oriel::command(command).args(&[name]).args(words).finish();
        run("no-such-sandbox").refuses(125, &["no-such-sandbox"]);
        run("../etc").refuses(125, &["../etc", "is no name"]);
    }
    Oriel::command(&["exec", "box"]).finish().exits_with(2);
    Oriel::command(&["exec", "-dt", "box", "ls"]).finish().exits_with(2);
    Oriel::command(&["exec", "-w", "here", "box", "ls"]).finish().refuses(2, &["--workdir"]);
    Oriel::command(&["stop", "-t", "-1", "box"]).finish().exits_with(2);
    Oriel::refused(&["-d"]).guest(&["true"]).finish().exits_with(2);
    let outcome = Oriel::refused(&["-d", "-i", "--name", "x"]).guest(&["true"]).finish();
    outcome.refuses(2, &["--detach", "--interactive"]);
}

/// Median, least and most of `count` times.
fn times(what: &str, count: usize, mut run: impl FnMut()) {
    let mut times: Vec<Duration> = (0..count)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    times.sort();
    let (median, least, most) = (times[count / 2], times[0], times[count - 1]);
    println!("{what}: median of {count} {median:.1?}, {least:.1?} to {most:.1?}");
}

#[test]
#[ignore = "figures"]
fn how_long_further_commands_take() {
    let start = Instant::now();
    let mut sandbox = Sandbox::start("figures", &[], &["sh", "-c", "echo up; sleep 1000"]);
    // The agent listens before the command starts.
    assert_eq!(sandbox.oriel.hear(), "up");
    println!("boot to agent ready and the first line of the command: {:.2?}", start.elapsed());
    let start = Instant::now();
    Oriel::run(&[]).guest(&["true"]).finish().exits_with(0);
    println!("beside it, a whole run of a sandbox without a name: {:.2?}", start.elapsed());
    times("oriel exec NAME true", 31, || {
        sandbox.exec(&[], &["true"]).exits_with(0);
    });
    times("of it, oriel itself (oriel --version)", 31, || {
        Oriel::command(&["--version"]).finish().exits_with(0);
    });
    let bytes = noise(8 << 20, 9);
    times("8 MiB through cat, there and back", 3, || {
        let outcome = sandbox.describe("exec", &["-i"], &["cat"]).input(&bytes).finish();
        assert!(outcome.stdout == bytes);
    });
    sandbox.describe("stop", &["-t", "0"], &[]).finish().exits_with(0);
}
