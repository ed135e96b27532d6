//! The whole device through its registers and rings, with a driver that does as Linux does, or worse.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::sync::lock;
use crate::virtio::testing::*;
use crate::virtio::{VIRTIO_RING_F_EVENT_IDX, VirtioDevice};

const MULTIPORT: u64 = 1 << 1;
/// Queues of ports 0 and 1, and of control messages.
const RX0: u16 = 0;
const TX0: u16 = 1;
const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;
const RX1: u16 = 4;
const TX1: u16 = 5;
const SIZE: u16 = 8;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// What a port's output got; it writes only while the gate is open.
#[derive(Clone, Default)]
struct Log {
    bytes: Arc<Mutex<Vec<u8>>>,
    gate: Arc<Mutex<Option<mpsc::Receiver<()>>>>,
}

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(gate) = &*lock(&self.gate) {
            let _ = gate.recv();
        }
        lock(&self.bytes).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A driver with the queues of two ports, and buffers of its own for each descriptor.
struct Guest {
    driver: Driver,
    device: Arc<ConsoleDevice>,
    logs: [Log; 2],
    queues: Vec<DriverQueue>,
}

/// Descriptor `head` of a queue has this buffer, of 256 bytes.
fn buffer(queue: u16, head: u16) -> u64 {
    0x20_0000 + 0x1_0000 * u64::from(queue) + 0x100 * u64::from(head)
}

impl Guest {
    fn new() -> Self {
        let logs = [Log::default(), Log::default()];
        let port =
            |name: &str, log: &Log| Port { name: name.into(), output: Some(Box::new(log.clone())) };
        let ports = vec![port("first", &logs[0]), port("org.second", &logs[1])];
        let device = Arc::new(ConsoleDevice::new(ports).unwrap());
        let driver = Driver::new(device.clone());
        Self { driver, device, logs, queues: Vec::new() }
    }

    fn start(&mut self, features: u64) {
        let queues: Vec<_> = (RX0..=TX1).map(|index| (index, SIZE)).collect();
        self.queues = self.driver.start(features, &queues);
    }

    /// A guest that is up, with `buffers` for control messages, before it has said anything.
    fn up(buffers: u16) -> Self {
        let mut guest = Self::new();
        guest.start(MULTIPORT);
        guest.offer(CONTROL_RX, buffers, 256);
        guest
    }

    /// A guest that has gone through the handshake with both ports.
    fn ready() -> Self {
        let mut guest = Self::up(SIZE);
        guest.handshake();
        guest
    }

    fn handshake(&mut self) {
        self.say(u32::MAX, DEVICE_READY, 1);
        let added = [self.hear(), self.hear()];
        assert_eq!(added, [(0, PORT_ADD, 1, vec![]), (1, PORT_ADD, 1, vec![])]);
        for (id, name) in [(0, &b"first"[..]), (1, b"org.second")] {
            self.say(id, PORT_READY, 1);
            assert_eq!(self.hear(), (id, PORT_OPEN, 1, vec![]), "open before it can be found");
            assert_eq!(self.hear(), (id, PORT_NAME, 1, name.to_vec()));
        }
    }

    /// Offers buffers 0 to `count` of a receive queue.
    fn offer(&mut self, index: u16, count: u16, len: u32) {
        for head in 0..count {
            self.offer_one(index, head, len);
        }
        self.driver.notify(index);
    }

    fn offer_one(&mut self, index: u16, head: u16, len: u32) {
        let memory = self.driver.memory();
        let queue = &mut self.queues[usize::from(index)];
        queue.describe(&memory, head, (buffer(index, head), len, WRITE, 0));
        queue.offer(&memory, head);
    }

    fn used(&mut self, index: u16) -> Option<(u32, u32)> {
        self.queues[usize::from(index)].take_used(&self.driver.memory())
    }

