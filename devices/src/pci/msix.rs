//! MSI-X: the vector table, the pending bits and the capability (PCI 3.0, 6.8.2).
//!
//! Each entry has a lock of its own over all that decides what a `trigger` does, so that a `trigger` and a
//! mask that cross each other end in one of the two orders, and the queues of a device do not wait for each
//! other. These are the innermost locks: nothing is called under them but the vector.

use std::io;
use std::sync::{Arc, Mutex};

use super::{InterruptController, MsiMessage, MsiVector};
use crate::complaint::complain;
use crate::sync::lock;

/// The capability's id.
pub const CAPABILITY_ID: u8 = 0x11;

/// Message Control, the first two bytes behind the capability's id and link: bits the guest may set.
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;
const CONTROL_ENABLE: u16 = 1 << 15;

/// Bytes of a table entry: address low, address high, data, vector control.
const ENTRY_SIZE: u64 = 16;

/// Vector Control: the vector is masked.
const VECTOR_MASKED: u32 = 1;

/// Most vectors a table can have (the capability states it in 11 bits).
pub const MAX_VECTORS: u16 = 2048;

/// Message addresses that a local APIC listens to: 0xFEExxxxx. Anything else would be a write to memory.
const APIC_MASK: u64 = 0xffff_ffff_fff0_0000;
const APIC_BASE: u64 = 0xfee0_0000;

struct Entry {
    /// Address low, address high, data, control.
    words: [u32; 4],
    /// The function's enable and mask bits, as far as this entry has heard of them.
    control: Control,
    pending: bool,
    /// What the vector was last connected to.
    connected: Option<MsiMessage>,
    vector: Arc<dyn MsiVector>,
}

/// The bits of Message Control that the guest sets.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Control {
    enabled: bool,
    masked: bool,
}

/// The MSI-X registers of one function and the vectors they drive.
pub struct Msix {
    control: Mutex<Control>,
    entries: Vec<Mutex<Entry>>,
    count: u16,
}

impl Msix {
    /// A table of `count` entries, all masked, with a vector of the machine's for each.
    ///
    /// # Errors
    ///
    /// The controller's; `InvalidInput` when `count` is 0 or above [`MAX_VECTORS`].
    pub fn new(controller: &dyn InterruptController, count: u16) -> io::Result<Self> {
        if !(1..=MAX_VECTORS).contains(&count) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let entry = |_| {
            Ok(Mutex::new(Entry {
                words: [0, 0, 0, VECTOR_MASKED],
                control: Control::default(),
                pending: false,
                connected: None,
                vector: controller.allocate_vector()?,
            }))
        };
        Ok(Self {
            control: Mutex::default(),
            entries: (0..count).map(entry).collect::<io::Result<_>>()?,
            count,
        })
    }

    /// Number of vectors.
    pub fn count(&self) -> u16 {
        self.count
    }

    /// The capability behind its id and link, for a table and a pending bit array at the given offsets
    /// (multiples of 8) of one BAR, and its writable bits.
    pub fn capability(&self, bar: u8, table: u32, pba: u32) -> ([u8; 10], [u8; 2]) {
        let control = (self.count - 1).to_le_bytes();
        let table = (table | u32::from(bar)).to_le_bytes();
        let pba = (pba | u32::from(bar)).to_le_bytes();
        let mut body = [0; 10];
        let bytes = control.iter().chain(&table).chain(&pba);
        for (target, byte) in body.iter_mut().zip(bytes) {
            *target = *byte;
        }
        (body, (CONTROL_ENABLE | CONTROL_FUNCTION_MASK).to_le_bytes())
    }

    /// The guest has written Message Control, which now reads `control`.
    pub fn set_control(&self, control: u16) {
        let new = Control {
            enabled: control & CONTROL_ENABLE != 0,
            masked: control & CONTROL_FUNCTION_MASK != 0,
        };
        let mut current = lock(&self.control);
        if *current == new {
            return;
        }
        *current = new;
        for entry in &self.entries {
            let mut entry = lock(entry);
            entry.control = new;
            entry.update();
        }
    }

    /// Interrupts the guest through `vector`, or sets its pending bit while it is masked. Does nothing for
    /// a vector that does not exist. `false` when MSI-X is disabled: the function has no interrupts then.
    pub fn trigger(&self, vector: u16) -> bool {
        let Some(entry) = self.entries.get(usize::from(vector)) else {
            return lock(&self.control).enabled;
        };
        let mut entry = lock(entry);
        if entry.open() {
            if entry.connected.is_some() {
                entry.vector.trigger();
            }
        } else if entry.control.enabled {
            entry.pending = true;
        }
        entry.control.enabled
    }

