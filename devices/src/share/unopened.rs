//! What a guest uses without opening it, and for how long it may believe what is there: the share's side of
//! `cache=watch`.
//!
//! A guest whose OPENDIR was answered with `ENOSYS` sends none any more, nor RELEASEDIR: it reads directories by their
//! node ids, and keeps the listings until somebody drops them. Files are opened: what a guest may do to a file, by which
//! descriptor and until when, is decided by its OPEN and RELEASE.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{OFlags, Statx};

use super::Share;
use super::handle::{Handle, NONE};
use super::inode::Inode;
use crate::fuse::abi::FOPEN_KEEP_CACHE;
use crate::fuse::{Caller, Result};
use crate::sync::lock;

/// The directories that were read lately, which are kept open for the next part of them.
#[derive(Default)]
pub(super) struct Unopened {
    /// The one used last at the end.
    recent: Mutex<Vec<Arc<Handle>>>,
    /// Counts up.
    stamp: AtomicU32,
}

impl Unopened {
    /// More than processes read at a time.
    const MOST: usize = 32;

    fn get(&self, nodeid: u64) -> Option<Arc<Handle>> {
        let mut recent = lock(&self.recent);
        let at = recent.iter().rposition(|handle| handle.nodeid() == nodeid)?;
        let handle = recent.remove(at);
        recent.push(handle.clone());
        Some(handle)
    }

    fn put(&self, handle: Arc<Handle>) {
        let mut recent = lock(&self.recent);
        let oldest = (recent.len() >= Self::MOST).then(|| recent.remove(0));
        recent.push(handle);
        drop(recent);
        drop(oldest);
    }

    pub(super) fn forget(&self, nodeid: u64) {
        let forgotten = self.get(nodeid).and_then(|_| lock(&self.recent).pop());
        drop(forgotten);
    }

    /// A session begins or ends.
    pub(super) fn clear(&self) {
        drop(std::mem::take(&mut *lock(&self.recent)));
    }
}

/// Two changes within this time may leave the same time stamp behind: a tick of the slowest kernel, twice.
const SAME_TIME: Duration = Duration::from_millis(20);

impl Share {
    /// Watches a directory, whose descriptor is `file`. `true`: what the guest is told of it from now on it may keep.
    pub(super) fn covers(&self, directory: &Inode, file: impl AsFd) -> bool {
        self.watch.as_ref().is_some_and(|watch| watch.cover(&self.host, directory, file))
    }

    /// Whether the guest may do without OPENDIR for good, as it may when somebody drops its listings.
    pub(super) fn needs_no_opendir(&self, directory: &Arc<Inode>) -> Result<bool> {
        match &self.watch {
            Some(_) => Ok(self.covers(directory, &self.file(directory)?)),
            None => Ok(false),
        }
    }

    /// A handle, or a directory that was not opened.
    ///
    /// # Errors
    ///
    /// `EBADF` for a handle that is none.
    pub(super) fn open_handle(&self, nodeid: u64, fh: u64) -> Result<Arc<Handle>> {
        if fh != NONE || self.watch.is_none() {
            return self.handles.get(nodeid, fh);
        }
        let inode = self.directory(nodeid)?;
        let file = self.file(&inode)?;
        self.covers(&inode, &file);
        if let Some(handle) = self.unopened.get(nodeid) {
            return Ok(handle);
        }
        let room = self.handles.room()?;
        let fd = self.open_quietly(&file, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let handle = Arc::new(Handle::of_directory(nodeid, fd, room));
        self.unopened.put(handle.clone());
        Ok(handle)
    }

    /// `FOPEN_*` of a file of which the guest may keep the data that it has. Who opens it for the agent wants them
    /// dropped.
    pub(super) fn kept_data(&self, caller: Caller, inode: &Inode) -> u32 {
        match &self.watch {
            Some(watch) if !watch.is_agent(caller.pid) && watch.has_data(inode.nodeid) => {
                FOPEN_KEEP_CACHE
            }
            _ => 0,
        }
    }

    /// The nanoseconds of a file's mtime, as the guest is told them.
    ///
    /// A guest that opens no directories keeps listings, and drops them when it is told of a change, or else when the
    /// mtime is another. Two changes may have the same one, when the second is soon after the first; what is told of
    /// what has just changed, and is not watched, is therefore another time each time, by less than a microsecond.
    pub(super) fn listing_time(&self, inode: &Inode, stat: &Statx) -> u32 {
        let nanoseconds = stat.stx_mtime.tv_nsec;
        let Some(watch) = &self.watch else { return nanoseconds };
        if !inode.is_directory() || watch.has_attributes(inode, stat.stx_nlink) {
            return nanoseconds;
        }
        let seconds = u64::try_from(stat.stx_mtime.tv_sec).unwrap_or(0);
        let changed = UNIX_EPOCH + Duration::new(seconds, nanoseconds);
        match SystemTime::now().duration_since(changed) {
            Ok(age) if age > SAME_TIME => nanoseconds,
            _ => {
                nanoseconds - nanoseconds % 1000 + self.unopened.stamp.fetch_add(1, Relaxed) % 1000
            }
        }
    }
}
