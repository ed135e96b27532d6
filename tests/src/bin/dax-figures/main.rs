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

mod first_touch;

use std::process::ExitCode;

/// A ratio and the bar it is held against.
struct Bars(bool);

impl Bars {
    fn at_most(&mut self, what: &str, value: f64, bar: f64) {
        self.hold(what, value, &format!("at most {bar}"), value <= bar);
    }

    #[expect(dead_code, reason = "for the next")]
    fn at_least(&mut self, what: &str, value: f64, bar: f64) {
        self.hold(what, value, &format!("at least {bar}"), value >= bar);
    }

    fn hold(&mut self, what: &str, value: f64, bar: &str, holds: bool) {
        let mark = if holds { "ok" } else { "MISSED" };
        println!("  {mark:<7} {what}: {value:.2} ({bar})");
        self.0 &= holds;
    }
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
        _ => {
            eprintln!("tests/dax first-touch, not {words:?}");
            return ExitCode::from(2);
        }
    }
    if bars.0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
