//! Whether anything may be changed through a share at this moment.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::time::{Duration, Instant};

use super::Share;
use crate::fuse::{Errno, Result};

/// How often it is looked whether changes have ended.
const INTERVAL: Duration = Duration::from_millis(1);

/// The way by which everything goes that changes something on the host.
///
/// It costs two atomic operations. Whoever counts himself in and then finds it open has done so before whoever
/// closed it looks who is there, so all that go on after it was closed are waited for.
#[derive(Debug)]
pub(super) struct Changes {
    closed: AtomicBool,
    under_way: AtomicUsize,
    /// It was open at some time.
    ever_open: AtomicBool,
}

/// Something is being changed, until this is dropped.
#[derive(Debug)]
#[must_use]
pub(super) struct Changing<'c>(&'c Changes);

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, SeqCst);
    }
}

impl Changes {
    pub(super) fn new(open: bool) -> Self {
        Self {
            closed: AtomicBool::new(!open),
            under_way: AtomicUsize::new(0),
            ever_open: AtomicBool::new(open),
        }
    }

    fn begin(&self) -> Result<Changing<'_>> {
        self.under_way.fetch_add(1, SeqCst);
        let changing = Changing(self);
        if self.closed.load(SeqCst) { Err(Errno::ROFS) } else { Ok(changing) }
    }
}

impl Share {
    /// Nothing may be changed through it.
    pub fn is_read_only(&self) -> bool {
        self.changes.closed.load(SeqCst)
    }

    /// Makes it read-only: every change that begins from now on is answered with `EROFS`. Waits for those that
    /// began before, and says how many have not ended after `patience`: 0 means that nothing is changed any more.
    ///
    /// What is mapped to be written through a window is not looked at here.
    pub fn close_to_changes(&self, patience: Duration) -> usize {
        self.changes.closed.store(true, SeqCst);
        let since = Instant::now();
        loop {
            let count = self.changes.under_way.load(SeqCst);
            if count == 0 || since.elapsed() >= patience {
                return count;
            }
            std::thread::sleep(INTERVAL);
        }
    }

    /// Makes it writable.
    pub fn open_to_changes(&self) {
        self.changes.ever_open.store(true, SeqCst);
        self.changes.closed.store(false, SeqCst);
    }

    /// Whether something of the guest's may be waiting to be written to a disk.
    pub(super) fn was_ever_writable(&self) -> bool {
        self.changes.ever_open.load(SeqCst)
    }

    /// Whether it may be changed, for what changes nothing itself.
    ///
    /// # Errors
    ///
    /// `EROFS`.
    pub(super) fn check_writable(&self) -> Result<()> {
        if self.is_read_only() { Err(Errno::ROFS) } else { Ok(()) }
    }

    /// Leave to change something until the guard is dropped.
    ///
    /// # Errors
    ///
    /// `EROFS`.
    pub(super) fn change(&self) -> Result<Changing<'_>> {
        self.changes.begin()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;

    use super::*;
    use crate::fuse::testing::Guest;

    #[test]
    fn who_closes_it_waits_for_all_that_went_on() {
        let guest = Guest::new();
        let share = &guest.share;
        let changing = share.change().unwrap();
        assert_eq!(share.close_to_changes(Duration::from_millis(20)), 1);
        assert_eq!(share.change().unwrap_err(), Errno::ROFS);
        drop(changing);
        assert_eq!(share.close_to_changes(Duration::ZERO), 0);
        share.open_to_changes();
        drop(share.change().unwrap());
    }

    #[test]
    fn nothing_changes_after_it_was_closed() {
        let guest = Guest::new();
        let (share, changed) = (&guest.share, AtomicU64::new(0));
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    while !stop.load(SeqCst) {
                        if let Ok(_changing) = share.change() {
                            changed.fetch_add(1, SeqCst);
                            std::thread::yield_now();
                            changed.fetch_add(1, SeqCst);
                        }
                    }
                });
            }
            for _ in 0..200 {
                assert_eq!(share.close_to_changes(Duration::from_secs(10)), 0);
                let before = changed.load(SeqCst);
                std::thread::yield_now();
                assert_eq!(changed.load(SeqCst), before);
                share.open_to_changes();
                std::thread::yield_now();
            }
            stop.store(true, SeqCst);
        });
        assert!(changed.load(SeqCst) > 0);
    }
}
