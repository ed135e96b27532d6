//! The tree behind a FUSE session: what is answered here, and what by which member.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use super::directories::{PARENT, SELF, Target};
use super::member::Member;
use super::{State, Tree};
use crate::fuse::abi::{
    self, ATTR_SUBMOUNT, AttrOut, CopyFileRangeIn, CreateIn, EntryOut, FallocateIn, FileLock,
    FlushIn, IoctlIn, Kstatfs, LkIn, LseekIn, OpenOut, ROOT_ID, ReadIn, ReleaseIn, SetattrIn,
    StatxOut, WriteIn,
};
use crate::fuse::{
    Caller, Counters, DirectorySink, Errno, FileSystem, Listing, LockReply, Payload, Placement,
    Preferences, Result, Wait, XattrReply,
};
use crate::share::{DaxPolicy, LockPolicy, NUMBER_BITS};
use crate::sync::{read, write};

/// Who answers a request.
enum At {
    /// The tree: the node id of one of its directories.
    Own(u64),
    /// A member.
    Member(Arc<Member>),
}

/// The only handle of a directory of the tree: nothing is held open for it.
const FH: u64 = 0;

/// A Linux guest takes `ENOSYS` as a word about the whole session and asks no more, whoever said it.
fn of_member<T>(result: Result<T>) -> Result<T> {
    result.map_err(|errno| if errno == Errno::NOSYS { Errno::OPNOTSUPP } else { errno })
}

impl Tree {
    /// # Errors
    ///
    /// `ENOENT`, `ESTALE`.
    fn at(&self, caller: Caller) -> Result<At> {
        let nodeid = caller.nodeid;
        if nodeid >> NUMBER_BITS != 0 {
            return Ok(At::Member(self.member(nodeid)?));
        }
        let directories = &read(&self.state).directories;
        match (directories.is(nodeid), directories.was(nodeid)) {
            (true, _) => Ok(At::Own(nodeid)),
            (_, true) => Err(Errno::STALE),
            _ => Err(Errno::NOENT),
        }
    }

    /// An operation that changes something, or is about an open file: not done by the tree itself.
    fn of_members<T>(
        &self,
        caller: Caller,
        otherwise: Errno,
        operation: impl FnOnce(&Member) -> Result<T>,
    ) -> Result<T> {
        match self.at(caller)? {
            At::Own(_) => Err(otherwise),
            At::Member(member) => of_member(operation(&member)),
        }
    }

    /// An operation on two nodes.
    fn of_both<T>(
        &self,
        caller: Caller,
        other: u64,
        operation: impl FnOnce(&Member) -> Result<T>,
    ) -> Result<T> {
        self.of_members(caller, Errno::ROFS, |member| {
            match self.at(Caller { nodeid: other, ..caller })? {
                At::Own(_) => Err(Errno::ROFS),
                // As between two mounts.
                At::Member(second) if second.index != member.index => Err(Errno::XDEV),
                At::Member(_) => operation(member),
            }
        })
    }

    fn own_attr(&self, id: u64) -> Result<abi::Attr> {
        read(&self.state).directories.attr(id).ok_or(Errno::STALE)
    }

    /// What a LOOKUP of something in the tree answers. A guest keeps none of these names.
    fn entry(&self, caller: Caller, number: u64, target: Target) -> Result<EntryOut> {
        match target {
            Target::Directory => {
                let attr = self.own_attr(number)?;
                Ok(EntryOut { nodeid: number, attr, ..EntryOut::default() })
            }
            Target::Member(index) => {
                let found = read(&self.state).members.get(&index).cloned();
                let member = found.ok_or(Errno::NOENT)?;
                let root = Caller { nodeid: member.root(), ..caller };
                if caller.at_once && !member.share.answers_at_once(root.nodeid) {
                    return Err(Errno::WOULD_WAIT);
                }
                let AttrOut { attr_valid, attr_valid_nsec, mut attr, .. } =
                    member.share.getattr(root, None)?;
                attr.flags |= ATTR_SUBMOUNT;
                member.looked_up();
                Ok(EntryOut {
                    nodeid: member.root(),
                    attr_valid,
                    attr_valid_nsec,
                    attr,
                    ..EntryOut::default()
                })
            }
        }
    }

