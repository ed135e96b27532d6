//! `cache=watch`: what the guest keeps for good, because it is told of each change.
//!
//! A directory that the guest looks at is watched before the guest is told anything of it ([`group`]), and what it is
//! told is remembered ([`tables`]). What then happens there and was not done by this process itself is
//! collected ([`pending`]), and an agent in the guest has its kernel ask anew, in batches that it acknowledges. Only
//! as long as such an agent is there and answers in time, the guest is told to keep anything for good; at all
//! other times it is told what it is told with `cache=auto`.
//!
//! Nothing here waits: requests are served by it, and another thread ([`Watch::gather`], [`Watch::take`]) has the time.

mod group;
mod pending;
mod tables;
#[cfg(test)]
mod tests;

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};

use self::group::{Event, Group, What};
use self::pending::Pending;
pub use self::pending::{Batch, Happened, Item};
use self::tables::Tables;
use super::file_handle::FileHandle;
use super::host::Host;
use super::inode::{Inode, Which};
use crate::sync::lock;

/// How much is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchLimits {
    /// Directories. Each is some 1.5 KiB of memory of the host's kernel, and one of what this user may watch
    /// (/proc/sys/fs/fanotify/max_user_marks).
    pub directories: usize,
    /// Names that the guest was told of, also of such as are not there. Each is some 150 bytes.
    pub names: usize,
}

impl Default for WatchLimits {
    /// Names for the largest source trees, and as many directories as such a tree has.
    fn default() -> Self {
        Self { directories: 1 << 16, names: 1 << 20 }
    }
}

/// The watch over one share.
pub struct Watch {
    group: Group,
    limits: WatchLimits,
    /// What this process does itself the guest knows: nobody but this guest's share does anything there.
    own_is_known: bool,
    state: Mutex<State>,
    /// The agent is there, and has answered in time.
    live: AtomicBool,
    /// The thread of the agent, by the guest's number; 0: none.
    agent: AtomicU32,
    counts: Counts,
}

#[derive(Default)]
struct State {
    tables: Tables,
    pending: Pending,
    /// What the agent has to acknowledge.
    sent: Option<Batch>,
    /// Not before all of this is acknowledged may the guest keep anything for good.
    recovering: bool,
    /// The agent is there.
    connected: bool,
    /// It has not acknowledged a batch in time.
    late: bool,
}

impl State {
    fn is_live(&self) -> bool {
        self.connected && !self.late && !self.recovering
    }
}

#[derive(Default)]
struct Counts {
    events: AtomicU64,
    own: AtomicU64,
    overflows: AtomicU64,
    unwatched: AtomicU64,
    batches: AtomicU64,
    revalidated: AtomicU64,
    lost: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Relaxed);
}

impl Watch {
    /// One over nothing. `own_is_known`: what this process does in the directory it does for this share alone.
    ///
    /// # Errors
    ///
    /// The host's, as of [`Group::new`].
    pub(super) fn new(limits: WatchLimits, own_is_known: bool) -> io::Result<Self> {
        Ok(Self {
            group: Group::new()?,
            limits,
            own_is_known,
            state: Mutex::default(),
            live: AtomicBool::new(false),
            agent: AtomicU32::new(0),
            counts: Counts::default(),
        })
    }

    /// Whether the guest may keep anything for good.
    pub(super) fn is_live(&self) -> bool {
        self.live.load(SeqCst)
    }

    /// Whether a request with this process number is the agent's.
    pub(super) fn is_agent(&self, pid: u32) -> bool {
        pid != 0 && self.agent.load(Relaxed) == pid
    }

    /// Watches a directory, if that can be. Called before anything is read of it that the guest may keep.
    pub(super) fn cover(&self, host: &Host, directory: &Inode, file: impl AsFd) -> bool {
        // What is mounted below has mounts of its own in the guest, where the agent is not.
        if !self.is_live() || !directory.identity.mount.is_own() {
            return false;
        }
        let mut state = lock(&self.state);
        if state.tables.watches(directory.nodeid) {
            return true;
        }
        if state.tables.directories.len() >= self.limits.directories {
            count(&self.counts.unwatched);
            return false;
        }
        let Ok(handle) = FileHandle::of(&file) else {
            count(&self.counts.unwatched);
            return false;
        };
        // Known before it is watched: no event shall be of a directory that is not known.
        state.tables.insert(directory.nodeid, handle);
        if let Err(error) = self.group.watch(host, file) {
            state.tables.remove(directory.nodeid);
            if self.counts.unwatched.fetch_add(1, Relaxed) == 0 {
                log::warn!(
                    "cache=watch: a directory cannot be watched, and is kept for a second: {error:?}"
                );
            }
            return false;
        }
        true
    }

