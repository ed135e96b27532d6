//! The root complex: bus 0, its two doors to configuration space, and the routing of BARs.
//!
//! There is no firmware: the root gives every BAR its address when the function is added. The guest may
//! move BARs and turn them off at any time; the routing follows at once.
//!
//! Locks, from the outside in: writes of what decides about decoding (one at a time over the bus), a
//! function's configuration, the routing table. A window is placed under the first alone, so a slot may take whatever
//! locks the machine has, but must not access configuration space. None is held while a BAR is accessed,
//! which may take as long as resetting a device takes.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, RwLock};

use vm_memory::GuestAddress;

use super::configuration::{Bar, BarKind, CONFIGURATION_SIZE, Configuration, Identity};
use super::{PciFunction, WindowSlot};
use crate::bus::BusDevice;
use crate::complaint::complain;
use crate::sync::{lock, read, write};

/// Bytes of the memory-mapped configuration space of bus 0: 32 devices of 8 functions of 4 KiB.
pub const ECAM_SIZE: u64 = 1 << 20;

/// Number of ports from 0xCF8 on: the address register and the data register, 4 bytes each.
pub const PORT_COUNT: u64 = 8;

/// Devices on a bus. Device 0 is the host bridge.
const DEVICES: usize = 32;

/// Configuration address register: the data register reaches configuration space (PCI 3.0, 3.2.2.3.2).
const ADDRESS_ENABLE: u32 = 1 << 31;

/// The host bridge: Red Hat's id for a bridge of a virtual machine, because drivers attach quirks to those
/// of real chipsets.
const HOST_BRIDGE: Identity = Identity {
    vendor: 0x1b36,
    device: 0x0008,
    revision: 0,
    class: 0x06_00_00,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// The stretches of guest-physical addresses in which BARs may be.
#[derive(Clone, Debug)]
pub struct AddressWindows {
    /// Below 4 GiB.
    pub mmio32: Range<u64>,
    /// Anywhere.
    pub mmio64: Range<u64>,
}

/// One of the [`AddressWindows`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressWindow {
    /// The one below 4 GiB.
    Mmio32,
    /// The other one.
    Mmio64,
}

impl AddressWindows {
    fn range(&self, window: AddressWindow) -> &Range<u64> {
        match window {
            AddressWindow::Mmio32 => &self.mmio32,
            AddressWindow::Mmio64 => &self.mmio64,
        }
    }
}

/// Where a function is. There is one bus, 0, and functions are not grouped: all are function 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PciAddress {
    /// Device number, 0 to 31.
    pub device: u8,
}

impl std::fmt::Display for PciAddress {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "00:{:02x}.0", self.device)
    }
}

/// A function could not be added.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RootError {
    /// All devices of the bus are taken.
    #[error("the PCI bus has no more than {DEVICES} devices")]
    BusFull,
    /// No address is left for a BAR.
    #[error("no {size:#x} bytes left for BAR {bar} in {window:?}")]
    NoAddress {
        /// Index of the BAR.
        bar: usize,
        /// Its size in bytes.
        size: u64,
        /// Where it was to go.
        window: AddressWindow,
    },
}

/// A BAR that is decoded.
#[derive(Clone)]
struct Mapping {
    start: u64,
    size: u64,
    device: usize,
    bar: usize,
    function: Arc<dyn PciFunction>,
    /// The BAR shows a window and has no registers.
    window: Option<Arc<dyn WindowSlot>>,
}

impl Mapping {
    fn is(&self, other: &Self) -> bool {
        self.same_bar(other) && self.start == other.start
    }

    fn same_bar(&self, other: &Self) -> bool {
        (self.device, self.bar) == (other.device, other.bar)
    }

    fn overlaps(&self, other: &Self) -> bool {
        // Neither sum overflows: a mapping is inside one of the windows.
        self.start < other.start + other.size && other.start < self.start + self.size
    }
}

struct Inner {
    windows: AddressWindows,
    /// By device number.
    functions: RwLock<Vec<Arc<dyn PciFunction>>>,
    /// What is decoded now, by address.
    mappings: RwLock<Vec<Mapping>>,
    /// Held while what decides about decoding is written and the routing follows.
    writing: Mutex<()>,
    /// The first unused address of each window.
    free: Mutex<AddressWindows>,
}

/// The root complex of the machine.
#[derive(Clone)]
pub struct PciRoot(Arc<Inner>);

impl PciRoot {
    /// A bus with nothing on it but the host bridge.
    pub fn new(windows: AddressWindows) -> Self {
        let bridge: Arc<dyn PciFunction> =
            Arc::new(HostBridge(Mutex::new(Configuration::new(HOST_BRIDGE))));
        Self(Arc::new(Inner {
            free: Mutex::new(windows.clone()),
            windows,
            functions: RwLock::new(vec![bridge]),
            mappings: RwLock::default(),
            writing: Mutex::default(),
        }))
    }

