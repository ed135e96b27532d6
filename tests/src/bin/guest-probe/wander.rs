//! Random reads of a mapped file that say when a page is not what it should be.
#![expect(unsafe_code, reason = "a memory-mapped file")]

use std::fs::File;
use std::io::{BufRead, BufWriter, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::{Context, Result, bail, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap};

const PAGE: u64 = 4096;
const WORDS: u64 = PAGE / 8;

/// The word at a place of a file, in words: one that no other place has (the finalizer of splitmix64).
fn word(place: u64) -> u64 {
    let mut value = place.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    value = (value ^ value >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ value >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ value >> 31
}

/// Makes a file for [`wander`] of a size in bytes.
pub fn write(size: &str, path: &Path) -> Result<()> {
    let size: u64 = size.parse().context("a size")?;
    let mut file = BufWriter::new(File::create(path)?);
    for place in 0..size / 8 {
        file.write_all(&word(place).to_le_bytes())?;
    }
    Ok(file.flush()?)
}

#[derive(Default)]
struct Counts {
    pages: AtomicU64,
    wrong: AtomicU64,
}

/// Reads whole pages of the file at random places, over and over, on a thread. To each line of standard input
/// it says how many pages it has read up to then and how many of them were wrong; ends with standard input.
pub fn wander(path: &Path) -> Result<()> {
    let file = File::open(path)?;
    let len = file.metadata()?.len();
    ensure!(len >= PAGE && len.is_multiple_of(PAGE), "{len} bytes are no pages");
    // SAFETY: the kernel chooses an address at which nothing else is. Nobody unmaps it.
    let start = unsafe {
        mmap(
            std::ptr::null_mut(),
            usize::try_from(len)?,
            ProtFlags::READ,
            MapFlags::SHARED,
            &file,
            0,
        )?
    };
    let start = start.expose_provenance();
    let counts: &'static Counts = Box::leak(Box::default());
    std::thread::spawn(move || {
        let words = std::ptr::with_exposed_provenance::<u64>(start);
        for round in 0.. {
            let page = word(round) % (len / PAGE);
            let mut wrong = false;
            for place in page * WORDS..(page + 1) * WORDS {
                // SAFETY: inside the mapping, which is aligned. Volatile: others may change it.
                let found = unsafe { words.wrapping_add(place as usize).read_volatile() };
                wrong |= found != word(place);
            }
            counts.pages.fetch_add(1, Relaxed);
            counts.wrong.fetch_add(wrong.into(), Relaxed);
        }
    });
    for line in std::io::stdin().lock().lines() {
        match line?.as_str() {
            "say" => println!(
                "pages={} wrong={}",
                counts.pages.load(Relaxed),
                counts.wrong.load(Relaxed)
            ),
            other => bail!("{other:?}"),
        }
    }
    Ok(())
}
