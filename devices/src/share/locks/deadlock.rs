//! Deadlocks: processes of the guest of which each waits for a POSIX lock that the next one has.
//!
//! The host looks for them among its processes, and to it all owners are one. So whoever is about to wait is
//! checked here, as Linux does it (`posix_locks_deadlock` of fs/locks.c): among the owners of this guest, and so
//! far. A circle that goes through another guest or a process of the host is not seen.

use std::sync::{Arc, Mutex};

use super::ranges::Span;
use super::{Locks, OwnerKey};
use crate::fuse::{Errno, Result};
use crate::sync::lock;

/// How many owners one check looks at. Linux follows ten; here one may be in the way of many.
const MOST: usize = 64;

/// What is waited for. Locked before the table of owners and before the state of any.
#[derive(Default)]
pub(super) struct Waits(Mutex<Vec<(OwnerKey, Span)>>);

/// That an owner waits, until this is dropped.
pub(super) struct Waiting {
    waits: Arc<Waits>,
    wanted: (OwnerKey, Span),
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let mut waits = lock(&self.waits.0);
        // Two that want the same are as good as each other.
        if let Some(at) = waits.iter().position(|wanted| *wanted == self.wanted) {
            waits.swap_remove(at);
        }
    }
}

impl Locks {
    /// Has an owner wait for a lock. The caller holds the state of none.
    ///
    /// # Errors
    ///
    /// `EDEADLK` when those who are in its way wait for it.
    pub(super) fn begin_waiting(&self, key: OwnerKey, span: Span) -> Result<Waiting> {
        // Held meanwhile: of two that would wait for each other one is the first.
        let mut waits = lock(&self.waits.0);
        if self.closes_a_circle(&waits, key, span) {
            return Err(Errno::DEADLK);
        }
        waits.push((key, span));
        Ok(Waiting { waits: self.waits.clone(), wanted: (key, span) })
    }

    fn closes_a_circle(&self, waits: &[(OwnerKey, Span)], key: OwnerKey, span: Span) -> bool {
        let (_, process) = key;
        let mut found = self.in_the_way(key, span);
        let mut looked_at = 0;
        while let Some(owner) = found.get(looked_at).copied() {
            if owner == process {
                return true;
            }
            looked_at += 1;
            if looked_at > MOST {
                return false;
            }
            // On any file, and of each of its threads.
            for (other, wanted) in waits.iter().filter(|((_, other), _)| *other == owner) {
                for owner in self.in_the_way(*other, *wanted) {
                    if !found.contains(&owner) {
                        found.push(owner);
                    }
                }
            }
        }
        false
    }

    /// The owners that have locked what `key` wants to lock.
    fn in_the_way(&self, (nodeid, process): OwnerKey, span: Span) -> Vec<u64> {
        let owners = self.of_node(nodeid).into_iter();
        owners
            .filter(|((_, other), owner)| {
                *other != process && lock(&owner.state).ranges.exclude(span)
            })
            .map(|((_, other), _)| other)
            .collect()
    }
}
