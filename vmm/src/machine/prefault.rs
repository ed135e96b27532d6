//! Entering pages into the guest's second-stage page tables ahead of its faults.

use std::io;

use anyhow::{Context, Result};
use kvm_bindings::{CpuId, KVM_CAP_PRE_FAULT_MEMORY, KVMIO, kvm_pre_fault_memory, kvm_sregs};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_mut_ref;
use vmm_sys_util::ioctl_iowr_nr;

// linux/kvm.h, since Linux 6.11.
ioctl_iowr_nr!(KVM_PRE_FAULT_MEMORY, KVMIO, 0xd5, kvm_pre_fault_memory);

/// Two values of CR3 that differ: any valid ones.
const CR3: [u64; 2] = [0, 0x1000];

/// A vCPU that never runs.
///
/// KVM enters pages through a vCPU's file descriptor, which is locked for as long as that vCPU runs; whoever
/// serves a request would have to interrupt one. All vCPUs of a VM share their second-stage page tables, so
/// one more, for this alone, lets any thread do it at once and without an exit. The guest is not told of it:
/// it is not in the MADT, it waits for a SIPI for ever, and its interrupt controller is off.
pub struct Prefaulter {
    vcpu: VcpuFd,
    sregs: kvm_sregs,
    turn: usize,
}

impl Prefaulter {
    /// The vCPU, with the number `id`, which no other has. `None` where KVM cannot enter pages ahead of
    /// faults.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn new(kvm: &Kvm, vm: &VmFd, cpuid: &CpuId, id: u8) -> Result<Option<Self>> {
        if kvm.check_extension_raw(KVM_CAP_PRE_FAULT_MEMORY.into()) <= 0 {
            return Ok(None);
        }
        let vcpu = vm.create_vcpu(id.into()).context("KVM_CREATE_VCPU")?;
        // The shape of the page tables follows from what the processor can address.
        vcpu.set_cpuid2(cpuid).context("KVM_SET_CPUID2")?;
        let sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
        Ok(Some(Self { vcpu, sregs, turn: 0 }))
    }

    /// Enters the pages behind `size` bytes from `address` on. Both are whole pages of one memslot, and no
    /// memslot is taken away meanwhile.
    ///
    /// # Errors
    ///
    /// KVM's: `EFAULT` where a page cannot be had, `EINTR`, `EOPNOTSUPP` without second-stage page tables.
    pub fn populate(&mut self, address: u64, size: u64) -> io::Result<()> {
        // When a memslot goes away, KVM throws the page tables away, and every vCPU finds that out when it
        // runs next. Before Linux 6.15 one that does not run would fault on the old ones without end. Any
        // change of CR3 from outside has it look for the current ones.
        self.turn ^= 1;
        self.sregs.cr3 = CR3[self.turn];
        self.vcpu.set_sregs(&self.sregs)?;
        let mut range = kvm_pre_fault_memory { gpa: address, size, ..Default::default() };
        // KVM says what is left, and stops at any signal.
        while range.size > 0 {
            // SAFETY: the argument is as large as the number of the call says, and lives across it. What it
            // changes is the guest's page tables, which show the guest what its memslots say in any case.
            #[expect(unsafe_code, reason = "an ioctl that kvm-ioctls does not have")]
            let done =
                unsafe { ioctl_with_mut_ref(&self.vcpu, KVM_PRE_FAULT_MEMORY(), &mut range) };
            if done < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}
