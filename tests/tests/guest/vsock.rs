//! Streams between programs of the host and programs of the guest.

use std::fs;
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use integration::vsock::{ECHO, SILENT, SINK, SOURCE, check_stream, write_stream};
use integration::{Oriel, Running, Tree};

/// Enough to fill every buffer on the way many times over.
const LARGE: u64 = 64 << 20;

/// For a gibibyte each way where KVM is emulated.
const SLOW: Duration = Duration::from_secs(600);

/// Whoever is refused is not left waiting. Generous: an emulated machine may be at something else for seconds.
const SOON: Duration = Duration::from_secs(20);

/// A guest whose probe listens and connects.
struct Guest {
    oriel: Running,
    tree: Tree,
}

impl Guest {
    fn new() -> Self {
        let mut guest = Self::booting();
        assert_eq!(guest.oriel.hear(), "listening");
        guest
    }

    fn booting() -> Self {
        let tree = Tree::with_probe(super::PROBE);
        let socket = tree.path("vsock");
        let oriel = Oriel::run(&["-i", "--vsock", socket.to_str().unwrap()])
            .args(&["-v", &tree.at("/s", "ro")])
            .guest(&["/s/guest-probe", "vsock"])
            .timeout(SLOW)
            .start();
        Self { oriel, tree }
    }

    fn path(&self) -> PathBuf {
        self.tree.path("vsock")
    }

    /// A client of a port of the guest. `None`: it was refused.
    fn try_connect(&self, port: u32) -> Option<UnixStream> {
        let mut stream = UnixStream::connect(self.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        writeln!(stream, "CONNECT {port}").unwrap();
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            match stream.read(&mut byte) {
                Ok(1) => line.push(byte[0]),
                Ok(_) => return None,
                Err(error) if error.kind() == ErrorKind::ConnectionReset => return None,
                Err(error) => panic!("port {port}: {error}"),
            }
        }
        assert!(line.starts_with(b"OK "), "{line:?}");
        Some(stream)
    }

    fn connect(&self, port: u32) -> UnixStream {
        self.try_connect(port).unwrap_or_else(|| panic!("port {port} should be listened on"))
    }

    /// What the guest connects to this port arrives there.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.tree.path(&format!("vsock_{port}"))).unwrap()
    }

    /// Ends the guest; its socket goes with it, and nothing else.
    fn end(self) {
        let Self { oriel, tree } = self;
        oriel.finish().exits_with(0).says_no_error();
        assert!(!tree.path("vsock").exists(), "the socket is gone");
    }
}

#[test]
fn programs_of_the_host_reach_programs_of_the_guest() {
    let mut guest = Guest::booting();
    let deadline = Instant::now() + Duration::from_secs(20);
    while !guest.path().exists() {
        assert!(Instant::now() < deadline, "the socket is there before the guest is");
        thread::sleep(Duration::from_millis(10));
    }
    let start = Instant::now();
    assert!(guest.try_connect(ECHO).is_none(), "nobody listens before the guest is up");
    assert!(start.elapsed() < SOON, "and that is said at once");
    assert_eq!(guest.oriel.hear(), "listening");
    let start = Instant::now();
    assert!(guest.try_connect(5).is_none(), "nobody listens on that port");
    assert!(start.elapsed() < SOON, "and that is said at once");

    // One end closes its direction, and the other goes on.
    let mut echo = guest.connect(ECHO);
    echo.write_all(b"hello").unwrap();
    let mut answer = [0; 5];
    echo.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"hello");
    echo.write_all(b"goodbye").unwrap();
    echo.shutdown(Shutdown::Write).unwrap();
    let mut rest = String::new();
    echo.read_to_string(&mut rest).unwrap();
    assert_eq!(rest, "goodbye");

    // Those that are not read, by the guest and by us, hold back nobody.
    let mut unread = guest.connect(SILENT);
    unread.set_nonblocking(true).unwrap();
    let mut stuffed = 0;
    let full = Instant::now() + Duration::from_secs(1);
    while Instant::now() < full {
        match unread.write(&[0; 4096]) {
            Ok(count) => stuffed += count,
            Err(_) => thread::sleep(Duration::from_millis(10)),
        }
    }
    assert!(stuffed < 8 << 20, "what nobody reads is bounded: {stuffed}");
    let mut stalled = guest.connect(SOURCE);
    writeln!(stalled, "{}", 4 << 20).unwrap();
    thread::sleep(Duration::from_millis(200));

    let mut streams: Vec<_> = (0..100).map(|_| guest.connect(ECHO)).collect();
    for (index, stream) in streams.iter_mut().enumerate() {
        write!(stream, "{index:04}").unwrap();
    }
    for (index, stream) in streams.iter_mut().enumerate().rev() {
        let mut answer = [0; 4];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer, *format!("{index:04}").as_bytes());
    }
    drop(streams);

    send(guest.connect(SINK), LARGE);
    receive(guest.connect(SOURCE), LARGE);

    assert_eq!(check_stream(&mut stalled).unwrap(), 4 << 20, "it goes on where it stopped");
    drop(unread);
    guest.end();
}

