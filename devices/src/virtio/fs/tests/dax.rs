//! What a guest can do wrong with the window (virtio 1.3, 5.11.6.4), each through a real ring.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::queue::{FIRST, guest, guest_on};
use crate::dax::{DaxWindow, Window};
use crate::fuse::abi::*;
use crate::fuse::opcode::Opcode;
use crate::fuse::testing::{Guest, serve};
use crate::virtio::fs::{Config, FsDevice};
use crate::virtio::testing::*;

const READ_ONLY: u64 = SETUPMAPPING_READ;
const BOTH: u64 = SETUPMAPPING_READ | SETUPMAPPING_WRITE;
/// What Linux maps at a time.
const RANGE: u64 = 2 << 20;
const PAGE: u64 = 4096;

fn window(guest: &Guest) -> &Arc<Window> {
    guest.window.as_ref().unwrap()
}

/// Makes a file whose page n is full of the byte `first + n`, and looks it up.
fn file(guest: &Guest, name: &str, pages: u8, first: u8) -> u64 {
    let data: Vec<u8> = (0..pages).flat_map(|page| [first + page; PAGE as usize]).collect();
    std::fs::write(guest.path().join(name), data).unwrap();
    guest.node(name)
}

fn pages_of(guest: &Guest, count: u64) -> Vec<Option<u8>> {
    (0..count).map(|page| window(guest).peek(page * PAGE)).collect()
}

fn count(guest: &Guest, name: &str) -> u64 {
    let counters = guest.session.snapshot();
    counters.iter().find(|(known, _)| *known == name).unwrap().1
}

#[test]
fn offsets_and_lengths_that_are_no_whole_pages_or_leave_the_window_are_refused() {
    let guest = guest();
    let node = file(&guest, "file", 4, 1);
    let size = window(&guest).size();
    guest.setup(node, 0, PAGE, READ_ONLY, 0).ok();
    let wrong = [
        (0, 0, 0),
        (1, PAGE, 0),
        (0, PAGE + 1, 0),
        (0, PAGE, 2048),
        (0, PAGE, size),
        (0, 2 * PAGE, size - PAGE),
        (0, size + PAGE, 0),
        (0, u64::MAX - 4095, 8192),
        (0, PAGE, u64::MAX - 4095),
        (u64::MAX - 4095, 2 * PAGE, 0),
        (i64::MAX as u64 - 4095, PAGE, 0),
    ];
    for (foffset, len, moffset) in wrong {
        let answer = guest.setup(node, foffset, len, READ_ONLY, moffset);
        assert_eq!(answer.error, libc::EINVAL, "{foffset:#x} {len:#x} {moffset:#x}");
    }
    assert_eq!(pages_of(&guest, 2), [Some(1), None], "what was there stays");
    assert_eq!(count(&guest, "dax_refused_invalid"), wrong.len() as u64);
}

#[test]
fn flags_that_do_not_say_what_is_wanted_are_refused() {
    let guest = guest();
    let node = file(&guest, "file", 1, 1);
    for flags in [0, SETUPMAPPING_WRITE, 4, BOTH | 4, 1 << 63, u64::MAX] {
        assert_eq!(guest.setup(node, 0, PAGE, flags, 0).error, libc::EINVAL, "{flags:#x}");
    }
    assert_eq!(pages_of(&guest, 1), [None]);
}

#[test]
fn a_mapping_over_others_replaces_and_splits_them() {
    let guest = guest();
    let (old, new) = (file(&guest, "old", 8, 1), file(&guest, "new", 2, 100));
    guest.setup(old, 0, 8 * PAGE, READ_ONLY, 0).ok();
    guest.setup(new, 0, 2 * PAGE, BOTH, 2 * PAGE).ok();
    let of = |pages: [u8; 8]| pages.map(Some);
    assert_eq!(pages_of(&guest, 8), of([1, 2, 100, 101, 5, 6, 7, 8]));
    guest.setup(new, PAGE, PAGE, READ_ONLY, 2 * PAGE).ok();
    guest.setup(old, 0, 3 * PAGE, BOTH, 5 * PAGE).ok();
    assert_eq!(pages_of(&guest, 8), of([1, 2, 101, 101, 5, 1, 2, 3]));
}

