//! A window that grows, as a driver sees it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};

use crate::dax;
use crate::memory::GuestBuffer;
use crate::virtio::fs::*;
use crate::virtio::testing::*;

/// Answers nothing, and notes how large the driver knows its window to be.
#[derive(Default)]
struct Nothing(AtomicU64);

impl Server for Nothing {
    fn serve(&self, _: &GuestBuffer<'_>, _: &GuestBuffer<'_>, _: &dyn Deferral) -> Served {
        Served::Done(0)
    }

    fn serve_urgent(&self, _: &GuestBuffer<'_>, _: &GuestBuffer<'_>) -> u32 {
        0
    }

    fn reset(&self) {}

    fn window_has_grown(&self, size: u64) {
        assert!(self.0.swap(size, SeqCst) < size);
    }
}

const GIB: u64 = 1 << 30;

/// A device with a window of 2 MiB that can have 12 GiB, and its driver.
fn growing() -> (Arc<dax::Window>, Arc<FsDevice>, Driver) {
    let (window, device, driver, _) = serving();
    (window, device, driver)
}

fn serving() -> (Arc<dax::Window>, Arc<FsDevice>, Driver, Arc<Nothing>) {
    let window = Arc::new(dax::Window::growable(2 << 20, 12 * GIB).unwrap());
    let slot = Arc::new(crate::pci::testing::Slot::default());
    let shown = Window { dax: window.clone(), slot };
    let server = Arc::new(Nothing::default());
    let config = Config::new("share", 1).unwrap();
    let device = FsDevice::new(config, server.clone(), Some(shown)).unwrap();
    let device = Arc::new(device);
    let driver = Driver::new(device.clone());
    (window, device, driver, server)
}

fn generation(driver: &Driver) -> u64 {
    driver.read::<1>(21)
}

#[test]
fn a_driver_that_wants_to_know_is_told_that_the_window_has_grown() {
    let (window, device, driver) = growing();
    // The BAR is as large as the window may become, from the start.
    let at = driver.find(8).unwrap().capability;
    for (register, byte) in [(0x20, 0xffff_ffffu32), (0x24, 0xffff_ffff)] {
        let before = driver.config_dword(register);
        driver.write_config(register, &byte.to_le_bytes());
        let sized = driver.config_dword(register);
        driver.write_config(register, &before.to_le_bytes());
        assert_eq!(sized, if register == 0x20 { 0xc } else { 0xffff_fffc }, "16 GiB");
    }
    assert!(!device.window_has_grown(), "there is no driver yet");
    driver.start(VIRTIO_FS_F_WINDOW_GROWS, &[(1, 16)]);
    assert_eq!(driver.find(8).unwrap().len, 2 << 20);
    let before = generation(&driver);
    for (count, size) in [(1, 4 << 20), (2, 5 * GIB), (3, 12 * GIB)] {
        window.grow(size).unwrap();
        assert!(device.window_has_grown());
        assert_eq!(driver.controller.wait(0, count), count, "configuration interrupts");
        assert_ne!(generation(&driver), before);
        assert_eq!(driver.find(8).unwrap().len, size);
    }
    // It is not the driver's to write.
    driver.write_config(at + 12, &[0xff; 4]);
    driver.write_config(at + 20, &[0xff; 4]);
    assert_eq!(driver.find(8).unwrap().len, 12 * GIB);
    driver.reset();
    assert!(!device.window_has_grown(), "the driver is gone");
    assert_eq!(driver.controller.triggers()[0], 3);
}

#[test]
fn a_driver_that_does_not_ask_is_left_alone_when_the_window_grows() {
    let (window, device, driver) = growing();
    assert_ne!(driver.offered() & VIRTIO_FS_F_WINDOW_GROWS, 0);
    let mut queues = driver.start(0, &[(1, 16)]);
    let before = generation(&driver);
    window.grow(GIB).unwrap();
    assert!(!device.window_has_grown());
    assert_eq!(driver.controller.triggers()[0], 0, "no configuration interrupt");
    assert_eq!(generation(&driver), before);
    queues[0].describe(&driver.memory(), 0, (0x1000, 64, WRITE, 0));
    queues[0].offer(&driver.memory(), 0);
    driver.notify(1);
    driver.wait(1, 1);
    // The next driver, or this one after a reset, finds it.
    driver.start(VIRTIO_FS_F_WINDOW_GROWS, &[(1, 16)]);
    assert_eq!(driver.find(8).unwrap().len, GIB);
    window.grow(2 * GIB).unwrap();
    assert!(device.window_has_grown());
}

#[test]
fn a_window_that_grows_while_a_driver_sets_up_the_device_is_not_missed() {
    let (window, device, driver) = growing();
    driver.negotiate(VIRTIO_FS_F_WINDOW_GROWS);
    driver.enable_interrupts();
    assert_eq!(driver.find(8).unwrap().len, 2 << 20);
    window.grow(GIB).unwrap();
    assert!(!device.window_has_grown());
    driver.enable(1, 16);
    driver.set_status(15);
    assert_eq!(driver.controller.wait(0, 1), 1, "told once it is up");
    assert_eq!(driver.find(8).unwrap().len, GIB);
    driver.start(VIRTIO_FS_F_WINDOW_GROWS, &[(1, 16)]);
    assert_eq!(driver.controller.triggers()[0], 1, "it has looked: nothing is new");
}

#[test]
fn the_two_halves_of_a_length_are_of_one_length() {
    let (window, _device, driver) = growing();
    window.grow(4 * GIB - (2 << 20)).unwrap();
    let at = driver.find(8).unwrap().capability;
    let low = driver.config_dword(at + 12);
    window.grow(9 * GIB).unwrap();
    let high = driver.config_dword(at + 20);
    assert_eq!((high, low), (0, 0xffe0_0000), "what it was when the first half was read");
    let [byte] = driver.read_config::<1>(at + 15);
    assert_eq!((driver.config_dword(at + 20), byte), (2, 0x40));
}

#[test]
fn the_server_counts_on_no_more_than_the_driver_knows_of() {
    let (window, _device, driver, server) = serving();
    assert_eq!(server.0.load(SeqCst), 2 << 20);
    window.grow(GIB).unwrap();
    assert_eq!(server.0.load(SeqCst), 2 << 20, "the driver has not looked");
    for _ in 0..2 {
        assert_eq!(driver.find(8).unwrap().len, GIB);
        assert_eq!(server.0.load(SeqCst), GIB);
    }
}
