//! The window in host memory.
#![expect(unsafe_code, reason = "maps files at fixed addresses inside one reservation")]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::fstat;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::DaxWindow;
use super::table::{Backing, FileEnds, Mapping, State, page_end};

/// Alignment of the window and of its size, in bytes: that of a large page. Host and guest address have to
/// agree modulo this for KVM to map one, and it is how much the Linux guest maps at a time.
pub const ALIGNMENT: u64 = 2 << 20;

/// Granularity of mappings in bytes.
pub(super) const PAGE: u64 = 4096;

/// The most mappings at a time for each [`ALIGNMENT`] of a window. The Linux guest makes one; a repair may
/// split it in two.
const MAPPINGS_PER_LARGE_PAGE: u64 = 2;

/// Bounds of the most mappings of a window. Each costs up to three of the process's memory areas: itself,
/// what is left of the reservation beside it, and a tail that was repaired. The host allows 65530 of them
/// (`vm.max_map_count`), and the rest of the process would fail for want of some.
const MOST_MAPPINGS: (u64, u64) = (256, 20_000);

/// A DAX window: a stretch of this process's addresses that is always mapped, to file pages or to nothing.
///
/// Where no file is, there is `PROT_NONE` memory that costs nothing; a guest that touches it gets `EFAULT`
/// from `KVM_RUN`.
///
/// # A file that shrinks
///
/// A file may be cut shorter by the host or another guest while it is mapped. Touching a page past its end
/// is then SIGBUS in this process and `EFAULT` from `KVM_RUN` in a vCPU. The window is therefore touched by
/// system calls only (see [`crate::memory`]), and a vCPU thread that gets `EFAULT` calls
/// [`repair_truncated`](Self::repair_truncated) and runs the vCPU again.
pub struct Window {
    base: NonNull<u8>,
    size: u64,
    most_mappings: usize,
    /// There are, or were lately, zero pages in the place of lost ones.
    repaired: AtomicBool,
    state: Mutex<State>,
}

// SAFETY: `base` is the address of a reservation that this value alone owns. No method makes a reference to
// what is there; changes to the mappings happen under the lock.
unsafe impl Send for Window {}
// SAFETY: as above.
unsafe impl Sync for Window {}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

