//! What a guest can send that is wrong, each through a real ring: flags, sizes, offsets and modes.

use std::os::unix::fs::PermissionsExt;

use vm_memory::ByteValued;

use super::queue::{FIRST, guest, guest_on};
use crate::fuse::abi::*;
use crate::fuse::opcode::Opcode;
use crate::fuse::testing::Guest;

fn file(guest: &Guest, content: &[u8]) -> (u64, u64) {
    std::fs::write(guest.path().join("file"), content).unwrap();
    let node = guest.node("file");
    (node, guest.fh(node, libc::O_RDWR))
}

fn content(guest: &Guest) -> Vec<u8> {
    std::fs::read(guest.path().join("file")).unwrap()
}

#[test]
fn open_takes_no_flag_that_makes_it_more_than_an_open_file() {
    let guest = guest();
    let (node, _) = file(&guest, b"data");
    for flags in [
        libc::O_PATH,
        libc::O_TMPFILE,
        libc::O_CREAT | libc::O_EXCL,
        libc::O_DIRECTORY,
        libc::O_NOFOLLOW,
        libc::O_ASYNC | libc::O_NONBLOCK | libc::O_NOATIME,
        !libc::O_ACCMODE & !libc::O_TRUNC,
    ] {
        // Not refused, because the guest's own open has dealt with them, but no more than O_RDONLY.
        let fh = guest.fh(node, libc::O_RDONLY | flags);
        assert_eq!(guest.read(node, fh, 0, 10).body, b"data", "{flags:#o}");
        assert_eq!(guest.write(node, fh, 0, b"x").error, libc::EBADF, "{flags:#o}");
    }
    assert_eq!(guest.open(node, libc::O_ACCMODE).error, libc::EINVAL);
    assert_eq!(std::fs::read_dir(guest.path()).unwrap().count(), 1);
}

#[test]
fn nothing_but_a_regular_file_is_ever_opened() {
    let guest = guest();
    // A FIFO whose open would wait for ever, a socket and, where it can be made, a device.
    for (name, mode, rdev) in
        [("fifo", libc::S_IFIFO, 0), ("socket", libc::S_IFSOCK, 0), ("whiteout", libc::S_IFCHR, 0)]
    {
        let body = MknodIn { mode: mode | 0o666, rdev, ..MknodIn::default() };
        let name = [name.as_bytes(), b"\0"].concat();
        let made: EntryOut = guest.call(Opcode::Mknod, ROOT_ID, &[body.as_slice(), &name]).get();
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR | libc::O_NONBLOCK] {
            assert_eq!(guest.open(made.nodeid, flags).error, libc::EACCES);
            let name = std::str::from_utf8(&name[..name.len() - 1]).unwrap();
            assert_ne!(guest.create(ROOT_ID, name, flags, 0o600).error, 0);
        }
        assert_ne!(guest.setup(made.nodeid, 0, 4096, 3, 0).error, 0);
        let size = SetattrIn { valid: SetattrValid::SIZE.bits(), ..SetattrIn::default() };
        assert_eq!(guest.setattr(made.nodeid, size).error, libc::EINVAL);
    }
    assert_eq!(guest.open(ROOT_ID, libc::O_RDONLY).error, libc::EISDIR);
}

#[test]
fn a_device_is_not_made_and_a_mode_that_is_none_is_refused() {
    let guest = guest();
    for (mode, rdev, error) in [
        (libc::S_IFCHR, 0x103, libc::EPERM),
        (libc::S_IFBLK, 0x800, libc::EPERM),
        (libc::S_IFBLK, 0, libc::EPERM),
        (libc::S_IFCHR, u32::MAX, libc::EPERM),
        (libc::S_IFDIR, 0, libc::EINVAL),
        (libc::S_IFLNK, 0, libc::EINVAL),
        (libc::S_IFMT, 0, libc::EINVAL),
    ] {
        let body = MknodIn { mode: mode | 0o666, rdev, ..MknodIn::default() };
        let answer = guest.call(Opcode::Mknod, ROOT_ID, &[body.as_slice(), b"node\0"]);
        assert_eq!(answer.error, error, "{mode:#o} {rdev:#x}");
    }
    assert_eq!(std::fs::read_dir(guest.path()).unwrap().count(), 0);
    // overlayfs in the guest needs this one, which is no device.
    let body = MknodIn { mode: libc::S_IFCHR, ..MknodIn::default() };
    assert_eq!(guest.call(Opcode::Mknod, ROOT_ID, &[body.as_slice(), b"node\0"]).error, 0);
}

