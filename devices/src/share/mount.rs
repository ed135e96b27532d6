//! The file systems of a share: its own, and what the host has mounted below it.
//!
//! The guest's nodes do not hold what is mounted below: no descriptor stays open there but those of files
//! that the guest has open itself. To reach a node there, its mount is entered anew by the directory and the
//! name where it was found last. So the host can unmount what the guest uses no more, whether or not the
//! guest has forgotten it; the guest's nodes are stale (`ESTALE`) from then on.

use std::collections::HashMap;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, Weak};

use rustix::fs::{OFlags, Statx, fstatfs};

use super::file_handle::FileHandle;
use super::host::{self, Host};
use super::pseudo;
use crate::fuse::{Errno, Result};
use crate::sync::lock;

/// File systems whose handles are good for as long as the file is there, by `f_type` of statfs(2)
/// (linux/magic.h and the file systems' own sources). Others have none, or handles that are only good while
/// the file is in the kernel's memory (FAT, most of FUSE), or that name one layer of several (overlayfs).
const HANDLES_LAST: &[(u32, &str)] = &[
    (0x0000_6969, "nfs"),
    (0x0000_ef53, "ext2, ext3, ext4"),
    (0x0102_1994, "tmpfs"),
    (0x2fc1_2fc1, "zfs"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0xca45_1a4e, "bcachefs"),
    (0xe0f5_e1e2, "erofs"),
    (0xf2f5_2010, "f2fs"),
];

/// `OVERLAYFS_SUPER_MAGIC` of linux/magic.h.
const OVERLAYFS: u32 = 0x794c_7630;

/// File systems whose files are in the memory of this machine, by `f_type`: to read one waits for nothing, but for
/// what was swapped out.
const IN_MEMORY: &[(u32, &str)] = &[(0x0102_1994, "tmpfs"), (0x8584_58f6, "ramfs")];

/// File systems whose files are on disks of this machine, or at least on what it takes for its disks. What a
/// request waits for there is a disk at most, and for most that concern names and attributes not even that. Not
/// overlayfs, which may have layers anywhere.
const ON_DISK: &[(u32, &str)] = &[
    (0x0000_ef53, "ext2, ext3, ext4"),
    (0x2fc1_2fc1, "zfs"),
    (0x5846_5342, "xfs"),
    (0x7371_7368, "squashfs"),
    (0x9123_683e, "btrfs"),
    (0xca45_1a4e, "bcachefs"),
    (0xe0f5_e1e2, "erofs"),
    (0xf2f5_2010, "f2fs"),
];

/// How far away the files of a file system are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Distance {
    /// In this machine's memory.
    Memory,
    /// On its disks.
    Disk,
    /// Not known: another machine or another process may have to answer, and may not. Or all that is changed is waited
    /// for (a mount with `sync`).
    Unknown,
}

/// What is known of writes to the page cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Writes {
    /// The file system may be able to say whether one would have to wait (`RWF_NOWAIT`).
    Asked,
    /// It cannot say so, but waits for little: ext4.
    Short,
    /// They wait for the disks whenever these have too much to do: ZFS.
    Long,
}

impl Writes {
    fn of(kind: u32) -> Self {
        match kind {
            0x0000_ef53 => Self::Short,
            0x2fc1_2fc1 => Self::Long,
            _ => Self::Asked,
        }
    }
}

impl Distance {
    pub(super) fn of(kind: u32) -> Self {
        let is_of = |kinds: &[(u32, &str)]| kinds.iter().any(|(magic, _)| *magic == kind);
        if is_of(IN_MEMORY) {
            Self::Memory
        } else if is_of(ON_DISK) {
            Self::Disk
        } else {
            Self::Unknown
        }
    }
}

/// Where something was found: a name in a directory. Either may be gone by now.
///
/// Where there are no handles, each node has one: the node id of the directory and the name are in one piece.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place(Box<[u8]>);

impl Place {
    pub(super) fn new(parent: u64, name: &CStr) -> Self {
        Self([parent.to_ne_bytes().as_slice(), name.to_bytes_with_nul()].concat().into())
    }

    fn parts(&self) -> Option<(&[u8; 8], &[u8])> {
        self.0.split_first_chunk()
    }

