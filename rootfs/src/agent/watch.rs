//! Has the guest's kernel ask the host anew for what has changed there: the guest's end of `cache=watch`.
//!
//! The kernel keeps names and attributes of a share for as long as the device has said, and has no call to drop
//! them. But it asks again for:
//!
//! - the attributes of a file, by statx(2) with `AT_STATX_FORCE_SYNC`; data that it has of the file go when the
//!   time or the size is another;
//! - a name, by mkdir(2) of it: what is to be new is always looked up (`LOOKUP_EXCL`, fs/fuse/dir.c). That is done on a
//!   mount of the share that is read-only, so that it has no other effect, ever;
//! - data and listings, after posix_fadvise(2) has dropped them.
//!
//! Directories and files are reached by the numbers that the device has given them, as file handles (fs/fuse/inode.c):
//! what the kernel does not know any more is not there to be reached, and needs no asking.

use std::ffi::{CStr, CString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use oriel_init::frames::{self, Decoder, MAX_TO_AGENT};
use oriel_init::watch::{self, Change, FromWatcher, ToWatcher};
use rustix::fs::{
    Advice, AtFlags, CWD, Mode, OFlags, Statx, StatxFlags, StatxTimestamp, fadvise, mkdirat,
    openat, statx,
};
use rustix::io::Errno;

use crate::{log, sys};

/// Serves a stream until its end.
///
/// # Errors
///
/// The stream's, and when it carries what is no message.
pub(super) fn serve(mut stream: UnixStream) -> io::Result<()> {
    let mut decoder = Decoder::new(MAX_TO_AGENT);
    let mut share = None;
    let mut piece = vec![0; frames::MAX_DATA];
    loop {
        let count = match stream.read(&mut piece) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        decoder.push(piece.get(..count).unwrap_or_default());
        while let Some(frame) = decoder.frame().map_err(io::Error::other)? {
            let answer = match (frame.message().map_err(io::Error::other)?, &mut share) {
                (ToWatcher::Begin { tag }, None) => match Share::open(&tag) {
                    Ok(opened) => {
                        share = Some(opened);
                        let thread = rustix::thread::gettid().as_raw_nonzero().get();
                        FromWatcher::Ready { thread: thread.unsigned_abs() }
                    }
                    Err(error) => {
                        FromWatcher::Refused { message: format!("share {tag:?}: {error}") }
                    }
                },
                (ToWatcher::Changed(changes), Some(share)) => {
                    share.ask_all(&changes);
                    FromWatcher::Done
                }
                _ => return Err(io::Error::other("a message that was not expected")),
            };
            let mut bytes = Vec::new();
            frames::put_message(&mut bytes, &answer);
            stream.write_all(&bytes)?;
        }
    }
}

/// A share, by a mount that nobody else sees.
struct Share {
    /// Nothing can be changed through it.
    read_only: OwnedFd,
}

impl Share {
    fn open(tag: &str) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let place = place_of(&mounts, tag)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it is not mounted"))?;
        let place = CString::new(place)?;
        let read_only = sys::read_only_twin(&place)?;
        Ok(Self { read_only })
    }

    fn ask_all(&self, changes: &[Change]) {
        for change in changes {
            match self.ask(change) {
                // The kernel does not know it any more.
                Ok(()) | Err(Errno::STALE | Errno::NOENT) => {}
                Err(error) => log(&format!("{change:?}: {error}")),
            }
        }
    }

    fn ask(&self, change: &Change) -> Result<(), Errno> {
        match change {
            Change::Name { directory, name, data } => {
                let name = watch::bytes(name).and_then(|name| CString::new(name).ok());
                let name = name.ok_or(Errno::INVAL)?;
                self.ask_name(*directory, &name, *data)
            }
            Change::Listing { directory } => self.ask_listing(*directory),
            Change::Node { node } => ask_attributes(&self.reach(*node, OFlags::PATH)?, c""),
        }
    }

    fn ask_name(&self, directory: u64, name: &CStr, data: bool) -> Result<(), Errno> {
        let directory = self.reach(directory, OFlags::PATH | OFlags::DIRECTORY)?;
        match mkdirat(&directory, name, Mode::empty()) {
            Ok(()) | Err(Errno::EXIST | Errno::ROFS) => {}
            Err(error) => return Err(error),
        }
        ask_attributes(&directory, name)?;
        if data {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            drop_data(&openat(&directory, name, flags, Mode::empty())?)?;
        }
        Ok(())
    }

    fn ask_listing(&self, directory: u64) -> Result<(), Errno> {
        let directory = self.reach(directory, OFlags::RDONLY | OFlags::DIRECTORY)?;
        fadvise(&directory, 0, None, Advice::DontNeed)?;
        ask_attributes(&directory, c"")
    }

    fn reach(&self, node: u64, flags: OFlags) -> Result<OwnedFd, Errno> {
        sys::open_fuse_node(self.read_only.as_fd(), node, flags)
    }
}

