//! Somebody on the host swaps names for symlinks to the outside, while the guest does all that can be done by them.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, symlink as host_symlink};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::*;

/// How long each race goes on: some thousand swaps.
const LASTS: Duration = Duration::from_secs(2);

/// All that can be seen of a directory: names, and of each what it is and has inside.
fn picture(path: &Path) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    let mut look = |name: &str, path: &Path| {
        let stat = std::fs::symlink_metadata(path).unwrap();
        let inside = if stat.is_file() { std::fs::read(path).unwrap() } else { Vec::new() };
        let mut names = [0; 1024];
        let count = rustix::fs::llistxattr(path, &mut names).unwrap_or(0);
        let what = format!(
            "{:o} {}:{} {} {:?} {:?} {inside:?} {:?}",
            stat.mode(),
            stat.uid(),
            stat.gid(),
            stat.nlink(),
            stat.modified(),
            (stat.ctime(), stat.ctime_nsec()),
            &names[..count],
        );
        seen.insert(name.to_string(), what);
    };
    look(".", path);
    for entry in std::fs::read_dir(path).unwrap() {
        let entry = entry.unwrap();
        look(entry.file_name().to_str().unwrap(), &entry.path());
    }
    seen
}

/// Calls `act` while the names of each of `pairs` change places below `path`.
fn while_swapping(path: &Path, pairs: &[(&str, &str)], mut act: impl FnMut()) {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (a, b) in pairs {
                    let (a, b) = (path.join(a), path.join(b));
                    renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE).unwrap();
                }
            }
        });
        let start = Instant::now();
        while start.elapsed() < LASTS {
            act();
        }
        stop.store(true, Ordering::Relaxed);
    });
}

fn outside() -> tempfile::TempDir {
    let outside = tempfile::tempdir().unwrap();
    for name in ["file", "other", "victim"] {
        std::fs::write(outside.path().join(name), "outside").unwrap();
    }
    std::fs::create_dir(outside.path().join("d")).unwrap();
    outside
}