#[test]
fn reads_and_writes_stay_inside_their_buffers_and_below_the_end_of_offsets() {
    let mut guest = guest();
    let (node, fh) = file(&guest, b"0123456789");
    for (offset, size) in [(u64::MAX, 1), (i64::MAX as u64, 1), (1 << 63, 0), (u64::MAX - 5, 6)] {
        assert_eq!(guest.read(node, fh, offset, size).error, libc::EINVAL, "{offset:#x}");
    }
    for offset in [u64::MAX, i64::MAX as u64 - 1, 1 << 63] {
        assert_eq!(guest.write(node, fh, offset, b"xxx").error, libc::EINVAL, "{offset:#x}");
    }
    for size in [0, 2, 4, 1 << 20, u32::MAX] {
        let body = WriteIn { fh, size, ..WriteIn::default() };
        let answer = guest.call(Opcode::Write, node, &[body.as_slice(), b"xxx"]);
        assert_eq!(answer.error, libc::EINVAL, "the data has 3 bytes and not {size}");
    }
    // The largest offset there is: the host's file system says what it thinks of it.
    let far = guest.write(node, fh, i64::MAX as u64 - 3, b"xxx").error;
    assert!(far == libc::EFBIG || far == libc::EINVAL, "{far}");
    guest.room = 16 + 4;
    assert_eq!(guest.read(node, fh, 3, u32::MAX).body, b"3456");
    assert_eq!(content(&guest), b"0123456789");
}

#[test]
fn attributes_that_cannot_be_are_refused_and_none_of_them_is_set() {
    let guest = guest();
    let (node, fh) = file(&guest, b"data");
    let mode = || guest.path().join("file").metadata().unwrap().permissions().mode();
    let before = mode();
    use SetattrValid as V;
    let none = SetattrIn::default();
    for (change, error) in [
        (SetattrIn { valid: 1 << 12, ..none }, libc::EINVAL),
        (SetattrIn { valid: u32::MAX, ..none }, libc::EINVAL),
        (SetattrIn { valid: V::SIZE.bits(), size: 1 << 63, ..none }, libc::EFBIG),
        (SetattrIn { valid: V::SIZE.bits(), size: u64::MAX, ..none }, libc::EFBIG),
        (SetattrIn { valid: V::ATIME.bits(), atimensec: 1_000_000_000, ..none }, libc::EINVAL),
        (SetattrIn { valid: V::MTIME.bits(), mtimensec: u32::MAX, ..none }, libc::EINVAL),
        (SetattrIn { valid: V::UID.bits(), uid: u32::MAX, ..none }, libc::EINVAL),
        (SetattrIn { valid: V::GID.bits(), gid: u32::MAX, ..none }, libc::EINVAL),
        (SetattrIn { valid: V::FH.bits(), fh: fh + 1, ..none }, libc::EBADF),
    ] {
        let change = SetattrIn { valid: change.valid | V::MODE.bits(), mode: 0o7777, ..change };
        assert_eq!(guest.setattr(node, change).error, error, "{:#x}", change.valid);
        assert_eq!(mode(), before);
    }
    assert_eq!(content(&guest), b"data");
}

#[test]
fn a_listing_has_whole_entries_whatever_cookie_and_size_it_is_asked_with() {
    let mut guest = guest();
    for at in 0..50 {
        std::fs::write(guest.path().join(format!("name{at}")), "").unwrap();
    }
    let fh = guest.opendir(ROOT_ID);
    for plus in [false, true] {
        // `list` checks that no entry is cut.
        for offset in [1, 7, i64::MAX as u64, 1 << 63, u64::MAX] {
            let _ = guest.list(plus, ROOT_ID, fh, offset, 4096);
        }
        for size in [0, 1, 31] {
            assert_eq!(guest.list(plus, ROOT_ID, fh, 0, size).unwrap_err(), libc::EINVAL);
        }
        assert_eq!(guest.list(plus, ROOT_ID, fh, 0, u32::MAX).unwrap().len(), 52);
        guest.room = 16 + 500;
        let part = guest.list(plus, ROOT_ID, fh, 0, u32::MAX).unwrap();
        assert!(!part.is_empty() && part.len() < 52, "as many as there is room for");
        guest.room = MAX_REQUEST;
    }
}

