//! From an operation's body to the call of the file system, and from its result to the reply's body.

use std::sync::atomic::Ordering::Relaxed;

use vm_memory::ByteValued;

use super::abi::{
    AccessIn, BatchForgetIn, CopyFileRangeIn, CopyFileRangeOut, CreateIn, Dirent, EntryOut,
    FSYNC_FDATASYNC, FallocateIn, FlushIn, ForgetIn, ForgetOne, FsyncIn, GETATTR_FH, GetattrIn,
    GetxattrIn, GetxattrOut, IN_HEADER, InitFlags, IoctlIn, IoctlOut, LinkIn, LkIn, LkOut, LseekIn,
    LseekOut, MAX_WRITE, MkdirIn, MknodIn, NAME_MAX, OpenIn, OpenOut, ReadIn, ReleaseIn, Rename2In,
    RenameIn, SETXATTR_ACL_KILL_SGID, SetattrIn, SetupmappingIn, SetxattrIn, SetxattrIn2,
    StatfsOut, StatxIn, SyncfsIn, TARGET_MAX, WriteIn, WriteOut,
};
use super::errno::{Errno, Result};
use super::extension;
use super::filesystem::{Caller, DirectorySink, Listing, LockReply, XattrReply};
use super::later::Wait;
use super::opcode::Opcode;
use super::reply::{Payload, Reply};
use super::request::{Decoder, Header};
use super::session::Session;
use crate::memory::GuestBuffer;

/// The largest listing in one reply, in bytes: that of the largest READ.
const LISTING_MAX: usize = MAX_WRITE as usize;

/// The most that a COPY_FILE_RANGE with a 32-bit count copies, in bytes: whole pages, so that what follows
/// can be a reflink as well.
const COPY_32_MAX: u64 = u32::MAX as u64 & !0xfff;

