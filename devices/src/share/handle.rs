//! What the guest has open, by file handle.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::direct::Direct;
use super::directory::Position;
use super::table::Table;
use crate::fuse::{Errno, Result};

/// An open regular file.
pub(super) struct OpenFile {
    pub(super) fd: OwnedFd,
    pub(super) writable: bool,
    pub(super) direct: Direct,
}

/// An open directory.
pub(super) struct OpenDirectory {
    pub(super) fd: OwnedFd,
    /// Where the listing stands. Locked while the descriptor is being read: the position belongs to it.
    pub(super) position: Mutex<Position>,
}

enum Kind {
    File(OpenFile),
    Directory(OpenDirectory),
}

/// A file or directory that the guest has open. It is of one node and of one kind, and a request that names
/// another node or is of the other kind does not find it.
pub(super) struct Handle {
    nodeid: u64,
    fh: u64,
    kind: Kind,
}

impl Handle {
    pub(super) fn fh(&self) -> u64 {
        self.fh
    }

    /// # Errors
    ///
    /// `EBADF` for a directory.
    pub(super) fn file(&self) -> Result<&OpenFile> {
        match &self.kind {
            Kind::File(file) => Ok(file),
            Kind::Directory(_) => Err(Errno::BADF),
        }
    }

    /// # Errors
    ///
    /// `EBADF` for a file.
    pub(super) fn directory(&self) -> Result<&OpenDirectory> {
        match &self.kind {
            Kind::Directory(directory) => Ok(directory),
            Kind::File(_) => Err(Errno::BADF),
        }
    }
}

impl AsFd for Handle {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.kind {
            Kind::File(file) => file.fd.as_fd(),
            Kind::Directory(directory) => directory.fd.as_fd(),
        }
    }
}

/// All of them.
pub(super) struct Handles {
    table: RwLock<Table<Handle>>,
}

impl Handles {
    pub(super) fn new(most: usize) -> Self {
        Self { table: RwLock::new(Table::new(most)) }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Table<Handle>> {
        self.table.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Table<Handle>> {
        self.table.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn live(&self) -> usize {
        self.read().live()
    }

    fn insert(&self, nodeid: u64, kind: Kind) -> Result<u64> {
        let handle = self.write().insert(|fh| Handle { nodeid, fh, kind })?;
        Ok(handle.fh())
    }

    /// # Errors
    ///
    /// `ENFILE` when too many are open.
    pub(super) fn add_file(&self, nodeid: u64, fd: OwnedFd, writable: bool) -> Result<u64> {
        self.insert(nodeid, Kind::File(OpenFile { fd, writable, direct: Direct::default() }))
    }

    /// # Errors
    ///
    /// `ENFILE` when too many are open.
    pub(super) fn add_directory(&self, nodeid: u64, fd: OwnedFd) -> Result<u64> {
        let position = Mutex::default();
        self.insert(nodeid, Kind::Directory(OpenDirectory { fd, position }))
    }

    /// The handle `fh` of node `nodeid`.
    ///
    /// # Errors
    ///
    /// `EBADF` when there is none, or it is of another node.
    pub(super) fn get(&self, nodeid: u64, fh: u64) -> Result<Arc<Handle>> {
        match self.read().get(fh) {
            Ok(handle) if handle.nodeid == nodeid => Ok(handle.clone()),
            _ => Err(Errno::BADF),
        }
    }

    /// Closes a handle of the kind that `is` accepts, when the last request on it ends.
    ///
    /// # Errors
    ///
    /// `EBADF` when there is none of that node and kind.
    pub(super) fn close(
        &self,
        nodeid: u64,
        fh: u64,
        is: impl FnOnce(&Handle) -> bool,
    ) -> Result<()> {
        let closed = {
            let mut table = self.write();
            match table.get(fh) {
                Ok(handle) if handle.nodeid == nodeid && is(handle) => {}
                _ => return Err(Errno::BADF),
            }
            table.remove(fh)
        };
        drop(closed);
        Ok(())
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        let closed = self.write().drain(|_| false);
        drop(closed);
    }
}
