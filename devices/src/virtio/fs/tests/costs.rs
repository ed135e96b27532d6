//! What a request costs the vCPU that rings, exactly: system calls, and memory that is asked for.

use std::sync::Arc;

use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::costs::{allocations, system_calls};
use crate::fuse::abi::*;
use crate::fuse::opcode::Opcode;
use crate::fuse::testing::{EVERYTHING, Guest};
use crate::share::Options;
use crate::virtio::VIRTIO_RING_F_EVENT_IDX;
use crate::virtio::fs::{Config, FsDevice};
use crate::virtio::testing::*;

const REQUEST: u64 = 0x28_0000;
const REPLY: u64 = 0x14_0000;

/// The interrupt: what is the write to an eventfd in a machine wakes whoever waits for it here.
const INTERRUPT: i64 = libc::SYS_futex;

/// A guest in memory, so that all of its files are had at once, and its device.
struct Machine {
    guest: Guest,
    device: Arc<FsDevice>,
    driver: Driver,
    queue: DriverQueue,
    /// Where its doorbell is.
    doorbell: u64,
    sent: u16,
}

impl Machine {
    fn new(change: impl FnOnce(&mut Options)) -> Self {
        let guest = Guest::without_init_in("/dev/shm", change, true);
        let config = Config::new("share", 1).unwrap();
        let device = FsDevice::new(config, guest.session.clone(), None).unwrap();
        let device = Arc::new(device);
        let driver = Driver::new(device.clone());
        let queue = driver.start(VIRTIO_RING_F_EVENT_IDX, &[(1, 64)]).remove(0);
        let doorbell = driver.find(2).unwrap().offset + 4;
        assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
        Self { guest, device, driver, queue, doorbell, sent: 0 }
    }

    /// Puts a request with room for `room` bytes of reply into the queue, as Linux does: headers apart from data.
    fn offer(&mut self, opcode: Opcode, nodeid: u64, parts: &[&[u8]], room: u32) {
        let memory = self.driver.memory();
        let frame = self.guest.frame(opcode as u32, nodeid, parts);
        memory.write_slice(&frame, GuestAddress(REQUEST)).unwrap();
        let body = frame.len() as u32 - 40;
        let chain = [
            (REQUEST, 40, NEXT, 1),
            (REQUEST + 40, body, NEXT, 2),
            (REPLY, 16, WRITE | NEXT, 3),
            (REPLY + 0x1000, room, WRITE, 0),
        ];
        for (index, descriptor) in (0..).zip(chain) {
            self.queue.describe(&memory, index, descriptor);
        }
        self.queue.set_used_event(&memory, self.sent);
        self.queue.offer(&memory, 0);
        self.sent += 1;
    }

    fn ring(&self) {
        self.driver.write::<2>(self.doorbell, 1);
    }

    /// What one such request costs once it is known how: system calls and allocations.
    fn cost(&mut self, opcode: Opcode, nodeid: u64, parts: &[&[u8]], room: u32) -> (Vec<i64>, u64) {
        let mut calls = None;
        let mut asked = 0;
        for round in 0..3 {
            let before = self.device.statistics().inline;
            self.offer(opcode, nodeid, parts, room);
            match round {
                0 => self.ring(),
                1 => calls = system_calls(|| self.ring()),
                _ => asked = allocations(|| self.ring()),
            }
            let (_, used) = self.queue.take_used(&self.driver.memory()).expect("served inline");
            let error: i32 = self.driver.memory().read_obj(GuestAddress(REPLY + 4)).unwrap();
            assert_eq!((error, used >= 16), (0, true), "{opcode:?}");
            assert_eq!(self.device.statistics().inline, before + 1);
            assert_eq!(self.driver.controller.triggers()[2], usize::from(self.sent));
        }
        (calls.unwrap_or_default(), asked)
    }
}

/// Whether the host can count system calls.
fn counts() -> bool {
    system_calls(|| ()).is_some()
}