    /// The node id of the directory.
    pub(super) fn parent(&self) -> u64 {
        self.parts().map_or(0, |(parent, _)| u64::from_ne_bytes(*parent))
    }

    pub(super) fn name(&self) -> &CStr {
        self.parts().and_then(|(_, name)| CStr::from_bytes_with_nul(name).ok()).unwrap_or_default()
    }

    pub(super) fn is(&self, parent: u64, name: &CStr) -> bool {
        self.parent() == parent && self.name() == name
    }
}

/// Which mount: its number, and the device number of what is there (subvolumes of btrfs are of one mount and
/// have a device number each; inode numbers mean nothing without it).
type Key = (u64, (u32, u32));

fn key(stat: &Statx) -> Key {
    (stat.stx_mnt_id, (stat.stx_dev_major, stat.stx_dev_minor))
}

/// A file system, as seen through one mount.
#[derive(Debug)]
pub(super) struct Mount {
    key: Key,
    /// It is an interface of the host's kernel (see [`pseudo`]): it is there to be seen, and nothing can be
    /// done with it.
    pub(super) closed: bool,
    /// It is of overlayfs: a file may be replaced by a copy that looks the same.
    pub(super) overlay: bool,
    pub(super) distance: Distance,
    pub(super) writes: Writes,
    /// Its files are reached by their handles.
    handles: bool,
    /// For the mount that the shared directory itself is on, which the share holds anyway: the directory,
    /// open for reading where that is needed for handles.
    own: Option<Option<Arc<OwnedFd>>>,
    /// Where it was found last. The shared directory is nowhere.
    place: Mutex<Option<Place>>,
}

impl Mount {
    /// Whether a file of these attributes, found in a directory of this mount, is on it as well. Only
    /// directories tell by the device number: on overlayfs files have those of its layers.
    pub(super) fn has(&self, stat: &Statx) -> bool {
        let (id, dev) = key(stat);
        let directory = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
        id == self.key.0 && (dev == self.key.1 || !directory)
    }

    /// Whether both are one mount of the host's, of which they may be two subvolumes. No, if the host has no numbers
    /// for mounts.
    pub(super) fn is_one_with(&self, other: &Self) -> bool {
        self.key.0 == other.key.0 && self.key.0 != 0
    }

    /// Whether its nodes are reached by handles.
    pub(super) fn has_handles(&self) -> bool {
        self.handles
    }

    /// Whether it is the one that the share holds in any case.
    pub(super) fn is_own(&self) -> bool {
        self.own.is_some()
    }

    /// A descriptor, open for reading, that is on it at all times.
    pub(super) fn own(&self) -> Option<&Arc<OwnedFd>> {
        self.own.as_ref()?.as_ref()
    }

    pub(super) fn place(&self) -> Option<Place> {
        lock(&self.place).clone()
    }

    fn found_at(&self, parent: u64, name: &CStr) {
        let mut place = lock(&self.place);
        if !place.as_ref().is_some_and(|place| place.is(parent, name)) {
            *place = Some(Place::new(parent, name));
        }
    }

    /// Opens its root for reading: `name` in `directory`.
    ///
    /// # Errors
    ///
    /// `ESTALE` when it is not mounted there any more.
    pub(super) fn enter(&self, directory: impl AsFd, name: &CStr) -> Result<OwnedFd> {
        let root = host::open_directory(directory, name)?;
        if key(&host::stat(&root)?) == self.key { Ok(root) } else { Err(Errno::STALE) }
    }

    fn new(host: &Host, fd: impl AsFd, stat: &Statx, handles: bool) -> Result<Self> {
        let statfs = fstatfs(&fd)?;
        let kind = statfs.f_type as u32;
        // Mounted with `sync`: whatever is changed there is on the disk before it is answered.
        let synchronous = statfs.f_flags as u64 & libc::ST_SYNCHRONOUS != 0;
        let directory = u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR;
        let lasting = HANDLES_LAST.iter().any(|(magic, _)| *magic == kind);
        Ok(Self {
            key: key(stat),
            closed: pseudo::is_pseudo_type(kind),
            overlay: kind == OVERLAYFS,
            distance: if synchronous { Distance::Unknown } else { Distance::of(kind) },
            writes: Writes::of(kind),
            // Where a single file is mounted, there is no directory to enter it by.
            handles: handles && lasting && directory && handles_work(host, fd, stat),
            own: None,
            place: Mutex::new(None),
        })
    }
}

