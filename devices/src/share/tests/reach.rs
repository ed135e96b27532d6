//! Nodes without descriptors: how their files are found again, and what that costs.

use super::*;
use crate::share::reach::Directories;

/// Both ways to reach a node: by handle (where this host has them) and by name.
const WAYS: [bool; 2] = [true, false];

fn guest(file_handles: bool) -> Guest {
    let mut guest = Guest::with(|options| options.file_handles = file_handles);
    // Many requests are sent here, and all the room of each is looked at.
    guest.room = 1 << 16;
    guest
}

/// The same, of a directory in memory where there is one: for tests that make very many files.
fn guest_in_memory(file_handles: bool) -> (tempfile::TempDir, Guest) {
    let directory = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let mut guest = Guest::with(|options| {
        options.directory = directory.path().to_owned();
        options.file_handles = file_handles;
    });
    guest.room = 1 << 16;
    (directory, guest)
}

/// How many descriptors the process holds on files below a directory, deleted ones among them.
fn descriptors_below(path: &std::path::Path) -> usize {
    let below = |entry: std::io::Result<std::fs::DirEntry>| {
        std::fs::read_link(entry.ok()?.path()).ok()?.starts_with(path).then_some(())
    };
    std::fs::read_dir("/proc/self/fd").unwrap().filter_map(below).count()
}

fn size_of_file(guest: &Guest, node: u64) -> u64 {
    guest.getattr(node).get::<AttrOut>().attr.size
}

#[test]
fn a_node_costs_no_descriptor() {
    for way in WAYS {
        let guest = guest(way);
        let before = descriptors_below(guest.path());
        for directory in 0..100 {
            let path = guest.path().join(format!("d{directory}"));
            std::fs::create_dir(&path).unwrap();
            for file in 0..20 {
                std::fs::write(path.join(format!("f{file}")), "data").unwrap();
            }
        }
        let mut nodes = Vec::new();
        for directory in 0..100 {
            let parent = guest.node(&format!("d{directory}"));
            for file in 0..20 {
                let entry: EntryOut = guest.lookup(parent, &format!("f{file}")).get();
                nodes.push(entry.nodeid);
            }
        }
        assert_eq!(guest.share.live_inodes(), 1 + 100 + 2000);
        assert!(nodes.iter().all(|node| size_of_file(&guest, *node) == 4));
        assert_eq!(guest.share.live_descriptors(), 0);
        let held = descriptors_below(guest.path()) - before;
        let by_handle = way && has_handles(&guest);
        assert!(held <= if by_handle { 0 } else { Directories::MOST }, "{held}");
    }
}

#[test]
fn nodes_are_reached_however_deep_they_are_and_in_whatever_order() {
    // Longer than a path may be, with names of all lengths.
    let names: Vec<String> = (0..2500).map(|depth| "x".repeat(1 + depth % 50)).collect();
    for way in WAYS {
        let (directory, guest) = guest_in_memory(way);
        let mut node = ROOT_ID;
        let mut nodes = Vec::new();
        for name in &names {
            node = mkdir(&guest, node, name, 0o755).get::<EntryOut>().nodeid;
            nodes.push(node);
        }
        let before = descriptors_below(directory.path());
        for depth in [2499, 0, 1200, 2498, 3, 2499] {
            assert_eq!(guest.getattr(nodes[depth]).error, 0, "{depth}");
        }
        guest.create(node, "deepest", libc::O_RDWR, 0o644).part::<EntryOut>(0);
        assert_eq!(guest.lookup(node, "deepest").error, 0);
        assert!(descriptors_below(directory.path()) <= before + Directories::MOST + 1);
    }
}

#[test]
fn renames_and_links_of_the_guest_do_not_lose_a_node() {
    for way in WAYS {
        let guest = guest(way);
        for name in ["a", "b", "c"] {
            std::fs::create_dir(guest.path().join(name)).unwrap();
        }
        std::fs::write(guest.path().join("a/file"), "one").unwrap();
        let (a, b, c) = (guest.node("a"), guest.node("b"), guest.node("c"));
        let file = guest.node("a/file");

        rename(&guest, (a, "file"), (b, "moved"), 0).ok();
        assert_eq!(size_of_file(&guest, file), 3);
        // A directory above it.
        rename(&guest, (ROOT_ID, "b"), (c, "inner"), 0).ok();
        assert_eq!(size_of_file(&guest, file), 3);
        // Another name, and the first one goes.
        link(&guest, file, a, "linked").get::<EntryOut>();
        unlink(&guest, Opcode::Unlink, b, "moved").ok();
        assert_eq!(size_of_file(&guest, file), 3);
        assert_eq!(guest.share.live_descriptors(), 0, "it has a name");
        // Two change places.
        std::fs::write(guest.path().join("a/other"), "four").unwrap();
        let other = guest.node("a/other");
        rename(&guest, (a, "linked"), (a, "other"), libc::RENAME_EXCHANGE).ok();
        assert_eq!((size_of_file(&guest, file), size_of_file(&guest, other)), (3, 4));
        assert_eq!(std::fs::read(guest.path().join("a/other")).unwrap(), b"one");
    }
}

