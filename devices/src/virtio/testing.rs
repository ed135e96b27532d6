//! The other side: guest memory, and a driver that sets up a device by hand through the registers.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests and fuzzers fail so")]

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, ProtFlags, mmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace, GuestMemory as _, GuestRegionMmap};

use super::{VIRTIO_F_VERSION_1, VirtioDevice, VirtioPci};
use crate::bus::BusDevice;
use crate::memory::{AtomicGuestMemory, GuestMemory};
use crate::pci::testing::Controller;
use crate::pci::{AddressWindow, AddressWindows, PciRoot};

/// Guest RAM: 4 MiB from 0 on.
pub const RAM: u64 = 4 << 20;
/// A region that says of itself that it is a DAX window.
pub const WINDOW: u64 = 1 << 32;
pub const WINDOW_SIZE: usize = 2 << 20;

pub const MMIO32: u64 = 0xc000_0000;
pub const MMIO64: u64 = 1 << 36;

/// Offsets in the common configuration.
pub const STATUS: u64 = 20;
pub const QUEUE_SELECT: u64 = 22;
pub const QUEUE_SIZE: u64 = 24;
pub const QUEUE_VECTOR: u64 = 26;
pub const QUEUE_ENABLE: u64 = 28;

/// `VIRTQ_DESC_F_*`.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// RAM, and a window at [`WINDOW`].
pub fn memory() -> AtomicGuestMemory {
    let ram = MmapRegionBuilder::new(RAM as usize)
        .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS)
        .build()
        .unwrap();
    let ram = GuestRegionMmap::new(ram, GuestAddress(0)).unwrap();
    // Without protection, as a window without mappings is: a plain load from here kills the test.
    let window = MmapRegionBuilder::new(WINDOW_SIZE)
        .with_mmap_prot(libc::PROT_NONE)
        .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE)
        .build()
        .unwrap();
    let window = GuestRegionMmap::new(window, GuestAddress(WINDOW)).unwrap();
    AtomicGuestMemory::new(GuestMemory::from_regions(vec![ram, window]).unwrap())
}

/// Where the driver keeps a queue: in pages of its own.
#[derive(Clone, Copy)]
pub struct DriverQueue {
    size: u16,
    base: u64,
    available: u16,
    used: u16,
}

impl DriverQueue {
    pub fn new(index: u16, size: u16) -> Self {
        Self { size, base: 0x10_0000 + u64::from(index) * 0x1_0000, available: 0, used: 0 }
    }

    pub fn descriptors(&self) -> u64 {
        self.base
    }

    pub fn driver(&self) -> u64 {
        self.base + 0x8000
    }

    pub fn device(&self) -> u64 {
        self.base + 0xc000
    }

    /// Writes a descriptor: address, length, flags, next.
    pub fn describe(
        &self,
        memory: &GuestMemory,
        index: u16,
        (address, len, flags, next): (u64, u32, u16, u16),
    ) {
        write_descriptor(
            memory,
            self.descriptors() + 16 * u64::from(index),
            (address, len, flags, next),
        );
    }

    /// Puts a head in the available ring, and only then moves the index.
    pub fn offer(&mut self, memory: &GuestMemory, head: u16) {
        let slot = self.driver() + 4 + 2 * u64::from(self.available % self.size);
        memory.write_obj(head, GuestAddress(slot)).unwrap();
        self.available = self.available.wrapping_add(1);
        self.set_available(memory, self.available);
    }

    pub fn set_available(&self, memory: &GuestMemory, index: u16) {
        let order = std::sync::atomic::Ordering::Release;
        memory.store(index, GuestAddress(self.driver() + 2), order).unwrap();
    }

    /// `used_event`: interrupt when the used index passes this.
    pub fn set_used_event(&self, memory: &GuestMemory, index: u16) {
        let at = self.driver() + 4 + 2 * u64::from(self.size);
        memory.write_obj(index, GuestAddress(at)).unwrap();
    }

    pub fn avail_event(&self, memory: &GuestMemory) -> u16 {
        let at = self.device() + 4 + 8 * u64::from(self.size);
        memory.read_obj(GuestAddress(at)).unwrap()
    }

    pub fn used_index(&self, memory: &GuestMemory) -> u16 {
        let order = std::sync::atomic::Ordering::Acquire;
        memory.load(GuestAddress(self.device() + 2), order).unwrap()
    }

    /// Takes the next entry of the used ring: head and length.
    pub fn take_used(&mut self, memory: &GuestMemory) -> Option<(u32, u32)> {
        if self.used_index(memory) == self.used {
            return None;
        }
        let at = self.device() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let head = memory.read_obj(GuestAddress(at)).unwrap();
        let len = memory.read_obj(GuestAddress(at + 4)).unwrap();
        Some((head, len))
    }
}

