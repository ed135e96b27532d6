//! Which stretches of a file one owner has locked.
//!
//! The host keeps the locks; this is the same list once more. It is needed to know how many records the host
//! keeps for the guest, which must not grow without bound, and whose the lock is that another owner meets.

use smallvec::SmallVec;

use crate::fuse::abi::FileLock;
use crate::fuse::{Errno, Result};

/// The largest offset of a file (`OFFSET_MAX` of linux/fs.h); a lock to there is one to the end of the file,
/// wherever that will be.
pub(super) const OFFSET_MAX: u64 = i64::MAX as u64;

/// The kind of a lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// `F_RDLCK`: shared.
    Read,
    /// `F_WRLCK`: exclusive.
    Write,
}

/// A stretch of a file, and what is wanted of it or held there. Offsets in bytes, both inclusive, at most
/// [`OFFSET_MAX`], and `first` is not above `last`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    pub(super) first: u64,
    pub(super) last: u64,
    /// `None` for no lock (`F_UNLCK`).
    pub(super) kind: Option<Kind>,
}

impl Span {
    /// Every byte, unlocked.
    pub(super) const NOTHING: Self = Self { first: 0, last: OFFSET_MAX, kind: None };

    /// What a guest asks for.
    ///
    /// # Errors
    ///
    /// `EINVAL` for an unknown type, and a range that ends before it begins or above [`OFFSET_MAX`].
    pub(super) fn of(lock: &FileLock) -> Result<Self> {
        if lock.start > lock.end || lock.end > OFFSET_MAX {
            return Err(Errno::INVAL);
        }
        let kind = match i32::try_from(lock.type_) {
            Ok(libc::F_RDLCK) => Some(Kind::Read),
            Ok(libc::F_WRLCK) => Some(Kind::Write),
            Ok(libc::F_UNLCK) => None,
            _ => return Err(Errno::INVAL),
        };
        Ok(Self { first: lock.start, last: lock.end, kind })
    }

    /// For the guest.
    pub(super) fn to_lock(self, pid: u32) -> FileLock {
        let kind = match self.kind {
            Some(Kind::Read) => libc::F_RDLCK,
            Some(Kind::Write) => libc::F_WRLCK,
            None => libc::F_UNLCK,
        };
        // Small positive numbers all of them.
        FileLock { start: self.first, end: self.last, type_: kind as u32, pid }
    }
}

/// The locks of one owner on one file: in order, without overlap, and two of the same kind never touch.
#[derive(Debug, Default)]
pub(super) struct Ranges(Vec<Span>);

/// What it takes to set a lock: these records go, and those come in their place.
#[derive(Debug)]
pub(super) struct Change {
    go: std::ops::Range<usize>,
    come: SmallVec<[Span; 3]>,
}

impl Change {
    /// The most records that one change adds: a lock in the middle of one of the other kind.
    pub(super) const MOST: usize = 2;

    /// How many records there are more afterwards.
    pub(super) fn more(&self) -> usize {
        self.come.len().saturating_sub(self.go.len())
    }

    /// How many there are fewer.
    pub(super) fn fewer(&self) -> usize {
        self.go.len().saturating_sub(self.come.len())
    }
}

impl Ranges {
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Span> {
        self.0.iter()
    }

    /// Whether another owner cannot set `span`.
    pub(super) fn exclude(&self, span: Span) -> bool {
        let start = self.0.partition_point(|held| held.last < span.first);
        let mut met = self.0.iter().skip(start).take_while(|held| held.first <= span.last);
        met.any(|held| span.kind == Some(Kind::Write) || held.kind == Some(Kind::Write))
    }

