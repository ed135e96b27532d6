//! Listings.

use std::ffi::CString;
use std::mem::MaybeUninit;
use std::sync::{Arc, PoisonError};

use rustix::fs::{FileType, RawDir, SeekFrom, seek};

use super::Share;
use super::budget::{Budget, Permit};
use crate::fuse::{Caller, DirectorySink, Errno, Listing, Result};

/// The most that is read of a directory at a time, in bytes, on the stack.
const BUFFER: usize = 32768;
/// The least: several entries, of which the longest has 280 bytes.
const BUFFER_LEAST: usize = 1024;
/// The largest reply, in bytes, for which who must not wait looks up what is in it. The Linux guest asks for a page.
const LISTED_AT_ONCE: usize = 16 << 10;
/// How much longer an entry is in a READDIRPLUS reply than in the host's listing, about.
const PLUS_FACTOR: usize = 4;
/// The largest reply whose entries are kept for a guest that comes back for the end of it. The Linux guest
/// does so when its process reads with a shorter buffer than a page, and asks for a page then.
const KEPT_REPLY: usize = 4096;

/// One name, as the host listed it.
struct Entry {
    ino: u64,
    /// The host's cookie of the place behind it.
    next: u64,
    kind: u8,
    name: CString,
}

/// Where the listing of an open directory stands.
///
/// Not all file systems can take a listing up at a cookie: for some (tmpfs before Linux 6.6, ramfs) it is the
/// number of the entry, and when an earlier one is deleted meanwhile, a name is lost. Their descriptors keep
/// the place, though. So a listing that goes on is never sought: what was read of the host and did not fit is
/// kept for the next request, and so is a short last reply, of which the guest may have dropped the end.
#[derive(Default)]
pub(super) struct Position {
    /// The cookie of the place before `recent`. None: not known, the descriptor has to be sought.
    start: Option<u64>,
    /// What was read last, in order. The descriptor stands behind the last of them.
    recent: Vec<Entry>,
    /// How many of them are in the last reply; the others wait for the next.
    sent: usize,
    /// For what `recent` takes.
    permit: Option<Permit>,
}

impl Position {
    /// How many of `recent` are before the cookie, if it is of a place among them.
    fn find(&self, cookie: u64) -> Option<usize> {
        let start = self.start?;
        let before = |count: usize| match count.checked_sub(1) {
            Some(last) => self.recent.get(last).map(|entry| entry.next),
            None => Some(start),
        };
        // Names with the same hash may have the same cookie. The end of the last reply is what is meant; or
        // else the first such place: rather a name twice than one lost.
        std::iter::once(self.sent)
            .chain(0..=self.recent.len())
            .find(|count| before(*count) == Some(cookie))
    }

    /// Forgets `count` of the oldest entries.
    fn drop_first(&mut self, count: usize) {
        if let Some(last) = self.recent.drain(..count.min(self.recent.len())).next_back() {
            self.start = Some(last.next);
        }
        self.sent = self.sent.saturating_sub(count);
    }

    /// The request ends: pays for what is kept until the next, out of `buffers`. Where there is not enough,
    /// nothing is kept and the descriptor will be sought.
    fn settle(&mut self, buffers: &Arc<Budget>) {
        /// What an allocation costs beside its bytes, about.
        const ALLOCATION: usize = 24;
        self.recent.shrink_to_fit();
        let of = |entry: &Entry| size_of::<Entry>() + ALLOCATION + entry.name.count_bytes();
        self.permit = None;
        match buffers.take(self.recent.iter().map(of).sum()) {
            Ok(permit) => self.permit = Some(permit),
            Err(_) => *self = Self::default(),
        }
    }
}

