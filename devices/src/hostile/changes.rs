//! Memory that changes after the device has read it: what was read counts (2.6, "copy once").

use std::io::{self, Write};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::fuse::{Deferral, Served};
use crate::memory::GuestBuffer;
use crate::sync::lock;
use crate::virtio::console::{ConsoleDevice, Port};
use crate::virtio::fs::{Config, Dispatch, FsDevice, Server};
use crate::virtio::testing::*;

const REQUEST: u64 = 0x20_0000;
const REPLY: u64 = 0x20_1000;
const ELSEWHERE: u64 = 0x20_2000;
const TABLE: u64 = 0x20_3000;

/// Between two points of which the test changes memory: whoever serves says that it has begun, and waits.
struct Gate {
    begun: Mutex<mpsc::Sender<()>>,
    go_on: Mutex<mpsc::Receiver<()>>,
}

impl Gate {
    fn pass(&self) {
        lock(&self.begun).send(()).unwrap();
        lock(&self.go_on).recv().unwrap();
    }
}

fn gate() -> (Gate, mpsc::Receiver<()>, mpsc::Sender<()>) {
    let ((begun, has_begun), (go_on, may_go_on)) = (mpsc::channel(), mpsc::channel());
    (Gate { begun: Mutex::new(begun), go_on: Mutex::new(may_go_on) }, has_begun, go_on)
}

/// Answers "answer" once the gate lets it.
struct Slow(Gate);

impl Server for Slow {
    fn serve(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        _: &dyn Deferral,
    ) -> Served {
        Served::Done(self.serve_urgent(request, reply))
    }

    fn serve_urgent(&self, request: &GuestBuffer<'_>, reply: &GuestBuffer<'_>) -> u32 {
        self.0.pass();
        assert_eq!(request.len(), 8);
        reply.write_at(0, b"answer").unwrap();
        6
    }

    fn reset(&self) {}
}

fn wait_used(driver: &Driver, queue: &mut DriverQueue) -> (u32, u32) {
    let since = Instant::now();
    loop {
        if let Some(used) = queue.take_used(&driver.memory()) {
            return used;
        }
        assert!(since.elapsed() < Duration::from_secs(10), "the request is not given back");
        std::thread::yield_now();
    }
}