    /// A guest read of the table. Only aligned 4 and 8 byte accesses are defined; others leave `data`.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        // An access of 8 aligned bytes never passes the end of an entry of 16.
        let (index, first) = split(offset);
        let Some(entry) = self.entries.get(index) else {
            return;
        };
        let words = lock(entry).words;
        for (word, bytes) in words.iter().skip(first).zip(data.chunks_exact_mut(4)) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
    }

    /// A guest write to the table. Only aligned 4 and 8 byte accesses are defined; others are ignored.
    pub fn write_table(&self, offset: u64, data: &[u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        let (index, first) = split(offset);
        let Some(entry) = self.entries.get(index) else {
            return;
        };
        let mut entry = lock(entry);
        let words = data.as_chunks::<4>().0;
        for (word, bytes) in entry.words.iter_mut().skip(first).zip(words) {
            *word = u32::from_le_bytes(*bytes);
        }
        // All other bits of Vector Control are reserved.
        entry.words[3] &= VECTOR_MASKED;
        entry.update();
    }

    /// A guest read of the pending bits. Writes have no effect, so there is no function for them.
    pub fn read_pba(&self, offset: u64, data: &mut [u8]) {
        if !aligned(offset, data.len()) {
            return;
        }
        for (at, byte) in data.iter_mut().enumerate() {
            let first = usize::try_from(offset).unwrap_or(usize::MAX);
            let first = first.saturating_add(at).saturating_mul(8);
            let entries = self.entries.iter().skip(first).take(8);
            *byte = entries
                .zip(0..)
                .fold(0, |bits, (entry, bit)| bits | u8::from(lock(entry).pending) << bit);
        }
    }
}

impl Entry {
    /// Whether nothing holds the vector back.
    fn open(&self) -> bool {
        self.control.enabled && !self.control.masked && self.words[3] & VECTOR_MASKED == 0
    }

    /// Connects the vector to what the registers now say, and delivers what was pending.
    fn update(&mut self) {
        let open = self.open();
        let address = u64::from(self.words[1]) << 32 | u64::from(self.words[0]);
        let message = (open && address & APIC_MASK == APIC_BASE)
            .then_some(MsiMessage { address, data: self.words[2] });
        if message != self.connected {
            self.connected = match self.vector.connect(message) {
                Ok(()) => message,
                Err(error) => {
                    complain!(host: "an interrupt vector could not be connected: {error}");
                    None
                }
            };
        }
        if !self.control.enabled {
            // Pending bits speak of messages, and the function no longer sends any.
            self.pending = false;
        } else if open && std::mem::take(&mut self.pending) && self.connected.is_some() {
            self.vector.trigger();
        }
    }
}

fn aligned(offset: u64, len: usize) -> bool {
    matches!(len, 4 | 8) && offset.is_multiple_of(len as u64)
}

