//! `cache=watch`: a guest that keeps everything, and sees each change of the host's.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use integration::{Tree, model};
use serde_json::Value;

use super::PROBE;
use super::agent::Sandbox;

/// How long a guest may take that is emulated.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs what it reads in the guest.
const SHELL: &str = "while read -r command; do eval \"$command\" 2>&1; done";

struct Watched {
    sandbox: Sandbox,
}

impl Watched {
    /// A sandbox that has the tree at /s with these options, once its agent is there.
    fn start(name: &str, tree: &Tree, options: &str) -> Self {
        Self::start_with(name, &[], tree, options)
    }

    fn start_with(name: &str, arguments: &[&str], tree: &Tree, options: &str) -> Self {
        let options = format!("cache=watch,{options}");
        let share = tree.at("/s", options.trim_end_matches(','));
        let arguments = [&["-i", "-v", share.as_str()], arguments].concat();
        let watched = Self { sandbox: Sandbox::start(name, &arguments, &["sh", "-c", SHELL]) };
        watched.wait_until("the agent is there", |counters| counters("watch_live") == 1);
        watched
    }

    fn stats(&self) -> Value {
        let outcome = self.sandbox.describe("stats", &["--json"], &[]).finish();
        outcome.exits_with(0);
        serde_json::from_str(&outcome.text()).unwrap()
    }

    fn wait_until(&self, what: &str, is_so: impl Fn(&dyn Fn(&str) -> u64) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let stats = self.stats();
            let counters = &watched(&stats)["counters"];
            if is_so(&|name| counters[name].as_u64().unwrap_or_default()) {
                return;
            }
            assert!(Instant::now() < deadline, "{what}: {counters:#}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// All that has happened so far the guest has heard of.
    fn settle(&self) {
        self.wait_until("nothing is to be told", |counters| counters("watch_pending") == 0);
    }

    /// Requests of the guest so far, by operation.
    fn requests(&self) -> Vec<(String, u64)> {
        let stats = self.stats();
        let operations = watched(&stats)["operations"].as_object().unwrap();
        let count =
            |(name, of): (&String, &Value)| (name.clone(), of["requests"].as_u64().unwrap());
        operations.iter().map(count).collect()
    }

    fn ask(&mut self, line: &str) -> String {
        self.sandbox.oriel.ask(line)
    }

    /// Asks the guest until it says so. That it says anything else at first is no mistake: it has a moment.
    fn comes_to(&mut self, question: &str, answer: &str) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said = self.ask(question);
            if said == answer {
                return;
            }
            assert!(
                Instant::now() < deadline,
                "{question}: {said:?}, not {answer:?}: {}",
                self.stats()
            );
        }
    }
}

/// Of what `oriel stats` says, the tree's part: a root file system is a share as well.
fn watched(stats: &Value) -> &Value {
    let mut shares = stats["shares"].as_array().unwrap().iter();
    shares.find(|share| share["tag"] == "share0").unwrap()
}

#[test]
fn what_does_not_change_costs_no_request_and_what_changes_is_seen() {
    let tree = Tree::with_probe(PROBE);
    for directory in 0..20 {
        for file in 0..10 {
            let name = format!("t/d{directory}/f{file}");
            fs::create_dir_all(tree.path(&name).parent().unwrap()).unwrap();
            tree.write(&name, b"data\n");
        }
    }
    tree.write("changed", b"before\n");
    tree.write("gone", b"gone\n");
    let mut guest = Watched::start("watch-sees", &tree, "");
    let look = "find /s/t -type f -size +0 | wc -l; ls -l /s/t/* | wc -l; cat /s/none 2>&1";
    let look = format!("({look}) | tr '\\n' ' '; echo");
    // What a directory was asked for before it was watched is kept for a second, and asked for again.
    for _ in 0..2 {
        guest.ask(&look);
        assert_eq!(guest.ask("sleep 2; echo later"), "later");
    }
    let first = guest.ask(&look);
    assert!(first.starts_with("200 "), "{first}");
    let before = guest.requests();
    assert_eq!(guest.ask(&look), first);
    assert_eq!(guest.requests(), before, "not one request");

    for (name, expected) in [("changed", "before"), ("gone", "gone")] {
        assert_eq!(guest.ask(&format!("cat /s/{name}")), expected);
    }
    assert_eq!(guest.ask("ls /s | tr '\\n' ' '; echo"), "changed gone guest-probe t");
    tree.write("changed", b"after\n");
    guest.comes_to("cat /s/changed", "after");
    tree.write("changed", b"AFTER\n");
    guest.comes_to("cat /s/changed", "AFTER");
    fs::set_permissions(tree.path("changed"), fs::Permissions::from_mode(0o640)).unwrap();
    guest.comes_to("stat -c %a /s/changed", "640");
    fs::remove_file(tree.path("gone")).unwrap();
    guest.comes_to("cat /s/gone >/dev/null 2>&1 && echo there || echo gone", "gone");
    tree.write("none", b"new\n");
    guest.comes_to("cat /s/none", "new");
    guest.comes_to("ls /s | tr '\\n' ' '; echo", "changed guest-probe none t");
    fs::rename(tree.path("none"), tree.path("changed")).unwrap();
    guest.comes_to("cat /s/changed", "new");
    fs::rename(tree.path("t/d0"), tree.path("t/moved")).unwrap();
    guest.comes_to("cat /s/t/moved/f0", "data");
    guest.comes_to("test -e /s/t/d0 || echo gone", "gone");
    tree.write("t/moved/f0", b"moved\n");
    guest.comes_to("cat /s/t/moved/f0", "moved");
    guest.sandbox.oriel.finish().exits_with(0);
}

