//! What an operation that failed answers.

use std::io;

/// A host errno, as the guest sees it: `error` of `struct fuse_out_header` is its negative.
#[derive(Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{}", io::Error::from_raw_os_error(*.0))]
pub struct Errno(i32);

/// The result of a file system operation.
pub type Result<T> = std::result::Result<T, Errno>;

macro_rules! errnos {
    ($($name:ident = $value:ident),* $(,)?) => {
        /// The errnos that the server itself answers, without the leading E.
        impl Errno {
            $(#[doc = concat!("`", stringify!($value), "`")]
            pub const $name: Errno = Errno(libc::$value);)*
        }
    };
}

errnos! {
    ACCES = EACCES,
    AGAIN = EAGAIN,
    BADF = EBADF,
    DEADLK = EDEADLK,
    EXIST = EEXIST,
    FBIG = EFBIG,
    INVAL = EINVAL,
    INTR = EINTR,
    IO = EIO,
    ISDIR = EISDIR,
    LOOP = ELOOP,
    MFILE = EMFILE,
    NAMETOOLONG = ENAMETOOLONG,
    NFILE = ENFILE,
    NODATA = ENODATA,
    NODEV = ENODEV,
    NOENT = ENOENT,
    NOLCK = ENOLCK,
    NOMEM = ENOMEM,
    NOSYS = ENOSYS,
    NOTDIR = ENOTDIR,
    NOTTY = ENOTTY,
    OPNOTSUPP = EOPNOTSUPP,
    PERM = EPERM,
    PROTO = EPROTO,
    RANGE = ERANGE,
    ROFS = EROFS,
    STALE = ESTALE,
    TOOBIG = E2BIG,
    XDEV = EXDEV,
}

impl Errno {
    /// Nothing was done: the caller must not wait ([`Caller::at_once`](super::Caller::at_once)), and it would have to.
    /// Never answered to a guest, and no errno of any host.
    pub(crate) const WOULD_WAIT: Errno = Errno(i32::MAX);

    /// The largest errno that the kernel takes from a FUSE server (`fuse_dev_do_write`, fs/fuse/dev.c).
    const MAX: i32 = 511;

    /// From a raw errno. What no guest would take becomes `EIO`.
    pub fn new(raw: i32) -> Self {
        if (1..=Self::MAX).contains(&raw) { Self(raw) } else { Self(libc::EIO) }
    }

    /// The positive errno.
    pub fn raw(self) -> i32 {
        self.0
    }
}

impl std::fmt::Debug for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.0, self)
    }
}

impl From<io::Error> for Errno {
    fn from(error: io::Error) -> Self {
        Self::new(error.raw_os_error().unwrap_or(libc::EIO))
    }
}

impl From<rustix::io::Errno> for Errno {
    fn from(error: rustix::io::Errno) -> Self {
        Self::new(error.raw_os_error())
    }
}

impl From<crate::memory::BufferError> for Errno {
    fn from(error: crate::memory::BufferError) -> Self {
        match error {
            crate::memory::BufferError::Fault => Self(libc::EFAULT),
            _ => Self::INVAL,
        }
    }
}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        Self::from_raw_os_error(errno.raw())
    }
}
