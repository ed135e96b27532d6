//! The window in host memory.
#![expect(
    unsafe_code,
    reason = "maps files at fixed addresses inside one reservation"
)]

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rustix::fs::{OFlags, fcntl_getfl, fstat};
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::DaxWindow;

/// Alignment of the window and of its size, in bytes: that of a large page. Host and guest address have to
/// agree modulo this for KVM to map one, and it is how much the Linux guest maps at a time.
pub const ALIGNMENT: u64 = 2 << 20;

/// Granularity of mappings in bytes.
const PAGE: u64 = 4096;

/// The most mappings at a time. Each costs up to three of the process's memory areas: itself, what is left
/// of the reservation beside it, and a tail that was repaired. The host allows 65530 (`vm.max_map_count`),
/// and the rest of the process needs some too. Enough for a window of 40 GiB in pieces of 2 MiB.
const MOST_MAPPINGS: usize = 20_000;

/// A file that is mapped, once for all its mappings of one kind: not a descriptor for every 2 MiB.
struct Backing {
    fd: OwnedFd,
    key: Key,
}

/// Which file it is, and whether its descriptor is open for writing.
type Key = (u64, u64, bool);

#[derive(Clone)]
struct Mapping {
    len: u64,
    file: Arc<Backing>,
    file_offset: u64,
    /// Private zero pages stand here for what the file has lost. The file comes back when it is mapped
    /// again, or when it has grown again by the time of the next repair.
    zeros: bool,
}

impl Mapping {
    /// The part from `from` on, of `len` bytes.
    fn part(&self, from: u64, len: u64) -> Self {
        Self {
            len,
            file_offset: self.file_offset + from,
            ..self.clone()
        }
    }
}

#[derive(Default)]
struct State {
    /// By offset in the window; they do not overlap.
    mappings: BTreeMap<u64, Mapping>,
    files: HashMap<Key, Weak<Backing>>,
}

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

    /// Puts zero pages where a mapped file has no pages any more, and says in how many places it did: 0 means
    /// that a fault did not come from there. Also takes such pages away where the file has grown again.
    ///
    /// For the vCPU thread whose `KVM_RUN` failed with `EFAULT`, and for anyone who got that from a system
    /// call on the window. The zero pages are the guest's own: what it writes there is in no file, and is
    /// gone when the range is mapped anew. They cost host memory only once touched, at most the window's
    /// size. Idempotent.
    ///
    /// # Errors
    ///
    /// The errno of `mmap`; what was repaired before stays so.
    pub fn repair_truncated(&self) -> io::Result<usize> {
        let mut state = self.state();
        let mut repaired = 0;
        let all: Vec<(u64, Mapping)> = state
            .mappings
            .iter()
            .map(|(offset, mapping)| (*offset, mapping.clone()))
            .collect();
        for (offset, mapping) in all {
            let file_len = u64::try_from(fstat(&mapping.file.fd)?.st_size).unwrap_or(0);
            let file_end = file_len.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
            let there = file_end
                .saturating_sub(mapping.file_offset)
                .min(mapping.len);
            if mapping.zeros {
                if there > 0 {
                    let grown = Mapping {
                        zeros: false,
                        ..mapping.part(0, there)
                    };
                    self.place(offset, &grown)?;
                    state.insert(offset, grown);
                    repaired += 1;
                }
            } else if there < mapping.len {
                let lost = Mapping {
                    zeros: true,
                    ..mapping.part(there, mapping.len - there)
                };
                self.place(offset + there, &lost)?;
                state.insert(offset + there, lost);
                repaired += 1;
            }
        }
        Ok(repaired)
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

    /// The address of a range that was checked.
    fn address(&self, offset: u64) -> *mut std::ffi::c_void {
        self.base.as_ptr().wrapping_add(offset as usize).cast()
    }

    /// Makes `mapping` visible at `offset`.
    fn place(&self, offset: u64, mapping: &Mapping) -> io::Result<()> {
        self.check(offset, mapping.len)?;
        let protection = match mapping.file.key {
            (_, _, true) => ProtFlags::READ | ProtFlags::WRITE,
            (_, _, false) => ProtFlags::READ,
        };
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
                    protection,
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

impl State {
    /// The backing of a file: the one that is there, or a new one with a descriptor of its own.
    fn backing(&mut self, file: BorrowedFd<'_>, writable: bool) -> io::Result<Arc<Backing>> {
        let stat = fstat(file)?;
        // So that nothing is replaced before it is clear that the file may be mapped so.
        let mode = fcntl_getfl(file)? & OFlags::ACCMODE;
        if mode == OFlags::WRONLY || (writable && mode != OFlags::RDWR) {
            return Err(io::Error::from_raw_os_error(libc::EACCES));
        }
        let key = (stat.st_dev, stat.st_ino, writable);
        if let Some(backing) = self.files.get(&key).and_then(Weak::upgrade) {
            return Ok(backing);
        }
        let fd = file.as_fd().try_clone_to_owned()?;
        // A file system that cannot share mappings says so here, where there is nothing to lose. A
        // page may lie past the end of the file.
        let protection = if writable {
            ProtFlags::READ | ProtFlags::WRITE
        } else {
            ProtFlags::READ
        };
        // SAFETY: a new mapping where the kernel likes, which is taken away again and never touched.
        unsafe {
            let trial = mmap(
                std::ptr::null_mut(),
                PAGE as usize,
                protection,
                MapFlags::SHARED,
                &fd,
                0,
            )?;
            munmap(trial, PAGE as usize)?;
        }
        let backing = Arc::new(Backing { fd, key });
        // What is not mapped any more holds no descriptor, but a little memory.
        if self.files.len() >= 64 && self.files.len() >= 2 * self.mappings.len() {
            self.files.retain(|_, file| file.strong_count() > 0);
        }
        self.files.insert(key, Arc::downgrade(&backing));
        Ok(backing)
    }

    /// Takes the parts of mappings that lie in a range out of the table, and returns them.
    fn cut_out(&mut self, offset: u64, len: u64) -> Vec<(u64, Mapping)> {
        let end = offset + len;
        let mut out = Vec::new();
        // The last one that starts before the range may reach into it, or over it.
        let before = self.mappings.range(..offset).next_back();
        let mut touched: Vec<u64> = before.map(|(at, _)| *at).into_iter().collect();
        touched.extend(self.mappings.range(offset..end).map(|(at, _)| *at));
        for at in touched {
            let Some(mapping) = self.mappings.remove(&at) else {
                continue;
            };
            let mapping_end = at + mapping.len;
            if at < offset {
                let keep = mapping.len.min(offset - at);
                self.mappings.insert(at, mapping.part(0, keep));
            }
            if mapping_end > end {
                self.mappings
                    .insert(end, mapping.part(end - at, mapping_end - end));
            }
            let from = at.max(offset);
            let to = mapping_end.min(end);
            if from < to {
                out.push((from, mapping.part(from - at, to - from)));
            }
        }
        out
    }

    /// Enters a mapping, over whatever was there.
    fn insert(&mut self, offset: u64, mapping: Mapping) {
        self.cut_out(offset, mapping.len);
        self.mappings.insert(offset, mapping);
    }
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
        if state.mappings.len() >= MOST_MAPPINGS && !state.mappings.contains_key(&offset) {
            return Err(io::Error::from_raw_os_error(libc::ENOMEM));
        }
        let mapping = Mapping {
            len,
            file: state.backing(file, writable)?,
            file_offset,
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
