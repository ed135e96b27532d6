//! From a node to its file.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex};

use super::handle::Handle;
use super::inode::{Inode, Which};
use super::mount::{Mount, Place};
use super::{Share, host};
use crate::fuse::{Errno, Result};
use crate::sync::lock;

/// The file of a node, for the length of one operation. A descriptor that may be `O_PATH` and may be one
/// the guest has open: good for what takes "the file behind a descriptor", not for I/O.
pub(super) enum Held {
    /// Opened for this operation.
    Own(OwnedFd),
    /// The root, a file without a name, a directory used lately.
    Shared(Arc<OwnedFd>),
    /// The guest has it open.
    Handle(Arc<Handle>),
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Own(fd) => fd.as_fd(),
            Self::Shared(fd) => fd.as_fd(),
            Self::Handle(handle) => handle.as_fd(),
        }
    }
}

/// The directories that were reached by name lately: whoever is in one is likely to want something in it
/// next. Only of the mount that the share holds in any case, and only directories: what the host unmounts or
/// deletes is to be gone.
#[derive(Default)]
pub(super) struct Directories {
    /// By node id, the one used last at the end.
    recent: Mutex<Vec<(u64, Arc<OwnedFd>)>>,
}

impl Directories {
    /// So many: the depth of a tree and some neighbours. They are few enough to look through.
    pub(super) const MOST: usize = 64;

    fn get(&self, nodeid: u64) -> Option<Arc<OwnedFd>> {
        let mut recent = lock(&self.recent);
        let at = recent.iter().rposition(|(known, _)| *known == nodeid)?;
        let (_, rest) = recent.split_at_mut_checked(at)?;
        rest.rotate_left(1);
        recent.last().map(|(_, fd)| fd.clone())
    }

    fn put(&self, nodeid: u64, fd: Arc<OwnedFd>) {
        let mut recent = lock(&self.recent);
        let known = recent.iter().any(|(known, _)| *known == nodeid);
        let oldest = (recent.len() >= Self::MOST && !known).then(|| recent.remove(0));
        if !known {
            recent.push((nodeid, fd));
        }
        drop(recent);
        drop(oldest);
    }

    /// Lets go of one.
    pub(super) fn forget(&self, nodeid: u64) {
        let mut recent = lock(&self.recent);
        let at = recent.iter().position(|(known, _)| *known == nodeid);
        let forgotten = at.map(|at| recent.remove(at));
        drop(recent);
        drop(forgotten);
    }

    /// Lets go of all.
    pub(super) fn clear(&self) {
        drop(std::mem::take(&mut *lock(&self.recent)));
    }

    #[cfg(test)]
    pub(super) fn live(&self) -> usize {
        lock(&self.recent).len()
    }
}

/// The longest path that is resolved at a time, in bytes; `PATH_MAX` of linux/limits.h counts a NUL.
const PATH: usize = 4095;

/// What a name that is gone, or is something else by now, means for the node that had it.
fn stale(error: Errno) -> Errno {
    match error {
        Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV => Errno::STALE,
        other => other,
    }
}

impl Share {
    /// The file of a node.
    ///
    /// By what is open anyway, else by its file handle, else by the name where it was found last, if that is
    /// still the file that it was.
    ///
    /// # Errors
    ///
    /// `ESTALE` when it is not found: the host has deleted it, unmounted it or (without handles) moved it. A
    /// Linux guest then looks its name up anew.
    pub(super) fn file(&self, inode: &Arc<Inode>) -> Result<Held> {
        match self.held(inode) {
            Some(held) => Ok(held),
            None => self.reach(inode),
        }
    }

    /// The file of a node, if it is open.
    fn held(&self, inode: &Inode) -> Option<Held> {
        if inode.nodeid == self.inodes.root() {
            return Some(Held::Shared(self.root.clone()));
        }
        if let Some(handle) = self.handles.of_node(inode.nodeid) {
            return Some(Held::Handle(handle));
        }
        if let Some(fd) = self.inodes.kept(inode.nodeid) {
            return Some(Held::Shared(fd));
        }
        if !inode.is_directory() {
            return None;
        }
        self.directories.get(inode.nodeid).map(Held::Shared)
    }