#[test]
fn what_the_guest_has_unlinked_is_there_until_it_is_forgotten() {
    for way in WAYS {
        let guest = guest(way);
        let file = file(&guest, b"data");
        let directory = mkdir(&guest, ROOT_ID, "directory", 0o755).get::<EntryOut>().nodeid;
        std::fs::write(guest.path().join("target"), "target").unwrap();
        std::fs::write(guest.path().join("source"), "source").unwrap();
        let (target, _source) = (guest.node("target"), guest.node("source"));

        unlink(&guest, Opcode::Unlink, ROOT_ID, "file").ok();
        unlink(&guest, Opcode::Rmdir, ROOT_ID, "directory").ok();
        rename(&guest, (ROOT_ID, "source"), (ROOT_ID, "target"), 0).ok();
        // The same name again is another file, and the same inode number, too.
        std::fs::write(guest.path().join("file"), "another").unwrap();
        let again = guest.node("file");
        assert_ne!(again, file);
        assert_eq!(guest.share.live_descriptors(), 3);
        let attributes = |node| guest.getattr(node).get::<AttrOut>().attr;
        for (node, size, links) in [(file, 4, 0), (target, 6, 0), (again, 7, 1)] {
            assert_eq!((attributes(node).size, attributes(node).nlink), (size, links));
        }
        assert_eq!(attributes(directory).nlink, 0);
        assert_eq!(guest.lookup(directory, "x").error, libc::ENOENT);
        let fh = guest.fh(file, libc::O_RDWR);
        assert_eq!(guest.read(file, fh, 0, 100).body, b"data");
        release(&guest, Opcode::Release, file, fh).ok();
        for node in [file, directory, target] {
            guest.forget(node, 1);
            assert_eq!(guest.getattr(node).error, libc::ESTALE);
        }
        assert_eq!((guest.share.live_descriptors(), guest.share.live_inodes()), (0, 3));
    }
}

#[test]
fn a_file_whose_two_names_are_taken_away_at_once_is_there_until_it_is_forgotten() {
    for way in WAYS {
        let guest = guest(way);
        for round in 0..200 {
            let node = file(&guest, b"data");
            link(&guest, node, ROOT_ID, "other").get::<EntryOut>();
            let start = std::sync::Barrier::new(2);
            std::thread::scope(|scope| {
                for name in ["file", "other"] {
                    let (guest, start) = (&guest, &start);
                    scope.spawn(move || {
                        start.wait();
                        unlink(guest, Opcode::Unlink, ROOT_ID, name).ok();
                    });
                }
            });
            let attr = guest.getattr(node).get::<AttrOut>().attr;
            assert_eq!((attr.nlink, attr.size), (0, 4), "round {round}");
            let fh = guest.fh(node, libc::O_RDWR);
            assert_eq!(guest.read(node, fh, 0, 100).body, b"data");
            release(&guest, Opcode::Release, node, fh).ok();
            assert_eq!(guest.share.live_descriptors(), 1);
            guest.forget(node, 2);
            assert_eq!((guest.share.live_descriptors(), guest.share.live_inodes()), (0, 1));
        }
    }
}

#[test]
fn a_file_that_the_host_deletes_is_stale_unless_it_is_open() {
    for way in WAYS {
        let guest = guest(way);
        let file = file(&guest, b"data");
        let fh = guest.fh(file, libc::O_RDONLY);
        std::fs::remove_file(guest.path().join("file")).unwrap();
        // Another with its name, and its inode number where the host is quick to use it again.
        std::fs::write(guest.path().join("file"), "another").unwrap();
        assert_eq!(size_of_file(&guest, file), 4);
        release(&guest, Opcode::Release, file, fh).ok();
        std::fs::remove_file(guest.path().join("file")).unwrap();
        std::fs::write(guest.path().join("file"), "a third").unwrap();
        assert_eq!(guest.getattr(file).error, libc::ESTALE);
        assert_eq!(guest.open(file, libc::O_RDONLY).error, libc::ESTALE);
        let new = guest.node("file");
        assert_ne!(new, file);
        assert_eq!(size_of_file(&guest, new), 7);
        assert_eq!(guest.getattr(file).error, libc::ESTALE);
        guest.forget(file, 1);
        guest.forget(new, 1);
        assert_eq!(guest.share.live_inodes(), 1);
    }
}

