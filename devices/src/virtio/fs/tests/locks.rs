//! Requests that wait for a lock, and what may come on which queue: through real rings.

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use super::queue;
use crate::fuse::abi::*;
use crate::fuse::opcode::{Answer, OPCODES, Opcode};
use crate::fuse::testing::{EVERYTHING, Guest};
use crate::virtio::fs::{Config, FsDevice};
use crate::virtio::testing::*;

/// Where the request and the reply of a head are: so many bytes for each.
const REQUEST: u64 = 0x20_0000;
const REPLY: u64 = 0x28_0000;
const ROOM: u64 = 0x400;

/// The high priority queue, and two request queues.
const HIPRIO: usize = 0;
const FIRST: usize = 1;
const SECOND: usize = 2;

/// How long is waited for what must not happen.
const MOMENT: Duration = Duration::from_millis(30);

/// A guest with a file that the host has locked. Requests go through the rings, many at a time.
struct Machine {
    guest: Guest,
    driver: Driver,
    queues: Vec<DriverQueue>,
    /// How many requests each queue has given back.
    done: [usize; 3],
    host: File,
    node: u64,
    fh: u64,
}

impl Machine {
    fn new() -> Self {
        let guest = Guest::without_init(|_| {}, false);
        let device =
            FsDevice::new(Config::new("share", 2).unwrap(), guest.session.clone(), None).unwrap();
        let driver = Driver::new(Arc::new(device));
        std::fs::write(guest.path().join("file"), "").unwrap();
        let host = File::open(guest.path().join("file")).unwrap();
        let mut machine =
            Self { guest, driver, queues: Vec::new(), done: [0; 3], host, node: 0, fh: 0 };
        machine.start();
        machine
    }

    /// Sets the device up and begins a session. The host has the lock.
    fn start(&mut self) {
        self.queues = self.driver.start(0, &[(0, 64), (1, 64), (2, 64)]);
        let triggers = self.driver.controller.triggers();
        self.done = [triggers[1], triggers[2], triggers[3]];
        assert_eq!(self.guest.init(7, MINOR, EVERYTHING).error, 0);
        self.node = self.guest.node("file");
        self.fh = self.guest.fh(self.node, libc::O_RDWR);
        flock(&self.host, FlockOperation::NonBlockingLockExclusive).unwrap();
    }

    fn unlock_on_host(&self) {
        flock(&self.host, FlockOperation::Unlock).unwrap();
    }

    fn is_locked_by_guest(&self) -> bool {
        flock(&self.host, FlockOperation::NonBlockingLockExclusive).is_err()
    }

    /// Puts a request into a queue and rings. It takes two descriptors from `head` on.
    fn send(&mut self, queue: usize, head: u16, unique: u64, opcode: u32, body: &[u8]) {
        let mut frame = self.guest.frame(opcode, self.node, &[body]);
        frame[8..16].copy_from_slice(&unique.to_ne_bytes());
        let memory = self.driver.memory();
        let at = (u64::from(head) + 64 * queue as u64) * ROOM;
        memory.write_slice(&frame, GuestAddress(REQUEST + at)).unwrap();
        memory.write_slice(&[0x5c; 16], GuestAddress(REPLY + at)).unwrap();
        let ring = &mut self.queues[queue];
        ring.describe(&memory, head, (REQUEST + at, frame.len() as u32, NEXT, head + 1));
        ring.describe(&memory, head + 1, (REPLY + at, ROOM as u32, WRITE, 0));
        ring.offer(&memory, head);
        drop(memory);
        self.driver.notify(queue as u16);
    }

    /// A SETLKW of flock(2) on a handle of its own.
    fn wait_for_lock(&mut self, queue: usize, head: u16, unique: u64) {
        let fh = self.guest.fh(self.node, libc::O_RDONLY);
        let lk = FileLock { start: 0, end: i64::MAX as u64, type_: 1, pid: 1 };
        let body = LkIn { fh, owner: fh, lk, lk_flags: LK_FLOCK, padding: 0 };
        self.send(queue, head, unique, Opcode::Setlkw as u32, body.as_slice());
    }

    fn interrupt(&mut self, queue: usize, head: u16, unique: u64) {
        let body = InterruptIn { unique };
        self.send(queue, head, unique | 1, Opcode::Interrupt as u32, body.as_slice());
    }