    fn wait_used(&mut self, index: u16) -> (u32, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.used(index) {
                return used;
            }
            assert!(start.elapsed().as_secs() < 10, "queue {index}");
            std::thread::yield_now();
        }
    }

    /// Sends bytes from a transmit queue, and does not wait.
    fn put(&mut self, index: u16, head: u16, bytes: &[u8]) {
        let memory = self.driver.memory();
        memory.write_slice(bytes, GuestAddress(buffer(index, head))).unwrap();
        let queue = &mut self.queues[usize::from(index)];
        queue.describe(&memory, head, (buffer(index, head), bytes.len() as u32, 0, 0));
        queue.offer(&memory, head);
        self.driver.notify(index);
    }

    /// Sends bytes, and waits until they are taken.
    fn transmit(&mut self, index: u16, bytes: &[u8]) {
        self.put(index, 0, bytes);
        assert_eq!(self.wait_used(index), (0, 0));
    }

    fn say(&mut self, id: u32, event: u16, value: u16) {
        let mut message = id.to_le_bytes().to_vec();
        message.extend(event.to_le_bytes());
        message.extend(value.to_le_bytes());
        self.transmit(CONTROL_TX, &message);
    }

    /// Receives from a queue, and gives the buffer back.
    fn receive(&mut self, index: u16) -> Vec<u8> {
        let (head, len) = self.wait_used(index);
        let head = head as u16;
        let mut bytes = vec![0; len as usize];
        let at = GuestAddress(buffer(index, head));
        self.driver.memory().read_slice(&mut bytes, at).unwrap();
        self.offer_one(index, head, 256);
        self.driver.notify(index);
        bytes
    }

    fn hear(&mut self) -> (u32, u16, u16, Vec<u8>) {
        let bytes = self.receive(CONTROL_RX);
        let (header, name) = bytes.split_at(8);
        let id = u32::from_le_bytes(header[..4].try_into().unwrap());
        let number = |at: usize| u16::from_le_bytes([header[at], header[at + 1]]);
        (id, number(4), number(6), name.to_vec())
    }

    /// Nothing comes in a queue for a while.
    fn expect_silence(&mut self, index: u16) {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(self.used(index), None);
    }

    fn output(&self, port: usize) -> Vec<u8> {
        lock(&self.logs[port].bytes).clone()
    }
}

fn noise(len: usize) -> Vec<u8> {
    let mut noise = Noise(7);
    (0..len).map(|_| noise.number() as u8).collect()
}

fn wait_for(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed().as_secs() < 10);
        std::thread::yield_now();
    }
}

#[test]
fn a_driver_sees_a_console_with_ports() {
    let guest = Guest::new();
    let driver = &guest.driver;
    assert_eq!(driver.config_dword(0), 0x1043_1af4);
    let at = driver.find(4).unwrap().offset;
    assert_eq!(driver.read::<4>(at + 4), 2, "max_nr_ports");
    assert_eq!(driver.read::<2>(18), 6, "queues");
    assert_eq!(driver.offered() & 0xff_ffff, MULTIPORT);
}

#[test]
fn ports_are_added_opened_and_named_when_the_driver_is_ready() {
    let mut guest = Guest::up(SIZE);
    guest.expect_silence(CONTROL_RX);
    guest.handshake();
    guest.expect_silence(CONTROL_RX);
}

#[test]
fn messages_wait_for_buffers_that_they_fit() {
    let mut guest = Guest::up(0);
    guest.say(0, DEVICE_READY, 1);
    for head in 0..3 {
        guest.offer_one(CONTROL_RX, head, if head == 1 { 7 } else { 256 });
    }
    guest.driver.notify(CONTROL_RX);
    assert_eq!(guest.hear(), (0, PORT_ADD, 1, vec![]));
    assert_eq!(guest.wait_used(CONTROL_RX), (1, 0), "too small");
    assert_eq!(guest.hear(), (1, PORT_ADD, 1, vec![]));
}

#[test]
fn what_the_guest_sends_reaches_the_port_s_writer() {
    let mut guest = Guest::ready();
    let bytes = noise(3000);
    for piece in bytes.chunks(250) {
        guest.transmit(TX1, piece);
    }
    guest.transmit(TX0, b"other");
    assert!(guest.output(1) == bytes);
    assert_eq!(guest.output(0), b"other");
}

#[test]
fn a_chain_may_be_long_and_in_pieces() {
    let mut guest = Guest::ready();
    let bytes = noise(0x2_0000);
    let memory = guest.driver.memory();
    memory.write_slice(&bytes, GuestAddress(0x30_0000)).unwrap();
    let queue = &mut guest.queues[usize::from(TX0)];
    queue.describe(&memory, 0, (0x30_0000, 0x1_0001, NEXT, 1));
    queue.describe(&memory, 1, (0x30_0000, 0, NEXT, 2));
    queue.describe(&memory, 2, (0x31_0001, 0xffff, 0, 0));
    queue.offer(&memory, 0);
    guest.driver.notify(TX0);
    assert_eq!(guest.wait_used(TX0), (0, 0));
    assert!(guest.output(0) == bytes);
}

