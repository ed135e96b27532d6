//! The whole device through its registers and rings, with a server that answers with the request itself.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestBuffer;
use crate::sync::lock;
use crate::virtio::fs::*;
use crate::virtio::testing::*;
use crate::virtio::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

const REQUEST: u64 = 0x1000;
const REPLY: u64 = 0x2000;
const TABLE: u64 = 0x3000;

/// Copies the request to the reply. A request `!` is a panic, `?` waits at the gate, `>` lies about the
/// length.
#[derive(Default)]
struct Echo {
    served: AtomicUsize,
    resets: AtomicUsize,
    gate: Mutex<Option<mpsc::Receiver<()>>>,
    waiting: AtomicUsize,
}

impl Server for Echo {
    fn serve(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        _deferral: &dyn Deferral,
    ) -> Served {
        Served::Done(self.serve_urgent(request, reply))
    }

    fn serve_urgent(&self, request: &GuestBuffer<'_>, reply: &GuestBuffer<'_>) -> u32 {
        let mut bytes = vec![0; request.len()];
        request.read_at(0, &mut bytes).unwrap();
        self.served.fetch_add(1, Ordering::SeqCst);
        match bytes.first() {
            Some(b'!') => panic!("as the request asks"),
            Some(b'?') => {
                let gate = lock(&self.gate).take().unwrap();
                self.waiting.fetch_add(1, Ordering::SeqCst);
                gate.recv().unwrap();
            }
            Some(b'>') => return u32::MAX,
            _ => {}
        }
        let len = bytes.len().min(reply.len());
        reply.write_at(0, &bytes[..len]).unwrap();
        len as u32
    }

    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
    }
}

fn driver(request_queues: u16) -> (Arc<Echo>, Driver) {
    let echo = Arc::new(Echo::default());
    let config = Config::new("share", request_queues).unwrap();
    let device = FsDevice::new(config, echo.clone(), None).unwrap();
    (echo, Driver::new(Arc::new(device)))
}

/// Describes a request of two descriptors from `head` on.
fn describe(driver: &Driver, queue: &DriverQueue, head: u16, text: &[u8]) {
    let memory = driver.memory();
    let request = REQUEST + 0x40 * u64::from(head);
    let reply = REPLY + 0x40 * u64::from(head);
    memory.write_slice(text, GuestAddress(request)).unwrap();
    queue.describe(&memory, head, (request, text.len() as u32, NEXT, head + 1));
    queue.describe(&memory, head + 1, (reply, 0x40, WRITE, 0));
}

fn reply(driver: &Driver, head: u16, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    let at = GuestAddress(REPLY + 0x40 * u64::from(head));
    driver.memory().read_slice(&mut bytes, at).unwrap();
    bytes
}

fn wait_for(what: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !what() {
        assert!(start.elapsed().as_secs() < 10);
        std::thread::yield_now();
    }
}

#[test]
fn a_driver_reads_the_tag_and_the_number_of_queues() {
    let (_echo, driver) = driver(3);
    assert_eq!(driver.config_dword(0), 0x105a_1af4);
    assert!(driver.find(8).is_none(), "no window, no shared memory");
    let at = driver.find(4).unwrap().offset;
    let mut tag = [0; 8];
    driver.read_bar(at, &mut tag);
    assert_eq!(&tag, b"share\0\0\0");
    assert_eq!(driver.read::<4>(at + 36), 3);
    driver.write::<4>(at + 36, 99);
    assert_eq!(driver.read::<4>(at + 36), 3);
    assert_eq!(driver.read::<2>(18), 4, "with the high priority queue");
    assert_eq!(driver.read::<2>(QUEUE_SIZE), 1024);
}

#[test]
fn the_window_is_shared_memory_number_zero() {
    let slot = Arc::new(crate::pci::testing::Slot::default());
    let window = crate::dax::Window::new(6 << 20).unwrap();
    let window = Window { dax: Arc::new(window), slot: slot.clone() };
    let config = Config::new("share", 1).unwrap();
    let device = FsDevice::new(config, Arc::new(Echo::default()), Some(window)).unwrap();
    let driver = Driver::new(Arc::new(device));
    let area = driver.find(8).unwrap();
    assert_eq!((area.bar, area.id, area.offset, area.len), (4, 0, 0, 6 << 20));
    assert_eq!(slot.places(), [Some(MMIO64)]);
    assert_eq!(driver.offered() & VIRTIO_FS_F_WINDOW_GROWS, 0, "it cannot grow");
}

