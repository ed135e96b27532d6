use vm_memory::GuestAddressSpace;

use super::*;
use crate::memory::AtomicGuestMemory;
use crate::virtio::testing::*;

const DATA: u64 = 0x8000;
const TABLE: u64 = 0x2000;
const SIZE: u16 = 8;
const INDIRECT_DESC: u64 = VIRTIO_RING_F_INDIRECT_DESC;

fn rings(size: u16) -> Rings {
    let driver = DriverQueue::new(0, size);
    Rings {
        size,
        descriptors: driver.descriptors(),
        driver: driver.driver(),
        device: driver.device(),
    }
}

struct Fixture {
    memory: AtomicGuestMemory,
    driver: DriverQueue,
    queue: Queue,
}

fn fixture(features: u64) -> Fixture {
    let memory = memory();
    let queue = Queue::new(rings(SIZE), features, &memory.memory()).unwrap();
    Fixture { memory, driver: DriverQueue::new(0, SIZE), queue }
}

type Entry = (u64, u32, u16, u16);

/// What becomes of a chain of these descriptors, the first of which is the head, and an indirect table.
fn outcome(features: u64, direct: &[Entry], table: &[Entry]) -> Result<(usize, usize), QueueError> {
    let mut it = fixture(features);
    let memory = it.memory.memory();
    for (index, entry) in (0..).zip(direct) {
        it.driver.describe(&memory, index, *entry);
    }
    for (index, entry) in (0..).zip(table) {
        write_descriptor(&memory, TABLE + 16 * index, *entry);
    }
    it.driver.offer(&memory, 0);
    let chain = it.queue.pop(&memory)?.unwrap();
    Ok((chain.readable.len(), chain.writable.len()))
}

#[test]
fn a_chain_is_split_in_what_is_read_and_what_is_written() {
    let mut it = fixture(0);
    let memory = it.memory.memory();
    assert!(it.queue.pop(&memory).unwrap().is_none());
    it.driver.describe(&memory, 5, (DATA, 3, NEXT, 2));
    it.driver.describe(&memory, 2, (DATA + 0x100, 2, NEXT, 7));
    it.driver.describe(&memory, 7, (DATA + 0x200, 4, WRITE, 9));
    memory.write_slice(b"abc", GuestAddress(DATA)).unwrap();
    memory.write_slice(b"de", GuestAddress(DATA + 0x100)).unwrap();
    it.driver.offer(&memory, 5);
    let chain = it.queue.pop(&memory).unwrap().unwrap();
    let mut bytes = [0; 5];
    chain.readable.read_at(0, &mut bytes).unwrap();
    assert_eq!(&bytes, b"abcde");
    chain.writable.write_at(0, b"pong").unwrap();
    it.queue.complete(&memory, chain.head, 4).unwrap();
    assert_eq!(it.driver.take_used(&memory), Some((5, 4)));
    let mut bytes = [0; 4];
    memory.read_slice(&mut bytes, GuestAddress(DATA + 0x200)).unwrap();
    assert_eq!(&bytes, b"pong");
    assert!(it.queue.pop(&memory).unwrap().is_none());
}

#[test]
fn a_table_may_replace_a_chain_or_its_end() {
    let table = [(DATA, 4, NEXT, 2), (0, 0, 0, 0), (DATA, 6, WRITE, 0)];
    let whole = [(TABLE, 48, INDIRECT, 0)];
    assert_eq!(outcome(INDIRECT_DESC, &whole, &table), Ok((4, 6)));
    let end = [(DATA, 10, NEXT, 1), (TABLE, 48, INDIRECT, 0)];
    assert_eq!(outcome(INDIRECT_DESC, &end, &table), Ok((14, 6)));
    let flag = [(TABLE, 48, INDIRECT | WRITE, 0)];
    assert_eq!(outcome(INDIRECT_DESC, &flag, &table), Ok((4, 6)), "WRITE is ignored");
    let odd = [(TABLE + 8, 16, INDIRECT, 0)];
    assert!(outcome(INDIRECT_DESC, &odd, &[]).is_ok(), "a table needs no alignment");
}

#[test]
fn empty_buffers_and_full_chains_are_fine() {
    assert_eq!(outcome(0, &[(0, 0, 0, 0)], &[]), Ok((0, 0)));
    let mut full: Vec<Entry> = (0..SIZE).map(|at| (DATA, 1, NEXT, at + 1)).collect();
    full[7].2 = 0;
    assert_eq!(outcome(0, &full, &[]), Ok((8, 0)));
    assert_eq!(outcome(INDIRECT_DESC, &[(TABLE, 128, INDIRECT, 0)], &full), Ok((8, 0)));
}

