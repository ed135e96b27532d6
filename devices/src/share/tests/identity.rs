use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

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
