use super::*;
use crate::pci::testing::Slot;

const MMIO32: u64 = 0xc000_0000;
const MMIO64: u64 = 1 << 36;

/// Answers every read with the low byte of its offset plus the BAR's index.
struct Function {
    configuration: Mutex<Configuration>,
    written: Mutex<Vec<(usize, u64, Vec<u8>)>>,
    slot: Option<Arc<Slot>>,
}

impl PciFunction for Function {
    fn configuration(&self) -> &Mutex<Configuration> {
        &self.configuration
    }
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(offset as u8 + bar as u8);
    }
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]) {
        lock(&self.written).push((bar, offset, data.to_vec()));
    }
    fn window(&self, bar: usize) -> Option<Arc<dyn WindowSlot>> {
        let slot = self.slot.clone().filter(|_| bar == 4)?;
        Some(slot)
    }
}

fn function(slot: Option<Arc<Slot>>) -> Arc<Function> {
    let mut configuration =
        Configuration::new(Identity { vendor: 0x1234, device: 0x5678, ..Identity::default() });
    configuration
        .add_bar(Bar { index: 0, kind: BarKind::Memory32, prefetchable: false, size: 0x1000 })
        .unwrap();
    configuration
        .add_bar(Bar { index: 4, kind: BarKind::Memory64, prefetchable: true, size: 0x20_0000 })
        .unwrap();
    Arc::new(Function { configuration: Mutex::new(configuration), written: Mutex::default(), slot })
}

fn root() -> PciRoot {
    PciRoot::new(AddressWindows {
        mmio32: MMIO32 + 0x10..MMIO32 + 0x10_0000,
        mmio64: MMIO64..MMIO64 + (1 << 30),
    })
}

fn read32(root: &PciRoot, address: u64) -> u32 {
    let (window, base) = if address < 1 << 32 {
        (AddressWindow::Mmio32, MMIO32 + 0x10)
    } else {
        (AddressWindow::Mmio64, MMIO64)
    };
    let mut data = [0; 4];
    root.mmio(window).read(address - base, &mut data);
    u32::from_le_bytes(data)
}

fn config(root: &PciRoot, device: u64, offset: u64, data: &[u8]) {
    root.ecam().write(device << 15 | offset, data);
}

