use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;
use crate::share::{GidMap, HostGid, HostUid, IdRange, UidMap};

fn owner(guest: &Guest, name: &str) -> (u32, u32, u32) {
    let stat = std::fs::symlink_metadata(guest.path().join(name)).unwrap();
    (stat.uid(), stat.gid(), stat.mode() & 0o7777)
}

fn chmod(guest: &Guest, name: &str, mode: u32) {
    std::fs::set_permissions(guest.path().join(name), PermissionsExt::from_mode(mode)).unwrap();
}

#[test]
fn an_ordinary_user_makes_files_as_itself() {
    if is_root() {
        return;
    }
    let mut guest = Guest::new();
    let own = (guest.uid, guest.gid);
    (guest.uid, guest.gid) = (0, 0);
    assert_eq!(mkdir(&guest, ROOT_ID, "d", 0o700).error, 0);
    let (uid, gid, _) = owner(&guest, "d");
    assert_eq!((uid, gid), own);
}

#[test]
fn root_makes_files_as_the_guests_process() {
    if !is_root() {
        return;
    }
    let mut guest = Guest::new();
    // Nobody else may write here on the host; the guest decided that its process may.
    chmod(&guest, ".", 0o700);
    (guest.uid, guest.gid) = (4242, 4343);
    assert_eq!(mkdir(&guest, ROOT_ID, "d", 0o755).error, 0);
    assert_eq!(mknod(&guest, "fifo", libc::S_IFIFO | 0o600, 0).error, 0);
    assert_eq!(symlink(&guest, ROOT_ID, "s", "x").error, 0);
    assert_eq!(guest.create(ROOT_ID, "file", libc::O_RDWR, 0o666).error, 0);
    for (name, mode) in [("d", 0o755), ("fifo", 0o600), ("s", 0o777), ("file", 0o666)] {
        assert_eq!(owner(&guest, name), (4242, 4343, mode), "{name}");
    }
    // The thread is itself again.
    std::fs::write(guest.path().join("after"), "").unwrap();
    let (uid, _, _) = owner(&guest, "after");
    assert_eq!(uid, 0);
    let caps = rustix::thread::capabilities(None).unwrap();
    assert_eq!(caps.effective & caps.permitted, caps.effective);
    for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX)] {
        (guest.uid, guest.gid) = (uid, gid);
        assert_eq!(mkdir(&guest, ROOT_ID, "none", 0o755).error, libc::EINVAL);
    }
}

#[test]
fn a_setgid_directory_gives_its_group_and_keeps_setgid_from_strangers() {
    if !is_root() {
        return;
    }
    let mut guest = Guest::new();
    std::fs::create_dir(guest.path().join("d")).unwrap();
    std::os::unix::fs::chown(guest.path().join("d"), Some(0), Some(777)).unwrap();
    chmod(&guest, "d", 0o2777);
    let d = guest.node("d");
    (guest.uid, guest.gid) = (4242, 4343);
    assert_eq!(mkdir(&guest, d, "sub", 0o755).error, 0);
    assert_eq!(owner(&guest, "d/sub"), (4242, 777, 0o2755));
    // CVE-2018-13405, CVE-2022-0358: not a member of the group, so no setgid file in it.
    assert_eq!(guest.create(d, "file", libc::O_RDWR, 0o2775).error, 0);
    assert_eq!(owner(&guest, "d/file"), (4242, 777, 0o775));
}

#[test]
fn suid_and_sgid_go_when_the_guest_says_that_its_process_may_not_keep_them() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), "data").unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDWR);
    let mode = || owner(&guest, "file").2;

    chmod(&guest, "file", 0o6755);
    assert_eq!(guest.write_with(node, fh, 0, b"x", 0, WRITE_KILL_SUIDGID).error, 0);
    assert_eq!(mode(), 0o755);

    chmod(&guest, "file", 0o6755);
    let valid = (SetattrValid::SIZE | SetattrValid::KILL_SUIDGID).bits();
    let change = SetattrIn { valid, size: 2, ..SetattrIn::default() };
    assert_eq!(guest.setattr(node, change).error, 0);
    assert_eq!(mode(), 0o755);

    chmod(&guest, "file", 0o6755);
    let body =
        OpenIn { flags: (libc::O_WRONLY | libc::O_TRUNC) as u32, fuse_flags: OPEN_KILL_SUIDGID };
    assert_eq!(guest.call(Opcode::Open, node, &[body.as_slice()]).error, 0);
    assert_eq!(mode(), 0o755);

    if is_root() {
        // Without the flag the process may keep them.
        chmod(&guest, "file", 0o6755);
        assert_eq!(guest.write(node, fh, 0, b"x").error, 0);
        assert_eq!(mode(), 0o6755);
        let change = SetattrIn {
            valid: (SetattrValid::UID | SetattrValid::GID).bits(),
            uid: 12,
            gid: 13,
            ..SetattrIn::default()
        };
        assert_eq!(guest.setattr(node, change).error, 0);
        assert_eq!(owner(&guest, "file"), (12, 13, 0o755));
        chmod(&guest, "file", 0o6755);
        assert_eq!(fallocate(&guest, node, fh, 0, 0, 9000).error, 0);
        assert_eq!(mode(), 0o755);
    }
}

