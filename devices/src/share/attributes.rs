//! Attributes: what a file says of itself, and SETATTR.

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Statx, Timespec, Timestamps, UTIME_NOW, UTIME_OMIT, Uid, chmodat,
    chownat, ftruncate, utimensat,
};

use super::identity::WithoutFsetid;
use super::ids::{GuestGid, GuestUid, HostGid, HostUid};
use super::inode::Inode;
use super::mount::Mount;
use super::options::DAY;
use super::{DaxPolicy, ITSELF, Share, host};
use crate::fuse::abi::{self, ATTR_DAX, Attr, AttrOut, SetattrIn, SetattrValid, StatxOut, SxTime};
use crate::fuse::{Caller, Errno, Result};

impl Share {
    /// Whether a node is to be mapped through the window: the one place that says so, so that LOOKUP,
    /// GETATTR, SETATTR, READDIRPLUS and CREATE say the same. (A guest drops what it knows of a file when
    /// the answer changes.)
    fn is_dax(&self, inode: &Inode, stat: &Statx) -> bool {
        let decided = self.mapped.as_ref().is_none_or(|mapped| mapped.is_mapped(inode.nodeid));
        decided && self.can_be_dax(&inode.identity.mount, stat)
    }

    /// A node was looked up: decides anew whether it is to be mapped, unless the guest has it open.
    pub(super) fn decide_dax(&self, inode: &Inode, stat: &Statx) {
        if let Some(mapped) = &self.mapped
            && self.can_be_dax(&inode.identity.mount, stat)
        {
            mapped.look_up(inode.nodeid, stat.stx_size);
        }
    }

    fn can_be_dax(&self, mount: &Mount, stat: &Statx) -> bool {
        let mode = u32::from(stat.stx_mode);
        if mode & libc::S_IFMT != libc::S_IFREG {
            return false;
        }
        match self.options.dax {
            DaxPolicy::Never => false,
            DaxPolicy::Always => true,
            // A write through the window reaches the host as a page fault, by which no kernel clears suid
            // and sgid. Such files are written by WRITE.
            //
            // On overlayfs the first write to a file of a lower layer, also by a process of the host,
            // replaces it by a copy of the same device and inode number, and what is mapped goes on to show
            // the old one.
            DaxPolicy::Inode => mode & (libc::S_ISUID | libc::S_ISGID) == 0 && !mount.overlay,
        }
    }

    /// The attributes as FUSE has them. `flags` is what comes on top of [`ATTR_DAX`].
    pub(super) fn attr(&self, inode: &Inode, stat: &Statx, flags: u32) -> Attr {
        let mode = u32::from(stat.stx_mode);
        let mtime = self.listing_time(inode, stat);
        Attr {
            ino: stat.stx_ino,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            // Seconds before 1970 are negative, and the kernel reads them so.
            atime: stat.stx_atime.tv_sec as u64,
            mtime: stat.stx_mtime.tv_sec as u64,
            ctime: stat.stx_ctime.tv_sec as u64,
            atimensec: stat.stx_atime.tv_nsec,
            mtimensec: mtime,
            ctimensec: stat.stx_ctime.tv_nsec,
            mode,
            nlink: stat.stx_nlink,
            uid: self.options.uids.to_guest(HostUid(stat.stx_uid)).0,
            gid: self.options.gids.to_guest(HostGid(stat.stx_gid)).0,
            rdev: encode_device(stat.stx_rdev_major, stat.stx_rdev_minor),
            blksize: stat.stx_blksize,
            flags: flags | if self.is_dax(inode, stat) { ATTR_DAX } else { 0 },
        }
    }

