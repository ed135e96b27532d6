use super::*;

fn content(guest: &Guest) -> Vec<u8> {
    std::fs::read(guest.path().join("file")).unwrap()
}

#[test]
fn create_makes_opens_and_names_a_file() {
    let guest = Guest::new();
    let answer = guest.create(ROOT_ID, "file", libc::O_WRONLY | libc::O_CREAT, 0o640);
    assert_eq!(answer.body.len(), 128 + 16);
    let (entry, open): (EntryOut, OpenOut) = (answer.part(0), answer.part(128));
    assert_eq!(entry.attr.mode, libc::S_IFREG | 0o640);
    assert_eq!(entry.attr.flags, ATTR_DAX);
    assert_eq!(guest.write(entry.nodeid, open.fh, 0, b"abc").get::<WriteOut>().size, 3);
    assert_eq!(content(&guest), b"abc");
    assert_eq!(guest.read(entry.nodeid, open.fh, 0, 3).error, libc::EBADF, "write-only");
    assert_eq!(guest.node("file"), entry.nodeid);

    // There already: opened, or refused, as the guest asked; truncated only on request.
    let answer = guest.create(ROOT_ID, "file", libc::O_RDWR | libc::O_EXCL, 0o600);
    assert_eq!(answer.error, libc::EEXIST);
    assert_eq!(guest.create(ROOT_ID, "file", libc::O_RDWR, 0o600).error, 0);
    assert_eq!(content(&guest), b"abc");
    let answer = guest.create(ROOT_ID, "file", libc::O_RDWR | libc::O_TRUNC, 0o600);
    assert_eq!(answer.part::<EntryOut>(0).nodeid, entry.nodeid);
    assert_eq!(content(&guest), b"");
    std::fs::create_dir(guest.path().join("d")).unwrap();
    assert_eq!(guest.create(ROOT_ID, "d", libc::O_RDWR, 0o600).error, libc::EISDIR);
}

#[test]
fn a_file_without_a_name_can_be_used_and_get_one() {
    let guest = Guest::new();
    let body = CreateIn {
        flags: (libc::O_RDWR | libc::O_TMPFILE) as u32,
        mode: libc::S_IFREG | 0o600,
        ..CreateIn::default()
    };
    // The name that Linux sends.
    let answer = guest.call(Opcode::Tmpfile, ROOT_ID, &[body.as_slice(), b"/\0"]);
    if answer.error == libc::EOPNOTSUPP {
        return;
    }
    let (entry, open): (EntryOut, OpenOut) = (answer.part(0), answer.part(128));
    assert_eq!(entry.attr.nlink, 0);
    assert_eq!(guest.write(entry.nodeid, open.fh, 0, b"tmp").error, 0);
    assert_eq!(std::fs::read_dir(guest.path()).unwrap().count(), 0);
    assert_eq!(link(&guest, entry.nodeid, ROOT_ID, "file").error, 0);
    assert_eq!(content(&guest), b"tmp");
}

#[test]
fn reads_are_cut_at_the_end_of_the_file_and_at_the_room_there_is() {
    let mut guest = Guest::new();
    let data: Vec<u8> = (0..100_000u32).map(|at| (at % 251) as u8).collect();
    let node = file(&guest, &data);
    let fh = guest.fh(node, libc::O_RDONLY);
    assert_eq!(guest.read(node, fh, 0, 1 << 20).body, data);
    assert_eq!(guest.read(node, fh, 99_990, 100).body, &data[99_990..]);
    assert_eq!(guest.read(node, fh, 100_000, 100).body, b"");
    assert_eq!(guest.read(node, fh, 5, 0).body, b"");
    for (offset, size) in [(u64::MAX, 1), (i64::MAX as u64, 1), (1 << 63, 0), (u64::MAX - 5, 6)] {
        assert_eq!(guest.read(node, fh, offset, size).error, libc::EINVAL);
    }
    guest.room = 16 + 10;
    assert_eq!(guest.read(node, fh, 3, u32::MAX).body, &data[3..13]);
    guest.room = 16;
    assert_eq!(guest.read(node, fh, 0, 10).body, b"");
}

