//! The directories that lead to members.
//!
//! They are there as long as a member is below them. Entries are listed in the order in which they were made, and
//! the cookie of an entry is its number, which is given out once: a listing that is read in pieces neither loses a
//! name nor has one twice, whatever comes and goes meanwhile.

use std::collections::{BTreeMap, HashMap};
use std::time::{SystemTime, UNIX_EPOCH};

use super::TreeError;
use crate::fuse::abi::{Attr, NAME_MAX, ROOT_ID};

/// The most names in a path.
pub(super) const DEPTH: usize = 16;

/// Cookies of `.` and `..`; no entry has such a number.
pub(super) const SELF: u64 = 1;
pub(super) const PARENT: u64 = 2;

/// What a name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Target {
    /// A directory of the tree: the number of the entry is its node id.
    Directory,
    /// The member with that index.
    Member(u32),
}

/// An entry.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) target: Target,
}

struct Directory {
    parent: u64,
    entries: BTreeMap<u64, Entry>,
    by_name: HashMap<String, u64>,
    /// When a name came or went last.
    changed: SystemTime,
}

impl Directory {
    fn new(parent: u64) -> Self {
        let changed = SystemTime::now();
        Self { parent, entries: BTreeMap::new(), by_name: HashMap::new(), changed }
    }
}

/// All of them, by node id.
pub(super) struct Directories {
    all: HashMap<u64, Directory>,
    next: u64,
}

/// The names of a path.
///
/// # Errors
///
/// [`TreeError::Path`].
pub(super) fn parse(path: &str) -> Result<Vec<&str>, TreeError> {
    let wrong = || TreeError::Path(path.chars().take(200).collect());
    let names = path.strip_prefix('/').ok_or_else(wrong)?;
    let names: Vec<_> = names.split('/').filter(|name| !name.is_empty()).collect();
    let fine = |name: &&str| {
        name.len() <= NAME_MAX && !matches!(*name, "." | "..") && !name.contains('\0')
    };
    if names.is_empty() || names.len() > DEPTH || !names.iter().all(fine) {
        return Err(wrong());
    }
    Ok(names)
}

/// The first so many names, as a path.
fn upto(names: &[&str], count: usize) -> String {
    names.iter().take(count).fold(String::new(), |path, name| path + "/" + name)
}

impl Directories {
    pub(super) fn new() -> Self {
        let all = HashMap::from([(ROOT_ID, Directory::new(ROOT_ID))]);
        Self { all, next: PARENT + 1 }
    }

    /// Whether a node id was ever given out.
    pub(super) fn was(&self, id: u64) -> bool {
        id == ROOT_ID || (PARENT + 1..self.next).contains(&id)
    }

    pub(super) fn is(&self, id: u64) -> bool {
        self.all.contains_key(&id)
    }

    /// The entry of a name, with its number.
    pub(super) fn entry(&self, directory: u64, name: &str) -> Option<(u64, Target)> {
        let directory = self.all.get(&directory)?;
        let number = directory.by_name.get(name)?;
        Some((*number, directory.entries.get(number)?.target))
    }

    /// The entries behind a cookie.
    pub(super) fn list(&self, directory: u64, after: u64) -> Vec<(u64, Entry)> {
        let Some(directory) = self.all.get(&directory) else { return Vec::new() };
        let rest = directory.entries.range(after.saturating_add(1)..);
        rest.map(|(number, entry)| (*number, entry.clone())).collect()
    }

    pub(super) fn parent(&self, directory: u64) -> u64 {
        self.all.get(&directory).map_or(ROOT_ID, |directory| directory.parent)
    }

    /// What a directory of the tree says of itself: everybody's to read, nobody's to change.
    pub(super) fn attr(&self, id: u64) -> Option<Attr> {
        let directory = self.all.get(&id)?;
        let below = directory.entries.len();
        let since = directory.changed.duration_since(UNIX_EPOCH).unwrap_or_default();
        let (seconds, nanoseconds) = (since.as_secs(), since.subsec_nanos());
        Some(Attr {
            ino: id,
            atime: seconds,
            mtime: seconds,
            ctime: seconds,
            atimensec: nanoseconds,
            mtimensec: nanoseconds,
            ctimensec: nanoseconds,
            mode: libc::S_IFDIR | 0o555,
            nlink: u32::try_from(below).unwrap_or(u32::MAX).saturating_add(2),
            blksize: 4096,
            ..Attr::default()
        })
    }

    /// The directory that holds the last of the names as far as there are directories, and how many names lead
    /// there.
    fn walk(&self, names: &[&str]) -> (u64, usize) {
        let (mut directory, mut passed) = (ROOT_ID, 0);
        while passed + 1 < names.len() {
            match names.get(passed).and_then(|name| self.entry(directory, name)) {
                Some((number, Target::Directory)) => (directory, passed) = (number, passed + 1),
                _ => break,
            }
        }
        (directory, passed)
    }

    /// The member at a path.
    pub(super) fn find(&self, names: &[&str]) -> Option<u32> {
        let (directory, passed) = self.walk(names);
        match self.entry(directory, names.get(passed)?)? {
            (_, Target::Member(index)) if passed + 1 == names.len() => Some(index),
            _ => None,
        }
    }

    /// Whether a member can be put there.
    ///
    /// # Errors
    ///
    /// What is there.
    pub(super) fn check_free(&self, names: &[&str]) -> Result<(), TreeError> {
        let (directory, passed) = self.walk(names);
        let Some(name) = names.get(passed) else { return Ok(()) };
        let path = upto(names, passed + 1);
        let last = passed + 1 == names.len();
        match self.entry(directory, name) {
            None => Ok(()),
            Some((_, Target::Member(_))) if last => Err(TreeError::Taken(path)),
            Some((_, Target::Member(_))) => Err(TreeError::Inside(path)),
            Some((_, Target::Directory)) => Err(TreeError::Holds(path)),
        }
    }

    /// Puts a member there.
    ///
    /// # Errors
    ///
    /// As [`check_free`](Self::check_free).
    pub(super) fn insert(&mut self, names: &[&str], index: u32) -> Result<(), TreeError> {
        self.check_free(names)?;
        let (mut directory, passed) = self.walk(names);
        for (at, name) in names.iter().enumerate().skip(passed) {
            let last = at + 1 == names.len();
            let target = if last { Target::Member(index) } else { Target::Directory };
            let number = self.next;
            self.next += 1;
            if let Some(holder) = self.all.get_mut(&directory) {
                holder.by_name.insert((*name).to_string(), number);
                holder.entries.insert(number, Entry { name: (*name).to_string(), target });
                holder.changed = SystemTime::now();
            }
            if !last {
                self.all.insert(number, Directory::new(directory));
                directory = number;
            }
        }
        Ok(())
    }

    /// Takes a member away, and the directories that lead to it and to nothing else.
    pub(super) fn remove(&mut self, names: &[&str]) -> Option<u32> {
        let index = self.find(names)?;
        let (mut directory, _) = self.walk(names);
        for name in names.iter().rev() {
            let holder = self.all.get_mut(&directory)?;
            if let Some(number) = holder.by_name.remove(*name) {
                holder.entries.remove(&number);
                holder.changed = SystemTime::now();
            }
            if !holder.entries.is_empty() || directory == ROOT_ID {
                break;
            }
            let parent = holder.parent;
            self.all.remove(&directory);
            directory = parent;
        }
        Some(index)
    }
}
