//! The share: a host directory, served so that the guest cannot leave it.
//!
//! It knows no virtio: [`Share`] implements [`FileSystem`](crate::fuse::FileSystem), and anything that
//! speaks FUSE may stand in front of it.
//!
//! What keeps a guest inside:
//!
//! - It never names a path. An operation is on a node id, a number in a table of files that LOOKUPs found
//!   ([`inode`](self)), or on one name in such a directory.
//! - A file handle of the host's is as good as the file. They are made and kept here ([`file_handle`](self)),
//!   and none ever comes from the guest.
//! - Every step from a directory to an entry is one `openat2` with `RESOLVE_BENEATH`, `RESOLVE_NO_SYMLINKS`
//!   and `RESOLVE_NO_MAGICLINKS` ([`host`](self)). No `..` is ever resolved, so a directory that the host
//!   moves out of the share does not become a way out.
//! - A file is opened for I/O from the `O_PATH` descriptor that was found, not by name, and only if it is a
//!   regular file or a directory: no FIFO that blocks, no device.
//! - What an interface of the host's kernel has mounted below (proc, sysfs and the like) can be seen and not
//!   entered ([`pseudo`](self)): a file there may be this very process's memory.
//! - The flags of an OPEN are an allow-list.

mod acl;
mod attributes;
mod budget;
mod changes;
mod common;
mod control;
mod direct;
mod directory;
mod file;
mod file_handle;
mod filesystem;
mod handle;
mod host;
mod identity;
mod ids;
mod inode;
mod locks;
mod mount;
mod namespace;
mod near;
mod options;
mod pseudo;
mod reach;
mod sys;
mod table;
mod unopened;
mod watch;
mod xattr;

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat};

pub use ids::{
    GidMap, GuestGid, GuestUid, HostGid, HostUid, Id, IdMap, IdMapError, IdRange, OVERFLOW, UidMap,
};
pub use options::{
    CachePolicy, DaxPolicy, DirectPolicy, LockLimits, LockPolicy, Options, Timeouts, XattrPolicy,
};

pub use watch::{Batch, Happened, Item, Watch, WatchLimits};

pub use common::Common;
pub(crate) use common::NUMBER_BITS;
pub use pseudo::is_pseudo;

use crate::dax::Policy;
use budget::{Budget, Permit};
use changes::Changes;
use handle::Handles;
use host::Host;
use inode::{Identity, Inodes};
use locks::Locks;
use mount::{Distance, Mounts};
use near::Slow;
use reach::Directories;

use table::Numbers;
use unopened::Unopened;

/// A host directory as a file system.
///
/// The files are opened through the `/proc/self/fd` of the process that calls [`Share::new`]: a process
/// that forks afterwards cannot serve the share.
///
/// Modes come out as the guest asked when the process's umask is 0; set it before the first request. (The
/// guest applies the umask of its own process itself.)
pub struct Share {
    options: Options,
    host: Host,
    root: Arc<OwnedFd>,
    mounts: Mounts,
    inodes: Inodes,
    handles: Handles,
    /// Of the files that can be mapped, which are. `None`: all.
    mapped: Option<Arc<Policy>>,
    locks: Locks,
    changes: Changes,
    numbers: Numbers,
    /// Which of the shares of its session it is.
    index: u32,
    /// For the descriptors that it holds itself.
    _own_descriptors: Permit,
    directories: Directories,
    slow: Slow,
    /// With [`CachePolicy::Watch`], where the host can.
    watch: Option<Arc<Watch>>,
    unopened: Unopened,
    /// Descriptors that are held for the guest: handles, files without a name, locks.
    descriptors: Arc<Budget>,
    /// Bytes of host memory that requests use while they are served: listings, values of attributes.
    buffers: Arc<Budget>,
    switch_identity: bool,
    /// The ids of the process.
    own: (HostUid, HostGid),
}

impl Share {
    /// Opens the directory.
    ///
    /// # Errors
    ///
    /// The host's, also when the directory is in proc, sysfs or another interface of its kernel; when the directory or `/proc/self/fd` cannot be opened; `ENOSYS` when the host has no
    /// `openat2` (Linux 5.6).
    pub fn new(options: Options) -> io::Result<Self> {
        Self::among(&Common::new(&options), 0, options)
    }