#[test]
fn what_happens_where_the_guest_never_looked_costs_it_no_request() {
    let tree = Tree::with_probe(PROBE);
    fs::create_dir_all(tree.path("seen")).unwrap();
    fs::create_dir_all(tree.path("unseen/below")).unwrap();
    tree.write("seen/f", b"data\n");
    let mut guest = Watched::start("watch-unseen", &tree, "");
    for _ in 0..2 {
        assert_eq!(guest.ask("cat /s/seen/f"), "data");
    }
    let before = guest.requests();
    let status = std::process::Command::new("sh")
        .args(["-c", "i=0; while [ $i -lt 10000 ]; do : >below/$((i % 100)); i=$((i + 1)); done"])
        .current_dir(tree.path("unseen"))
        .status();
    assert!(status.unwrap().success());
    guest.settle();
    assert_eq!(guest.requests(), before);
    guest.sandbox.oriel.finish().exits_with(0);
}

/// Host and two guests work on one tree at once; each time they have stopped all three see the same. Says how often the
/// first guest's watch has lost events.
fn all_see_the_same(name: &str, options: &str, rounds: u64) -> u64 {
    /// Of each of the three in a round.
    const OPERATIONS: u64 = 34;
    let tree = Tree::with_probe(PROBE);
    let root = tree.path("tree");
    fs::create_dir(&root).unwrap();
    let mut guests = ["a", "b"].map(|which| {
        let mut guest = Watched::start(&format!("{name}-{which}"), &tree, options);
        assert_eq!(guest.ask("echo ready; /s/guest-probe tree /s/tree"), "ready");
        guest
    });
    for round in 0..rounds {
        for (which, guest) in guests.iter_mut().enumerate() {
            let seed = round * 3 + which as u64;
            guest.sandbox.oriel.say(&format!("work {seed} {OPERATIONS}"));
        }
        model::operate(&root, round * 3 + 2, OPERATIONS);
        for guest in &mut guests {
            assert_eq!(guest.sandbox.oriel.hear(), "done");
        }
        if options.is_empty() {
            guests.iter().for_each(Watched::settle);
        } else {
            // What is not watched is kept for a second, by a clock that may be slower than this one.
            thread::sleep(Duration::from_millis(1500));
        }
        compare(&root, &mut guests, round);
    }
    let stats = guests[0].stats();
    for guest in guests {
        guest.sandbox.oriel.finish();
    }
    watched(&stats)["counters"]["watch_overflows"].as_u64().unwrap()
}

fn compare(root: &Path, guests: &mut [Watched; 2], round: u64) {
    let here = model::look(root).unwrap();
    for guest in guests {
        let there = guest.ask("look");
        if there != model::digest(&here) {
            let dump = guest.ask("dump");
            let stats = guest.stats();
            let counters = &watched(&stats)["counters"];
            panic!("round {round}: {there}\nhost: {}\nguest: {dump}\n{counters}", here.join("; "));
        }
    }
}

/// How many operations `tests/watch model` wants.
fn rounds(of: u64) -> u64 {
    let operations = std::env::var("ORIEL_WATCH_OPERATIONS").ok();
    operations.and_then(|count| count.parse::<u64>().ok()).map_or(of, |count| count.div_ceil(102))
}

#[test]
fn host_and_two_guests_see_the_same_whenever_they_stop() {
    all_see_the_same("watch-model", "", rounds(12));
}

#[test]
fn they_do_so_also_where_not_everything_can_be_watched() {
    all_see_the_same("watch-budget", "watches=3", rounds(4));
}

/// Changes how many events the host's kernel keeps for a group, for all that are made from now on: so not in one process
/// with the other tests.
#[test]
#[ignore = "changes the host's kernel"]
fn they_do_so_also_when_events_are_lost() {
    const LIMIT: &str = "/proc/sys/fs/fanotify/max_queued_events";
    let before = fs::read_to_string(LIMIT).unwrap();
    fs::write(LIMIT, "8").unwrap();
    let seen = std::panic::catch_unwind(|| all_see_the_same("watch-overflow", "", rounds(4)));
    fs::write(LIMIT, before).unwrap();
    let overflows = seen.unwrap();
    println!("lost events {overflows} times");
    assert!(overflows > 0);
}

