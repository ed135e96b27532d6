//! Extended attributes: which there are, and by which names the host keeps them.

use std::borrow::Cow;
use std::ffi::{CStr, CString};
use std::os::fd::AsFd;

use rustix::fs::{
    AtFlags, Mode, XattrFlags, chmodat, fgetxattr, fremovexattr, getxattr, listxattr, removexattr,
    setxattr,
};

use super::reach::Held;
use super::{Share, XattrPolicy, acl, host};
use crate::fuse::abi::{NAME_MAX, XATTR_MAX};
use crate::fuse::{Caller, Errno, Result, XattrReply};

/// Under which names the host keeps what must not take effect there. `user.*`, because an ordinary user may
/// have no others, and a share made as root can then be served by one.
const PREFIX: &[u8] = b"user.oriel.";
/// `security.capability` under its name on the host.
const MAPPED_CAPABILITY: &CStr = c"user.oriel.security.capability";

/// Whether an attribute belongs to one of these kinds: a name is more than its kind.
fn is_of(kinds: &[&[u8]], name: &[u8]) -> bool {
    kinds.iter().any(|kind| name.starts_with(kind) && name.len() > kind.len())
}

/// Whether the guest and the host mean the same by an attribute, when none is mapped.
fn is_shared(name: &[u8]) -> bool {
    name == b"security.capability" || is_of(&[b"user.", b"trusted."], name)
}

