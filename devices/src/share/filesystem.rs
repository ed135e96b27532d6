//! The share behind a FUSE session: which operation is done where.

use std::ffi::CStr;

use rustix::fs::AtFlags;

use super::{DaxPolicy, LockPolicy, Share};
use crate::fuse::abi::{
    AttrOut, CopyFileRangeIn, CreateIn, EntryOut, FallocateIn, FileLock, FlushIn, IoctlIn, Kstatfs,
    LkIn, LseekIn, OPEN_KILL_SUIDGID, OpenOut, ReadIn, ReleaseIn, SetattrIn, StatxOut, WriteIn,
};
use crate::fuse::{
    Caller, DirectorySink, FileSystem, LockReply, Payload, Placement, Preferences, Result, Wait,
    XattrReply,
};

impl FileSystem for Share {
    fn preferences(&self) -> Preferences {
        Preferences {
            writeback: self.options.writeback(),
            direct_io: self.options.direct_io(),
            submounts: self.options.submounts,
            dax: self.options.dax != DaxPolicy::Never,
            // With every file mapped, most writes never come here to be cleared by the host; then the
            // guest has to do it itself, by a SETATTR before the write.
            kill_privileges: self.options.dax != DaxPolicy::Always,
            readdirplus: true,
            acl: self.options.acl,
            groups: self.switch_identity,
            locks: self.options.locks == LockPolicy::Host,
        }
    }

    fn statistics(&self) -> Vec<(&'static str, u64)> {
        let mapped = self.mapped.iter().flat_map(|mapped| mapped.statistics());
        mapped.chain(self.watch_statistics()).collect()
    }

    fn window_has_grown(&self, size: u64) {
        if let Some(mapped) = &self.mapped {
            mapped.window_has_grown(size);
        }
    }

    fn answers_at_once(&self, nodeid: u64) -> bool {
        // The way to what is mounted below may lead through any other mount.
        let may_be_reached = |mount: &super::mount::Mount| mount.is_own() || self.all_are_near();
        let node = self.inodes.get(nodeid);
        self.slow.is_over()
            && node.is_ok_and(|node| {
                let mount = &node.identity.mount;
                self.is_near(mount.distance) && may_be_reached(mount)
            })
    }

    fn all_answer_at_once(&self, forgetting: bool) -> bool {
        // What has lost its last name goes when its node is forgotten, whatever its size; and a large table may become
        // a small one.
        self.slow.is_over()
            && self.all_are_near()
            && !(forgetting && (self.inodes.keeps_any() || self.inodes.are_many()))
    }

    fn was_slow(&self, _nodeid: u64) {
        self.slow.begin();
    }

    fn clear(&self) {
        self.handles.clear();
        // After the handles: a request that finds one of them from now on sets no lock any more.
        self.locks.clear();
        self.inodes.clear();
        self.directories.clear();
        if let Some(watch) = &self.watch {
            watch.clear();
            self.unopened.clear();
        }
        if let Some(mapped) = &self.mapped {
            mapped.all_forgotten(self.numbers.first..=self.numbers.last);
        }
    }

    fn lookup(&self, caller: Caller, name: &CStr) -> Result<EntryOut> {
        self.look_up(caller, name)
    }

    fn forget(&self, nodeid: u64, count: u64) {
        self.give_back(nodeid, count);
    }

    fn getattr(&self, caller: Caller, fh: Option<u64>) -> Result<AttrOut> {
        self.get_attributes(caller, fh)
    }

    fn statx(&self, caller: Caller, fh: Option<u64>, mask: u32) -> Result<StatxOut> {
        self.get_statx(caller, fh, mask)
    }

    fn setattr(&self, caller: Caller, change: &SetattrIn) -> Result<AttrOut> {
        self.set_attributes(caller, change)
    }

    fn access(&self, caller: Caller, mask: u32) -> Result<()> {
        self.check_access(caller, mask)
    }

    fn readlink(&self, caller: Caller) -> Result<Vec<u8>> {
        self.read_link(caller)
    }

    fn symlink(&self, caller: Caller, name: &CStr, target: &CStr) -> Result<EntryOut> {
        self.make_symlink(caller, name, target)
    }

    fn mknod(&self, caller: Caller, name: &CStr, mode: u32, rdev: u32) -> Result<EntryOut> {
        self.make_node(caller, name, mode, rdev)
    }

    fn mkdir(&self, caller: Caller, name: &CStr, mode: u32) -> Result<EntryOut> {
        self.make_directory(caller, name, mode)
    }

    fn unlink(&self, caller: Caller, name: &CStr) -> Result<()> {
        self.remove(caller, name, AtFlags::empty())
    }

    fn rmdir(&self, caller: Caller, name: &CStr) -> Result<()> {
        self.remove(caller, name, AtFlags::REMOVEDIR)
    }

