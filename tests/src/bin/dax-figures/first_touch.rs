//! What the first touch of a page costs: in order, with and without entering pages ahead of the faults, and at
//! random.

use integration::{Bench, Tree};

use super::Bars;

const RANGE: usize = 2 << 20;
/// Ranges that are read in order, in each round, and such as are touched once.
const IN_ORDER: usize = 32;
const SCATTERED: usize = 64;
const PIECE: usize = 8;
const ROUNDS: usize = 3;
const PAGES: usize = RANGE / 4096;

/// Time and second-stage faults of one question.
#[derive(Clone, Copy, Default)]
struct Cost {
    nanoseconds: u64,
    faults: u64,
}

fn ask(guest: &mut Bench, line: &str) -> Cost {
    let before = guest.faults();
    let nanoseconds = guest.time(line);
    Cost { nanoseconds, faults: guest.faults() - before }
}

pub fn measure(bars: &mut Bars) {
    let tree = Tree::with_probe(&super::probe());
    let names: Vec<String> = (0..ROUNDS).map(|round| format!("data{round}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    for name in &names {
        tree.fill(name, (IN_ORDER + SCATTERED) * RANGE);
    }
    let mut guests = ["auto", "never"].map(|mode| {
        let options = format!("dax=always,window=1G,prefault={mode}");
        Bench::start(&tree.at("/s", &options), "/s", &names, "512M")
    });
    let mut ordered = [Vec::new(), Vec::new()];
    let mut scattered = [Vec::new(), Vec::new()];
    for round in 0..ROUNDS {
        for (which, guest) in guests.iter_mut().enumerate() {
            guest.guest().ask(&format!("use {round}"));
            ordered[which].push(ask(guest, &format!("touch 0 {}", IN_ORDER * PAGES)));
        }
        // In small pieces by turns: a page costs little, and the machine has other things to do now and then.
        for piece in 0..SCATTERED / PIECE {
            for (which, guest) in guests.iter_mut().enumerate() {
                let from = IN_ORDER + piece * PIECE;
                let line = format!("scatter {from} {} {}", from + PIECE, round + 1);
                scattered[which].push(ask(guest, &line));
            }
        }
    }
    let size = ((IN_ORDER + SCATTERED) * RANGE) >> 20;
    println!("{ROUNDS} files of {size} MiB in the page cache, small pages, median of {ROUNDS}:");
    println!("{:42} {:>14} {:>14}", "", "prefault=auto", "prefault=never");
    let per = |costs: &[Cost], count: usize, value: fn(&Cost) -> u64| {
        let mut each: Vec<f64> =
            costs.iter().map(|cost| value(cost) as f64 / count as f64).collect();
        each.sort_by(f64::total_cmp);
        each[each.len() / 2]
    };
    let row = |name: &str, costs: &[Vec<Cost>; 2], count: usize, value: fn(&Cost) -> u64| {
        let [auto, never] = [0, 1].map(|which| per(&costs[which], count, value));
        println!("{name:42} {auto:14.2} {never:14.2}");
        (auto, never)
    };
    let (faults, _) = row("in order: faults a range", &ordered, IN_ORDER, |cost| cost.faults);
    let (fast, slow) =
        row("in order: ns a page", &ordered, IN_ORDER * PAGES, |cost| cost.nanoseconds);
    row("one page of each range: faults a range", &scattered, PIECE, |cost| cost.faults);
    let (with, without) =
        row("one page of each range: ns a range", &scattered, PIECE, |cost| cost.nanoseconds);
    bars.at_most("faults per fresh range read in order", faults, 2.0);
    bars.at_most("time per page read in order, against no prefault", fast / slow, 0.2);
    bars.at_most("time per single random touch, against no prefault", with / without, 1.1);
    for guest in guests {
        guest.end();
    }
}
