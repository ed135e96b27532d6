//! Open files: data in and out.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    FallocateFlags, OFlags, SeekFrom, fallocate, fdatasync, fstatvfs, fsync, seek, syncfs,
};

use super::handle::{OpenFile, Room};
use super::identity::WithoutFsetid;
use super::reach::Held;
use super::{Share, sys};
use crate::fuse::abi::{
    CopyFileRangeIn, FallocateIn, Kstatfs, LseekIn, OpenOut, ReadIn, WRITE_CACHE,
    WRITE_KILL_SUIDGID, WriteIn,
};
use crate::fuse::{Caller, Errno, Payload, Placement, Result};

/// The most that one COPY_FILE_RANGE copies, in bytes: a request must end some time, and the guest asks
/// again for the rest.
const COPY_MAX: u64 = 64 << 20;

/// What fallocate(2) can do. A Linux guest sends the first five; the rest move data under its own cache, and
/// a kernel that sends them will know. Modes that are newer than this list are `EOPNOTSUPP`.
const FALLOCATE_MODES: [i32; 9] = {
    const KEEP: i32 = libc::FALLOC_FL_KEEP_SIZE;
    [
        0,
        KEEP,
        libc::FALLOC_FL_PUNCH_HOLE | KEEP,
        libc::FALLOC_FL_ZERO_RANGE,
        libc::FALLOC_FL_ZERO_RANGE | KEEP,
        libc::FALLOC_FL_COLLAPSE_RANGE,
        libc::FALLOC_FL_INSERT_RANGE,
        libc::FALLOC_FL_UNSHARE_RANGE,
        libc::FALLOC_FL_UNSHARE_RANGE | KEEP,
    ]
};

impl Share {
    /// From the guest's open flags to those for the host: an allow-list.
    ///
    /// Left out, and why:
    /// - `O_DIRECT`: see [`direct`](super::direct).
    /// - `O_APPEND`: see [`write_file`](Self::write_file).
    /// - `O_CREAT`, `O_EXCL`, `O_NOFOLLOW`, `O_DIRECTORY`: about names, and there is none here.
    /// - `O_PATH`, `O_TMPFILE`: would make it something else than an open file.
    /// - `O_NOATIME`, `O_NONBLOCK`, `O_NOCTTY`, `O_ASYNC`: the guest's own affair, or without meaning.
    ///
    /// # Errors
    ///
    /// `EINVAL` for no known access mode, `EROFS` for any that changes a read-only share.
    pub(super) fn open_flags(&self, flags: u32) -> Result<OFlags> {
        let flags = OFlags::from_bits_retain(flags);
        let mode = flags & OFlags::ACCMODE;
        if mode != OFlags::RDONLY && mode != OFlags::WRONLY && mode != OFlags::RDWR {
            return Err(Errno::INVAL);
        }
        if mode != OFlags::RDONLY || flags.contains(OFlags::TRUNC) {
            self.check_writable()?;
        }
        let allowed = OFlags::ACCMODE | OFlags::TRUNC | OFlags::SYNC | OFlags::DSYNC;
        Ok(flags & allowed)
    }

    /// The flags for a file that is being made, from those of [`open_flags`](Self::open_flags).
    pub(super) fn creation_flags(&self, flags: OFlags) -> OFlags {
        let flags = flags - OFlags::TRUNC;
        if flags & OFlags::ACCMODE == OFlags::WRONLY && self.options.writeback() {
            return (flags - OFlags::ACCMODE) | OFlags::RDWR;
        }
        flags
    }

    /// Opens for the guest what was found to be a regular file.
    pub(super) fn open_for_guest(&self, file: &Held, flags: OFlags) -> Result<OwnedFd> {
        let write_only = flags & OFlags::ACCMODE == OFlags::WRONLY;
        if write_only && self.options.writeback() {
            // To write a part of a page back, the guest reads the rest of it from the same handle.
            let both = (flags - OFlags::ACCMODE) | OFlags::RDWR;
            match self.host.reopen(file, both) {
                Err(Errno::ACCES) => {}
                other => return other,
            }
        }
        self.open_quietly(file, flags)
    }

