use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

#[test]
fn attributes_are_set_in_one_step() {
    let guest = Guest::new();
    let node = file(&guest, b"0123456789");
    let out: AttrOut = guest
        .setattr(
            node,
            SetattrIn {
                valid: (SetattrValid::MODE
                    | SetattrValid::SIZE
                    | SetattrValid::ATIME
                    | SetattrValid::MTIME)
                    .bits(),
                mode: 0o4711,
                size: 4,
                atime: -5i64 as u64,
                atimensec: 7,
                mtime: 1_000_000_000,
                mtimensec: 999_999_999,
                ..SetattrIn::default()
            },
        )
        .get();
    assert_eq!(out.attr.size, 4);
    assert_eq!((out.attr.atime as i64, out.attr.atimensec), (-5, 7));
    assert_eq!((out.attr.mtime, out.attr.mtimensec), (1_000_000_000, 999_999_999));
    let host = std::fs::metadata(guest.path().join("file")).unwrap();
    assert_eq!(host.mtime(), 1_000_000_000);
    let now = SetattrIn {
        valid: (SetattrValid::MTIME_NOW | SetattrValid::MTIME).bits(),
        ..SetattrIn::default()
    };
    assert!(guest.setattr(node, now).get::<AttrOut>().attr.mtime > 1_600_000_000);
    assert_eq!(guest.setattr(node, SetattrIn::default()).error, 0);
}

#[test]
fn attributes_that_cannot_be_are_refused_before_anything_is_done() {
    let guest = Guest::new();
    let node = file(&guest, b"data");
    let before = std::fs::metadata(guest.path().join("file")).unwrap();
    use SetattrValid as V;
    let refused = |change: SetattrIn, error| {
        let change = SetattrIn { valid: change.valid | V::MODE.bits(), mode: 0o777, ..change };
        assert_eq!(guest.setattr(node, change).error, error, "{change:?}");
    };
    let base = SetattrIn::default();
    refused(SetattrIn { valid: 1 << 12, ..base }, libc::EINVAL);
    refused(SetattrIn { valid: u32::MAX, ..base }, libc::EINVAL);
    for (valid, size) in [(V::SIZE, u64::MAX), (V::SIZE, 1 << 63)] {
        refused(SetattrIn { valid: valid.bits(), size, ..base }, libc::EFBIG);
    }
    let nsec = 1_000_000_000;
    refused(SetattrIn { valid: V::ATIME.bits(), atimensec: nsec, ..base }, libc::EINVAL);
    refused(SetattrIn { valid: V::MTIME.bits(), mtimensec: u32::MAX, ..base }, libc::EINVAL);
    refused(SetattrIn { valid: V::UID.bits(), uid: u32::MAX, ..base }, libc::EINVAL);
    refused(SetattrIn { valid: V::GID.bits(), gid: u32::MAX, ..base }, libc::EINVAL);
    refused(SetattrIn { valid: V::FH.bits(), fh: 77, ..base }, libc::EBADF);
    let after = std::fs::metadata(guest.path().join("file")).unwrap();
    assert_eq!(before.permissions().mode(), after.permissions().mode());
    let change = SetattrIn { valid: V::SIZE.bits(), ..base };
    assert_eq!(guest.setattr(ROOT_ID, change).error, libc::EISDIR);
}

#[test]
fn a_handle_open_for_writing_truncates_what_the_mode_forbids() {
    let guest = Guest::new();
    let node = file(&guest, b"data");
    let fh = guest.fh(node, libc::O_RDWR);
    std::fs::set_permissions(guest.path().join("file"), PermissionsExt::from_mode(0o000)).unwrap();
    let valid = (SetattrValid::SIZE | SetattrValid::FH).bits();
    let change = SetattrIn { valid, fh, size: 1, ..SetattrIn::default() };
    assert_eq!(guest.setattr(node, change).get::<AttrOut>().attr.size, 1);
}

#[test]
fn dax_is_said_of_the_same_files_everywhere() {
    let guest = Guest::new();
    let node = file(&guest, b"");
    assert_eq!(guest.getattr(node).get::<AttrOut>().attr.flags, ATTR_DAX);
    let change =
        SetattrIn { valid: SetattrValid::MODE.bits(), mode: 0o644, ..SetattrIn::default() };
    assert_eq!(guest.setattr(node, change).get::<AttrOut>().attr.flags, ATTR_DAX);
    let dir = guest.opendir(ROOT_ID);
    for name in guest.list(true, ROOT_ID, dir, 0, 4096).unwrap() {
        let flags = if name.name == b"file" { ATTR_DAX } else { 0 };
        assert_eq!(name.entry.unwrap().attr.flags, flags);
    }
    assert_eq!(guest.getattr(ROOT_ID).get::<AttrOut>().attr.flags, 0);
    // A write through the window clears no suid: such a file goes the other way.
    let suid = SetattrIn { mode: 0o4755, ..change };
    assert_eq!(guest.setattr(node, suid).get::<AttrOut>().attr.flags, 0);
}