impl Session {
    /// Serves every operation that is answered, but INIT, DESTROY and SETLKW. Returns the length of the body.
    pub(super) fn dispatch(
        &self,
        opcode: Opcode,
        header: &Header,
        mut body: Decoder<'_>,
        request: &GuestBuffer<'_>,
        reply: &Reply<'_, '_>,
    ) -> Result<usize> {
        let fs = &*self.fs;
        let caller = Caller { group: self.group(opcode, header, &mut body)?, ..header.caller() };
        let with_umask = |umask| Caller {
            umask: self.agreed_on(InitFlags::DONT_MASK).then_some(umask),
            ..caller
        };
        let done = |result: Result<()>| result.map(|()| 0);
        // Of the caller's node it is known.
        let answers = |nodeid| match caller.at_once && !fs.answers_at_once(nodeid) {
            true => Err(Errno::WOULD_WAIT),
            false => Ok(()),
        };
        match opcode {
            Opcode::Lookup => self.entry(fs.lookup(caller, body.last_name()?), reply),
            Opcode::Getattr => {
                let input: GetattrIn = body.take()?;
                let fh = (input.flags & GETATTR_FH != 0).then_some(input.fh);
                reply.put(&fs.getattr(caller, fh)?)
            }
            Opcode::Statx => {
                let input: StatxIn = body.take()?;
                let fh = (input.getattr_flags & GETATTR_FH != 0).then_some(input.fh);
                reply.put(&fs.statx(caller, fh, input.sx_mask)?)
            }
            Opcode::Setattr => {
                let input: SetattrIn = body.take()?;
                reply.put(&fs.setattr(caller, &input)?)
            }
            Opcode::Access => {
                let input: AccessIn = body.take()?;
                done(fs.access(caller, input.mask))
            }
            Opcode::Readlink => {
                let target = fs.readlink(caller)?;
                reply.put_bytes(0, &target)
            }
            Opcode::Symlink => {
                let name = body.name()?;
                let target = body.last_string(TARGET_MAX)?;
                if target.is_empty() {
                    return Err(Errno::NOENT);
                }
                self.entry(fs.symlink(caller, name, target), reply)
            }
            Opcode::Mknod => {
                let input: MknodIn = body.take()?;
                let caller = with_umask(input.umask);
                let made = fs.mknod(caller, body.last_name()?, input.mode, input.rdev);
                self.entry(made, reply)
            }
            Opcode::Mkdir => {
                let input: MkdirIn = body.take()?;
                let made = fs.mkdir(with_umask(input.umask), body.last_name()?, input.mode);
                self.entry(made, reply)
            }
            Opcode::Unlink => done(fs.unlink(caller, body.last_name()?)),
            Opcode::Rmdir => done(fs.rmdir(caller, body.last_name()?)),
            Opcode::Rename => {
                let input: RenameIn = body.take()?;
                let name = body.name()?;
                answers(input.newdir)?;
                done(fs.rename(caller, name, input.newdir, body.last_name()?, 0))
            }
            Opcode::Rename2 => {
                let input: Rename2In = body.take()?;
                let name = body.name()?;
                answers(input.newdir)?;
                done(fs.rename(caller, name, input.newdir, body.last_name()?, input.flags))
            }
            Opcode::Link => {
                let input: LinkIn = body.take()?;
                answers(input.oldnodeid)?;
                self.entry(fs.link(caller, input.oldnodeid, body.last_name()?), reply)
            }
            Opcode::Open => {
                let input: OpenIn = body.take()?;
                reply.put(&fs.open(caller, input.flags, input.fuse_flags)?)
            }
            Opcode::Create => {
                let input: CreateIn = body.take()?;
                let caller = with_umask(input.umask);
                self.created(fs.create(caller, body.last_name()?, &input), caller, reply)
            }
            Opcode::Tmpfile => {
                let input: CreateIn = body.take()?;
                let caller = with_umask(input.umask);
                // The name says nothing: Linux sends "/", the name of the dentry before it has one.
                body.last_string(NAME_MAX)?;
                self.created(fs.tmpfile(caller, &input), caller, reply)
            }
            Opcode::Read => {
                let input: ReadIn = body.take()?;
                check_range(input.offset, u64::from(input.size))?;
                let target = reply.body().cut(input.size as usize);
                let count = fs.read(caller, &input, target)?;
                self.counters.bytes_read.fetch_add(count as u64, Relaxed);
                if let Some(part) = fs.counters_of(caller.nodeid) {
                    part.bytes_read.fetch_add(count as u64, Relaxed);
                }
                Ok(count)
            }
            Opcode::Write => {
                let input: WriteIn = body.take()?;
                check_range(input.offset, u64::from(input.size))?;
                let start = IN_HEADER + size_of::<WriteIn>();
                let there = header.body.checked_sub(size_of::<WriteIn>());
                if there != Some(input.size as usize) || input.size > MAX_WRITE {
                    return Err(Errno::INVAL);
                }
                let source = Payload::new(request, start, input.size as usize)?;
                let count = fs.write(caller, &input, source)?;
                self.counters.bytes_written.fetch_add(count as u64, Relaxed);
                if let Some(part) = fs.counters_of(caller.nodeid) {
                    part.bytes_written.fetch_add(count as u64, Relaxed);
                }
                reply.put(&WriteOut {
                    size: u32::try_from(count).map_err(|_| Errno::IO)?,
                    padding: 0,
                })
            }
            Opcode::Statfs => reply.put(&StatfsOut { st: fs.statfs(caller)? }),
            Opcode::Release => {
                let input: ReleaseIn = body.take()?;
                done(fs.release(caller, &input))
            }
            Opcode::Releasedir => {
                let input: ReleaseIn = body.take()?;
                done(fs.releasedir(caller, input.fh))
            }
            Opcode::Flush => {
                let input: FlushIn = body.take()?;
                done(fs.flush(caller, &input))
            }
            Opcode::Fsync => {
                let input: FsyncIn = body.take()?;
                let data_only = input.fsync_flags & FSYNC_FDATASYNC != 0;
                done(fs.fsync(caller, input.fh, data_only))
            }
            Opcode::Fsyncdir => {
                let input: FsyncIn = body.take()?;
                let data_only = input.fsync_flags & FSYNC_FDATASYNC != 0;
                done(fs.fsyncdir(caller, input.fh, data_only))
            }
            Opcode::Setxattr => {
                let input: SetxattrIn = body.take()?;
                let more = match self.agreed_on(InitFlags::SETXATTR_EXT) {
                    true => body.take()?,
                    false => SetxattrIn2::default(),
                };
                let kill_sgid = more.setxattr_flags & SETXATTR_ACL_KILL_SGID != 0;
                let name = xattr_name(&mut body)?;
                let value = body.rest();
                if value.len() != input.size as usize {
                    return Err(Errno::INVAL);
                }
                done(fs.setxattr(caller, name, value, input.flags, kill_sgid))
            }
            Opcode::Getxattr => {
                let input: GetxattrIn = body.take()?;
                let name = xattr_name(&mut body)?;
                if !body.rest().is_empty() {
                    return Err(Errno::INVAL);
                }
                xattr(fs.getxattr(caller, name, input.size)?, reply)
            }
            Opcode::Listxattr => {
                let input: GetxattrIn = body.take()?;
                xattr(fs.listxattr(caller, input.size)?, reply)
            }
            Opcode::Removexattr => {
                let name = xattr_name(&mut body)?;
                if !body.rest().is_empty() {
                    return Err(Errno::INVAL);
                }
                done(fs.removexattr(caller, name))
            }
            Opcode::Opendir => {
                let input: OpenIn = body.take()?;
                reply.put(&fs.opendir(caller, input.flags)?)
            }
            Opcode::Readdir | Opcode::Readdirplus => {
                let input: ReadIn = body.take()?;
                let room = reply.room().unwrap_or(0);
                let mut sink = Entries {
                    bytes: Vec::new(),
                    looked_up: Vec::new(),
                    room: room.min(input.size as usize).min(LISTING_MAX),
                    plus: opcode == Opcode::Readdirplus,
                };
                let listed = fs
                    .readdir(caller, input.fh, input.offset, &mut sink)
                    .and_then(|()| reply.put_bytes(0, &sink.bytes));
                // What the guest was not told of it cannot forget.
                if listed.is_err() {
                    for nodeid in sink.looked_up {
                        fs.forget(nodeid, 1);
                    }
                }
                listed
            }
            Opcode::Fallocate => {
                let input: FallocateIn = body.take()?;
                check_range(input.offset, input.length)?;
                done(fs.fallocate(caller, &input))
            }
            Opcode::Lseek => {
                let input: LseekIn = body.take()?;
                let offset = fs.lseek(caller, &input)?;
                reply.put(&LseekOut { offset })
            }
            Opcode::CopyFileRange | Opcode::CopyFileRange64 => {
                let mut input: CopyFileRangeIn = body.take()?;
                check_range(input.offset_in, input.len)?;
                check_range(input.offset_out, input.len)?;
                if opcode == Opcode::CopyFileRange {
                    // The count of this reply has 32 bits.
                    input.len = input.len.min(COPY_32_MAX);
                }
                let count = fs.copy_file_range(caller, &input)?;
                if opcode == Opcode::CopyFileRange64 {
                    return reply.put(&CopyFileRangeOut { bytes_copied: count });
                }
                reply.put(&WriteOut {
                    size: u32::try_from(count).map_err(|_| Errno::IO)?,
                    padding: 0,
                })
            }
            Opcode::Ioctl => {
                let input: IoctlIn = body.take()?;
                let data = body.rest();
                if data.len() != input.in_size as usize {
                    return Err(Errno::INVAL);
                }
                let out = fs.ioctl(caller, &input, data)?;
                if out.len() > input.out_size as usize {
                    return Err(Errno::INVAL);
                }
                let head = IoctlOut::default();
                let at = reply.put(&head)?;
                reply.put_bytes(at, &out)
            }
            Opcode::Syncfs => {
                body.take::<SyncfsIn>()?;
                done(fs.syncfs(caller))
            }
            Opcode::Setupmapping => {
                let input: SetupmappingIn = body.take()?;
                let mappings = self.usable_mappings()?;
                done(mappings.setup(fs, caller, &input, &self.counters))
            }
            Opcode::Removemapping => {
                let mappings = self.usable_mappings()?;
                done(mappings.remove(&mut body, &self.counters, caller.at_once))
            }
            Opcode::Getlk => {
                let input: LkIn = body.take()?;
                reply.put(&LkOut { lk: fs.get_lock(caller, &input)? })
            }
            Opcode::Setlk => {
                let input: LkIn = body.take()?;
                done(fs.set_lock(caller, &input, None).map(drop))
            }
            // The reasons are in the table.
            Opcode::Bmap | Opcode::Poll => Err(Errno::NOSYS),
            // Served before this is reached.
            Opcode::Init
            | Opcode::Destroy
            | Opcode::Setlkw
            | Opcode::Forget
            | Opcode::BatchForget
            | Opcode::Interrupt
            | Opcode::NotifyReply => Err(Errno::INVAL),
        }
    }

