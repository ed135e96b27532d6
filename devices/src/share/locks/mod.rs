//! Locks that hold between this guest, other guests and the processes of the host.
//!
//! The guest keeps no locks itself (`POSIX_LOCKS` and `FLOCK_LOCKS` are negotiated): each one that a process
//! there sets, tests or gives up comes here and is set on the host's file.
//!
//! - A lock of **flock(2)** belongs to an open file, in the guest as on the host. It is set on the descriptor
//!   of the guest's handle, and goes with it.
//! - A **POSIX lock** (fcntl(2), lockf(3)) belongs to an owner, which is a process of the guest and a number
//!   to us. For each owner on each file there is an open file description of its own, and its locks are
//!   `F_OFD` locks of that. So owners are against each other, against the other guests and against every lock
//!   of the host's processes, and closing another descriptor of the same file takes no lock away.
//! - The guest's own `F_OFD` locks come as POSIX locks whose owner is the open file. The guest says nothing
//!   when such an owner is gone, so locks also go with the handle through which their owner last set one.
//!   For a process's locks that never comes too early: a process that closes a file gives all its locks on it
//!   up before (FLUSH).
//!
//! The host does not look for deadlocks among such locks, as it does among those of processes; among the owners of
//! one guest it is done here.
//!
//! Bounded are the descriptions, the records of locks that the host keeps, and the threads that wait. Above,
//! the answer is `ENOLCK`.

mod deadlock;
mod ranges;
mod sys;
mod wait;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use rustix::fs::{FlockOperation, OFlags, flock};

use super::Share;
use super::budget::{Budget, Permit};
use super::common::Common;
use super::handle::{Handle, OpenFile};
use super::options::LockPolicy;
use crate::fuse::abi::{FileLock, FlushIn, LK_FLOCK, LkIn, RELEASE_FLOCK_UNLOCK, ReleaseIn};
use crate::fuse::{Caller, Errno, LockReply, Result, Wait};
use crate::kick;
use crate::sync::lock;
use deadlock::{Waiting, Waits};
use ranges::{Change, Kind, Ranges, Span};

/// Whose locks: a node, and a number that the guest gave its process or open file.
type OwnerKey = (u64, u64);

/// An open file description that carries locks.
struct Description {
    fd: OwnedFd,
    /// It may carry locks of [`Kind::Write`].
    writable: bool,
    /// Its place among the descriptors of the share.
    _permit: Permit,
}

impl AsFd for Description {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// One owner of locks on one file.
struct Owner {
    /// Locked while a lock is set, never while one is waited for.
    state: Mutex<OwnerState>,
}

struct OwnerState {
    description: Arc<Description>,
    /// What the description has locked.
    ranges: Ranges,
    /// The process in the guest that set a lock last.
    pid: u32,
    /// The handle through which it did.
    fh: u64,
    /// Requests that wait to set a lock.
    waiters: usize,
    /// It was taken out of the table, or is about to be: sets no more locks.
    closed: bool,
}

struct Table {
    owners: BTreeMap<OwnerKey, Arc<Owner>>,
    /// Counts how often all owners were dropped.
    generation: u64,
}

/// The POSIX locks of a share's guest.
pub(super) struct Locks {
    table: Mutex<Table>,
    /// How many owners are in the table, so that closing a file need not look where there are none.
    count: AtomicUsize,
    most_owners: usize,
    /// Records of locks that the host may still keep.
    records: Arc<Budget>,
    /// Requests that may still wait.
    waiters: Arc<Budget>,
    /// What POSIX locks are waited for.
    waits: Arc<Waits>,
}

impl Locks {
    /// Those of a share, for at most so many owners.
    ///
    /// # Errors
    ///
    /// The host's, when a signal cannot be given a handler.
    pub(super) fn new(policy: LockPolicy, most_owners: usize, common: &Common) -> io::Result<Self> {
        if policy == LockPolicy::Host {
            kick::prepare()?;
        }
        Ok(Self {
            table: Mutex::new(Table { owners: BTreeMap::new(), generation: 0 }),
            count: AtomicUsize::new(0),
            most_owners,
            records: common.lock_records.clone(),
            waiters: common.lock_waiters.clone(),
            waits: Arc::default(),
        })
    }

    /// How many requests wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiters.used()
    }

    /// How many owners there are: each holds a file descriptor.
    pub(super) fn owners(&self) -> usize {
        self.count.load(Ordering::Acquire)
    }

    fn generation(&self) -> u64 {
        lock(&self.table).generation
    }

    fn find(&self, key: OwnerKey) -> Option<Arc<Owner>> {
        lock(&self.table).owners.get(&key).cloned()
    }

