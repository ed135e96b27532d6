//! Pages of mapped files that go away: whoever takes them, the guest loses a process or reads zeros, and the
//! machine goes on.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use integration::{Oriel, Running, Tree, text};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::PROBE;

const MIB: usize = 1 << 20;

/// A guest that maps one file after another, as it is told, and what each of them is to it.
fn guest(tree: &Tree, options: &str, files: &[&str]) -> Running {
    let script: Vec<String> =
        files.iter().map(|file| format!("/s/guest-probe map /s/{file}")).collect();
    let share = tree.at("/s", options);
    Oriel::run(&["-i", "-v", &share]).script(&script.join(" && ")).start()
}

#[track_caller]
fn is_lost(answer: &str) {
    assert!(
        answer == "signal 7" || answer == "value 0",
        "a page that is gone is a SIGBUS or zeros, not {answer:?}"
    );
}

fn open(tree: &Tree, name: &str) -> File {
    OpenOptions::new().read(true).write(true).open(tree.path(name)).unwrap()
}

/// Asks until the answer is this one. What the host does to a file reaches a guest that sends no request
/// within a tenth of a second; on a slow machine it may be more.
#[track_caller]
fn soon(guest: &mut Running, question: &str, answer: &str) {
    let start = Instant::now();
    loop {
        let found = guest.ask(question);
        if found == answer {
            return;
        }
        assert!(start.elapsed() < Duration::from_secs(10), "{question}: {found}, not {answer}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_file_that_is_cut_removed_or_replaced_by_anybody_costs_no_more_than_a_process() {
    let files = ["by-host", "by-guest", "by-other", "removed", "replaced"];
    let tree = Tree::with_probe(PROBE);
    for name in files {
        tree.fill(name, 4 * MIB);
    }
    let mut guest = guest(&tree, "dax=always,cache=never", &files);

    assert_eq!(guest.hear(), format!("mapped {}", 4 * MIB));
    assert_eq!(guest.ask(&format!("get {}", 3 * MIB)), "7");
    let file = open(&tree, "by-host");
    file.set_len(8192).unwrap();
    is_lost(&guest.ask(&format!("touch {}", 3 * MIB)));
    is_lost(&guest.ask("touch 8192"));
    assert_eq!(guest.ask("get 8191"), "7", "what is left is as it was");
    // The page as the buffer of a request: an error or zeros, in either direction.
    for question in ["store 8192 /s/copy", "load 8192 /s/guest-probe"] {
        let answer = guest.ask(question);
        assert!(["4096", "errno 14", "errno 5"].contains(&answer.as_str()), "{question}: {answer}");
    }
    file.set_len(4 * MIB as u64).unwrap();
    file.write_all_at(&[9], 3 * MIB as u64).unwrap();
    soon(&mut guest, &format!("get {}", 3 * MIB), "9");
    assert_eq!(guest.ask(&format!("put {} 8", 3 * MIB)), "done");
    assert_eq!(tree.read("by-host")[3 * MIB], 8, "the file's own page again");
    assert_eq!(guest.ask("end"), format!("mapped {}", 4 * MIB));

    assert_eq!(guest.ask(&format!("get {}", 3 * MIB)), "7");
    assert_eq!(guest.ask("grow 8192"), "done");
    let lost = guest.ask(&format!("touch {}", 3 * MIB));
    assert_eq!(lost, "signal 7", "what the guest itself cut off its kernel knows to be gone");
    assert_eq!(guest.ask("get 8191"), "7");
    assert_eq!(guest.ask("end"), format!("mapped {}", 4 * MIB));

    assert_eq!(guest.ask(&format!("get {}", 3 * MIB)), "7");
    let other = Oriel::run(&["-v", &tree.at("/s", "dax=always")])
        .guest(&["/s/guest-probe", "cut", "/s/by-other", "4096"])
        .finish();
    other.exits_with(0);
    is_lost(&guest.ask(&format!("touch {}", 3 * MIB)));
    assert_eq!(guest.ask("get 4095"), "7");
    assert_eq!(guest.ask("end"), format!("mapped {}", 4 * MIB));

    fs::remove_file(tree.path("removed")).unwrap();
    for at in [0, 3 * MIB] {
        assert_eq!(guest.ask(&format!("get {at}")), "7", "a file without a name is still there");
    }
    assert_eq!(guest.ask("put 5 6"), "done");
    assert_eq!(guest.ask("get 5"), "6");
    assert_eq!(guest.ask("end"), format!("mapped {}", 4 * MIB));

    tree.write("new", &[3; 8192]);
    fs::rename(tree.path("new"), tree.path("replaced")).unwrap();
    assert_eq!(guest.ask(&format!("get {}", 3 * MIB)), "7", "the mapping is of the old file");
    assert_eq!(guest.ask("put 0 4"), "done");
    assert_eq!(tree.read("replaced"), [3; 8192], "and the new one is not touched");
    guest.finish().exits_with(0);
}

/// What is mounted in a tree, and the process that serves it. Unmounted when dropped.
pub(super) struct Mounted<'t>(&'t Tree, &'t str, Option<Child>);

impl Mounted<'_> {
    /// The process that serves it.
    pub(super) fn server(&mut self) -> &mut Child {
        self.2.as_mut().expect("a file system that is served")
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        if let Some(server) = &mut self.2 {
            let _ = server.kill();
            let _ = server.wait();
        }
        let _ = unmount(self.0.path(self.1), UnmountFlags::DETACH);
    }
}

#[test]
fn a_write_that_finds_the_disk_full_waits_for_room_and_then_goes_on() {
    let tree = Tree::with_probe(PROBE);
    fs::create_dir(tree.path("disk")).unwrap();
    mount("tmpfs", tree.path("disk"), "tmpfs", MountFlags::empty(), Some(c"size=4m")).unwrap();
    let _mounted = Mounted(&tree, "disk", None);
    let sparse = File::create(tree.path("disk/sparse")).unwrap();
    sparse.set_len(8 * MIB as u64).unwrap();
    let mut guest = guest(&tree, "dax=always", &["disk/sparse"]);
    assert_eq!(guest.hear(), format!("mapped {}", 8 * MIB));
    assert_eq!(guest.ask("put 0 1"), "done");
    let mut filler = File::create(tree.path("disk/filler")).unwrap();
    while std::io::Write::write_all(&mut filler, &[1; 4096]).is_ok() {}
    guest.say(&format!("put {} 2", 4 * MIB));
    std::thread::sleep(Duration::from_secs(2));
    filler.set_len(0).unwrap();
    assert_eq!(guest.hear(), "done");
    assert_eq!(guest.ask(&format!("get {}", 4 * MIB)), "2");
    let mut byte = [0];
    open(&tree, "disk/sparse").read_exact_at(&mut byte, 4 * MIB as u64).unwrap();
    assert_eq!(byte, [2], "what was written while the disk was full is in the file");
    let outcome = guest.finish();
    outcome.exits_with(0);
    outcome.check(outcome.stderr.contains("disk of the host is full"), "the host is told");
}

/// Where the program that mounts a share on the host is.
const SERVER: &str = env!("CARGO_BIN_EXE_share-on-fuse");

/// Makes a directory `net` in the tree and mounts there, by a process of its own, another tree, which has a file
/// `far`.
pub(super) fn serve<'t>(tree: &'t Tree, served: &Tree) -> Mounted<'t> {
    served.fill("far", 4 * MIB);
    fs::create_dir(tree.path("net")).unwrap();
    let mut server = Command::new(SERVER)
        .args([served.text(), text(&tree.path("net"))])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while !tree.path("net/far").exists() {
        assert!(start.elapsed() < Duration::from_secs(20), "nothing is mounted");
        assert_eq!(server.try_wait().unwrap(), None, "the server ended");
        std::thread::sleep(Duration::from_millis(20));
    }
    Mounted(tree, "net", Some(server))
}

#[test]
fn a_file_whose_server_is_gone_is_zeros_and_the_others_are_not_touched() {
    let tree = Tree::with_probe(PROBE);
    let served = Tree::new();
    tree.fill("near", 4 * MIB);
    let mut mounted = serve(&tree, &served);
    let mut guest = guest(&tree, "dax=always,cache=always", &["net/far", "near"]);
    assert_eq!(guest.hear(), format!("mapped {}", 4 * MIB));
    assert_eq!(guest.ask("get 0"), "7");
    mounted.server().kill().unwrap();
    mounted.server().wait().unwrap();
    is_lost(&guest.ask(&format!("touch {}", 3 * MIB)));
    guest.say("end");
    assert_eq!(guest.hear(), format!("mapped {}", 4 * MIB));
    assert_eq!(guest.ask(&format!("get {}", 3 * MIB)), "7", "the machine goes on");
    guest.finish().exits_with(0);
}
