//! Where everything is in the guest's address space.
//!
//! ```text
//! 0x0000_0000  boot structures, command line, ACPI tables (first MiB), kernel (16 MiB), …, initrd: RAM
//! 0xc000_0000  32-bit hole: MMIO32, ECAM, I/O APIC, local APICs, KVM's own pages
//! 0x1_0000_0000  RAM that did not fit below the hole
//! after RAM    MMIO64: the DAX windows
//! ```

use std::ops::Range;

/// Global descriptor table of the boot CPU.
pub const BOOT_GDT: u64 = 0x500;
/// The zero page (`struct boot_params`).
pub const ZERO_PAGE: u64 = 0x7000;
/// Stack pointer at the kernel's entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page map level 4; the other levels follow, a page each.
pub const BOOT_PML4: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x20000;
/// End of the usable part of the first 640 KiB (where a PC has its EBDA).
pub const LOW_MEMORY_END: u64 = 0x9fc00;
/// ACPI tables, root pointer first.
pub const ACPI: Range<u64> = 0xe0000..0xf0000;
/// Where a PC's firmware is entered in real mode.
pub const RESET_VECTOR: u64 = 0xffff0;
/// Start of the memory above the first MiB.
pub const HIGH_MEMORY: u64 = 0x10_0000;
/// Where a bzImage is loaded: the alignment and default address of x86-64 kernels.
pub const KERNEL: u64 = 0x100_0000;

/// RAM below the hole ends here at the latest.
pub const HOLE_START: u64 = 0xc000_0000;
/// RAM goes on here.
pub const HOLE_END: u64 = 0x1_0000_0000;
/// 32-bit BARs.
pub const MMIO32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI Express configuration space of bus 0, 4 KiB for each of 256 functions.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Local APICs.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// A page that KVM needs on Intel for real mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages that KVM needs on Intel for real mode.
pub const KVM_TSS: usize = 0xfffb_d000;

/// Alignment of the first 64-bit BAR area, and of everything Linux hot-adds as a DAX range: one memory
/// section is 128 MiB, and a gigabyte keeps the direct map's large pages.
pub const MMIO64_ALIGN: u64 = 1 << 30;

/// The last page of each RAM region is kept from the guest's allocator: virtio-queue 0.17 refuses a ring
/// that ends exactly at the end of a region.
pub const REGION_TAIL: u64 = 4096;

/// Ports of PCI configuration mechanism 1.
pub const PCI_CONFIG_PORTS: u64 = 0xcf8;
/// Power and reset registers (`devices::power`).
pub const POWER_PORTS: u16 = 0x600;
/// COM1: base port.
pub const SERIAL_PORT: u16 = 0x3f8;
/// COM1's interrupt line.
pub const SERIAL_LINE: u32 = 4;

/// Number of I/O APIC pins: the first message-signalled interrupt's GSI.
pub const IO_APIC_PINS: u32 = 24;

/// Splits `size` bytes of RAM around the hole.
pub fn ram_ranges(size: u64) -> Vec<Range<u64>> {
    let low = size.min(HOLE_START);
    let ranges = [0..low, HOLE_END..HOLE_END + (size - low)];
    ranges.into_iter().filter(|range| !range.is_empty()).collect()
}

/// The 64-bit MMIO area above `size` bytes of RAM, for CPUs with `address_bits` physical address bits.
/// Empty when there is no room.
pub fn mmio64(size: u64, address_bits: u32) -> Range<u64> {
    // Linux with four-level page tables maps at most 46 bits of physical memory, DAX ranges included.
    let end = 1u64 << address_bits.min(46);
    let ram_end = ram_ranges(size).last().map_or(0, |range| range.end).max(HOLE_END);
    let start = ram_end.next_multiple_of(MMIO64_ALIGN);
    start..end.max(start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_goes_around_the_hole() {
        let gib = 1u64 << 30;
        assert_eq!(ram_ranges(gib).len(), 1);
        assert_eq!(ram_ranges(3 * gib).len(), 1);
        assert_eq!(ram_ranges(4 * gib), vec![0..3 * gib, 4 * gib..5 * gib]);
    }

    #[test]
    fn the_64_bit_area_follows_ram_and_ends_with_the_address_width() {
        let gib = 1u64 << 30;
        assert_eq!(mmio64(gib, 40), 4 * gib..1 << 40);
        assert_eq!(mmio64(4 * gib, 40), 5 * gib..1 << 40);
        assert_eq!(mmio64(gib, 52), 4 * gib..1 << 46);
        assert!(mmio64(gib, 32).is_empty());
    }
}