    fn rename(
        &self,
        caller: Caller,
        name: &CStr,
        new_directory: u64,
        new_name: &CStr,
        flags: u32,
    ) -> Result<()> {
        self.move_entry(caller, name, new_directory, new_name, flags)
    }

    fn link(&self, caller: Caller, nodeid: u64, name: &CStr) -> Result<EntryOut> {
        self.make_link(caller, nodeid, name)
    }

    fn open(&self, caller: Caller, flags: u32, fuse_flags: u32) -> Result<OpenOut> {
        let inode = self.inodes.get(caller.nodeid)?;
        self.open_inode(caller, &inode, flags, fuse_flags & OPEN_KILL_SUIDGID != 0)
    }

    fn create(
        &self,
        caller: Caller,
        name: &CStr,
        request: &CreateIn,
    ) -> Result<(EntryOut, OpenOut)> {
        self.create_file(caller, name, request)
    }

    fn tmpfile(&self, caller: Caller, request: &CreateIn) -> Result<(EntryOut, OpenOut)> {
        self.create_unnamed(caller, request)
    }

    fn read(&self, caller: Caller, request: &ReadIn, target: Payload<'_, '_>) -> Result<usize> {
        self.read_file(caller, request, target)
    }

    fn write(&self, caller: Caller, request: &WriteIn, source: Payload<'_, '_>) -> Result<usize> {
        self.write_file(caller, request, source)
    }

    fn flush(&self, caller: Caller, request: &FlushIn) -> Result<()> {
        // The locks first: they go, whatever the host has to say about the data.
        self.drop_locks(caller, request)?;
        self.flush_file(caller, request.fh)
    }

    fn release(&self, caller: Caller, request: &ReleaseIn) -> Result<()> {
        self.release_file(caller, request)
    }

    fn get_lock(&self, caller: Caller, request: &LkIn) -> Result<FileLock> {
        self.test_lock(caller, request)
    }

    fn set_lock(
        &self,
        caller: Caller,
        request: &LkIn,
        wait: Option<Wait<'_>>,
    ) -> Result<LockReply> {
        self.lock_file(caller, request, wait)
    }

    fn fsync(&self, caller: Caller, fh: u64, data_only: bool) -> Result<()> {
        self.sync(caller, fh, data_only, true)
    }

    fn fallocate(&self, caller: Caller, request: &FallocateIn) -> Result<()> {
        self.allocate(caller, request)
    }

    fn lseek(&self, caller: Caller, request: &LseekIn) -> Result<u64> {
        self.seek_file(caller, request)
    }

    fn copy_file_range(&self, caller: Caller, request: &CopyFileRangeIn) -> Result<u64> {
        self.copy_range(caller, request)
    }

    fn ioctl(&self, caller: Caller, request: &IoctlIn, input: &[u8]) -> Result<Vec<u8>> {
        self.control(caller, request, input)
    }

    fn opendir(&self, caller: Caller, _flags: u32) -> Result<OpenOut> {
        self.open_directory(caller)
    }

    fn readdir(
        &self,
        caller: Caller,
        fh: u64,
        offset: u64,
        sink: &mut dyn DirectorySink,
    ) -> Result<()> {
        self.list(caller, fh, offset, sink)
    }

    fn releasedir(&self, caller: Caller, fh: u64) -> Result<()> {
        if caller.at_once {
            let handle = self.handles.get(caller.nodeid, fh)?;
            self.check_close_at_once(&handle)?;
        }
        self.handles.close(caller.nodeid, fh, |handle| handle.directory().is_ok())
    }

    fn fsyncdir(&self, caller: Caller, fh: u64, data_only: bool) -> Result<()> {
        self.sync(caller, fh, data_only, false)
    }

    fn statfs(&self, caller: Caller) -> Result<Kstatfs> {
        self.file_system(caller)
    }

    fn syncfs(&self, caller: Caller) -> Result<()> {
        self.sync_file_system(caller)
    }

    fn setxattr(
        &self,
        caller: Caller,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> Result<()> {
        self.set_xattr(caller, name, value, flags, kill_sgid)
    }

    fn getxattr(&self, caller: Caller, name: &CStr, size: u32) -> Result<XattrReply> {
        self.get_xattr(caller, name, size)
    }

    fn listxattr(&self, caller: Caller, size: u32) -> Result<XattrReply> {
        self.list_xattrs(caller, size)
    }

    fn removexattr(&self, caller: Caller, name: &CStr) -> Result<()> {
        self.remove_xattr(caller, name)
    }

    fn map(&self, caller: Caller, writable: bool, place: &mut dyn Placement) -> Result<()> {
        self.map_file(caller, writable, place)
    }
}
