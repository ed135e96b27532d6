//! What DAX does and costs, measured with real guests: `tests/dax`.
//!
//! Times mean nothing by themselves where the processor is emulated: two guests, or two ways in one guest, are
//! asked in turns, and what counts are the ratios. Each command prints its figures, says which bar each ratio
//! is held against, and fails when one does not reach it.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a measurement that cannot be made ends the program"
)]

mod cliff;
mod density;
mod first_touch;
mod litmus;

use std::process::ExitCode;

/// A ratio and the bar it is held against.
struct Bars(bool);

impl Bars {
    fn at_most(&mut self, what: &str, value: f64, bar: f64) {
        self.hold(what, value, &format!("at most {bar}"), value <= bar);
    }

    /// Within what two guests that do the same differ by.
    fn at_least(&mut self, what: &str, value: f64, bar: f64) {
        const NOISE: f64 = 0.05;
        self.hold(what, value, &format!("at least {bar}, within {NOISE}"), value >= bar - NOISE);
    }

    fn hold(&mut self, what: &str, value: f64, bar: &str, holds: bool) {
        let mark = if holds { "ok" } else { "MISSED" };
        println!("  {mark:<7} {what}: {value:.2} ({bar})");
        self.0 &= holds;
    }
}

/// The time below which a quarter of them is: of what was measured while the machine did little else.
fn undisturbed(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 4]
}

/// The middle one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The program that runs in the guests: built with this one.
fn probe() -> String {
    let this = std::env::current_exe().expect("where this program is");
    this.with_file_name("guest-probe").to_str().expect("a path in UTF-8").into()
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let mut bars = Bars(true);
    match words[..] {
        ["first-touch"] => first_touch::measure(&mut bars),
        ["litmus"] => litmus::play(&mut bars, 1_000_000),
        ["litmus", rounds] => litmus::play(&mut bars, rounds.parse().expect("a number of rounds")),
        ["density"] => density::table(&mut bars, 16),
        ["density", most] => {
            density::table(&mut bars, most.parse().expect("a number of sandboxes"))
        }
        ["cliff"] => cliff::random(&mut bars),
        ["warm"] => cliff::warm(&mut bars),
        _ => {
            eprintln!(
                "tests/dax litmus [ROUNDS]|first-touch|cliff|warm|density [SANDBOXES], not {words:?}"
            );
            return ExitCode::from(2);
        }
    }
    if bars.0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