    /// READDIR and READDIRPLUS of a directory of the tree.
    fn list_own(
        &self,
        caller: Caller,
        id: u64,
        offset: u64,
        sink: &mut dyn DirectorySink,
    ) -> Result<()> {
        let (parent, entries) = {
            let State { directories, .. } = &*read(&self.state);
            (directories.parent(id), directories.list(id, offset.max(PARENT)))
        };
        let mut listed = 0;
        for (number, name, ino) in [(SELF, c".", id), (PARENT, c"..", parent)] {
            if offset < number {
                if !sink.fits(name.count_bytes()) {
                    return if listed > 0 { Ok(()) } else { Err(Errno::INVAL) };
                }
                sink.add(&Listing { ino, next: number, kind: libc::DT_DIR, name }, None);
                listed += 1;
            }
        }
        for (number, entry) in entries {
            let name = CString::new(entry.name).map_err(|_| Errno::IO)?;
            if !sink.fits(name.count_bytes()) {
                return if listed > 0 { Ok(()) } else { Err(Errno::INVAL) };
            }
            // One that cannot be looked up is listed all the same.
            let found = match sink.plus() {
                true => self.entry(caller, number, entry.target).ok(),
                false => None,
            };
            let ino = found.as_ref().map_or(number, |found| found.attr.ino);
            let listing = Listing { ino, next: number, kind: libc::DT_DIR, name: &name };
            sink.add(&listing, found.as_ref());
            listed += 1;
        }
        Ok(())
    }
}

impl FileSystem for Tree {
    fn preferences(&self) -> Preferences {
        let session = &self.session;
        Preferences {
            // What one guest collects, another member's options may forbid.
            writeback: false,
            // Members may have cache=never, and be mapped all the same.
            direct_io: true,
            submounts: true,
            dax: session.dax != DaxPolicy::Never,
            kill_privileges: session.dax != DaxPolicy::Always,
            readdirplus: true,
            acl: session.acl,
            groups: session.switches_identity(),
            locks: session.locks == LockPolicy::Host,
        }
    }

    fn answers_at_once(&self, nodeid: u64) -> bool {
        // Its own directories are nowhere but here.
        nodeid >> NUMBER_BITS == 0
            || self.member(nodeid).is_ok_and(|member| member.share.answers_at_once(nodeid))
    }

    fn all_answer_at_once(&self, forgetting: bool) -> bool {
        let state = read(&self.state);
        state.members.values().all(|member| {
            // One that was removed goes with its last node.
            !(forgetting && member.is_removed()) && member.share.all_answer_at_once(forgetting)
        })
    }

    fn was_slow(&self, nodeid: u64) {
        if let Ok(member) = self.member(nodeid) {
            member.share.was_slow(nodeid);
        }
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let state = read(&self.state);
        let removed = state.members.values().filter(|member| member.is_removed()).count();
        let attached = state.members.len().saturating_sub(removed);
        let members = [("members", attached as u64), ("members_removed", removed as u64)];
        members.into_iter().chain(self.common.statistics()).collect()
    }

    fn counters_of(&self, nodeid: u64) -> Option<Arc<Counters>> {
        (nodeid >> NUMBER_BITS != 0)
            .then(|| self.member(nodeid).ok())
            .flatten()
            .map(|member| member.counters.clone())
    }

    fn window_has_grown(&self, size: u64) {
        self.common.window_has_grown(size);
    }

