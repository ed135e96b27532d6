//! A group of fanotify(7): which directories are watched, and what happens in them.
//!
//! Directories are marked one by one, which takes no capability (Linux 5.13). An event names the directory by its
//! file handle and the entry by its name, and says whether this process has done it.
#![expect(unsafe_code, reason = "two system calls that rustix does not have")]

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use bitflags::bitflags;

use super::super::file_handle::FileHandle;
use super::super::host::Host;
use crate::fuse::Result;

bitflags! {
    /// What has happened, by the numbers of linux/fanotify.h.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub(super) struct What: u64 {
        const MODIFY = libc::FAN_MODIFY;
        const ATTRIB = libc::FAN_ATTRIB;
        const MOVED_FROM = libc::FAN_MOVED_FROM;
        const MOVED_TO = libc::FAN_MOVED_TO;
        const CREATE = libc::FAN_CREATE;
        const DELETE = libc::FAN_DELETE;
        const DELETE_SELF = libc::FAN_DELETE_SELF;
        /// Events were lost.
        const OVERFLOW = libc::FAN_Q_OVERFLOW;
        /// It is about a directory.
        const ONDIR = libc::FAN_ONDIR;
    }
}

impl What {
    /// Names came or went.
    pub(super) const NAMES: Self =
        Self::MOVED_FROM.union(Self::MOVED_TO).union(Self::CREATE).union(Self::DELETE);

    /// What is watched of a directory.
    const WATCHED: u64 = Self::MODIFY.bits()
        | Self::ATTRIB.bits()
        | Self::NAMES.bits()
        | Self::DELETE_SELF.bits()
        | libc::FAN_ONDIR
        | libc::FAN_EVENT_ON_CHILD;
}

/// Something has happened.
#[derive(Debug)]
pub(super) struct Event {
    pub(super) what: What,
    /// This process has done it.
    pub(super) own: bool,
    /// The directory; none when it is about none.
    pub(super) directory: Option<FileHandle>,
    /// The entry; empty when it is about the directory itself.
    pub(super) name: Vec<u8>,
}

/// The group.
#[derive(Debug)]
pub(super) struct Group(OwnedFd);

/// What is read at once, in bytes: some 500 events.
const BUFFER: usize = 32 << 10;

impl Group {
    /// # Errors
    ///
    /// The host's: `ENOSYS`, `EINVAL` before Linux 5.13 without CAP_SYS_ADMIN, `EPERM` where a container forbids it,
    /// `EMFILE` when this user has too many.
    pub(super) fn new() -> io::Result<Self> {
        let flags = libc::FAN_CLASS_NOTIF
            | libc::FAN_CLOEXEC
            | libc::FAN_NONBLOCK
            | libc::FAN_REPORT_DIR_FID
            | libc::FAN_REPORT_NAME;
        // SAFETY: fanotify_init takes two numbers.
        let fd = unsafe { libc::syscall(libc::SYS_fanotify_init, flags, libc::O_RDONLY) };
        let fd = i32::try_from(fd).unwrap_or(-1);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call returned a new descriptor, which nobody else has.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// Watches a directory from now on.
    ///
    /// # Errors
    ///
    /// The host's: `ENOSPC` when this user watches too much, `EACCES` for one that may not be read, `ENODEV`,
    /// `EOPNOTSUPP` and `EXDEV` where the file system has no handles.
    pub(super) fn watch(&self, host: &Host, directory: impl AsFd) -> Result<()> {
        self.mark(host, directory, libc::FAN_MARK_ADD)
    }

    /// Watches it no more.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(super) fn leave(&self, host: &Host, directory: impl AsFd) -> Result<()> {
        self.mark(host, directory, libc::FAN_MARK_REMOVE)
    }

    /// Watches nothing any more.
    pub(super) fn leave_all(&self) {
        // SAFETY: with FAN_MARK_FLUSH the kernel looks at no name.
        unsafe {
            libc::syscall(
                libc::SYS_fanotify_mark,
                self.0.as_raw_fd(),
                libc::FAN_MARK_FLUSH,
                0u64,
                libc::AT_FDCWD,
                std::ptr::null::<libc::c_char>(),
            );
        }
    }

    fn mark(&self, host: &Host, directory: impl AsFd, how: libc::c_uint) -> Result<()> {
        host.by_path(directory, |place, name| self.mark_path(place.as_fd(), name, how))
    }