    /// SETLKW. `None` when the lock is waited for.
    pub(super) fn set_lock_waiting(
        &self,
        header: &Header,
        mut body: Decoder<'_>,
        wait: Wait<'_>,
    ) -> Result<Option<usize>> {
        let input: LkIn = body.take()?;
        Ok(match self.fs.set_lock(header.caller(), &input, Some(wait))? {
            LockReply::Done => Some(0),
            LockReply::Waiting => None,
        })
    }

    /// FORGET and BATCH_FORGET.
    pub(super) fn forget(
        &self,
        opcode: Opcode,
        header: &Header,
        mut body: Decoder<'_>,
    ) -> Result<()> {
        if opcode == Opcode::Forget {
            let input: ForgetIn = body.take()?;
            self.fs.forget(header.raw.nodeid, input.nlookup);
            return Ok(());
        }
        let input: BatchForgetIn = body.take()?;
        for _ in 0..input.count {
            // Ends at the end of the body at the latest, whatever the count says.
            let one: ForgetOne = body.take()?;
            self.fs.forget(one.nodeid, one.nlookup);
        }
        Ok(())
    }

    /// The supplementary group that a request to make a file names behind its body, which ends before it.
    fn group(
        &self,
        opcode: Opcode,
        header: &Header,
        body: &mut Decoder<'_>,
    ) -> Result<Option<u32>> {
        let makes = matches!(
            opcode,
            Opcode::Create | Opcode::Tmpfile | Opcode::Mknod | Opcode::Mkdir | Opcode::Symlink
        );
        if !makes || !self.agreed_on(InitFlags::CREATE_SUPP_GROUP) {
            return Ok(None);
        }
        let len = usize::from(header.extension_units()) * extension::UNIT;
        extension::supplementary_group(body.split_end(len)?)
    }

