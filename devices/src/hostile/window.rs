//! Buffers in the window whose pages are there: they work like RAM, on every device.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::testing::{Kind, Machine, init, packet};
use crate::virtio::testing::*;

const SIZE: u16 = 8;

/// A file of two pages that is mapped where the guest has its window. What the device reads from and writes to there
/// is the file's.
struct Pages(std::fs::File);

impl Pages {
    fn map(machine: &Machine) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        machine.driver.map_window(file.as_fd(), 8192);
        Self(file)
    }

    fn put(&self, bytes: &[u8], at: u64) {
        std::os::unix::fs::FileExt::write_all_at(&self.0, bytes, at).unwrap();
    }

    fn get(&self, len: usize, at: u64) -> Vec<u8> {
        let mut bytes = vec![0; len];
        std::os::unix::fs::FileExt::read_exact_at(&self.0, &mut bytes, at).unwrap();
        bytes
    }
}

/// Has one request served that is in the first page, with room for its reply across the end of it, and says what
/// the reply is.
fn serve(machine: &Machine, index: u16, request: &[u8], room: u32) -> Vec<u8> {
    let mut queue = machine.driver.start(machine.features(), &[(index, SIZE)]).remove(0);
    let pages = Pages::map(machine);
    pages.put(request, 100);
    let at = 4096 - u64::from(room) / 2;
    let memory = machine.driver.memory();
    let next = if room > 0 { NEXT } else { 0 };
    queue.describe(&memory, 0, (WINDOW + 100, request.len() as u32, next, 1));
    queue.describe(&memory, 1, (WINDOW + at, room, WRITE, 0));
    queue.offer(&memory, u16::from(request.is_empty()));
    machine.driver.notify(index);
    let since = Instant::now();
    let used = loop {
        if let Some((_, used)) = queue.take_used(&memory) {
            break used;
        }
        assert!(since.elapsed() < Duration::from_secs(10), "a request in the window is not served");
        std::thread::yield_now();
    };
    assert_eq!(machine.driver.status(), 15);
    pages.get(used as usize, at)
}

#[test]
fn a_file_system_is_asked_and_answers_in_a_window() {
    let (_directory, machine) = super::file_system();
    let reply = serve(&machine, 1, &init(u64::MAX), 256);
    assert_eq!(reply[4..8], [0; 4], "INIT succeeds");
    assert_eq!(reply.len(), 16 + 64);
    machine.still_works();
}

#[test]
fn a_console_writes_out_of_a_window() {
    let machine = Machine::console();
    assert_eq!(machine.kind, Kind::Console);
    serve(&machine, 1, b"output out of a file", 0);
    machine.still_works();
}

/// A console whose first port is ready and open: what was typed before comes into its first buffer.
fn open_console(machine: &Machine) -> Vec<DriverQueue> {
    let mut queues = machine.driver.start(2, &[0, 1, 2, 3].map(|index| (index, SIZE)));
    let memory = machine.driver.memory();
    // VIRTIO_CONSOLE_PORT_READY and VIRTIO_CONSOLE_PORT_OPEN of port 0.
    for (head, event) in [(0, 3u8), (1, 6)] {
        let at = 0x21_0000 + 8 * u64::from(head);
        memory.write_slice(&[0, 0, 0, 0, event, 0, 1, 0], GuestAddress(at)).unwrap();
        queues[3].describe(&memory, head, (at, 8, 0, 0));
        queues[3].offer(&memory, head);
    }
    machine.driver.notify(3);
    queues
}

/// Waits until the device has given back so many.
fn wait(machine: &Machine, queue: &DriverQueue, count: u16) {
    let since = Instant::now();
    while queue.used_index(&machine.driver.memory()) != count {
        assert!(since.elapsed() < Duration::from_secs(10), "nothing comes");
        std::thread::yield_now();
    }
}

#[test]
fn a_console_reads_into_a_window() {
    let machine = Machine::console();
    let mut queues = open_console(&machine);
    let pages = Pages::map(&machine);
    queues[0].describe(&machine.driver.memory(), 0, (WINDOW + 4094, 64, WRITE, 0));
    queues[0].offer(&machine.driver.memory(), 0);
    machine.driver.notify(0);
    wait(&machine, &queues[0], 1);
    assert_eq!(pages.get(5, 4094), b"typed");
    machine.still_works();
}

#[test]
fn random_bytes_go_into_a_window() {
    let machine = Machine::rng();
    let bytes = serve(&machine, 0, &[], 64);
    assert!(bytes.len() == 64 && bytes != [0; 64]);
    machine.still_works();
}

#[test]
fn packets_are_sent_out_of_a_window_and_received_into_it() {
    let directory = tempfile::tempdir().unwrap();
    let machine = Machine::vsock(directory.path());
    let mut queues = machine.driver.start(1, &[(0, SIZE), (1, SIZE)]);
    let pages = Pages::map(&machine);
    let request = packet(1, (2, 3), &[]);
    pages.put(&request, 4090);
    let memory = machine.driver.memory();
    queues[0].describe(&memory, 0, (WINDOW + 1000, 44, WRITE, 0));
    queues[0].offer(&memory, 0);
    queues[1].describe(&memory, 0, (WINDOW + 4090, request.len() as u32, 0, 0));
    queues[1].offer(&memory, 0);
    machine.driver.notify(1);
    wait(&machine, &queues[0], 1);
    assert_eq!(pages.get(2, 1030), [3, 0], "VIRTIO_VSOCK_OP_RST: nobody listens");
    machine.still_works();
}

#[test]
fn a_console_takes_pages_that_are_gone_for_no_output_and_no_buffer() {
    let machine = Machine::console();
    let mut queues = open_console(&machine);
    let memory = machine.driver.memory();
    for (index, flags) in [(0, WRITE), (1, 0)] {
        let queue = &mut queues[index];
        queue.describe(&memory, 0, (WINDOW + 10, 64, flags, 0));
        queue.offer(&memory, 0);
        machine.driver.notify(index as u16);
        wait(&machine, queue, 1);
        assert_eq!(queue.take_used(&memory), Some((0, 0)));
    }
    assert_eq!(machine.driver.status(), 15);
    // The input was not lost with it.
    queues[0].describe(&memory, 1, (0x20_0000, 64, WRITE, 0));
    queues[0].offer(&memory, 1);
    machine.driver.notify(0);
    wait(&machine, &queues[0], 2);
    let mut bytes = [0; 5];
    memory.read_slice(&mut bytes, GuestAddress(0x20_0000)).unwrap();
    assert_eq!(&bytes, b"typed");
    machine.still_works();
}
