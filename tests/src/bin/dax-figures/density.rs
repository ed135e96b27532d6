//! What sandboxes that read the same file cost together.

use std::fs;

use integration::{Bench, Tree, text};

use super::{Bars, median};

const MIB: u64 = 1 << 20;
/// The file that all read.
const FILE: u64 = 256;
/// Sandboxes that run at a time.
const STEPS: [usize; 3] = [1, 4, 16];
/// What each has: enough to keep the file in its own page cache.
const MEMORY: &str = "448M";

/// KiB of a line of a file of /proc, such as /proc/meminfo.
fn kib(path: &str, name: &str) -> u64 {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.trim().trim_end_matches(" kB").parse().ok());
    number.unwrap_or_else(|| panic!("{path}: {name}"))
}

/// A row of the table, in MiB.
struct Row {
    /// MemTotal less MemFree, and Cached, of one guest in the middle.
    guest_used: f64,
    guest_cached: f64,
    /// Memory of the VMM processes that belongs to no file: the guests' RAM above all.
    host_private: f64,
    /// All that the host has used since before the first.
    host_used: f64,
}

fn measure(tree: &Tree, mode: &str, most: usize) -> Vec<Row> {
    let share = tree.at("/s", mode);
    let used = || {
        let value = |name| kib("/proc/meminfo", name);
        value("MemTotal") - value("MemFree")
    };
    let before = used();
    let mut guests: Vec<Bench> = Vec::new();
    let mut rows = Vec::new();
    for step in STEPS.into_iter().filter(|step| *step <= most) {
        // All at once: most of the time is that of their boots.
        std::thread::scope(|scope| {
            let start = || {
                let mut guest = Bench::start(&share, "/s", &["file"], MEMORY);
                guest.time("stream");
                guest
            };
            let started: Vec<_> = (guests.len()..step).map(|_| scope.spawn(start)).collect();
            guests.extend(started.into_iter().map(|guest| guest.join().expect("a sandbox starts")));
        });
        let mut of_guests: [Vec<f64>; 2] = Default::default();
        let mut private = 0;
        for guest in &mut guests {
            let answer = guest.guest().ask("memory");
            let words: Vec<f64> =
                answer.split(' ').map(|word| word.parse().expect("KiB")).collect();
            of_guests[0].push((words[0] - words[1]) / 1024.0);
            of_guests[1].push(words[2] / 1024.0);
            let rollup = format!("/proc/{}/smaps_rollup", guest.guest().process_id());
            // The guest's RAM above all. Pages of files that only one maps count as private, too.
            private += kib(&rollup, "Anonymous");
        }
        let [guest_used, guest_cached] = of_guests.map(median);
        rows.push(Row {
            guest_used,
            guest_cached,
            host_private: private as f64 / 1024.0,
            host_used: (used() as f64 - before as f64) / 1024.0,
        });
    }
    for guest in guests {
        guest.end();
    }
    rows
}

pub fn table(bars: &mut Bars, most: usize) {
    // In memory, and there before the first sandbox: the one copy that all share.
    let tree = Tree::with_probe(&super::probe());
    tree.fill("file", (FILE * MIB) as usize);
    println!(
        "Each sandbox ({MEMORY}) has read one file of {FILE} MiB, which is in {}.",
        text(&tree.path(""))
    );
    println!("MiB, on top of the file's own pages on the host:");
    println!(
        "{:12} {:>9} {:>16} {:>18} {:>18} {:>14}",
        "", "sandboxes", "guest: in use", "guest: page cache", "host: of the VMMs", "host: in all"
    );
    let modes = ["dax=inode,window=512M", "dax=never"];
    let tables = modes.map(|mode| {
        let rows = measure(&tree, mode, most);
        for (row, count) in rows.iter().zip(STEPS) {
            let mode = mode.split(',').next().unwrap_or(mode);
            println!(
                "{mode:12} {count:9} {:16.0} {:18.0} {:18.0} {:14.0}",
                row.guest_used, row.guest_cached, row.host_private, row.host_used
            );
        }
        rows
    });
    let [mapped, read] = &tables;
    for (mapped, read) in mapped.iter().zip(read) {
        bars.at_most("page cache in a guest, MiB", mapped.guest_cached, 16.0);
        bars.at_most("host memory against no DAX", mapped.host_used / read.host_used, 0.6);
    }
}
