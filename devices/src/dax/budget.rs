//! How many mappings all windows of this process may have.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

/// The most mappings of all windows at a time. Each costs up to three of the process's memory areas: the
/// file, the zeros in the place of its lost pages, and what is left of the reservation beside it. The host
/// allows 65530 of them (`vm.max_map_count`); a process that wants one more gets `ENOMEM` from whatever it
/// was doing, its memory allocator included.
pub(super) const MOST: usize = 20_000;

/// That of this process.
pub(super) static PROCESS: Budget = Budget::new(MOST);

/// A number of mappings that windows draw from.
pub(super) struct Budget(AtomicUsize);

impl Budget {
    pub(super) const fn new(most: usize) -> Self {
        Self(AtomicUsize::new(most))
    }

    /// Takes `count` out.
    ///
    /// # Errors
    ///
    /// `ENOMEM` when there are not so many left; then none is taken.
    pub(super) fn draw(&self, count: usize) -> io::Result<()> {
        self.0
            .fetch_update(Relaxed, Relaxed, |left| left.checked_sub(count))
            .map(drop)
            .map_err(|_| io::Error::from_raw_os_error(libc::ENOMEM))
    }

    /// Puts back what was drawn.
    pub(super) fn give_back(&self, count: usize) {
        self.0.fetch_add(count, Relaxed);
    }

    #[cfg(test)]
    pub(super) fn left(&self) -> usize {
        self.0.load(Relaxed)
    }
}
