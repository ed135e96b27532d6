//! What the shares of one session have in common.

use std::sync::Arc;

use super::DaxPolicy;
use super::budget::Budget;
use super::options::Options;
use crate::dax::Policy;
use crate::fuse::Errno;

/// So many bits of a node id or handle are the share's own. Above them is the index of the share in its session;
/// one that is alone has index 0.
pub(crate) const NUMBER_BITS: u32 = 44;

/// How much of the host's a guest may make the shares of one session hold, all of them together, and which of
/// their files have room in its window.
pub struct Common {
    pub(super) nodes: Arc<Budget>,
    pub(super) handles: Arc<Budget>,
    /// Descriptors that are held for the guest: handles, files without a name, locks.
    pub(super) descriptors: Arc<Budget>,
    /// Bytes of host memory that requests use while they are served: listings, values of attributes.
    pub(super) buffers: Arc<Budget>,
    pub(super) lock_records: Arc<Budget>,
    pub(super) lock_waiters: Arc<Budget>,
    /// Of the files that can be mapped, which are. `None`: all.
    pub(super) mapped: Option<Arc<Policy>>,
}

impl Common {
    /// As these options say. Those that are about a directory do not count.
    pub fn new(options: &Options) -> Arc<Self> {
        let (caps, locks) = (options.caps(), options.lock_limits());
        let mapped = match (options.dax, options.window) {
            (DaxPolicy::Inode, Some(window)) => Some(Policy::new(window, !options.direct_io())),
            _ => None,
        };
        Arc::new(Self {
            nodes: Budget::new(caps.inodes, Errno::NFILE),
            handles: Budget::new(caps.handles, Errno::NFILE),
            descriptors: Budget::new(caps.descriptors, Errno::NFILE),
            buffers: Budget::new(caps.buffers, Errno::NOMEM),
            lock_records: Budget::new(locks.records, Errno::NOLCK),
            lock_waiters: Budget::new(locks.waiters, Errno::NOLCK),
            mapped: mapped.map(Arc::new),
        })
    }

    /// What there is to say of it in numbers, by name.
    pub fn statistics(&self) -> Vec<(&'static str, u64)> {
        self.mapped.iter().flat_map(|mapped| mapped.statistics()).collect()
    }

    /// See [`FileSystem::window_has_grown`](crate::fuse::FileSystem::window_has_grown).
    pub fn window_has_grown(&self, size: u64) {
        if let Some(mapped) = &self.mapped {
            mapped.window_has_grown(size);
        }
    }

    /// How many descriptors are held.
    #[cfg(test)]
    pub(crate) fn descriptors_in_use(&self) -> usize {
        self.descriptors.used()
    }
}
