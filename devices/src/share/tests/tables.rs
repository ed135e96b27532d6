use super::*;

#[test]
fn node_ids_that_were_never_given_are_refused_everywhere() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), "").unwrap();
    guest.node("file");
    for node in [0, 3, 1 << 32, (1 << 32) | 1, u64::MAX, u64::MAX - 1, 0x7fff_ffff_ffff] {
        let errors = [
            guest.getattr(node).error,
            guest.lookup(node, "file").error,
            guest.open(node, libc::O_RDONLY).error,
            guest.create(node, "x", libc::O_RDWR, 0o644).error,
            link(&guest, node, ROOT_ID, "x").error,
            rename(&guest, (node, "a"), (ROOT_ID, "b"), 0).error,
            rename(&guest, (ROOT_ID, "file"), (node, "b"), 0).error,
            guest.setattr(node, SetattrIn::default()).error,
            guest.call(Opcode::Statfs, node, &[]).error,
            guest.call(Opcode::Readlink, node, &[]).error,
            getxattr(&guest, node, "user.x", 0).error,
            guest.setup(node, 0, 4096, 2, 0).error,
            guest.call(Opcode::Syncfs, node, &[&[0; 8]]).error,
        ];
        assert_eq!(errors, [libc::ENOENT; 13], "{node:#x}");
    }
}

#[test]
fn a_node_lives_as_long_as_its_lookups() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), "").unwrap();
    let node = guest.node("file");
    assert_eq!(guest.node("file"), node);
    guest.forget(node, 1);
    assert_eq!(guest.getattr(node).error, 0);
    guest.forget(node, 1);
    assert_eq!(guest.getattr(node).error, libc::ESTALE);
    assert_eq!(guest.share.live_inodes(), 1);
    // The next one of the same file has another number.
    let again = guest.node("file");
    assert_ne!(again, node);
    assert_eq!(guest.getattr(node).error, libc::ESTALE);
    guest.forget(node, 1);
    assert_eq!(guest.getattr(again).error, 0);
}

#[test]
fn forgetting_too_much_is_forgetting_and_the_root_stays() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), "").unwrap();
    let node = guest.node("file");
    guest.forget(ROOT_ID, u64::MAX);
    guest.forget(node, u64::MAX);
    guest.forget(node, u64::MAX);
    guest.forget(0, 1);
    assert_eq!(guest.getattr(ROOT_ID).error, 0);
    assert_eq!(guest.share.live_inodes(), 1);
}

#[test]
fn a_batch_forgets_what_its_bytes_name_whatever_its_count_says() {
    let guest = Guest::new();
    for name in ["a", "b"] {
        std::fs::write(guest.path().join(name), "").unwrap();
    }
    let one = |nodeid| ForgetOne { nodeid, nlookup: 1 };
    for count in [2, u32::MAX] {
        let head = BatchForgetIn { count, dummy: 0 };
        let (a, b) = (one(guest.node("a")), one(guest.node("b")));
        let body = [head.as_slice(), a.as_slice(), b.as_slice()];
        let opcode = Opcode::BatchForget as u32;
        assert!(guest.raw(opcode, 0, &body).is_none());
        assert_eq!(guest.share.live_inodes(), 1);
    }
}

#[test]
fn handles_are_of_one_node_and_one_kind() {
    let guest = Guest::new();
    for name in ["a", "b"] {
        std::fs::write(guest.path().join(name), name).unwrap();
    }
    let (a, b) = (guest.node("a"), guest.node("b"));
    let fh = guest.fh(a, libc::O_RDWR);
    let dir = guest.opendir(ROOT_ID);
    for (node, fh) in [(b, fh), (a, dir), (a, 0), (a, fh + 100), (a, fh | (1 << 32)), (a, u64::MAX)]
    {
        assert_eq!(guest.read(node, fh, 0, 1).error, libc::EBADF);
        assert_eq!(guest.write(node, fh, 0, b"x").error, libc::EBADF);
        assert_eq!(fallocate(&guest, node, fh, 0, 0, 1).error, libc::EBADF);
        assert_eq!(release(&guest, Opcode::Release, node, fh).error, libc::EBADF);
    }
    for (node, fh) in [(a, fh), (ROOT_ID, fh), (a, dir)] {
        assert!(guest.list(false, node, fh, 0, 4096).is_err());
        assert_eq!(release(&guest, Opcode::Releasedir, node, fh).error, libc::EBADF);
    }
    release(&guest, Opcode::Release, a, fh).ok();
    assert_eq!(guest.read(a, fh, 0, 1).error, libc::EBADF, "closed");
    assert_eq!(release(&guest, Opcode::Release, a, fh).error, libc::EBADF);
    release(&guest, Opcode::Releasedir, ROOT_ID, dir).ok();
    assert_eq!(guest.share.live_handles(), 0);
    assert_eq!(std::fs::read(guest.path().join("b")).unwrap(), b"b");
}

