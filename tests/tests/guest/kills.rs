//! The process of a sandbox is killed at any moment: what its guest was told to be on the disk is there, nothing else is
//! left, and the next sandbox goes on with it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use integration::{Oriel, Outcome, Random, Tree, copy_executable};
use rustix::process::Signal;

use super::PROBE;

/// How often: `tests/kills` says how often else.
const KILLS: u64 = 6;

/// What is done to the files in between, round after round.
const OPTIONS: [&str; 4] =
    ["dax=always", "dax=never,cache=always,writeback", "dax=inode", "dax=always,cache=never"];

/// How long a guest works at most before it is killed, in milliseconds.
const WORK: u64 = 2500;

/// Copies a program of the host's with its libraries into a tree, and says how a guest calls it. `None` where the host
/// has none.
fn program(tree: &Tree, name: &str) -> Option<String> {
    let listed = Command::new("sh").args(["-c", &format!("ldd \"$(command -v {name})\"")]).output();
    let listed = listed.ok().filter(|listed| listed.status.success())?;
    let listed = String::from_utf8(listed.stdout).unwrap();
    fs::create_dir_all(tree.path("programs")).unwrap();
    let mut loader = None;
    for path in listed.split_whitespace().filter(|word| word.starts_with('/')) {
        let file = Path::new(path).file_name().unwrap().to_str().unwrap();
        copy_executable(Path::new(path), &tree.path(&format!("programs/{file}")));
        if file.starts_with("ld-linux") {
            loader = Some(file.to_string());
        }
    }
    let found = Command::new("sh").args(["-c", &format!("command -v {name}")]).output().unwrap();
    let found = String::from_utf8(found.stdout).unwrap();
    copy_executable(Path::new(found.trim()), &tree.path(&format!("programs/{name}")));
    let loader = loader?;
    Some(format!("/p/programs/{loader} --library-path /p/programs /p/programs/{name}"))
}

/// What a sandbox could leave on the host: mounts, locks, memory, cgroups, sockets and temporary files.
fn traces(own: &str) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    found.extend(fs::read_to_string("/proc/self/mounts").unwrap().lines().map(String::from));
    let locks = fs::read_to_string("/proc/locks").unwrap();
    // Their numbers change; what counts is how many there are.
    found.insert(format!("{} locks", locks.lines().count()));
    for directory in ["/dev/shm", "/tmp", "/run", "/run/oriel"] {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let path = entry.path();
            // Of the test itself: its own directories and the console's.
            if !path.starts_with("/tmp/.tmp") && !path.to_string_lossy().ends_with(own) {
                found.insert(path.to_string_lossy().into_owned());
            }
        }
    }
    for entry in fs::read_dir("/sys/fs/cgroup").into_iter().flatten().flatten() {
        found.insert(entry.path().to_string_lossy().into_owned());
    }
    found
}

/// The last number that the guest has said with `word`.
fn last_of(outcome: &Outcome, word: &str) -> Option<u64> {
    let text = outcome.text();
    let mut numbers = text.lines().rev().filter_map(|line| {
        line.strip_prefix(word)?.strip_prefix(' ')?.strip_suffix('.')?.parse().ok()
    });
    numbers.next()
}

