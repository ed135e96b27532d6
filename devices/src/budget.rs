//! How much of something there may be.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// A number of things that may still be had. Any thread may draw at any time.
#[derive(Debug)]
pub(crate) struct Budget(AtomicUsize);

/// There are not so many left.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Exhausted;

impl Budget {
    pub(crate) const fn new(most: usize) -> Self {
        Self(AtomicUsize::new(most))
    }

    /// Takes `count` out.
    ///
    /// # Errors
    ///
    /// [`Exhausted`] when there are not so many left; then none is taken.
    pub(crate) fn draw(&self, count: usize) -> Result<(), Exhausted> {
        self.0
            .fetch_update(Relaxed, Relaxed, |left| left.checked_sub(count))
            .map(drop)
            .map_err(|_| Exhausted)
    }

    /// Puts back what was drawn.
    pub(crate) fn give_back(&self, count: usize) {
        self.0.fetch_add(count, Relaxed);
    }

    /// How many can be had.
    pub(crate) fn left(&self) -> usize {
        self.0.load(Relaxed)
    }
}

/// `ENOMEM`.
impl From<Exhausted> for io::Error {
    fn from(_: Exhausted) -> Self {
        Self::from_raw_os_error(libc::ENOMEM)
    }
}
