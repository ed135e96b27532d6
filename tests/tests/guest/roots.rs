//! A host directory as the guest's root.

use std::fs;
use std::os::unix::fs::MetadataExt;

use integration::{Oriel, Tree};

#[test]
fn a_writable_root_is_the_hosts_directory() {
    let root = Tree::root();
    root.write("greeting", b"hello\n");
    let script = r#"
        echo "greeting=$(cat /greeting)"
        echo "root=$(grep ' / ' /proc/mounts)"
        echo "from the guest" >/answer
        mkdir -p /made/by/guest
        busybox chown 1000:100 /made
        busybox chmod 0701 /made
        busybox ln -s ../outside /made/link
        rm /etc/passwd
        busybox ps >/dev/null && echo "proc=mounted"
        echo "devices=$([ -c /dev/null ] && [ -c /dev/ttyS0 ] && echo there)"
        echo x >/tmp/in-memory && echo "tmp=writable"
    "#;
    let outcome = Oriel::run(&["--root", root.text()]).script(script).finish();
    outcome.exits_with(0).says_no_error().guest_says(&[
        ("greeting", "hello", "the host's files are the guest's"),
        ("proc", "mounted", "/proc"),
        ("devices", "there", "/dev"),
        ("tmp", "writable", "/tmp"),
    ]);
    let mounted = outcome.value("root");
    outcome.check(mounted.starts_with("root / virtiofs rw"), "the root is virtio-fs, writable");
    assert_eq!(root.read("answer"), b"from the guest\n", "what the guest writes is the host's");
    let made = fs::metadata(root.path("made")).unwrap();
    assert_eq!((made.uid(), made.gid()), (1000, 100), "with the guest's owner");
    assert_eq!(made.mode() & 0o7777, 0o701, "and the guest's mode");
    assert!(root.path("made/by/guest").is_dir(), "mkdir -p");
    let link = fs::read_link(root.path("made/link")).unwrap();
    assert_eq!(link.to_str(), Some("../outside"), "a symbolic link as it is");
    assert!(!root.path("etc/passwd").exists(), "what the guest removes is gone");
    assert!(root.names("tmp").is_empty(), "the guest's /tmp is its own");
    assert!(root.names("dev").is_empty(), "the guest's /dev is its own");
}

#[test]
fn a_read_only_root_stays_read_only_whatever_the_guest_does() {
    let root = Tree::root();
    root.write("kept", b"as it was");
    let before = root.names(".");
    let script = r#"
        echo x 2>/dev/null >/new || echo "before=refused"
        mount -o remount,rw / && echo "remounted=yes"
        echo "root=$(grep ' / ' /proc/mounts)"
        echo "error=$(touch /new 2>&1)"
        echo "change=$( (echo x >/kept) 2>&1)"
        echo "remove=$(rm /kept 2>&1)"
    "#;
    let outcome = Oriel::run(&["--root", &format!("{}:ro", root.text())]).script(script).finish();
    outcome.exits_with(0).guest_says(&[("before", "refused", "it is mounted read-only")]);
    let error = outcome.value("error");
    outcome.check(error.contains("Read-only file system"), "the host refuses a file");
    outcome.check(
        outcome.value("change").contains("Read-only file system"),
        "the host refuses a change",
    );
    outcome.check(
        outcome.value("remove").contains("Read-only file system"),
        "the host refuses a removal",
    );
    assert_eq!(root.read("kept"), b"as it was");
    assert_eq!(root.names("."), before, "nothing has been made");
}

#[test]
fn an_overlay_keeps_writes_in_the_guest() {
    let root = Tree::root();
    root.write("kept", b"as it was");
    let script = r#"
        echo changed >/kept && echo "kept=$(cat /kept)"
        rm /etc/passwd && ls /etc/passwd 2>/dev/null || echo "removed=yes"
        mkdir /new && echo x >/new/file && echo "new=$(cat /new/file)"
        busybox mv /bin/touch /bin/moved && echo "moved=$(ls /bin/moved)"
        echo "root=$(grep ' / ' /proc/mounts)"
        mkdir /under && busybox mount -t virtiofs root /under
        busybox mount -o remount,rw /under 2>/dev/null
        (echo changed >/under/kept) 2>/dev/null || echo "under=refused"
    "#;
    let outcome =
        Oriel::run(&["--root", &format!("{}:overlay", root.text())]).script(script).finish();
    outcome.exits_with(0).says_no_error().guest_says(&[
        ("kept", "changed", "the guest sees its change"),
        ("removed", "yes", "the guest sees its removal"),
        ("new", "x", "the guest sees its file"),
        ("moved", "/bin/moved", "the guest sees its rename"),
        ("under", "refused", "the host refuses a write that goes around the overlay"),
    ]);
    outcome.check(outcome.value("root").contains("overlay"), "the root is an overlay");
    assert_eq!(root.read("kept"), b"as it was", "the host's file is as it was");
    assert!(root.path("etc/passwd").exists(), "the host's file is still there");
    assert!(!root.path("new").exists(), "nothing has been made on the host");
    assert!(root.path("bin/touch").is_symlink(), "nothing has been renamed on the host");
}

#[test]
fn the_hosts_own_userland_runs_in_a_guest() {
    let script = r#"
        echo "release=$(sha256sum </etc/os-release)"
        echo "env=$(/usr/bin/env -i A=b /usr/bin/env)"
        echo "list=$(ls -A / | wc -l)"
        echo "bash=$(/bin/bash -c 'echo $BASH_VERSION')"
        echo x >/etc/oriel-test-file && echo "written=yes"
        echo "maps=$(grep -c libc.so /proc/self/maps)"
        mkdir /under && mount -t virtiofs root /under
        cat /under/proc/self/environ >/dev/null 2>&1 || echo "proc=closed"
        [ -x /usr/bin/python3 ] && echo "python=$(python3 -c 'print(6 * 7)')" || echo python=42
    "#;
    let outcome = Oriel::run(&["--root", "/:overlay", "-u", "0:0"]).script(script).finish();
    outcome.exits_with(0).guest_says(&[
        ("env", "A=b", "a dynamically linked program of the host"),
        ("written", "yes", "the guest may write"),
        ("python", "42", "python, where the host has it"),
        ("proc", "closed", "the host's processes are not the guest's to read"),
    ]);
    let output =
        std::process::Command::new("sh").args(["-c", "sha256sum </etc/os-release"]).output();
    let host = String::from_utf8(output.unwrap().stdout).unwrap();
    outcome.check(outcome.value("release") == host.trim(), "/etc/os-release is the host's");
    outcome.check(!outcome.value("bash").is_empty(), "the host's bash");
    assert!(!fs::exists("/etc/oriel-test-file").unwrap(), "and not on the host");
}