#[test]
fn a_writer_that_blocks_holds_back_its_own_port_only() {
    let mut guest = Guest::ready();
    let (open, gate) = mpsc::channel();
    *lock(&guest.logs[0].gate) = Some(gate);
    guest.put(TX0, 0, b"stuck");
    guest.transmit(TX1, b"goes");
    guest.device.input(1).unwrap().send(b"in").unwrap();
    guest.offer(RX1, 1, 256);
    guest.say(1, PORT_OPEN, 1);
    assert_eq!(guest.receive(RX1), b"in");
    assert_eq!(guest.used(TX0), None, "not taken yet");
    drop(open);
    assert_eq!(guest.wait_used(TX0), (0, 0));
    assert_eq!(guest.output(0), b"stuck");
}

#[test]
fn input_larger_than_all_buffers_arrives_whole() {
    for features in [0, VIRTIO_RING_F_EVENT_IDX] {
        let mut guest = Guest::new();
        guest.start(MULTIPORT | features);
        guest.offer(CONTROL_RX, SIZE, 256);
        guest.handshake();
        guest.say(1, PORT_OPEN, 1);
        guest.offer(RX1, SIZE, 256);
        let bytes = noise(5 * input::CAPACITY + 77);
        let input = guest.device.input(1).unwrap();
        std::thread::scope(|scope| {
            // Blocks: it is more than the port holds.
            scope.spawn(|| input.send(&bytes).unwrap());
            let mut received = Vec::new();
            while received.len() < bytes.len() {
                received.extend(guest.receive(RX1));
            }
            assert!(received == bytes);
        });
    }
}

#[test]
fn input_waits_until_the_guest_has_opened_the_port() {
    let mut guest = Guest::up(SIZE);
    let input = guest.device.input(0).unwrap();
    input.send(b"early ").unwrap();
    guest.offer(RX0, 2, 4);
    guest.handshake();
    guest.expect_silence(RX0);
    guest.say(0, PORT_OPEN, 1);
    assert_eq!(guest.receive(RX0), b"earl");
    assert_eq!(guest.receive(RX0), b"y ");
    guest.say(0, PORT_OPEN, 0);
    input.send(b"late").unwrap();
    guest.expect_silence(RX0);
    guest.say(0, PORT_OPEN, 1);
    assert_eq!(guest.receive(RX0), b"late");
}

