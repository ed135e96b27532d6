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

/// The host's own answer to a fallocate of a fresh file of three blocks, and the file.
fn fallocate_here(guest: &Guest, mode: i32, offset: i64, length: i64) -> (i32, Vec<u8>) {
    let path = guest.path().join("same");
    std::fs::write(&path, three_blocks()).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    let mode = rustix::fs::FallocateFlags::from_bits_retain(mode as u32);
    let result = rustix::fs::fallocate(&file, mode, offset as u64, length as u64);
    (result.err().map_or(0, |error| error.raw_os_error()), std::fs::read(path).unwrap())
}

fn three_blocks() -> Vec<u8> {
    [[1; 4096], [2; 4096], [3; 4096]].concat()
}

#[test]
fn fallocate_does_what_the_hosts_file_system_does_in_every_mode() {
    use libc::{
        FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE, FALLOC_FL_KEEP_SIZE,
        FALLOC_FL_PUNCH_HOLE, FALLOC_FL_UNSHARE_RANGE, FALLOC_FL_ZERO_RANGE, O_RDONLY, O_RDWR,
    };
    let guest = Guest::new();
    for mode in [
        0,
        FALLOC_FL_KEEP_SIZE,
        FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE,
        FALLOC_FL_ZERO_RANGE,
        FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE,
        FALLOC_FL_COLLAPSE_RANGE,
        FALLOC_FL_INSERT_RANGE,
        FALLOC_FL_UNSHARE_RANGE,
        FALLOC_FL_UNSHARE_RANGE | FALLOC_FL_KEEP_SIZE,
    ] {
        for (offset, length) in [(4096, 4096), (8192, 8192), (5, 100), (1 << 20, 4096)] {
            let node = file(&guest, &three_blocks());
            let fh = guest.fh(node, O_RDWR);
            let answer = fallocate(&guest, node, fh, mode, offset as u64, length as u64);
            let expected = fallocate_here(&guest, mode, offset, length);
            assert!((answer.error, content(&guest)) == expected, "{mode:#x} at {offset}");
        }
    }
    let node = file(&guest, b"x");
    let fh = guest.fh(node, O_RDWR);
    for mode in [
        FALLOC_FL_PUNCH_HOLE,
        FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_KEEP_SIZE,
        FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE,
        // FALLOC_FL_NO_HIDE_STALE, and FALLOC_FL_WRITE_ZEROES of Linux 6.17.
        4,
        0x80,
        1 << 20,
        -1,
    ] {
        assert_eq!(fallocate(&guest, node, fh, mode, 0, 4096).error, libc::EOPNOTSUPP, "{mode:#x}");
    }
    let read_only = guest.fh(node, O_RDONLY);
    assert_eq!(fallocate(&guest, node, read_only, 0, 0, 4096).error, libc::EBADF);
}

#[test]
fn holes_and_data_are_where_the_host_says() {
    let guest = Guest::new();
    let node = file(&guest, b"");
    let host = std::fs::OpenOptions::new().write(true).open(guest.path().join("file")).unwrap();
    std::os::unix::fs::FileExt::write_at(&host, &[7; 4096], 1 << 20).unwrap();
    host.set_len(3 << 20).unwrap();
    let fh = guest.fh(node, libc::O_RDONLY);
    let mut from = 0;
    // What is data at this grain differs between file systems; that the guest sees the same does not.
    for _ in 0..8 {
        for whence in [libc::SEEK_DATA, libc::SEEK_HOLE] {
            let body = LseekIn { fh, offset: from, whence: whence as u32, padding: 0 };
            let answer = guest.call(Opcode::Lseek, node, &[body.as_slice()]);
            let seek = match whence {
                libc::SEEK_DATA => rustix::fs::SeekFrom::Data(from),
                _ => rustix::fs::SeekFrom::Hole(from),
            };
            match rustix::fs::seek(&host, seek) {
                Ok(at) => assert_eq!(answer.get::<LseekOut>().offset, at),
                Err(error) => assert_eq!(answer.error, error.raw_os_error()),
            }
        }
        from += 500_000;
    }
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
    let send = |opcode, change: &dyn Fn(&mut CopyFileRangeIn)| {
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
        guest.call(opcode, node, &[body.as_slice()])
    };
    let copy = |change: &dyn Fn(&mut CopyFileRangeIn)| send(Opcode::CopyFileRange, change);
    assert_eq!(copy(&|_| {}).get::<WriteOut>().size, 4);
    assert_eq!(std::fs::read(guest.path().join("to")).unwrap(), b"\x002345");
    assert_eq!(copy(&|body| body.flags = 1).error, libc::EINVAL);
    assert_eq!(copy(&|body| body.len = u64::MAX).error, libc::EINVAL);
    assert_eq!(copy(&|body| body.offset_in = i64::MAX as u64).error, libc::EINVAL);
    assert_eq!(copy(&|body| body.fh_out = fh_in).error, libc::EBADF);
    assert_eq!(copy(&|body| body.nodeid_out = node).error, libc::EBADF);
    assert_eq!(copy(&|body| body.fh_in = 99).error, libc::EBADF);
    assert_eq!(copy(&|body| body.len = 1 << 50).get::<WriteOut>().size, 8);
    assert_eq!(copy(&|body| body.offset_in = 10).get::<WriteOut>().size, 0, "the end of the file");
    let long = send(Opcode::CopyFileRange64, &|body| body.len = 1 << 50);
    assert_eq!(long.get::<CopyFileRangeOut>().bytes_copied, 8);
}

