//! Message passing through one shared page-cache page: two programs that map one file, wherever they run.
#![expect(unsafe_code, reason = "memory-mapped files")]

use std::fs::OpenOptions;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::mm::{MapFlags, ProtFlags, mmap};

/// Bytes of the file: flags and messages of both sides, each on a page of its own.
pub const SIZE: usize = 4 * 4096;
/// Words of a message, spread over its page: a line each.
const WORDS: usize = 8;
const LINE: usize = 64;
/// Looks at the flag before the processor is offered to somebody else.
const LOOKS: u32 = 2000;
/// How long the other side may be silent.
const PATIENCE: Duration = Duration::from_secs(120);

struct Shared(*mut u8);

impl Shared {
    fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at + 8 <= SIZE && at.is_multiple_of(8));
        // SAFETY: inside the mapping, which is there until the process ends, and aligned. Everybody who
        // changes it does so by atomic stores of words, as far as this machine is concerned.
        unsafe { &*self.0.wrapping_add(at).cast::<AtomicU64>() }
    }

    fn flag(&self, side: usize) -> &AtomicU64 {
        self.word(side * 4096)
    }

    fn message(&self, side: usize, word: usize) -> &AtomicU64 {
        self.word((2 + side) * 4096 + word * LINE)
    }
}

/// What word `word` of message `round` of a side is.
fn expected(side: usize, round: u64, word: usize) -> u64 {
    round.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ ((side as u64) << 8 | word as u64)
}

fn wait(flag: &AtomicU64, round: u64) -> Result<()> {
    let mut since = None;
    loop {
        for _ in 0..LOOKS {
            match flag.load(Ordering::Acquire) {
                found if found == round => return Ok(()),
                // The flag of the round before, or of nobody yet.
                found if found < round => {}
                found => bail!("round {found} came before round {round}"),
            }
            std::hint::spin_loop();
        }
        let since = since.get_or_insert_with(Instant::now);
        ensure!(since.elapsed() < PATIENCE, "nobody answered round {round}");
        rustix::thread::sched_yield();
    }
}

/// Waits for a message and says how many of its words are not what they should be.
fn receive(shared: &Shared, from: usize, round: u64) -> Result<u64> {
    wait(shared.flag(from), round)?;
    let is_wrong = |word: &usize| {
        shared.message(from, *word).load(Ordering::Relaxed) != expected(from, round, *word)
    };
    Ok((0..WORDS).filter(is_wrong).count() as u64)
}

/// Plays `side` (0 begins, 1 answers) for so many rounds: writes the words of a message and then its flag,
/// waits for the other's flag and looks at all words of its message. Words that are not the message's are
/// counted: there must be none.
pub fn play(path: &Path, side: usize, from: u64, rounds: u64) -> Result<()> {
    ensure!(side < 2, "side 0 or 1");
    let file = OpenOptions::new().read(true).write(true).open(path)?;
    let access = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: the kernel chooses an address at which nothing else is.
    let start = unsafe { mmap(std::ptr::null_mut(), SIZE, access, MapFlags::SHARED, &file, 0) };
    let shared = Shared(start.context("mmap")?.cast());
    let other = 1 - side;
    println!("ready");
    let begun = Instant::now();
    let mut wrong = 0u64;
    for round in from + 1..=from + rounds {
        if side == 1 {
            wrong += receive(&shared, other, round)?;
        }
        for word in 0..WORDS {
            shared.message(side, word).store(expected(side, round, word), Ordering::Relaxed);
        }
        shared.flag(side).store(round, Ordering::Release);
        if side == 0 {
            wrong += receive(&shared, other, round)?;
        }
    }
    let last = from + rounds;
    println!("rounds={last} wrong={wrong} nanoseconds={}", begun.elapsed().as_nanos());
    Ok(())
}

/// Says which rounds each side has reached, and whether its last message is whole.
pub fn look(path: &Path) -> Result<()> {
    let bytes = std::fs::read(path)?;
    ensure!(bytes.len() == SIZE, "{} bytes", bytes.len());
    let word = |at: usize| -> Result<u64> {
        let bytes = bytes.get(at..at + 8).context("a word")?;
        Ok(u64::from_ne_bytes(bytes.try_into()?))
    };
    for side in 0..2 {
        let round = word(side * 4096)?;
        let mut whole = true;
        for number in 0..WORDS {
            whole &= word((2 + side) * 4096 + number * LINE)? == expected(side, round, number);
        }
        println!("side{side}={round} whole{side}={whole}");
    }
    Ok(())
}
