//! POSIX ACLs as extended attributes: `struct posix_acl_xattr_header` and `_entry` of
//! linux/posix_acl_xattr.h, little-endian whatever the machine.
//!
//! The host's kernel checks an ACL as a whole and lets it take effect. What is done here is what it cannot:
//! the ids in the entries are the guest's on one side and the host's on the other.

use std::io;
use std::os::fd::AsFd;

use rustix::fs::{OFlags, fgetxattr};

use super::host::Host;
use super::ids::{GidMap, GuestGid, GuestUid, HostGid, HostUid, UidMap};
use crate::fuse::{Errno, Result};

/// The attribute with a file's ACL.
pub(super) const ACCESS: &[u8] = b"system.posix_acl_access";
/// The attribute with the ACL that is given to what is made in a directory.
pub(super) const DEFAULT: &[u8] = b"system.posix_acl_default";

/// `POSIX_ACL_XATTR_VERSION`.
const VERSION: u32 = 2;
const HEADER: usize = 4;
const ENTRY: usize = 8;
/// `ACL_USER_OBJ`, `ACL_GROUP_OBJ`, `ACL_MASK`, `ACL_OTHER`: of nobody in particular, so their id is no id.
const OBJECTS: [u16; 4] = [0x01, 0x04, 0x10, 0x20];
/// `ACL_USER`.
const USER: u16 = 0x02;
/// `ACL_GROUP`.
const GROUP: u16 = 0x08;
/// `ACL_READ | ACL_WRITE | ACL_EXECUTE`.
const PERMISSIONS: u16 = 0o7;

/// Whether the file system of a directory has ACLs.
///
/// # Errors
///
/// Says so when it has none; the host's when the directory may not be read.
pub(super) fn check(directory: impl AsFd, host: &Host) -> io::Result<()> {
    let directory = host.reopen(directory, OFlags::RDONLY | OFlags::DIRECTORY)?;
    match fgetxattr(directory, ACCESS, &mut [0u8; 0][..]) {
        Ok(_) | Err(rustix::io::Errno::NODATA) => Ok(()),
        Err(rustix::io::Errno::OPNOTSUPP) => {
            Err(io::Error::other("its file system has no ACLs; leave acl"))
        }
        Err(error) => Err(error.into()),
    }
}

/// Whether an attribute is an ACL.
pub(super) fn is_acl(name: &[u8]) -> bool {
    name == ACCESS || name == DEFAULT
}

/// An ACL of the guest with the ids of the host.
///
/// # Errors
///
/// `EINVAL` for what is no ACL, `EOPNOTSUPP` for one of another version, `EPERM` for one that names a user
/// or a group the host has none for.
pub(super) fn to_host(acl: &[u8], uids: &UidMap, gids: &GidMap) -> Result<Vec<u8>> {
    translate(acl, |tag, id| match tag {
        USER => Ok(uids.to_host(GuestUid(id))?.0),
        _ => Ok(gids.to_host(GuestGid(id))?.0),
    })
}

/// An ACL of the host with the ids of the guest; those it has no number for are the overflow id.
///
/// # Errors
///
/// `EIO` for what is no ACL: the host's kernel would not have kept it.
pub(super) fn to_guest(acl: &[u8], uids: &UidMap, gids: &GidMap) -> Result<Vec<u8>> {
    let translated = translate(acl, |tag, id| match tag {
        USER => Ok(uids.to_guest(HostUid(id)).0),
        _ => Ok(gids.to_guest(HostGid(id)).0),
    });
    translated.map_err(|_| Errno::IO)
}

