//! Packets of a guest and programs of the host, in any order.
#![no_main]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};

use devices::testing::{Machine, packet};
use devices::virtio::testing::WRITE;
use fuzz::input::{ARENA, Input};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};

const LONGEST: usize = 96;
const SIZE: u16 = 16;
const RX: u16 = 0;
const TX: u16 = 1;

/// Where packets are sent from, and where buffers for those to receive are.
const SENT: u64 = ARENA;
const RECEIVED: u64 = ARENA + 0x2_0000;

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let machine = Machine::vsock(directory.path());
    let driver = &machine.driver;
    let start = |features: u8| {
        let features = u64::from(features & 3) << 28 | 1;
        driver.start(features, &[(RX, SIZE), (TX, SIZE), (2, 8)])
    };
    let mut queues = start(input.byte());
    // Heads of buffers that the device does not have, and whether it has the packet's.
    let mut free: Vec<u16> = (0..SIZE).collect();
    let mut sending = false;
    let mut listeners: Vec<UnixListener> = Vec::new();
    let mut programs: Vec<UnixStream> = Vec::new();
    // Of the host and of the guest.
    let mut ports: Vec<(u32, u32)> = vec![(1, 2)];
    for _ in 0..LONGEST {
        if input.is_empty() {
            break;
        }
        let memory = driver.memory();
        let stream = usize::from(input.byte());
        match input.byte() % 16 {
            0..=5 if !sending || input.byte() == 0 => {
                let op = input.byte() % 12;
                let pair = ports[stream % ports.len()];
                let mut bytes =
                    packet(u16::from(op % 9), pair, &vec![0x55; input.short() as usize]);
                if op > 8 {
                    // Any field at all.
                    let at = 4 * usize::from(input.byte() % 11);
                    bytes[at..at + 4].copy_from_slice(&(input.number() as u32).to_le_bytes());
                }
                if op == 4 {
                    bytes[32] = input.byte() & 3;
                }
                if op == 6 || input.rarely(8) {
                    // How much room there is, and was.
                    bytes[36..40].copy_from_slice(&(input.number() as u32).to_le_bytes());
                    bytes[40..44].copy_from_slice(&(input.number() as u32).to_le_bytes());
                }
                let len = bytes.len() as u32;
                memory.write_slice(&bytes, GuestAddress(SENT)).unwrap();
                let queue = &mut queues[usize::from(TX)];
                queue.describe(&memory, 0, (SENT, len - input.pick(&[0, 0, 0, 1]), 0, 0));
                queue.offer(&memory, 0);
                sending = true;
                driver.notify(TX);
            }
            6..=8 => {
                let queue = &mut queues[usize::from(RX)];
                let len = input.pick(&[44, 60, 4096, 0x2000, 0, 43]);
                let count = free.len().min(1 + usize::from(input.byte() % 16));
                for head in free.drain(..count) {
                    let at = RECEIVED + 0x2000 * u64::from(head);
                    queue.describe(&memory, head, (at, len, WRITE, 0));
                    queue.offer(&memory, head);
                }
                driver.notify(RX);
            }
            9 => {
                let mut client = UnixStream::connect(&path).unwrap();
                client.set_nonblocking(true).unwrap();
                let request = format!("CONNECT {}\n", input.byte() % 8);
                let bytes = if input.rarely(8) { input.bytes(64) } else { request.as_bytes() };
                let _ = client.write_all(bytes);
                programs.push(client);
            }
            10 if !programs.is_empty() => {
                let data = vec![0xaa; usize::from(input.short())];
                let _ = (&programs[stream % programs.len()]).write(&data);
            }
            11 if !programs.is_empty() => {
                let mut data = vec![0; usize::from(input.short())];
                let _ = (&programs[stream % programs.len()]).read(&mut data);
            }
            12 if !programs.is_empty() => drop(programs.swap_remove(stream % programs.len())),
            13 => {
                let at = directory.path().join(format!("vsock_{}", input.byte() % 4));
                if let Ok(listener) = UnixListener::bind(at) {
                    listener.set_nonblocking(true).unwrap();
                    listeners.push(listener);
                }
            }
            14 => {
                for listener in &listeners {
                    while let Ok((program, _)) = listener.accept() {
                        program.set_nonblocking(true).unwrap();
                        programs.push(program);
                    }
                }
            }
            15 if input.rarely(4) => {
                drop(memory);
                queues = start(input.byte());
                free = (0..SIZE).collect();
                sending = false;
                continue;
            }
            _ => ports.push((u32::from(input.byte() % 4), u32::from(input.byte() % 4))),
        }
        // The device goes on by itself: what it did is there before the next step.
        machine.settle(&[]);
        while let Some((head, len)) = queues[usize::from(RX)].take_used(&memory) {
            assert!(len <= 0x2000);
            free.push(head as u16);
            let mut header = [0; 44];
            let at = RECEIVED + 0x2000 * u64::from(head % u32::from(SIZE));
            memory.read_slice(&mut header, GuestAddress(at)).unwrap();
            let word = |at: usize| u32::from_le_bytes(header[at..at + 4].try_into().unwrap());
            // The host asks for a stream: the guest knows the ports of it now.
            if len >= 44 && header[30] == 1 {
                ports.push((word(16), word(20)));
            }
        }
        while queues[usize::from(TX)].take_used(&memory).is_some() {
            sending = false;
        }
    }
    programs.clear();
    listeners.clear();
    for port in 0..4 {
        let _ = std::fs::remove_file(directory.path().join(format!("vsock_{port}")));
    }
    machine.still_works();
});
