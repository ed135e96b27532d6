//! Names: looking up, making, renaming and removing entries.

use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RenameFlags, Statx, makedev, mkdirat, mknodat, readlinkat,
    renameat_with, symlinkat, unlinkat,
};

use super::budget::Permit;
use super::changes::Changing;
use super::handle::Room;
use super::identity::WithoutFsetid;
use super::inode::{Identity, Inode};
use super::mount::Mount;
use super::options::DAY;
use super::reach::Held;
use super::{Share, host};
use crate::fuse::abi::{ATTR_SUBMOUNT, CreateIn, EntryOut, OPEN_KILL_SUIDGID, OpenOut};
use crate::fuse::{Caller, Errno, Result};

/// So many blocks of 512 bytes of a file are given back by who must not wait: 16 MiB, which are some ten
/// extents.
pub(super) const FREED_AT_ONCE: u64 = 32 << 10;

/// The node that a name belongs to.
struct Owner {
    inode: Arc<Inode>,
    fd: OwnedFd,
}

fn is_directory(stat: &Statx) -> bool {
    u32::from(stat.stx_mode) & libc::S_IFMT == libc::S_IFDIR
}

impl Share {
    /// The directory of an operation on a name.
    pub(super) fn directory(&self, nodeid: u64) -> Result<Arc<Inode>> {
        let inode = self.inodes.get(nodeid)?;
        inode.check_open_to_guests()?;
        if inode.is_directory() { Ok(inode) } else { Err(Errno::NOTDIR) }
    }

    /// The same, of one that changes it.
    fn writable_directory(&self, nodeid: u64) -> Result<(Arc<Inode>, Changing<'_>)> {
        let inode = self.directory(nodeid)?;
        Ok((inode, self.change()?))
    }

