//! A PCI device without a driver: its configuration space, its registers, and memory that it can reach.
#![expect(unsafe_code, reason = "device registers, and memory that a device changes")]

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::mm::{MapFlags, ProtFlags, mlock, mmap, mmap_anonymous};

/// Where Linux shows PCI devices.
const DEVICES: &str = "/sys/bus/pci/devices";

/// What to map of a BAR.
pub const BAR_SIZE: usize = 1 << 16;

/// Memory of this process that is looked at byte by byte, for somebody else changes it.
pub struct Bytes {
    start: *mut u8,
    len: usize,
}

// SAFETY: plain memory that is there until the process ends; all accesses are volatile.
unsafe impl Sync for Bytes {}

impl Bytes {
    /// Reads 1, 2, 4 or 8 bytes in one access.
    pub fn get<const N: usize>(&self, at: usize) -> u64 {
        assert!(at.is_multiple_of(N) && at + N <= self.len, "{at:#x}");
        let place = self.start.wrapping_add(at);
        // SAFETY: aligned, and inside the mapping, as just checked.
        unsafe {
            match N {
                1 => place.read_volatile().into(),
                2 => place.cast::<u16>().read_volatile().into(),
                4 => place.cast::<u32>().read_volatile().into(),
                _ => place.cast::<u64>().read_volatile(),
            }
        }
    }

    /// Writes as many.
    pub fn put<const N: usize>(&self, at: usize, value: u64) {
        assert!(at.is_multiple_of(N) && at + N <= self.len, "{at:#x}");
        let place = self.start.wrapping_add(at);
        // SAFETY: as above.
        unsafe {
            match N {
                1 => place.write_volatile(value as u8),
                2 => place.cast::<u16>().write_volatile(value as u16),
                4 => place.cast::<u32>().write_volatile(value as u32),
                _ => place.cast::<u64>().write_volatile(value),
            }
        }
    }

    pub fn write(&self, at: usize, bytes: &[u8]) {
        bytes
            .iter()
            .enumerate()
            .for_each(|(index, byte)| self.put::<1>(at + index, (*byte).into()));
    }

    pub fn read(&self, at: usize, len: usize) -> Vec<u8> {
        (at..at + len).map(|at| self.get::<1>(at) as u8).collect()
    }
}

/// Pages whose physical addresses are known and stay.
pub struct Pages {
    pub bytes: Bytes,
    frames: Vec<u64>,
}

impl Pages {
    pub fn new(count: usize) -> Result<Self> {
        let len = count * 4096;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: new memory where the kernel likes.
        let start = unsafe { mmap_anonymous(std::ptr::null_mut(), len, access, MapFlags::SHARED)? };
        // SAFETY: the memory just mapped.
        unsafe { mlock(start, len)? };
        let bytes = Bytes { start: start.cast(), len };
        (0..count).for_each(|page| bytes.put::<8>(page * 4096, 0));
        let map = File::open("/proc/self/pagemap")?;
        let frame = |page: usize| -> Result<u64> {
            let mut entry = [0; 8];
            map.read_exact_at(&mut entry, (start.addr() / 4096 + page) as u64 * 8)?;
            let entry = u64::from_le_bytes(entry);
            // Bit 63: present; bits 0 to 54: the frame.
            ensure!(entry >> 63 == 1 && entry << 9 != 0, "no frame: not root?");
            Ok((entry & ((1 << 55) - 1)) * 4096)
        };
        let frames = (0..count).map(frame).collect::<Result<_>>()?;
        Ok(Self { bytes, frames })
    }

    /// Guest-physical.
    pub fn address(&self, at: usize) -> u64 {
        self.frames[at / 4096] + (at % 4096) as u64
    }
}

/// A function of the bus.
pub struct Function {
    pub path: PathBuf,
    configuration: File,
}

impl Function {
    /// The file system device of a tag. It is read through configuration space, whoever drives the device.
    pub fn of_tag(tag: &str) -> Result<Self> {
        for entry in fs::read_dir(DEVICES)? {
            let path = entry?.path();
            let function = Self::open(path)?;
            if function.read(0)? == 0x105a_1af4 && function.tag()? == tag {
                return Ok(function);
            }
        }
        anyhow::bail!("there is no file system device {tag}")
    }

