use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::fstat;

use super::{ALIGNMENT, Budget, GrowError, Window, page_end};
use crate::dax::DaxWindow;

const MIB: u64 = 1 << 20;

/// A file whose page n is full of the byte n + 1.
fn pages(count: u8) -> File {
    let mut file = tempfile::tempfile().unwrap();
    for page in 0..count {
        file.write_all(&[page + 1; 4096]).unwrap();
    }
    file
}

/// A byte of the window, as a device touches it: by a system call, which says so when nothing is there.
fn vectors(window: &Window, offset: u64, byte: &mut u8) -> [libc::iovec; 2] {
    let vector = |base: *mut u8| libc::iovec { iov_base: base.cast(), iov_len: 1 };
    let address = window.host_address().wrapping_add(offset as usize);
    [vector(byte), vector(address)]
}

impl Window {
    pub(crate) fn peek(&self, offset: u64) -> Option<u8> {
        let mut byte = 0u8;
        let [own, window] = vectors(self, offset, &mut byte);
        // SAFETY: `own` is one byte of this frame; the kernel checks the other address.
        let count = unsafe { libc::process_vm_readv(libc::getpid(), &own, 1, &window, 1, 0) };
        (count == 1).then_some(byte)
    }

    pub(crate) fn poke(&self, offset: u64, mut byte: u8) -> bool {
        let [own, window] = vectors(self, offset, &mut byte);
        // SAFETY: as in `peek`.
        unsafe { libc::process_vm_writev(libc::getpid(), &own, 1, &window, 1, 0) == 1 }
    }
}

fn peek(window: &Window, offset: u64) -> Option<u8> {
    window.peek(offset)
}

fn poke(window: &Window, offset: u64, byte: u8) -> bool {
    window.poke(offset, byte)
}

#[test]
fn a_window_is_aligned_and_a_whole_number_of_large_pages() {
    for size in [0, 1, 4096, MIB, 3 * MIB, u64::MAX, u64::MAX - ALIGNMENT + 1] {
        assert!(Window::new(size).is_err(), "{size}");
    }
    for size in [ALIGNMENT, 5 * ALIGNMENT] {
        let window = Window::new(size).unwrap();
        assert_eq!(window.host_address() as u64 % ALIGNMENT, 0);
        assert_eq!(window.size(), size);
        assert_eq!(window.max_size(), size, "it cannot grow");
        assert_eq!(peek(&window, 0), None);
    }
}

#[test]
fn a_window_grows_in_place_and_never_beyond_what_is_reserved() {
    for (size, reserved) in
        [(0, ALIGNMENT), (ALIGNMENT, MIB), (2 * ALIGNMENT, ALIGNMENT), (ALIGNMENT, 3 * MIB)]
    {
        assert!(Window::growable(size, reserved).is_err(), "{size} of {reserved}");
    }
    let window = Window::growable(ALIGNMENT, 4 * ALIGNMENT).unwrap();
    assert_eq!((window.size(), window.max_size()), (ALIGNMENT, 4 * ALIGNMENT));
    let address = window.host_address();
    let file = pages(1);
    window.map(0, 4096, file.as_fd(), 0, true).unwrap();
    let beyond = window.map(ALIGNMENT, 4096, file.as_fd(), 0, true).unwrap_err();
    assert_eq!(beyond.raw_os_error(), Some(libc::EINVAL), "reserved is not yet there");
    assert_eq!(peek(&window, ALIGNMENT), None);

    let (asked, present) = (2 * ALIGNMENT, ALIGNMENT);
    window.grow(asked).unwrap();
    window.grow(asked).unwrap();
    assert_eq!(window.size(), asked);
    window.map(ALIGNMENT, 4096, file.as_fd(), 0, true).unwrap();
    assert!(poke(&window, ALIGNMENT, 9));
    assert_eq!(peek(&window, 0), Some(9), "what was mapped before still is");
    assert_eq!(window.host_address(), address);

    assert_eq!(window.grow(3 * MIB), Err(GrowError::Unaligned(3 * MIB)));
    let shrinks = GrowError::Shrinks { asked: present, present: asked };
    assert_eq!(window.grow(present), Err(shrinks));
    assert_eq!(window.grow(0), Err(GrowError::Shrinks { asked: 0, present: asked }));
    let beyond = GrowError::Beyond { asked: 5 * ALIGNMENT, reserved: 4 * ALIGNMENT };
    assert_eq!(window.grow(5 * ALIGNMENT), Err(beyond));
    assert_eq!(window.size(), asked, "as it was");

    // Over the old end in one piece.
    let large = tempfile::tempfile().unwrap();
    large.set_len(4 * ALIGNMENT).unwrap();
    window.grow(4 * ALIGNMENT).unwrap();
    window.map(0, 4 * ALIGNMENT, large.as_fd(), 0, false).unwrap();
    assert_eq!(peek(&window, 4 * ALIGNMENT - 1), Some(0));
    window.clear();
    assert_eq!(window.live_mappings(), 0);
    assert_eq!(peek(&window, 4 * ALIGNMENT - 1), None, "cleared to its new end");
}

