//! What is mapped where in a window.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Weak};

use rustix::fs::{OFlags, Stat, fcntl_getfl, fstat, fstatfs};

use super::window::PAGE;

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS: u32 = 0x9584_58f6;
/// `OVERLAYFS_SUPER_MAGIC` of linux/magic.h.
const OVERLAYFS: u32 = 0x794c_7630;
/// `TMPFS_MAGIC` of linux/magic.h; also memfds.
pub(super) const TMPFS: u32 = 0x0102_1994;

/// A file that is mapped, once for all its mappings of one kind: not a descriptor for every 2 MiB.
pub(super) struct Backing {
    pub(super) fd: OwnedFd,
    pub(super) key: Key,
    /// Its change time, where a copy-up may put another file in its place (see [`Opened`]).
    copied_up: Option<(i64, i64)>,
    /// It is nowhere but in memory: a page of it can be had for writing at any time, and not only by a write.
    pub(super) in_memory: bool,
    /// That the host cannot say where it ends was logged.
    pub(super) lost: AtomicBool,
}

impl Backing {
    /// Another file may take its place: see [`Opened::backing`].
    pub(super) fn may_be_copied_up(&self) -> bool {
        self.copied_up.is_some()
    }
}

/// Which file it is, and whether its descriptor is open for writing.
pub(super) type Key = (u64, u64, bool);

/// A file that is about to be mapped, and what had to be asked of the host for that. No lock is held while
/// it is: the host may be slow.
pub(super) struct Opened {
    pub(super) stat: Stat,
    key: Key,
    read_only: bool,
}

impl Opened {
    /// # Errors
    ///
    /// `EACCES` when the file is not open as the mapping needs it; the errno of `fstat`.
    pub(super) fn new(file: BorrowedFd<'_>, writable: bool) -> io::Result<Self> {
        // So that nothing is replaced before it is clear that the file may be mapped so.
        let mode = fcntl_getfl(file)? & OFlags::ACCMODE;
        if mode == OFlags::WRONLY || (writable && mode != OFlags::RDWR) {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        let stat = fstat(file)?;
        let key = (stat.st_dev, stat.st_ino, writable);
        Ok(Self { stat, key, read_only: mode == OFlags::RDONLY })
    }

    /// A backing with a descriptor of its own.
    ///
    /// A descriptor of overlayfs that is open for reading only may be of a file of a lower layer, which the
    /// first write anywhere replaces by a copy: device and inode number stay as they are, and what is
    /// mapped through the descriptor shows the old file for ever. The change time is another one then.
    ///
    /// # Errors
    ///
    /// `ENODEV` for a file of hugetlbfs, whose pages are not of the window's size; what `trial` says, which
    /// is called with the new descriptor.
    pub(super) fn backing(
        &self,
        file: BorrowedFd<'_>,
        trial: impl FnOnce(&OwnedFd) -> io::Result<()>,
    ) -> io::Result<Backing> {
        let file_system = fstatfs(file)?.f_type as u32;
        if file_system == HUGETLBFS {
            return Err(io::Error::from_raw_os_error(libc::ENODEV));
        }
        let fd = file.try_clone_to_owned()?;
        trial(&fd)?;
        let replaceable = file_system == OVERLAYFS && self.read_only;
        Ok(Backing {
            fd,
            key: self.key,
            copied_up: replaceable.then_some(self.changed()),
            in_memory: file_system == TMPFS,
            lost: AtomicBool::new(false),
        })
    }

    fn changed(&self) -> (i64, i64) {
        (self.stat.st_ctime, self.stat.st_ctime_nsec as i64)
    }

    /// Whether the file is that of a backing which is there.
    fn is_of(&self, backing: &Backing) -> bool {
        backing.copied_up.is_none_or(|changed| self.read_only && changed == self.changed())
    }
}

/// What the guest's access to a mapping comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// It reads the file, and cannot write.
    Read,
    /// It reads and writes the file.
    Write,
    /// It reads the file, and what it writes is its own.
    Severed,
}

#[derive(Clone)]
pub(super) struct Mapping {
    /// On whose behalf.
    pub(super) owner: u32,
    pub(super) access: Access,
    pub(super) len: u64,
    pub(super) file: Arc<Backing>,
    pub(super) file_offset: u64,
    /// Where the file ended when this was mapped, rounded up to a page.
    pub(super) known_end: u64,
    /// So much of it shows the file. From there on private zero pages stand for what the file has lost.
    /// They are no mapping of their own, so that no repair makes more mappings than the guest did.
    pub(super) shown: u64,
}

impl Mapping {
    /// The part from `from` on, of `len` bytes.
    pub(super) fn part(&self, from: u64, len: u64) -> Self {
        Self {
            len,
            file_offset: self.file_offset.saturating_add(from),
            shown: self.shown.saturating_sub(from).min(len),
            ..self.clone()
        }
    }

    /// How much of it lies before the end of its file.
    pub(super) fn there(&self, file_end: u64) -> u64 {
        file_end.saturating_sub(self.file_offset).min(self.len)
    }
}

