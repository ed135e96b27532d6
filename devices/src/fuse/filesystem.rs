//! What the protocol asks of a file system.

use std::ffi::CStr;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use super::abi::{
    AttrOut, CopyFileRangeIn, CreateIn, EntryOut, FallocateIn, FileLock, FlushIn, IoctlIn, Kstatfs,
    LkIn, LseekIn, OpenOut, ReadIn, ReleaseIn, SetattrIn, StatxOut, WriteIn,
};
use super::counters::Counters;
use super::errno::{Errno, Result};
use super::later::Wait;
use super::reply::Payload;

/// Who asks, and about what: the parts of the request's header that an operation may use.
///
/// All of it is what the guest says. `uid`, `gid` and `pid` are those of the guest's process; a guest that
/// lies about them lies to itself, since it is the guest that decides who may do what in its share.
#[derive(Clone, Copy, Debug)]
pub struct Caller {
    /// The node the operation is on; for one with a name, the directory.
    pub nodeid: u64,
    /// User id of the process (of the guest's initial user namespace).
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Process id.
    pub pid: u32,
    /// A supplementary group of the process that counts for what it makes: the directory's, when the process
    /// is in it.
    pub group: Option<u32>,
    /// The process's umask, where the file system has to apply it to what is made. `None` when the guest has.
    pub umask: Option<u32>,
    /// The thread must not wait, nor take on anybody's identity: it is a vCPU's. What cannot be done so is left alone
    /// and answered with [`Errno::WOULD_WAIT`]; another thread then does all of it. Only of nodes that
    /// [answer at once](FileSystem::answers_at_once).
    pub at_once: bool,
}

/// What a file system wants of the session, asked at every INIT.
#[derive(Clone, Copy, Debug, Default)]
pub struct Preferences {
    /// The guest may collect writes in its page cache.
    pub writeback: bool,
    /// Some files are opened with `FOPEN_DIRECT_IO`, and should be mappable all the same.
    pub direct_io: bool,
    /// Mount points below the root are to be told to the guest.
    pub submounts: bool,
    /// Files may be mapped through the window, if there is one.
    pub dax: bool,
    /// The file system clears suid and sgid as `HANDLE_KILLPRIV_V2` asks.
    pub kill_privileges: bool,
    /// READDIRPLUS exists.
    pub readdirplus: bool,
    /// ACLs are extended attributes, they give what is made its mode, and ids may be mapped by mounts.
    pub acl: bool,
    /// What is made is made as the guest's process, whose groups then count.
    pub groups: bool,
    /// Locks of fcntl(2) and flock(2) are the file system's to grant.
    pub locks: bool,
}

/// One entry of a listing.
#[derive(Clone, Copy, Debug)]
pub struct Listing<'n> {
    /// Inode number.
    pub ino: u64,
    /// The cookie that continues the listing after this entry.
    pub next: u64,
    /// `DT_*`.
    pub kind: u8,
    /// The name.
    pub name: &'n CStr,
}

/// Takes the entries of a listing, as many as fit.
pub trait DirectorySink {
    /// Bytes that the reply has room for.
    fn room(&self) -> usize;

    /// Whether an entry with a name of `name_len` bytes still fits. What fits is taken by
    /// [`add`](Self::add).
    fn fits(&self, name_len: usize) -> bool;

    /// Whether entries are to come with what a LOOKUP of them answers (READDIRPLUS).
    fn plus(&self) -> bool;

    /// Adds an entry that [`fits`](Self::fits). `entry` is there when the entry was looked up, which the
    /// guest then has to FORGET; without one, READDIRPLUS says only that there is such a name.
    fn add(&mut self, listing: &Listing<'_>, entry: Option<&EntryOut>);
}

/// The answer of GETXATTR and LISTXATTR.
#[derive(Debug, PartialEq, Eq)]
pub enum XattrReply {
    /// The caller asked with size 0: the value's length.
    Size(u32),
    /// The value.
    Value(Vec<u8>),
}

/// What became of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockReply {
    /// It is set, or gone.
    Done,
    /// It is waited for. [`Wait::begin`] was called, and what that returned answers the request.
    Waiting,
}

/// A file system behind a session.
///
/// Every method may be called from any thread, and many at once, with any argument: node ids and file
/// handles are whatever the guest sent, and are refused with `ENOENT`, `ESTALE` or `EBADF` when they are not
/// ones that were given out and are still alive. Names were checked: one component, neither `.` nor `..`.
/// Flags, modes, sizes and offsets were not.
///
/// A method that answers an [`EntryOut`] with a node id other than 0 has counted one lookup of that node,
/// which the guest gives back by [`forget`](Self::forget).
///
/// What is not implemented answers `ENOSYS`; the Linux guest then mostly does without for good.
pub trait FileSystem: Send + Sync {
    /// What to negotiate.
    fn preferences(&self) -> Preferences;