/// The extension that names one supplementary group.
fn in_group(group: u32) -> [u32; 4] {
    [16, EXT_GROUPS, 1, group]
}

fn mkdir_in_group(guest: &Guest, parent: u64, name: &str, mode: u32, extension: &[u32]) -> Answer {
    let body = MkdirIn { mode, umask: 0 };
    let name = [name.as_bytes(), b"\0"].concat();
    guest.call_extended(Opcode::Mkdir, parent, &[body.as_slice(), &name], extension)
}

#[test]
fn the_directorys_group_counts_when_the_process_is_in_it() {
    if !is_root() {
        return;
    }
    let mut guest = Guest::new();
    std::fs::create_dir(guest.path().join("d")).unwrap();
    std::os::unix::fs::chown(guest.path().join("d"), Some(0), Some(777)).unwrap();
    chmod(&guest, "d", 0o2777);
    let d = guest.node("d");
    (guest.uid, guest.gid) = (4242, 4343);
    let groups = rustix::process::getgroups().unwrap();
    let create = |name: &[u8], extension: &[u32]| {
        let body = CreateIn { flags: libc::O_RDWR as u32, mode: 0o2775, ..CreateIn::default() };
        guest.call_extended(Opcode::Create, d, &[body.as_slice(), name, b"\0"], extension)
    };
    assert_eq!(create(b"member", &in_group(777)).error, 0);
    assert_eq!(owner(&guest, "d/member"), (4242, 777, 0o2775));
    assert_eq!(create(b"stranger", &[]).error, 0);
    assert_eq!(owner(&guest, "d/stranger"), (4242, 777, 0o775));
    assert_eq!(create(b"elsewhere", &in_group(778)).error, 0);
    assert_eq!(owner(&guest, "d/elsewhere"), (4242, 777, 0o775));
    let body = MknodIn { mode: libc::S_IFREG | 0o2770, ..MknodIn::default() };
    let parts: [&[u8]; 2] = [body.as_slice(), b"node\0"];
    assert_eq!(guest.call_extended(Opcode::Mknod, d, &parts, &in_group(777)).error, 0);
    assert_eq!(owner(&guest, "d/node"), (4242, 777, 0o2770));
    let parts: [&[u8]; 1] = [b"link\0target\0"];
    assert_eq!(guest.call_extended(Opcode::Symlink, d, &parts, &in_group(777)).error, 0);
    assert_eq!(mkdir_in_group(&guest, d, "sub", 0o700, &in_group(777)).error, 0);
    assert_eq!(owner(&guest, "d/sub"), (4242, 777, 0o2700));
    assert_eq!(rustix::process::getgroups().unwrap(), groups, "the thread has its own again");
}

#[test]
fn an_extension_is_no_part_of_the_name_and_one_that_is_malformed_is_refused() {
    let guest = Guest::with(|options| options.switch_identity = Some(true));
    if is_root() {
        assert_eq!(mkdir_in_group(&guest, ROOT_ID, "d", 0o700, &in_group(1)).error, 0);
        assert!(guest.path().join("d").is_dir());
    }
    for wrong in [&[16, EXT_GROUPS, 2, 1][..], &[8, EXT_GROUPS], &[0, 0], &[24, 1, 0, 0]] {
        let answer = mkdir_in_group(&guest, ROOT_ID, "none", 0o700, wrong);
        assert_eq!(answer.error, libc::EINVAL, "{wrong:?}");
    }
    // More extensions than bytes.
    let body = MkdirIn::default();
    let mut request = guest.frame(Opcode::Mkdir as u32, ROOT_ID, &[body.as_slice(), b"none\0"]);
    for units in [1, 2, u16::MAX] {
        request[36..38].copy_from_slice(&units.to_ne_bytes());
        let answer = guest.send(&mut request.clone(), 0x1122_3344_5566_7788).unwrap();
        assert_eq!(answer.error, libc::EINVAL, "{units}");
    }
    assert!(!guest.path().join("none").exists());
    // Where it was not negotiated it is padding.
    let guest = Guest::with(|options| options.switch_identity = Some(false));
    let body = MkdirIn { mode: 0o700, umask: 0 };
    let mut request = guest.frame(Opcode::Mkdir as u32, ROOT_ID, &[body.as_slice(), b"d\0"]);
    request[36..38].copy_from_slice(&7u16.to_ne_bytes());
    assert_eq!(guest.send(&mut request, 0x1122_3344_5566_7788).unwrap().error, 0);
}