#[test]
fn mappings_show_the_file_and_go_away() {
    let window = Window::new(ALIGNMENT).unwrap();
    let file = pages(4);
    window.map(0, 16384, file.as_fd(), 0, false).unwrap();
    assert_eq!(peek(&window, 0), Some(1));
    assert_eq!(peek(&window, 16383), Some(4));
    assert!(!poke(&window, 0, 9), "read-only");
    window.unmap(4096, 8192).unwrap();
    assert_eq!([0, 4096, 8192, 12288].map(|at| peek(&window, at)), [Some(1), None, None, Some(4)]);
    assert_eq!(window.live_mappings(), 2);
    window.unmap(0, ALIGNMENT).unwrap();
    window.unmap(0, ALIGNMENT).unwrap();
    assert_eq!((window.live_mappings(), window.live_files()), (0, 0));
}

#[test]
fn an_overlapping_mapping_replaces_and_splits() {
    let window = Window::new(ALIGNMENT).unwrap();
    let (old, new) = (pages(8), pages(2));
    window.map(0, 32768, old.as_fd(), 0, true).unwrap();
    window.map(8192, 8192, new.as_fd(), 0, true).unwrap();
    let bytes: Vec<_> = (0..8).map(|page| peek(&window, page * 4096).unwrap()).collect();
    assert_eq!(bytes, [1, 2, 1, 2, 5, 6, 7, 8]);
    assert_eq!(window.live_mappings(), 3);
    // Over the ends of two, and exactly over one.
    window.map(4096, 8192, new.as_fd(), 0, true).unwrap();
    window.map(0, 4096, new.as_fd(), 4096, true).unwrap();
    let bytes: Vec<_> = (0..8).map(|page| peek(&window, page * 4096).unwrap()).collect();
    assert_eq!(bytes, [2, 1, 2, 2, 5, 6, 7, 8]);
}

#[test]
fn writes_through_a_writable_mapping_reach_the_file() {
    let window = Window::new(ALIGNMENT).unwrap();
    let file = pages(1);
    window.map(0, 4096, file.as_fd(), 0, false).unwrap();
    // The upgrade that the Linux guest does: the same range once more, with no unmap before.
    window.map(0, 4096, file.as_fd(), 0, true).unwrap();
    assert!(poke(&window, 7, 0x77));
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_at(&file, &mut byte, 7).unwrap();
    assert_eq!(byte, [0x77]);
    assert_eq!(window.live_mappings(), 1);
}