    /// What there is to say of the file system in numbers, by name.
    fn statistics(&self) -> Vec<(&'static str, u64)> {
        Vec::new()
    }

    /// Where requests of a node are counted besides, in a file system that is put together from several.
    fn counters_of(&self, nodeid: u64) -> Option<Arc<Counters>> {
        let _ = nodeid;
        None
    }

    /// The guest knows now that its DAX window has `size` bytes, more than before. Called by a vCPU's thread: must
    /// not block.
    fn window_has_grown(&self, size: u64) {
        let _ = size;
    }

    /// Whether what is asked of a node needs nobody who may fail to answer, such as another machine: at most this
    /// one's memory and disks. Asked before each request that is to be served [`at_once`](Caller::at_once).
    fn answers_at_once(&self, nodeid: u64) -> bool {
        let _ = nodeid;
        false
    }

    /// The same of all nodes, and for `forgetting` any of them as well.
    fn all_answer_at_once(&self, forgetting: bool) -> bool {
        let _ = forgetting;
        false
    }

    /// A request of a node that was to be served [`at_once`](Caller::at_once) took so long that the next ones should
    /// not be for a while.
    fn was_slow(&self, nodeid: u64) {
        let _ = nodeid;
    }

    /// A session begins or ends: drops every node but the root, and every handle. Node ids and handles that
    /// were given out before are never valid again. Requests may still be running; what they hold goes when
    /// they end. Idempotent.
    fn clear(&self);

    /// LOOKUP.
    fn lookup(&self, caller: Caller, name: &CStr) -> Result<EntryOut>;
    /// FORGET and BATCH_FORGET: gives back `count` lookups of a node. Too many, or of no node, is no error.
    fn forget(&self, nodeid: u64, count: u64);
    /// GETATTR.
    fn getattr(&self, caller: Caller, fh: Option<u64>) -> Result<AttrOut>;
    /// STATX: `mask` is what the caller wants (`STATX_*`), and the mask of the answer what it has of it.
    fn statx(&self, _caller: Caller, _fh: Option<u64>, _mask: u32) -> Result<StatxOut> {
        Err(Errno::NOSYS)
    }
    /// SETATTR.
    fn setattr(&self, caller: Caller, change: &SetattrIn) -> Result<AttrOut>;
    /// ACCESS.
    fn access(&self, caller: Caller, mask: u32) -> Result<()>;
    /// READLINK: the target, without a NUL.
    fn readlink(&self, caller: Caller) -> Result<Vec<u8>>;

    /// SYMLINK. The target is any string; it is never resolved here.
    fn symlink(&self, caller: Caller, name: &CStr, target: &CStr) -> Result<EntryOut>;
    /// MKNOD.
    fn mknod(&self, caller: Caller, name: &CStr, mode: u32, rdev: u32) -> Result<EntryOut>;
    /// MKDIR.
    fn mkdir(&self, caller: Caller, name: &CStr, mode: u32) -> Result<EntryOut>;
    /// UNLINK.
    fn unlink(&self, caller: Caller, name: &CStr) -> Result<()>;
    /// RMDIR.
    fn rmdir(&self, caller: Caller, name: &CStr) -> Result<()>;
    /// RENAME (flags 0) and RENAME2.
    fn rename(
        &self,
        caller: Caller,
        name: &CStr,
        new_directory: u64,
        new_name: &CStr,
        flags: u32,
    ) -> Result<()>;
    /// LINK: `nodeid` under a further name in the caller's directory.
    fn link(&self, caller: Caller, nodeid: u64, name: &CStr) -> Result<EntryOut>;