    fn usable_mappings(&self) -> Result<&super::mapping::Mappings> {
        match &self.mappings {
            Some(mappings) if self.fs.preferences().dax => Ok(mappings),
            _ => Err(Errno::NOSYS),
        }
    }

    /// Answers an entry. If the guest cannot be told of it, it cannot forget it either.
    fn entry(&self, entry: Result<EntryOut>, reply: &Reply<'_, '_>) -> Result<usize> {
        let entry = entry?;
        reply.put(&entry).inspect_err(|_| {
            self.fs.forget(entry.nodeid, 1);
        })
    }

    fn created(
        &self,
        made: Result<(EntryOut, OpenOut)>,
        caller: Caller,
        reply: &Reply<'_, '_>,
    ) -> Result<usize> {
        let (entry, open) = made?;
        reply.put(&entry).and_then(|at| reply.put_bytes(at, open.as_slice())).inspect_err(|_| {
            let caller = Caller { nodeid: entry.nodeid, ..caller };
            // Nobody holds it; a failure to close what was just opened is no news.
            let _ = self.fs.release(caller, &ReleaseIn { fh: open.fh, ..ReleaseIn::default() });
            self.fs.forget(entry.nodeid, 1);
        })
    }
}

/// A stretch of a file: its end fits a file offset (`loff_t`).
fn check_range(offset: u64, len: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= i64::MAX as u64 => Ok(()),
        _ => Err(Errno::INVAL),
    }
}

/// The name of an extended attribute: not empty, at most 255 bytes (`XATTR_NAME_MAX`), else `ERANGE`.
fn xattr_name<'b>(body: &mut Decoder<'b>) -> Result<&'b std::ffi::CStr> {
    match body.string(NAME_MAX) {
        Ok(name) if name.is_empty() => Err(Errno::RANGE),
        Err(Errno::NAMETOOLONG) => Err(Errno::RANGE),
        other => other,
    }
}

fn xattr(answer: XattrReply, reply: &Reply<'_, '_>) -> Result<usize> {
    match answer {
        XattrReply::Size(size) => reply.put(&GetxattrOut { size, padding: 0 }),
        XattrReply::Value(value) => match reply.room() {
            Some(room) if room >= value.len() => reply.put_bytes(0, &value),
            _ => Err(Errno::RANGE),
        },
    }
}

/// The entries of a READDIR or READDIRPLUS reply.
struct Entries {
    bytes: Vec<u8>,
    /// The nodes among them, each counted once per entry.
    looked_up: Vec<u64>,
    room: usize,
    plus: bool,
}

impl Entries {
    /// Bytes of an entry: whole multiples of 8 (`FUSE_DIRENT_ALIGN`).
    fn size(&self, name_len: usize) -> usize {
        let plus = if self.plus { size_of::<EntryOut>() } else { 0 };
        plus + (size_of::<Dirent>() + name_len).next_multiple_of(8)
    }
}

impl DirectorySink for Entries {
    fn room(&self) -> usize {
        self.room - self.bytes.len().min(self.room)
    }

    fn fits(&self, name_len: usize) -> bool {
        self.size(name_len) <= self.room()
    }

    fn plus(&self) -> bool {
        self.plus
    }

    fn add(&mut self, listing: &Listing<'_>, entry: Option<&EntryOut>) {
        let name = listing.name.to_bytes();
        let end = self.bytes.len() + self.size(name.len());
        self.looked_up.extend(entry.map(|entry| entry.nodeid));
        if self.plus {
            let none = EntryOut::default();
            self.bytes.extend_from_slice(entry.unwrap_or(&none).as_slice());
        }
        let dirent = Dirent {
            ino: listing.ino,
            off: listing.next,
            // At most 255 (`NAME_MAX`) on Linux.
            namelen: name.len() as u32,
            type_: u32::from(listing.kind),
        };
        self.bytes.extend_from_slice(dirent.as_slice());
        self.bytes.extend_from_slice(name);
        self.bytes.resize(end, 0);
    }
}
