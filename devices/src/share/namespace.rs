//! Names: looking up, making, renaming and removing entries.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, makedev, mkdirat, mknodat, readlinkat,
    renameat_with, symlinkat, unlinkat,
};

use super::identity::WithoutFsetid;
use super::inode::{Held, Inode, Key};
use super::{Share, host, pseudo};
use crate::fuse::abi::{ATTR_SUBMOUNT, CreateIn, EntryOut, OPEN_KILL_SUIDGID, OpenOut};
use crate::fuse::{Caller, Errno, Result};

impl Share {
    /// The directory of an operation on a name.
    pub(super) fn directory(&self, nodeid: u64) -> Result<Arc<Inode>> {
        let inode = self.inodes.get(nodeid)?;
        inode.check_open_to_guests()?;
        if inode.is_directory() { Ok(inode) } else { Err(Errno::NOTDIR) }
    }

    /// The same, of one that changes it.
    fn writable_directory(&self, nodeid: u64) -> Result<Arc<Inode>> {
        let inode = self.directory(nodeid)?;
        self.check_writable()?;
        Ok(inode)
    }

    /// LOOKUP. That there is no such entry is an answer that the guest may keep when it is not an error:
    /// node id 0 and for how long (`fuse_lookup_name`, fs/fuse/dir.c).
    pub(super) fn look_up(&self, directory: &Arc<Inode>, name: &CStr) -> Result<EntryOut> {
        let negative = self.options.timeouts().negative;
        let file = self.file(directory)?;
        match self.find_in(directory, &file, name) {
            Err(Errno::NOENT) if !negative.is_zero() => Ok(EntryOut {
                entry_valid: negative.as_secs(),
                entry_valid_nsec: negative.subsec_nanos(),
                ..EntryOut::default()
            }),
            found => found,
        }
    }

    /// Finds an entry and counts a lookup of it. `file` is the directory's.
    pub(super) fn find_in(
        &self,
        directory: &Arc<Inode>,
        file: impl AsFd,
        name: &CStr,
    ) -> Result<EntryOut> {
        self.entry(Some(directory), host::find(file, name)?)
    }

    /// Counts a lookup of the file behind an `O_PATH` descriptor.
    fn entry(&self, directory: Option<&Arc<Inode>>, fd: OwnedFd) -> Result<EntryOut> {
        let stat = host::stat(&fd)?;
        let crosses = directory.is_some_and(|one| Key::of(&stat).crosses_mount(&one.key));
        let closed = crosses && pseudo::is_pseudo(&fd)?;
        let inode = self.inodes.remember(fd, &stat, closed)?;
        let mounted = crosses && self.options.submounts && inode.is_directory();
        self.decide_dax(inode.nodeid, &stat);
        let timeouts = self.options.timeouts();
        Ok(EntryOut {
            nodeid: inode.nodeid,
            // The node id has its generation inside, and is never given out twice.
            generation: 0,
            entry_valid: timeouts.entry.as_secs(),
            attr_valid: timeouts.attributes.as_secs(),
            entry_valid_nsec: timeouts.entry.subsec_nanos(),
            attr_valid_nsec: timeouts.attributes.subsec_nanos(),
            attr: self.attr(inode.nodeid, &stat, if mounted { ATTR_SUBMOUNT } else { 0 }),
        })
    }

    /// Makes an entry by `make` as the caller, then looks it up.
    fn make(
        &self,
        caller: Caller,
        name: &CStr,
        make: impl FnOnce(&Held) -> rustix::io::Result<()>,
    ) -> Result<EntryOut> {
        let directory = self.writable_directory(caller.nodeid)?;
        let file = self.file(&directory)?;
        {
            let _identity = self.identity(caller)?;
            make(&file)?;
        }
        self.find_in(&directory, file, name)
    }

    pub(super) fn make_symlink(
        &self,
        caller: Caller,
        name: &CStr,
        target: &CStr,
    ) -> Result<EntryOut> {
        self.make(caller, name, |directory| symlinkat(target, directory, name))
    }

    pub(super) fn make_directory(
        &self,
        caller: Caller,
        name: &CStr,
        mode: u32,
    ) -> Result<EntryOut> {
        let mode = Mode::from_raw_mode(mode & 0o7777);
        self.make(caller, name, |directory| mkdirat(directory, name, mode))
    }

    /// MKNOD: regular files, FIFOs and sockets, which live in the guest alone. A device node would be one of
    /// the host's devices; only the whiteout of overlayfs (0, 0), which is no device at all, is always made.
    pub(super) fn make_node(
        &self,
        caller: Caller,
        name: &CStr,
        mode: u32,
        rdev: u32,
    ) -> Result<EntryOut> {
        let whiteout = mode & libc::S_IFMT == libc::S_IFCHR && rdev == 0;
        match mode & libc::S_IFMT {
            0 | libc::S_IFREG | libc::S_IFIFO | libc::S_IFSOCK => {}
            libc::S_IFCHR | libc::S_IFBLK if whiteout || self.options.device_nodes => {}
            libc::S_IFCHR | libc::S_IFBLK => return Err(Errno::PERM),
            _ => return Err(Errno::INVAL),
        }
        let kind = match mode & libc::S_IFMT {
            0 => FileType::RegularFile,
            kind => FileType::from_raw_mode(kind),
        };
        let permissions = Mode::from_raw_mode(mode & 0o7777);
        let device = decode_device(rdev);
        self.make(caller, name, |directory| mknodat(directory, name, kind, permissions, device))
    }

