//! A split virtqueue (2.7), from the device's side.
//!
//! Ring positions and notification suppression are `virtio_queue`'s. Descriptors are walked here, for two
//! reasons: that crate ends a broken chain early without a word, and it reads an indirect table with plain
//! loads wherever it is, while a guest may put it where only system calls may read (see [`crate::memory`]).
//!
//! Every descriptor is copied once and only the copy is looked at.

use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue as Ring, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemory as _, GuestMemoryRegion};

use super::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use crate::memory::{BufferError, GuestBuffer, GuestMemory};

/// The descriptor continues in the one `next` names.
const VIRTQ_DESC_F_NEXT: u16 = 1;
/// The device writes to the buffer; without, it reads.
const VIRTQ_DESC_F_WRITE: u16 = 2;
/// The buffer is a table of descriptors.
const VIRTQ_DESC_F_INDIRECT: u16 = 4;
/// The driver does not want to be interrupted; only without EVENT_IDX.
const VIRTQ_AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Most descriptors in a queue (2.7).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Bytes of a descriptor.
const DESCRIPTOR_SIZE: u64 = 16;

/// Most bytes in one chain (2.7.5.2).
const MAX_CHAIN_BYTES: u64 = 1 << 32;

/// Where the driver says the three parts of a queue are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Rings {
    /// Number of descriptors.
    pub size: u16,
    /// Guest-physical address of the descriptor area.
    pub descriptors: u64,
    /// Guest-physical address of the driver area (available ring).
    pub driver: u64,
    /// Guest-physical address of the device area (used ring).
    pub device: u64,
}

/// A queue the driver has set up in a way that cannot work.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum RingError {
    /// The size is 0, not a power of two, or above 32768.
    #[error("a queue cannot have {0} descriptors")]
    Size(u16),
    /// A part is not aligned: to 16, 2 and 4 bytes (2.7).
    #[error("queue area at {0:#x} is not aligned")]
    Alignment(u64),
    /// A part wraps, leaves RAM, or is in a window whose pages may vanish.
    #[error("queue area at {address:#x}+{len:#x} is not RAM")]
    NotRam {
        /// Guest-physical address.
        address: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Two parts share a byte.
    #[error("queue areas overlap")]
    Overlap,
}

/// The driver has broken the queue. The queue cannot be used any more: the device stops it and says that
/// it needs a reset.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The available index is further ahead than the queue is long.
    #[error("more requests are available than the queue has descriptors")]
    AvailableIndex,
    /// A ring is no longer where it was checked to be.
    #[error("a ring cannot be accessed")]
    Ring,
    /// The head of a chain is not in the descriptor area.
    #[error("head {0} is not in the queue")]
    Head(u16),
    /// The head is that of a chain the device still works on.
    #[error("head {0} is in flight already")]
    InFlight(u16),
    /// `next` is not in the table.
    #[error("descriptor {0} is not in its table")]
    Next(u16),
    /// The chain has more descriptors than the queue, or a loop.
    #[error("a chain is longer than the queue, or a loop")]
    TooLong,
    /// The chain has more than 2^32 bytes.
    #[error("a chain has more than 4 GiB")]
    TooManyBytes,
    /// A buffer to read from comes behind one to write to (2.7.4.2).
    #[error("a readable buffer is behind a writable one")]
    Order,
    /// A buffer is not memory.
    #[error("a buffer cannot be used")]
    Buffer(#[source] BufferError),
    /// An indirect descriptor, without the feature.
    #[error("an indirect descriptor without the feature")]
    IndirectNotNegotiated,
    /// An indirect descriptor that also has a next one.
    #[error("an indirect descriptor has a next one")]
    IndirectNext,
    /// An indirect descriptor in an indirect table.
    #[error("an indirect table in an indirect table")]
    IndirectNested,
    /// An indirect table that is empty, not made of whole descriptors, or longer than the queue.
    #[error("an indirect table of {0} bytes")]
    IndirectLength(u32),
    /// An indirect table that is not in RAM: no driver has one in a window, where to read it may take as long as a
    /// disk does.
    #[error("an indirect table cannot be read")]
    IndirectTable,
    /// A chain was completed that is not in flight: a mistake of the device.
    #[error("head {0} is not in flight")]
    NotInFlight(u16),
}