#[test]
fn a_window_is_memory_too() {
    assert_eq!(outcome(0, &[(WINDOW, 4096, WRITE, 0)], &[]), Ok((0, 4096)));
    // But not for a table, which would be read while others wait.
    assert_eq!(
        outcome(INDIRECT_DESC, &[(WINDOW, 16, INDIRECT, 0)], &[]),
        Err(QueueError::IndirectTable)
    );
}

#[test]
fn every_broken_chain_has_its_error() {
    let not_memory = |address, len| BufferError::NotMemory { address, len };
    let cases: Vec<(Vec<Entry>, QueueError)> = vec![
        (vec![(DATA, 1, NEXT, 8)], QueueError::Next(8)),
        (vec![(DATA, 1, NEXT, 0xffff)], QueueError::Next(0xffff)),
        (vec![(DATA, 1, NEXT, 0)], QueueError::TooLong),
        (vec![(DATA, 0, NEXT, 1), (DATA, 0, NEXT, 0)], QueueError::TooLong),
        (vec![(DATA, 1, WRITE | NEXT, 1), (DATA, 1, 0, 0)], QueueError::Order),
        (vec![(DATA, 0, WRITE | NEXT, 1), (DATA, 1, 0, 0)], QueueError::Order),
        (vec![(RAM - 1, 2, 0, 0)], QueueError::Buffer(not_memory(RAM - 1, 2))),
        (vec![(u64::MAX, 2, WRITE, 0)], QueueError::Buffer(not_memory(u64::MAX, 2))),
        (vec![(0, u32::MAX, 0, 0)], QueueError::Buffer(not_memory(0, u32::MAX as usize))),
        (vec![(TABLE, 16, INDIRECT | NEXT, 0)], QueueError::IndirectNext),
        (vec![(TABLE, 0, INDIRECT, 0)], QueueError::IndirectLength(0)),
        (vec![(TABLE, 17, INDIRECT, 0)], QueueError::IndirectLength(17)),
        (vec![(TABLE, 144, INDIRECT, 0)], QueueError::IndirectLength(144)),
        (vec![(TABLE, 0x10_0000, INDIRECT, 0)], QueueError::IndirectLength(0x10_0000)),
        (vec![(RAM, 16, INDIRECT, 0)], QueueError::IndirectTable),
    ];
    for (chain, error) in cases {
        assert_eq!(outcome(INDIRECT_DESC, &chain, &[]), Err(error));
    }
}

#[test]
fn every_broken_table_has_its_error() {
    let inside = [(TABLE, 32, INDIRECT, 0)];
    let behind = [(DATA, 1, NEXT, 1), (TABLE, 128, INDIRECT, 0)];
    let full: Vec<Entry> =
        (0..8).map(|at| (DATA, 1, if at < 7 { NEXT } else { 0 }, at + 1)).collect();
    let nested = [(TABLE, 16, INDIRECT, 0)];
    for (direct, table, error) in [
        (&inside[..], &nested[..], QueueError::IndirectNested),
        (&inside, &[(DATA, 1, NEXT, 2)], QueueError::Next(2)),
        (&inside, &[(DATA, 1, NEXT, 0)], QueueError::TooLong),
        (&behind, &full, QueueError::TooLong),
    ] {
        assert_eq!(outcome(INDIRECT_DESC, direct, table), Err(error));
    }
    assert_eq!(outcome(0, &inside, &[]), Err(QueueError::IndirectNotNegotiated));
}

#[test]
fn more_than_four_gigabytes_are_too_many() {
    const MANY: u16 = 2048;
    // The window as a buffer, over and over: 2048 times 2 MiB are 4 GiB. One byte more is in RAM.
    for (first, expected) in [
        ((WINDOW, WINDOW_SIZE as u32), Ok(1 << 32)),
        ((0, WINDOW_SIZE as u32 + 1), Err(QueueError::TooManyBytes)),
    ] {
        let memory = memory();
        let memory = memory.memory();
        let mut queue = Queue::new(rings(MANY), 0, &memory).unwrap();
        let mut driver = DriverQueue::new(0, MANY);
        driver.describe(&memory, 0, (first.0, first.1, NEXT, 1));
        for index in 1..MANY {
            let flags = if index + 1 < MANY { NEXT } else { 0 };
            driver.describe(&memory, index, (WINDOW, WINDOW_SIZE as u32, flags, index + 1));
        }
        driver.offer(&memory, 0);
        let popped = queue.pop(&memory);
        assert_eq!(popped.map(|chain| chain.unwrap().readable.len()), expected);
    }
}

