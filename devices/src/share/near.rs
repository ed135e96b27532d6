//! What is had without waiting: for the thread of a vCPU, which serves a request itself when it can.
//!
//! Names and attributes are taken to be had without waiting wherever the file system is this machine's
//! ([`Distance`]). For data there is more to it:
//!
//! - A **read** is tried with `RWF_NOWAIT`: what is in the host's page cache comes, and what is not is left to a
//!   thread that may wait for a disk. In a file system that is all memory there is nothing to try.
//! - A **write** into the page cache is one of memory, if it is small. File systems that can say that it would have
//!   to wait (XFS, btrfs) are asked to; with the others (ext4) a process that makes pages dirty faster than a disk
//!   takes them is slowed down, as it would be on the host.
//!
//! What goes past the cache, or to the disk at once, is always waited for.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::OFlags;

use super::Share;
use super::handle::OpenFile;
use super::mount::Distance;
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
            Self::Cache { writes_unknown, .. } => {
                // Of what is appended no part may be written twice, as it would be when all of it is done again.
                if writes_unknown.load(Ordering::Relaxed) || flags & libc::RWF_APPEND != 0 {
                    return plain();
                }
                match source.write_to(file.fd.as_fd(), request.offset, flags | libc::RWF_NOWAIT) {
                    Err(Errno::AGAIN) => Err(Errno::WOULD_WAIT),
                    Err(Errno::OPNOTSUPP) => {
                        writes_unknown.store(true, Ordering::Relaxed);
                        plain()
                    }
                    other => other,
                }
            }
        }
    }
}

impl Share {
    /// Whether files so far away are had without waiting.
    pub(super) fn is_near(&self, distance: Distance) -> bool {
        self.options.trust_file_systems || distance != Distance::Unknown
    }

    /// How the data of a node's file is had that is open with `flags`.
    pub(super) fn near(&self, nodeid: u64, flags: OFlags) -> Near {
        let distance = self.inodes.get(nodeid).map(|node| node.identity.mount.distance);
        match distance {
            // Each write of it is synced.
            _ if flags.intersects(OFlags::SYNC | OFlags::DSYNC) => Near::Never,
            Ok(Distance::Memory) => Near::Memory,
            Ok(distance) if self.is_near(distance) => Near::Cache {
                reads_wait: AtomicBool::new(false),
                writes_unknown: AtomicBool::new(false),
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
            other => other,
        }
    }

    /// # Errors
    ///
    /// [`Errno::WOULD_WAIT`] for a write that is large, goes past the cache or to the disk at once, or is done with
    /// fewer rights than the thread has.
    pub(super) fn check_write_at_once(&self, file: &OpenFile, request: &WriteIn) -> Result<()> {
        let cached = request.fuse_flags & WRITE_CACHE != 0;
        let flags = request.flags as i32;
        let waits = request.size > WRITTEN_AT_ONCE
            || matches!(file.near, Near::Never)
            || request.fuse_flags & WRITE_KILL_SUIDGID != 0
            || !cached && (flags & libc::O_DSYNC != 0 || self.is_direct(request.flags));
        if waits { Err(Errno::WOULD_WAIT) } else { Ok(()) }
    }
}
