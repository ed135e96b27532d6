//! Pages for which the guest need not fault: those of a range that is being read in order.
//!
//! A mapping costs the guest a second-stage fault for each page it touches, 512 for 2 MiB of small pages. Where
//! the order of the mappings says that a range will be read from one end to the other ([`super::streams`]),
//! the pages of it that are in the host's page cache are entered into the guest's page tables before the guest
//! hears that the range is mapped. A page that is not in the cache is left alone: reading it is I/O that
//! nobody asked for yet. A mapping for writing is left alone too, unless the file is in memory only: other file
//! systems give a page for writing only to a write.
#![expect(unsafe_code, reason = "cachestat(2) has no wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{PoisonError, Weak};

use super::window::{PAGE, Window};

/// `__NR_cachestat`, the same number on every architecture since Linux 6.5.
const SYS_CACHESTAT: libc::c_long = 451;

/// The smallest run of cached pages that is looked for in a range of which not all is cached, in bytes. Below,
/// the question costs as much as the faults.
const SHORTEST_RUN: u64 = 64 << 10;

/// The guest's page tables, as far as this window is in them: what only the hypervisor can reach.
pub trait GuestPageTables: Send + Sync {
    /// Enters the pages of a range of the window (bytes, whole pages). May be called from any thread. May
    /// block while a page is read, if one is not in memory any more.
    ///
    /// # Errors
    ///
    /// The host's. Some pages may have been entered; nothing is lost either way, for a fault would do the
    /// same.
    fn populate(&self, offset: u64, len: u64) -> io::Result<()>;
}

/// `struct cachestat_range` of linux/mman.h.
#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

/// `struct cachestat` of linux/mman.h.
#[repr(C)]
#[derive(Default)]
struct Cachestat {
    nr_cache: u64,
    nr_dirty: u64,
    nr_writeback: u64,
    nr_evicted: u64,
    nr_recently_evicted: u64,
}

/// How many pages of a stretch of a file are in the page cache.
///
/// # Errors
///
/// `ENOSYS` before Linux 6.5, `EPERM` where the host keeps that from this user.
fn cached_pages(file: impl AsFd, off: u64, len: u64) -> io::Result<u64> {
    let range = CachestatRange { off, len };
    let mut found = Cachestat::default();
    // SAFETY: both structures are as the kernel expects them and live across the call.
    let done = unsafe {
        let file = file.as_fd().as_raw_fd();
        libc::syscall(SYS_CACHESTAT, file, &raw const range, &raw mut found, 0)
    };
    if done == 0 { Ok(found.nr_cache) } else { Err(io::Error::last_os_error()) }
}

/// Adds the runs of `[from, from + len)` for which `cached` says that all their pages are there. Neighbours
/// are joined.
fn cached_runs(
    from: u64,
    len: u64,
    cached: &impl Fn(u64, u64) -> io::Result<u64>,
    runs: &mut Vec<(u64, u64)>,
) -> io::Result<()> {
    let pages = cached(from, len)?;
    if pages >= len / PAGE {
        match runs.last_mut() {
            Some((at, before)) if *at + *before == from => *before += len,
            _ => runs.push((from, len)),
        }
    } else if pages > 0 && len > SHORTEST_RUN {
        let half = (len / 2).next_multiple_of(SHORTEST_RUN);
        cached_runs(from, half, cached, runs)?;
        cached_runs(from + half, len - half, cached, runs)?;
    }
    Ok(())
}

impl Window {
    /// Where the guest's page tables are. Before, and on a host that cannot enter pages ahead of a fault,
    /// every page costs its fault. Only the first call counts.
    pub fn set_page_tables(&self, tables: Weak<dyn GuestPageTables>) {
        // A second machine around one window does not exist.
        let _ = self.tables.set(tables);
    }