    /// OPEN. `fuse_flags` are `FUSE_OPEN_*`.
    fn open(&self, caller: Caller, flags: u32, fuse_flags: u32) -> Result<OpenOut>;
    /// CREATE.
    fn create(
        &self,
        caller: Caller,
        name: &CStr,
        request: &CreateIn,
    ) -> Result<(EntryOut, OpenOut)>;
    /// TMPFILE: a file without a name in the caller's directory.
    fn tmpfile(&self, _caller: Caller, _request: &CreateIn) -> Result<(EntryOut, OpenOut)> {
        Err(Errno::NOSYS)
    }
    /// READ: fills `target` and says how many bytes came.
    fn read(&self, caller: Caller, request: &ReadIn, target: Payload<'_, '_>) -> Result<usize>;
    /// WRITE: stores `source` and says how many bytes went.
    fn write(&self, caller: Caller, request: &WriteIn, source: Payload<'_, '_>) -> Result<usize>;
    /// FLUSH: one descriptor of an open file was closed. With it go all POSIX locks of `lock_owner` on the
    /// file (fcntl(2)).
    fn flush(&self, caller: Caller, request: &FlushIn) -> Result<()>;
    /// RELEASE: the last one was. With it go the locks that belong to the open file.
    fn release(&self, caller: Caller, request: &ReleaseIn) -> Result<()>;
    /// GETLK: the first lock that keeps the given one from being set, or the given one with type `F_UNLCK`.
    /// `pid` is 0 for a process that is none of this guest's.
    fn get_lock(&self, _caller: Caller, _request: &LkIn) -> Result<FileLock> {
        Err(Errno::NOSYS)
    }
    /// SETLK, and SETLKW with leave to `wait`: sets or takes away a lock. Without that leave, a lock that
    /// cannot be had is `EAGAIN`.
    fn set_lock(
        &self,
        _caller: Caller,
        _request: &LkIn,
        _wait: Option<Wait<'_>>,
    ) -> Result<LockReply> {
        Err(Errno::NOSYS)
    }
    /// FSYNC.
    fn fsync(&self, caller: Caller, fh: u64, data_only: bool) -> Result<()>;
    /// FALLOCATE.
    fn fallocate(&self, caller: Caller, request: &FallocateIn) -> Result<()>;
    /// LSEEK: the resulting offset.
    fn lseek(&self, caller: Caller, request: &LseekIn) -> Result<u64>;
    /// COPY_FILE_RANGE and COPY_FILE_RANGE_64: how many bytes were copied, at most as many as were asked.
    /// After `EOPNOTSUPP` and `EXDEV` the Linux guest copies by reading and writing, this time; after
    /// `ENOSYS` always.
    fn copy_file_range(&self, caller: Caller, request: &CopyFileRangeIn) -> Result<u64>;
    /// IOCTL: what goes back to the caller, at most `out_size` bytes. `input` is as long as `in_size` says.
    fn ioctl(&self, _caller: Caller, _request: &IoctlIn, _input: &[u8]) -> Result<Vec<u8>> {
        Err(Errno::NOTTY)
    }

    /// OPENDIR.
    fn opendir(&self, caller: Caller, flags: u32) -> Result<OpenOut>;
    /// READDIR and READDIRPLUS from cookie `offset`. An empty reply is the end of the directory; `EINVAL`
    /// when there is an entry left and no room even for that one.
    fn readdir(
        &self,
        caller: Caller,
        fh: u64,
        offset: u64,
        sink: &mut dyn DirectorySink,
    ) -> Result<()>;
    /// RELEASEDIR.
    fn releasedir(&self, caller: Caller, fh: u64) -> Result<()>;
    /// FSYNCDIR.
    fn fsyncdir(&self, caller: Caller, fh: u64, data_only: bool) -> Result<()>;

    /// STATFS.
    fn statfs(&self, caller: Caller) -> Result<Kstatfs>;
    /// SYNCFS.
    fn syncfs(&self, caller: Caller) -> Result<()>;

    /// SETXATTR. `flags` are `XATTR_*` of setxattr(2). With `kill_sgid`, an ACL that is set takes the file's
    /// sgid with it.
    fn setxattr(
        &self,
        caller: Caller,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> Result<()>;
    /// GETXATTR. `size` 0 asks for the length.
    fn getxattr(&self, caller: Caller, name: &CStr, size: u32) -> Result<XattrReply>;
    /// LISTXATTR. `size` 0 asks for the length.
    fn listxattr(&self, caller: Caller, size: u32) -> Result<XattrReply>;
    /// REMOVEXATTR.
    fn removexattr(&self, caller: Caller, name: &CStr) -> Result<()>;

    /// SETUPMAPPING: opens the caller's node, a regular file, for reading and, when the mapping is `writable`,
    /// for writing, and has `place` map it, at most once. Where the file cannot be another than the one that is mapped
    /// of the node already, it need not be opened ([`Placement::more`]). The authority is the node id; no
    /// handle counts.
    fn map(&self, caller: Caller, writable: bool, place: &mut dyn Placement) -> Result<()>;
}

/// The place in the window where [`FileSystem::map`] has a file mapped. `owner` says on whose behalf, where several file
/// systems share a window: see [`DaxWindow::set_writable`](crate::dax::DaxWindow::set_writable).
pub trait Placement {
    /// Maps a file.
    ///
    /// # Errors
    ///
    /// The window's.
    fn file(&mut self, file: BorrowedFd<'_>, owner: u32) -> Result<()>;

    /// Maps more of the file that is mapped of the caller's node already, for the same owner and kind of access: by
    /// one system call. `None` when nothing is, or the host has to be asked how long the file is by now.
    fn more(&mut self, owner: u32) -> Option<Result<()>>;
}