    /// Goes up from the node to the first that is open or has a handle in a mount that is, and down again.
    ///
    /// What the guest makes of its directories decides how far that is, so nothing here recurses, and no
    /// more than two descriptors are open at a time.
    fn reach(&self, inode: &Arc<Inode>) -> Result<Held> {
        let mut way: Vec<(Arc<Inode>, Place)> = Vec::new();
        let mut node = inode.clone();
        let base = loop {
            if let Some(held) = self.held(&node) {
                break held;
            }
            let mount = &node.identity.mount;
            let place = match &node.identity.file {
                Which::Handle(handle) => match mount.own() {
                    Some(own) => break Held::Own(handle.open(own)?),
                    None => mount.place(),
                },
                Which::Named(named) => named.place(),
            };
            let place = place.ok_or(Errno::STALE)?;
            let parent = self.inodes.get(place.parent()).map_err(|_| Errno::STALE)?;
            way.push((node, place));
            // The host may have moved directories so that places that were noted at different times make a
            // ring.
            if way.len() > self.inodes.live() {
                return Err(Errno::STALE);
            }
            node = parent;
        };
        let mut here = Here { file: base, names: Vec::new() };
        let mut above = node;
        for (node, place) in way.iter().rev() {
            let crosses = !node.identity.mount.is_one_with(&above.identity.mount);
            above = node.clone();
            match &node.identity.file {
                Which::Named(_) if crosses => here.cross(place.name())?,
                Which::Named(_) => here.step(place.name())?,
                Which::Handle(handle) => {
                    here.resolve()?;
                    let mount =
                        node.identity.mount.enter(&here.file, place.name()).map_err(stale)?;
                    here.file = Held::Own(handle.open(mount)?);
                }
            }
        }
        here.resolve()?;
        let found = here.file;
        if inode.identity.named().is_none() || way.is_empty() {
            return Ok(found);
        }
        if !inode.identity.looks_like(&host::stat(&found)?) {
            return Err(Errno::STALE);
        }
        match found {
            Held::Own(fd) if inode.is_directory() && inode.identity.mount.is_own() => {
                let fd = Arc::new(fd);
                self.directories.put(inode.nodeid, fd.clone());
                Ok(Held::Shared(fd))
            }
            found => Ok(found),
        }
    }

    /// A descriptor, open for reading, of each file system that the guest knows nodes of and that can be
    /// reached: what SYNCFS is to sync.
    pub(super) fn file_systems(&self) -> Vec<OwnedFd> {
        self.mounts.all().iter().filter_map(|mount| self.open_root_of(mount).ok()).collect()
    }

    fn open_root_of(&self, mount: &Mount) -> Result<OwnedFd> {
        match mount.place() {
            None => self.host.reopen(&self.root, rustix::fs::OFlags::RDONLY),
            Some(place) => {
                let parent = self.inodes.get(place.parent()).map_err(|_| Errno::STALE)?;
                mount.enter(self.file(&parent)?, place.name())
            }
        }
    }
}

/// How far the way down has come: `names` below `file`.
struct Here {
    file: Held,
    names: Vec<u8>,
}

impl Here {
    /// One name further. As many as a path may have are resolved at a time.
    fn step(&mut self, name: &std::ffi::CStr) -> Result<()> {
        if self.names.len() + 1 + name.count_bytes() > PATH {
            self.resolve()?;
        }
        if !self.names.is_empty() {
            self.names.push(b'/');
        }
        self.names.extend_from_slice(name.to_bytes());
        Ok(())
    }

    /// Into what is mounted under a name.
    fn cross(&mut self, name: &std::ffi::CStr) -> Result<()> {
        self.resolve()?;
        self.file = Held::Own(host::find(&self.file, name).map_err(stale)?);
        Ok(())
    }

    /// Within one mount. What the host has mounted on the way since is not what was found there, and whoever serves it
    /// may never answer.
    fn resolve(&mut self) -> Result<()> {
        if !self.names.is_empty() {
            self.file = Held::Own(host::find_path(&self.file, &self.names).map_err(stale)?);
            self.names.clear();
        }
        Ok(())
    }
}
