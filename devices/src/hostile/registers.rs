//! Registers: configuration space, BARs, common configuration, doorbells, MSI-X.

use super::{cases, file_system};
use crate::virtio::VIRTIO_F_VERSION_1;
use crate::virtio::testing::*;

/// Offsets in the common configuration.
const DEVICE_FEATURE_SELECT: u64 = 0;
const DEVICE_FEATURE: u64 = 4;
const DRIVER_FEATURE_SELECT: u64 = 8;
const DRIVER_FEATURE: u64 = 12;
const NUM_QUEUES: u64 = 18;
const QUEUE_DESC: u64 = 32;

/// Does its worst to a device that a driver has set up, then puts the BARs where they were and has a request
/// served.
fn attack(case: fn(&Driver)) {
    let (_directory, machine) = file_system();
    machine.driver.start(0, &[(1, 8)]);
    case(&machine.driver);
    let driver = &machine.driver;
    driver.write_config(4, &[0, 0]);
    driver.write_config(0x10, &(MMIO32 as u32).to_le_bytes());
    driver.write_config(0x20, &(MMIO64 as u32).to_le_bytes());
    driver.write_config(0x24, &((MMIO64 >> 32) as u32).to_le_bytes());
    driver.write_config(4, &[6, 0]);
    machine.still_works();
}

fn select(driver: &Driver, queue: u64) {
    driver.write::<2>(QUEUE_SELECT, queue);
}

/// A register keeps what it has, whatever is written to it.
fn keeps<const N: usize>(driver: &Driver, register: u64, values: &[u64]) {
    let before = driver.read::<N>(register);
    for value in values {
        driver.write::<N>(register, *value);
        assert_eq!(driver.read::<N>(register), before, "{register}: {value:#x}");
    }
}

/// The same for configuration space.
fn configuration_keeps(driver: &Driver, offset: u64) {
    let before = driver.config_dword(offset);
    for value in [0u32, u32::MAX, 0x5555_5555] {
        driver.write_config(offset, &value.to_le_bytes());
        assert_eq!(driver.config_dword(offset), before, "{offset:#x}");
    }
}

/// The device that has been set up goes on: its status is as it was.
fn is_up(driver: &Driver) {
    assert_eq!(driver.status(), 15);
}

