//! Accesses to configuration space and BARs, in any order, of a device with a window.
#![no_main]

use devices::testing::Machine;
use devices::virtio::testing::{Driver, MMIO32, MMIO64};
use fuzz::input::Input;
use fuzz::place::Place;
use libfuzzer_sys::fuzz_target;

const LONGEST: usize = 400;

/// The window's BAR is as long as this.
const WINDOW_BAR: u64 = 4 << 20;

/// Registers of configuration space in which something is decided: command, BARs, capabilities.
fn register(input: &mut Input<'_>, driver: &Driver) -> u64 {
    match input.byte() % 8 {
        0 => 4,
        1 => 0x10 + 4 * u64::from(input.byte() % 6),
        2 => driver.msix() + u64::from(input.byte() % 12),
        // The second way to the registers: its BAR, offset, length and data.
        3 => driver.find(5).unwrap().capability + [4, 8, 12, 16][usize::from(input.byte() % 4)],
        4 => u64::from(input.short() % 0x1100),
        _ => u64::from(input.byte()),
    }
}

fn offset(input: &mut Input<'_>) -> u64 {
    let area = input.pick(&[0, 0, 0, 0x1000, 0x2000, 0x3000, 0x4000, 0x8000, 0xffc0]);
    area + u64::from(input.byte() % 0x44)
}

/// What is written to an address: a number, one of the BARs' places, or a step of the status.
fn value(input: &mut Input<'_>) -> u64 {
    match input.byte() % 6 {
        0 => MMIO32 + u64::from(input.byte()) * 0x8000,
        1 => (MMIO64 + u64::from(input.byte()) * 0x20_0000) >> (32 * (input.byte() % 2)),
        2 => input.pick(&[1, 3, 11, 15, 0]),
        3 => u64::from(input.byte()) << 12,
        _ => input.number(),
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let place = Place::new();
    let machine = Machine::fs(place.serve(&mut input));
    let (driver, slot) = (&machine.driver, &machine.slot);
    for _ in 0..LONGEST {
        if input.is_empty() {
            break;
        }
        let mut bytes = [0; 8];
        let len = input.pick(&[4, 2, 1, 4, 8, 3]);
        match input.byte() % 16 {
            0 => drop(driver.read_config::<4>(register(&mut input, driver))),
            1 => drop(driver.read_config::<8>(register(&mut input, driver))),
            2 => driver.read_bar(offset(&mut input), &mut bytes[..len]),
            3..=6 => {
                let at = register(&mut input, driver);
                driver.write_config(at, &value(&mut input).to_le_bytes()[..len]);
            }
            // What a driver does needs the registers where it looks for them.
            7 => {
                in_order(driver);
                driver.negotiate(0);
            }
            8 => {
                in_order(driver);
                driver.start(u64::from(input.byte() & 3) << 28, &[(1, 8)]);
            }
            9 => driver.notify(input.byte().into()),
            _ => {
                let at = offset(&mut input);
                driver.write_bar(at, &value(&mut input).to_le_bytes()[..len]);
            }
        }
        if input.byte() == 0 {
            in_order(driver);
        }
        for place in slot.places().into_iter().flatten() {
            let window = MMIO64..=MMIO64 + (1 << 36) - WINDOW_BAR;
            let low = MMIO32..=MMIO32 + (1 << 20) - WINDOW_BAR.min(1 << 20);
            assert!(window.contains(&place) || low.contains(&place), "{place:#x}");
            assert!(place.is_multiple_of(WINDOW_BAR), "{place:#x}");
        }
    }
    in_order(driver);
    machine.still_works();
    driver.reset();
    place.check_outside();
});

/// What a driver that starts over does first: the registers are where it looks for them.
fn in_order(driver: &Driver) {
    driver.write_config(4, &[0, 0]);
    driver.write_config(0x10, &(MMIO32 as u32).to_le_bytes());
    driver.write_config(0x20, &(MMIO64 as u32).to_le_bytes());
    driver.write_config(0x24, &((MMIO64 >> 32) as u32).to_le_bytes());
    driver.write_config(4, &[6, 0]);
}