    /// Opens for the guest what nobody else holds a lease of (fcntl(2), F_SETLEASE), who would have to be waited for.
    ///
    /// # Errors
    ///
    /// [`Errno::WOULD_WAIT`] when somebody does.
    pub(super) fn open_at_once(&self, file: &Held, flags: OFlags) -> Result<OwnedFd> {
        // Means nothing else to a regular file (open(2)).
        match self.open_for_guest(file, flags | OFlags::NONBLOCK) {
            Err(Errno::AGAIN) => Err(Errno::WOULD_WAIT),
            other => other,
        }
    }

    /// Opens a file. Reading from a share that is read-only leaves no trace, where the host allows that
    /// (`O_NOATIME` is for a file's owner and for root).
    pub(super) fn open_quietly(&self, file: &Held, flags: OFlags) -> Result<OwnedFd> {
        if self.is_read_only() && flags & OFlags::ACCMODE == OFlags::RDONLY {
            match self.host.reopen(file, flags | OFlags::NOATIME) {
                Err(Errno::PERM) => {}
                other => return other,
            }
        }
        self.host.reopen(file, flags)
    }

    pub(super) fn add_open_file(
        &self,
        nodeid: u64,
        fd: OwnedFd,
        flags: OFlags,
        room: Room,
    ) -> Result<OpenOut> {
        let writable = flags & OFlags::ACCMODE != OFlags::RDONLY;
        let file = OpenFile::new(fd, writable, self.near(nodeid, flags));
        let fh = self.handles.add_file(nodeid, file, room)?;
        if let Some(mapped) = &self.mapped {
            mapped.opened(nodeid);
        }
        Ok(OpenOut { fh, open_flags: self.options.file_open_flags(), passthrough: 0 })
    }

    pub(super) fn open_directory(&self, caller: Caller) -> Result<OpenOut> {
        let inode = self.directory(caller.nodeid)?;
        if self.needs_no_opendir(&inode)? {
            return Err(Errno::NOSYS);
        }
        let room = self.handles.room()?;
        let fd = self.open_quietly(&self.file(&inode)?, OFlags::RDONLY | OFlags::DIRECTORY)?;
        let fh = self.handles.add_directory(caller.nodeid, fd, room)?;
        Ok(OpenOut { fh, open_flags: self.options.directory_open_flags(), passthrough: 0 })
    }

    /// READ. A short count is the end of the file to the guest, so it is only cut to the room there is.
    pub(super) fn read_file(
        &self,
        caller: Caller,
        request: &ReadIn,
        target: Payload<'_, '_>,
    ) -> Result<usize> {
        let handle = self.handles.get(caller.nodeid, request.fh)?;
        match caller.at_once {
            true => self.read_at_once(handle.file()?, request, &target),
            false => self.read_data(handle.file()?, request, &target),
        }
    }

    /// WRITE.
    ///
    /// The host's descriptor never has O_APPEND, because `pwrite` ignores the offset on one that does
    /// (pwrite(2), BUGS), and one handle carries two kinds of writes. Those of a program that opened with
    /// O_APPEND have the flag in `flags`: they go to where the file ends on the host *now*
    /// (`RWF_APPEND`), so that several guests and the host may append to one log and lose nothing, although
    /// each guest's offset is where it last saw the end. Pages that the guest writes back from a mapping
    /// (`FUSE_WRITE_CACHE`) go to their offset, whatever handle the guest picked to send them through. With
    /// writeback the guest alone knows where the file ends, and its offset counts.
    pub(super) fn write_file(
        &self,
        caller: Caller,
        request: &WriteIn,
        source: Payload<'_, '_>,
    ) -> Result<usize> {
        let handle = self.handles.get(caller.nodeid, request.fh)?;
        let file = handle.file()?;
        let _changing = self.change()?;
        if !file.writable {
            return Err(Errno::BADF);
        }
        let append = request.flags & libc::O_APPEND as u32 != 0
            && request.fuse_flags & WRITE_CACHE == 0
            && !self.options.writeback();
        if caller.at_once {
            self.check_write_at_once(file, request)?;
        }
        let mut flags = if append { libc::RWF_APPEND } else { 0 };
        // The descriptor syncs each write if it was opened so. A single write may want it too
        // (`RWF_DSYNC` of pwritev2), and says so in the flags it would have to be opened with.
        if request.fuse_flags & WRITE_CACHE == 0 {
            let wanted = request.flags as i32;
            if wanted & libc::O_SYNC == libc::O_SYNC {
                flags |= libc::RWF_SYNC;
            } else if wanted & libc::O_DSYNC != 0 {
                flags |= libc::RWF_DSYNC;
            }
        }
        let _kill = WithoutFsetid::when(request.fuse_flags & WRITE_KILL_SUIDGID != 0)?;
        // What the guest writes back it wrote before, and took them off then.
        if request.fuse_flags & WRITE_CACHE == 0 {
            self.drop_mapped_capability(&file.fd)?;
        }
        match caller.at_once {
            true => file.near.write(file, request, &source, flags),
            false => self.write_data(file, request, &source, flags),
        }
    }

