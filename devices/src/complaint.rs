//! What a guest can bring about as often as it likes, told to whoever runs it.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use log::Level;

/// So many of one kind in the life of the process: enough to find out what is wrong with a driver, or with the host.
const MOST: usize = 100;

/// What is left to one place of the code. Each has its own, so that nothing a guest does hides what is said elsewhere.
pub(crate) struct Complaints(AtomicUsize);

impl Complaints {
    pub(crate) const fn new() -> Self {
        Self(AtomicUsize::new(MOST))
    }

    /// At which level the next one is logged: at `level`, as long as there is anything left.
    pub(crate) fn next_level(&self, level: Level) -> Level {
        match self.0.fetch_update(Relaxed, Relaxed, |left| left.checked_sub(1)) {
            Ok(1) => {
                log::log!(level, "more lines like the next one are logged at debug level");
                level
            }
            Ok(_) => level,
            Err(_) => Level::Debug,
        }
    }
}

/// Logs a warning of what a guest does wrong or, after `host:`, an error of the host that comes of what a guest does. A
/// log takes disk, so there are so many of each kind and no more.
macro_rules! complain {
    (host: $($argument:tt)+) => { $crate::complaint::complain!(@ Error $($argument)+) };
    (@ $level:ident $($argument:tt)+) => {{
        static COMPLAINTS: $crate::complaint::Complaints = $crate::complaint::Complaints::new();
        log::log!(COMPLAINTS.next_level(log::Level::$level), $($argument)+)
    }};
    ($($argument:tt)+) => { $crate::complaint::complain!(@ Warn $($argument)+) };
}
pub(crate) use complain;

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use log::{LevelFilter, Log, Metadata, Record};

    use super::*;

    /// Keeps what this module logs.
    struct Kept(Mutex<Vec<(Level, String)>>);

    static KEPT: Kept = Kept(Mutex::new(Vec::new()));

    impl Log for Kept {
        fn enabled(&self, metadata: &Metadata<'_>) -> bool {
            metadata.target() == module_path!()
        }

        fn log(&self, record: &Record<'_>) {
            if self.enabled(record.metadata()) {
                self.0.lock().unwrap().push((record.level(), record.args().to_string()));
            }
        }

        fn flush(&self) {}
    }

    #[test]
    fn a_guest_that_goes_on_doing_wrong_fills_no_log_and_hides_nothing_else() {
        log::set_logger(&KEPT).unwrap();
        log::set_max_level(LevelFilter::Debug);
        for round in 0..3 * MOST {
            complain!("the guest errs: {round}");
            complain!(host: "the host fails because of it: {round}");
        }
        complain!("another mistake");
        complain!(host: "another failure");
        log::set_max_level(LevelFilter::Off);
        let kept = KEPT.0.lock().unwrap();
        let count = |level, text: &str| {
            kept.iter().filter(|(at, said)| *at == level && said.starts_with(text)).count()
        };
        assert_eq!(count(Level::Warn, "the guest errs"), MOST);
        assert_eq!(count(Level::Debug, "the guest errs"), 2 * MOST);
        assert_eq!(count(Level::Error, "the host fails"), MOST);
        assert_eq!(count(Level::Debug, "the host fails"), 2 * MOST);
        assert_eq!(count(Level::Warn, "another mistake"), 1);
        assert_eq!(count(Level::Error, "another failure"), 1);
    }
}
