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
fn a_file_is_closed_at_once_unless_more_may_go_than_a_descriptor() {
    let close = |guest: &Guest, opcode, node, fh| {
        let release = ReleaseIn { fh, ..ReleaseIn::default() };
        let done = guest.at_once(opcode, node, &[release.as_slice()]);
        if done.is_none() {
            guest.call(opcode, node, &[release.as_slice()]).ok();
        }
        done.map(|reply| reply.error)
    };
    let guest = in_memory();
    let path = guest.path().join("file");
    std::fs::write(&path, vec![7; 17 << 20]).unwrap();
    let node = guest.node("file");
    for flags in [libc::O_RDONLY, libc::O_RDWR] {
        let fh = guest.fh(node, flags);
        assert_eq!(close(&guest, Opcode::Release, node, fh), Some(0));
        assert_eq!(close(&guest, Opcode::Release, node, fh), Some(libc::EBADF));
    }
    let open = OpenIn::default();
    let open: OpenOut = guest.call(Opcode::Opendir, ROOT_ID, &[open.as_slice()]).get();
    assert_eq!(close(&guest, Opcode::Releasedir, ROOT_ID, open.fh), Some(0));
    let fh = guest.fh(node, libc::O_RDONLY);
    std::fs::remove_file(&path).unwrap();
    assert_eq!(close(&guest, Opcode::Release, node, fh), None, "all that is in it goes");
    assert_eq!(guest.share.live_handles(), 0);

    let Some(disk) = Disk::new("ext4", 512) else { return };
    let guest = on_disk(&disk);
    std::fs::write(guest.path().join("file"), "data").unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDONLY);
    assert_eq!(close(&guest, Opcode::Release, node, fh), Some(0));
    let fh = guest.fh(node, libc::O_RDWR);
    assert_eq!(close(&guest, Opcode::Release, node, fh), None, "a disk may have to do with it");
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

#[test]
fn what_is_mounted_below_something_far_is_not_looked_at_by_a_vcpu() {
    let guest = in_memory();
    let lower = tempfile::tempdir().unwrap();
    std::fs::create_dir(lower.path().join("inner")).unwrap();
    let Some(overlay) = Mounted::overlay(&guest.path().join("far"), lower.path()) else { return };
    let inner = guest.path().join("far/inner");
    rustix::mount::mount("tmpfs", &inner, "tmpfs", rustix::mount::MountFlags::empty(), None)
        .unwrap();
    std::fs::write(inner.join("file"), "x").unwrap();
    let node = guest.node("far/inner/file");
    let getattr = GetattrIn::default();
    assert!(guest.at_once(Opcode::Getattr, node, &[getattr.as_slice()]).is_none());
    assert_eq!(guest.call(Opcode::Getattr, node, &[getattr.as_slice()]).error, 0);
    rustix::mount::unmount(&inner, rustix::mount::UnmountFlags::DETACH).unwrap();
    drop(overlay);
    // What is mounted from memory in memory is.
    let Some(near) = Mounted::new(&guest.path().join("near"), "tmpfs") else { return };
    let other = in_memory();
    let Some(own) = Mounted::new(&other.path().join("near"), "tmpfs") else { return };
    std::fs::write(own.path().join("file"), "x").unwrap();
    let node = other.node("near/file");
    assert!(other.at_once(Opcode::Getattr, node, &[getattr.as_slice()]).is_some());
    drop((near, own));
}

#[test]
fn what_is_mounted_over_the_way_to_a_file_is_not_gone_through() {
    let guest = Guest::without_init_in("/dev/shm", |options| options.file_handles = false, true);
    assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
    let inner = guest.path().join("a/b");
    std::fs::create_dir_all(&inner).unwrap();
    std::fs::write(inner.join("file"), "x").unwrap();
    let node = guest.node("a/b/file");
    // The very file is there as well, by way of another mount.
    if rustix::mount::mount_bind(&inner, &inner).is_err() {
        return;
    }
    // No directory is held.
    guest.share.directories.clear();
    let found = guest.at_once(Opcode::Getattr, node, &[GetattrIn::default().as_slice()]);
    assert_eq!(found.unwrap().error, libc::ESTALE);
    rustix::mount::unmount(&inner, rustix::mount::UnmountFlags::DETACH).unwrap();
    let found = guest.at_once(Opcode::Getattr, node, &[GetattrIn::default().as_slice()]);
    assert_eq!(found.unwrap().error, 0);
}