/// Sends so many bytes into a sink that answers with their number; how long it took.
fn send(mut sink: UnixStream, length: u64) -> Duration {
    let start = Instant::now();
    write_stream(&mut sink, length).unwrap();
    sink.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    sink.read_to_string(&mut answer).unwrap();
    assert_eq!(answer.trim(), length.to_string(), "all bytes came as they were sent");
    start.elapsed()
}

/// Asks a source for so many bytes; how long it took.
fn receive(mut source: UnixStream, length: u64) -> Duration {
    let start = Instant::now();
    writeln!(source, "{length}").unwrap();
    assert_eq!(check_stream(&mut source).unwrap(), length, "all bytes came as they were sent");
    start.elapsed()
}

#[test]
#[ignore = "takes minutes where KVM is emulated"]
fn a_gibibyte_goes_each_way_through_one_stream() {
    let length = 1 << 30;
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let sink = thread::spawn(move || {
        let received = check_stream(&mut theirs).unwrap();
        writeln!(theirs, "{received}").unwrap();
    });
    let plain = send(ours, length);
    sink.join().unwrap();
    let guest = Guest::new();
    let there = send(guest.connect(SINK), length);
    let back = receive(guest.connect(SOURCE), length);
    let speed = |time: Duration| (length >> 20) as f64 / time.as_secs_f64();
    let ratio = |time: Duration| speed(time) / speed(plain);
    println!("within the host:  {:.0} MiB/s", speed(plain));
    println!("host to guest:    {:.0} MiB/s, ratio {:.2}", speed(there), ratio(there));
    println!("guest to host:    {:.0} MiB/s, ratio {:.2}", speed(back), ratio(back));
    guest.end();
}

#[test]
#[ignore = "figures"]
fn how_long_a_hundred_streams_take() {
    let guest = Guest::new();
    let round = |echo: &mut UnixStream| {
        let mut answer = [0; 4];
        echo.write_all(b"ping").unwrap();
        echo.read_exact(&mut answer).unwrap();
    };
    let start = Instant::now();
    let mut streams: Vec<_> = (0..100).map(|_| guest.connect(ECHO)).collect();
    println!("100 streams, opened one after another: {:.1?} each", start.elapsed() / 100);
    let start = Instant::now();
    streams.iter_mut().for_each(round);
    println!("one round trip through each of them: {:.1?} each", start.elapsed() / 100);
    let start = Instant::now();
    for stream in &mut streams {
        stream.write_all(b"ping").unwrap();
    }
    for stream in &mut streams {
        stream.read_exact(&mut [0; 4]).unwrap();
    }
    println!("and through all of them at once: {:.1?} in all", start.elapsed());
    drop(streams);
    guest.end();
}

