//! What goes wrong on the host is an error to who asked for it in the guest, and to nobody else.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use integration::{Oriel, Running, Tree};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::Signal;

/// A tmpfs in a tree, for as long as it lives.
struct Disk(PathBuf);

impl Disk {
    /// `None` where the kernel does not know one of the options.
    fn mount(tree: &Tree, name: &str, options: &std::ffi::CStr) -> Option<Self> {
        let path = tree.path(name);
        fs::create_dir(&path).unwrap();
        mount("tmpfs", &path, "tmpfs", MountFlags::empty(), Some(options)).ok()?;
        Some(Self(path))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = unmount(&self.0, UnmountFlags::DETACH);
    }
}

#[track_caller]
fn others_go_on(guest: &mut Running) {
    assert_eq!(guest.ask("cat /o/file"), "well");
    assert_eq!(guest.ask("echo made >/o/new && cat /o/new && rm /o/new"), "made");
}

#[test]
fn what_the_host_cannot_do_is_an_error_to_who_asked_and_the_rest_goes_on() {
    let (tree, other, gone) = (Tree::new(), Tree::new(), Tree::new());
    other.write("file", b"well\n");
    gone.write("file", b"soon gone\n");
    let _small = Disk::mount(&tree, "small", c"size=1m").unwrap();
    let quota = Disk::mount(&tree, "quota", c"size=16m,usrquota,usrquota_block_hardlimit=1m");
    if quota.is_some() {
        tree.write("quota/file", b"");
        std::os::unix::fs::chown(tree.path("quota/file"), Some(1000), Some(1000)).unwrap();
    }
    // Descriptors enough for a sandbox, and for three shares some 40 open files each.
    let mut guest = Oriel::run(&["-i", "-v", &tree.at("/s", "cache=never")])
        .args(&["-v", &other.at("/o", "cache=never"), "-v", &gone.at("/g", "cache=never")])
        .script(r#"while read -r command; do eval "$command" 2>&1; done"#)
        .under(&["prlimit", "--nofile=512:512"])
        .start();
    others_go_on(&mut guest);

    let fill = |file: &str| format!("dd if=/dev/zero of={file} bs=64k count=64 conv=notrunc 2>&1");
    let said = guest.ask(&format!("{} | grep -o 'No space left on device'", fill("/s/small/a")));
    assert_eq!(said, "No space left on device");
    others_go_on(&mut guest);
    assert_eq!(guest.ask("rm /s/small/a; echo room >/s/small/b; cat /s/small/b"), "room");

    if quota.is_some() {
        let said = guest.ask(&format!("{} | grep -o 'uota exceeded'", fill("/s/quota/file")));
        assert_eq!(said, "uota exceeded");
        others_go_on(&mut guest);
    } else {
        println!("this kernel has no quotas on tmpfs: EDQUOT is not tested");
    }

    // More open files than there may be. Those that are open stay so, and when they go there is room again.
    guest.say("for i in $(seq 60); do { exec sleep 300 </o/file; } 2>>/tmp/errors & done");
    let refused = "sleep 1; while [ $(($(pidof sleep | wc -w) + $(wc -l </tmp/errors))) -lt 60 ]; do sleep 0.2; done; \
                   grep -c 'oo many open files' /tmp/errors";
    let refused: u32 = guest.ask(refused).parse().unwrap();
    assert!((1..60).contains(&refused), "{refused} of 60");
    assert_eq!(guest.ask("killall sleep; wait; cat /o/file"), "well");

    fs::remove_dir_all(gone.path("")).unwrap();
    for command in ["cat /g/file", "echo new >/g/new", "mkdir /g/d"] {
        let said = guest
            .ask(&format!("{{ {command}; }} 2>&1 | grep -c -e 'No such' -e nonexistent -e tale"));
        assert_eq!(said, "1", "{command}");
    }
    others_go_on(&mut guest);

    guest.signal(Signal::STOP);
    std::thread::sleep(Duration::from_secs(3));
    guest.signal(Signal::CONT);
    others_go_on(&mut guest);
    let outcome = guest.finish();
    outcome.exits_with(0);
    fs::create_dir(gone.path("")).unwrap();
}

/// A place for groups of processes whose memory is limited: the host's, or one that is mounted for it.
fn cgroups(tree: &Tree) -> (PathBuf, Option<Disk>) {
    let hosts = Path::new("/sys/fs/cgroup");
    if hosts.join("cgroup.controllers").exists() {
        return (hosts.to_owned(), None);
    }
    let path = tree.path("cgroups");
    fs::create_dir(&path).unwrap();
    mount("cgroup2", &path, "cgroup2", MountFlags::empty(), None).unwrap();
    (path.clone(), Some(Disk(path)))
}

#[test]
fn a_sandbox_that_the_host_kills_for_its_memory_leaves_nothing_and_can_be_started_again() {
    let (tree, data) = (Tree::new(), Tree::new());
    let (groups, _mounted) = cgroups(&tree);
    let controllers = fs::read_to_string(groups.join("cgroup.controllers")).unwrap();
    if !controllers.split_whitespace().any(|one| one == "memory") {
        println!("this host does not limit memory by cgroups: not tested");
        return;
    }
    let _ = fs::write(groups.join("cgroup.subtree_control"), "+memory");
    let name = format!("test-oom-{}", std::process::id());
    let group = groups.join(&name);
    fs::create_dir(&group).unwrap();
    fs::write(group.join("memory.max"), "320M").unwrap();
    let _ = fs::write(group.join("memory.swap.max"), "0");
    let enter = format!("echo $$ >{}/cgroup.procs; exec \"$@\"", group.display());
    let outcome = Oriel::run(&["--name", &name, "-m", "1G", "-v", &data.at("/s", "dax=never")])
        .script(
            "echo kept >/s/file; sync; mount -o remount,size=900m /tmp 2>/dev/null; \
                 dd if=/dev/zero of=/tmp/much bs=1M count=800; echo survived",
        )
        .under(&["sh", "-c", &enter, "sh"])
        .finish();
    outcome.check(outcome.status == 128 + 9, "the host has killed it");
    assert_eq!(data.read("file"), b"kept\n");
    fs::remove_dir(&group).unwrap();
    let listed = Oriel::command(&["ps", "--quiet"]).finish();
    listed.check(!listed.text().contains(&name), "it runs no more");
    assert!(!Path::new(&format!("/run/oriel/{name}.sock")).exists());
    let outcome = Oriel::run(&["--name", &name, "-v", &data.at("/s", "")])
        .guest(&["cat", "/s/file"])
        .finish();
    outcome.exits_with(0);
    assert_eq!(outcome.text(), "kept\n");
}