    /// The tree's own directories and the roots of members keep their numbers: none of them can be opened for
    /// more than a listing.
    fn clear(&self) {
        let (left, gone): (Vec<_>, Vec<_>) = {
            let mut state = write(&self.state);
            let gone: Vec<u32> = state
                .members
                .values()
                .filter(|member| member.is_removed())
                .map(|member| member.index)
                .collect();
            let gone = gone.iter().filter_map(|index| state.members.remove(index)).collect();
            (state.members.values().cloned().collect(), gone)
        };
        for member in left.iter().chain(&gone) {
            member.clear();
        }
    }

    fn lookup(&self, caller: Caller, name: &CStr) -> Result<EntryOut> {
        match self.at(caller)? {
            At::Member(member) => of_member(member.share.lookup(caller, name)),
            At::Own(id) => {
                let name = name.to_str().map_err(|_| Errno::NOENT)?;
                let found = read(&self.state).directories.entry(id, name);
                let (number, target) = found.ok_or(Errno::NOENT)?;
                self.entry(caller, number, target)
            }
        }
    }

    fn forget(&self, nodeid: u64, count: u64) {
        // The tree's own directories are there as long as they lead somewhere.
        if nodeid >> NUMBER_BITS == 0 {
            return;
        }
        if let Ok(member) = self.member(nodeid) {
            member.forget(nodeid, count);
            self.drop_unused(&member);
        }
    }

    fn getattr(&self, caller: Caller, fh: Option<u64>) -> Result<AttrOut> {
        match self.at(caller)? {
            At::Member(member) => of_member(member.share.getattr(caller, fh)),
            At::Own(id) => Ok(AttrOut { attr: self.own_attr(id)?, ..AttrOut::default() }),
        }
    }

    fn statx(&self, caller: Caller, fh: Option<u64>, mask: u32) -> Result<StatxOut> {
        let id = match self.at(caller)? {
            // ENOSYS would be for all, and it is what the guest can do without: it asks by GETATTR then.
            At::Member(member) => return member.share.statx(caller, fh, mask),
            At::Own(id) => id,
        };
        let attr = self.own_attr(id)?;
        let time = abi::SxTime {
            tv_sec: attr.mtime as i64,
            tv_nsec: attr.mtimensec,
            ..abi::SxTime::default()
        };
        Ok(StatxOut {
            stat: abi::Statx {
                mask: mask & libc::STATX_BASIC_STATS,
                blksize: attr.blksize,
                nlink: attr.nlink,
                mode: (libc::S_IFDIR | 0o555) as u16,
                ino: attr.ino,
                atime: time,
                ctime: time,
                mtime: time,
                ..abi::Statx::default()
            },
            ..StatxOut::default()
        })
    }

    fn setattr(&self, caller: Caller, change: &SetattrIn) -> Result<AttrOut> {
        self.of_members(caller, Errno::ROFS, |member| member.share.setattr(caller, change))
    }

    fn access(&self, caller: Caller, mask: u32) -> Result<()> {
        match self.at(caller)? {
            At::Member(member) => of_member(member.share.access(caller, mask)),
            At::Own(_) if mask & !0o7 != 0 => Err(Errno::INVAL),
            At::Own(_) if mask & libc::W_OK as u32 != 0 => Err(Errno::ROFS),
            At::Own(_) => Ok(()),
        }
    }

    fn readlink(&self, caller: Caller) -> Result<Vec<u8>> {
        self.of_members(caller, Errno::INVAL, |member| member.share.readlink(caller))
    }

    fn symlink(&self, caller: Caller, name: &CStr, target: &CStr) -> Result<EntryOut> {
        self.of_members(caller, Errno::ROFS, |member| member.share.symlink(caller, name, target))
    }

    fn mknod(&self, caller: Caller, name: &CStr, mode: u32, rdev: u32) -> Result<EntryOut> {
        self.of_members(caller, Errno::ROFS, |member| member.share.mknod(caller, name, mode, rdev))
    }

    fn mkdir(&self, caller: Caller, name: &CStr, mode: u32) -> Result<EntryOut> {
        self.of_members(caller, Errno::ROFS, |member| member.share.mkdir(caller, name, mode))
    }

