//! What the guest may keep, and when it is told.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use super::*;
use crate::fuse::abi::*;
use crate::fuse::opcode::Opcode;
use crate::fuse::testing::Guest;
use crate::share::{CachePolicy, LockPolicy, Options};
use vm_memory::ByteValued;

const AGENT: u32 = 4711;

/// A guest with an agent, where the host has fanotify.
fn guest(change: impl FnOnce(&mut Options)) -> Option<Guest> {
    let guest = Guest::with(|options| {
        options.cache = CachePolicy::Watch;
        change(options);
    });
    let watch = guest.share.watch()?;
    watch.connected(AGENT);
    // A file system without handles is not watched.
    let probe = FileHandle::of(fs::File::open(guest.path()).unwrap());
    probe.ok().map(|_| guest)
}

/// Changes on the host are another process's.
fn host(guest: &Guest, script: &str) {
    let status = Command::new("sh").args(["-ec", script]).current_dir(guest.path()).status();
    assert!(status.unwrap().success(), "{script}");
}

fn watch(guest: &Guest) -> &Watch {
    guest.share.watch().unwrap()
}

fn counted(guest: &Guest, name: &str) -> u64 {
    let all = watch(guest).statistics();
    all.iter().find(|(other, _)| *other == name).unwrap().1
}

/// Seconds for which the guest may keep what a LOOKUP answers.
fn kept(guest: &Guest, parent: u64, name: &str) -> (u64, u64) {
    let answer = guest.lookup(parent, name);
    match answer.error {
        0 => {
            let entry: EntryOut = answer.get();
            (entry.entry_valid, if entry.nodeid == 0 { 0 } else { entry.attr_valid })
        }
        _ => (0, 0),
    }
}

const GOOD: u64 = 86400;

/// All that the agent is to ask for now; it does it.
fn told(guest: &Guest) -> Vec<Item> {
    watch(guest).gather().unwrap();
    let mut items = Vec::new();
    while let Some(batch) = watch(guest).take() {
        items.extend(batch.items);
        watch(guest).done();
    }
    items
}

/// A name that is to be asked for.
fn name(directory: u64, name: &str, data: bool) -> Item {
    Item::Name { directory, name: name.as_bytes().into(), happened: Happened { data } }
}

#[test]
fn only_with_an_agent_does_the_guest_keep_anything_for_good() {
    let Some(guest) = guest(|_| {}) else { return };
    host(&guest, "mkdir d; echo data >f");
    assert_eq!(kept(&guest, ROOT_ID, "f"), (GOOD, GOOD));
    assert_eq!(kept(&guest, ROOT_ID, "none"), (GOOD, 0), "that it is not there, too");
    assert_eq!(kept(&guest, ROOT_ID, "d"), (GOOD, GOOD));
    watch(&guest).disconnected();
    assert_eq!(kept(&guest, ROOT_ID, "f"), (1, 1));
    assert_eq!(kept(&guest, ROOT_ID, "none"), (0, 0));
    assert_eq!(counted(&guest, "watch_agent_lost"), 1);
    watch(&guest).connected(AGENT);
    assert_eq!(kept(&guest, ROOT_ID, "f"), (GOOD, GOOD));
    watch(&guest).is_late();
    assert_eq!((kept(&guest, ROOT_ID, "f"), counted(&guest, "watch_live")), ((1, 1), 0));
    watch(&guest).done();
    assert_eq!((kept(&guest, ROOT_ID, "f"), counted(&guest, "watch_live")), ((GOOD, GOOD), 1));
}

#[test]
fn what_the_guest_was_told_of_and_the_host_changes_the_agent_hears_of() {
    let Some(guest) = guest(|_| {}) else { return };
    host(&guest, "mkdir d; echo data >f; echo data >d/f; echo data >unseen");
    let node = guest.node("f");
    let d = guest.node("d");
    kept(&guest, ROOT_ID, "none");
    kept(&guest, d, "f");
    assert_eq!(told(&guest), []);
    host(&guest, "echo more >>f");
    assert_eq!(told(&guest), [name(ROOT_ID, "f", true)]);
    host(&guest, "chmod 600 d/f; echo more >>unseen");
    assert_eq!(told(&guest), [name(d, "f", false)]);
    host(&guest, "echo data >none");
    let new = told(&guest);
    assert!(new.contains(&name(ROOT_ID, "none", true)), "{new:?}");
    assert!(new.contains(&Item::Listing { directory: ROOT_ID }));
    host(&guest, "rm f");
    let gone = told(&guest);
    assert!(gone.contains(&name(ROOT_ID, "f", false)), "{gone:?}");
    assert!(gone.contains(&Item::Node { node }), "it may be open in the guest");
    host(&guest, "echo data >another");
    assert_eq!(told(&guest), [Item::Listing { directory: ROOT_ID }], "a name it never asked for");
    assert_eq!(told(&guest), []);
}

