use std::sync::atomic::Ordering;

use vm_memory::ByteValued;

use super::{AT_ONCE, Header, Session};
use crate::fuse::abi::*;
use crate::fuse::opcode::{Answer, OPCODES, Opcode};
use crate::fuse::testing::{EVERYTHING, Guest};
use crate::fuse::{Counters, LATENCY_CLASSES, latency_bound};
use crate::share::{CachePolicy, DaxPolicy};

fn agreed(guest: &Guest, offered: u64) -> (InitOut, InitFlags) {
    let out: InitOut = guest.init(7, 45, offered).get();
    let bits = u64::from(out.flags) | u64::from(out.flags2) << 32;
    let flags = InitFlags::from_bits(bits).expect("only known flags are answered");
    (out, flags)
}

#[test]
fn a_session_can_be_shared_by_threads() {
    fn check<T: Send + Sync>() {}
    check::<Session>();
}

#[test]
fn init_offers_what_the_design_says_and_nothing_more() {
    let guest = Guest::without_init(|_| {}, true);
    let (out, flags) = agreed(&guest, EVERYTHING);
    let all = InitFlags::all();
    let mut without = InitFlags::WRITEBACK_CACHE
        | InitFlags::DIRECT_IO_ALLOW_MMAP
        | InitFlags::POSIX_ACL
        | InitFlags::DONT_MASK
        | InitFlags::SETXATTR_EXT
        | InitFlags::ALLOW_IDMAP;
    // Whose groups would count where everything is made as one user?
    without.set(InitFlags::CREATE_SUPP_GROUP, !rustix::process::geteuid().is_root());
    assert_eq!(flags, all - without);
    assert_eq!((out.major, out.minor), (7, 45));
    assert_eq!(out.max_write, 1 << 20);
    assert_eq!((out.max_pages, out.map_alignment), (256, 12));
    assert_eq!((out.max_background, out.congestion_threshold), (65535, 49149));
    assert_eq!((out.time_gran, out.max_readahead), (1, 131072));
}

#[test]
fn init_answers_no_flag_that_was_not_offered() {
    let guest = Guest::without_init(|_| {}, true);
    let (out, flags) = agreed(&guest, 0);
    assert!(flags.is_empty());
    assert_eq!((out.max_pages, out.map_alignment), (0, 0));
    for flag in InitFlags::all().iter() {
        let (_, flags) = agreed(&guest, flag.bits());
        assert!(flag.contains(flags), "{flag:?} was offered, {flags:?} answered");
    }
    // The upper half without the flag that says it is there.
    let (_, flags) = agreed(&guest, EVERYTHING & !InitFlags::INIT_EXT.bits());
    assert!(!flags.contains(InitFlags::HAS_INODE_DAX));
    let (_, flags) = agreed(&guest, InitFlags::READDIRPLUS_AUTO.bits());
    assert!(flags.is_empty());
}

#[test]
fn init_offers_dax_only_with_a_window_and_a_policy() {
    let dax = InitFlags::HAS_INODE_DAX | InitFlags::MAP_ALIGNMENT;
    let guest = Guest::without_init(|_| {}, false);
    assert!(!agreed(&guest, EVERYTHING).1.intersects(dax));
    let guest = Guest::without_init(|options| options.dax = DaxPolicy::Never, true);
    assert!(!agreed(&guest, EVERYTHING).1.intersects(dax));
    assert_eq!(guest.setup(ROOT_ID, 0, 4096, 2, 0).error, libc::ENOSYS);
    let guest = Guest::without_init(|options| options.dax = DaxPolicy::Always, true);
    let flags = agreed(&guest, EVERYTHING).1;
    assert!(flags.contains(dax));
    assert!(!flags.contains(InitFlags::HANDLE_KILLPRIV_V2));
}

#[test]
fn init_follows_the_options() {
    let guest = Guest::without_init(|options| options.writeback = true, false);
    assert!(agreed(&guest, EVERYTHING).1.contains(InitFlags::WRITEBACK_CACHE));
    let guest = Guest::without_init(
        |options| {
            options.writeback = true;
            options.cache = CachePolicy::Never;
        },
        false,
    );
    let flags = agreed(&guest, EVERYTHING).1;
    assert!(!flags.contains(InitFlags::WRITEBACK_CACHE));
    assert!(flags.contains(InitFlags::DIRECT_IO_ALLOW_MMAP));
}

