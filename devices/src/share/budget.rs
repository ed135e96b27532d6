//! Budgets: how much of the host's a share may use at a time.

use std::sync::Arc;

use crate::budget;
use crate::fuse::{Errno, Result};

/// So many of something (descriptors, bytes), for all requests of a share together. Whatever the guest sends,
/// no more is in use at a time; who asks for more is refused and may ask again.
#[derive(Debug)]
pub(super) struct Budget {
    left: budget::Budget,
    most: usize,
    /// What a request is answered that wants more than there is.
    full: Errno,
}

impl Budget {
    pub(super) fn new(most: usize, full: Errno) -> Arc<Self> {
        Arc::new(Self { left: budget::Budget::new(most), most, full })
    }

    /// Takes `count` until the permit is dropped.
    ///
    /// # Errors
    ///
    /// The budget's own when there are not so many left; then none is taken.
    pub(super) fn take(self: &Arc<Self>, count: usize) -> Result<Permit> {
        self.draw(count)?;
        Ok(Permit { budget: self.clone(), count })
    }

    /// Takes `count` that are [given back](Self::give_back) by hand.
    ///
    /// # Errors
    ///
    /// As [`take`](Self::take).
    pub(super) fn draw(&self, count: usize) -> Result<()> {
        self.left.draw(count).map_err(|_| self.full)
    }

    /// Gives back what was drawn, or what permits were [spent](Permit::spend) on.
    pub(super) fn give_back(&self, count: usize) {
        self.left.give_back(count);
    }

    /// How much is in use.
    pub(super) fn used(&self) -> usize {
        self.most.saturating_sub(self.left.left())
    }
}

/// What was taken of a budget. Dropping it gives it back: keep it beside what it stands for.
#[derive(Debug)]
#[must_use]
pub(super) struct Permit {
    budget: Arc<Budget>,
    count: usize,
}

impl Permit {
    /// Uses up `count`, of the permit or, where that has not so many, of the budget: dropping the permit does
    /// not give it back.
    ///
    /// # Errors
    ///
    /// The budget's own; then nothing is used up.
    pub(super) fn spend(&mut self, count: usize) -> Result<()> {
        match self.count.checked_sub(count) {
            Some(left) => self.count = left,
            None => self.budget.draw(count)?,
        }
        Ok(())
    }

    /// Adds what was spent, now or before, and is free again.
    pub(super) fn take_back(&mut self, count: usize) {
        self.count += count;
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.give_back(self.count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_than_the_budget_is_out_at_a_time() {
        let budget = Budget::new(10, Errno::NFILE);
        let seven = budget.take(7).unwrap();
        assert_eq!(budget.take(4).unwrap_err(), Errno::NFILE);
        assert_eq!(budget.take(usize::MAX).unwrap_err(), Errno::NFILE);
        let three = budget.take(3).unwrap();
        assert_eq!(budget.used(), 10);
        drop(seven);
        drop(budget.take(7).unwrap());
        drop(three);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn what_is_spent_stays_taken_until_it_is_given_back() {
        let budget = Budget::new(10, Errno::NOLCK);
        let mut permit = budget.take(3).unwrap();
        permit.spend(2).unwrap();
        assert_eq!(permit.spend(8).unwrap_err(), Errno::NOLCK);
        permit.spend(7).unwrap();
        assert_eq!(budget.used(), 10);
        permit.take_back(1);
        drop(permit);
        assert_eq!(budget.used(), 8);
        budget.give_back(8);
        assert_eq!(budget.used(), 0);
    }
}