#[test]
fn a_bad_range_changes_nothing() {
    let window = Window::new(ALIGNMENT).unwrap();
    let file = pages(1);
    window.map(0, 4096, file.as_fd(), 0, false).unwrap();
    for (offset, len, file_offset) in [
        (0, 0, 0),
        (1, 4096, 0),
        (0, 4095, 0),
        (0, 4096, 1),
        (0, ALIGNMENT + 4096, 0),
        (ALIGNMENT, 4096, 0),
        (ALIGNMENT - 4096, 8192, 0),
        (u64::MAX - 4095, 4096, 0),
        (u64::MAX - 4095, 8192, 0),
        (0, u64::MAX - 4095, 0),
        (0, 4096, u64::MAX - 4095),
        (0, 4096, i64::MAX as u64 - 4095),
    ] {
        let error = window.map(offset, len, file.as_fd(), file_offset, false);
        assert_eq!(error.unwrap_err().raw_os_error(), Some(libc::EINVAL));
        if file_offset == 0 {
            let error = window.unmap(offset, len).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        }
    }
    assert_eq!(peek(&window, 0), Some(1));
    assert_eq!(window.live_mappings(), 1);
}

#[test]
fn a_file_that_cannot_be_mapped_leaves_what_is_there() {
    let window = Window::new(ALIGNMENT).unwrap();
    let file = pages(1);
    window.map(0, 4096, file.as_fd(), 0, true).unwrap();
    let read_only = File::open("/proc/self/exe").unwrap();
    let error = window.map(0, 4096, read_only.as_fd(), 0, true).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EACCES));
    let directory = File::open("/").unwrap();
    let error = window.map(0, 4096, directory.as_fd(), 0, false).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    assert_eq!(peek(&window, 0), Some(1));
}

#[test]
fn a_file_costs_one_descriptor_however_often_it_is_mapped() {
    let window = Window::new(4 * ALIGNMENT).unwrap();
    let file = pages(1);
    for at in 0..64 {
        let file = file.try_clone().unwrap();
        window.map(at * 8192, 4096, file.as_fd(), 0, at % 2 == 0).unwrap();
    }
    assert_eq!((window.live_mappings(), window.live_files()), (64, 2));
    drop(file);
    assert_eq!(peek(&window, 8192), Some(1));
    window.clear();
    window.clear();
    assert_eq!((window.live_mappings(), window.live_files()), (0, 0));
    assert_eq!(peek(&window, 8192), None);
}

#[test]
fn mappings_are_bounded_and_there_is_room_again_afterwards() {
    let window = Window::new(8 * ALIGNMENT).unwrap();
    let file = pages(1);
    let most = window.most_mappings();
    assert_eq!(most, 256);
    let step = 3 * 4096;
    let map = |at: usize, len| window.map(at as u64 * step, len, file.as_fd(), 0, false);
    let full = |result: std::io::Result<()>| {
        assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ENOMEM));
    };
    for at in 0..most {
        map(at, step).unwrap();
    }
    full(map(most, 4096));
    // No more by splitting either: in the middle, at the start, or by taking the middle away.
    full(window.map(4096, 4096, file.as_fd(), 0, false));
    full(map(0, 4096));
    full(window.unmap(4096, 4096));
    // The same again, and over several, is fine.
    map(0, step).unwrap();
    window.unmap(step * 2 - 4096, 2 * 4096).unwrap();
    assert_eq!(window.live_mappings(), most);
    window.unmap(0, step).unwrap();
    map(most, 4096).unwrap();
    assert_eq!(window.live_mappings(), most);
}

#[test]
fn a_truncated_file_is_repaired_with_zeros_and_comes_back() {
    let window = Window::new(ALIGNMENT).unwrap();
    let file = pages(4);
    window.map(0, 32768, file.as_fd(), 0, true).unwrap();
    // Past the end of the file from the start.
    assert_eq!(peek(&window, 16384), None);
    assert_eq!(window.repair_truncated().unwrap(), 1);
    assert_eq!(window.repair_truncated().unwrap(), 0);
    assert_eq!(peek(&window, 16384), Some(0));

    file.set_len(4097).unwrap();
    assert_eq!(peek(&window, 8192), None, "gone, and no signal");
    assert_eq!(window.repair_truncated().unwrap(), 1);
    let bytes: Vec<_> = (0..8).map(|page| peek(&window, page * 4096).unwrap()).collect();
    assert_eq!(bytes, [1, 2, 0, 0, 0, 0, 0, 0]);
    assert!(poke(&window, 8192, 5), "scratch memory of the guest's own");

    // Mapped again, it is the file again.
    file.set_len(12288).unwrap();
    window.map(0, 32768, file.as_fd(), 0, true).unwrap();
    assert_eq!(peek(&window, 8192), Some(0));
    assert!(poke(&window, 8192, 6));
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_at(&file, &mut byte, 8192).unwrap();
    assert_eq!(byte, [6]);
}