#[test]
fn a_vcpu_never_sees_a_gap_while_a_range_is_replaced() {
    let guest = guest();
    let (one, other) = (file(&guest, "one", 4, 1), file(&guest, "other", 4, 1));
    guest.setup(one, 0, 4 * PAGE, BOTH, 0).ok();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let mut looks = 0u64;
            while !done.load(Ordering::Relaxed) {
                assert_eq!(window(&guest).peek(looks % 4 * PAGE), Some((looks % 4) as u8 + 1));
                looks += 1;
            }
            looks
        });
        for round in 0..500 {
            let (node, flags) = if round % 2 == 0 { (other, READ_ONLY) } else { (one, BOTH) };
            guest.setup(node, 0, 4 * PAGE, flags, 0).ok();
        }
        done.store(true, Ordering::Relaxed);
        assert!(looks.join().unwrap() > 0);
    });
}

#[test]
fn the_node_is_the_authority_and_the_handle_means_nothing() {
    let guest = guest();
    let node = file(&guest, "file", 1, 7);
    let other = file(&guest, "other", 1, 9);
    let fh = guest.fh(other, libc::O_RDONLY);
    for fh in [u64::MAX, 0, fh, 12345] {
        let body = SetupmappingIn { fh, foffset: 0, len: PAGE, flags: READ_ONLY, moffset: 0 };
        guest.call(Opcode::Setupmapping, node, &[body.as_slice()]).ok();
        assert_eq!(pages_of(&guest, 1), [Some(7)]);
    }
    for forged in [0, u64::MAX, node + 1000, node | 1 << 32] {
        let error = guest.setup(forged, 0, PAGE, READ_ONLY, 0).error;
        assert!([libc::ENOENT, libc::ESTALE].contains(&error), "{forged:#x}: {error}");
    }
    assert_eq!(guest.setup(ROOT_ID, 0, PAGE, READ_ONLY, 0).error, libc::EINVAL, "a directory");
}

#[test]
fn a_read_only_share_is_not_mapped_for_writing() {
    let guest = guest_on(FIRST, 0, |options| options.read_only = true);
    let node = file(&guest, "file", 1, 1);
    assert_eq!(guest.setup(node, 0, PAGE, BOTH, 0).error, libc::EROFS);
    guest.setup(node, 0, PAGE, READ_ONLY, 0).ok();
    assert_eq!(guest.setup(node, 0, PAGE, BOTH, 0).error, libc::EROFS, "no upgrade either");
    assert!(!window(&guest).poke(0, 5));
    assert_eq!(count(&guest, "dax_refused_access"), 2);
}

#[test]
fn a_mapping_past_the_end_is_fine_and_a_file_that_shrinks_leaves_zeros_until_it_grows() {
    let guest = guest();
    let node = file(&guest, "file", 4, 1);
    let on_host = File::options().write(true).open(guest.path().join("file")).unwrap();
    guest.setup(node, 0, RANGE, BOTH, 0).ok();
    assert_eq!(pages_of(&guest, 5)[3..], [Some(4), None]);
    // By the host, and then by the guest.
    for cut in [0, 1] {
        if cut == 0 {
            on_host.set_len(PAGE).unwrap();
        } else {
            let change =
                SetattrIn { valid: SetattrValid::SIZE.bits(), size: PAGE, ..Default::default() };
            assert_eq!(guest.setattr(node, change).error, 0);
        }
        assert_eq!(pages_of(&guest, 2), [Some(1), None], "a fault, and no signal");
        assert!(window(&guest).repair_truncated().unwrap() > 0);
        assert_eq!(pages_of(&guest, 4), [1, 0, 0, 0].map(Some));
        on_host.write_all_at(&[8; 3 * PAGE as usize], PAGE).unwrap();
        assert_eq!(guest.getattr(node).get::<AttrOut>().attr.size, 4 * PAGE);
        assert_eq!(pages_of(&guest, 4), [1, 8, 8, 8].map(Some), "what the reply names is there");
    }
    assert!(count(&guest, "dax_repairs") > 0);
}

