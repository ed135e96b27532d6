//! What the process that runs a guest has of the host, looked at from outside.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use integration::{Oriel, Running, Tree};

/// Capabilities by their numbers in linux/capability.h.
const CHOWN: u32 = 0;
const DAC_OVERRIDE: u32 = 1;
const DAC_READ_SEARCH: u32 = 2;
const FOWNER: u32 = 3;
const FSETID: u32 = 4;
const SETGID: u32 = 6;
const SETUID: u32 = 7;

fn of(guest: &Running, file: &str) -> String {
    fs::read_to_string(format!("/proc/{}/{file}", guest.process_id())).unwrap()
}

/// The lines of /proc/PID/status, of the process and of each of its threads.
fn threads(guest: &Running) -> Vec<BTreeMap<String, String>> {
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.process_id())).unwrap();
    let status = |task: fs::DirEntry| {
        // A thread may have ended since.
        let text = fs::read_to_string(task.path().join("status")).ok()?;
        let pairs = text.lines().filter_map(|line| line.split_once(':'));
        Some(pairs.map(|(name, value)| (name.to_string(), value.trim().to_string())).collect())
    };
    tasks.flatten().filter_map(status).collect()
}

/// It has filters of system calls: the two that the process has, and the two of its own kind.
fn is_filtered(thread: &BTreeMap<String, String>) {
    let name = &thread["Name"];
    assert_eq!(thread["Seccomp"], "2", "{name}");
    // Linux 5.9.
    if let Some(filters) = thread.get("Seccomp_filters") {
        assert!(filters.parse::<u32>().unwrap() >= 4, "{name}: {filters} filters");
    }
}

fn set(capabilities: &[u32]) -> String {
    format!("{:016x}", capabilities.iter().fold(0u64, |set, number| set | 1 << number))
}

fn names(directory: &str) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(directory)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn of_the_host_a_sandbox_has_its_shares_and_no_right_that_they_do_not_need() {
    let (tree, read) = (Tree::new(), Tree::new());
    tree.write("file", b"one\n");
    let sockets = Tree::new();
    let vsock = sockets.path("box.sock");
    let args = ["-i", "-v", &tree.at("/s", ""), "-v", &read.at("/r", "ro"), "--vsock"];
    let mut guest = Oriel::run(&args).args(&[vsock.to_str().unwrap()]).guest(&["sh"]).start();
    assert_eq!(guest.ask("cat /s/file; echo two >/s/new"), "one");
    let expected = set(&[CHOWN, DAC_OVERRIDE, DAC_READ_SEARCH, FOWNER, FSETID, SETGID, SETUID]);
    let threads = threads(&guest);
    assert!(threads.len() > 3, "{threads:?}");
    for thread in threads {
        let name = &thread["Name"];
        assert_eq!(thread["NoNewPrivs"], "1", "{name}");
        is_filtered(&thread);
        assert_eq!((&thread["CapPrm"], &thread["CapEff"]), (&expected, &expected), "{name}");
        for none in ["CapInh", "CapBnd", "CapAmb"] {
            assert_eq!(thread[none], set(&[]), "{name}: {none}");
        }
    }
    let limits = of(&guest, "limits");
    for limit in ["Max core file size", "Max locked memory"] {
        let line = limits.lines().find(|line| line.starts_with(limit)).unwrap();
        assert_eq!(line.split_whitespace().rev().nth(1), Some("0"), "{line}");
    }

    // Its root directory.
    let root = format!("/proc/{}/root", guest.process_id());
    let mounts = of(&guest, "mountinfo");
    let flags = |at: &str| {
        let fields = |line: &str| {
            let mut fields = line.split(' ').skip(4);
            (fields.next() == Some(at)).then(|| fields.next().unwrap().to_string())
        };
        mounts.lines().find_map(fields).unwrap_or_else(|| panic!("{at} in {mounts}"))
    };
    for at in ["/", "/.share/0", "/.share/1", "/proc/self/fd", sockets.text()] {
        assert!(flags(at).contains("nodev") && flags(at).contains("noexec") || at == "/", "{at}");
    }
    assert!(flags("/.share/0").starts_with("rw,") && flags("/.share/1").starts_with("ro,"));
    assert!(flags("/").starts_with("ro,"));
    assert_eq!(names(&format!("{root}/.share")), ["0", "1"]);
    assert_eq!(names(&format!("{root}/proc")), ["self"]);
    for absent in ["etc", "usr", "proc/self/root", "proc/1", "dev", "sys", "root", "var"] {
        assert!(fs::symlink_metadata(format!("{root}/{absent}")).is_err(), "{absent}");
    }
    assert_eq!(mounts.lines().count(), 5, "{mounts}");
    guest.finish().exits_with(0);
    assert!(!vsock.exists());
}

#[test]
fn who_only_reads_keeps_nothing_to_change_files_with() {
    let tree = Tree::new();
    tree.write("file", b"one\n");
    let mut guest = Oriel::run(&["-i", "-v", &tree.at("/s", "ro")]).guest(&["sh"]).start();
    assert_eq!(guest.ask("cat /s/file"), "one");
    for thread in threads(&guest) {
        assert_eq!(thread["CapPrm"], set(&[DAC_READ_SEARCH, FOWNER]));
    }
    guest.finish().exits_with(0);
}

#[test]
fn a_directory_is_added_by_its_descriptor_and_not_by_its_name() {
    let (tree, name) = (Tree::new(), format!("test-walls-{}", std::process::id()));
    tree.write("file", b"one\n");
    let mut guest = Oriel::run(&["-i", "--name", &name, "--shares", "/s"]).guest(&["sh"]).start();
    assert_eq!(guest.ask("ls /s | wc -l"), "0");
    let mut stream = UnixStream::connect(format!("/run/oriel/{name}.sock")).unwrap();
    let add = format!(r#"{{"request":"share-add","host":"{}","path":"/a"}}"#, tree.text());
    stream.write_all(format!("{add}\n").as_bytes()).unwrap();
    let mut heard = String::new();
    BufReader::new(&stream).read_line(&mut heard).unwrap();
    assert!(heard.contains("SCM_RIGHTS") && heard.contains(tree.text()), "{heard}");
    let share = format!("{}:/a", tree.text());
    Oriel::command(&["share", "add", &name, &share]).finish().exits_with(0).says_no_error();
    assert_eq!(guest.ask("cat /s/a/file"), "one");
    // One of the control socket and one of streams are among them, and those that came with the share.
    threads(&guest).iter().for_each(is_filtered);
    let list = Oriel::command(&["share", "list", &name]).finish();
    list.check(list.text().contains(tree.text()), "it has the name that it has on the host");
    guest.finish().exits_with(0);
}

#[test]
fn without_walls_it_says_so_and_has_all_that_the_user_has() {
    let tree = Tree::new();
    tree.write("file", b"one\n");
    let args = ["-i", "--no-sandbox", "-v", &tree.at("/s", "")];
    let mut guest = Oriel::run(&args).guest(&["sh"]).start();
    assert_eq!(guest.ask("cat /s/file"), "one");
    assert!(threads(&guest).iter().all(|thread| thread["NoNewPrivs"] == "0"));
    assert!(threads(&guest).iter().all(|thread| thread["Seccomp"] == "0"));
    assert!(fs::exists(format!("/proc/{}/root/etc", guest.process_id())).unwrap());
    let outcome = guest.finish();
    outcome.exits_with(0);
    outcome.check(outcome.stderr.lines().count() == 1, "one line");
    outcome.check(outcome.stderr.contains("--no-sandbox"), "that names the option");
}