#[test]
fn what_the_host_moves_is_found_by_its_handle_or_else_when_it_is_looked_up() {
    for way in WAYS {
        let guest = guest(way);
        std::fs::create_dir_all(guest.path().join("a/b")).unwrap();
        std::fs::write(guest.path().join("a/b/file"), "data").unwrap();
        let file = guest.node("a/b/file");
        let b = guest.node("a/b");
        std::fs::rename(guest.path().join("a"), guest.path().join("moved")).unwrap();
        if guest.getattr(file).error != 0 {
            assert!(!way || !has_handles(&guest));
            assert_eq!(guest.getattr(file).error, libc::ESTALE);
            assert_eq!(guest.getattr(b).error, libc::ESTALE);
            // One LOOKUP of the directory that was moved is enough for all below it.
            guest.node("moved");
        }
        assert_eq!(size_of_file(&guest, file), 4);
        assert_eq!(guest.node("moved/b/file"), file);
    }
}

pub(super) fn has_handles(guest: &Guest) -> bool {
    guest.share.mounts.root().has_handles()
}

#[test]
fn directories_that_the_host_moves_into_each_other_are_no_endless_way() {
    let guest = guest(false);
    std::fs::create_dir_all(guest.path().join("a/b/c")).unwrap();
    let (a, b) = (guest.node("a"), guest.node("a/b"));
    let c = guest.node("a/b/c");
    let path = |name| guest.path().join(name);
    std::fs::rename(path("a/b"), path("b")).unwrap();
    std::fs::rename(path("a"), path("b/a")).unwrap();
    // The guest still takes `b` for an entry of `a`, and learns from an open `b` that `a` is one of `b`.
    let node = guest.share.inodes.get(a).unwrap();
    node.identity.named().unwrap().found_at(b, c"a");
    guest.share.directories.clear();
    for node in [a, b, c] {
        assert_eq!(guest.getattr(node).error, libc::ESTALE);
    }
    assert_eq!(guest.node("b/a"), a);
    assert_eq!(guest.getattr(a).error, 0);
}

#[test]
fn a_file_without_a_name_lives_as_long_as_its_node_and_may_get_one() {
    for way in WAYS {
        let guest = guest(way);
        let body = CreateIn { flags: libc::O_RDWR as u32, mode: 0o644, ..CreateIn::default() };
        let answer = guest.call(Opcode::Tmpfile, ROOT_ID, &[body.as_slice(), b"/\0"]);
        if answer.error == libc::EOPNOTSUPP {
            return;
        }
        let (node, fh) = (answer.part::<EntryOut>(0).nodeid, answer.part::<OpenOut>(128).fh);
        assert_eq!(guest.write(node, fh, 0, b"data").error, 0);
        release(&guest, Opcode::Release, node, fh).ok();
        assert_eq!(size_of_file(&guest, node), 4);
        assert_eq!(guest.share.live_descriptors(), 1);
        assert_eq!(link(&guest, node, ROOT_ID, "name").get::<EntryOut>().nodeid, node);
        assert_eq!(guest.share.live_descriptors(), 0);
        assert_eq!(size_of_file(&guest, node), 4);
        guest.forget(node, 2);
        assert_eq!(guest.share.live_inodes(), 1);
    }
}

#[test]
fn a_node_whose_directory_is_forgotten_is_found_again_by_a_lookup() {
    for way in WAYS {
        let guest = guest(way);
        std::fs::create_dir(guest.path().join("d")).unwrap();
        std::fs::write(guest.path().join("d/file"), "data").unwrap();
        let d = guest.node("d");
        let file = guest.node("d/file");
        guest.forget(d, 2);
        assert_eq!(guest.getattr(d).error, libc::ESTALE);
        let expected = if way && has_handles(&guest) { 0 } else { libc::ESTALE };
        assert_eq!(guest.getattr(file).error, expected);
        assert_eq!(guest.node("d/file"), file);
        assert_eq!(size_of_file(&guest, file), 4);
    }
}

