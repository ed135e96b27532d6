//! The configuration space of one function: a type 0 header and a capability list (PCI 3.0, chapter 6).
//!
//! Registers are data: 256 bytes, and for each a mask of the bits a write may change. Sizing a BAR needs
//! no code that way: the address bits below its size are simply not writable.

use std::ops::Range;

/// Size of the space in bytes. The functions here are conventional PCI functions, without the extended
/// space of PCI Express.
pub const CONFIGURATION_SIZE: u16 = 256;

/// Number of base address registers in a type 0 header.
pub const BAR_COUNT: usize = 6;

const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
const COMMAND: usize = 0x04;
const STATUS: usize = 0x06;
const REVISION_ID: usize = 0x08;
const CLASS_CODE: usize = 0x09;
const CACHE_LINE_SIZE: usize = 0x0c;
const BASE_ADDRESS_0: usize = 0x10;
const SUBSYSTEM_VENDOR_ID: usize = 0x2c;
const SUBSYSTEM_ID: usize = 0x2e;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// First byte behind the header.
const HEADER_END: usize = 0x40;

/// The function answers at its memory BARs.
const COMMAND_MEMORY_SPACE: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTERRUPT_DISABLE: u16 = 1 << 10;

const STATUS_CAPABILITIES_LIST: u16 = 1 << 4;

/// Bits of a memory BAR that are not address (PCI 3.0, 6.2.5.1).
const BAR_TYPE_64: u64 = 0b100;
const BAR_PREFETCHABLE: u64 = 0b1000;
/// The smallest memory BAR: the four low bits are not address.
const BAR_MIN_SIZE: u64 = 16;

/// What the read-only registers of the header say.
#[derive(Clone, Copy, Debug, Default)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Base class, sub-class and programming interface, from the high to the low of three bytes.
    pub class: u32,
    /// Subsystem Vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// How wide a memory BAR's address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// One register; the address is below 4 GiB.
    Memory32,
    /// Two registers.
    Memory64,
}

/// One memory BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bar {
    /// Index of its (first) register, 0 to 5.
    pub index: usize,
    /// How wide its address is.
    pub kind: BarKind,
    /// Whether reading has no side effect.
    pub prefetchable: bool,
    /// Size in bytes, a power of two of at least 16; also the alignment of its address.
    pub size: u64,
}

/// A mistake in the description of a function. Never caused by a guest.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigurationError {
    /// The BAR's size is not a power of two, too small or too large, or its registers are not there or in
    /// use.
    #[error("BAR {0:?} cannot be laid out")]
    Bar(Bar),
    /// The capabilities are longer than the space.
    #[error("no room for a capability of {len} bytes")]
    NoRoom {
        /// Length of the capability in bytes.
        len: usize,
    },
}

/// The registers of one function.
pub struct Configuration {
    bytes: [u8; CONFIGURATION_SIZE as usize],
    /// For each byte, the bits that a write changes.
    writable: [u8; CONFIGURATION_SIZE as usize],
    bars: Vec<Bar>,
    /// Where the next capability's offset is to be written.
    link: usize,
    /// Where the next capability starts.
    free: usize,
}