/// Whether an attribute is kept under the prefix. One that has the prefix already gets it once more (this may
/// be the share of a guest of ours that shares it again), so no two of the guest's are one of the host's.
fn is_mapped(name: &[u8]) -> bool {
    is_of(&[b"security.", b"trusted.", PREFIX], name)
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
    /// Whether the guest has any attributes.
    ///
    /// # Errors
    ///
    /// `ENOSYS` when it has none: it does not ask again.
    fn check_attributes(&self) -> Result<()> {
        match self.options.xattr {
            XattrPolicy::Off => Err(Errno::NOSYS),
            XattrPolicy::On | XattrPolicy::Mapped => Ok(()),
        }
    }

    /// By which name the host keeps an attribute of the guest's.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` for one that the guest cannot have; `ERANGE` when the host's name would be too long.
    fn host_name<'n>(&self, name: &'n CStr) -> Result<Cow<'n, CStr>> {
        let bytes = name.to_bytes();
        if self.options.acl && acl::is_acl(bytes) {
            return Ok(name.into());
        }
        match self.options.xattr {
            XattrPolicy::On if is_shared(bytes) => Ok(name.into()),
            XattrPolicy::Mapped if is_mapped(bytes) => {
                let mapped = [PREFIX, bytes].concat();
                if mapped.len() > NAME_MAX {
                    return Err(Errno::RANGE);
                }
                Ok(CString::new(mapped).map_err(|_| Errno::INVAL)?.into())
            }
            // Only what is behind the prefix is anything, and of that only what was put there.
            XattrPolicy::Mapped if is_of(&[b"user."], bytes) && bytes != PREFIX => Ok(name.into()),
            _ => Err(Errno::OPNOTSUPP),
        }
    }

    /// By which name the guest knows an attribute of the host's; `None` when it does not see it.
    fn guest_name<'n>(&self, name: &'n [u8]) -> Option<&'n [u8]> {
        if acl::is_acl(name) {
            return self.options.acl.then_some(name);
        }
        match self.options.xattr {
            XattrPolicy::Off => None,
            XattrPolicy::On => is_shared(name).then_some(name),
            XattrPolicy::Mapped => match name.strip_prefix(PREFIX) {
                Some(own) => is_mapped(own).then_some(own),
                None => is_of(&[b"user."], name).then_some(name),
            },
        }
    }

    /// The file of an operation, of any kind: none of these opens it.
    fn attributed(&self, caller: Caller) -> Result<Held> {
        let inode = self.inodes.get(caller.nodeid)?;
        inode.check_open_to_guests()?;
        self.file(&inode)
    }

    /// SETXATTR. `kill_sgid` comes with an ACL that is set by somebody who may not have sgid on that file.
    pub(super) fn set_xattr(
        &self,
        caller: Caller,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> Result<()> {
        self.check_attributes()?;
        let _changing = self.change()?;
        let flags = XattrFlags::from_bits(flags)
            .filter(|flags| (XattrFlags::CREATE | XattrFlags::REPLACE).contains(*flags))
            .ok_or(Errno::INVAL)?;
        let host_name = self.host_name(name)?;
        let is_acl = acl::is_acl(name.to_bytes());
        let file = self.attributed(caller)?;
        if !is_acl {
            return Ok(setxattr(host::path(&file)?, &*host_name, value, flags)?);
        }
        let translated = acl::to_host(value, &self.options.uids, &self.options.gids)?;
        // The host would leave it to this process, which may have it. Before: rather a bit lost than one kept.
        if kill_sgid {
            self.clear_sgid(&file)?;
        }
        Ok(setxattr(host::path(&file)?, &*host_name, &translated, flags)?)
    }

    fn clear_sgid(&self, file: impl AsFd) -> Result<()> {
        let mode = Mode::from_raw_mode(u32::from(host::stat(&file)?.stx_mode) & 0o7777);
        if mode.contains(Mode::SGID) {
            self.host.by_path(&file, |proc_fd, path| {
                chmodat(proc_fd, path, mode - Mode::SGID, AtFlags::empty())
            })?;
        }
        Ok(())
    }

    pub(super) fn get_xattr(&self, caller: Caller, name: &CStr, size: u32) -> Result<XattrReply> {
        self.check_attributes()?;
        let host_name = self.host_name(name)?;
        let file = self.attributed(caller)?;
        let path = host::path(&file)?;
        let _buffer = self.buffers.take(XATTR_MAX)?;
        let value = read_all(|value| getxattr(&path, &*host_name, value))?;
        let value = match acl::is_acl(name.to_bytes()) {
            true => acl::to_guest(&value, &self.options.uids, &self.options.gids)?,
            false => value,
        };
        answer(value, size)
    }

    pub(super) fn list_xattrs(&self, caller: Caller, size: u32) -> Result<XattrReply> {
        self.check_attributes()?;
        let file = self.attributed(caller)?;
        let path = host::path(&file)?;
        let _buffer = self.buffers.take(XATTR_MAX)?;
        let names = read_all(|names| listxattr(&path, names))?;
        let mut listed = Vec::with_capacity(names.len());
        for name in names.split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
            if let Some(name) = self.guest_name(name) {
                listed.extend_from_slice(name);
                listed.push(0);
            }
        }
        answer(listed, size)
    }

    pub(super) fn remove_xattr(&self, caller: Caller, name: &CStr) -> Result<()> {
        self.check_attributes()?;
        let _changing = self.change()?;
        let host_name = self.host_name(name)?;
        let file = self.attributed(caller)?;
        Ok(removexattr(host::path(&file)?, &*host_name)?)
    }

    /// Takes the guest's file capabilities from a regular file whose content or owner changed, as the host's
    /// kernel takes those that it knows as such, whoever changed it.
    ///
    /// # Errors
    ///
    /// The host's, when they may still be there.
    pub(super) fn drop_mapped_capability(&self, file: impl AsFd) -> Result<()> {
        self.drop_capability(
            |value| fgetxattr(&file, MAPPED_CAPABILITY, value),
            || fremovexattr(&file, MAPPED_CAPABILITY),
        )
    }

    /// The same for a file that is not open.
    pub(super) fn drop_mapped_capability_by_path(&self, file: impl AsFd) -> Result<()> {
        let path = host::path(&file)?;
        self.drop_capability(
            |value| getxattr(&path, MAPPED_CAPABILITY, value),
            || removexattr(&path, MAPPED_CAPABILITY),
        )
    }

    fn drop_capability(
        &self,
        get: impl FnOnce(&mut [u8]) -> rustix::io::Result<usize>,
        remove: impl FnOnce() -> rustix::io::Result<()>,
    ) -> Result<()> {
        use rustix::io::Errno as Host;
        if self.options.xattr != XattrPolicy::Mapped {
            return Ok(());
        }
        // Asked first, because nearly no file has one, and to remove an attribute takes the inode's lock.
        let there = get(&mut []);
        if let Err(Host::NODATA | Host::OPNOTSUPP) = there {
            return Ok(());
        }
        match remove() {
            Ok(()) | Err(Host::NODATA | Host::OPNOTSUPP) => Ok(()),
            // An ordinary user's file with a mode that lets even its owner neither read nor write, who has it open
            // nevertheless: the host keeps and shows its attributes to nobody.
            Err(Host::ACCESS) if there == Err(Host::ACCESS) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }
}