#[test]
fn statx_has_the_birth_time() {
    let guest = Guest::new();
    let node = file(&guest, b"12345");
    let body = StatxIn { sx_mask: u32::MAX, ..StatxIn::default() };
    let out: StatxOut = guest.call(Opcode::Statx, node, &[body.as_slice()]).get();
    let host = std::fs::metadata(guest.path().join("file")).unwrap();
    assert_eq!((out.stat.ino, out.stat.size), (host.ino(), 5));
    assert_eq!(u32::from(out.stat.mode), host.mode());
    // The type is left out for a file with DAX, which the guest would else take for one without.
    let basic = libc::STATX_BASIC_STATS & !libc::STATX_TYPE;
    assert_eq!(out.stat.mask & libc::STATX_BASIC_STATS, basic);
    if let Ok(created) = host.created() {
        let since = created.duration_since(std::time::UNIX_EPOCH).unwrap();
        assert_eq!(out.stat.btime.tv_sec as u64, since.as_secs());
        assert_ne!(out.stat.mask & libc::STATX_BTIME, 0);
    }
    assert_eq!(out.stat.mask & !(libc::STATX_BASIC_STATS | libc::STATX_BTIME), 0);
    for wanted in [0, libc::STATX_SIZE, libc::STATX_BTIME | libc::STATX_MODE, 1 << 31] {
        let body = StatxIn { sx_mask: wanted, ..body };
        let answer: StatxOut = guest.call(Opcode::Statx, node, &[body.as_slice()]).get();
        assert_eq!(answer.stat.mask, out.stat.mask & wanted, "only what was asked and is known");
    }
    let root: StatxOut = guest.call(Opcode::Statx, ROOT_ID, &[body.as_slice()]).get();
    assert_eq!(root.stat.mask & libc::STATX_BASIC_STATS, libc::STATX_BASIC_STATS);
    let body = StatxIn { getattr_flags: GETATTR_FH, fh: 9, ..body };
    let answer = guest.call(Opcode::Statx, node, &[body.as_slice()]);
    assert_eq!(answer.error, libc::EBADF);
}

#[test]
fn extended_attributes_are_those_the_guest_may_have() {
    let guest = Guest::new();
    let node = file(&guest, b"");
    let set = setxattr(&guest, node, "user.one", b"value", 0);
    if set.error == libc::EOPNOTSUPP {
        return; // This directory's file system has none.
    }
    set.ok();
    assert_eq!(getxattr(&guest, node, "user.one", 0).get::<GetxattrOut>().size, 5);
    assert_eq!(getxattr(&guest, node, "user.one", 5).body, b"value");
    assert_eq!(getxattr(&guest, node, "user.one", u32::MAX).body, b"value");
    assert_eq!(getxattr(&guest, node, "user.one", 4).error, libc::ERANGE);
    assert_eq!(getxattr(&guest, node, "user.none", 4).error, libc::ENODATA);
    assert_eq!(setxattr(&guest, node, "user.one", b"", 1).error, libc::EEXIST);
    assert_eq!(setxattr(&guest, node, "user.two", b"", 2).error, libc::ENODATA);
    assert_eq!(setxattr(&guest, node, "user.one", b"", 4).error, libc::EINVAL);
    for name in ["security.selinux", "security.ima", "system.posix_acl_access", "user.", "x"] {
        assert_eq!(setxattr(&guest, node, name, b"v", 0).error, libc::EOPNOTSUPP, "{name}");
        assert_eq!(getxattr(&guest, node, name, 9).error, libc::EOPNOTSUPP, "{name}");
    }
    let long = format!("user.{}", "x".repeat(251));
    assert_eq!(setxattr(&guest, node, &long, b"v", 0).error, libc::ERANGE);
    assert_eq!(getxattr(&guest, node, "", 9).error, libc::ERANGE);
    let body = SetxattrIn { size: 6, flags: 0 };
    let parts: [&[u8]; 2] = [body.as_slice(), b"user.x\0short"];
    assert_eq!(guest.call(Opcode::Setxattr, node, &parts).error, libc::EINVAL);

    let list = |size| {
        let body = GetxattrIn { size, padding: 0 };
        guest.call(Opcode::Listxattr, node, &[body.as_slice()])
    };
    assert_eq!(list(0).get::<GetxattrOut>().size, 9);
    assert_eq!(list(100).body, b"user.one\0");
    assert_eq!(list(8).error, libc::ERANGE);
    guest.call(Opcode::Removexattr, node, &[b"user.one\0"]).ok();
    assert_eq!(list(100).body, b"");

    let fifo: EntryOut = mknod(&guest, "fifo", libc::S_IFIFO | 0o600, 0).get();
    assert_eq!(getxattr(&guest, fifo.nodeid, "user.x", 9).error, libc::ENODATA);
    assert_eq!(setxattr(&guest, fifo.nodeid, "user.x", b"", 0).error, libc::EPERM);

    let guest = Guest::with(|options| options.xattr = crate::share::XattrPolicy::Off);
    let node = file(&guest, b"");
    assert_eq!(getxattr(&guest, node, "user.one", 0).error, libc::ENOSYS);
    assert_eq!(setxattr(&guest, node, "user.one", b"", 0).error, libc::ENOSYS);
}
