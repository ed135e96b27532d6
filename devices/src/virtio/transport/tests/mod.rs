//! The registers, as a driver meets them, in front of a device that does nothing but take notes.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;

use super::*;
use crate::pci::testing::Slot;
use crate::virtio::testing::*;
use crate::virtio::{
    Activation, Interrupts, SharedMemory, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX,
};

mod areas;
mod common;

const FEATURE: u64 = 1 << 3;
/// Not a page and not a power of two.
const WINDOW_LEN: u64 = 3 << 20;

#[derive(Debug, PartialEq, Eq)]
enum Call {
    /// Features, and number and size of each queue.
    Activate(u64, Vec<u16>),
    Notify(u16),
    Reset,
}

#[derive(Default)]
struct Notes {
    calls: Mutex<Vec<Call>>,
    interrupts: Mutex<Option<Arc<dyn Interrupts>>>,
    slot: Arc<Slot>,
    refuse: AtomicBool,
    /// A reset waits here, when there is something to wait for.
    gate: Mutex<Option<mpsc::Receiver<()>>>,
}

impl Notes {
    fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut lock(&self.calls))
    }

    fn interrupts(&self) -> Arc<dyn Interrupts> {
        lock(&self.interrupts).clone().unwrap()
    }
}

impl VirtioDevice for Notes {
    fn device_id(&self) -> u16 {
        26
    }
    fn features(&self) -> u64 {
        FEATURE
    }
    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 16]
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (target, byte) in data.iter_mut().zip(b"oriel".iter().skip(offset as usize)) {
            *target = *byte;
        }
    }
    fn shared_memory(&self) -> Option<SharedMemory> {
        Some(SharedMemory { id: 0, size: WINDOW_LEN, slot: self.slot.clone() })
    }
    fn activate(&self, activation: Activation) -> io::Result<()> {
        if self.refuse.load(Ordering::Relaxed) {
            return Err(io::Error::other("no more threads"));
        }
        let queues = activation.queues.iter().map(|queue| queue.index).collect();
        lock(&self.calls).push(Call::Activate(activation.features, queues));
        *lock(&self.interrupts) = Some(activation.interrupts);
        Ok(())
    }
    fn notify(&self, queue: u16) {
        lock(&self.calls).push(Call::Notify(queue));
    }
    fn reset(&self) {
        let gate = lock(&self.gate).take();
        if let Some(gate) = gate {
            gate.recv().unwrap();
        }
        lock(&self.calls).push(Call::Reset);
    }
}

fn driver() -> (Arc<Notes>, Driver) {
    let notes = Arc::new(Notes::default());
    let driver = Driver::new(notes.clone());
    (notes, driver)
}

#[test]
fn a_driver_finds_all_structures() {
    let (notes, driver) = driver();
    assert_eq!(driver.config_dword(0), 0x105a_1af4);
    assert_eq!(driver.config_dword(8), 0x0180_0001);
    assert_eq!(driver.config_dword(0x2c) >> 16, 0x40);
    let ids: Vec<_> = driver.capabilities().iter().map(|(id, _)| *id).collect();
    assert_eq!(ids, [0x11, 9, 9, 9, 9, 9, 9]);
    for (cfg_type, len) in [(1, 64), (2, 8), (3, 1), (4, 0x1000)] {
        let area = driver.find(cfg_type).unwrap();
        assert_eq!((area.bar, area.len), (0, len), "{cfg_type}");
    }
    let notify = driver.find(2).unwrap();
    assert_eq!(driver.config_dword(notify.capability + 16), 4);
    let shared = driver.find(8).unwrap();
    assert_eq!((shared.bar, shared.id), (4, 0));
    assert_eq!((shared.offset, shared.len), (0, WINDOW_LEN));
    assert_eq!(driver.find(5).unwrap().len, 0);
    // The BAR is a power of two; the capability tells the true length.
    driver.write_config(4, &[0, 0]);
    driver.write_config(0x20, &[0xff; 4]);
    assert_eq!(driver.config_dword(0x20), (!(4 << 20) + 1) | 0xc);
    driver.write_config(0x20, &[0; 4]);
    notes.slot.places();
    driver.write_config(4, &[6, 0]);
    assert_eq!(notes.slot.places(), [Some(MMIO64)]);
    driver.write_config(0x20, &0x40_0000u32.to_le_bytes());
    assert_eq!(notes.slot.places(), [Some(MMIO64 + 0x40_0000)]);
    driver.write_config(4, &[4, 0]);
    assert_eq!(notes.slot.places(), [None]);
}

#[test]
fn registers_follow_the_bar() {
    let (_notes, mut driver) = driver();
    assert_eq!(driver.read::<2>(18), 2);
    driver.write_config(0x10, &(MMIO32 as u32 + 0x2_0000).to_le_bytes());
    assert_eq!(driver.read::<2>(18), 0xffff);
    driver.bar += 0x2_0000;
    assert_eq!(driver.read::<2>(18), 2);
}
