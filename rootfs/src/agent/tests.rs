//! Further commands, over a socket of this host instead of vsock.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::{Duration, Instant};

use oriel_init::container::{Capabilities, Confinement, Limit};
use oriel_init::frames::{Decoder, Frame, Kind, MAX_DATA, MAX_TO_HOST};
use oriel_init::protocol::{Exec, FromHost, STDIN_WINDOW};

use super::*;
use crate::children::tests::children;

/// Longer than anything takes on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn base() -> Process {
    Process {
        args: vec!["sh".into()],
        env: vec!["PATH=/usr/bin:/bin".into(), "BASE=base".into(), "BOTH=base".into()],
        cwd: "/tmp".into(),
        user: None,
        terminal: false,
        stdin: false,
        confinement: Confinement::default(),
    }
}

/// The groups of a process are set by root alone.
fn able() -> bool {
    rustix::process::geteuid().is_root()
}

fn script(script: &str) -> Exec {
    Exec { args: ["sh", "-c", script].map(String::from).to_vec(), ..Exec::default() }
}

/// The host's end.
struct Host {
    stream: UnixStream,
    decoder: Decoder,
}

impl Host {
    fn connect(agent: &Arc<Agent>) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_read_timeout(Some(PATIENCE)).unwrap();
        agent.begin(theirs);
        Self { stream: ours, decoder: Decoder::new(MAX_TO_HOST) }
    }

    fn of(exec: &Exec) -> Self {
        let agent = Agent::new(base(), children());
        let mut host = Self::connect(&agent);
        host.say(exec);
        host
    }

    fn say(&mut self, message: &impl serde::Serialize) {
        let mut bytes = Vec::new();
        frames::put_message(&mut bytes, message);
        self.stream.write_all(&bytes).unwrap();
    }

    fn send(&mut self, kind: Kind, data: &[u8]) {
        let mut bytes = Vec::new();
        frames::put(&mut bytes, kind, data);
        self.stream.write_all(&bytes).unwrap();
    }

    /// `None`: the stream is closed.
    fn hear(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.frame().unwrap() {
                return Some(frame);
            }
            let mut piece = [0; 4096];
            match self.stream.read(&mut piece) {
                Ok(0) => return None,
                Ok(count) => self.decoder.push(&piece[..count]),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return None,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => panic!("{error}"),
            }
        }
    }

    fn hear_message(&mut self) -> FromAgent {
        self.hear().unwrap().message().unwrap()
    }

    /// Hears output until there is this in it.
    fn hear_until(&mut self, text: &str) -> String {
        let mut heard = String::new();
        while !heard.contains(text) {
            let frame = self.hear().unwrap_or_else(|| panic!("{text:?} in {heard:?}"));
            if frame.kind != Kind::Message {
                heard += &String::from_utf8_lossy(&frame.bytes);
            }
        }
        heard
    }

    /// All output up to the end.
    fn finish(mut self) -> (Vec<u8>, Vec<u8>, FromAgent) {
        let (mut stdout, mut stderr, mut last) = (Vec::new(), Vec::new(), None);
        while let Some(frame) = self.hear() {
            assert!(frame.bytes.len() <= MAX_DATA);
            match frame.kind {
                Kind::Stdout => stdout.extend(frame.bytes),
                Kind::Stderr => stderr.extend(frame.bytes),
                _ => last = Some(frame.message().unwrap()),
            }
        }
        (stdout, stderr, last.unwrap())
    }
}

fn text(exec: &Exec) -> String {
    let (stdout, stderr, last) = Host::of(exec).finish();
    assert_eq!(stderr, b"");
    assert_eq!(last, FromAgent::Exited { status: 0 });
    String::from_utf8(stdout).unwrap()
}

fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn streams_are_apart_and_the_status_comes_last() {
    if !able() {
        return;
    }
    let exec = script("head -c 3000000 /dev/zero; head -c 1000000 /dev/zero >&2; exit 7");
    let (stdout, stderr, last) = Host::of(&exec).finish();
    assert_eq!((stdout.len(), stderr.len()), (3_000_000, 1_000_000));
    assert_eq!(last, FromAgent::Exited { status: 7 });
    let (.., last) = Host::of(&script("kill -9 $$")).finish();
    assert_eq!(last, FromAgent::Exited { status: 137 });
}

#[test]
fn surroundings_are_those_of_the_first_command_and_what_was_asked_for() {
    if !able() {
        return;
    }
    let mut exec = script("echo $BASE $BOTH $OWN $PWD $(id -u):$(id -g)");
    exec.env = vec!["BOTH=exec".into(), "OWN=a=b".into()];
    assert_eq!(text(&exec), "base exec a=b /tmp 0:0\n");
    exec.cwd = Some("/usr".into());
    exec.user = Some("1234:77".into());
    assert_eq!(text(&exec), "base exec a=b /usr 1234:77\n");
    assert_eq!(text(&script("cat; echo end")), "end\n", "no standard input was asked for");
}