fn config32(root: &PciRoot, device: u64, offset: u64) -> u32 {
    let mut data = [0; 4];
    root.ecam().read(device << 15 | offset, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn both_doors_lead_to_the_same_registers() {
    let root = root();
    let address = root.add(function(None)).unwrap();
    assert_eq!(address.to_string(), "00:01.0");
    assert_eq!(config32(&root, 0, 8) >> 8, 0x06_00_00, "the host bridge");
    assert_eq!(config32(&root, 1, 0), 0x5678_1234);
    let ports = root.ports();
    ports.write(0, &0x8000_0800u32.to_le_bytes());
    let mut data = [0; 4];
    ports.read(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_0800);
    ports.read(4, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x5678_1234);
    ports.read(6, &mut data[..2]);
    assert_eq!(data[..2], [0x78, 0x56]);
    ports.write(0, &0x8000_0804u32.to_le_bytes());
    ports.write(4, &[6, 0]);
    assert_eq!(config32(&root, 1, 4) & 0xffff, 6);
}

#[test]
fn what_is_not_there_reads_as_ones() {
    let root = root();
    root.add(function(None)).unwrap();
    for (device, offset) in [(2, 0), (31, 0), (1, 0x100), (1, 0xffc), (1, 0x1000), (1, 0x7000)] {
        config(&root, device, offset, &[0xff; 4]);
        assert_eq!(config32(&root, device, offset), u32::MAX, "{device} {offset:#x}");
    }
    let ports = root.ports();
    // Not enabled; another bus; another function; another device.
    for address in [0x0000_0800u32, 0x8001_0800, 0x8000_0900, 0x8000_1000] {
        ports.write(0, &address.to_le_bytes());
        let mut data = [0; 4];
        ports.read(4, &mut data);
        assert_eq!(data, [0xff; 4], "{address:#x}");
    }
    // A byte at 0xCFB is not the address register: Linux checks that.
    ports.write(3, &[1]);
    let mut data = [0; 4];
    ports.read(0, &mut data);
    assert_eq!(u32::from_le_bytes(data), 0x8000_1000);
    ports.read(2, &mut data);
    assert_eq!(data, [0xff; 4]);
}

#[test]
fn bars_are_aligned_and_answer_once_they_are_enabled() {
    let root = root();
    let function = function(None);
    root.add(function.clone()).unwrap();
    let address = u64::from(config32(&root, 1, 0x10));
    assert_eq!(address, MMIO32 + 0x1000, "the window starts off a page");
    assert_eq!(config32(&root, 1, 0x20), 0xc);
    assert_eq!(config32(&root, 1, 0x24), 0x10);
    assert_eq!(read32(&root, address), u32::MAX, "not decoded yet");
    config(&root, 1, 4, &[2, 0]);
    assert_eq!(read32(&root, address + 5), 0x0505_0505);
    assert_eq!(read32(&root, MMIO64 + 1), 0x0505_0505);
    assert_eq!(read32(&root, address + 0xffe), u32::MAX, "leaves the BAR");
    assert_eq!(read32(&root, address - 1), u32::MAX, "before the BAR");
    root.mmio(AddressWindow::Mmio64).write(7, &[1, 2]);
    assert_eq!(*lock(&function.written), [(4, 7, vec![1, 2])]);
    config(&root, 1, 4, &[0, 0]);
    assert_eq!(read32(&root, address), u32::MAX);
}

#[test]
fn accesses_follow_a_bar_that_moves() {
    let root = root();
    root.add(function(None)).unwrap();
    config(&root, 1, 4, &[2, 0]);
    let old = u64::from(config32(&root, 1, 0x10));
    let new = old + 0x8000;
    config(&root, 1, 0x10, &(new as u32).to_le_bytes());
    assert_eq!(read32(&root, old), u32::MAX);
    assert_eq!(read32(&root, new), 0);
    // Into the other window, half by half.
    config(&root, 1, 0x20, &0x0040_0000u32.to_le_bytes());
    assert_eq!(read32(&root, MMIO64), u32::MAX);
    assert_eq!(read32(&root, MMIO64 + 0x40_0000), 0x0404_0404);
}

#[test]
fn a_bar_outside_of_the_windows_is_not_decoded() {
    let root = root();
    root.add(function(None)).unwrap();
    config(&root, 1, 4, &[2, 0]);
    let home = config32(&root, 1, 0x10);
    // RAM, below the window, across its end, behind it, sizing.
    for address in [0u32, 0xc000_0000, 0xc010_0000, 0xfee0_0000, u32::MAX] {
        config(&root, 1, 0x10, &address.to_le_bytes());
        assert_eq!(read32(&root, u64::from(home)), u32::MAX);
    }
    config(&root, 1, 0x24, &u32::MAX.to_le_bytes());
    config(&root, 1, 0x20, &u32::MAX.to_le_bytes());
    assert_eq!(read32(&root, MMIO64), u32::MAX);
    config(&root, 1, 0x10, &home.to_le_bytes());
    assert_eq!(read32(&root, u64::from(home)), 0);
}

#[test]
fn a_bar_on_another_waits_until_that_one_moves() {
    let root = root();
    let (first, second) = (function(None), function(None));
    root.add(first.clone()).unwrap();
    root.add(second.clone()).unwrap();
    config(&root, 1, 4, &[2, 0]);
    config(&root, 2, 4, &[2, 0]);
    let address = config32(&root, 1, 0x10);
    config(&root, 2, 0x10, &address.to_le_bytes());
    root.mmio(AddressWindow::Mmio32).write(u64::from(address) - MMIO32 - 0x10, &[1]);
    assert_eq!(lock(&first.written).len(), 1);
    assert_eq!(lock(&second.written).len(), 0);
    config(&root, 1, 4, &[0, 0]);
    root.mmio(AddressWindow::Mmio32).write(u64::from(address) - MMIO32 - 0x10, &[1]);
    assert_eq!(lock(&second.written).len(), 1);
}

#[test]
fn a_window_is_placed_moved_and_taken_away() {
    let root = root();
    let slot = Arc::new(Slot::default());
    root.add(function(Some(slot.clone()))).unwrap();
    assert_eq!(slot.places(), []);
    config(&root, 1, 4, &[2, 0]);
    assert_eq!(slot.places(), [Some(MMIO64)]);
    assert_eq!(read32(&root, MMIO64), u32::MAX, "it has no registers");
    config(&root, 1, 4, &[6, 0]);
    assert_eq!(slot.places(), [], "nothing is new");
    config(&root, 1, 0x20, &0x0060_0000u32.to_le_bytes());
    assert_eq!(slot.places(), [Some(MMIO64 + 0x60_0000)]);
    config(&root, 1, 0x24, &0u32.to_le_bytes());
    assert_eq!(slot.places(), [None], "that is RAM");
    config(&root, 1, 0x24, &0x10u32.to_le_bytes());
    assert_eq!(slot.places(), [Some(MMIO64 + 0x60_0000)]);
    config(&root, 1, 4, &[0, 0]);
    assert_eq!(slot.places(), [None]);
}

#[test]
fn a_window_that_the_machine_refuses_is_nowhere() {
    let root = root();
    let slot = Arc::new(Slot::default());
    root.add(function(Some(slot.clone()))).unwrap();
    config(&root, 1, 4, &[2, 0]);
    slot.places();
    slot.refuse(true);
    config(&root, 1, 0x20, &0x0060_0000u32.to_le_bytes());
    assert_eq!(slot.places(), [None]);
    slot.refuse(false);
    config(&root, 1, 0x20, &0x0040_0000u32.to_le_bytes());
    assert_eq!(slot.places(), [Some(MMIO64 + 0x40_0000)]);
}

#[test]
fn a_full_bus_and_a_full_window_are_errors() {
    let root = root();
    for _ in 1..32 {
        root.add(function(None)).unwrap();
    }
    assert_eq!(root.add(function(None)), Err(RootError::BusFull));
    let small = PciRoot::new(AddressWindows {
        mmio32: MMIO32..MMIO32 + 0x1000,
        mmio64: MMIO64..MMIO64 + 0x1000,
    });
    let error = small.add(function(None)).unwrap_err();
    let expected = RootError::NoAddress { bar: 4, size: 0x20_0000, window: AddressWindow::Mmio64 };
    assert_eq!(error, expected);
}