    /// LOOKUP. That there is no such entry is an answer that the guest may keep when it is not an error:
    /// node id 0 and for how long (`fuse_lookup_name`, fs/fuse/dir.c).
    pub(super) fn look_up(&self, caller: Caller, name: &CStr) -> Result<EntryOut> {
        let directory = self.directory(caller.nodeid)?;
        let file = self.file(&directory)?;
        let told = self.tell(&directory, &file, name);
        let found = self.find_told(caller, &directory, &file, name, told);
        let kept = matches!(found, Err(Errno::NOENT)) && self.is_told(told, &directory, name, None);
        let negative = if kept { DAY } else { self.options.timeouts().negative };
        match found {
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
        caller: Caller,
        directory: &Arc<Inode>,
        file: impl AsFd,
        name: &CStr,
    ) -> Result<EntryOut> {
        let told = self.tell(directory, &file, name);
        self.find_told(caller, directory, file, name, told)
    }

    fn find_told(
        &self,
        caller: Caller,
        directory: &Arc<Inode>,
        file: impl AsFd,
        name: &CStr,
        told: bool,
    ) -> Result<EntryOut> {
        let found = match caller.at_once {
            true => host::find_unmounted(file, name)?,
            false => host::find(file, name)?,
        };
        self.entry(directory, Some((name, told)), found, None)
    }

    /// The guest is about to be told of a name. `true`: if it is, it may keep it for good.
    fn tell(&self, directory: &Inode, file: impl AsFd, name: &CStr) -> bool {
        let watch = self.watch.as_ref();
        watch
            .is_some_and(|watch| self.covers(directory, file) && watch.tell(directory.nodeid, name))
    }

    /// Whether it still is, now that it is known what it is: a node and how many names that has, or nothing.
    fn is_told(
        &self,
        told: bool,
        directory: &Inode,
        name: &CStr,
        found: Option<(&Inode, u32)>,
    ) -> bool {
        told && self.watch.as_ref().is_some_and(|watch| {
            let (node, alone) = found.map_or((0, false), |(inode, links)| {
                (inode.nodeid, inode.is_directory() || links == 1)
            });
            watch.found(directory.nodeid, name, node, alone)
        })
    }

    /// Counts a lookup of the file behind a descriptor, which was found in `directory` under `name` or was
    /// made there without one. Of the name, `true` says that the guest may keep it for good. `room` is that of its
    /// node, if it was made.
    fn entry(
        &self,
        directory: &Arc<Inode>,
        name: Option<(&CStr, bool)>,
        fd: impl AsFd,
        room: Option<Permit>,
    ) -> Result<EntryOut> {
        let mut stat = host::stat(&fd)?;
        let (name, told) = name.unzip();
        let parent = &directory.identity.mount;
        let crosses = !parent.has(&stat);
        let mount = match name {
            Some(name) if crosses => {
                self.mounts.find(&self.host, &fd, &stat, directory.nodeid, name)?
            }
            _ => parent.clone(),
        };
        let submount = crosses && self.options.submounts && is_directory(&stat);
        let inode = self.node_of(directory, name, &fd, (&stat, mount), room)?;
        self.decide_dax(&inode, &stat);
        // What is in a directory changes its attributes.
        if inode.is_directory() && self.covers(&inode, &fd) {
            stat = host::stat(&fd)?;
        }
        let attr = self.attr(&inode, &stat, if submount { ATTR_SUBMOUNT } else { 0 });
        let mut timeouts = self.options.timeouts();
        if let (Some(name), Some(told)) = (name, told)
            && self.is_told(told, directory, name, Some((&inode, stat.stx_nlink)))
        {
            timeouts.entry = DAY;
        }
        timeouts.attributes = self.attributes_timeout(&inode, &stat);
        Ok(EntryOut {
            nodeid: inode.nodeid,
            // A node id is never given out twice.
            generation: 0,
            entry_valid: timeouts.entry.as_secs(),
            attr_valid: timeouts.attributes.as_secs(),
            entry_valid_nsec: timeouts.entry.subsec_nanos(),
            attr_valid_nsec: timeouts.attributes.subsec_nanos(),
            attr,
        })
    }

    /// The node of a file that was found or made, counting a lookup.
    fn node_of(
        &self,
        directory: &Arc<Inode>,
        name: Option<&CStr>,
        fd: impl AsFd,
        (stat, mount): (&Statx, Arc<Mount>),
        room: Option<Permit>,
    ) -> Result<Arc<Inode>> {
        let identity = Identity::of(mount, &fd, stat);
        let inode =
            self.inodes.remember(identity, u32::from(stat.stx_mode) & libc::S_IFMT, room)?;
        match name {
            Some(name) => {
                if let Some(named) = inode.identity.named() {
                    named.found_at(directory.nodeid, name);
                }
                self.inodes.release(inode.nodeid);
            }
            None => self
                .keep(&inode, self.host.reopen(&fd, OFlags::PATH))
                .inspect_err(|_| self.give_back(inode.nodeid, 1))?,
        }
        Ok(inode)
    }

    /// Holds a file open that nothing else leads to.
    fn keep(&self, inode: &Inode, fd: Result<OwnedFd>) -> Result<()> {
        self.inodes.keep(inode.nodeid, fd?, self.descriptors.take(1)?);
        Ok(())
    }

    /// FORGET.
    pub(super) fn give_back(&self, nodeid: u64, count: u64) {
        let watched = self.watch.as_ref().zip(self.inodes.get(nodeid).ok());
        if self.inodes.forget(nodeid, count) {
            if let Some((watch, inode)) = watched {
                watch.forgotten(&self.host, &inode);
            }
            self.directories.forget(nodeid);
            self.unopened.forget(nodeid);
            self.locks.forget(nodeid);
            if let Some(mapped) = &self.mapped {
                mapped.forgotten(nodeid);
            }
        }
    }

    /// Whom a name belongs to before it is taken away, if the guest knows that node.
    ///
    /// # Errors
    ///
    /// [`Errno::WOULD_WAIT`] for a caller who must not wait, when a mount or a large file may go with the name.
    fn owner_of(
        &self,
        caller: Caller,
        directory: &Inode,
        file: &Held,
        name: &CStr,
    ) -> Result<Option<Owner>> {
        let found = match caller.at_once {
            true => host::find_unmounted(file, name),
            false => host::find(file, name),
        };
        let fd = match found {
            Err(Errno::WOULD_WAIT) => return Err(Errno::WOULD_WAIT),
            Err(_) => return Ok(None),
            Ok(fd) => fd,
        };
        let Ok(stat) = host::stat(&fd) else { return Ok(None) };
        if caller.at_once && stat.stx_nlink <= 1 && stat.stx_blocks > FREED_AT_ONCE {
            return Err(Errno::WOULD_WAIT);
        }
        let parent = &directory.identity.mount;
        let mount = match parent.has(&stat) {
            true => Some(parent.clone()),
            false if is_directory(&stat) => self.mounts.known(&stat),
            false => None,
        };
        let inode = mount.and_then(|mount| self.inodes.known(&Identity::of(mount, &fd, &stat)));
        Ok(inode.map(|inode| Owner { inode, fd }))
    }

    /// A name was taken away. A node that the guest may still be using is held open if nothing else leads to
    /// its file now. Where there is no descriptor left for that, the node is stale.
    fn name_is_gone(&self, directory: &Inode, name: &CStr, owner: Option<Owner>) {
        let Some(Owner { inode, fd }) = owner else { return };
        if let Some(named) = inode.identity.named() {
            named.gone_from(directory.nodeid, name);
        }
        // Asked afterwards: others may have taken away other names of the file meanwhile.
        let last = inode.is_directory() || host::stat(&fd).is_ok_and(|stat| stat.stx_nlink == 0);
        if last || inode.identity.named().is_some_and(|named| named.place().is_none()) {
            let _ = self.keep(&inode, Ok(fd));
        }
    }

    /// Makes an entry by `make` as the caller, then looks it up.
    fn make(
        &self,
        caller: Caller,
        name: &CStr,
        make: impl FnOnce(&Held) -> rustix::io::Result<()>,
    ) -> Result<EntryOut> {
        let (directory, _changing) = self.writable_directory(caller.nodeid)?;
        let file = self.file(&directory)?;
        let room = self.inodes.room()?;
        let told = self.tell(&directory, &file, name);
        {
            let _identity = self.identity(caller)?;
            make(&file)?;
        }
        self.entry(&directory, Some((name, told)), host::find(&file, name)?, Some(room))
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
        let (directory, _changing) = self.writable_directory(caller.nodeid)?;
        let file = self.file(&directory)?;
        let owner = self.owner_of(caller, &directory, &file, name)?;
        unlinkat(&file, name, flags)?;
        self.name_is_gone(&directory, name, owner);
        Ok(())
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
        let (new, _changing) = self.writable_directory(new_directory)?;
        let (from, to) = (self.file(&old)?, self.file(&new)?);
        // A handle does not change by it.
        let moved = match old.identity.mount.has_handles() {
            true => None,
            false => self.owner_of(caller, &old, &from, name)?,
        };
        let replaced = match flags.contains(RenameFlags::NOREPLACE) {
            true => None,
            false => self.owner_of(caller, &new, &to, new_name)?,
        };
        let exchanges = flags.contains(RenameFlags::EXCHANGE);
        let told = self.tell(&new, &to, new_name);
        let told_back = exchanges && self.tell(&old, &from, name);
        renameat_with(from, name, to, new_name, flags)?;
        if let Some(watch) = &self.watch {
            let (there, here) = ((new.nodeid, new_name), (old.nodeid, name));
            watch.moved(here, there, exchanges.then_some(told_back), told);
        }
        let now_at = |owner: &Option<Owner>, directory: &Inode, name| {
            if let Some(named) = owner.as_ref().and_then(|owner| owner.inode.identity.named()) {
                named.found_at(directory.nodeid, name);
            }
        };
        now_at(&moved, &new, new_name);
        match (&moved, &replaced) {
            _ if exchanges => now_at(&replaced, &old, name),
            // Two names of one file: the host has done nothing.
            (Some(moved), Some(replaced)) if moved.inode.nodeid == replaced.inode.nodeid => {}
            _ => self.name_is_gone(&new, new_name, replaced),
        }
        Ok(())
    }

    pub(super) fn make_link(&self, caller: Caller, nodeid: u64, name: &CStr) -> Result<EntryOut> {
        let inode = self.inodes.get(nodeid)?;
        let (directory, _changing) = self.writable_directory(caller.nodeid)?;
        if inode.is_directory() {
            return Err(Errno::PERM);
        }
        let into = self.file(&directory)?;
        let told = self.tell(&directory, &into, name);
        self.host.link(self.file(&inode)?, &into, name)?;
        // What was done must not be done again: whatever the name is by now, it is not left to anybody else.
        self.entry(&directory, Some((name, told)), host::find(into, name)?, None)
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
        let (directory, _changing) = self.writable_directory(caller.nodeid)?;
        let flags = self.open_flags(request.flags)?;
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        let parent = self.file(&directory)?;
        let room = (self.inodes.room()?, self.handles.room()?);
        let told = self.tell(&directory, &parent, name);
        let made = {
            let _identity = self.identity(caller)?;
            host::create(&parent, name, self.creation_flags(flags), mode)
        };
        match made {
            Ok(fd) => self.created(&directory, Some((name, told)), fd, flags, room),
            Err(Errno::EXIST) if request.flags & libc::O_EXCL as u32 == 0 => {
                // Somebody was faster. Not by O_CREAT without O_EXCL: that would open whatever is there now,
                // a FIFO for example.
                drop(room);
                let entry = self.find_in(caller, &directory, &parent, name)?;
                let kill = request.fuse_flags & OPEN_KILL_SUIDGID != 0;
                self.open_existing(caller, &entry, request.flags, kill)
                    .map(|open| (entry, open))
                    .inspect_err(|_| self.give_back(entry.nodeid, 1))
            }
            Err(errno) => Err(errno),
        }
    }

    fn open_existing(
        &self,
        caller: Caller,
        entry: &EntryOut,
        flags: u32,
        kill: bool,
    ) -> Result<OpenOut> {
        match entry.attr.mode & libc::S_IFMT {
            libc::S_IFREG => {
                let inode = self.inodes.get(entry.nodeid)?;
                self.open_inode(caller, &inode, flags, kill)
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
        let (directory, _changing) = self.writable_directory(caller.nodeid)?;
        let mut flags = self.creation_flags(self.open_flags(request.flags)?);
        // O_EXCL says that it will never get a name. Here it is no flag of an open file.
        flags.set(OFlags::EXCL, request.flags & libc::O_EXCL as u32 != 0);
        let mode = Mode::from_raw_mode(request.mode & 0o7777);
        let parent = self.file(&directory)?;
        let room = (self.inodes.room()?, self.handles.room()?);
        let fd = {
            let _identity = self.identity(caller)?;
            host::create_unnamed(parent, flags, mode)?
        };
        self.created(&directory, None, fd, flags, room)
    }

    /// The node and the handle of a file that was just made. The node is found from the descriptor, not by
    /// name: that may be another file's by now.
    fn created(
        &self,
        directory: &Arc<Inode>,
        name: Option<(&CStr, bool)>,
        fd: OwnedFd,
        flags: OFlags,
        (node, handle): (Permit, Room),
    ) -> Result<(EntryOut, OpenOut)> {
        let entry = self.entry(directory, name, &fd, Some(node))?;
        self.add_open_file(entry.nodeid, fd, flags, handle)
            .map(|open| (entry, open))
            .inspect_err(|_| self.give_back(entry.nodeid, 1))
    }

    /// Opens a regular file that the guest knows.
    pub(super) fn open_inode(
        &self,
        caller: Caller,
        inode: &Arc<Inode>,
        flags: u32,
        kill: bool,
    ) -> Result<OpenOut> {
        if inode.is_directory() {
            return Err(Errno::ISDIR);
        }
        inode.check_openable()?;
        let flags = self.open_flags(flags)?;
        // As many blocks as the file has are given back.
        if caller.at_once && flags.contains(OFlags::TRUNC) {
            return Err(Errno::WOULD_WAIT);
        }
        // Held while the file is opened: one that was opened before a switch to read-only is known then.
        let changes = flags.intersects(OFlags::ACCMODE | OFlags::TRUNC);
        let _changing = changes.then(|| self.change()).transpose()?;
        let room = self.handles.room()?;
        let fd = {
            let truncates = flags.contains(OFlags::TRUNC);
            let _kill = WithoutFsetid::when(kill && truncates)?;
            let fd = match caller.at_once {
                false => self.open_for_guest(&self.file(inode)?, flags)?,
                true => self.open_at_once(&self.file(inode)?, flags)?,
            };
            if truncates {
                self.drop_mapped_capability(&fd)?;
            }
            fd
        };
        let mut open = self.add_open_file(inode.nodeid, fd, flags, room)?;
        open.open_flags |= self.kept_data(caller, inode);
        Ok(open)
    }
}

/// A device number as the guest encodes it (`new_encode_dev`, linux/kdev_t.h).
fn decode_device(rdev: u32) -> u64 {
    let major = (rdev >> 8) & 0xfff;
    let minor = (rdev & 0xff) | ((rdev >> 12) & 0xf_ff00);
    makedev(major, minor)
}
