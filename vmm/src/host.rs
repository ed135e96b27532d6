//! What this host can do for a virtual machine, and what is missing.

use std::io::ErrorKind;

use anyhow::{Context, Result, bail};
use kvm_ioctls::{Cap, Kvm};

/// The KVM API version since 2007; there is no other.
const KVM_API_VERSION: i32 = 12;

/// The processor's virtualization extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Virtualization {
    /// AMD-V.
    Svm,
    /// Intel VT-x.
    Vmx,
}

/// What /proc/cpuinfo says of the processor.
pub fn virtualization() -> Option<Virtualization> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    virtualization_in(&info)
}

fn virtualization_in(cpuinfo: &str) -> Option<Virtualization> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    flags.split_whitespace().find_map(|flag| match flag {
        "svm" => Some(Virtualization::Svm),
        "vmx" => Some(Virtualization::Vmx),
        _ => None,
    })
}

/// Opens /dev/kvm on a host that can run a guest kernel.
///
/// # Errors
///
/// One line: what is wrong with /dev/kvm and what to do about it.
pub fn open_kvm() -> Result<Kvm> {
    const DEVICE: &str = "/dev/kvm";
    let kvm = match Kvm::new() {
        Ok(kvm) => kvm,
        Err(error) => {
            let remedy = match std::io::Error::from(error).kind() {
                ErrorKind::NotFound => {
                    "is missing: enable virtualization in the firmware and load kvm_intel or kvm_amd \
                     (without a processor that has it, tests/with-kvm emulates one)"
                        .to_string()
                }
                ErrorKind::PermissionDenied => {
                    "may not be opened by this user: add the user to the group that owns it \
                     (usually `usermod -aG kvm $USER`) or run as root"
                        .to_string()
                }
                _ => format!("cannot be opened: {error}"),
            };
            bail!("{DEVICE} {remedy}");
        }
    };
    if virtualization().is_none() {
        bail!(
            "{DEVICE} only emulates here: the processor has neither svm nor vmx (see /proc/cpuinfo), so an \
             ordinary guest kernel dies in it; use a host that has one, or run through tests/with-kvm"
        );
    }
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION {
        bail!(
            "{DEVICE} speaks API version {version}, not {KVM_API_VERSION}: the host kernel is too old"
        );
    }
    for (capability, name) in [
        (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    ] {
        if !kvm.check_extension(capability) {
            bail!("{DEVICE} lacks {name}: the host kernel is too old");
        }
    }
    Ok(kvm)
}

/// Number of CPUs this process may use.
pub fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// RAM of the host in bytes.
///
/// # Errors
///
/// When the host does not tell.
pub fn total_memory() -> Result<u64> {
    let info = rustix::system::sysinfo();
    info.totalram.checked_mul(info.mem_unit.into()).context("how much RAM has the host?")
}

/// Lifts this process's limit of open files as far as it goes: each inode that a guest knows is one.
pub fn raise_open_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        log::warn!("the limit of open files stays at {:?}: {error}", limit.current);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_virtualization_extension_is_a_whole_word_of_the_flags() {
        let info = |flags: &str| format!("vendor_id : x svm\nflags\t\t: fpu {flags} sse\n");
        assert_eq!(virtualization_in(&info("svm")), Some(Virtualization::Svm));
        assert_eq!(virtualization_in(&info("vmx")), Some(Virtualization::Vmx));
        assert_eq!(virtualization_in(&info("svm_lock")), None);
        assert_eq!(virtualization_in(""), None);
    }
}