#[test]
fn init_offers_acls_and_what_comes_with_them_together() {
    let with = InitFlags::POSIX_ACL
        | InitFlags::DONT_MASK
        | InitFlags::SETXATTR_EXT
        | InitFlags::ALLOW_IDMAP;
    let guest = Guest::without_init(|options| options.acl = true, false);
    assert!(agreed(&guest, EVERYTHING).1.contains(with));
    // Each of the others is only of use to a guest that has ACLs.
    let (_, flags) = agreed(&guest, EVERYTHING & !InitFlags::POSIX_ACL.bits());
    assert!(!flags.intersects(with), "{flags:?}");
    let (_, flags) = agreed(&guest, EVERYTHING & !InitFlags::ALLOW_IDMAP.bits());
    assert!(flags.contains(with - InitFlags::ALLOW_IDMAP), "{flags:?}");
    // The upper half has not been offered.
    let (_, flags) = agreed(&guest, EVERYTHING & !InitFlags::INIT_EXT.bits());
    assert!(!flags.contains(InitFlags::ALLOW_IDMAP) && flags.contains(InitFlags::POSIX_ACL));
}

#[test]
fn each_cache_mode_agrees_on_its_flags() {
    let cached = InitFlags::WRITEBACK_CACHE;
    let direct = InitFlags::DIRECT_IO_ALLOW_MMAP;
    let always =
        InitFlags::AUTO_INVAL_DATA | InitFlags::PARALLEL_DIROPS | InitFlags::CACHE_SYMLINKS;
    for (cache, writeback, expected) in [
        (CachePolicy::Never, true, direct),
        (CachePolicy::Metadata, true, direct),
        (CachePolicy::Auto, true, cached),
        (CachePolicy::Always, true, cached),
        (CachePolicy::Always, false, InitFlags::empty()),
    ] {
        let guest = Guest::without_init(
            |options| (options.cache, options.writeback) = (cache, writeback),
            false,
        );
        let (_, flags) = agreed(&guest, EVERYTHING);
        assert_eq!(flags & (cached | direct), expected, "{cache:?}");
        assert!(flags.contains(always), "{cache:?}");
    }
}

#[test]
fn init_out_is_as_long_as_the_guests_version_expects() {
    let guest = Guest::without_init(|_| {}, false);
    for (minor, len) in [(4, 8), (5, 24), (22, 24), (23, 64), (31, 64), (99, 64)] {
        assert_eq!(guest.init(7, minor, 0).body.len(), len, "7.{minor}");
    }
}

#[test]
fn a_newer_major_version_is_told_ours_and_the_session_has_not_begun() {
    let guest = Guest::without_init(|_| {}, false);
    let out: InitOut = guest.init(8, 0, EVERYTHING).get();
    assert_eq!((out.major, out.flags, out.max_write), (7, 0, 0));
    assert_eq!(guest.getattr(ROOT_ID).error, libc::EIO);
    assert_eq!(guest.init(6, 0, 0).error, libc::EPROTO);
    assert_eq!(guest.getattr(ROOT_ID).error, libc::EIO);
}

#[test]
fn init_ext_with_a_short_body_is_taken_as_nothing_more_offered() {
    let guest = Guest::without_init(|_| {}, true);
    let body = InitIn { major: 7, minor: 38, max_readahead: 0, flags: u32::MAX };
    let out: InitOut = guest.call(Opcode::Init, 0, &[body.as_slice()]).get();
    assert_eq!(out.flags2, 0);
    assert_ne!(out.flags, 0);
}

#[test]
fn nothing_but_init_is_served_before_init_and_after_destroy() {
    let guest = Guest::without_init(|_| {}, true);
    for round in 0..2 {
        for limits in OPCODES {
            if limits.opcode == Opcode::Init {
                continue;
            }
            let body = vec![0; limits.least];
            let answer = guest.raw(limits.opcode as u32, ROOT_ID, &[&body]);
            match limits.answer {
                Answer::Never => assert!(answer.is_none()),
                Answer::Body(_) => assert_eq!(answer.unwrap().error, libc::EIO, "{round}"),
            }
        }
        assert_eq!(guest.init(7, 40, EVERYTHING).error, 0);
        guest.call(Opcode::Destroy, 0, &[]).ok();
    }
}