#[test]
fn a_write_whose_size_is_not_that_of_its_data_is_refused() {
    let guest = Guest::new();
    let node = file(&guest, b"before");
    let fh = guest.fh(node, libc::O_RDWR);
    for size in [0, 2, 4, 1 << 20, u32::MAX] {
        let body = WriteIn { fh, size, ..WriteIn::default() };
        let answer = guest.call(Opcode::Write, node, &[body.as_slice(), b"xxx"]);
        assert_eq!(answer.error, libc::EINVAL, "{size}");
    }
    for offset in [u64::MAX, i64::MAX as u64 - 1, u64::MAX - 2] {
        assert_eq!(guest.write(node, fh, offset, b"xxx").error, libc::EINVAL);
    }
    assert_eq!(content(&guest), b"before");
    let largest = vec![7; MAX_WRITE as usize];
    assert_eq!(guest.write(node, fh, 0, &largest).get::<WriteOut>().size, MAX_WRITE);
    assert_eq!(content(&guest), largest);
    let read_only = guest.fh(node, libc::O_RDONLY);
    assert_eq!(guest.write(node, read_only, 0, b"x").error, libc::EBADF);
}

#[test]
fn direct_io_works_at_any_alignment() {
    let guest = Guest::new();
    let node = file(&guest, b"0123456789");
    let fh = guest.fh(node, libc::O_RDWR | libc::O_DIRECT);
    assert_eq!(guest.read(node, fh, 3, 4).body, b"3456");
    assert_eq!(guest.write(node, fh, 1, b"abc").error, 0);
    assert_eq!(content(&guest), b"0abc456789");
    let answer = guest.create(ROOT_ID, "new", libc::O_RDWR | libc::O_DIRECT, 0o600);
    let (entry, open): (EntryOut, OpenOut) = (answer.part(0), answer.part(128));
    assert_eq!(guest.write(entry.nodeid, open.fh, 7, b"x").error, 0);
}

#[test]
fn appends_go_to_the_end_as_it_is_on_the_host() {
    let guest = Guest::new();
    let node = file(&guest, b"one ");
    let flags = libc::O_WRONLY | libc::O_APPEND;
    let fh = guest.fh(node, flags);
    // The guest still believes in the old end; the host has appended meanwhile.
    std::fs::write(guest.path().join("file"), "one two ").unwrap();
    assert_eq!(guest.write_with(node, fh, 4, b"three", flags, 0).get::<WriteOut>().size, 5);
    assert_eq!(content(&guest), b"one two three");
    // A page of the guest's cache goes to its place, through whatever handle.
    assert_eq!(guest.write_with(node, fh, 0, b"ONE", flags, WRITE_CACHE).error, 0);
    assert_eq!(guest.write_with(node, fh, 4, b"TWO", 0, WRITE_CACHE).error, 0);
    assert_eq!(content(&guest), b"ONE TWO three");
}

#[test]
fn an_open_that_truncates_truncates() {
    let guest = Guest::new();
    let node = file(&guest, b"data");
    assert_eq!(guest.open(node, libc::O_WRONLY | libc::O_TRUNC).error, 0);
    assert_eq!(content(&guest), b"");
    assert_eq!(guest.open(ROOT_ID, libc::O_RDONLY).error, libc::EISDIR);
}

