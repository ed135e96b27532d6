//! Locks between two sandboxes that share a directory, and the host.

use std::time::Duration;

use integration::{Locker, Oriel, Running, Tree};

use super::PROBE;

/// Two guests boot side by side.
const TIMEOUT: Duration = Duration::from_secs(180);

fn act(guest: &mut Running, command: &str, expected: &str) {
    assert_eq!(guest.ask(command), expected, "{command}");
}

#[test]
fn locks_hold_between_two_sandboxes_and_the_host() {
    let tree = Tree::with_probe(PROBE);
    tree.write("file", b"text");
    let sandbox = |script| {
        Oriel::run(&["-i", "-v", &tree.at("/s", "")]).timeout(TIMEOUT).script(script).start()
    };
    let probe = "exec /s/guest-probe lock /s/file";
    // At its end it leaves a process behind that waits for a lock which it will not get.
    let leaves = r#"
        /s/guest-probe lock /s/file
        { echo "wait write 0 0"; sleep 1000; } | /s/guest-probe lock /s/file &
        sleep 1
        exit 7
    "#;
    let (mut one, mut two) = (sandbox(probe), sandbox(leaves));
    let mut host = Locker::start(PROBE, &tree.path("file"));
    assert_eq!((one.hear(), two.hear()), ("ready".into(), "ready".into()));

    act(&mut one, "set write 0 10", "ok");
    act(&mut two, "set read 5 1", "busy");
    host.act("set read 5 1", "busy");
    act(&mut two, "get read 5 1", "write 0 10 0");
    host.act("get read 5 1", "write 0 10 -1");
    host.act("set write 20 10", "ok");
    act(&mut one, "get write 0 0", "write 20 10 0");
    act(&mut two, "set write 10 20", "busy");

    two.say("wait write 0 10");
    act(&mut one, "touch", "ok");
    assert_eq!(two.hear(), "ok", "closing a file gives up the locks of the process");
    one.say("wait write 20 10");
    host.act("set none 0 0", "ok");
    assert_eq!(one.hear(), "ok", "the host has given it up");

    act(&mut one, "flock write", "ok");
    act(&mut two, "flock read", "busy");
    host.act("flock read", "busy");
    // A sandbox that dies has no locks.
    two.say("flockwait write");
    drop(one);
    assert_eq!(two.hear(), "ok");
    host.act("wait write 20 10", "ok");
    host.act("flock read", "busy");

    act(&mut two, "set none 0 0", "ok");
    host.act("set write 0 0", "ok");
    let outcome = two.finish();
    outcome.exits_with(7);
}
