//! What a real kernel makes of the operations: of those that programs seldom use.

use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::panic::AssertUnwindSafe;

use devices::share::{DaxPolicy, DirectPolicy};
use integration::noise;
use rustix::fs::{
    AtFlags, CWD, IFlags, Mode, OFlags, RawDir, RenameFlags, StatxFlags, fcntl_getfl, fcntl_setfl,
    ioctl_getflags, ioctl_setflags, renameat_with, statx,
};

use super::smoke::{MODES, door};

#[test]
fn a_program_may_use_o_direct_with_any_buffer_offset_and_length() {
    for (cache, direct) in MODES.into_iter().flat_map(|cache| {
        [DirectPolicy::Buffered, DirectPolicy::Host].map(|direct| (cache, direct))
    }) {
        let (directory, door) = door(|options| {
            options.cache = cache;
            options.direct = direct;
            options.dax = DaxPolicy::Never;
        });
        let what = format!("{cache:?}, {direct:?}");
        let flags = OFlags::DIRECT.bits() as i32;
        let path = door.path().join("file");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .custom_flags(flags)
            .open(&path)
            .unwrap();
        let mut model = vec![0; 3 << 20];
        // As fio -direct=1 -bs=1M, and then as no disk would have it.
        let source = noise(2 << 20, 7);
        for (at, len, skew) in [
            (0, 1 << 20, 0),
            (1 << 20, 1 << 20, 512),
            (5, 100, 1),
            (4096, 4095, 3),
            (777_777, 333_333, 17),
            ((2 << 20) - 1, 1, 0),
            (2 << 20, 1 << 20, 4095),
        ] {
            let data = &source[skew..skew + len];
            assert_eq!(file.write_at(data, at as u64).unwrap(), len, "{what} at {at}");
            model[at..at + len].copy_from_slice(data);
        }
        assert!(fs::read(directory.path().join("file")).unwrap() == model, "{what}");
        let mut buffer = vec![0; (1 << 20) + 64];
        for (at, len, skew) in
            [(0, 1 << 20, 0), (1, 4096, 3), (4096, 4096, 33), (3_000_000, 300_000, 5)]
        {
            let target = &mut buffer[skew..skew + len];
            let count = file.read_at(target, at as u64).unwrap();
            assert!(target[..count] == model[at..(at + len).min(model.len())], "{what} at {at}");
        }
        // The flag goes and comes, and whichever way the data took, all read the same.
        for round in 0..6u8 {
            fcntl_setfl(&file, fcntl_getfl(&file).unwrap() ^ OFlags::DIRECT).unwrap();
            let at = 1000 * usize::from(round);
            assert_eq!(file.write_at(&[round; 8192], at as u64).unwrap(), 8192, "{what}");
            model[at..at + 8192].fill(round);
            let mut back = vec![0; 65536];
            file.read_exact_at(&mut back, 0).unwrap();
            assert!(back == model[..65536], "{what}: {round}");
        }
        let mut append = OpenOptions::new().append(true).custom_flags(flags).open(&path).unwrap();
        for part in [&b"odd"[..], &[1; 4096], b"end"] {
            std::io::Write::write_all(&mut append, part).unwrap();
            model.extend_from_slice(part);
        }
        assert!(fs::read(&path).unwrap() == model, "{what}");
        assert!(fs::read(directory.path().join("file")).unwrap() == model, "{what}");
    }
}

/// Removes all names of a directory as `rm -r` with a small buffer does: some names are read, these are
/// removed, and the reading goes on. musl reads 2 KiB at a time.
fn remove_all(path: &std::path::Path) -> HashSet<Vec<u8>> {
    let directory = File::open(path).unwrap();
    let mut buffer = vec![std::mem::MaybeUninit::uninit(); 2048];
    let mut seen = HashSet::new();
    let mut entries = RawDir::new(&directory, &mut buffer);
    let mut doomed = Vec::new();
    while let Some(entry) = entries.next() {
        let entry = entry.unwrap();
        let name = entry.file_name().to_owned();
        if name.as_bytes() != b"." && name.as_bytes() != b".." {
            seen.insert(name.as_bytes().to_vec());
            doomed.push(name);
        }
        if entries.is_buffer_empty() {
            for name in doomed.drain(..) {
                rustix::fs::unlinkat(&directory, name, AtFlags::empty()).unwrap();
            }
        }
    }
    seen
}