#[test]
fn the_rest_of_a_files_operations_work() {
    let guest = Guest::new();
    let node = file(&guest, b"0123456789");
    let fh = guest.fh(node, libc::O_RDWR);
    let flush = FlushIn { fh, ..FlushIn::default() };
    guest.call(Opcode::Flush, node, &[flush.as_slice()]).ok();
    for fsync_flags in [0, FSYNC_FDATASYNC] {
        let body = FsyncIn { fh, fsync_flags, padding: 0 };
        guest.call(Opcode::Fsync, node, &[body.as_slice()]).ok();
    }
    fallocate(&guest, node, fh, 0, 0, 20).ok();
    assert_eq!(content(&guest).len(), 20);
    let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    fallocate(&guest, node, fh, punch, 0, 5).ok();
    assert_eq!(&content(&guest)[..10], b"\0\0\0\0\x0056789");
    for mode in [libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE, 1 << 20, -1] {
        assert_eq!(fallocate(&guest, node, fh, mode, 0, 4096).error, libc::EOPNOTSUPP);
    }
    for (offset, length) in [(0, 0), (0, u64::MAX), (u64::MAX, 1), (i64::MAX as u64, 1)] {
        assert_eq!(fallocate(&guest, node, fh, 0, offset, length).error, libc::EINVAL);
    }

    let lseek = |whence: i32, offset| {
        let body = LseekIn { fh, offset, whence: whence as u32, padding: 0 };
        guest.call(Opcode::Lseek, node, &[body.as_slice()])
    };
    assert_eq!(lseek(libc::SEEK_HOLE, 0).error, 0);
    assert_eq!(lseek(libc::SEEK_END, 0).get::<LseekOut>().offset, 20);
    assert_eq!(lseek(libc::SEEK_DATA, 1 << 40).error, libc::ENXIO);
    for (whence, offset) in [(1, 0), (5, 0), (-1, 0), (libc::SEEK_DATA, u64::MAX)] {
        assert_eq!(lseek(whence, offset).error, libc::EINVAL);
    }

    let access = |mask| {
        let body = AccessIn { mask, padding: 0 };
        guest.call(Opcode::Access, node, &[body.as_slice()]).error
    };
    assert_eq!((access(0), access(6)), (0, 0));
    assert_eq!((access(1), access(8)), (libc::EACCES, libc::EINVAL));

    let stat: StatfsOut = guest.call(Opcode::Statfs, ROOT_ID, &[]).get();
    assert_eq!(stat.st.namelen, 255);
    guest.call(Opcode::Syncfs, ROOT_ID, &[&[0; 8]]).ok();
    assert_eq!(content(&guest).len(), 20);
}

#[test]
fn holes_are_not_told_of_to_a_guest_that_collects_writes() {
    let guest = Guest::with(|options| options.writeback = true);
    std::fs::write(guest.path().join("file"), "text").unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDWR);
    let body = LseekIn { fh, offset: 0, whence: libc::SEEK_HOLE as u32, padding: 0 };
    assert_eq!(guest.call(Opcode::Lseek, node, &[body.as_slice()]).error, libc::ENOSYS);
}

#[test]
fn ranges_are_copied_on_the_host() {
    let guest = Guest::new();
    let node = file(&guest, b"0123456789");
    std::fs::write(guest.path().join("to"), "").unwrap();
    let to = guest.node("to");
    let (fh_in, fh_out) = (guest.fh(node, libc::O_RDONLY), guest.fh(to, libc::O_RDWR));
    let copy = |change: &dyn Fn(&mut CopyFileRangeIn)| {
        let mut body = CopyFileRangeIn {
            fh_in,
            offset_in: 2,
            nodeid_out: to,
            fh_out,
            offset_out: 1,
            len: 4,
            flags: 0,
        };
        change(&mut body);
        guest.call(Opcode::CopyFileRange, node, &[body.as_slice()])
    };
    assert_eq!(copy(&|_| {}).get::<WriteOut>().size, 4);
    assert_eq!(std::fs::read(guest.path().join("to")).unwrap(), b"\x002345");
    assert_eq!(copy(&|body| body.flags = 1).error, libc::EINVAL);
    assert_eq!(copy(&|body| body.len = u64::MAX).error, libc::EINVAL);
    assert_eq!(copy(&|body| body.fh_out = fh_in).error, libc::EBADF);
    assert_eq!(copy(&|body| body.nodeid_out = node).error, libc::EBADF);
    assert_eq!(copy(&|body| body.len = 1 << 50).get::<WriteOut>().size, 8);
}

#[test]
fn ioctls_are_refused_but_the_one_that_lsattr_needs() {
    let guest = Guest::new();
    let node = file(&guest, b"");
    let fh = guest.fh(node, libc::O_RDONLY);
    let ioctl = |cmd, in_size, out_size, data: &[u8]| {
        let body = IoctlIn { fh, cmd, in_size, out_size, ..IoctlIn::default() };
        guest.call(Opcode::Ioctl, node, &[body.as_slice(), data])
    };
    let answer = ioctl(0x8008_6601, 0, 4, b"");
    assert!(answer.error == libc::ENOTTY || answer.body.len() == 16 + 4);
    assert_eq!(ioctl(0x4008_6602, 4, 0, b"\0\0\0\0").error, libc::ENOTTY);
    assert_eq!(ioctl(0x5401, 0, 60, b"").error, libc::ENOTTY);
    assert_eq!(ioctl(0x5401, u32::MAX, u32::MAX, b"").error, libc::EINVAL);
}