impl Share {
    /// READDIR and READDIRPLUS.
    ///
    /// A cookie is the host's `d_off`, opaque here too: it is only ever given back to `lseek` of the same
    /// directory, so one that the guest made up lists at worst other names of it.
    pub(super) fn list(
        &self,
        caller: Caller,
        fh: u64,
        offset: u64,
        sink: &mut dyn DirectorySink,
    ) -> Result<()> {
        let inode = self.directory(caller.nodeid)?;
        if caller.at_once && sink.room() > LISTED_AT_ONCE {
            return Err(Errno::WOULD_WAIT);
        }
        let _buffer = self.buffers.take(sink.room())?;
        let handle = self.open_handle(caller.nodeid, fh)?;
        let directory = handle.directory()?;
        let mut guard = directory.position.lock().unwrap_or_else(PoisonError::into_inner);
        let position = &mut *guard;
        // From the start even if it stands there: that is how rewinddir(3) asks for what is new.
        match position.find(offset).filter(|_| offset != 0) {
            Some(before) => position.drop_first(before),
            None => {
                *position = Position::default();
                seek(&directory.fd, SeekFrom::Start(offset))?;
                position.start = Some(offset);
            }
        }
        position.sent = 0;
        let room = sink.room();

        let add = |entry: &Entry, sink: &mut dyn DirectorySink| {
            let name = entry.name.as_c_str();
            if !sink.fits(name.count_bytes()) {
                return false;
            }
            let own = matches!(name.to_bytes(), b"." | b"..");
            // A name that is gone by now, or whose file cannot be looked up, is listed all the same, as
            // READDIR does; the guest will look it up itself if it wants to. It costs the rest nothing.
            let found = match sink.plus() && !own {
                true => self.find_in(caller, &inode, &directory.fd, name).ok(),
                false => None,
            };
            let listing = Listing { ino: entry.ino, next: entry.next, kind: entry.kind, name };
            sink.add(&listing, found.as_ref());
            true
        };
        for entry in &position.recent {
            if !add(entry, sink) {
                break;
            }
            position.sent += 1;
        }

        let factor = if sink.plus() { PLUS_FACTOR } else { 1 };
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        // Not on with a reply that is nearly full: what does not fit has to be kept.
        while position.sent == position.recent.len()
            && (position.sent == 0 || sink.room() / factor >= BUFFER_LEAST)
        {
            let wanted = (sink.room() / factor).clamp(BUFFER_LEAST, BUFFER);
            let buffer = buffer.get_mut(..wanted).unwrap_or_default();
            let mut entries = RawDir::new(&directory.fd, buffer);
            let before = position.recent.len();
            loop {
                match entries.next() {
                    None => break,
                    Some(Ok(entry)) => position.recent.push(Entry {
                        ino: entry.ino(),
                        next: entry.next_entry_cookie(),
                        kind: kind(entry.file_type()),
                        name: entry.file_name().to_owned(),
                    }),
                    Some(Err(error)) => {
                        // What was listed so far is not lost; the error comes back at the next request.
                        if position.sent == 0 {
                            *position = Position::default();
                            return Err(error.into());
                        }
                        break;
                    }
                }
                if entries.is_buffer_empty() {
                    break;
                }
            }
            if position.recent.len() == before {
                break;
            }
            for entry in position.recent.iter().skip(before) {
                if !add(entry, sink) {
                    break;
                }
                position.sent += 1;
            }
        }
        if position.sent == 0 && !position.recent.is_empty() {
            return Err(Errno::INVAL);
        }
        if room - sink.room() > KEPT_REPLY {
            let sent = position.sent;
            position.drop_first(sent);
        }
        position.settle(&self.buffers);
        Ok(())
    }
}

/// `DT_*` of dirent.h.
fn kind(file_type: FileType) -> u8 {
    match file_type {
        FileType::RegularFile => libc::DT_REG,
        FileType::Directory => libc::DT_DIR,
        FileType::Symlink => libc::DT_LNK,
        FileType::Fifo => libc::DT_FIFO,
        FileType::Socket => libc::DT_SOCK,
        FileType::CharacterDevice => libc::DT_CHR,
        FileType::BlockDevice => libc::DT_BLK,
        FileType::Unknown => libc::DT_UNKNOWN,
    }
}
