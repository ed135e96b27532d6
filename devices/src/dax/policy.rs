//! Which files a guest maps, where that is for the host to decide (`dax=inode`).
//!
//! A window that is smaller than what is read through it is slower than no window: every miss then costs a
//! mapping that is taken from another file. So files are promised a place as long as there is room for all of
//! each. Those without are read through the guest's page cache, as without DAX.

use std::collections::{BTreeMap, HashMap};
use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::window::ALIGNMENT;

/// Files up to this size in bytes are read: one READ brings such a file whole (it is what Linux reads ahead),
/// which is never dearer than a SETUPMAPPING and the REMOVEMAPPING to come, and leaves a range of 2 MiB to a
/// file that fills it.
const SMALL: u64 = 128 << 10;

/// The part of the window in percent that the Linux guest keeps free by taking ranges back
/// (`FUSE_DAX_RECLAIM_THRESHOLD`). What is promised leaves it alone, so that nothing is taken back.
const KEPT_FREE: u64 = 20;

/// How long a file that was looked up and not opened keeps its place. Whoever opens it later finds it as it
/// was told, which costs time and nothing else if others have its place.
const PROMISE: Duration = Duration::from_secs(10);

/// Why a file is not mapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Refusal {
    /// It is cheaper to read.
    Small,
    /// It does not fit the window.
    Large,
    /// Other files have the room.
    Pressure,
}

#[derive(Default)]
struct Node {
    /// How often the guest has it open.
    opens: u64,
    /// Ranges that are kept for it; 0: it is not mapped.
    ranges: u64,
    /// While nobody has it open, but ranges are kept for it: its place in [`State::idle`].
    turn: u64,
    /// When it was last looked up without having been opened since.
    promised: Option<Instant>,
}

#[derive(Default)]
struct State {
    /// What is open or has ranges.
    nodes: HashMap<u64, Node>,
    /// Nodes with ranges that are not open: the one that was used least lately first.
    idle: BTreeMap<u64, u64>,
    turn: u64,
    /// Ranges that are kept for all nodes.
    used: u64,
    refused: [u64; 3],
}

/// Decides for the files of one share. The answer for a node is the same, whoever asks, from one LOOKUP of it
/// to the next, and as long as the guest has it open: a guest that hears another answer drops what it knows of
/// the file once nobody uses it, and asks anew.
///
/// Ranges are those of the guest, 2 MiB each. Methods may be called from any thread with any number.
pub struct Policy {
    /// The most ranges that are promised at a time.
    most: AtomicU64,
    /// Bytes; files up to this are read.
    small: u64,
    state: Mutex<State>,
}

/// The most ranges that are promised of a window of so many.
fn most_of(all: u64) -> u64 {
    all.saturating_sub((all.saturating_mul(KEPT_FREE) / 100).max(1))
}

impl Policy {
    /// What the guest maps at a time, in bytes.
    pub const RANGE: u64 = ALIGNMENT;

    /// Ranges that a file of `size` bytes takes when it is mapped; 0 when it is read, which small ones are if
    /// `reads`.
    pub fn ranges_of(size: u64, reads: bool) -> u64 {
        if reads && size <= SMALL { 0 } else { size.div_ceil(ALIGNMENT) }
    }

    /// The least window in which so many ranges can be promised, in bytes.
    pub fn window_for(ranges: u64) -> u64 {
        let about = ranges.saturating_mul(100) / (100 - KEPT_FREE);
        // Both divisions round down.
        let mut near = about.saturating_sub(1)..about.saturating_add(3);
        let all = near.find(|all| most_of(*all) >= ranges);
        let all = all.unwrap_or(about);
        all.saturating_mul(ALIGNMENT)
    }

    /// For a window of `window` bytes. `reads` says whether the guest keeps what it has read; where it does
    /// not, small files are mapped too.
    pub fn new(window: u64, reads: bool) -> Self {
        let most = AtomicU64::new(most_of(window / ALIGNMENT));
        Self { most, small: if reads { SMALL } else { 0 }, state: Mutex::default() }
    }