/// Changes something while a request is being served, whose descriptors are a table. The reply is where the device
/// was told first, and nowhere else.
fn change(what: impl Fn(&Driver, &mut DriverQueue)) {
    let (gate, has_begun, go_on) = gate();
    let config = Config::new("share", 1).unwrap();
    let device = FsDevice::new(config, Arc::new(Slow(gate)), None).unwrap();
    let driver = Driver::new(Arc::new(device.with_dispatch(Dispatch::Worker)));
    let mut queue = driver.start(1 << 28, &[(1, 8)]).remove(0);
    let memory = driver.memory();
    write_descriptor(&memory, TABLE, (REQUEST, 8, NEXT, 1));
    write_descriptor(&memory, TABLE + 16, (REPLY, 64, WRITE, 0));
    queue.describe(&memory, 0, (TABLE, 32, INDIRECT, 0));
    queue.offer(&memory, 0);
    driver.notify(1);
    has_begun.recv_timeout(Duration::from_secs(10)).unwrap();
    what(&driver, &mut queue);
    go_on.send(()).unwrap();
    assert_eq!(wait_used(&driver, &mut queue), (0, 6));
    let mut bytes = [0; 6];
    memory.read_slice(&mut bytes, GuestAddress(REPLY)).unwrap();
    assert_eq!(&bytes, b"answer");
    memory.read_slice(&mut bytes, GuestAddress(ELSEWHERE)).unwrap();
    assert_eq!(bytes, [0; 6], "not where it was told later");
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_table_that_changes_while_its_request_is_served_does_not_move_the_reply() {
    change(|driver, _| {
        write_descriptor(&driver.memory(), TABLE + 16, (ELSEWHERE, 64, WRITE, 0));
        write_descriptor(&driver.memory(), TABLE, (RAM, u32::MAX, NEXT, 7));
    });
}

#[test]
fn a_descriptor_that_changes_while_its_request_is_served_is_not_looked_at() {
    change(|driver, queue| {
        queue.describe(&driver.memory(), 0, (RAM, u32::MAX, NEXT | INDIRECT, 0))
    });
}

#[test]
fn an_available_ring_that_changes_while_a_request_is_served_is_not_looked_at() {
    change(|driver, queue| {
        let ring = GuestAddress(queue.driver() + 4);
        driver.memory().write_slice(&[0xff; 16], ring).unwrap();
    });
}

/// Ends the thread that changes memory, also when the test fails.
struct Stop<'s>(&'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Of a file system's request the header decides: what it says of lengths and nodes is read once.
#[test]
fn a_request_that_changes_all_the_time_is_one_or_the_other() {
    let (directory, share) = super::share(|_| {});
    let machine = crate::testing::Machine::fs(share);
    let driver = &machine.driver;
    let mut queue = driver.start(0, &[(1, 8)]).remove(0);
    machine.serve(&mut queue, 1, &crate::testing::init(u64::MAX), 256);
    let memory = driver.memory();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _at_the_end = Stop(&stop);
        scope.spawn(|| {
            // Length, opcode and the first byte of the name.
            let values: [[u8; 4]; 4] = [[45, 0, 0, 0], [255; 4], [1, 0, 0, 0], [41, 0, 0, 0]];
            while !stop.load(Ordering::Relaxed) {
                for value in values {
                    for at in [0, 4, 40] {
                        memory.write_slice(&value, GuestAddress(0x30_0000 + at)).unwrap();
                    }
                }
            }
        });
        let lookup = crate::testing::request(crate::fuse::opcode::Opcode::Lookup, 1, 7, b"file\0");
        for _ in 0..3000 {
            // The form of the reply is right, whatever was read: `serve` and the length say so.
            let reply = machine.serve(&mut queue, 1, &lookup, 256);
            if let Some(len) = reply.get(..4) {
                assert_eq!(u32::from_ne_bytes(len.try_into().unwrap()) as usize, reply.len());
            }
        }
    });
    assert_eq!(driver.status(), 15);
    assert_eq!(std::fs::read_dir(directory.path().join("share")).unwrap().count(), 4);
    machine.still_works();
}

/// Takes what comes, once the gate lets it.
struct Output(Arc<Gate>, Arc<Mutex<Vec<u8>>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.pass();
        lock(&self.1).extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn output_that_changes_while_it_is_written_is_what_it_was() {
    let (gate, has_begun, go_on) = gate();
    let written = Arc::new(Mutex::new(Vec::new()));
    let output = Output(Arc::new(gate), written.clone());
    let port = Port { name: "first".into(), output: Some(Box::new(output)) };
    let device = Arc::new(ConsoleDevice::new(vec![port]).unwrap());
    let driver = Driver::new(device);
    let mut queue = driver.start(0, &[(1, 8)]).remove(0);
    let memory = driver.memory();
    memory.write_slice(b"as it was", GuestAddress(REQUEST)).unwrap();
    queue.describe(&memory, 0, (REQUEST, 9, 0, 0));
    queue.offer(&memory, 0);
    driver.notify(1);
    has_begun.recv_timeout(Duration::from_secs(10)).unwrap();
    memory.write_slice(b"something", GuestAddress(REQUEST)).unwrap();
    queue.describe(&memory, 0, (RAM, u32::MAX, NEXT, 0));
    go_on.send(()).unwrap();
    assert_eq!(wait_used(&driver, &mut queue), (0, 0));
    assert_eq!(*lock(&written), b"as it was");
    assert_eq!(driver.status(), 15);
}
