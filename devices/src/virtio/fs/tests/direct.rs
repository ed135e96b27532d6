//! O_DIRECT, on every file system that this machine can make.

use std::io::IoSliceMut;
use std::path::{Path, PathBuf};

use rustix::io::ReadWriteFlags;
use vm_memory::ByteValued;

use super::queue::{FIRST, guest_on};
use crate::fuse::abi::*;
use crate::fuse::testing::Guest;
use crate::share::testing::{Disk, Mounted};
use crate::share::{DaxPolicy, DirectPolicy};
use crate::virtio::testing::Noise;

const DIRECT: i32 = libc::O_RDWR | libc::O_DIRECT;

/// A guest of a directory, whose buffers begin `skew` bytes into a page.
fn guest(directory: &Path, direct: DirectPolicy, skew: u64) -> Guest {
    guest_on(FIRST, skew, |options| {
        options.directory = directory.to_owned();
        options.direct = direct;
        options.dax = DaxPolicy::Never;
    })
}

/// Reads with the flags that a READ has of a descriptor opened so.
fn read(guest: &Guest, node: u64, fh: u64, offset: u64, size: u32, flags: i32) -> Vec<u8> {
    let body = ReadIn { fh, offset, size, flags: flags as u32, ..ReadIn::default() };
    let answer = guest.call(crate::fuse::opcode::Opcode::Read, node, &[body.as_slice()]);
    assert_eq!(answer.error, 0);
    answer.body
}

/// Directories on file systems of all kinds, and what keeps them there.
fn places() -> (Vec<(String, PathBuf)>, impl Sized) {
    let own = tempfile::tempdir().unwrap();
    let mut places = vec![("the tests' own".to_owned(), own.path().to_owned())];
    let mounted = Mounted::new(&own.path().join("tmpfs"), "tmpfs");
    places.extend(mounted.iter().map(|one| ("tmpfs".to_owned(), one.path().to_owned())));
    let mut disks = Vec::new();
    for (kind, sector) in
        [("ext4", 512), ("ext4", 4096), ("xfs", 512), ("xfs", 4096), ("btrfs", 4096)]
    {
        if let Some(disk) = Disk::new(kind, sector) {
            places.push((format!("{kind} with sectors of {sector}"), disk.path().to_owned()));
            disks.push(disk);
        } else {
            eprintln!("{kind} with sectors of {sector} cannot be made here");
        }
    }
    (places, (mounted, own, disks))
}

/// Whether the host has the first page of a file in its cache.
fn is_cached(path: &Path) -> bool {
    let file = std::fs::File::open(path).unwrap();
    let mut page = [0; 4096];
    let flags = ReadWriteFlags::NOWAIT;
    rustix::io::preadv2(file, &mut [IoSliceMut::new(&mut page)], 0, flags).is_ok()
}

#[test]
fn direct_io_of_any_offset_length_and_address_does_what_buffered_io_does() {
    let (places, _keep) = places();
    let mut noise = Noise(0x9e37_79b9_7f4a_7c15);
    for (what, place) in &places {
        for policy in [DirectPolicy::Buffered, DirectPolicy::Host] {
            for skew in [0, 1, 512, 4095] {
                let path = place.join("file");
                std::fs::write(&path, "").unwrap();
                let mut guest = guest(place, policy, skew);
                guest.room = 16 + 10 * 4096;
                let node = guest.node("file");
                let handles = [guest.fh(node, DIRECT), guest.fh(node, libc::O_RDWR)];
                let mut model: Vec<u8> = Vec::new();
                for step in 0..100u32 {
                    let unit = noise.pick(&[4096, 512, 1]);
                    let offset = noise.below(20 * 4096 / unit) * unit;
                    let unit = noise.pick(&[4096, 512, 1]);
                    let len = (noise.below(10 * 4096 / unit) * unit) as usize;
                    // Also a descriptor whose flag was changed by fcntl(2) after it was opened.
                    let (fh, flags) = (noise.pick(&handles), noise.pick(&[DIRECT, libc::O_RDWR]));
                    let case = || format!("{what}, {policy:?}, {skew}: step {step}");
                    let append = if noise.below(8) == 0 { libc::O_APPEND } else { 0 };
                    let start = if append == 0 { offset as usize } else { model.len() };
                    if noise.below(2) == 0 {
                        let data: Vec<u8> = (0..len).map(|_| noise.number() as u8).collect();
                        let answer = guest.write_with(node, fh, offset, &data, flags | append, 0);
                        assert_eq!(answer.get::<WriteOut>().size as usize, len, "{}", case());
                        model.resize(model.len().max(start + len), 0);
                        model[start..start + len].copy_from_slice(&data);
                        if len == 0 {
                            model.truncate(path.metadata().unwrap().len() as usize);
                        }
                    } else {
                        let data = read(&guest, node, fh, offset, len as u32, flags);
                        let end = (offset as usize + len).min(model.len());
                        let expected = model.get(offset as usize..end).unwrap_or_default();
                        assert!(data == expected, "{}", case());
                    }
                }
                assert!(std::fs::read(&path).unwrap() == model, "{what}, {policy:?}, {skew}");
            }
        }
    }
}