    pub(super) fn sync(&self, caller: Caller, fh: u64, data_only: bool, file: bool) -> Result<()> {
        let handle = match file {
            true => self.handles.get(caller.nodeid, fh)?,
            false => self.open_handle(caller.nodeid, fh)?,
        };
        if file {
            handle.file()?;
        } else {
            handle.directory()?;
        }
        let sync = if data_only { fdatasync::<BorrowedFd<'_>> } else { fsync };
        Ok(sync(handle.as_fd())?)
    }

    /// SYNCFS, of the file system that the node is on: the guest asks for each that it has mounted. If it is
    /// not told of mounts below the directory, it asks once, and all that it knows nodes of are meant. On a
    /// read-only share nothing of the guest's can be waiting.
    pub(super) fn sync_file_system(&self, caller: Caller) -> Result<()> {
        let inode = self.inodes.get(caller.nodeid)?;
        if !self.was_ever_writable() {
            return Ok(());
        }
        inode.check_openable()?;
        if self.options.submounts {
            return Ok(syncfs(self.host.reopen(self.file(&inode)?, OFlags::RDONLY)?)?);
        }
        // One that fails does not keep the others from being synced.
        let mut result = Ok(());
        for file in self.file_systems() {
            result = result.and(syncfs(file));
        }
        Ok(result?)
    }

    pub(super) fn file_system(&self, caller: Caller) -> Result<Kstatfs> {
        let stat = fstatvfs(self.file(&self.inodes.get(caller.nodeid)?)?)?;
        let number = |number: u64| u32::try_from(number).unwrap_or(u32::MAX);
        Ok(Kstatfs {
            blocks: stat.f_blocks,
            bfree: stat.f_bfree,
            bavail: stat.f_bavail,
            files: stat.f_files,
            ffree: stat.f_ffree,
            bsize: number(stat.f_bsize),
            namelen: number(stat.f_namemax),
            frsize: number(stat.f_frsize),
            ..Kstatfs::default()
        })
    }

    pub(super) fn allocate(&self, caller: Caller, request: &FallocateIn) -> Result<()> {
        let handle = self.handles.get(caller.nodeid, request.fh)?;
        let file = handle.file()?;
        let _changing = self.change()?;
        if !file.writable {
            return Err(Errno::BADF);
        }
        if !FALLOCATE_MODES.contains(&(request.mode as i32)) {
            return Err(Errno::OPNOTSUPP);
        }
        let mode = FallocateFlags::from_bits_retain(request.mode);
        // The protocol does not say whether the caller has CAP_FSETID: rather a bit lost than one kept.
        let _kill = WithoutFsetid::when(true)?;
        self.drop_mapped_capability(&file.fd)?;
        Ok(fallocate(&file.fd, mode, request.offset, request.length)?)
    }

    /// LSEEK. The position that this moves is nobody's: all I/O names its offset.
    pub(super) fn seek_file(&self, caller: Caller, request: &LseekIn) -> Result<u64> {
        let handle = self.handles.get(caller.nodeid, request.fh)?;
        let file = handle.file()?;
        // Where the guest collects writes, the host knows holes that are none any more, and whoever copies
        // by them loses data. After ENOSYS the guest's kernel calls the whole file data, which is allowed.
        if self.options.writeback() {
            return Err(Errno::NOSYS);
        }
        if request.offset > i64::MAX as u64 {
            return Err(Errno::INVAL);
        }
        let from = match request.whence as i32 {
            libc::SEEK_SET => SeekFrom::Start(request.offset),
            libc::SEEK_END => SeekFrom::End(request.offset as i64),
            libc::SEEK_DATA => SeekFrom::Data(request.offset),
            libc::SEEK_HOLE => SeekFrom::Hole(request.offset),
            _ => return Err(Errno::INVAL),
        };
        // Where the next hole is may take as long to find as the file is long.
        if caller.at_once && matches!(from, SeekFrom::Data(_) | SeekFrom::Hole(_)) {
            return Err(Errno::WOULD_WAIT);
        }
        Ok(seek(&file.fd, from)?)
    }

    /// COPY_FILE_RANGE. The host shares the blocks where its file system can (reflink), copies inside it
    /// otherwise, and may copy less than was asked, as may this.
    ///
    /// # Errors
    ///
    /// Besides the real ones, `EXDEV` or `EOPNOTSUPP` when it cannot be done here, after which the guest
    /// reads and writes.
    pub(super) fn copy_range(&self, caller: Caller, request: &CopyFileRangeIn) -> Result<u64> {
        let source = self.handles.get(caller.nodeid, request.fh_in)?;
        let target = self.handles.get(request.nodeid_out, request.fh_out)?;
        let (source, target) = (source.file()?, target.file()?);
        let _changing = self.change()?;
        if !target.writable {
            return Err(Errno::BADF);
        }
        if request.flags != 0 {
            return Err(Errno::INVAL);
        }
        let len = usize::try_from(request.len.min(COPY_MAX)).map_err(|_| Errno::INVAL)?;
        let (mut from, mut to) = (request.offset_in, request.offset_out);
        let _kill = WithoutFsetid::when(true)?;
        self.drop_mapped_capability(&target.fd)?;
        let copied = rustix::fs::copy_file_range(
            &source.fd,
            Some(&mut from),
            &target.fd,
            Some(&mut to),
            len,
        );
        match copied {
            Ok(count) => Ok(count as u64),
            // A host without the call, or whose file system does not take these two files. ENOSYS would be
            // for good, and for all files. (Two ranges of one file that overlap are the caller's mistake.)
            Err(rustix::io::Errno::NOSYS) => Err(Errno::OPNOTSUPP),
            Err(rustix::io::Errno::INVAL) if caller.nodeid != request.nodeid_out => {
                Err(Errno::OPNOTSUPP)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// FLUSH: a descriptor of the file was closed. Its data went to the host with each WRITE; what is left is
    /// what the host's file system does and says at a close.
    pub(super) fn flush_file(&self, caller: Caller, fh: u64) -> Result<()> {
        let handle = self.handles.get(caller.nodeid, fh)?;
        let file = handle.file()?;
        if !file.writable {
            return Ok(());
        }
        match rustix::io::dup(&file.fd) {
            Ok(twin) => Ok(sys::close(twin)?),
            // Not the caller's fault, and no data is lost.
            Err(_) => Ok(()),
        }
    }

    /// SETUPMAPPING: opens a file and has `place` map it. A switch to read-only waits for both.
    ///
    /// On overlayfs a file that is open for reading may be one of a lower layer. The guest's next write
    /// would replace it by a copy, which a mapping of the old one never shows. So where the guest may write,
    /// the file is opened for writing, which makes the copy now. What remains is a file that the VMM may not
    /// open for writing, and a read-only share, when a process of the host writes: mappings that are there
    /// show the old data until the guest maps the range again.
    pub(super) fn map_file(
        &self,
        caller: Caller,
        writable: bool,
        place: &mut dyn Placement,
    ) -> Result<()> {
        let inode = self.inodes.get(caller.nodeid)?;
        inode.check_open_to_guests()?;
        if !inode.is_regular() {
            return Err(Errno::INVAL);
        }
        // A copy-up would have put another file in its place.
        if !inode.identity.mount.overlay {
            let _changing = writable.then(|| self.change()).transpose()?;
            if let Some(mapped) = place.more(self.index) {
                return mapped;
            }
        }
        let found = self.file(&inode)?;
        let changing = match writable {
            true => Some(self.change()?),
            // To make the copy is a change as well.
            false if inode.identity.mount.overlay => self.change().ok(),
            false => None,
        };
        let file = match changing.as_ref().map(|_| self.host.reopen(&found, OFlags::RDWR)) {
            Some(Ok(file)) if writable => file,
            Some(Err(error)) if writable => return Err(error),
            // Also when it was opened for writing: held like that, the host could not run it (ETXTBSY).
            _ => self.open_quietly(&found, OFlags::RDONLY)?,
        };
        place.file(file.as_fd(), self.index)
    }
}
