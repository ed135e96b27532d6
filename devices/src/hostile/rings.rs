//! Rings and chains, the same mistakes for every device.

use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::file_system;
use crate::testing::{Kind, Machine, init, packet};
use crate::virtio::testing::*;
use crate::virtio::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

const SIZE: u16 = 8;
const BUFFER: u64 = 0x20_0000;
const ROOM: u64 = 0x21_0000;
const TABLE: u64 = 0x22_0000;

/// A device that is up, and the queue in which it takes requests.
struct Ring<'m> {
    machine: &'m Machine,
    index: u16,
    queue: DriverQueue,
    /// Length of a request that the device understands, at [`BUFFER`].
    request: u32,
}

impl Ring<'_> {
    /// Features of rings are `features`.
    fn start(machine: &Machine, features: u64) -> Ring<'_> {
        let index = if machine.kind == Kind::Rng { 0 } else { 1 };
        let features = features | machine.features();
        let queue = machine.driver.start(features, &[(index, SIZE)]).remove(0);
        let request = match machine.kind {
            Kind::Fs => init(u64::MAX),
            Kind::Console => b"output".to_vec(),
            // An answer to a stream that there is not, which is not answered.
            Kind::Vsock => packet(3, (5, 6), &[]),
            Kind::Rng => Vec::new(),
        };
        machine.driver.memory().write_slice(&request, GuestAddress(BUFFER)).unwrap();
        Ring { machine, index, queue, request: request.len() as u32 }
    }

    fn describe(&self, index: u16, descriptor: (u64, u32, u16, u16)) {
        self.queue.describe(&self.machine.driver.memory(), index, descriptor);
    }

    fn entry(&self, index: u64, descriptor: (u64, u32, u16, u16)) {
        write_descriptor(&self.machine.driver.memory(), TABLE + 16 * index, descriptor);
    }

    fn offer(&mut self, head: u16) {
        self.queue.offer(&self.machine.driver.memory(), head);
    }

    /// A good request in two descriptors from `at` on.
    fn good(&self, at: u16) {
        self.describe(at, (BUFFER, self.request, NEXT, at + 1));
        self.describe(at + 1, (ROOM, 256, WRITE, 0));
    }

    fn ring(&self) {
        self.machine.driver.notify(self.index);
    }

    /// The device gives so many requests back, and is well.
    #[track_caller]
    fn served(&mut self, count: usize) {
        for _ in 0..count {
            let since = Instant::now();
            while self.queue.take_used(&self.machine.driver.memory()).is_none() {
                assert!(since.elapsed() < Duration::from_secs(10), "a request is not given back");
                std::thread::yield_now();
            }
        }
        assert_eq!(self.machine.driver.status(), 15);
        // So is the next one, without a reset.
        self.good(4);
        self.offer(4);
        self.ring();
        let since = Instant::now();
        while self.queue.take_used(&self.machine.driver.memory()).is_none() {
            assert!(since.elapsed() < Duration::from_secs(10), "the next request is not served");
            std::thread::yield_now();
        }
    }

    /// The device says that it needs a reset, and gives nothing back.
    #[track_caller]
    fn broken(&mut self) {
        self.ring();
        self.machine.driver.wait_until_broken();
        assert_eq!(self.queue.take_used(&self.machine.driver.memory()), None);
    }
}