    pub(super) fn remove(&self, caller: Caller, name: &CStr, flags: AtFlags) -> Result<()> {
        let directory = self.writable_directory(caller.nodeid)?;
        Ok(unlinkat(self.file(&directory)?, name, flags)?)
    }

    pub(super) fn move_entry(
        &self,
        caller: Caller,
        name: &CStr,
        new_directory: u64,
        new_name: &CStr,
        flags: u32,
    ) -> Result<()> {
        let allowed = RenameFlags::NOREPLACE | RenameFlags::EXCHANGE | RenameFlags::WHITEOUT;
        let flags = RenameFlags::from_bits_retain(flags);
        if !allowed.contains(flags) {
            return Err(Errno::INVAL);
        }
        let old = self.directory(caller.nodeid)?;
        let new = self.writable_directory(new_directory)?;
        Ok(renameat_with(self.file(&old)?, name, self.file(&new)?, new_name, flags)?)
    }

    pub(super) fn make_link(&self, caller: Caller, nodeid: u64, name: &CStr) -> Result<EntryOut> {
        let inode = self.inodes.get(nodeid)?;
        let directory = self.writable_directory(caller.nodeid)?;
        if inode.is_directory() {
            return Err(Errno::PERM);
        }
        let into = self.file(&directory)?;
        self.host.link(self.file(&inode)?, &into, name)?;
        self.find_in(&directory, into, name)
    }

    pub(super) fn read_link(&self, caller: Caller) -> Result<Vec<u8>> {
        let inode = self.inodes.get(caller.nodeid)?;
        if inode.kind != libc::S_IFLNK {
            return Err(Errno::INVAL);
        }
        // An empty path means the descriptor's own file.
        Ok(readlinkat(self.file(&inode)?, c"", Vec::with_capacity(256))?.into_bytes())
    }

    /// CREATE. The Linux guest sends it for a name that it believes is not there.
    pub(super) fn create_file(
        &self,
        caller: Caller,
        name: &CStr,
        request: &CreateIn,
    ) -> Result<(EntryOut, OpenOut)> {
        let directory = self.writable_directory(caller.nodeid)?;
        let flags = self.open_flags(request.flags)?;
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        let parent = self.file(&directory)?;
        let made = {
            let _identity = self.identity(caller)?;
            host::create(&parent, name, self.creation_flags(flags), mode)
        };
        match made {
            Ok(fd) => self.created(fd, flags),
            Err(Errno::EXIST) if request.flags & libc::O_EXCL as u32 == 0 => {
                // Somebody was faster. Not by O_CREAT without O_EXCL: that would open whatever is there now,
                // a FIFO for example.
                let entry = self.find_in(&directory, &parent, name)?;
                let kill = request.fuse_flags & OPEN_KILL_SUIDGID != 0;
                self.open_existing(&entry, request.flags, kill)
                    .map(|open| (entry, open))
                    .inspect_err(|_| {
                        self.inodes.forget(entry.nodeid, 1);
                    })
            }
            Err(errno) => Err(errno),
        }
    }

    fn open_existing(&self, entry: &EntryOut, flags: u32, kill: bool) -> Result<OpenOut> {
        match entry.attr.mode & libc::S_IFMT {
            libc::S_IFREG => {
                let inode = self.inodes.get(entry.nodeid)?;
                self.open_inode(&inode, flags, kill)
            }
            libc::S_IFDIR => Err(Errno::ISDIR),
            // The guest looks the name up again and follows the link, or opens its own FIFO.
            _ => Err(Errno::STALE),
        }
    }

    /// TMPFILE.
    pub(super) fn create_unnamed(
        &self,
        caller: Caller,
        request: &CreateIn,
    ) -> Result<(EntryOut, OpenOut)> {
        let directory = self.writable_directory(caller.nodeid)?;
        let mut flags = self.creation_flags(self.open_flags(request.flags)?);
        // O_EXCL says that it will never get a name. Here it is no flag of an open file.
        flags.set(OFlags::EXCL, request.flags & libc::O_EXCL as u32 != 0);
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        let parent = self.file(&directory)?;
        let fd = {
            let _identity = self.identity(caller)?;
            host::create_unnamed(parent, flags, mode)?
        };
        self.created(fd, flags)
    }

    /// The node and the handle of a file that was just made. The node is found from the descriptor, not by
    /// name: that may be another file's by now.
    fn created(&self, fd: OwnedFd, flags: OFlags) -> Result<(EntryOut, OpenOut)> {
        let entry = self.entry(None, self.host.reopen(&fd, OFlags::PATH)?)?;
        self.add_open_file(entry.nodeid, fd, flags).map(|open| (entry, open)).inspect_err(|_| {
            self.inodes.forget(entry.nodeid, 1);
        })
    }

    /// Opens a regular file that the guest knows.
    pub(super) fn open_inode(&self, inode: &Arc<Inode>, flags: u32, kill: bool) -> Result<OpenOut> {
        if inode.is_directory() {
            return Err(Errno::ISDIR);
        }
        inode.check_openable()?;
        let flags = self.open_flags(flags)?;
        let fd = {
            let truncates = flags.contains(OFlags::TRUNC);
            let _kill = WithoutFsetid::when(kill && truncates)?;
            let fd = self.open_for_guest(&self.file(inode)?, flags)?;
            if truncates {
                self.drop_mapped_capability(&fd)?;
            }
            fd
        };
        self.add_open_file(inode.nodeid, fd, flags)
    }
}

/// A device number as the guest encodes it (`new_encode_dev`, linux/kdev_t.h).
fn decode_device(rdev: u32) -> u64 {
    let major = (rdev >> 8) & 0xfff;
    let minor = (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00);
    makedev(major, minor)
}