fn ranges(guest: u32, host: u32, count: u32) -> [IdRange; 1] {
    [IdRange { guest, host, count }]
}

fn mapped(guest: u32, host: u32, count: u32) -> Guest {
    Guest::with(|options| {
        options.uids = UidMap::of_ranges(&ranges(guest, host, count)).unwrap();
        options.gids = GidMap::of_ranges(&ranges(guest, host + 1_000_000, count)).unwrap();
    })
}

fn chown(guest: &Guest, node: u64, uid: Option<u32>, gid: Option<u32>) -> Answer {
    let mut valid = SetattrValid::empty();
    valid.set(SetattrValid::UID, uid.is_some());
    valid.set(SetattrValid::GID, gid.is_some());
    let change = SetattrIn {
        valid: valid.bits(),
        uid: uid.unwrap_or(7777),
        gid: gid.unwrap_or(7777),
        ..SetattrIn::default()
    };
    guest.setattr(node, change)
}

#[test]
fn with_ranges_the_guests_ids_are_others_on_the_host() {
    if !is_root() {
        return;
    }
    let mut guest = mapped(0, 100_000, 1000);
    chmod(&guest, ".", 0o700);
    for (uid, gid) in [(0, 0), (5, 6), (999, 999)] {
        (guest.uid, guest.gid) = (uid, gid);
        let name = format!("d{uid}");
        let made: EntryOut = mkdir(&guest, ROOT_ID, &name, 0o755).get();
        assert_eq!((made.attr.uid, made.attr.gid), (uid, gid));
        assert_eq!(owner(&guest, &name), (100_000 + uid, 1_100_000 + gid, 0o755));
        let created = guest.create(ROOT_ID, &format!("f{uid}"), libc::O_RDWR, 0o600);
        assert_eq!(created.part::<EntryOut>(0).attr.uid, uid);
    }
    let node = guest.node("f5");
    let out: AttrOut = chown(&guest, node, Some(7), Some(8)).get();
    assert_eq!((out.attr.uid, out.attr.gid), (7, 8));
    assert_eq!(owner(&guest, "f5").0, 100_007);
    let out: AttrOut = chown(&guest, node, None, Some(9)).get();
    assert_eq!((out.attr.uid, out.attr.gid), (7, 9));
    let out: StatxOut = guest.call(Opcode::Statx, node, &[StatxIn::default().as_slice()]).get();
    assert_eq!((out.stat.uid, out.stat.gid), (7, 9));
    // The guest's root keeps what root may: sgid on a file of a group it is not in.
    (guest.uid, guest.gid) = (0, 5);
    assert_eq!(guest.create(ROOT_ID, "sgid", libc::O_RDWR, 0o2755).error, 0);
    assert_eq!(owner(&guest, "sgid"), (100_000, 1_100_005, 0o2755));
}

#[test]
fn an_id_without_a_counterpart_is_shown_as_nobody_and_gets_no_files() {
    if !is_root() {
        return;
    }
    let mut guest = mapped(10, 100_000, 10);
    let node = file(&guest, b"of the host's root");
    let out: AttrOut = guest.getattr(node).get();
    assert_eq!((out.attr.uid, out.attr.gid), (65534, 65534));
    for (uid, gid) in [(Some(9), None), (None, Some(20)), (Some(65534), None), (Some(10), Some(0))]
    {
        assert_eq!(chown(&guest, node, uid, gid).error, libc::EPERM);
    }
    assert_eq!(owner(&guest, "file").0, 0, "nothing was done");
    for (uid, gid) in [(0, 10), (10, 0), (20, 10), (65534, 10)] {
        (guest.uid, guest.gid) = (uid, gid);
        assert_eq!(mkdir(&guest, ROOT_ID, "d", 0o700).error, libc::EPERM);
        assert_eq!(guest.create(ROOT_ID, "f", libc::O_RDWR, 0o600).error, libc::EPERM);
        assert_eq!(symlink(&guest, ROOT_ID, "s", "x").error, libc::EPERM);
    }
    // A supplementary group without a counterpart gives no right, and is no reason to refuse either.
    (guest.uid, guest.gid) = (10, 10);
    assert_eq!(mkdir_in_group(&guest, ROOT_ID, "d", 0o700, &in_group(65534)).error, 0);
    assert_eq!(owner(&guest, "d").0, 100_000);
}

