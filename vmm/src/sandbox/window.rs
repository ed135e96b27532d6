//! How large the window of a share is when its user does not say.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use devices::dax::Policy;
use devices::share;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, StatxFlags, statx};

/// The smallest window that is chosen, in bytes: what a directory that is empty now may need, for 1 MiB of the
/// guest's memory.
const LEAST: u64 = 64 << 20;

/// The window for directories that come later, in bytes: for 8 MiB of the guest's memory.
const UNKNOWN: u64 = 512 << 20;

/// For how long a directory is looked at: a small part of the time in which a sandbox starts, and enough for some
/// ten thousand files that the host has in its caches. One that takes longer counts as large.
const PATIENCE: Duration = Duration::from_millis(20);

/// A window that was chosen or asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WindowChoice {
    /// Its size.
    pub bytes: u64,
    /// To how much it can grow, in bytes.
    pub max: u64,
    /// Why it is that large: a few words.
    pub reason: String,
}

impl WindowChoice {
    /// What the user asked for.
    pub fn asked(bytes: u64, max: Option<u64>) -> Self {
        Self { bytes, max: max.unwrap_or(bytes), reason: "as asked".into() }
    }

    /// Room for all files of `directory` that would be mapped, as far as a quick look finds them; `reads` says
    /// whether small ones are read. At most `memory` bytes, so that what the guest spends on its windows is at
    /// most 1/64 of its memory if all of them have so much of it; never more than `max`, to which the window
    /// can grow, if that is given.
    pub fn fitting(directory: &Path, reads: bool, memory: u64, max: Option<u64>) -> Self {
        let most = most(memory, max);
        match ranges_in(directory, reads, most / Policy::RANGE, PATIENCE) {
            Found::Ranges(ranges) => Self::for_ranges(Some(ranges), most, max),
            Found::Much => Self::for_ranges(None, most, max),
            Found::Far => Self::unknown(memory, max),
        }
    }

    /// For files that are not known yet: at most what [`fitting`](Self::fitting) gives to many large ones.
    pub fn unknown(memory: u64, max: Option<u64>) -> Self {
        let bytes = UNKNOWN.min(most(memory, max));
        Self { bytes, max: max.unwrap_or(bytes), reason: "its files are not known yet".into() }
    }

    /// For files that take so many ranges, if that is known.
    fn for_ranges(found: Option<u64>, most: u64, max: Option<u64>) -> Self {
        let least = LEAST.min(most);
        let (bytes, reason) = match found {
            Some(ranges) => {
                let needed = Policy::window_for(ranges);
                let take = format!("its files take {} MiB", (ranges * Policy::RANGE) >> 20);
                let reason = match needed {
                    _ if needed > most => format!("the most for the guest's memory; {take}"),
                    _ if needed < least => format!("the least; {take}"),
                    _ => format!("room for its files; {take}"),
                };
                (needed.clamp(least, most), reason)
            }
            None => (most, "the most for the guest's memory; its files are many or large".into()),
        };
        Self { bytes, max: max.unwrap_or(bytes), reason }
    }
}

/// The largest window that is chosen, in whole ranges of `memory`.
fn most(memory: u64, max: Option<u64>) -> u64 {
    (memory / Policy::RANGE * Policy::RANGE).max(LEAST).min(max.unwrap_or(u64::MAX))
}

/// What a look at a directory finds.
#[derive(Debug, PartialEq, Eq)]
enum Found {
    /// So many ranges of the window its files would take.
    Ranges(u64),
    /// More than there can be, or more files than there is time to look at.
    Much,
    /// Another machine or process has its files, and might keep the sandbox from starting: not looked at.
    Far,
}

/// Ranges of the window that the files of a directory would take, if they are at most `most`. What is mounted below is not
/// looked at: it may be of any size, and far away.
fn ranges_in(directory: &Path, reads: bool, most: u64, patience: Duration) -> Found {
    let deadline = Instant::now() + patience;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let Ok(root) = rustix::fs::openat(CWD, directory, flags | OFlags::PATH, Mode::empty()) else {
        return Found::Ranges(0);
    };
    if !share::is_near(&root).unwrap_or(false) {
        return Found::Far;
    }
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    let mut directories: VecDeque<PathBuf> = VecDeque::from([PathBuf::from(".")]);
    let mut ranges = 0;
    while let Some(directory) = directories.pop_front() {
        // One that may not be read is none that the guest reads.
        let opened = rustix::fs::openat2(&root, &directory, flags, Mode::empty(), resolve);
        let Ok(opened) = opened else { continue };
        let Ok(listing) = Dir::read_from(&opened) else { continue };
        // Also where there is nothing in them.
        if Instant::now() > deadline {
            return Found::Much;
        }
        for entry in listing.flatten() {
            if Instant::now() > deadline {
                return Found::Much;
            }
            let name = entry.file_name();
            let kind = match entry.file_type() {
                FileType::Unknown => {
                    file(&opened, name).map_or(FileType::Unknown, |(kind, _)| kind)
                }
                known => known,
            };
            match kind {
                FileType::Directory if !matches!(name.to_bytes(), b"." | b"..") => {
                    use std::os::unix::ffi::OsStrExt;
                    directories
                        .push_back(directory.join(std::ffi::OsStr::from_bytes(name.to_bytes())));
                }
                FileType::RegularFile => {
                    let size = file(&opened, name).map_or(0, |(_, size)| size);
                    ranges += Policy::ranges_of(size, reads);
                    if ranges > most {
                        return Found::Much;
                    }
                }
                _ => {}
            }
        }
    }
    Found::Ranges(ranges)
}

