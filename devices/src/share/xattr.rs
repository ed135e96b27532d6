//! Extended attributes.

use std::ffi::CStr;
use std::os::fd::OwnedFd;

use rustix::fs::{OFlags, XattrFlags, fgetxattr, flistxattr, fremovexattr, fsetxattr};

use super::Share;
use crate::fuse::abi::XATTR_MAX;
use crate::fuse::{Caller, Errno, Result, XattrReply};

/// Whether the guest sees an attribute.
///
/// `trusted.*` is what overlayfs in the guest needs of its upper layer, `security.capability` what a root
/// file system has on its binaries. Other `security.*` would be the host's policy in the guest's hand, and
/// `system.*` are ACLs, which the guest does not enforce.
fn allowed(name: &[u8]) -> bool {
    name == b"security.capability"
        || [b"user.".as_slice(), b"trusted."]
            .iter()
            .any(|prefix| name.starts_with(prefix) && name.len() > prefix.len())
}

/// The answer to a caller who has room for `size` bytes.
fn answer(value: Vec<u8>, size: u32) -> Result<XattrReply> {
    match size {
        0 => Ok(XattrReply::Size(u32::try_from(value.len()).map_err(|_| Errno::TOOBIG)?)),
        size if value.len() <= size as usize => Ok(XattrReply::Value(value)),
        _ => Err(Errno::RANGE),
    }
}

/// Reads by `read` into as many bytes as it takes: most values are short.
fn read_all(read: impl Fn(&mut [u8]) -> rustix::io::Result<usize>) -> Result<Vec<u8>> {
    for size in [256, XATTR_MAX] {
        let mut value = vec![0; size];
        match read(&mut value) {
            Ok(len) => {
                value.truncate(len);
                return Ok(value);
            }
            Err(rustix::io::Errno::RANGE) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::TOOBIG)
}

impl Share {
    /// The file of an operation, opened. Nothing but a regular file or a directory ever is.
    ///
    /// # Errors
    ///
    /// `ENOSYS` when the share has no attributes: the guest does not ask again. `otherwise` for any other
    /// kind of file: `user.*` is not allowed there in any case (xattr(7)).
    fn with_attributes(&self, caller: Caller, otherwise: Errno) -> Result<OwnedFd> {
        if !self.options.xattr {
            return Err(Errno::NOSYS);
        }
        let inode = self.inodes.get(caller.nodeid)?;
        inode.check_openable().map_err(|_| otherwise)?;
        self.host.reopen(self.file(&inode)?, OFlags::RDONLY)
    }

    pub(super) fn set_xattr(
        &self,
        caller: Caller,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> Result<()> {
        if !self.options.xattr {
            return Err(Errno::NOSYS);
        }
        self.check_writable()?;
        let flags = XattrFlags::from_bits(flags)
            .filter(|flags| (XattrFlags::CREATE | XattrFlags::REPLACE).contains(*flags))
            .ok_or(Errno::INVAL)?;
        if !allowed(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP);
        }
        let file = self.with_attributes(caller, Errno::PERM)?;
        Ok(fsetxattr(file, name, value, flags)?)
    }

    pub(super) fn get_xattr(&self, caller: Caller, name: &CStr, size: u32) -> Result<XattrReply> {
        let file = self.with_attributes(caller, Errno::NODATA)?;
        if !allowed(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP);
        }
        answer(read_all(|value| fgetxattr(&file, name, value))?, size)
    }

    pub(super) fn list_xattrs(&self, caller: Caller, size: u32) -> Result<XattrReply> {
        let file = match self.with_attributes(caller, Errno::NODATA) {
            Err(Errno::NODATA) => return answer(Vec::new(), size),
            file => file?,
        };
        let mut names = read_all(|names| flistxattr(&file, names))?;
        names = names
            .split_inclusive(|byte| *byte == 0)
            .filter(|name| allowed(name.strip_suffix(b"\0").unwrap_or(name)))
            .flatten()
            .copied()
            .collect();
        answer(names, size)
    }

    pub(super) fn remove_xattr(&self, caller: Caller, name: &CStr) -> Result<()> {
        if !self.options.xattr {
            return Err(Errno::NOSYS);
        }
        self.check_writable()?;
        if !allowed(name.to_bytes()) {
            return Err(Errno::OPNOTSUPP);
        }
        let file = self.with_attributes(caller, Errno::NODATA)?;
        Ok(fremovexattr(file, name)?)
    }
}