    /// What would come of setting `span`, by the rules of fcntl(2): it takes the place of all that was locked
    /// there, and what is left of that on either side stays.
    pub(super) fn plan(&self, span: Span) -> Change {
        let mut set = span;
        let mut start = self.0.partition_point(|held| held.last < span.first);
        let mut end = self.0.partition_point(|held| held.first <= span.last);
        // Neighbours that touch are one with it, if they are of its kind.
        if let Some(before) = start.checked_sub(1)
            && let Some(held) = self.0.get(before)
            && held.kind == span.kind
            && held.last.checked_add(1) == Some(span.first)
        {
            set.first = held.first;
            start = before;
        }
        if let Some(held) = self.0.get(end)
            && held.kind == span.kind
            && span.last.checked_add(1) == Some(held.first)
        {
            set.last = held.last;
            end += 1;
        }
        let (mut left, mut right) = (None, None);
        if let Some(held) = self.0.get(start..end).and_then(<[Span]>::first)
            && held.first < span.first
        {
            if held.kind == span.kind {
                set.first = held.first;
            } else {
                // Above `held.first`, so not 0.
                left = Some(Span { last: span.first - 1, ..*held });
            }
        }
        if let Some(held) = self.0.get(start..end).and_then(<[Span]>::last)
            && held.last > span.last
        {
            if held.kind == span.kind {
                set.last = held.last;
            } else {
                right = Some(Span { first: span.last + 1, ..*held });
            }
        }
        let middle = span.kind.map(|_| set);
        Change { go: start..end, come: [left, middle, right].into_iter().flatten().collect() }
    }

    /// Carries out what was planned, and nothing was changed since.
    pub(super) fn apply(&mut self, change: Change) {
        self.0.splice(change.go, change.come);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: usize = 24;

    #[test]
    fn ranges_are_those_of_a_list_of_bytes() {
        let mut state = 0x1234_5678_9abc_def1u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        let mut ranges = Ranges::default();
        let mut bytes = [None; BYTES];
        for _ in 0..20_000 {
            let first = random(BYTES as u64);
            let last = first + random(BYTES as u64 - first);
            let kind = [None, Some(Kind::Read), Some(Kind::Write)][random(3) as usize];
            let change = ranges.plan(Span { first, last, kind });
            let (more, fewer, before) = (change.more(), change.fewer(), ranges.len());
            ranges.apply(change);
            assert_eq!(before + more - fewer, ranges.len());
            assert!(more <= Change::MOST);
            bytes[first as usize..=last as usize].fill(kind);
            let mut expected: Vec<Span> = Vec::new();
            for (at, kind) in bytes.iter().enumerate().filter(|(_, kind)| kind.is_some()) {
                let at = at as u64;
                match expected.last_mut() {
                    Some(span) if span.kind == *kind && span.last + 1 == at => span.last = at,
                    _ => expected.push(Span { first: at, last: at, kind: *kind }),
                }
            }
            assert_eq!(ranges.0, expected);
        }
    }

    #[test]
    fn a_lock_may_end_at_the_largest_offset() {
        let mut ranges = Ranges::default();
        let all = Span { kind: Some(Kind::Write), ..Span::NOTHING };
        ranges.apply(ranges.plan(all));
        let end = Span { first: OFFSET_MAX, last: OFFSET_MAX, kind: Some(Kind::Read) };
        ranges.apply(ranges.plan(end));
        assert_eq!(ranges.0, [Span { last: OFFSET_MAX - 1, ..all }, end]);
        ranges.apply(ranges.plan(Span::NOTHING));
        assert!(ranges.is_empty());
    }

    #[test]
    fn what_is_no_lock_is_refused() {
        let lock = |start, end, type_| FileLock { start, end, type_, pid: 0 };
        assert!(Span::of(&lock(0, OFFSET_MAX, 0)).is_ok());
        for bad in [
            lock(1, 0, 0),
            lock(0, OFFSET_MAX + 1, 0),
            lock(u64::MAX, u64::MAX, 0),
            lock(OFFSET_MAX, 0, 2),
            lock(0, 0, 3),
            lock(0, 0, u32::MAX),
        ] {
            assert_eq!(Span::of(&bad), Err(Errno::INVAL), "{bad:?}");
        }
    }
}
