//! What a session did, in numbers.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::errno::Errno;
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
    /// SETUPMAPPINGs that were refused because they are malformed or not of a regular file.
    pub dax_refused_invalid: AtomicU64,
    /// … because the share or the file may not be written or read.
    pub dax_refused_access: AtomicU64,
    /// … because the window or the process has too many mappings, or the host no memory.
    pub dax_refused_full: AtomicU64,
    /// … because the host's file system has no shared mappings, or no such file any more.
    pub dax_refused_host: AtomicU64,
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
            dax_refused_invalid: AtomicU64::new(0),
            dax_refused_access: AtomicU64::new(0),
            dax_refused_full: AtomicU64::new(0),
            dax_refused_host: AtomicU64::new(0),
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

    /// Counts a SETUPMAPPING that failed.
    pub(super) fn refuse_mapping(&self, errno: Errno) {
        let counter = match errno {
            Errno::INVAL => &self.dax_refused_invalid,
            Errno::ACCES | Errno::PERM | Errno::ROFS => &self.dax_refused_access,
            Errno::NOMEM | Errno::NFILE | Errno::MFILE => &self.dax_refused_full,
            _ => &self.dax_refused_host,
        };
        Self::add(counter, 1);
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
            ("dax_refused_invalid", &self.dax_refused_invalid),
            ("dax_refused_access", &self.dax_refused_access),
            ("dax_refused_full", &self.dax_refused_full),
            ("dax_refused_host", &self.dax_refused_host),
            ("sessions", &self.sessions),
        ];
        operations.chain(rest.map(|(name, counter)| (name, counter.load(Relaxed)))).collect()
    }
}
