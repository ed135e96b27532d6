//! Kernel images: an ELF `vmlinux` or a `bzImage`, entered by the 64-bit boot protocol
//! (`Documentation/arch/x86/boot.rst`).

use std::io::{Cursor, Read, Seek};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use devices::memory::GuestMemory;
use linux_loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{Cmdline, KernelLoader, load_cmdline};
use vm_memory::{GuestAddress, GuestMemory as _, GuestMemoryRegion, ReadVolatile};

use super::contents::{Contents, from_its_beginning};
use super::unpack::payload;
use crate::machine::layout;

const ELF_MAGIC: &[u8] = b"\x7fELF";
const ELF_CLASS_64: u8 = 2;
const ELF_MACHINE_X86_64: u16 = 62;
/// Offsets of `e_phoff` and `e_phnum` in the file, of `p_vaddr` in a program header, and its size.
const ELF_PROGRAM_HEADERS: usize = 32;
const ELF_PROGRAM_HEADER_COUNT: usize = 56;
const ELF_SEGMENT_ADDRESS: usize = 16;
const ELF_PROGRAM_HEADER_SIZE: u64 = 56;
const ELF_SEGMENT_LOAD: u32 = 1;
/// Virtual addresses from here on are the kernel's.
const KERNEL_HALF: u64 = 1 << 63;

/// `setup_header` fields, as offsets in a bzImage.
const HEADER_MAGIC_OFFSET: usize = 0x202;
const HEADER_MAGIC: &[u8] = b"HdrS";
const VERSION_OFFSET: usize = 0x206;
const XLOADFLAGS_OFFSET: usize = 0x236;
/// The kernel has a 64-bit entry point at 0x200.
const XLF_KERNEL_64: u16 = 1;
/// Boot protocol 2.12, the first with `xloadflags`.
const VERSION_XLOADFLAGS: u16 = 0x20c;
/// The 64-bit entry point of a bzImage, from where it was loaded.
const BZIMAGE_ENTRY_64: u64 = 0x200;

const BOOT_FLAG: u16 = 0xaa55;
/// `type_of_loader` of a loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// Longest command line of an x86 kernel, its NUL included (`COMMAND_LINE_SIZE`).
const CMDLINE_MAX: usize = 2048;
const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;
const PAGE: u64 = 4096;

/// A file that is a kernel of ours.
pub struct KernelFile {
    /// Where it came from.
    pub path: PathBuf,
    /// What is in it.
    pub format: Format,
    /// The whole file.
    pub contents: Contents,
}

/// Kind of kernel file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// An uncompressed ELF kernel.
    Vmlinux,
    /// A kernel that unpacks itself.
    BzImage,
}

impl KernelFile {
    /// Opens `path` and makes sure that it is a kernel for x86-64.
    ///
    /// # Errors
    ///
    /// One line that says what it is not.
    pub fn open(path: &Path) -> Result<Self> {
        let name = path.display();
        let read = || format!("cannot read the kernel {name}");
        let contents = Contents::open(path).with_context(read)?;
        let head = contents.head().with_context(read)?;
        let format = Self::detect(&head, contents.len()).with_context(|| {
            format!("{name} is no kernel for this machine; name a vmlinux or a bzImage for x86-64")
        })?;
        drop(head);
        Ok(Self { path: path.into(), format, contents })
    }

    /// What kind of kernel a file of `size` bytes is that begins with `head`.
    ///
    /// # Errors
    ///
    /// What is missing.
    pub fn detect(head: &[u8], size: u64) -> Result<Format> {
        let word = |at: usize| Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?));
        if head.starts_with(ELF_MAGIC) {
            ensure!(head.get(4) == Some(&ELF_CLASS_64), "it is a 32-bit ELF file");
            ensure!(
                word(18) == Some(ELF_MACHINE_X86_64),
                "it is an ELF file for another processor"
            );
            ensure!(has_kernel_segment(head), "it is an ELF file, but a program and no kernel");
            return Ok(Format::Vmlinux);
        }
        let magic = head.get(HEADER_MAGIC_OFFSET..HEADER_MAGIC_OFFSET + HEADER_MAGIC.len());
        if magic != Some(HEADER_MAGIC) {
            bail!("it is neither an ELF file nor a bzImage");
        }
        let flags = word(XLOADFLAGS_OFFSET).unwrap_or(0);
        let has_flags = word(VERSION_OFFSET).is_some_and(|version| version >= VERSION_XLOADFLAGS);
        ensure!(has_flags && flags & XLF_KERNEL_64 != 0, "it is a bzImage without a 64-bit entry");
        let end = payload(head).map(|payload| payload.end as u64);
        ensure!(end.is_some_and(|end| end <= size), "it is a bzImage whose end is missing");
        Ok(Format::BzImage)
    }
}