#[test]
fn a_file_that_somebody_has_a_lease_of_is_opened_by_who_may_wait() {
    let guest = in_memory();
    std::fs::write(guest.path().join("file"), "x").unwrap();
    let node = guest.node("file");
    let open = OpenIn { flags: libc::O_RDWR as u32, fuse_flags: 0 };
    let held = std::fs::File::open(guest.path().join("file")).unwrap();
    assert!(lease(&held, libc::F_RDLCK));
    assert!(guest.at_once(Opcode::Open, node, &[open.as_slice()]).is_none());
    assert_eq!(guest.share.live_handles(), 0);
    assert!(lease(&held, libc::F_UNLCK));
    assert_eq!(guest.at_once(Opcode::Open, node, &[open.as_slice()]).unwrap().error, 0);
}

/// Takes a lease, and has it be told of by a signal that nobody minds, or gives it back.
#[expect(unsafe_code, reason = "fcntl(2)")]
fn lease(file: &std::fs::File, kind: i32) -> bool {
    use std::os::fd::AsRawFd;
    // `F_SETSIG` of linux/fcntl.h.
    const F_SETSIG: i32 = 10;
    // SAFETY: both take a number, and concern the file alone.
    unsafe {
        libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) == 0
            && libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) == 0
    }
}

#[test]
fn a_write_to_a_part_of_a_page_is_left_alone_where_nobody_says_whether_it_would_wait() {
    let Some(disk) = Disk::new("ext4", 512) else { return };
    let guest = on_disk(&disk);
    std::fs::write(guest.path().join("file"), [0; 10000]).unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDWR);
    let append = libc::O_APPEND as u32;
    let cases = [
        (0, 4096, 0, true),
        (0, 8192, 0, true),
        (10, 10, 0, false),
        (4096, 10, 0, false),
        (4096, 4097, 0, false),
        (10000, 10, 0, true),
        (100, 10, append, true),
        (20000, 10, 0, true),
    ];
    for (offset, size, flags, served) in cases {
        let body = WriteIn { fh, offset, size, flags, ..WriteIn::default() };
        let data = vec![1; size as usize];
        let done = guest.at_once(Opcode::Write, node, &[body.as_slice(), &data]);
        assert_eq!(done.is_some(), served, "{offset} {size}");
    }
}

#[test]
fn only_so_much_is_mapped_taken_away_or_forgotten_at_once() {
    let guest = in_memory();
    std::fs::write(guest.path().join("file"), [1; 4096]).unwrap();
    let node = guest.node("file");
    let setup = |len| SetupmappingIn { fh: u64::MAX, len, flags: 2, ..SetupmappingIn::default() };
    let map = |len| guest.at_once(Opcode::Setupmapping, node, &[setup(len).as_slice()]);
    map(2 << 20).unwrap().ok();
    assert!(map(4 << 20).is_none());
    let remove = |count: u32, len| {
        let one = RemovemappingOne { moffset: 0, len };
        let ranges = one.as_slice().repeat(count as usize);
        let head = RemovemappingIn { count };
        guest.at_once(Opcode::Removemapping, node, &[head.as_slice(), &ranges])
    };
    assert!(remove(17, 4096).is_none());
    assert!(remove(1, 4 << 20).is_none());
    assert_eq!(guest.window.as_ref().unwrap().live_mappings(), 1);
    remove(16, 2 << 20).unwrap().ok();
    let forget = |count: u32| {
        let one = ForgetOne { nodeid: node, nlookup: 0 };
        let head = BatchForgetIn { count, dummy: 0 };
        let all = one.as_slice().repeat(count as usize);
        let mut frame = guest.frame(Opcode::BatchForget as u32, 0, &[head.as_slice(), &all]);
        let mut none = [];
        let request = crate::memory::GuestBuffer::from_slice(&mut frame);
        let reply = crate::memory::GuestBuffer::from_slice(&mut none);
        guest.session.serve_urgent_at_once(&request, &reply)
    };
    assert_eq!((forget(64), forget(65)), (Some(0), None));
}

#[test]
fn a_hole_is_looked_for_by_who_may_wait() {
    let guest = in_memory();
    std::fs::write(guest.path().join("file"), [1; 4096]).unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDONLY);
    let seek = |whence: i32| {
        let body = LseekIn { fh, whence: whence as u32, ..LseekIn::default() };
        guest.at_once(Opcode::Lseek, node, &[body.as_slice()]).is_some()
    };
    let served = [libc::SEEK_SET, libc::SEEK_END, libc::SEEK_DATA, libc::SEEK_HOLE].map(seek);
    assert_eq!(served, [true, true, false, false]);
}

#[test]
fn a_share_that_was_slow_is_left_alone_for_a_while() {
    use crate::fuse::FileSystem;
    let guest = in_memory();
    let looked_up = || guest.at_once(Opcode::Lookup, ROOT_ID, &[b"none\0"]).is_some();
    assert!(looked_up());
    guest.share.was_slow(ROOT_ID);
    assert!(!looked_up());
    assert!(!guest.share.all_answer_at_once(false));
}