    /// The guest is about to be told of a name in a directory that is covered. `false`: not for good.
    pub(super) fn tell(&self, directory: u64, name: &CStr) -> bool {
        lock(&self.state).tables.tell(directory, name.to_bytes(), self.limits.names)
    }

    /// A name that was told is a node's, 0 when it is not there; `alone`: its only name. `false`: it is not to be kept
    /// for good after all.
    pub(super) fn found(&self, directory: u64, name: &CStr, node: u64, alone: bool) -> bool {
        lock(&self.state).tables.found(directory, name.to_bytes(), node, alone)
    }

    /// Whether the guest hears of all changes of a node's attributes: of a directory, or of what has one name.
    pub(super) fn has_attributes(&self, inode: &Inode, links: u32) -> bool {
        if !self.is_live() {
            return false;
        }
        let state = lock(&self.state);
        match inode.is_directory() {
            true => state.tables.watches(inode.nodeid),
            false => links == 1 && state.tables.has_node(inode.nodeid),
        }
    }

    /// Whether the guest hears of all changes of a file's data.
    pub(super) fn has_data(&self, node: u64) -> bool {
        self.is_live() && lock(&self.state).tables.has_node(node)
    }

    /// The guest has moved an entry, and goes on believing the new name for as long as it was to believe the old one.
    /// `told`: the new one was told before. Where that does not hold, the guest is to ask for it. With `back` the two
    /// have changed places, and it says so of the old name.
    pub(super) fn moved(
        &self,
        from: (u64, &CStr),
        to: (u64, &CStr),
        back: Option<bool>,
        told: bool,
    ) {
        let mut state = lock(&self.state);
        let moved = state.tables.told(from.0, from.1.to_bytes());
        let other = state.tables.told(to.0, to.1.to_bytes());
        self.now_at(&mut state, to, moved, told);
        if let Some(told) = back {
            self.now_at(&mut state, from, other, told);
        }
    }

    fn now_at(&self, state: &mut State, at: (u64, &CStr), node: Option<u64>, told: bool) {
        let State { tables, pending, .. } = state;
        let (Some(node), name) = (node, at.1.to_bytes()) else { return };
        if told && tables.found(at.0, name, node, tables.has_node(node)) {
            return;
        }
        tables.lose_node(node);
        // A guest that renames more than its agent keeps up with believes what it likes.
        if pending.len() < self.limits.names {
            pending.name(at.0, name, Happened::ANYTHING);
            pending.listing(at.0);
            pending.node(node);
        }
    }

    /// The guest has forgotten a node. What leads to a directory is for the host to find; without, its mark stays.
    pub(super) fn forgotten(&self, host: &Host, inode: &Inode) {
        // Locked to the end: who finds the directory again is to watch it after this.
        let mut state = lock(&self.state);
        state.tables.forget(inode.nodeid);
        if inode.is_directory()
            && state.tables.remove(inode.nodeid)
            && let Which::Handle(handle) = &inode.identity.file
            && let Some(mount) = inode.identity.mount.own()
            // One that is gone is watched no more.
            && let Ok(file) = handle.open(mount)
        {
            let _ = self.group.leave(host, file);
        }
    }

    /// A session begins or ends: the guest knows nothing.
    pub(super) fn clear(&self) {
        let mut state = lock(&self.state);
        state.tables.clear();
        state.pending = Pending::default();
        self.group.leave_all();
    }

