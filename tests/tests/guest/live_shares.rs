//! Shares that come and go while the guest runs, by the commands of a user.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use integration::{Oriel, Outcome, Running, Tree};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::PROBE;

/// A sandbox's name, which no other test has at the same time.
fn name(of: &str) -> String {
    format!("test-{of}-{}", std::process::id())
}

/// `oriel ARGS` against a sandbox.
fn oriel(args: &[&str]) -> Outcome {
    Oriel::command(args).finish()
}

/// One that does what it should.
fn done(args: &[&str]) -> String {
    let outcome = oriel(args);
    outcome.exits_with(0).says_no_error();
    outcome.text().trim().to_string()
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed().as_secs() < 20, "{what}");
        sleep(Duration::from_millis(50));
    }
}

/// A tmpfs of the host's, unmounted when this is dropped.
pub(super) struct Mounted(pub(super) PathBuf);

impl Mounted {
    pub(super) fn new(path: PathBuf) -> Self {
        fs::create_dir_all(&path).unwrap();
        mount("none", &path, "tmpfs", MountFlags::empty(), c"mode=755").unwrap();
        Self(path)
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

/// Says a line to a sandbox's socket and hears one.
fn say(sandbox: &str, line: &str) -> String {
    let mut stream = UnixStream::connect(format!("/run/oriel/{sandbox}.sock")).unwrap();
    stream.write_all(line.as_bytes()).unwrap();
    let mut heard = String::new();
    BufReader::new(stream).read_line(&mut heard).unwrap();
    heard.trim_end().into()
}

/// Asks the process that has a file mapped, which the guest's shell has as 8 and 9.
fn mapped(guest: &mut Running, line: &str) -> String {
    guest.ask(&format!("echo {line} >&8; read -r line <&9; echo \"$line\""))
}

#[test]
fn shares_are_added_used_switched_to_read_only_and_removed_while_the_guest_runs() {
    let (probe, host, name) = (Tree::with_probe(PROBE), Tree::new(), name("live"));
    let name = name.as_str();
    let data = Mounted::new(host.path("data"));
    let file = |name: &str| Path::new(data.path()).join(name);
    fs::write(file("file"), "one\n").unwrap();
    fs::write(file("mapped"), [b'a'; 8192]).unwrap();
    let at = probe.at("/t", "dax=never,ro");
    let place = "/run/shares:tag=live,dax=always,window=16M";
    let mut guest =
        Oriel::run(&["-i", "--name", name, "-v", &at, "--shares", place]).guest(&["sh"]).start();
    assert_eq!(guest.ask("ls /run/shares | wc -l"), "0");
    assert!(done(&["status", name]).contains("running"));

    let share = format!("{}:/a/data", data.path());
    assert!(done(&["share", "add", name, &share]).starts_with("/run/shares/a/data: "));
    assert_eq!(guest.ask("cat /run/shares/a/data/file"), "one");
    assert_eq!(guest.ask("grep -c ' /run/shares/a/data virtiofs' /proc/mounts"), "1");
    let device = |path: &str| format!("stat -c %d {path}");
    let tree = guest.ask(&device("/run/shares/a"));
    assert_ne!(guest.ask(&device("/run/shares/a/data")), tree, "a device number of its own");
    assert_eq!(
        guest.ask("touch /run/shares/new 2>&1 | grep -o 'Read-only.*'"),
        "Read-only file system"
    );
    assert_eq!(guest.ask("echo guest >/run/shares/a/data/made; echo $?"), "0");
    assert_eq!(fs::read(file("made")).unwrap(), b"guest\n");

    // Read-only, for what is open and for what is mapped.
    assert_eq!(guest.ask("exec 3>>/run/shares/a/data/log; echo 1 >&3; echo $?"), "0");
    let start = "mkfifo /tmp/in /tmp/out; /t/guest-probe map /run/shares/a/data/mapped </tmp/in >/tmp/out 2>&1 & \
                 exec 8>/tmp/in 9</tmp/out; read -r line <&9; echo \"$line\"";
    assert_eq!(guest.ask(start), "mapped 8192");
    assert_eq!(mapped(&mut guest, "put 0 66"), "done");
    assert_eq!(
        fs::read(file("mapped")).unwrap()[0],
        b'B',
        "it is mapped from the host's page cache"
    );
    assert_eq!(done(&["share", "update", name, "/a/data", "ro"]), "/a/data: read-only");
    for change in [
        "echo 2 >&3",
        "echo x >/run/shares/a/data/file",
        "touch /run/shares/a/data/new",
        "rm /run/shares/a/data/file",
        "chmod 600 /run/shares/a/data/file",
    ] {
        let said = guest.ask(&format!("({change}) 2>&1 | grep -o 'Read-only.*' || echo it works"));
        assert_eq!(said, "Read-only file system", "{change}");
    }
    assert_eq!(mapped(&mut guest, "put 1 67"), "done", "the guest goes on");
    assert_eq!(
        (mapped(&mut guest, "get 1"), mapped(&mut guest, "get 2")),
        ("67".into(), "97".into())
    );
    assert_eq!(&fs::read(file("mapped")).unwrap()[..3], b"Baa", "its store is in no file");
    assert_eq!(fs::read(file("log")).unwrap(), b"1\n");
    assert_eq!(done(&["share", "update", name, "/a/data", "rw"]), "/a/data: writable");
    assert_eq!(mapped(&mut guest, "get 1"), "97", "the file's again");
    assert_eq!(mapped(&mut guest, "put 1 68"), "done");
    assert_eq!(&fs::read(file("mapped")).unwrap()[..3], b"BDa");
    assert_eq!(guest.ask("echo 3 >&3; echo $?"), "0");
    assert_eq!(done(&["share", "update", name, "/a/data", "ro"]), "/a/data: read-only");
    assert_eq!(mapped(&mut guest, "put 1 69"), "done");
    assert!(mapped(&mut guest, "sync").contains("Read-only"), "who syncs hears of it");
    assert_eq!(done(&["share", "update", name, "/a/data", "rw"]), "/a/data: writable");

    // What is wrong is told in a line.
    for (args, hints) in [
        (&["add", name, &share][..], &["/a/data already"][..]),
        (&["add", name, "/nonexistent:/b"], &["/nonexistent"]),
        (&["add", name, "/tmp:/a/data/b"], &["/a/data is a share"]),
        (&["add", name, "/tmp:/../b"], &["no place"]),
        (&["add", name, "/tmp:/b:locks=guest"], &["locks="]),
        (&["remove", name, "/b"], &["only at /a/data"]),
        (&["update", name, "/b", "ro"], &["only at /a/data"]),
    ] {
        oriel(&[&["share"], args].concat()).refuses(125, hints);
    }
    oriel(&["share", "add", name, "/tmp:/b:window=4M"]).refuses(2, &["window"]);
    assert!(say(name, "hello\n").contains("no request"));
    assert!(say(name, "{\"request\":\"share-remove\"}\n").contains("path"));

    // Removed: open files work on, and then nothing of it is left.
    assert_eq!(guest.ask("exec 4</run/shares/a/data/file; echo $?"), "0");
    assert!(done(&["share", "remove", name, "/a/data"]).contains("open"));
    oriel(&["share", "remove", name, "/a/data"]).refuses(125, &["nor anywhere else"]);
    assert_eq!(guest.ask("ls /run/shares | wc -l"), "0");
    let looked = guest.ask("cat /run/shares/a/data/file 2>&1 | grep -o 'No such.*'");
    assert_eq!(looked, "No such file or directory");
    assert_eq!(guest.ask("grep -c /run/shares/ /proc/mounts"), "0", "its mount is gone as well");
    assert_eq!(guest.ask("cat <&4; echo 4 >&3"), "one");
    assert_eq!(guest.ask("cd /; exec 3>&- 4<&- 8>&- 9<&-; wait; echo closed"), "closed");
    assert_eq!(fs::read(file("log")).unwrap(), b"1\n3\n4\n");
    until("nothing of it is left", || {
        let list = done(&["share", "list", name, "--json"]);
        list.contains("\"shares\": []")
    });
    unmount(&data.0, UnmountFlags::empty()).expect("nobody uses it");

    // Each has its own options; and by force.
    let other = Mounted::new(host.path("other"));
    fs::write(Path::new(other.path()).join("file"), "other\n").unwrap();
    done(&["share", "add", name, &format!("{}:/ro:ro,cache=never,xattr=off", other.path())]);
    done(&["share", "add", name, &format!("{}:/mapped:uid-map=7:0:1", other.path())]);
    assert_eq!(guest.ask("stat -c %u /run/shares/ro/file /run/shares/mapped/file | xargs"), "0 7");
    let said = guest.ask("(echo x >/run/shares/ro/file) 2>&1 | grep -o 'Read-only.*'");
    assert_eq!(said, "Read-only file system");
    assert_eq!(guest.ask("exec 5</run/shares/mapped/file; echo open"), "open");
    assert_eq!(done(&["share", "remove", name, "/mapped", "--force"]), "/mapped: removed");
    assert_eq!(done(&["share", "remove", name, "/ro", "--force"]), "/ro: removed");
    unmount(&other.0, UnmountFlags::empty()).expect("nobody uses it");
    assert_eq!(guest.ask("cat <&5 >/dev/null 2>&1 && echo it works || echo gone"), "gone");
    assert_eq!(guest.ask("ls /run/shares | wc -l; exec 5<&-"), "0");

    let metrics = done(&["stats", name, "--openmetrics"]);
    assert!(metrics.contains(
        "oriel_share_requests_total{tag=\"live\",path=\"/run/shares\",operation=\"LOOKUP\"}"
    ));
    assert!(metrics.contains("oriel_share_members{tag=\"live\",path=\"/run/shares\"} 0"));
    assert!(metrics.ends_with("# EOF"));
    assert_eq!(say(name, "{\"request\":\"stop\"}\n"), "{\"ok\":{}}");
    let socket = format!("/run/oriel/{name}.sock");
    until("it stops", || !Path::new(&socket).exists());
    guest.finish().exits_with(128 + 15);
}