impl Configuration {
    /// A function without BARs and capabilities. It uses no interrupt pin: functions here have MSI-X or
    /// no interrupt.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIGURATION_SIZE as usize],
            writable: [0; CONFIGURATION_SIZE as usize],
            bars: Vec::new(),
            link: CAPABILITIES_POINTER,
            free: HEADER_END,
        };
        space.set(VENDOR_ID, &identity.vendor.to_le_bytes());
        space.set(DEVICE_ID, &identity.device.to_le_bytes());
        let class = identity.class.to_le_bytes();
        space.set(REVISION_ID, &[identity.revision]);
        space.set(CLASS_CODE, &class[..3]);
        space.set(SUBSYSTEM_VENDOR_ID, &identity.subsystem_vendor.to_le_bytes());
        space.set(SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        let command = COMMAND_MEMORY_SPACE | COMMAND_BUS_MASTER | COMMAND_INTERRUPT_DISABLE;
        space.allow(COMMAND, &command.to_le_bytes());
        // Registers in which a driver keeps notes; the function looks at neither.
        space.allow(CACHE_LINE_SIZE, &[0xff]);
        space.allow(INTERRUPT_LINE, &[0xff]);
        space
    }

    /// Gives the function a BAR, at address 0 until [`place_bar`](Self::place_bar).
    ///
    /// # Errors
    ///
    /// [`ConfigurationError::Bar`].
    pub fn add_bar(&mut self, bar: Bar) -> Result<(), ConfigurationError> {
        let (registers, max, flags) = match bar.kind {
            BarKind::Memory32 => (1, 1 << 31, 0),
            BarKind::Memory64 => (2, 1 << 63, BAR_TYPE_64),
        };
        let taken = |index| {
            self.bars.iter().any(|other| {
                let count = if other.kind == BarKind::Memory64 { 2 } else { 1 };
                (other.index..other.index + count).contains(&index)
            })
        };
        let fits = bar.index < BAR_COUNT
            && bar.index + registers <= BAR_COUNT
            && !(bar.index..bar.index + registers).any(taken);
        let sized = bar.size.is_power_of_two() && (BAR_MIN_SIZE..=max).contains(&bar.size);
        if !fits || !sized {
            return Err(ConfigurationError::Bar(bar));
        }
        let flags = flags | if bar.prefetchable { BAR_PREFETCHABLE } else { 0 };
        let at = BASE_ADDRESS_0 + 4 * bar.index;
        self.set(at, &flags.to_le_bytes()[..4 * registers]);
        self.allow(at, &(!(bar.size - 1)).to_le_bytes()[..4 * registers]);
        self.bars.push(bar);
        Ok(())
    }

    /// Appends a capability with the given bytes behind its id and link, and says at which offset it is.
    /// `writable` are the bits of `body` the guest may change; what it leaves out is read-only.
    ///
    /// # Errors
    ///
    /// [`ConfigurationError::NoRoom`].
    pub fn add_capability(
        &mut self,
        id: u8,
        body: &[u8],
        writable: &[u8],
    ) -> Result<u16, ConfigurationError> {
        let at = self.free;
        let len = 2 + body.len();
        // Capabilities start at a multiple of four (PCI 3.0, 6.7).
        let end = at + len.next_multiple_of(4);
        let (Ok(offset), Ok(link)) = (u16::try_from(at), u8::try_from(at)) else {
            return Err(ConfigurationError::NoRoom { len });
        };
        if end > self.bytes.len() {
            return Err(ConfigurationError::NoRoom { len });
        }
        self.set(STATUS, &STATUS_CAPABILITIES_LIST.to_le_bytes());
        self.set(self.link, &[link]);
        self.set(at, &[id, 0]);
        self.set(at + 2, body);
        self.allow(at + 2, writable);
        self.link = at + 1;
        self.free = end;
        Ok(offset)
    }

    /// The function's BARs, in the order they were added.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// Writes the address of a BAR, as firmware would.
    pub fn place_bar(&mut self, bar: Bar, address: u64) {
        let at = BASE_ADDRESS_0 + 4 * bar.index;
        let bytes = address.to_le_bytes();
        self.write_masked(at, &bytes[..4]);
        if bar.kind == BarKind::Memory64 {
            self.write_masked(at + 4, &bytes[4..]);
        }
    }

    /// The address the guest has given a BAR, whether or not it is decoded.
    pub fn bar_address(&self, bar: Bar) -> u64 {
        let at = BASE_ADDRESS_0 + 4 * bar.index;
        let low = self.dword(at);
        let high = match bar.kind {
            BarKind::Memory32 => 0,
            BarKind::Memory64 => self.dword(at + 4),
        };
        (u64::from(high) << 32 | u64::from(low)) & !(bar.size - 1)
    }

    /// Whether the guest has made the function answer at its memory BARs.
    pub fn decodes_memory(&self) -> bool {
        self.dword(COMMAND) & u32::from(COMMAND_MEMORY_SPACE) != 0
    }

    /// Whether a write of `len` bytes at `offset` may change what [`decodes_memory`](Self::decodes_memory)
    /// or [`bar_address`](Self::bar_address) say.
    pub fn decides_decoding(offset: u16, len: usize) -> bool {
        let first = usize::from(offset);
        let overlaps = |range: Range<usize>| first < range.end && range.start < first + len;
        overlaps(COMMAND..STATUS) || overlaps(BASE_ADDRESS_0..BASE_ADDRESS_0 + 4 * BAR_COUNT)
    }

    /// A guest read. Anything but 1, 2 or 4 aligned bytes inside the space reads as ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        match aligned(offset, data.len()).and_then(|range| self.bytes.get(range)) {
            Some(bytes) => data.copy_from_slice(bytes),
            None => data.fill(0xff),
        }
    }

    /// A guest write: changes the writable bits. Anything but 1, 2 or 4 aligned bytes inside the space is
    /// ignored.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        if let Some(range) = aligned(offset, data.len()) {
            self.write_masked(range.start, data);
        }
    }

    /// The device's own write to a register of its own, whatever the guest may do there.
    pub fn set(&mut self, offset: usize, bytes: &[u8]) {
        for (target, byte) in self.bytes.iter_mut().skip(offset).zip(bytes) {
            *target = *byte;
        }
    }

    /// The four bytes at `offset`; ones outside of the space.
    pub fn dword(&self, offset: usize) -> u32 {
        let bytes = self.bytes.get(offset..).and_then(<[u8]>::first_chunk);
        bytes.map_or(u32::MAX, |bytes| u32::from_le_bytes(*bytes))
    }

    fn allow(&mut self, offset: usize, mask: &[u8]) {
        for (target, bits) in self.writable.iter_mut().skip(offset).zip(mask) {
            *target = *bits;
        }
    }

    fn write_masked(&mut self, offset: usize, data: &[u8]) {
        let registers = self.bytes.iter_mut().zip(&self.writable);
        for ((target, mask), byte) in registers.skip(offset).zip(data) {
            *target = *target & !mask | byte & mask;
        }
    }
}

