//! All figures of a run, and what follows from them.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::events::{Event, Figure};
use crate::trace::Profile;

/// The middle of several figures, and the outermost.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Spread {
    fn of(mut values: Vec<f64>) -> Option<Self> {
        values.sort_by(f64::total_cmp);
        let (least, most) = (*values.first()?, *values.last()?);
        let middle = values.len() / 2;
        let median = match values.len() % 2 {
            0 => f64::midpoint(values[middle - 1], values[middle]),
            _ => values[middle],
        };
        Some(Self { median, least, most })
    }
}

/// What a run brought.
#[derive(Debug, Default, Serialize)]
pub struct Results {
    pub machine: Vec<(String, String)>,
    pub commands: Vec<(String, String)>,
    pub missed: Vec<(String, String, String)>,
    /// By system and job.
    figures: BTreeMap<String, BTreeMap<String, Vec<Figure>>>,
    /// By job and system, of the last round.
    pub profiles: BTreeMap<String, BTreeMap<String, Profile>>,
}

impl Results {
    pub fn take(&mut self, event: Event) {
        match event {
            Event::Machine(machine) => self.machine = machine,
            Event::Command(system, line) => self.commands.push((system, line)),
            Event::Measured((_, system, job), figure) => {
                self.figures.entry(system).or_default().entry(job).or_default().push(figure);
            }
            Event::Profiled((_, system, job), profile) => {
                self.profiles.entry(job).or_default().insert(system, profile);
            }
            Event::Missed((_, system, job), why) => {
                let seen = self.missed.iter().any(|(s, j, _)| *s == system && *j == job);
                if !seen {
                    self.missed.push((system, job, why));
                }
            }
            Event::Finished(..) => {}
        }
    }

    fn all(&self, system: &str, job: &str) -> &[Figure] {
        self.figures.get(system).and_then(|jobs| jobs.get(job)).map_or(&[], Vec::as_slice)
    }

    /// The time of one operation in nanoseconds; of `memory`, KiB.
    pub fn time(&self, system: &str, job: &str) -> Option<Spread> {
        Spread::of(self.all(system, job).iter().map(|figure| figure.nanoseconds).collect())
    }

    /// The exits of one operation.
    pub fn exits(&self, system: &str, job: &str) -> Option<Spread> {
        Spread::of(self.all(system, job).iter().filter_map(|figure| figure.exits).collect())
    }

    /// The processors' time of one operation in nanoseconds.
    pub fn cpu(&self, system: &str, job: &str) -> Option<Spread> {
        Spread::of(self.all(system, job).iter().map(|figure| figure.cpu).collect())
    }

    /// Its bars, with what they are held against.
    pub fn bars(&self) -> Vec<Held> {
        BARS.iter().filter_map(|bar| bar.hold(self)).collect()
    }
}

/// A promise of ours.
#[derive(Debug)]
struct Bar {
    what: &'static str,
    ours: (&'static str, &'static str),
    against: Against,
    /// The figure may be at most this much.
    most: f64,
}

/// What a figure is held against.
#[derive(Debug)]
enum Against {
    /// A time, as a multiple of that of another system or job.
    Time(&'static str, &'static str),
    /// Memory in MiB.
    Memory,
    /// Exits of one operation.
    Exits,
}

/// A bar and the figure.
#[derive(Debug, PartialEq, Serialize)]
pub struct Held {
    pub what: &'static str,
    pub ours: String,
    pub theirs: String,
    pub figure: f64,
    pub most: f64,
    pub holds: bool,
}

const fn bar(
    what: &'static str,
    ours: (&'static str, &'static str),
    theirs: (&'static str, &'static str),
    most: f64,
) -> Bar {
    Bar { what, ours, against: Against::Time(theirs.0, theirs.1), most }
}

