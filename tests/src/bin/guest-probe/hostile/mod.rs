//! A driver that means harm: takes a file system device from the guest's kernel and does by hand what no driver does.
//!
//! After each case the device has to work for a driver that starts it over, and so has another share of the guest.
//! In the end the kernel gets the device back.

mod device;
mod driver;

use std::path::Path;

use anyhow::{Result, ensure};

use device::map;
use driver::{
    AVAILABLE, DESCRIPTORS, Driver, INDIRECT, NEXT, QUEUE_ENABLE, QUEUE_SELECT, QUEUE_SIZE, REPLY,
    REQUEST, SIZE, STATUS, TABLE, WRITE, other_works,
};

/// Opcodes of `linux/fuse.h`.
const LOOKUP: u32 = 1;
const GETATTR: u32 = 3;
const MKNOD: u32 = 8;
const OPEN: u32 = 14;
const READ: u32 = 15;
const SETUPMAPPING: u32 = 48;
const REMOVEMAPPING: u32 = 49;

/// Bytes of the attacked device's window, as the test has it.
const WINDOW: u64 = 8 << 20;

/// Does everything to the device of a tag, and prints for each case `name=ok` or what went wrong.
pub fn attack(tag: &str) -> Result<()> {
    let mut driver = Driver::new(tag)?;
    driver.works()?;
    for (name, case) in CASES {
        let result = case(&mut driver).and_then(|()| driver.works());
        match result {
            Ok(()) => println!("{name}=ok"),
            Err(error) => println!("{name}={error:#}"),
        }
    }
    driver.reset()?;
    driver.function.bind()?;
    println!("cases={}", CASES.len());
    Ok(())
}

/// Touches a place of the window where nothing is mapped.
pub fn touch_window(tag: &str) -> Result<()> {
    let driver = Driver::new(tag)?;
    let window = driver.function.window()?;
    println!("touching");
    println!("byte={}", window.get::<1>(0));
    Ok(())
}

type Case = fn(&mut Driver) -> Result<()>;

/// One descriptor is offered, and breaks the queue.
fn breaks(driver: &mut Driver, descriptor: (u64, u32, u16, u16)) -> Result<()> {
    driver.start(1 << 28)?;
    driver.describe(DESCRIPTORS, descriptor);
    driver.offer(0);
    driver.ring();
    driver.wait_until_broken()
}

/// The same for a table that begins with this.
fn table_breaks(driver: &mut Driver, entry: (u64, u32, u16, u16), len: u32) -> Result<()> {
    driver.describe(TABLE, entry);
    let table = driver.memory.address(TABLE);
    breaks(driver, (table, len, INDIRECT, 0))
}

/// A device with such rings does not start.
fn refuses_rings(driver: &mut Driver, rings: (u64, u64, u64)) -> Result<()> {
    driver.negotiate(0)?;
    driver.enable(rings.0, rings.1, rings.2);
    ensure!(driver.registers.get::<2>(QUEUE_ENABLE) == 0, "the queue is enabled");
    driver.registers.put::<1>(STATUS, 15);
    driver.wait_until_broken()
}

/// Registers at an address where something else is, are nowhere, and the other share is where it was.
fn registers_at(driver: &mut Driver, address: u32) -> Result<()> {
    driver.begin()?;
    driver.place(0, address)?;
    let seen = driver.registers.get::<4>(STATUS & !3);
    ensure!(seen == 0xffff_ffff, "registers are still there: {seen:#x}");
    other_works()?;
    driver.put_back()?;
    ensure!(driver.status() == 15, "the status is {:#x}", driver.status());
    driver.lookup("file").map(drop)
}

/// A window at an address where it cannot be is nowhere; requests go on.
fn window_at(driver: &mut Driver, low: u32, high: u32) -> Result<()> {
    driver.begin()?;
    driver.place(4, low)?;
    driver.place(5, high)?;
    driver.lookup("file")?;
    other_works()?;
    driver.put_back()?;
    driver.lookup("file").map(drop)
}

