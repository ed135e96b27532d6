//! Random reads of more data than the window holds, and warm reads of a file that fits.

use integration::{Bench, Tree};

use super::{Bars, undisturbed};

const MIB: usize = 1 << 20;
/// The window, and four times as much data.
const WINDOW: &str = "64M";
const DATA: usize = 256 * MIB;
const MANY: usize = 16;
/// Random reads of 4 KiB in one question: of data that is read for the first time, and of data that was read
/// before.
const COLD: usize = 64;
const WARM: usize = 1024;
/// Questions to each guest.
const ROUNDS: usize = 60;

const MODES: [(&str, &str); 3] = [
    ("dax=inode", "dax=inode,window="),
    ("dax=never", "dax=never"),
    ("dax=always", "dax=always,window="),
];
/// The guest that maps what does not fit, and by how much less it is asked: it takes so much longer.
const THRASHING: usize = 2;
const LESS: usize = 16;

fn guests(tree: &Tree, files: &[&str], window: &str) -> Vec<Bench> {
    let start = |(_, options): &(&str, &str)| {
        let size = if options.ends_with('=') { window } else { "" };
        Bench::start(&tree.at("/s", &format!("{options}{size}")), "/s", files, "640M")
    };
    MODES.iter().map(start).collect()
}

/// Asks all guests by turns for so many reads, and returns the microseconds of one read in each.
fn by_turns(
    guests: &mut [Bench],
    reads: [usize; MODES.len()],
    line: impl Fn(usize, usize) -> String,
) -> Vec<f64> {
    let mut times = vec![Vec::new(); guests.len()];
    for round in 0..ROUNDS {
        let mut order: Vec<usize> = (0..guests.len()).collect();
        order.rotate_left(round % guests.len());
        for which in order {
            let reads = reads[which];
            let took = guests[which].time(&line(reads, round)) as f64;
            times[which].push(took / reads as f64 / 1000.0);
        }
    }
    times.into_iter().map(undisturbed).collect()
}

fn head(what: &str) {
    println!("{what}, us a read:");
    print!("{:40}", "");
    MODES.iter().for_each(|(name, _)| print!(" {name:>16}"));
    println!();
}

fn row(name: &str, times: &[f64]) {
    print!("{name:40}");
    times.iter().for_each(|time| print!(" {time:16.1}"));
    println!();
}

fn data_of(tree: &Tree, name: &str, files: &[&str], bars: &mut Bars) {
    let mut guests = guests(tree, files, WINDOW);
    let read = |seed: usize| move |reads, round| format!("read {reads} {}", seed + round);
    let mut less = [COLD; MODES.len()];
    less[THRASHING] /= LESS;
    let cold = by_turns(&mut guests, less, read(1));
    row(&format!("{name}, for the first time"), &cold);
    for guest in &mut guests {
        for file in 0..files.len() {
            guest.guest().ask(&format!("use {file}"));
            guest.time("stream");
        }
    }
    let mut less = [WARM; MODES.len()];
    less[THRASHING] = COLD / LESS;
    let warm = by_turns(&mut guests, less, read(1000));
    row(&format!("{name}, all read before"), &warm);
    for (what, times) in [("for the first time", cold), ("all read before", warm)] {
        let what = format!("{name}, {what}: speed of dax=inode against dax=never");
        bars.at_least(&what, times[1] / times[0], 1.0);
    }
    for guest in guests {
        guest.end();
    }
}

pub fn random(bars: &mut Bars) {
    let size = DATA / MIB;
    head(&format!("Random reads of 4 KiB from {size} MiB through a window of {WINDOW}"));
    let tree = Tree::with_probe(&super::probe());
    tree.fill("one", DATA);
    data_of(&tree, "one file", &["one"], bars);
    drop(tree);
    let tree = Tree::with_probe(&super::probe());
    let names: Vec<String> = (0..MANY).map(|number| format!("file{number:02}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for name in &names {
        tree.fill(name, DATA / MANY);
    }
    data_of(&tree, &format!("{MANY} files"), &names, bars);
}

pub fn warm(bars: &mut Bars) {
    const PAGES: usize = 8 * MIB / 4096;
    const COUNT: usize = 2_000;
    let tree = Tree::with_probe(&super::probe());
    tree.fill("file", 8 * MIB);
    let mut guests = guests(&tree, &["file"], "64M");
    for guest in &mut guests {
        guest.time("stream");
        guest.time("stream");
    }
    let line = |count, round| format!("again {PAGES} {count} {}", round + 1);
    let times = by_turns(&mut guests, [COUNT; MODES.len()], line);
    head("4 KiB by pread(2) from a file of 8 MiB that was read before");
    row("", &times);
    bars.at_most("time through DAX against the guest's page cache", times[0] / times[1], 1.25);
    for guest in guests {
        guest.end();
    }
}
