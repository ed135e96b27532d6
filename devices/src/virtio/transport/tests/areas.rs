//! Everything but the common configuration: doorbells, the device's own registers, interrupts, and the
//! second door.

use super::*;

#[test]
fn notifications_count_when_they_are_right_and_the_driver_is_ready() {
    let (notes, driver) = driver();
    driver.notify(0);
    driver.start(0, &[(0, 8), (1, 8)]);
    notes.calls();
    let at = driver.find(2).unwrap().offset;
    driver.write::<2>(at + 8, 2);
    driver.write::<2>(at + 4, 0);
    driver.write::<2>(at + 2, 0);
    driver.write::<4>(at, 0);
    driver.write::<1>(at, 0);
    driver.write::<8>(at, 0);
    assert_eq!(notes.calls(), []);
    driver.notify(1);
    driver.notify(0);
    assert_eq!(notes.calls(), [Call::Notify(1), Call::Notify(0)]);
    driver.set_status(0x8f);
    driver.notify(0);
    assert_eq!(notes.calls(), [], "the driver has given up");
}

#[test]
fn device_configuration_reads_zero_past_its_end() {
    let (_notes, driver) = driver();
    let at = driver.find(4).unwrap().offset;
    let mut bytes = [0xff; 8];
    driver.read_bar(at, &mut bytes);
    assert_eq!(&bytes, b"oriel\0\0\0");
    driver.write_bar(at, b"other");
    driver.read_bar(at + 3, &mut bytes[..2]);
    assert_eq!(&bytes[..2], b"el");
    driver.read_bar(at + 0xff8, &mut bytes);
    assert_eq!(bytes, [0; 8]);
}