pub fn write_descriptor(
    memory: &GuestMemory,
    at: u64,
    (address, len, flags, next): (u64, u32, u16, u16),
) {
    memory.write_obj(address, GuestAddress(at)).unwrap();
    memory.write_obj(len, GuestAddress(at + 8)).unwrap();
    memory.write_obj(flags, GuestAddress(at + 12)).unwrap();
    memory.write_obj(next, GuestAddress(at + 14)).unwrap();
}

/// A structure that a capability points to: BAR, offset in it, length.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    pub capability: u64,
    pub bar: u8,
    pub id: u8,
    pub offset: u64,
    pub len: u64,
}

/// A machine with one virtio device, 00:01.0, and the driver's way to it.
pub struct Driver {
    pub memory: AtomicGuestMemory,
    pub controller: Controller,
    ecam: Arc<dyn BusDevice>,
    mmio32: Arc<dyn BusDevice>,
    /// Where BAR 0 is.
    pub bar: u64,
}

impl Driver {
    pub fn new(device: Arc<dyn VirtioDevice>) -> Self {
        let memory = memory();
        let controller = Controller::default();
        let function = VirtioPci::new(device, memory.clone(), &controller).unwrap();
        let root = PciRoot::new(AddressWindows {
            mmio32: MMIO32..MMIO32 + (1 << 20),
            mmio64: MMIO64..MMIO64 + (1 << 36),
        });
        let address = root.add(Arc::new(function)).unwrap();
        assert_eq!(address.device, 1);
        let driver = Self {
            memory,
            controller,
            ecam: root.ecam(),
            mmio32: root.mmio(AddressWindow::Mmio32),
            bar: MMIO32,
        };
        driver.write_config(4, &6u16.to_le_bytes());
        driver
    }

    pub fn memory(&self) -> impl std::ops::Deref<Target = GuestMemory> + use<> {
        self.memory.memory()
    }

    /// Shows a file in the window, from its start on.
    #[expect(unsafe_code, reason = "mmap over the window's reservation")]
    pub fn map_window(&self, file: BorrowedFd<'_>, len: usize) {
        assert!(len <= WINDOW_SIZE);
        let memory = self.memory();
        let (region, _) = memory.to_region_addr(GuestAddress(WINDOW)).unwrap();
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces pages of the reservation that this region is, and no others: it is longer.
        unsafe { mmap(region.as_ptr().cast(), len, protection, flags, file, 0) }.unwrap();
    }

