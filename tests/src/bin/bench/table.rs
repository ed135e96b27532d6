//! Figures as text for a terminal.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::{Cell, CellAlignment, Row, Table, presets};

use crate::results::{Held, Results};
use crate::trace::Profile;

/// A time as people read it.
pub fn time(nanoseconds: f64) -> String {
    match nanoseconds {
        n if n < 1e3 => format!("{n:.0} ns"),
        n if n < 1e5 => format!("{:.1} µs", n / 1e3),
        n if n < 1e6 => format!("{:.0} µs", n / 1e3),
        n if n < 1e9 => format!("{:.1} ms", n / 1e6),
        n => format!("{:.2} s", n / 1e9),
    }
}

/// What a job's figure is, in words: `memory` is in KiB, all others are times.
pub fn figure(job: &str, value: f64) -> String {
    if job == "memory" { format!("{:.1} MiB", value / 1024.0) } else { time(value) }
}

fn right(text: String) -> Cell {
    Cell::new(text).set_alignment(CellAlignment::Right)
}

/// The medians: a row a job, a column a system.
pub fn medians(results: &Results, jobs: &[&str], systems: &[&str]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let head = systems.iter().map(|system| right((*system).to_owned()));
    table.set_header(Row::from(
        [Cell::new("median of")].into_iter().chain(head).collect::<Vec<_>>(),
    ));
    for job in jobs {
        let one = |system: &&str| {
            results.time(system, job).map_or("–".into(), |spread| figure(job, spread.median))
        };
        let cells = systems.iter().map(|system| right(one(system)));
        table.add_row([Cell::new(job)].into_iter().chain(cells).collect::<Vec<_>>());
    }
    table
}

/// Where the time of an operation of a job goes: a column a system.
pub fn profile(job: &str, of: &BTreeMap<String, Profile>) -> Table {
    /// What happens less often than this in an operation is left out.
    const SELDOM: f64 = 0.05;
    /// And all but what happens most often: a boot makes system calls of a hundred kinds.
    const MOST_COUNTS: usize = 24;
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    let head = of.keys().map(|system| right(system.clone()));
    table.set_header([Cell::new(job)].into_iter().chain(head));
    let total = |profile: &Profile| profile.times.values().sum::<f64>();
    let times: BTreeSet<&String> = of.values().flat_map(|profile| profile.times.keys()).collect();
    for name in times {
        let one = |profile: &Profile| {
            let part = profile.times.get(name).copied().unwrap_or(0.0);
            format!("{} {:3.0} %", time(part), part / total(profile) * 100.0)
        };
        table.add_row([Cell::new(name)].into_iter().chain(of.values().map(|p| right(one(p)))));
    }
    let sums = of.values().map(|profile| right(time(total(profile))));
    table.add_row([Cell::new("together, traced")].into_iter().chain(sums));
    let names: BTreeSet<&String> = of.values().flat_map(|profile| profile.counts.keys()).collect();
    let mut counts: Vec<(&String, Vec<f64>)> = names
        .into_iter()
        .map(|name| {
            let one = |profile: &Profile| profile.counts.get(name).copied().unwrap_or(0.0);
            (name, of.values().map(one).collect())
        })
        .collect();
    let most = |counts: &[f64]| counts.iter().copied().fold(0.0, f64::max);
    counts.sort_by(|(_, one), (_, other)| most(other).total_cmp(&most(one)));
    for (name, counts) in counts.iter().take(MOST_COUNTS) {
        if most(counts) >= SELDOM {
            let cells = counts.iter().map(|count| right(format!("{count:.2}")));
            table.add_row([Cell::new(name)].into_iter().chain(cells));
        }
    }
    table
}

/// The bars.
pub fn bars(bars: &[Held]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN);
    table.set_header(["", "figure", "bar", "", "of"]);
    for held in bars {
        table.add_row([
            Cell::new(held.what),
            right(format!("{:.2}", held.figure)),
            right(format!("{:.2}", held.most)),
            Cell::new(if held.holds { "ok" } else { "MISSED" }),
            Cell::new(format!("{} {}", held.ours, held.theirs)),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_short_and_say_their_unit() {
        let shown = [0.5, 999.0, 1500.0, 250_000.0, 2_500_000.0, 1.5e9].map(time);
        assert_eq!(shown, ["0 ns", "999 ns", "1.5 µs", "250 µs", "2.5 ms", "1.50 s"]);
    }
}
