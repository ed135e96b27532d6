//! The ACPI tables of a hardware-reduced platform: what there is, without firmware to ask.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Name, Package,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace as GasSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, AmlSink};
use anyhow::{Context, Result, ensure};
use devices::memory::GuestMemory;
use devices::{power, serial};
use std::ops::Range;
use vm_memory::{Bytes, GuestAddress};

use super::layout;

const OEM_ID: [u8; 6] = *b"ORIEL ";
const OEM_TABLE_ID: [u8; 8] = *b"ORIELVMM";
const OEM_REVISION: u32 = 1;
/// A table's address alignment; ACPI asks for none, processors like a cache line.
const TABLE_ALIGN: u64 = 64;

/// IAPC_BOOT_ARCH: no VGA to probe, and no CMOS real-time clock. Bit 1 (an 8042 keyboard controller) is
/// clear too, so that nothing is probed that nobody answers.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_RTC: u16 = 1 << 5;

#[derive(Default)]
struct Bytecode(Vec<u8>);

impl AmlSink for Bytecode {
    fn byte(&mut self, byte: u8) {
        self.0.push(byte);
    }
}

fn encode(aml: &dyn Aml) -> Vec<u8> {
    let mut sink = Bytecode::default();
    aml.to_aml_bytes(&mut sink);
    sink.0
}

/// Writes the tables at [`layout::ACPI`] for `cpus` processors (local APIC ids 0 to `cpus` - 1) and a 64-bit
/// MMIO area, and returns the address of the root pointer (RSDP).
///
/// # Errors
///
/// When they do not fit the area or the guest has no RAM there.
pub fn write_tables(memory: &GuestMemory, cpus: u8, mmio64: &Range<u64>) -> Result<u64> {
    let mut writer = Writer { memory, next: layout::ACPI.start + TABLE_ALIGN };
    let dsdt = writer.put(&dsdt(mmio64))?;
    let fadt = writer.put(&encode(&fadt(dsdt)))?;
    let madt = writer.put(&encode(&madt(cpus)))?;
    let mcfg = writer.put(&encode(&mcfg()))?;
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for table in [fadt, madt, mcfg] {
        xsdt.add_entry(table);
    }
    let xsdt = writer.put(&encode(&xsdt))?;
    // The root pointer comes first, where a guest that scans for it begins.
    writer.next = layout::ACPI.start;
    writer.put(&encode(&Rsdp::new(OEM_ID, xsdt)))
}

struct Writer<'a> {
    memory: &'a GuestMemory,
    next: u64,
}

impl Writer<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64> {
        let address = self.next;
        let end = address + table.len() as u64;
        ensure!(end <= layout::ACPI.end, "the ACPI tables do not fit");
        self.memory
            .write_slice(table, GuestAddress(address))
            .context("the guest has no memory for the ACPI tables")?;
        self.next = end.next_multiple_of(TABLE_ALIGN);
        Ok(address)
    }
}

fn port(address: u64) -> GAS {
    GAS::new(GasSpace::SystemIo, 8, 0, AccessSize::ByteAccess, address)
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let ports = u64::from(layout::POWER_PORTS);
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.reset_reg = port(ports + power::RESET);
    fadt.reset_value = power::RESET_VALUE;
    fadt.sleep_control_reg = port(ports + power::SLEEP_CONTROL);
    fadt.sleep_status_reg = port(ports + power::SLEEP_STATUS);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_RTC).into();
    fadt.finalize()
}

fn madt(cpus: u8) -> MADT {
    let local = LocalInterruptController::Address(layout::LOCAL_APIC);
    let mut madt = MADT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION, local);
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IO_APIC, 0));
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(layout::ECAM.start, 0, 0, 0);
    mcfg
}

/// The PCI root, the serial port and the soft-off state.
fn dsdt(mmio64: &Range<u64>) -> Vec<u8> {
    let hid = EISAName::new("PNP0A08");
    let cid = EISAName::new("PNP0A03");
    let zero = 0u8;
    let bus = AddressSpace::new_bus_number(0u16, 0);
    let config = IO::new(layout::PCI_CONFIG_PORTS as u16, layout::PCI_CONFIG_PORTS as u16, 1, 8);
    let memory32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::MMIO32.start as u32,
        (layout::MMIO32.end - 1) as u32,
        None,
    );
    let memory64 = (!mmio64.is_empty()).then(|| {
        AddressSpace::new_memory(
            AddressSpaceCacheable::Cacheable,
            true,
            mmio64.start,
            mmio64.end - 1,
            None,
        )
    });
    let mut windows: Vec<&dyn Aml> = vec![&bus, &config, &memory32];
    if let Some(memory64) = &memory64 {
        windows.push(memory64);
    }
    let hid = Name::new("_HID".into(), &hid);
    let cid = Name::new("_CID".into(), &cid);
    let segment = Name::new("_SEG".into(), &zero);
    let base_bus = Name::new("_BBN".into(), &zero);
    let unique = Name::new("_UID".into(), &zero);
    let resources = ResourceTemplate::new(windows);
    let resources = Name::new("_CRS".into(), &resources);
    let root =
        Device::new("PCI0".into(), vec![&hid, &cid, &segment, &base_bus, &unique, &resources]);
    let mut system_bus = encode(&Scope::new("\\_SB_".into(), vec![&root]));
    system_bus.extend(serial_port());
    let soft_off = Package::new(vec![&power::SLEEP_TYPE_S5, &zero, &zero, &zero]);
    let soft_off = Name::new("\\_S5_".into(), &soft_off);

    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&system_bus);
    dsdt.append_slice(&encode(&soft_off));
    dsdt.as_slice().to_vec()
}

fn serial_port() -> Vec<u8> {
    let hid = EISAName::new("PNP0501");
    let ports = IO::new(layout::SERIAL_PORT, layout::SERIAL_PORT, 1, serial::PORTS as u8);
    let line = Interrupt::new(true, true, false, false, layout::SERIAL_LINE);
    let hid = Name::new("_HID".into(), &hid);
    let unique = Name::new("_UID".into(), &0u8);
    let resources = ResourceTemplate::new(vec![&ports, &line]);
    let resources = Name::new("_CRS".into(), &resources);
    let device = Device::new("COM1".into(), vec![&hid, &unique, &resources]);
    encode(&Scope::new("\\_SB_".into(), vec![&device]))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(memory: &GuestMemory, address: u64) -> Vec<u8> {
        let len: u32 = memory.read_obj(GuestAddress(address + 4)).unwrap();
        let mut bytes = vec![0; len as usize];
        memory.read_slice(&mut bytes, GuestAddress(address)).unwrap();
        bytes
    }

    #[test]
    fn the_root_pointer_leads_to_tables_with_right_checksums() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let root = write_tables(&memory, 255, &(1 << 32..1 << 40)).unwrap();
        assert_eq!(root, layout::ACPI.start);
        let mut rsdp = [0; 36];
        memory.read_slice(&mut rsdp, GuestAddress(root)).unwrap();
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&memory, u64::from_le_bytes(rsdp[24..32].try_into().unwrap()));
        let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum(&rsdp), 0);
        assert_eq!(sum(&xsdt), 0);
        let mut names = Vec::new();
        for entry in xsdt[36..].chunks(8) {
            let table = table(&memory, u64::from_le_bytes(entry.try_into().unwrap()));
            assert_eq!(sum(&table), 0);
            names.push(String::from_utf8_lossy(&table[..4]).into_owned());
        }
        assert_eq!(names, ["FACP", "APIC", "MCFG"]);
    }
}