    fn unlink(&self, caller: Caller, name: &CStr) -> Result<()> {
        self.of_members(caller, Errno::ROFS, |member| member.share.unlink(caller, name))
    }

    fn rmdir(&self, caller: Caller, name: &CStr) -> Result<()> {
        self.of_members(caller, Errno::ROFS, |member| member.share.rmdir(caller, name))
    }

    fn rename(
        &self,
        caller: Caller,
        name: &CStr,
        new_directory: u64,
        new_name: &CStr,
        flags: u32,
    ) -> Result<()> {
        self.of_both(caller, new_directory, |member| {
            member.share.rename(caller, name, new_directory, new_name, flags)
        })
    }

    fn link(&self, caller: Caller, nodeid: u64, name: &CStr) -> Result<EntryOut> {
        self.of_both(caller, nodeid, |member| member.share.link(caller, nodeid, name))
    }

    fn open(&self, caller: Caller, flags: u32, fuse_flags: u32) -> Result<OpenOut> {
        self.of_members(caller, Errno::ISDIR, |member| member.share.open(caller, flags, fuse_flags))
    }

    fn create(
        &self,
        caller: Caller,
        name: &CStr,
        request: &CreateIn,
    ) -> Result<(EntryOut, OpenOut)> {
        self.of_members(caller, Errno::ROFS, |member| member.share.create(caller, name, request))
    }

    fn tmpfile(&self, caller: Caller, request: &CreateIn) -> Result<(EntryOut, OpenOut)> {
        self.of_members(caller, Errno::ROFS, |member| member.share.tmpfile(caller, request))
    }

    fn read(&self, caller: Caller, request: &ReadIn, target: Payload<'_, '_>) -> Result<usize> {
        self.of_members(caller, Errno::BADF, |member| member.share.read(caller, request, target))
    }

    fn write(&self, caller: Caller, request: &WriteIn, source: Payload<'_, '_>) -> Result<usize> {
        self.of_members(caller, Errno::BADF, |member| member.share.write(caller, request, source))
    }

    fn flush(&self, caller: Caller, request: &FlushIn) -> Result<()> {
        self.of_members(caller, Errno::BADF, |member| member.share.flush(caller, request))
    }

    fn release(&self, caller: Caller, request: &ReleaseIn) -> Result<()> {
        self.of_members(caller, Errno::BADF, |member| {
            let released = member.share.release(caller, request);
            self.drop_unused(member);
            released
        })
    }

    fn get_lock(&self, caller: Caller, request: &LkIn) -> Result<FileLock> {
        self.of_members(caller, Errno::BADF, |member| member.share.get_lock(caller, request))
    }

    fn set_lock(
        &self,
        caller: Caller,
        request: &LkIn,
        wait: Option<Wait<'_>>,
    ) -> Result<LockReply> {
        self.of_members(caller, Errno::BADF, |member| member.share.set_lock(caller, request, wait))
    }

    fn fsync(&self, caller: Caller, fh: u64, data_only: bool) -> Result<()> {
        self.of_members(caller, Errno::BADF, |member| {
            member.share.fsync(caller, fh, data_only)?;
            // What the guest has stored in its own copy is in no file, and whoever syncs is to hear of it.
            let severed = || {
                let file = member.share.file_number(caller.nodeid, fh)?;
                Some(self.window.as_ref()?.is_severed(member.index, file))
            };
            match member.share.is_read_only() && severed() == Some(true) {
                true => Err(Errno::ROFS),
                false => Ok(()),
            }
        })
    }

    fn fallocate(&self, caller: Caller, request: &FallocateIn) -> Result<()> {
        self.of_members(caller, Errno::BADF, |member| member.share.fallocate(caller, request))
    }

    fn lseek(&self, caller: Caller, request: &LseekIn) -> Result<u64> {
        self.of_members(caller, Errno::BADF, |member| member.share.lseek(caller, request))
    }

