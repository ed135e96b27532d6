//! Who the host thinks is asking.
//!
//! The process serves a share as itself. Two things are done as someone else:
//!
//! - What is made (CREATE, MKDIR, MKNOD, SYMLINK, TMPFILE) is made with the file system ids of the guest's
//!   process and the one supplementary group of its that counts, so that owner, group, setgid directories,
//!   default ACLs and the host's quota come out as they would there. A process that may not take on ids (an
//!   ordinary user's) makes everything as itself.
//! - What the guest does for a process without CAP_FSETID is done without it, so that the host's kernel
//!   clears suid and sgid in the same step as it changes the file.

use std::cell::Cell;

use rustix::fs::Mode;
use rustix::process::{Gid, getegid, geteuid, getgroups, umask};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, set_capabilities, set_thread_groups,
};

use super::ids::{GuestGid, GuestUid, HostGid, HostUid};
use super::{Share, sys};
use crate::fuse::{Caller, Errno, Result};

thread_local! {
    /// What a guard could not restore, if that ever happened.
    static STUCK: Cell<bool> = const { Cell::new(false) };
    /// The thread's umask is its own and not the process's.
    static OWN_UMASK: Cell<bool> = const { Cell::new(false) };
}

/// Whether this process may take on other ids: root's can, and one that has a user namespace of its own.
pub(super) fn can_switch() -> bool {
    let needed = CapabilitySet::SETUID | CapabilitySet::SETGID;
    capabilities(None).is_ok_and(|sets| sets.effective.contains(needed))
}

/// The ids of the process itself, which its threads have when they serve nobody in particular.
pub(super) fn own() -> (HostUid, HostGid) {
    (HostUid(geteuid().as_raw()), HostGid(getegid().as_raw()))
}

impl Share {
    /// Makes the calling thread make files as `caller` would, until the guard is dropped.
    ///
    /// # Errors
    ///
    /// `EPERM` for a user or group that the host has none for, or that this process may not take on (one that
    /// is not mapped in its user namespace); `EINVAL` for the id that is none; `EIO` when this thread is stuck
    /// with what it took on before.
    pub(super) fn identity(&self, caller: Caller) -> Result<AsUser> {
        let mut guard = AsUser::default();
        // Also where what is made is this process's in any case: not everybody in the guest has files here.
        let uid = self.options.uids.to_host(GuestUid(caller.uid))?;
        let gid = self.options.gids.to_host(GuestGid(caller.gid))?;
        if self.switch_identity {
            // A group that no file here can have gives no right to any.
            let group = caller.group.and_then(|id| self.options.gids.to_host(GuestGid(id)).ok());
            let is_root = caller.uid == 0;
            if !is_root || group.is_some() || (uid, gid) != self.own {
                // Not by a thread that is somebody else's.
                if caller.at_once {
                    return Err(Errno::WOULD_WAIT);
                }
                guard.take_on(uid, gid, group, is_root)?;
            }
        }
        if let Some(mask) = caller.umask {
            if caller.at_once {
                return Err(Errno::WOULD_WAIT);
            }
            guard.umask = Umask::set(mask)?;
        }
        Ok(guard)
    }
}

/// The calling thread makes files as another user until this is dropped. The fields are given back from the
/// first to the last.
#[derive(Default)]
pub(super) struct AsUser {
    umask: Umask,
    ids: Ids,
    groups: Groups,
    fsetid: WithoutFsetid,
}

impl AsUser {
    /// Takes on the ids.
    ///
    /// What the guest's process may do in a directory was decided by the guest, which knows all its groups.
    /// So CAP_DAC_OVERRIDE and CAP_MKNOD are kept, and with them only the ownership of what is made changes;
    /// and CAP_FSETID when it is the guest's root that asks, so that sgid comes out as root may have it.
    fn take_on(
        &mut self,
        uid: HostUid,
        gid: HostGid,
        group: Option<HostGid>,
        is_root: bool,
    ) -> Result<()> {
        if STUCK.get() {
            return Err(Errno::IO);
        }
        self.fsetid = WithoutFsetid::when(!is_root)?;
        self.groups = Groups::only(group)?;
        let kept = CapabilitySet::DAC_OVERRIDE | CapabilitySet::MKNOD | CapabilitySet::FSETID;
        let kept = capabilities(None)?.effective & kept;
        // The group first: afterwards the capability to set it may be gone. From here on, dropping the
        // guard undoes it.
        let gid_before = sys::set_fsgid(gid.0);
        let uid_before = sys::set_fsuid(uid.0);
        self.ids = Ids { before: Some((uid_before, gid_before)) };
        if sys::fsgid() != gid.0 || sys::fsuid() != uid.0 {
            return Err(Errno::PERM);
        }
        // Who is no longer user 0 has lost them (capabilities(7), "Effect of user ID changes").
        let now = capabilities(None)?;
        if !now.effective.contains(kept) {
            set_capabilities(None, CapabilitySets { effective: now.effective | kept, ..now })?;
        }
        Ok(())
    }
}

/// File system ids to go back to.
#[derive(Default)]
struct Ids {
    before: Option<(u32, u32)>,
}

impl Drop for Ids {
    fn drop(&mut self) {
        let Some((uid, gid)) = self.before else {
            return;
        };
        // Going back to the user of before gives back the capabilities that leaving it took.
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

/// Supplementary groups to go back to. Those of this process would count as the guest process's
/// (CVE-2022-0358: a setgid file in a group it is not in), and the process may need them to reach its files.
#[derive(Default)]
struct Groups {
    before: Option<Vec<Gid>>,
}

impl Groups {
    /// The calling thread has `group` and no other.
    fn only(group: Option<HostGid>) -> Result<Self> {
        let before = getgroups()?;
        let wanted: Vec<_> = group.map(|group| Gid::from_raw(group.0)).into_iter().collect();
        // A user namespace may forbid setgroups(2), which is no harm where there is nothing to change.
        if before == wanted {
            return Ok(Self::default());
        }
        set_thread_groups(&wanted)?;
        Ok(Self { before: Some(before) })
    }
}

impl Drop for Groups {
    fn drop(&mut self) {
        if let Some(before) = &self.before
            && let Err(error) = set_thread_groups(before)
        {
            STUCK.set(true);
            log::error!("a thread could not take its own groups back: {error}");
        }
    }
}

/// A umask to go back to.
#[derive(Default)]
struct Umask {
    before: Option<Mode>,
}

impl Umask {
    /// The calling thread has the umask `mask`. By it, and not by cutting the mode: the host's kernel leaves
    /// the umask out in a directory with a default ACL, in the same step as it makes the file.
    fn set(mask: u32) -> Result<Self> {
        if !OWN_UMASK.get() {
            sys::unshare_umask()?;
            OWN_UMASK.set(true);
        }
        Ok(Self { before: Some(umask(Mode::from_raw_mode(mask & 0o777))) })
    }
}

impl Drop for Umask {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            umask(before);
        }
    }
}

/// The calling thread has no CAP_FSETID until this is dropped.
#[derive(Default)]
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
            return Ok(Self::default());
        }
        let now = capabilities(None)?;
        if !now.effective.contains(CapabilitySet::FSETID) {
            return Ok(Self::default());
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
