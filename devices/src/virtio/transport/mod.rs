//! Virtio over PCI (4.1): a [`VirtioDevice`] as a [`PciFunction`].
//!
//! BAR 0 has all registers, BAR 4 the device's shared memory, if it has some. Interrupts are MSI-X only:
//! there is no interrupt pin, so a guest without MSI-X support gets none.
//!
//! No lock is held while the device is reset, which waits for its workers, and workers take no lock of the
//! transport but that of the MSI-X table. So neither can a worker that interrupts wait for a vCPU that
//! resets, nor the other way round.

mod capabilities;
mod common;
mod signals;

#[cfg(test)]
mod tests;

use std::io;
use std::sync::{Arc, Mutex};

use crate::memory::AtomicGuestMemory;
use crate::pci::configuration::{ConfigurationError, Identity};
use crate::pci::{Bar, BarKind, Configuration, InterruptController, Msix, PciFunction, WindowSlot};
use crate::sync::lock;

use super::VirtioDevice;
use super::queue::MAX_QUEUE_SIZE;
use capabilities::{PciCfg, REGISTERS_BAR, SHARED_MEMORY_BAR, SharedMemoryCap};
use common::CommonConfiguration;
use signals::Signals;

/// Vendor ID of all virtio devices (4.1.2).
const VENDOR_ID: u16 = 0x1af4;
/// Device ID of device type 0 (4.1.2.1).
const DEVICE_ID_BASE: u16 = 0x1040;
/// Devices without the legacy interface have a revision of at least 1 and a subsystem id of at least 0x40
/// (4.1.2.1, 4.1.2.2).
const REVISION: u8 = 1;
const SUBSYSTEM_ID: u16 = 0x40;

/// The areas of BAR 0, each in pages of its own so that a guest can map them one by one.
mod layout {
    use std::ops::Range;

    pub(super) const COMMON: Range<u64> = 0..0x1000;
    pub(super) const ISR: Range<u64> = 0x1000..0x2000;
    pub(super) const DEVICE: Range<u64> = 0x2000..0x3000;
    pub(super) const NOTIFY: Range<u64> = 0x3000..0x4000;
    pub(super) const PBA: Range<u64> = 0x4000..0x5000;
    /// Room for more entries than a device has queues: see [`super::MAX_QUEUES`].
    pub(super) const MSIX_TABLE: Range<u64> = 0x8000..0x1_0000;
    pub(super) const SIZE: u64 = 0x1_0000;
}

/// Bytes between the notification addresses of two queues (`notify_off_multiplier`, 4.1.4.4).
const NOTIFY_MULTIPLIER: u32 = 4;

/// Most queues of a device: each has a notification address, and all have to fit the area.
const MAX_QUEUES: usize = 1024;

