//! What a guest can send that is wrong, each through a real ring: INIT, extended attributes, nodes, attributes.

use std::os::unix::fs::{MetadataExt, PermissionsExt};

use vm_memory::ByteValued;

use super::queue::{FIRST, guest, guest_on};
use crate::fuse::abi::*;
use crate::fuse::opcode::Opcode;
use crate::fuse::testing::{Answer, EVERYTHING, Guest};
use crate::share::XattrPolicy;

/// `FUSE_HEADER_OVERHEAD` of fs/fuse/virtio_fs.c: descriptors of a request that are not of its pages.
const HEADER_DESCRIPTORS: u16 = 4;

fn agreed(guest: &Guest, flags: u64) -> (InitOut, InitFlags) {
    let out: InitOut = guest.init(7, MINOR, flags).get();
    let bits = u64::from(out.flags) | u64::from(out.flags2) << 32;
    (out, InitFlags::from_bits(bits).expect("only known flags are answered"))
}

fn file(guest: &Guest) -> u64 {
    std::fs::write(guest.path().join("file"), "data").unwrap();
    guest.node("file")
}

#[test]
fn an_init_with_garbage_in_its_flags_gets_what_both_sides_know() {
    let guest = guest_on(FIRST, 0, |options| options.acl = true);
    let mut garbage = 0x9e37_79b9_7f4a_7c15u64;
    for _ in 0..200 {
        garbage = garbage.rotate_left(13).wrapping_mul(0xd134_2543_de82_ef95);
        let (out, flags) = agreed(&guest, garbage);
        let extended = garbage & InitFlags::INIT_EXT.bits() != 0;
        let offered = if extended { garbage } else { garbage & 0xffff_ffff };
        assert_eq!(flags.bits() & !offered, 0, "{garbage:#x}");
        // What needs something else has it.
        assert!(
            flags.contains(InitFlags::POSIX_ACL)
                || !flags.intersects(InitFlags::ALLOW_IDMAP | InitFlags::DONT_MASK)
        );
        assert!(
            flags.contains(InitFlags::DO_READDIRPLUS)
                || !flags.contains(InitFlags::READDIRPLUS_AUTO)
        );
        assert_eq!(out.max_pages != 0, flags.contains(InitFlags::MAX_PAGES));
        assert_eq!(out.map_alignment == 12, flags.contains(InitFlags::MAP_ALIGNMENT));
        assert_eq!((out.major, out.minor, out.max_write), (7, MINOR, MAX_WRITE));
    }
}

#[test]
fn max_readahead_is_the_guests_affair_whatever_it_is() {
    let guest = guest();
    for max_readahead in [0, 1, 4096, u32::MAX] {
        let body = InitIn { major: 7, minor: MINOR, max_readahead, flags: u32::MAX };
        let rest = [0xff; 48];
        let out: InitOut = guest.call(Opcode::Init, 0, &[body.as_slice(), &rest]).get();
        assert_eq!(out.max_readahead, max_readahead);
        assert_eq!(out.max_write, MAX_WRITE, "and nothing else follows from it");
    }
}

#[test]
fn the_largest_request_fits_into_a_queue_of_the_devices_size() {
    let (out, flags) = agreed(&guest(), EVERYTHING);
    assert!(flags.contains(InitFlags::MAX_PAGES));
    assert!(out.max_pages <= crate::virtio::fs::device::QUEUE_SIZE - HEADER_DESCRIPTORS);
    assert_eq!(u32::from(out.max_pages) * 4096, out.max_write);
}

#[test]
fn an_init_of_another_version_begins_no_session_and_ends_none() {
    let guest = guest();
    let node = file(&guest);
    let out: InitOut = guest.init(8, 0, EVERYTHING).get();
    assert_eq!((out.major, out.flags, out.flags2), (7, 0, 0));
    assert_eq!(guest.init(6, 99, EVERYTHING).error, libc::EPROTO);
    assert_eq!(guest.init(0, 0, EVERYTHING).error, libc::EPROTO);
    // A newer guest says next what it can of our version; until then nothing is served.
    assert_eq!(guest.getattr(node).error, libc::EIO);
    assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
    assert_eq!(guest.getattr(node).error, libc::ESTALE);
    // Of the other byte order: no operation has that number.
    let body = InitIn { major: 7u32.swap_bytes(), ..InitIn::default() };
    let answer = guest.raw((Opcode::Init as u32).swap_bytes(), 0, &[body.as_slice()]).unwrap();
    assert_eq!(answer.error, libc::ENOSYS);
}