#[test]
fn a_second_init_ends_the_first_session() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), "x").unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDONLY);
    guest.setup(node, 0, 4096, 2, 0).ok();
    let window = guest.window.as_ref().unwrap();
    assert_eq!(window.live_mappings(), 1);

    assert_eq!(guest.init(7, 40, EVERYTHING).error, 0);
    assert_eq!(window.live_mappings(), 0);
    assert_eq!((guest.share.live_inodes(), guest.share.live_handles()), (1, 0));
    assert_eq!(guest.getattr(node).error, libc::ESTALE);
    assert_eq!(guest.getattr(ROOT_ID).error, 0);
    let again = guest.node("file");
    assert_ne!(again, node);
    assert_eq!(guest.read(again, fh, 0, 1).error, libc::EBADF);
}

#[test]
fn destroy_is_answered_and_clears_and_so_does_reset() {
    for reset in [false, true] {
        let guest = Guest::new();
        std::fs::write(guest.path().join("file"), "x").unwrap();
        let node = guest.node("file");
        guest.fh(node, libc::O_RDONLY);
        guest.setup(node, 0, 4096, 2, 0).ok();
        if reset {
            guest.session.reset();
            guest.session.reset();
        } else {
            guest.call(Opcode::Destroy, 0, &[]).ok();
        }
        assert_eq!(guest.window.as_ref().unwrap().live_mappings(), 0);
        assert_eq!((guest.share.live_inodes(), guest.share.live_handles()), (1, 0));
        assert_eq!(guest.getattr(ROOT_ID).error, libc::EIO);
        let live = guest.session.snapshot();
        assert!(live.contains(&("dax_live", 0)));
        assert!(live.contains(&("dax_setups", 1)));
    }
}

#[test]
fn a_request_with_a_wrong_length_is_answered_with_an_errno() {
    let guest = Guest::new();
    let good = guest.frame(Opcode::Lookup as u32, ROOT_ID, &[b"a\0"]);
    for len in [0, 39, 40, good.len() as u32 + 1, u32::MAX] {
        let mut bytes = good.clone();
        bytes[..4].copy_from_slice(&len.to_ne_bytes());
        let answer = guest.send(&mut bytes, 0x1122_3344_5566_7788).unwrap();
        assert_eq!(answer.error, libc::EINVAL, "len {len}");
    }
    for short in 16..40 {
        let mut bytes = good[..short].to_vec();
        let answer = guest.send(&mut bytes, 0x1122_3344_5566_7788).unwrap();
        assert_eq!(answer.error, libc::EINVAL, "{short} bytes");
    }
    assert_eq!(guest.send(&mut [], 0).unwrap().error, libc::EINVAL);
    // More bytes than the length says are no part of the request.
    let mut bytes = [good.as_slice(), b"rest"].concat();
    let answer = guest.send(&mut bytes, 0x1122_3344_5566_7788).unwrap();
    assert_eq!(answer.error, libc::ENOENT);
}

#[test]
fn every_operation_checks_the_length_of_its_body() {
    let guest = Guest::new();
    for limits in OPCODES {
        for len in [limits.least.checked_sub(1), limits.most.checked_add(1)] {
            let Some(len) = len else { continue };
            let answer = guest.raw(limits.opcode as u32, ROOT_ID, &[&vec![0; len]]);
            match limits.answer {
                Answer::Never => assert!(answer.is_none()),
                Answer::Body(_) => {
                    assert_eq!(answer.unwrap().error, libc::EINVAL, "{}", limits.name);
                }
            }
        }
    }
}

#[test]
fn unknown_operations_are_not_implemented() {
    let guest = Guest::new();
    for opcode in [0, 7, 19, 54, 4096, 26 << 24, u32::MAX] {
        assert_eq!(guest.raw(opcode, ROOT_ID, &[]).unwrap().error, libc::ENOSYS);
    }
}