    fn mark_path(
        &self,
        place: BorrowedFd<'_>,
        name: &CStr,
        how: libc::c_uint,
    ) -> rustix::io::Result<()> {
        // SAFETY: the kernel reads the name up to its NUL, and nothing else of this process's memory.
        let result = unsafe {
            libc::syscall(
                libc::SYS_fanotify_mark,
                self.0.as_raw_fd(),
                how | libc::FAN_MARK_ONLYDIR,
                What::WATCHED,
                place.as_raw_fd(),
                name.as_ptr(),
            )
        };
        match result {
            0 => Ok(()),
            _ => Err(rustix::io::Errno::from_io_error(&io::Error::last_os_error())
                .unwrap_or(rustix::io::Errno::IO)),
        }
    }

    /// Takes some events. None: there are no more now.
    ///
    /// # Errors
    ///
    /// The host's.
    pub(super) fn read(&self, mut each: impl FnMut(Event)) -> io::Result<Option<()>> {
        let mut buffer = vec![0; BUFFER];
        match rustix::io::read(&self.0, &mut buffer) {
            Ok(count) => {
                let mut rest = buffer.get(..count).unwrap_or_default();
                while let Some((event, after)) = parse(rest) {
                    each(event);
                    rest = after;
                }
                Ok(Some(()))
            }
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(rustix::io::Errno::INTR) => Ok(Some(())),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The number that begins there, and what follows.
macro_rules! number {
    ($number:ty, $bytes:expr) => {{
        let (first, rest) = $bytes.split_first_chunk::<{ size_of::<$number>() }>()?;
        (<$number>::from_ne_bytes(*first), rest)
    }};
}

/// The first event of what was read (`struct fanotify_event_metadata`), and the rest.
fn parse(bytes: &[u8]) -> Option<(Event, &[u8])> {
    let (length, rest) = number!(u32, bytes);
    let (_version, rest) = number!(u16, rest);
    let (head, rest) = number!(u16, rest);
    let (mask, rest) = number!(u64, rest);
    let (_fd, rest) = number!(i32, rest);
    let (pid, _) = number!(i32, rest);
    let (event, after) = bytes.split_at_checked(length as usize)?;
    let own = u32::try_from(pid) == Ok(std::process::id());
    let what = What::from_bits_truncate(mask);
    let mut parsed = Event { what, own, directory: None, name: Vec::new() };
    let mut records = event.get(usize::from(head)..)?;
    while let Some((directory, name, others)) = record(records) {
        if let Some(directory) = directory {
            parsed.directory = Some(directory);
            parsed.name = name;
        }
        records = others;
    }
    // An event that says it is empty would be read for ever.
    (length > 0).then_some((parsed, after))
}

/// A record about an event (`struct fanotify_event_info_fid`): a directory and a name in it, when it is one of those.
fn record(bytes: &[u8]) -> Option<(Option<FileHandle>, Vec<u8>, &[u8])> {
    let ([kind, _], rest) = bytes.split_first_chunk::<2>()?;
    let (length, _) = number!(u16, rest);
    let (record, others) = bytes.split_at_checked(usize::from(length))?;
    if length == 0 {
        return None;
    }
    let named = *kind == libc::FAN_EVENT_INFO_TYPE_DFID_NAME;
    if !named && *kind != libc::FAN_EVENT_INFO_TYPE_DFID {
        return Some((None, Vec::new(), others));
    }
    // The header, and the number of the file system.
    let rest = record.get(4 + 8..)?;
    let (length, rest) = number!(u32, rest);
    let (kind, rest) = number!(i32, rest);
    let (handle, rest) = rest.split_at_checked(length as usize)?;
    let name = rest.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = if named && name != b"." { name.to_vec() } else { Vec::new() };
    Some((Some(FileHandle::of_bytes(kind, handle)), name, others))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_read_in_part_or_is_no_event_is_none() {
        assert!(parse(&[]).is_none());
        assert!(parse(&[0; 24]).is_none(), "of no length");
        let mut event = vec![0; 24];
        event[0] = 25;
        assert!(parse(&event).is_none(), "longer than what is there");
        event[0] = 24;
        event[6] = 24;
        event[8..16].copy_from_slice(&libc::FAN_Q_OVERFLOW.to_ne_bytes());
        let (parsed, rest) = parse(&event).unwrap();
        assert_eq!((parsed.what, rest.len()), (What::OVERFLOW, 0));
        // A record that is longer than its event, and one of no length.
        for record in [[2, 0, 200, 0], [2, 0, 0, 0]] {
            let mut event = [event.as_slice(), &record].concat();
            event[0] = 28;
            assert!(parse(&event).unwrap().0.directory.is_none());
        }
    }
}