#[test]
fn a_request_goes_through_the_ring_and_back() {
    let (_echo, driver) = driver(1);
    let mut queues = driver.start(0, &[(0, 16), (1, 16)]);
    for (round, text) in [(1, &b"hello"[..]), (2, b"world!"), (3, b"")] {
        describe(&driver, &queues[1], 4, text);
        queues[1].offer(&driver.memory(), 4);
        driver.notify(1);
        driver.wait(1, round);
        let used = queues[1].take_used(&driver.memory());
        assert_eq!(used, Some((4, text.len() as u32)));
        assert_eq!(reply(&driver, 4, text.len()), text);
    }
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_request_may_be_an_indirect_table() {
    let (_echo, driver) = driver(1);
    let mut queues = driver.start(VIRTIO_RING_F_INDIRECT_DESC, &[(1, 16)]);
    let memory = driver.memory();
    memory.write_slice(b"one two", GuestAddress(REQUEST)).unwrap();
    write_descriptor(&memory, TABLE, (REQUEST, 4, NEXT, 1));
    write_descriptor(&memory, TABLE + 16, (REQUEST + 4, 3, NEXT, 2));
    write_descriptor(&memory, TABLE + 32, (REPLY, 3, WRITE | NEXT, 3));
    write_descriptor(&memory, TABLE + 48, (REPLY + 3, 0x10, WRITE, 0));
    queues[0].describe(&memory, 9, (TABLE, 64, INDIRECT, 0));
    queues[0].offer(&memory, 9);
    driver.notify(1);
    driver.wait(1, 1);
    assert_eq!(queues[0].take_used(&memory), Some((9, 7)));
    assert_eq!(reply(&driver, 0, 7), b"one two");
}

#[test]
fn what_was_there_before_the_driver_was_ready_is_served() {
    let (_echo, driver) = driver(1);
    driver.negotiate(0);
    driver.enable_interrupts();
    let mut queue = driver.enable(1, 16);
    describe(&driver, &queue, 0, b"early");
    queue.offer(&driver.memory(), 0);
    driver.notify(1);
    assert_eq!(driver.controller.triggers(), [0, 0, 0]);
    driver.set_status(15);
    driver.wait(1, 1);
    assert_eq!(reply(&driver, 0, 5), b"early");
}

#[test]
fn a_batch_makes_one_interrupt() {
    let (_echo, driver) = driver(1);
    let mut queues = driver.start(VIRTIO_RING_F_EVENT_IDX, &[(1, 64)]);
    let memory = driver.memory();
    let queue = &mut queues[0];
    // The driver wants to hear of the last one only.
    queue.set_used_event(&memory, 15);
    for head in 0..16 {
        describe(&driver, queue, 2 * head, b"batch");
        queue.offer(&memory, 2 * head);
    }
    driver.notify(1);
    driver.wait(1, 1);
    // Two threads may serve so many, and in any order.
    wait_for(|| queue.used_index(&memory) == 16);
    let mut used: Vec<_> = std::iter::from_fn(|| queue.take_used(&memory)).collect();
    used.sort_unstable();
    let expected: Vec<_> = (0..16).map(|head| (2 * head, 5)).collect();
    assert_eq!(used, expected);
    wait_for(|| queue.avail_event(&memory) == 16);
}

#[test]
fn queues_are_served_while_another_is_stuck() {
    let (echo, driver) = driver(2);
    let (open, gate) = mpsc::channel();
    *lock(&echo.gate) = Some(gate);
    let mut queues = driver.start(0, &[(0, 16), (1, 16), (2, 16)]);
    for (index, text) in [(1, b"?stuck"), (0, b"hiprio"), (2, b"second")] {
        let head = 2 * index as u16;
        describe(&driver, &queues[index], head, text);
        queues[index].offer(&driver.memory(), head);
        driver.notify(index as u16);
        if index == 1 {
            wait_for(|| echo.waiting.load(Ordering::SeqCst) == 1);
        } else {
            driver.wait(index as u16, 1);
            assert_eq!(reply(&driver, head, 6), text);
        }
    }
    assert_eq!(queues[1].take_used(&driver.memory()), None);
    open.send(()).unwrap();
    driver.wait(1, 1);
    assert_eq!(reply(&driver, 2, 6), b"?stuck");
}

#[test]
fn every_malformed_chain_makes_the_device_need_a_reset() {
    for (what, descriptor) in [
        ("next outside", (REQUEST, 4, NEXT, 16)),
        ("loop", (REQUEST, 4, NEXT, 0)),
        ("not memory", (RAM, 4, 0, 0)),
        ("empty table", (TABLE, 0, INDIRECT, 0)),
        ("table with next", (TABLE, 16, INDIRECT | NEXT, 0)),
        ("table not in memory", (WINDOW + (4 << 30), 16, INDIRECT, 0)),
        ("table in an empty window", (WINDOW, 16, INDIRECT, 0)),
    ] {
        let (echo, driver) = driver(1);
        let mut queues = driver.start(VIRTIO_RING_F_INDIRECT_DESC, &[(0, 16), (1, 16)]);
        queues[1].describe(&driver.memory(), 0, descriptor);
        queues[1].offer(&driver.memory(), 0);
        driver.notify(1);
        driver.wait_until_broken();
        assert_eq!(echo.served.load(Ordering::SeqCst), 0, "{what}");
        assert_eq!(queues[1].take_used(&driver.memory()), None, "{what}");
        // That queue is dead, the other lives, and a reset helps.
        describe(&driver, &queues[1], 4, b"dead");
        queues[1].offer(&driver.memory(), 4);
        driver.notify(1);
        describe(&driver, &queues[0], 6, b"alive");
        queues[0].offer(&driver.memory(), 6);
        driver.notify(0);
        driver.wait(0, 1);
        assert_eq!(queues[1].take_used(&driver.memory()), None, "{what}");
        let mut queues = driver.start(0, &[(1, 16)]);
        describe(&driver, &queues[0], 0, b"again");
        queues[0].offer(&driver.memory(), 0);
        driver.notify(1);
        driver.wait(1, 1);
    }
}

#[test]
fn a_ring_that_lies_makes_the_device_need_a_reset() {
    let lies: [fn(&Driver, &mut DriverQueue); 2] = [
        |driver, queue| queue.set_available(&driver.memory(), 17),
        |driver, queue| queue.offer(&driver.memory(), 16),
    ];
    for lie in lies {
        let (_echo, driver) = driver(1);
        let mut queues = driver.start(0, &[(1, 16)]);
        lie(&driver, &mut queues[0]);
        driver.notify(1);
        driver.wait_until_broken();
    }
}

#[test]
fn a_server_that_panics_stops_its_queue_and_says_so() {
    let (_echo, driver) = driver(1);
    let mut queues = driver.start(0, &[(1, 16)]);
    describe(&driver, &queues[0], 0, b"!");
    queues[0].offer(&driver.memory(), 0);
    driver.notify(1);
    driver.wait_until_broken();
    assert_eq!(queues[0].take_used(&driver.memory()), None);
}

#[test]
fn a_server_cannot_claim_more_than_there_is_room_for() {
    let (_echo, driver) = driver(1);
    let mut queues = driver.start(0, &[(1, 16)]);
    describe(&driver, &queues[0], 0, b">");
    queues[0].offer(&driver.memory(), 0);
    driver.notify(1);
    driver.wait(1, 1);
    assert_eq!(queues[0].take_used(&driver.memory()), Some((0, 0x40)));
}

#[test]
fn a_reset_waits_for_the_request_that_is_being_served() {
    let (echo, driver) = driver(1);
    let (open, gate) = mpsc::channel();
    *lock(&echo.gate) = Some(gate);
    let mut queues = driver.start(0, &[(0, 16), (1, 16)]);
    assert_eq!(echo.resets.load(Ordering::SeqCst), 0);
    describe(&driver, &queues[1], 0, b"?slow");
    describe(&driver, &queues[1], 2, b"later");
    queues[1].offer(&driver.memory(), 0);
    queues[1].offer(&driver.memory(), 2);
    driver.notify(1);
    wait_for(|| echo.waiting.load(Ordering::SeqCst) == 1);
    // The vCPU does not wait with it; doorbells during a reset have no effect, and nobody hangs.
    driver.set_status(0);
    for _ in 0..100 {
        assert_eq!(driver.status(), 15);
        driver.notify(1);
    }
    assert_eq!(echo.resets.load(Ordering::SeqCst), 0, "not while it is served");
    open.send(()).unwrap();
    driver.wait_until_reset();
    assert_eq!(echo.resets.load(Ordering::SeqCst), 1);
    let served = echo.served.load(Ordering::SeqCst);
    let memory = driver.memory();
    memory.write_slice(&[0; 0x40], GuestAddress(REPLY)).unwrap();
    driver.notify(1);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(reply(&driver, 0, 5), [0; 5], "memory is the driver's again");
    assert_eq!(echo.served.load(Ordering::SeqCst), served);
    let mut queues = driver.start(0, &[(1, 16)]);
    let interrupts = driver.controller.triggers()[2];
    describe(&driver, &queues[0], 0, b"fresh");
    queues[0].offer(&driver.memory(), 0);
    driver.notify(1);
    driver.wait(1, interrupts + 1);
    assert_eq!(queues[0].take_used(&driver.memory()), Some((0, 5)));
}

#[test]
fn no_request_is_lost_when_doorbells_and_sleep_cross() {
    let (echo, driver) = driver(1);
    let mut queues = driver.start(VIRTIO_RING_F_EVENT_IDX, &[(1, 64)]);
    let memory = driver.memory();
    let queue = &mut queues[0];
    let mut old = 0u16;
    for round in 0..20_000u16 {
        let head = 2 * (round % 16);
        describe(&driver, queue, head, b"x");
        queue.offer(&memory, head);
        // Ring only when the device asks for it, as a driver does (2.7.10.1).
        std::sync::atomic::fence(Ordering::SeqCst);
        let new = round.wrapping_add(1);
        let event = queue.avail_event(&memory);
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            driver.notify(1);
        }
        old = new;
        wait_for(|| queue.used_index(&memory) == new);
        queue.take_used(&memory).unwrap();
    }
    assert_eq!(echo.served.load(Ordering::SeqCst), 20_000);
}

#[test]
fn a_device_that_is_dropped_takes_its_workers_along() {
    let (echo, driver) = driver(4);
    driver.start(0, &[(0, 16), (1, 16), (4, 16)]);
    drop(driver);
    assert_eq!(Arc::strong_count(&echo), 1);
}