#[test]
fn programs_of_the_guest_reach_programs_of_the_host() {
    let mut guest = Guest::new();
    let answer = guest.oriel.ask("connect 2 5");
    assert!(answer.contains("reset"), "nobody listens there: {answer}");
    let answer = guest.oriel.ask("connect 77 5");
    assert!(answer.starts_with("error"), "there is nobody but the host: {answer}");
    fs::write(guest.tree.path("vsock_6"), "no socket").unwrap();
    let answer = guest.oriel.ask("connect 2 6");
    assert!(answer.contains("reset"), "that is no socket: {answer}");

    serve(guest.listen(10), |mut stream| {
        io::copy(&mut stream.try_clone()?, &mut stream)?;
        stream.shutdown(Shutdown::Write)
    });
    assert_eq!(guest.oriel.ask("echo 10 hello"), "hello");
    assert_eq!(guest.oriel.ask("many 10 100"), "100");

    let silent = guest.listen(11);
    let held = thread::spawn(move || silent.accept().unwrap());
    assert_eq!(guest.oriel.ask("connect 2 11"), "connected");
    drop(held.join().unwrap());

    serve(guest.listen(12), |mut stream| {
        let received = check_stream(&mut stream)?;
        writeln!(stream, "{received}")
    });
    let answer = guest.oriel.ask(&format!("send 12 {LARGE}"));
    assert_eq!(answer, LARGE.to_string(), "all bytes came");
    serve(guest.listen(13), |mut stream| {
        let mut line = String::new();
        BufReader::new(stream.try_clone()?).read_line(&mut line)?;
        write_stream(&mut stream, line.trim().parse().map_err(io::Error::other)?)
    });
    let answer = guest.oriel.ask(&format!("receive 13 {LARGE}"));
    assert_eq!(answer, LARGE.to_string(), "all bytes came");
    guest.end();
}

fn serve(listener: UnixListener, serve: fn(UnixStream) -> io::Result<()>) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            thread::spawn(move || serve(stream.unwrap()).unwrap());
        }
    });
}

#[test]
fn what_a_command_sends_last_arrives_before_its_sandbox_ends() {
    let tree = Tree::with_probe(super::PROBE);
    let socket = tree.path("vsock");
    // A sandbox that was killed has left this.
    drop(UnixListener::bind(&socket).unwrap());
    let listener = UnixListener::bind(tree.path("vsock_20")).unwrap();
    let reader = thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        thread::sleep(Duration::from_millis(300));
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    let outcome = Oriel::run(&["--vsock", socket.to_str().unwrap(), "-v", &tree.at("/s", "ro")])
        .script("head -c 300000 /dev/zero | /s/guest-probe vsock-pipe 20")
        .finish();
    outcome.exits_with(0).says_no_error();
    assert_eq!(reader.join().unwrap(), 300_000);
    assert!(!socket.exists());
    assert!(tree.path("vsock_20").exists(), "that is not the sandbox's");
}

#[test]
fn a_vsock_path_that_cannot_be_used_is_refused() {
    let tree = Tree::new();
    tree.write("file", b"mine");
    let file = tree.path("file");
    let taken = tree.path("taken");
    let _listener = UnixListener::bind(&taken).unwrap();
    for (value, status, words) in [
        (file.to_str().unwrap(), 125, &["--vsock", "file", "no socket"][..]),
        (taken.to_str().unwrap(), 125, &["--vsock", "taken", "somebody listens"]),
        ("/no/such/directory/socket", 125, &["--vsock", "/no/such/directory"]),
        ("x,cid=2", 2, &["--vsock", "2", "reserved"]),
        ("x,cid=many", 2, &["--vsock", "many"]),
        (&"x".repeat(120), 2, &["--vsock", "too long"]),
    ] {
        Oriel::refused(&["--vsock", value, "--", "true"]).finish().refuses(status, words);
    }
    assert_eq!(tree.read("file"), b"mine");
    UnixStream::connect(&taken).unwrap();
}

#[test]
fn the_guest_has_a_source_of_random_bytes() {
    let script = r#"
        echo "rng=$(cat /sys/class/misc/hw_random/rng_current)"
        echo "bytes=$(head -c 100000 /dev/hwrng | wc -c)"
        echo "kinds=$(head -c 10000 /dev/hwrng | od -An -v -tu1 -w1 | sort -u | wc -l)"
    "#;
    let outcome = Oriel::run(&[]).script(script).finish();
    outcome.exits_with(0).guest_says(&[
        ("rng", "virtio_rng.0", "the guest's kernel uses it"),
        ("bytes", "100000", "as many as are asked for"),
        ("kinds", "256", "all kinds"),
    ]);
}