type Case = fn(&mut Ring<'_>);

/// Offers one descriptor, and the queue breaks.
fn breaks(ring: &mut Ring<'_>, descriptor: (u64, u32, u16, u16)) {
    ring.describe(0, descriptor);
    ring.offer(0);
    ring.broken();
}

/// The same for a table with this first entry, and this length.
fn table_breaks(ring: &mut Ring<'_>, entry: (u64, u32, u16, u16), len: u32) {
    ring.entry(0, entry);
    breaks(ring, (TABLE, len, INDIRECT, 0));
}

fn run(machine: &Machine, features: u64, case: Case) {
    case(&mut Ring::start(machine, features));
    machine.still_works();
}

/// Every case is a test for every device.
macro_rules! for_every_device {
    ($($name:ident, $features:expr => $case:expr;)*) => {
        mod fs {
            use super::*;
            $(#[test] fn $name() { let (_directory, machine) = file_system(); run(&machine, $features, $case); })*
        }
        mod console {
            use super::*;
            $(#[test] fn $name() { run(&Machine::console(), $features, $case); })*
        }
        mod rng {
            use super::*;
            $(#[test] fn $name() { run(&Machine::rng(), $features, $case); })*
        }
        mod vsock {
            use super::*;
            $(#[test] fn $name() {
                let directory = tempfile::tempdir().unwrap();
                run(&Machine::vsock(directory.path()), $features, $case);
            })*
        }
    };
}

const TABLES: u64 = VIRTIO_RING_F_INDIRECT_DESC;
const EVENTS: u64 = VIRTIO_RING_F_EVENT_IDX;

for_every_device! {
    an_available_index_one_too_far_breaks_the_queue, 0 => |ring| {
        ring.queue.set_available(&ring.machine.driver.memory(), SIZE + 1);
        ring.broken();
    };
    an_available_index_that_goes_back_breaks_the_queue, EVENTS => |ring| {
        ring.good(0);
        ring.offer(0);
        ring.ring();
        ring.served(1);
        ring.queue.set_available(&ring.machine.driver.memory(), 0);
        ring.broken();
    };
    a_head_behind_the_queue_breaks_it, 0 => |ring| {
        ring.offer(SIZE);
        ring.broken();
    };
    the_greatest_head_breaks_the_queue, 0 => |ring| {
        ring.offer(u16::MAX);
        ring.broken();
    };
    a_next_descriptor_behind_the_queue_breaks_it, 0 =>
        |ring| breaks(ring, (BUFFER, 4, NEXT, SIZE));
    a_descriptor_that_is_its_own_next_breaks_the_queue, 0 =>
        |ring| breaks(ring, (BUFFER, 4, NEXT, 0));
    a_loop_over_all_descriptors_breaks_the_queue, 0 => |ring| {
        (0..SIZE).for_each(|at| ring.describe(at, (BUFFER, 0, NEXT, (at + 1) % SIZE)));
        ring.offer(3);
        ring.broken();
    };
    a_readable_buffer_behind_a_writable_one_breaks_the_queue, 0 => |ring| {
        ring.describe(1, (BUFFER, 4, 0, 0));
        breaks(ring, (ROOM, 4, WRITE | NEXT, 1));
    };
    a_buffer_behind_ram_breaks_the_queue, 0 => |ring| breaks(ring, (RAM, 1, WRITE, 0));
    a_buffer_that_leaves_ram_breaks_the_queue, 0 => |ring| breaks(ring, (RAM - 4, 5, WRITE, 0));
    a_buffer_that_wraps_breaks_the_queue, 0 => |ring| breaks(ring, (u64::MAX - 3, 8, WRITE, 0));
    a_buffer_as_long_as_can_be_breaks_the_queue, 0 =>
        |ring| breaks(ring, (BUFFER, u32::MAX, WRITE, 0));
    a_buffer_at_the_registers_breaks_the_queue, 0 => |ring| breaks(ring, (MMIO32, 64, WRITE, 0));
    a_table_without_the_feature_breaks_the_queue, 0 =>
        |ring| table_breaks(ring, (BUFFER, 4, 0, 0), 16);
    a_table_that_has_a_next_breaks_the_queue, TABLES => |ring| {
        ring.entry(0, (BUFFER, 4, 0, 0));
        breaks(ring, (TABLE, 16, INDIRECT | NEXT, 1));
    };
    a_table_in_a_table_breaks_the_queue, TABLES =>
        |ring| table_breaks(ring, (TABLE, 16, INDIRECT, 0), 16);
    a_table_of_nothing_breaks_the_queue, TABLES => |ring| table_breaks(ring, (BUFFER, 4, 0, 0), 0);
    a_table_with_part_of_a_descriptor_breaks_the_queue, TABLES =>
        |ring| table_breaks(ring, (BUFFER, 4, 0, 0), 17);
    a_table_longer_than_the_queue_breaks_it, TABLES =>
        |ring| table_breaks(ring, (BUFFER, 4, 0, 0), 16 * (u32::from(SIZE) + 1));
    a_table_as_long_as_can_be_breaks_the_queue, TABLES =>
        |ring| table_breaks(ring, (BUFFER, 4, 0, 0), !15);
    a_table_whose_next_is_behind_it_breaks_the_queue, TABLES =>
        |ring| table_breaks(ring, (BUFFER, 4, NEXT, 1), 16);
    a_table_with_a_loop_breaks_the_queue, TABLES =>
        |ring| table_breaks(ring, (BUFFER, 0, NEXT, 0), 16);
    a_table_behind_ram_breaks_the_queue, TABLES =>
        |ring| breaks(ring, (RAM - 8, 16, INDIRECT, 0));
    a_table_in_the_window_breaks_the_queue, TABLES =>
        |ring| breaks(ring, (WINDOW, 16, INDIRECT, 0));
    an_empty_buffer_is_a_request_of_no_bytes, 0 => |ring| {
        ring.describe(0, (BUFFER, 0, 0, 0));
        ring.offer(0);
        ring.ring();
        ring.served(1);
    };
    an_empty_buffer_may_be_anywhere, 0 => |ring| {
        ring.describe(0, (u64::MAX, 0, WRITE, 0));
        ring.offer(0);
        ring.ring();
        ring.served(1);
    };
    as_many_empty_buffers_as_the_queue_has_are_a_chain, 0 => |ring| {
        let next = |at| if at + 1 < SIZE { NEXT } else { 0 };
        (0..SIZE).for_each(|at| ring.describe(at, (BUFFER, 0, next(at), at + 1)));
        ring.offer(0);
        ring.ring();
        ring.served(1);
    };
    flags_that_mean_nothing_are_ignored, 0 => |ring| {
        ring.describe(0, (BUFFER, ring.request, 0xfff8 | NEXT, 1));
        ring.describe(1, (ROOM, 256, 0xfff8 | WRITE, 7));
        ring.offer(0);
        ring.ring();
        ring.served(1);
    };
    a_table_that_says_it_is_writable_is_served, TABLES => |ring| {
        ring.entry(0, (BUFFER, ring.request, NEXT, 1));
        ring.entry(1, (ROOM, 256, WRITE, 0));
        ring.describe(0, (TABLE, 32, INDIRECT | WRITE, 0));
        ring.offer(0);
        ring.ring();
        ring.served(1);
    };
    a_table_at_the_end_of_a_chain_is_served, TABLES => |ring| {
        ring.entry(0, (ROOM, 256, WRITE, 0));
        ring.describe(0, (BUFFER, ring.request, NEXT, 1));
        ring.describe(1, (TABLE, 16, INDIRECT, 0));
        ring.offer(0);
        ring.ring();
        ring.served(1);
    };
    what_is_read_from_a_page_that_is_gone_is_no_request, 0 => |ring| {
        ring.describe(0, (WINDOW + 100, 5000, NEXT, 1));
        ring.describe(1, (ROOM, 256, WRITE, 0));
        ring.offer(0);
        ring.ring();
        ring.served(1);
    };
    what_is_written_to_a_page_that_is_gone_is_lost, 0 => |ring| {
        ring.describe(0, (BUFFER, ring.request, NEXT, 1));
        ring.describe(1, (WINDOW + 100, 5000, WRITE, 0));
        ring.offer(0);
        ring.ring();
        ring.served(1);
    };
    a_buffer_from_ram_into_nothing_breaks_the_queue, 0 =>
        |ring| breaks(ring, (WINDOW + WINDOW_SIZE as u64 - 4, 8, WRITE, 0));
    garbage_in_the_used_event_does_not_stop_requests, EVENTS => |ring| {
        for event in [0x7777, u16::MAX, 0x8000, 0, 1] {
            ring.queue.set_used_event(&ring.machine.driver.memory(), event);
            ring.good(0);
            ring.offer(0);
            ring.ring();
            ring.served(1);
        }
    };
    garbage_in_the_flags_of_the_available_ring_does_not_stop_requests, 0 => |ring| {
        for flags in [0xffffu16, 0xfffe, 0x5555] {
            let at = GuestAddress(ring.queue.driver());
            ring.machine.driver.memory().write_obj(flags, at).unwrap();
            ring.good(0);
            ring.offer(0);
            ring.ring();
            ring.served(1);
        }
    };
    what_the_driver_writes_to_the_used_ring_is_not_read, EVENTS => |ring| {
        // But for the index by which this driver finds what is new.
        let at = GuestAddress(ring.queue.device() + 4);
        ring.machine.driver.memory().write_slice(&[0xff; 8 * SIZE as usize], at).unwrap();
        ring.good(0);
        ring.offer(0);
        ring.ring();
        ring.served(1);
    };
    a_storm_of_doorbells_is_one, EVENTS => |ring| {
        ring.good(0);
        ring.offer(0);
        (0..2000).for_each(|_| ring.ring());
        ring.served(1);
    };
    a_used_ring_that_nobody_reads_costs_nothing, EVENTS => |ring| {
        // Each entry is written a hundred times over.
        for _ in 0..100 * SIZE {
            ring.good(0);
            let before = ring.queue.used_index(&ring.machine.driver.memory());
            ring.offer(0);
            ring.ring();
            let since = Instant::now();
            while ring.queue.used_index(&ring.machine.driver.memory()) == before {
                assert!(since.elapsed() < Duration::from_secs(10), "a request is not given back");
                std::thread::yield_now();
            }
        }
        ring.served(100 * usize::from(SIZE));
    };
}
