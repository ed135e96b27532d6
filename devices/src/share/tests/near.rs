//! What is served without waiting, and what is left alone.

use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::Advice;

use super::*;
use crate::share::testing::Disk;

/// A guest whose files are in memory.
fn in_memory() -> Guest {
    let guest = Guest::without_init_in("/dev/shm", |_| {}, true);
    assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
    guest
}

fn on_disk(disk: &Disk) -> Guest {
    let guest = Guest::without_init_in(disk.path(), |_| {}, true);
    assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
    guest
}

fn requests(guest: &Guest, opcode: Opcode) -> u64 {
    guest.session.counters().requests(opcode)
}

#[test]
fn what_may_take_long_is_left_alone_and_done_by_who_may_wait() {
    let guest = in_memory();
    std::fs::write(guest.path().join("file"), "0123456789").unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDWR);
    let size = SetattrIn { valid: SetattrValid::SIZE.bits(), size: 3, ..SetattrIn::default() };
    let fsync = FsyncIn { fh, ..FsyncIn::default() };
    let truncating = OpenIn { flags: (libc::O_RDWR | libc::O_TRUNC) as u32, fuse_flags: 0 };
    let allocate = FallocateIn { fh, length: 4096, ..FallocateIn::default() };
    let lock =
        LkIn { fh, owner: 1, lk: FileLock { type_: 1, ..FileLock::default() }, ..LkIn::default() };
    let large = WriteIn { fh, size: (64 << 10) + 1, ..WriteIn::default() };
    let synced = WriteIn { fh, size: 1, flags: libc::O_DSYNC as u32, ..WriteIn::default() };
    let killing = WriteIn { fh, size: 1, fuse_flags: WRITE_KILL_SUIDGID, ..WriteIn::default() };
    let bytes = vec![b'x'; (64 << 10) + 1];
    let cases: [(Opcode, &[&[u8]]); 9] = [
        (Opcode::Setattr, &[size.as_slice()]),
        (Opcode::Fsync, &[fsync.as_slice()]),
        (Opcode::Open, &[truncating.as_slice()]),
        (Opcode::Fallocate, &[allocate.as_slice()]),
        (Opcode::Setlkw, &[lock.as_slice()]),
        (Opcode::Write, &[large.as_slice(), &bytes]),
        (Opcode::Write, &[synced.as_slice(), b"y"]),
        (Opcode::Write, &[killing.as_slice(), b"y"]),
        (Opcode::Syncfs, &[&[0; 8]]),
    ];
    for (opcode, parts) in cases {
        let before = (requests(&guest, opcode), guest.share.live_handles());
        let metadata = std::fs::metadata(guest.path().join("file")).unwrap();
        assert!(guest.at_once(opcode, node, parts).is_none(), "{opcode:?}");
        let now = std::fs::metadata(guest.path().join("file")).unwrap();
        let of = |of: std::fs::Metadata| (of.len(), of.ctime(), of.ctime_nsec());
        assert_eq!(of(metadata), of(now), "{opcode:?}");
        assert_eq!((requests(&guest, opcode), guest.share.live_handles()), before);
        assert_eq!(guest.call(opcode, node, parts).error, 0, "{opcode:?}");
        assert_eq!(requests(&guest, opcode), before.0 + 1, "counted once");
    }
}

