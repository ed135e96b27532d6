//! What the first touch of a page costs: in order, with and without entering pages ahead of the faults, and at
//! random.

use integration::{Bench, Tree};

use super::{Bars, undisturbed};

const RANGE: usize = 2 << 20;
/// Ranges that are read in order, in each round, and such as are touched once in a random order.
const IN_ORDER: usize = 32;
const SCATTERED: usize = 64;
/// Of these, so many at a time.
const PIECE: usize = 4;
const ROUNDS: usize = 4;
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
    // In small pieces by turns: the machine has other things to do now and then.
    for round in 0..ROUNDS {
        for guest in &mut guests {
            guest.guest().ask(&format!("use {round}"));
        }
        for at in (0..IN_ORDER).step_by(PIECE) {
            for (guest, costs) in guests.iter_mut().zip(&mut ordered) {
                costs.push(ask(guest, &format!("touch {} {}", at * PAGES, PIECE * PAGES)));
            }
        }
        let end = IN_ORDER + SCATTERED;
        for skip in (0..SCATTERED).step_by(PIECE) {
            for (guest, costs) in guests.iter_mut().zip(&mut scattered) {
                let line = format!("scatter {IN_ORDER} {end} {} {skip} {PIECE}", round + 1);
                costs.push(ask(guest, &line));
            }
        }
    }
    let size = ((IN_ORDER + SCATTERED) * RANGE) >> 20;
    println!(
        "{ROUNDS} files of {size} MiB in the page cache, small pages, {PIECE} ranges at a time by turns:"
    );
    println!("{:42} {:>14} {:>14}", "", "prefault=auto", "prefault=never");
    let row = |name: &str, [auto, never]: [f64; 2]| {
        println!("{name:42} {auto:14.2} {never:14.2}");
        (auto, never)
    };
    let faults = |costs: &[Vec<Cost>; 2]| {
        let sum = |costs: &Vec<Cost>| costs.iter().map(|cost| cost.faults).sum::<u64>();
        [0, 1].map(|which| sum(&costs[which]) as f64 / (costs[which].len() * PIECE) as f64)
    };
    let time = |costs: &[Vec<Cost>; 2], count: usize| {
        let each = |cost: &Cost| cost.nanoseconds as f64 / count as f64;
        [0, 1].map(|which| undisturbed(costs[which].iter().map(each).collect()))
    };
    let (entered, _) = row("in order: faults a range", faults(&ordered));
    let (fast, slow) = row("in order: ns a page", time(&ordered, PIECE * PAGES));
    row("one page of each range: faults a range", faults(&scattered));
    let (with, without) = row("one page of each range: ns a range", time(&scattered, PIECE));
    bars.at_most("faults per fresh range read in order", entered, 2.0);
    bars.at_most("time per page read in order, against no prefault", fast / slow, 0.2);
    bars.at_most("time per single random touch, against no prefault", with / without, 1.1);
    for guest in guests {
        guest.end();
    }
}
