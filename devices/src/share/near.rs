//! What is had without waiting: for the thread of a vCPU, which serves a request itself when it can.
//!
//! Names and attributes are taken to be had without waiting wherever the file system is this machine's
//! ([`Distance`]). For data there is more to it:
//!
//! - A **read** is tried with `RWF_NOWAIT`: what is in the host's page cache comes, and what is not is left to a
//!   thread that may wait for a disk. In a file system that is all memory there is nothing to try.
//! - A **write** into the page cache is one of memory, if it is small. File systems that can say that it would have
//!   to wait (XFS, btrfs) are asked to. ext4 cannot: there, what replaces whole pages or begins at the end of the file
//!   is written, which reads nothing but the last page, and what changes a part of a page is left alone, which may have
//!   to be read first. A process that makes pages dirty faster than the disk takes them is slowed down, as it would be
//!   on the host. Other file systems that cannot say, and ZFS, are never written to.
//!
//! What goes past the cache, or to the disk at once, is always waited for.
//!
//! All of that may turn out wrong: a file system that is frozen, a disk behind a network, a program that has to permit
//! each access (fanotify(7)). So a request that took long has those of its share left alone for a while ([`Slow`]).

use std::os::fd::AsFd;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, fstat};

use super::Share;
use super::handle::{Handle, OpenFile};
use super::mount::{Distance, Writes};
use super::namespace::FREED_AT_ONCE;
use crate::fuse::abi::{ReadIn, WRITE_CACHE, WRITE_KILL_SUIDGID, WriteIn};
use crate::fuse::{Errno, Payload, Result};

/// The largest write, in bytes, that is done without another thread: copying it takes some ten microseconds, not
/// more than waking that thread. A program that writes more at a time gains by going on meanwhile.
const WRITTEN_AT_ONCE: u32 = 64 << 10;

/// How the data of an open file is had without waiting.
pub(super) enum Near {
    /// By an ordinary read or write: it is in memory.
    Memory,
    /// If the page cache has it.
    Cache {
        /// The file system cannot say whether a read would have to wait.
        reads_wait: AtomicBool,
        /// It cannot say so of a write.
        writes_unknown: AtomicBool,
        /// What is written then.
        writes: Writes,
    },
    /// Not at all.
    Never,
}

impl Near {
    /// Writes without waiting for more than the file system lets nobody avoid. `flags` are those of pwritev2(2).
    pub(super) fn write(
        &self,
        file: &OpenFile,
        request: &WriteIn,
        source: &Payload<'_, '_>,
        flags: i32,
    ) -> Result<usize> {
        let plain = || source.write_to(file.fd.as_fd(), request.offset, flags);
        match self {
            Self::Never => Err(Errno::WOULD_WAIT),
            Self::Memory => plain(),
            Self::Cache { writes: Writes::Short, .. } => match needs_no_page(file, request, flags)?
            {
                true => plain(),
                false => Err(Errno::WOULD_WAIT),
            },
            Self::Cache { writes_unknown, .. } => {
                // Of what is appended no part may be written twice, as it would be when all of it is done again.
                if writes_unknown.load(Ordering::Relaxed) || flags & libc::RWF_APPEND != 0 {
                    return Err(Errno::WOULD_WAIT);
                }
                match source.write_to(file.fd.as_fd(), request.offset, flags | libc::RWF_NOWAIT) {
                    Err(Errno::AGAIN) => Err(Errno::WOULD_WAIT),
                    Err(Errno::OPNOTSUPP) => {
                        writes_unknown.store(true, Ordering::Relaxed);
                        Err(Errno::WOULD_WAIT)
                    }
                    other => other,
                }
            }
        }
    }
}

/// Whether a write replaces whole pages or begins at the end of the file.
fn needs_no_page(file: &OpenFile, request: &WriteIn, flags: i32) -> Result<bool> {
    const PAGE: u64 = 4096;
    let whole = request.offset.is_multiple_of(PAGE) && u64::from(request.size).is_multiple_of(PAGE);
    let ends = || Ok::<_, Errno>(request.offset >= end_of(file)?);
    Ok(whole || flags & libc::RWF_APPEND != 0 || ends()?)
}

fn end_of(file: &OpenFile) -> Result<u64> {
    Ok(u64::try_from(fstat(&file.fd)?.st_size).unwrap_or(0))
}

/// What a read of `wanted` bytes at `offset` that did not wait has brought: all of it, or what there is up to the
/// `end` of the file. Before Linux 5.11 such a read also stops, without an error, where a page is not in the cache, and
/// to the guest a short count is the end of the file.
fn all_there_is(
    count: usize,
    wanted: usize,
    offset: u64,
    end: impl FnOnce() -> Result<u64>,
) -> Result<usize> {
    let complete = count >= wanted || offset.saturating_add(count as u64) >= end()?;
    if complete { Ok(count) } else { Err(Errno::WOULD_WAIT) }
}

/// Whether requests of a share took too long lately to be served by who must not wait.
#[derive(Default)]
pub(super) struct Slow {
    /// In milliseconds of [`now`](Self::now).
    until: AtomicU64,
}

impl Slow {
    /// For so long. Whoever has something frozen or waits for a network has done so for longer, and one request in that
    /// time that is tried in vain is not felt.
    const TIME: Duration = Duration::from_secs(5);

    fn now() -> Duration {
        static START: LazyLock<Instant> = LazyLock::new(Instant::now);
        START.elapsed()
    }