fn sqlite(tree: &Tree, sql: &str) -> String {
    let output = Command::new("sqlite3")
        .args(["-batch", "-bail"])
        .arg(tree.path("database"))
        .arg(sql)
        .output()
        .unwrap();
    assert!(output.status.success(), "{sql}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_string()
}

/// Kills so many sandboxes and looks at what is left, each time.
fn kill_again_and_again(kills: u64) {
    let programs = Tree::with_probe(PROBE);
    let data = Tree::new();
    let sqlite_command = program(&programs, "sqlite3");
    if sqlite_command.is_some() {
        sqlite(
            &data,
            "CREATE TABLE numbers (n INTEGER PRIMARY KEY, noise BLOB); CREATE TABLE total (n INTEGER);
             INSERT INTO total VALUES (0);",
        );
    } else {
        println!("there is no sqlite3 on this host: only the log is written");
    }
    let name = format!("test-kills-{}", std::process::id());
    let log_name = format!("{name}.log");
    let mut random = Random::new(u64::from(std::process::id()));
    let (mut next, mut rows, mut early, mut boot) = (0, 0, 0, Duration::ZERO);
    // What every start makes once: the directory of sockets.
    Oriel::command(&["ps"]).finish().exits_with(0);
    let _ = fs::create_dir("/run/oriel");
    let before = traces(&log_name);
    for round in 0..kills {
        let options = OPTIONS[round as usize % OPTIONS.len()];
        let mut script = format!("/p/guest-probe log /s {next} & ");
        if let Some(sqlite) = &sqlite_command {
            script += &format!(
                r#"n={rows}; while :; do
                    echo "BEGIN; INSERT INTO numbers VALUES ($n, randomblob(700)); UPDATE total SET n = n + 1;"
                    echo "COMMIT; SELECT 'row $n.';"
                    n=$((n + 1))
                done | {sqlite} -batch -bail -cmd 'PRAGMA synchronous=FULL' /s/database & "#
            );
        }
        script += "wait";
        let mut guest = Oriel::run(&["--name", &name, "-v", &data.at("/s", options)])
            .args(&["-v", &programs.at("/p", "ro")])
            .script(&script)
            .start();
        // While it boots, or while it works; the first one shows how long a boot takes.
        let started = Instant::now();
        let pause = match round % 3 {
            1 => random.below(1 + boot.as_millis() as u64),
            _ => {
                let first = guest.hear();
                assert!(first.ends_with('.'), "{first}");
                boot = boot.max(started.elapsed());
                random.below(WORK)
            }
        };
        std::thread::sleep(Duration::from_millis(pause));
        guest.signal(Signal::KILL);
        let outcome = guest.finish();
        outcome.check(outcome.status == 128 + 9, "it was killed");

        let synced = last_of(&outcome, "synced");
        early += u64::from(synced.is_none());
        if let Some(synced) = synced {
            let looked = Command::new(PROBE)
                .args(["log-check", data.text(), &synced.to_string()])
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&looked.stderr).into_owned();
            outcome.check(looked.status.success(), &format!("round {round}, {options}: {said}"));
            next = synced + 1;
        }
        if sqlite_command.is_some() {
            let found = sqlite(
                &data,
                "PRAGMA integrity_check; SELECT count(*), max(n) + 1, (SELECT n FROM total) FROM numbers;",
            );
            let counts: Vec<_> = found.lines().nth(1).unwrap_or_default().split('|').collect();
            outcome.check(found.starts_with("ok\n"), &format!("round {round}, {options}: {found}"));
            let count: u64 = counts[0].parse().unwrap();
            outcome.check(
                count == 0 || counts.iter().all(|other| *other == counts[0]),
                &format!("round {round}, {options}: rows and their sum: {found}"),
            );
            let told = last_of(&outcome, "row").map_or(rows, |last| last + 1);
            outcome.check(count >= told, &format!("round {round}, {options}: {found}, not {told}"));
            rows = count;
        }
        // Any later command takes the sockets away.
        let listed = Oriel::command(&["ps", "--quiet"]).finish();
        listed.check(!listed.text().contains(&name), "it runs no more");
        let now = traces(&log_name);
        let left: Vec<_> = now.symmetric_difference(&before).collect();
        outcome.check(left.is_empty(), &format!("round {round}: {left:?}"));
        println!("{}: {options}, {next} entries, {rows} transactions", round + 1);
    }
    println!(
        "{kills} kills, {early} of them before the first entry; {next} entries and {rows} transactions that were \
         told to be on the disk are there; a boot took {:.1} s at most",
        boot.as_secs_f64()
    );
    Oriel::command(&["rm", &name]).finish();
}

#[test]
fn what_was_synced_before_a_sandbox_was_killed_is_there_and_the_next_one_starts() {
    let kills = std::env::var("ORIEL_TEST_KILLS").ok();
    kill_again_and_again(kills.map_or(KILLS, |kills| kills.parse().expect("a number of kills")));
}