/// Entry and word in it at an offset in the table.
fn split(offset: u64) -> (usize, usize) {
    let index = usize::try_from(offset / ENTRY_SIZE).unwrap_or(usize::MAX);
    (index, (offset % ENTRY_SIZE / 4) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::testing::Controller;

    const APIC: [u8; 8] = [0, 0x10, 0xe0, 0xfe, 0, 0, 0, 0];

    fn msix() -> (Controller, Msix) {
        let controller = Controller::default();
        let msix = Msix::new(&controller, 3).unwrap();
        (controller, msix)
    }

    fn program(msix: &Msix, vector: u64, data: u32) {
        msix.write_table(vector * 16, &APIC);
        msix.write_table(vector * 16 + 8, &u64::from(data).to_le_bytes());
    }

    fn message(data: u32) -> Option<MsiMessage> {
        Some(MsiMessage { address: 0xfee0_1000, data })
    }

    #[test]
    fn an_open_vector_is_connected_once_and_interrupts() {
        let (controller, msix) = msix();
        program(&msix, 1, 0x41);
        assert_eq!(controller.connections(1), [], "not enabled yet");
        msix.trigger(1);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(controller.connections(1), [message(0x41)]);
        msix.write_table(0x18, &0x41u32.to_le_bytes());
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(controller.connections(1).len(), 1, "nothing is new");
        msix.trigger(1);
        msix.trigger(3);
        msix.trigger(u16::MAX);
        assert_eq!(controller.triggers(), [0, 1, 0]);
    }

    #[test]
    fn what_a_mask_held_back_comes_with_the_unmasking() {
        let (controller, msix) = msix();
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 2, 7);
        msix.write_table(0x2c, &1u32.to_le_bytes());
        msix.trigger(2);
        msix.trigger(2);
        let mut pending = [0xff; 8];
        msix.read_pba(0, &mut pending);
        assert_eq!(pending, [4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(controller.triggers(), [0, 0, 0]);
        msix.write_table(0x2c, &0u32.to_le_bytes());
        assert_eq!(controller.triggers(), [0, 0, 1], "once, and after connecting");
        assert_eq!(controller.connections(2), [message(7), None, message(7)]);
        msix.read_pba(0, &mut pending);
        assert_eq!(pending, [0; 8]);
    }

    #[test]
    fn the_function_mask_holds_all_vectors_back() {
        let (controller, msix) = msix();
        msix.set_control(CONTROL_ENABLE | CONTROL_FUNCTION_MASK);
        program(&msix, 0, 1);
        program(&msix, 1, 2);
        msix.trigger(0);
        msix.trigger(1);
        assert_eq!(controller.triggers(), [0, 0, 0]);
        msix.set_control(CONTROL_ENABLE);
        assert_eq!(controller.triggers(), [1, 1, 0]);
    }

    /// Whoever triggers while masks change reaches the guest at once or when the last one is lifted.
    #[test]
    fn no_interrupt_is_lost_while_a_mask_changes() {
        use std::sync::atomic::{AtomicBool, Ordering};
        let (controller, msix) = msix();
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 1, 7);
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for function in [true, false] {
                let (msix, stop) = (&msix, &stop);
                scope.spawn(move || {
                    let mut masked = false;
                    while !stop.load(Ordering::Relaxed) || masked {
                        masked = !masked;
                        if function {
                            msix.set_control(CONTROL_ENABLE | u16::from(masked) << 14);
                        } else {
                            msix.write_table(0x1c, &u32::from(masked).to_le_bytes());
                        }
                    }
                });
            }
            // One is on its way at a time: each has to arrive, for nothing else is triggered meanwhile.
            let arrived = (1..=2000).all(|count| {
                msix.trigger(1);
                controller.wait(1, count) == count
            });
            stop.store(true, Ordering::Relaxed);
            assert!(arrived, "an interrupt is lost");
        });
        assert_eq!(controller.triggers(), [0, 2000, 0], "and none comes twice");
    }

    #[test]
    fn a_message_that_no_apic_hears_interrupts_nobody() {
        let (controller, msix) = msix();
        msix.set_control(CONTROL_ENABLE);
        program(&msix, 0, 1);
        for address in [0u64, 0xfed0_0000, 0xfef0_0000, 0x1_fee0_0000, u64::MAX] {
            msix.write_table(0, &address.to_le_bytes());
            assert_eq!(controller.connections(0).last(), Some(&None), "{address:#x}");
            msix.trigger(0);
        }
        assert_eq!(controller.triggers(), [0, 0, 0]);
        assert_eq!(controller.connections(0).len(), 2);
    }

    #[test]
    fn a_refusal_by_the_host_leaves_the_vector_silent() {
        let (controller, msix) = msix();
        msix.set_control(CONTROL_ENABLE);
        controller.refuse(true);
        program(&msix, 0, 1);
        msix.trigger(0);
        assert_eq!(controller.triggers(), [0, 0, 0]);
        controller.refuse(false);
        program(&msix, 0, 2);
        msix.trigger(0);
        assert_eq!(controller.triggers(), [1, 0, 0]);
    }

    #[test]
    fn table_accesses_of_odd_size_or_place_have_no_effect() {
        let (_controller, msix) = msix();
        for (offset, len) in [(0, 1), (0, 2), (2, 4), (4, 8), (48, 4), (u64::MAX - 7, 8)] {
            msix.write_table(offset, &[0xff; 8][..len]);
            let mut data = [0xaa; 8];
            msix.read_table(offset, &mut data[..len]);
            assert_eq!(data, [0xaa; 8]);
        }
        let mut entry = [0; 8];
        msix.read_table(8, &mut entry);
        assert_eq!(entry, [0, 0, 0, 0, 1, 0, 0, 0], "masked after reset");
        msix.read_pba(u64::MAX - 7, &mut entry);
        assert_eq!(entry, [0; 8]);
    }
}