#[test]
fn no_more_descriptors_are_held_than_the_share_may_have() {
    for way in WAYS {
        let guest = Guest::with(|options| {
            options.file_handles = way;
            options.max_descriptors = Some(3);
        });
        let names = ["a", "b", "c", "d", "e"];
        let nodes = names.map(|name| {
            std::fs::write(guest.path().join(name), "data").unwrap();
            guest.node(name)
        });
        let open: Vec<_> =
            nodes.iter().map(|node| guest.open(*node, libc::O_RDONLY).error).collect();
        assert_eq!(open, [0, 0, 0, libc::ENFILE, libc::ENFILE]);
        let answer = guest.create(ROOT_ID, "f", libc::O_RDWR, 0o600);
        assert_eq!(answer.error, libc::ENFILE);
        let body = OpenIn::default();
        let answer = guest.call(Opcode::Opendir, ROOT_ID, &[body.as_slice()]);
        assert_eq!(answer.error, libc::ENFILE);
        // There is none to hold a file that loses its name, so it is stale. That it goes is no failure.
        unlink(&guest, Opcode::Unlink, ROOT_ID, "e").ok();
        assert_eq!(guest.getattr(nodes[4]).error, libc::ESTALE);
        // One that is open is reached by that.
        unlink(&guest, Opcode::Unlink, ROOT_ID, "a").ok();
        assert_eq!(size_of_file(&guest, nodes[0]), 4);
        assert_eq!(guest.share.live_descriptors(), 3);
        guest.session.reset();
        assert_eq!(guest.share.live_descriptors(), 0);
    }
}

#[test]
fn requests_use_no_more_memory_for_listings_than_the_share_may_have() {
    let guest = Guest::with(|options| options.max_buffers = Some(10_000));
    let directory = guest.opendir(ROOT_ID);
    assert_eq!(guest.list(true, ROOT_ID, directory, 0, 1 << 20).unwrap_err(), libc::ENOMEM);
    assert!(guest.list(true, ROOT_ID, directory, 0, 8192).is_ok());
    for name in 0..200 {
        std::fs::File::create(guest.path().join(format!("a-name-of-some-length-{name}"))).unwrap();
    }
    // What was read of the host and waits for the next request counts, handle by handle. Where there is no
    // room for it, it is read again; no name is lost.
    let handles: Vec<u64> = (0..20).map(|_| guest.opendir(ROOT_ID)).collect();
    for fh in &handles {
        let (mut offset, mut listed) = (0, 0);
        loop {
            let names = guest.list(false, ROOT_ID, *fh, offset, 300).unwrap();
            assert!(guest.share.buffers.used() <= 10_000);
            let Some(last) = names.last() else { break };
            offset = last.next;
            listed += names.len();
        }
        assert_eq!(listed, 202);
        guest.list(false, ROOT_ID, *fh, 0, 300).unwrap();
    }
    let held = guest.share.buffers.used();
    assert!(held > 0 && held <= 10_000, "{held}");
    for fh in handles {
        release(&guest, Opcode::Releasedir, ROOT_ID, fh).ok();
    }
    release(&guest, Opcode::Releasedir, ROOT_ID, directory).ok();
    assert_eq!(guest.share.buffers.used(), 0);
}

#[test]
fn a_tree_of_many_files_costs_little_and_gives_it_back() {
    const FILES: usize = 50_000;
    const DIRECTORIES: usize = 50;
    for way in WAYS {
        let (scratch, guest) = guest_in_memory(way);
        for directory in 0..DIRECTORIES {
            let path = scratch.path().join(format!("d{directory}"));
            std::fs::create_dir(&path).unwrap();
            for file in 0..FILES / DIRECTORIES {
                std::fs::File::create(path.join(format!("file-{file}"))).unwrap();
            }
        }
        let before = descriptors_below(scratch.path());
        let mut nodes = Vec::new();
        for directory in 0..DIRECTORIES {
            let parent = guest.node(&format!("d{directory}"));
            nodes.push((parent, 1));
            let fh = guest.opendir(parent);
            let mut offset = 0;
            loop {
                let names = guest.list(true, parent, fh, offset, 60_000).unwrap();
                let Some(last) = names.last() else { break };
                offset = last.next;
                let entries = names.iter().filter_map(|name| name.entry);
                nodes.extend(entries.map(|entry| (entry.nodeid, 1)).filter(|node| node.0 != 0));
            }
            release(&guest, Opcode::Releasedir, parent, fh).ok();
        }
        assert_eq!(nodes.len(), FILES + DIRECTORIES);
        assert_eq!(guest.share.live_inodes(), 1 + FILES + DIRECTORIES);
        let held = descriptors_below(scratch.path()) - before;
        let most = if way && has_handles(&guest) { 0 } else { Directories::MOST };
        assert!(held <= most, "{held}");
        let capacity = guest.share.inodes.capacity();
        assert!(capacity >= FILES);
        for (nodeid, count) in nodes {
            guest.forget(nodeid, count);
        }
        assert_eq!(guest.share.live_inodes(), 1);
        assert!(guest.share.inodes.capacity() <= capacity / 100, "memory goes back");
        assert_eq!(guest.share.directories.live(), 0);
        assert_eq!(descriptors_below(scratch.path()), before);
    }
}
