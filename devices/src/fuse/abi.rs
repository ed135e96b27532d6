//! The wire: `struct`s and flags of `linux/fuse.h`, protocol 7.45.
//!
//! What `fuse-backend-rs` defines is used from there; newer parts are here, with the names of the header.
//! All are plain numbers in the host's byte order, which on x86 is the guest's.

use bitflags::bitflags;
use vm_memory::ByteValued;

pub use fuse_backend_rs::abi::fuse_abi::{
    AccessIn, Attr, AttrOut, BatchForgetIn, CopyFileRangeIn, CreateIn, Dirent, EntryOut,
    FallocateIn, FileLock, FlushIn, ForgetIn, ForgetOne, FsyncIn, GetattrIn, GetxattrIn,
    GetxattrOut, InHeader, InitIn, InitIn2, InitOut, InterruptIn, IoctlIn, IoctlOut, Kstatfs,
    LinkIn, LkIn, LkOut, LseekIn, LseekOut, MkdirIn, MknodIn, OpenIn, OpenOut, OutHeader, ReadIn,
    ReleaseIn, Rename2In, RenameIn, SetattrIn, SetxattrIn, StatfsOut, WriteIn, WriteOut,
};
pub use fuse_backend_rs::abi::virtio_fs::{RemovemappingIn, RemovemappingOne, SetupmappingIn};

/// `FUSE_KERNEL_VERSION`.
pub const MAJOR: u32 = 7;
/// The minor version this server speaks: that of `FUSE_COPY_FILE_RANGE_64`, Linux 6.18. What came between
/// 7.40 and it is behind INIT flags.
pub const MINOR: u32 = 45;
/// `FUSE_ROOT_ID`: the node id of a share's root.
pub const ROOT_ID: u64 = 1;
/// Bytes of `struct fuse_in_header`.
pub const IN_HEADER: usize = 40;
/// Bytes of `struct fuse_out_header`.
pub const OUT_HEADER: usize = 16;
/// `FUSE_COMPAT_INIT_OUT_SIZE`: what a guest before 7.5 expects.
pub const COMPAT_INIT_OUT: usize = 8;
/// `FUSE_COMPAT_22_INIT_OUT_SIZE`: what a guest before 7.23 expects.
pub const COMPAT_22_INIT_OUT: usize = 24;

/// `FUSE_NAME_MAX` of this server: the longest name a Linux file system takes, in bytes.
pub const NAME_MAX: usize = 255;
/// The longest symlink target, `PATH_MAX` without its NUL.
pub const TARGET_MAX: usize = 4095;
/// `XATTR_SIZE_MAX` and `XATTR_LIST_MAX` of linux/limits.h.
pub const XATTR_MAX: usize = 65536;

/// The largest READ or WRITE in bytes. It is the most a guest sends: its page limit is 256 pages.
pub const MAX_WRITE: u32 = 1 << 20;
/// [`MAX_WRITE`] in pages of 4 KiB, for `init_out.max_pages`.
pub const MAX_PAGES: u16 = 256;
/// The largest request in bytes: headers and one WRITE (`FUSE_BUFFER_HEADER_SIZE` is 4 KiB too).
pub const MAX_REQUEST: usize = MAX_WRITE as usize + 4096;

bitflags! {
    /// `flags` and `flags2` of INIT as one number.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct InitFlags: u64 {
        /// Several reads of one file may be under way.
        const ASYNC_READ = 1 << 0;
        /// GETLK, SETLK and SETLKW go to the server.
        const POSIX_LOCKS = 1 << 1;
        /// OPEN carries O_TRUNC instead of a SETATTR before it.
        const ATOMIC_O_TRUNC = 1 << 3;
        /// Writes above 4 KiB.
        const BIG_WRITES = 1 << 5;
        /// The guest does not apply its umask; the server would.
        const DONT_MASK = 1 << 6;
        /// flock(2) goes to the server too, as a SETLK.
        const FLOCK_LOCKS = 1 << 10;
        /// Cached pages go when the size or mtime changed.
        const AUTO_INVAL_DATA = 1 << 12;
        /// READDIRPLUS exists.
        const DO_READDIRPLUS = 1 << 13;
        /// The guest chooses between READDIR and READDIRPLUS.
        const READDIRPLUS_AUTO = 1 << 14;
        /// Direct I/O may be asynchronous.
        const ASYNC_DIO = 1 << 15;
        /// The guest collects writes in its page cache.
        const WRITEBACK_CACHE = 1 << 16;
        /// LOOKUP and READDIR of one directory may be under way at once.
        const PARALLEL_DIROPS = 1 << 18;
        /// `init_out.max_pages` counts.
        const MAX_PAGES = 1 << 22;
        /// The guest asks for ACLs as extended attributes and decides by them.
        const POSIX_ACL = 1 << 20;
        /// READLINK replies may be cached.
        const CACHE_SYMLINKS = 1 << 23;
        /// `init_out.map_alignment` counts.
        const MAP_ALIGNMENT = 1 << 26;
        /// `ATTR_SUBMOUNT` makes the guest mount a file system of its own there.
        const SUBMOUNTS = 1 << 27;
        /// The server clears suid, sgid and capabilities, for callers without CAP_FSETID.
        const HANDLE_KILLPRIV_V2 = 1 << 28;
        /// SETXATTR has flags of its own.
        const SETXATTR_EXT = 1 << 29;
        /// There is a `flags2`.
        const INIT_EXT = 1 << 30;
        /// `ATTR_DAX` of a file's attributes counts.
        const HAS_INODE_DAX = 1 << 33;
        /// Requests that make files name the supplementary group that counts for them.
        const CREATE_SUPP_GROUP = 1 << 34;
        /// A shared mapping of a file with `FOPEN_DIRECT_IO` is allowed.
        const DIRECT_IO_ALLOW_MMAP = 1 << 36;
        /// The file system may be mounted with other ids than its own (mount_setattr(2)). Ids then stand only
        /// in requests that make files.
        const ALLOW_IDMAP = 1 << 40;
    }
}

