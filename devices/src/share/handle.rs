//! What the guest has open, by file handle.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use super::budget::{Budget, Permit};
use super::direct::Direct;
use super::directory::Position;
use super::near::Near;
use super::table::{Numbered, Numbers, Table};
use crate::fuse::{Errno, Result};

/// An open regular file.
pub(super) struct OpenFile {
    pub(super) fd: OwnedFd,
    pub(super) writable: bool,
    pub(super) direct: Direct,
    pub(super) near: Near,
}

impl OpenFile {
    pub(super) fn new(fd: OwnedFd, writable: bool, near: Near) -> Self {
        Self { fd, writable, direct: Direct::default(), near }
    }
}

/// An open directory.
pub(super) struct OpenDirectory {
    pub(super) fd: OwnedFd,
    /// Where the listing stands. Locked while the descriptor is being read: the position belongs to it.
    pub(super) position: Mutex<Position>,
}

/// What a guest sends that has opened nothing: no handle has this number.
pub(super) const NONE: u64 = 0;

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
    closed: AtomicBool,
    _room: Room,
}

impl Numbered for Handle {
    fn number(&self) -> &u64 {
        &self.fh
    }
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

impl Handle {
    /// A directory that the guest uses without having opened it. It is in no table.
    pub(super) fn of_directory(nodeid: u64, fd: OwnedFd, room: Room) -> Self {
        let kind = Kind::Directory(OpenDirectory { fd, position: Mutex::default() });
        Self { nodeid, fh: NONE, kind, closed: AtomicBool::new(false), _room: room }
    }

    pub(super) fn nodeid(&self) -> u64 {
        self.nodeid
    }

    fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Whether it is in the table no more, and stays open only until the requests that have it end.
    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::SeqCst)
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

struct State {
    table: Table<Handle>,
    /// Node and handle.
    by_node: BTreeSet<(u64, u64)>,
}

/// All of them.
pub(super) struct Handles {
    state: RwLock<State>,
    slots: Arc<Budget>,
    descriptors: Arc<Budget>,
}

/// Room for one more. Taken before its file is made, opened or truncated, so that nothing is done to a file that the
/// guest is then told it could not open.
pub(super) struct Room {
    _slot: Permit,
    _descriptor: Permit,
}

impl Handles {
    /// A table, whose handles take one of `slots` and one of `descriptors` each.
    pub(super) fn new(slots: Arc<Budget>, numbers: Numbers, descriptors: Arc<Budget>) -> Self {
        let state = State { table: Table::new(numbers), by_node: BTreeSet::new() };
        Self { state: RwLock::new(state), slots, descriptors }
    }

    /// # Errors
    ///
    /// `ENFILE` when too many are open.
    pub(super) fn room(&self) -> Result<Room> {
        Ok(Room { _slot: self.slots.take(1)?, _descriptor: self.descriptors.take(1)? })
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn live(&self) -> usize {
        self.read().table.live()
    }

    fn insert(&self, nodeid: u64, kind: Kind, room: Room) -> Result<u64> {
        let mut state = self.write();
        let handle = state.table.insert(|fh| Handle {
            nodeid,
            fh,
            kind,
            closed: AtomicBool::new(false),
            _room: room,
        })?;
        state.by_node.insert((nodeid, handle.fh));
        Ok(handle.fh())
    }

    /// Any handle of a node.
    pub(super) fn of_node(&self, nodeid: u64) -> Option<Arc<Handle>> {
        let state = self.read();
        let (_, fh) = *state.by_node.range((nodeid, 0)..=(nodeid, u64::MAX)).next()?;
        state.table.get(fh).ok().cloned()
    }

    /// # Errors
    ///
    /// `ENFILE` when there are no numbers any more.
    pub(super) fn add_file(&self, nodeid: u64, file: OpenFile, room: Room) -> Result<u64> {
        self.insert(nodeid, Kind::File(file), room)
    }

    /// # Errors
    ///
    /// As [`add_file`](Self::add_file).
    pub(super) fn add_directory(&self, nodeid: u64, fd: OwnedFd, room: Room) -> Result<u64> {
        let position = Mutex::default();
        self.insert(nodeid, Kind::Directory(OpenDirectory { fd, position }), room)
    }

    /// The handle `fh` of node `nodeid`.
    ///
    /// # Errors
    ///
    /// `EBADF` when there is none, or it is of another node.
    pub(super) fn get(&self, nodeid: u64, fh: u64) -> Result<Arc<Handle>> {
        match self.read().table.get(fh) {
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
            let mut state = self.write();
            match state.table.get(fh) {
                Ok(handle) if handle.nodeid == nodeid && is(handle) => {}
                _ => return Err(Errno::BADF),
            }
            state.by_node.remove(&(nodeid, fh));
            state.table.remove(fh)
        };
        closed.iter().for_each(|handle| handle.close());
        drop(closed);
        Ok(())
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        let closed = {
            let mut state = self.write();
            state.by_node.clear();
            state.table.drain(|_| false)
        };
        closed.iter().for_each(|handle| handle.close());
        drop(closed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_table_refuses_until_there_is_room() {
        let slots = Budget::new(2, Errno::NFILE);
        let descriptors = Budget::new(9, Errno::NFILE);
        let handles = Handles::new(slots, Numbers::of(0), descriptors.clone());
        let open = || {
            let room = handles.room()?;
            let file = std::fs::File::open("/dev/null").unwrap();
            handles.add_file(7, OpenFile::new(file.into(), false, Near::Never), room)
        };
        assert_eq!((open(), open(), open()), (Ok(1), Ok(2), Err(Errno::NFILE)));
        assert_eq!((handles.live(), descriptors.used()), (2, 2), "a refusal takes nothing");
        handles.close(7, 2, |_| true).unwrap();
        drop(handles.room().unwrap());
        assert_eq!(open(), Ok(3));
        assert_eq!(handles.live(), 2);
        handles.clear();
        assert_eq!(descriptors.used(), 0);
    }
}