    /// The owner `key`, made with a description from `open` if it is not there.
    ///
    /// # Errors
    ///
    /// `ENOLCK` when there are too many owners; `EBADF` when all were dropped since `generation`; the host's.
    fn find_or_add(
        &self,
        key: OwnerKey,
        generation: u64,
        open: impl FnOnce() -> Result<Description>,
    ) -> Result<Arc<Owner>> {
        if let Some(owner) = self.find(key) {
            return Ok(owner);
        }
        // Outside the lock: the host may take its time.
        let owner = Arc::new(Owner {
            state: Mutex::new(OwnerState {
                description: Arc::new(open()?),
                ranges: Ranges::default(),
                pid: 0,
                fh: 0,
                waiters: 0,
                closed: false,
            }),
        });
        let mut unused = Vec::new();
        let mut table = lock(&self.table);
        if table.generation != generation {
            return Err(Errno::BADF);
        }
        // Another thread may have been quicker.
        if let Some(other) = table.owners.get(&key) {
            return Ok(other.clone());
        }
        if table.owners.len() >= self.most_owners {
            unused = table.take_unused();
        }
        let result = if table.owners.len() < self.most_owners {
            table.owners.insert(key, owner.clone());
            Ok(owner)
        } else {
            Err(Errno::NOLCK)
        };
        self.count.store(table.owners.len(), Ordering::Release);
        drop(table);
        // Closes descriptors, outside the lock.
        drop(unused);
        result
    }

    /// Takes an owner that is closed out of the table.
    fn remove(&self, key: OwnerKey, owner: &Arc<Owner>) {
        let mut table = lock(&self.table);
        if table.owners.get(&key).is_some_and(|other| Arc::ptr_eq(other, owner)) {
            table.owners.remove(&key);
            self.count.store(table.owners.len(), Ordering::Release);
        }
    }

    /// The owners of locks on a node. Outside the lock of the table: each may be busy with the host.
    fn of_node(&self, nodeid: u64) -> Vec<(OwnerKey, Arc<Owner>)> {
        if self.owners() == 0 {
            return Vec::new();
        }
        let table = lock(&self.table);
        let range = table.owners.range((nodeid, 0)..=(nodeid, u64::MAX));
        range.map(|(key, owner)| (*key, owner.clone())).collect()
    }

    /// Gives up all locks of the owners of `nodeid` that `which` picks. With `waiters_stay`, those who wait for
    /// a lock still get it.
    fn drop_owners(
        &self,
        nodeid: u64,
        waiters_stay: bool,
        which: impl Fn(OwnerKey, &OwnerState) -> bool,
    ) {
        for (key, owner) in self.of_node(nodeid) {
            let closed = {
                let mut state = lock(&owner.state);
                if !which(key, &state) {
                    continue;
                }
                state.unlock_all(&self.records);
                state.closed = state.waiters == 0 || !waiters_stay;
                state.closed
            };
            if closed {
                self.remove(key, &owner);
            }
        }
    }

    /// The node is forgotten.
    pub(super) fn forget(&self, nodeid: u64) {
        self.drop_owners(nodeid, false, |_, _| true);
    }

    /// The session is over: gives up all locks. The handles are gone already.
    pub(super) fn clear(&self) {
        let owners = {
            let mut table = lock(&self.table);
            table.generation = table.generation.wrapping_add(1);
            self.count.store(0, Ordering::Release);
            std::mem::take(&mut table.owners)
        };
        for owner in owners.values() {
            let mut state = lock(&owner.state);
            state.unlock_all(&self.records);
            state.closed = true;
        }
    }

    /// The guest's process that has just this lock on a node, `except` for one owner.
    fn holder(&self, nodeid: u64, held: Span, except: Option<OwnerKey>) -> Option<u32> {
        self.of_node(nodeid).into_iter().find_map(|(key, owner)| {
            if Some(key) == except {
                return None;
            }
            let state = lock(&owner.state);
            state.ranges.iter().any(|span| *span == held).then_some(state.pid)
        })
    }
}

impl Table {
    /// Closes the owners that have no lock now, and takes them out.
    fn take_unused(&mut self) -> Vec<Arc<Owner>> {
        let mut taken = Vec::new();
        self.owners.retain(|_, owner| {
            // One that is busy is being used.
            let Ok(mut state) = owner.state.try_lock() else {
                return true;
            };
            if state.ranges.is_empty() && state.waiters == 0 {
                state.closed = true;
                taken.push(owner.clone());
            }
            !state.closed
        });
        taken
    }
}

impl OwnerState {
    /// Sets a lock without waiting. `permit` is for the records that it takes.
    ///
    /// # Errors
    ///
    /// `EAGAIN`; `ENOLCK` when there are too many records; the host's.
    fn set(&mut self, span: Span, permit: &mut Permit) -> Result<()> {
        let change = self.ranges.plan(span);
        let (more, fewer) = (change.more(), change.fewer());
        permit.spend(more)?;
        if let Err(errno) = sys::set(self.description.as_fd(), span) {
            permit.take_back(more);
            return Err(errno);
        }
        permit.take_back(fewer);
        self.ranges.apply(change);
        Ok(())
    }