    /// Waits for the next request that a queue gives back: its head, and the error and `unique` of its
    /// reply.
    fn take(&mut self, queue: usize) -> (u16, Option<(i32, u64)>) {
        let memory = self.driver.memory();
        let start = Instant::now();
        let (head, len) = loop {
            if let Some(used) = self.queues[queue].take_used(&memory) {
                break used;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "nothing comes");
            std::thread::yield_now();
        };
        self.done[queue] += 1;
        // Another may have come meanwhile.
        let interrupts = self.driver.controller.wait(queue + 1, self.done[queue]);
        assert!(interrupts >= self.done[queue], "no interrupt");
        let head = head as u16;
        let mut header = OutHeader::default();
        let at = REPLY + (u64::from(head) + 64 * queue as u64) * ROOM;
        memory.read_slice(header.as_mut_slice(), GuestAddress(at)).unwrap();
        if len == 0 {
            assert_eq!(header.as_slice(), [0x5c; 16], "nothing is written");
            return (head, None);
        }
        assert_eq!(header.len, len);
        (head, Some((-header.error, header.unique)))
    }

    fn nothing_comes(&mut self, queue: usize) {
        std::thread::sleep(MOMENT);
        assert_eq!(self.queues[queue].take_used(&self.driver.memory()), None);
    }

    /// What the device may write to: replies and rings.
    fn writable_memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; 3 * 64 * ROOM as usize];
        let memory = self.driver.memory();
        memory.read_slice(&mut bytes, GuestAddress(REPLY)).unwrap();
        for queue in &self.queues {
            let mut ring = [0; 0x400];
            memory.read_slice(&mut ring, GuestAddress(queue.device())).unwrap();
            bytes.extend(ring);
        }
        bytes
    }
}

#[test]
fn a_request_that_waits_does_not_hold_up_its_queue() {
    let mut machine = Machine::new();
    machine.wait_for_lock(FIRST, 0, 100);
    let getattr = GetattrIn::default();
    for head in [2, 4, 6, 2] {
        machine.send(FIRST, head, 200, Opcode::Getattr as u32, getattr.as_slice());
        assert_eq!(machine.take(FIRST), (head, Some((0, 200))));
    }
    machine.nothing_comes(FIRST);
    machine.unlock_on_host();
    assert_eq!(machine.take(FIRST), (0, Some((0, 100))));
    assert!(machine.is_locked_by_guest());
    assert_eq!(machine.driver.status(), 15);
}

#[test]
fn a_head_that_waits_must_not_be_offered_again() {
    let mut machine = Machine::new();
    machine.wait_for_lock(FIRST, 0, 100);
    machine.nothing_comes(FIRST);
    machine.queues[FIRST].offer(&machine.driver.memory(), 0);
    machine.driver.notify(FIRST as u16);
    machine.driver.wait_until_broken();
    let before = machine.writable_memory();
    machine.unlock_on_host();
    std::thread::sleep(MOMENT);
    assert!(before == machine.writable_memory(), "a broken queue gets no more replies");
}

#[test]
fn an_interrupt_on_any_queue_ends_the_waiting_and_an_unknown_one_does_nothing() {
    let mut machine = Machine::new();
    for queue in [HIPRIO, FIRST, SECOND] {
        machine.wait_for_lock(SECOND, 0, 100);
        machine.wait_for_lock(SECOND, 2, 102);
        for unknown in [0, 98, 101, u64::MAX] {
            machine.interrupt(queue, 10, unknown);
            assert_eq!(machine.take(queue), (10, None));
        }
        machine.nothing_comes(SECOND);
        machine.interrupt(queue, 10, 102);
        // The interrupt itself is given back too, and in any order.
        let mut given_back = [machine.take(queue), machine.take(SECOND)];
        if queue != SECOND {
            assert_eq!(given_back, [(10, None), (2, Some((libc::EINTR, 102)))]);
        }
        given_back.sort();
        assert_eq!(given_back, [(2, Some((libc::EINTR, 102))), (10, None)]);
        machine.nothing_comes(SECOND);
        machine.unlock_on_host();
        assert_eq!(machine.take(SECOND), (0, Some((0, 100))));
        // The lock goes with the session.
        machine.start();
    }
}

#[test]
fn an_interrupt_that_is_there_before_its_request_counts() {
    let mut machine = Machine::new();
    machine.interrupt(HIPRIO, 0, 100);
    assert_eq!(machine.take(HIPRIO), (0, None));
    machine.wait_for_lock(FIRST, 0, 100);
    assert_eq!(machine.take(FIRST), (0, Some((libc::EINTR, 100))));
    // Once.
    machine.wait_for_lock(FIRST, 0, 100);
    machine.nothing_comes(FIRST);
    machine.unlock_on_host();
    assert_eq!(machine.take(FIRST), (0, Some((0, 100))));
}

