//! Guest RAM: what stands behind it on the host.

use std::ffi::CString;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use devices::memory::GuestMemory;
use rustix::fs::{FallocateFlags, MemfdFlags, Mode, OFlags};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use super::layout;

/// Size of a huge page of hugetlbfs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HugePage {
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl HugePage {
    /// In bytes.
    pub fn bytes(self) -> u64 {
        match self {
            Self::Size2M => 2 << 20,
            Self::Size1G => 1 << 30,
        }
    }
}

/// Where guest RAM comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Backend {
    /// Private anonymous memory.
    Anonymous,
    /// A memfd, which other processes can be given.
    Memfd,
    /// An unnamed file in this directory, or a new file of this name that is unlinked at once: nothing stays
    /// behind, however the process ends.
    File(PathBuf),
    /// A memfd of huge pages. The host must have reserved them.
    HugeTlb(HugePage),
}

/// How much RAM, and from where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryConfig {
    /// Bytes, a multiple of 2 MiB.
    pub size: u64,
    /// What stands behind it.
    pub backend: Backend,
}

/// Maps guest RAM. Nothing is touched: pages come as the guest uses them.
///
/// # Errors
///
/// The backend's, with what to do about it.
pub fn allocate(config: &MemoryConfig) -> Result<GuestMemory> {
    let file = match &config.backend {
        Backend::Anonymous => None,
        Backend::Memfd => Some(memfd(MemfdFlags::CLOEXEC)?),
        Backend::HugeTlb(page) => {
            let size = match page {
                HugePage::Size2M => MemfdFlags::HUGE_2MB,
                HugePage::Size1G => MemfdFlags::HUGE_1GB,
            };
            Some(memfd(MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | size)?)
        }
        Backend::File(path) => Some(unlinked_file(path)?),
    };
    if let Some(file) = &file {
        rustix::fs::ftruncate(file, config.size).with_context(|| explain(config))?;
        // A file system that is full would be found out at the first touch, by a signal.
        if let Backend::File(_) = config.backend {
            rustix::fs::fallocate(file, FallocateFlags::empty(), 0, config.size)
                .with_context(|| explain(config))?;
        }
    }
    let file = file.map(|fd| std::sync::Arc::new(File::from(fd)));
    let mut regions = Vec::new();
    let mut offset = 0;
    for range in layout::ram_ranges(config.size) {
        let len = range.end - range.start;
        let mut builder = MmapRegionBuilder::new(usize::try_from(len)?)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE);
        builder = match &file {
            None => builder
                .with_mmap_flags(libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE),
            // Huge pages are reserved here and not at the first touch, which would be a SIGBUS.
            Some(file) => builder
                .with_mmap_flags(libc::MAP_SHARED)
                .with_file_offset(FileOffset::from_arc(file.clone(), offset)),
        };
        let region = builder.build().with_context(|| explain(config))?;
        let region = GuestRegionMmap::new(region, GuestAddress(range.start))
            .context("guest RAM passes the end of the address space")?;
        regions.push(region);
        offset += len;
    }
    Ok(GuestMemory::from_regions(regions)?)
}

fn explain(config: &MemoryConfig) -> String {
    let mib = config.size >> 20;
    match &config.backend {
        Backend::HugeTlb(page) => {
            let (pages, name) = (config.size / page.bytes(), page.bytes() >> 10);
            format!(
                "--memory: the host has no {pages} free huge pages of {name} KiB; reserve them with \
                 `echo {pages} > /sys/kernel/mm/hugepages/hugepages-{name}kB/nr_hugepages`"
            )
        }
        Backend::File(path) => {
            format!("--memory: no {mib} MiB in {}; choose another backend=file:", path.display())
        }
        Backend::Anonymous | Backend::Memfd => {
            format!("--memory: the host does not give {mib} MiB; ask for less")
        }
    }
}

fn memfd(flags: MemfdFlags) -> Result<OwnedFd> {
    let name = CString::new("oriel-guest-ram")?;
    rustix::fs::memfd_create(name.as_c_str(), flags).context(
        "--memory: the host has no memory files of this kind; choose another backend= (anon works \
         everywhere)",
    )
}

fn unlinked_file(path: &Path) -> Result<OwnedFd> {
    let mode = Mode::RUSR | Mode::WUSR;
    let name = path.display();
    if path.is_dir() {
        let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
        return rustix::fs::open(path, flags, mode)
            .with_context(|| format!("--memory: cannot make a file in {name}"));
    }
    if path.exists() {
        bail!("--memory: {name} exists; name a directory (/dev/shm) or a file that does not exist");
    }
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, mode)
        .with_context(|| format!("--memory: cannot make the file {name}"))?;
    rustix::fs::unlink(path).with_context(|| format!("--memory: cannot unlink {name}"))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemory as _};

    use super::*;

    #[test]
    fn every_backend_gives_memory_around_the_hole_and_leaves_no_file() {
        let directory = tempfile::tempdir().unwrap();
        let backends = [
            Backend::Anonymous,
            Backend::Memfd,
            Backend::File(directory.path().into()),
            Backend::File(directory.path().join("ram")),
        ];
        for backend in backends {
            // A file is allocated in full, which a test shall not ask of a small /tmp.
            if let Backend::File(_) = backend {
                allocate(&MemoryConfig { size: 4 << 20, backend }).unwrap();
                continue;
            }
            let memory = allocate(&MemoryConfig { size: 4 << 30, backend }).unwrap();
            assert_eq!(memory.num_regions(), 2);
            memory.write_obj(1u8, GuestAddress(layout::HOLE_START - 1)).unwrap();
            memory.write_obj(2u8, GuestAddress(layout::HOLE_END)).unwrap();
            assert!(memory.write_obj(2u8, GuestAddress(layout::HOLE_START)).is_err());
            let last: u8 = memory.read_obj(GuestAddress(layout::HOLE_START - 1)).unwrap();
            assert_eq!(last, 1);
        }
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_existing_file_is_not_used_as_ram() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let backend = Backend::File(file.path().into());
        let error = allocate(&MemoryConfig { size: 2 << 20, backend }).unwrap_err();
        assert!(error.to_string().contains("exists"), "{error}");
    }
}