#[test]
fn a_second_init_takes_everything_that_the_first_session_had() {
    let guest = guest();
    let node = file(&guest);
    let fh = guest.fh(node, libc::O_RDWR);
    let directory = guest.opendir(ROOT_ID);
    guest.setup(node, 0, 4096, 2, 0).ok();
    let (_, flags) = agreed(&guest, InitFlags::MAX_PAGES.bits());
    assert_eq!(flags, InitFlags::MAX_PAGES);
    assert_eq!(guest.window.as_ref().unwrap().live_mappings(), 0);
    assert_eq!((guest.share.live_inodes(), guest.share.live_handles()), (1, 0));
    assert_eq!(guest.read(node, fh, 0, 4).error, libc::EBADF);
    assert_eq!(guest.getattr(node).error, libc::ESTALE);
    assert_eq!(guest.list(false, ROOT_ID, directory, 0, 4096).unwrap_err(), libc::EBADF);
    // What was agreed on is what the second one said: extensions are padding again.
    let body = MkdirIn { mode: 0o700, umask: 0 };
    let mut request = guest.frame(Opcode::Mkdir as u32, ROOT_ID, &[body.as_slice(), b"d\0"]);
    request[36..38].copy_from_slice(&9u16.to_ne_bytes());
    assert_eq!(guest.send(&mut request, 0x1122_3344_5566_7788).unwrap().error, 0);
}

fn set(guest: &Guest, node: u64, name: &[u8], size: u32, value: &[u8]) -> Answer {
    let body = SetxattrIn { size, flags: 0 };
    guest.call(Opcode::Setxattr, node, &[body.as_slice(), name, value])
}

#[test]
fn an_extended_attribute_that_is_cut_or_too_long_is_refused() {
    let guest = guest_on(FIRST, 0, |options| options.xattr = XattrPolicy::Mapped);
    let node = file(&guest);
    assert_eq!(set(&guest, node, b"user.x\0", 3, b"abc").error, 0);
    for (name, size, value, error) in [
        (&b"user.x"[..], 3, &b""[..], libc::EINVAL), // no NUL
        (b"user.x\0", 4, b"abc", libc::EINVAL),
        (b"user.x\0", 2, b"abc", libc::EINVAL),
        (b"user.x\0", u32::MAX, b"abc", libc::EINVAL),
        (b"\0", 3, b"abc", libc::ERANGE),
        (&[&[b'x'; 256][..], b"\0"].concat(), 3, b"abc", libc::ERANGE),
        (&[&[b'x'; 300][..]].concat(), 0, b"", libc::ERANGE),
        (b"user.x\0", 65537, &[7; 65537], libc::E2BIG),
        (b"user.\0", 3, b"abc", libc::EOPNOTSUPP),
        (b"other.x\0", 3, b"abc", libc::EOPNOTSUPP),
        (b"system.x\0", 3, b"abc", libc::EOPNOTSUPP),
    ] {
        assert_eq!(set(&guest, node, name, size, value).error, error, "{} bytes", name.len());
    }
    // Longer than any attribute: no such request.
    assert_eq!(set(&guest, node, b"user.x\0", 80_000, &[7; 80_000]).error, libc::EINVAL);
    for flags in [4, 3 << 2, u32::MAX] {
        let body = SetxattrIn { size: 0, flags };
        let answer = guest.call(Opcode::Setxattr, node, &[body.as_slice(), b"user.y\0"]);
        assert_eq!(answer.error, libc::EINVAL, "{flags}");
    }
    for opcode in [Opcode::Getxattr, Opcode::Removexattr] {
        let body: &[u8] = if opcode == Opcode::Getxattr { &[9, 0, 0, 0, 0, 0, 0, 0] } else { &[] };
        for (name, error) in [
            (&b"user.x"[..], libc::EINVAL),
            (b"user.x\0more", libc::EINVAL),
            (b"\0", libc::ERANGE),
            (&[&[b'x'; 256][..], b"\0"].concat(), libc::ERANGE),
        ] {
            assert_eq!(guest.call(opcode, node, &[body, name]).error, error, "{opcode:?}");
        }
    }
    let get = |size| {
        let body = GetxattrIn { size, padding: 0 };
        guest.call(Opcode::Getxattr, node, &[body.as_slice(), b"user.x\0"])
    };
    assert_eq!(get(3).body, b"abc", "what was there is as it was");
    assert_eq!(get(0).get::<GetxattrOut>().size, 3);
    assert_eq!(get(2).error, libc::ERANGE);
    assert_eq!(get(u32::MAX).body, b"abc");
}

