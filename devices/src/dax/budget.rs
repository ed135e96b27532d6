//! How many mappings all windows of this process may have.

use std::sync::LazyLock;

use rustix::process::{Resource, getrlimit};

use crate::budget::Budget;

/// The most mappings of all windows at a time. Each costs up to three of the process's memory areas: the
/// file, the zeros in the place of its lost pages, and what is left of the reservation beside it. The host
/// allows 65530 of them (`vm.max_map_count`); a process that wants one more gets `ENOMEM` from whatever it
/// was doing, its memory allocator included.
pub(super) const MOST: usize = 20_000;

/// That of this process. Each mapping may be of another file, whose descriptor it holds: they have an eighth of
/// what the process may open when its first window is made.
pub(super) static PROCESS: LazyLock<Budget> = LazyLock::new(|| {
    let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX) / 8;
    Budget::new(usize::try_from(files).unwrap_or(usize::MAX).min(MOST))
});