    /// Puts a function on the bus and gives its BARs their addresses: 64-bit ones in the window that may
    /// be anywhere, others below 4 GiB, each aligned to its size. It does not answer there before the
    /// guest's driver enables it.
    ///
    /// # Errors
    ///
    /// [`RootError`]; the function is not on the bus then.
    pub fn add(&self, function: Arc<dyn PciFunction>) -> Result<PciAddress, RootError> {
        let mut functions = write(&self.0.functions);
        let device = functions.len();
        if device >= DEVICES {
            return Err(RootError::BusFull);
        }
        {
            let mut configuration = lock(function.configuration());
            let mut free = lock(&self.0.free);
            for bar in configuration.bars().to_vec() {
                let address = take_address(&mut free, bar)?;
                configuration.place_bar(bar, address);
            }
        }
        functions.push(function);
        Ok(PciAddress { device: device as u8 })
    }

    /// The memory-mapped configuration space ([`ECAM_SIZE`] bytes; PCI Express 3.0, 7.2.2) of bus 0.
    pub fn ecam(&self) -> Arc<dyn BusDevice> {
        Arc::new(Ecam(self.0.clone()))
    }

    /// The [`PORT_COUNT`] ports at 0xCF8 (PCI 3.0, 3.2.2.3.2).
    pub fn ports(&self) -> Arc<dyn BusDevice> {
        Arc::new(Ports { root: self.0.clone(), address: AtomicU32::new(0) })
    }

    /// Everything in one of the windows; to be attached over all of it.
    pub fn mmio(&self, window: AddressWindow) -> Arc<dyn BusDevice> {
        Arc::new(Mmio { base: self.0.windows.range(window).start, root: self.0.clone() })
    }
}

/// Takes an address for `bar` from the front of its window.
fn take_address(free: &mut AddressWindows, bar: Bar) -> Result<u64, RootError> {
    let (window, range) = match bar.kind {
        BarKind::Memory32 => (AddressWindow::Mmio32, &mut free.mmio32),
        BarKind::Memory64 => (AddressWindow::Mmio64, &mut free.mmio64),
    };
    let start = range.start.checked_next_multiple_of(bar.size);
    let taken = start.and_then(|start| Some((start, start.checked_add(bar.size)?)));
    match taken {
        Some((start, end)) if end <= range.end => {
            range.start = end;
            Ok(start)
        }
        _ => Err(RootError::NoAddress { bar: bar.index, size: bar.size, window }),
    }
}

impl Inner {
    fn function(&self, device: usize) -> Option<Arc<dyn PciFunction>> {
        read(&self.functions).get(device).cloned()
    }

    fn read_config(&self, device: usize, register: u16, data: &mut [u8]) {
        match self.function(device) {
            Some(function) if register < CONFIGURATION_SIZE => {
                function.read_config(register, data);
            }
            _ => data.fill(0xff),
        }
    }

    fn write_config(&self, device: usize, register: u16, data: &[u8]) {
        let Some(function) = self.function(device) else {
            return;
        };
        let moves = Configuration::decides_decoding(register, data.len());
        // Not held for all writes: one of the PCI_CFG capability is an access to a BAR, which may take long.
        let _one_at_a_time = moves.then(|| lock(&self.writing));
        function.write_config(register, data);
        if moves {
            self.route();
        }
    }

    /// The BARs that the guest wants decoded, at addresses of its choice.
    fn wanted(&self) -> Vec<Mapping> {
        let functions = read(&self.functions);
        let mut wanted = Vec::new();
        for (device, function) in functions.iter().enumerate() {
            let configuration = lock(function.configuration());
            if !configuration.decodes_memory() {
                continue;
            }
            wanted.extend(configuration.bars().iter().map(|bar| Mapping {
                start: configuration.bar_address(*bar),
                size: bar.size,
                device,
                bar: bar.index,
                function: function.clone(),
                window: function.window(bar.index),
            }));
        }
        wanted
    }

    /// Makes the routing follow the registers. What is decoded already has precedence over what comes to
    /// lie on it; a BAR outside of the windows or on another is not decoded until one of them moves.
    fn route(&self) {
        let old = read(&self.mappings).clone();
        let (mut new, moved): (Vec<_>, Vec<_>) = self
            .wanted()
            .into_iter()
            .partition(|wanted| old.iter().any(|mapping| mapping.is(wanted)));
        let mut shown = Vec::new();
        for wanted in moved {
            if !self.is_free(&wanted, &new) {
                // At debug level: the guest can do this as often as it likes, and a log takes disk.
                log::debug!(
                    "BAR {} of {} cannot be at {:#x}: not decoded",
                    wanted.bar,
                    wanted.device,
                    wanted.start
                );
                continue;
            }
            if wanted.window.is_some() {
                shown.push(wanted.clone());
            }
            new.push(wanted);
        }
        for gone in &old {
            if let Some(window) = &gone.window
                && !new.iter().any(|mapping| mapping.same_bar(gone))
            {
                place(window.as_ref(), None);
            }
        }
        new.retain(|mapping| {
            let moved = shown.iter().any(|shown| shown.same_bar(mapping));
            match &mapping.window {
                Some(window) if moved => {
                    // Nowhere at all is better than at an address the BAR no longer has.
                    place(window.as_ref(), Some(mapping.start)) || {
                        place(window.as_ref(), None);
                        false
                    }
                }
                _ => true,
            }
        });
        new.sort_by_key(|mapping| mapping.start);
        *write(&self.mappings) = new;
    }