#[test]
fn a_guest_user_that_is_the_hosts_root_keeps_no_sgid_that_is_not_its_own() {
    if !is_root() {
        return;
    }
    let mut guest = Guest::with(|options| {
        options.uids = UidMap::of_ranges(&ranges(1000, 0, 1)).unwrap();
        options.gids = GidMap::of_ranges(&ranges(1000, 0, 1000)).unwrap();
    });
    std::os::unix::fs::chown(guest.path(), None, Some(777)).unwrap();
    chmod(&guest, ".", 0o2777);
    (guest.uid, guest.gid) = (1000, 1000);
    assert_eq!(guest.create(ROOT_ID, "file", libc::O_RDWR, 0o2775).error, 0);
    assert_eq!(owner(&guest, "file"), (0, 777, 0o775));
}

#[test]
fn a_process_that_cannot_take_on_ids_makes_everything_as_itself_and_shows_it_as_roots() {
    let mut guest = Guest::new();
    let own = (guest.uid, guest.gid);
    guest = Guest::with(|options| {
        options.switch_identity = Some(false);
        options.uids = UidMap::as_root(HostUid(own.0));
        options.gids = GidMap::as_root(HostGid(own.1));
    });
    for (uid, gid) in [(0, 0), (4242, 4343)] {
        (guest.uid, guest.gid) = (uid, gid);
        let name = format!("d{uid}");
        let made: EntryOut = mkdir(&guest, ROOT_ID, &name, 0o700).get();
        assert_eq!((made.attr.uid, made.attr.gid), (0, 0));
        assert_eq!(owner(&guest, &name), (own.0, own.1, 0o700));
        // To whom it belongs already.
        assert_eq!(chown(&guest, made.nodeid, Some(0), Some(0)).error, 0);
        if !is_root() {
            assert_eq!(chown(&guest, made.nodeid, Some(4242), None).error, libc::EPERM);
        }
    }
}

#[test]
fn with_acls_the_umask_is_applied_here_to_what_is_made_and_to_nothing_else() {
    let guest = Guest::with(|options| options.acl = true);
    let made = |body: &[u8], opcode: Opcode, name: &str| {
        let name = [name.as_bytes(), b"\0"].concat();
        assert_eq!(guest.call(opcode, ROOT_ID, &[body, &name]).error, 0);
    };
    made(MkdirIn { mode: 0o777, umask: 0o27 }.as_slice(), Opcode::Mkdir, "d");
    let flags = libc::O_RDWR as u32;
    let create = CreateIn { flags, mode: 0o666, umask: 0o77, fuse_flags: 0 };
    made(create.as_slice(), Opcode::Create, "f");
    let mknod = MknodIn { mode: libc::S_IFIFO | 0o666, umask: 0o22, ..MknodIn::default() };
    made(mknod.as_slice(), Opcode::Mknod, "p");
    assert_eq!(owner(&guest, "d").2, 0o750);
    assert_eq!(owner(&guest, "f").2, 0o600);
    assert_eq!(owner(&guest, "p").2, 0o644);
    // This thread's and the process's are what they were.
    std::fs::write(guest.path().join("here"), "").unwrap();
    let path = guest.path().join("there");
    std::thread::spawn(move || std::fs::write(path, "").unwrap()).join().unwrap();
    assert_eq!((owner(&guest, "here").2, owner(&guest, "there").2), (0o666, 0o666));

    // Without, the guest has applied its umask, and the field says nothing.
    let guest = Guest::new();
    let body = MkdirIn { mode: 0o777, umask: 0o777 };
    assert_eq!(guest.call(Opcode::Mkdir, ROOT_ID, &[body.as_slice(), b"d\0"]).error, 0);
    assert_eq!(owner(&guest, "d").2, 0o777);
}