    fn copy_file_range(&self, caller: Caller, request: &CopyFileRangeIn) -> Result<u64> {
        self.of_both(caller, request.nodeid_out, |member| {
            member.share.copy_file_range(caller, request)
        })
    }

    fn ioctl(&self, caller: Caller, request: &IoctlIn, input: &[u8]) -> Result<Vec<u8>> {
        self.of_members(caller, Errno::NOTTY, |member| member.share.ioctl(caller, request, input))
    }

    fn opendir(&self, caller: Caller, flags: u32) -> Result<OpenOut> {
        match self.at(caller)? {
            At::Member(member) => of_member(member.share.opendir(caller, flags)),
            // Nothing of it is to be kept.
            At::Own(_) => Ok(OpenOut { fh: FH, ..OpenOut::default() }),
        }
    }

    fn readdir(
        &self,
        caller: Caller,
        fh: u64,
        offset: u64,
        sink: &mut dyn DirectorySink,
    ) -> Result<()> {
        match self.at(caller)? {
            At::Member(member) => of_member(member.share.readdir(caller, fh, offset, sink)),
            At::Own(id) if fh == FH => self.list_own(caller, id, offset, sink),
            At::Own(_) => Err(Errno::BADF),
        }
    }

    fn releasedir(&self, caller: Caller, fh: u64) -> Result<()> {
        match self.at(caller)? {
            At::Member(member) => {
                let released = of_member(member.share.releasedir(caller, fh));
                self.drop_unused(&member);
                released
            }
            At::Own(_) if fh == FH => Ok(()),
            At::Own(_) => Err(Errno::BADF),
        }
    }

    fn fsyncdir(&self, caller: Caller, fh: u64, data_only: bool) -> Result<()> {
        match self.at(caller)? {
            At::Member(member) => of_member(member.share.fsyncdir(caller, fh, data_only)),
            At::Own(_) if fh == FH => Ok(()),
            At::Own(_) => Err(Errno::BADF),
        }
    }

    fn statfs(&self, caller: Caller) -> Result<Kstatfs> {
        match self.at(caller)? {
            At::Member(member) => of_member(member.share.statfs(caller)),
            At::Own(_) => {
                let namelen = abi::NAME_MAX as u32;
                Ok(Kstatfs { bsize: 4096, frsize: 4096, namelen, ..Kstatfs::default() })
            }
        }
    }

    fn syncfs(&self, caller: Caller) -> Result<()> {
        match self.at(caller)? {
            At::Member(member) => of_member(member.share.syncfs(caller)),
            // Nothing of it is on a disk, and the guest asks for each member by itself.
            At::Own(_) => Ok(()),
        }
    }

    fn setxattr(
        &self,
        caller: Caller,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> Result<()> {
        self.of_members(caller, Errno::ROFS, |member| {
            member.share.setxattr(caller, name, value, flags, kill_sgid)
        })
    }

    fn getxattr(&self, caller: Caller, name: &CStr, size: u32) -> Result<XattrReply> {
        self.of_members(caller, Errno::OPNOTSUPP, |member| {
            member.share.getxattr(caller, name, size)
        })
    }

    fn listxattr(&self, caller: Caller, size: u32) -> Result<XattrReply> {
        self.of_members(caller, Errno::OPNOTSUPP, |member| member.share.listxattr(caller, size))
    }

    fn removexattr(&self, caller: Caller, name: &CStr) -> Result<()> {
        self.of_members(caller, Errno::ROFS, |member| member.share.removexattr(caller, name))
    }

    fn map(&self, caller: Caller, writable: bool, place: &mut dyn Placement) -> Result<()> {
        self.of_members(caller, Errno::INVAL, |member| member.share.map(caller, writable, place))
    }
}

// The root of the tree is that of the session.
const _: () = assert!(ROOT_ID >> NUMBER_BITS == 0);
