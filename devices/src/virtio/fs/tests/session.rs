//! What a guest can send that is wrong, each through a real ring: INIT, and what is not its turn.

use vm_memory::ByteValued;

use super::queue::{FIRST, guest, silent_guest};
use crate::fuse::abi::*;
use crate::fuse::opcode::{Answer, OPCODES, Opcode};
use crate::fuse::testing::EVERYTHING;

#[test]
fn nothing_is_served_before_init() {
    let guest = silent_guest(FIRST, 0, |_| {});
    for limits in OPCODES.iter().filter(|limits| limits.opcode != Opcode::Init) {
        let answer = guest.raw(limits.opcode as u32, ROOT_ID, &[&vec![0; limits.least]]);
        match limits.answer {
            Answer::Never => assert!(answer.is_none(), "{}", limits.name),
            Answer::Body(_) => assert_eq!(answer.unwrap().error, libc::EIO, "{}", limits.name),
        }
    }
}

#[test]
fn a_version_that_is_not_spoken_here_begins_no_session() {
    let guest = silent_guest(FIRST, 0, |_| {});
    assert_eq!(guest.init(6, 40, EVERYTHING).error, libc::EPROTO);
    let newer: InitOut = guest.init(8, 0, EVERYTHING).get();
    assert_eq!((newer.major, newer.flags, newer.flags2), (7, 0, 0));
    assert_eq!(guest.init(u32::MAX, u32::MAX, EVERYTHING).get::<InitOut>().major, 7);
    // Of the other byte order: opcode 26 << 24.
    let big = InitIn { major: 7u32.swap_bytes(), ..InitIn::default() };
    let answer = guest.raw(26u32.swap_bytes(), 0, &[big.as_slice()]).unwrap();
    assert_eq!(answer.error, libc::ENOSYS);
    assert_eq!(guest.getattr(ROOT_ID).error, libc::EIO);
    assert_eq!(guest.init(7, 0, 0).error, 0, "and a good one still does");
    assert_eq!(guest.getattr(ROOT_ID).error, 0);
}

#[test]
fn init_answers_what_was_offered_and_what_fits_the_queue() {
    let guest = silent_guest(FIRST, 0, |_| {});
    for offered in [0, 1, EVERYTHING, 0x5555_5555_5555_5555, 0xaaaa_aaaa_aaaa_aaaa] {
        let out: InitOut = guest.init(7, u32::MAX, offered).get();
        let answered = u64::from(out.flags) | u64::from(out.flags2) << 32;
        assert_eq!(answered & !offered, 0, "{offered:#x}");
        assert!(InitFlags::from_bits(answered).is_some(), "{offered:#x}");
        // Headers take four descriptors of the 1024 (`FUSE_HEADER_OVERHEAD`, fs/fuse/virtio_fs.c).
        assert!(out.max_pages <= 1024 - 4);
        assert_eq!(u32::from(out.max_pages) * 4096 % MAX_WRITE, 0);
        assert!(out.map_alignment == 0 || out.map_alignment == 12);
    }
}

#[test]
fn a_second_init_drops_what_the_first_session_had() {
    let guest = guest();
    std::fs::write(guest.path().join("file"), "x").unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDWR);
    guest.setup(node, 0, 4096, 3, 0).ok();
    assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
    assert_eq!(guest.window.as_ref().unwrap().live_mappings(), 0);
    assert_eq!((guest.share.live_inodes(), guest.share.live_handles()), (1, 0));
    assert_eq!(guest.getattr(node).error, libc::ESTALE);
    assert_eq!(guest.write(node, fh, 0, b"y").error, libc::EBADF);
    // One that is refused ends it as little as any other wrong request does.
    assert_eq!(guest.init(6, 0, 0).error, libc::EPROTO);
    assert_eq!(guest.getattr(ROOT_ID).error, 0);
}
