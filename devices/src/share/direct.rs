//! READ and WRITE of data, and O_DIRECT.
//!
//! A program in the guest that opens with O_DIRECT may use any buffer, offset and length that the guest's
//! kernel lets through, which for FUSE is all of them. The host's file systems want whole blocks of their
//! disk, at addresses that their disk can reach, and some know no O_DIRECT at all. So
//!
//! - with [`DirectPolicy::Buffered`] the flag ends in the guest, and all data goes through the host's cache;
//! - with [`DirectPolicy::Host`] such a request is tried on a second descriptor that is open with O_DIRECT,
//!   and what the host refuses there goes through its cache. The host's kernel keeps the two in step: before
//!   it reads or writes a range directly it writes back what is dirty in the cache, and afterwards throws out
//!   what is there. Neither way is data on the disk before an FSYNC, which is all that O_DIRECT promises.
//!
//! The flags are those of the request, not of the OPEN: fcntl(2) can change them meanwhile.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;

use rustix::fs::{OFlags, fcntl_getfl};

use super::budget::Permit;
use super::handle::OpenFile;
use super::{DaxPolicy, DirectPolicy, Share};
use crate::fuse::abi::{ReadIn, WRITE_CACHE, WriteIn};
use crate::fuse::{Errno, Payload, Result};

/// The second descriptor of an open file, opened by the first request that asks for it; none when the host
/// refuses, or when there are no descriptors left for the guest.
#[derive(Default)]
pub(super) struct Direct(OnceLock<Option<(OwnedFd, Permit)>>);

impl Share {
    /// Reads what there is, up to the end of the file.
    pub(super) fn read_data(
        &self,
        file: &OpenFile,
        request: &ReadIn,
        target: &Payload<'_, '_>,
    ) -> Result<usize> {
        let direct = self.direct(file, request.flags, target);
        move_data(direct, &file.fd, target.len(), |fd, done| {
            let offset = request.offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
            target.rest(done).read_from(fd, offset, 0)
        })
    }

    /// Writes with `flags` of pwritev2(2).
    pub(super) fn write_data(
        &self,
        file: &OpenFile,
        request: &WriteIn,
        source: &Payload<'_, '_>,
        flags: i32,
    ) -> Result<usize> {
        let direct = match request.fuse_flags & WRITE_CACHE {
            0 => self.direct(file, request.flags, source),
            // A page of the guest's cache, through whatever handle.
            _ => None,
        };
        move_data(direct, &file.fd, source.len(), |fd, done| {
            let offset = request.offset.checked_add(done as u64).ok_or(Errno::INVAL)?;
            source.rest(done).write_to(fd, offset, flags)
        })
    }

    /// Whether a request with these flags asks for O_DIRECT and may have it.
    pub(super) fn is_direct(&self, flags: u32) -> bool {
        let wanted = flags & libc::O_DIRECT as u32 != 0;
        // Windows are made of the cache, and a store to a mapped page meanwhile would be lost.
        let allowed =
            self.options.direct == DirectPolicy::Host && self.options.dax == DaxPolicy::Never;
        wanted && allowed
    }

    /// The descriptor for a request that asks for O_DIRECT and may have it.
    fn direct<'f>(
        &self,
        file: &'f OpenFile,
        flags: u32,
        data: &Payload<'_, '_>,
    ) -> Option<BorrowedFd<'f>> {
        // A buffer in a window (another share's) is itself a page of the cache, perhaps of the very range.
        if !self.is_direct(flags) || data.is_in_window() {
            return None;
        }
        let (fd, _) = file.direct.0.get_or_init(|| self.open_direct(file).ok()).as_ref()?;
        Some(fd.as_fd())
    }

    /// # Errors
    ///
    /// `EINVAL` where the file system knows no O_DIRECT (overlayfs over such a one, tmpfs before Linux 6.6),
    /// `ENFILE`.
    fn open_direct(&self, file: &OpenFile) -> Result<(OwnedFd, Permit)> {
        let permit = self.descriptors.take(1)?;
        let kept = OFlags::ACCMODE | OFlags::SYNC | OFlags::DSYNC;
        let flags = (fcntl_getfl(&file.fd)? & kept) | OFlags::DIRECT;
        Ok((self.host.reopen(&file.fd, flags)?, permit))
    }
}

/// Moves `len` bytes by `step`, which is told a descriptor and how many are done: by the direct descriptor
/// first, if there is one, and what that leaves by the other.
fn move_data(
    direct: Option<BorrowedFd<'_>>,
    buffered: &OwnedFd,
    len: usize,
    step: impl Fn(BorrowedFd<'_>, usize) -> Result<usize>,
) -> Result<usize> {
    let done = match direct.map(|direct| step(direct, 0)) {
        // Not so, at least not from here on: an odd offset, address or length.
        None | Some(Err(Errno::INVAL)) => 0,
        Some(result) => result?,
    };
    if done > 0 && done >= len {
        return Ok(done);
    }
    match step(buffered.as_fd(), done) {
        Ok(more) => Ok(done + more),
        Err(_) if done > 0 => Ok(done),
        Err(error) => Err(error),
    }
}