bitflags! {
    /// `valid` of SETATTR.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct SetattrValid: u32 {
        /// `mode` counts.
        const MODE = 1 << 0;
        /// `uid` counts.
        const UID = 1 << 1;
        /// `gid` counts.
        const GID = 1 << 2;
        /// `size` counts.
        const SIZE = 1 << 3;
        /// `atime` counts.
        const ATIME = 1 << 4;
        /// `mtime` counts.
        const MTIME = 1 << 5;
        /// `fh` counts.
        const FH = 1 << 6;
        /// The atime is now.
        const ATIME_NOW = 1 << 7;
        /// The mtime is now.
        const MTIME_NOW = 1 << 8;
        /// `lock_owner` counts.
        const LOCKOWNER = 1 << 9;
        /// `ctime` counts.
        const CTIME = 1 << 10;
        /// The caller may not keep suid and sgid over a truncation.
        const KILL_SUIDGID = 1 << 11;
    }
}

/// `FUSE_GETATTR_FH`: `fh` of GETATTR and STATX counts.
pub const GETATTR_FH: u32 = 1 << 0;
/// `FUSE_ATTR_SUBMOUNT`: a directory where another file system is mounted on the host.
pub const ATTR_SUBMOUNT: u32 = 1 << 0;
/// `FUSE_ATTR_DAX`: this file is to be mapped through the window.
pub const ATTR_DAX: u32 = 1 << 1;
/// `FOPEN_DIRECT_IO`: reads and writes pass the guest's page cache by.
pub const FOPEN_DIRECT_IO: u32 = 1 << 0;
/// `FOPEN_KEEP_CACHE`: what is cached stays valid over this open.
pub const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// `FOPEN_CACHE_DIR`: the listing may be cached.
pub const FOPEN_CACHE_DIR: u32 = 1 << 3;
/// `FUSE_OPEN_KILL_SUIDGID`: the caller may not keep suid and sgid over an O_TRUNC.
pub const OPEN_KILL_SUIDGID: u32 = 1 << 0;
/// `FUSE_WRITE_CACHE`: a page of the guest's cache, written by no particular caller or open.
pub const WRITE_CACHE: u32 = 1 << 0;
/// `FUSE_WRITE_KILL_SUIDGID`: the caller may not keep suid and sgid over this write.
pub const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// `FUSE_SETXATTR_ACL_KILL_SGID`: the caller may not keep sgid when this ACL is set.
pub const SETXATTR_ACL_KILL_SGID: u32 = 1 << 0;
/// `FUSE_EXT_GROUPS`: the kind of an extension with supplementary groups.
pub const EXT_GROUPS: u32 = 32;
/// `FUSE_IOCTL_UNRESTRICTED`: the server may look at all of the caller's memory, by asking for it piece by
/// piece. Linux offers this to character devices in user space only.
pub const IOCTL_UNRESTRICTED: u32 = 1 << 1;
/// `FUSE_LK_FLOCK`: a lock of flock(2), not of fcntl(2).
pub const LK_FLOCK: u32 = 1 << 0;
/// `FUSE_RELEASE_FLOCK_UNLOCK`: there may be a lock of flock(2) on this handle.
pub const RELEASE_FLOCK_UNLOCK: u32 = 1 << 1;
/// `FUSE_FSYNC_FDATASYNC`.
pub const FSYNC_FDATASYNC: u32 = 1 << 0;
/// `FUSE_SETUPMAPPING_FLAG_WRITE`.
pub const SETUPMAPPING_WRITE: u64 = 1 << 0;
/// `FUSE_SETUPMAPPING_FLAG_READ`.
pub const SETUPMAPPING_READ: u64 = 1 << 1;