#[test]
fn names_attributes_and_data_in_memory_are_served_at_once() {
    let guest = in_memory();
    let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
    let made = guest.at_once(Opcode::Create, ROOT_ID, &[create.as_slice(), b"file\0"]).unwrap();
    let (entry, open): (EntryOut, OpenOut) = (made.part(0), made.part(128));
    let (node, fh) = (entry.nodeid, open.fh);
    let write = WriteIn { fh, size: 5, ..WriteIn::default() };
    guest.at_once(Opcode::Write, node, &[write.as_slice(), b"hello"]).unwrap();
    let append = WriteIn { flags: libc::O_APPEND as u32, ..write };
    guest.at_once(Opcode::Write, node, &[append.as_slice(), b"world"]).unwrap();
    let read = ReadIn { fh, size: 4096, ..ReadIn::default() };
    let data = guest.at_once(Opcode::Read, node, &[read.as_slice()]).unwrap();
    assert_eq!(data.body, b"helloworld");
    let found = guest.at_once(Opcode::Lookup, ROOT_ID, &[b"file\0"]).unwrap();
    assert_eq!(found.get::<EntryOut>().nodeid, node);
    let missing = guest.at_once(Opcode::Lookup, ROOT_ID, &[b"none\0"]).unwrap();
    assert_eq!(missing.error, libc::ENOENT);
    let rename = RenameIn { newdir: ROOT_ID };
    guest.at_once(Opcode::Rename, ROOT_ID, &[rename.as_slice(), b"file\0new\0"]).unwrap().ok();
    let flush = FlushIn { fh, ..FlushIn::default() };
    guest.at_once(Opcode::Flush, node, &[flush.as_slice()]).unwrap().ok();
    let release = ReleaseIn { fh, ..ReleaseIn::default() };
    guest.at_once(Opcode::Release, node, &[release.as_slice()]).unwrap().ok();
    let setup = SetupmappingIn { fh: u64::MAX, len: 4096, flags: 2, ..SetupmappingIn::default() };
    guest.at_once(Opcode::Setupmapping, node, &[setup.as_slice()]).unwrap().ok();
    guest.at_once(Opcode::Unlink, ROOT_ID, &[b"new\0"]).unwrap().ok();
    assert_eq!(std::fs::read_dir(guest.path()).unwrap().count(), 0);
}

#[test]
fn data_that_is_not_in_the_page_cache_is_left_to_who_may_wait() {
    let Some(disk) = Disk::new("ext4", 512) else { return };
    let guest = on_disk(&disk);
    let path = guest.path().join("file");
    std::fs::write(&path, [7; 256 << 10]).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDONLY);
    let read = |offset, size| ReadIn { fh, offset, size, ..ReadIn::default() };
    let at_once =
        |offset, size| guest.at_once(Opcode::Read, node, &[read(offset, size).as_slice()]);
    assert_eq!(at_once(0, 256 << 10).unwrap().body.len(), 256 << 10);
    assert_eq!(at_once(0, 1 << 20).unwrap().body.len(), 256 << 10, "up to the end");
    assert_eq!(at_once(1 << 20, 4096).unwrap().body, [], "past it");
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, Advice::Random).unwrap();
    // To be asked for data that is not there starts to read it, and a disk in memory may be quick enough to be asked in
    // vain; then all of it is there. A short answer would be the end of the file.
    let is_left = |cached: usize, size: u32| {
        (0..1000).any(|_| {
            let all = std::num::NonZero::new(256 << 10);
            rustix::fs::fadvise(&file, 0, all, Advice::DontNeed).unwrap();
            file.read_exact_at(&mut vec![0; cached], 0).unwrap();
            let reply = at_once(0, size);
            if let Some(reply) = &reply {
                assert_eq!(reply.body, vec![7; size as usize]);
            }
            reply.is_none()
        })
    };
    assert!(is_left(0, 4096), "nothing is cached");
    assert!(is_left(4096, 256 << 10), "a part is cached");
    assert_eq!(guest.read(node, fh, 0, 256 << 10).body, [7; 256 << 10]);
    assert_eq!(at_once(0, 256 << 10).unwrap().body, [7; 256 << 10]);
}

#[test]
fn writes_at_once_land_where_they_belong_on_every_file_system() {
    for kind in ["ext4", "xfs", "btrfs"] {
        let Some(disk) = Disk::new(kind, 512) else { continue };
        let guest = on_disk(&disk);
        std::fs::write(guest.path().join("file"), "").unwrap();
        let node = guest.node("file");
        let fh = guest.fh(node, libc::O_RDWR);
        for round in 0..64u64 {
            let flags = if round % 2 == 0 { 0 } else { libc::O_APPEND as u32 };
            let body = WriteIn { fh, offset: round * 512, size: 512, flags, ..WriteIn::default() };
            let data = [round as u8; 512];
            let parts = [body.as_slice(), &data];
            let done = guest.at_once(Opcode::Write, node, &parts);
            let done = done.unwrap_or_else(|| guest.call(Opcode::Write, node, &parts));
            assert_eq!(done.get::<WriteOut>().size, 512, "{kind}");
        }
        let expected: Vec<u8> = (0..64).flat_map(|round| [round; 512]).collect();
        assert_eq!(std::fs::read(guest.path().join("file")).unwrap(), expected, "{kind}");
    }
}