#[test]
fn a_head_outside_of_the_queue_or_in_flight_is_refused() {
    let mut it = fixture(0);
    let memory = it.memory.memory();
    it.driver.offer(&memory, SIZE);
    assert_eq!(it.queue.pop(&memory).err(), Some(QueueError::Head(SIZE)));
    let mut it = fixture(0);
    let memory = it.memory.memory();
    it.driver.offer(&memory, 3);
    it.queue.pop(&memory).unwrap().unwrap();
    it.driver.offer(&memory, 3);
    assert_eq!(it.queue.pop(&memory).err(), Some(QueueError::InFlight(3)));
    it.queue.complete(&memory, 3, 0).unwrap();
    let error = it.queue.complete(&memory, 3, 0);
    assert_eq!(error, Err(QueueError::NotInFlight(3)));
    let error = it.queue.complete(&memory, SIZE, 0);
    assert_eq!(error, Err(QueueError::NotInFlight(SIZE)));
    it.driver.offer(&memory, 3);
    assert!(it.queue.pop(&memory).unwrap().is_some());
}

#[test]
fn an_available_index_that_runs_ahead_is_refused() {
    for (index, error) in [(SIZE + 1, true), (0xffff, true), (SIZE, false)] {
        let mut it = fixture(0);
        let memory = it.memory.memory();
        it.driver.set_available(&memory, index);
        let popped = it.queue.pop(&memory).err();
        assert_eq!(popped, error.then_some(QueueError::AvailableIndex));
    }
}

#[test]
fn the_rings_wrap_around() {
    let mut it = fixture(VIRTIO_RING_F_EVENT_IDX);
    let memory = it.memory.memory();
    for round in 0..70_000u32 {
        let head = (round % u32::from(SIZE)) as u16;
        it.driver.offer(&memory, head);
        let chain = it.queue.pop(&memory).unwrap().unwrap();
        it.queue.complete(&memory, chain.head, round).unwrap();
        assert_eq!(it.driver.take_used(&memory), Some((head.into(), round)));
        it.driver.set_used_event(&memory, it.driver.used_index(&memory));
    }
}

#[test]
fn one_interrupt_is_wanted_for_a_batch() {
    let mut it = fixture(VIRTIO_RING_F_EVENT_IDX);
    let memory = it.memory.memory();
    for head in 0..4 {
        it.driver.offer(&memory, head);
    }
    // Used index 2 and everything before it is known to the driver: it waits for the third.
    it.driver.set_used_event(&memory, 2);
    let mut wanted = Vec::new();
    for _ in 0..4 {
        let chain = it.queue.pop(&memory).unwrap().unwrap();
        it.queue.complete(&memory, chain.head, 0).unwrap();
        wanted.push(it.queue.interrupt_wanted(&memory).unwrap());
    }
    assert_eq!(wanted, [false, false, true, false]);
    // Asked once for several, it is the same one.
    for head in 0..4 {
        it.driver.offer(&memory, head);
    }
    it.driver.set_used_event(&memory, 5);
    for _ in 0..4 {
        let chain = it.queue.pop(&memory).unwrap().unwrap();
        it.queue.complete(&memory, chain.head, 0).unwrap();
    }
    assert!(it.queue.interrupt_wanted(&memory).unwrap());
    assert!(!it.queue.interrupt_wanted(&memory).unwrap());
}

#[test]
fn without_the_feature_a_flag_turns_interrupts_off() {
    let mut it = fixture(0);
    let memory = it.memory.memory();
    assert!(it.queue.interrupt_wanted(&memory).unwrap());
    let flags = GuestAddress(it.driver.driver());
    memory.write_obj(1u16, flags).unwrap();
    assert!(!it.queue.interrupt_wanted(&memory).unwrap());
    memory.write_obj(0xfffeu16, flags).unwrap();
    assert!(it.queue.interrupt_wanted(&memory).unwrap());
}

#[test]
fn what_comes_before_notifications_are_on_is_not_missed() {
    for features in [0, VIRTIO_RING_F_EVENT_IDX] {
        let mut it = fixture(features);
        let memory = it.memory.memory();
        it.queue.disable_notification(&memory).unwrap();
        it.driver.offer(&memory, 0);
        assert!(it.queue.enable_notification(&memory).unwrap());
        it.queue.pop(&memory).unwrap().unwrap();
        assert!(!it.queue.enable_notification(&memory).unwrap());
        if features != 0 {
            assert_eq!(it.driver.avail_event(&memory), 1);
        }
    }
}