#[test]
fn what_the_guest_does_itself_costs_it_nothing() {
    let Some(guest) = guest(|_| {}) else { return };
    host(&guest, "echo data >f");
    let node = guest.node("f");
    let fh = guest.fh(node, libc::O_RDWR);
    assert_eq!(guest.write(node, fh, 0, b"other").error, 0);
    let made = guest.call(Opcode::Mkdir, ROOT_ID, &[&[0xed, 1, 0, 0, 0, 0, 0, 0], b"d\0"]);
    assert_eq!(made.error, 0);
    assert_eq!(told(&guest), []);
    assert!(counted(&guest, "watch_own_events") > 0);
    // But where another share of the process has the directory.
    let Some(guest) = self::guest(|options| options.alone = false) else { return };
    host(&guest, "echo data >f");
    let node = guest.node("f");
    let fh = guest.fh(node, libc::O_RDWR);
    assert_eq!(guest.write(node, fh, 0, b"other").error, 0);
    assert_eq!(told(&guest), [name(ROOT_ID, "f", true)]);
}

#[test]
fn what_the_guest_moves_is_watched_where_it_is() {
    let Some(guest) = guest(|_| {}) else { return };
    host(&guest, "mkdir d; echo data >f");
    guest.node("f");
    let d = guest.node("d");
    let rename = Rename2In { newdir: d, flags: 0, padding: 0 };
    guest.call(Opcode::Rename2, ROOT_ID, &[rename.as_slice(), b"f\0g\0"]).ok();
    assert_eq!(told(&guest), []);
    host(&guest, "echo more >>d/g");
    assert_eq!(told(&guest), [name(d, "g", true)]);
}

#[test]
fn beyond_the_budget_it_is_for_a_second() {
    let Some(guest) = guest(|options| {
        options.watch_limits = WatchLimits { directories: 2, names: 3 };
    }) else {
        return;
    };
    host(&guest, "mkdir a b; echo >f; echo >g; echo >a/f; echo >b/f");
    let (a, b) = (guest.node("a"), guest.node("b"));
    assert_eq!(kept(&guest, b, "f"), (1, 1), "the root and the first are watched");
    assert_eq!(kept(&guest, ROOT_ID, "b"), (GOOD, 1), "what is in it changes its attributes");
    assert_eq!(kept(&guest, a, "f"), (GOOD, GOOD));
    assert_eq!(kept(&guest, ROOT_ID, "f"), (1, 1), "three names, no more");
    assert_eq!((counted(&guest, "watch_directories"), counted(&guest, "watch_names")), (2, 3));
    assert!(counted(&guest, "watch_refused") > 0);
    // What is forgotten leaves room.
    guest.forget(a, 2);
    assert_eq!(kept(&guest, b, "f"), (GOOD, GOOD));
    host(&guest, "echo >a/f; echo >b/f");
    assert_eq!(told(&guest), [name(b, "f", true)]);
}

#[test]
fn a_file_of_two_names_is_asked_for_each_second() {
    let Some(guest) = guest(|_| {}) else { return };
    host(&guest, "echo >f; ln f g; echo >alone");
    assert_eq!(
        kept(&guest, ROOT_ID, "f"),
        (GOOD, 1),
        "it may be changed by a name that is nowhere here"
    );
    assert_eq!(kept(&guest, ROOT_ID, "alone"), (GOOD, GOOD));
}

#[test]
fn when_events_are_lost_everything_is_asked_for() {
    let Some(guest) = guest(|_| {}) else { return };
    host(&guest, "mkdir d; echo >f; echo >d/f");
    let (f, d) = (guest.node("f"), guest.node("d"));
    let of_d = guest.node("d/f");
    kept(&guest, ROOT_ID, "none");
    let event = Event { what: What::OVERFLOW, own: false, directory: None, name: Vec::new() };
    watch(&guest).take_event(&mut lock(&watch(&guest).state), event);
    assert_eq!(kept(&guest, ROOT_ID, "f"), (1, 1), "nothing more for good until that is done");
    let all = told(&guest);
    for item in [
        name(ROOT_ID, "f", true),
        name(ROOT_ID, "none", true),
        name(d, "f", true),
        Item::Listing { directory: ROOT_ID },
        Item::Listing { directory: d },
        Item::Node { node: f },
        Item::Node { node: of_d },
    ] {
        assert!(all.contains(&item), "{item:?} in {all:?}");
    }
    assert_eq!(kept(&guest, ROOT_ID, "f"), (GOOD, GOOD));
    assert_eq!(counted(&guest, "watch_overflows"), 1);
}

