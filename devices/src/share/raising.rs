//! Requests by which the agent in the guest only has those who watch a file there hear of what has happened on the host:
//! to its kernel they are changes, and here nothing is done ([`Share::is_raising`]).

use std::ffi::CStr;
use std::sync::Arc;

use rustix::fs::OFlags;

use super::inode::Inode;
use super::{Share, Watch};
use crate::fuse::abi::{EntryOut, OpenOut};
use crate::fuse::{Caller, Errno, Result};

impl Share {
    /// Whether a change is the agent's, which never makes any: nothing is to be done. No program of the guest has that
    /// thread's number, and a guest that claims to be it only loses its own changes.
    pub(super) fn is_raising(&self, caller: Caller) -> Option<&Watch> {
        self.watch.as_deref().filter(|watch| watch.is_agent(caller.pid))
    }

    /// # Errors
    ///
    /// `EPERM` for a change that is never made so.
    pub(super) fn refuse_raising(&self, caller: Caller) -> Result<()> {
        if self.is_raising(caller).is_some() { Err(Errno::PERM) } else { Ok(()) }
    }

    /// Makes what is there already, to the guest's kernel.
    ///
    /// # Errors
    ///
    /// `ENOENT` when it is not.
    pub(super) fn make_as_if(
        &self,
        watch: &Watch,
        caller: Caller,
        name: &CStr,
    ) -> Result<EntryOut> {
        watch.has_raised(caller.nodeid, name);
        let entry = self.look_up(caller, name)?;
        if entry.nodeid == 0 { Err(Errno::NOENT) } else { Ok(entry) }
    }

    /// Opens a file for the guest's kernel, and for nothing else.
    ///
    /// # Errors
    ///
    /// The host's; `ENFILE`.
    pub(super) fn open_as_if(&self, inode: &Arc<Inode>) -> Result<OpenOut> {
        inode.check_openable()?;
        let room = self.handles.room()?;
        let fd = self.host.reopen(self.file(inode)?, OFlags::PATH)?;
        self.add_open_file(inode.nodeid, fd, OFlags::RDONLY, room)
    }
}
