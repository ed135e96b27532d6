//! One page of a file in two guests and on the host: a store by any is seen by all, in order.

use std::process::{Command, Stdio};
use std::time::Duration;

use integration::{Oriel, Outcome, Running, Tree, text};

use super::Bars;

const SIZE: usize = 4 * 4096;

struct Player(Who);

enum Who {
    Guest(Box<Running>),
    Host(std::process::Child),
}

fn guest(tree: &Tree, side: u32, from: u64, rounds: u64) -> Player {
    let share = tree.at("/s", "dax=always,window=64M");
    let (side, from, rounds) = (side.to_string(), from.to_string(), rounds.to_string());
    let command = ["/s/guest-probe", "litmus", "/s/page", &side, &from, &rounds];
    let run = Oriel::run(&["-v", &share, "--memory", "128M"]).guest(&command);
    let mut running = run.timeout(Duration::from_secs(900)).start();
    assert_eq!(running.hear(), "ready");
    Player(Who::Guest(Box::new(running)))
}

fn host(tree: &Tree, side: u32, from: u64, rounds: u64) -> Player {
    let child = Command::new(super::probe())
        .args(["litmus", text(&tree.path("page"))])
        .args([side.to_string(), from.to_string(), rounds.to_string()])
        .stdout(Stdio::piped())
        .spawn();
    Player(Who::Host(child.expect("the probe runs on the host too")))
}

impl Player {
    /// Rounds played, wrong words, nanoseconds.
    fn result(self) -> [u64; 3] {
        let text = match self.0 {
            Who::Guest(running) => {
                let outcome: Outcome = running.finish();
                outcome.exits_with(0);
                outcome.text()
            }
            Who::Host(child) => {
                let output = child.wait_with_output().expect("the probe ends");
                assert!(output.status.success(), "the probe on the host failed");
                String::from_utf8_lossy(&output.stdout).into()
            }
        };
        ["rounds", "wrong", "nanoseconds"].map(|name| {
            let word =
                text.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix('='));
            word.and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{text}"))
        })
    }
}

/// Which rounds the file has after everybody has left, and that all words are there.
fn left_in_the_file(tree: &Tree, round: u64) {
    let output = Command::new(super::probe()).args(["litmus", text(&tree.path("page"))]).output();
    let output = String::from_utf8_lossy(&output.expect("the probe").stdout).to_string();
    let expected = format!("side0={round} whole0=true\nside1={round} whole1=true\n");
    assert_eq!(output, expected, "the last message of each is in the file");
}

pub fn play(bars: &mut Bars, rounds: u64) {
    let tree = Tree::with_probe(&super::probe());
    tree.fill("page", SIZE);
    std::fs::write(tree.path("page"), vec![0; SIZE]).expect("a page of zeros");
    println!("Message passing through one mapped page, {rounds} rounds there and back:");
    let mut from = 0;
    for (name, host_side) in
        [("guest and guest", None), ("guest and host", Some(0)), ("host and guest", Some(1))]
    {
        // The one that answers first: it waits.
        let one = match host_side {
            Some(1) => host(&tree, 1, from, rounds),
            _ => guest(&tree, 1, from, rounds),
        };
        let other = match host_side {
            Some(0) => host(&tree, 0, from, rounds),
            _ => guest(&tree, 0, from, rounds),
        };
        let (one, other) = (one.result(), other.result());
        let wrong = one[1] + other[1];
        let microseconds = other[2] as f64 / rounds as f64 / 1000.0;
        println!(
            "  {name:16} {} rounds, {wrong} wrong words, {microseconds:.1} us a round",
            one[0] - from
        );
        bars.at_most(&format!("wrong words between {name}"), wrong as f64, 0.0);
        from += rounds;
        assert_eq!((one[0], other[0]), (from, from));
        left_in_the_file(&tree, from);
    }
}
