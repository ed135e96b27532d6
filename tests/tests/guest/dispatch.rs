//! Who serves requests, and what that costs: KVM's own counters, which are exact on any machine.

use integration::{Bench, Tree};

use super::PROBE;
use super::shares::counters;

/// Calls of one kind that are counted.
const MANY: u64 = 2000;
/// How often they are; the least disturbed counts.
const ROUNDS: u64 = 3;
/// For so many milliseconds the guest does nothing before: what its clock and the host's cost then is not the requests'.
const NOTHING: u64 = 500;

/// What one call of the guest's program costs.
#[derive(Debug)]
struct Cost {
    microseconds: f64,
    /// Without those that come with time, however long the calls take on this machine.
    exits: f64,
    halts: f64,
    /// One for each request: nothing else of a guest that does only this is memory-mapped I/O.
    doorbells: f64,
}

/// What one call costs of those that the guest makes when it is asked `line`, which takes a count.
fn cost(bench: &mut Bench, line: &str) -> Cost {
    let counted = |bench: &mut Bench, line: &str| {
        let counters = ["exits", "halt_exits", "mmio_exits"];
        let before = counters.map(|name| bench.counter(name));
        let time = bench.time(line) as f64 / 1000.0;
        let after = counters.map(|name| bench.counter(name));
        let [exits, halts, doorbells] = [0, 1, 2].map(|at| (after[at] - before[at]) as f64);
        Cost { microseconds: time, exits, halts, doorbells }
    };
    let ask = |bench: &mut Bench| {
        let nothing = counted(bench, &format!("spin {NOTHING}"));
        let calls = counted(bench, &line.replace("COUNT", &MANY.to_string()));
        let of_time = nothing.exits / nothing.microseconds * calls.microseconds;
        let each = |total: f64| total / MANY as f64;
        Cost {
            microseconds: each(calls.microseconds),
            exits: each(calls.exits - of_time),
            halts: each(calls.halts),
            doorbells: each(calls.doorbells),
        }
    };
    ask(bench);
    let all = (0..ROUNDS).map(|_| ask(bench));
    all.min_by(|one, other| one.exits.total_cmp(&other.exits)).expect("some")
}

/// The cost, and how many requests vCPUs and threads served.
fn measure(dispatch: &str, line: &str) -> (Cost, u64, u64) {
    let tree = Tree::with_probe(PROBE);
    tree.fill("file", 8 << 20);
    let stats = tempfile::NamedTempFile::new().unwrap();
    let share = tree.at("/s", &format!("cache=never,dax=never,dispatch={dispatch}"));
    let arguments = ["-v", &share, "--memory", "512M", "--stats", stats.path().to_str().unwrap()];
    let mut bench = Bench::with(&arguments, "/s", &["file"]);
    let cost = cost(&mut bench, line);
    bench.end();
    let counters = counters(stats.path(), "share0");
    let count = |name: &str| counters.get(name).and_then(|count| count.as_u64()).unwrap_or(0);
    println!("dispatch={dispatch}, {line}: {cost:.2?}");
    (cost, count("served_inline"), count("served_by_threads"))
}

/// `line`, each call of which makes so many requests.
fn check(line: &str, requests: u64) {
    let (inline, by_vcpu, by_threads) = measure("auto", line);
    let all = (ROUNDS + 1) * MANY * requests;
    assert!(by_vcpu >= all && by_threads < all / 50, "{by_vcpu} and {by_threads} by threads");
    let each = requests as f64;
    assert!((each..1.05 * each).contains(&inline.doorbells), "{inline:?}");
    // The doorbell, and the end of the interrupt where the guest has to say that.
    assert!(inline.exits <= 2.0 * each, "{inline:?}");
    assert!(inline.halts < 0.02, "{inline:?}");
    let (threads, by_vcpu, by_threads) = measure("worker", line);
    assert!(by_vcpu == 0 && by_threads >= all, "{by_vcpu} and {by_threads} by threads");
    let ratio = inline.microseconds / threads.microseconds;
    println!("{line}: inline takes {ratio:.2} of the time that it takes with threads");
}

#[test]
fn a_name_that_is_looked_for_inline_costs_two_exits_a_request_and_no_halt() {
    // The directory's attributes, and the name.
    check("missing COUNT", 2);
}

#[test]
fn a_page_that_is_read_inline_costs_two_exits_and_no_halt() {
    check("again 2048 COUNT 7", 1);
}
