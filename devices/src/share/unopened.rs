//! What a guest uses without opening it, and for how long it may believe what is there: the share's side of
//! `cache=watch`.
//!
//! A guest whose OPENDIR was answered with `ENOSYS` sends none any more, nor RELEASEDIR: it reads directories by their
//! node ids, and keeps the listings until somebody drops them. The same goes for OPEN, FLUSH and RELEASE; but then
//! nobody hears of the end of who had locked a file, so that is where locks are the guest's own only
//! ([`LockPolicy::Guest`]).

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{OFlags, Statx};

use super::handle::{Handle, NONE, OpenFile};
use super::inode::Inode;
use super::{LockPolicy, Share};
use crate::fuse::abi::FOPEN_KEEP_CACHE;
use crate::fuse::{Caller, Errno, Result};
use crate::sync::lock;

/// The directories and files that were read lately, which are kept open for the next part of them.
#[derive(Default)]
pub(super) struct Unopened {
    /// The guest opens no files any more.
    files: AtomicBool,
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
        self.files.store(false, Relaxed);
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

    /// Whether files may be used without OPEN in this session.
    pub(super) fn may_do_without_open(&self) -> bool {
        self.watch.is_some() && self.options.locks == LockPolicy::Guest
    }

    /// Whether a guest that opens a file may do without from now on, for good.
    pub(super) fn needs_no_open(&self, caller: Caller, file: &Inode) -> bool {
        let watched =
            |watch: &Arc<super::Watch>| !watch.is_agent(caller.pid) && watch.has_data(file.nodeid);
        let needs_none = self.may_do_without_open() && self.watch.as_ref().is_some_and(watched);
        if needs_none {
            self.unopened.files.store(true, Relaxed);
        }
        needs_none
    }

    /// Whether it does.
    pub(super) fn does_without_open(&self) -> bool {
        self.unopened.files.load(Relaxed)
    }

    /// Whether a number is that of no handle because the guest has opened none.
    pub(super) fn is_unopened(&self, fh: u64) -> bool {
        fh == NONE && self.does_without_open()
    }

    /// A handle, or a file that was not opened, for `access`.
    ///
    /// # Errors
    ///
    /// `EBADF` for a handle that is none; the host's; [`Errno::WOULD_WAIT`].
    pub(super) fn open_file(&self, caller: Caller, fh: u64, access: OFlags) -> Result<Arc<Handle>> {
        let nodeid = caller.nodeid;
        if !self.is_unopened(fh) {
            return self.handles.get(nodeid, fh);
        }
        let inode = self.inodes.get(nodeid)?;
        if !inode.is_regular() {
            return Err(Errno::BADF);
        }
        // One that is open for writing is not kept: the host could not run it.
        let writes = access != OFlags::RDONLY;
        if !writes && let Some(handle) = self.unopened.get(nodeid) {
            return Ok(handle);
        }
        inode.check_openable()?;
        let changing = writes.then(|| self.change()).transpose()?;
        let room = self.handles.room()?;
        let file = self.file(&inode)?;
        let fd = match caller.at_once {
            false => self.open_for_guest(&file, access)?,
            true => self.open_at_once(&file, access)?,
        };
        drop(changing);
        let opened = OpenFile::new(fd, writes, self.near(nodeid, access));
        let handle = Arc::new(Handle::of_file(nodeid, opened, room));
        if !writes {
            self.unopened.put(handle.clone());
        }
        Ok(handle)
    }

    /// The same, of a directory or a file.
    ///
    /// # Errors
    ///
    /// As [`open_file`](Self::open_file).
    pub(super) fn open_any(&self, caller: Caller, fh: u64) -> Result<Arc<Handle>> {
        match self.inodes.get(caller.nodeid)?.is_directory() {
            true => self.open_handle(caller.nodeid, fh),
            false => self.open_file(caller, fh, OFlags::RDONLY),
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
    /// A guest that opens nothing keeps listings and data, and drops them when it is told of a change, or else when the
    /// mtime is another. Two changes may have the same one, when the second is soon after the first; what is told of
    /// what has just changed, and is not watched, is therefore another time each time, by less than a microsecond.
    pub(super) fn listing_time(&self, inode: &Inode, stat: &Statx) -> u32 {
        let nanoseconds = stat.stx_mtime.tv_nsec;
        let Some(watch) = &self.watch else { return nanoseconds };
        let keeps = inode.is_directory() || self.does_without_open();
        if !keeps || watch.has_attributes(inode, stat.stx_nlink) {
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
