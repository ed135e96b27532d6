//! The common configuration: features, status, queues.

use super::*;

#[test]
fn features_are_offered_by_halves_and_end_at_64() {
    let (_notes, driver) = driver();
    assert_eq!(driver.offered(), FEATURE | 0x1_3000_0000);
    for select in [2, 3, 4, 0xffff_ffff] {
        driver.write::<4>(0, select);
        driver.write::<4>(8, select);
        driver.write::<4>(12, 0xffff_ffff);
        assert_eq!(driver.read::<4>(4), 0);
        assert_eq!(driver.read::<4>(12), 0);
    }
    driver.accept(FEATURE);
    driver.write::<4>(8, 0);
    assert_eq!(driver.read::<4>(12), FEATURE);
}

#[test]
fn features_that_do_not_fit_are_not_agreed() {
    let (_notes, driver) = driver();
    for features in [0, FEATURE, VIRTIO_F_VERSION_1 | 1, VIRTIO_F_VERSION_1 | 1 << 34] {
        driver.reset();
        driver.set_status(3);
        driver.accept(features);
        driver.set_status(11);
        assert_eq!(driver.status(), 3, "{features:#x}");
        driver.set_status(15);
        assert_eq!(driver.status(), 3, "{features:#x}");
    }
    driver.accept(VIRTIO_F_VERSION_1 | FEATURE);
    driver.set_status(11);
    assert_eq!(driver.status(), 11);
    driver.accept(0);
    driver.write::<4>(8, 1);
    assert_eq!(driver.read::<4>(12), 1, "agreed is agreed");
}

#[test]
fn the_status_only_grows_and_only_in_order() {
    let (notes, driver) = driver();
    for early in [2, 4, 8, 14, 12] {
        driver.set_status(early);
        assert_eq!(driver.status(), 0, "{early}");
    }
    driver.set_status(3);
    driver.set_status(1);
    assert_eq!(driver.status(), 3, "nothing is taken back");
    driver.set_status(7);
    assert_eq!(driver.status(), 3, "DRIVER_OK without FEATURES_OK");
    driver.set_status(0x43);
    assert_eq!(driver.status(), 3, "DEVICE_NEEDS_RESET is the device's");
    driver.set_status(0x83);
    assert_eq!(driver.status(), 0x83);
    driver.accept(VIRTIO_F_VERSION_1);
    driver.set_status(0x8f);
    assert_eq!(driver.status(), 0x8b, "a driver that gave up is not ready");
    assert_eq!(notes.calls(), []);
}

#[test]
fn a_device_starts_once_with_the_enabled_queues() {
    let (notes, driver) = driver();
    driver.start(FEATURE, &[(1, 8)]);
    let agreed = VIRTIO_F_VERSION_1 | FEATURE;
    assert_eq!(notes.calls(), [Call::Activate(agreed, vec![1])]);
    driver.set_status(15);
    assert_eq!(notes.calls(), [], "nothing is new");
}

#[test]
fn a_reset_forgets_everything() {
    let (notes, driver) = driver();
    driver.start(FEATURE, &[(0, 64), (1, 8)]);
    notes.calls();
    notes.interrupts().config_changed();
    driver.reset();
    assert_eq!(notes.calls(), [Call::Reset]);
    assert_eq!(driver.status(), 0);
    assert_eq!(driver.read::<2>(16), 0xffff, "config vector");
    for (queue, size) in [(0, 256), (1, 16)] {
        driver.write::<2>(QUEUE_SELECT, queue);
        assert_eq!(driver.read::<2>(QUEUE_SIZE), size);
        assert_eq!(driver.read::<2>(QUEUE_ENABLE), 0);
        assert_eq!(driver.read::<2>(QUEUE_VECTOR), 0xffff);
        for register in [32, 40, 48] {
            assert_eq!(driver.read::<8>(register), 0);
        }
    }
    assert_eq!(driver.read::<1>(driver.find(3).unwrap().offset), 0, "ISR");
    driver.notify(0);
    assert_eq!(notes.calls(), []);
    driver.start(0, &[(0, 2)]);
    driver.notify(0);
    let again = Call::Activate(VIRTIO_F_VERSION_1, vec![0]);
    assert_eq!(notes.calls(), [again, Call::Notify(0)]);
}