#[test]
fn what_is_made_as_somebody_else_is_not_made_by_a_vcpu() {
    if !is_root() {
        return;
    }
    let mut guest = in_memory();
    guest.uid = 1000;
    let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
    let parts = [create.as_slice(), &b"file\0"[..]];
    assert!(guest.at_once(Opcode::Create, ROOT_ID, &parts).is_none());
    assert_eq!(std::fs::read_dir(guest.path()).unwrap().count(), 0);
    assert_eq!((guest.share.live_inodes(), guest.share.live_handles()), (1, 0));
    assert_eq!(guest.call(Opcode::Create, ROOT_ID, &parts).error, 0);
    assert_eq!(std::fs::metadata(guest.path().join("file")).unwrap().uid(), 1000);
    // The same of what comes with the mask of its process.
    let guest = Guest::with(|options| options.acl = true);
    let mkdir = MkdirIn { mode: 0o777, umask: 0o22 };
    let parts = [mkdir.as_slice(), &b"directory\0"[..]];
    assert!(guest.at_once(Opcode::Mkdir, ROOT_ID, &parts).is_none());
}

#[test]
fn what_is_mounted_from_elsewhere_is_never_looked_at_by_a_vcpu() {
    let guest = in_memory();
    // Nobody knows who serves these files.
    let lower = tempfile::tempdir().unwrap();
    std::fs::write(lower.path().join("file"), "x").unwrap();
    let Some(overlay) = Mounted::overlay(&guest.path().join("far"), lower.path()) else { return };
    std::fs::create_dir(guest.path().join("near")).unwrap();
    assert!(guest.at_once(Opcode::Lookup, ROOT_ID, &[b"near\0"]).is_some());
    assert!(guest.at_once(Opcode::Lookup, ROOT_ID, &[b"far\0"]).is_none());
    let forget = |node| {
        let one = ForgetIn { nlookup: 1 };
        let mut frame = guest.frame(Opcode::Forget as u32, node, &[one.as_slice()]);
        let mut none = [];
        let request = crate::memory::GuestBuffer::from_slice(&mut frame);
        let reply = crate::memory::GuestBuffer::from_slice(&mut none);
        guest.session.serve_urgent_at_once(&request, &reply)
    };
    let near = guest.node("near");
    assert_eq!(forget(near), Some(0));
    let far = guest.node("far");
    assert!(guest.at_once(Opcode::Lookup, far, &[b"file\0"]).is_none());
    assert!(guest.at_once(Opcode::Getattr, far, &[GetattrIn::default().as_slice()]).is_none());
    let rename = RenameIn { newdir: far };
    let parts = [rename.as_slice(), &b"near\0new\0"[..]];
    assert!(guest.at_once(Opcode::Rename, ROOT_ID, &parts).is_none());
    // From now on mappings and forgetting may concern it as well.
    assert_eq!(forget(near), None);
    let setup = SetupmappingIn { fh: u64::MAX, len: 4096, flags: 2, ..SetupmappingIn::default() };
    let file = guest.node("far/file");
    assert!(guest.at_once(Opcode::Setupmapping, file, &[setup.as_slice()]).is_none());
    assert!(guest.at_once(Opcode::Getattr, ROOT_ID, &[GetattrIn::default().as_slice()]).is_some());
    drop(overlay);
}

#[test]
fn a_share_of_an_unknown_file_system_is_served_at_once_only_if_it_is_trusted() {
    let lower = tempfile::tempdir().unwrap();
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    let Some(overlay) = Mounted::overlay(&place.path().join("far"), lower.path()) else { return };
    for trusted in [false, true] {
        let trust = |options: &mut crate::share::Options| options.trust_file_systems = trusted;
        let guest = Guest::without_init_in(overlay.path(), trust, true);
        assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
        let answer = guest.at_once(Opcode::Lookup, ROOT_ID, &[b"none\0"]);
        assert_eq!(answer.is_some(), trusted);
    }
}

#[test]
fn a_large_file_is_not_given_back_by_a_vcpu() {
    let guest = in_memory();
    let large = std::fs::File::create(guest.path().join("large")).unwrap();
    rustix::fs::fallocate(&large, rustix::fs::FallocateFlags::empty(), 0, 17 << 20).unwrap();
    std::fs::write(guest.path().join("small"), [1; 4096]).unwrap();
    assert!(guest.at_once(Opcode::Unlink, ROOT_ID, &[b"large\0"]).is_none());
    assert!(guest.at_once(Opcode::Unlink, ROOT_ID, &[b"small\0"]).is_some());
    assert!(guest.path().join("large").exists());
}
