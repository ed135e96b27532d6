//! Numbers that the guest may hold.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::hash::{Hash, Hasher};
use std::sync::Arc;

use super::common::NUMBER_BITS;
use crate::fuse::{Errno, Result};

/// A value that knows its number.
pub(super) trait Numbered {
    fn number(&self) -> &u64;
}

/// Values by number. The first value ever inserted has the first number of [`Numbers`], the next one the next: a
/// number is given out once and never again, so one whose value is gone is stale for good.
///
/// A value costs its [`Arc`] and some 10 to 20 bytes; what was needed for values that are gone goes back.
pub(super) struct Table<T> {
    values: HashSet<Entry<T>>,
    numbers: Numbers,
    next: u64,
}

/// The numbers that a share gives out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Numbers {
    /// The first one; that of the root, among node ids.
    pub(super) first: u64,
    /// None of them is larger.
    pub(super) last: u64,
}

impl Numbers {
    /// Those of the share with that index in its session. A share that is alone has index 0 and all numbers: the
    /// guest would need centuries to get to `u64::MAX`, which means "none" to it. Among others, a hundred thousand
    /// a second last five years.
    pub(super) fn of(index: u32) -> Self {
        let base = u64::from(index) << NUMBER_BITS;
        let last = base | ((1 << NUMBER_BITS) - 1);
        Self { first: base + 1, last: if index == 0 { u64::MAX } else { last } }
    }
}

/// Stands in the set under the number that the value has inside, which is not stored a second time.
struct Entry<T>(Arc<T>);

impl<T: Numbered> Borrow<u64> for Entry<T> {
    fn borrow(&self) -> &u64 {
        self.0.number()
    }
}

impl<T: Numbered> Hash for Entry<T> {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.number().hash(state);
    }
}

impl<T: Numbered> PartialEq for Entry<T> {
    fn eq(&self, other: &Self) -> bool {
        self.0.number() == other.0.number()
    }
}

impl<T: Numbered> Eq for Entry<T> {}

/// Shrinks a set of which less than a quarter is used, to twice what is: then as many values have to come or
/// go before its size changes again as there are now.
pub(super) fn shrink<T: Eq + Hash>(set: &mut HashSet<T>) {
    /// Below, there is nothing to gain.
    const LEAST: usize = 64;
    if set.capacity() > LEAST && set.len() < set.capacity() / 4 {
        set.shrink_to(set.len() * 2);
    }
}

impl<T: Numbered> Table<T> {
    /// An empty table. How many values there may be is the affair of whoever inserts them.
    pub(super) fn new(numbers: Numbers) -> Self {
        Self { values: HashSet::new(), numbers, next: numbers.first }
    }

    pub(super) fn live(&self) -> usize {
        self.values.len()
    }