/// Whether an ELF file that begins with `bytes` has something to load in the kernel's half of the address space.
fn has_kernel_segment(bytes: &[u8]) -> bool {
    let field = |at: usize| {
        let bytes = bytes.get(at..at.checked_add(8)?)?;
        Some(u64::from_le_bytes(bytes.try_into().ok()?))
    };
    let header = |index: u64| {
        let table = field(ELF_PROGRAM_HEADERS)?;
        let at = table.checked_add(index * ELF_PROGRAM_HEADER_SIZE)?;
        let at = usize::try_from(at).ok()?;
        Some((field(at)? as u32, field(at.checked_add(ELF_SEGMENT_ADDRESS)?)?))
    };
    let count = field(ELF_PROGRAM_HEADER_COUNT).map_or(0, |word| word & 0xffff);
    (0..count)
        .filter_map(header)
        .any(|(kind, address)| kind == ELF_SEGMENT_LOAD && address >= KERNEL_HALF)
}

/// Everything that is in guest memory when the guest starts.
pub struct BootImage {
    /// The kernel.
    pub kernel: KernelFile,
    /// The archives that the initial RAM file system is made of, one after the other; there may be none.
    pub initrd: Vec<Contents>,
    /// The kernel command line.
    pub cmdline: String,
}

impl BootImage {
    /// Puts kernel, initrd, command line and zero page into `memory` and returns the entry point. `acpi` is
    /// the address of the ACPI root pointer.
    ///
    /// # Errors
    ///
    /// When something does not fit, with the option that helps.
    pub fn load(&self, memory: &GuestMemory, acpi: u64) -> Result<u64> {
        let (entry, end, mut header) = match &self.kernel.contents {
            Contents::File(file, _) => {
                let mut file = from_its_beginning(file).context("kernel")?;
                self.load_kernel(memory, &mut file)
            }
            Contents::Bytes(bytes) => self.load_kernel(memory, &mut Cursor::new(bytes)),
        }?;
        header.boot_flag = BOOT_FLAG;
        header.header = u32::from_le_bytes(*b"HdrS");
        header.type_of_loader = LOADER_UNDEFINED;
        if header.kernel_alignment == 0 {
            header.kernel_alignment = layout::KERNEL as u32;
        }
        let initrd = self.load_initrd(memory, end)?;
        header.ramdisk_image = initrd as u32;
        header.ramdisk_size = self.initrd_size() as u32;
        header.cmd_line_ptr = layout::CMDLINE as u32;
        header.cmdline_size = self.load_cmdline(memory)? as u32;
        let mut zero_page = boot_params { hdr: header, acpi_rsdp_addr: acpi, ..Default::default() };
        add_memory_map(memory, &mut zero_page)?;
        let parameters = BootParams::new(&zero_page, GuestAddress(layout::ZERO_PAGE));
        LinuxBootConfigurator::write_bootparams(&parameters, memory).context("zero page")?;
        Ok(entry)
    }

    /// Entry point, where free memory begins, and what the kernel says of itself.
    fn load_kernel<F: Read + ReadVolatile + Seek>(
        &self,
        memory: &GuestMemory,
        file: &mut F,
    ) -> Result<(u64, u64, setup_header)> {
        let name = self.kernel.path.display();
        Ok(match self.kernel.format {
            Format::Vmlinux => {
                let high = Some(GuestAddress(layout::HIGH_MEMORY));
                let loaded = Elf::load(memory, None, file, high)
                    .map_err(|error| load_error(&name, &error))?;
                (loaded.kernel_load.0, loaded.kernel_end, setup_header::default())
            }
            Format::BzImage => {
                let at = Some(GuestAddress(layout::KERNEL));
                let loaded = BzImage::load(memory, at, file, None)
                    .map_err(|error| load_error(&name, &error))?;
                let header = loaded.setup_header.context("bzImage without a header")?;
                // It unpacks itself in place and needs more room than the file.
                let end = layout::KERNEL + u64::from(header.init_size);
                (layout::KERNEL + BZIMAGE_ENTRY_64, end.max(loaded.kernel_end), header)
            }
        })
    }

    fn initrd_size(&self) -> u64 {
        self.initrd.iter().map(Contents::len).fold(0, u64::saturating_add)
    }

    /// At the end of the RAM below the hole, where the kernel never is.
    fn load_initrd(&self, memory: &GuestMemory, kernel_end: u64) -> Result<u64> {
        let size = self.initrd_size();
        if size == 0 {
            return Ok(0);
        }
        let low_ram = memory.iter().next().map_or(0, |region| region.len());
        let address = low_ram.checked_sub(size.saturating_add(layout::REGION_TAIL));
        let address = address.map(|address| address & !(PAGE - 1));
        let address = address.filter(|address| *address >= kernel_end).with_context(|| {
            format!(
                "--memory: {} MiB do not hold the kernel and an initrd of {} MiB; give more",
                low_ram >> 20,
                (size >> 20) + 1
            )
        })?;
        let mut at = address;
        for contents in &self.initrd {
            contents.load(memory, GuestAddress(at)).context("initrd")?;
            at += contents.len();
        }
        Ok(address)
    }