#[test]
fn what_happens_without_an_agent_the_next_one_hears_of() {
    let Some(guest) = guest(|_| {}) else { return };
    host(&guest, "echo >f");
    guest.node("f");
    host(&guest, "echo >>f");
    watch(&guest).gather().unwrap();
    let lost = watch(&guest).take().unwrap();
    assert!(watch(&guest).take().is_none(), "one batch at a time");
    watch(&guest).disconnected();
    host(&guest, "chmod 600 f");
    assert!(watch(&guest).gather().unwrap());
    assert!(watch(&guest).take().is_none());
    watch(&guest).connected(AGENT);
    assert_eq!(kept(&guest, ROOT_ID, "f"), (1, 1), "not before it has caught up");
    let caught_up = told(&guest);
    assert_eq!(lost.items.len(), 1);
    assert!(caught_up.contains(&name(ROOT_ID, "f", true)), "{caught_up:?}");
    assert_eq!(kept(&guest, ROOT_ID, "f"), (GOOD, GOOD));
}

#[test]
fn directories_are_read_without_being_opened() {
    let Some(guest) = guest(|_| {}) else { return };
    host(&guest, "mkdir d; touch d/a d/b");
    let d = guest.node("d");
    let refused = guest.call(Opcode::Opendir, d, &[OpenIn::default().as_slice()]);
    assert_eq!(refused.error, libc::ENOSYS);
    let names = |guest: &Guest| guest.list(false, d, 0, 0, 4096).unwrap().len();
    assert_eq!(names(&guest), 4);
    host(&guest, "touch d/c");
    assert_eq!(names(&guest), 5);
    assert_eq!(told(&guest), [Item::Listing { directory: d }]);
    guest.forget(d, 9);
    assert_ne!(guest.call(Opcode::Readdir, d, &[&[0; 40]]).error, 0);
}

#[test]
fn the_time_of_an_unwatched_directory_that_has_just_changed_is_never_twice_the_same() {
    let Some(guest) = guest(|options| options.watch_limits.directories = 0) else { return };
    host(&guest, "mkdir d; touch -d @1000000000.123456789 d");
    let d = guest.node("d");
    let time = || guest.getattr(d).get::<AttrOut>().attr;
    assert_eq!(time().mtimensec, 123_456_789);
    fs::set_permissions(guest.path().join("d"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(guest.path().join("d/f"), "").unwrap();
    let (one, two) = (time(), time());
    let soon = std::time::SystemTime::now()
        .duration_since(fs::metadata(guest.path().join("d")).unwrap().modified().unwrap())
        .unwrap()
        < std::time::Duration::from_millis(10);
    assert_eq!(one.mtime, two.mtime);
    assert!(!soon || one.mtimensec != two.mtimensec);
    std::thread::sleep(std::time::Duration::from_millis(40));
    assert_eq!(time().mtimensec, time().mtimensec);
}

#[test]
fn files_are_opened_and_closed_by_requests() {
    let Some(guest) = guest(|options| options.locks = LockPolicy::Guest) else { return };
    host(&guest, "echo data >f; chmod 444 f");
    let node = guest.node("f");
    assert_eq!(kept(&guest, ROOT_ID, "f"), (GOOD, GOOD));
    let fh = guest.fh(node, libc::O_RDONLY);
    assert_ne!(fh, 0);
    let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..Default::default() };
    // Also when the name turns out to be there.
    for name in [b"new\0", b"new\0"] {
        assert_eq!(guest.call(Opcode::Create, ROOT_ID, &[create.as_slice(), name]).error, 0);
    }
    assert_eq!(guest.share.live_handles(), 3);
    // One that was never opened is none.
    let read = ReadIn { size: 4, ..Default::default() };
    assert_eq!(guest.call(Opcode::Read, node, &[read.as_slice()]).error, libc::EBADF);
    assert_ne!(guest.call(Opcode::Flush, node, &[&[0; 24]]).error, libc::ENOSYS);
    let release = ReleaseIn { fh, ..Default::default() };
    guest.call(Opcode::Release, node, &[release.as_slice()]).ok();
    assert_eq!(guest.share.live_handles(), 2);
}
