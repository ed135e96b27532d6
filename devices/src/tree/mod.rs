//! The tree: many shares behind one session, that come and go while the guest uses them.
//!
//! A [`Tree`] is a [`FileSystem`](crate::fuse::FileSystem) like a [`Share`](crate::share::Share) is. Its root and
//! the directories below are not on any disk: they are names that lead to members, and a member is a share, a
//! directory of the host's with options of its own. The guest sees each member as a mount below the tree, with a
//! device number of its own (`FUSE_ATTR_SUBMOUNT`).
//!
//! **Numbers.** All members are in one session, so node ids and handles say whose they are: the upper 20 bits are
//! the member's [index](member), the lower 44 bits the number that the member gave out. The tree's own directories
//! have index 0. An index is given out once and never again, as numbers are inside a member, so what a guest still
//! knows of a member that is gone is stale for good, whatever it asks and forgets.
//!
//! **Gone.** A member that is removed has no name from then on, and names of the tree are never kept by a guest.
//! What the guest knows of it goes on to work, as after `umount --lazy`, until it lets go of it; then the host's
//! directory is left alone. With force it ends at once.
//!
//! **Read-only.** A member that is switched to read-only changes nothing on the host from then on, by whatever way:
//! handles that were opened before answer `EROFS`, and what is mapped to be written becomes the guest's own copy.
//!
//! What concerns a whole session is the same for all members: see [`Tree::new`].

mod directories;
mod error;
mod filesystem;
mod member;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

pub use error::TreeError;

use crate::dax::DaxWindow;
use crate::fuse::{Counters, Errno};
use crate::share::{Common, DaxPolicy, DirectPolicy, NUMBER_BITS, Options, Share};
use crate::sync::{lock, read, write};
use directories::{Directories, parse};
use member::Member;

/// The most members at a time, removed ones that the guest still uses among them. Each holds four descriptors.
pub const MOST_MEMBERS: usize = 1024;

/// One more than the largest index of a member.
const INDEXES: u32 = 1 << (u64::BITS - NUMBER_BITS);

/// How long requests that are being served are waited for, where something is to be over when a call returns.
const PATIENCE: Duration = Duration::from_secs(5);

/// A directory of shares.
pub struct Tree {
    /// What concerns the session, of all members.
    session: Options,
    common: Arc<Common>,
    window: Option<Arc<dyn DaxWindow>>,
    state: RwLock<State>,
}

struct State {
    directories: Directories,
    /// By index: those in the tree, and removed ones that the guest still knows.
    members: HashMap<u32, Arc<Member>>,
    /// The index of the next one.
    next: u32,
}

/// What there is to say of a member.
#[derive(Clone)]
pub struct MemberInfo {
    /// Where it is in the tree, or was.
    pub path: String,
    /// The host's directory.
    pub directory: PathBuf,
    /// Nothing may be changed through it.
    pub read_only: bool,
    /// It is in the tree no more, and the guest still knows something of it.
    pub removed: bool,
    /// How many files of it the guest knows.
    pub nodes: usize,
    /// How many files and directories of it the guest has open.
    pub open: usize,
    /// What was counted of its requests: all that are about its nodes, but for FORGET and for waiting for locks.
    pub counters: Arc<Counters>,
}

/// What became of a member that was removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removed {
    /// Nothing of it is left.
    Gone,
    /// The guest knows so many files of it, and has so many open. It goes when that is over.
    InUse {
        /// Known files.
        nodes: usize,
        /// Open files and directories.
        open: usize,
    },
}

impl Tree {
    /// An empty tree.
    ///
    /// Of `session` counts what concerns a whole session and so all members: `dax` and `window`, `acl`, `locks`,
    /// `switch_identity`, `trust_file_systems`, and all limits, which are those of the members together. With `read_only`, all members
    /// are. `window` is the session's.
    pub fn new(session: Options, window: Option<Arc<dyn DaxWindow>>) -> Self {
        let common = Common::new(&session);
        let state = State { directories: Directories::new(), members: HashMap::new(), next: 1 };
        Self { session, common, window, state: RwLock::new(state) }
    }

