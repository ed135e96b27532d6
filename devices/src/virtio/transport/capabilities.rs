//! The capabilities by which a driver finds the registers (4.1.4).

use crate::pci::configuration::{Configuration, ConfigurationError};
use crate::pci::{Msix, msix};

use super::{NOTIFY_MULTIPLIER, layout};

/// The BAR with all registers.
pub(super) const REGISTERS_BAR: usize = 0;
/// The BAR that is the shared memory: a pair of registers from here on.
pub(super) const SHARED_MEMORY_BAR: usize = 4;

/// Capability id: vendor specific, which all of virtio's are.
const CAPABILITY_VENDOR: u8 = 0x09;

/// `cfg_type` of `struct virtio_pci_cap`.
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;
const SHARED_MEMORY_CFG: u8 = 8;

/// Bytes of `struct virtio_pci_common_cfg`, up to and with `admin_queue_num`.
pub(super) const COMMON_CFG_SIZE: u32 = 64;

/// Offsets in `struct virtio_pci_cfg_cap`, from the start of the capability.
const PCI_CFG_BAR: usize = 4;
const PCI_CFG_OFFSET: usize = 8;
const PCI_CFG_LENGTH: usize = 12;
const PCI_CFG_DATA: usize = 16;

/// `struct virtio_pci_cap` behind its id and link, with what follows it in the longer capabilities.
fn body(
    cfg_type: u8,
    bar: usize,
    id: u8,
    offset: u32,
    length: u32,
    more: &[u32],
) -> ([u8; 22], usize) {
    let len = 14 + 4 * more.len();
    let mut bytes = [0; 22];
    // `cap_len` counts the id and the link, too.
    let head = [len as u8 + 2, cfg_type, bar as u8, id, 0, 0];
    let words = [offset, length];
    let words = words.iter().chain(more).flat_map(|word| word.to_le_bytes());
    for (target, byte) in bytes.iter_mut().zip(head.into_iter().chain(words)) {
        *target = byte;
    }
    (bytes, len)
}

fn add(
    configuration: &mut Configuration,
    (bytes, len): ([u8; 22], usize),
    writable: &[u8],
) -> Result<u16, ConfigurationError> {
    configuration.add_capability(CAPABILITY_VENDOR, &bytes[..len], writable)
}

/// Adds the MSI-X capability and says where.
pub(super) fn add_msix(
    configuration: &mut Configuration,
    msix: &Msix,
) -> Result<u16, ConfigurationError> {
    let (bytes, writable) = msix.capability(
        REGISTERS_BAR as u8,
        layout::MSIX_TABLE.start as u32,
        layout::PBA.start as u32,
    );
    configuration.add_capability(msix::CAPABILITY_ID, &bytes, &writable)
}

/// Adds the capabilities of the areas of BAR 0.
pub(super) fn add_registers(
    configuration: &mut Configuration,
    queues: u32,
) -> Result<(), ConfigurationError> {
    let area = |cfg_type, area: &std::ops::Range<u64>, length, more: &[u32]| {
        body(cfg_type, REGISTERS_BAR, 0, area.start as u32, length, more)
    };
    let device_size = (layout::DEVICE.end - layout::DEVICE.start) as u32;
    let notify = [NOTIFY_MULTIPLIER];
    for capability in [
        area(COMMON_CFG, &layout::COMMON, COMMON_CFG_SIZE, &[]),
        area(NOTIFY_CFG, &layout::NOTIFY, queues * NOTIFY_MULTIPLIER, &notify),
        area(ISR_CFG, &layout::ISR, 1, &[]),
        area(DEVICE_CFG, &layout::DEVICE, device_size, &[]),
    ] {
        add(configuration, capability, &[])?;
    }
    Ok(())
}

/// Offsets of the halves of the length in `struct virtio_pci_cap64`, from the start of the capability.
const CAP64_LENGTH: usize = 12;
const CAP64_LENGTH_HIGH: usize = 20;

/// The capability of a shared memory region (4.1.4.7), whose length may change.
pub(super) struct SharedMemoryCap {
    at: usize,
}

impl SharedMemoryCap {
    /// Adds the capability of a region that is the first in its BAR.
    pub(super) fn add(
        configuration: &mut Configuration,
        id: u8,
    ) -> Result<Self, ConfigurationError> {
        // `struct virtio_pci_cap64`: the high halves come last, offset first.
        let capability = body(SHARED_MEMORY_CFG, SHARED_MEMORY_BAR, id, 0, 0, &[0, 0]);
        let at = usize::from(add(configuration, capability, &[])?);
        Ok(Self { at })
    }

    /// Whether an access to configuration space begins to read the length. The lower half is read first,
    /// and decides what the upper half says, so that nobody reads two halves of different lengths.
    pub(super) fn begins_length(&self, offset: u16, len: usize) -> bool {
        let (start, length) = (usize::from(offset), self.at + CAP64_LENGTH);
        start < length + 4 && length < start + len
    }

    /// Writes the length.
    pub(super) fn set_length(&self, configuration: &mut Configuration, length: u64) {
        configuration.set(self.at + CAP64_LENGTH, &(length as u32).to_le_bytes());
        let high = (length >> 32) as u32;
        configuration.set(self.at + CAP64_LENGTH_HIGH, &high.to_le_bytes());
    }
}

/// The capability that is a second door to the registers (4.1.4.9), for software that cannot reach BARs.
pub(super) struct PciCfg {
    at: usize,
}

/// What an access to `pci_cfg_data` stands for: an access to BAR 0.
pub(super) struct Window {
    pub(super) offset: u64,
    /// 1, 2 or 4.
    pub(super) len: usize,
    /// What `pci_cfg_data` holds.
    pub(super) data: [u8; 4],
}

impl PciCfg {
    pub(super) fn add(configuration: &mut Configuration) -> Result<Self, ConfigurationError> {
        let capability = body(PCI_CFG, 0, 0, 0, 0, &[0]);
        // Writable are `bar`, `offset`, `length` and the data.
        let writable = [
            0, 0, 0xff, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff,
            0xff,
        ];
        let at = usize::from(add(configuration, capability, &writable)?);
        Ok(Self { at })
    }

    /// Whether an access to configuration space touches `pci_cfg_data`.
    pub(super) fn is_data(&self, offset: u16, len: usize) -> bool {
        let data = self.at + PCI_CFG_DATA;
        let start = usize::from(offset);
        // What configuration space does not answer has no effect here either.
        matches!(len, 1 | 2 | 4)
            && start.is_multiple_of(len)
            && start >= data
            && start + len <= data + 4
    }

    /// The access that the registers describe, if it is one to an area of BAR 0: of 1, 2 or 4 bytes,
    /// aligned.
    pub(super) fn window(&self, configuration: &Configuration) -> Option<Window> {
        let bar = configuration.dword(self.at + PCI_CFG_BAR) as u8;
        let offset = configuration.dword(self.at + PCI_CFG_OFFSET);
        let length = configuration.dword(self.at + PCI_CFG_LENGTH);
        let valid = usize::from(bar) == REGISTERS_BAR
            && matches!(length, 1 | 2 | 4)
            && offset.is_multiple_of(length)
            && u64::from(offset) + u64::from(length) <= layout::SIZE;
        valid.then(|| Window {
            offset: offset.into(),
            len: length as usize,
            data: configuration.dword(self.at + PCI_CFG_DATA).to_le_bytes(),
        })
    }

    /// Puts what was read from the BAR into `pci_cfg_data`.
    pub(super) fn store(&self, configuration: &mut Configuration, data: &[u8]) {
        configuration.set(self.at + PCI_CFG_DATA, data);
    }
}