    pub fn read_config<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.ecam.read((1 << 15) + offset, &mut data);
        data
    }

    pub fn write_config(&self, offset: u64, data: &[u8]) {
        self.ecam.write((1 << 15) + offset, data);
    }

    pub fn config_dword(&self, offset: u64) -> u32 {
        u32::from_le_bytes(self.read_config(offset))
    }

    /// Reads at an offset in BAR 0, by way of the window it is in.
    pub fn read_bar(&self, offset: u64, data: &mut [u8]) {
        self.mmio32.read(self.bar - MMIO32 + offset, data);
    }

    pub fn write_bar(&self, offset: u64, data: &[u8]) {
        self.mmio32.write(self.bar - MMIO32 + offset, data);
    }

    pub fn read<const N: usize>(&self, offset: u64) -> u64 {
        let mut data = [0; 8];
        self.read_bar(offset, &mut data[..N]);
        u64::from_le_bytes(data)
    }

    pub fn write<const N: usize>(&self, offset: u64, value: u64) {
        self.write_bar(offset, &value.to_le_bytes()[..N]);
    }

    /// All capabilities as id and offset, in the order of the list.
    pub fn capabilities(&self) -> Vec<(u8, u64)> {
        let mut found = Vec::new();
        let [mut at] = self.read_config::<1>(0x34);
        while at != 0 {
            let [id, next] = self.read_config::<2>(at.into());
            found.push((id, at.into()));
            at = next;
        }
        found
    }

    /// The first virtio capability of a `cfg_type`.
    pub fn find(&self, cfg_type: u8) -> Option<Area> {
        let found = self
            .capabilities()
            .into_iter()
            .find(|(id, at)| *id == 9 && self.read_config::<1>(at + 3) == [cfg_type]);
        found.map(|(_, at)| {
            let [len] = self.read_config::<1>(at + 2);
            let [bar] = self.read_config::<1>(at + 4);
            let [id] = self.read_config::<1>(at + 5);
            let mut area = Area {
                capability: at,
                bar,
                id,
                offset: self.config_dword(at + 8).into(),
                len: self.config_dword(at + 12).into(),
            };
            if cfg_type == 8 {
                assert_eq!(len, 24);
                area.offset |= u64::from(self.config_dword(at + 16)) << 32;
                area.len |= u64::from(self.config_dword(at + 20)) << 32;
            }
            area
        })
    }

    pub fn status(&self) -> u64 {
        self.read::<1>(STATUS)
    }

    pub fn set_status(&self, status: u64) {
        self.write::<1>(STATUS, status);
    }

    /// Resets the device, and waits until that is done (4.1.4.3.2).
    pub fn reset(&self) {
        self.set_status(0);
        self.wait_until_reset();
    }

    /// Waits for the end of a reset.
    pub fn wait_until_reset(&self) {
        let start = Instant::now();
        while self.status() != 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "the reset does not end");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub fn accept(&self, features: u64) {
        for select in 0..2 {
            self.write::<4>(8, select);
            self.write::<4>(12, features >> (32 * select) & 0xffff_ffff);
        }
    }

    pub fn offered(&self) -> u64 {
        (0..2).fold(0, |features, select| {
            self.write::<4>(0, select);
            features | self.read::<4>(4) << (32 * select)
        })
    }

    /// The steps of 3.1.1 up to FEATURES_OK, with VERSION_1 and `features`.
    pub fn negotiate(&self, features: u64) {
        self.reset();
        self.set_status(1);
        self.set_status(3);
        self.accept(features | VIRTIO_F_VERSION_1);
        self.set_status(11);
        assert_eq!(self.status(), 11);
    }

    /// Clears the rings and enables the queue, with vector `index + 1`.
    pub fn enable(&self, index: u16, size: u16) -> DriverQueue {
        let queue = DriverQueue::new(index, size);
        let zeros = [0; 0x1_0000];
        let base = GuestAddress(queue.descriptors());
        self.memory().write_slice(&zeros, base).unwrap();
        self.write::<2>(QUEUE_SELECT, index.into());
        self.write::<2>(QUEUE_SIZE, size.into());
        self.write::<2>(QUEUE_VECTOR, u64::from(index) + 1);
        for (at, address) in [(32, queue.descriptors()), (40, queue.driver()), (48, queue.device())]
        {
            self.write::<4>(at, address & 0xffff_ffff);
            self.write::<4>(at + 4, address >> 32);
        }
        self.write::<2>(QUEUE_ENABLE, 1);
        queue
    }

    /// Enables MSI-X and opens all vectors, each with its number as data; vector 0 is for configuration
    /// changes.
    pub fn enable_interrupts(&self) {
        let at = self.msix();
        let [low, high] = self.read_config::<2>(at + 2);
        let count = (u16::from_le_bytes([low, high]) & 0x7ff) + 1;
        self.write_config(at + 2, &0x8000u16.to_le_bytes());
        let table = u64::from(self.config_dword(at + 4) & !7);
        for vector in 0..u64::from(count) {
            self.write::<8>(table + 16 * vector, 0xfee0_0000);
            self.write::<8>(table + 16 * vector + 8, vector);
        }
        self.write::<2>(16, 0);
    }

    /// Offset of the MSI-X capability.
    pub fn msix(&self) -> u64 {
        let found = self.capabilities().into_iter().find(|(id, _)| *id == 0x11);
        found.unwrap().1
    }

    /// A device that is up, with the given queues.
    pub fn start(&self, features: u64, queues: &[(u16, u16)]) -> Vec<DriverQueue> {
        self.negotiate(features);
        self.enable_interrupts();
        let queues = queues.iter().map(|(index, size)| self.enable(*index, *size));
        let queues = queues.collect();
        self.set_status(15);
        assert_eq!(self.status(), 15);
        queues
    }

    /// Rings a queue's doorbell.
    pub fn notify(&self, queue: u16) {
        let area = self.find(2).unwrap();
        self.write::<2>(area.offset + 4 * u64::from(queue), queue.into());
    }

    /// Waits for interrupt number `count` of a queue.
    pub fn wait(&self, queue: u16, count: usize) {
        let seen = self.controller.wait(usize::from(queue) + 1, count);
        assert_eq!(seen, count, "interrupts of queue {queue}");
    }

    /// Waits until the device says that it needs a reset, and has interrupted to say so.
    pub fn wait_until_broken(&self) {
        assert_eq!(self.controller.wait(0, 1), 1, "configuration interrupts");
        assert_eq!(self.status() & 64, 64);
    }
}

/// Numbers without a pattern, the same in every run (xorshift64).
pub struct Noise(pub u64);

impl Noise {
    /// The next one.
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.number() % end
    }

    /// One of `choices`.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }
}