#[test]
fn without_room_for_a_header_nothing_is_answered_and_nothing_is_done() {
    let mut guest = Guest::new();
    for room in 0..16 {
        guest.room = room;
        let body = MkdirIn::default();
        assert!(guest.raw(Opcode::Mkdir as u32, ROOT_ID, &[body.as_slice(), b"d\0"]).is_none());
        assert!(guest.raw(9999, ROOT_ID, &[]).is_none());
    }
    // Room for an error, but not for the entry that the directory would be.
    guest.room = 16 + 127;
    let body = MkdirIn::default();
    let answer = guest.call(Opcode::Mkdir, ROOT_ID, &[body.as_slice(), b"d\0"]);
    assert_eq!(answer.error, libc::EINVAL);
    assert!(!guest.path().join("d").exists());
}

#[test]
fn forget_and_interrupt_are_never_answered() {
    let guest = Guest::new();
    for (opcode, body) in [
        (Opcode::Forget, vec![0u8; 8]),
        (Opcode::Forget, vec![0; 3]),
        (Opcode::Forget, vec![0; 4000]),
        (Opcode::BatchForget, vec![0xff; 8]),
        (Opcode::BatchForget, vec![0xff; 24]),
        (Opcode::BatchForget, vec![]),
        (Opcode::Interrupt, vec![9; 8]),
        (Opcode::NotifyReply, vec![1; 64]),
    ] {
        assert!(guest.raw(opcode as u32, ROOT_ID, &[&body]).is_none());
    }
    assert_eq!(guest.getattr(ROOT_ID).error, 0, "the root cannot be forgotten");
}

#[test]
fn any_bytes_at_all_get_a_well_formed_answer() {
    let mut guest = Guest::new();
    // xorshift, so that a failure can be repeated.
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..20_000 {
        let mut bytes = vec![0u8; (random() % 300) as usize];
        bytes.fill_with(|| (random() >> 32) as u8 & (random() >> 24) as u8);
        if bytes.len() >= 40 {
            let opcode = (random() % 56) as u32;
            let len = bytes.len() as u32;
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            bytes[4..8].copy_from_slice(&opcode.to_ne_bytes());
            bytes[16..24].copy_from_slice(&(random() % 3).to_ne_bytes());
            if opcode == Opcode::Destroy as u32 {
                continue;
            }
        }
        let mut unique = [0; 8];
        for (to, from) in unique.iter_mut().zip(bytes.iter().skip(8)) {
            *to = *from;
        }
        guest.room = (random() % 400) as usize;
        guest.send(&mut bytes, u64::from_ne_bytes(unique));
    }
}

#[test]
fn counters_name_what_was_asked() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), "hello").unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDWR);
    assert_eq!(guest.read(node, fh, 0, 100).body, b"hello");
    assert_eq!(guest.write(node, fh, 0, b"abc").get::<WriteOut>().size, 3);
    guest.lookup(ROOT_ID, "missing");
    let counters = guest.session.counters().snapshot();
    for expected in [
        ("LOOKUP", 2),
        ("READ", 1),
        ("WRITE", 1),
        ("INIT", 1),
        ("errors", 1),
        ("malformed", 0),
        ("bytes_read", 5),
        ("bytes_written", 3),
        ("sessions", 1),
    ] {
        assert!(counters.contains(&expected), "{expected:?} in {counters:?}");
    }
    assert!(!counters.iter().any(|(name, _)| *name == "RENAME"));
}

