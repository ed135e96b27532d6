//! What the host mounts below a shared directory, in a mount namespace of the test's own.

use std::fs;
use std::path::Path;

use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change,
    mount_remount, unmount,
};

use super::*;
use crate::share::sys::unshare_mounts;

/// Both ways to reach a node: by handle (where this host has them) and by name.
const WAYS: [bool; 2] = [true, false];

/// Runs a test where its mounts are seen by nobody else, once for each way; not at all where this process may
/// not mount.
pub(super) fn with_mounts(test: impl Fn(&Guest) + Send + Sync) {
    for way in WAYS {
        std::thread::scope(|scope| {
            let run = || {
                if let Err(error) = unshare_mounts() {
                    assert!(!is_root(), "{error}");
                    return;
                }
                let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
                mount_change("/", private).unwrap();
                let guest = Guest::with(|options| options.file_handles = way);
                test(&guest);
                // So that the directory can be removed.
                guest.session.reset();
                while unmount(guest.path().join("sub"), UnmountFlags::DETACH).is_ok() {}
            };
            scope.spawn(run).join().unwrap();
        });
    }
}

fn mount_tmpfs(at: &Path) {
    fs::create_dir_all(at).unwrap();
    mount("none", at, "tmpfs", MountFlags::empty(), c"mode=755").unwrap();
}

fn entry(guest: &Guest, parent: u64, name: &str) -> EntryOut {
    guest.lookup(parent, name).get()
}

fn is_submount(entry: &EntryOut) -> bool {
    entry.attr.flags & ATTR_SUBMOUNT != 0
}

/// Reads a file through the guest.
fn content(guest: &Guest, node: u64) -> Vec<u8> {
    let fh = guest.fh(node, libc::O_RDONLY);
    let body = guest.read(node, fh, 0, 4096).body;
    release(guest, Opcode::Release, node, fh).ok();
    body
}

#[test]
fn a_mount_below_is_told_as_such_and_nested_ones_and_what_is_in_them_is_reached() {
    with_mounts(|guest| {
        let sub = guest.path().join("sub");
        mount_tmpfs(&sub);
        fs::write(sub.join("file"), "in sub").unwrap();
        mount_tmpfs(&sub.join("a/inner"));
        fs::create_dir_all(sub.join("a/inner/deep/deeper")).unwrap();
        fs::write(sub.join("a/inner/deep/deeper/file"), "in inner").unwrap();

        let outer = entry(guest, ROOT_ID, "sub");
        assert!(is_submount(&outer));
        let (file, a) = (entry(guest, outer.nodeid, "file"), entry(guest, outer.nodeid, "a"));
        let inner = entry(guest, a.nodeid, "inner");
        assert!(is_submount(&inner) && !is_submount(&file) && !is_submount(&a));
        // Two file systems, the same numbers, two nodes: the guest gives each a device number of its own.
        assert_eq!(inner.attr.ino, outer.attr.ino);
        assert_ne!(inner.nodeid, outer.nodeid);

        assert_eq!(content(guest, file.nodeid), b"in sub");
        let deep = guest.node("sub/a/inner/deep/deeper/file");
        assert_eq!(content(guest, deep), b"in inner");
        let made = guest.create(inner.nodeid, "made", libc::O_RDWR, 0o600);
        assert_eq!(made.error, 0);
        assert!(sub.join("a/inner/made").exists());
        let answer = rename(guest, (inner.nodeid, "made"), (outer.nodeid, "made"), 0);
        assert_eq!(answer.error, libc::EXDEV);
        // STATFS is of the file system that the node is on.
        let blocks = |node: u64| guest.call(Opcode::Statfs, node, &[]).get::<StatfsOut>().st;
        assert_ne!(blocks(inner.nodeid).files, blocks(ROOT_ID).files);
        assert_eq!(guest.call(Opcode::Syncfs, inner.nodeid, &[&[0; 8]]).error, 0);
    });
}

#[test]
fn a_listing_tells_of_mounts_as_a_lookup_does() {
    with_mounts(|guest| {
        mount_tmpfs(&guest.path().join("sub"));
        let fh = guest.opendir(ROOT_ID);
        let names = guest.list(true, ROOT_ID, fh, 0, 4096).unwrap();
        let listed = names.iter().find(|name| name.name == b"sub").unwrap().entry.unwrap();
        assert!(is_submount(&listed));
        assert_eq!(listed.nodeid, entry(guest, ROOT_ID, "sub").nodeid);
    });
}