cases! { attack:
    vendor_and_device_cannot_be_written => |driver| configuration_keeps(driver, 0);
    the_class_cannot_be_written => |driver| configuration_keeps(driver, 8);
    the_subsystem_cannot_be_written => |driver| configuration_keeps(driver, 0x2c);
    the_list_of_capabilities_cannot_be_written => |driver| {
        configuration_keeps(driver, 0x34);
        for (_, at) in driver.capabilities() {
            let before = driver.read_config::<2>(at);
            driver.write_config(at, &[0xff; 2]);
            assert_eq!(driver.read_config::<2>(at), before, "{at:#x}");
        }
    };
    where_structures_are_cannot_be_written => |driver| {
        for kind in [1, 2, 3, 4, 8] {
            let area = driver.find(kind).unwrap();
            for offset in [4, 8, 12] {
                configuration_keeps(driver, area.capability + offset);
            }
        }
    };
    bars_that_there_are_not_stay_nothing => |driver| {
        for bar in [0x14, 0x18, 0x1c] {
            driver.write_config(bar, &[0xff; 4]);
            assert_eq!(driver.config_dword(bar), 0, "{bar:#x}");
        }
    };
    there_is_no_expansion_rom => |driver| {
        driver.write_config(0x30, &[0xff; 4]);
        assert_eq!(driver.config_dword(0x30), 0);
    };
    configuration_space_is_not_read_in_odd_pieces => |driver| {
        assert_eq!(driver.read_config::<3>(0), [0xff; 3]);
        assert_eq!(driver.read_config::<2>(1), [0xff; 2]);
        assert_eq!(driver.read_config::<4>(2), [0xff; 4]);
        assert_eq!(driver.read_config::<8>(0), [0xff; 8]);
    };
    configuration_space_is_not_written_in_odd_pieces => |driver| {
        let before = driver.config_dword(4);
        driver.write_config(4, &[0; 3]);
        driver.write_config(4, &[0; 8]);
        driver.write_config(3, &[0; 2]);
        assert_eq!(driver.config_dword(4), before);
        is_up(driver);
    };
    behind_configuration_space_is_nothing => |driver| {
        for at in [0xfe, 0x100, 0x800, 0xffc, 0xffe] {
            driver.write_config(at, &[0; 4]);
            assert_eq!(driver.read_config::<4>(at), [0xff; 4], "{at:#x}");
        }
    };
    registers_on_ram_are_decoded_nowhere => |driver| {
        driver.write_config(0x10, &0x1000u32.to_le_bytes());
        assert_eq!(driver.read::<1>(STATUS), 0xff);
        driver.write::<1>(STATUS, 0);
    };
    registers_at_the_end_of_addresses_are_decoded_nowhere => |driver| {
        driver.write_config(0x10, &[0xff; 4]);
        assert_eq!(driver.read::<1>(STATUS), 0xff);
    };
    registers_that_are_turned_off_read_as_ones => |driver| {
        driver.write_config(4, &[0, 0]);
        assert_eq!(driver.read::<4>(0), 0xffff_ffff);
        driver.write::<1>(STATUS, 0);
        driver.write_config(4, &[6, 0]);
        is_up(driver);
    };
    the_window_on_the_registers_waits => |driver| {
        driver.write_config(0x20, &(MMIO32 as u32).to_le_bytes());
        driver.write_config(0x24, &[0; 4]);
        is_up(driver);
    };
    a_window_on_ram_is_nowhere => |driver| {
        driver.write_config(0x20, &[0; 4]);
        driver.write_config(0x24, &[0; 4]);
        is_up(driver);
    };
    a_window_at_the_end_of_addresses_is_nowhere => |driver| {
        driver.write_config(0x20, &[0xff; 4]);
        driver.write_config(0x24, &[0xff; 4]);
        is_up(driver);
    };
    feature_words_above_the_second_are_nothing => |driver| {
        for word in [2, 3, 0x8000_0000, 0xffff_ffff] {
            driver.write::<4>(DEVICE_FEATURE_SELECT, word);
            assert_eq!(driver.read::<4>(DEVICE_FEATURE), 0);
            driver.write::<4>(DRIVER_FEATURE_SELECT, word);
            driver.write::<4>(DRIVER_FEATURE, 0xffff_ffff);
            assert_eq!(driver.read::<4>(DRIVER_FEATURE), 0);
        }
    };
    what_is_offered_cannot_be_written => |driver| {
        driver.write::<4>(DEVICE_FEATURE_SELECT, 1);
        keeps::<4>(driver, DEVICE_FEATURE, &[0, 0xffff_ffff]);
    };
    features_after_they_were_agreed_are_ignored => |driver| {
        driver.write::<4>(DRIVER_FEATURE_SELECT, 1);
        keeps::<4>(driver, DRIVER_FEATURE, &[0, 0xffff_ffff]);
    };
    features_that_were_not_offered_are_not_agreed => |driver| {
        driver.reset();
        driver.set_status(1);
        driver.set_status(3);
        driver.accept(VIRTIO_F_VERSION_1 | 1 << 40);
        driver.set_status(11);
        assert_eq!(driver.status(), 3);
    };
    nothing_without_version_1_is_agreed => |driver| {
        driver.reset();
        driver.set_status(3);
        driver.accept(0);
        driver.set_status(11);
        assert_eq!(driver.status(), 3);
        driver.set_status(15);
        assert_eq!(driver.status(), 3, "and nothing starts");
    };
    status_bits_are_not_taken_back => |driver| {
        for status in [1, 3, 11, 14, 0x10, 0x40, 0x80 >> 1] {
            driver.set_status(status);
            is_up(driver);
        }
    };
    that_it_needs_a_reset_is_not_the_drivers_to_say => |driver| {
        driver.set_status(15 | 0x40);
        is_up(driver);
    };
    status_bits_that_mean_nothing_are_not_kept => |driver| {
        driver.set_status(15 | 0x30);
        is_up(driver);
    };
    a_driver_that_gave_up_is_not_heard => |driver| {
        driver.set_status(15 | 0x80);
        assert_eq!(driver.status(), 0x8f);
        driver.notify(1);
        driver.set_status(15);
        assert_eq!(driver.status(), 0x8f);
    };
    a_status_written_as_two_or_four_bytes_is_a_status => |driver| {
        driver.write::<4>(STATUS, 0xffff_ff0f);
        is_up(driver);
    };
    the_number_of_queues_cannot_be_written => |driver| keeps::<2>(driver, NUM_QUEUES, &[0, 9]);
    a_queue_that_there_is_not_has_no_registers => |driver| {
        for queue in [2, 3, 0x100, 0xffff] {
            select(driver, queue);
            for register in [QUEUE_SIZE, QUEUE_ENABLE] {
                assert_eq!(driver.read::<2>(register), 0);
                keeps::<2>(driver, register, &[1, 8, 0xffff]);
            }
            keeps::<8>(driver, QUEUE_DESC, &[0x1000, u64::MAX]);
            assert_eq!(driver.read::<2>(QUEUE_VECTOR), 0xffff);
        }
    };
    the_size_of_a_queue_in_use_stays => |driver| {
        select(driver, 1);
        keeps::<2>(driver, QUEUE_SIZE, &[0, 1, 4, 16, 0xffff]);
    };
    the_rings_of_a_queue_in_use_stay => |driver| {
        select(driver, 1);
        for register in [32, 40, 48] {
            keeps::<8>(driver, register, &[0, 0x1000, RAM, u64::MAX]);
            keeps::<4>(driver, register + 4, &[1, 0xffff_ffff]);
        }
    };
    a_queue_in_use_is_not_disabled => |driver| {
        select(driver, 1);
        keeps::<2>(driver, QUEUE_ENABLE, &[0, 1, 2, 0xffff]);
    };
    a_queue_is_not_enabled_after_the_start => |driver| {
        select(driver, 0);
        for register in [32, 40, 48] {
            driver.write::<8>(register, 0x30_0000 + 0x1000 * register);
        }
        driver.write::<2>(QUEUE_ENABLE, 1);
        assert_eq!(driver.read::<2>(QUEUE_ENABLE), 0);
        driver.notify(0);
        is_up(driver);
    };
    a_vector_that_there_is_not_is_none => |driver| {
        driver.reset();
        select(driver, 1);
        for vector in [3, 4, 0x7ff, 0x800, 0xfffe] {
            driver.write::<2>(QUEUE_VECTOR, vector);
            assert_eq!(driver.read::<2>(QUEUE_VECTOR), 0xffff);
            driver.write::<2>(16, vector);
            assert_eq!(driver.read::<2>(16), 0xffff);
        }
    };
    where_a_doorbell_is_cannot_be_written => |driver| {
        select(driver, 1);
        keeps::<2>(driver, 30, &[0, 0xffff]);
    };
    a_doorbell_of_no_queue_is_not_heard => |driver| {
        for queue in [2, 3, 0x1000, 0xffff] {
            driver.notify(queue);
        }
        is_up(driver);
    };
    a_doorbell_of_another_width_is_not_heard => |driver| {
        let at = driver.find(2).unwrap().offset;
        driver.write::<1>(at + 4, 1);
        driver.write::<4>(at + 4, 1);
        driver.write::<8>(at, 1);
        driver.write::<2>(at + 5, 1);
        driver.write::<2>(at + 4, 0);
        is_up(driver);
    };
    a_doorbell_before_the_start_is_not_heard => |driver| {
        driver.negotiate(0);
        driver.notify(1);
        driver.enable(1, 8);
        driver.notify(1);
        assert_eq!(driver.status(), 11);
    };
    the_configuration_of_the_device_cannot_be_written => |driver| {
        let at = driver.find(4).unwrap().offset;
        for offset in [0, 36, 40] {
            keeps::<4>(driver, at + offset, &[0, 0xffff_ffff]);
        }
    };
    behind_the_configuration_of_the_device_is_nothing => |driver| {
        let at = driver.find(4).unwrap().offset;
        for offset in [44, 48, 0x100, 0xff8] {
            assert_eq!(driver.read::<8>(at + offset), 0, "{offset:#x}");
        }
    };
    the_interrupt_status_cannot_be_written => |driver| {
        let at = driver.find(3).unwrap().offset;
        driver.write::<1>(at, 0xff);
        assert_eq!(driver.read::<1>(at), 0);
    };
    between_the_structures_is_nothing => |driver| {
        for offset in (64..0x1_0000).step_by(0x3f8) {
            let is_register = |kind| {
                let area = driver.find(kind).unwrap();
                (area.offset..area.offset + area.len).contains(&offset)
            };
            if ![1, 2, 3, 4].into_iter().any(is_register) {
                driver.write::<8>(offset, u64::MAX);
            }
        }
        driver.enable_interrupts();
        is_up(driver);
    };
    pending_bits_cannot_be_written => |driver| {
        let at = u64::from(driver.config_dword(driver.msix() + 8) & !7);
        let control = driver.msix() + 2;
        // Masked, so that none is sent away.
        driver.write_config(control, &0xc000u16.to_le_bytes());
        driver.write::<8>(at, u64::MAX);
        driver.write::<4>(at + 4, 0xffff_ffff);
        assert_eq!(driver.read::<8>(at), 0);
        let before = driver.controller.triggers();
        driver.write_config(control, &0x8000u16.to_le_bytes());
        assert_eq!(driver.controller.triggers(), before, "none was pending");
    };
    the_table_of_vectors_is_written_in_whole_words => |driver| {
        let at = u64::from(driver.config_dword(driver.msix() + 4) & !7);
        let before = driver.read::<8>(at);
        driver.write::<1>(at, 0xff);
        driver.write::<2>(at, 0xffff);
        driver.write::<4>(at + 2, 0xffff_ffff);
        driver.write::<8>(at + 4, u64::MAX);
        assert_eq!(driver.read::<8>(at), before);
    };
    behind_the_table_of_vectors_is_nothing => |driver| {
        let at = u64::from(driver.config_dword(driver.msix() + 4) & !7);
        driver.write::<8>(at + 3 * 16, u64::MAX);
        driver.write::<8>(at + 0x7f8, u64::MAX);
        is_up(driver);
    };
    the_number_of_vectors_cannot_be_written => |driver| {
        let control = driver.msix() + 2;
        driver.write_config(control, &[0xff; 2]);
        assert_eq!(u16::from_le_bytes(driver.read_config(control)) & 0x7ff, 2);
        configuration_keeps(driver, driver.msix() + 4);
        configuration_keeps(driver, driver.msix() + 8);
    };
    messages_to_memory_are_never_sent => |driver| {
        let table = u64::from(driver.config_dword(driver.msix() + 4) & !7);
        for address in [0u64, 0x1000, 0xfef0_0000, 0xfedf_fffc, 1 << 32 | 0xfee0_0000] {
            for vector in 0..3 {
                driver.write::<8>(table + 16 * vector, address);
                assert_eq!(driver.controller.connections(vector as usize).last(), Some(&None));
            }
        }
    };
    the_second_door_is_closed_to_what_the_first_is => |driver| {
        let at = driver.find(5).unwrap().capability;
        for (bar, offset, len) in [(0, 20, 0), (0, 20, 3), (0, 20, 8), (0, 21, 2), (1, 20, 1), (4, 0, 4), (0xff, 0, 4), (0, 0x1_0000, 4), (0, u32::MAX, 1)] {
            driver.write_config(at + 4, &[bar]);
            driver.write_config(at + 8, &u32::to_le_bytes(offset));
            driver.write_config(at + 12, &u32::to_le_bytes(len));
            driver.write_config(at + 16, &[0; 4]);
            is_up(driver);
        }
    };
    a_reset_through_the_second_door_is_a_reset => |driver| {
        let at = driver.find(5).unwrap().capability;
        driver.write_config(at + 4, &[0]);
        driver.write_config(at + 8, &(STATUS as u32).to_le_bytes());
        driver.write_config(at + 12, &1u32.to_le_bytes());
        driver.write_config(at + 16, &[0]);
        driver.wait_until_reset();
    };
    a_hundred_resets_in_a_row_are_resets => |driver| {
        (0..100).for_each(|_| driver.set_status(0));
        driver.wait_until_reset();
    };
    a_thousand_starts_without_a_request_are_starts => |driver| {
        for _ in 0..1000 {
            driver.negotiate(0);
            driver.set_status(15);
            is_up(driver);
        }
    };
}
