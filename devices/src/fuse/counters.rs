//! What a session did, in numbers.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use super::errno::Errno;
use super::opcode::{OPCODES, Opcode};

/// One more than the largest opcode.
const CODES: usize = 64;

/// How many classes of duration there are: see [`latency_bound`].
pub const LATENCY_CLASSES: usize = 25;

/// log2 of the first bound in nanoseconds. No request is served in less than about a microsecond.
const FIRST_BOUND: u32 = 10;

/// The longest duration of a class: twice as long as that of the class before, from 1024 ns to 8.6 s. `None` for
/// the last class, of all that took longer.
pub fn latency_bound(class: usize) -> Option<Duration> {
    let exponent = FIRST_BOUND.checked_add(u32::try_from(class).ok()?)?;
    (class + 1 < LATENCY_CLASSES).then(|| Duration::from_nanos(1 << exponent))
}

/// The class of a request that took so many nanoseconds.
fn latency_class(nanoseconds: u64) -> usize {
    let exponent = u64::BITS - nanoseconds.saturating_sub(1).leading_zeros();
    (exponent.saturating_sub(FIRST_BOUND) as usize).min(LATENCY_CLASSES - 1)
}

/// What is counted of one operation.
struct Operation {
    requests: AtomicU64,
    /// Of these, such as were answered with an errno.
    errors: AtomicU64,
    /// For how long all that ended were served, from the header's first byte to the last of the reply.
    nanoseconds: AtomicU64,
    /// How many of those took how long.
    latency: [AtomicU64; LATENCY_CLASSES],
}

impl Operation {
    const fn new() -> Self {
        Self {
            requests: AtomicU64::new(0),
            errors: AtomicU64::new(0),
            nanoseconds: AtomicU64::new(0),
            latency: [const { AtomicU64::new(0) }; LATENCY_CLASSES],
        }
    }
}

/// What was counted of one operation up to some moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OperationCounts {
    /// The name of linux/fuse.h, without `FUSE_`.
    pub name: &'static str,
    /// Well-formed requests that came.
    pub requests: u64,
    /// Of these, such as were answered with an errno. A LOOKUP of a name that is not there is one.
    pub errors: u64,
    /// How long serving took, all requests together. One that waited for a lock was served when it was answered.
    pub nanoseconds: u64,
    /// How many ended after a duration of each class: see [`latency_bound`].
    pub latency: [u64; LATENCY_CLASSES],
}

/// Counts since the session was made; a reset does not clear them. Any thread may read them at any time;
/// two of them read one after the other need not fit together.
pub struct Counters {
    operations: [Operation; CODES],
    /// Requests answered with an errno.
    pub errors: AtomicU64,
    /// Requests that did not even have the form of one, or of an unknown operation.
    pub malformed: AtomicU64,
    /// Requests that were tried without waiting and took so long that those of their share were not for a while.
    pub slow_at_once: AtomicU64,
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
            operations: [const { Operation::new() }; CODES],
            errors: AtomicU64::new(0),
            malformed: AtomicU64::new(0),
            slow_at_once: AtomicU64::new(0),
            bytes_read: AtomicU64::new(0),
            bytes_written: AtomicU64::new(0),
            dax_setups: AtomicU64::new(0),
            dax_upgrades: AtomicU64::new(0),
            dax_removes: AtomicU64::new(0),
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
        if let Some(operation) = self.operations.get(opcode as usize) {
            operation.requests.fetch_add(1, Relaxed);
        }
    }

    /// A request that was counted is served, which took so long.
    pub(super) fn finish(&self, opcode: Opcode, took: Duration, failed: bool) {
        let Some(operation) = self.operations.get(opcode as usize) else { return };
        // 584 years.
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        operation.nanoseconds.fetch_add(nanoseconds, Relaxed);
        if let Some(class) = operation.latency.get(latency_class(nanoseconds)) {
            class.fetch_add(1, Relaxed);
        }
        if failed {
            operation.errors.fetch_add(1, Relaxed);
            self.errors.fetch_add(1, Relaxed);
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
        let operation = self.operations.get(opcode as usize);
        operation.map_or(0, |operation| operation.requests.load(Relaxed))
    }

    /// What was counted of each operation that came.
    pub fn operations(&self) -> Vec<OperationCounts> {
        let counts = |limits: &super::opcode::Limits| {
            let of = self.operations.get(limits.opcode as usize)?;
            let requests = of.requests.load(Relaxed);
            (requests > 0).then(|| OperationCounts {
                name: limits.name,
                requests,
                errors: of.errors.load(Relaxed),
                nanoseconds: of.nanoseconds.load(Relaxed),
                latency: of.latency.each_ref().map(|class| class.load(Relaxed)),
            })
        };
        OPCODES.iter().filter_map(counts).collect()
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
            ("slow_at_once", &self.slow_at_once),
            ("bytes_read", &self.bytes_read),
            ("bytes_written", &self.bytes_written),
            ("dax_setups", &self.dax_setups),
            ("dax_upgrades", &self.dax_upgrades),
            ("dax_removes", &self.dax_removes),
            ("dax_refused_invalid", &self.dax_refused_invalid),
            ("dax_refused_access", &self.dax_refused_access),
            ("dax_refused_full", &self.dax_refused_full),
            ("dax_refused_host", &self.dax_refused_host),
            ("sessions", &self.sessions),
        ];
        operations.chain(rest.map(|(name, counter)| (name, counter.load(Relaxed)))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_is_in_the_first_class_whose_bound_it_does_not_exceed() {
        for (nanoseconds, class) in
            [(0, 0), (1, 0), (1024, 0), (1025, 1), (2048, 1), (2049, 2), (u64::MAX, 24)]
        {
            assert_eq!(latency_class(nanoseconds), class, "{nanoseconds}");
        }
        for class in 0..LATENCY_CLASSES - 1 {
            let bound = latency_bound(class).unwrap().as_nanos() as u64;
            assert_eq!((latency_class(bound), latency_class(bound + 1)), (class, class + 1));
        }
        assert_eq!(latency_bound(0), Some(Duration::from_nanos(1024)));
        assert_eq!(latency_bound(LATENCY_CLASSES - 1), None);
        assert_eq!(latency_bound(usize::MAX), None);
    }
}
