//! IOCTL: the inode flags that lsattr(1) and chattr(1) show and change, and nothing else.
//!
//! All other ioctls would be the host's devices' and file systems' to answer, with memory of the caller that
//! is not here. These four have arguments of fixed size, which the request brings and the reply takes along.
//!
//! A flag is only changed when it is the guest's own affair: how its file is stored and cached. It cannot
//! make a file that the host's users cannot remove (immutable, append-only), spend a project's quota, or
//! change how names are compared.

use rustix::fs::{IFlags, ioctl_getflags, ioctl_setflags};

use super::{Share, sys};
use crate::fuse::abi::{IOCTL_UNRESTRICTED, IoctlIn};
use crate::fuse::{Caller, Errno, Result};

/// `FS_IOC_GETFLAGS` and `FS_IOC_SETFLAGS` of linux/fs.h. Their argument is an `int`, although the numbers
/// say `long`.
const FS_IOC_GETFLAGS: u32 = 0x8008_6601;
const FS_IOC_SETFLAGS: u32 = 0x4008_6602;
/// `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR`: a `struct fsxattr`.
const FS_IOC_FSGETXATTR: u32 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u32 = 0x401c_5820;

/// Bytes of their arguments.
const FLAGS: u32 = size_of::<u32>() as u32;
const FSXATTR: u32 = size_of::<sys::FsXattr>() as u32;

/// The flags that a guest may change.
const SETTABLE: IFlags = IFlags::SECURE_REMOVAL
    .union(IFlags::UNRM)
    .union(IFlags::COMPRESSED)
    .union(IFlags::SYNC)
    .union(IFlags::NODUMP)
    .union(IFlags::NOATIME)
    .union(IFlags::NOTAIL)
    .union(IFlags::DIRSYNC)
    .union(IFlags::TOPDIR)
    .union(IFlags::NOCOW)
    // FS_NOCOMP_FL, which has no name here.
    .union(IFlags::from_bits_retain(0x400));

/// The same of `fsx_xflags`: `FS_XFLAG_SYNC`, `FS_XFLAG_NOATIME`, `FS_XFLAG_NODUMP`, `FS_XFLAG_NODEFRAG`.
const SETTABLE_XFLAGS: u32 = 0x20 | 0x40 | 0x80 | 0x2000;

impl Share {
    /// # Errors
    ///
    /// `ENOTTY` for any other ioctl, and for one of these with other sizes; `EROFS` for a change of a
    /// read-only share; `EPERM` for a change that a guest may not make; the host's.
    pub(super) fn control(
        &self,
        caller: Caller,
        request: &IoctlIn,
        input: &[u8],
    ) -> Result<Vec<u8>> {
        let handle = self.open_handle(caller.nodeid, request.fh)?;
        if request.flags & IOCTL_UNRESTRICTED != 0 {
            return Err(Errno::NOTTY);
        }
        match (request.cmd, request.in_size, request.out_size) {
            (FS_IOC_GETFLAGS, 0, FLAGS) => {
                Ok((ioctl_getflags(&*handle)?.bits()).to_ne_bytes().to_vec())
            }
            (FS_IOC_SETFLAGS, FLAGS, 0) => {
                let flags = input.try_into().map_err(|_| Errno::INVAL)?;
                let wanted = IFlags::from_bits_retain(u32::from_ne_bytes(flags));
                let _changing = self.change()?;
                let now = ioctl_getflags(&*handle)?;
                if !SETTABLE.contains(now ^ wanted) {
                    return Err(Errno::PERM);
                }
                ioctl_setflags(&*handle, wanted)?;
                Ok(Vec::new())
            }
            (FS_IOC_FSGETXATTR, 0, FSXATTR) => Ok(sys::get_fsxattr(&*handle)?.to_bytes().to_vec()),
            (FS_IOC_FSSETXATTR, FSXATTR, 0) => {
                let wanted = sys::FsXattr::from_bytes(input).ok_or(Errno::INVAL)?;
                let _changing = self.change()?;
                let now = sys::get_fsxattr(&*handle)?;
                // What the host says of the file (`nextents`) is no wish.
                let same = sys::FsXattr { xflags: now.xflags, nextents: now.nextents, ..wanted };
                if (now.xflags ^ wanted.xflags) & !SETTABLE_XFLAGS != 0 || same != now {
                    return Err(Errno::PERM);
                }
                sys::set_fsxattr(&*handle, &wanted)?;
                Ok(Vec::new())
            }
            _ => Err(Errno::NOTTY),
        }
    }
}
