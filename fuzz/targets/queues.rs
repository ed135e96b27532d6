//! Descriptor tables, rings and memory as a driver would never leave them, for every device.
#![no_main]

use devices::testing::{Kind, Machine, init, packet};
use devices::virtio::testing::{Driver, DriverQueue, RAM, WINDOW, WRITE, write_descriptor};
use fuzz::frames::Known;
use fuzz::input::{ARENA, Input};
use fuzz::place::Place;
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const LONGEST: usize = 96;

/// Descriptors of each queue.
const SIZE: u16 = 8;

/// An address: mostly in the arena.
fn address(input: &mut Input<'_>) -> u64 {
    match input.byte() % 16 {
        0 => RAM - u64::from(input.byte()),
        1 => WINDOW + u64::from(input.short()),
        2 => input.number(),
        3 => 0x10_0000 + u64::from(input.short()),
        _ => ARENA + 16 * u64::from(input.short()),
    }
}

fn descriptor(input: &mut Input<'_>) -> (u64, u32, u16, u16) {
    let address = address(input);
    let len = match input.byte() {
        long @ 240.. if long % 2 == 0 => input.number() as u32,
        240.. => 4096,
        short => short.into(),
    };
    // NEXT, WRITE and INDIRECT, and sometimes what is none of them.
    let flags = match input.byte() {
        flags @ ..=248 => u16::from(flags & 7),
        _ => input.short(),
    };
    let next = u16::from(input.byte());
    (address, len, flags, if next < 240 { next % SIZE } else { next << 8 })
}

/// Writes to memory wherever there is some; elsewhere nothing happens.
fn put(driver: &Driver, bytes: &[u8], at: u64) {
    let _ = driver.memory().write_slice(bytes, GuestAddress(at));
}

fn start(machine: &Machine, input: &mut Input<'_>) -> Vec<DriverQueue> {
    // Indirect tables, event indices, both or none.
    let features = [3 << 28, 0, 1 << 28, 1 << 29][usize::from(input.byte() % 4)];
    let all: Vec<_> = (0..machine.queues()).map(|index| (index, SIZE)).collect();
    machine.driver.start(features | machine.features(), &all)
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let place = Place::new();
    let machine = match input.byte() % 8 {
        0..=2 => Machine::fs(place.serve(&mut input)),
        3 | 4 => Machine::console(),
        5 | 6 => Machine::vsock(&place.sockets()),
        _ => Machine::rng(),
    };
    let driver = &machine.driver;
    let mut queues = start(&machine, &mut input);
    let mut known = Known::default();
    if machine.kind == Kind::Fs {
        put(driver, &init(u64::MAX), ARENA);
        let memory = driver.memory();
        queues[1].describe(&memory, 0, (ARENA, 104, 1, 1));
        queues[1].describe(&memory, 1, (ARENA + 0x1000, 256, WRITE, 0));
        queues[1].offer(&memory, 0);
        driver.notify(1);
    }
    for _ in 0..LONGEST {
        if input.is_empty() {
            break;
        }
        let index = usize::from(input.byte()) % queues.len();
        let queue = &mut queues[index];
        let memory = driver.memory();
        match input.byte() % 16 {
            0..=3 => {
                let at = u16::from(input.byte()) % SIZE;
                queue.describe(&memory, at, descriptor(&mut input));
            }
            4 => {
                let at = ARENA + 16 * u64::from(input.short());
                let entry = descriptor(&mut input);
                write_descriptor(&memory, at, entry);
            }
            5 => put(driver, input.bytes(255), ARENA + 16 * u64::from(input.byte())),
            6 | 7 => {
                // What the device understands.
                let bytes = match machine.kind {
                    Kind::Fs => known.request(&mut input).1,
                    Kind::Vsock => {
                        let ports = (input.byte().into(), input.byte().into());
                        packet(u16::from(input.byte() % 9), ports, input.bytes(64))
                    }
                    Kind::Console => {
                        let id = u32::from(input.byte() % 4);
                        let event = u16::from(input.byte() % 9);
                        let value = u16::from(input.byte() % 2);
                        let words = [
                            id.to_le_bytes(),
                            (u32::from(value) << 16 | u32::from(event)).to_le_bytes(),
                        ];
                        words.concat()
                    }
                    Kind::Rng => input.bytes(255).to_vec(),
                };
                put(driver, &bytes, ARENA + 16 * u64::from(input.byte()));
            }
            8 | 9 => {
                let head = u16::from(input.byte());
                queue.offer(&memory, if head < 250 { head % SIZE } else { head << 8 });
            }
            10 => queue.set_available(&memory, input.short()),
            11 => queue.set_used_event(&memory, input.short()),
            12 => put(driver, input.bytes(255), queue.descriptors() + u64::from(input.short())),
            13 => {
                drop(memory);
                machine.settle(&queues);
                queues = start(&machine, &mut input);
            }
            _ => driver.notify(index as u16),
        }
    }
    for index in 0..machine.queues() {
        driver.notify(index);
    }
    machine.settle(&queues);
    machine.still_works();
    driver.reset();
    place.check_outside();
});