fn buffer(driver: &Driver) -> u64 {
    driver.memory.address(REQUEST)
}

/// Maps the first 2 MiB of a file at the window's start.
fn map_file(driver: &mut Driver, name: &str) -> Result<()> {
    let node = driver.lookup(name)?;
    let words = [u64::MAX, 0, 2 << 20, 2, 0].map(u64::to_ne_bytes).concat();
    driver.refused(0, SETUPMAPPING, node, &words)
}

/// What a mapping request with these numbers is answered.
fn mapping_refused(
    driver: &mut Driver,
    foffset: u64,
    len: u64,
    flags: u64,
    moffset: u64,
) -> Result<()> {
    driver.begin()?;
    let node = driver.lookup("file")?;
    let words = [u64::MAX, foffset, len, flags, moffset].map(u64::to_ne_bytes).concat();
    driver.refused(libc::EINVAL, SETUPMAPPING, node, &words)
}

const CASES: [(&str, Case); 62] = [
    // Registers.
    ("status_out_of_order", |driver| {
        driver.reset()?;
        for status in [2, 4, 8, 12, 14] {
            driver.registers.put::<1>(STATUS, status);
            ensure!(driver.status() == 0, "{status}");
        }
        Ok(())
    }),
    ("status_taken_back", |driver| {
        driver.begin()?;
        for status in [1, 3, 7, 0x40, 0x10] {
            driver.registers.put::<1>(STATUS, status);
            ensure!(driver.status() == 15, "{status}");
        }
        driver.lookup("file").map(drop)
    }),
    ("features_that_were_not_offered", |driver| {
        driver.reset()?;
        driver.registers.put::<1>(STATUS, 3);
        for select in [0, 1, 2, 0xffff_ffff] {
            driver.registers.put::<4>(8, select);
            driver.registers.put::<4>(12, 0xffff_ffff);
        }
        driver.registers.put::<1>(STATUS, 11);
        ensure!(driver.status() == 3, "agreed");
        Ok(())
    }),
    ("a_queue_that_there_is_not", |driver| {
        driver.negotiate(0)?;
        for queue in [99, 0x8000, 0xffff] {
            driver.registers.put::<2>(QUEUE_SELECT, queue);
            driver.registers.put::<2>(QUEUE_SIZE, 8);
            driver.registers.put::<2>(QUEUE_ENABLE, 1);
            ensure!(driver.registers.get::<2>(QUEUE_SIZE) == 0);
            ensure!(driver.registers.get::<2>(QUEUE_ENABLE) == 0);
        }
        Ok(())
    }),
    ("a_size_that_cannot_be", |driver| {
        driver.negotiate(0)?;
        driver.registers.put::<2>(QUEUE_SELECT, 1);
        let before = driver.registers.get::<2>(QUEUE_SIZE);
        for size in [0, 3, 0x8000, 0xffff] {
            driver.registers.put::<2>(QUEUE_SIZE, size);
            ensure!(driver.registers.get::<2>(QUEUE_SIZE) == before, "{size}");
        }
        Ok(())
    }),
    ("rings_that_are_not_aligned", |driver| {
        let (descriptors, available, used) = driver.rings();
        refuses_rings(driver, (descriptors + 8, available, used))?;
        refuses_rings(driver, (descriptors, available + 1, used))?;
        refuses_rings(driver, (descriptors, available, used + 2))
    }),
    ("rings_behind_memory", |driver| {
        let (descriptors, available, used) = driver.rings();
        refuses_rings(driver, (1 << 45, available, used))?;
        refuses_rings(driver, (descriptors, u64::MAX - 1, used))?;
        refuses_rings(driver, (descriptors, available, 0))
    }),
    ("rings_in_the_window", |driver| {
        let (descriptors, available, _) = driver.rings();
        let window = driver.bar(4);
        refuses_rings(driver, (descriptors, available, window))?;
        refuses_rings(driver, (window, window + 0x1000, window + 0x2000))
    }),
    ("rings_in_the_registers", |driver| {
        let (_, available, used) = driver.rings();
        let registers = driver.bar(0);
        refuses_rings(driver, (registers, available, used))?;
        refuses_rings(driver, (0xfee0_0000, available, used))
    }),
    ("rings_on_each_other", |driver| {
        let (descriptors, available, _) = driver.rings();
        refuses_rings(driver, (descriptors, available, descriptors))?;
        refuses_rings(driver, (descriptors, descriptors + 16, available))
    }),
    ("registers_of_a_queue_in_use", |driver| {
        driver.begin()?;
        driver.registers.put::<2>(QUEUE_SELECT, 1);
        for register in [QUEUE_SIZE, QUEUE_ENABLE] {
            let before = driver.registers.get::<2>(register);
            driver.registers.put::<2>(register, 0);
            ensure!(driver.registers.get::<2>(register) == before);
        }
        for register in [32, 40, 48] {
            driver.registers.put::<4>(register, 0);
            driver.registers.put::<4>(register + 4, 0xffff_ffff);
        }
        driver.lookup("file").map(drop)
    }),
    ("doorbells_of_nothing", |driver| {
        driver.begin()?;
        driver.ring_at::<2>(4, 0xffff);
        driver.ring_at::<4>(4, 1);
        driver.ring_at::<1>(4, 1);
        driver.ring_at::<2>(0xf00, 0x3c0);
        ensure!(driver.status() == 15);
        driver.lookup("file").map(drop)
    }),
    ("doorbells_before_the_start", |driver| {
        driver.negotiate(0)?;
        driver.ring();
        ensure!(driver.status() == 11);
        Ok(())
    }),
    ("a_storm_of_doorbells", |driver| {
        driver.begin()?;
        (0..2000).for_each(|_| driver.ring());
        driver.lookup("file").map(drop)
    }),
    ("a_storm_of_resets", |driver| {
        for _ in 0..50 {
            driver.begin()?;
            driver.offer(5);
            driver.ring();
            driver.registers.put::<1>(STATUS, 0);
        }
        driver.reset()
    }),
    ("registers_on_ram", |driver| registers_at(driver, 0x10_0000)),
    ("registers_on_the_first_page", |driver| registers_at(driver, 0)),
    ("registers_on_the_interrupt_controllers", |driver| {
        registers_at(driver, 0xfec0_0000)?;
        registers_at(driver, 0xfee0_0000)
    }),
    ("registers_on_configuration_space", |driver| registers_at(driver, 0xe000_0000)),
    ("registers_at_the_end", |driver| registers_at(driver, 0xffff_0000)),
    ("registers_on_anothers", |driver| {
        // The other share's among them: it still answers meanwhile.
        let others = driver.function.registers_of_others()?;
        ensure!(!others.is_empty(), "there are no others");
        others.into_iter().try_for_each(|other| registers_at(driver, other))
    }),
    ("a_window_on_ram", |driver| {
        // On the very rings: requests get through as long as RAM stays RAM.
        let here = driver.memory.address(DESCRIPTORS);
        window_at(driver, here as u32, (here >> 32) as u32)?;
        driver.place(4, here as u32)?;
        driver.place(5, (here >> 32) as u32)?;
        let (low, high) = (driver.function.read(0x20)?, driver.function.read(0x24)?);
        let at = u64::from(high) << 32 | u64::from(low & !15);
        ensure!((at..at + WINDOW).contains(&here), "the window is at {at:#x}, the rings {here:#x}");
        driver.put_back()
    }),
    ("a_window_on_address_0", |driver| window_at(driver, 0, 0)),
    ("a_window_on_the_registers", |driver| {
        let registers = driver.bar(0) as u32;
        window_at(driver, registers, 0)
    }),
    ("a_window_at_the_end_of_addresses", |driver| window_at(driver, 0xffff_ffff, 0xffff_ffff)),
    ("a_window_on_the_interrupt_controllers", |driver| window_at(driver, 0xfe00_0000, 0)),
    ("a_window_that_moves_with_what_is_mapped", |driver| {
        driver.begin()?;
        map_file(driver, "request")?;
        let (low, high) = (driver.bar(4) as u32, (driver.bar(4) >> 32) as u32);
        let window = driver.function.window()?;
        let frame = window.read(0, 45);
        ensure!(frame.ends_with(b"file\0"), "{frame:?} at first");
        let moved = high + 8;
        driver.function.put(4, &[4, 0])?;
        driver.place(5, moved)?;
        driver.function.put(4, &[6, 0])?;
        let at = u64::from(moved) << 32 | u64::from(low & !15);
        let (error, _) = driver.call(LOOKUP, 1, b"file\0")?;
        ensure!(error == 0);
        // The request that is in the file, and no other, is what the device finds there.
        let reply = driver.memory.address(REPLY);
        driver.describe(DESCRIPTORS, (at, frame.len() as u32, NEXT, 1));
        driver.describe(DESCRIPTORS + 16, (reply, 4096, WRITE, 0));
        driver.offer(0);
        driver.ring();
        let used = driver.wait_used()?;
        let head = driver.memory.bytes.read(REPLY, 16);
        ensure!(used == 144 && head[4..8] == [0; 4], "{used} bytes, {head:?}");
        ensure!(head[8..] == frame[8..16], "the reply {head:?} is to another request");
        // And so does a processor.
        let text = map(Path::new("/dev/mem"), at, 4096)?.read(0, frame.len());
        ensure!(text == frame, "{text:?} at its new place");
        let text = window.read(0, 6);
        ensure!(text == [0xff; 6], "{text:?} at its old place");
        // Where it was is nothing any more.
        driver.start(0)?;
        driver.describe(DESCRIPTORS, (driver.bar(4), 8, NEXT, 1));
        driver.describe(DESCRIPTORS + 16, (reply, 4096, WRITE, 0));
        driver.offer(0);
        driver.ring();
        driver.wait_until_broken()
    }),
    ("the_sizes_of_bars", |driver| {
        driver.begin()?;
        driver.function.put(4, &[0, 0])?;
        for bar in 0..6 {
            driver.place(bar, 0xffff_ffff)?;
            driver.function.read(0x10 + 4 * bar)?;
        }
        driver.put_back()?;
        driver.lookup("file").map(drop)
    }),
    ("memory_turned_off_and_on", |driver| {
        driver.begin()?;
        for _ in 0..100 {
            driver.function.put(4, &[0, 0])?;
            ensure!(driver.registers.get::<4>(0) == 0xffff_ffff);
            driver.function.put(4, &[6, 0])?;
        }
        driver.lookup("file").map(drop)
    }),
    ("the_second_door_with_wrong_lengths", |driver| {
        driver.begin()?;
        let (door, _) = driver.function.structure(5)?;
        for (bar, offset, len) in [
            (0, 20, 0),
            (0, 20, 3),
            (0, 20, 8),
            (0, 21, 2),
            (4, 20, 1),
            (9, 20, 1),
            (0, u32::MAX, 1),
        ] {
            driver.function.put(door + 4, &[bar])?;
            driver.function.write(door + 8, offset)?;
            driver.function.write(door + 12, len)?;
            driver.function.write(door + 16, 0)?;
            ensure!(driver.status() == 15, "{bar} {offset} {len}");
        }
        driver.lookup("file").map(drop)
    }),
    ("masks_that_change_all_the_time", |driver| {
        driver.begin()?;
        let control = driver.function.msix()? + 2;
        for round in 0..100u8 {
            driver.function.put(control, &[0, 0x80 | (round % 2) << 6])?;
            driver.lookup("file")?;
        }
        driver.function.put(control, &[0, 0])
    }),
    ("vectors_that_there_are_not", |driver| {
        driver.negotiate(0)?;
        for vector in [100, 0x7fff, 0xfffe] {
            driver.registers.put::<2>(16, vector);
            ensure!(driver.registers.get::<2>(16) == 0xffff);
        }
        Ok(())
    }),
    // Rings.
    ("an_index_that_runs_ahead", |driver| {
        driver.start(0)?;
        driver.memory.bytes.put::<2>(AVAILABLE + 2, u64::from(SIZE) + 1);
        driver.ring();
        driver.wait_until_broken()
    }),
    ("a_head_behind_the_queue", |driver| {
        driver.start(0)?;
        driver.offer(SIZE);
        driver.ring();
        driver.wait_until_broken()
    }),
    ("a_next_behind_the_queue", |driver| breaks(driver, (buffer(driver), 4, NEXT, SIZE))),
    ("a_loop", |driver| breaks(driver, (buffer(driver), 4, NEXT, 0))),
    ("readable_behind_writable", |driver| {
        driver.start(0)?;
        let at = buffer(driver);
        driver.describe(DESCRIPTORS, (at, 4, WRITE | NEXT, 1));
        driver.describe(DESCRIPTORS + 16, (at, 4, 0, 0));
        driver.offer(0);
        driver.ring();
        driver.wait_until_broken()
    }),
    ("a_buffer_behind_memory", |driver| breaks(driver, (1 << 45, 64, 0, 0))),
    ("a_buffer_that_wraps", |driver| breaks(driver, (u64::MAX - 7, 64, 0, 0))),
    ("a_buffer_of_4_gib", |driver| breaks(driver, (buffer(driver), u32::MAX, 0, 0))),
    ("a_buffer_in_the_registers", |driver| breaks(driver, (driver.bar(0), 64, 0, 0))),
    ("a_buffer_in_the_local_apic", |driver| breaks(driver, (0xfee0_0000, 64, WRITE, 0))),
    ("a_buffer_in_an_empty_window", |driver| {
        driver.begin()?;
        let reply = driver.memory.address(REPLY);
        for (request, reply) in [(driver.bar(4), reply), (buffer(driver), driver.bar(4))] {
            driver.describe(DESCRIPTORS, (request, 56, NEXT, 1));
            driver.describe(DESCRIPTORS + 16, (reply, 256, WRITE, 0));
            driver.offer(0);
            driver.ring();
            // An error, or nothing where an error has no place.
            ensure!([0, 16].contains(&driver.wait_used()?));
        }
        ensure!(driver.status() == 15);
        Ok(())
    }),
    ("a_table_without_the_feature", |driver| {
        driver.start(0)?;
        driver.describe(DESCRIPTORS, (driver.memory.address(TABLE), 16, INDIRECT, 0));
        driver.offer(0);
        driver.ring();
        driver.wait_until_broken()
    }),
    ("a_table_of_nothing", |driver| table_breaks(driver, (0, 0, 0, 0), 0)),
    ("a_table_without_end", |driver| table_breaks(driver, (buffer(driver), 4, NEXT, 0), !15)),
    ("a_table_in_a_table", |driver| {
        let table = driver.memory.address(TABLE);
        table_breaks(driver, (table, 16, INDIRECT, 0), 16)
    }),
    ("a_table_with_a_loop", |driver| table_breaks(driver, (buffer(driver), 0, NEXT, 0), 16)),
    ("a_table_in_the_window", |driver| breaks(driver, (driver.bar(4), 16, INDIRECT, 0))),
    // Requests.
    ("operations_before_an_init", |driver| {
        driver.start(0)?;
        driver.refused(libc::EIO, GETATTR, 1, &[0; 16])
    }),
    ("operations_that_there_are_not", |driver| {
        driver.begin()?;
        for opcode in [0, 7, 100, u32::MAX] {
            driver.refused(libc::ENOSYS, opcode, 1, &[0; 16])?;
        }
        Ok(())
    }),
    ("names_that_lead_out", |driver| {
        driver.begin()?;
        for name in ["", ".", "..", "/", "/etc/passwd", "../secret", "file/.."] {
            driver.refused(libc::EINVAL, LOOKUP, 1, &[name.as_bytes(), b"\0"].concat())?;
        }
        Ok(())
    }),
    ("nodes_and_handles_that_were_not_given", |driver| {
        driver.begin()?;
        let node = driver.lookup("file")?;
        for made_up in [0, node + 1000, 1 << 44, u64::MAX] {
            driver.refused(libc::ENOENT, GETATTR, made_up, &[0; 16])?;
            let read = [made_up, 0, 10, 0, 0].map(u64::to_ne_bytes).concat();
            driver.refused(libc::EBADF, READ, node, &read)?;
        }
        Ok(())
    }),
    ("lengths_that_lie", |driver| {
        driver.begin()?;
        for len in [0u32, 39, 55, 57, u32::MAX] {
            let mut frame = driver.frame(GETATTR, 1, &[0; 16]);
            frame[..4].copy_from_slice(&len.to_ne_bytes());
            let reply = driver.send(&frame)?;
            ensure!(reply.get(4..8) == Some(&(-libc::EINVAL).to_ne_bytes()), "{len}: {reply:?}");
        }
        Ok(())
    }),
    ("a_second_init", |driver| {
        driver.begin()?;
        let node = driver.lookup("file")?;
        driver.init()?;
        driver.refused(libc::ESTALE, GETATTR, node, &[0; 16])
    }),
    ("a_disk_of_the_host_made_and_opened", |driver| {
        driver.begin()?;
        let body = [0o60666u32, 0x800, 0, 0].map(u32::to_ne_bytes).concat();
        driver.refused(libc::EPERM, MKNOD, 1, &[&body[..], b"disk\0"].concat())
    }),
    ("a_fifo_opened", |driver| {
        driver.begin()?;
        let node = driver.lookup("fifo")?;
        driver.refused(libc::EACCES, OPEN, node, &[0; 8])
    }),
    ("mappings_past_the_window", |driver| {
        mapping_refused(driver, 0, 2 << 20, 2, 1 << 40)?;
        mapping_refused(driver, 0, !0xfff, 2, 0x1000)
    }),
    ("mappings_of_no_pages", |driver| {
        mapping_refused(driver, 0, 0, 2, 0)?;
        mapping_refused(driver, 1, 4096, 2, 0)?;
        mapping_refused(driver, 0, 4095, 2, 0)
    }),
    ("mappings_for_nothing", |driver| {
        mapping_refused(driver, 0, 4096, 0, 0)?;
        mapping_refused(driver, 0, 4096, 4, 0)
    }),
    ("removals_of_more_than_came", |driver| {
        driver.begin()?;
        let body = [&u32::MAX.to_ne_bytes()[..], &[0; 16]].concat();
        driver.refused(libc::EINVAL, REMOVEMAPPING, 1, &body)
    }),
    ("a_request_that_changes_while_it_is_served", |driver| {
        driver.begin()?;
        let frame = driver.frame(LOOKUP, 1, b"file\0");
        let address = driver.memory.address(REQUEST);
        for round in 0..500u32 {
            driver.memory.bytes.write(REQUEST, &frame);
            let reply = driver.memory.address(REPLY);
            driver.describe(DESCRIPTORS, (address, frame.len() as u32, NEXT, 1));
            driver.describe(DESCRIPTORS + 16, (reply, 4096, WRITE, 0));
            driver.offer(0);
            driver.ring();
            // While a thread of the device may be at it, or just after.
            driver.memory.bytes.write(REQUEST, &round.wrapping_mul(0x9e37_79b9).to_ne_bytes());
            driver.memory.bytes.write(REQUEST + 40, b"/..\0\xff");
            let used = driver.wait_used()?;
            ensure!(used == 16 || used == 144, "a reply of {used} bytes");
        }
        Ok(())
    }),
];