#[test]
#[ignore = "prints figures"]
fn how_soon_a_guest_sees_what_the_host_has_changed() {
    let tree = Tree::with_probe(PROBE);
    fs::create_dir(tree.path("t")).unwrap();
    tree.write("t/f", b"");
    let mut guest = Watched::start("watch-latency", &tree, "");
    assert_eq!(guest.ask("echo ready; /s/guest-probe tree /s/t"), "ready");
    let round_trip: u64 = guest.ask("round-trip 200").parse().unwrap();
    // Until what the guest says is heard here takes about half of what question and answer do.
    let mut asked: Vec<u64> = (0..50)
        .map(|_| {
            let since = Instant::now();
            guest.ask("round-trip 0");
            since.elapsed().as_micros() as u64
        })
        .collect();
    asked.sort_unstable();
    let heard = asked[asked.len() / 2] / 2;
    let mut times: Vec<u64> = Vec::new();
    for size in 1..=200u64 {
        assert_eq!(guest.ask(&format!("size f {size}")), "asking");
        thread::sleep(Duration::from_millis(20));
        let since = Instant::now();
        fs::OpenOptions::new().write(true).open(tree.path("t/f")).unwrap().set_len(size).unwrap();
        guest.sandbox.oriel.hear();
        times.push((since.elapsed().as_micros() as u64).saturating_sub(heard));
    }
    times.sort_unstable();
    let (median, p99) = (times[times.len() / 2], times[times.len() * 99 / 100]);
    println!(
        "a FUSE round trip: {round_trip} us; a change is seen after {median} us, p99 {p99} us, without the {heard} us \
         until the guest is heard to say so"
    );
    println!("multiples: {:.1}, {:.1}", ratio(median, round_trip), ratio(p99, round_trip));
    guest.sandbox.oriel.finish();
}

fn ratio(of: u64, to: u64) -> f64 {
    of as f64 / to as f64
}

/// A root file system with git, and for the tools that watch files: what tests/suite has made.
fn debian() -> Option<String> {
    let home = std::env::var("HOME").ok()?;
    let cache = std::env::var("XDG_CACHE_HOME").unwrap_or_else(|_| format!("{home}/.cache"));
    let root = format!("{cache}/oriel/suites/rootfs");
    Path::new(&root).join("usr/bin/git").exists().then_some(root)
}

#[test]
#[ignore = "prints figures"]
fn a_second_find_sends_no_request_and_a_second_status_only_opens_files() {
    let Some(root) = debian() else { return println!("no root file system: tests/suite apt") };
    let files = std::env::var("ORIEL_WATCH_FILES").ok().and_then(|count| count.parse().ok());
    let files: u64 = files.unwrap_or(2_000);
    let tree = Tree::new();
    let script = "git init -q . && git config user.name t && git config user.email t && \
        i=0; while [ $i -lt $1 ]; do d=d$((i / 1000))/e$((i / 50)); mkdir -p $d; \
        j=0; while [ $j -lt 50 ]; do echo $i >$d/f$i; i=$((i + 1)); j=$((j + 1)); done; done; \
        git add -A && git commit -qm all && sleep 1 && git status >/dev/null";
    let mut make = std::process::Command::new("sh");
    make.args(["-ec", script, "sh", &files.to_string()]).current_dir(tree.path("."));
    assert!(make.status().unwrap().success());
    let root = format!("{root}:overlay,dax=never");
    let options = ["--root", root.as_str(), "--memory", "2G"];
    let mut guest = Watched::start_with("watch-git", &options, &tree, "locks=guest,dax=never");
    assert_eq!(
        guest.ask("mount -t tmpfs none /mnt && cp -a /s /mnt/s && sleep 1; echo copied"),
        "copied"
    );
    guest.ask(
        "git config --global --add safe.directory '*'; git -C /mnt/s status >/dev/null; echo done",
    );
    for (what, command, allowed) in [
        (
            "git status",
            "git --no-optional-locks -C $at status --porcelain | wc -l",
            ["OPEN", "FLUSH", "RELEASE"].as_slice(),
        ),
        ("find", "find $at -newer / -size +1000k | wc -l", &[]),
    ] {
        let mut timed = |at: &str| -> u64 {
            let command = format!(
                "at={at}; a=$(date +%s%N); r=$({command}); b=$(date +%s%N); echo $r $(((b - a) / 1000))"
            );
            let answer = guest.ask(&command);
            answer.split(' ').nth(1).and_then(|time| time.parse().ok()).expect("a time")
        };
        for at in ["/s", "/s", "/s", "/mnt/s"] {
            println!("{what} of {at}: {} us", timed(at));
        }
        let (mut here, mut there) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            here.push(timed("/s"));
            there.push(timed("/mnt/s"));
        }
        here.sort_unstable();
        there.sort_unstable();
        let before = guest.requests();
        guest.ask(&format!("at=/s; {command}"));
        let after = guest.requests();
        let sent: Vec<_> = after.iter().filter(|of| !before.contains(of)).collect();
        println!(
            "{what} of {files} files: {} us, tmpfs {} us: {:.2} of its speed; requests: {sent:?}",
            here[2],
            there[2],
            ratio(there[2], here[2])
        );
        assert!(sent.iter().all(|of| allowed.contains(&of.0.as_str())));
    }
    guest.sandbox.oriel.finish();
}