#[test]
fn configuration_changes_are_announced_and_counted() {
    let (notes, driver) = driver();
    driver.start(0, &[(0, 8)]);
    let before = driver.read::<1>(21);
    notes.interrupts().config_changed();
    assert_eq!(driver.controller.triggers(), [1, 0, 0]);
    assert_ne!(driver.read::<1>(21), before);
    let isr = driver.find(3).unwrap().offset;
    assert_eq!(driver.read::<1>(isr), 2);
    assert_eq!(driver.read::<1>(isr), 0, "reading clears it");
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_corrupt_queue_is_announced_once() {
    let (notes, driver) = driver();
    driver.start(0, &[(0, 8)]);
    notes.interrupts().needs_reset();
    notes.interrupts().needs_reset();
    driver.wait_until_broken();
    assert_eq!(driver.status(), 0x4f);
    driver.set_status(driver.status() | 15);
    assert_eq!(driver.status(), 0x4f);
    driver.start(0, &[(0, 8)]);
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_device_that_cannot_start_needs_a_reset() {
    let (notes, driver) = driver();
    notes.refuse.store(true, Ordering::Relaxed);
    driver.negotiate(0);
    driver.enable_interrupts();
    driver.set_status(15);
    driver.wait_until_broken();
    driver.notify(0);
    assert_eq!(notes.calls(), []);
}

#[test]
fn queue_interrupts_go_to_their_vectors_or_wait_behind_a_mask() {
    let (notes, driver) = driver();
    driver.start(0, &[(0, 8), (1, 8)]);
    let interrupts = notes.interrupts();
    interrupts.queue(1);
    assert_eq!(driver.controller.triggers(), [0, 0, 1]);
    let at = driver.msix();
    let table = u64::from(driver.config_dword(at + 4) & !7);
    let pba = u64::from(driver.config_dword(at + 8) & !7);
    driver.write::<4>(table + 0x1c, 1);
    interrupts.queue(0);
    assert_eq!(driver.read::<8>(pba), 2);
    driver.write::<4>(table + 0x1c, 0);
    assert_eq!(driver.controller.triggers(), [0, 1, 1]);
    driver.write_config(at + 2, &0xc000u16.to_le_bytes());
    interrupts.queue(0);
    interrupts.queue(1);
    assert_eq!(driver.controller.triggers(), [0, 1, 1]);
    driver.write_config(at + 2, &0x8000u16.to_le_bytes());
    assert_eq!(driver.controller.triggers(), [0, 2, 2]);
    // Without MSI-X there is only the ISR.
    driver.write_config(at + 2, &0u16.to_le_bytes());
    interrupts.queue(0);
    assert_eq!(driver.read::<1>(driver.find(3).unwrap().offset), 1);
    interrupts.queue(9);
    assert_eq!(driver.controller.triggers(), [0, 2, 2]);
}

/// Describes an access in the PCI_CFG capability; where the data is.
fn point(driver: &Driver, bar: u8, offset: u32, length: u32) -> u64 {
    let at = driver.find(5).unwrap().capability;
    driver.write_config(at + 4, &[bar]);
    driver.write_config(at + 8, &offset.to_le_bytes());
    driver.write_config(at + 12, &length.to_le_bytes());
    at + 16
}

#[test]
fn the_second_door_reaches_the_registers() {
    let (notes, driver) = driver();
    let data = point(&driver, 0, 18, 2);
    assert_eq!(driver.read_config::<2>(data), [2, 0]);
    let data = point(&driver, 0, STATUS as u32, 1);
    driver.write_config(data, &[1]);
    assert_eq!(driver.status(), 1);
    driver.write_config(4, &[0, 0]);
    assert_eq!(driver.read_config::<1>(data), [1], "decoding is not needed");
    driver.write_config(4, &[6, 0]);
    driver.start(0, &[(0, 8)]);
    notes.calls();
    let notify = driver.find(2).unwrap().offset as u32;
    let data = point(&driver, 0, notify, 2);
    driver.write_config(data, &[0, 0]);
    assert_eq!(notes.calls(), [Call::Notify(0)]);
    let data = point(&driver, 0, STATUS as u32, 1);
    driver.write_config(data, &[0]);
    assert_eq!(notes.calls(), [Call::Reset]);
}

#[test]
fn the_second_door_has_the_same_checks() {
    let (_notes, driver) = driver();
    driver.set_status(1);
    for (bar, offset, length) in [
        (0, 20, 0),
        (0, 20, 3),
        (0, 20, 8),
        (0, 21, 2),
        (0, 18, 4),
        (0, 0xffff_fffc, 4),
        (0, 0x1_0000, 1),
        (1, 20, 1),
        (4, 20, 1),
        (6, 20, 1),
        (0xff, 20, 1),
    ] {
        let data = point(&driver, bar, offset, length);
        driver.write_config(data, &[0; 4]);
        assert_eq!(driver.read_config::<4>(data), [0; 4], "{bar} {offset:#x} {length}");
        assert_eq!(driver.status(), 1);
    }
    let data = point(&driver, 0, STATUS as u32, 1);
    driver.write_config(data, &[0; 8]);
    driver.write_config(data + 1, &[0; 2]);
    assert_eq!(driver.status(), 1);
}

#[test]
fn random_accesses_are_all_answered() {
    let (notes, driver) = driver();
    let mut noise = Noise(2);
    let mut data = [0; 8];
    for _ in 0..300_000 {
        let len = noise.pick(&[1, 2, 4, 8]);
        data.copy_from_slice(&noise.number().to_le_bytes());
        if noise.below(2) == 0 {
            // Small numbers mean more than large ones.
            data = [noise.pick(&[0, 1, 3, 11, 15]), 0, 0, 0, 0, 0, 0, 0];
        }
        let area = noise.pick(&[0, 0, 0, 0x1000, 0x2000, 0x3000, 0x4000, 0x8000, 0xffc0]);
        let offset = area + noise.below(0x40);
        match noise.below(4) {
            0 => driver.read_bar(offset, &mut data[..len]),
            1 => driver.write_bar(offset, &data[..len]),
            2 => drop(driver.read_config::<4>(noise.below(0x110))),
            _ => driver.write_config(noise.below(0x110), &data[..len]),
        }
        if noise.below(200) == 0 {
            // However confused it is, a driver that starts over finds the device in order.
            driver.write_config(0x10, &(MMIO32 as u32).to_le_bytes());
            driver.write_config(4, &[6, 0]);
            driver.start(0, &[(0, 8)]);
        }
    }
    assert!(notes.calls().len() > 1000);
}

#[test]
fn doorbells_resets_and_interrupts_from_all_sides_do_not_hang() {
    let (notes, driver) = driver();
    driver.start(0, &[(0, 8)]);
    let interrupts = notes.interrupts();
    std::thread::scope(|scope| {
        for side in 0..4 {
            let (driver, interrupts) = (&driver, &interrupts);
            scope.spawn(move || {
                for round in 0..5_000 {
                    match side {
                        0 => driver.set_status(if round % 5 == 0 { 0 } else { 3 }),
                        1 => driver.notify(0),
                        2 => {
                            interrupts.queue(0);
                            interrupts.needs_reset();
                            driver.status();
                        }
                        _ => {
                            let control = 0x8000u16 | (round % 2) << 14;
                            driver.write_config(driver.msix() + 2, &control.to_le_bytes());
                            driver.write_config(4, &[(round % 3 * 2) as u8, 0]);
                        }
                    }
                }
            });
        }
    });
}