#[test]
fn a_repair_leaves_alone_the_unused_tails_of_files_that_lost_nothing() {
    let window = Window::new(ALIGNMENT).unwrap();
    let (log, cut) = (pages(1), pages(2));
    window.map(0, 8192, log.as_fd(), 0, false).unwrap();
    window.map(8192, 8192, cut.as_fd(), 0, false).unwrap();
    cut.set_len(4096).unwrap();
    assert_eq!(window.repair_truncated().unwrap(), 1);
    assert_eq!((peek(&window, 4096), peek(&window, 12288)), (None, Some(0)));
    // So what the host appends to the other one is there at once.
    log.set_len(8192).unwrap();
    assert_eq!(peek(&window, 4096), Some(0));
    assert_eq!(window.repair_truncated().unwrap(), 0);
}

#[test]
fn a_file_that_grows_again_replaces_the_zeros_at_the_next_repair() {
    let window = Window::new(ALIGNMENT).unwrap();
    let file = pages(4);
    window.map(0, 16384, file.as_fd(), 0, true).unwrap();
    file.set_len(0).unwrap();
    assert_eq!(window.repair_truncated().unwrap(), 1);
    file.set_len(8192).unwrap();
    assert_eq!(window.repair_truncated().unwrap(), 1);
    assert!(poke(&window, 4096, 3));
    let mut byte = [0];
    std::os::unix::fs::FileExt::read_at(&file, &mut byte, 4096).unwrap();
    assert_eq!(byte, [3]);
    assert_eq!(window.repair_truncated().unwrap(), 0);
}

#[test]
fn a_write_that_makes_a_file_longer_brings_its_pages_back() {
    let window = Window::new(ALIGNMENT).unwrap();
    let file = pages(2);
    window.map(0, 8192, file.as_fd(), 0, true).unwrap();
    file.set_len(0).unwrap();
    assert_eq!(window.repair_truncated().unwrap(), 1);
    std::os::unix::fs::FileExt::write_at(&file, &[8; 8192], 0).unwrap();
    assert_eq!(peek(&window, 4096), Some(0));
    window.file_may_have_grown();
    assert_eq!(peek(&window, 4096), Some(8));
    window.file_may_have_grown();
}

#[test]
fn random_changes_leave_what_a_simple_model_says() {
    const PAGES: u64 = 64;
    let window = Window::new(ALIGNMENT).unwrap();
    let file = pages(200);
    let mut model = [None; PAGES as usize];
    let mut state = 88172645463325252u64;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    for _ in 0..2000 {
        let at = random(PAGES);
        let len = 1 + random(PAGES - at);
        let from = random(100);
        let range = at as usize..(at + len) as usize;
        if random(3) == 0 {
            window.unmap(at * 4096, len * 4096).unwrap();
            model[range].fill(None);
        } else {
            let writable = random(2) == 0;
            window.map(at * 4096, len * 4096, file.as_fd(), from * 4096, writable).unwrap();
            for (page, slot) in model[range].iter_mut().enumerate() {
                *slot = Some((from as u8) + page as u8 + 1);
            }
        }
        let seen: Vec<_> = (0..PAGES).map(|page| peek(&window, page * 4096)).collect();
        assert_eq!(seen, model);
    }
}