impl Window {
    /// Reserves a window of `size` bytes.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a size of 0 or not a multiple of 2 MiB; the errno of `mmap`.
    pub fn new(size: u64) -> io::Result<Self> {
        if size == 0 || !size.is_multiple_of(ALIGNMENT) {
            return Err(invalid());
        }
        let total = size.checked_add(ALIGNMENT).ok_or_else(invalid)?;
        let total = usize::try_from(total).map_err(|_| invalid())?;
        let len = usize::try_from(size).map_err(|_| invalid())?;
        // SAFETY: a new mapping where the kernel likes; nothing is replaced.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                total,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE,
            )?
        };
        // More was reserved than is needed; what lies outside the aligned part goes back.
        let skip = start.cast::<u8>().align_offset(ALIGNMENT as usize);
        let base = start.cast::<u8>().wrapping_add(skip);
        let end = base.wrapping_add(len);
        let left = total.saturating_sub(skip).saturating_sub(len);
        // SAFETY: both are parts of the mapping made above, to which nobody else has an address yet.
        unsafe {
            if skip > 0 {
                munmap(start, skip)?;
            }
            if left > 0 {
                munmap(end.cast(), left)?;
            }
        }
        Ok(Self {
            base: NonNull::new(base).ok_or_else(invalid)?,
            size,
            most_mappings: (size / ALIGNMENT * MAPPINGS_PER_LARGE_PAGE)
                .clamp(MOST_MAPPINGS.0, MOST_MAPPINGS.1) as usize,
            repaired: AtomicBool::new(false),
            state: Mutex::default(),
        })
    }

    /// Where the window is in this process: for the memory slot. Aligned to 2 MiB. Stays until the value is
    /// dropped; so must the slot not be longer there than that.
    pub fn host_address(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// How many stretches of files are mapped now.
    pub fn live_mappings(&self) -> usize {
        self.state().mappings.len()
    }

    /// How many file descriptors the window holds.
    pub fn live_files(&self) -> usize {
        let state = self.state();
        let held = |file: &&Weak<Backing>| file.strong_count() > 0;
        state.files.values().filter(held).count()
    }

    /// Puts zero pages where a mapped file has no pages any more, and says in how many places something
    /// was done: 0 means that a fault did not come from there.
    ///
    /// For the vCPU thread whose `KVM_RUN` failed with `EFAULT`, and for anyone who got that from a system
    /// call on the window. The zero pages are the guest's own: what it writes there is in no file. They give
    /// way to the file's pages when the range is mapped anew and when the file has them again
    /// ([`DaxWindow::file_may_have_grown`]). They cost host memory only once touched, at most the window's
    /// size. Idempotent.
    ///
    /// # Errors
    ///
    /// The errno of `mmap`; what was repaired before stays so.
    pub fn repair_truncated(&self) -> io::Result<usize> {
        let mut state = self.state();
        // `KVM_RUN` does not say which page it was. First the likely ones: of files that are shorter than
        // when they were mapped. Pages past the end of the others were never there, and a guest that keeps
        // to the sizes it was told does not touch them.
        let repaired = self.restore_grown(&mut state)? + self.cover_lost(&mut state, false)?;
        if repaired > 0 {
            return Ok(repaired);
        }
        self.cover_lost(&mut state, true)
    }

    /// Covers the parts of mappings that lie past the ends of their files: of such files as have lost
    /// pages, or of `all`.
    fn cover_lost(&self, state: &mut State, all: bool) -> io::Result<usize> {
        let mut covered = 0;
        let mut ends = FileEnds::default();
        for (offset, mapping) in state.copy(|mapping| !mapping.zeros) {
            let file_end = ends.of(&mapping.file)?;
            let there = file_end.saturating_sub(mapping.file_offset).min(mapping.len);
            if there < mapping.len && (all || file_end < mapping.known_end) {
                let lost = Mapping { zeros: true, ..mapping.part(there, mapping.len - there) };
                self.place(offset + there, &lost)?;
                state.insert(offset + there, lost);
                self.repaired.store(true, Ordering::Release);
                covered += 1;
            }
        }
        Ok(covered)
    }

    /// Puts the file's pages back where there are zeros and the file has pages again.
    fn restore_grown(&self, state: &mut State) -> io::Result<usize> {
        if !self.repaired.load(Ordering::Acquire) {
            return Ok(0);
        }
        let mut restored = 0;
        let mut left = false;
        let mut ends = FileEnds::default();
        for (offset, mapping) in state.copy(|mapping| mapping.zeros) {
            let file_end = ends.of(&mapping.file)?;
            let there = file_end.saturating_sub(mapping.file_offset).min(mapping.len);
            left |= there < mapping.len;
            if there > 0 {
                let grown = Mapping { zeros: false, known_end: file_end, ..mapping.part(0, there) };
                self.place(offset, &grown)?;
                state.insert(offset, grown);
                restored += 1;
            }
        }
        self.repaired.store(left, Ordering::Release);
        Ok(restored)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a range and returns its end.
    fn check(&self, offset: u64, len: u64) -> io::Result<u64> {
        let whole = offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
        match offset.checked_add(len) {
            Some(end) if whole && len > 0 && end <= self.size => Ok(end),
            _ => Err(invalid()),
        }
    }

    /// Refuses what would leave too many mappings, when it leaves more than there are.
    fn check_count(&self, state: &State, offset: u64, len: u64, more: usize) -> io::Result<()> {
        let now = state.mappings.len();
        let then = state.count_without(offset, len) + more;
        if then > now && then > self.most_mappings {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        Ok(())
    }

    /// The address of a range that was checked.
    fn address(&self, offset: u64) -> *mut std::ffi::c_void {
        self.base.as_ptr().wrapping_add(offset as usize).cast()
    }

    /// Makes `mapping` visible at `offset`.
    fn place(&self, offset: u64, mapping: &Mapping) -> io::Result<()> {
        self.check(offset, mapping.len)?;
        let (_, _, writable) = mapping.file.key;
        let len = mapping.len as usize;
        // SAFETY: MAP_FIXED replaces what is at the address, and `check` saw that the whole range is inside
        // the reservation that `self` owns. No Rust reference points there: the window is only ever touched
        // through raw pointers, by system calls and by the guest.
        unsafe {
            if mapping.zeros {
                mmap_anonymous(
                    self.address(offset),
                    len,
                    ProtFlags::READ | ProtFlags::WRITE,
                    MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
                )?;
            } else {
                mmap(
                    self.address(offset),
                    len,
                    protection(writable),
                    MapFlags::SHARED | MapFlags::FIXED,
                    &mapping.file.fd,
                    mapping.file_offset,
                )?;
            }
        }
        Ok(())
    }

    /// Maps the empty reservation over a range.
    fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        // SAFETY: as in `place`.
        unsafe {
            mmap_anonymous(
                self.address(offset),
                len as usize,
                ProtFlags::empty(),
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            )?;
        }
        Ok(())
    }

    /// After a failure to place something at a range: makes it what the table says it is. A kernel before
    /// 6.12 may have taken away what was there before it failed.
    fn restore(&self, state: &mut State, offset: u64, len: u64) {
        if self.reserve(offset, len).is_err() {
            // Out of memory areas, which `mmap` finds out before it changes anything: all is as it was.
            return;
        }
        for (at, mapping) in state.cut_out(offset, len) {
            if self.place(at, &mapping).is_ok() {
                state.mappings.insert(at, mapping);
            }
        }
    }
}

/// Maps a page of a file somewhere and takes it away again: a file system that cannot share mappings says so
/// here, where there is nothing to lose. The page may lie past the end of the file.
fn try_mapping(file: &OwnedFd, writable: bool) -> io::Result<()> {
    // SAFETY: a new mapping where the kernel likes, which is taken away again and never touched.
    unsafe {
        let trial = mmap(
            std::ptr::null_mut(),
            PAGE as usize,
            protection(writable),
            MapFlags::SHARED,
            file,
            0,
        )?;
        munmap(trial, PAGE as usize)?;
    }
    Ok(())
}

fn protection(writable: bool) -> ProtFlags {
    if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ }
}