#[test]
fn each_operation_has_its_errors_and_its_durations() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), "hello").unwrap();
    let before = std::time::Instant::now();
    let node = guest.node("file");
    for _ in 0..3 {
        assert_eq!(guest.lookup(ROOT_ID, "missing").error, libc::ENOENT);
        assert_eq!(guest.lookup(node, "x").error, libc::ENOTDIR);
    }
    guest.forget(node, 1);
    let took = before.elapsed().as_nanos() as u64;
    // No request of any operation: counted as malformed, and under none.
    guest.raw(4096, ROOT_ID, &[]);
    let operations = guest.session.counters().operations();
    let names: Vec<_> = operations.iter().map(|of| of.name).collect();
    assert_eq!(names, ["LOOKUP", "FORGET", "INIT"]);
    for (of, requests, errors) in [(0, 7, 6), (1, 1, 0), (2, 1, 0)]
        .map(|(at, requests, errors)| (&operations[at], requests, errors))
    {
        assert_eq!((of.requests, of.errors), (requests, errors), "{}", of.name);
        assert_eq!(of.latency.iter().sum::<u64>(), requests, "{}", of.name);
    }
    let lookups = operations[0].nanoseconds;
    assert!(lookups > 0 && lookups <= took, "{lookups} of {took} ns");
    // The sum is what the classes say, as far as they say it.
    let least: u64 = (1..LATENCY_CLASSES)
        .map(|class| {
            operations[0].latency[class] * latency_bound(class - 1).unwrap().as_nanos() as u64
        })
        .sum();
    assert!(lookups >= least);
}

/// Run by hand, in a release build: what counting costs a request.
#[test]
#[ignore = "prints a figure"]
fn what_two_looks_at_the_clock_cost() {
    const TIMES: u32 = 1_000_000;
    let start = std::time::Instant::now();
    for _ in 0..TIMES {
        let since = std::hint::black_box(std::time::Instant::now());
        std::hint::black_box(since.elapsed());
    }
    let clock = start.elapsed() / TIMES;
    let counters = Counters::default();
    let start = std::time::Instant::now();
    for _ in 0..TIMES {
        let since = std::hint::black_box(std::time::Instant::now());
        counters.count(Opcode::Getattr);
        counters.finish(Opcode::Getattr, since.elapsed(), false);
    }
    let counted = start.elapsed() / TIMES;
    let guest = Guest::new();
    let start = std::time::Instant::now();
    for _ in 0..TIMES / 100 {
        guest.getattr(ROOT_ID);
    }
    let request = start.elapsed() / (TIMES / 100);
    println!("clock {clock:?}, all of counting {counted:?}, a GETATTR {request:?}");
}

#[test]
fn no_mapping_outlives_a_second_init() {
    let guest = std::sync::Arc::new(Guest::new());
    std::fs::write(guest.path().join("file"), [1; 4096]).unwrap();
    for _ in 0..20 {
        let node = guest.node("file");
        // So that there is something to clear, and time for a request to come between.
        for _ in 0..400 {
            guest.fh(node, libc::O_RDONLY);
        }
        std::thread::scope(|scope| {
            for thread in 0..6u64 {
                let guest = &guest;
                scope.spawn(
                    move || {
                        while guest.setup(node, 0, 4096, 2, thread * 4096).error == 0 {}
                    },
                );
            }
            std::thread::sleep(std::time::Duration::from_millis(2));
            assert_eq!(guest.init(7, 40, EVERYTHING).error, 0);
        });
        assert_eq!(guest.window.as_ref().unwrap().live_mappings(), 0);
    }
}

#[test]
fn a_node_of_an_ended_session_is_not_mapped_in_the_next() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), [1; 4096]).unwrap();
    let node = guest.node("file");
    assert_eq!(guest.init(7, 40, EVERYTHING).error, 0);
    assert_eq!(guest.setup(node, 0, 4096, 2, 0).error, libc::ESTALE);
    assert_eq!(guest.window.as_ref().unwrap().live_mappings(), 0);
}

#[test]
fn what_was_tried_without_waiting_and_took_long_is_counted_and_not_tried_again_soon() {
    let guest = Guest::without_init_in("/dev/shm", |_| {}, true);
    assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
    let raw = InHeader { nodeid: ROOT_ID, ..InHeader::default() };
    let slow = || guest.session.counters().slow_at_once.load(Ordering::Relaxed);
    let tried = || guest.at_once(Opcode::Lookup, ROOT_ID, &[b"none\0"]).is_some();
    for (at_once, took, is_slow) in
        [(true, AT_ONCE, false), (false, AT_ONCE * 2, false), (true, AT_ONCE * 2, true)]
    {
        guest.session.note_time(&Header { raw, body: 0, at_once }, took);
        assert_eq!((slow(), tried()), (u64::from(is_slow), !is_slow));
    }
}
