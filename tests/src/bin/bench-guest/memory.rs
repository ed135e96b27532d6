//! Files and memory, touched page by page.
#![expect(unsafe_code, reason = "memory-mapped files")]

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use integration::Random;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};

use super::{Count, repeat};

const PAGE: usize = 4096;
/// How many are touched between looks at the clock.
const BATCH: u64 = 256;

/// Readable memory, unmapped at its end.
struct Mapping {
    start: *mut std::ffi::c_void,
    length: usize,
}

impl Mapping {
    fn of(file: &File) -> Result<Self> {
        let length = usize::try_from(file.metadata()?.len())?;
        ensure!(length >= PAGE, "an empty file");
        // SAFETY: the kernel chooses an address at which nothing else is.
        let start = unsafe {
            mmap(std::ptr::null_mut(), length, ProtFlags::READ, MapFlags::SHARED, file, 0)?
        };
        Ok(Self { start, length })
    }

    fn anonymous(length: usize) -> Result<Self> {
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an address at which nothing else is.
        let start =
            unsafe { mmap_anonymous(std::ptr::null_mut(), length, access, MapFlags::PRIVATE)? };
        let mapping = Self { start, length };
        for page in 0..length / PAGE {
            // SAFETY: inside the mapping, which is writable and nobody else's.
            unsafe { mapping.at(page).write_volatile(1) };
        }
        Ok(mapping)
    }

    fn at(&self, page: usize) -> *mut u8 {
        self.start.cast::<u8>().wrapping_add(page % (self.length / PAGE) * PAGE)
    }

    fn touch(&self, page: usize) -> u8 {
        // SAFETY: `at` stays inside the mapping.
        unsafe { self.at(page).read_volatile() }
    }

    fn in_order(&self) -> Count {
        let start = Instant::now();
        let pages = self.length / PAGE;
        for page in 0..pages {
            std::hint::black_box(self.touch(page));
        }
        (pages as u64, start.elapsed())
    }

    fn at_random(&self, limit: Duration) -> Result<Count> {
        let mut random = Random::new(1);
        let pages = (self.length / PAGE) as u64;
        let (batches, time) = repeat(limit, |_| {
            for _ in 0..BATCH {
                std::hint::black_box(self.touch(random.below(pages) as usize));
            }
            Ok(true)
        })?;
        Ok((batches * BATCH, time))
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: what was mapped, and no reference into it is left.
        let _ = unsafe { munmap(self.start, self.length) };
    }
}

pub(crate) fn first_touch(path: &Path) -> Result<Count> {
    Ok(Mapping::of(&File::open(path)?)?.in_order())
}

pub(crate) fn second_touch(path: &Path, limit: Duration) -> Result<Count> {
    let mapping = Mapping::of(&File::open(path)?)?;
    mapping.in_order();
    mapping.at_random(limit)
}

pub(crate) fn touch_memory(mebibytes: usize, limit: Duration) -> Result<Count> {
    Mapping::anonymous(mebibytes << 20)?.at_random(limit)
}
