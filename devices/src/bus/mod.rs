//! Port and memory-mapped I/O: which device answers at an address.

use std::sync::Arc;

/// A device that answers accesses to a range of ports or addresses.
///
/// Called by vCPU threads, several at a time. `data` is 1, 2, 4 or 8 bytes long, and `offset + data.len()`
/// never passes the end of the range the device was attached with; neither is aligned in any way. What a
/// device does not implement reads as it finds it: the bus fills `data` with ones beforehand.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset` from the start of the device's range.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset` from the start of the device's range.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range could not be attached.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// It is empty or passes the end of the address space.
    #[error("{start:#x}+{len:#x} is not a range")]
    Range {
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
    /// It shares an address with a device that is already there.
    #[error("{start:#x}+{len:#x} overlaps another device")]
    Overlap {
        /// First address.
        start: u64,
        /// Length in bytes.
        len: u64,
    },
}

struct Range {
    start: u64,
    len: u64,
    device: Arc<dyn BusDevice>,
}

/// One address space (ports, or memory-mapped I/O). Built before the first vCPU runs and never changed
/// after, so that looking up a device takes no lock: what the guest moves (PCI BARs) is looked up by the
/// device that owns the whole area.
#[derive(Default)]
pub struct Bus {
    /// Sorted by `start`, not overlapping.
    ranges: Vec<Range>,
}

impl Bus {
    /// A bus on which nobody answers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lets `device` answer `len` addresses from `start` on.
    ///
    /// # Errors
    ///
    /// [`BusError`] when the range is empty, wraps, or overlaps another; the bus is unchanged then.
    pub fn attach(
        &mut self,
        start: u64,
        len: u64,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let last = len.checked_sub(1).and_then(|rest| start.checked_add(rest));
        let last = last.ok_or(BusError::Range { start, len })?;
        let at = self.ranges.partition_point(|range| range.start < start);
        let overlaps_previous = at
            .checked_sub(1)
            .and_then(|before| self.ranges.get(before))
            .is_some_and(|before| start - before.start < before.len);
        let overlaps_next = self.ranges.get(at).is_some_and(|next| next.start <= last);
        if overlaps_previous || overlaps_next {
            return Err(BusError::Overlap { start, len });
        }
        self.ranges.insert(at, Range { start, len, device });
        Ok(())
    }

    /// A guest read. All ones where nobody answers, as on a real bus.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.read(offset, data);
        }
    }

    /// A guest write. Lost where nobody answers.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, &dyn BusDevice)> {
        let after = self.ranges.partition_point(|range| range.start <= address);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        let offset = address - range.start;
        let end = offset.checked_add(len as u64)?;
        (end <= range.len).then(|| (offset, range.device.as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    #[derive(Default)]
    struct Latch(AtomicU64);

    impl BusDevice for Latch {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill((self.0.load(Ordering::Relaxed) + offset) as u8);
        }
        fn write(&self, _offset: u64, data: &[u8]) {
            self.0.store(data[0].into(), Ordering::Relaxed);
        }
    }

    #[test]
    fn an_access_goes_to_the_device_that_holds_all_of_it() {
        let mut bus = Bus::new();
        bus.attach(0x10, 4, Arc::new(Latch::default())).unwrap();
        bus.write(0x10, &[5]);
        let mut byte = [0];
        bus.read(0x13, &mut byte);
        assert_eq!(byte, [8]);
        let mut word = [0; 4];
        bus.read(0x12, &mut word);
        assert_eq!(word, [0xff; 4], "straddles the end of the device");
        bus.read(0xf, &mut byte);
        assert_eq!(byte, [0xff], "before the device");
        bus.read(u64::MAX, &mut word);
        assert_eq!(word, [0xff; 4], "wraps");
    }

    #[test]
    fn ranges_do_not_overlap() {
        let mut bus = Bus::new();
        let device = || Arc::new(Latch::default());
        bus.attach(0x10, 0x10, device()).unwrap();
        for (start, len) in [(0x10, 1), (0x1f, 1), (0, 0x11), (0, 0x100), (0x18, 0x100)] {
            let error = bus.attach(start, len, device()).unwrap_err();
            assert_eq!(error, BusError::Overlap { start, len });
        }
        for (start, len) in [(0, 0), (u64::MAX, 2)] {
            let error = bus.attach(start, len, device()).unwrap_err();
            assert_eq!(error, BusError::Range { start, len });
        }
        bus.attach(0, 0x10, device()).unwrap();
        bus.attach(0x20, 1, device()).unwrap();
        bus.attach(u64::MAX, 1, device()).unwrap();
    }
}