impl Rings {
    /// Checks all that can be checked before the queue is used.
    ///
    /// # Errors
    ///
    /// [`RingError`], one for each mistake.
    pub fn check(&self, memory: &GuestMemory) -> Result<(), RingError> {
        if !self.size.is_power_of_two() || self.size > MAX_QUEUE_SIZE {
            return Err(RingError::Size(self.size));
        }
        let size = u64::from(self.size);
        // Alignments and lengths of 2.7, the lengths with the event fields of EVENT_IDX.
        let areas = [
            (self.descriptors, 16, DESCRIPTOR_SIZE * size),
            (self.driver, 2, 6 + 2 * size),
            (self.device, 4, 6 + 8 * size),
        ];
        for (address, alignment, len) in areas {
            if !address.is_multiple_of(alignment) {
                return Err(RingError::Alignment(address));
            }
            // No driver has a queue at 0; `virtio_queue` takes it for a queue that was not set up.
            if address == 0 || !is_ram(memory, address, len) {
                return Err(RingError::NotRam { address, len });
            }
        }
        let [first, second, third] = areas.map(|(address, _, len)| address..address + len);
        let overlap =
            |a: &std::ops::Range<u64>, b: &std::ops::Range<u64>| a.start < b.end && b.start < a.end;
        if overlap(&first, &second) || overlap(&second, &third) || overlap(&first, &third) {
            return Err(RingError::Overlap);
        }
        Ok(())
    }
}

/// Whether a range is wholly in RAM. A region without any protection is a window.
fn is_ram(memory: &GuestMemory, address: u64, len: u64) -> bool {
    let Some(end) = address.checked_add(len) else {
        return false;
    };
    let mut at = address;
    while at < end {
        match memory.to_region_addr(GuestAddress(at)) {
            Some((region, start)) if region.prot() != libc::PROT_NONE => {
                // `start` is inside the region, so this is at least 1.
                at = at.saturating_add(region.len() - start.0);
            }
            _ => return false,
        }
    }
    true
}

/// One request: what the device may read, then what it may write.
pub struct Chain<'m> {
    /// By which the driver knows the request; to be given back to [`Queue::complete`].
    pub head: u16,
    /// The device-readable buffers, in order.
    pub readable: GuestBuffer<'m>,
    /// The device-writable buffers, in order.
    pub writable: GuestBuffer<'m>,
}

/// A queue in use.
pub struct Queue {
    ring: Ring,
    indirect: bool,
    /// For each descriptor, whether it is the head of a chain the device works on.
    in_flight: Vec<bool>,
}

#[derive(Clone, Copy)]
struct Descriptor {
    address: GuestAddress,
    len: u32,
    flags: u16,
    next: u16,
}

/// Where the next descriptor comes from: the descriptor area, or an indirect table. In RAM, either.
struct Table {
    /// Number of descriptors.
    size: u16,
    /// Guest-physical.
    address: u64,
    is_indirect: bool,
}