#[derive(Default)]
pub(super) struct State {
    /// By offset in the window; they do not overlap.
    pub(super) mappings: BTreeMap<u64, Mapping>,
    /// The offsets of single pages that could not be had although their file has them, and in whose place
    /// there are private zeros. All in what their mappings show of the file.
    pub(super) unreadable: BTreeSet<u64>,
    pub(super) files: HashMap<Key, Weak<Backing>>,
    /// Goes up when a range is mapped or unmapped.
    pub(super) changes: u64,
    /// How much of the budget is drawn for this window.
    pub(super) drawn: usize,
}

/// Where files end now, rounded up to a page: asked once for each, since many mappings are of one file.
#[derive(Default)]
pub(super) struct FileEnds(HashMap<usize, u64>);

fn identity(file: &Arc<Backing>) -> usize {
    Arc::as_ptr(file).addr()
}

impl FileEnds {
    /// Asks `end_of` for the ends of files, and leaves out those that give no answer.
    pub(super) fn of_those_that_answer(
        files: &[Arc<Backing>],
        end_of: impl Fn(&OwnedFd) -> io::Result<u64>,
    ) -> Self {
        let end = |file: &Arc<Backing>| Some((identity(file), end_of(&file.fd).ok()?));
        Self(files.iter().filter_map(end).collect())
    }

    /// Asks `end_of` for the ends of files. One that cannot be asked (its server is gone, it was removed
    /// there) has lost all its pages: only for who knows that some page cannot be had.
    pub(super) fn ask(
        files: &[Arc<Backing>],
        end_of: impl Fn(&OwnedFd) -> io::Result<u64>,
    ) -> Self {
        let end = |file: &Arc<Backing>| match end_of(&file.fd) {
            Ok(end) => end,
            Err(error) => {
                let (device, inode, _) = file.key;
                if !file.lost.swap(true, Relaxed) {
                    log::warn!(
                        "the host has lost a file that is mapped (device {device:#x}, inode {inode}): \
                         {error}; the guest reads zeros there"
                    );
                }
                0
            }
        };
        Self(files.iter().map(|file| (identity(file), end(file))).collect())
    }

    /// None for a file that was mapped after the question, or gave no answer.
    pub(super) fn of(&self, file: &Arc<Backing>) -> Option<u64> {
        self.0.get(&identity(file)).copied()
    }
}

pub(super) fn page_end(stat: &Stat) -> u64 {
    let len = u64::try_from(stat.st_size).unwrap_or(0);
    len.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX)
}

impl State {
    /// The files of such mappings, each once.
    pub(super) fn files_of(&self, which: impl Fn(&Mapping) -> bool) -> Vec<Arc<Backing>> {
        let files: HashMap<usize, Arc<Backing>> = self
            .mappings
            .values()
            .filter(|mapping| which(mapping))
            .map(|mapping| (identity(&mapping.file), mapping.file.clone()))
            .collect();
        files.into_values().collect()
    }

    /// The mapping that has an offset, and where it begins.
    pub(super) fn at(&self, offset: u64) -> Option<(u64, &Mapping)> {
        let (start, mapping) = self.mappings.range(..=offset).next_back()?;
        (offset - start < mapping.len).then_some((*start, mapping))
    }

    /// The backing of a file, when there is one.
    pub(super) fn known(&self, file: &Opened) -> Option<Arc<Backing>> {
        self.files.get(&file.key).and_then(Weak::upgrade).filter(|backing| file.is_of(backing))
    }

    /// Enters a backing.
    pub(super) fn add_file(&mut self, file: &Arc<Backing>) {
        // What is not mapped any more holds no descriptor, but a little memory.
        if self.files.len() >= 64 && self.files.len() >= 2 * self.mappings.len() {
            self.files.retain(|_, file| file.strong_count() > 0);
        }
        self.files.insert(file.key, Arc::downgrade(file));
    }

    /// What counts towards the budget.
    pub(super) fn count(&self) -> usize {
        self.mappings.len() + self.unreadable.len()
    }

    /// How much counts once a range is cut out.
    pub(super) fn count_without(&self, offset: u64, len: u64) -> usize {
        let end = offset + len;
        let inside = self
            .mappings
            .range(offset..end)
            .filter(|(at, mapping)| *at + mapping.len <= end)
            .count();
        let before = self.mappings.range(..offset).next_back();
        let split = before.is_some_and(|(at, mapping)| at + mapping.len > end);
        let pages = self.unreadable.range(offset..end).count();
        self.count() - inside - pages + usize::from(split)
    }

    /// Forgets the unreadable pages of a range.
    pub(super) fn forget_unreadable(&mut self, from: u64, to: u64) {
        while let Some(at) = self.unreadable.range(from..to).next().copied() {
            self.unreadable.remove(&at);
        }
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
        self.forget_unreadable(offset, end);
        self.changes += 1;
        out
    }

    /// Enters a mapping, over whatever was there, and returns that.
    pub(super) fn insert(&mut self, offset: u64, mapping: Mapping) -> Vec<(u64, Mapping)> {
        let before = self.cut_out(offset, mapping.len);
        self.mappings.insert(offset, mapping);
        before
    }
}

#[cfg(test)]
#[path = "table_test.rs"]
mod tests;