#[test]
fn a_long_copy_is_done_in_pieces_and_whole_in_the_end() {
    let guest = Guest::new();
    let node = file(&guest, b"");
    let path = guest.path().join("file");
    let size: u64 = (64 << 20) + 12345;
    let host = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    // Mostly a hole.
    for at in (0..size).step_by(9 << 20) {
        std::os::unix::fs::FileExt::write_at(&host, &at.to_ne_bytes(), at).unwrap();
    }
    host.set_len(size).unwrap();
    let answer = guest.create(ROOT_ID, "to", libc::O_RDWR, 0o600);
    let (entry, open): (EntryOut, OpenOut) = (answer.part(0), answer.part(128));
    let fh_in = guest.fh(node, libc::O_RDONLY);
    let mut done = 0;
    let mut pieces = 0;
    while done < size {
        let body = CopyFileRangeIn {
            fh_in,
            offset_in: done,
            nodeid_out: entry.nodeid,
            fh_out: open.fh,
            offset_out: done,
            len: size - done,
            flags: 0,
        };
        let answer = guest.call(Opcode::CopyFileRange64, node, &[body.as_slice()]);
        let count = answer.get::<CopyFileRangeOut>().bytes_copied;
        assert!(count > 0 && count <= 64 << 20, "{count}");
        done += count;
        pieces += 1;
    }
    assert!(pieces > 1);
    assert!(std::fs::read(path).unwrap() == std::fs::read(guest.path().join("to")).unwrap());
}

#[test]
fn what_the_host_cannot_copy_the_guest_is_told_to_copy_itself() {
    let guest = Guest::new();
    let Some(_mounted) = Mounted::new(&guest.path().join("other"), "tmpfs") else { return };
    let node = file(&guest, b"text");
    std::fs::write(guest.path().join("other/to"), "").unwrap();
    let to = guest.node("other/to");
    let body = CopyFileRangeIn {
        fh_in: guest.fh(node, libc::O_RDONLY),
        nodeid_out: to,
        fh_out: guest.fh(to, libc::O_RDWR),
        len: 4,
        ..CopyFileRangeIn::default()
    };
    for opcode in [Opcode::CopyFileRange, Opcode::CopyFileRange64] {
        let error = guest.call(opcode, node, &[body.as_slice()]).error;
        assert!([libc::EXDEV, libc::EOPNOTSUPP].contains(&error), "{error}");
    }
}

#[test]
fn a_single_write_that_is_to_be_durable_is() {
    // Of a guest that opened without O_SYNC and writes with RWF_DSYNC. That the data is on the disk cannot be
    // seen from here, but that the host was asked can: a file system that refuses the flag refuses the write.
    let guest = Guest::new();
    let node = file(&guest, b"");
    let fh = guest.fh(node, libc::O_RDWR);
    for flags in [libc::O_DSYNC, libc::O_SYNC, libc::O_SYNC | libc::O_APPEND, libc::O_DIRECT] {
        let answer = guest.write_with(node, fh, 0, b"abc", libc::O_RDWR | flags, 0);
        assert_eq!(answer.get::<WriteOut>().size, 3, "{flags:#o}");
    }
    assert_eq!(content(&guest), b"abcabc");
}

#[test]
fn a_flush_is_of_a_file_that_is_open() {
    let guest = Guest::new();
    let node = file(&guest, b"");
    let flush = |nodeid, fh| {
        let body = FlushIn { fh, ..FlushIn::default() };
        guest.call(Opcode::Flush, nodeid, &[body.as_slice()]).error
    };
    for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR] {
        let fh = guest.fh(node, flags);
        // As often as descriptors are closed, and the file stays open.
        assert_eq!((flush(node, fh), flush(node, fh)), (0, 0));
        assert_eq!(guest.getattr(node).error, 0);
        assert_eq!(flush(ROOT_ID, fh), libc::EBADF);
        release(&guest, Opcode::Release, node, fh).ok();
        assert_eq!(flush(node, fh), libc::EBADF);
    }
    assert_eq!(flush(ROOT_ID, guest.opendir(ROOT_ID)), libc::EBADF);
}
