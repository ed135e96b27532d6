//! A window that is made larger while its guest runs, and the socket by which that is asked for.

use std::os::unix::fs::PermissionsExt;

use integration::{Oriel, Outcome, Running, Tree, noise, sha256};

const MIB: usize = 1 << 20;

/// A name that no other test has at the same time.
fn name(of: &str) -> String {
    format!("test-{of}-{}", std::process::id())
}

/// A directory for the sockets of an ordinary user. Root's are in /run/oriel.
fn runtime() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// `oriel ARGS` against a sandbox.
fn oriel(runtime: &tempfile::TempDir, args: &[&str]) -> Outcome {
    Oriel::command(args).env("XDG_RUNTIME_DIR", runtime.path()).finish()
}

/// How many ranges are mapped now, and the window's size in MiB.
fn window(runtime: &tempfile::TempDir, name: &str) -> (u64, u64) {
    let outcome = oriel(runtime, &["stats", name]);
    outcome.exits_with(0).says_no_error();
    let stats: serde_json::Value = serde_json::from_slice(&outcome.stdout).unwrap();
    let share = &stats["shares"][0];
    let number = |value: &serde_json::Value| value.as_u64().unwrap_or_else(|| panic!("{stats}"));
    (number(&share["counters"]["dax_live"]), number(&share["window"]["size"]) >> 20)
}

/// What the README says to do in the guest, as a line.
const SET_UP_AGAIN: &str = "umount /s && \
    for fs in /sys/fs/virtiofs/*; do [ \"$(cat $fs/tag)\" = share0 ] && device=$(basename $(readlink $fs/device)); done && \
    echo $device >/sys/bus/virtio/drivers/virtiofs/unbind && \
    echo $device >/sys/bus/virtio/drivers/virtiofs/bind && \
    mount -t virtiofs -o dax=always share0 /s; echo $?";

#[test]
fn a_window_is_larger_once_the_guest_sets_up_the_device_again_without_a_reboot() {
    let (tree, runtime, name) = (Tree::new(), runtime(), name("grow"));
    tree.write("data", &noise(32 * MIB, 7));
    let sum = format!("{}  -", sha256(&tree.path("data")));
    let share = tree.at("/s", "dax=always,window=8M,window-max=64M");
    let mut guest = Oriel::run(&["-i", "--name", &name, "-v", &share])
        .env("XDG_RUNTIME_DIR", runtime.path())
        .guest(&["sh"])
        .start();
    let hash = |guest: &mut Running| guest.ask("sha256sum </s/data");
    assert_eq!(hash(&mut guest), sum);
    let (live, size) = window(&runtime, &name);
    assert!(live <= 4 && size == 8, "{live} ranges of 2 MiB in {size} MiB");

    let resized = oriel(&runtime, &["share", "resize", &name, "/s", "64M"]);
    resized.exits_with(0).says_no_error();
    resized.check(resized.text().contains("unbind"), "it says when the guest sees it");
    assert_eq!(hash(&mut guest), sum, "the stock driver goes on with what it has");
    let (live, size) = window(&runtime, &name);
    assert!(live <= 4 && size == 64, "{live} ranges of 2 MiB in {size} MiB");

    assert_eq!(guest.ask(SET_UP_AGAIN), "0");
    assert_eq!(hash(&mut guest), sum);
    assert_eq!(window(&runtime, &name), (16, 64), "all of the file is mapped");
    let uptime = guest.ask("cut -d. -f1 /proc/uptime");
    assert_ne!(uptime, "0", "it is the same boot");

    for (arguments, hints) in [
        (["/s", "32M"], &["32 MiB", "64 MiB", "only grows"][..]),
        (["/s", "66M"], &["66 MiB", "64 MiB", "window-max"]),
        (["/t", "66M"], &["/t", "/s"]),
    ] {
        let [path, size] = arguments;
        oriel(&runtime, &["share", "resize", &name, path, size]).refuses(125, hints);
    }
    oriel(&runtime, &["share", "resize", &name, "/s", "65M"]).refuses(2, &["65M", "2 MiB"]);
    let taken = Oriel::refused(&["--name", &name, "true"]).env("XDG_RUNTIME_DIR", runtime.path());
    taken.finish().refuses(125, &["--name", &name, "runs already"]);
    guest.finish().exits_with(0).says_no_error();
    oriel(&runtime, &["stats", &name]).refuses(125, &["no sandbox", &name]);
}

#[test]
fn the_name_of_a_killed_sandbox_can_be_used_again() {
    let (runtime, name) = (runtime(), name("killed"));
    let start = || {
        let run = Oriel::run(&["-i", "--name", &name]).env("XDG_RUNTIME_DIR", runtime.path());
        let mut guest = run.guest(&["cat"]).start();
        assert_eq!(guest.ask("hello"), "hello");
        guest
    };
    let guest = start();
    guest.signal(rustix::process::Signal::KILL);
    assert_eq!(guest.finish().status, 128 + 9);
    oriel(&runtime, &["stats", &name]).refuses(125, &["no sandbox"]);
    let guest = start();
    let outcome = oriel(&runtime, &["stats", &name]);
    outcome.exits_with(0);
    assert_eq!(outcome.text().split_whitespace().collect::<String>(), r#"{"shares":[]}"#);
    let directory = match rustix::process::geteuid().is_root() {
        true => "/run/oriel".into(),
        false => runtime.path().join("oriel"),
    };
    let socket = directory.join(format!("{name}.sock"));
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    guest.finish().exits_with(0).says_no_error();
    assert!(!socket.exists());
}