    /// Where all the other virtio devices have their registers, as the kernel has placed them.
    pub fn registers_of_others(&self) -> Result<Vec<u32>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(DEVICES)? {
            let path = entry?.path();
            let other = Self::open(path)?;
            if other.path != self.path && other.read(0)? & 0xffff == 0x1af4 {
                found.push(other.read(0x10)? & !15);
            }
        }
        Ok(found)
    }

    fn open(path: PathBuf) -> Result<Self> {
        let file = path.join("config");
        let configuration = OpenOptions::new().read(true).write(true).open(file)?;
        Ok(Self { path, configuration })
    }

    /// A dword of configuration space.
    pub fn read(&self, at: u64) -> Result<u32> {
        let mut bytes = [0; 4];
        self.configuration.read_exact_at(&mut bytes, at)?;
        Ok(u32::from_le_bytes(bytes))
    }

    pub fn write(&self, at: u64, value: u32) -> Result<()> {
        self.put(at, &value.to_le_bytes())
    }

    /// 1, 2 or 4 bytes.
    pub fn put(&self, at: u64, bytes: &[u8]) -> Result<()> {
        Ok(self.configuration.write_all_at(bytes, at)?)
    }

    /// The virtio capability of a kind: where it is, and where its structure is in BAR 0.
    pub fn structure(&self, kind: u8) -> Result<(u64, u64)> {
        let mut at = u64::from(self.read(0x34)? & 0xff);
        while at != 0 {
            let head = self.read(at)?.to_le_bytes();
            if head[0] == 9 && head[3] == kind {
                return Ok((at, self.read(at + 8)?.into()));
            }
            at = head[1].into();
        }
        anyhow::bail!("no capability {kind}")
    }

    /// The MSI-X capability.
    pub fn msix(&self) -> Result<u64> {
        let mut at = u64::from(self.read(0x34)? & 0xff);
        while self.read(at)? & 0xff != 0x11 {
            at = u64::from(self.read(at)? >> 8 & 0xff);
            ensure!(at != 0, "no MSI-X");
        }
        Ok(at)
    }

    /// The device's configuration, through the capability that is a second way to the registers.
    fn tag(&self) -> Result<String> {
        let (door, offset) = (self.structure(5)?.0, self.structure(4)?.1);
        let mut tag = Vec::new();
        for word in 0..9 {
            self.put(door + 4, &[0])?;
            self.write(door + 8, (offset + 4 * word) as u32)?;
            self.write(door + 12, 4)?;
            tag.extend(self.read(door + 16)?.to_le_bytes());
        }
        tag.retain(|byte| *byte != 0);
        Ok(String::from_utf8_lossy(&tag).into())
    }

    /// Takes the device away from its driver.
    pub fn unbind(&self) -> Result<()> {
        let name = self.path.file_name().context("a name")?;
        fs::write(self.path.join("driver/unbind"), name.as_encoded_bytes()).context("unbind")
    }

    /// Gives it to the driver again.
    pub fn bind(&self) -> Result<()> {
        let name = self.path.file_name().context("a name")?;
        fs::write("/sys/bus/pci/drivers/virtio-pci/bind", name.as_encoded_bytes()).context("bind")
    }

    /// The registers of BAR 0.
    pub fn registers(&self) -> Result<Bytes> {
        map(&self.path.join("resource0"), 0, BAR_SIZE)
    }

    /// The start of its window, BAR 4.
    pub fn window(&self) -> Result<Bytes> {
        map(&self.path.join("resource4"), 0, BAR_SIZE)
    }
}

/// Maps part of a file that is memory of the machine.
pub fn map(path: &Path, offset: u64, len: usize) -> Result<Bytes> {
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: new memory where the kernel likes; what a device does to it is what this program is for.
    let start = unsafe { mmap(std::ptr::null_mut(), len, access, MapFlags::SHARED, &file, offset) };
    let start = start.with_context(|| format!("mmap of {}", path.display()))?;
    Ok(Bytes { start: start.cast(), len })
}
