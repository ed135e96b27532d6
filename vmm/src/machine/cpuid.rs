//! What CPUID tells the guest: the host's processor as KVM can run it, with this machine's topology.

use anyhow::{Context, Result};
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

const LEAF_FEATURES: u32 = 1;
const LEAF_CACHE: u32 = 4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_ADDRESS_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_CACHE: u32 = 0x8000_001d;
const LEAF_AMD_TOPOLOGY: u32 = 0x8000_001e;

/// EBX of leaf 0 on AMD ("Auth" of "AuthenticAMD") and on Hygon ("Hygo"), whose topology leaves are AMD's.
const VENDORS_AMD: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

const FEATURE_VMX: u32 = 1 << 5;
const FEATURE_TSC_DEADLINE: u32 = 1 << 24;
const FEATURE_HYPERVISOR: u32 = 1 << 31;
const FEATURE_HTT: u32 = 1 << 28;
const AMD_FEATURE_CMP_LEGACY: u32 = 1 << 1;
const AMD_FEATURE_SVM: u32 = 1 << 2;

const TOPOLOGY_SMT: u32 = 1;
const TOPOLOGY_CORE: u32 = 2;
/// KVM_CPUID_FLAG_SIGNIFCANT_INDEX of `asm/kvm.h`: the entry is for one subleaf.
const SIGNIFICANT_INDEX: u32 = 1;

/// What KVM supports here, before it is made one CPU's.
///
/// # Errors
///
/// KVM's.
pub fn supported(kvm: &Kvm) -> Result<CpuId> {
    kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).context("KVM_GET_SUPPORTED_CPUID")
}

/// Number of physical address bits that CPUID tells the guest.
pub fn address_bits(supported: &CpuId) -> u32 {
    let sizes = supported.as_slice().iter().find(|entry| entry.function == LEAF_ADDRESS_SIZES);
    // 36 bits is what processors without the leaf have.
    sizes.map_or(36, |entry| entry.eax & 0xff)
}

/// CPUID of CPU number `id` of `cpus`: one socket, a core each, no hyper-threads.
///
/// # Errors
///
/// When the entries are too many for KVM.
pub fn for_cpu(kvm: &Kvm, supported: &CpuId, id: u8, cpus: u8) -> Result<CpuId> {
    let apic_id = u32::from(id);
    let count = u32::from(cpus);
    let vendor = supported.as_slice().iter().find(|entry| entry.function == 0);
    let amd = vendor.is_some_and(|entry| VENDORS_AMD.contains(&entry.ebx));
    let core_bits = count.next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = supported
        .as_slice()
        .iter()
        .filter(|entry| !matches!(entry.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2))
        .copied()
        .collect();
    for entry in &mut entries {
        match entry.function {
            LEAF_FEATURES => {
                entry.ebx = entry.ebx & 0x0000_ffff | apic_id << 24 | count << 16;
                entry.ecx |= FEATURE_HYPERVISOR;
                // Virtual machines inside this one are not offered.
                entry.ecx &= !FEATURE_VMX;
                if kvm.check_extension(Cap::TscDeadlineTimer) {
                    entry.ecx |= FEATURE_TSC_DEADLINE;
                }
                set(&mut entry.edx, FEATURE_HTT, cpus > 1);
            }
            LEAF_CACHE | LEAF_AMD_CACHE => {
                // Level 3 is shared by all CPUs, the others by none.
                let level = entry.eax >> 5 & 0b111;
                let sharing = if level >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
                if entry.function == LEAF_CACHE {
                    entry.eax = entry.eax & !(0x3f << 26) | (count - 1).min(0x3f) << 26;
                }
            }
            LEAF_AMD_FEATURES => {
                entry.ecx &= !AMD_FEATURE_SVM;
                set(&mut entry.ecx, AMD_FEATURE_CMP_LEGACY, amd && cpus > 1);
            }
            LEAF_ADDRESS_SIZES if amd => {
                entry.ecx = entry.ecx & !0xf0ff | core_bits << 12 | (count - 1);
            }
            LEAF_AMD_TOPOLOGY => {
                entry.eax = apic_id;
                entry.ebx = apic_id;
                entry.ecx = 0;
            }
            _ => {}
        }
    }
    let level = |index, shift, cpus, kind| kvm_cpuid_entry2 {
        function: LEAF_TOPOLOGY,
        index,
        flags: SIGNIFICANT_INDEX,
        eax: shift,
        ebx: cpus,
        ecx: kind << 8 | index,
        edx: apic_id,
        ..Default::default()
    };
    entries.push(level(0, 0, 1, TOPOLOGY_SMT));
    entries.push(level(1, core_bits, count, TOPOLOGY_CORE));
    CpuId::from_entries(&entries).context("too many CPUID entries")
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on { *register | bit } else { *register & !bit };
}