#[test]
fn repairs_and_growth_make_no_mappings() {
    let window = Window::new(2 * ALIGNMENT).unwrap();
    let file = pages(1);
    let most = window.most_mappings() as u64;
    let step = 4 * 4096;
    for at in 0..most {
        window.map(at * step, step, file.as_fd(), 0, false).unwrap();
    }
    for round in 1..4 {
        window.repair_truncated().unwrap();
        assert_eq!(window.live_mappings() as u64, most);
        // Over the zeros: a part of a mapping that is its own, which there is no room for.
        for at in 0..most {
            let (offset, len) = (at * step + round * 4096, step - round * 4096);
            let error = window.map(offset, len, file.as_fd(), 0, false).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::ENOMEM));
        }
    }
    assert_eq!(window.live_mappings() as u64, most);
}

#[test]
fn a_file_that_grows_page_by_page_stays_one_mapping_of_two_areas() {
    let window = Window::new(2 * ALIGNMENT).unwrap();
    let file = pages(4);
    window.map(0, ALIGNMENT, file.as_fd(), 0, false).unwrap();
    file.set_len(0).unwrap();
    assert_eq!(window.repair_truncated().unwrap(), 1);
    let start = window.host_address() as usize;
    for page in 1..=400u64 {
        file.set_len(page * 4096).unwrap();
        std::os::unix::fs::FileExt::write_at(&file, &[page as u8], (page - 1) * 4096).unwrap();
        window.file_may_have_grown();
        assert_eq!(peek(&window, (page - 1) * 4096), Some(page as u8));
    }
    assert_eq!(window.live_mappings(), 1);
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let inside = |line: &&str| {
        let from = usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap();
        (start..start + ALIGNMENT as usize).contains(&from)
    };
    assert_eq!(maps.lines().filter(inside).count(), 2, "{maps}");
}

#[test]
fn the_addresses_of_a_window_stay_its_own_whatever_is_mapped_and_removed() {
    let window = Window::new(2 * ALIGNMENT).unwrap();
    let file = pages(8);
    let (start, size) = (window.host_address() as u64, 2 * ALIGNMENT);
    // What is nobody's file may be neither read nor written nor run, and belongs to the window all the same.
    let check = |files: usize| {
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let (mut at, mut mapped) = (start, 0);
        for line in maps.lines() {
            let (range, rest) = line.split_once(' ').unwrap();
            let (from, to) = range.split_once('-').unwrap();
            let [from, to] = [from, to].map(|text| u64::from_str_radix(text, 16).unwrap());
            if to <= start || from >= start + size {
                continue;
            }
            assert!(from.max(start) == at, "a gap at {at:#x}: {maps}");
            at = to;
            if !rest.starts_with("---p") {
                mapped += 1;
            }
        }
        assert!(at >= start + size, "a gap at {at:#x}: {maps}");
        assert_eq!(mapped, files, "{maps}");
    };
    check(0);
    window.map(0, 32768, file.as_fd(), 0, true).unwrap();
    window.map(ALIGNMENT, 32768, file.as_fd(), 0, false).unwrap();
    check(2);
    window.unmap(8192, 8192).unwrap();
    check(3);
    assert!(window.map(0, ALIGNMENT, std::io::stdin().as_fd(), 0, true).is_err());
    window.unmap(0, ALIGNMENT).unwrap();
    check(1);
    window.clear();
    check(0);
}

#[test]
fn a_part_of_a_repaired_mapping_keeps_its_zeros_and_gets_its_pages_back() {
    let window = Window::new(ALIGNMENT).unwrap();
    let file = pages(8);
    window.map(0, 32768, file.as_fd(), 0, true).unwrap();
    file.set_len(8192).unwrap();
    assert_eq!(window.repair_truncated().unwrap(), 1);
    // Cut in the zeros: what is before has the end of the file in it, what is behind is zeros alone.
    window.unmap(16384, 4096).unwrap();
    let seen = |window: &Window| (0..8).map(|page| peek(window, page * 4096)).collect::<Vec<_>>();
    let zero = Some(0);
    assert_eq!(seen(&window), [Some(1), Some(2), zero, zero, None, zero, zero, zero]);
    std::os::unix::fs::FileExt::write_at(&file, &[9; 6 * 4096], 0).unwrap();
    window.file_may_have_grown();
    let nine = Some(9);
    assert_eq!(seen(&window), [nine, nine, nine, nine, None, nine, zero, zero]);
    assert_eq!(window.live_mappings(), 2);
}