/// Whether this process may open files of the file system by handle: tried with its root.
fn handles_work(host: &Host, fd: impl AsFd, stat: &Statx) -> bool {
    let try_it = || {
        let handle = FileHandle::of(&fd)?;
        let mount = host.reopen(&fd, OFlags::RDONLY | OFlags::DIRECTORY)?;
        host::stat(handle.open(mount)?)
    };
    try_it().is_ok_and(|found| found.stx_ino == stat.stx_ino && key(&found) == key(stat))
}

/// The mounts that the guest knows nodes of.
pub(super) struct Mounts {
    root: Arc<Mount>,
    handles: bool,
    /// All that were ever found answer at once: see [`Distance`].
    near: AtomicBool,
    // Weak: a mount is known as long as one of its nodes.
    below: Mutex<HashMap<Key, Weak<Mount>>>,
}

impl Mounts {
    /// Those of a share whose directory is `root`. With `handles`, nodes are reached by handles where that
    /// works.
    pub(super) fn new(host: &Host, root: &OwnedFd, stat: &Statx, handles: bool) -> Result<Self> {
        let mut mount = Mount::new(host, root, stat, handles)?;
        let readable = match mount.handles {
            true => Some(Arc::new(host.reopen(root, OFlags::RDONLY | OFlags::DIRECTORY)?)),
            false => None,
        };
        mount.own = Some(readable);
        let near = AtomicBool::new(mount.distance != Distance::Unknown);
        Ok(Self { root: Arc::new(mount), handles, near, below: Mutex::default() })
    }

    /// Whether the files of all that the guest ever knew nodes of are in this machine's memory or on its disks.
    pub(super) fn are_near(&self) -> bool {
        self.near.load(Ordering::Relaxed)
    }

    /// That of the shared directory.
    pub(super) fn root(&self) -> &Arc<Mount> {
        &self.root
    }

    /// The mount of a file that was found under `name` in the directory `parent`, which is of another.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(super) fn find(
        &self,
        host: &Host,
        fd: impl AsFd,
        stat: &Statx,
        parent: u64,
        name: &CStr,
    ) -> Result<Arc<Mount>> {
        let known = || lock(&self.below).get(&key(stat)).and_then(Weak::upgrade);
        if let Some(mount) = known() {
            mount.found_at(parent, name);
            return Ok(mount);
        }
        // Not under the lock: this asks the host about a file system, which may be a network away.
        let mut mount = Mount::new(host, fd, stat, self.handles)?;
        if mount.distance == Distance::Unknown {
            self.near.store(false, Ordering::Relaxed);
        }
        // A subvolume of the share's own mount. (A host that does not number its mounts has 0 for all.)
        if mount.key.0 == self.root.key.0 && mount.key.0 != 0 {
            mount.own.clone_from(&self.root.own);
            mount.handles &= self.root.handles;
        }
        let mut below = lock(&self.below);
        let mount = match below.get(&key(stat)).and_then(Weak::upgrade) {
            Some(mount) => mount,
            None => {
                below.retain(|_, mount| mount.strong_count() > 0);
                let mount = Arc::new(mount);
                below.insert(key(stat), Arc::downgrade(&mount));
                mount
            }
        };
        drop(below);
        mount.found_at(parent, name);
        Ok(mount)
    }

    /// The mount of a directory, if it is known.
    pub(super) fn known(&self, stat: &Statx) -> Option<Arc<Mount>> {
        if self.root.key == key(stat) {
            return Some(self.root.clone());
        }
        lock(&self.below).get(&key(stat)).and_then(Weak::upgrade)
    }

    /// All of them.
    pub(super) fn all(&self) -> Vec<Arc<Mount>> {
        let below = lock(&self.below);
        std::iter::once(self.root.clone()).chain(below.values().filter_map(Weak::upgrade)).collect()
    }
}