#[test]
fn an_answer_to_a_question_that_was_not_asked_is_ignored() {
    let mut machine = Machine::new();
    for queue in [HIPRIO, FIRST] {
        for body in [&[][..], &[0xff; 256]] {
            machine.send(queue, 0, 1, Opcode::NotifyReply as u32, body);
            assert_eq!(machine.take(queue), (0, None));
        }
    }
    assert_eq!(machine.driver.status(), 15);
}

#[test]
fn the_high_priority_queue_refuses_what_has_a_reply_and_does_none_of_it() {
    let mut machine = Machine::new();
    let mkdir = [MkdirIn { mode: 0o755, umask: 0 }.as_slice(), b"d\0"].concat();
    for limits in OPCODES {
        let body = match limits.opcode {
            Opcode::Mkdir => mkdir.clone(),
            _ => vec![0; limits.least],
        };
        machine.send(HIPRIO, 0, 8, limits.opcode as u32, &body);
        match limits.answer {
            Answer::Never => assert_eq!(machine.take(HIPRIO), (0, None), "{}", limits.name),
            Answer::Body(_) => {
                assert_eq!(machine.take(HIPRIO), (0, Some((libc::EINVAL, 8))), "{}", limits.name);
            }
        }
    }
    assert!(!machine.guest.path().join("d").exists());
    // Neither INIT nor DESTROY has ended the session.
    assert_eq!(machine.guest.getattr(machine.node).error, 0);
    assert_eq!(machine.driver.status(), 15);
}

#[test]
fn the_high_priority_queue_goes_on_while_the_others_are_full_of_waiting_requests() {
    let mut machine = Machine::new();
    for queue in [FIRST, SECOND] {
        for head in (0..64).step_by(2) {
            machine.wait_for_lock(queue, head, 1000 * queue as u64 + u64::from(head));
        }
    }
    let forget = ForgetIn { nlookup: 1 };
    assert_eq!(machine.guest.node("file"), machine.node, "one lookup more");
    for _ in 0..100 {
        machine.send(HIPRIO, 0, 8, Opcode::Forget as u32, forget.as_slice());
        assert_eq!(machine.take(HIPRIO), (0, None));
        machine.guest.node("file");
    }
    for queue in [FIRST, SECOND] {
        machine.nothing_comes(queue);
        for head in (0..64).step_by(2) {
            let unique = 1000 * queue as u64 + u64::from(head);
            machine.interrupt(HIPRIO, 0, unique);
            assert_eq!(machine.take(HIPRIO), (0, None));
            assert_eq!(machine.take(queue), (head, Some((libc::EINTR, unique))));
        }
    }
}

#[test]
fn a_reset_ends_the_waiting_at_once_and_nothing_is_written_afterwards() {
    let mut machine = Machine::new();
    for queue in [FIRST, SECOND] {
        for head in (0..64).step_by(2) {
            machine.wait_for_lock(queue, head, u64::from(head));
        }
        machine.nothing_comes(queue);
    }
    let start = Instant::now();
    machine.driver.reset();
    assert!(start.elapsed() < Duration::from_secs(1), "{:?}", start.elapsed());
    assert_eq!(machine.driver.status(), 0);
    let before = machine.writable_memory();
    let interrupts = machine.driver.controller.triggers();
    machine.unlock_on_host();
    std::thread::sleep(MOMENT);
    assert!(before == machine.writable_memory(), "memory is the driver's again");
    assert_eq!(machine.driver.controller.triggers(), interrupts);
    assert!(!machine.is_locked_by_guest(), "nobody got the lock");
    machine.start();
    machine.wait_for_lock(FIRST, 0, 100);
    machine.unlock_on_host();
    assert_eq!(machine.take(FIRST), (0, Some((0, 100))));
}