    fn attr_out(&self, inode: &Inode, file: impl AsFd) -> Result<AttrOut> {
        let stat = host::stat(file)?;
        let timeout = self.attributes_timeout(inode, &stat);
        Ok(AttrOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            dummy: 0,
            attr: self.attr(inode, &stat, 0),
        })
    }

    /// For how long the guest may keep the attributes of a node.
    pub(super) fn attributes_timeout(&self, inode: &Inode, stat: &Statx) -> Duration {
        match &self.watch {
            Some(watch) if watch.has_attributes(inode, stat.stx_nlink) => DAY,
            _ => self.options.timeouts().attributes,
        }
    }

    /// The node of a request that may name a handle, which then has to be one of that node.
    fn node(&self, caller: Caller, fh: Option<u64>) -> Result<std::sync::Arc<Inode>> {
        let inode = self.inodes.get(caller.nodeid)?;
        if let Some(fh) = fh {
            self.handles.get(caller.nodeid, fh)?;
        }
        Ok(inode)
    }

    pub(super) fn get_attributes(&self, caller: Caller, fh: Option<u64>) -> Result<AttrOut> {
        let inode = self.node(caller, fh)?;
        let file = self.file(&inode)?;
        if inode.is_directory() {
            self.covers(&inode, &file);
        }
        self.attr_out(&inode, file)
    }

    /// STATX: attributes and the birth time, of these what is `wanted` and what the host has. Mounts have
    /// numbers of the guest's own.
    pub(super) fn get_statx(
        &self,
        caller: Caller,
        fh: Option<u64>,
        wanted: u32,
    ) -> Result<StatxOut> {
        let inode = self.node(caller, fh)?;
        let stat = host::stat(self.file(&inode)?)?;
        let timeout = self.attributes_timeout(&inode, &stat);
        // STATX_BASIC_STATS and STATX_BTIME, the fields that fuse_statx has.
        let known = libc::STATX_BASIC_STATS | libc::STATX_BTIME;
        let mut mask = stat.stx_mask & known & wanted;
        // A guest that gets all basic attributes takes them for those of the file, and as this reply has no
        // place for ATTR_DAX, for those of a file without DAX: it then drops the file, and what is mapped of
        // it, at every close (`fuse_do_statx`, fs/fuse/dir.c; `fuse_dax_dontcache`, fs/fuse/dax.c). It knows
        // the type, and tells its caller so whatever is said here.
        //
        // With writeback the guest alone knows the size, and corrects only attributes that it takes. It gets no
        // STATX then, and asks by GETATTR, which has a place for ATTR_DAX.
        if self.is_dax(&inode, &stat) {
            if self.options.writeback() {
                return Err(Errno::NOSYS);
            }
            mask &= !libc::STATX_TYPE;
        }
        Ok(StatxOut {
            attr_valid: timeout.as_secs(),
            attr_valid_nsec: timeout.subsec_nanos(),
            stat: abi::Statx {
                mask,
                blksize: stat.stx_blksize,
                // Attributes such as "immutable" are the host's affair; "mount root" would be a lie here.
                nlink: stat.stx_nlink,
                uid: self.options.uids.to_guest(HostUid(stat.stx_uid)).0,
                gid: self.options.gids.to_guest(HostGid(stat.stx_gid)).0,
                mode: stat.stx_mode,
                ino: stat.stx_ino,
                size: stat.stx_size,
                blocks: stat.stx_blocks,
                atime: sx_time(stat.stx_atime.tv_sec, stat.stx_atime.tv_nsec),
                btime: sx_time(stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec),
                ctime: sx_time(stat.stx_ctime.tv_sec, stat.stx_ctime.tv_nsec),
                mtime: sx_time(stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec),
                rdev_major: stat.stx_rdev_major,
                rdev_minor: stat.stx_rdev_minor,
                dev_major: stat.stx_dev_major,
                dev_minor: stat.stx_dev_minor,
                ..abi::Statx::default()
            },
            ..StatxOut::default()
        })
    }

    pub(super) fn set_attributes(&self, caller: Caller, change: &SetattrIn) -> Result<AttrOut> {
        // What is not known is not done, and must not look done.
        let valid = SetattrValid::from_bits(change.valid).ok_or(Errno::INVAL)?;
        // As many blocks as the file has may have to be given back. And a capability is the thread's.
        if caller.at_once && valid.intersects(SetattrValid::SIZE | SetattrValid::KILL_SUIDGID) {
            return Err(Errno::WOULD_WAIT);
        }
        let inode = self.inodes.get(caller.nodeid)?;
        let _changing = self.change()?;
        inode.check_open_to_guests()?;
        let handle = match valid.contains(SetattrValid::FH) {
            true => Some(self.handles.get(caller.nodeid, change.fh)?),
            false => None,
        };
        // All of it is checked before any of it is done.
        let owner = self.owner(valid, change)?;
        let times = timestamps(valid, change)?;
        if valid.contains(SetattrValid::SIZE) {
            if change.size > i64::MAX as u64 {
                return Err(Errno::FBIG);
            }
            if !inode.is_regular() {
                return Err(if inode.is_directory() { Errno::ISDIR } else { Errno::INVAL });
            }
        }

        let file = self.file(&inode)?;
        // The owner before the mode: changing it clears suid and sgid, which the mode may have set anew.
        if let Some((uid, gid)) = owner {
            chownat(&file, c"", uid, gid, ITSELF)?;
            if inode.is_regular() {
                self.drop_mapped_capability_by_path(&file)?;
            }
        }
        if valid.contains(SetattrValid::MODE) {
            if inode.kind == libc::S_IFLNK {
                return Err(Errno::OPNOTSUPP);
            }
            let mode = Mode::from_raw_mode(change.mode & 0o7777);
            self.host
                .by_path(&file, |proc_fd, path| chmodat(proc_fd, path, mode, AtFlags::empty()))?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let _kill = WithoutFsetid::when(valid.contains(SetattrValid::KILL_SUIDGID))?;
            // A handle that is open for writing may do what the mode no longer allows.
            match handle.as_deref().map(|handle| handle.file()) {
                Some(Ok(open)) if open.writable => self.truncate(&open.fd, change.size)?,
                _ => self.truncate(self.host.reopen(&file, OFlags::WRONLY)?, change.size)?,
            }
        }
        if let Some(times) = times {
            self.host.by_path(&file, |proc_fd, path| {
                utimensat(proc_fd, path, &times, AtFlags::empty())
            })?;
        }
        self.attr_out(&inode, file)
    }

    fn truncate(&self, file: impl AsFd, size: u64) -> Result<()> {
        self.drop_mapped_capability(&file)?;
        Ok(ftruncate(file, size)?)
    }

    /// The owner and group to set, as the host has them. All ones is no id: chown(2) takes it for "leave it".
    fn owner(&self, valid: SetattrValid, change: &SetattrIn) -> Result<Option<Owner>> {
        let uid = match valid.contains(SetattrValid::UID) {
            true => Some(Uid::from_raw(self.options.uids.to_host(GuestUid(change.uid))?.0)),
            false => None,
        };
        let gid = match valid.contains(SetattrValid::GID) {
            true => Some(Gid::from_raw(self.options.gids.to_host(GuestGid(change.gid))?.0)),
            false => None,
        };
        Ok((uid.is_some() || gid.is_some()).then_some((uid, gid)))
    }

    /// ACCESS, by the mode bits. The Linux guest of a virtio-fs share decides this itself
    /// (`default_permissions`) and does not ask.
    pub(super) fn check_access(&self, caller: Caller, mask: u32) -> Result<()> {
        let inode = self.inodes.get(caller.nodeid)?;
        let wanted = mask & 0o7;
        if wanted != mask {
            return Err(Errno::INVAL);
        }
        if wanted & libc::W_OK as u32 != 0 {
            self.check_writable()?;
        }
        let stat = host::stat(self.file(&inode)?)?;
        let mode = u32::from(stat.stx_mode);
        let execute = libc::X_OK as u32;
        let allowed = if caller.uid == 0 {
            // Root reads and writes all, and executes what anybody may execute.
            let anybody = mode & 0o111 != 0 || inode.is_directory();
            if anybody { 0o7 } else { 0o7 & !execute }
        } else if GuestUid(caller.uid) == self.options.uids.to_guest(HostUid(stat.stx_uid)) {
            mode >> 6
        } else if GuestGid(caller.gid) == self.options.gids.to_guest(HostGid(stat.stx_gid)) {
            mode >> 3
        } else {
            mode
        };
        if wanted & !allowed == 0 { Ok(()) } else { Err(Errno::ACCES) }
    }
}