#[test]
fn the_next_request_can_be_asked_for_behind_others_that_wait() {
    for features in [0, VIRTIO_RING_F_EVENT_IDX] {
        let mut it = fixture(features);
        let memory = it.memory.memory();
        assert_eq!(it.queue.ask_for_next(&memory), Ok(false));
        for head in 0..3 {
            it.driver.offer(&memory, head);
        }
        assert_eq!(it.queue.ask_for_next(&memory), Ok(true));
        if features != 0 {
            assert_eq!(it.driver.avail_event(&memory), 3);
        }
        it.queue.pop(&memory).unwrap().unwrap();
        assert_eq!(it.queue.waiting(&memory), Ok(2), "none is lost by it");
        it.driver.set_available(&memory, 100);
        let broken = if features == 0 { Ok(true) } else { Err(QueueError::AvailableIndex) };
        assert_eq!(it.queue.ask_for_next(&memory), broken);
    }
}

#[test]
fn rings_are_checked_before_they_are_used() {
    let memory = memory();
    let memory = memory.memory();
    let good = rings(SIZE);
    assert_eq!(good.check(&memory), Ok(()));
    let with = |change: fn(&mut Rings)| {
        let mut bad = good;
        change(&mut bad);
        bad.check(&memory).unwrap_err()
    };
    for size in [0, 3, 0x8001, 0xffff] {
        assert_eq!(Rings { size, ..good }.check(&memory), Err(RingError::Size(size)));
    }
    assert_eq!(with(|r| r.descriptors += 8), RingError::Alignment(good.descriptors + 8));
    assert_eq!(with(|r| r.driver += 1), RingError::Alignment(good.driver + 1));
    assert_eq!(with(|r| r.device += 2), RingError::Alignment(good.device + 2));
    assert_eq!(with(|r| r.driver = r.descriptors + 126), RingError::Overlap);
    assert_eq!(with(|r| r.device = r.driver + 20), RingError::Overlap);
    let outside = RingError::NotRam { address: WINDOW, len: 128 };
    assert_eq!(with(|r| r.descriptors = WINDOW), outside);
    let wraps = RingError::NotRam { address: u64::MAX - 1, len: 22 };
    assert_eq!(with(|r| r.driver = u64::MAX - 1), wraps);
}

#[test]
fn random_rings_are_answered_with_a_chain_or_an_error() {
    let mut noise = Noise(1);
    let (mut chains, mut errors) = (0, 0);
    for _ in 0..20_000 {
        let mut it = fixture(INDIRECT_DESC);
        let memory = it.memory.memory();
        for at in 0..16u64 {
            let entry = (
                noise.pick(&[DATA, TABLE, TABLE, RAM - 8, WINDOW, u64::MAX, 0]),
                noise.pick(&[0, 1, 16, 32, 128, 4096, u32::MAX]),
                noise.below(8) as u16,
                noise.below(9) as u16,
            );
            if at < 8 {
                it.driver.describe(&memory, at as u16, entry);
            } else {
                write_descriptor(&memory, TABLE + 16 * (at - 8), entry);
            }
        }
        for _ in 0..4 {
            it.driver.offer(&memory, noise.below(9) as u16);
        }
        while let Some(popped) = it.queue.pop(&memory).transpose() {
            match popped {
                Ok(chain) => {
                    chains += 1;
                    it.queue.complete(&memory, chain.head, 0).unwrap();
                }
                Err(_) => {
                    errors += 1;
                    break;
                }
            }
        }
    }
    assert!(chains > 1000 && errors > 1000, "{chains} {errors}");
}

#[test]
fn a_request_that_is_put_back_comes_again() {
    let mut it = fixture(0);
    let memory = it.memory.memory();
    for head in [3, 1] {
        it.driver.describe(&memory, head, (DATA, 4, WRITE, 0));
        it.driver.offer(&memory, head);
    }
    let first = it.queue.pop(&memory).unwrap().unwrap().head;
    it.queue.put_back(first).unwrap();
    assert_eq!(it.queue.put_back(first), Err(QueueError::NotInFlight(first)));
    for head in [3, 1] {
        assert_eq!(it.queue.pop(&memory).unwrap().unwrap().head, head);
        it.queue.complete(&memory, head, 0).unwrap();
        assert_eq!(it.driver.take_used(&memory), Some((head.into(), 0)));
    }
    assert_eq!(it.queue.put_back(8), Err(QueueError::NotInFlight(8)));
}