#[test]
fn a_lock_that_is_granted_during_a_reset_is_answered_before_it_or_never() {
    let mut machine = Machine::new();
    for round in 0..100u64 {
        for head in (0..16).step_by(2) {
            machine.wait_for_lock(FIRST, head, u64::from(head));
        }
        let (host, driver) = (&machine.host, &machine.driver);
        std::thread::scope(|scope| {
            scope.spawn(move || {
                std::thread::sleep(Duration::from_micros(round * 7));
                flock(host, FlockOperation::Unlock).unwrap();
            });
            std::thread::sleep(Duration::from_micros(300));
            driver.reset();
        });
        let before = machine.writable_memory();
        let interrupts = machine.driver.controller.triggers();
        std::thread::sleep(Duration::from_millis(1));
        assert!(before == machine.writable_memory(), "round {round}");
        assert_eq!(machine.driver.controller.triggers(), interrupts, "round {round}");
        let start = Instant::now();
        while machine.is_locked_by_guest() {
            assert!(start.elapsed() < Duration::from_secs(10), "a lock has outlived its session");
        }
        machine.start();
    }
}

#[test]
fn a_device_that_goes_away_leaves_no_one_waiting() {
    let mut machine = Machine::new();
    for head in (0..64).step_by(2) {
        machine.wait_for_lock(FIRST, head, u64::from(head));
    }
    machine.nothing_comes(FIRST);
    let session = Arc::downgrade(&machine.guest.session);
    let Machine { guest, driver, host, .. } = machine;
    drop(driver);
    guest.session.reset();
    drop(guest);
    assert!(session.upgrade().is_none(), "nothing keeps the session");
    flock(&host, FlockOperation::Unlock).unwrap();
    let start = Instant::now();
    while flock(&host, FlockOperation::NonBlockingLockExclusive).is_err() {
        assert!(start.elapsed() < Duration::from_secs(10));
    }
}

#[test]
fn a_reply_whose_place_is_gone_is_no_reply() {
    let mut machine = Machine::new();
    let lk = FileLock { start: 0, end: 0, type_: 1, pid: 1 };
    let fh = machine.fh;
    let body = LkIn { fh, owner: 1, lk, lk_flags: LK_FLOCK, padding: 0 };
    let frame = machine.guest.frame(Opcode::Setlkw as u32, machine.node, &[body.as_slice()]);
    let memory = machine.driver.memory();
    memory.write_slice(&frame, GuestAddress(REQUEST)).unwrap();
    let ring = &mut machine.queues[FIRST];
    ring.describe(&memory, 0, (REQUEST, frame.len() as u32, NEXT, 1));
    ring.describe(&memory, 1, (WINDOW, 16, WRITE, 0));
    ring.offer(&memory, 0);
    drop(memory);
    machine.driver.notify(FIRST as u16);
    machine.nothing_comes(FIRST);
    // The guest moves the window away while the reply is still to come.
    let without = machine.driver.memory().remove_region(GuestAddress(WINDOW), WINDOW_SIZE as u64);
    machine.driver.memory.lock().unwrap().replace(without.unwrap().0);
    machine.unlock_on_host();
    machine.driver.wait(FIRST as u16, machine.done[FIRST] + 1);
    assert_eq!(machine.queues[FIRST].take_used(&machine.driver.memory()), Some((0, 0)));
    assert_eq!(machine.driver.status(), 15);
}

#[test]
fn what_is_no_lock_is_refused() {
    let guest = queue::guest();
    std::fs::write(guest.path().join("file"), "").unwrap();
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDWR);
    const END: u64 = i64::MAX as u64;
    for opcode in [Opcode::Getlk, Opcode::Setlk, Opcode::Setlkw] {
        for (start, end, type_, lk_flags, expected) in [
            (0, END, 1, 0, 0),
            (END, END, 0, 0, 0),
            (1, 0, 0, 0, libc::EINVAL),
            (0, END + 1, 0, 0, libc::EINVAL),
            (END + 1, u64::MAX, 0, 0, libc::EINVAL),
            (0, u64::MAX, 1, 0, libc::EINVAL),
            (0, 0, 3, 0, libc::EINVAL),
            (0, 0, u32::MAX, 0, libc::EINVAL),
            (0, 0, 1 << 16, 0, libc::EINVAL),
            (0, 0, 1, 2, libc::EINVAL),
            (0, 0, 1, u32::MAX, libc::EINVAL),
        ] {
            let lk = FileLock { start, end, type_, pid: u32::MAX };
            let body = LkIn { fh, owner: u64::MAX, lk, lk_flags, padding: u32::MAX };
            let answer = guest.call(opcode, node, &[body.as_slice()]);
            assert_eq!(answer.error, expected, "{opcode:?} {body:?}");
            let wrong = LkIn { fh: fh + 1, ..body };
            let answer = guest.call(opcode, node, &[wrong.as_slice()]);
            assert!(answer.error != 0, "{opcode:?} {body:?}");
        }
    }
}
