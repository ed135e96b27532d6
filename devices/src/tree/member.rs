//! A share in a tree.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Mutex, Weak};

use super::MemberInfo;
use crate::dax::DaxWindow;
use crate::fuse::abi::ROOT_ID;
use crate::fuse::{Counters, FileSystem};
use crate::share::{NUMBER_BITS, Share};

/// A share in a tree, or one that was. Whoever serves a request of it holds it, so when it is dropped, nothing of
/// it is being served; what is mapped of it is then taken away.
pub(super) struct Member {
    /// The upper bits of all its numbers. Also by which the window knows what is mapped of it.
    pub(super) index: u32,
    /// Where it is, or was.
    pub(super) path: String,
    pub(super) share: Share,
    /// One switch to read-only or back at a time.
    pub(super) switching: Mutex<()>,
    window: Option<Arc<dyn DaxWindow>>,
    /// How many lookups of its root the guest has to give back.
    lookups: AtomicU64,
    removed: AtomicBool,
    /// Requests of its nodes.
    pub(super) counters: Arc<Counters>,
    /// The last field: when it is dropped, so is all the rest, and nothing on the host is held any more.
    gone: Arc<()>,
}

impl Member {
    /// Whoever has this learns when the member is gone: it can be upgraded no more.
    pub(super) fn watch(&self) -> Weak<()> {
        Arc::downgrade(&self.gone)
    }

    pub(super) fn new(
        index: u32,
        path: String,
        share: Share,
        window: Option<Arc<dyn DaxWindow>>,
    ) -> Self {
        Self {
            index,
            path,
            share,
            switching: Mutex::default(),
            window,
            lookups: AtomicU64::new(0),
            removed: AtomicBool::new(false),
            counters: Arc::default(),
            gone: Arc::default(),
        }
    }

    /// The node id of its root.
    pub(super) fn root(&self) -> u64 {
        u64::from(self.index) << NUMBER_BITS | ROOT_ID
    }

    /// The guest was told of the root.
    pub(super) fn looked_up(&self) {
        self.lookups.fetch_add(1, Relaxed);
    }

    /// FORGET of a node of it.
    pub(super) fn forget(&self, nodeid: u64, count: u64) {
        if nodeid != self.root() {
            return self.share.forget(nodeid, count);
        }
        // Too many are all there are.
        let less = |lookups: u64| Some(lookups.saturating_sub(count));
        let _ = self.lookups.fetch_update(Relaxed, Relaxed, less);
    }

    /// Whether the guest knows something of it.
    pub(super) fn is_known(&self) -> bool {
        // The root is always there.
        self.lookups.load(Relaxed) > 0
            || self.share.live_inodes() > 1
            || self.share.live_handles() > 0
    }

    /// It is in the tree no more.
    pub(super) fn remove(&self) {
        self.removed.store(true, SeqCst);
    }

    pub(super) fn is_removed(&self) -> bool {
        self.removed.load(SeqCst)
    }

    /// The session has ended.
    pub(super) fn clear(&self) {
        self.lookups.store(0, Relaxed);
        self.share.clear();
    }

    /// Ends all that the guest has of it. Requests that are being served may still hold something.
    pub(super) fn end(&self) {
        self.clear();
        if let Some(window) = &self.window {
            window.take_away(self.index);
        }
    }

    pub(super) fn info(&self) -> MemberInfo {
        MemberInfo {
            path: self.path.clone(),
            directory: self.share.options().directory.clone(),
            read_only: self.share.is_read_only(),
            removed: self.is_removed(),
            nodes: self.share.live_inodes(),
            open: self.share.live_handles(),
            counters: self.counters.clone(),
        }
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(window) = &self.window {
            window.take_away(self.index);
        }
    }
}
