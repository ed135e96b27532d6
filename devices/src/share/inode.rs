//! The files that the guest knows, by node id.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, PoisonError, RwLock};

use rustix::fs::Statx;

use super::Share;
use super::table::Table;
use crate::fuse::abi::ROOT_ID;
use crate::fuse::{Errno, Result};

/// Which file it is, on the host. The number of the mount is part of it: the same directory, mounted in two
/// places, is two nodes, because the guest has to see each of them in its own place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Key {
    dev: (u32, u32),
    ino: u64,
    mount: u64,
}

impl Key {
    pub(super) fn of(attributes: &Statx) -> Self {
        Self {
            dev: (attributes.stx_dev_major, attributes.stx_dev_minor),
            ino: attributes.stx_ino,
            mount: attributes.stx_mnt_id,
        }
    }

    /// Whether the two are on different mounts.
    pub(super) fn crosses_mount(&self, other: &Key) -> bool {
        self.dev != other.dev || self.mount != other.mount
    }
}

/// A file the guest knows.
pub(super) struct Inode {
    /// Holds the file, so its inode number is not used again while it is in the table.
    fd: OwnedFd,
    pub(super) nodeid: u64,
    pub(super) key: Key,
    /// `S_IFMT` part of the mode, which never changes.
    pub(super) kind: u32,
    /// In a file system that is an interface of the host's kernel (see [`super::pseudo`]): it is there to be
    /// seen, and nothing can be done with it.
    pub(super) closed: bool,
    /// How many lookups the guest has to give back. Raised under at least the read lock of the table,
    /// lowered under its write lock.
    lookups: AtomicU64,
}

impl Inode {
    /// `EACCES` for what is an interface of the host's kernel.
    pub(super) fn check_open_to_guests(&self) -> Result<()> {
        if self.closed { Err(Errno::ACCES) } else { Ok(()) }
    }

    /// `EACCES` for what is neither a regular file nor a directory: nothing else is ever opened.
    pub(super) fn check_openable(&self) -> Result<()> {
        self.check_open_to_guests()?;
        match self.kind {
            libc::S_IFREG | libc::S_IFDIR => Ok(()),
            _ => Err(Errno::ACCES),
        }
    }

    pub(super) fn is_directory(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub(super) fn is_regular(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    fn count_lookup(&self) {
        // Saturates: a counter that wrapped would free a node that is in use.
        let _ = self.lookups.fetch_update(Relaxed, Relaxed, |count| count.checked_add(1));
    }
}

/// The file of a node, for the length of one operation. A descriptor that may be `O_PATH` and may be one
/// the guest has open: good for what takes "the file behind a descriptor", not for I/O.
pub(super) struct Held(Arc<Inode>);

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.fd.as_fd()
    }
}

impl Share {
    /// The file of a node.
    ///
    /// # Errors
    ///
    /// `ESTALE` when the host no longer has it.
    pub(super) fn file(&self, inode: &Arc<Inode>) -> Result<Held> {
        Ok(Held(inode.clone()))
    }
}

struct State {
    table: Table<Inode>,
    by_key: HashMap<Key, u64>,
}

/// All of them.
pub(super) struct Inodes {
    state: RwLock<State>,
}

impl Inodes {
    /// A table that has only the root.
    pub(super) fn new(root: OwnedFd, attributes: &Statx, most: usize) -> Self {
        let inodes =
            Self { state: RwLock::new(State { table: Table::new(most), by_key: HashMap::new() }) };
        // Cannot fail: the table is empty and has room for at least one. Being the first, it is node 1.
        let _ = inodes.remember(root, attributes, false);
        inodes
    }

    pub(super) fn live(&self) -> usize {
        self.read().table.live()
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The file of a node id.
    ///
    /// # Errors
    ///
    /// `ENOENT` or `ESTALE`.
    pub(super) fn get(&self, nodeid: u64) -> Result<Arc<Inode>> {
        self.read().table.get(nodeid).cloned()
    }

    /// Counts a lookup of the file behind `fd` and returns its node, new or known. `fd` is an `O_PATH`
    /// descriptor; `attributes` are its own. `closed` is [`Inode::closed`] of a new node.
    ///
    /// # Errors
    ///
    /// `ENFILE` when there are too many nodes.
    pub(super) fn remember(
        &self,
        fd: OwnedFd,
        attributes: &Statx,
        closed: bool,
    ) -> Result<Arc<Inode>> {
        let key = Key::of(attributes);
        {
            let state = self.read();
            if let Some(inode) = state.known(&key) {
                inode.count_lookup();
                return Ok(inode.clone());
            }
        }
        let mut state = self.write();
        if let Some(inode) = state.known(&key) {
            inode.count_lookup();
            return Ok(inode.clone());
        }
        let inode = state.table.insert(|nodeid| Inode {
            fd,
            nodeid,
            key,
            kind: u32::from(attributes.stx_mode) & libc::S_IFMT,
            closed,
            lookups: AtomicU64::new(1),
        })?;
        state.by_key.insert(key, inode.nodeid);
        Ok(inode)
    }

    /// Gives `count` lookups back. The root stays; a count that is too large is one that is exact; a node
    /// that is not there is nothing. Says whether the node is gone now.
    pub(super) fn forget(&self, nodeid: u64, count: u64) -> bool {
        if nodeid == ROOT_ID {
            return false;
        }
        let removed = {
            let mut state = self.write();
            let Ok(inode) = state.table.get(nodeid) else {
                return false;
            };
            let left = inode.lookups.load(Relaxed).saturating_sub(count);
            inode.lookups.store(left, Relaxed);
            if left > 0 {
                return false;
            }
            let key = inode.key;
            state.by_key.remove(&key);
            state.table.remove(nodeid)
        };
        // Closes the descriptor, outside the lock.
        drop(removed);
        true
    }

    /// Forgets everything but the root.
    pub(super) fn clear(&self) {
        let removed = {
            let mut state = self.write();
            state.by_key.retain(|_, nodeid| *nodeid == ROOT_ID);
            state.table.drain(|inode| inode.nodeid == ROOT_ID)
        };
        drop(removed);
    }
}

impl State {
    fn known(&self, key: &Key) -> Option<&Arc<Inode>> {
        self.by_key.get(key).and_then(|nodeid| self.table.get(*nodeid).ok())
    }
}