#[test]
fn what_the_first_command_may_do_is_what_further_ones_may() {
    if !able() {
        return;
    }
    let kill = 1 << 5;
    let capabilities = Capabilities {
        bounding: kill | 1,
        effective: kill,
        permitted: kill,
        inheritable: kill,
        ambient: kill,
    };
    let confinement = Confinement {
        ids: Some((1234, 77, vec![5, 6])),
        umask: Some(0o27),
        limits: vec![Limit { resource: libc::RLIMIT_NOFILE, soft: 100, hard: 200 }],
        capabilities: Some(capabilities),
        no_new_privileges: true,
    };
    let mut base = base();
    base.confinement = confinement;
    let agent = Agent::new(base, children());
    let mut exec = script(
        "id -u; id -g; id -G; umask; ulimit -n; ulimit -Hn; grep -E 'Cap|NoNew' /proc/self/status",
    );
    let mut host = Host::connect(&agent);
    host.say(&exec);
    let (stdout, stderr, last) = host.finish();
    assert_eq!(
        (String::from_utf8_lossy(&stderr), last),
        ("".into(), FromAgent::Exited { status: 0 })
    );
    let text = String::from_utf8(stdout).unwrap();
    let words: Vec<_> = text.lines().map(|line| line.split('\t').next_back().unwrap()).collect();
    let (one, two) = ("0000000000000020", "0000000000000021");
    assert_eq!(words, ["1234", "77", "77 5 6", "0027", "100", "200", one, one, one, two, one, "1"]);
    exec.user = Some("4321".into());
    exec.args = vec!["id".into(), "-G".into()];
    let mut host = Host::connect(&agent);
    host.say(&exec);
    assert_eq!(host.finish().0, b"0\n", "another user has no groups of that one's");
}

#[test]
fn standard_input_arrives_within_its_window() {
    if !able() {
        return;
    }
    let mut exec = script("cat");
    exec.stdin = true;
    let mut host = Host::of(&exec);
    let data: Vec<u8> = (0..=250).cycle().take(3 << 20).collect();
    let (mut room, mut sent, mut heard) = (STDIN_WINDOW, 0, Vec::new());
    while heard.len() < data.len() {
        while sent < data.len() && room > 0 {
            let count = room.min(MAX_DATA).min(data.len() - sent);
            host.send(Kind::Stdin, &data[sent..sent + count]);
            (sent, room) = (sent + count, room - count);
            if sent == data.len() {
                host.send(Kind::Stdin, &[]);
            }
        }
        let frame = host.hear().unwrap();
        match frame.kind {
            Kind::Stdout => heard.extend(frame.bytes),
            _ => match frame.message().unwrap() {
                FromAgent::Started => {}
                FromAgent::Room { bytes } => room += bytes as usize,
                other => panic!("{other:?}"),
            },
        }
        assert!(room <= STDIN_WINDOW);
    }
    assert!(heard == data);
    assert_eq!(host.finish().2, FromAgent::Exited { status: 0 });
}

#[test]
fn a_signal_passes_input_that_is_not_read_and_output_that_is_not_taken() {
    if !able() {
        return;
    }
    let mut exec = script("trap 'exit 9' USR1; echo ready; while :; do sleep 0.01; done");
    exec.stdin = true;
    let mut host = Host::of(&exec);
    host.hear_until("ready");
    for _ in 0..STDIN_WINDOW / MAX_DATA {
        host.send(Kind::Stdin, &[7; MAX_DATA]);
    }
    host.say(&FromHost::Signal { number: libc::SIGUSR1 });
    assert_eq!(host.finish().2, FromAgent::Exited { status: 9 });

    let mut host = Host::of(&script("trap 'echo late >&2' TERM; yes; sleep 0.3; exit 5"));
    assert_eq!(host.hear_message(), FromAgent::Started);
    // Everything on the way is full by then.
    thread::sleep(Duration::from_millis(200));
    host.say(&FromHost::Signal { number: libc::SIGTERM });
    let (_, stderr, last) = host.finish();
    assert_eq!(last, FromAgent::Exited { status: 5 });
    assert!(stderr.ends_with(b"late\n"));
}