#[test]
fn a_tree_can_be_removed_while_it_is_listed() {
    for cache in MODES {
        let (directory, door) = door(|options| options.cache = cache);
        // On ramfs a cookie is the number of an entry, which deleting earlier ones changes.
        let ram = directory.path().join("ram");
        fs::create_dir(&ram).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("ramfs", &ram, "ramfs", flags, None).unwrap();
        let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
            for name in ["ram", "disk"] {
                let _ = fs::create_dir(directory.path().join(name));
                for at in 0..2000 {
                    File::create(directory.path().join(name).join(format!("{at}"))).unwrap();
                }
                let seen = remove_all(&door.path().join(name));
                let left: Vec<_> = fs::read_dir(directory.path().join(name)).unwrap().collect();
                assert_eq!((seen.len(), left.len()), (2000, 0), "{cache:?}: {name}");
            }
        }));
        drop(door);
        rustix::mount::unmount(&ram, rustix::mount::UnmountFlags::DETACH).unwrap();
        result.unwrap();
    }
}

#[test]
fn lsattr_and_chattr_work() {
    let (directory, door) = door(|_| {});
    fs::write(directory.path().join("file"), "").unwrap();
    for name in ["file", "."] {
        let here = File::open(door.path().join(name)).unwrap();
        let there = File::open(directory.path().join(name)).unwrap();
        let before = match ioctl_getflags(&there) {
            Ok(flags) => flags,
            Err(error) => {
                assert_eq!(ioctl_getflags(&here).unwrap_err(), error);
                continue;
            }
        };
        assert_eq!(ioctl_getflags(&here).unwrap(), before);
        ioctl_setflags(&here, before ^ IFlags::NODUMP).unwrap();
        assert_eq!(ioctl_getflags(&there).unwrap(), before ^ IFlags::NODUMP);
        let immutable = ioctl_setflags(&here, before | IFlags::IMMUTABLE);
        assert_eq!(immutable.unwrap_err(), rustix::io::Errno::PERM);
    }
}

#[test]
fn a_rename_may_leave_a_whiteout() {
    let (directory, door) = door(|_| {});
    fs::write(door.path().join("from"), "text").unwrap();
    let (from, to) = (door.path().join("from"), door.path().join("to"));
    renameat_with(CWD, &from, CWD, &to, RenameFlags::WHITEOUT).unwrap();
    assert_eq!(fs::read(&to).unwrap(), b"text");
    for path in [from, directory.path().join("from")] {
        let whiteout = fs::metadata(path).unwrap();
        assert!(whiteout.file_type().is_char_device());
        assert_eq!(whiteout.rdev(), 0);
    }
    let again = renameat_with(CWD, &to, CWD, &to, RenameFlags::from_bits_retain(1 << 10));
    assert_eq!(again.unwrap_err(), rustix::io::Errno::INVAL);
}

#[test]
fn poll_says_of_a_file_that_it_is_ready() {
    use rustix::event::{PollFd, PollFlags, poll};
    let (_directory, door) = door(|_| {});
    let file = File::create(door.path().join("file")).unwrap();
    let events = PollFlags::IN | PollFlags::OUT;
    for _ in 0..2 {
        let mut polled = [PollFd::new(&file, events)];
        let timeout = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
        assert_eq!(poll(&mut polled, Some(&timeout)).unwrap(), 1);
        assert_eq!(polled[0].revents(), events);
    }
    // Once, and never again.
    let requests = door.counters().requests(devices::fuse::opcode::Opcode::Poll);
    assert_eq!(requests, 1);
}

#[test]
fn a_file_has_its_birth_time_and_the_id_of_its_mount() {
    let (directory, door) = door(|_| {});
    fs::write(directory.path().join("file"), "").unwrap();
    let mask = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
    let of = |path: &std::path::Path| {
        let stat = statx(CWD, path.join("file"), AtFlags::empty(), mask).unwrap();
        (stat.stx_mask & mask.bits(), stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec)
    };
    assert_eq!(of(door.path()), of(directory.path()));
    // Which mount it is on, a kernel knows by itself.
    let mount = |path: &std::path::Path| {
        let stat = statx(CWD, path, AtFlags::empty(), StatxFlags::MNT_ID).unwrap();
        assert_ne!(stat.stx_mask & StatxFlags::MNT_ID.bits(), 0);
        stat.stx_mnt_id
    };
    assert_eq!(mount(&door.path().join("file")), mount(door.path()));
    assert_ne!(mount(door.path()), mount(directory.path()));
}

#[test]
fn a_range_is_copied_by_the_host() {
    let (directory, door) = door(|_| {});
    let data = noise(70 << 20, 3);
    fs::write(directory.path().join("from"), &data).unwrap();
    let from = File::open(door.path().join("from")).unwrap();
    let to = rustix::fs::open(
        door.path().join("to"),
        OFlags::CREATE | OFlags::WRONLY,
        Mode::from_raw_mode(0o600),
    )
    .unwrap();
    let mut left = data.len();
    while left > 0 {
        let count = rustix::fs::copy_file_range(&from, None, &to, None, left).unwrap();
        assert!(count > 0);
        left -= count;
    }
    assert!(fs::read(directory.path().join("to")).unwrap() == data);
    assert_eq!(door.counters().requests(devices::fuse::opcode::Opcode::Write), 0);
}