    fn after(time: Duration) -> u64 {
        u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn begin(&self) {
        self.until
            .fetch_max(Self::after(Self::now().saturating_add(Self::TIME)), Ordering::Relaxed);
    }

    /// Most shares are never slow, and the time is not looked at then.
    pub(super) fn is_over(&self) -> bool {
        let until = self.until.load(Ordering::Relaxed);
        until == 0 || until <= Self::after(Self::now())
    }
}

impl Share {
    /// Whether all that the guest ever knew nodes of is had without waiting.
    pub(super) fn all_are_near(&self) -> bool {
        self.options.trust_file_systems || self.mounts.are_near()
    }

    /// Whether files so far away are had without waiting.
    pub(super) fn is_near(&self, distance: Distance) -> bool {
        self.options.trust_file_systems || distance != Distance::Unknown
    }

    /// How the data of a node's file is had that is open with `flags`.
    pub(super) fn near(&self, nodeid: u64, flags: OFlags) -> Near {
        let mount = self.inodes.get(nodeid).map(|node| node.identity.mount.clone());
        match mount.as_ref().map(|mount| mount.distance) {
            // Each write of it is synced.
            _ if flags.intersects(OFlags::SYNC | OFlags::DSYNC) => Near::Never,
            Ok(Distance::Memory) => Near::Memory,
            Ok(distance) if self.is_near(distance) => Near::Cache {
                reads_wait: AtomicBool::new(false),
                writes_unknown: AtomicBool::new(false),
                writes: mount.map_or(Writes::Long, |mount| mount.writes),
            },
            _ => Near::Never,
        }
    }

    /// Reads what there is, up to the end of the file, if the page cache has all of it.
    pub(super) fn read_at_once(
        &self,
        file: &OpenFile,
        request: &ReadIn,
        target: &Payload<'_, '_>,
    ) -> Result<usize> {
        if self.is_direct(request.flags) {
            return Err(Errno::WOULD_WAIT);
        }
        let reads_wait = match &file.near {
            Near::Memory => return target.read_from(file.fd.as_fd(), request.offset, 0),
            Near::Cache { reads_wait, .. } if !reads_wait.load(Ordering::Relaxed) => reads_wait,
            _ => return Err(Errno::WOULD_WAIT),
        };
        match target.read_from(file.fd.as_fd(), request.offset, libc::RWF_NOWAIT) {
            Err(Errno::AGAIN) => Err(Errno::WOULD_WAIT),
            Err(Errno::OPNOTSUPP) => {
                reads_wait.store(true, Ordering::Relaxed);
                Err(Errno::WOULD_WAIT)
            }
            Ok(count) => all_there_is(count, target.len(), request.offset, || end_of(file)),
            other => other,
        }
    }

    /// Whether what the guest has open is closed without waiting. It waits itself: with this device Linux sends RELEASE
    /// before close(2) returns (`fuse_file_put`, fs/fuse/file.c).
    ///
    /// # Errors
    ///
    /// [`Errno::WOULD_WAIT`] where more may go than a descriptor: what has no name any more, with all that is in it; and
    /// what was open for writing on a disk, which some file systems trim then, or begin to write.
    pub(super) fn check_close_at_once(&self, handle: &Handle) -> Result<()> {
        let written =
            handle.file().is_ok_and(|file| file.writable && !matches!(file.near, Near::Memory));
        let stat = fstat(handle)?;
        let blocks = u64::try_from(stat.st_blocks).unwrap_or(0);
        let waits = written || stat.st_nlink == 0 && blocks > FREED_AT_ONCE;
        if waits { Err(Errno::WOULD_WAIT) } else { Ok(()) }
    }

    /// # Errors
    ///
    /// [`Errno::WOULD_WAIT`] for a write that is large, goes past the cache or to the disk at once, or is done with
    /// fewer rights than the thread has.
    pub(super) fn check_write_at_once(&self, file: &OpenFile, request: &WriteIn) -> Result<()> {
        let cached = request.fuse_flags & WRITE_CACHE != 0;
        let flags = request.flags as i32;
        let waits = request.size > WRITTEN_AT_ONCE
            || matches!(file.near, Near::Never | Near::Cache { writes: Writes::Long, .. })
            || request.fuse_flags & WRITE_KILL_SUIDGID != 0
            || !cached && (flags & libc::O_DSYNC != 0 || self.is_direct(request.flags));
        if waits { Err(Errno::WOULD_WAIT) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_read_that_did_not_wait_is_believed_at_the_end_of_the_file_only() {
        let end = |end| move || Ok(end);
        assert_eq!(all_there_is(4096, 4096, 0, || Err(Errno::IO)), Ok(4096), "nobody is asked");
        assert_eq!(all_there_is(100, 4096, 0, end(100)), Ok(100));
        assert_eq!(all_there_is(0, 4096, 100, end(100)), Ok(0));
        assert_eq!(all_there_is(0, 4096, 8192, end(100)), Ok(0), "past the end");
        assert_eq!(all_there_is(0, 4096, 0, end(100)), Err(Errno::WOULD_WAIT));
        assert_eq!(all_there_is(4096, 8192, 4096, end(1 << 20)), Err(Errno::WOULD_WAIT));
        assert_eq!(all_there_is(0, 1, 0, || Err(Errno::IO)), Err(Errno::IO));
    }

    #[test]
    fn a_share_is_slow_for_a_while() {
        let slow = Slow::default();
        assert!(slow.is_over());
        slow.begin();
        assert!(!slow.is_over());
        slow.until.store(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(2));
        let _ = Slow::now();
        std::thread::sleep(Duration::from_millis(2));
        assert!(slow.is_over());
    }
}