    /// Puts a directory of the host's into the tree at `path`, with the directories that lead there. The guest
    /// sees it as soon as it looks.
    ///
    /// # Errors
    ///
    /// [`TreeError`]: the tree is as it was.
    pub fn add(&self, path: &str, mut options: Options) -> Result<(), TreeError> {
        let names = parse(path)?;
        self.check_options(&options)?;
        options.read_only |= self.session.read_only;
        options.window = self.session.window;
        options.switch_identity = self.session.switch_identity;
        options.trust_file_systems = self.session.trust_file_systems;
        options.max_locks = self.session.max_locks;
        options.max_handles = self.session.max_handles;
        let index = {
            let mut state = write(&self.state);
            // Before the host is asked, and once more after.
            state.directories.check_free(&names)?;
            if state.members.len() >= MOST_MEMBERS {
                return Err(TreeError::Full);
            }
            let index = state.next;
            if index >= INDEXES {
                return Err(TreeError::UsedUp);
            }
            state.next += 1;
            index
        };
        // Not under the lock: the directory may be a network away.
        let share = Share::among(&self.common, index, options)
            .map_err(|error| TreeError::Host(error.to_string()))?;
        let path = format!("/{}", names.join("/"));
        let member = Arc::new(Member::new(index, path, share, self.window.clone()));
        let mut state = write(&self.state);
        if state.members.len() >= MOST_MEMBERS {
            return Err(TreeError::Full);
        }
        state.directories.insert(&names, index)?;
        state.members.insert(index, member);
        Ok(())
    }

    /// What cannot be another for one member than for the session.
    fn check_options(&self, options: &Options) -> Result<(), TreeError> {
        let session = &self.session;
        if options.writeback {
            return Err(TreeError::Differs("writeback"));
        }
        if options.acl && !session.acl {
            return Err(TreeError::Differs("acl"));
        }
        if options.locks != session.locks {
            return Err(TreeError::Differs("locks="));
        }
        // A guest that maps all files does not ask which.
        let fewer = options.dax == DaxPolicy::Never && session.dax == DaxPolicy::Inode;
        if options.dax != session.dax && !fewer {
            return Err(TreeError::Differs("dax="));
        }
        // Where the guest may map, it may also map what is not marked.
        if options.direct == DirectPolicy::Host && session.dax != DaxPolicy::Never {
            return Err(TreeError::Differs("direct=host"));
        }
        Ok(())
    }