/// The bytes of an access that configuration space answers.
fn aligned(offset: u16, len: usize) -> Option<Range<usize>> {
    let start = usize::from(offset);
    let valid = matches!(len, 1 | 2 | 4)
        && start.is_multiple_of(len)
        && start + len <= usize::from(CONFIGURATION_SIZE);
    valid.then_some(start..start + len)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BAR_4: Bar = Bar { index: 4, kind: BarKind::Memory64, prefetchable: true, size: 1 << 33 };

    fn space() -> Configuration {
        let mut space = Configuration::new(Identity {
            vendor: 0x1af4,
            device: 0x105a,
            class: 0x018000,
            ..Identity::default()
        });
        let bar_0 = Bar { index: 0, kind: BarKind::Memory32, prefetchable: false, size: 0x1000 };
        space.add_bar(bar_0).unwrap();
        space.add_bar(BAR_4).unwrap();
        space
    }

    #[test]
    fn a_bar_of_ones_reads_back_its_size_and_its_flags() {
        let mut space = space();
        for index in 0..6 {
            space.write(0x10 + 4 * index, &[0xff; 4]);
        }
        let read: Vec<_> = (0..6).map(|index| space.dword(0x10 + 4 * index)).collect();
        assert_eq!(read, [0xffff_f000, 0, 0, 0, 0xc, 0xffff_fffe]);
        space.place_bar(BAR_4, 3 << 33);
        assert_eq!(space.bar_address(BAR_4), 3 << 33);
    }

    #[test]
    fn read_only_registers_do_not_change() {
        let mut space = space();
        for offset in (0..256).step_by(4) {
            space.write(offset, &[0xff; 4]);
        }
        assert_eq!(space.dword(VENDOR_ID), 0x105a_1af4);
        assert_eq!(space.dword(0x08), 0x0180_0000);
        assert_eq!(space.dword(COMMAND), 0x0406);
        assert!(space.decodes_memory());
        for offset in 0x40..0x100 {
            assert_eq!(space.bytes[offset], 0);
        }
    }

    #[test]
    fn an_access_of_odd_size_or_place_has_no_effect() {
        let mut space = space();
        for (offset, len) in [(4, 3), (4, 8), (5, 2), (2, 4), (256, 1), (0xffff, 1), (4, 0)] {
            space.write(offset, &[0xff; 8][..len]);
            let mut data = [0; 8];
            space.read(offset, &mut data[..len]);
            assert!(data[..len].iter().all(|byte| *byte == 0xff), "{offset:#x}");
        }
        assert_eq!(space.dword(COMMAND), 0);
    }

    #[test]
    fn capabilities_form_a_list_until_the_space_is_full() {
        let mut space = space();
        assert_eq!(space.add_capability(9, &[1, 2, 3], &[]), Ok(0x40));
        assert_eq!(space.add_capability(0x11, &[0; 10], &[0, 0xc0]), Ok(0x48));
        let status = u32::from(STATUS_CAPABILITIES_LIST) << 16;
        assert_eq!(space.dword(COMMAND), status);
        assert_eq!(space.dword(CAPABILITIES_POINTER), 0x40);
        assert_eq!(space.dword(0x40), 0x0201_4809);
        space.write(0x4a, &[0xff; 2]);
        assert_eq!(space.dword(0x48), 0xc000_0011);
        let error = space.add_capability(9, &[0; 180], &[]);
        assert_eq!(error, Err(ConfigurationError::NoRoom { len: 182 }));
    }

    #[test]
    fn a_bar_that_cannot_be_is_refused() {
        let mut space = space();
        let good = Bar { index: 1, kind: BarKind::Memory32, prefetchable: false, size: 16 };
        for bad in [
            Bar { index: 0, ..good },
            Bar { index: 5, ..good },
            Bar { index: 6, ..good },
            Bar { size: 8, ..good },
            Bar { size: 24, ..good },
            Bar { size: 1 << 32, ..good },
            Bar { index: 3, kind: BarKind::Memory64, ..good },
        ] {
            assert_eq!(space.add_bar(bad), Err(ConfigurationError::Bar(bad)));
        }
        assert_eq!(space.add_bar(good), Ok(()));
    }
}
