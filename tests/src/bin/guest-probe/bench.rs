//! Reads of one file, timed, as standard input asks.
#![expect(unsafe_code, reason = "memory-mapped files")]

use std::fs::{self, File};
use std::io::BufRead;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use integration::Random;
use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous};

const PAGE: usize = 4096;
/// What the guest kernel maps at a time.
const RANGE: usize = 2 << 20;

/// A read-only mapping at an address that allows large pages. Stays until the process ends.
struct Mapping {
    start: *const u8,
    length: usize,
}

impl Mapping {
    fn new(file: &File, length: usize) -> Result<Self> {
        let none = ProtFlags::empty();
        // SAFETY: the kernel chooses an address at which nothing else is.
        let reserved = unsafe {
            mmap_anonymous(std::ptr::null_mut(), length + RANGE, none, MapFlags::PRIVATE)?
        };
        let skip = reserved.cast::<u8>().align_offset(RANGE);
        let start = reserved.cast::<u8>().wrapping_add(skip);
        let flags = MapFlags::SHARED | MapFlags::FIXED;
        // SAFETY: replaces a part of the reservation above, of which nothing else knows.
        unsafe { mmap(start.cast(), length, ProtFlags::READ, flags, file, 0)? };
        Ok(Self { start, length })
    }

    fn touch(&self, page: usize) -> Result<u64> {
        let at = page * PAGE;
        ensure!(at < self.length, "page {page} is behind the end");
        // SAFETY: inside the mapping, which nobody unmaps.
        Ok(unsafe { self.start.wrapping_add(at).read_volatile() }.into())
    }
}

/// Numbers below `end` in a random order, each once.
fn shuffled(end: usize, seed: u64) -> Vec<usize> {
    let mut random = Random::new(seed);
    let mut numbers: Vec<usize> = (0..end).collect();
    for at in (1..end).rev() {
        numbers.swap(at, random.below(at as u64 + 1) as usize);
    }
    numbers
}

fn timed(work: impl FnOnce() -> Result<u64>) -> Result<(Duration, u64)> {
    let start = Instant::now();
    let sum = work()?;
    Ok((start.elapsed(), sum))
}

fn read(files: &[File], pages: &[(usize, u64)]) -> Result<u64> {
    let mut buffer = [0; PAGE];
    let mut sum = 0u64;
    for (file, page) in pages {
        files[*file].read_exact_at(&mut buffer, page * PAGE as u64)?;
        sum = sum.wrapping_add(buffer[0].into());
    }
    Ok(sum)
}

fn meminfo(name: &str) -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.context("no such line")?.trim().trim_end_matches(" kB");
    Ok(number.parse()?)
}