#[test]
fn all_windows_of_a_process_draw_from_one_budget() {
    let budget: &'static Budget = Box::leak(Box::new(Budget::new(3)));
    let file = pages(4);
    let one = Window::within(ALIGNMENT, ALIGNMENT, budget).unwrap();
    let other = Window::within(ALIGNMENT, ALIGNMENT, budget).unwrap();
    let map = |window: &Window, at: u64| window.map(at * 8192, 4096, file.as_fd(), 0, false);
    map(&one, 0).unwrap();
    map(&other, 0).unwrap();
    map(&other, 1).unwrap();
    assert_eq!(map(&one, 1).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
    assert_eq!(map(&other, 2).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
    // The same again needs no more; what is taken away is there for the other.
    map(&one, 0).unwrap();
    other.unmap(0, ALIGNMENT).unwrap();
    map(&one, 1).unwrap();
    assert_eq!(budget.left(), 1);
    one.clear();
    assert_eq!(budget.left(), 3);
    map(&one, 0).unwrap();
    drop(one);
    assert_eq!(budget.left(), 3);
}

#[test]
fn a_mapping_that_fails_costs_nothing_of_the_budget() {
    let budget: &'static Budget = Box::leak(Box::new(Budget::new(3)));
    let window = Window::within(ALIGNMENT, ALIGNMENT, budget).unwrap();
    window.map(0, 4096, File::open("/").unwrap().as_fd(), 0, false).unwrap_err();
    assert_eq!(budget.left(), 3);
}

#[test]
fn a_file_of_which_the_host_has_only_errors_has_lost_its_pages_and_the_others_are_repaired() {
    let window = Window::new(ALIGNMENT).unwrap();
    let (gone, cut) = (pages(2), pages(3));
    window.map(0, 8192, gone.as_fd(), 0, false).unwrap();
    window.map(8192, 12288, cut.as_fd(), 0, false).unwrap();
    cut.set_len(4096).unwrap();
    let end_of = |file: &OwnedFd| match page_end(&fstat(file)?) {
        8192 => Err(std::io::Error::from_raw_os_error(libc::ESTALE)),
        end => Ok(end),
    };
    let before = window.repairs();
    // Who only looks after it takes an error for no loss: what was stored there may still be written back.
    assert_eq!(window.cover_shrunk_by(end_of).unwrap(), 1);
    let bytes: Vec<_> = (0..5).map(|page| peek(&window, page * 4096).unwrap()).collect();
    assert_eq!(bytes, [1, 2, 1, 0, 0]);
    assert_eq!(window.cover_shrunk_by(end_of).unwrap(), 0);
    // Who knows that a page cannot be had, takes it for one.
    assert_eq!(window.repair_by(end_of).unwrap(), 1);
    assert_ne!(window.repairs(), before);
    let bytes: Vec<_> = (0..5).map(|page| peek(&window, page * 4096).unwrap()).collect();
    assert_eq!(bytes, [0, 0, 1, 0, 0]);
    assert_eq!(window.repair_by(end_of).unwrap(), 0);
    // The server is back.
    window.file_may_have_grown();
    assert_eq!((peek(&window, 0), peek(&window, 4096)), (Some(1), Some(2)));
}

#[test]
fn a_file_of_large_pages_is_refused_and_leaves_nothing_mapped() {
    use rustix::fs::{MemfdFlags, memfd_create};
    let window = Window::new(ALIGNMENT).unwrap();
    let Ok(large) = memfd_create("large", MemfdFlags::HUGETLB) else {
        return; // The host has no large pages.
    };
    for writable in [false, true] {
        let error = window.map(0, ALIGNMENT, large.as_fd(), 0, writable).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
    }
    assert_eq!((window.live_mappings(), window.live_files()), (0, 0));
    assert!(!std::fs::read_to_string("/proc/self/maps").unwrap().contains("memfd:large"));
}

/// Makes every page of a mapping that is in no page cache one that cannot be had: userfaultfd(2) with
/// `UFFD_FEATURE_SIGBUS`. None where this process may not.
fn fail_missing_pages(window: &Window, offset: u64, len: u64) -> Option<OwnedFd> {
    use std::os::fd::AsRawFd;
    // UFFDIO_API and UFFDIO_REGISTER of linux/userfaultfd.h, and their arguments.
    const API: libc::c_ulong = 0xc018_aa3f;
    const REGISTER: libc::c_ulong = 0xc020_aa00;
    const FEATURE_SIGBUS: u64 = 1 << 7;
    const MODE_MISSING: u64 = 1;
    // SAFETY: the faults that it makes are those of the window, which is touched by system calls only.
    let fd = unsafe { rustix::mm::userfaultfd(rustix::mm::UserfaultfdFlags::CLOEXEC) }.ok()?;
    let mut api = [0xaa, FEATURE_SIGBUS, 0];
    let mut register = [window.host_address() as u64 + offset, len, MODE_MISSING, 0];
    // SAFETY: both arguments are as large as their numbers say.
    let done = unsafe {
        libc::ioctl(fd.as_raw_fd(), API, api.as_mut_ptr()) == 0
            && libc::ioctl(fd.as_raw_fd(), REGISTER, register.as_mut_ptr()) == 0
    };
    done.then_some(fd)
}

#[test]
fn a_page_that_the_host_cannot_read_is_covered_alone_and_comes_back_when_mapped_anew() {
    use std::os::unix::fs::FileExt;
    let budget: &'static Budget = Box::leak(Box::new(Budget::new(8)));
    let window = Window::within(ALIGNMENT, ALIGNMENT, budget).unwrap();
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = File::from(rustix::fs::memfd_create("holes", flags).unwrap());
    file.set_len(7 * 4096).unwrap();
    for page in [0, 1, 2, 4, 6] {
        file.write_at(&[page as u8 + 1; 4096], page * 4096).unwrap();
    }
    window.map(0, 7 * 4096, file.as_fd(), 0, true).unwrap();
    assert_eq!(window.cover_unreadable().unwrap(), 0);
    let punch = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    for page in [3, 5] {
        rustix::fs::fallocate(&file, punch, page * 4096, 4096).unwrap();
    }
    let Some(_fd) = fail_missing_pages(&window, 0, 7 * 4096) else {
        return; // Not allowed to.
    };
    assert_eq!((peek(&window, 3 * 4096), peek(&window, 5 * 4096)), (None, None));
    assert_eq!(window.repair_truncated().unwrap(), 0);
    let before = window.repairs();
    assert_eq!(window.cover_unreadable().unwrap(), 2);
    assert_eq!((window.repairs() - before, budget.left()), (2, 5));
    assert_eq!(window.cover_unreadable().unwrap(), 0);
    let bytes: Vec<_> = (0..7).map(|page| peek(&window, page * 4096).unwrap()).collect();
    assert_eq!(bytes, [1, 2, 3, 0, 5, 0, 7]);
    // The guest's own, and the pages beside it are still the file's.
    assert!(poke(&window, 3 * 4096, 8) && poke(&window, 4 * 4096, 9));
    let mut byte = [0];
    file.read_at(&mut byte, 4 * 4096).unwrap();
    assert_eq!(byte, [9]);

    window.map(3 * 4096, 4096, file.as_fd(), 3 * 4096, true).unwrap();
    file.write_at(&[4], 3 * 4096).unwrap();
    assert_eq!(peek(&window, 3 * 4096), Some(4));
    // A page that the file loses is no longer one that cannot be read.
    file.set_len(4096).unwrap();
    window.repair_truncated().unwrap();
    file.write_at(&[6; 4096], 5 * 4096).unwrap();
    window.file_may_have_grown();
    assert_eq!(peek(&window, 5 * 4096), Some(6));
    assert_eq!(budget.left(), 5);
}

#[test]
fn a_full_disk_is_told_from_one_with_room() {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount,
        fsopen,
    };
    let mount = || {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        fsconfig_set_string(&context, "size", "1m")?;
        fsconfig_create(&context)?;
        fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())
    };
    let Ok(mount) = mount() else {
        return; // Not allowed to.
    };
    let make = |name: &str| {
        use rustix::fs::{Mode, OFlags};
        let flags = OFlags::RDWR | OFlags::CREATE;
        File::from(rustix::fs::openat(&mount, name, flags, Mode::RUSR | Mode::WUSR).unwrap())
    };
    let (sparse, mut fill) = (make("sparse"), make("fill"));
    sparse.set_len(ALIGNMENT).unwrap();
    let window = Window::new(ALIGNMENT).unwrap();
    window.map(0, ALIGNMENT, sparse.as_fd(), 0, true).unwrap();
    assert_eq!(window.full_file_system(), None);
    while fill.write_all(&[1; 4096]).is_ok() {}
    assert!(!poke(&window, 100 * 4096, 1));
    assert_eq!(window.repair_truncated().unwrap(), 0);
    let stat = fstat(&sparse).unwrap();
    assert_eq!(window.full_file_system(), Some((stat.st_dev, stat.st_ino)));
    assert_eq!(window.cover_unreadable().unwrap(), 0, "what is written there is not to be lost");
    fill.set_len(0).unwrap();
    assert!(poke(&window, 100 * 4096, 1), "it goes on where it was");
    assert_eq!(window.full_file_system(), None);
}

