//! What a guest does wrong, told to whoever runs it.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use log::Level;

/// So many in the life of the process: enough to find out what is wrong with a driver.
const MOST: usize = 100;

/// How many are left.
pub(crate) struct Complaints(AtomicUsize);

/// Those of the process.
pub(crate) static COMPLAINTS: Complaints = Complaints::new();

impl Complaints {
    const fn new() -> Self {
        Self(AtomicUsize::new(MOST))
    }

    /// At which level the next one is logged.
    pub(crate) fn next_level(&self) -> Level {
        match self.0.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)) {
            Ok(1) => {
                log::warn!("what the guest does wrong is logged at debug level from here on");
                Level::Warn
            }
            Ok(_) => Level::Warn,
            Err(_) => Level::Debug,
        }
    }
}

/// Logs a warning of what a guest can do as often as it likes. A log takes disk, so there are so many warnings and no
/// more.
macro_rules! complain {
    ($($argument:tt)+) => {
        log::log!($crate::complaint::COMPLAINTS.next_level(), $($argument)+)
    };
}
pub(crate) use complain;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_goes_on_doing_wrong_fills_no_log() {
        let complaints = Complaints::new();
        assert!((0..MOST).all(|_| complaints.next_level() == Level::Warn));
        assert!((0..MOST).all(|_| complaints.next_level() == Level::Debug));
    }
}