#[test]
fn a_full_table_answers_enfile_and_recovers() {
    let guest = Guest::with(|options| {
        options.max_inodes = Some(3);
        options.max_handles = Some(2);
    });
    for name in ["a", "b", "c"] {
        std::fs::write(guest.path().join(name), "").unwrap();
    }
    let (a, b) = (guest.node("a"), guest.node("b"));
    assert_eq!(guest.lookup(ROOT_ID, "c").error, libc::ENFILE);
    assert_eq!(guest.lookup(ROOT_ID, "a").error, 0, "known already");
    // A listing is not lost to it: the name comes without a node.
    let dir = guest.opendir(ROOT_ID);
    let names = guest.list(true, ROOT_ID, dir, 0, 4096).unwrap();
    assert_eq!(names.len(), 5);
    let nodes: Vec<u64> = names.iter().map(|name| name.entry.unwrap().nodeid).collect();
    assert_eq!(nodes.iter().filter(|node| **node == 0).count(), 3);

    let fh = guest.fh(a, libc::O_RDONLY);
    assert_eq!(guest.open(b, libc::O_RDONLY).error, libc::ENFILE);
    let answer = guest.create(ROOT_ID, "made", libc::O_RDWR, 0o644);
    assert_eq!(answer.error, libc::ENFILE);
    assert!(!guest.path().join("made").exists());
    release(&guest, Opcode::Release, a, fh).ok();
    assert_eq!(guest.open(b, libc::O_RDONLY).error, 0);
    guest.forget(b, 9);
    assert_eq!(guest.lookup(ROOT_ID, "c").error, 0);
}

#[test]
fn what_is_refused_for_want_of_room_changes_nothing() {
    let guest = Guest::with(|options| {
        options.max_inodes = Some(2);
        options.max_handles = Some(1);
    });
    let node = file(&guest, b"precious");
    let fh = guest.fh(node, libc::O_RDONLY);
    let refused = [
        guest.open(node, libc::O_RDWR | libc::O_TRUNC),
        guest.create(ROOT_ID, "made", libc::O_RDWR, 0o644),
        mkdir(&guest, ROOT_ID, "made", 0o755),
        mknod(&guest, "made", libc::S_IFREG | 0o600, 0),
        symlink(&guest, ROOT_ID, "made", "nowhere"),
    ];
    assert_eq!(refused.each_ref().map(|answer| answer.error), [libc::ENFILE; 5]);
    release(&guest, Opcode::Release, node, fh).ok();
    let answer = guest.create(ROOT_ID, "made", libc::O_RDWR, 0o644);
    assert_eq!(answer.error, libc::ENFILE, "a node is missing");
    assert_eq!(std::fs::read(guest.path().join("file")).unwrap(), b"precious");
    assert_eq!(std::fs::read_dir(guest.path()).unwrap().count(), 1);
    guest.fh(node, libc::O_RDWR | libc::O_TRUNC);
    assert_eq!(std::fs::read(guest.path().join("file")).unwrap(), b"");
}

#[test]
fn many_threads_at_once_agree_on_nodes_and_counts() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), "").unwrap();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for _ in 0..500 {
                    let node = guest.node("file");
                    assert_eq!(guest.getattr(node).error, 0);
                    let fh = guest.fh(node, libc::O_RDWR);
                    assert_eq!(guest.write(node, fh, 0, b"x").error, 0);
                    release(&guest, Opcode::Release, node, fh).ok();
                    guest.forget(node, 1);
                }
            });
        }
    });
    assert_eq!((guest.share.live_inodes(), guest.share.live_handles()), (1, 0));
}
