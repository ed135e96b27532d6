//! What a guest can send that is wrong, each through a real ring: node ids, lookup counts and handles.

use vm_memory::ByteValued;

use super::queue::{FIRST, guest, guest_on};
use crate::fuse::abi::*;
use crate::fuse::opcode::Opcode;
use crate::fuse::testing::Guest;

/// What every operation on a node answers; the ones with a handle name one that does not exist.
fn errors_of_all(guest: &Guest, node: u64) -> Vec<(&'static str, i32)> {
    let named = |before: &[u8]| [before, b"name\0"].concat();
    let link = LinkIn { oldnodeid: node };
    let rename = Rename2In { newdir: ROOT_ID, ..Rename2In::default() };
    let into = Rename2In { newdir: node, ..Rename2In::default() };
    let names = |head: &[u8]| [head, b"file\0other\0".as_slice()].concat();
    let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
    let xattr = GetxattrIn::default();
    let requests = [
        ("LOOKUP", Opcode::Lookup, node, named(b"")),
        ("GETATTR", Opcode::Getattr, node, GetattrIn::default().as_slice().to_vec()),
        ("STATX", Opcode::Statx, node, StatxIn::default().as_slice().to_vec()),
        ("SETATTR", Opcode::Setattr, node, SetattrIn::default().as_slice().to_vec()),
        ("ACCESS", Opcode::Access, node, AccessIn::default().as_slice().to_vec()),
        ("READLINK", Opcode::Readlink, node, Vec::new()),
        ("SYMLINK", Opcode::Symlink, node, b"name\0target\0".to_vec()),
        ("MKNOD", Opcode::Mknod, node, named(MknodIn::default().as_slice())),
        ("MKDIR", Opcode::Mkdir, node, named(MkdirIn::default().as_slice())),
        ("UNLINK", Opcode::Unlink, node, named(b"")),
        ("RMDIR", Opcode::Rmdir, node, named(b"")),
        ("LINK of it", Opcode::Link, ROOT_ID, named(link.as_slice())),
        ("RENAME2 out of it", Opcode::Rename2, node, names(rename.as_slice())),
        ("RENAME2 into it", Opcode::Rename2, ROOT_ID, names(into.as_slice())),
        ("OPEN", Opcode::Open, node, OpenIn::default().as_slice().to_vec()),
        ("OPENDIR", Opcode::Opendir, node, OpenIn::default().as_slice().to_vec()),
        ("CREATE", Opcode::Create, node, named(create.as_slice())),
        ("TMPFILE", Opcode::Tmpfile, node, named(create.as_slice())),
        ("STATFS", Opcode::Statfs, node, Vec::new()),
        ("SYNCFS", Opcode::Syncfs, node, vec![0; 8]),
        ("GETXATTR", Opcode::Getxattr, node, [xattr.as_slice(), b"user.x\0"].concat()),
        ("LISTXATTR", Opcode::Listxattr, node, xattr.as_slice().to_vec()),
    ];
    let mut errors: Vec<_> = requests
        .into_iter()
        .map(|(name, opcode, node, body)| (name, guest.call(opcode, node, &[&body]).error))
        .collect();
    errors.push(("SETUPMAPPING", guest.setup(node, 0, 4096, SETUPMAPPING_READ, 0).error));
    errors
}

#[test]
fn a_node_id_that_was_never_given_is_no_entry_to_every_operation() {
    let guest = guest();
    std::fs::write(guest.path().join("file"), "data").unwrap();
    assert_eq!(guest.node("file"), 2);
    for node in [0, 3, 1 << 32, (1 << 32) | 2, u64::from(u32::MAX), u64::MAX] {
        for (name, error) in errors_of_all(&guest, node) {
            assert_eq!(error, libc::ENOENT, "{name} of {node:#x}");
        }
    }
    assert_eq!(std::fs::read_dir(guest.path()).unwrap().count(), 1, "nothing was made or moved");
}

#[test]
fn a_node_that_was_forgotten_is_stale_to_every_operation() {
    let guest = guest();
    std::fs::create_dir(guest.path().join("directory")).unwrap();
    std::fs::write(guest.path().join("file"), "data").unwrap();
    for name in ["directory", "file"] {
        let node = guest.node(name);
        guest.forget(node, 1);
        for (name, error) in errors_of_all(&guest, node) {
            assert_eq!(error, libc::ESTALE, "{name}");
        }
        assert_ne!(guest.node(name), node, "a number is given out once");
    }
}

#[test]
fn a_node_of_another_kind_is_refused_by_what_needs_one() {
    let guest = guest();
    std::fs::create_dir(guest.path().join("directory")).unwrap();
    std::fs::write(guest.path().join("file"), "data").unwrap();
    let (directory, file) = (guest.node("directory"), guest.node("file"));
    assert_eq!(guest.lookup(file, "x").error, libc::ENOTDIR);
    assert_eq!(guest.create(file, "x", libc::O_RDWR, 0o600).error, libc::ENOTDIR);
    let body = OpenIn::default();
    assert_eq!(guest.call(Opcode::Opendir, file, &[body.as_slice()]).error, libc::ENOTDIR);
    assert_eq!(guest.open(directory, libc::O_RDONLY).error, libc::EISDIR);
    assert_eq!(guest.call(Opcode::Readlink, file, &[]).error, libc::EINVAL);
    assert_eq!(guest.setup(directory, 0, 4096, SETUPMAPPING_READ, 0).error, libc::EINVAL);
}