#[test]
fn whatever_is_done_in_a_directory_that_is_swapped_for_a_symlink_is_not_done_outside() {
    let outside = outside();
    let before = picture(outside.path());
    let guest = Guest::new();
    let path = guest.path().to_owned();
    for real in ["one", "two"] {
        std::fs::create_dir_all(path.join(real).join("d")).unwrap();
        std::fs::write(path.join(real).join("file"), "inside").unwrap();
    }
    host_symlink(outside.path(), path.join("swap one")).unwrap();
    host_symlink(outside.path(), path.join("swap two")).unwrap();
    let mut done = BTreeMap::<&str, u32>::new();
    while_swapping(&path, &[("one", "swap one"), ("two", "swap two")], || {
        let mut count = |what: &'static str, answer: &Answer| {
            *done.entry(what).or_default() += u32::from(answer.error == 0);
        };
        let directory = |name| {
            let answer = guest.lookup(ROOT_ID, name);
            (answer.error == 0).then(|| answer.get::<EntryOut>().nodeid)
        };
        let (Some(one), Some(two)) = (directory("one"), directory("two")) else { return };
        let answer = guest.create(one, "other", libc::O_RDWR, 0o600);
        count("create", &answer);
        if answer.error == 0 {
            let (node, fh) = (answer.part::<EntryOut>(0).nodeid, answer.part::<OpenOut>(128).fh);
            guest.write(node, fh, 0, b"inside");
            release(&guest, Opcode::Release, node, fh).ok();
        }
        count("mkdir", &mkdir(&guest, one, "made", 0o777));
        count("symlink", &symlink(&guest, one, "link", "target"));
        let answer = guest.lookup(one, "file");
        count("lookup", &answer);
        if answer.error == 0 {
            let node = answer.get::<EntryOut>().nodeid;
            count("link", &link(&guest, node, two, "hard"));
            let change =
                SetattrIn { valid: SetattrValid::MODE.bits(), mode: 0o600, ..SetattrIn::default() };
            count("chmod", &guest.setattr(node, change));
            count("setxattr", &setxattr(&guest, node, "user.x", b"1", 0));
            let opened = guest.open(node, libc::O_RDWR);
            count("open", &opened);
            if opened.error == 0 {
                let fh = opened.part::<OpenOut>(0).fh;
                assert_eq!(guest.read(node, fh, 0, 10).body, b"inside");
                release(&guest, Opcode::Release, node, fh).ok();
            }
            count("map", &guest.setup(node, 0, 4096, 2, 0));
        }
        count("rename", &rename(&guest, (two, "hard"), (one, "moved"), 0));
        count("exchange", &rename(&guest, (one, "file"), (two, "file"), libc::RENAME_EXCHANGE));
        for name in ["moved", "other", "link", "victim", "hard"] {
            count("unlink", &unlink(&guest, Opcode::Unlink, one, name));
        }
        count("unlink", &unlink(&guest, Opcode::Unlink, two, "hard"));
        count("rmdir", &unlink(&guest, Opcode::Rmdir, one, "made"));
        count("setxattr", &setxattr(&guest, one, "user.x", b"1", 0));
        let listing = guest.call(Opcode::Opendir, one, &[OpenIn::default().as_slice()]);
        count("opendir", &listing);
        if listing.error == 0 {
            let fh = listing.part::<OpenOut>(0).fh;
            for name in guest.list(true, one, fh, 0, 8192).unwrap_or_default() {
                assert_ne!(name.name, b"victim");
            }
            release(&guest, Opcode::Releasedir, one, fh).ok();
        }
    });
    assert_eq!(picture(outside.path()), before);
    // And the race was one: each was done, inside.
    for what in ["create", "mkdir", "symlink", "link", "rename", "exchange", "unlink", "rmdir"] {
        assert!(done.get(what).is_some_and(|times| *times > 0), "{what}: {done:?}");
    }
}

#[test]
fn whatever_is_done_to_a_file_that_is_swapped_for_a_symlink_is_not_done_outside() {
    let outside = outside();
    let before = picture(outside.path());
    let guest = Guest::new();
    let path = guest.path().to_owned();
    std::fs::write(path.join("own"), "inside").unwrap();
    host_symlink(outside.path().join("victim"), path.join("swap")).unwrap();
    let mut reads = 0;
    while_swapping(&path, &[("own", "swap")], || {
        let answer = guest.lookup(ROOT_ID, "own");
        if answer.error != 0 {
            return;
        }
        let node = answer.get::<EntryOut>().nodeid;
        let all = SetattrValid::MODE | SetattrValid::UID | SetattrValid::MTIME;
        let change = SetattrIn {
            valid: all.bits(),
            mode: 0o644,
            uid: guest.uid,
            mtime: 7,
            ..SetattrIn::default()
        };
        guest.setattr(node, change);
        let change =
            SetattrIn { valid: SetattrValid::SIZE.bits(), size: 6, ..SetattrIn::default() };
        guest.setattr(node, change);
        setxattr(&guest, node, "user.x", b"1", 0);
        guest.call(Opcode::Removexattr, node, &[b"user.x\0"]);
        link(&guest, node, ROOT_ID, "hard");
        unlink(&guest, Opcode::Unlink, ROOT_ID, "hard");
        guest.setup(node, 0, 4096, 2, 0);
        let opened = guest.open(node, libc::O_RDWR);
        if opened.error == 0 {
            let fh = opened.part::<OpenOut>(0).fh;
            assert_eq!(guest.read(node, fh, 0, 10).body, b"inside");
            guest.write(node, fh, 0, b"inside");
            release(&guest, Opcode::Release, node, fh).ok();
            reads += 1;
        }
    });
    assert_eq!(picture(outside.path()), before);
    assert!(reads > 0);
}