/// A device number as the kernel reads it (`new_decode_dev`, linux/kdev_t.h).
fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | ((major & 0xfff) << 8) | ((minor & !0xff) << 12)
}

fn sx_time(tv_sec: i64, tv_nsec: u32) -> SxTime {
    SxTime { tv_sec, tv_nsec, reserved: 0 }
}

/// A user and a group of the host, those of the two that are to change.
type Owner = (Option<Uid>, Option<Gid>);

/// The times to set; the ctime is the host's affair.
fn timestamps(valid: SetattrValid, change: &SetattrIn) -> Result<Option<Timestamps>> {
    let time = |set, now, seconds: u64, nanoseconds: u32| {
        let tv_nsec = if valid.contains(now) {
            UTIME_NOW
        } else if !valid.contains(set) {
            UTIME_OMIT
        } else if nanoseconds < 1_000_000_000 {
            nanoseconds.into()
        } else {
            return Err(Errno::INVAL);
        };
        Ok(Timespec { tv_sec: seconds as i64, tv_nsec })
    };
    use SetattrValid as V;
    let last_access = time(V::ATIME, V::ATIME_NOW, change.atime, change.atimensec)?;
    let last_modification = time(V::MTIME, V::MTIME_NOW, change.mtime, change.mtimensec)?;
    if !valid.intersects(V::ATIME | V::ATIME_NOW | V::MTIME | V::MTIME_NOW) {
        return Ok(None);
    }
    Ok(Some(Timestamps { last_access, last_modification }))
}