    /// How many values there is room for without asking for memory.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.values.capacity()
    }

    /// Inserts a value, which is told its number.
    ///
    /// # Errors
    ///
    /// `ENFILE` when all numbers were given out.
    pub(super) fn insert(&mut self, value: impl FnOnce(u64) -> T) -> Result<Arc<T>> {
        // The last one is not given out.
        let next = self.next.checked_add(1).filter(|next| *next <= self.numbers.last);
        let next = next.ok_or(Errno::NFILE)?;
        let value = Arc::new(value(self.next));
        self.next = next;
        self.values.insert(Entry(value.clone()));
        Ok(value)
    }

    /// The value of a number.
    ///
    /// # Errors
    ///
    /// `ESTALE` for a number that was valid, `ENOENT` for one that never was.
    pub(super) fn get(&self, number: u64) -> Result<&Arc<T>> {
        match self.values.get(&number) {
            Some(Entry(value)) => Ok(value),
            None if (self.numbers.first..self.next).contains(&number) => Err(Errno::STALE),
            None => Err(Errno::NOENT),
        }
    }

    /// Takes a value out. Its number is stale from now on.
    pub(super) fn remove(&mut self, number: u64) -> Option<Arc<T>> {
        let Entry(value) = self.values.take(&number)?;
        shrink(&mut self.values);
        Some(value)
    }

    /// Takes out all values that `keep` does not want.
    pub(super) fn drain(&mut self, keep: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        let drained =
            self.values.extract_if(|Entry(value)| !keep(value)).map(|Entry(value)| value).collect();
        shrink(&mut self.values);
        drained
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq)]
    struct Value(u64, char);

    impl Numbered for Value {
        fn number(&self) -> &u64 {
            &self.0
        }
    }

    fn insert(table: &mut Table<Value>, value: char) -> Result<u64> {
        table.insert(|number| Value(number, value)).map(|value| value.0)
    }

    #[test]
    fn the_first_number_is_one_and_a_removed_one_is_stale() {
        let mut table = Table::new(Numbers::of(0));
        assert_eq!(insert(&mut table, 'a'), Ok(1));
        assert_eq!(**table.get(1).unwrap(), Value(1, 'a'));
        table.remove(1).unwrap();
        assert_eq!(table.get(1), Err(Errno::STALE));
        assert_eq!(insert(&mut table, 'b'), Ok(2));
        assert_eq!(table.get(1), Err(Errno::STALE));
        assert!(table.remove(1).is_none());
        assert_eq!(table.live(), 1);
    }

    #[test]
    fn a_number_that_never_was_is_not_found() {
        let mut table = Table::new(Numbers::of(0));
        insert(&mut table, 'a').unwrap();
        for number in [0, 2, 1 << 32, (7 << 32) | 1, u64::MAX] {
            assert_eq!(table.get(number), Err(Errno::NOENT), "{number:#x}");
            assert!(table.remove(number).is_none());
        }
    }

    #[test]
    fn what_is_drained_leaves_the_rest() {
        let mut table = Table::new(Numbers::of(0));
        assert_eq!(insert(&mut table, 'a'), Ok(1));
        assert_eq!(insert(&mut table, 'b'), Ok(2));
        assert_eq!(table.drain(|value| value.1 == 'b').len(), 1);
        assert_eq!(insert(&mut table, 'd'), Ok(3));
        assert_eq!(table.live(), 2);
    }

    #[test]
    fn what_is_gone_costs_no_memory_whichever_are_left() {
        let mut table = Table::new(Numbers::of(0));
        for _ in 0..10_000 {
            insert(&mut table, 'x').unwrap();
        }
        assert!(table.capacity() >= 10_000);
        // The last ones and a few between stay.
        for number in (1..9_990).filter(|number| number % 1000 != 0) {
            table.remove(number).unwrap();
        }
        assert_eq!(table.live(), 20);
        assert!(table.capacity() <= 200, "{}", table.capacity());
        assert_eq!(table.get(9_995).unwrap().0, 9_995);
        assert_eq!(table.get(1_000).unwrap().0, 1_000);
        table.drain(|_| false);
        assert!(table.capacity() <= 200);
    }

    #[test]
    fn the_numbers_of_an_index_begin_and_end_with_it() {
        let numbers = Numbers::of(7);
        let mut table = Table::new(numbers);
        let first = 7 << NUMBER_BITS | 1;
        assert_eq!(insert(&mut table, 'x'), Ok(first));
        assert_eq!(table.get(1).err(), Some(Errno::NOENT));
        assert_eq!(table.get(7 << NUMBER_BITS).err(), Some(Errno::NOENT));
        assert_eq!(table.get(first + 1).err(), Some(Errno::NOENT));
        table.remove(first).unwrap();
        assert_eq!(table.get(first).err(), Some(Errno::STALE));
        table.next = numbers.last - 1;
        assert_eq!(insert(&mut table, 'y').map(|number| number >> NUMBER_BITS), Ok(7));
        assert_eq!(insert(&mut table, 'z'), Err(Errno::NFILE));
    }
}
