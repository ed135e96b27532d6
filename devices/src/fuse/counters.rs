//! What a session did, in numbers.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::opcode::{OPCODES, Opcode};

/// One more than the largest opcode.
const CODES: usize = 64;

/// Counts since the session was made; a reset does not clear them. Any thread may read them at any time;
/// two of them read one after the other need not fit together.
pub struct Counters {
    requests: [AtomicU64; CODES],
    /// Requests answered with an errno.
    pub errors: AtomicU64,
    /// Requests that did not even have the form of one, or of an unknown operation.
    pub malformed: AtomicU64,
    /// Bytes that READ put into guest memory.
    pub bytes_read: AtomicU64,
    /// Bytes that WRITE took from guest memory.
    pub bytes_written: AtomicU64,
    /// SETUPMAPPINGs that succeeded.
    pub dax_setups: AtomicU64,
    /// Of these, such as made a read-only mapping of the same range writable.
    pub dax_upgrades: AtomicU64,
    /// Ranges taken away by REMOVEMAPPING.
    pub dax_removes: AtomicU64,
    /// Ranges mapped now (a gauge).
    pub dax_live: AtomicU64,
    /// INITs that began a session.
    pub sessions: AtomicU64,
}

impl Default for Counters {
    fn default() -> Self {
        Self {
            requests: [const { AtomicU64::new(0) }; CODES],
            errors: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            dax_setups: AtomicU64::new(0),
            dax_upgrades: AtomicU64::new(0),
            dax_removes: AtomicU64::new(0),
            dax_live: AtomicU64::new(0),
            sessions: AtomicU64::new(0),
        }
    }
}

impl Counters {
    pub(super) fn count(&self, opcode: Opcode) {
        if let Some(counter) = self.requests.get(opcode as usize) {
            counter.fetch_add(1, Relaxed);
        }
    }

    pub(super) fn add(counter: &AtomicU64, count: usize) {
        counter.fetch_add(count as u64, Relaxed);
    }

    /// How many well-formed requests of one operation came.
    pub fn requests(&self, opcode: Opcode) -> u64 {
        self.requests.get(opcode as usize).map_or(0, |counter| counter.load(Relaxed))
    }

    /// All counters with their names: operations by the names of linux/fuse.h (only those that came), then
    /// the rest.
    pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
        let operations = OPCODES
            .iter()
            .map(|limits| (limits.name, self.requests(limits.opcode)))
            .filter(|(_, count)| *count > 0);
        let rest = [
            ("errors", &self.errors),
            ("malformed", &self.malformed),
            ("bytes_read", &self.bytes_read),
            ("bytes_written", &self.bytes_written),
            ("dax_setups", &self.dax_setups),
            ("dax_upgrades", &self.dax_upgrades),
            ("dax_removes", &self.dax_removes),
            ("dax_live", &self.dax_live),
            ("sessions", &self.sessions),
        ];
        operations.chain(rest.map(|(name, counter)| (name, counter.load(Relaxed)))).collect()
    }
}