    /// Takes a member out of the tree. Its name is gone when this returns.
    ///
    /// What the guest knows of it goes on to work until the guest lets go of it. With `force` it ends now: node
    /// ids are stale, handles are bad ones, locks are given up, and zeros that are the guest's own stand where
    /// files were mapped. `force` also ends what is left of members that were at the path before.
    ///
    /// # Errors
    ///
    /// [`TreeError::Missing`]; [`TreeError::Serving`] when requests that were being served have not ended in time.
    pub fn remove(&self, path: &str, force: bool) -> Result<Removed, TreeError> {
        let names = parse(path)?;
        let path = format!("/{}", names.join("/"));
        let (index, mut doomed) = {
            let mut state = write(&self.state);
            let index = state.directories.remove(&names);
            let left: Vec<u32> = state
                .members
                .values()
                .filter(|member| force && member.is_removed() && member.path == path)
                .map(|member| member.index)
                .collect();
            if index.is_none() && left.is_empty() {
                return Err(TreeError::Missing { path, there: state.paths() });
            }
            let doomed: Vec<_> =
                left.iter().filter_map(|index| state.members.remove(index)).collect();
            (index, doomed)
        };
        if let Some(index) = index {
            let Some(member) = read(&self.state).members.get(&index).cloned() else {
                return Ok(Removed::Gone);
            };
            member.remove();
            let in_use = Removed::InUse {
                nodes: member.share.live_inodes(),
                open: member.share.live_handles(),
            };
            if !force && !self.drop_unused(&member) {
                return Ok(in_use);
            }
            doomed.extend(write(&self.state).members.remove(&index));
        }
        let mut left = Vec::new();
        for member in doomed {
            // Who finds it from now on is a request that was being served already.
            member.end();
            left.push(member.watch());
        }
        let since = Instant::now();
        while left.iter().any(|gone| gone.strong_count() > 0) {
            if since.elapsed() > PATIENCE {
                return Err(TreeError::Serving(path));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(Removed::Gone)
    }

    /// Lets go of a removed member that the guest knows nothing of, and says whether it is one.
    fn drop_unused(&self, member: &Member) -> bool {
        if !member.is_removed() || member.is_known() {
            return false;
        }
        let dropped = write(&self.state).members.remove(&member.index);
        // Closes descriptors, outside the lock.
        drop(dropped);
        true
    }

    /// Switches a member to read-only, or back.
    ///
    /// When this returns, and until it is switched back, nothing on the host is changed through the member any
    /// more: changes that were being served have ended, all further ones answer `EROFS`, and ranges of the window
    /// that could be written to show the file as before, but what the guest stores there is its own and in no
    /// file, and FSYNC of such a file answers `EROFS`. Switched back, they show the file again, and what was stored meanwhile is lost. Idempotent.
    ///
    /// # Errors
    ///
    /// [`TreeError::Missing`]; [`TreeError::AllReadOnly`]; [`TreeError::Changing`] when changes that were being
    /// served have not ended in time. The member is read-only for all others then. [`TreeError::Mapped`] when the
    /// host has no memory to take what is mapped from the guest: it is read-only but for that.
    pub fn set_read_only(&self, path: &str, read_only: bool) -> Result<(), TreeError> {
        let names = parse(path)?;
        let member = {
            let state = read(&self.state);
            let found = state.directories.find(&names);
            let member = found.and_then(|index| state.members.get(&index)).cloned();
            member.ok_or_else(|| TreeError::Missing {
                path: format!("/{}", names.join("/")),
                there: state.paths(),
            })?
        };
        if self.session.read_only && !read_only {
            return Err(TreeError::AllReadOnly);
        }
        let _one = lock(&member.switching);
        let changing = match read_only {
            true => member.share.close_to_changes(PATIENCE),
            false => {
                member.share.open_to_changes();
                0
            }
        };
        if let Some(window) = &self.window {
            let switched = window.set_writable(member.index, !read_only);
            switched.map_err(|error| TreeError::Mapped {
                path: member.path.clone(),
                why: error.to_string(),
            })?;
        }
        match changing {
            0 => Ok(()),
            count => Err(TreeError::Changing { path: member.path.clone(), count }),
        }
    }

    /// All members, those in the tree first, by path.
    pub fn list(&self) -> Vec<MemberInfo> {
        let members: Vec<_> = read(&self.state).members.values().cloned().collect();
        let mut list: Vec<_> = members.iter().map(|member| member.info()).collect();
        list.sort_by(|a, b| (a.removed, &a.path).cmp(&(b.removed, &b.path)));
        list
    }

    /// The member of a node id.
    ///
    /// # Errors
    ///
    /// `ESTALE` for one that is gone, `ENOENT` for one that never was.
    fn member(&self, nodeid: u64) -> Result<Arc<Member>, Errno> {
        let index = (nodeid >> NUMBER_BITS) as u32;
        let state = read(&self.state);
        match state.members.get(&index) {
            Some(member) => Ok(member.clone()),
            None if index < state.next => Err(Errno::STALE),
            None => Err(Errno::NOENT),
        }
    }
}

impl State {
    /// Where members are.
    fn paths(&self) -> Vec<String> {
        let there = self.members.values().filter(|member| !member.is_removed());
        let mut paths: Vec<_> = there.map(|member| member.path.clone()).collect();
        paths.sort();
        paths
    }
}

#[cfg(test)]
mod tests;