#[test]
fn direct_io_passes_the_hosts_cache_by_only_where_it_is_told_to() {
    for kind in ["ext4", "xfs"] {
        let Some(disk) = Disk::new(kind, 512) else { continue };
        for (policy, cached) in [(DirectPolicy::Buffered, true), (DirectPolicy::Host, false)] {
            let guest = guest(disk.path(), policy, 0);
            // A file each: to look whether it is cached makes the host read it.
            let fresh = |name: &str| {
                let path = disk.path().join(name);
                std::fs::write(&path, [7; 1 << 20]).unwrap();
                let file = std::fs::File::open(&path).unwrap();
                file.sync_all().unwrap();
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
                let node = guest.node(name);
                (path, node, guest.fh(node, DIRECT))
            };
            let (path, ..) = fresh("untouched");
            assert!(!is_cached(&path));
            let (path, node, fh) = fresh("read");
            assert!(read(&guest, node, fh, 0, 1 << 20, DIRECT) == [7; 1 << 20]);
            assert_eq!(is_cached(&path), cached, "{kind}: read");
            let (path, node, fh) = fresh("written");
            assert_eq!(guest.write_with(node, fh, 0, &[8; 1 << 20], DIRECT, 0).error, 0);
            assert_eq!(is_cached(&path), cached, "{kind}: write");
            // A page of the guest's cache is not direct, whatever the handle was opened with.
            let (path, node, fh) = fresh("written back");
            assert_eq!(guest.write_with(node, fh, 0, &[8; 4096], DIRECT, WRITE_CACHE).error, 0);
            assert!(is_cached(&path));
        }
    }
}

#[test]
fn the_host_and_direct_io_see_what_the_other_wrote_at_once() {
    let (places, _keep) = places();
    for (what, place) in &places {
        for skew in [0, 100] {
            let path = place.join("file");
            std::fs::write(&path, [1; 16384]).unwrap();
            let guest = guest(place, DirectPolicy::Host, skew);
            let node = guest.node("file");
            let fh = guest.fh(node, DIRECT);
            for round in 2..20 {
                // Dirty in the host's cache, then read directly.
                std::fs::write(&path, [round; 16384]).unwrap();
                assert!(read(&guest, node, fh, 0, 16384, DIRECT) == [round; 16384], "{what}");
                // Clean in the host's cache, then written directly.
                let data = [round + 100; 4096];
                assert_eq!(guest.write_with(node, fh, 4096, &data, DIRECT, 0).error, 0);
                assert!(std::fs::read(&path).unwrap()[4096..8192] == data, "{what}");
            }
        }
    }
}

#[test]
fn where_files_are_mapped_they_are_not_read_or_written_past_the_cache() {
    let Some(disk) = Disk::new("ext4", 512) else { return };
    let path = disk.path().join("file");
    std::fs::write(&path, "").unwrap();
    let guest = guest_on(FIRST, 0, |options| {
        options.directory = disk.path().to_owned();
        options.direct = DirectPolicy::Host;
    });
    let node = guest.node("file");
    let fh = guest.fh(node, DIRECT);
    assert_eq!(guest.write_with(node, fh, 0, &[7; 1 << 20], DIRECT, 0).error, 0);
    assert!(is_cached(&path));
}

#[test]
fn descriptors_for_direct_io_are_counted_and_without_one_the_cache_is_used() {
    let Some(disk) = Disk::new("ext4", 512) else { return };
    std::fs::write(disk.path().join("file"), [7; 8192]).unwrap();
    let guest = guest_on(FIRST, 0, |options| {
        options.directory = disk.path().to_owned();
        options.direct = DirectPolicy::Host;
        options.dax = DaxPolicy::Never;
        options.max_descriptors = Some(3);
    });
    let node = guest.node("file");
    let handles = [guest.fh(node, DIRECT), guest.fh(node, DIRECT)];
    for (fh, held) in handles.into_iter().zip([3, 3]) {
        assert!(read(&guest, node, fh, 0, 8192, DIRECT) == [7; 8192]);
        assert_eq!(guest.write_with(node, fh, 0, &[7; 4096], DIRECT, 0).error, 0);
        assert_eq!(guest.share.live_descriptors(), held);
    }
    for fh in handles {
        let body = ReleaseIn { fh, ..ReleaseIn::default() };
        guest.call(crate::fuse::opcode::Opcode::Release, node, &[body.as_slice()]).ok();
    }
    assert_eq!(guest.share.live_descriptors(), 0);
}
