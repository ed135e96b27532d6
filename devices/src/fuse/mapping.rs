//! SETUPMAPPING and REMOVEMAPPING (virtio 1.3, section 5.11.6.4): files in the DAX window.
//!
//! What the Linux guest does (fs/fuse/dax.c): always 2 MiB at a time, by node id with `fh = -1`, often past
//! the end of the file; a read-only range becomes writable by a second SETUPMAPPING over it; an unmount takes
//! nothing away, so the session does.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use smallvec::SmallVec;

use super::abi::{
    RemovemappingIn, RemovemappingOne, SETUPMAPPING_READ, SETUPMAPPING_WRITE, SetupmappingIn,
};
use super::counters::Counters;
use super::errno::{Errno, Result};
use super::filesystem::{Caller, FileSystem, Placement};
use super::request::Decoder;
use crate::dax::DaxWindow;

/// Granularity of offsets and lengths, in bytes: that which INIT names as `map_alignment`.
const PAGE: u64 = 4096;

/// The longest range that is mapped or taken away at once, in bytes: what the Linux guest asks for.
const LONGEST_AT_ONCE: u64 = 2 << 20;

/// So many ranges are taken away at once.
const REMOVED_AT_ONCE: u32 = 16;

/// # Errors
///
/// [`Errno::WOULD_WAIT`] for a range that is too long for who must not wait.
fn check_len(at_once: bool, len: u64) -> Result<()> {
    if at_once && len > LONGEST_AT_ONCE { Err(Errno::WOULD_WAIT) } else { Ok(()) }
}

/// What was mapped by one SETUPMAPPING, remembered for the counters.
struct Mapped {
    len: u64,
    nodeid: u64,
    foffset: u64,
    writable: bool,
}

#[derive(Default)]
struct State {
    /// Goes up when a session begins or ends. A request that was under way then maps nothing any more.
    epoch: u64,
    /// By offset in the window. Never more than one entry a page of the window.
    live: BTreeMap<u64, Mapped>,
    /// For each node and kind of access that is mapped, where in the window it was mapped last; not for all, when
    /// some of its ranges went.
    latest: HashMap<(u64, bool), u64>,
}

impl State {
    /// Remembers what was mapped, and says whether that made a read-only range writable.
    fn note(&mut self, nodeid: u64, request: &SetupmappingIn, end: u64, writable: bool) -> bool {
        let upgrade = self.live.get(&request.moffset).is_some_and(|before| {
            writable
                && !before.writable
                && before.len == request.len
                && before.nodeid == nodeid
                && before.foffset == request.foffset
        });
        self.drop_range(request.moffset, end);
        let mapped = Mapped { len: request.len, nodeid, foffset: request.foffset, writable };
        self.live.insert(request.moffset, mapped);
        self.latest.insert((nodeid, writable), request.moffset);
        upgrade
    }

    fn drop_range(&mut self, from: u64, to: u64) {
        while let Some((at, _)) = self.live.range(from..to).next() {
            let at = *at;
            let Some(gone) = self.live.remove(&at) else { continue };
            let key = (gone.nodeid, gone.writable);
            if self.latest.get(&key) == Some(&at) {
                self.latest.remove(&key);
            }
        }
    }
}

/// The window of a session.
pub(super) struct Mappings {
    window: Arc<dyn DaxWindow>,
    // Held while the window changes, so that nothing is mapped behind a `clear`. Taken last: no other lock
    // is taken under it but the window's own.
    state: Mutex<State>,
}