#[test]
fn an_attribute_that_the_reply_has_no_room_for_is_out_of_range() {
    let mut guest = guest();
    let node = file(&guest);
    assert_eq!(set(&guest, node, b"user.x\0", 100, &[7; 100]).error, 0);
    let body = GetxattrIn { size: 100, padding: 0 };
    for room in [16, 24, 115] {
        guest.room = room;
        let answer = guest.call(Opcode::Getxattr, node, &[body.as_slice(), b"user.x\0"]);
        assert_eq!(answer.error, libc::ERANGE, "{room}");
    }
    guest.room = 116;
    assert_eq!(guest.call(Opcode::Getxattr, node, &[body.as_slice(), b"user.x\0"]).body.len(), 100);
}

#[test]
fn an_attribute_of_a_fifo_is_never_asked_of_the_fifo() {
    for xattr in [XattrPolicy::On, XattrPolicy::Mapped] {
        let guest = guest_on(FIRST, 0, |options| options.xattr = xattr);
        let body = MknodIn { mode: libc::S_IFIFO | 0o600, ..MknodIn::default() };
        let fifo: EntryOut =
            guest.call(Opcode::Mknod, ROOT_ID, &[body.as_slice(), b"fifo\0"]).get();
        // To open it would block this request for ever.
        let body = GetxattrIn { size: 100, padding: 0 };
        let answer = guest.call(Opcode::Getxattr, fifo.nodeid, &[body.as_slice(), b"user.x\0"]);
        assert_eq!(answer.error, libc::ENODATA);
        assert_eq!(set(&guest, fifo.nodeid, b"user.x\0", 0, b"").error, libc::EPERM);
        let answer = guest.call(Opcode::Listxattr, fifo.nodeid, &[body.as_slice()]);
        assert_eq!((answer.error, answer.body.len()), (0, 0));
    }
}

#[test]
fn a_guests_security_attributes_are_kept_from_the_host_or_refused() {
    let on_host = |guest: &Guest, name: &str| {
        rustix::fs::getxattr(guest.path().join("file"), name, &mut [0u8; 100][..]).is_ok()
    };
    let guest = guest_on(FIRST, 0, |options| options.xattr = XattrPolicy::Mapped);
    let node = file(&guest);
    for name in ["security.selinux", "security.capability", "security.ima", "trusted.x"] {
        let bytes = [name.as_bytes(), b"\0"].concat();
        assert_eq!(set(&guest, node, &bytes, 1, b"v").error, 0);
        assert!(!on_host(&guest, name), "{name}");
    }
    let guest = guest_on(FIRST, 0, |options| options.xattr = XattrPolicy::On);
    let node = file(&guest);
    for name in ["security.selinux", "security.ima", "security.evm", "system.posix_acl_access"] {
        let bytes = [name.as_bytes(), b"\0"].concat();
        assert_eq!(set(&guest, node, &bytes, 1, b"v").error, libc::EOPNOTSUPP, "{name}");
        assert!(!on_host(&guest, name), "{name}");
    }
    let guest = guest_on(FIRST, 0, |options| options.xattr = XattrPolicy::Off);
    let node = file(&guest);
    assert_eq!(set(&guest, node, b"user.x\0", 1, b"v").error, libc::ENOSYS);
}