#[test]
fn a_hole_in_the_window_shows_nothing_of_the_host_and_costs_nothing() {
    let guest = guest();
    let size = window(&guest).size();
    for at in (0..size).step_by(PAGE as usize) {
        assert_eq!(window(&guest).peek(at), None);
        assert!(!window(&guest).poke(at, 1));
    }
    let node = file(&guest, "file", 1, 1);
    guest.setup(node, 0, PAGE, BOTH, 0).ok();
    guest.remove(1, &[(0, PAGE)]).ok();
    assert_eq!((pages_of(&guest, 1), window(&guest).live_files()), (vec![None], 0));
}

#[test]
fn too_many_mappings_are_refused_until_some_are_removed() {
    let guest = guest();
    let node = file(&guest, "file", 1, 1);
    let mut most = 0;
    // Never two that could be joined.
    let at = |number: u64| number * 2 * PAGE;
    let error = loop {
        match guest.setup(node, 0, PAGE, READ_ONLY, at(most)).error {
            0 => most += 1,
            error => break error,
        }
    };
    assert_eq!((error, most), (libc::ENOMEM, 256));
    assert_eq!(count(&guest, "dax_refused_full"), 1);
    guest.remove(1, &[(at(3), PAGE)]).ok();
    guest.setup(node, 0, PAGE, READ_ONLY, at(most)).ok();
    assert_eq!(guest.setup(node, 0, PAGE, READ_ONLY, at(3)).error, libc::ENOMEM);
}

#[test]
fn a_removal_is_checked_as_a_whole_before_anything_is_removed() {
    let guest = guest();
    let node = file(&guest, "file", 2, 1);
    let size = window(&guest).size();
    guest.setup(node, 0, 2 * PAGE, READ_ONLY, 0).ok();
    for (count, ranges) in [(0, 0), (0, 1), (2, 1), (257, 256), (u32::MAX, 1), (1, 0)] {
        let ranges = vec![(0, PAGE); ranges];
        assert_eq!(guest.remove(count, &ranges).error, libc::EINVAL, "count {count}");
    }
    for bad in [(1, PAGE), (0, 1), (0, 0), (size, PAGE), (0, size + PAGE), (u64::MAX - 4095, PAGE)]
    {
        assert_eq!(guest.remove(2, &[(0, PAGE), bad]).error, libc::EINVAL, "{bad:?}");
    }
    assert_eq!(pages_of(&guest, 2), [Some(1), Some(2)]);
    // What is not mapped may be removed, and what another node has there too: the window is the guest's.
    let other = file(&guest, "other", 1, 50);
    let ranges = [(0, PAGE), (4 * PAGE, PAGE)];
    let bytes: Vec<u8> = ranges
        .iter()
        .flat_map(|(at, len)| [at.to_ne_bytes(), len.to_ne_bytes()].concat())
        .collect();
    let head = 2u32.to_ne_bytes();
    guest.call(Opcode::Removemapping, other, &[&head, &bytes]).ok();
    assert_eq!(pages_of(&guest, 2), [None, Some(2)]);
    guest.remove(300, &vec![(0, size); 300]).ok();
    assert_eq!(window(&guest).live_mappings(), 0);
}

