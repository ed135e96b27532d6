//! The whole device through its registers and its ring.

use std::sync::Arc;
use std::time::Instant;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::virtio::testing::*;
use crate::virtio::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

const BUFFER: u64 = 0x20_0000;

struct Guest {
    driver: Driver,
    queue: DriverQueue,
}

impl Guest {
    fn new() -> Self {
        let driver = Driver::new(Arc::new(RngDevice::new().unwrap()));
        let queue = start(&driver);
        Self { driver, queue }
    }

    fn offer(&mut self, address: u64, len: u32, flags: u16) {
        let memory = self.driver.memory();
        self.queue.describe(&memory, 0, (address, len, flags, 0));
        self.queue.offer(&memory, 0);
        self.driver.notify(0);
    }

    /// How many bytes came.
    fn wait(&mut self) -> u32 {
        let start = Instant::now();
        loop {
            if let Some((0, len)) = self.queue.take_used(&self.driver.memory()) {
                return len;
            }
            assert!(start.elapsed().as_secs() < 10);
            std::thread::yield_now();
        }
    }

    fn bytes(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.driver.memory().read_slice(&mut bytes, GuestAddress(BUFFER)).unwrap();
        bytes
    }
}

fn start(driver: &Driver) -> DriverQueue {
    let features = VIRTIO_RING_F_EVENT_IDX | VIRTIO_RING_F_INDIRECT_DESC;
    driver.start(features, &[(0, 8)])[0]
}

#[test]
fn a_driver_sees_an_entropy_device() {
    let driver = Driver::new(Arc::new(RngDevice::new().unwrap()));
    assert_eq!(driver.config_dword(0), 0x1044_1af4);
    assert_eq!(driver.read::<2>(18), 1, "queues");
    assert_eq!(driver.offered() & 0xff_ffff, 0);
}

#[test]
fn a_buffer_is_filled_with_bytes_that_differ_each_time() {
    let mut guest = Guest::new();
    guest.offer(BUFFER, 64, WRITE);
    assert_eq!(guest.wait(), 64);
    let first = guest.bytes(80);
    assert_eq!(first[64..], [0; 16], "nothing behind it");
    guest.offer(BUFFER, 64, WRITE);
    assert_eq!(guest.wait(), 64);
    let second = guest.bytes(64);
    assert!(first[..64] != second[..] && second != [0; 64]);
}

#[test]
fn a_large_buffer_gets_a_bounded_part() {
    let mut guest = Guest::new();
    guest.offer(BUFFER, 1 << 20, WRITE);
    assert_eq!(guest.wait(), 4096);
    assert_eq!(guest.bytes(5000)[4096..], [0; 904]);
}

#[test]
fn a_request_without_room_gets_nothing() {
    let mut guest = Guest::new();
    for (address, len, flags) in [(BUFFER, 0, WRITE), (BUFFER, 64, 0), (WINDOW, 64, WRITE)] {
        guest.offer(address, len, flags);
        assert_eq!(guest.wait(), 0);
    }
    assert_eq!(guest.driver.status(), 15);
}

#[test]
fn a_queue_that_is_broken_makes_the_device_need_a_reset() {
    let mut guest = Guest::new();
    guest.offer(RAM, 64, WRITE);
    guest.driver.wait_until_broken();
    guest.queue = start(&guest.driver);
    guest.offer(BUFFER, 64, WRITE);
    assert_eq!(guest.wait(), 64);
}