impl DaxWindow for Window {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
        writable: bool,
    ) -> io::Result<()> {
        self.check(offset, len)?;
        match file_offset.checked_add(len) {
            Some(end) if file_offset.is_multiple_of(PAGE) && end <= i64::MAX as u64 => {}
            _ => return Err(invalid()),
        }
        let mut state = self.state();
        self.check_count(&state, offset, len, 1)?;
        let stat = fstat(file)?;
        let mapping = Mapping {
            len,
            file: state.backing(file, &stat, writable, |fd| try_mapping(fd, writable))?,
            file_offset,
            known_end: page_end(&stat),
            zeros: false,
        };
        if let Err(error) = self.place(offset, &mapping) {
            self.restore(&mut state, offset, len);
            return Err(error);
        }
        state.insert(offset, mapping);
        Ok(())
    }

    fn unmap(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        let mut state = self.state();
        self.check_count(&state, offset, len, 0)?;
        self.reserve(offset, len)?;
        state.cut_out(offset, len);
        Ok(())
    }

    fn clear(&self) {
        let mut state = self.state();
        // One call that joins all areas into one: cannot run out of them.
        if let Err(error) = self.reserve(0, self.size) {
            log::error!("cannot clear a DAX window: {error}");
            return;
        }
        state.mappings.clear();
        state.files.clear();
        self.repaired.store(false, Ordering::Release);
    }

    fn file_may_have_grown(&self) {
        if self.repaired.load(Ordering::Acquire)
            && let Err(error) = self.restore_grown(&mut self.state())
        {
            log::warn!("cannot map the pages of a file that has grown: {error}");
        }
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        // SAFETY: the reservation is `size` bytes at `base` and owned by this value, which nobody can use
        // any more. Whoever made a memory slot of it has taken that away first (`host_address`).
        let result = unsafe { munmap(self.address(0), self.size as usize) };
        if let Err(error) = result {
            log::error!("cannot unmap a DAX window: {error}");
        }
    }
}

#[cfg(test)]
#[path = "window_test.rs"]
mod tests;