/// `id` is asked for each entry of a certain user or group, with its tag.
fn translate(acl: &[u8], id: impl Fn(u16, u32) -> Result<u32>) -> Result<Vec<u8>> {
    // An empty one removes what is there (`posix_acl_from_xattr`, fs/posix_acl.c).
    if acl.is_empty() {
        return Ok(Vec::new());
    }
    let (version, entries) = acl.split_first_chunk::<HEADER>().ok_or(Errno::INVAL)?;
    if u32::from_le_bytes(*version) != VERSION {
        return Err(Errno::OPNOTSUPP);
    }
    let (entries, rest) = entries.as_chunks::<ENTRY>();
    if !rest.is_empty() {
        return Err(Errno::INVAL);
    }
    let mut translated = version.to_vec();
    for [tag_low, tag_high, permissions_low, permissions_high, number @ ..] in entries {
        let tag = u16::from_le_bytes([*tag_low, *tag_high]);
        let permissions = u16::from_le_bytes([*permissions_low, *permissions_high]);
        if permissions & !PERMISSIONS != 0 {
            return Err(Errno::INVAL);
        }
        let number = match tag {
            USER | GROUP => id(tag, u32::from_le_bytes(*number))?.to_le_bytes(),
            _ if OBJECTS.contains(&tag) => *number,
            _ => return Err(Errno::INVAL),
        };
        translated.extend_from_slice(&tag.to_le_bytes());
        translated.extend_from_slice(&permissions.to_le_bytes());
        translated.extend_from_slice(&number);
    }
    Ok(translated)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::share::IdRange;

    fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
        let mut bytes = VERSION.to_le_bytes().to_vec();
        for (tag, permissions, id) in entries {
            bytes.extend_from_slice(&tag.to_le_bytes());
            bytes.extend_from_slice(&permissions.to_le_bytes());
            bytes.extend_from_slice(&id.to_le_bytes());
        }
        bytes
    }

    fn maps() -> (UidMap, GidMap) {
        let range = |host| [IdRange { guest: 0, host, count: 100 }];
        (UidMap::of_ranges(&range(1000)).unwrap(), GidMap::of_ranges(&range(2000)).unwrap())
    }

    #[test]
    fn the_ids_of_named_users_and_groups_are_mapped_and_nothing_else() {
        let (uids, gids) = maps();
        let none = u32::MAX;
        let guest =
            acl(&[(1, 7, none), (2, 6, 5), (4, 5, none), (8, 4, 6), (16, 7, none), (32, 0, none)]);
        let host = acl(&[
            (1, 7, none),
            (2, 6, 1005),
            (4, 5, none),
            (8, 4, 2006),
            (16, 7, none),
            (32, 0, none),
        ]);
        assert_eq!(to_host(&guest, &uids, &gids), Ok(host.clone()));
        assert_eq!(to_guest(&host, &uids, &gids), Ok(guest));
        assert_eq!(to_guest(&acl(&[(2, 6, 5)]), &uids, &gids), Ok(acl(&[(2, 6, 65534)])));
        assert_eq!(to_host(&[], &uids, &gids), Ok(vec![]));
    }

    #[test]
    fn what_is_no_acl_is_refused() {
        let (uids, gids) = maps();
        let refused = |bytes: &[u8]| to_host(bytes, &uids, &gids).unwrap_err();
        assert_eq!(refused(&acl(&[(2, 6, 100)])), Errno::PERM, "no such user on the host");
        assert_eq!(refused(&acl(&[(8, 6, 100)])), Errno::PERM, "no such group on the host");
        assert_eq!(refused(&acl(&[(2, 6, u32::MAX)])), Errno::INVAL);
        assert_eq!(refused(&acl(&[(3, 6, 0)])), Errno::INVAL, "no such tag");
        assert_eq!(refused(&acl(&[(1, 8, 0)])), Errno::INVAL, "no such permission");
        let good = acl(&[(1, 7, 0), (32, 7, 0)]);
        for len in 1..good.len() {
            if (len - HEADER.min(len)) % ENTRY != 0 || len < HEADER {
                assert_eq!(refused(&good[..len]), Errno::INVAL, "{len} bytes");
            }
        }
        assert_eq!(refused(&[3, 0, 0, 0]), Errno::OPNOTSUPP, "another version");
        assert_eq!(to_guest(&[9], &uids, &gids), Err(Errno::IO));
    }
}