fn mknod(guest: &Guest, name: &str, mode: u32, rdev: u32) -> Answer {
    let body = MknodIn { mode, rdev, ..MknodIn::default() };
    let name = [name.as_bytes(), b"\0"].concat();
    guest.call(Opcode::Mknod, ROOT_ID, &[body.as_slice(), &name])
}

#[test]
fn a_device_node_is_not_made_unless_it_is_the_whiteout_of_an_overlay() {
    let guest = guest();
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        // null, mem, sda, kvm, and one that does not exist.
        for rdev in [0x103, 0x101, 0x800, 0xae8, u32::MAX] {
            assert_eq!(mknod(&guest, "device", kind | 0o666, rdev).error, libc::EPERM, "{rdev:#x}");
        }
    }
    assert_eq!(mknod(&guest, "device", libc::S_IFBLK | 0o600, 0).error, libc::EPERM);
    assert!(guest.path().join("device").symlink_metadata().is_err());
    if rustix::process::geteuid().is_root() {
        assert_eq!(mknod(&guest, "whiteout", libc::S_IFCHR, 0).error, 0);
    }
}

#[test]
fn mode_bits_beyond_the_permissions_make_nothing_else_of_a_node() {
    let guest = guest();
    for kind in [libc::S_IFDIR, libc::S_IFLNK, 0o150_000, 0o170_000, 0o030_000] {
        assert_eq!(mknod(&guest, "node", kind | 0o600, 0).error, libc::EINVAL, "{kind:#o}");
    }
    assert!(guest.path().join("node").symlink_metadata().is_err());
    // Bits above the mode's sixteen are nobody's.
    assert_eq!(mknod(&guest, "node", 0xfff0_0000 | libc::S_IFREG | 0o640, 0).error, 0);
    let made = guest.path().join("node").symlink_metadata().unwrap();
    assert_eq!(made.mode(), libc::S_IFREG | 0o640);
    let body = MkdirIn { mode: u32::MAX, umask: 0 };
    let parts: [&[u8]; 2] = [body.as_slice(), b"directory\0"];
    assert_eq!(guest.call(Opcode::Mkdir, ROOT_ID, &parts).error, 0);
    assert!(guest.path().join("directory").is_dir());
    let created = guest.create(ROOT_ID, "file", libc::O_RDWR, libc::S_IFBLK | 0o4600);
    assert_eq!(created.error, 0);
    let made = guest.path().join("file").symlink_metadata().unwrap();
    assert_eq!(made.mode() & libc::S_IFMT, libc::S_IFREG);
}

#[test]
fn what_is_made_belongs_to_the_guests_process_and_leaks_no_group_of_ours() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let mut guest = guest();
    std::os::unix::fs::chown(guest.path(), Some(0), Some(0)).unwrap();
    std::fs::set_permissions(guest.path(), PermissionsExt::from_mode(0o2777)).unwrap();
    (guest.uid, guest.gid) = (4242, 4343);
    // Group 0, which this process has and the guest's has not.
    assert_eq!(guest.create(ROOT_ID, "file", libc::O_RDWR, 0o2775).error, 0);
    let made = guest.path().join("file").metadata().unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o7777), (4242, 0, 0o775));
    // And with ids that are none.
    for (uid, gid) in [(u32::MAX, 0), (0, u32::MAX)] {
        (guest.uid, guest.gid) = (uid, gid);
        assert_eq!(mknod(&guest, "none", libc::S_IFREG, 0).error, libc::EINVAL);
    }
}