    fn is_free(&self, wanted: &Mapping, mappings: &[Mapping]) -> bool {
        let inside = |range: &Range<u64>| {
            wanted.start >= range.start
                && wanted.start.checked_add(wanted.size).is_some_and(|end| end <= range.end)
        };
        (inside(&self.windows.mmio32) || inside(&self.windows.mmio64))
            && !mappings.iter().any(|mapping| mapping.overlaps(wanted))
    }

    /// The function, BAR and offset in it behind an access, which must be wholly inside the BAR.
    fn find(&self, address: u64, len: usize) -> Option<(Arc<dyn PciFunction>, usize, u64)> {
        let mappings = read(&self.mappings);
        let after = mappings.partition_point(|mapping| mapping.start <= address);
        let mapping = mappings.get(after.checked_sub(1)?)?;
        let offset = address - mapping.start;
        let inside = offset.checked_add(len as u64)? <= mapping.size;
        (inside && mapping.window.is_none())
            .then(|| (mapping.function.clone(), mapping.bar, offset))
    }
}

/// Tells a window where to be; whether it is there.
fn place(window: &dyn WindowSlot, address: Option<u64>) -> bool {
    window
        .place(address.map(GuestAddress))
        .inspect_err(|error| {
            complain!(host: "a window could not be placed at {address:x?}: {error}");
        })
        .is_ok()
}

struct Ecam(Arc<Inner>);

impl Ecam {
    /// Device and register of an offset; functions other than 0 do not exist.
    fn target(offset: u64) -> Option<(usize, u16)> {
        let function = offset >> 12 & 7;
        (offset < ECAM_SIZE && function == 0)
            .then_some(((offset >> 15) as usize, (offset & 0xfff) as u16))
    }
}

impl BusDevice for Ecam {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match Self::target(offset) {
            Some((device, register)) => self.0.read_config(device, register, data),
            None => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some((device, register)) = Self::target(offset) {
            self.0.write_config(device, register, data);
        }
    }
}

struct Ports {
    root: Arc<Inner>,
    address: AtomicU32,
}

impl Ports {
    /// Device and register that the data register now stands for, for an access `offset` bytes into it.
    fn target(&self, offset: u64) -> Option<(usize, u16)> {
        let address = self.address.load(Ordering::Relaxed);
        let bus_and_function = address >> 16 & 0xff | address >> 8 & 7;
        let register = (address & 0xfc) as u16 + (offset & 3) as u16;
        (address & ADDRESS_ENABLE != 0 && bus_and_function == 0)
            .then_some(((address >> 11 & 0x1f) as usize, register))
    }
}

impl BusDevice for Ports {
    fn read(&self, offset: u64, data: &mut [u8]) {
        match (offset, data.len()) {
            // Only a whole dword is the address register; anything else there passes by.
            (0, 4) => {
                data.copy_from_slice(&self.address.load(Ordering::Relaxed).to_le_bytes());
            }
            (4.., _) => match self.target(offset) {
                Some((device, register)) => self.root.read_config(device, register, data),
                None => data.fill(0xff),
            },
            _ => data.fill(0xff),
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, <[u8; 4]>::try_from(data)) {
            (0, Ok(bytes)) => self.address.store(u32::from_le_bytes(bytes), Ordering::Relaxed),
            (4.., _) => {
                if let Some((device, register)) = self.target(offset) {
                    self.root.write_config(device, register, data);
                }
            }
            _ => {}
        }
    }
}

struct Mmio {
    root: Arc<Inner>,
    base: u64,
}

impl BusDevice for Mmio {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let target = self.base.checked_add(offset);
        let target = target.and_then(|address| self.root.find(address, data.len()));
        if let Some((function, bar, offset)) = target {
            function.read_bar(bar, offset, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let target = self.base.checked_add(offset);
        let target = target.and_then(|address| self.root.find(address, data.len()));
        if let Some((function, bar, offset)) = target {
            function.write_bar(bar, offset, data);
        }
    }
}

struct HostBridge(Mutex<Configuration>);

impl PciFunction for HostBridge {
    fn configuration(&self) -> &Mutex<Configuration> {
        &self.0
    }

    fn read_bar(&self, _bar: usize, _offset: u64, _data: &mut [u8]) {}

    fn write_bar(&self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

#[cfg(test)]
mod tests;
