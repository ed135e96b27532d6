//! What a guest can send that is wrong, each through a real ring: the form of a request.

use vm_memory::ByteValued;

use super::queue::guest;
use crate::fuse::abi::*;
use crate::fuse::opcode::{Answer, OPCODES, Opcode};

const UNIQUE: u64 = 0x1122_3344_5566_7788;

#[test]
fn a_request_shorter_than_a_header_is_an_error_that_echoes_what_it_can() {
    let guest = guest();
    let good = guest.frame(Opcode::Lookup as u32, ROOT_ID, &[b"a\0"]);
    for len in 0..IN_HEADER {
        // `unique` is at 8..16; what is missing of it reads as zero.
        let unique =
            if len < 16 { UNIQUE & !(u64::MAX << (8 * len.saturating_sub(8))) } else { UNIQUE };
        let answer = guest.send(&mut good[..len].to_vec(), unique).unwrap();
        assert_eq!(answer.error, libc::EINVAL, "{len} bytes");
    }
}

#[test]
fn a_length_that_is_not_that_of_the_buffer_is_refused_or_bounds_the_request() {
    let guest = guest();
    let good = guest.frame(Opcode::Lookup as u32, ROOT_ID, &[b"a\0"]);
    for len in [0, 1, 39, 40, good.len() as u32 + 1, MAX_REQUEST as u32 + 1, u32::MAX] {
        let mut bytes = good.clone();
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        assert_eq!(guest.send(&mut bytes, UNIQUE).unwrap().error, libc::EINVAL, "len {len}");
    }
    // What follows is no part of the request: the name is "a", not "a" and more.
    let mut bytes = [good.as_slice(), b"/../etc\0"].concat();
    assert_eq!(guest.send(&mut bytes, UNIQUE).unwrap().error, libc::ENOENT);
}

#[test]
fn without_room_for_the_reply_nothing_is_done_and_nothing_is_written_past_it() {
    let mut guest = guest();
    let body = MkdirIn::default();
    for room in [0, 1, 15, 16, 16 + 127] {
        guest.room = room;
        let answer = guest.raw(Opcode::Mkdir as u32, ROOT_ID, &[body.as_slice(), b"d\0"]);
        // With less than a header's room: used length 0.
        assert_eq!(answer.map(|answer| answer.error), (room >= 16).then_some(libc::EINVAL));
        assert!(!guest.path().join("d").exists(), "{room}");
    }
    guest.room = 16 + 128;
    assert_eq!(
        guest.raw(Opcode::Mkdir as u32, ROOT_ID, &[body.as_slice(), b"d\0"]).unwrap().error,
        0
    );
}

#[test]
fn a_body_that_is_too_short_or_too_long_for_its_operation_is_refused() {
    let guest = guest();
    for limits in OPCODES {
        for len in [limits.least.checked_sub(1), limits.most.checked_add(1)] {
            let Some(len) = len.filter(|len| *len <= MAX_REQUEST) else { continue };
            let answer = guest.raw(limits.opcode as u32, ROOT_ID, &[&vec![0; len]]);
            match limits.answer {
                Answer::Never => assert!(answer.is_none(), "{}", limits.name),
                Answer::Body(_) => {
                    assert_eq!(answer.unwrap().error, libc::EINVAL, "{}", limits.name);
                }
            }
        }
    }
}

#[test]
fn an_unknown_operation_is_not_implemented_and_costs_nothing() {
    let guest = guest();
    for opcode in [0, 7, 19, 54, 4096, 1 << 20, 26 << 24, u32::MAX] {
        for body in [&[][..], &[0xff; 4096]] {
            let answer = guest.raw(opcode, ROOT_ID, &[body]).unwrap();
            assert_eq!(answer.error, libc::ENOSYS, "{opcode}");
        }
    }
    assert_eq!(guest.getattr(ROOT_ID).error, 0);
}
