//! The state in which the boot CPU enters the kernel: 64-bit mode, as `Documentation/arch/x86/boot.rst`
//! asks under "64-bit Boot Protocol".

use anyhow::{Context, Result};
use devices::memory::GuestMemory;
use devices::power;
use kvm_bindings::{
    Msrs, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::layout;

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
/// A flat 64-bit code segment: granular, long, present, executable and readable, accessed.
const CODE_DESCRIPTOR: u64 = 0x00af_9b00_0000_ffff;
/// A flat data segment: granular, 32-bit, present, writable, accessed.
const DATA_DESCRIPTOR: u64 = 0x00cf_9300_0000_ffff;

const CR0_PROTECTED: u64 = 1;
const CR0_PAGING: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LONG_MODE_ENABLE: u64 = 1 << 8;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;
/// RFLAGS bit 1 is always set.
const RFLAGS_RESERVED: u64 = 2;

const PAGE_PRESENT_WRITABLE: u64 = 0b11;
const PAGE_LARGE: u64 = 1 << 7;
/// The identity map covers what lies below the end of the hole.
const IDENTITY_GIGABYTES: u64 = 4;

/// Default values of the x87 control word and MXCSR after reset of a process.
const FPU_CONTROL: u16 = 0x37f;
const MXCSR: u32 = 0x1f80;

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRING: u64 = 1;
const MSR_MTRR_DEFAULT_TYPE: u32 = 0x2ff;
/// MTRRs on, write-back everywhere: the page tables alone say what is uncached.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

const APIC_LVT_LINT0: usize = 0x350;
const APIC_LVT_LINT1: usize = 0x360;
const DELIVERY_NMI: u32 = 0b100 << 8;
const DELIVERY_EXTINT: u32 = 0b111 << 8;
const DELIVERY_MASK: u32 = 0b111 << 8;

/// Prepares the boot CPU to enter the kernel at `entry` with the zero page in RSI.
///
/// # Errors
///
/// KVM's, or when the guest has no RAM for the page tables.
pub fn set_boot_state(vcpu: &VcpuFd, memory: &GuestMemory, entry: u64) -> Result<()> {
    write_page_tables(memory).context("page tables")?;
    let mut sregs = vcpu.get_sregs().context("KVM_GET_SREGS")?;
    set_segments(memory, &mut sregs).context("descriptor table")?;
    sregs.cr0 |= CR0_PROTECTED | CR0_PAGING;
    sregs.cr3 = layout::BOOT_PML4;
    sregs.cr4 |= CR4_PAE;
    sregs.efer |= EFER_LONG_MODE_ENABLE | EFER_LONG_MODE_ACTIVE;
    vcpu.set_sregs(&sregs).context("KVM_SET_SREGS")?;
    let regs = kvm_regs {
        rip: entry,
        rsi: layout::ZERO_PAGE,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rflags: RFLAGS_RESERVED,
        ..Default::default()
    };
    vcpu.set_regs(&regs).context("KVM_SET_REGS")
}

/// Puts real-mode code at the reset vector that resets the machine: Linux reboots through the firmware when
/// it finds no other way that it likes, and there is no firmware.
///
/// # Errors
///
/// When the guest has no RAM there.
pub fn write_reset_vector(memory: &GuestMemory) -> Result<()> {
    let [low, high] = (layout::POWER_PORTS + power::RESET as u16).to_le_bytes();
    // mov dx, port; mov al, value; out dx, al; hlt
    let code = [0xba, low, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4];
    memory.write_slice(&code, GuestAddress(layout::RESET_VECTOR)).context("reset vector")
}

/// What every CPU gets: a sane FPU, memory types, and local interrupt pins.
///
/// # Errors
///
/// KVM's.
pub fn set_common_state(vcpu: &VcpuFd) -> Result<()> {
    let fpu = kvm_fpu { fcw: FPU_CONTROL, mxcsr: MXCSR, ..Default::default() };
    vcpu.set_fpu(&fpu).context("KVM_SET_FPU")?;
    let entry = |index, data| kvm_msr_entry { index, data, ..Default::default() };
    let msrs = Msrs::from_entries(&[
        entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRING),
        entry(MSR_MTRR_DEFAULT_TYPE, MTRR_ENABLED_WRITE_BACK),
    ])
    .context("MSR list")?;
    vcpu.set_msrs(&msrs).context("KVM_SET_MSRS")?;
    let mut lapic = vcpu.get_lapic().context("KVM_GET_LAPIC")?;
    set_delivery(&mut lapic, APIC_LVT_LINT0, DELIVERY_EXTINT);
    set_delivery(&mut lapic, APIC_LVT_LINT1, DELIVERY_NMI);
    vcpu.set_lapic(&lapic).context("KVM_SET_LAPIC")
}

fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    let mut bytes = [0; 4];
    for (byte, at) in bytes.iter_mut().zip(register..) {
        *byte = lapic.regs[at] as u8;
    }
    let value = u32::from_le_bytes(bytes) & !DELIVERY_MASK | mode;
    for (byte, at) in value.to_le_bytes().into_iter().zip(register..) {
        lapic.regs[at] = byte as _;
    }
}

fn set_segments(memory: &GuestMemory, sregs: &mut kvm_sregs) -> Result<()> {
    let table = [0, 0, CODE_DESCRIPTOR, DATA_DESCRIPTOR];
    for (index, descriptor) in table.into_iter().enumerate() {
        memory.write_obj(descriptor, GuestAddress(layout::BOOT_GDT + 8 * index as u64))?;
    }
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = 8 * table.len() as u16 - 1;
    sregs.cs = segment(CODE_SELECTOR, CODE_DESCRIPTOR);
    let data = segment(DATA_SELECTOR, DATA_DESCRIPTOR);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    Ok(())
}

/// The hidden part of a segment register, as loading `descriptor` would fill it.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bit = |n: u32| (descriptor >> n & 1) as u8;
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: 0,
        present: bit(47),
        avl: bit(52),
        l: bit(53),
        db: bit(54),
        g: bit(55),
        unusable: 0,
        padding: 0,
    }
}

/// Maps the first [`IDENTITY_GIGABYTES`] one to one with 2 MiB pages.
fn write_page_tables(memory: &GuestMemory) -> Result<()> {
    const PAGE: u64 = 4096;
    let pml4 = layout::BOOT_PML4;
    let pdpt = pml4 + PAGE;
    memory.write_obj(pdpt | PAGE_PRESENT_WRITABLE, GuestAddress(pml4))?;
    for gigabyte in 0..IDENTITY_GIGABYTES {
        let directory = pdpt + PAGE * (1 + gigabyte);
        let entry = directory | PAGE_PRESENT_WRITABLE;
        memory.write_obj(entry, GuestAddress(pdpt + 8 * gigabyte))?;
        for index in 0..512 {
            let page = (gigabyte << 30) | (index << 21) | PAGE_PRESENT_WRITABLE | PAGE_LARGE;
            memory.write_obj(page, GuestAddress(directory + 8 * index))?;
        }
    }
    Ok(())
}
