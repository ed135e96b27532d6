//! The command in the guest: streams, status, signals, surroundings.

use std::time::Duration;

use integration::{Oriel, Tree, noise};
use rustix::process::Signal;

/// Every byte of standard input costs an exit of the guest.
const SLOW: Duration = Duration::from_secs(240);

#[test]
fn standard_output_and_error_are_apart_and_exact() {
    let tree = Tree::new();
    let mut bytes = noise(64 << 10, 1);
    bytes.extend((0..=255).chain(*b"\r\n\n\r\0\x03\x04\x11\x13\x1a\x1c"));
    tree.write("bytes", &bytes);
    let script = "cat /s/bytes; echo to error >&2; printf '\\000\\r\\n\\377' >&2; exit 7";
    let outcome = Oriel::run(&["-v", &tree.at("/s", "ro")]).script(script).finish();
    outcome.exits_with(7);
    outcome
        .check(outcome.stdout == bytes, "standard output is what the command wrote, byte for byte");
    let error = outcome.stderr == "to error\n\0\r\n\u{fffd}";
    outcome.check(error, "standard error is what the command wrote");
}

#[test]
fn standard_input_reaches_the_command_byte_for_byte() {
    let mut bytes = noise(200 << 10, 2);
    bytes.extend(b"\r\n\n\r\0\x03\x04\x11\x13\x1a\x1c no line end");
    let outcome = Oriel::run(&["-i"]).script("cat; exit 255").input(&bytes).timeout(SLOW).finish();
    outcome.exits_with(255);
    outcome.check(outcome.stdout == bytes, "what went in came out");
}

#[test]
fn the_command_has_the_surroundings_that_were_asked_for() {
    let tree = Tree::new();
    let script = r#"
        echo "home=$(pwd)"
        echo "one=$ONE"
        echo "host=$FROM_HOST"
        echo "unset=${NOT_THERE-yes}"
        echo "equals=$EQUALS"
        echo "last=$LAST"
        echo "hostname=$(hostname)/$HOSTNAME"
        echo "id=$(id -u):$(id -g)"
        echo "root=$(stat -c '%a %u' /)"
        echo "write=$( (touch /root-only) 2>&1 | grep -c denied)"
        touch made && echo "made=yes"
        echo "arguments=$0,$1,$2"
    "#;
    std::os::unix::fs::chown(tree.path("."), Some(1000), Some(1001)).unwrap();
    let outcome = Oriel::run(&["-u", "1000:1001", "-w", "/s", "--hostname", "some-host.example"])
        .args(&[
            "-v",
            &tree.at("/s", ""),
            "-e",
            "ONE=1 and more",
            "--env",
            "FROM_HOST",
            "-e",
            "NOT_THERE",
        ])
        .args(&["-e", "EQUALS=a=b=", "-e", "LAST=first", "-e", "LAST=last"])
        .env("FROM_HOST", "the host's")
        .script(script)
        .args(&["a b", "", "ü$x"])
        .finish();
    outcome.exits_with(0).says_no_error().guest_says(&[
        ("home", "/s", "--workdir"),
        ("one", "1 and more", "--env NAME=VALUE"),
        ("host", "the host's", "--env NAME"),
        ("unset", "yes", "a name that the host does not have"),
        ("equals", "a=b=", "only the first = counts"),
        ("last", "last", "the last value counts"),
        ("hostname", "some-host.example/some-host.example", "--hostname"),
        ("id", "1000:1001", "--user UID:GID"),
        ("root", "755 0", "the guest's / belongs to root alone"),
        ("write", "1", "the user is not root"),
        ("made", "yes", "but owns the share"),
        ("arguments", "a b,,ü$x", "arguments as they are"),
    ]);
    use std::os::unix::fs::MetadataExt;
    let made = std::fs::metadata(tree.path("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (1000, 1001), "the host's file belongs to that user");
}

#[test]
fn a_user_can_be_named() {
    let root = Tree::root();
    root.write("etc/passwd", b"root:x:0:0::/:/bin/sh\nalice:x:1234:1234::/home/alice:/bin/sh\n");
    root.write("etc/group", b"root:x:0:\nalice:x:1234:\nusers:x:100:alice\n");
    let outcome = Oriel::run(&["--root", root.text(), "--user", "alice"])
        .script("echo \"id=$(busybox id -u):$(busybox id -g)\"; echo \"groups=$(busybox id -G)\"")
        .finish();
    outcome.exits_with(0).guest_says(&[("id", "1234:1234", "--user NAME")]);
    let groups = outcome.value("groups");
    outcome.check(groups.split(' ').any(|group| group == "100"), "with the groups of /etc/group");
    let outcome =
        Oriel::run(&["--root", root.text(), "--user", "nobody-here"]).script("true").finish();
    outcome.exits_with(125);
    outcome.check(outcome.stderr.contains("nobody-here"), "an unknown user is named");
}

#[test]
fn a_command_that_is_not_found_is_127() {
    let outcome = Oriel::run(&[]).guest(&["no-such-command"]).finish();
    outcome.exits_with(127);
    outcome.check(outcome.stderr.contains("no-such-command"), "it is named");
}

#[test]
fn a_command_that_cannot_be_executed_is_126() {
    let tree = Tree::new();
    tree.write("text", b"no program");
    let outcome = Oriel::run(&["-v", &tree.at("/s", "")]).guest(&["/s/text"]).finish();
    outcome.exits_with(126);
    outcome.check(outcome.stderr.contains("/s/text"), "it is named");
}

#[test]
fn a_command_that_a_signal_killed_is_128_and_the_signal() {
    Oriel::run(&[]).script("kill -9 $$").finish().exits_with(137).says_no_error();
}

#[test]
fn signals_reach_the_command_and_its_status_comes_back() {
    let script = "trap 'echo terminated; exit 9' TERM; trap 'echo interrupted' INT; echo ready
        while :; do sleep 0.1; done";
    let mut guest = Oriel::run(&[]).script(script).start();
    assert_eq!(guest.hear(), "ready");
    guest.signal(Signal::INT);
    assert_eq!(guest.hear(), "interrupted", "SIGINT");
    guest.signal(Signal::TERM);
    assert_eq!(guest.hear(), "terminated", "SIGTERM");
    guest.finish().exits_with(9);
}

#[test]
fn a_command_that_ignores_signals_is_ended_by_the_third() {
    let script = "trap 'echo no' TERM; echo ready; while :; do sleep 0.1; done";
    let mut guest = Oriel::run(&[]).script(script).timeout(Duration::from_secs(60)).start();
    assert_eq!(guest.hear(), "ready");
    for _ in 0..2 {
        guest.signal(Signal::TERM);
        assert_eq!(guest.hear(), "no");
    }
    guest.signal(Signal::TERM);
    guest.finish().exits_with(143);
}

#[test]
fn a_boot_can_be_interrupted() {
    let guest = Oriel::run(&[]).script("sleep 60").start();
    std::thread::sleep(Duration::from_millis(1500));
    // Not SIGINT: what starts the tests may have them ignore it until the program asks for it.
    guest.signal(Signal::TERM);
    let outcome = guest.finish();
    outcome.exits_with(143);
    outcome.check(outcome.took < Duration::from_secs(30), "at once");
}

#[test]
fn what_a_command_left_running_does_not_hold_the_sandbox() {
    let outcome = Oriel::run(&[]).script("sleep 1000 & echo done; exit 3").finish();
    outcome.exits_with(3);
    assert_eq!(outcome.text(), "done\n");
}
