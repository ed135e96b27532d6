//! Who the host thinks is asking.
//!
//! The process serves a share as itself. Two things are done as someone else:
//!
//! - What is made (CREATE, MKDIR, MKNOD, SYMLINK, TMPFILE) is made with the file system ids of the guest's
//!   process, so that owner, group, setgid directories and the host's quota come out as they would there.
//! - What the guest does for a process without CAP_FSETID is done without it, so that the host's kernel
//!   clears suid and sgid in the same step as it changes the file.

use std::cell::Cell;

use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use super::sys;
use crate::fuse::{Errno, Result};

thread_local! {
    /// The thread has no supplementary groups any more. They would count as the guest process's
    /// (CVE-2022-0358: a setgid file in a group it is not in).
    static GROUPS_DROPPED: Cell<bool> = const { Cell::new(false) };
    /// The ids that a guard could not restore, if that ever happened.
    static STUCK: Cell<bool> = const { Cell::new(false) };
}

/// The calling thread makes files as another user until this is dropped.
pub(super) struct AsUser {
    before: Option<(u32, u32)>,
}

impl AsUser {
    /// Nobody else.
    pub(super) fn unchanged() -> Self {
        Self { before: None }
    }

    /// Takes on the ids.
    ///
    /// What the guest's process may do in a directory was decided by the guest, which knows the process's
    /// groups. So CAP_DAC_OVERRIDE is kept, and with it only the ownership of what is made changes.
    ///
    /// # Errors
    ///
    /// `EPERM` when the process may not take on these ids (they are not mapped in its user namespace), `EIO`
    /// when this thread is stuck with other ones.
    pub(super) fn switch(uid: u32, gid: u32) -> Result<Self> {
        if STUCK.get() {
            return Err(Errno::IO);
        }
        if uid == u32::MAX || gid == u32::MAX {
            return Err(Errno::INVAL);
        }
        if !GROUPS_DROPPED.get() {
            // A user namespace may forbid setgroups(2), which is no harm where there are none.
            if !rustix::process::getgroups()?.is_empty() {
                sys::drop_groups()?;
            }
            GROUPS_DROPPED.set(true);
        }
        let overrides = capabilities(None)?.effective & CapabilitySet::DAC_OVERRIDE;
        // The group first: afterwards the capability to set it may be gone. From here on, dropping the
        // guard undoes it.
        let gid_before = sys::set_fsgid(gid);
        let uid_before = sys::set_fsuid(uid);
        let guard = Self { before: Some((uid_before, gid_before)) };
        if sys::fsgid() != gid || sys::fsuid() != uid {
            return Err(Errno::PERM);
        }
        if uid != 0 && !overrides.is_empty() {
            let now = capabilities(None)?;
            set_capabilities(None, CapabilitySets { effective: now.effective | overrides, ..now })?;
        }
        Ok(guard)
    }
}

impl Drop for AsUser {
    fn drop(&mut self) {
        let Some((uid, gid)) = self.before else {
            return;
        };
        // Going back to the user of before gives back the capabilities that leaving it took
        // (capabilities(7), "Effect of user ID changes").
        sys::set_fsuid(uid);
        sys::set_fsgid(gid);
        if sys::fsuid() != uid || sys::fsgid() != gid {
            // Cannot happen: going back to one's own ids is always allowed. If it does, this thread makes
            // nothing any more; all else it does is done with fewer rights than before.
            STUCK.set(true);
            log::error!("a thread could not take its own user and group id back");
        }
    }
}

/// The calling thread has no CAP_FSETID until this is dropped.
pub(super) struct WithoutFsetid {
    before: Option<CapabilitySets>,
}

impl WithoutFsetid {
    /// Drops the capability if `drop` says so and the thread has it.
    ///
    /// # Errors
    ///
    /// The host's: then the operation must not go on.
    pub(super) fn when(drop: bool) -> Result<Self> {
        if !drop {
            return Ok(Self { before: None });
        }
        let now = capabilities(None)?;
        if !now.effective.contains(CapabilitySet::FSETID) {
            return Ok(Self { before: None });
        }
        set_capabilities(
            None,
            CapabilitySets { effective: now.effective - CapabilitySet::FSETID, ..now },
        )?;
        Ok(Self { before: Some(now) })
    }
}

impl Drop for WithoutFsetid {
    fn drop(&mut self) {
        if let Some(before) = self.before
            && let Err(error) = set_capabilities(None, before)
        {
            // Fewer rights than before, never more.
            log::error!("a thread could not take CAP_FSETID back: {error}");
        }
    }
}
