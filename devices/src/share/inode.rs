//! The files that the guest knows, by node id.
//!
//! A node holds no descriptor. It is an [`Identity`], by which the same file is found to be the same node,
//! and by which [`Share::file`](super::Share::file) gets at the file when there is something to do with it.

use std::borrow::Borrow;
use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::hash::{Hash, Hasher};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use rustix::fs::{Statx, StatxFlags, StatxTimestamp};

use super::budget::{Budget, Permit};
use super::file_handle::FileHandle;
use super::mount::{Mount, Place};
use super::sys;
use super::table::{Numbered, Numbers, Table, shrink};
use crate::fuse::{Errno, Result};
use crate::sync::lock;

/// So many nodes are worth going through the heap for: about a megabyte.
const MANY: usize = 8192;

/// Which file it is, on the host. The mount is part of it: the same directory, mounted in two places, is two
/// nodes, because the guest has to see each of them in its own place.
#[derive(Debug)]
pub(super) struct Identity {
    pub(super) mount: Arc<Mount>,
    pub(super) file: Which,
}

/// Which file of a mount.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) enum Which {
    /// The one with that handle.
    Handle(FileHandle),
    /// The one that looks like that, where there are no handles.
    Named(Box<Named>),
}

/// What tells a file from all others without a handle, and the name under which it is reached.
#[derive(Debug)]
pub(super) struct Named {
    ino: u64,
    /// What else tells files apart, in one, because there may be a million of these: the device number; `S_IFMT` of
    /// the mode, so that a number which is used again for a FIFO is never opened as what it was; and the birth time,
    /// where there is one that never changes, so that it is not for another file either.
    stamp: u64,
    /// Where it was found last. None when it has no name that is known.
    place: Mutex<Option<Place>>,
}

impl Named {
    fn of(stat: &Statx, mount: &Mount) -> Self {
        // On overlayfs a file is born again when it is copied up.
        let has_birth = stat.stx_mask & StatxFlags::BTIME.bits() != 0 && !mount.overlay;
        Self {
            ino: stat.stx_ino,
            stamp: device_and_kind(stat) ^ if has_birth { nanoseconds(&stat.stx_btime) } else { 0 },
            place: Mutex::new(None),
        }
    }

    fn key(&self) -> impl Hash + Eq + use<> {
        (self.ino, self.stamp)
    }

    pub(super) fn place(&self) -> Option<Place> {
        lock(&self.place).clone()
    }

    /// It has just been found there.
    pub(super) fn found_at(&self, parent: u64, name: &CStr) {
        let mut place = lock(&self.place);
        if !place.as_ref().is_some_and(|place| place.is(parent, name)) {
            *place = Some(Place::new(parent, name));
        }
    }

    /// It is no longer there.
    pub(super) fn gone_from(&self, parent: u64, name: &CStr) {
        let mut place = lock(&self.place);
        if place.as_ref().is_some_and(|place| place.is(parent, name)) {
            *place = None;
        }
    }
}

/// The device number as the kernel keeps it, 12 bits of the major and 20 of the minor one, and above them the kind.
fn device_and_kind(stat: &Statx) -> u64 {
    let device = (stat.stx_dev_major << 20) | (stat.stx_dev_minor & 0xf_ffff);
    (u64::from(stat.stx_mode & libc::S_IFMT as u16) << 32) | u64::from(device)
}

/// Nanoseconds since 1970. Wraps after 584 years, which tells no two files less apart.
fn nanoseconds(time: &StatxTimestamp) -> u64 {
    (time.tv_sec as u64).wrapping_mul(1_000_000_000).wrapping_add(time.tv_nsec.into())
}

impl PartialEq for Named {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Named {}

impl Hash for Named {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.key().hash(state);
    }
}

impl Identity {
    /// That of the file behind a descriptor, whose attributes are `stat`.
    pub(super) fn of(mount: Arc<Mount>, fd: impl std::os::fd::AsFd, stat: &Statx) -> Self {
        let handle = mount.has_handles().then(|| FileHandle::of(fd));
        let file = match handle {
            Some(Ok(handle)) => Which::Handle(handle),
            _ => Which::Named(Box::new(Named::of(stat, &mount))),
        };
        Self { mount, file }
    }

    pub(super) fn named(&self) -> Option<&Named> {
        match &self.file {
            Which::Named(named) => Some(named),
            Which::Handle(_) => None,
        }
    }

    /// Whether a file of these attributes is the one, as far as can be told without a handle.
    pub(super) fn looks_like(&self, stat: &Statx) -> bool {
        self.mount.has(stat)
            && self.named().is_some_and(|named| *named == Named::of(stat, &self.mount))
    }
}

impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.mount, &other.mount) && self.file == other.file
    }
}

impl Eq for Identity {}

impl Hash for Identity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        Arc::as_ptr(&self.mount).hash(state);
        self.file.hash(state);
    }
}

/// A file the guest knows. There may be a million of them: see that it stays small.
#[derive(Debug)]
pub(super) struct Inode {
    pub(super) nodeid: u64,
    /// How many lookups the guest has to give back. Raised under at least the read lock of the table,
    /// lowered under its write lock.
    lookups: AtomicU64,
    pub(super) identity: Identity,
    /// `S_IFMT` part of the mode, which never changes.
    pub(super) kind: u32,
}

impl Inode {
    /// `EACCES` for what is an interface of the host's kernel.
    pub(super) fn check_open_to_guests(&self) -> Result<()> {
        if self.identity.mount.closed { Err(Errno::ACCES) } else { Ok(()) }
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

impl Numbered for Inode {
    fn number(&self) -> &u64 {
        &self.nodeid
    }
}

/// Stands in a set under its identity, which is not stored a second time.
#[derive(Debug)]
struct ByIdentity(Arc<Inode>);

impl Borrow<Identity> for ByIdentity {
    fn borrow(&self) -> &Identity {
        &self.0.identity
    }
}

impl PartialEq for ByIdentity {
    fn eq(&self, other: &Self) -> bool {
        self.0.identity == other.0.identity
    }
}

impl Eq for ByIdentity {}

impl Hash for ByIdentity {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.identity.hash(state);
    }
}

struct State {
    table: Table<Inode>,
    by_identity: HashSet<ByIdentity>,
    /// Files that are held open, because nothing else leads to them: those whose last name the guest took
    /// away while it knew them, and may be using. By node id.
    kept: HashMap<u64, Kept>,
}

/// A file that is held open, and the leave to do so.
type Kept = (Arc<OwnedFd>, Permit);

/// All of them.
pub(super) struct Inodes {
    state: RwLock<State>,
    /// How many there may be, the root among them.
    budget: Arc<Budget>,
    /// The node id of the root.
    root: u64,
}

impl Inodes {
    /// A table that has only the root.
    ///
    /// # Errors
    ///
    /// `ENFILE` when `budget` has not even that.
    pub(super) fn new(root: Identity, numbers: Numbers, budget: Arc<Budget>) -> Result<Self> {
        let state =
            State { table: Table::new(numbers), by_identity: HashSet::new(), kept: HashMap::new() };
        let inodes = Self { state: RwLock::new(state), budget, root: numbers.first };
        // The first one has the first number.
        inodes.remember(root, libc::S_IFDIR, None)?;
        Ok(inodes)
    }