#[test]
fn mapping_and_removing_one_range_at_once_leaves_one_or_the_other() {
    let guest = guest();
    let node = file(&guest, "file", 2, 1);
    let straight = |opcode: Opcode, body: &[u8]| {
        // As another queue would.
        let mut request = guest.frame(opcode as u32, node, &[body]);
        let mut reply = [0; 64];
        assert_eq!(serve(&guest.session, &mut request, &mut reply), 16);
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(|| {
            for _ in 0..500 {
                let body = RemovemappingOne { moffset: 0, len: 2 * PAGE };
                straight(Opcode::Removemapping, &[&[1, 0, 0, 0], body.as_slice()].concat());
                let body =
                    SetupmappingIn { fh: 0, foffset: PAGE, len: PAGE, flags: BOTH, moffset: 0 };
                straight(Opcode::Setupmapping, body.as_slice());
            }
        });
        for _ in 0..500 {
            guest.setup(node, 0, 2 * PAGE, READ_ONLY, 0).ok();
            let seen = window(&guest).peek(0);
            assert!([None, Some(1), Some(2)].contains(&seen), "{seen:?}");
        }
        other.join().unwrap();
    });
    guest.remove(1, &[(0, RANGE)]).ok();
    assert_eq!((window(&guest).live_mappings(), window(&guest).live_files()), (0, 0));
}

#[test]
fn a_forgotten_node_keeps_its_mappings_and_a_session_that_ends_leaves_none() {
    let guest = guest();
    for end in ["DESTROY", "INIT", "reset"] {
        let node = file(&guest, "file", 2, 1);
        guest.setup(node, 0, 2 * PAGE, BOTH, 0).ok();
        guest.forget(node, 1);
        assert_eq!(pages_of(&guest, 2), [Some(1), Some(2)], "a vCPU may still use them");
        match end {
            "DESTROY" => guest.call(Opcode::Destroy, 0, &[]).ok(),
            "INIT" => {}
            _ => guest.session.reset(),
        }
        if end != "INIT" {
            assert_eq!(guest.setup(node, 0, PAGE, READ_ONLY, 0).error, libc::EIO, "{end}");
        }
        assert_eq!(guest.init(7, MINOR, u64::MAX).error, 0);
        assert_eq!(pages_of(&guest, 2), [None, None], "{end}");
        assert_eq!(count(&guest, "dax_mapped_bytes"), 0);
        assert_eq!(guest.setup(node, 0, PAGE, READ_ONLY, 0).error, libc::ESTALE, "{end}");
    }
}

#[test]
fn reads_and_writes_of_a_mapped_file_see_the_same_pages() {
    let guest = guest();
    let node = file(&guest, "file", 2, 1);
    let fh = guest.fh(node, libc::O_RDWR);
    guest.setup(node, 0, 2 * PAGE, BOTH, 0).ok();
    for round in 10..60u8 {
        assert!(window(&guest).poke(PAGE, round));
        assert_eq!(guest.read(node, fh, PAGE, 1).body, [round]);
        assert_eq!(guest.write(node, fh, PAGE + 1, &[round + 1]).error, 0);
        assert_eq!(window(&guest).peek(PAGE + 1), Some(round + 1));
    }
}

#[test]
fn requests_and_replies_in_pages_that_are_gone_are_errors_and_no_signals() {
    let session = guest().session.clone();
    let device = FsDevice::new(Config::new("share", 1).unwrap(), session, None).unwrap();
    let driver = Driver::new(Arc::new(device));
    let mut queue = driver.start(0, &[(FIRST, 16)]).remove(0);
    let memory = driver.memory();
    let (request, reply) = (0x1000, 0x2000);
    let header =
        InHeader { len: 40, opcode: Opcode::Statfs as u32, nodeid: ROOT_ID, ..Default::default() };
    memory.write_slice(header.as_slice(), GuestAddress(request)).unwrap();
    // An empty window is at WINDOW: as a mapping whose page is gone is to a device.
    for (round, readable, writable, used) in
        [(1, WINDOW, reply, Some(16)), (2, request, WINDOW, Some(0)), (3, WINDOW, WINDOW, Some(0))]
    {
        queue.describe(&memory, 0, (readable, 40, NEXT, 1));
        queue.describe(&memory, 1, (writable, 0x400, WRITE, 0));
        queue.offer(&memory, 0);
        driver.notify(FIRST);
        driver.wait(FIRST, round);
        assert_eq!(queue.take_used(&memory).map(|(_, len)| len), used, "round {round}");
        assert_eq!(driver.status(), 15);
    }
}
