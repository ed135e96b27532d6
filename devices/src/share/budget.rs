//! Budgets: how much of the host's a share may use at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use crate::fuse::{Errno, Result};

/// So many of something (descriptors, bytes), for all requests of a share together. Whatever the guest sends,
/// no more is in use at a time; who asks for more is refused and may ask again.
#[derive(Debug)]
pub(super) struct Budget {
    used: AtomicUsize,
    most: usize,
    /// What a request is answered that wants more than there is.
    full: Errno,
}

impl Budget {
    pub(super) fn new(most: usize, full: Errno) -> Arc<Self> {
        Arc::new(Self { used: AtomicUsize::new(0), most, full })
    }

    /// Takes `count` until the permit is dropped.
    ///
    /// # Errors
    ///
    /// The budget's own when there are not so many left; then none is taken.
    pub(super) fn take(self: &Arc<Self>, count: usize) -> Result<Permit> {
        let more = |used: usize| used.checked_add(count).filter(|together| *together <= self.most);
        self.used.fetch_update(Relaxed, Relaxed, more).map_err(|_| self.full)?;
        Ok(Permit { budget: self.clone(), count })
    }

    /// How much is in use.
    pub(super) fn used(&self) -> usize {
        self.used.load(Relaxed)
    }
}

/// What was taken of a budget. Dropping it gives it back: keep it beside what it stands for.
#[derive(Debug)]
#[must_use]
pub(super) struct Permit {
    budget: Arc<Budget>,
    count: usize,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.count, Relaxed);
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
}