/// Ratios of times: "ten times the operations" is a tenth of the time.
const BARS: &[Bar] = &[
    bar("stat of a new name", ("oriel", "stat-miss"), ("virtiofsd", "stat-miss"), 0.5),
    bar("create, write, close", ("oriel", "create"), ("virtiofsd", "create"), 0.5),
    bar("unlink", ("oriel", "unlink"), ("virtiofsd", "unlink"), 0.5),
    bar(
        "random 4 KiB, direct, no DAX",
        ("oriel-never", "randread-direct"),
        ("virtiofsd", "randread-direct"),
        0.5,
    ),
    bar(
        "1 MiB read, direct, no DAX",
        ("oriel-never", "read-1m-direct"),
        ("virtiofsd", "read-1m-direct"),
        0.9,
    ),
    bar(
        "1 MiB write, direct, no DAX",
        ("oriel-never", "seeds-write"),
        ("virtiofsd", "seeds-write"),
        0.9,
    ),
    bar("random 4 KiB, warm, DAX", ("oriel", "randread-warm"), ("9p", "randread-warm"), 0.1),
    bar(
        "the same, against tmpfs",
        ("oriel", "randread-warm"),
        ("oriel", "tmpfs-randread"),
        1.0 / 0.8,
    ),
    bar(
        "mapped, second touch, against memory",
        ("oriel", "second-touch"),
        ("oriel", "memory-touch"),
        1.0 / 0.9,
    ),
    bar("mapped, first touch", ("oriel", "first-touch"), ("alioth-dax", "first-touch"), 0.5),
    bar(
        "random 4 KiB of four windows",
        ("oriel", "oversubscribed"),
        ("oriel-never", "oversubscribed"),
        1.0,
    ),
    bar(
        "exec to exit of a guest that runs true",
        ("oriel", "run-true"),
        ("virtiofsd", "run-true"),
        0.5,
    ),
    Bar {
        what: "memory of the VMM",
        ours: ("oriel", "memory"),
        against: Against::Memory,
        most: 8.0,
    },
    Bar {
        what: "exits of a stat of a new name",
        ours: ("oriel", "stat-miss"),
        against: Against::Exits,
        most: 2.0,
    },
];

impl Bar {
    fn hold(&self, results: &Results) -> Option<Held> {
        let (system, job) = self.ours;
        let (figure, theirs) = match self.against {
            Against::Time(their_system, their_job) => {
                let theirs = results.time(their_system, their_job)?.median;
                (
                    results.time(system, job)?.median / theirs,
                    format!("× {their_system} {their_job}"),
                )
            }
            Against::Memory => (results.time(system, job)?.median / 1024.0, "MiB".to_owned()),
            Against::Exits => (results.exits(system, job)?.median, "exits".to_owned()),
        };
        Some(Held {
            what: self.what,
            ours: format!("{system} {job}"),
            theirs,
            figure,
            most: self.most,
            holds: figure <= self.most,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(figures: &[(&str, &str, f64)]) -> Results {
        let mut results = Results::default();
        for (system, job, nanoseconds) in figures {
            let figure = Figure { nanoseconds: *nanoseconds, cpu: 0.0, exits: None };
            results.take(Event::Measured((0, (*system).into(), (*job).into()), figure));
        }
        results
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_two_in_the_middle() {
        let results =
            results(&[("a", "j", 4.0), ("a", "j", 1.0), ("a", "j", 2.0), ("a", "j", 9.0)]);
        let spread = results.time("a", "j").unwrap();
        assert_eq!((spread.least, spread.median, spread.most), (1.0, 3.0, 9.0));
        assert_eq!(results.time("b", "j"), None);
        assert_eq!(results.exits("a", "j"), None, "no counter, no figure");
    }

    #[test]
    fn a_bar_that_is_missed_says_by_how_much_and_one_without_figures_says_nothing() {
        let results = results(&[("oriel", "stat-miss", 6.0), ("virtiofsd", "stat-miss", 10.0)]);
        let bars = results.bars();
        assert_eq!(bars.len(), 1);
        assert_eq!((bars[0].figure, bars[0].holds), (0.6, false));
    }
}
