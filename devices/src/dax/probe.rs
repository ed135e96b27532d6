//! Pages that a file has and the host cannot give: a disk that fails, a disk that is full.
#![expect(unsafe_code, reason = "asks the kernel to read pages of the window")]

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{SeekFrom, fstat, fstatvfs, seek};
use rustix::mm::{Advice, madvise};

use super::table::{Mapping, page_end};
use super::window::{ALIGNMENT, PAGE, Window};

/// The most pages that one call covers. Those of a disk that is gone are covered as the guest asks for them.
const MOST_PAGES: usize = 64;

/// How long one call looks for pages that cannot be read. All that is mapped is read from the disk for that.
const PATIENCE: Duration = Duration::from_secs(30);

/// How often it looks again when the guest has mapped something else in the meantime.
const TRIES: usize = 3;

/// A file system with less room than this, in bytes, is full: some of the last blocks are only for the file
/// system's own use.
const NO_ROOM: u64 = 64 << 10;

impl Window {
    /// Puts zero pages in the place of pages that a file has but the host cannot read, and says how many
    /// there are: 0 means that a fault did not come from there.
    ///
    /// For the vCPU thread whose `KVM_RUN` failed with `EFAULT` when
    /// [`repair_truncated`](Self::repair_truncated) found nothing. KVM does not say which page it was, so
    /// all that is mapped is read, which changes and dirties nothing. May block for long; no lock is held
    /// while it reads.
    ///
    /// Holes of files on a full disk are left alone: there is nothing in them that could not be read, only no room
    /// for it, and what the guest writes there is not to be lost.
    ///
    /// A page that is covered is the guest's own from then on: what it writes there is in no file. The
    /// file's page comes back when the range is mapped anew. Each is logged.
    ///
    /// # Errors
    ///
    /// `ENOMEM` when there would be too many mappings, else the errno of `mmap`.
    pub fn cover_unreadable(&self) -> io::Result<usize> {
        let deadline = Instant::now() + PATIENCE;
        for _ in 0..TRIES {
            let (changes, mappings) = {
                let state = self.state();
                let all = state.mappings.iter().map(|(at, mapping)| (*at, mapping.clone()));
                (state.changes, all.collect::<Vec<_>>())
            };
            let mut failing = Vec::new();
            for (at, mapping) in mappings {
                for (from, len) in readable(&mapping) {
                    self.find_unreadable(at + from, len, deadline, &mut failing);
                }
            }
            if failing.is_empty() {
                return Ok(0);
            }
            if let Some(covered) = self.cover_pages(changes, &failing)? {
                return Ok(covered);
            }
        }
        Ok(0)
    }

    /// Halves a range until what cannot be read is single pages.
    fn find_unreadable(&self, at: u64, len: u64, deadline: Instant, failing: &mut Vec<u64>) {
        if len == 0 || failing.len() >= MOST_PAGES || Instant::now() > deadline {
            return;
        }
        // Not more at a time, for the sake of the deadline.
        if len <= ALIGNMENT {
            // SAFETY: reads the pages of a range inside the reservation into the page table, as a read by
            // the guest does. What is mapped there stays as it is.
            let read =
                unsafe { madvise(self.address(at), len as usize, Advice::LinuxPopulateRead) };
            match read {
                Err(rustix::io::Errno::FAULT) if len == PAGE => {
                    failing.push(at);
                    return;
                }
                Err(rustix::io::Errno::FAULT) => {}
                // EINVAL: the kernel cannot do this (before Linux 5.14). Anything else says nothing of the
                // file.
                _ => return,
            }
        }
        let half = (len / 2).next_multiple_of(PAGE);
        self.find_unreadable(at, half, deadline, failing);
        self.find_unreadable(at + half, len - half, deadline, failing);
    }

    /// Covers pages, unless something was mapped or unmapped since `changes`: it may be what failed.
    fn cover_pages(&self, changes: u64, pages: &[u64]) -> io::Result<Option<usize>> {
        // Where the files end, without the lock: what is past that is for `repair_truncated`.
        let mut lost = Vec::new();
        for at in pages {
            let found = self.state().at(*at).map(|(start, mapping)| {
                (mapping.file.clone(), mapping.file_offset.saturating_add(at - start))
            });
            if let Some((file, offset)) = found
                && fstat(&file.fd).is_ok_and(|stat| offset < page_end(&stat))
            {
                lost.push((*at, file, offset));
            }
        }
        let mut state = self.state();
        if state.changes != changes {
            return Ok(None);
        }
        let mut covered = 0;
        for (at, file, offset) in lost {
            let shown = state.at(at).is_some_and(|(start, mapping)| at - start < mapping.shown);
            if !shown {
                continue;
            }
            covered += 1;
            // Another vCPU may have had the same fault, and the guest may have written there since.
            if state.unreadable.contains(&at) {
                continue;
            }
            let then = state.count() + 1;
            self.check_count(&mut state, then)?;
            if let Err(error) = self.place_zeros(at, PAGE) {
                self.settle(&mut state);
                return Err(error);
            }
            state.unreadable.insert(at);
            self.repairs.fetch_add(1, Ordering::Release);
            let (device, inode, _) = file.key;
            log::error!(
                "the host cannot read a page of a file (device {device:#x}, inode {inode}, offset \
                 {offset:#x}); the guest reads zeros there, and what it writes there is lost"
            );
        }
        Ok(Some(covered))
    }

    /// A file, by device and inode number, that is mapped for writing and whose file system is full. A guest
    /// that writes to a hole of such a file, or to any block that the file system would have to move, gets
    /// no page for it.
    ///
    /// Nothing can be put in its place without losing what the guest writes, so it is for the caller to wait
    /// until there is room. Asks the host, and may block as long as a file's server does.
    pub fn full_file_system(&self) -> Option<(u64, u64)> {
        let files = self.state().files_of(|mapping| mapping.file.key.2);
        let full = files.iter().find(|file| is_full(&file.fd))?;
        let (device, inode, _) = full.key;
        Some((device, inode))
    }
}

fn is_full(file: &OwnedFd) -> bool {
    fstatvfs(file).is_ok_and(|stat| {
        // Without a limit of its own (tmpfs) a file system has no blocks at all.
        stat.f_blocks > 0 && stat.f_bavail.saturating_mul(stat.f_frsize) < NO_ROOM
    })
}

/// The parts of what a mapping shows of its file that a read gives a page for, if the disk does not fail: offsets
/// and lengths in the mapping.
fn readable(mapping: &Mapping) -> Vec<(u64, u64)> {
    if !is_full(&mapping.file.fd) {
        return vec![(0, mapping.shown)];
    }
    let (mut at, mut parts) = (0, Vec::new());
    while at < mapping.shown {
        // Nobody reads or writes at the position of this descriptor.
        let seek = |to| seek(&mapping.file.fd, to);
        let from = mapping.file_offset.saturating_add(at);
        let Ok(data) = seek(SeekFrom::Data(from)) else { break };
        let Ok(hole) = seek(SeekFrom::Hole(data)) else { break };
        let start = data.saturating_sub(mapping.file_offset) / PAGE * PAGE;
        let end =
            hole.saturating_sub(mapping.file_offset).next_multiple_of(PAGE).min(mapping.shown);
        if start >= end {
            break;
        }
        parts.push((start, end - start));
        at = end;
    }
    parts
}