impl Mappings {
    pub(super) fn new(window: Arc<dyn DaxWindow>) -> Self {
        Self { window, state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes everything away. The file system's nodes are gone already: whoever finds the epoch of after
    /// this call can open none of them.
    pub(super) fn clear(&self) {
        let mut state = self.state();
        state.epoch += 1;
        state.live.clear();
        state.latest.clear();
        self.window.clear();
    }

    /// See [`DaxWindow::asks_the_host`].
    pub(super) fn asks_the_host(&self) -> bool {
        self.window.asks_the_host()
    }

    /// See [`DaxWindow::file_may_have_grown`].
    pub(super) fn file_may_have_grown(&self) {
        self.window.file_may_have_grown();
    }

    /// A range of the guest's, checked: whole pages, not empty, inside the window. Its end.
    fn check(&self, offset: u64, len: u64) -> Result<u64> {
        let end = offset.checked_add(len).ok_or(Errno::INVAL)?;
        let whole = offset.is_multiple_of(PAGE) && len.is_multiple_of(PAGE);
        if len == 0 || !whole || end > self.window.size() {
            return Err(Errno::INVAL);
        }
        Ok(end)
    }

    /// What there is to say of the window in numbers, by name.
    pub(super) fn statistics(&self) -> [(&'static str, u64); 5] {
        let of = self.window.statistics();
        [
            ("dax_live", of.mappings),
            ("dax_mapped_bytes", of.mapped_bytes),
            ("dax_repairs", of.repairs),
            ("dax_prefaulted", of.prefaulted),
            ("dax_prefaulted_bytes", of.prefaulted_bytes),
        ]
    }

    /// SETUPMAPPING.
    pub(super) fn setup(
        &self,
        fs: &dyn FileSystem,
        caller: Caller,
        request: &SetupmappingIn,
        counters: &Counters,
    ) -> Result<()> {
        self.map(fs, caller, request, counters).inspect_err(|errno| counters.refuse_mapping(*errno))
    }

    fn map(
        &self,
        fs: &dyn FileSystem,
        caller: Caller,
        request: &SetupmappingIn,
        counters: &Counters,
    ) -> Result<()> {
        let writable = match request.flags {
            SETUPMAPPING_READ => false,
            flags if flags == SETUPMAPPING_READ | SETUPMAPPING_WRITE => true,
            _ => return Err(Errno::INVAL),
        };
        let end = self.check(request.moffset, request.len)?;
        check_len(caller.at_once, request.len)?;
        let file_end = request.foffset.checked_add(request.len);
        if !request.foffset.is_multiple_of(PAGE)
            || file_end.is_none_or(|file_end| file_end > i64::MAX as u64)
        {
            return Err(Errno::INVAL);
        }
        // Before the file is opened, see `clear`.
        let epoch = self.state().epoch;
        let nodeid = caller.nodeid;
        let mut place =
            Place { mappings: self, nodeid, request, end, writable, epoch, upgrade: false };
        fs.map(caller, writable, &mut place)?;
        let upgrade = place.upgrade;
        // Not under the lock: it may take a while, and other ranges need not wait for that.
        self.window.mapped(request.moffset);
        Counters::add(&counters.dax_setups, 1);
        Counters::add(&counters.dax_upgrades, usize::from(upgrade));
        Ok(())
    }

    /// REMOVEMAPPING: every range is checked before any is taken away.
    pub(super) fn remove(
        &self,
        decoder: &mut Decoder<'_>,
        counters: &Counters,
        at_once: bool,
    ) -> Result<()> {
        let count = decoder.take::<RemovemappingIn>()?.count;
        if at_once && count > REMOVED_AT_ONCE {
            return Err(Errno::WOULD_WAIT);
        }
        let mut ranges: SmallVec<[RemovemappingOne; 16]> = SmallVec::new();
        if count == 0 {
            return Err(Errno::INVAL);
        }
        for _ in 0..count {
            // Ends at the end of the body at the latest, whatever the count says.
            let one: RemovemappingOne = decoder.take()?;
            self.check(one.moffset, one.len)?;
            check_len(at_once, one.len)?;
            ranges.push(one);
        }
        let mut state = self.state();
        for one in &ranges {
            self.window.unmap(one.moffset, one.len)?;
            // `check` saw that this does not wrap.
            let end = one.moffset.saturating_add(one.len);
            state.drop_range(one.moffset, end);
        }
        drop(state);
        Counters::add(&counters.dax_removes, ranges.len());
        Ok(())
    }
}

/// Where one SETUPMAPPING maps.
struct Place<'p> {
    mappings: &'p Mappings,
    nodeid: u64,
    /// Checked.
    request: &'p SetupmappingIn,
    /// Of the range in the window.
    end: u64,
    writable: bool,
    epoch: u64,
    /// It made a read-only range writable.
    upgrade: bool,
}

impl Place<'_> {
    /// Opening may block (a network file system), so it is done outside the lock. What is asked of the host under it
    /// is about a file that was just opened: `fstat`, and for a new one a trial `mmap`.
    fn map(
        &mut self,
        state: &mut State,
        map: impl FnOnce(&dyn DaxWindow) -> io::Result<()>,
    ) -> Result<()> {
        if state.epoch != self.epoch {
            return Err(Errno::IO);
        }
        map(&*self.mappings.window)?;
        self.upgrade = state.note(self.nodeid, self.request, self.end, self.writable);
        Ok(())
    }
}

impl Placement for Place<'_> {
    fn file(&mut self, file: BorrowedFd<'_>, owner: u32) -> Result<()> {
        let &SetupmappingIn { moffset, len, foffset, .. } = self.request;
        let writable = self.writable;
        self.map(&mut self.mappings.state(), |window| {
            window.map_for(owner, moffset, len, file, foffset, writable)
        })
    }

    fn more(&mut self, owner: u32) -> Option<Result<()>> {
        let &SetupmappingIn { moffset, len, foffset, .. } = self.request;
        let mut state = self.mappings.state();
        let like = *state.latest.get(&(self.nodeid, self.writable))?;
        let mut known = true;
        let writable = self.writable;
        let mapped = self.map(&mut state, |window| {
            let mapped = window.map_like(like, owner, moffset, len, foffset, writable);
            known = mapped.is_some();
            // Not told to anybody.
            mapped.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()))
        });
        known.then_some(mapped)
    }
}