#[test]
fn a_write_or_a_truncation_without_privilege_takes_set_id_bits() {
    let guest = guest();
    let node = file(&guest);
    let path = guest.path().join("file");
    let mode =
        |mode: u32| std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
    let fh = guest.fh(node, libc::O_RDWR);
    let truncate = SetattrIn {
        valid: (SetattrValid::SIZE | SetattrValid::KILL_SUIDGID).bits(),
        size: 1,
        ..SetattrIn::default()
    };
    let open =
        OpenIn { flags: (libc::O_WRONLY | libc::O_TRUNC) as u32, fuse_flags: OPEN_KILL_SUIDGID };
    let changes: [&dyn Fn() -> Answer; 3] = [
        &|| guest.write_with(node, fh, 0, b"x", 0, WRITE_KILL_SUIDGID),
        &|| guest.setattr(node, truncate),
        &|| guest.call(Opcode::Open, node, &[open.as_slice()]),
    ];
    for change in changes {
        mode(0o6755);
        assert_eq!(change().error, 0);
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o755);
    }
}

#[test]
fn attributes_that_no_file_can_have_are_refused_whole() {
    let guest = guest();
    let node = file(&guest);
    let path = guest.path().join("file");
    let before = path.metadata().unwrap();
    use SetattrValid as V;
    let nsec = 1_000_000_000;
    let base = SetattrIn { mode: 0o777, ..SetattrIn::default() };
    for (valid, change, error) in [
        (V::SIZE.bits(), SetattrIn { size: u64::MAX, ..base }, libc::EFBIG),
        (V::SIZE.bits(), SetattrIn { size: 1 << 63, ..base }, libc::EFBIG),
        (V::ATIME.bits(), SetattrIn { atimensec: nsec, ..base }, libc::EINVAL),
        (V::MTIME.bits(), SetattrIn { mtimensec: nsec, ..base }, libc::EINVAL),
        (V::MTIME.bits(), SetattrIn { mtimensec: u32::MAX, ..base }, libc::EINVAL),
        (V::UID.bits(), SetattrIn { uid: u32::MAX, ..base }, libc::EINVAL),
        (V::GID.bits(), SetattrIn { gid: u32::MAX, ..base }, libc::EINVAL),
        (V::FH.bits(), SetattrIn { fh: u64::MAX, ..base }, libc::EBADF),
        (1 << 12, base, libc::EINVAL),
        (u32::MAX, base, libc::EINVAL),
    ] {
        // With a mode that would be fine: nothing of it is done.
        let change = SetattrIn { valid: valid | V::MODE.bits(), ..change };
        assert_eq!(guest.setattr(node, change).error, error, "{change:?}");
    }
    let after = path.metadata().unwrap();
    assert_eq!((before.mode(), before.len()), (after.mode(), after.len()));
    // As large as the host's file system takes, and no larger.
    let huge = SetattrIn { valid: V::SIZE.bits(), size: i64::MAX as u64, ..base };
    assert!([0, libc::EFBIG, libc::EINVAL].contains(&guest.setattr(node, huge).error));
    for node in [ROOT_ID, 0, 77, u64::MAX] {
        let change = SetattrIn { valid: V::SIZE.bits(), ..base };
        let expected = if node == ROOT_ID { libc::EISDIR } else { libc::ENOENT };
        assert_eq!(guest.setattr(node, change).error, expected, "{node}");
    }
}

#[test]
fn a_mode_of_a_symlink_is_not_set_on_what_it_points_to() {
    let guest = guest();
    let node = file(&guest);
    std::os::unix::fs::symlink("file", guest.path().join("link")).unwrap();
    let link = guest.node("link");
    let before = guest.path().join("file").metadata().unwrap().mode();
    let change =
        SetattrIn { valid: SetattrValid::MODE.bits(), mode: 0o777, ..SetattrIn::default() };
    assert_eq!(guest.setattr(link, change).error, libc::EOPNOTSUPP);
    let size = SetattrIn { valid: SetattrValid::SIZE.bits(), ..SetattrIn::default() };
    assert_eq!(guest.setattr(link, size).error, libc::EINVAL);
    assert_eq!(guest.path().join("file").metadata().unwrap().mode(), before);
    assert_eq!(guest.getattr(node).get::<AttrOut>().attr.size, 4);
}
