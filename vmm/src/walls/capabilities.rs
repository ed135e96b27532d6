//! Capabilities (capabilities(7)): those that serving the shares takes, and no others.

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities,
};

/// What is done to the shared directories, by all shares together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Needs {
    /// Something is written to one of them.
    pub writes: bool,
    /// Device nodes are made (`dev`).
    pub device_nodes: bool,
    /// File capabilities are set: attributes are the host's (`xattr=on`), and something is written.
    pub file_capabilities: bool,
    /// `trusted.*` is the host's, because somebody wants it so (`xattr=on`).
    pub trusted: bool,
}

impl Needs {
    /// As capabilities.
    fn capabilities(self) -> CapabilitySet {
        // To reach files by their handles and read them, and to leave no time of access behind (O_NOATIME).
        let mut needed = CapabilitySet::DAC_READ_SEARCH | CapabilitySet::FOWNER;
        if self.writes {
            needed |= CapabilitySet::DAC_OVERRIDE
                | CapabilitySet::CHOWN
                | CapabilitySet::FSETID
                | CapabilitySet::SETUID
                | CapabilitySet::SETGID;
        }
        needed.set(CapabilitySet::MKNOD, self.device_nodes);
        needed.set(CapabilitySet::SETFCAP, self.file_capabilities);
        needed.set(CapabilitySet::SYS_ADMIN, self.trusted);
        needed
    }
}

/// Whether the calling thread has it now.
pub fn has(capability: CapabilitySet) -> bool {
    capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// Gives up, for good, all that is not needed. Says what is left.
///
/// # Errors
///
/// The host's.
pub fn keep(needs: Needs) -> Result<CapabilitySet> {
    let now = capabilities(None).context("capabilities")?;
    let kept = now.permitted & needs.capabilities();
    if now.permitted.contains(CapabilitySet::SETPCAP) {
        for number in 0..u64::BITS {
            let capability = CapabilitySet::from_bits_retain(1 << number);
            match remove_capability_from_bounding_set(capability) {
                Ok(()) => {}
                // There are no more.
                Err(Errno::INVAL) => break,
                Err(error) => return Err(error).context("bounding set"),
            }
        }
    }
    match clear_ambient_capability_set() {
        // Linux 4.2 and older have none.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(error).context("ambient capabilities"),
    }
    let sets =
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    set_capabilities(None, sets).context("capabilities")?;
    Ok(kept)
}

/// For people.
pub fn described(kept: CapabilitySet) -> String {
    if kept.is_empty() {
        return "no capability".into();
    }
    let names: Vec<_> = kept.iter_names().map(|(name, _)| name).collect();
    format!("the capabilities {}", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_only_reads_may_change_nothing() {
        let reading = Needs::default().capabilities();
        assert_eq!(reading, CapabilitySet::DAC_READ_SEARCH | CapabilitySet::FOWNER);
        let writing = Needs { writes: true, ..Needs::default() }.capabilities();
        assert!(writing.contains(reading | CapabilitySet::CHOWN | CapabilitySet::SETUID));
        for never in [CapabilitySet::SYS_ADMIN, CapabilitySet::MKNOD, CapabilitySet::SYS_PTRACE] {
            assert!(!writing.contains(never));
        }
    }

    #[test]
    fn a_thread_that_gave_them_up_has_them_no_more() {
        // Of this thread alone: the others of the test go on as they are.
        let left = std::thread::spawn(|| {
            let kept = keep(Needs::default()).unwrap();
            assert!(!has(CapabilitySet::CHOWN) && !has(CapabilitySet::SYS_ADMIN));
            let sets = capabilities(None).unwrap();
            assert_eq!((sets.effective, sets.permitted), (kept, kept));
            assert!(
                set_capabilities(
                    None,
                    CapabilitySets { permitted: kept | CapabilitySet::CHOWN, ..sets }
                )
                .is_err()
            );
            kept
        });
        let left = left.join().unwrap();
        assert!(Needs::default().capabilities().contains(left));
    }
}