/// Of a regular file; to open anything else may mean something to somebody.
fn drop_data(file: &OwnedFd) -> Result<(), Errno> {
    let kind = u32::from(statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::TYPE)?.stx_mode);
    if kind & libc::S_IFMT != libc::S_IFREG {
        return Ok(());
    }
    // To open it drops them as well, also what is mapped, where the device hears of it.
    let opened = openat(CWD, path_of(file), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    fadvise(opened, 0, None, Advice::DontNeed)
}

fn path_of(file: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// How often attributes are asked for, at most. Twice is enough, but where the guest itself changes them all the time.
const ATTEMPTS: usize = 3;

/// Of a file, or of an entry of a directory when a name is given. That the name was looked up just now is not enough: an
/// answer that comes after another one, which was asked for later, the kernel does not keep
/// (`fuse_change_attributes_i`, fs/fuse/inode.c). So until what it keeps is what the host said.
fn ask_attributes(at: &OwnedFd, name: &CStr) -> Result<(), Errno> {
    let how = AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW;
    for _ in 0..ATTEMPTS {
        let said = statx(at, name, how | AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS)?;
        let kept = statx(at, name, how | AtFlags::STATX_DONT_SYNC, StatxFlags::BASIC_STATS)?;
        if of_both(&said) == of_both(&kept) {
            break;
        }
    }
    Ok(())
}

/// What the kernel keeps of a file as the host said it. (Times of access it has its own.)
fn of_both(of: &Statx) -> impl PartialEq + use<> {
    let time = |time: StatxTimestamp| (time.tv_sec, time.tv_nsec);
    let owner = (of.stx_uid, of.stx_gid);
    (of.stx_mode, owner, of.stx_nlink, of.stx_size, time(of.stx_mtime), time(of.stx_ctime))
}

/// Where a share is mounted, as /proc/PID/mountinfo says (proc(5)).
fn place_of(mounts: &str, tag: &str) -> Option<Vec<u8>> {
    mounts.lines().find_map(|line| {
        let (own, of) = line.split_once(" - ")?;
        let mut of = of.split(' ');
        let is_it = of.next() == Some("virtiofs") && unescape(of.next()?) == tag.as_bytes();
        let mut own = own.split(' ').skip(3);
        // All of it, and not a directory of it that is mounted elsewhere.
        (is_it && own.next() == Some("/")).then(|| own.next().map(unescape))?
    })
}

/// Spaces and the like are three octal digits behind a backslash.
fn unescape(text: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = (*first == b'\\').then(|| after.first_chunk::<3>()).flatten();
        let number = digits
            .and_then(|digits| str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match number {
            Some(number) => {
                bytes.push(number);
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_found_by_its_tag_where_all_of_it_is_mounted() {
        let mounts = "\
            22 1 0:2 / / rw - rootfs rootfs rw\n\
            30 22 0:29 /sub /part rw,relatime shared:1 - virtiofs share0 rw\n\
            31 22 0:29 / /my\\040data rw,relatime shared:1 master:2 - virtiofs share0 rw,dax=inode\n\
            32 22 0:30 / /t rw - tmpfs share1 rw\n\
            nonsense\n";
        assert_eq!(place_of(mounts, "share0"), Some(b"/my data".to_vec()));
        assert_eq!(place_of(mounts, "share1"), None);
        assert_eq!(place_of(mounts, "share"), None);
        assert_eq!(unescape("\\134\\0"), b"\\\\0");
    }
}
