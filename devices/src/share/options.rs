//! How a share is to be served.

use std::path::PathBuf;
use std::time::Duration;

use rustix::process::{Resource, getrlimit};

use super::ids::{GidMap, UidMap};
use super::watch::WatchLimits;
use crate::fuse::abi::{FOPEN_CACHE_DIR, FOPEN_DIRECT_IO, FOPEN_KEEP_CACHE};

/// How long the guest may trust what it was told. The README has the promises of each in a table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CachePolicy {
    /// Nothing is cached: every read is the host's, every name is looked up anew.
    Never,
    /// Names and attributes are cached (the directory changes through this guest only), file data is not.
    Metadata,
    /// Names and attributes for a second, data until the file changed or is opened anew.
    #[default]
    Auto,
    /// Everything: nobody but this guest changes the directory.
    Always,
    /// Everything, for an agent in the guest has its kernel ask again for what changes on the host. As long as there
    /// is none, as [`Auto`](Self::Auto).
    Watch,
}

/// Which files the guest maps through the DAX window.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DaxPolicy {
    /// None.
    Never,
    /// Those that are marked with `FUSE_ATTR_DAX` (a guest that mounts with `dax=inode`, or with no `dax`
    /// option at all, asks that).
    #[default]
    Inode,
    /// All: for guests that mount with `dax=always`.
    Always,
}

/// Which extended attributes there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum XattrPolicy {
    /// None.
    #[default]
    Off,
    /// `user.*`, `trusted.*` and `security.capability`, which are the host's. The other `security.*` would be
    /// the host's policy in the guest's hand.
    On,
    /// `user.*` is the host's; `trusted.*` and `security.*` are kept on the host as `user.oriel.trusted.*` and
    /// so on, where they mean nothing to it, and the host's own are hidden.
    Mapped,
}

/// For how long the guest may keep what it was told of names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// That a name is there, and which file it is.
    pub entry: Duration,
    /// The attributes of a file.
    pub attributes: Duration,
    /// That a name is not there. With zero the guest is not even told in a form that it could keep.
    pub negative: Duration,
}

/// What becomes of a guest's O_DIRECT on the host. In the guest it passes the guest's cache by in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DirectPolicy {
    /// Data goes through the host's page cache, the one that all guests and the host share. Works on every
    /// file system, at every alignment.
    #[default]
    Buffered,
    /// Past the host's page cache as well, where its file system takes the request; otherwise through it.
    /// Only with [`DaxPolicy::Never`]: the window is made of that cache.
    Host,
}

/// Whom the guest's locks (fcntl(2), flock(2)) concern.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LockPolicy {
    /// Everybody who uses the host's files: they are locks of the host.
    #[default]
    Host,
    /// The guest alone, which keeps them itself.
    Guest,
}

/// How much of what carries locks a guest may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LockLimits {
    /// Owners of POSIX locks, counted once for each file they have locked and not closed since. Each holds a
    /// file descriptor.
    pub owners: usize,
    /// Locked ranges. Each is memory of the host's kernel, which goes through all of a file's for each lock.
    pub records: usize,
    /// Requests that wait for a lock. Each has a thread.
    pub waiters: usize,
}

impl LockLimits {
    /// More than any program we know of needs; with all of them on one file, each further lock there takes the
    /// host a millisecond.
    const RECORDS: usize = 1 << 16;
    /// A waiting thread takes some 30 KiB: its stack in the kernel, what it uses of its own, a timer.
    const WAITERS: usize = 1 << 10;

    /// So many owners, at most as many as there are records, and the usual number of all else.
    pub fn with_owners(owners: usize) -> Self {
        Self {
            owners: owners.clamp(1, Self::RECORDS),
            records: Self::RECORDS,
            waiters: Self::WAITERS,
        }
    }
}