    /// The guest knows now that its window has `window` bytes. What was refused a place is not looked at again
    /// before its next LOOKUP.
    pub fn window_has_grown(&self, window: u64) {
        self.most.fetch_max(most_of(window / ALIGNMENT), Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Decides at a LOOKUP, or whatever else tells the guest of a node, of which the file has `size` bytes.
    pub fn look_up(&self, nodeid: u64, size: u64) -> bool {
        self.look_up_at(nodeid, size, Instant::now())
    }

    fn look_up_at(&self, nodeid: u64, size: u64, now: Instant) -> bool {
        let mut state = self.state();
        let known = state.nodes.get(&nodeid);
        if let Some(open) = known.filter(|node| node.opens > 0) {
            return open.ranges > 0;
        }
        let before = known.map_or(0, |node| node.ranges);
        let promised = known.and_then(|node| node.promised);
        state.give_up(nodeid);
        match self.find_room(&mut state, size, now) {
            Ok(ranges) => {
                let turn = state.next_turn();
                state.idle.insert(turn, nodeid);
                state.used += ranges;
                // What is used again and again stays one that was opened.
                let promised = if before > 0 { promised.map(|_| now) } else { Some(now) };
                state.nodes.insert(nodeid, Node { opens: 0, ranges, turn, promised });
                true
            }
            Err(reason) => {
                if let Some(count) = state.refused.get_mut(reason as usize) {
                    *count += 1;
                }
                false
            }
        }
    }

    /// Ranges for a file; takes them from files that nobody uses.
    fn find_room(&self, state: &mut State, size: u64, now: Instant) -> Result<u64, Refusal> {
        if size <= self.small {
            return Err(Refusal::Small);
        }
        let ranges = size.div_ceil(ALIGNMENT);
        let most = self.most.load(Relaxed);
        if ranges > most {
            return Err(Refusal::Large);
        }
        let mut room = most.saturating_sub(state.used);
        let mut doomed = Vec::new();
        for nodeid in state.idle.values() {
            if room >= ranges {
                break;
            }
            let Some(node) = state.nodes.get(nodeid) else { continue };
            let kept = |since| now.saturating_duration_since(since) < PROMISE;
            if !node.promised.is_some_and(kept) {
                room += node.ranges;
                doomed.push(*nodeid);
            }
        }
        if room < ranges {
            return Err(Refusal::Pressure);
        }
        for nodeid in doomed {
            state.give_up(nodeid);
        }
        Ok(ranges)
    }

    /// What was decided for a node.
    pub fn is_mapped(&self, nodeid: u64) -> bool {
        self.state().nodes.get(&nodeid).is_some_and(|node| node.ranges > 0)
    }

    /// The guest has opened a node.
    pub fn opened(&self, nodeid: u64) {
        let mut state = self.state();
        let node = state.nodes.entry(nodeid).or_default();
        node.opens += 1;
        node.promised = None;
        let turn = node.turn;
        state.idle.remove(&turn);
    }

    /// The guest has closed it once.
    pub fn closed(&self, nodeid: u64) {
        let mut state = self.state();
        let next = state.next_turn();
        let Some(node) = state.nodes.get_mut(&nodeid) else { return };
        node.opens = node.opens.saturating_sub(1);
        if node.opens > 0 {
            return;
        }
        if node.ranges == 0 {
            state.nodes.remove(&nodeid);
        } else {
            let old = std::mem::replace(&mut node.turn, next);
            state.idle.remove(&old);
            state.idle.insert(next, nodeid);
        }
    }

    /// The guest knows the node no more.
    pub fn forgotten(&self, nodeid: u64) {
        self.state().give_up(nodeid);
    }

    /// The guest knows none of these nodes any more.
    pub fn all_forgotten(&self, nodes: RangeInclusive<u64>) {
        let mut state = self.state();
        let gone: Vec<u64> =
            state.nodes.keys().copied().filter(|nodeid| nodes.contains(nodeid)).collect();
        for nodeid in gone {
            state.give_up(nodeid);
        }
    }

    /// The guest knows nothing any more.
    pub fn clear(&self) {
        let mut state = self.state();
        let refused = state.refused;
        *state = State { refused, ..State::default() };
    }

    /// What there is to say in numbers, by name.
    pub fn statistics(&self) -> [(&'static str, u64); 4] {
        let state = self.state();
        let [small, large, pressure] = state.refused;
        [
            ("dax_promised_bytes", state.used * ALIGNMENT),
            ("dax_files_read_small", small),
            ("dax_files_read_large", large),
            ("dax_files_read_pressure", pressure),
        ]
    }
}

impl State {
    fn next_turn(&mut self) -> u64 {
        // From 1 on: 0 is that of a node which never had one.
        self.turn += 1;
        self.turn
    }

    /// Takes a node's ranges away and forgets it.
    fn give_up(&mut self, nodeid: u64) {
        if let Some(node) = self.nodes.remove(&nodeid) {
            self.idle.remove(&node.turn);
            self.used = self.used.saturating_sub(node.ranges);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: u64 = ALIGNMENT;

    /// A window of 20 ranges, of which 16 are promised at most.
    fn policy() -> Policy {
        Policy::new(20 * RANGE, true)
    }

    fn refused(policy: &Policy) -> [u64; 3] {
        policy.state().refused
    }

    fn used(policy: &Policy) -> u64 {
        let state = policy.state();
        assert_eq!(state.used, state.nodes.values().map(|node| node.ranges).sum::<u64>());
        let idle = |node: &&Node| node.opens == 0 && node.ranges > 0;
        assert_eq!(state.idle.len(), state.nodes.values().filter(idle).count());
        state.used
    }

    #[test]
    fn a_window_that_has_grown_has_room_for_more() {
        let policy = policy();
        assert!(policy.look_up(1, 10 * RANGE));
        assert!(!policy.look_up(2, 10 * RANGE) && !policy.look_up(3, 20 * RANGE));
        policy.window_has_grown(50 * RANGE);
        assert!(policy.look_up(2, 10 * RANGE) && policy.look_up(3, 20 * RANGE));
        assert!(!policy.look_up(4, RANGE), "a fifth stays free");
        policy.window_has_grown(0);
        assert_eq!(used(&policy), 40, "it never shrinks");
    }

    #[test]
    fn small_files_are_read_and_so_are_files_that_are_too_large() {
        let policy = policy();
        for (size, mapped) in [
            (0, false),
            (SMALL, false),
            (SMALL + 1, true),
            (16 * RANGE, true),
            (16 * RANGE + 1, false),
            (u64::MAX, false),
        ] {
            assert_eq!(policy.look_up(size, size), mapped, "{size}");
            assert_eq!(policy.is_mapped(size), mapped, "{size}");
            policy.forgotten(size);
        }
        assert_eq!((refused(&policy), used(&policy)), ([2, 2, 0], 0));
    }

    #[test]
    fn where_the_guest_keeps_no_data_small_files_are_mapped_too() {
        let policy = Policy::new(20 * RANGE, false);
        assert!(policy.look_up(1, 1));
        assert!(!policy.look_up(2, 0), "there is nothing to map");
    }

    #[test]
    fn files_are_mapped_until_the_window_is_full_and_the_guest_never_has_to_take_ranges_back() {
        let policy = policy();
        let mapped = (1..=10).filter(|node| policy.look_up(*node, 3 * RANGE)).count();
        assert_eq!((mapped, used(&policy), refused(&policy)), (5, 15, [0, 0, 5]));
        assert!(policy.look_up(11, RANGE), "one still fits");
    }

    #[test]
    fn an_answer_stays_as_long_as_the_file_is_open_whatever_becomes_of_its_size() {
        let policy = policy();
        assert!(policy.look_up(1, RANGE));
        policy.opened(1);
        assert!(!policy.look_up(2, 10));
        policy.opened(2);
        policy.opened(2);
        for size in [0, 10, 5 * RANGE, 1 << 40] {
            assert!(policy.look_up(1, size) && policy.is_mapped(1), "{size}");
            assert!(!policy.look_up(2, size) && !policy.is_mapped(2), "{size}");
        }
        policy.closed(2);
        assert!(!policy.look_up(2, RANGE), "still open once");
        policy.closed(2);
        policy.closed(1);
        assert!(policy.look_up(2, RANGE), "a file that has grown is decided anew");
        assert!(!policy.look_up(1, 1 << 40));
        assert_eq!(used(&policy), 1);
    }

    #[test]
    fn a_file_that_was_closed_makes_room_and_the_one_unused_for_longest_goes_first() {
        let policy = policy();
        for node in 1..=4 {
            assert!(policy.look_up(node, 4 * RANGE));
            policy.opened(node);
        }
        assert!(!policy.look_up(5, RANGE), "all are in use");
        for node in [3, 1, 4] {
            policy.closed(node);
        }
        // Used once more: 1 is now the oldest.
        assert!(policy.look_up(3, 4 * RANGE));
        assert!(policy.look_up(5, 4 * RANGE));
        assert!(!policy.is_mapped(1) && policy.is_mapped(3) && policy.is_mapped(4));
        assert!(policy.is_mapped(2), "open");
        assert!(!policy.look_up(6, 16 * RANGE), "not even all of the idle ones make room");
        assert!(policy.is_mapped(3) && policy.is_mapped(4), "so none of them goes");
        assert_eq!(used(&policy), 16);
    }

    #[test]
    fn a_file_that_was_only_looked_up_keeps_its_place_for_a_while() {
        let policy = policy();
        let start = Instant::now();
        assert!(policy.look_up_at(1, 16 * RANGE, start));
        let look = |node, seconds| {
            policy.look_up_at(node, 2 * RANGE, start + Duration::from_secs(seconds))
        };
        assert!(!look(2, 9));
        assert!(look(2, 10));
        assert!(!policy.is_mapped(1));
        assert_eq!(used(&policy), 2);
    }

    #[test]
    fn a_session_that_ends_leaves_nothing_and_closing_what_is_not_open_is_nothing() {
        let policy = policy();
        policy.closed(7);
        policy.forgotten(7);
        policy.look_up(1, RANGE);
        policy.opened(1);
        policy.clear();
        policy.closed(1);
        assert_eq!((used(&policy), policy.is_mapped(1)), (0, false));
        assert!(policy.state().nodes.is_empty());
    }

    #[test]
    fn a_window_is_as_large_as_what_is_promised_in_it_needs_and_no_larger() {
        let most = |window| Policy::new(window, true).most.load(Relaxed);
        for ranges in 1..3000 {
            let window = Policy::window_for(ranges);
            assert_eq!(most(window), ranges, "{ranges}");
            assert!(most(window - RANGE) < ranges, "{ranges}");
        }
        assert!(Policy::window_for(u64::MAX) > 0);
        let sizes = [0, SMALL, SMALL + 1, RANGE + 1];
        assert_eq!(sizes.map(|size| Policy::ranges_of(size, true)), [0, 0, 1, 2]);
        assert_eq!(sizes.map(|size| Policy::ranges_of(size, false)), [0, 1, 1, 2]);
    }

    #[test]
    fn a_window_of_one_range_holds_no_file() {
        for window in [0, RANGE] {
            assert!(!Policy::new(window, true).look_up(1, RANGE));
        }
        assert!(Policy::new(2 * RANGE, true).look_up(1, RANGE));
    }

    #[test]
    fn random_requests_never_promise_more_than_there_is() {
        let policy = policy();
        let mut state = 88172645463325252u64;
        let mut random = move |below: u64| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state % below
        };
        for _ in 0..20_000 {
            let node = random(30);
            match random(6) {
                0..3 => {
                    policy.look_up(node, random(8 * RANGE));
                }
                3 => policy.opened(node),
                4 => policy.closed(node),
                _ => policy.forgotten(node),
            }
            assert!(used(&policy) <= 16);
        }
    }
}