#[test]
fn the_same_directory_mounted_twice_is_two_nodes() {
    with_mounts(|guest| {
        let sub = guest.path().join("sub");
        fs::create_dir_all(sub.join("again")).unwrap();
        fs::create_dir(guest.path().join("there")).unwrap();
        fs::write(guest.path().join("there/file"), "one").unwrap();
        mount_bind(guest.path().join("there"), sub.join("again")).unwrap();
        let there = entry(guest, ROOT_ID, "there");
        let again = entry(guest, guest.node("sub"), "again");
        assert_eq!(there.attr.ino, again.attr.ino);
        assert_ne!(there.nodeid, again.nodeid);
        assert!(is_submount(&again) && !is_submount(&there));
        assert_ne!(guest.node("there/file"), guest.node("sub/again/file"));
        assert_eq!(content(guest, guest.node("sub/again/file")), b"one");
        unmount(sub.join("again"), UnmountFlags::empty()).unwrap();
    });
}

#[test]
fn what_is_mounted_while_the_guest_runs_is_seen_at_its_next_lookup_and_so_is_its_end() {
    with_mounts(|guest| {
        let sub = guest.path().join("sub");
        fs::create_dir(&sub).unwrap();
        fs::write(sub.join("below"), "").unwrap();
        let before = entry(guest, ROOT_ID, "sub");
        assert!(!is_submount(&before));
        mount_tmpfs(&sub);
        fs::write(sub.join("above"), "").unwrap();
        // The node that the guest has still is the directory that is covered now.
        if guest.share.mounts.root().has_handles() {
            assert_eq!(guest.lookup(before.nodeid, "below").error, 0);
        }
        let during = entry(guest, ROOT_ID, "sub");
        assert!(is_submount(&during));
        assert_ne!(during.nodeid, before.nodeid);
        assert_eq!(guest.lookup(during.nodeid, "above").error, 0);
        assert_eq!(guest.lookup(during.nodeid, "below").error, libc::ENOENT);
        unmount(&sub, UnmountFlags::empty()).unwrap();
        let after = entry(guest, ROOT_ID, "sub");
        assert!(!is_submount(&after));
        assert_eq!(after.nodeid, before.nodeid);
        assert_eq!(guest.lookup(after.nodeid, "below").error, 0);
    });
}

#[test]
fn a_mount_that_is_read_only_is_so_in_the_guest() {
    with_mounts(|guest| {
        let sub = guest.path().join("sub");
        mount_tmpfs(&sub);
        fs::write(sub.join("file"), "data").unwrap();
        let (directory, file) = (guest.node("sub"), guest.node("sub/file"));
        assert_eq!(guest.open(file, libc::O_RDWR).error, 0, "not yet");
        guest.session.reset();
        assert_eq!(guest.init(7, MINOR, u64::MAX).error, 0);
        let flags = MountFlags::RDONLY | MountFlags::BIND;
        mount_remount(&sub, flags, c"").unwrap();
        let (directory, file) = {
            assert_ne!((directory, file), (guest.node("sub"), guest.node("sub/file")));
            (guest.node("sub"), guest.node("sub/file"))
        };
        let change = SetattrIn { valid: SetattrValid::SIZE.bits(), ..SetattrIn::default() };
        let errors = [
            guest.open(file, libc::O_RDWR).error,
            guest.open(file, libc::O_RDONLY | libc::O_TRUNC).error,
            guest.create(directory, "made", libc::O_RDWR, 0o644).error,
            mkdir(guest, directory, "made", 0o755).error,
            unlink(guest, Opcode::Unlink, directory, "file").error,
            rename(guest, (directory, "file"), (directory, "moved"), 0).error,
            guest.setattr(file, change).error,
            guest.setup(file, 0, 4096, SETUPMAPPING_READ | SETUPMAPPING_WRITE, 0).error,
        ];
        assert_eq!(errors, [libc::EROFS; 8]);
        assert_eq!(content(guest, file), b"data");
        // It is that mount alone.
        assert_eq!(guest.create(ROOT_ID, "made", libc::O_RDWR, 0o644).error, 0);
    });
}

#[test]
fn the_host_can_unmount_what_the_guest_merely_knows() {
    with_mounts(|guest| {
        let sub = guest.path().join("sub");
        mount_tmpfs(&sub);
        fs::create_dir(sub.join("d")).unwrap();
        fs::write(sub.join("d/file"), "old").unwrap();
        let (root, d, file) = (guest.node("sub"), guest.node("sub/d"), guest.node("sub/d/file"));
        assert_eq!(content(guest, file), b"old");
        unmount(&sub, UnmountFlags::empty()).unwrap();
        for node in [root, d, file] {
            assert_eq!(guest.getattr(node).error, libc::ESTALE);
        }
        // Another of the same kind in its place, with the same numbers inside, is another.
        mount_tmpfs(&sub);
        fs::create_dir(sub.join("d")).unwrap();
        fs::write(sub.join("d/file"), "new").unwrap();
        for node in [root, d, file] {
            assert_eq!(guest.getattr(node).error, libc::ESTALE);
            assert_ne!(guest.open(node, libc::O_RDONLY).error, 0);
        }
        let again = guest.node("sub/d/file");
        assert_ne!(again, file);
        assert_eq!(content(guest, again), b"new");
        assert_eq!(guest.getattr(file).error, libc::ESTALE);
    });
}

