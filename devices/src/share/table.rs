//! Numbers that the guest may hold: an index and a generation.

use std::sync::Arc;

use crate::fuse::{Errno, Result};

/// Values by number. A number is the index plus one in its lower half and the slot's generation in its upper
/// half, so the first value ever inserted has number 1, a number is never 0 and never `u64::MAX`, and a
/// number whose value is gone is never given out again.
pub(super) struct Table<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    live: usize,
    most: usize,
}

struct Slot<T> {
    generation: u32,
    value: Option<Arc<T>>,
}

fn number(index: u32, generation: u32) -> u64 {
    (u64::from(generation) << 32) | (u64::from(index) + 1)
}

/// The index and the generation of a number.
fn parts(number: u64) -> Option<(u32, u32)> {
    let index = (number as u32).checked_sub(1)?;
    Some((index, (number >> 32) as u32))
}

impl<T> Table<T> {
    /// An empty table for at most `most` values.
    pub(super) fn new(most: usize) -> Self {
        Self { slots: Vec::new(), free: Vec::new(), live: 0, most: most.min(u32::MAX as usize - 1) }
    }

    pub(super) fn live(&self) -> usize {
        self.live
    }

    /// Inserts a value, which is told its number.
    ///
    /// # Errors
    ///
    /// `ENFILE` when the table is full.
    pub(super) fn insert(&mut self, value: impl FnOnce(u64) -> T) -> Result<Arc<T>> {
        if self.live >= self.most {
            return Err(Errno::NFILE);
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                let index = u32::try_from(self.slots.len()).map_err(|_| Errno::NFILE)?;
                self.slots.push(Slot { generation: 0, value: None });
                index
            }
        };
        let slot = self.slots.get_mut(index as usize).ok_or(Errno::NFILE)?;
        let value = Arc::new(value(number(index, slot.generation)));
        slot.value = Some(value.clone());
        self.live += 1;
        Ok(value)
    }

    /// The value of a number.
    ///
    /// # Errors
    ///
    /// `ESTALE` for a number that was valid, `ENOENT` for one that never was.
    pub(super) fn get(&self, number: u64) -> Result<&Arc<T>> {
        let (index, generation) = parts(number).ok_or(Errno::NOENT)?;
        let slot = self.slots.get(index as usize).ok_or(Errno::NOENT)?;
        match &slot.value {
            Some(value) if slot.generation == generation => Ok(value),
            _ if generation < slot.generation => Err(Errno::STALE),
            _ => Err(Errno::NOENT),
        }
    }

    /// Takes a value out. Its number is stale from now on.
    pub(super) fn remove(&mut self, number: u64) -> Option<Arc<T>> {
        let (index, generation) = parts(number)?;
        let slot = self.slots.get_mut(index as usize)?;
        if slot.generation != generation {
            return None;
        }
        let value = slot.value.take()?;
        self.live -= 1;
        // A slot that ran out of generations is not used again.
        if let Some(next) = generation.checked_add(1) {
            slot.generation = next;
            if next != u32::MAX {
                self.free.push(index);
            }
        }
        Some(value)
    }

    /// Takes out all values that `keep` does not want.
    pub(super) fn drain(&mut self, keep: impl Fn(&T) -> bool) -> Vec<Arc<T>> {
        let doomed: Vec<u64> = (0u32..)
            .zip(&self.slots)
            .filter(|(_, slot)| slot.value.as_deref().is_some_and(|value| !keep(value)))
            .map(|(index, slot)| number(index, slot.generation))
            .collect();
        doomed.into_iter().filter_map(|number| self.remove(number)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_number_is_one_and_a_removed_one_is_stale() {
        let mut table = Table::new(8);
        let first = *table.insert(|number| number).unwrap();
        assert_eq!(first, 1);
        assert_eq!(**table.get(1).unwrap(), 1);
        table.remove(1).unwrap();
        assert_eq!(table.get(1), Err(Errno::STALE));
        let second = *table.insert(|number| number).unwrap();
        assert_eq!(second, (1 << 32) | 1);
        assert_eq!(table.get(1), Err(Errno::STALE));
        assert!(table.remove(1).is_none());
        assert_eq!(table.live(), 1);
    }

    #[test]
    fn a_number_that_never_was_is_not_found() {
        let mut table = Table::new(8);
        table.insert(|_| ()).unwrap();
        for number in [0, 2, 1 << 32, (7 << 32) | 1, u64::MAX] {
            assert_eq!(table.get(number), Err(Errno::NOENT), "{number:#x}");
            assert!(table.remove(number).is_none());
        }
    }

    #[test]
    fn a_full_table_refuses_until_there_is_room() {
        let mut table = Table::new(2);
        table.insert(|_| 'a').unwrap();
        let second = table.insert(|number| {
            assert_eq!(number, 2);
            'b'
        });
        second.unwrap();
        assert_eq!(table.insert(|_| 'c').unwrap_err(), Errno::NFILE);
        assert_eq!(table.drain(|value| *value == 'a').len(), 1);
        table.insert(|_| 'd').unwrap();
        assert_eq!(table.live(), 2);
    }
}