/// The options of a share.
#[derive(Clone, Debug)]
pub struct Options {
    /// The host directory.
    pub directory: PathBuf,
    /// Where this process finds it, if not there: in a mount namespace of its own, or by a descriptor.
    pub found_at: Option<PathBuf>,
    /// Every change is answered with `EROFS`, from the start on.
    pub read_only: bool,
    /// How long the guest may trust what it was told.
    pub cache: CachePolicy,
    /// Instead of the policy's own [`Timeouts::entry`].
    pub entry_timeout: Option<Duration>,
    /// Instead of the policy's own [`Timeouts::attributes`].
    pub attr_timeout: Option<Duration>,
    /// Instead of the policy's own [`Timeouts::negative`].
    pub negative_timeout: Option<Duration>,
    /// How much is watched with [`CachePolicy::Watch`].
    pub watch_limits: WatchLimits,
    /// No other share of this process has any of the directory's files: what this process does there it does for
    /// this guest.
    pub alone: bool,
    /// Which files are mapped through the window.
    pub dax: DaxPolicy,
    /// Bytes of the window. With [`DaxPolicy::Inode`] it decides which files are marked; `None` marks
    /// whatever can be mapped.
    pub window: Option<u64>,
    /// What becomes of a guest's O_DIRECT on the host.
    pub direct: DirectPolicy,
    /// Whether the guest may collect writes in its page cache. It then believes its own sizes and times, so
    /// this is for a directory that nobody else changes. Not with [`CachePolicy::Never`] and
    /// [`CachePolicy::Metadata`].
    pub writeback: bool,
    /// Whether there are extended attributes, and by which names the host keeps them.
    pub xattr: XattrPolicy,
    /// Whether the host's POSIX ACLs count in the guest, and the guest may set them. The host's file system
    /// must have them.
    pub acl: bool,
    /// Which user of the guest is which of the host.
    pub uids: UidMap,
    /// Which group of the guest is which of the host.
    pub gids: GidMap,
    /// Whether the guest is told of mounts below the directory. Without, files of two file systems may
    /// show the same device and inode number.
    pub submounts: bool,
    /// Whether the guest may make device nodes. One that it makes is a device of the host for whoever opens
    /// it there.
    pub device_nodes: bool,
    /// Whether files are made with the user and group id of the guest's process. By default when the
    /// process may take on ids; without, whoever makes a file in the guest, it is this process's.
    pub switch_identity: Option<bool>,
    /// Whom the guest's locks concern.
    pub locks: LockPolicy,
    /// How many locks the guest may have. By default owners for a sixteenth of what the process may open, 65536
    /// ranges, and 1024 that wait.
    pub max_locks: Option<LockLimits>,
    /// Whether nodes are reached by the host's file handles, where the file system has them and the process
    /// is allowed to use them (CAP_DAC_READ_SEARCH). Otherwise, and without, they are reached by name.
    pub file_handles: bool,
    /// Whether file systems of every kind are taken for ones that answer without waiting for another machine or
    /// process. A vCPU's thread then serves requests that it would leave to another otherwise, and hangs with a file
    /// system that does.
    pub trust_file_systems: bool,
    /// The most nodes the guest may know at a time, the root among them. Each costs some 120 bytes (without
    /// file handles 200) and no descriptor. By default 1,048,576.
    pub max_inodes: Option<usize>,
    /// The most files and directories the guest may have open at a time. By default a quarter of what the
    /// process may open (`RLIMIT_NOFILE`) when the share is made.
    pub max_handles: Option<usize>,
    /// The most descriptors that are held for the guest at a time: those of handles, of files that have lost
    /// their last name while the guest uses them, and of locks. By default half of what the process may open.
    /// What comes on top is fewer than 100, and a few for each request that is being served.
    pub max_descriptors: Option<usize>,
    /// The most bytes of memory that requests use at a time for listings and values of extended attributes.
    /// By default 64 MiB, enough for 64 of the largest at once.
    pub max_buffers: Option<usize>,
}

/// The kernel has no "for ever" that does not overflow somewhere.
pub(super) const DAY: Duration = Duration::from_secs(86400);