#[test]
fn what_the_guest_has_open_keeps_its_mount_as_on_any_machine() {
    with_mounts(|guest| {
        let sub = guest.path().join("sub");
        mount_tmpfs(&sub);
        fs::write(sub.join("file"), "data").unwrap();
        let file = guest.node("sub/file");
        let fh = guest.fh(file, libc::O_RDONLY);
        let busy = unmount(&sub, UnmountFlags::empty()).unwrap_err();
        assert_eq!(busy, rustix::io::Errno::BUSY);
        // umount -l: gone for all who look it up, there for who has it open.
        unmount(&sub, UnmountFlags::DETACH).unwrap();
        assert_eq!(guest.read(file, fh, 0, 100).body, b"data");
        assert_eq!(guest.getattr(file).error, 0);
        assert!(!is_submount(&entry(guest, ROOT_ID, "sub")));
        release(guest, Opcode::Release, file, fh).ok();
        assert_eq!(guest.getattr(file).error, libc::ESTALE);
        guest.forget(file, 1);
    });
}

#[test]
fn what_the_guest_has_unlinked_keeps_its_mount_until_it_is_forgotten() {
    with_mounts(|guest| {
        let sub = guest.path().join("sub");
        mount_tmpfs(&sub);
        fs::write(sub.join("file"), "data").unwrap();
        let (directory, file) = (guest.node("sub"), guest.node("sub/file"));
        unlink(guest, Opcode::Unlink, directory, "file").ok();
        assert_eq!(content(guest, file), b"data");
        assert!(unmount(&sub, UnmountFlags::empty()).is_err());
        guest.forget(file, 1);
        unmount(&sub, UnmountFlags::empty()).unwrap();
    });
}

#[test]
fn a_file_that_is_mounted_over_another_is_a_file_of_its_own() {
    with_mounts(|guest| {
        let (under, over) = (guest.path().join("under"), guest.path().join("over"));
        fs::write(&under, "under").unwrap();
        fs::write(&over, "over").unwrap();
        let covered = guest.node("under");
        mount_bind(&over, &under).unwrap();
        let found = entry(guest, ROOT_ID, "under");
        assert!(!is_submount(&found));
        assert_ne!(found.nodeid, covered);
        assert_ne!(found.nodeid, guest.node("over"));
        assert_eq!(content(guest, found.nodeid), b"over");
        unmount(&under, UnmountFlags::empty()).unwrap();
        assert_eq!(guest.getattr(found.nodeid).error, libc::ESTALE);
        assert_eq!(guest.node("under"), covered);
    });
}

#[test]
fn the_file_systems_that_the_guest_knows_are_counted_and_forgotten() {
    with_mounts(|guest| {
        let sub = guest.path().join("sub");
        mount_tmpfs(&sub);
        mount_tmpfs(&sub.join("inner"));
        assert_eq!(guest.share.file_systems().len(), 1);
        let (outer, inner) = (guest.node("sub"), guest.node("sub/inner"));
        assert_eq!(guest.share.file_systems().len(), 3);
        unmount(sub.join("inner"), UnmountFlags::empty()).unwrap();
        assert_eq!(guest.share.file_systems().len(), 2, "one cannot be reached any more");
        guest.forget(inner, 9);
        guest.forget(outer, 9);
        assert_eq!(guest.share.file_systems().len(), 1);
        assert_eq!(guest.share.live_inodes(), 1);
    });
}

#[test]
fn a_guest_that_is_not_told_of_mounts_syncs_all_that_it_knows() {
    with_mounts(|guest| {
        let sub = guest.path().join("sub");
        mount_tmpfs(&sub);
        let path = guest.path().to_owned();
        let other = Guest::with(|options| {
            options.directory = path;
            options.submounts = false;
            options.file_handles = guest.share.options().file_handles;
        });
        let found = entry(&other, ROOT_ID, "sub");
        assert!(!is_submount(&found));
        assert_eq!(other.share.file_systems().len(), 2);
        assert_eq!(other.call(Opcode::Syncfs, ROOT_ID, &[&[0; 8]]).error, 0);
    });
}