    /// Readable when [`gather`](Self::gather) has something to do.
    pub fn events(&self) -> BorrowedFd<'_> {
        self.group.as_fd()
    }

    /// Takes what has happened. `true`: something is to be told.
    ///
    /// # Errors
    ///
    /// The host's. Nothing is kept for good from then on.
    pub fn gather(&self) -> io::Result<bool> {
        loop {
            let mut state = lock(&self.state);
            let read = self.group.read(|event| self.take_event(&mut state, event));
            match read {
                Ok(Some(())) => {}
                Ok(None) => return Ok(!state.pending.is_empty()),
                Err(error) => {
                    state.recovering = true;
                    self.settle(&state);
                    return Err(error);
                }
            }
        }
    }

    fn take_event(&self, state: &mut State, event: Event) {
        count(&self.counts.events);
        if event.what.contains(What::OVERFLOW) {
            return self.overflow(state);
        }
        if event.own {
            count(&self.counts.own);
            if self.own_is_known {
                return;
            }
        }
        let State { tables, pending, .. } = state;
        let Some(directory) = event.directory.and_then(|handle| tables.by_handle(&handle)) else {
            return;
        };
        if event.name.is_empty() {
            pending.node(directory);
            if event.what.contains(What::DELETE_SELF) {
                tables.remove(directory);
            }
            return;
        }
        let told = tables.told(directory, &event.name);
        let listed = event.what.intersects(What::NAMES);
        if listed {
            pending.listing(directory);
        }
        if told.is_some() && (listed || event.what.intersects(What::MODIFY | What::ATTRIB)) {
            let data = event.what.contains(What::MODIFY) && !event.what.contains(What::ONDIR);
            pending.name(directory, &event.name, Happened { data });
        }
        if listed && let Some(node) = told.filter(|node| *node != 0) {
            // It may be open in the guest, where what happens to it is heard of no more.
            tables.lose_node(node);
            pending.node(node);
        }
    }

    /// Events were lost: all that the guest was told it is to ask for.
    fn overflow(&self, state: &mut State) {
        if self.counts.overflows.fetch_add(1, Relaxed) == 0 {
            log::warn!(
                "cache=watch: more has changed on the host than it can be told of; the guest asks for all it knows"
            );
        }
        state.recovering = true;
        self.settle(state);
        let State { tables, pending, .. } = state;
        for (directory, watched) in &tables.directories {
            pending.listing(*directory);
            for (name, node) in &watched.names {
                pending.name(*directory, name, Happened::ANYTHING);
                if *node != 0 {
                    pending.node(*node);
                }
            }
        }
    }

    /// An agent is there, and its requests come from this thread.
    pub fn connected(&self, agent: u32) {
        let mut state = lock(&self.state);
        state.connected = true;
        state.late = false;
        self.agent.store(agent, Relaxed);
        // What was on its way to another one was perhaps not done.
        if let Some(batch) = state.sent.take() {
            state.pending.put_back(batch);
        }
        // Something was not told in time.
        state.recovering |= !state.pending.is_empty();
        self.settle(&state);
    }

    /// It is gone.
    pub fn disconnected(&self) {
        let mut state = lock(&self.state);
        if std::mem::take(&mut state.connected) && self.counts.lost.fetch_add(1, Relaxed) == 0 {
            log::warn!(
                "cache=watch: the agent in the guest is gone; until it is back this is cache=auto"
            );
        }
        self.agent.store(0, Relaxed);
        self.settle(&state);
    }

    /// It does not answer.
    pub fn is_late(&self) {
        let mut state = lock(&self.state);
        if !std::mem::replace(&mut state.late, true) && self.counts.lost.fetch_add(1, Relaxed) == 0
        {
            log::warn!(
                "cache=watch: the agent in the guest does not answer; until it does this is cache=auto"
            );
        }
        self.settle(&state);
    }

    /// What the agent is to do next, when it has done what it was told before.
    pub fn take(&self) -> Option<Batch> {
        let mut state = lock(&self.state);
        if !state.connected || state.sent.is_some() || state.pending.is_empty() {
            return None;
        }
        let batch = state.pending.take();
        state.sent = Some(batch.clone());
        count(&self.counts.batches);
        Some(batch)
    }

    /// It has done that.
    pub fn done(&self) {
        let mut state = lock(&self.state);
        if let Some(batch) = state.sent.take() {
            self.counts.revalidated.fetch_add(batch.len() as u64, Relaxed);
        }
        state.late = false;
        if state.pending.is_empty() {
            state.recovering = false;
        }
        self.settle(&state);
    }

    fn settle(&self, state: &State) {
        self.live.store(state.is_live(), SeqCst);
    }

    /// In numbers, by name.
    pub(super) fn statistics(&self) -> Vec<(&'static str, u64)> {
        let (directories, names, pending) = {
            let state = lock(&self.state);
            let sent = state.sent.as_ref().map_or(0, Batch::len);
            (state.tables.directories.len(), state.tables.names, state.pending.len() + sent)
        };
        let of = |counter: &AtomicU64| counter.load(Relaxed);
        vec![
            ("watch_live", u64::from(self.is_live())),
            ("watch_directories", directories as u64),
            ("watch_names", names as u64),
            ("watch_pending", pending as u64),
            ("watch_events", of(&self.counts.events)),
            ("watch_own_events", of(&self.counts.own)),
            ("watch_overflows", of(&self.counts.overflows)),
            ("watch_refused", of(&self.counts.unwatched)),
            ("watch_batches", of(&self.counts.batches)),
            ("watch_revalidated", of(&self.counts.revalidated)),
            ("watch_agent_lost", of(&self.counts.lost)),
        ]
    }
}