/// What an entry is, and its size, as far as is known here.
fn file(directory: &OwnedFd, name: &CStr) -> Option<(FileType, u64)> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let stat = statx(directory.as_fd(), name, flags, StatxFlags::TYPE | StatxFlags::SIZE).ok()?;
    Some((FileType::from_raw_mode(stat.stx_mode.into()), stat.stx_size))
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File};

    use super::*;

    const MIB: u64 = 1 << 20;
    /// However busy the machine is.
    const LONG: Duration = Duration::from_secs(60);

    fn file(path: PathBuf, size: u64) {
        File::create(path).unwrap().set_len(size).unwrap();
    }

    #[test]
    fn what_files_take_is_counted_by_the_rules_of_the_policy() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        for name in ["a", "b/c", "b/d/e"] {
            fs::create_dir_all(path.join(name).parent().unwrap()).unwrap();
            file(path.join(name), 50 * MIB);
        }
        for number in 0..100 {
            file(path.join(format!("small{number}")), 1000);
        }
        std::os::unix::fs::symlink("/", path.join("root")).unwrap();
        std::os::unix::fs::symlink(".", path.join("loop")).unwrap();
        assert_eq!(ranges_in(path, true, 1000, LONG), Found::Ranges(75));
        assert_eq!(ranges_in(path, false, 1000, LONG), Found::Ranges(175));
        assert_eq!(ranges_in(path, true, 75, LONG), Found::Ranges(75));
        assert_eq!(ranges_in(path, true, 74, LONG), Found::Much, "more than there can be");
        assert_eq!(ranges_in(path, true, 1000, Duration::ZERO), Found::Much, "no time to look");
        file(path.join("huge"), 1 << 42);
        assert_eq!(ranges_in(path, true, 1000, LONG), Found::Much);
        assert_eq!(ranges_in(Path::new("/nonexistent"), true, 1, LONG), Found::Ranges(0));
    }

    #[test]
    fn what_is_mounted_is_not_looked_at() {
        let directory = tempfile::tempdir().unwrap();
        file(directory.path().join("here"), 50 * MIB);
        // As root, or not at all.
        let below = directory.path().join("below");
        fs::create_dir(&below).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        if rustix::mount::mount("tmpfs", &below, "tmpfs", flags, None).is_ok() {
            file(below.join("there"), 50 * MIB);
            let found = ranges_in(directory.path(), true, 1000, LONG);
            rustix::mount::unmount(&below, rustix::mount::UnmountFlags::DETACH).unwrap();
            assert_eq!(found, Found::Ranges(25));
        }
        // Every process has one of these, and nobody knows how large.
        assert_eq!(ranges_in(Path::new("/proc"), true, 1000, LONG), Found::Far);
        assert_eq!(
            WindowChoice::fitting(Path::new("/proc"), true, 4096 * MIB, None).bytes,
            UNKNOWN
        );
    }

    #[test]
    fn a_small_directory_gets_the_least_and_a_large_one_what_the_memory_allows() {
        let choose = |ranges, memory: u64| WindowChoice::for_ranges(ranges, memory * MIB, None);
        for (ranges, memory, bytes, why) in [
            (Some(0), 1024, LEAST, "least"),
            (Some(25), 1024, LEAST, "least"),
            // The ranges and the fifth that the guest keeps free.
            (Some(75), 1024, Policy::window_for(75), "150 MiB"),
            (Some(75), 128, 128 * MIB, "memory"),
            (Some(10), 32, 32 * MIB, "least"),
            (None, 1024, 1024 * MIB, "memory"),
        ] {
            let choice = choose(ranges, memory);
            assert_eq!((choice.bytes, choice.max), (bytes, bytes), "{choice:?}");
            assert!(choice.reason.contains(why), "{choice:?}");
        }
        assert!((180 * MIB..200 * MIB).contains(&Policy::window_for(75)));
    }

    #[test]
    fn a_window_that_is_chosen_has_the_least_in_any_guest_and_never_more_than_it_can_grow_to() {
        let directory = tempfile::tempdir().unwrap();
        let choose = |memory: u64, max: Option<u64>| {
            let max = max.map(|max| max * MIB);
            let choice = WindowChoice::fitting(directory.path(), true, memory * MIB, max);
            (choice.bytes / MIB, choice.max / MIB)
        };
        assert_eq!(choose(1024, None), (64, 64));
        assert_eq!(choose(16, None), (64, 64), "less would hold nothing");
        assert_eq!(choose(1024, Some(4)), (4, 4));
        assert_eq!(choose(1024, Some(64)), (64, 64));
        assert_eq!(choose(1024, Some(4096)), (64, 4096));
        let unknown = |memory: u64, max: Option<u64>| {
            let choice = WindowChoice::unknown(memory * MIB, max.map(|max| max * MIB));
            (choice.bytes / MIB, choice.max / MIB)
        };
        assert_eq!(unknown(4096, None), (512, 512));
        assert_eq!(unknown(256, None), (256, 256));
        assert_eq!(unknown(1024, Some(4)), (4, 4));
        assert_eq!(unknown(1024, Some(8192)), (512, 8192));
    }
}
