//! IOCTL.

use super::*;

const GETFLAGS: u32 = 0x8008_6601;
const SETFLAGS: u32 = 0x4008_6602;
const FSGETXATTR: u32 = 0x801c_581f;
const FSSETXATTR: u32 = 0x401c_5820;
/// `FS_NODUMP_FL`, and as `fsx_xflags`.
const NODUMP: u32 = 0x40;
const X_NODUMP: u32 = 0x80;

fn ioctl(guest: &Guest, nodeid: u64, fh: u64, cmd: u32, out_size: u32, data: &[u8]) -> Answer {
    let body = IoctlIn { fh, cmd, in_size: data.len() as u32, out_size, ..IoctlIn::default() };
    guest.call(Opcode::Ioctl, nodeid, &[body.as_slice(), data])
}

fn flags(guest: &Guest, nodeid: u64, fh: u64) -> u32 {
    let answer = ioctl(guest, nodeid, fh, GETFLAGS, 4, b"");
    // The Linux guest takes exactly this length (`fuse_priv_ioctl`).
    assert_eq!(answer.body.len(), 16 + 4);
    assert_eq!(answer.part::<IoctlOut>(0).result, 0);
    answer.part(16)
}

/// A file of a file system that has flags, and the root's handle.
fn file_with_flags(guest: &Guest) -> Option<(u64, u64, u64)> {
    let node = file(guest, b"");
    let fh = guest.fh(node, libc::O_RDONLY);
    let answer = ioctl(guest, node, fh, GETFLAGS, 4, b"");
    (answer.error != libc::ENOTTY).then(|| (node, fh, guest.opendir(ROOT_ID)))
}

#[test]
fn lsattr_and_chattr_work_on_files_and_directories() {
    let guest = Guest::new();
    let Some((node, fh, dir)) = file_with_flags(&guest) else { return };
    for (nodeid, fh) in [(node, fh), (ROOT_ID, dir)] {
        let before = flags(&guest, nodeid, fh);
        let changed = before ^ NODUMP;
        ioctl(&guest, nodeid, fh, SETFLAGS, 0, &changed.to_ne_bytes());
        assert_eq!(flags(&guest, nodeid, fh), changed);

        let answer = ioctl(&guest, nodeid, fh, FSGETXATTR, 28, b"");
        assert_eq!(answer.body.len(), 16 + 28);
        let mut fsxattr = answer.body[16..].to_vec();
        assert_eq!(answer.part::<u32>(16) & X_NODUMP != 0, changed & NODUMP != 0);
        fsxattr[0] ^= X_NODUMP as u8;
        assert_eq!(ioctl(&guest, nodeid, fh, FSSETXATTR, 0, &fsxattr).error, 0);
        assert_eq!(flags(&guest, nodeid, fh), before);
    }
}

#[test]
fn a_flag_that_is_not_the_guests_own_affair_stays_as_it_is() {
    let guest = Guest::new();
    let Some((node, fh, _)) = file_with_flags(&guest) else { return };
    let before = flags(&guest, node, fh);
    for flag in 0..32 {
        // Immutable, append-only, casefold, project, DAX, …: all but those of how a file is stored.
        const SETTABLE: u32 = 0x0083_84cf;
        if (1 << flag) & SETTABLE == 0 {
            let wanted = before ^ (1u32 << flag) ^ NODUMP;
            let answer = ioctl(&guest, node, fh, SETFLAGS, 0, &wanted.to_ne_bytes());
            assert_eq!(answer.error, libc::EPERM, "{:#x}", 1u32 << flag);
        }
    }
    let answer = ioctl(&guest, node, fh, FSGETXATTR, 28, b"");
    // Immutable, extent size, project, copy-on-write extent size.
    for (at, bit) in [(0, 8), (4, 1), (12, 1), (16, 1)] {
        let mut fsxattr = answer.body[16..].to_vec();
        fsxattr[at] ^= bit;
        let answer = ioctl(&guest, node, fh, FSSETXATTR, 0, &fsxattr);
        assert_eq!(answer.error, libc::EPERM, "byte {at}");
    }
    assert_eq!(flags(&guest, node, fh), before);
}

#[test]
fn no_other_ioctl_and_no_other_size_reaches_the_host() {
    let guest = Guest::new();
    let node = file(&guest, b"");
    let fh = guest.fh(node, libc::O_RDWR);
    for (cmd, out_size, data) in [
        (GETFLAGS, 0, &b""[..]),
        (GETFLAGS, 3, b""),
        (GETFLAGS, 8, b""),
        (GETFLAGS, u32::MAX, b""),
        (GETFLAGS, 4, b"\0\0\0\0"),
        (SETFLAGS, 0, b""),
        (SETFLAGS, 0, b"\0\0\0\0\0\0\0\0"),
        (SETFLAGS, 4, b"\0\0\0\0"),
        (FSGETXATTR, 27, b""),
        (FSSETXATTR, 0, &[0; 27]),
        (FSSETXATTR, 0, &[0; 29]),
        // TCGETS, FIOCLEX, FICLONE, FS_IOC_FIEMAP, FS_IOC_GETVERSION, FITRIM, FIFREEZE, and the 32-bit GETFLAGS.
        (0x5401, 60, b""),
        (0x5451, 0, b""),
        (0x4004_9409, 0, b"\0\0\0\0"),
        (0xc020_660b, 32, &[0; 32]),
        (0x8008_7601, 8, b""),
        (0xc018_5879, 24, &[0xff; 24]),
        (0xc004_5877, 4, b"\0\0\0\0"),
        (0x8004_6601, 4, b""),
        (u32::MAX, u32::MAX, &[0xff; 4096]),
    ] {
        let error = ioctl(&guest, node, fh, cmd, out_size, data).error;
        assert_eq!(error, libc::ENOTTY, "{cmd:#x} {out_size}");
    }
    let send = |change: &dyn Fn(&mut IoctlIn)| {
        let mut body = IoctlIn { fh, cmd: GETFLAGS, out_size: 4, ..IoctlIn::default() };
        change(&mut body);
        guest.call(Opcode::Ioctl, node, &[body.as_slice()]).error
    };
    assert_eq!(send(&|body| body.flags = IOCTL_UNRESTRICTED), libc::ENOTTY);
    assert_eq!(send(&|body| body.in_size = 4), libc::EINVAL, "fewer bytes than the size says");
    assert_eq!(send(&|body| body.in_size = u32::MAX), libc::EINVAL);
    assert_eq!(send(&|body| body.fh = 77), libc::EBADF);
}

#[test]
fn flags_of_a_read_only_share_are_read_and_not_changed() {
    let guest = Guest::with(|options| {
        options.read_only = true;
        std::fs::write(options.directory.join("file"), "").unwrap();
    });
    let Some((node, fh, _)) = file_with_flags(&guest) else { return };
    let before = flags(&guest, node, fh);
    let changed = before ^ NODUMP;
    let answer = ioctl(&guest, node, fh, SETFLAGS, 0, &changed.to_ne_bytes());
    assert_eq!(answer.error, libc::EROFS);
    let fsxattr = ioctl(&guest, node, fh, FSGETXATTR, 28, b"").body[16..].to_vec();
    assert_eq!(ioctl(&guest, node, fh, FSSETXATTR, 0, &fsxattr).error, libc::EROFS);
    assert_eq!(flags(&guest, node, fh), before);
}
