//! A writer of logs, who says of each entry when it is on the disk.
#![expect(unsafe_code, reason = "a memory-mapped file")]

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::Result;
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync};

/// Bytes of an entry, and entries of the mapped log, which has them in a circle.
const ENTRY: usize = 64;
const MAPPED: usize = 4096;

fn entry(number: u64) -> [u8; ENTRY] {
    let mut entry = [b'.'; ENTRY];
    let text = format!("{number:020} {:016x}\n", number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let (text, end) = (text.as_bytes(), ENTRY - 1);
    entry[..text.len()].copy_from_slice(text);
    entry[end] = b'\n';
    entry
}

/// Writes entries from number `from` on without end: each to `log` by pwrite(2) and fsync(2), to `log.mapped` by stores
/// and msync(2), and to a file of its own that gets its name by rename(2); then says `synced NUMBER.`.
pub fn write(directory: &Path, from: u64) -> Result<()> {
    let open = |name: &str| {
        OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(directory.join(name))
    };
    let (log, mapped) = (open("log")?, open("log.mapped")?);
    let length = ENTRY * MAPPED;
    mapped.set_len(length as u64)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses an address at which nothing else is.
    let start =
        unsafe { mmap(std::ptr::null_mut(), length, access, MapFlags::SHARED, &mapped, 0)? };
    for number in from.. {
        let bytes = entry(number);
        log.write_all_at(&bytes, number * ENTRY as u64)?;
        log.sync_all()?;
        let place = number as usize % MAPPED * ENTRY;
        // SAFETY: inside the mapping, which stays until the process ends; nobody else looks at it here.
        unsafe {
            start.cast::<u8>().add(place).copy_from_nonoverlapping(bytes.as_ptr(), ENTRY);
            msync(start, length, MsyncFlags::SYNC)?;
        }
        let mut new = File::create(directory.join("newest.new"))?;
        new.write_all(&bytes)?;
        new.sync_all()?;
        std::fs::rename(directory.join("newest.new"), directory.join("newest"))?;
        println!("synced {number}.");
    }
    Ok(())
}

/// Fails unless all entries up to `last` are in the log, the last ones in the mapped one, and one at least as new in the
/// file with a name.
pub fn check(directory: &Path, last: u64) -> Result<()> {
    let number_of = |bytes: &[u8]| -> Option<u64> {
        std::str::from_utf8(bytes.get(..20)?).ok()?.trim().parse().ok()
    };
    let log = std::fs::read(directory.join("log"))?;
    let mapped = std::fs::read(directory.join("log.mapped"))?;
    for number in 0..=last {
        let at = number as usize * ENTRY;
        let found = log.get(at..at + ENTRY);
        anyhow::ensure!(
            found == Some(&entry(number)),
            "entry {number} of {last} is not in the log"
        );
        // A newer one may be there, but none that is half written and was synced.
        let place = number as usize % MAPPED * ENTRY;
        if number + MAPPED as u64 > last {
            let found = mapped.get(place..place + ENTRY).unwrap_or_default();
            let newer = number_of(found).filter(|newer| *newer > last);
            anyhow::ensure!(
                found == entry(number) || newer.is_some(),
                "entry {number} of {last} is not in the mapped log"
            );
        }
    }
    let newest = std::fs::read(directory.join("newest"))?;
    let found = number_of(&newest);
    anyhow::ensure!(
        found.is_some_and(|found| found >= last && newest == entry(found)),
        "the file with a name has {found:?}, and {last} was synced"
    );
    println!("entries={}", last + 1);
    Ok(())
}
