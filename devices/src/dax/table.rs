//! What is mapped where in a window.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use rustix::fs::{OFlags, Stat, fcntl_getfl, fstat};

use super::window::PAGE;

/// A file that is mapped, once for all its mappings of one kind: not a descriptor for every 2 MiB.
pub(super) struct Backing {
    pub(super) fd: OwnedFd,
    pub(super) key: Key,
}

/// Which file it is, and whether its descriptor is open for writing.
pub(super) type Key = (u64, u64, bool);

#[derive(Clone)]
pub(super) struct Mapping {
    pub(super) len: u64,
    pub(super) file: Arc<Backing>,
    pub(super) file_offset: u64,
    /// Where the file ended when this was mapped, rounded up to a page.
    pub(super) known_end: u64,
    /// Private zero pages stand here for what the file has lost.
    pub(super) zeros: bool,
}

impl Mapping {
    /// The part from `from` on, of `len` bytes.
    pub(super) fn part(&self, from: u64, len: u64) -> Self {
        Self { len, file_offset: self.file_offset + from, ..self.clone() }
    }
}

#[derive(Default)]
pub(super) struct State {
    /// By offset in the window; they do not overlap.
    pub(super) mappings: BTreeMap<u64, Mapping>,
    pub(super) files: HashMap<Key, Weak<Backing>>,
}

/// Where files end now, rounded up to a page: asked once for each, since many mappings are of one file.
#[derive(Default)]
pub(super) struct FileEnds(HashMap<Key, u64>);

impl FileEnds {
    pub(super) fn of(&mut self, file: &Backing) -> io::Result<u64> {
        if let Some(end) = self.0.get(&file.key) {
            return Ok(*end);
        }
        let end = page_end(&fstat(&file.fd)?);
        self.0.insert(file.key, end);
        Ok(end)
    }
}

pub(super) fn page_end(stat: &Stat) -> u64 {
    let len = u64::try_from(stat.st_size).unwrap_or(0);
    len.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
}

impl State {
    /// The mappings of one kind, as they are now.
    pub(super) fn copy(&self, which: impl Fn(&Mapping) -> bool) -> Vec<(u64, Mapping)> {
        self.mappings
            .iter()
            .filter(|(_, mapping)| which(mapping))
            .map(|(offset, mapping)| (*offset, mapping.clone()))
            .collect()
    }

    /// The backing of a file: the one that is there, or a new one with a descriptor of its own. `stat` is
    /// the file's; `trial` is called with a new one before it is entered.
    pub(super) fn backing(
        &mut self,
        file: BorrowedFd<'_>,
        stat: &Stat,
        writable: bool,
        trial: impl FnOnce(&OwnedFd) -> io::Result<()>,
    ) -> io::Result<Arc<Backing>> {
        // So that nothing is replaced before it is clear that the file may be mapped so.
        let mode = fcntl_getfl(file)? & OFlags::ACCMODE;
        if mode == OFlags::WRONLY || (writable && mode != OFlags::RDWR) {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        let key = (stat.st_dev, stat.st_ino, writable);
        if let Some(backing) = self.files.get(&key).and_then(Weak::upgrade) {
            return Ok(backing);
        }
        let fd = file.as_fd().try_clone_to_owned()?;
        trial(&fd)?;
        let backing = Arc::new(Backing { fd, key });
        // What is not mapped any more holds no descriptor, but a little memory.
        if self.files.len() >= 64 && self.files.len() >= 2 * self.mappings.len() {
            self.files.retain(|_, file| file.strong_count() > 0);
        }
        self.files.insert(key, Arc::downgrade(&backing));
        Ok(backing)
    }

    /// How many mappings there are once a range is cut out.
    pub(super) fn count_without(&self, offset: u64, len: u64) -> usize {
        let end = offset + len;
        let inside = self
            .mappings
            .range(offset..end)
            .filter(|(at, mapping)| *at + mapping.len <= end)
            .count();
        let before = self.mappings.range(..offset).next_back();
        let split = before.is_some_and(|(at, mapping)| at + mapping.len > end);
        self.mappings.len() - inside + usize::from(split)
    }

    /// Takes the parts of mappings that lie in a range out of the table, and returns them.
    pub(super) fn cut_out(&mut self, offset: u64, len: u64) -> Vec<(u64, Mapping)> {
        let end = offset + len;
        let mut out = Vec::new();
        // The last one that starts before the range may reach into it, or over it.
        let before = self.mappings.range(..offset).next_back();
        let mut touched: Vec<u64> = before.map(|(at, _)| *at).into_iter().collect();
        touched.extend(self.mappings.range(offset..end).map(|(at, _)| *at));
        for at in touched {
            let Some(mapping) = self.mappings.remove(&at) else {
                continue;
            };
            let mapping_end = at + mapping.len;
            if at < offset {
                let keep = mapping.len.min(offset - at);
                self.mappings.insert(at, mapping.part(0, keep));
            }
            if mapping_end > end {
                self.mappings.insert(end, mapping.part(end - at, mapping_end - end));
            }
            let from = at.max(offset);
            let to = mapping_end.min(end);
            if from < to {
                out.push((from, mapping.part(from - at, to - from)));
            }
        }
        out
    }

    /// Enters a mapping, over whatever was there.
    pub(super) fn insert(&mut self, offset: u64, mapping: Mapping) {
        self.cut_out(offset, mapping.len);
        self.mappings.insert(offset, mapping);
    }
}