#[test]
fn a_reset_that_takes_long_is_seen_as_unfinished() {
    let (notes, driver) = driver();
    driver.start(0, &[(0, 8)]);
    let (open, gate) = mpsc::channel();
    *lock(&notes.gate) = Some(gate);
    notes.calls();
    // Comes back, although the device is not done.
    driver.set_status(0);
    assert!(lock(&notes.gate).is_none(), "it is being reset");
    assert_eq!(driver.status(), 15);
    driver.notify(0);
    driver.set_status(0);
    driver.write::<2>(QUEUE_SELECT, 1);
    notes.interrupts().queue(0);
    notes.interrupts().needs_reset();
    assert_eq!(driver.read::<2>(QUEUE_SELECT), 0);
    assert_eq!(notes.calls(), []);
    open.send(()).unwrap();
    driver.wait_until_reset();
    assert_eq!(notes.calls(), [Call::Reset], "one is enough");
}

/// Its status reads 0 before and after: there is no telling from it that a reset goes on.
#[test]
fn a_device_that_is_not_in_use_is_reset_at_once() {
    let (notes, driver) = driver();
    let (_open, gate) = mpsc::channel();
    *lock(&notes.gate) = Some(gate);
    for before in [0, 1, 3] {
        driver.set_status(before);
        driver.write::<2>(QUEUE_SELECT, 1);
        driver.set_status(0);
        assert_eq!(driver.read::<2>(QUEUE_SELECT), 0);
        driver.set_status(1);
        assert_eq!(driver.status(), 1, "nothing that is written then is lost");
        driver.set_status(0);
    }
    assert_eq!(notes.calls(), []);
}

#[test]
fn a_queue_that_does_not_exist_reads_as_nothing() {
    let (_notes, driver) = driver();
    for queue in [2, 0xffff] {
        driver.write::<2>(QUEUE_SELECT, queue);
        for register in [QUEUE_SIZE, QUEUE_VECTOR, QUEUE_ENABLE, 32, 40, 48] {
            driver.write::<2>(register, 1);
        }
        assert_eq!(driver.read::<2>(QUEUE_SIZE), 0);
        assert_eq!(driver.read::<2>(QUEUE_ENABLE), 0);
        assert_eq!(driver.read::<2>(QUEUE_VECTOR), 0xffff);
        assert_eq!(driver.read::<8>(32), 0);
    }
}

#[test]
fn a_size_that_cannot_be_is_refused() {
    let (_notes, driver) = driver();
    driver.write::<2>(QUEUE_SELECT, 1);
    assert_eq!(driver.read::<2>(QUEUE_SIZE), 16);
    driver.write::<2>(QUEUE_SIZE, 4);
    for size in [0, 3, 15, 32, 0x8000, 0xffff] {
        driver.write::<2>(QUEUE_SIZE, size);
        assert_eq!(driver.read::<2>(QUEUE_SIZE), 4, "{size}");
    }
}

#[test]
fn a_vector_that_does_not_exist_is_no_vector() {
    let (_notes, driver) = driver();
    for (vector, read) in [(2, 2), (3, 0xffff), (0, 0), (0xfffe, 0xffff)] {
        driver.write::<2>(16, vector);
        driver.write::<2>(QUEUE_VECTOR, vector);
        assert_eq!(driver.read::<2>(16), read);
        assert_eq!(driver.read::<2>(QUEUE_VECTOR), read);
    }
}

#[test]
fn the_registers_of_an_enabled_queue_are_frozen() {
    let (_notes, driver) = driver();
    driver.negotiate(0);
    let queue = driver.enable(1, 8);
    for (register, value) in [(QUEUE_SIZE, 4), (QUEUE_VECTOR, 0), (QUEUE_ENABLE, 0), (32, 0)] {
        driver.write::<2>(register, value);
    }
    driver.write::<8>(40, 0x1000);
    driver.write::<8>(48, 0x2000);
    assert_eq!(driver.read::<2>(QUEUE_SIZE), 8);
    assert_eq!(driver.read::<2>(QUEUE_VECTOR), 2);
    assert_eq!(driver.read::<2>(QUEUE_ENABLE), 1);
    assert_eq!(driver.read::<8>(32), queue.descriptors());
    assert_eq!(driver.read::<8>(40), queue.driver());
    assert_eq!(driver.read::<8>(48), queue.device());
    driver.set_status(15);
    let other = driver.enable(0, 8);
    assert_eq!(driver.read::<2>(QUEUE_ENABLE), 0, "too late");
    assert_ne!(driver.read::<8>(32), other.descriptors());
}