    /// The same, as one of several shares of a session, which have `common` in common. Each has an `index` of its
    /// own, from 1 to 2^20 - 1, which is in its numbers. Limits on nodes, descriptors and memory are those of
    /// `common`; so is the room in the window.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new); `ENFILE` when the others have left no descriptors.
    pub fn among(common: &Common, index: u32, options: Options) -> io::Result<Self> {
        // The directory, the same open for reading, /proc/self/fd, and one to spare.
        const OWN: usize = 4;
        let own_descriptors = common.descriptors.take(if index == 0 { 0 } else { OWN })?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let found_at = options.found_at.as_ref().unwrap_or(&options.directory);
        let root = openat(CWD, found_at, flags, Mode::empty())?;
        let host = Host::new()?;
        if pseudo::is_pseudo(&root)? {
            return Err(io::Error::other(
                "it is an interface of the host's kernel (proc, sysfs, …) and is never shared",
            ));
        }
        let attributes = host::stat(&root)?;
        if options.acl && options.xattr == XattrPolicy::Off {
            return Err(io::Error::other(
                "its ACLs are extended attributes; leave acl or xattr=off",
            ));
        }
        if options.acl {
            acl::check(&root, &host)?;
        }
        // So that a host without openat2 is found out now and not by the guest.
        host.reopen(&root, OFlags::PATH)?;
        rustix::fs::openat2(&root, ".", flags, Mode::empty(), rustix::fs::ResolveFlags::BENEATH)?;
        let mounts = Mounts::new(&host, &root, &attributes, options.file_handles)?;
        let identity = Identity::of(mounts.root().clone(), &root, &attributes);
        let numbers = Numbers::of(index);
        let watch = Self::start_watch(&options, index);
        let descriptors = common.descriptors.clone();
        Ok(Self {
            switch_identity: options.switches_identity(),
            own: identity::own(),
            root: Arc::new(root),
            mounts,
            inodes: Inodes::new(identity, numbers, common.nodes.clone())?,
            handles: Handles::new(common.handles.clone(), numbers, descriptors.clone()),
            directories: Directories::default(),
            slow: Slow::default(),
            watch,
            unopened: Unopened::default(),
            descriptors,
            buffers: common.buffers.clone(),
            mapped: common.mapped.clone(),
            locks: Locks::new(options.locks, options.lock_limits().owners, common)?,
            changes: Changes::new(!options.read_only),
            numbers,
            index,
            _own_descriptors: own_descriptors,
            host,
            options,
        })
    }

    /// What it was made with.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// With [`CachePolicy::Watch`], the watch over it: for whoever talks to the agent in the guest.
    pub fn watch(&self) -> Option<&Arc<Watch>> {
        self.watch.as_ref()
    }

    fn watch_statistics(&self) -> Vec<(&'static str, u64)> {
        match &self.watch {
            Some(watch) => watch.statistics(),
            None if self.options.cache == CachePolicy::Watch => vec![("watch_live", 0)],
            None => Vec::new(),
        }
    }

    fn start_watch(options: &Options, index: u32) -> Option<Arc<Watch>> {
        // The agent reaches one file system by a tag, and not what is in a tree of many.
        if options.cache != CachePolicy::Watch || index != 0 {
            return None;
        }
        match Watch::new(options.watch_limits, options.alone) {
            Ok(watch) => Some(Arc::new(watch)),
            Err(error) => {
                let directory = options.directory.display();
                log::warn!(
                    "{directory}: cache=watch: {error}; this is cache=auto (fanotify, Linux 5.13)"
                );
                None
            }
        }
    }

    /// How many nodes the guest knows, the root among them.
    pub fn live_inodes(&self) -> usize {
        self.inodes.live()
    }

    /// How many files and directories the guest has open.
    pub fn live_handles(&self) -> usize {
        self.handles.live()
    }

    /// Device and inode number of an open file.
    pub(crate) fn file_number(&self, nodeid: u64, fh: u64) -> Option<(u64, u64)> {
        let stat = rustix::fs::fstat(&*self.handles.get(nodeid, fh).ok()?).ok()?;
        Some((stat.st_dev, stat.st_ino))
    }

    /// How many owners of POSIX locks there are, each with a file descriptor.
    pub fn live_lock_owners(&self) -> usize {
        self.locks.owners()
    }

    /// How many requests wait for a lock, each with a thread.
    pub fn live_lock_waiters(&self) -> usize {
        self.locks.waiting()
    }

    /// How many descriptors are held for the guest.
    pub fn live_descriptors(&self) -> usize {
        self.descriptors.used()
    }
}

/// Whether the files of a directory are in memory or on disks of this machine, so that to ask for their names and
/// attributes takes no other machine or process.
///
/// # Errors
///
/// The host's.
pub fn is_near(directory: impl AsFd) -> io::Result<bool> {
    Ok(Distance::of(rustix::fs::fstatfs(directory)?.f_type as u32) != Distance::Unknown)
}

impl Drop for Share {
    /// A request that was being served when the session ended may have been promised room in the window since.
    fn drop(&mut self) {
        if let Some(mapped) = &self.mapped {
            mapped.all_forgotten(self.numbers.first..=self.numbers.last);
        }
    }
}

/// `AT_EMPTY_PATH` without following: "the file this descriptor is of".
const ITSELF: AtFlags = AtFlags::EMPTY_PATH.union(AtFlags::SYMLINK_NOFOLLOW);

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