    fn load_cmdline(&self, memory: &GuestMemory) -> Result<usize> {
        let mut line = Cmdline::new(CMDLINE_MAX).context("command line")?;
        line.insert_str(&self.cmdline).with_context(|| {
            format!("--cmdline: the kernel takes {CMDLINE_MAX} printable ASCII characters at most")
        })?;
        load_cmdline(memory, GuestAddress(layout::CMDLINE), &line).context("command line")?;
        Ok(self.cmdline.len())
    }
}

fn load_error(name: &dyn std::fmt::Display, error: &linux_loader::loader::Error) -> anyhow::Error {
    anyhow::anyhow!(
        "--kernel {name}: it cannot be loaded ({error}); give --memory more, or name another kernel"
    )
}

/// The e820 map: RAM region by region, without the PC's holes and the last page of each.
fn add_memory_map(memory: &GuestMemory, zero_page: &mut boot_params) -> Result<()> {
    let mut entries = Vec::new();
    let mut add = |start: u64, end: u64, kind| {
        if end > start {
            entries.push(boot_e820_entry { addr: start, size: end - start, type_: kind });
        }
    };
    for region in memory.iter() {
        // A window is no RAM, and is not there yet in any case.
        let (start, end) = (region.start_addr().0, region.start_addr().0 + region.len());
        let usable_end = end - layout::REGION_TAIL;
        if start == 0 {
            add(0, layout::LOW_MEMORY_END, E820_RAM);
            add(layout::LOW_MEMORY_END, layout::HIGH_MEMORY, E820_RESERVED);
            add(layout::HIGH_MEMORY, usable_end, E820_RAM);
        } else {
            add(start, usable_end, E820_RAM);
        }
        add(usable_end, end, E820_RESERVED);
    }
    // Linux trusts the MCFG table only for memory that is reserved.
    add(layout::ECAM.start, layout::ECAM.end, E820_RESERVED);
    ensure!(entries.len() <= zero_page.e820_table.len(), "too many memory regions");
    zero_page.e820_table[..entries.len()].copy_from_slice(&entries);
    zero_page.e820_entries = entries.len() as u8;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn detect(bytes: &[u8]) -> Result<Format> {
        KernelFile::detect(bytes, bytes.len() as u64)
    }

    fn bzimage(flags: u16) -> Vec<u8> {
        let mut bytes = vec![0; 0x1000];
        bytes[HEADER_MAGIC_OFFSET..][..4].copy_from_slice(HEADER_MAGIC);
        bytes[VERSION_OFFSET..][..2].copy_from_slice(&0x20fu16.to_le_bytes());
        bytes[XLOADFLAGS_OFFSET..][..2].copy_from_slice(&flags.to_le_bytes());
        bytes
    }

    #[test]
    fn kernels_are_told_from_other_files() {
        assert_eq!(detect(&bzimage(1)).unwrap(), Format::BzImage);
        assert!(detect(&bzimage(0)).is_err());
        assert!(detect(&bzimage(1)[..0x800]).is_err(), "cut off");
        assert!(detect(b"#!/bin/sh\n").is_err());
        assert!(detect(b"").is_err());
        let mut elf = vec![0; 64 + 56];
        elf[..5].copy_from_slice(b"\x7fELF\x02");
        assert!(detect(&elf).is_err());
        elf[18] = 62;
        elf[32] = 64; // e_phoff
        elf[56] = 1; // e_phnum
        elf[64] = 1; // PT_LOAD
        elf[64 + 18] = 0x40; // p_vaddr: 0x400000, a program's
        assert!(detect(&elf).is_err());
        elf[56] = 0xff; // more headers than there are
        assert!(detect(&elf).is_err());
        elf[64 + 16..64 + 24].copy_from_slice(&0xffff_ffff_8100_0000u64.to_le_bytes());
        assert_eq!(detect(&elf).unwrap(), Format::Vmlinux);
    }

    #[test]
    fn a_kernel_that_lies_about_its_size_is_refused() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap();
        let mut bytes = bzimage(1);
        bytes[0x211] = 1; // loadflags: LOADED_HIGH
        bytes[0x1f1] = 200; // setup_sects: more than the file
        let kernel = KernelFile {
            path: "k".into(),
            format: Format::BzImage,
            contents: Contents::Bytes(bytes),
        };
        let image = BootImage { kernel, initrd: Vec::new(), cmdline: String::new() };
        assert!(image.load(&memory, 0).is_err());
    }

    #[test]
    fn an_initrd_that_does_not_fit_names_the_option() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 32 << 20)]).unwrap();
        let kernel = KernelFile {
            path: "k".into(),
            format: Format::Vmlinux,
            contents: Contents::Bytes(Vec::new()),
        };
        let image = BootImage {
            kernel,
            initrd: vec![Contents::Bytes(vec![0; 31 << 20])],
            cmdline: String::new(),
        };
        let error = image.load_initrd(&memory, 2 << 20).unwrap_err();
        assert!(error.to_string().contains("--memory"), "{error}");
        assert_eq!(image.load_initrd(&memory, 0).unwrap() % PAGE, 0);
    }
}