    fn unlock_all(&mut self, records: &Budget) {
        if let Err(errno) = sys::set(self.description.as_fd(), Span::NOTHING) {
            log::error!("locks are not given up before their file is closed: {errno}");
        }
        records.give_back(self.ranges.len());
        self.ranges = Ranges::default();
    }

    /// Moves the locks, which are all of [`Kind::Read`], to a description that may carry others. They hold at
    /// every moment.
    fn upgrade(&mut self, description: Description) -> Result<()> {
        for span in self.ranges.iter() {
            sys::set(description.as_fd(), *span)?;
        }
        let old = std::mem::replace(&mut self.description, Arc::new(description));
        // Somebody may hold it who waits.
        sys::set(old.as_fd(), Span::NOTHING)
    }
}

/// A request that waits for a POSIX lock.
struct Waiter {
    owner: Arc<Owner>,
    span: Span,
    /// For the records that the lock may take: it must not fail when it was granted.
    records: Permit,
    /// None until it is known that it may wait.
    waiting: Option<Waiting>,
    _place: Permit,
}

impl Waiter {
    fn attempt(&mut self) -> Result<()> {
        let description = lock(&self.owner.state).description.clone();
        sys::wait(description.as_fd(), self.span)?;
        // The host has granted it. Since then the owner may have given up everything, or may have got another
        // description. So it is set once more, which changes nothing where nothing has changed.
        let mut state = lock(&self.owner.state);
        if state.closed || !Arc::ptr_eq(&description, &state.description) {
            sys::set(description.as_fd(), Span { kind: None, ..self.span })?;
        }
        if state.closed {
            return Err(Errno::BADF);
        }
        state.set(self.span, &mut self.records)
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        lock(&self.owner.state).waiters -= 1;
    }
}

impl Share {
    /// SETLK, and with `wait` SETLKW.
    pub(super) fn lock_file(
        &self,
        caller: Caller,
        request: &LkIn,
        wait: Option<Wait<'_>>,
    ) -> Result<LockReply> {
        self.check_locks()?;
        // Before the handle is found, so that a session that ends meanwhile leaves no lock behind.
        let generation = self.locks.generation();
        let span = Span::of(&request.lk)?;
        let handle = self.handles.get(caller.nodeid, request.fh)?;
        let file = handle.file()?;
        match request.lk_flags {
            0 => {}
            LK_FLOCK => return self.lock_whole(handle, span.kind, wait),
            _ => return Err(Errno::INVAL),
        }
        // Of a descriptor that cannot write no process has such a lock (fcntl(2)). So a read-only share has
        // none at all.
        if span.kind == Some(Kind::Write) && !file.writable {
            return Err(Errno::BADF);
        }
        let key = (caller.nodeid, request.owner);
        loop {
            let owner = match span.kind {
                Some(_) => self.locks.find_or_add(key, generation, || self.describe(file))?,
                None => match self.locks.find(key) {
                    Some(owner) => owner,
                    None => return Ok(LockReply::Done),
                },
            };
            let mut state = lock(&owner.state);
            if state.closed {
                drop(state);
                self.locks.remove(key, &owner);
                continue;
            }
            if span.kind.is_some() {
                (state.pid, state.fh) = (request.lk.pid, request.fh);
            }
            if span.kind == Some(Kind::Write) && !state.description.writable {
                state.upgrade(self.describe(file)?)?;
            }
            let mut records = self.locks.records.take(0)?;
            return match (state.set(span, &mut records), wait) {
                (Ok(()), _) => Ok(LockReply::Done),
                (Err(Errno::AGAIN), Some(wait)) => {
                    let place = self.locks.waiters.take(1)?;
                    let records = self.locks.records.take(Change::MOST)?;
                    state.waiters += 1;
                    drop(state);
                    let mut waiter = Waiter { owner, span, records, waiting: None, _place: place };
                    waiter.waiting = Some(self.locks.begin_waiting(key, span)?);
                    wait::start(wait, move || waiter.attempt())
                }
                (Err(errno), _) => Err(errno),
            };
        }
    }

