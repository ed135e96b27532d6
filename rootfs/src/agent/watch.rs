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
//! Those of the guest who watch files (inotify(7)) hear what the kernel itself does. So what the host has done is done
//! once more, where somebody watches, by requests that the device knows and that change nothing: made, removed, opened for
//! writing and closed, changed in mode.
//!
//! Directories and files are reached by the numbers that the device has given them, as file handles (fs/fuse/inode.c):
//! what the kernel does not know any more is not there to be reached, and needs no asking.

use std::collections::HashSet;
use std::ffi::{CStr, CString};
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;

use oriel_init::frames::{self, Decoder, MAX_TO_AGENT};
use oriel_init::watch::{
    self, ATTRIBUTES, CLOSED, CREATED, Change, DELETED, FromWatcher, MODIFIED, ToWatcher,
};
use rustix::fs::{
    Advice, AtFlags, CWD, FallocateFlags, FileType, Mode, OFlags, Statx, StatxFlags,
    StatxTimestamp, chmod, fadvise, fallocate, mkdirat, mknodat, openat, statx, symlinkat,
    unlinkat,
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
                (ToWatcher::Begin { tag, group }, None) => match Share::open(&tag, group) {
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

/// A share, by mounts that nobody else sees.
struct Share {
    /// Nothing can be changed through it.
    read_only: OwnedFd,
    writable: OwnedFd,
    /// The group id to have while names are to be taken for new ones.
    group: u32,
    listeners: Listeners,
}

impl Share {
    fn open(tag: &str, group: u32) -> io::Result<Self> {
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        let place = place_of(&mounts, tag)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "it is not mounted"))?;
        let place = CString::new(place)?;
        let read_only = sys::twin_mount(&place, true)?;
        let writable = sys::twin_mount(&place, false)?;
        let of = statx(&read_only, "", AtFlags::EMPTY_PATH, StatxFlags::empty())?;
        let listeners = Listeners::of(of.stx_dev_major, of.stx_dev_minor);
        Ok(Self { read_only, writable, group, listeners })
    }

    fn ask_all(&mut self, changes: &[Change]) {
        let heard = |change: &Change| matches!(change, Change::Name { events, .. } if *events != 0);
        if changes.iter().any(heard) {
            self.listeners.look();
        }
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
            Change::Name { directory, name, ask, data, events } => {
                let name = watch::bytes(name).and_then(|name| CString::new(name).ok());
                let name = name.ok_or(Errno::INVAL)?;
                self.ask_name(*directory, &name, (*ask, *data), *events)
            }
            Change::Listing { directory } => self.ask_listing(*directory),
            Change::Node { node } => ask_attributes(&self.reach(*node, OFlags::PATH)?, c""),
        }
    }

    fn ask_name(
        &self,
        node: u64,
        name: &CStr,
        (ask, data): (bool, bool),
        events: u8,
    ) -> Result<(), Errno> {
        let listens = events != 0 && !self.listeners.is_empty();
        if !ask && !listens {
            return Ok(());
        }
        let directory = self.reach(node, OFlags::PATH | OFlags::DIRECTORY)?;
        let before = if ask && listens { known(&directory, name) } else { None };
        let heard = listens
            && (self.listeners.hears(statx(&directory, "", AtFlags::EMPTY_PATH, INO)?.stx_ino)
                || before.is_some_and(|(_, number)| self.listeners.hears(number)));
        // First, for it is only heard of what the kernel still knows. But not of a directory: it may be there by another
        // name, and the kernel lets nobody work in one that it has seen removed.
        if heard
            && events & DELETED != 0
            && let Some((mode, _)) = before
            && FileType::from_raw_mode(mode) != FileType::Directory
        {
            self.raise(node, name, DELETED, mode);
        }
        if ask || heard {
            match mkdirat(&directory, name, Mode::empty()) {
                Ok(()) | Err(Errno::EXIST | Errno::ROFS) => {}
                Err(error) => return Err(error),
            }
        }
        if ask {
            match ask_attributes(&directory, name) {
                // It is not there, and that the kernel knows by now.
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        if ask && data {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            drop_data(&openat(&directory, name, flags, Mode::empty())?)?;
        }
        if heard && let Some((mode, _)) = known(&directory, name) {
            for event in [CREATED, ATTRIBUTES, events & (MODIFIED | CLOSED)] {
                if events & event != 0 {
                    self.raise(node, name, event, mode);
                }
            }
        }
        Ok(())
    }

    /// Has those who watch a directory, or a file in it, hear of something. What cannot be heard is not.
    fn raise(&self, node: u64, name: &CStr, events: u8, mode: u32) {
        let raised =
            sys::open_fuse_node(self.writable.as_fd(), node, OFlags::PATH | OFlags::DIRECTORY)
                .and_then(|directory| {
                    let _group = sys::FileGroup::take(self.group);
                    raise(&directory, name, events, mode)
                });
        match raised {
            // Nothing is heard of what is being run, of what is gone again, and where all is read-only.
            Ok(()) | Err(Errno::TXTBSY | Errno::NOENT | Errno::STALE | Errno::ROFS) => {}
            Err(error) => log(&format!("{events} of {name:?} is not heard: {error}")),
        }
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

const INO: StatxFlags = StatxFlags::INO;

/// Mode and number of an entry, as the kernel knows it now.
fn known(directory: &OwnedFd, name: &CStr) -> Option<(u32, u64)> {
    let how = AtFlags::SYMLINK_NOFOLLOW | AtFlags::STATX_DONT_SYNC;
    let of = statx(directory, name, how, StatxFlags::MODE | StatxFlags::TYPE | INO).ok()?;
    Some((of.stx_mode.into(), of.stx_ino))
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

/// Does to the kernel what the host has done already: of these events one, or the last two.
fn raise(directory: &OwnedFd, name: &CStr, events: u8, mode: u32) -> Result<(), Errno> {
    let kind = FileType::from_raw_mode(mode);
    let permissions = Mode::from_raw_mode(mode & 0o7777);
    match (events, kind) {
        (DELETED, _) => unlinkat(directory, name, AtFlags::empty()),
        (CREATED, FileType::Directory) => mkdirat(directory, name, permissions),
        (CREATED, FileType::Symlink) => symlinkat(c"-", directory, name),
        (CREATED, FileType::RegularFile | FileType::Fifo | FileType::Socket) => {
            mknodat(directory, name, kind, permissions, 0)
        }
        (ATTRIBUTES, FileType::RegularFile | FileType::Directory) => {
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = openat(directory, name, flags, Mode::empty())?;
            chmod(path_of(&file), permissions)
        }
        (events, FileType::RegularFile) if events & (MODIFIED | CLOSED) != 0 => {
            let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = openat(directory, name, flags, Mode::empty())?;
            if events & MODIFIED == 0 {
                return Ok(());
            }
            fallocate(&file, FallocateFlags::KEEP_SIZE, 0, 1)
        }
        _ => Ok(()),
    }
}

/// Who of the guest watches files of a share, by inotify(7) or fanotify(7).
struct Listeners {
    /// The share's device, as /proc/PID/fdinfo has it.
    device: String,
    /// The numbers of what is watched, in hexadecimal digits.
    files: HashSet<String>,
    /// All of the share is.
    everything: bool,
}

impl Listeners {
    fn of(major: u32, minor: u32) -> Self {
        // Of the kernel's own number the lower 20 bits are the minor one.
        let device = format!("sdev:{:x}", major << 20 | minor);
        Self { device, files: HashSet::new(), everything: false }
    }

    fn is_empty(&self) -> bool {
        self.files.is_empty() && !self.everything
    }

    fn hears(&self, number: u64) -> bool {
        self.everything || self.files.contains(&format!("{number:x}"))
    }

    /// Looks who there is now.
    fn look(&mut self) {
        self.files.clear();
        self.everything = false;
        let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
        for process in processes {
            let Ok(descriptors) = fs::read_dir(process.path().join("fd")) else { continue };
            for descriptor in descriptors.flatten() {
                let to = fs::read_link(descriptor.path()).unwrap_or_default();
                if matches!(to.to_str(), Some("anon_inode:inotify" | "anon_inode:[fanotify]")) {
                    let info = process.path().join("fdinfo").join(descriptor.file_name());
                    self.take(&fs::read_to_string(info).unwrap_or_default());
                }
            }
        }
    }

    /// Of one descriptor (proc(5)).
    fn take(&mut self, info: &str) {
        for line in info.lines() {
            let words = || line.split(' ');
            let kind = words().next();
            if !matches!(kind, Some("inotify" | "fanotify"))
                || !words().any(|word| word == self.device)
            {
                continue;
            }
            match words().find_map(|word| word.strip_prefix("ino:")) {
                Some(number) => drop(self.files.insert(number.into())),
                // A mark of a mount or of a file system.
                None => self.everything = true,
            }
        }
    }
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

    #[test]
    fn who_watches_is_told_by_what_proc_says() {
        let mut listeners = Listeners::of(0, 0x2d);
        let info = "pos:\t0\nflags:\t00\nmnt_id:\t15\ninode_no:\t2072\n\
            inotify wd:2 ino:9e7e sdev:2d mask:fce ignored_mask:0 fhandle-bytes:8\n\
            inotify wd:1 ino:77 sdev:2e mask:fce ignored_mask:0\n";
        listeners.take(info);
        assert!(listeners.hears(0x9e7e) && !listeners.hears(0x77) && !listeners.hears(1));
        listeners.take("fanotify flags:0 event-flags:0\nfanotify sdev:2d mflags:0 mask:3\n");
        assert!(listeners.hears(1));
        let mut listeners = Listeners::of(4095, 0xf_ffff);
        listeners.look();
        assert!(listeners.is_empty(), "nobody watches a device that is not there");
    }
}
