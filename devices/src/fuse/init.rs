//! INIT: what the two sides agree on.

use vm_memory::ByteValued;

use super::abi::{
    COMPAT_22_INIT_OUT, COMPAT_INIT_OUT, InitFlags, InitIn, InitIn2, InitOut, MAJOR, MAX_PAGES,
    MAX_WRITE, MINOR,
};
use super::errno::{Errno, Result};
use super::filesystem::Preferences;
use super::request::Decoder;

/// log2 of the granularity of mappings: 4 KiB. The Linux guest refuses anything above 21.
const MAP_ALIGNMENT: u16 = 12;
/// As many requests in the background as there can be: how many are served at once is for the queues.
const MAX_BACKGROUND: u16 = u16::MAX;
/// Three quarters of [`MAX_BACKGROUND`], the ratio that the kernel uses itself.
const CONGESTION_THRESHOLD: u16 = 49149;
/// Timestamps are exact to the nanosecond.
const TIME_GRANULARITY: u32 = 1;

/// What comes with ACLs and not without them: a directory's default ACL takes the place of the umask, so the
/// guest leaves that to the host; a flag of SETXATTR is about ACLs alone; and a guest allows mounts with other
/// ids only when it decides itself who may do what, which POSIX_ACL says (`process_init_reply`,
/// fs/fuse/inode.c).
const WITH_ACL: InitFlags = InitFlags::POSIX_ACL
    .union(InitFlags::DONT_MASK)
    .union(InitFlags::SETXATTR_EXT)
    .union(InitFlags::ALLOW_IDMAP);

/// The reply to an INIT.
pub(super) struct Negotiated {
    out: InitOut,
    len: usize,
    /// Whether the session has begun: not after a reply that only names the major version.
    pub(super) begun: bool,
    /// What was agreed on.
    pub(super) flags: InitFlags,
}

impl Negotiated {
    /// The reply's body: as long as a guest of that version expects.
    pub(super) fn body(&self) -> &[u8] {
        self.out.as_slice().get(..self.len).unwrap_or_default()
    }
}

/// Answers an INIT.
///
/// # Errors
///
/// `EPROTO` for a major version below 7; `EINVAL` for a short body.
pub(super) fn negotiate(
    decoder: &mut Decoder<'_>,
    wanted: Preferences,
    window: bool,
) -> Result<Negotiated> {
    let request: InitIn = decoder.take()?;
    let mut out = InitOut { major: MAJOR, minor: MINOR, ..InitOut::default() };
    let full = size_of::<InitOut>();
    if request.major > MAJOR {
        // "If the major versions do not match, the daemon replies with the one it speaks, and the kernel
        // sends a second INIT" (linux/fuse.h). Nothing else in this reply counts.
        return Ok(Negotiated { out, len: full, begun: false, flags: InitFlags::empty() });
    }
    if request.major < MAJOR {
        return Err(Errno::PROTO);
    }

    let mut offered = InitFlags::from_bits_truncate(u64::from(request.flags));
    if offered.contains(InitFlags::INIT_EXT) {
        // Some guests set the flag and send the 16 bytes of old: they offer nothing more.
        let more: InitIn2 = decoder.take().unwrap_or_default();
        offered |= InitFlags::from_bits_truncate(u64::from(more.flags2) << 32);
    }
    let flags = agree(offered, wanted, window);

    // What the guest would read ahead is its own affair.
    out.max_readahead = request.max_readahead;
    out.flags = flags.bits() as u32;
    out.flags2 = (flags.bits() >> 32) as u32;
    out.max_background = MAX_BACKGROUND;
    out.congestion_threshold = CONGESTION_THRESHOLD;
    out.max_write = MAX_WRITE;
    out.time_gran = TIME_GRANULARITY;
    if flags.contains(InitFlags::MAX_PAGES) {
        out.max_pages = MAX_PAGES;
    }
    if flags.contains(InitFlags::MAP_ALIGNMENT) {
        out.map_alignment = MAP_ALIGNMENT;
    }
    let len = match request.minor {
        0..5 => COMPAT_INIT_OUT,
        5..23 => COMPAT_22_INIT_OUT,
        _ => full,
    };
    Ok(Negotiated { out, len, begun: true, flags })
}

/// What is both offered and wanted, less what depends on something that is not.
fn agree(offered: InitFlags, wanted: Preferences, window: bool) -> InitFlags {
    let mut want = InitFlags::ASYNC_READ
        | InitFlags::ATOMIC_O_TRUNC
        | InitFlags::BIG_WRITES
        | InitFlags::AUTO_INVAL_DATA
        | InitFlags::ASYNC_DIO
        | InitFlags::PARALLEL_DIROPS
        | InitFlags::MAX_PAGES
        | InitFlags::CACHE_SYMLINKS
        | InitFlags::INIT_EXT;
    want.set(InitFlags::DO_READDIRPLUS | InitFlags::READDIRPLUS_AUTO, wanted.readdirplus);
    want.set(InitFlags::POSIX_LOCKS | InitFlags::FLOCK_LOCKS, wanted.locks);
    want.set(InitFlags::WRITEBACK_CACHE, wanted.writeback);
    want.set(InitFlags::SUBMOUNTS, wanted.submounts);
    want.set(InitFlags::HANDLE_KILLPRIV_V2, wanted.kill_privileges);
    want.set(InitFlags::DIRECT_IO_ALLOW_MMAP, wanted.direct_io);
    want.set(InitFlags::CREATE_SUPP_GROUP, wanted.groups);
    want.set(WITH_ACL, wanted.acl);
    want.set(InitFlags::MAP_ALIGNMENT | InitFlags::HAS_INODE_DAX, wanted.dax && window);
    let mut flags = offered & want;
    // The upper half of the flags is only read when this one is set.
    if !flags.contains(InitFlags::INIT_EXT) {
        flags &= InitFlags::from_bits_truncate(u64::from(u32::MAX));
    }
    if !flags.contains(InitFlags::POSIX_ACL) {
        flags.remove(WITH_ACL);
    }
    if !flags.contains(InitFlags::DO_READDIRPLUS) {
        flags.remove(InitFlags::READDIRPLUS_AUTO);
    }
    flags
}
