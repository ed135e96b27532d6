use super::*;

#[test]
fn a_read_only_share_is_changed_by_no_operation() {
    let directory = std::sync::OnceLock::new();
    let guest = Guest::with(|options| {
        options.read_only = true;
        directory.set(options.directory.clone()).unwrap();
        std::fs::write(options.directory.join("file"), "data").unwrap();
        std::fs::create_dir(options.directory.join("d")).unwrap();
    });
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDONLY);
    let tmpfile = CreateIn { flags: libc::O_RDWR as u32, ..CreateIn::default() };
    let copy = CopyFileRangeIn {
        fh_in: fh,
        nodeid_out: node,
        fh_out: fh,
        len: 1,
        ..CopyFileRangeIn::default()
    };
    let access = AccessIn { mask: 2, padding: 0 };
    let answers = [
        guest.create(ROOT_ID, "new", libc::O_RDWR, 0o644),
        guest.create(ROOT_ID, "new", libc::O_RDONLY, 0o644),
        guest.create(ROOT_ID, "file", libc::O_RDONLY, 0o644),
        mkdir(&guest, ROOT_ID, "new", 0o755),
        mknod(&guest, "new", libc::S_IFREG, 0),
        symlink(&guest, ROOT_ID, "new", "target"),
        link(&guest, node, ROOT_ID, "new"),
        unlink(&guest, Opcode::Unlink, ROOT_ID, "file"),
        unlink(&guest, Opcode::Rmdir, ROOT_ID, "d"),
        rename(&guest, (ROOT_ID, "file"), (ROOT_ID, "new"), 0),
        guest.call(Opcode::Tmpfile, ROOT_ID, &[tmpfile.as_slice(), b"/\0"]),
        guest.open(node, libc::O_WRONLY),
        guest.open(node, libc::O_RDWR),
        guest.open(node, libc::O_RDONLY | libc::O_TRUNC),
        guest.write(node, fh, 0, b"x"),
        guest.setattr(node, SetattrIn { valid: 1, mode: 0o777, ..SetattrIn::default() }),
        guest.setattr(node, SetattrIn { valid: 8, ..SetattrIn::default() }),
        guest.setattr(node, SetattrIn { valid: 1 << 8, ..SetattrIn::default() }),
        fallocate(&guest, node, fh, 0, 0, 100),
        guest.call(Opcode::CopyFileRange, node, &[copy.as_slice()]),
        setxattr(&guest, node, "user.x", b"v", 0),
        guest.call(Opcode::Removexattr, node, &[b"user.x\0"]),
        guest.call(Opcode::Access, node, &[access.as_slice()]),
        guest.setup(node, 0, 4096, 3, 0),
    ];
    for (at, answer) in answers.iter().enumerate() {
        assert_eq!(answer.error, libc::EROFS, "operation {at}");
    }
    assert_eq!(guest.read(node, fh, 0, 9).body, b"data");
    guest.setup(node, 0, 4096, 2, 0).ok();
    let mut names: Vec<_> = std::fs::read_dir(directory.get().unwrap())
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    names.sort();
    assert_eq!(names, ["d", "file"]);
    assert_eq!(std::fs::read(guest.path().join("file")).unwrap(), b"data");
}

#[test]
fn reading_from_a_read_only_share_leaves_no_trace() {
    let guest = Guest::with(|options| options.read_only = true);
    let path = guest.path().join("file");
    std::fs::write(&path, b"data").unwrap();
    // Older than the last change: the host would note the next reading (relatime).
    let long_ago = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000);
    let set = |path: &std::path::Path| {
        let times = std::fs::FileTimes::new().set_accessed(long_ago);
        std::fs::File::open(path).unwrap().set_times(times).unwrap();
    };
    let accessed = |path: &std::path::Path| path.metadata().unwrap().accessed().unwrap();
    set(&path);
    set(guest.path());
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDONLY);
    assert_eq!(guest.read(node, fh, 0, 9).body, b"data");
    let dir = guest.opendir(ROOT_ID);
    guest.list(false, ROOT_ID, dir, 0, 4096).unwrap();
    assert_eq!((accessed(&path), accessed(guest.path())), (long_ago, long_ago));
}