#[test]
fn lookups_of_a_listing_are_counted_for_the_entries_that_fit_and_no_other() {
    let mut guest = guest();
    for at in 0..20 {
        std::fs::write(guest.path().join(format!("file{at}")), "").unwrap();
    }
    let fh = guest.opendir(ROOT_ID);
    guest.room = 16 + 160 * 7;
    let names = guest.list(true, ROOT_ID, fh, 0, u32::MAX).unwrap();
    let nodes: Vec<u64> =
        names.iter().filter_map(|name| name.entry).map(|entry| entry.nodeid).collect();
    let counted: Vec<u64> = nodes.into_iter().filter(|node| *node != 0).collect();
    assert_eq!(guest.share.live_inodes(), 1 + counted.len());
    for node in counted {
        guest.forget(node, 1);
    }
    assert_eq!(guest.share.live_inodes(), 1);
}

#[test]
fn modes_flags_and_whences_that_are_not_known_are_refused() {
    let guest = guest();
    let (node, fh) = file(&guest, &[7; 8192]);
    for mode in [2, 4, 0x80, 0x100, 1 << 31, u32::MAX] {
        let body = FallocateIn { fh, offset: 0, length: 4096, mode, padding: 0 };
        let answer = guest.call(Opcode::Fallocate, node, &[body.as_slice()]);
        assert_eq!(answer.error, libc::EOPNOTSUPP, "{mode:#x}");
    }
    for (offset, length) in [(0, u64::MAX), (u64::MAX, 1), (i64::MAX as u64, 1), (0, 0)] {
        let body = FallocateIn { fh, offset, length, mode: 0, padding: 0 };
        assert_eq!(guest.call(Opcode::Fallocate, node, &[body.as_slice()]).error, libc::EINVAL);
    }
    for (whence, offset) in [(1, 0), (5, 0), (u32::MAX, 0), (3, u64::MAX), (4, 1 << 63)] {
        let body = LseekIn { fh, offset, whence, padding: 0 };
        assert_eq!(guest.call(Opcode::Lseek, node, &[body.as_slice()]).error, libc::EINVAL);
    }
    let copy = |change: &dyn Fn(&mut CopyFileRangeIn)| {
        let mut body = CopyFileRangeIn {
            fh_in: fh,
            nodeid_out: node,
            fh_out: fh,
            offset_out: 1 << 20,
            len: 4096,
            ..CopyFileRangeIn::default()
        };
        change(&mut body);
        let answers = [Opcode::CopyFileRange, Opcode::CopyFileRange64]
            .map(|opcode| guest.call(opcode, node, &[body.as_slice()]).error);
        assert_eq!(answers[0], answers[1]);
        answers[0]
    };
    assert_eq!(copy(&|body| body.flags = 1), libc::EINVAL);
    assert_eq!(copy(&|body| body.len = u64::MAX), libc::EINVAL);
    assert_eq!(copy(&|body| body.offset_in = u64::MAX - 1), libc::EINVAL);
    assert_eq!(copy(&|body| body.offset_out = i64::MAX as u64), libc::EINVAL);
    assert_eq!(copy(&|body| body.offset_out = 1), libc::EINVAL, "it overlaps itself");
    assert_eq!(copy(&|body| body.fh_out = fh + 1), libc::EBADF);
    assert_eq!(content(&guest), [7; 8192]);
    let rename = Rename2In { newdir: ROOT_ID, flags: 8, padding: 0 };
    let answer = guest.call(Opcode::Rename2, ROOT_ID, &[rename.as_slice(), b"file\0new\0"]);
    assert_eq!(answer.error, libc::EINVAL);
    for (opcode, size) in [(Opcode::Bmap, 16), (Opcode::Poll, 24)] {
        assert_eq!(guest.call(opcode, node, &[&vec![0xff; size]]).error, libc::ENOSYS);
    }
}