    /// Leaves every page to its fault, whatever the host could do.
    pub fn never_prefault(&self) {
        /// Page tables of nobody.
        struct Nowhere;
        impl GuestPageTables for Nowhere {
            fn populate(&self, _offset: u64, _len: u64) -> io::Result<()> {
                Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP))
            }
        }
        self.set_page_tables(Weak::<Nowhere>::new());
    }

    /// Follows the order of mappings, and enters the pages of the mapping that begins at `offset` if it will
    /// be read in order.
    pub(super) fn prefault(&self, offset: u64) {
        let Some(tables) = self.tables.get().and_then(Weak::upgrade) else { return };
        let mapping = self.state().mappings.get(&offset).cloned();
        let Some(mapping) = mapping else { return };
        let (_, _, writable) = mapping.file.key;
        if writable && !mapping.file.in_memory {
            return;
        }
        let mut streams = self.streams.lock().unwrap_or_else(PoisonError::into_inner);
        let identity = mapping.file.key;
        let (from, len) = (mapping.file_offset, mapping.len);
        let in_order = streams.note(identity, from, len, mapping.known_end);
        drop(streams);
        if !in_order {
            return;
        }
        let there = mapping.there(mapping.known_end).min(mapping.shown);
        let cached = |at: u64, len: u64| {
            cached_pages(&mapping.file.fd, mapping.file_offset.saturating_add(at), len)
        };
        let mut runs = Vec::new();
        // Without an answer, nothing is known to be in the cache.
        if there == 0 || cached_runs(0, there, &cached, &mut runs).is_err() {
            return;
        }
        let mut bytes = 0;
        for (at, len) in runs {
            if let Err(error) = tables.populate(offset.saturating_add(at), len) {
                log::debug!("pages of a DAX window are not entered ahead of faults: {error}");
                break;
            }
            bytes += len;
        }
        if bytes > 0 {
            self.prefaulted.fetch_add(1, Relaxed);
            self.prefaulted_bytes.fetch_add(bytes, Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::dax::DaxWindow;
    use crate::dax::table::TMPFS;

    const RANGE: u64 = 2 << 20;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, u64)>>);

    impl GuestPageTables for Recorder {
        fn populate(&self, offset: u64, len: u64) -> io::Result<()> {
            self.0.lock().unwrap().push((offset, len));
            Ok(())
        }
    }

    impl Recorder {
        fn take(&self) -> Vec<(u64, u64)> {
            std::mem::take(&mut self.0.lock().unwrap())
        }
    }

    fn window(ranges: u64) -> (Window, Arc<Recorder>) {
        let window = Window::new(ranges * RANGE).unwrap();
        let recorder = Arc::new(Recorder::default());
        let tables: Arc<dyn GuestPageTables> = recorder.clone();
        window.set_page_tables(Arc::downgrade(&tables));
        (window, recorder)
    }

    /// A file in memory whose first `cached` bytes have pages.
    fn file(size: u64, cached: usize) -> std::fs::File {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let mut file = std::fs::File::from(rustix::fs::memfd_create("prefault", flags).unwrap());
        file.set_len(size).unwrap();
        file.write_all(&vec![1; cached]).unwrap();
        file
    }

    /// Maps range `range` of the file at the same place of the window, and says what was entered.
    fn map(
        window: &Window,
        tables: &Recorder,
        file: &std::fs::File,
        range: u64,
    ) -> Vec<(u64, u64)> {
        let at = range * RANGE;
        window.map(at, RANGE, file.as_fd(), at, false).unwrap();
        window.mapped(at);
        tables.take()
    }

    fn has_cachestat() -> bool {
        cached_pages(file(4096, 0), 0, 4096).is_ok()
    }

    #[test]
    fn cached_pages_of_a_file_read_in_order_are_entered_and_others_are_not() {
        if !has_cachestat() {
            return; // Before Linux 6.5. The next test is of that case.
        }
        let (window, tables) = window(10);
        let cached = 3 * RANGE + 3 * SHORTEST_RUN;
        let file = file(10 * RANGE, cached as usize);
        for range in 0..3 {
            let at = range * RANGE;
            assert_eq!(map(&window, &tables, &file, range), [(at, RANGE)]);
        }
        assert_eq!(map(&window, &tables, &file, 3), [(3 * RANGE, 3 * SHORTEST_RUN)]);
        assert_eq!(map(&window, &tables, &file, 4), []);
        let statistics = window.statistics();
        assert_eq!(statistics.prefaulted, 4);
        assert_eq!(statistics.prefaulted_bytes, cached);
    }

    #[test]
    fn random_mappings_enter_nothing() {
        let (window, tables) = window(10);
        let file = file(10 * RANGE, 10 * RANGE as usize);
        for range in [5, 2, 9, 0, 7] {
            assert_eq!(map(&window, &tables, &file, range), []);
        }
        assert_eq!(window.statistics().prefaulted, 0);
    }

    #[test]
    fn a_file_that_is_written_in_order_is_entered_if_it_is_in_memory() {
        if !has_cachestat() {
            return;
        }
        let on_disk = tempfile::tempfile().unwrap();
        (&on_disk).write_all(&vec![1; 10 * RANGE as usize]).unwrap();
        for file in [file(10 * RANGE, 10 * RANGE as usize), on_disk] {
            let in_memory = rustix::fs::fstatfs(&file).unwrap().f_type as u32 == TMPFS;
            let (window, tables) = window(10);
            for range in 0..10 {
                // It was read before, in another order.
                map(&window, &tables, &file, 9 - range);
                let at = range * RANGE;
                window.map(at, RANGE, file.as_fd(), at, true).unwrap();
                window.mapped(at);
                let expected: &[_] = if in_memory { &[(at, RANGE)] } else { &[] };
                assert_eq!(tables.take(), expected, "{range}");
            }
        }
    }

    #[test]
    fn nothing_is_entered_past_the_end_of_a_file_or_where_nothing_is_mapped() {
        if !has_cachestat() {
            return;
        }
        let (window, tables) = window(10);
        let size = 8 * RANGE + 5000;
        let file = file(size, size as usize);
        for range in 0..8 {
            map(&window, &tables, &file, range);
        }
        assert_eq!(map(&window, &tables, &file, 8), [(8 * RANGE, 8192)]);
        assert_eq!(map(&window, &tables, &file, 9), []);
        window.unmap(0, RANGE).unwrap();
        window.mapped(0);
        window.mapped(4096);
        window.mapped(u64::MAX);
        assert_eq!(tables.take(), []);
    }

    #[test]
    fn a_host_that_does_not_say_what_is_cached_enters_nothing() {
        let unknown = |_, _| Err(io::Error::from_raw_os_error(libc::ENOSYS));
        let mut runs = Vec::new();
        assert!(cached_runs(0, RANGE, &unknown, &mut runs).is_err());
        assert_eq!(runs, []);
        // And one without the means to enter them: no page tables were set. Or it is not wanted.
        let (unwanted, tables) = (Window::new(8 * RANGE).unwrap(), Arc::new(Recorder::default()));
        unwanted.never_prefault();
        let late: Arc<dyn GuestPageTables> = tables.clone();
        unwanted.set_page_tables(Arc::downgrade(&late));
        let window = Window::new(8 * RANGE).unwrap();
        let file = file(8 * RANGE, 8 * RANGE as usize);
        for range in 0..8 {
            window.map(range * RANGE, RANGE, file.as_fd(), range * RANGE, false).unwrap();
            window.mapped(range * RANGE);
            assert_eq!(map(&unwanted, &tables, &file, range), []);
        }
        assert_eq!(window.statistics().prefaulted, 0);
    }

    #[test]
    fn runs_are_joined_and_short_ones_left_out() {
        // Pages 0 to 15 and 32 to 99 are cached: 64 KiB, and then 272 KiB that end inside a piece.
        let cached = |from: u64, len: u64| {
            let is = |page: &u64| *page < 16 || (32..100).contains(page);
            Ok((from / PAGE..(from + len) / PAGE).filter(is).count() as u64)
        };
        let mut runs = Vec::new();
        cached_runs(0, RANGE, &cached, &mut runs).unwrap();
        assert_eq!(runs, [(0, 64 << 10), (128 << 10, 256 << 10)]);
    }
}