#[test]
fn a_read_of_a_page_is_one_system_call_and_asks_for_no_memory() {
    let mut machine = Machine::new(|_| {});
    std::fs::write(machine.guest.path().join("file"), [7; 8192]).unwrap();
    let node = machine.guest.node("file");
    let fh = machine.guest.fh(node, libc::O_RDONLY);
    let body = ReadIn { fh, offset: 4096, size: 4096, ..ReadIn::default() };
    let (calls, asked) = machine.cost(Opcode::Read, node, &[body.as_slice()], 4096);
    assert_eq!(asked, 0);
    if counts() {
        assert_eq!(calls, [libc::SYS_preadv2, INTERRUPT]);
    }
    let mut data = [0; 4096];
    machine.driver.memory().read_slice(&mut data, GuestAddress(REPLY + 0x1000)).unwrap();
    assert_eq!(data, [7; 4096]);
}

#[test]
fn a_write_of_a_page_is_one_system_call_and_asks_for_no_memory() {
    let mut machine = Machine::new(|options| options.xattr = crate::share::XattrPolicy::On);
    std::fs::write(machine.guest.path().join("file"), [7; 8192]).unwrap();
    let node = machine.guest.node("file");
    let fh = machine.guest.fh(node, libc::O_RDWR);
    let body = WriteIn { fh, offset: 0, size: 1024, ..WriteIn::default() };
    let parts = [body.as_slice(), &[9; 1024]];
    let (calls, asked) = machine.cost(Opcode::Write, node, &parts, 8);
    assert_eq!(asked, 0);
    if counts() {
        assert_eq!(calls, [libc::SYS_pwritev2, INTERRUPT]);
    }
}

#[test]
fn attributes_and_names_that_are_known_ask_for_no_memory() {
    let mut machine = Machine::new(|_| {});
    std::fs::write(machine.guest.path().join("file"), "x").unwrap();
    let node = machine.guest.node("file");
    let fh = machine.guest.fh(node, libc::O_RDONLY);
    let body = GetattrIn { flags: GETATTR_FH, fh, ..GetattrIn::default() };
    let (calls, asked) = machine.cost(Opcode::Getattr, node, &[body.as_slice()], 104);
    assert_eq!(asked, 0);
    if counts() {
        assert_eq!(calls, [libc::SYS_statx, INTERRUPT]);
    }
    let (mut calls, asked) = machine.cost(Opcode::Lookup, ROOT_ID, &[b"file\0"], 128);
    assert_eq!(asked, 0);
    // Where the standard library checks itself, it looks whether what it closes is open.
    calls.retain(|call| !cfg!(debug_assertions) || *call != libc::SYS_fcntl);
    if counts() {
        // Find it, ask what it is, and which; let go of it.
        let mut expected = vec![libc::SYS_openat2, libc::SYS_statx];
        // Not where files are told apart without handles.
        if calls.contains(&libc::SYS_name_to_handle_at) {
            expected.push(libc::SYS_name_to_handle_at);
        }
        expected.extend([libc::SYS_close, INTERRUPT]);
        assert_eq!(calls, expected);
    }
}

#[test]
fn more_of_a_file_that_is_mapped_is_one_system_call_and_so_is_taking_it_away() {
    const RANGE: u64 = 2 << 20;
    let mut machine = Machine::new(|options| options.dax = crate::share::DaxPolicy::Always);
    let file = std::fs::File::create(machine.guest.path().join("file")).unwrap();
    file.set_len(3 * RANGE).unwrap();
    let node = machine.guest.node("file");
    for flags in [SETUPMAPPING_READ, SETUPMAPPING_READ | SETUPMAPPING_WRITE] {
        let setup = |range: u64| SetupmappingIn {
            fh: u64::MAX,
            foffset: range * RANGE,
            len: RANGE,
            flags,
            moffset: range * RANGE,
        };
        machine.cost(Opcode::Setupmapping, node, &[setup(0).as_slice()], 0);
        let (calls, _) = machine.cost(Opcode::Setupmapping, node, &[setup(1).as_slice()], 0);
        if counts() {
            assert_eq!(calls, [libc::SYS_mmap, INTERRUPT]);
        }
    }
    // One range, at 0.
    let remove = [1u32.to_ne_bytes().as_slice(), &[0; 8], &RANGE.to_ne_bytes()].concat();
    let (calls, _) = machine.cost(Opcode::Removemapping, node, &[&remove], 0);
    if counts() {
        assert_eq!(calls, [libc::SYS_mmap, INTERRUPT]);
    }
}