#[test]
fn a_count_of_lookups_that_is_too_large_is_all_there_are_and_the_root_cannot_be_forgotten() {
    let guest = guest();
    std::fs::write(guest.path().join("file"), "data").unwrap();
    let node = guest.node("file");
    guest.forget(node, u64::MAX);
    guest.forget(node, u64::MAX);
    for node in [0, 77, u64::MAX, ROOT_ID] {
        guest.forget(node, u64::MAX);
    }
    assert_eq!(guest.getattr(node).error, libc::ESTALE);
    assert_eq!(guest.getattr(ROOT_ID).error, 0);
    assert_eq!(guest.share.live_inodes(), 1);
    assert_ne!(guest.node("file"), node);
}

#[test]
fn a_batch_that_counts_more_than_it_holds_forgets_what_it_holds() {
    let guest = guest();
    for name in ["a", "b"] {
        std::fs::write(guest.path().join(name), "").unwrap();
    }
    for count in [2, 3, u32::MAX] {
        let head = BatchForgetIn { count, dummy: 0 };
        let one = |name| ForgetOne { nodeid: guest.node(name), nlookup: 1 };
        let (a, b) = (one("a"), one("b"));
        let body = [head.as_slice(), a.as_slice(), b.as_slice(), &[1; 15]];
        assert!(guest.raw(Opcode::BatchForget as u32, 0, &body).is_none());
        assert_eq!(guest.share.live_inodes(), 1);
    }
}

#[test]
fn a_handle_that_is_forged_closed_or_another_nodes_is_a_bad_one() {
    let guest = guest();
    for name in ["a", "b"] {
        std::fs::write(guest.path().join(name), "data").unwrap();
    }
    let (a, b) = (guest.node("a"), guest.node("b"));
    let closed = guest.fh(a, libc::O_RDWR);
    let body = ReleaseIn { fh: closed, ..ReleaseIn::default() };
    guest.call(Opcode::Release, a, &[body.as_slice()]).ok();
    let (of_a, of_b) = (guest.fh(a, libc::O_RDWR), guest.fh(b, libc::O_RDWR));
    let directory = guest.opendir(ROOT_ID);
    for fh in [0, closed, of_b, directory, of_a + 77, of_a | (1 << 32), u64::MAX] {
        let release = ReleaseIn { fh, ..ReleaseIn::default() };
        let flush = FlushIn { fh, ..FlushIn::default() };
        let sync = FsyncIn { fh, ..FsyncIn::default() };
        let allocate = FallocateIn { fh, length: 1, ..FallocateIn::default() };
        let seek = LseekIn { fh, ..LseekIn::default() };
        let errors = [
            guest.read(a, fh, 0, 10).error,
            guest.write(a, fh, 0, b"x").error,
            guest.call(Opcode::Release, a, &[release.as_slice()]).error,
            guest.call(Opcode::Flush, a, &[flush.as_slice()]).error,
            guest.call(Opcode::Fsync, a, &[sync.as_slice()]).error,
            guest.call(Opcode::Fallocate, a, &[allocate.as_slice()]).error,
            guest.call(Opcode::Lseek, a, &[seek.as_slice()]).error,
        ];
        assert_eq!(errors, [libc::EBADF; 7], "{fh:#x}");
    }
    assert_eq!(guest.read(a, of_a, 0, 10).body, b"data", "the right one still is");
    assert_eq!(guest.share.live_handles(), 3);
}

#[test]
fn a_files_handle_is_no_directorys() {
    let guest = guest();
    std::fs::write(guest.path().join("file"), "data").unwrap();
    let fh = guest.fh(guest.node("file"), libc::O_RDWR);
    for node in [ROOT_ID, guest.node("file")] {
        assert!(guest.list(false, node, fh, 0, 4096).is_err());
        let body = ReleaseIn { fh, ..ReleaseIn::default() };
        let answer = guest.call(Opcode::Releasedir, node, &[body.as_slice()]);
        assert_eq!(answer.error, libc::EBADF);
        let body = FsyncIn { fh, ..FsyncIn::default() };
        assert_eq!(guest.call(Opcode::Fsyncdir, node, &[body.as_slice()]).error, libc::EBADF);
    }
    assert_eq!(guest.share.live_handles(), 1);
}

#[test]
fn more_nodes_handles_or_descriptors_than_there_may_be_are_refused_until_there_is_room() {
    let guest = guest_on(FIRST, 0, |options| {
        options.max_inodes = Some(6);
        options.max_handles = Some(4);
        options.max_descriptors = Some(3);
    });
    let names = ["a", "b", "c", "d", "e", "f"];
    for name in names {
        std::fs::write(guest.path().join(name), "").unwrap();
    }
    // The root is one of six.
    let found = names.map(|name| guest.lookup(ROOT_ID, name).error);
    assert_eq!(found, [0, 0, 0, 0, 0, libc::ENFILE]);
    assert_eq!(guest.create(ROOT_ID, "g", libc::O_RDWR, 0o600).error, libc::ENFILE);
    let nodes = [2, 3, 4, 5];
    let opened = nodes.map(|node| guest.open(node, libc::O_RDONLY));
    assert_eq!(opened.each_ref().map(|answer| answer.error), [0, 0, 0, libc::ENFILE]);
    assert_eq!(guest.share.live_descriptors(), 3);
    let body = ReleaseIn { fh: opened[0].get::<OpenOut>().fh, ..ReleaseIn::default() };
    guest.call(Opcode::Release, 2, &[body.as_slice()]).ok();
    assert_eq!(guest.open(5, libc::O_RDONLY).error, 0);
    guest.forget(2, 1);
    assert_eq!(guest.lookup(ROOT_ID, "f").error, 0);
}
