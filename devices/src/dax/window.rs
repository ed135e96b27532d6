//! The window in host memory.
#![expect(unsafe_code, reason = "maps files at fixed addresses inside one reservation")]

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use rustix::fs::fstat;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::budget;
use super::streams::Streams;
use super::table::{Access, Backing, FileEnds, Mapping, Opened, State, page_end};
use super::{DaxWindow, GuestPageTables, Statistics};
use crate::budget::Budget;
use crate::complaint::complain;

/// Alignment of the window and of its size, in bytes: that of a large page. Host and guest address have to
/// agree modulo this for KVM to map one, and it is how much the Linux guest maps at a time.
pub const ALIGNMENT: u64 = 2 << 20;

/// Granularity of mappings in bytes.
pub(super) const PAGE: u64 = 4096;

/// The most mappings at a time for each [`ALIGNMENT`] of a window. The Linux guest makes one.
const MAPPINGS_PER_LARGE_PAGE: u64 = 2;

/// Bounds of the most mappings of one window. All windows together have [`budget::MOST`].
const MOST_MAPPINGS: (u64, u64) = (256, budget::MOST as u64);

/// A DAX window: a stretch of this process's addresses that is always mapped, to file pages or to nothing.
///
/// Where no file is, there is `PROT_NONE` memory that costs nothing; a guest that touches it gets `EFAULT`
/// from `KVM_RUN`.
///
/// # A window that grows
///
/// All addresses that a window may ever take are reserved from the start, and are nothing but reserved behind
/// its present size. So neither its address nor anything that was told of it ([`host_address`], the memory
/// slot) changes when it grows.
///
/// [`host_address`]: Self::host_address
///
/// # A file that shrinks
///
/// A file may be cut shorter by the host or another guest while it is mapped. Touching a page past its end
/// is then SIGBUS in this process and `EFAULT` from `KVM_RUN` in a vCPU. The window is therefore touched by
/// system calls only (see [`crate::memory`]), and a vCPU thread that gets `EFAULT` calls
/// [`repair_truncated`](Self::repair_truncated) and runs the vCPU again.
///
/// # A disk that fails or is full
///
/// is the same to the guest. What the host cannot read is found by
/// [`cover_unreadable`](Self::cover_unreadable). A write that finds no room on the disk is not repaired: the
/// vCPU waits for room ([`full_file_system`](Self::full_file_system)).
pub struct Window {
    base: NonNull<u8>,
    /// So much is reserved, in bytes.
    reserved: u64,
    /// So much of it may be used. Only grows, and under the lock of `state`.
    size: AtomicU64,
    budget: &'static Budget,
    /// There are, or were lately, zero pages in the place of lost ones.
    repaired: AtomicBool,
    /// Goes up with everything that is repaired.
    pub(super) repairs: AtomicU64,
    pub(super) tables: OnceLock<Weak<dyn GuestPageTables>>,
    pub(super) prefaulted: AtomicU64,
    pub(super) prefaulted_bytes: AtomicU64,
    pub(super) streams: Mutex<Streams>,
    // One repair at a time, from asking the host where files end to acting on it: a file that grows in
    // between is seen by the next. Taken before `state`, and held while the host is asked, which may block;
    // no `map` or `unmap` waits for it.
    repairing: Mutex<()>,
    // Held over `mmap` in the window and table look-ups, never while the host is asked about a file or closes
    // one. What is left that may block is the file system's own part of `mmap`.
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

/// Why a window cannot have a size. Sizes are bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GrowError {
    /// It is no multiple of [`ALIGNMENT`].
    #[error("{0} bytes are not a multiple of 2 MiB")]
    Unaligned(u64),
    /// Something may be mapped in what would be taken away.
    #[error("{} MiB are less than the {} MiB that it has, and a window only grows", .asked >> 20, .present >> 20)]
    Shrinks {
        /// What it should have.
        asked: u64,
        /// What it has.
        present: u64,
    },
    /// No addresses were reserved for that.
    #[error("{} MiB are more than the {} MiB that were reserved for it", .asked >> 20, .reserved >> 20)]
    Beyond {
        /// What it should have.
        asked: u64,
        /// What it can have.
        reserved: u64,
    },
}

impl Window {
    /// Reserves a window of `size` bytes.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a size of 0 or not a multiple of 2 MiB; the errno of `mmap`.
    pub fn new(size: u64) -> io::Result<Self> {
        Self::growable(size, size)
    }

