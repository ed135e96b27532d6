//! How many mappings all windows of this process may have.

use crate::budget::Budget;

/// The most mappings of all windows at a time. Each costs up to three of the process's memory areas: the
/// file, the zeros in the place of its lost pages, and what is left of the reservation beside it. The host
/// allows 65530 of them (`vm.max_map_count`); a process that wants one more gets `ENOMEM` from whatever it
/// was doing, its memory allocator included.
pub(super) const MOST: usize = 20_000;

/// That of this process.
pub(super) static PROCESS: Budget = Budget::new(MOST);