#[test]
fn queue_enable_takes_nothing_but_one() {
    let (_notes, driver) = driver();
    driver.negotiate(0);
    for (at, address) in [(32, 0x1000), (40, 0x2000), (48, 0x3000)] {
        driver.write::<8>(at, address);
    }
    for value in [0, 2, 0xffff] {
        driver.write::<2>(QUEUE_ENABLE, value);
        assert_eq!(driver.read::<2>(QUEUE_ENABLE), 0);
    }
    driver.write::<2>(QUEUE_ENABLE, 1);
    assert_eq!(driver.read::<2>(QUEUE_ENABLE), 1);
}

#[test]
fn rings_that_cannot_be_make_the_device_need_a_reset() {
    let good = [0x1000, 0x2000, 0x3000];
    for (area, address) in [
        (0, 0x1008),
        (1, 0x2001),
        (2, 0x3002),
        (0, 0),
        (1, RAM),
        (2, RAM - 0x40),
        (0, u64::MAX - 0xf),
        (0, WINDOW),
        (1, WINDOW),
        (2, WINDOW + 0x1000),
        (1, 0x1000),
        (2, 0x1010),
        (2, 0x1ffc),
    ] {
        let (notes, driver) = driver();
        driver.negotiate(0);
        driver.enable_interrupts();
        let mut addresses = good;
        addresses[area] = address;
        for (at, address) in [32, 40, 48].into_iter().zip(addresses) {
            driver.write::<8>(at, address);
        }
        driver.write::<2>(QUEUE_ENABLE, 1);
        assert_eq!(driver.read::<2>(QUEUE_ENABLE), 0, "{area} {address:#x}");
        assert_eq!(driver.status(), 0x4b);
        assert_eq!(driver.controller.triggers()[0], 0, "not before DRIVER_OK");
        driver.set_status(15);
        driver.wait_until_broken();
        driver.notify(0);
        assert_eq!(notes.calls(), []);
        driver.reset();
        assert_eq!(driver.status(), 0);
    }
}

#[test]
fn rings_may_end_with_ram() {
    let (_notes, driver) = driver();
    driver.negotiate(0);
    driver.write::<2>(QUEUE_SIZE, 1);
    for (at, address) in [(32, 0x1000), (40, 0x2000), (48, RAM - 16)] {
        driver.write::<8>(at, address);
    }
    driver.write::<2>(QUEUE_ENABLE, 1);
    assert_eq!(driver.read::<2>(QUEUE_ENABLE), 1);
}

#[test]
fn accesses_of_any_width_and_place_are_answered_by_bytes() {
    let (_notes, driver) = driver();
    driver.write::<8>(32, 0x1122_3344_5566_7788);
    assert_eq!(driver.read::<4>(34), 0x3344_5566);
    driver.write::<1>(37, 0xaa);
    assert_eq!(driver.read::<8>(32), 0x1122_aa44_5566_7788);
    driver.write::<4>(38, 0x0304_0506);
    assert_eq!(driver.read::<8>(32), 0x0506_aa44_5566_7788);
    assert_eq!(driver.read::<8>(40), 0x0304);
    // Vector and number of queues; status, generation, queue_select.
    assert_eq!(driver.read::<4>(16), 0x0002_ffff);
    driver.write::<4>(20, 0x0001_ff01);
    assert_eq!(driver.read::<4>(20), 0x0001_0001);
    assert_eq!(driver.read::<8>(56), 0);
    driver.write::<8>(56, u64::MAX);
    driver.write::<8>(0xffc, u64::MAX);
    assert_eq!(driver.read::<8>(0x800), 0, "behind the registers");
}

#[test]
fn event_idx_reaches_the_device() {
    let (notes, driver) = driver();
    driver.start(VIRTIO_RING_F_EVENT_IDX, &[]);
    let agreed = VIRTIO_F_VERSION_1 | VIRTIO_RING_F_EVENT_IDX;
    assert_eq!(notes.calls(), [Call::Activate(agreed, vec![])]);
}