#[test]
fn an_ioctl_that_is_not_allowed_never_reaches_the_host() {
    let guest = guest();
    let (node, fh) = file(&guest, b"");
    for (cmd, in_size, out_size, flags, error) in [
        (0x5401, 0, 60, 0, libc::ENOTTY),
        (u32::MAX, 0, u32::MAX, 0, libc::ENOTTY),
        // The right one with other sizes, or with memory of the caller's to be asked for.
        (0x8008_6601, 0, 8, 0, libc::ENOTTY),
        (0x8008_6601, 0, u32::MAX, 0, libc::ENOTTY),
        (0x8008_6601, 0, 4, IOCTL_UNRESTRICTED, libc::ENOTTY),
        // Sizes that are not those of the data.
        (0x4008_6602, 4, 0, 0, libc::EINVAL),
        (0x4008_6602, u32::MAX, 0, 0, libc::EINVAL),
    ] {
        let body = IoctlIn { fh, cmd, in_size, out_size, flags, ..IoctlIn::default() };
        let answer = guest.call(Opcode::Ioctl, node, &[body.as_slice()]);
        assert_eq!(answer.error, error, "{cmd:#x}");
    }
}

#[test]
fn the_newer_operations_are_there_and_take_nothing_that_is_wrong() {
    let guest = guest();
    guest.call(Opcode::Syncfs, ROOT_ID, &[&[0xff; 8]]).ok();
    assert_ne!(guest.call(Opcode::Syncfs, 999, &[&[0; 8]]).error, 0);
    let statx = StatxIn { sx_mask: u32::MAX, sx_flags: u32::MAX, ..StatxIn::default() };
    let out: StatxOut = guest.call(Opcode::Statx, ROOT_ID, &[statx.as_slice()]).get();
    assert_eq!(out.stat.mask & !(libc::STATX_BASIC_STATS | libc::STATX_BTIME), 0);
    let statx = StatxIn { getattr_flags: GETATTR_FH, fh: u64::MAX, ..statx };
    assert_eq!(guest.call(Opcode::Statx, ROOT_ID, &[statx.as_slice()]).error, libc::EBADF);
    for (flags, error) in [(libc::O_ACCMODE, libc::EINVAL), (libc::O_RDONLY, libc::EINVAL)] {
        let tmpfile = CreateIn { flags: flags as u32, mode: 0o600, ..CreateIn::default() };
        let answer = guest.call(Opcode::Tmpfile, ROOT_ID, &[tmpfile.as_slice(), b"/\0"]);
        assert!(answer.error == error || answer.error == libc::EOPNOTSUPP, "{}", answer.error);
    }
    let (node, _) = file(&guest, b"");
    let tmpfile = CreateIn { flags: libc::O_RDWR as u32, ..CreateIn::default() };
    let answer = guest.call(Opcode::Tmpfile, node, &[tmpfile.as_slice(), b"/\0"]);
    assert_eq!(answer.error, libc::ENOTDIR);
    let unused = [0u8; 8];
    assert_eq!(guest.raw(54, ROOT_ID, &[&unused]).unwrap().error, libc::ENOSYS);
}

#[test]
fn a_read_only_share_is_changed_by_nothing_that_comes_through_the_ring() {
    let guest = guest_on(FIRST, 0, |options| {
        options.read_only = true;
        std::fs::write(options.directory.join("file"), "data").unwrap();
    });
    let node = guest.node("file");
    for flags in [libc::O_WRONLY, libc::O_RDWR, libc::O_RDONLY | libc::O_TRUNC] {
        assert_eq!(guest.open(node, flags).error, libc::EROFS);
    }
    let fh = guest.fh(node, libc::O_RDONLY);
    assert_eq!(guest.write(node, fh, 0, b"x").error, libc::EROFS);
    assert_eq!(guest.create(ROOT_ID, "new", libc::O_RDONLY, 0o600).error, libc::EROFS);
    assert_eq!(guest.setup(node, 0, 4096, 3, 0).error, libc::EROFS);
    assert_eq!(std::fs::read_dir(guest.path()).unwrap().count(), 1);
    assert_eq!(content(&guest), b"data");
}