/// A virtio device could not be put on PCI. Never caused by a guest.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The device has no queue, too many, or one of an impossible size.
    #[error("the device's queues cannot be: {0:?}")]
    Queues(Vec<u16>),
    /// The host has no more interrupt vectors.
    #[error("no interrupt vectors")]
    Vectors(#[source] io::Error),
    /// The shared memory is empty or larger than any address space.
    #[error("{0:#x} bytes of shared memory cannot be")]
    SharedMemory(u64),
    /// The registers do not fit. Does not happen.
    #[error(transparent)]
    Configuration(#[from] ConfigurationError),
}

/// A virtio device on the PCI bus.
pub struct VirtioPci {
    device: Arc<dyn VirtioDevice>,
    configuration: Mutex<Configuration>,
    msix: Arc<Msix>,
    /// Offset of the MSI-X capability.
    msix_capability: u16,
    pci_cfg: PciCfg,
    /// What tells how long the shared memory is.
    shared_memory: Option<SharedMemoryCap>,
    common: Arc<CommonConfiguration>,
    signals: Arc<Signals>,
    window: Option<Arc<dyn WindowSlot>>,
}

impl VirtioPci {
    /// Puts `device` behind registers. It gets one interrupt vector for each queue and one for changes of
    /// its configuration. `memory` is where its queues will be.
    ///
    /// # Errors
    ///
    /// [`TransportError`].
    pub fn new(
        device: Arc<dyn VirtioDevice>,
        memory: AtomicGuestMemory,
        controller: &dyn InterruptController,
    ) -> Result<Self, TransportError> {
        let sizes = device.queue_max_sizes().to_vec();
        let possible = |size: &u16| size.is_power_of_two() && *size <= MAX_QUEUE_SIZE;
        if sizes.is_empty() || sizes.len() > MAX_QUEUES || !sizes.iter().all(possible) {
            return Err(TransportError::Queues(sizes));
        }
        // At most `MAX_QUEUES` + 1.
        let vectors = sizes.len() as u16 + 1;
        let msix = Msix::new(controller, vectors).map_err(TransportError::Vectors)?;
        let msix = Arc::new(msix);
        let device_id = device.device_id();
        let mut configuration = Configuration::new(Identity {
            vendor: VENDOR_ID,
            device: DEVICE_ID_BASE.saturating_add(device_id),
            revision: REVISION,
            class: class_code(device_id),
            subsystem_vendor: VENDOR_ID,
            subsystem: SUBSYSTEM_ID,
        });
        configuration.add_bar(Bar {
            index: REGISTERS_BAR,
            kind: BarKind::Memory32,
            prefetchable: false,
            size: layout::SIZE,
        })?;
        let msix_capability = capabilities::add_msix(&mut configuration, &msix)?;
        capabilities::add_registers(&mut configuration, sizes.len() as u32)?;
        let shared = device.shared_memory();
        let mut shared_memory = None;
        if let Some(shared) = &shared {
            let size = shared.size.checked_next_power_of_two();
            let size = size.filter(|size| shared.size >= 4096 && *size < 1 << 52);
            configuration.add_bar(Bar {
                index: SHARED_MEMORY_BAR,
                kind: BarKind::Memory64,
                prefetchable: true,
                size: size.ok_or(TransportError::SharedMemory(shared.size))?,
            })?;
            let capability = SharedMemoryCap::add(&mut configuration, shared.id)?;
            capability.set_length(&mut configuration, device.read_shared_memory_size());
            shared_memory = Some(capability);
        }
        let pci_cfg = PciCfg::add(&mut configuration)?;
        let signals = Arc::new(Signals::new(msix.clone(), sizes.len()));
        let common = CommonConfiguration::new(device.clone(), memory, signals.clone());
        let common = Arc::new(common);
        Ok(Self {
            device,
            configuration: Mutex::new(configuration),
            msix,
            msix_capability,
            pci_cfg,
            shared_memory,
            common,
            signals,
            window: shared.map(|shared| shared.slot),
        })
    }

    fn read_registers(&self, offset: u64, data: &mut [u8]) {
        let len = data.len() as u64;
        if let Some(offset) = inside(&layout::COMMON, offset, len) {
            self.common.read(offset, data);
        } else if let Some(offset) = inside(&layout::ISR, offset, len) {
            data.fill(0);
            if let (0, Some(isr)) = (offset, data.first_mut()) {
                *isr = self.signals.take_isr();
            }
        } else if let Some(offset) = inside(&layout::DEVICE, offset, len) {
            data.fill(0);
            self.device.read_config(offset, data);
        } else if inside(&layout::NOTIFY, offset, len).is_some() {
            data.fill(0);
        } else if let Some(offset) = inside(&layout::PBA, offset, len) {
            self.msix.read_pba(offset, data);
        } else if let Some(offset) = inside(&layout::MSIX_TABLE, offset, len) {
            self.msix.read_table(offset, data);
        }
    }

    fn write_registers(&self, offset: u64, data: &[u8]) {
        let len = data.len() as u64;
        if let Some(offset) = inside(&layout::NOTIFY, offset, len) {
            self.ring(offset, data);
        } else if let Some(offset) = inside(&layout::COMMON, offset, len) {
            self.common.write(offset, data);
        } else if let Some(offset) = inside(&layout::DEVICE, offset, len) {
            self.device.write_config(offset, data);
        } else if let Some(offset) = inside(&layout::MSIX_TABLE, offset, len) {
            self.msix.write_table(offset, data);
        }
    }

    /// A doorbell: the queue's number, written as 16 bits at the queue's address (4.1.5.2).
    fn ring(&self, offset: u64, data: &[u8]) {
        let (Ok(bytes), Ok(queue)) =
            (<[u8; 2]>::try_from(data), u16::try_from(offset / u64::from(NOTIFY_MULTIPLIER)))
        else {
            return;
        };
        let named = u16::from_le_bytes(bytes);
        let valid = offset.is_multiple_of(u64::from(NOTIFY_MULTIPLIER))
            && named == queue
            && usize::from(queue) < self.device.queue_max_sizes().len();
        if valid && self.signals.running() {
            self.device.notify(queue);
        } else {
            log::debug!("notification of queue {named} at {offset:#x} is ignored");
        }
    }
}

impl PciFunction for VirtioPci {
    fn configuration(&self) -> &Mutex<Configuration> {
        &self.configuration
    }

    fn read_config(&self, offset: u16, data: &mut [u8]) {
        if self.pci_cfg.is_data(offset, data.len()) {
            // The lock is not held over the access: see `PciFunction::configuration`.
            let window = self.pci_cfg.window(&lock(&self.configuration));
            if let Some(window) = window {
                let mut bytes = [0xff; 4];
                let target = &mut bytes[..window.len];
                self.read_registers(window.offset, target);
                self.pci_cfg.store(&mut lock(&self.configuration), target);
            }
        }
        let length = self
            .shared_memory
            .as_ref()
            .filter(|capability| capability.begins_length(offset, data.len()))
            .map(|capability| (capability, self.device.read_shared_memory_size()));
        let mut configuration = lock(&self.configuration);
        if let Some((capability, length)) = length {
            capability.set_length(&mut configuration, length);
        }
        configuration.read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) {
        let (control, window) = {
            let mut configuration = lock(&self.configuration);
            configuration.write(offset, data);
            let control = configuration.dword(usize::from(self.msix_capability)) >> 16;
            let window = self
                .pci_cfg
                .is_data(offset, data.len())
                .then(|| self.pci_cfg.window(&configuration))
                .flatten();
            (control as u16, window)
        };
        // Does nothing when nothing is new.
        self.msix.set_control(control);
        if let Some(window) = window {
            self.write_registers(window.offset, &window.data[..window.len]);
        }
    }

    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        if bar == REGISTERS_BAR {
            self.read_registers(offset, data);
        }
    }

    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        if bar == REGISTERS_BAR {
            self.write_registers(offset, data);
        }
    }

    fn window(&self, bar: usize) -> Option<Arc<dyn WindowSlot>> {
        self.window.clone().filter(|_| bar == SHARED_MEMORY_BAR)
    }
}

/// Where in `area` an access is, if it is wholly in there.
fn inside(area: &std::ops::Range<u64>, offset: u64, len: u64) -> Option<u64> {
    let end = offset.checked_add(len)?;
    (offset >= area.start && end <= area.end).then(|| offset - area.start)
}

/// The PCI class that fits a device type: guests choose drivers by the ids, people read the class.
fn class_code(device_id: u16) -> u32 {
    match device_id {
        // Network: Ethernet controller.
        1 => 0x02_00_00,
        // Block, SCSI host, file system: other mass storage controller.
        2 | 8 | 26 => 0x01_80_00,
        // Console, socket: other communication controller.
        3 | 19 => 0x07_80_00,
        // Anything else: unclassified.
        _ => 0xff_00_00,
    }
}
