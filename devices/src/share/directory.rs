//! Listings.

use std::mem::MaybeUninit;
use std::sync::PoisonError;

use rustix::fs::{FileType, RawDir, SeekFrom, seek};

use super::Share;
use crate::fuse::{Caller, DirectorySink, Errno, Listing, Result};

/// The most that is read of a directory at a time, in bytes, on the stack.
const BUFFER: usize = 32768;
/// The least: one entry with the longest name has 280.
const BUFFER_LEAST: usize = 1024;
/// How much longer an entry is in a READDIRPLUS reply than in the host's listing, about.
const PLUS_FACTOR: usize = 4;

impl Share {
    /// READDIR and READDIRPLUS.
    ///
    /// A cookie is the host's `d_off`, opaque here too: it is only ever given back to `lseek` of the same
    /// directory, so one that the guest made up lists at worst other names of it. What was read of the host
    /// and did not fit is read again by the next request.
    pub(super) fn list(
        &self,
        caller: Caller,
        fh: u64,
        offset: u64,
        sink: &mut dyn DirectorySink,
    ) -> Result<()> {
        let inode = self.directory(caller.nodeid)?;
        let handle = self.handles.get(caller.nodeid, fh)?;
        let directory = handle.directory()?;
        let mut position = directory.position.lock().unwrap_or_else(PoisonError::into_inner);
        // From the start even if it stands there: that is how rewinddir(3) asks for what is new.
        if *position != Some(offset) || offset == 0 {
            *position = None;
            seek(&directory.fd, SeekFrom::Start(offset))?;
        }
        let factor = if sink.plus() { PLUS_FACTOR } else { 1 };
        let wanted = (sink.room() / factor).clamp(BUFFER_LEAST, BUFFER);
        let mut buffer = [MaybeUninit::uninit(); BUFFER];
        let mut entries = RawDir::new(&directory.fd, buffer.get_mut(..wanted).unwrap_or_default());
        *position = None;
        let mut last = offset;
        let mut any = false;
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                // What was listed so far is not lost; the error comes back at the next request.
                Err(_) if any => return Ok(()),
                Err(error) => return Err(error.into()),
            };
            let name = entry.file_name();
            if !sink.fits(name.count_bytes()) {
                return if any { Ok(()) } else { Err(Errno::INVAL) };
            }
            let listing = Listing {
                ino: entry.ino(),
                next: entry.next_entry_cookie(),
                kind: kind(entry.file_type()),
                name,
            };
            let own = matches!(name.to_bytes(), b"." | b"..");
            // A name that is gone by now, or whose file cannot be looked up, is listed all the same, as
            // READDIR does; the guest will look it up itself if it wants to. It costs the rest nothing.
            let found = match sink.plus() && !own {
                true => self.find_in(&inode, &directory.fd, name).ok(),
                false => None,
            };
            sink.add(&listing, found.as_ref());
            any = true;
            last = listing.next;
        }
        *position = Some(last);
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