impl Queue {
    /// A queue that nothing was taken from yet. `features` are the accepted ones.
    ///
    /// # Errors
    ///
    /// [`RingError`], as [`Rings::check`] says.
    pub fn new(rings: Rings, features: u64, memory: &GuestMemory) -> Result<Self, RingError> {
        rings.check(memory)?;
        let bad_size = |_| RingError::Size(rings.size);
        let mut ring = Ring::new(rings.size).map_err(bad_size)?;
        let place = |result: Result<(), virtio_queue::Error>, address| {
            result.map_err(|_| RingError::Alignment(address))
        };
        let areas = rings;
        place(ring.try_set_desc_table_address(GuestAddress(areas.descriptors)), areas.descriptors)?;
        place(ring.try_set_avail_ring_address(GuestAddress(areas.driver)), areas.driver)?;
        place(ring.try_set_used_ring_address(GuestAddress(areas.device)), areas.device)?;
        ring.set_event_idx(features & VIRTIO_RING_F_EVENT_IDX != 0);
        ring.set_ready(true);
        Ok(Self {
            ring,
            indirect: features & VIRTIO_RING_F_INDIRECT_DESC != 0,
            in_flight: vec![false; usize::from(rings.size)],
        })
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// How many requests the driver has put in the queue that were not taken.
    ///
    /// # Errors
    ///
    /// [`QueueError::AvailableIndex`], [`QueueError::Ring`].
    pub fn waiting(&self, memory: &GuestMemory) -> Result<u16, QueueError> {
        let index = self.ring.avail_idx(memory, Ordering::Acquire).map_err(|_| QueueError::Ring)?;
        let count = index.0.wrapping_sub(self.ring.next_avail());
        if count > self.ring.size() { Err(QueueError::AvailableIndex) } else { Ok(count) }
    }

    /// A request that was taken before and not given back, once more. What the driver has written to it since
    /// counts.
    ///
    /// # Errors
    ///
    /// As [`pop`](Self::pop), and [`QueueError::NotInFlight`].
    pub fn again<'m>(&self, memory: &'m GuestMemory, head: u16) -> Result<Chain<'m>, QueueError> {
        match self.in_flight.get(usize::from(head)) {
            Some(true) => self.walk(memory, head),
            _ => Err(QueueError::NotInFlight(head)),
        }
    }

    /// The next request, if there is one.
    ///
    /// # Errors
    ///
    /// [`QueueError`]: the driver has broken the queue. Do not call again.
    pub fn pop<'m>(&mut self, memory: &'m GuestMemory) -> Result<Option<Chain<'m>>, QueueError> {
        let index = self.ring.avail_idx(memory, Ordering::Acquire).map_err(|_| QueueError::Ring)?;
        if index.0 == self.ring.next_avail() {
            return Ok(None);
        }
        let mut available = self.ring.iter(memory).map_err(|error| match error {
            virtio_queue::Error::InvalidAvailRingIndex => QueueError::AvailableIndex,
            _ => QueueError::Ring,
        })?;
        // There is one, unless the ring cannot be read or the driver has taken its index back. That must
        // not look like an empty queue, or the caller would ask again forever.
        let head = available.next().ok_or(QueueError::Ring)?.head_index();
        match self.in_flight.get_mut(usize::from(head)) {
            None => return Err(QueueError::Head(head)),
            Some(true) => return Err(QueueError::InFlight(head)),
            Some(free) => *free = true,
        }
        self.walk(memory, head).map(Some)
    }

    /// Undoes the last [`pop`](Self::pop): the request is the next one again. `head` is its head; nothing
    /// may have been popped since.
    ///
    /// # Errors
    ///
    /// [`QueueError::NotInFlight`].
    pub fn put_back(&mut self, head: u16) -> Result<(), QueueError> {
        match self.in_flight.get_mut(usize::from(head)) {
            Some(busy @ true) => *busy = false,
            _ => return Err(QueueError::NotInFlight(head)),
        }
        self.ring.go_to_previous_position();
        Ok(())
    }

    /// Follows a chain and sorts its buffers.
    fn walk<'m>(&self, memory: &'m GuestMemory, head: u16) -> Result<Chain<'m>, QueueError> {
        let mut chain = Chain { head, readable: GuestBuffer::new(), writable: GuestBuffer::new() };
        let mut table =
            Table { size: self.ring.size(), address: self.ring.desc_table(), is_indirect: false };
        let mut index = head;
        let mut left = self.ring.size();
        let mut bytes = 0u64;
        let mut writing = false;
        loop {
            let descriptor = table.read(memory, index)?;
            if descriptor.flags & VIRTQ_DESC_F_INDIRECT != 0 {
                // At most once a chain: the second time the table is indirect already.
                if table.is_indirect {
                    return Err(QueueError::IndirectNested);
                }
                table = self.open_table(memory, descriptor)?;
                index = 0;
                continue;
            }
            left = left.checked_sub(1).ok_or(QueueError::TooLong)?;
            bytes += u64::from(descriptor.len);
            if bytes > MAX_CHAIN_BYTES {
                return Err(QueueError::TooManyBytes);
            }
            let buffer = if descriptor.flags & VIRTQ_DESC_F_WRITE != 0 {
                writing = true;
                &mut chain.writable
            } else if !writing {
                &mut chain.readable
            } else {
                return Err(QueueError::Order);
            };
            buffer
                .push(memory, descriptor.address, descriptor.len as usize)
                .map_err(QueueError::Buffer)?;
            if descriptor.flags & VIRTQ_DESC_F_NEXT == 0 {
                return Ok(chain);
            }
            index = descriptor.next;
        }
    }

    fn open_table(
        &self,
        memory: &GuestMemory,
        descriptor: Descriptor,
    ) -> Result<Table, QueueError> {
        if !self.indirect {
            return Err(QueueError::IndirectNotNegotiated);
        }
        if descriptor.flags & VIRTQ_DESC_F_NEXT != 0 {
            return Err(QueueError::IndirectNext);
        }
        // VIRTQ_DESC_F_WRITE means nothing here (2.7.5.3.2).
        let len = u64::from(descriptor.len);
        let size = u16::try_from(len / DESCRIPTOR_SIZE)
            .ok()
            .filter(|size| (1..=self.ring.size()).contains(size))
            .filter(|_| len.is_multiple_of(DESCRIPTOR_SIZE))
            .ok_or(QueueError::IndirectLength(descriptor.len))?;
        if !is_ram(memory, descriptor.address.0, len) {
            return Err(QueueError::IndirectTable);
        }
        Ok(Table { size, address: descriptor.address.0, is_indirect: true })
    }

    /// Gives a request back to the driver, with the number of bytes written to it. Tells nobody: see
    /// [`interrupt_wanted`](Self::interrupt_wanted).
    ///
    /// # Errors
    ///
    /// [`QueueError::NotInFlight`], or [`QueueError::Ring`].
    pub fn complete(
        &mut self,
        memory: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        match self.in_flight.get_mut(usize::from(head)) {
            Some(busy @ true) => *busy = false,
            _ => return Err(QueueError::NotInFlight(head)),
        }
        self.ring.add_used(memory, head, written).map_err(|_| QueueError::Ring)
    }

    /// Whether the driver wants an interrupt for what was completed since the last call (2.7.7). To be
    /// asked once after one or more calls of [`complete`](Self::complete).
    ///
    /// # Errors
    ///
    /// [`QueueError::Ring`].
    pub fn interrupt_wanted(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        // Also the barrier between what was written to the ring and what is read now.
        let wanted = self.ring.needs_notification(memory).map_err(|_| QueueError::Ring)?;
        if self.ring.event_idx_enabled() {
            return Ok(wanted);
        }
        let flags: u16 = memory
            .load(GuestAddress(self.ring.avail_ring()), Ordering::Relaxed)
            .map_err(|_| QueueError::Ring)?;
        Ok(u16::from_le(flags) & VIRTQ_AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Asks the driver not to notify: the device looks by itself. A hint, the driver may still do it.
    ///
    /// # Errors
    ///
    /// [`QueueError::Ring`].
    pub fn disable_notification(&mut self, memory: &GuestMemory) -> Result<(), QueueError> {
        self.ring.disable_notification(memory).map_err(|_| QueueError::Ring)
    }

    /// Asks the driver to notify of the next request. `true` means that requests came meanwhile, of which
    /// there may be no notification: the caller must go on, not sleep.
    ///
    /// # Errors
    ///
    /// [`QueueError::Ring`].
    pub fn enable_notification(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        self.ring.enable_notification(memory).map_err(|_| QueueError::Ring)
    }

    /// Asks the driver to notify of the next request that it adds, also when others are in the queue that nobody has
    /// taken. (After [`enable_notification`](Self::enable_notification) a driver with EVENT_IDX notifies only if they
    /// have been taken.) `true` when there are such.
    ///
    /// # Errors
    ///
    /// [`QueueError::AvailableIndex`], [`QueueError::Ring`].
    pub fn ask_for_next(&mut self, memory: &GuestMemory) -> Result<bool, QueueError> {
        if !self.ring.event_idx_enabled() {
            return self.enable_notification(memory);
        }
        // `avail_event` (2.7.8), behind the header of the used ring and its elements. Inside memory: see `Rings::check`.
        let event = 4 + 8 * u64::from(self.ring.size());
        let event = self.ring.used_ring().checked_add(event).ok_or(QueueError::Ring)?;
        let place = GuestAddress(event);
        let mut waiting = self.waiting(memory)?;
        // A driver that goes on adding is through when the queue is full.
        for _ in 0..=self.ring.size() {
            let index = self.ring.next_avail().wrapping_add(waiting);
            memory.store(index.to_le(), place, Ordering::Relaxed).map_err(|_| QueueError::Ring)?;
            // The driver writes its index first and then looks here; who looks there after writing here has seen it.
            fence(Ordering::SeqCst);
            let before = std::mem::replace(&mut waiting, self.waiting(memory)?);
            if before == waiting {
                break;
            }
        }
        Ok(waiting > 0)
    }
}

impl Table {
    fn read(&self, memory: &GuestMemory, index: u16) -> Result<Descriptor, QueueError> {
        if index >= self.size {
            return Err(QueueError::Next(index));
        }
        let mut bytes = [0; DESCRIPTOR_SIZE as usize];
        let offset = u64::from(index) * DESCRIPTOR_SIZE;
        let address = self.address.checked_add(offset).ok_or(QueueError::Ring)?;
        memory.read_slice(&mut bytes, GuestAddress(address)).map_err(|_| QueueError::Ring)?;
        Ok(Descriptor::decode(bytes))
    }
}

impl Descriptor {
    /// `struct virtq_desc` (2.7.5).
    fn decode(bytes: [u8; DESCRIPTOR_SIZE as usize]) -> Self {
        let value = u128::from_le_bytes(bytes);
        Self {
            address: GuestAddress(value as u64),
            len: (value >> 64) as u32,
            flags: (value >> 96) as u16,
            next: (value >> 112) as u16,
        }
    }
}

#[cfg(test)]
mod tests;