#[test]
fn looking_after_a_window_covers_what_shrank_and_nothing_else() {
    let window = Window::new(2 << 20).unwrap();
    assert_eq!(window.cover_shrunk().unwrap(), 0);
    let [short, long] = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
    short.set_len(4096).unwrap();
    long.set_len(8192).unwrap();
    window.map(0, 8192, short.as_fd(), 0, true).unwrap();
    window.map(8192, 8192, long.as_fd(), 0, true).unwrap();
    assert_eq!(window.cover_shrunk().unwrap(), 0, "one has always been short");
    long.set_len(4096).unwrap();
    assert_eq!(window.cover_shrunk().unwrap(), 1);
    assert_eq!(window.cover_shrunk().unwrap(), 0);
}

#[test]
fn mappings_hold_an_eighth_of_the_descriptors_that_the_process_may_have() {
    const FEW: &str = "ORIEL_TEST_FEW_DESCRIPTORS";
    const NAME: &str = "mappings_hold_an_eighth_of_the_descriptors_that_the_process_may_have";
    if std::env::var_os(FEW).is_none() {
        // In a process of its own: what counts is the limit when the first window is made.
        let status = std::process::Command::new("sh")
            .args(["-c", "ulimit -n 256 && exec \"$@\"", "sh"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", &format!("dax::window::tests::{NAME}")])
            .env(FEW, "")
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&status.stdout);
        assert!(status.status.success() && output.contains("1 passed"), "{output}");
        return;
    }
    let window = Window::new(ALIGNMENT).unwrap();
    // Each is of another file.
    let map = |at: u64| window.map(at * 8192, 4096, pages(1).as_fd(), 0, false);
    for at in 0..32 {
        map(at).unwrap();
    }
    assert_eq!(map(32).unwrap_err().raw_os_error(), Some(libc::ENOMEM));
    assert_eq!(window.live_files(), 32);
    // The others are everybody's.
    let rest: Vec<_> = (0..200).map(|_| File::open("/dev/null").unwrap()).collect();
    drop(rest);
    window.unmap(0, 8192).unwrap();
    map(32).unwrap();
}
