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
        options.events = true;
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
    let mut all = all_told(guest);
    all.retain(|item| !matches!(item, Item::Name { happened, .. } if !happened.ask));
    for item in &mut all {
        if let Item::Name { happened, .. } = item {
            happened.events = Events::empty();
        }
    }
    all
}

fn all_told(guest: &Guest) -> Vec<Item> {
    watch(guest).gather().unwrap();
    let mut items = Vec::new();
    while let Some(batch) = watch(guest).take() {
        items.extend(batch.items);
        watch(guest).done();
    }
    items
}

/// A name that is to be asked for. What is heard of it is for another test.
fn name(directory: u64, name: &str, data: bool) -> Item {
    let happened = Happened { ask: true, data, events: Events::empty() };
    Item::Name { directory, name: name.as_bytes().into(), happened }
}

/// What is heard of names.
fn heard(guest: &Guest) -> Vec<(String, Events)> {
    let of = |item: &Item| match item {
        Item::Name { name, happened, .. } => {
            Some((String::from_utf8_lossy(name).into_owned(), happened.events))
        }
        _ => None,
    };
    all_told(guest).iter().filter_map(of).collect()
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
fn what_happens_in_a_directory_is_heard_there_also_of_names_that_nobody_asked_for() {
    let Some(guest) = guest(|_| {}) else { return };
    host(&guest, "echo >f; echo >old");
    guest.node("f");
    heard(&guest);
    let of = |events: &[(&str, Events)]| -> Vec<_> {
        events.iter().map(|(name, events)| (name.to_string(), *events)).collect()
    };
    use Events as E;
    host(&guest, "echo >new");
    assert_eq!(heard(&guest), of(&[("new", E::CREATED | E::MODIFIED | E::CLOSED)]));
    host(&guest, "chmod 600 f");
    assert_eq!(heard(&guest), of(&[("f", E::ATTRIBUTES)]));
    host(&guest, "mv f moved; rm old");
    let moved = [("f", E::DELETED), ("moved", E::CREATED), ("old", E::DELETED)];
    let mut all = heard(&guest);
    all.sort_by(|one, other| one.0.cmp(&other.0));
    assert_eq!(all, of(&moved));
    fs::write(guest.path().join("own"), "").unwrap();
    assert_eq!(heard(&guest), []);
}

/// A request that the agent makes only for others to hear of what has happened.
fn raise(
    guest: &mut Guest,
    opcode: Opcode,
    node: u64,
    parts: &[&[u8]],
) -> crate::fuse::testing::Answer {
    let before = (guest.pid, guest.gid);
    (guest.pid, guest.gid) = (AGENT, RAISING);
    let answer = guest.call(opcode, node, parts);
    (guest.pid, guest.gid) = before;
    answer
}

/// Number, size, mode and times of the files of the next test.
fn seen(directory: &std::path::Path) -> Vec<impl PartialEq + std::fmt::Debug + use<>> {
    use std::os::unix::fs::MetadataExt;
    let of = |name| fs::symlink_metadata(directory.join(name)).unwrap();
    let times = |of: &fs::Metadata| (of.mtime(), of.mtime_nsec(), of.ctime(), of.ctime_nsec());
    let all = ["f", "new", "."].map(of);
    all.iter().map(|of| (of.ino(), of.size(), of.mode(), times(of))).collect()
}

#[test]
fn what_the_agent_raises_reaches_no_file() {
    let Some(mut guest) = guest(|_| {}) else { return };
    host(&guest, "echo data >f; touch -d @1000000000 f .");
    let node = guest.node("f");
    watch(&guest).gather().unwrap();
    while watch(&guest).take().is_some() {
        watch(&guest).done();
    }
    host(&guest, "echo >new; touch -d @1000000000 .");
    watch(&guest).gather().unwrap();
    assert!(watch(&guest).take().is_some());
    let before = seen(guest.path());
    let directory = guest.directory.path().to_owned();
    let setattr = SetattrIn {
        valid: SetattrValid::MODE.bits() | SetattrValid::SIZE.bits(),
        mode: 0o777,
        ..Default::default()
    };
    let changed = raise(&mut guest, Opcode::Setattr, node, &[setattr.as_slice()]);
    assert_eq!(changed.get::<AttrOut>().attr.size, 5, "what it is, and not what was asked");
    raise(&mut guest, Opcode::Unlink, ROOT_ID, &[b"f\0"]).ok();
    let rename = Rename2In { newdir: ROOT_ID, flags: 0, padding: 0 };
    raise(&mut guest, Opcode::Rename2, ROOT_ID, &[rename.as_slice(), b"f\0g\0"]).ok();
    // A name that is new on the host is new for the agent, once.
    assert_eq!(raise(&mut guest, Opcode::Lookup, ROOT_ID, &[b"new\0"]).error, libc::ENOENT);
    assert_eq!(guest.lookup(ROOT_ID, "new").error, 0, "and for nobody else");
    let mknod = MknodIn { mode: libc::S_IFREG | 0o600, ..Default::default() };
    let made = raise(&mut guest, Opcode::Mknod, ROOT_ID, &[mknod.as_slice(), b"new\0"]);
    assert_eq!(made.get::<EntryOut>().attr.size, 1);
    assert_eq!(raise(&mut guest, Opcode::Lookup, ROOT_ID, &[b"new\0"]).error, 0);
    let made = raise(&mut guest, Opcode::Mknod, ROOT_ID, &[mknod.as_slice(), b"other\0"]);
    assert_eq!(made.error, libc::ENOENT, "nothing is made");
    assert!(!directory.join("other").exists());
    // What is opened so is of no use, and so is writing by another's handle.
    let open = OpenIn { flags: libc::O_WRONLY as u32, fuse_flags: 0 };
    let fh = match raise(&mut guest, Opcode::Open, node, &[open.as_slice()]) {
        answer if answer.error == 0 => answer.get::<OpenOut>().fh,
        answer => panic!("{answer:?}"),
    };
    let allocate = FallocateIn { fh, length: 1 << 20, ..Default::default() };
    raise(&mut guest, Opcode::Fallocate, node, &[allocate.as_slice()]).ok();
    assert_ne!(guest.write(node, fh, 0, b"x").error, 0);
    assert_eq!(seen(&directory), before);
    // Who only has the group, or only the thread's number, is an ordinary guest.
    guest.gid = RAISING;
    guest.call(Opcode::Unlink, ROOT_ID, &[b"f\0"]).ok();
    assert!(!directory.join("f").exists());
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