impl Options {
    /// The defaults for a directory: writable, `cache=auto`, `dax=inode`, no extended attributes.
    pub fn new(directory: impl Into<PathBuf>) -> Self {
        Self {
            directory: directory.into(),
            found_at: None,
            read_only: false,
            cache: CachePolicy::default(),
            entry_timeout: None,
            attr_timeout: None,
            negative_timeout: None,
            watch_limits: WatchLimits::default(),
            alone: true,
            dax: DaxPolicy::default(),
            window: None,
            direct: DirectPolicy::default(),
            writeback: false,
            xattr: XattrPolicy::Off,
            acl: false,
            uids: UidMap::same(),
            gids: GidMap::same(),
            submounts: true,
            device_nodes: false,
            switch_identity: None,
            locks: LockPolicy::default(),
            max_locks: None,
            file_handles: true,
            trust_file_systems: false,
            max_inodes: None,
            max_handles: None,
            max_descriptors: None,
            max_buffers: None,
        }
    }

    /// For how long names and attributes are valid.
    ///
    /// With [`CachePolicy::Auto`] a missing name is asked for anew each time: a program that looks whether
    /// somebody else left a lock or a journal there gets the answer of now. That a name is there may safely
    /// be a second old: who then opens it, finds out.
    pub fn timeouts(&self) -> Timeouts {
        let (names, negative) = match self.cache {
            CachePolicy::Never => (Duration::ZERO, Duration::ZERO),
            CachePolicy::Auto | CachePolicy::Watch => (Duration::from_secs(1), Duration::ZERO),
            CachePolicy::Metadata | CachePolicy::Always => (DAY, DAY),
        };
        Timeouts {
            entry: self.entry_timeout.unwrap_or(names),
            attributes: self.attr_timeout.unwrap_or(names),
            negative: self.negative_timeout.unwrap_or(negative),
        }
    }

    /// Whether file data passes the guest's page cache by.
    pub(super) fn direct_io(&self) -> bool {
        matches!(self.cache, CachePolicy::Never | CachePolicy::Metadata)
    }

    /// Whether the guest may collect writes. It cannot where it does not cache data.
    pub(super) fn writeback(&self) -> bool {
        self.writeback && !self.direct_io() && !self.read_only
    }

    /// `FOPEN_*` of a file that is opened.
    pub(super) fn file_open_flags(&self) -> u32 {
        match self.cache {
            CachePolicy::Never | CachePolicy::Metadata => FOPEN_DIRECT_IO,
            // The guest throws away what it has of the file when it is opened: what one closed is what the
            // next one to open reads, on whichever side.
            CachePolicy::Auto | CachePolicy::Watch => 0,
            CachePolicy::Always => FOPEN_KEEP_CACHE,
        }
    }

    /// `FOPEN_*` of a directory that is opened. Without `FOPEN_KEEP_CACHE` the listing is kept for as long as
    /// the directory is open, and each opendir(3) reads a new one.
    pub(super) fn directory_open_flags(&self) -> u32 {
        match self.cache {
            CachePolicy::Never => 0,
            CachePolicy::Auto | CachePolicy::Watch => FOPEN_CACHE_DIR,
            CachePolicy::Metadata | CachePolicy::Always => FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE,
        }
    }

    /// Whether files are made with the ids of the guest's process.
    pub(crate) fn switches_identity(&self) -> bool {
        self.switch_identity.unwrap_or_else(super::identity::can_switch)
    }

    pub(super) fn lock_limits(&self) -> LockLimits {
        self.max_locks.unwrap_or_else(|| {
            let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
            LockLimits::with_owners(usize::try_from(files / 16).unwrap_or(usize::MAX))
        })
    }

    pub(super) fn caps(&self) -> Caps {
        /// 120 MiB of nodes, and more files than most hosts have in a directory.
        const INODES: usize = 1 << 20;
        const BUFFERS: usize = 64 << 20;
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let files = usize::try_from(files).unwrap_or(usize::MAX);
        Caps {
            // The root is always there.
            inodes: self.max_inodes.unwrap_or(INODES).max(1),
            handles: self.max_handles.unwrap_or(files / 4),
            descriptors: self.max_descriptors.unwrap_or(files / 2),
            buffers: self.max_buffers.unwrap_or(BUFFERS),
        }
    }
}

/// How much a guest may make the share hold, see [`Options`].
pub(super) struct Caps {
    pub(super) inodes: usize,
    pub(super) handles: usize,
    pub(super) descriptors: usize,
    pub(super) buffers: usize,
}