#[test]
fn input_that_does_not_fit_is_refused_when_the_sender_cannot_wait() {
    let guest = Guest::new();
    let input = guest.device.input(0).unwrap();
    assert!(input.try_send(&vec![0; input::CAPACITY - 1]));
    assert!(!input.try_send(b"ab"));
    assert!(input.try_send(b"a"));
    input.close();
    assert!(!input.try_send(b""));
    assert_eq!(input.send(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    assert!(guest.device.input(2).is_none());
}

#[test]
fn the_port_closes_after_the_last_byte() {
    let mut guest = Guest::ready();
    let input = guest.device.input(1).unwrap();
    input.send(b"all").unwrap();
    input.close();
    guest.expect_silence(CONTROL_RX);
    guest.say(1, PORT_OPEN, 1);
    guest.expect_silence(CONTROL_RX);
    guest.offer(RX1, 1, 256);
    assert_eq!(guest.hear(), (1, PORT_OPEN, 0, vec![]));
    let used = guest.used(RX1);
    assert_eq!(used, Some((0, 3)), "in the ring before the port closes");
    guest.expect_silence(CONTROL_RX);
}

#[test]
fn an_empty_input_ends_when_the_port_is_opened() {
    let mut guest = Guest::up(SIZE);
    guest.device.input(0).unwrap().close();
    guest.handshake();
    guest.say(0, PORT_OPEN, 1);
    assert_eq!(guest.hear(), (0, PORT_OPEN, 0, vec![]));
}

#[test]
fn control_messages_without_a_meaning_are_ignored() {
    let mut guest = Guest::up(SIZE);
    for message in [&b""[..], b"short", &[0xff; 8], &[0xff; 100]] {
        guest.transmit(CONTROL_TX, message);
    }
    for id in [2, u32::MAX] {
        for event in [PORT_READY, PORT_OPEN, CONSOLE_PORT, PORT_NAME, 99] {
            guest.say(id, event, 1);
        }
    }
    for event in [DEVICE_READY, PORT_READY, PORT_OPEN, CONSOLE_PORT] {
        guest.say(0, event, 0);
    }
    guest.expect_silence(CONTROL_RX);
    assert_eq!(guest.driver.status(), 15);
    guest.handshake();
}

#[test]
fn a_driver_that_asks_and_never_listens_costs_nothing() {
    let mut guest = Guest::up(0);
    for _ in 0..1000 {
        guest.say(0, PORT_READY, 1);
    }
    guest.offer(CONTROL_RX, SIZE, 256);
    assert_eq!(guest.hear(), (0, PORT_OPEN, 1, vec![]));
    assert_eq!(guest.hear(), (0, PORT_NAME, 1, b"first".to_vec()));
    guest.expect_silence(CONTROL_RX);
}

#[test]
fn every_queue_that_is_broken_makes_the_device_need_a_reset() {
    for index in RX0..=TX1 {
        let mut guest = Guest::ready();
        for port in 0..2 {
            guest.say(port as u32, PORT_OPEN, 1);
            guest.device.input(port).unwrap().send(b"in").unwrap();
        }
        let memory = guest.driver.memory();
        let queue = &mut guest.queues[usize::from(index)];
        if index == CONTROL_RX {
            // All buffers are there already, and one of them now a second time.
            queue.offer(&memory, 0);
            guest.say(0, PORT_READY, 1);
        } else {
            queue.describe(&memory, 0, (RAM, 4, if index % 2 == 0 { WRITE } else { 0 }, 0));
            queue.offer(&memory, 0);
            guest.driver.notify(index);
        }
        guest.driver.wait_until_broken();
        // A reset helps.
        guest.start(MULTIPORT);
        guest.offer(CONTROL_RX, SIZE, 256);
        guest.handshake();
        guest.transmit(TX0, b"again");
        assert_eq!(guest.output(0), b"again");
    }
}

#[test]
fn a_reset_forgets_the_driver_and_keeps_the_input() {
    let mut guest = Guest::ready();
    guest.say(0, PORT_OPEN, 1);
    guest.offer(RX0, 1, 4);
    let input = guest.device.input(0).unwrap();
    input.send(b"gonekept").unwrap();
    assert_eq!(guest.wait_used(RX0), (0, 4));
    guest.start(MULTIPORT);
    guest.offer(CONTROL_RX, SIZE, 256);
    guest.offer(RX0, SIZE, 256);
    guest.expect_silence(CONTROL_RX);
    guest.handshake();
    guest.expect_silence(RX0);
    guest.say(0, PORT_OPEN, 1);
    assert_eq!(guest.receive(RX0), b"kept");
}

#[test]
fn a_reset_does_not_wait_for_a_writer_that_blocks() {
    let mut guest = Guest::ready();
    let (open, gate) = mpsc::channel();
    *lock(&guest.logs[0].gate) = Some(gate);
    guest.put(TX0, 0, b"old");
    std::thread::sleep(Duration::from_millis(30));
    guest.start(MULTIPORT);
    guest.put(TX0, 0, b"new");
    guest.expect_silence(TX0);
    drop(open);
    assert_eq!(guest.wait_used(TX0), (0, 0));
    assert_eq!(guest.output(0), b"oldnew");
    guest.expect_silence(TX0);
}

#[test]
fn without_ports_port_0_still_has_output() {
    let mut guest = Guest::new();
    guest.device.input(0).unwrap().send(b"waits").unwrap();
    guest.start(0);
    guest.offer(RX0, SIZE, 256);
    guest.transmit(TX0, b"plain");
    assert_eq!(guest.output(0), b"plain");
    guest.put(TX1, 0, b"no such port");
    guest.expect_silence(RX0);
    assert_eq!(guest.output(1), b"");
}

#[test]
fn a_device_that_finishes_has_written_everything() {
    let mut guest = Guest::ready();
    let (open, gate) = mpsc::channel();
    *lock(&guest.logs[0].gate) = Some(gate);
    for head in 0..SIZE {
        guest.put(TX0, head, &noise(250));
        guest.put(TX1, head, &noise(250));
    }
    let device = guest.device.clone();
    let finishing = std::thread::spawn(move || device.finish());
    wait_for(|| guest.output(1).len() == 250 * usize::from(SIZE));
    assert!(!finishing.is_finished());
    drop(open);
    finishing.join().unwrap();
    assert!(guest.output(0) == noise(250).repeat(SIZE.into()));
    guest.device.finish();
    guest.device.reset();
}

#[test]
fn a_device_that_is_dropped_takes_its_threads_along() {
    let guest = Guest::ready();
    let Guest { driver, device, logs, .. } = guest;
    let input = device.input(0).unwrap();
    drop((driver, device));
    wait_for(|| logs.iter().all(|log| Arc::strong_count(&log.bytes) == 1));
    assert!(input.send(b"x").is_err());
}
