//! Programs of the host that ask a sandbox for what is wrong, or for nothing.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use integration::Tree;
use oriel_init::frames;
use oriel_init::protocol::Exec;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::agent::Sandbox;

/// Longer than anything takes where KVM is emulated.
const PATIENCE: Duration = Duration::from_secs(60);

/// As many as are opened at once and say nothing.
const HALF_OPEN: usize = 1000;

/// How many file descriptors a process has, and how many threads but those of virtio-fs queues: of these there come to be
/// more, eight at most for a queue, when a machine is too busy for the others to be in time, and they stay.
fn held(process: u32) -> (usize, usize) {
    let entries = |of| fs::read_dir(format!("/proc/{process}/{of}")).unwrap().flatten();
    // One that ends meanwhile has no name any more.
    let name = |task: fs::DirEntry| fs::read_to_string(task.path().join("comm")).ok();
    let threads = entries("task").filter_map(name);
    (entries("fd").count(), threads.filter(|name| !name.starts_with("virtio-fs:")).count())
}

#[test]
fn whatever_its_clients_do_a_sandbox_lives_on_and_holds_nothing_of_them() {
    let files = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files }).unwrap();
    let tree = Tree::new();
    tree.write("file", b"contents\n");
    let sandbox = Sandbox::start("clients", &["--shares", "/run/s"], &["sleep", "1000"]);
    let share = |words: &[&str]| {
        let (verb, words) = words.split_first().unwrap();
        sandbox.describe("share", &[verb], words).finish()
    };
    let lives = || sandbox.exec(&[], &["echo", "alive"]).text() == "alive\n";
    assert!(lives());
    let process = sandbox.oriel.process_id();
    // Whoever was served a moment ago is gone by then.
    thread::sleep(Duration::from_secs(2));
    let before = held(process);

    let stream = || {
        let stream = UnixStream::connect(sandbox.socket("vsock")).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream
    };
    // Lines that are none, and a port that nobody listens on.
    for line in [
        &b"CONNECT\n"[..],
        b"CONNECT x\n",
        b"CONNECT -1\n",
        b"CONNECT 4294967296\n",
        b"CONNECT 512 512\n",
        b"\n",
        b"GET / HTTP/1.1\r\n\r\n",
        &[0xff; 100],
        b"CONNECT 5\n",
    ] {
        let mut stream = stream();
        // It may be closed before all is written.
        let _ = stream.write_all(line);
        let start = Instant::now();
        let heard = stream.read(&mut [0; 64]).unwrap_or(0);
        assert_eq!(heard, 0, "{line:?}");
        assert!(start.elapsed() < PATIENCE, "{line:?}");
    }
    // A client that does not read holds back its own command alone.
    let mut silent = stream();
    silent.write_all(b"CONNECT 512\n").unwrap();
    BufReader::new(&silent).read_line(&mut String::new()).unwrap();
    let words = ["head", "-c", "20000000", "/dev/zero"].map(String::from);
    let mut request = Vec::new();
    frames::put_message(&mut request, &Exec { args: words.to_vec(), ..Exec::default() });
    silent.write_all(&request).unwrap();
    // Those that say nothing, or half of it.
    let mut half: Vec<_> = (0..HALF_OPEN).map(|_| stream()).collect();
    for stream in half.iter_mut().step_by(2) {
        let _ = stream.write_all(b"CONN");
    }
    assert!(lives(), "among {HALF_OPEN} half-open connections");
    drop(half);

    // The control socket.
    let ask = |line: &[u8]| {
        let mut stream = UnixStream::connect(sandbox.socket("sock")).unwrap();
        stream.write_all(line).unwrap();
        let mut answer = String::new();
        BufReader::new(stream).read_line(&mut answer).unwrap();
        answer
    };
    for (line, hint) in [
        (&b"hello\n"[..], "no request"),
        (b"{\"request\":\"fly\"}\n", "fly"),
        (b"{\"request\":\"share-remove\",\"path\":\"/nowhere\"}\n", "/nowhere"),
        (b"{\"request\":\"share-update\",\"path\":\"/nowhere\",\"read-only\":true}\n", "/nowhere"),
        (b"{\"request\":\"share-resize\",\"share\":\"/nowhere\",\"size\":2097152}\n", "/nowhere"),
        (
            b"{\"request\":\"share-add\",\"host\":\"/no/such/dir\",\"path\":\"/x\"}\n",
            "/no/such/dir",
        ),
        (b"{\"request\":\"signal\",\"number\":99}\n", "99"),
    ] {
        let answer = ask(line);
        assert!(answer.starts_with("{\"error\":") && answer.contains(hint), "{answer}");
    }
    let waits = UnixStream::connect(sandbox.socket("sock")).unwrap();
    (&waits).write_all(b"{\"request\":\"wait\"}\n").unwrap();

    // A share that is added twice, and removed while a file of it is open: that works until it is closed.
    let added = tree.at("/a", "");
    share(&["add", &added]).exits_with(0).says_no_error();
    share(&["add", &added]).refuses(125, &["/a", "already"]);
    let script =
        "exec 3</run/s/a/file; echo open; read line; cat <&3; ls /run/s/a 2>&1 | grep -c 'No such'";
    let mut open = sandbox.describe("exec", &["-i"], &["sh", "-c", script]).start();
    assert_eq!(open.hear(), "open");
    let removed = share(&["remove", "/a"]);
    removed.exits_with(0).says_no_error();
    share(&["remove", "/a"]).refuses(125, &["/a"]);
    assert_eq!(open.ask("go on"), "contents");
    assert_eq!(open.hear(), "1");
    open.finish().exits_with(0);

    assert!(lives());
    drop((silent, waits));
    let deadline = Instant::now() + PATIENCE;
    loop {
        let now = held(process);
        if now.0 <= before.0 && now.1 <= before.1 {
            break;
        }
        assert!(Instant::now() < deadline, "{now:?} is held, and was {before:?}");
        // What the guest knows of a share it lets go of when it looks the name up.
        sandbox.exec(&[], &["ls", "/run/s"]).exits_with(0);
        thread::sleep(Duration::from_secs(1));
    }
    sandbox.describe("stop", &["-t", "0"], &[]).finish().exits_with(0);
}