    /// The node id of the root.
    pub(super) fn root(&self) -> u64 {
        self.root
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

    /// The node of a file, if the guest knows it.
    pub(super) fn known(&self, identity: &Identity) -> Option<Arc<Inode>> {
        self.read().known(identity).cloned()
    }

    /// Room for one more node. Taken before a file is made, so that there is none that the guest is then not
    /// told of.
    ///
    /// # Errors
    ///
    /// `ENFILE` when there are too many nodes.
    pub(super) fn room(&self) -> Result<Permit> {
        self.budget.take(1)
    }

    /// Counts a lookup of a file and returns its node, new or known. `kind` is the `S_IFMT` part of its mode.
    /// A new one takes `room`; for files that were there before, it is looked for only then.
    ///
    /// # Errors
    ///
    /// `ENFILE` when there are too many nodes.
    pub(super) fn remember(
        &self,
        identity: Identity,
        kind: u32,
        room: Option<Permit>,
    ) -> Result<Arc<Inode>> {
        {
            let state = self.read();
            if let Some(inode) = state.known(&identity) {
                inode.count_lookup();
                return Ok(inode.clone());
            }
        }
        let mut state = self.write();
        if let Some(inode) = state.known(&identity) {
            inode.count_lookup();
            return Ok(inode.clone());
        }
        let mut room = room.map_or_else(|| self.room(), Ok)?;
        let inode = state.table.insert(|nodeid| Inode {
            nodeid,
            lookups: AtomicU64::new(1),
            identity,
            kind,
        })?;
        room.spend(1)?;
        state.by_identity.insert(ByIdentity(inode.clone()));
        Ok(inode)
    }

    /// Gives `count` lookups back. The root stays; a count that is too large is one that is exact; a node
    /// that is not there is nothing.
    ///
    /// True if the node is gone now. When there are far fewer than there were, their memory goes back to the
    /// host.
    pub(super) fn forget(&self, nodeid: u64, count: u64) -> bool {
        if nodeid == self.root {
            return false;
        }
        let (removed, shrunk) = {
            let mut state = self.write();
            let Ok(inode) = state.table.get(nodeid) else {
                return false;
            };
            let left = inode.lookups.load(Relaxed).saturating_sub(count);
            inode.lookups.store(left, Relaxed);
            if left > 0 {
                return false;
            }
            let before = state.by_identity.capacity();
            let removed = state.remove(nodeid);
            self.budget.give_back(1);
            (removed, before >= MANY && state.by_identity.capacity() < before)
        };
        // Closes the descriptor of one that was kept, outside the lock.
        drop(removed);
        if shrunk {
            sys::return_free_memory();
        }
        true
    }

    /// Forgets everything but the root.
    pub(super) fn clear(&self) {
        let removed = {
            let mut state = self.write();
            state.by_identity.retain(|ByIdentity(inode)| inode.nodeid == self.root);
            shrink(&mut state.by_identity);
            let kept = std::mem::take(&mut state.kept);
            (state.table.drain(|inode| inode.nodeid == self.root), kept)
        };
        self.budget.give_back(removed.0.len());
        let many = removed.0.len() >= MANY;
        drop(removed);
        if many {
            sys::return_free_memory();
        }
    }

    /// Holds the file of a node open until the node is forgotten. Nothing if it is forgotten already.
    pub(super) fn keep(&self, nodeid: u64, fd: OwnedFd, permit: Permit) {
        let mut state = self.write();
        let before = match state.table.get(nodeid) {
            Ok(_) => state.kept.insert(nodeid, (Arc::new(fd), permit)),
            Err(_) => None,
        };
        drop(state);
        drop(before);
    }

    /// The file of a node that is held open.
    pub(super) fn kept(&self, nodeid: u64) -> Option<Arc<OwnedFd>> {
        let state = self.read();
        state.kept.get(&nodeid).map(|(fd, _)| fd.clone())
    }

    /// Whether any file is held open.
    pub(super) fn keeps_any(&self) -> bool {
        !self.read().kept.is_empty()
    }

    /// Whether they take so much memory that forgetting some may give it back, which takes a while.
    pub(super) fn are_many(&self) -> bool {
        self.read().by_identity.capacity() >= MANY
    }

    /// Holds it no longer: it has a name again.
    pub(super) fn release(&self, nodeid: u64) {
        if self.kept(nodeid).is_some() {
            let released = self.write().kept.remove(&nodeid);
            drop(released);
        }
    }

    /// Nodes that there is room for without asking for memory.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        let state = self.read();
        state.table.capacity().max(state.by_identity.capacity())
    }
}

impl Drop for Inodes {
    fn drop(&mut self) {
        self.budget.give_back(self.live());
    }
}

impl State {
    fn known(&self, identity: &Identity) -> Option<&Arc<Inode>> {
        self.by_identity.get(identity).map(|ByIdentity(inode)| inode)
    }

    fn remove(&mut self, nodeid: u64) -> Option<(Arc<Inode>, Option<Kept>)> {
        let inode = self.table.remove(nodeid)?;
        self.by_identity.remove(&inode.identity);
        shrink(&mut self.by_identity);
        Some((inode, self.kept.remove(&nodeid)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::testing::Guest;
    use crate::share::host;

    #[test]
    fn a_node_is_small() {
        assert_eq!((size_of::<Inode>(), size_of::<Named>()), (56, 40));
    }

    #[test]
    fn a_number_that_is_used_again_for_another_kind_is_another_file() {
        let guest = Guest::new();
        let root = guest.share.inodes.get(guest.share.inodes.root()).unwrap();
        let mount = &root.identity.mount;
        std::fs::write(guest.path().join("file"), "").unwrap();
        let stat = host::stat(std::fs::File::open(guest.path().join("file")).unwrap()).unwrap();
        let (mut fifo, mut moved) = (stat, stat);
        fifo.stx_mode = libc::S_IFIFO as u16 | 0o600;
        moved.stx_dev_minor ^= 1;
        assert_eq!(Named::of(&stat, mount), Named::of(&stat, mount));
        assert_ne!(Named::of(&stat, mount), Named::of(&fifo, mount));
        assert_ne!(Named::of(&stat, mount), Named::of(&moved, mount));
    }
}