/// `struct fuse_ext_header`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct ExtHeader {
    /// Bytes of the extension, this header among them.
    pub size: u32,
    /// What it is: `type` of the header file.
    pub kind: u32,
}

/// What `struct fuse_setxattr_in` has more with `SETXATTR_EXT`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SetxattrIn2 {
    /// `SETXATTR_*`.
    pub setxattr_flags: u32,
    /// Unused.
    pub padding: u32,
}

/// `struct fuse_syncfs_in`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SyncfsIn {
    /// Unused.
    pub padding: u64,
}

/// `struct fuse_copy_file_range_out`, the reply of `FUSE_COPY_FILE_RANGE_64`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct CopyFileRangeOut {
    /// How many bytes were copied.
    pub bytes_copied: u64,
}

/// `struct fuse_statx_in`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct StatxIn {
    /// [`GETATTR_FH`].
    pub getattr_flags: u32,
    /// Unused.
    pub reserved: u32,
    /// The open file, when the flag says so.
    pub fh: u64,
    /// `AT_STATX_*`.
    pub sx_flags: u32,
    /// `STATX_*` that the caller wants.
    pub sx_mask: u32,
}

/// `struct fuse_sx_time`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SxTime {
    /// Seconds since the epoch.
    pub tv_sec: i64,
    /// Nanoseconds.
    pub tv_nsec: u32,
    /// Unused.
    pub reserved: i32,
}

/// `struct fuse_statx`. The fields are those of statx(2).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
#[allow(missing_docs, reason = "statx(2) says what each field is")]
pub struct Statx {
    pub mask: u32,
    pub blksize: u32,
    pub attributes: u64,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub mode: u16,
    pub spare0: u16,
    pub ino: u64,
    pub size: u64,
    pub blocks: u64,
    pub attributes_mask: u64,
    pub atime: SxTime,
    pub btime: SxTime,
    pub ctime: SxTime,
    pub mtime: SxTime,
    pub rdev_major: u32,
    pub rdev_minor: u32,
    pub dev_major: u32,
    pub dev_minor: u32,
    pub spare2: [u64; 14],
}

/// `struct fuse_statx_out`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct StatxOut {
    /// Seconds for which the attributes may be cached.
    pub attr_valid: u64,
    /// Nanoseconds on top.
    pub attr_valid_nsec: u32,
    /// Unused.
    pub flags: u32,
    /// Unused.
    pub spare: [u64; 2],
    /// The attributes.
    pub stat: Statx,
}

/// Declares structs of integers without padding to be readable from and writable to raw bytes.
#[expect(unsafe_code, reason = "ByteValued is an unsafe trait")]
mod plain {
    use super::{
        ByteValued, CopyFileRangeOut, ExtHeader, SetxattrIn2, StatxIn, StatxOut, SyncfsIn,
    };

    // SAFETY: `repr(C)`, integers only, so every bit pattern is valid; there is no padding, because the
    // sizes below are the sums of the fields' sizes.
    unsafe impl ByteValued for SyncfsIn {}
    const _: () = assert!(size_of::<SyncfsIn>() == 8);
    // SAFETY: as above.
    unsafe impl ByteValued for ExtHeader {}
    const _: () = assert!(size_of::<ExtHeader>() == 8);
    // SAFETY: as above.
    unsafe impl ByteValued for SetxattrIn2 {}
    const _: () = assert!(size_of::<SetxattrIn2>() == 8);
    // SAFETY: as above.
    unsafe impl ByteValued for CopyFileRangeOut {}
    const _: () = assert!(size_of::<CopyFileRangeOut>() == 8);
    // SAFETY: as above.
    unsafe impl ByteValued for StatxIn {}
    const _: () = assert!(size_of::<StatxIn>() == 24);
    // SAFETY: as above; 32 bytes and the 256 of `struct fuse_statx`.
    unsafe impl ByteValued for StatxOut {}
    const _: () = assert!(size_of::<StatxOut>() == 288);
}

const _: () = assert!(size_of::<InHeader>() == IN_HEADER);
const _: () = assert!(size_of::<OutHeader>() == OUT_HEADER);
const _: () = assert!(size_of::<EntryOut>() == 128);
const _: () = assert!(size_of::<AttrOut>() == 104);
const _: () = assert!(size_of::<InitOut>() == 64);
const _: () = assert!(size_of::<SetattrIn>() == 88);
const _: () = assert!(size_of::<WriteIn>() == 40);
const _: () = assert!(size_of::<SetupmappingIn>() == 40);