    /// Reserves a window of `size` bytes that can [grow](Self::grow) up to `reserved`.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new), for both; `EINVAL` for a size above what is reserved.
    pub fn growable(size: u64, reserved: u64) -> io::Result<Self> {
        Self::within(size, reserved, &budget::PROCESS)
    }

    fn within(size: u64, reserved: u64, budget: &'static Budget) -> io::Result<Self> {
        let whole = size.is_multiple_of(ALIGNMENT) && reserved.is_multiple_of(ALIGNMENT);
        if size == 0 || !whole || size > reserved {
            return Err(invalid());
        }
        let total = reserved.checked_add(ALIGNMENT).ok_or_else(invalid)?;
        let total = usize::try_from(total).map_err(|_| invalid())?;
        let len = usize::try_from(reserved).map_err(|_| invalid())?;
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
            reserved,
            size: AtomicU64::new(size),
            budget,
            repaired: AtomicBool::new(false),
            repairs: AtomicU64::new(0),
            tables: OnceLock::new(),
            prefaulted: AtomicU64::new(0),
            prefaulted_bytes: AtomicU64::new(0),
            streams: Mutex::default(),
            repairing: Mutex::default(),
            state: Mutex::default(),
        })
    }

    /// Makes the window `size` bytes long. What is mapped stays as it is. Idempotent.
    ///
    /// # Errors
    ///
    /// [`GrowError`]; the window has the size that it had.
    pub fn grow(&self, size: u64) -> Result<(), GrowError> {
        if !size.is_multiple_of(ALIGNMENT) {
            return Err(GrowError::Unaligned(size));
        }
        if size > self.reserved {
            return Err(GrowError::Beyond { asked: size, reserved: self.reserved });
        }
        let _state = self.state();
        let present = self.size();
        if size < present {
            return Err(GrowError::Shrinks { asked: size, present });
        }
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    fn most_mappings(&self) -> usize {
        let most = self.size() / ALIGNMENT * MAPPINGS_PER_LARGE_PAGE;
        most.clamp(MOST_MAPPINGS.0, MOST_MAPPINGS.1) as usize
    }

    /// Where the window is in this process: for the memory slot, which has all of
    /// [`max_size`](DaxWindow::max_size) from there. Aligned to 2 MiB. Stays until the value is dropped; so must
    /// the slot not be longer there than that.
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

    /// Whether a file is mapped now.
    pub fn is_used(&self) -> bool {
        !self.state().mappings.is_empty()
    }

    /// Goes up with everything that is repaired. A fault of a vCPU that entered the guest before is thereby
    /// explained.
    pub fn repairs(&self) -> u64 {
        self.repairs.load(Ordering::Acquire)
    }

    /// Puts zero pages where a mapped file has no pages any more, and says in how many places something
    /// was done: 0 means that a fault did not come from there.
    ///
    /// For the vCPU thread whose `KVM_RUN` failed with `EFAULT`, and for anyone who got that from a system
    /// call on the window. The zero pages are the guest's own: what it writes there is in no file. They give
    /// way to the file's pages when the range is mapped anew and when the file has them again
    /// ([`DaxWindow::file_may_have_grown`]). They cost host memory only once touched, at most the window's
    /// size. Idempotent. A file about which the host has nothing but errors (a server that is gone) is one
    /// that has lost all its pages; the others are repaired all the same.
    ///
    /// Asks the host for the size of every mapped file, and so may block as long as a file's server does.
    ///
    /// # Errors
    ///
    /// The errno of `mmap`; what was repaired before stays so.
    pub fn repair_truncated(&self) -> io::Result<usize> {
        self.repair_by(|file| Ok(page_end(&fstat(file)?)))
    }

    /// Does the same for files that are shorter than when they were mapped, and leaves the others alone.
    ///
    /// For whoever looks after the window from time to time: a vCPU that touches a page that is gone need
    /// not come back from `KVM_RUN` with an error. Where KVM may wait for a page asynchronously it takes
    /// the fault for a page that is not there yet, and tries again without end.
    ///
    /// # Errors
    ///
    /// As [`repair_truncated`](Self::repair_truncated).
    pub fn cover_shrunk(&self) -> io::Result<usize> {
        if self.live_mappings() == 0 {
            return Ok(0);
        }
        self.cover_shrunk_by(|file| Ok(page_end(&fstat(file)?)))
    }

    fn cover_shrunk_by(&self, end_of: impl Fn(&OwnedFd) -> io::Result<u64>) -> io::Result<usize> {
        // Nothing is held meanwhile, so that a file server which does not answer holds up nobody else. A file
        // that cannot be asked may have its pages all the same, and the guest what it stored to them.
        let files = self.state().files_of(|_| true);
        let ends = FileEnds::of_those_that_answer(&files, &end_of);
        let changed = self.state().files_of(|mapping| {
            ends.of(&mapping.file).is_some_and(|end| {
                let there = mapping.there(end);
                mapping.shown < there || there < mapping.shown && end < mapping.known_end
            })
        });
        if changed.is_empty() {
            return Ok(0);
        }
        let _one = self.note_repair();
        let ends = FileEnds::of_those_that_answer(&changed, end_of);
        self.repair_with(&ends, false)
    }

    /// Repairs with the ends of files from `end_of`, also what was past the end of its file from the start if
    /// nothing else is found.
    fn repair_by(&self, end_of: impl Fn(&OwnedFd) -> io::Result<u64>) -> io::Result<usize> {
        let _one = self.note_repair();
        let files = self.state().files_of(|_| true);
        self.repair_with(&FileEnds::ask(&files, end_of), true)
    }

    /// Before the ends of files are asked for: who makes one longer from now on comes and looks.
    fn note_repair(&self) -> MutexGuard<'_, ()> {
        let one = self.repairing.lock().unwrap_or_else(PoisonError::into_inner);
        self.repaired.store(true, Ordering::SeqCst);
        one
    }

    fn repair_with(&self, ends: &FileEnds, all: bool) -> io::Result<usize> {
        let mut state = self.state();
        // `KVM_RUN` does not say which page it was. First the likely ones: of files that are shorter than
        // when they were mapped. Pages past the end of the others were never there, and a guest that keeps
        // to the sizes it was told does not touch them.
        let mut repaired = self.restore_grown(&mut state, ends)?;
        repaired += self.cover_lost(&mut state, ends, false)?;
        if repaired == 0 && all {
            repaired = self.cover_lost(&mut state, ends, true)?;
        }
        self.note_zeros(&state);
        Ok(repaired)
    }

    /// Covers the parts of mappings that lie past the ends of their files: of such files as have lost
    /// pages, or of `all`.
    fn cover_lost(&self, state: &mut State, ends: &FileEnds, all: bool) -> io::Result<usize> {
        let mut lost = Vec::new();
        for (offset, mapping) in &mut state.mappings {
            let Some(end) = ends.of(&mapping.file) else { continue };
            let there = mapping.there(end);
            if there < mapping.shown && (all || end < mapping.known_end) {
                self.place_zeros(offset + there, mapping.shown - there)?;
                lost.push((offset + there, offset + mapping.shown));
                mapping.shown = there;
                self.repairs.fetch_add(1, Ordering::Release);
            }
        }
        for (from, to) in &lost {
            state.forget_unreadable(*from, *to);
        }
        self.settle(state);
        Ok(lost.len())
    }

    /// Puts the file's pages back where there are zeros and the file has pages again.
    fn restore_grown(&self, state: &mut State, ends: &FileEnds) -> io::Result<usize> {
        let mut restored = 0;
        for (offset, mapping) in &mut state.mappings {
            let Some(end) = ends.of(&mapping.file) else { continue };
            let there = mapping.there(end);
            if mapping.shown < there {
                let grown = mapping.part(mapping.shown, there - mapping.shown);
                self.place_file(offset + mapping.shown, &grown, grown.len)?;
                mapping.shown = there;
                mapping.known_end = end;
                self.repairs.fetch_add(1, Ordering::Release);
                restored += 1;
            }
        }
        Ok(restored)
    }

    /// Remembers whether anything is left to restore.
    fn note_zeros(&self, state: &State) {
        let zeros = state.mappings.values().any(|mapping| mapping.shown < mapping.len);
        self.repaired.store(zeros, Ordering::SeqCst);
    }

    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks a range and returns its end.
    fn check(&self, offset: u64, len: u64) -> io::Result<u64> {
        let whole = offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
        match offset.checked_add(len) {
            Some(end) if whole && len > 0 && end <= self.size() => Ok(end),
            _ => Err(invalid()),
        }
    }

    /// Checks where something is to be mapped, and of which part of its file.
    fn check_mapping(&self, offset: u64, len: u64, file_offset: u64) -> io::Result<()> {
        self.check(offset, len)?;
        match file_offset.checked_add(len) {
            Some(end) if file_offset.is_multiple_of(PAGE) && end <= i64::MAX as u64 => Ok(()),
            _ => Err(invalid()),
        }
    }

    /// Maps what was checked, over whatever was there.
    fn enter(
        &self,
        mut state: MutexGuard<'_, State>,
        offset: u64,
        mapping: Mapping,
    ) -> io::Result<()> {
        let len = mapping.len;
        let then = state.count_without(offset, len) + 1;
        self.check_count(&mut state, then)?;
        let placed = self.place(offset, &mapping);
        let mut before = Vec::new();
        match placed {
            Ok(()) => before = state.insert(offset, mapping),
            Err(_) => self.restore(&mut state, offset, len),
        }
        self.settle(&mut state);
        // Closes files, which may block: without the lock.
        drop(state);
        drop(before);
        placed
    }

    /// Refuses what would leave too many mappings, when it leaves more than there are. Draws what it needs
    /// from the budget; [`settle`](Self::settle) gives back what is not needed after all.
    pub(super) fn check_count(&self, state: &mut State, then: usize) -> io::Result<()> {
        if then > state.count() && then > self.most_mappings() {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let more = then.saturating_sub(state.drawn);
        self.budget.draw(more)?;
        state.drawn += more;
        Ok(())
    }

    /// Gives back what the table does not need of the budget.
    pub(super) fn settle(&self, state: &mut State) {
        let left = state.drawn.saturating_sub(state.count());
        state.drawn -= left;
        self.budget.give_back(left);
    }

    /// The address of a range that was checked.
    pub(super) fn address(&self, offset: u64) -> *mut std::ffi::c_void {
        self.base.as_ptr().wrapping_add(offset as usize).cast()
    }

    /// Makes `mapping` visible at `offset`.
    pub(super) fn place(&self, offset: u64, mapping: &Mapping) -> io::Result<()> {
        if mapping.shown > 0 {
            self.place_file(offset, mapping, mapping.shown)?;
        }
        if mapping.shown < mapping.len {
            self.place_zeros(offset + mapping.shown, mapping.len - mapping.shown)?;
        }
        Ok(())
    }

    /// Makes the first `len` bytes of what `mapping` has of its file visible at `offset`.
    fn place_file(&self, offset: u64, mapping: &Mapping, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        let (protection, flags) = match mapping.access {
            Access::Read => (protection(false), MapFlags::SHARED),
            Access::Write => (protection(true), MapFlags::SHARED),
            Access::Severed => (protection(true), MapFlags::PRIVATE | MapFlags::NORESERVE),
        };
        // SAFETY: MAP_FIXED replaces what is at the address, and `check` saw that the whole range is inside
        // the reservation that `self` owns. No Rust reference points there: the window is only ever touched
        // through raw pointers, by system calls and by the guest.
        unsafe {
            mmap(
                self.address(offset),
                len as usize,
                protection,
                flags | MapFlags::FIXED,
                &mapping.file.fd,
                mapping.file_offset,
            )?;
        }
        Ok(())
    }

    /// Puts private zero pages over a range.
    pub(super) fn place_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        // SAFETY: as in `place_file`.
        unsafe {
            mmap_anonymous(
                self.address(offset),
                len as usize,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED,
            )?;
        }
        Ok(())
    }

    /// Maps the empty reservation over a range.
    pub(super) fn reserve(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        // SAFETY: as in `place_file`.
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
    pub(super) fn restore(&self, state: &mut State, offset: u64, len: u64) {
        if self.reserve(offset, len).is_err() {
            // Out of memory areas, which `mmap` finds out before it changes anything: all is as it was.
            return;
        }
        let pages: Vec<u64> = state.unreadable.range(offset..offset + len).copied().collect();
        for (at, mapping) in state.cut_out(offset, len) {
            if self.place(at, &mapping).is_ok() {
                state.mappings.insert(at, mapping);
            }
        }
        for at in pages {
            if state.at(at).is_some() && self.place_zeros(at, PAGE).is_ok() {
                state.unreadable.insert(at);
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

fn access(writable: bool) -> Access {
    if writable { Access::Write } else { Access::Read }
}

fn protection(writable: bool) -> ProtFlags {
    if writable { ProtFlags::READ | ProtFlags::WRITE } else { ProtFlags::READ }
}

impl DaxWindow for Window {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn max_size(&self) -> u64 {
        self.reserved
    }

    fn map_for(
        &self,
        owner: u32,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
        writable: bool,
    ) -> io::Result<()> {
        self.check_mapping(offset, len, file_offset)?;
        let opened = Opened::new(file, writable)?;
        let known = self.state().known(&opened);
        let file = match known {
            Some(backing) => backing,
            None => Arc::new(opened.backing(file, |fd| try_mapping(fd, writable))?),
        };
        let mut state = self.state();
        // Another thread may have been first.
        let file = state.known(&opened).unwrap_or(file);
        state.add_file(&file);
        let known_end = page_end(&opened.stat);
        let access = access(writable);
        let mapping = Mapping { owner, access, len, file, file_offset, known_end, shown: len };
        self.enter(state, offset, mapping)
    }

    fn map_like(
        &self,
        like: u64,
        owner: u32,
        offset: u64,
        len: u64,
        file_offset: u64,
        writable: bool,
    ) -> Option<io::Result<()>> {
        let state = self.state();
        let there = state.mappings.get(&like).filter(|mapping| {
            mapping.owner == owner
                && mapping.access == access(writable)
                && !mapping.file.may_be_copied_up()
                && file_offset.saturating_add(len) <= mapping.known_end
        })?;
        let mapping = Mapping { len, file_offset, shown: len, ..there.clone() };
        let checked = self.check_mapping(offset, len, file_offset);
        Some(checked.and_then(|()| self.enter(state, offset, mapping)))
    }

    fn set_writable(&self, owner: u32, writable: bool) -> io::Result<()> {
        self.switch(owner, writable)
    }

    fn is_severed(&self, owner: u32, file: (u64, u64)) -> bool {
        self.state().mappings.values().any(|mapping| {
            let (device, inode, _) = mapping.file.key;
            mapping.access == Access::Severed && mapping.owner == owner && (device, inode) == file
        })
    }

    fn take_away(&self, owner: u32) {
        self.replace_by_zeros(owner);
    }

    fn mapped(&self, offset: u64) {
        self.prefault(offset);
    }

    fn statistics(&self) -> Statistics {
        let (mappings, mapped_bytes) = {
            let state = self.state();
            let bytes = state.mappings.values().map(|mapping| mapping.len).sum();
            (state.mappings.len() as u64, bytes)
        };
        Statistics {
            mappings,
            mapped_bytes,
            repairs: self.repairs(),
            prefaulted: self.prefaulted.load(Ordering::Relaxed),
            prefaulted_bytes: self.prefaulted_bytes.load(Ordering::Relaxed),
        }
    }

    fn unmap(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(offset, len)?;
        let mut state = self.state();
        let then = state.count_without(offset, len);
        self.check_count(&mut state, then)?;
        let reserved = self.reserve(offset, len);
        let before = if reserved.is_ok() { state.cut_out(offset, len) } else { Vec::new() };
        self.settle(&mut state);
        // Closes files, as in `map`.
        drop(state);
        drop(before);
        reserved
    }

    fn clear(&self) {
        self.streams.lock().unwrap_or_else(PoisonError::into_inner).clear();
        let mut state = self.state();
        // One call that joins all areas into one: cannot run out of them.
        if let Err(error) = self.reserve(0, self.size()) {
            log::error!("cannot clear a DAX window: {error}");
            return;
        }
        let before = std::mem::take(&mut state.mappings);
        state.unreadable.clear();
        state.files.clear();
        state.changes += 1;
        self.settle(&mut state);
        // Closes files, as in `map`.
        drop(state);
        drop(before);
    }

    fn asks_the_host(&self) -> bool {
        self.repaired.load(Ordering::SeqCst)
    }

    fn file_may_have_grown(&self) {
        if !self.asks_the_host() {
            return;
        }
        let _one = self.repairing.lock().unwrap_or_else(PoisonError::into_inner);
        let files = self.state().files_of(|mapping| mapping.shown < mapping.len);
        let ends = FileEnds::ask(&files, |file| Ok(page_end(&fstat(file)?)));
        let mut state = self.state();
        if let Err(error) = self.restore_grown(&mut state, &ends) {
            complain!(host: "cannot map the pages of a file that has grown: {error}");
        }
        self.note_zeros(&state);
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.budget.give_back(self.state().drawn);
        // SAFETY: the reservation is `reserved` bytes at `base` and owned by this value, which nobody can use
        // any more. Whoever made a memory slot of it has taken that away first (`host_address`).
        let result = unsafe { munmap(self.address(0), self.reserved as usize) };
        if let Err(error) = result {
            log::error!("cannot unmap a DAX window: {error}");
        }
    }
}

#[cfg(test)]
#[path = "window_test.rs"]
mod tests;
