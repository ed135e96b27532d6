//! Limits of the process, as setrlimit(2) has them.

use anyhow::{Context, Result};
use rustix::process::{Resource, Rlimit, setrlimit};

/// What a sandbox has no use for. Guest memory in a core dump would be the guest's secrets on the host's disk; no
/// memory is locked, no message queue made, and no thread wants to be before others.
const NOTHING: [(Resource, &str); 5] = [
    (Resource::Core, "RLIMIT_CORE"),
    (Resource::Memlock, "RLIMIT_MEMLOCK"),
    (Resource::Msgqueue, "RLIMIT_MSGQUEUE"),
    (Resource::Nice, "RLIMIT_NICE"),
    (Resource::Rtprio, "RLIMIT_RTPRIO"),
];

/// Lowers them, for good.
///
/// # Errors
///
/// The host's.
pub fn lower() -> Result<()> {
    for (resource, name) in NOTHING {
        setrlimit(resource, Rlimit { current: Some(0), maximum: Some(0) }).context(name)?;
    }
    Ok(())
}