#[test]
fn a_terminal_has_a_size_and_is_the_sessions_own() {
    if !able() {
        return;
    }
    // A trap that runs ends a shell's `read` with nothing.
    let mut exec = script(
        "stty size; trap 'stty size' WINCH; tty; while [ -z \"$line\" ]; do read line; done; \
         echo got $line; read more",
    );
    (exec.terminal, exec.stdin, exec.size) = (true, true, Some((33, 101)));
    let mut host = Host::of(&exec);
    assert!(host.hear_until("/dev/pts/").starts_with("33 101\r\n"));
    host.say(&FromHost::Resize { rows: 50, columns: 7 });
    host.send(Kind::Stdin, b"hello\n");
    let heard = host.hear_until("got hello");
    assert!(heard.contains("50 7"), "{heard:?}");
    // Ctrl-C: to the terminal's foreground.
    host.send(Kind::Stdin, b"\x03");
    assert_eq!(host.finish().2, FromAgent::Exited { status: 130 });
    // And what was written to it last is not lost.
    let mut exec = script("seq 1 5000");
    exec.terminal = true;
    let (stdout, _, last) = Host::of(&exec).finish();
    assert_eq!(last, FromAgent::Exited { status: 0 });
    assert!(stdout.ends_with(b"\r\n4999\r\n5000\r\n"));
}

#[test]
fn what_a_command_leaves_behind_keeps_nobody() {
    if !able() {
        return;
    }
    let (stdout, _, last) = Host::of(&script("sleep 5 & echo done; exit 3")).finish();
    assert_eq!((&stdout[..], last), (&b"done\n"[..], FromAgent::Exited { status: 3 }));
    let (_, _, last) = Host::of(&script("timeout 5 yes & exit 4")).finish();
    assert_eq!(last, FromAgent::Exited { status: 4 });
}

#[test]
fn a_host_that_goes_hangs_a_terminal_up_and_leaves_another_command_alone() {
    if !able() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str| directory.path().join(name);
    let path = directory.path().display();
    let mut exec = script(&format!(
        "trap 'touch {path}/hup; exit' HUP; echo ready; while :; do sleep 0.01; done"
    ));
    exec.terminal = true;
    let agent = Agent::new(base(), children());
    let mut host = Host::connect(&agent);
    host.say(&exec);
    host.hear_until("ready");
    drop(host);
    wait_until("SIGHUP", || file("hup").exists());

    let mut exec = script(&format!(
        "echo ready; cat; head -c 1000000 /dev/zero; echo; echo >&2 && touch {path}/went-on"
    ));
    exec.stdin = true;
    let mut host = Host::connect(&agent);
    host.say(&exec);
    host.hear_until("ready");
    // The first has made its file, and may take a moment to end.
    wait_until("the first is gone", || *agent.running() == 1);
    drop(host);
    wait_until("its output is taken, and its input ends", || file("went-on").exists());
    agent.finish(PATIENCE);
    assert_eq!(*agent.running(), 0);
}

#[test]
fn a_command_that_ignores_that_its_terminal_is_gone_counts_until_it_ends() {
    if !able() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let end = directory.path().join("end");
    let mut exec = script(&format!(
        "trap '' HUP; echo ready; while ! [ -e {} ]; do sleep 0.01; done",
        end.display()
    ));
    exec.terminal = true;
    let agent = Agent::new(base(), children());
    let mut host = Host::connect(&agent);
    host.say(&exec);
    host.hear_until("ready");
    drop(host);
    agent.finish(Duration::from_millis(300));
    assert_eq!(*agent.running(), 1);
    std::fs::write(&end, "").unwrap();
    agent.finish(PATIENCE);
    assert_eq!(*agent.running(), 0);
}

#[test]
fn a_command_may_close_its_terminal_and_open_it_again() {
    if !able() {
        return;
    }
    let mut exec =
        script("echo before; exec 0<&- 1>&- 2>&-; sleep 0.3; exec >/dev/tty; echo behind; exit 8");
    exec.terminal = true;
    let (stdout, _, last) = Host::of(&exec).finish();
    assert_eq!(String::from_utf8_lossy(&stdout), "before\r\nbehind\r\n");
    assert_eq!(last, FromAgent::Exited { status: 8 });
}

#[test]
fn nobody_but_the_host_is_heard() {
    let agent = Agent::new(base(), children());
    for peer in [0, 1, 3, u32::MAX] {
        let (ours, theirs) = UnixStream::pair().unwrap();
        agent.admit(theirs, peer);
        let mut host = Host { stream: ours, decoder: Decoder::new(MAX_TO_HOST) };
        assert!(host.hear().is_none(), "{peer}");
        assert_eq!(*agent.running(), 0);
    }
    let (ours, theirs) = UnixStream::pair().unwrap();
    agent.admit(theirs, vsock::HOST);
    let mut host = Host { stream: ours, decoder: Decoder::new(MAX_TO_HOST) };
    host.say(&Exec::default());
    assert!(matches!(host.hear_message(), FromAgent::Refused { status: 125, .. }));
}