    /// A lock of flock(2). Its owner is the handle.
    fn lock_whole(
        &self,
        handle: Arc<Handle>,
        kind: Option<Kind>,
        wait: Option<Wait<'_>>,
    ) -> Result<LockReply> {
        let (now, later) = match kind {
            Some(Kind::Read) => (FlockOperation::NonBlockingLockShared, FlockOperation::LockShared),
            Some(Kind::Write) => {
                (FlockOperation::NonBlockingLockExclusive, FlockOperation::LockExclusive)
            }
            None => (FlockOperation::NonBlockingUnlock, FlockOperation::Unlock),
        };
        match (flock(&*handle, now).map_err(Errno::from), wait) {
            (Ok(()), _) => Ok(LockReply::Done),
            (Err(Errno::AGAIN), Some(wait)) => {
                let place = self.locks.waiters.take(1)?;
                wait::start(wait, move || {
                    let _place = &place;
                    flock(&*handle, later)?;
                    // Given up with the handle, as soon as this request has ended.
                    if handle.is_closed() { Err(Errno::BADF) } else { Ok(()) }
                })
            }
            (Err(errno), _) => Err(errno),
        }
    }

    /// GETLK.
    pub(super) fn test_lock(&self, caller: Caller, request: &LkIn) -> Result<FileLock> {
        self.check_locks()?;
        let span = Span::of(&request.lk)?;
        let handle = self.handles.get(caller.nodeid, request.fh)?;
        let file = handle.file()?;
        if request.lk_flags != 0 {
            return Err(Errno::INVAL);
        }
        let key = (caller.nodeid, request.owner);
        // Without a description of its own the owner has no lock, and nor has the handle's descriptor.
        let found = match self.locks.find(key) {
            Some(owner) => {
                let description = lock(&owner.state).description.clone();
                sys::test(description.as_fd(), span)?
            }
            None => sys::test(file.fd.as_fd(), span)?,
        };
        Ok(match found {
            None => Span { kind: None, ..span }.to_lock(0),
            // The host's processes have no number in the guest.
            Some((held, Some(_))) => held.to_lock(0),
            Some((held, None)) => {
                // Asked for no lock at all, the host tells of the owner's own (Linux 6.6).
                let except = span.kind.map(|_| key);
                held.to_lock(self.locks.holder(caller.nodeid, held, except).unwrap_or(0))
            }
        })
    }

    /// FLUSH: a process has closed a descriptor of the file, and with it all its locks there are gone.
    pub(super) fn drop_locks(&self, caller: Caller, request: &FlushIn) -> Result<()> {
        self.handles.get(caller.nodeid, request.fh)?.file()?;
        self.locks.drop_owners(caller.nodeid, true, |(_, owner), _| owner == request.lock_owner);
        Ok(())
    }

    /// RELEASE: nobody has the file open through this handle any more.
    ///
    /// The guest does not ask twice: the handle is closed, whatever the host says.
    pub(super) fn release_file(&self, caller: Caller, request: &ReleaseIn) -> Result<()> {
        if caller.at_once {
            // Locks that go with it are looked for among those of all files.
            if self.locks.count.load(Ordering::Relaxed) > 0 {
                return Err(Errno::WOULD_WAIT);
            }
            let handle = self.handles.get(caller.nodeid, request.fh)?;
            self.check_close_at_once(&handle)?;
        }
        let mut unlocked = Ok(());
        if request.release_flags & RELEASE_FLOCK_UNLOCK != 0
            && let Ok(handle) = self.handles.get(caller.nodeid, request.fh)
            && let Ok(file) = handle.file()
        {
            // At once, also where a request still holds the handle.
            unlocked = flock(&file.fd, FlockOperation::Unlock);
        }
        self.handles.close(caller.nodeid, request.fh, |handle| handle.file().is_ok())?;
        self.locks.drop_owners(caller.nodeid, false, |_, state| state.fh == request.fh);
        if let Some(mapped) = &self.mapped {
            mapped.closed(caller.nodeid);
        }
        Ok(unlocked?)
    }

    /// Opens a file once more, to carry the locks of one owner. It is opened for no more than the guest has
    /// it open for: on the host, opening for writing is something that others notice.
    fn describe(&self, file: &OpenFile) -> Result<Description> {
        let permit = self.descriptors.take(1).map_err(|_| Errno::NOLCK)?;
        let reopen = |flags| self.host.reopen(&file.fd, flags);
        let opened = if file.writable {
            // A file that the process may only write can still carry locks of that kind.
            reopen(OFlags::RDWR).or_else(|errno| reopen(OFlags::WRONLY).map_err(|_| errno))
        } else {
            reopen(OFlags::RDONLY)
        };
        match opened {
            Ok(fd) => Ok(Description { fd, writable: file.writable, _permit: permit }),
            Err(Errno::MFILE | Errno::NFILE) => Err(Errno::NOLCK),
            Err(errno) => Err(errno),
        }
    }

    fn check_locks(&self) -> Result<()> {
        match self.options.locks {
            LockPolicy::Host => Ok(()),
            LockPolicy::Guest => Err(Errno::NOSYS),
        }
    }
}