/// Answers one line with one line, which begins with the time it took in nanoseconds and the sum of what was
/// seen:
///
/// - `use FILE`: no time; what follows is about this file, first the first;
/// - `touch FROM COUNT`: the pages from FROM on, in order, through a mapping;
/// - `ranges FROM TO SEED`: all pages of these ranges of 2 MiB, one range after the other in a random order;
/// - `scatter FROM TO SEED [SKIP COUNT]`: one page of each of these ranges, in a random order; only COUNT of them,
///   after the first SKIP;
/// - `read COUNT SEED`: random pages of all files, as long as the first, by pread(2);
/// - `again PAGES COUNT SEED`: the same of the first PAGES pages of the file;
/// - `stream`: the file from one end to the other, 128 KiB at a time, by pread(2);
/// - `missing COUNT`: so many looks for a name that is not there, beside the first file;
/// - `spin MILLISECONDS`: nothing, for so long;
/// - `memory`: not a time, but MemTotal, MemFree and Cached in KiB.
pub fn serve(paths: &[&str]) -> Result<()> {
    let open = |path: &&str| File::open(Path::new(path)).with_context(|| path.to_string());
    let files: Vec<File> = paths.iter().map(open).collect::<Result<_>>()?;
    let map = |file: &File| Mapping::new(file, usize::try_from(file.metadata()?.len())?);
    let mappings: Vec<Mapping> = files.iter().map(map).collect::<Result<_>>()?;
    let mut which = 0;
    let (mut file, mut mapping) = (files.first().context("a file")?, &mappings[0]);
    let pages = (mapping.length / PAGE) as u64;
    println!("open {}", mapping.length);
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let number = |at: usize| -> Result<u64> {
            words.get(at).context("a number is missing")?.parse().context("a number")
        };
        let sum_of = |pages: &mut dyn Iterator<Item = usize>| -> Result<u64> {
            let mut sum = 0u64;
            for page in pages {
                sum = sum.wrapping_add(mapping.touch(page)?);
            }
            Ok(sum)
        };
        let in_range = RANGE / PAGE;
        let ranges = || -> Result<Vec<usize>> {
            let (from, to) = (number(1)? as usize, number(2)? as usize);
            ensure!(from <= to, "{from} to {to}");
            Ok(shuffled(to - from, number(3)?).into_iter().map(|range| from + range).collect())
        };
        let (time, sum) = match words[..] {
            ["touch", ..] => {
                let (from, count) = (number(1)? as usize, number(2)? as usize);
                timed(|| sum_of(&mut (from..from + count)))?
            }
            ["ranges", ..] => {
                let order = ranges()?;
                let pages = |range: usize| range * in_range..(range + 1) * in_range;
                timed(|| sum_of(&mut order.into_iter().flat_map(pages)))?
            }
            ["scatter", ..] => {
                let order = ranges()?;
                let mut random = Random::new(number(3)? + 1);
                let (skip, count) = match words.len() {
                    4 => (0, order.len()),
                    _ => (number(4)? as usize, number(5)? as usize),
                };
                let pages: Vec<usize> = order
                    .into_iter()
                    .map(|range| range * in_range + random.below(in_range as u64) as usize)
                    .collect();
                timed(|| sum_of(&mut pages.into_iter().skip(skip).take(count)))?
            }
            ["read", ..] => {
                let mut random = Random::new(number(2)?);
                let one = |_| (random.below(files.len() as u64) as usize, random.below(pages));
                let order: Vec<_> = (0..number(1)?).map(one).collect();
                timed(|| read(&files, &order))?
            }
            ["again", ..] => {
                let (most, mut random) = (number(1)?, Random::new(number(3)?));
                let order: Vec<_> = (0..number(2)?).map(|_| (which, random.below(most))).collect();
                timed(|| read(&files, &order))?
            }
            ["stream"] => timed(|| {
                let mut buffer = vec![0; 128 << 10];
                let (mut at, mut sum) = (0, 0u64);
                loop {
                    let count = file.read_at(&mut buffer, at)?;
                    if count == 0 {
                        return Ok(sum);
                    }
                    at += count as u64;
                    sum = sum.wrapping_add(buffer[0].into());
                }
            })?,
            ["missing", _] => {
                let name = Path::new(paths[0]).with_file_name("not-there");
                let count = number(1)?;
                timed(|| {
                    Ok((0..count).filter(|_| fs::symlink_metadata(&name).is_ok()).count() as u64)
                })?
            }
            ["spin", _] => {
                let limit = Duration::from_millis(number(1)?);
                timed(|| {
                    let (start, mut turns) = (Instant::now(), 0);
                    while start.elapsed() < limit {
                        turns += 1;
                    }
                    Ok(turns)
                })?
            }
            ["use", _] => {
                which = number(1)? as usize;
                file = files.get(which).context("no such file")?;
                mapping = &mappings[which];
                println!("done");
                continue;
            }
            ["memory"] => {
                let value = |name| meminfo(name);
                println!("{} {} {}", value("MemTotal")?, value("MemFree")?, value("Cached")?);
                continue;
            }
            _ => bail!("{line:?}"),
        };
        println!("{} {sum}", time.as_nanos());
    }
    Ok(())
}