#[test]
fn a_host_that_talks_nonsense_is_left_and_its_command_goes_on_without_it() {
    if !able() {
        return;
    }
    let agent = Agent::new(base(), children());
    let frame = |kind: Kind, data: &[u8]| {
        let mut bytes = Vec::new();
        frames::put(&mut bytes, kind, data);
        bytes
    };
    for nonsense in [
        &b"GET / HTTP/1.1\r\n\r\n"[..],
        &[0, 255, 255, 255, 255],
        &frame(Kind::Message, b"{}"),
        &frame(Kind::Message, b"\"started\""),
        &frame(Kind::Message, &[b'['; 10_000]),
        &frame(Kind::Stdin, b"before it was asked"),
        &[9; 100_000],
    ] {
        let mut host = Host::connect(&agent);
        // It may be left before it has said all.
        let _ = host.stream.write_all(nonsense);
        assert!(host.hear().is_none());
    }
    let mut exec = script("echo ready; sleep 5");
    exec.stdin = true;
    for nonsense in [
        &frame(Kind::Stdout, b"x")[..],
        &frame(Kind::Message, b"{\"signal\":{\"number\":65}}"),
        &frame(Kind::Message, b"{\"signal\":{\"number\":-9}}"),
        &frame(Kind::Message, b"{\"signal\":{\"number\":0}}"),
        &frame(Kind::Message, b"{\"resize\":{\"rows\":65536,\"columns\":1}}"),
        &frame(Kind::Stdin, &[0; MAX_DATA]).repeat(STDIN_WINDOW / MAX_DATA + 2),
        &[7],
    ] {
        let mut host = Host::connect(&agent);
        host.say(&exec);
        host.hear_until("ready");
        let _ = host.stream.write_all(nonsense);
        if nonsense.len() == 1 {
            host.stream.write_all(&[0; 4]).unwrap();
        }
        assert!(host.hear().is_none());
    }
    agent.finish(PATIENCE);
    // One that says nothing, one that says half, one that ends: each is over at once when it goes.
    drop(Host::connect(&agent));
    let mut host = Host::connect(&agent);
    host.stream.write_all(&[0, 10]).unwrap();
    host.stream.shutdown(Shutdown::Write).unwrap();
    assert!(host.hear().is_none());
    agent.finish(PATIENCE);
    assert_eq!(*agent.running(), 0);
}

#[test]
fn what_cannot_be_run_is_refused_with_its_reason() {
    let refused = |exec: &Exec| match Host::of(exec).finish().2 {
        FromAgent::Refused { status, message } => (status, message),
        other => panic!("{other:?}"),
    };
    let (status, message) = refused(&Exec { args: vec!["no-such".into()], ..Exec::default() });
    assert_eq!(status, 127);
    assert!(message.contains("\"no-such\"") && !message.contains('\n'), "{message}");
    assert_eq!(refused(&Exec { args: vec!["/etc".into()], ..Exec::default() }).0, 126);
    assert_eq!(refused(&Exec::default()).0, 125);
    let (status, message) = refused(&Exec { user: Some("eve-nobody".into()), ..script("true") });
    assert_eq!(status, 125);
    assert!(message.contains("eve-nobody"), "{message}");
    assert_eq!(refused(&Exec { env: vec!["=".into()], ..script("true") }).0, 125);
    assert_eq!(refused(&Exec { cwd: Some("/no/where".into()), ..script("true") }).0, 126);
}

#[test]
fn one_command_too_many_is_refused_and_there_is_room_again() {
    if !able() {
        return;
    }
    let agent = Agent::new(base(), children());
    let mut exec = script("echo ready; read line");
    exec.stdin = true;
    let start = |agent: &Arc<Agent>| {
        let mut host = Host::connect(agent);
        host.say(&exec);
        host
    };
    let mut hosts: Vec<_> = (0..MOST_EXECS).map(|_| start(&agent)).collect();
    for host in &mut hosts {
        host.hear_until("ready");
    }
    let FromAgent::Refused { status: 125, message } = Host::connect(&agent).finish().2 else {
        panic!("one too many")
    };
    assert!(message.contains("64"), "{message}");
    hosts.pop().unwrap().send(Kind::Stdin, &[]);
    wait_until("room", || *agent.running() < MOST_EXECS);
    let mut host = start(&agent);
    host.hear_until("ready");
    drop((host, hosts));
    agent.finish(PATIENCE);
}
