//! The DAX window: what is mapped, what that shows, and what it saves.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use integration::{Bench, Oriel, Tree, copy_executable, noise, sha256, text};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::PROBE;
use super::shares::counters;

const MIB: usize = 1 << 20;

#[test]
fn a_mapped_file_is_one_memory_in_guest_and_host() {
    let tree = Tree::with_probe(PROBE);
    tree.write("shared", &vec![1; 4 * MIB]);
    let stats = tempfile::NamedTempFile::new().unwrap();
    let mut guest = Oriel::run(&["-i", "-v", &tree.at("/s", "dax=always")])
        .args(&["--stats", stats.path().to_str().unwrap()])
        .guest(&["/s/guest-probe", "map", "/s/shared"])
        .start();
    assert_eq!(guest.hear(), format!("mapped {}", 4 * MIB));
    let host = OpenOptions::new().read(true).write(true).open(tree.path("shared")).unwrap();
    assert_eq!(guest.ask("get 4097"), "1", "the guest reads the host's byte");
    for round in 0..100u64 {
        let (mine, yours) = ((round % 251) as u8 + 2, (round % 241) as u8 + 3);
        let at = round * 37_123 % (4 * MIB as u64 - 1);
        host.write_all_at(&[mine], at).unwrap();
        assert_eq!(
            guest.ask(&format!("get {at}")),
            mine.to_string(),
            "the guest sees the host's write"
        );
        assert_eq!(guest.ask(&format!("put {} {yours}", at + 1)), "done");
        let mut byte = [0];
        host.read_exact_at(&mut byte, at + 1).unwrap();
        assert_eq!(byte[0], yours, "the host sees the guest's write at once");
    }
    assert_eq!(guest.ask("sync"), "done", "msync");
    guest.finish().exits_with(0).says_no_error();
    let counters = counters(stats.path(), "share0");
    let count = |name: &str| counters.get(name).and_then(|count| count.as_u64()).unwrap_or(0);
    assert!(count("dax_setups") > 0, "files were mapped: {counters:?}");
    assert_eq!(count("READ"), 0, "no READ with dax=always: {counters:?}");
    assert_eq!(count("WRITE"), 0, "no WRITE of mapped memory: {counters:?}");
    let operations: u64 = counters
        .iter()
        .filter(|(name, _)| name.starts_with(|first: char| first.is_ascii_uppercase()))
        .filter_map(|(_, count)| count.as_u64())
        .sum();
    assert!(operations < 100, "200 looks and changes cost {operations} requests: {counters:?}");
}

#[test]
fn a_file_that_shrinks_while_it_is_mapped_costs_no_more_than_a_process() {
    let tree = Tree::with_probe(PROBE);
    tree.write("shared", &vec![7; 4 * MIB]);
    let mut guest = Oriel::run(&["-i", "-v", &tree.at("/s", "dax=always,cache=never")])
        .guest(&["/s/guest-probe", "map", "/s/shared"])
        .timeout(std::time::Duration::from_secs(45))
        .start();
    assert_eq!(guest.hear(), format!("mapped {}", 4 * MIB));
    for page in [0, 100_000, 3 * MIB] {
        assert_eq!(guest.ask(&format!("get {page}")), "7");
    }
    let host = OpenOptions::new().write(true).open(tree.path("shared")).unwrap();
    host.set_len(8192).unwrap();
    let lost = guest.ask(&format!("touch {}", 3 * MIB));
    assert!(
        lost == "signal 7" || lost == "value 0",
        "a page that is gone is a SIGBUS or zeros: {lost}"
    );
    let lost = guest.ask("touch 100000");
    assert!(
        lost == "signal 7" || lost == "value 0",
        "a page that is gone is a SIGBUS or zeros: {lost}"
    );
    assert_eq!(guest.ask("get 8191"), "7", "what is left is as it was");
    host.set_len(4 * MIB as u64).unwrap();
    host.write_all_at(&[9], 100).unwrap();
    assert_eq!(guest.ask("get 100"), "9", "the mapping goes on");
    assert_eq!(guest.ask("put 101 8"), "done");
    assert_eq!(tree.read("shared")[101], 8, "in both directions");
    guest.finish().exits_with(0);
}

#[test]
fn a_file_grows_on_either_side_while_it_is_mapped() {
    let tree = Tree::with_probe(PROBE);
    tree.write("shared", &vec![5; 5000]);
    // The probe maps the length that it finds: a second one sees what has grown.
    let script = "/s/guest-probe map /s/shared; /s/guest-probe map /s/shared </dev/null";
    let mut guest =
        Oriel::run(&["-i", "-v", &tree.at("/s", "dax=always,cache=never")]).script(script).start();
    assert_eq!(guest.hear(), "mapped 5000");
    assert_eq!(guest.ask("get 4999"), "5");
    let host = OpenOptions::new().read(true).write(true).open(tree.path("shared")).unwrap();
    host.set_len(3 * MIB as u64).unwrap();
    assert_eq!(guest.ask("size"), (3 * MIB).to_string(), "the guest sees the new length");
    assert_eq!(guest.ask(&format!("grow {}", 5 * MIB)), "done");
    assert_eq!(host.metadata().unwrap().len(), 5 * MIB as u64, "the host sees the guest's");
    host.write_all_at(&[6], 4999).unwrap();
    assert_eq!(guest.ask("get 4999"), "6", "the mapping is the same");
    let outcome = guest.finish();
    outcome.exits_with(0);
    outcome.check(
        outcome.text().ends_with(&format!("mapped {}\n", 5 * MIB)),
        "a new mapping has it all",
    );
}

#[test]
fn a_window_smaller_than_the_file_is_used_again_and_again() {
    let tree = Tree::new();
    let data = noise(24 * MIB, 4);
    tree.write("data", &data);
    let stats = tempfile::NamedTempFile::new().unwrap();
    let script = "for i in 1 2; do sha256sum </s/data; done; cat /s/data >/s/copy; cmp /s/data /s/copy && echo same";
    let outcome = Oriel::run(&["-v", &tree.at("/s", "dax=always,window=8M")])
        .args(&["--stats", stats.path().to_str().unwrap()])
        .script(script)
        .finish();
    outcome.exits_with(0).says_no_error();
    let sum = format!("{}  -", sha256(&tree.path("data")));
    let lines: Vec<String> = outcome.text().lines().map(String::from).collect();
    assert_eq!(lines, [sum.clone(), sum, "same".into()], "what was read is right, every time");
    assert!(tree.read("copy") == data, "and what was written");
    let counters = counters(stats.path(), "share0");
    assert!(counters["dax_removes"].as_u64() > Some(10), "ranges were taken back: {counters:?}");
    assert_eq!(counters["dax_live"].as_u64(), Some(0), "none is left: {counters:?}");
}

const LARGE: usize = 256 * MIB;

/// 256 MiB in both directions; the host's side in memory.
fn large(options: &str) {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = |name: &str| directory.path().join(name);
    copy_executable(Path::new(PROBE), &path("guest-probe"));
    let data = noise(LARGE, 5);
    fs::write(path("from-host"), &data).unwrap();
    drop(data);
    let script = format!(
        "sha256sum /s/from-host; /s/guest-probe noise {LARGE} /s/from-guest; sha256sum /s/from-guest"
    );
    let stats = tempfile::NamedTempFile::new().unwrap();
    let outcome = Oriel::run(&["-v", &format!("{}:/s:{options}", text(directory.path()))])
        .args(&["--stats", stats.path().to_str().unwrap()])
        .script(&script)
        .timeout(std::time::Duration::from_secs(240))
        .finish();
    outcome.exits_with(0).says_no_error();
    let sums: Vec<String> = outcome
        .text()
        .lines()
        .map(|line| line.split(' ').next().unwrap_or_default().into())
        .collect();
    outcome.check(sums.len() == 2, "the guest prints two sums");
    assert_eq!(sums[0], sha256(&path("from-host")), "the guest reads what the host wrote");
    assert_eq!(fs::metadata(path("from-guest")).unwrap().len(), LARGE as u64);
    assert_eq!(sums[1], sha256(&path("from-guest")), "the host reads what the guest wrote");
    let counters = counters(stats.path(), "share0");
    let count = |name: &str| counters.get(name).and_then(|count| count.as_u64()).unwrap_or(0);
    if options.contains("dax=always") {
        assert_eq!(count("bytes_read"), 0, "all was read through the window: {counters:?}");
        assert!(
            count("dax_setups") >= LARGE as u64 / (2 * MIB as u64),
            "in ranges of 2 MiB: {counters:?}"
        );
    } else {
        assert!(count("bytes_read") >= LARGE as u64, "all was read by READ: {counters:?}");
        assert!(count("bytes_written") >= LARGE as u64, "all was written by WRITE: {counters:?}");
    }
}

#[test]
fn a_quarter_of_a_gibibyte_arrives_in_both_directions() {
    large("dax=always,window=128M");
    large("dax=never");
}

/// Pages in what the guest maps at a time.
const RANGE: u64 = 512;

/// Numbers of a share's counters.
fn count(counters: &serde_json::Map<String, serde_json::Value>, name: &str) -> u64 {
    counters.get(name).and_then(|count| count.as_u64()).unwrap_or(0)
}

#[test]
fn a_file_read_in_order_costs_no_faults_and_random_touches_enter_no_neighbours() {
    // The probe is a file of many ranges itself, and has a share of its own.
    let (programs, tree) = (Tree::with_probe(PROBE), Tree::new());
    tree.fill("data", 96 * 2 * MIB);
    let stats = tempfile::NamedTempFile::new().unwrap();
    let (programs, share) =
        (programs.at("/s", "dax=never"), tree.at("/d", "dax=always,window=256M"));
    let arguments = ["-v", &programs, "-v", &share, "--stats", stats.path().to_str().unwrap()];
    let mut guest = Bench::with(&arguments, "/s", &["../d/data"]);
    let mut faults = |line: &str| {
        let before = guest.faults();
        guest.time(line);
        guest.faults() - before
    };
    let in_order = faults(&format!("touch 0 {}", 32 * RANGE));
    assert!(in_order <= 2 * 32, "{in_order} faults for 32 ranges in order, 512 each without help");
    let scattered = faults("scatter 32 64 1");
    assert!((32..=3 * 32).contains(&scattered), "{scattered} faults for 32 single pages");
    // All the pages of ranges that come in no order: what it costs without.
    let shuffled = faults("ranges 64 80 3");
    // Three of them may follow one another all the same.
    assert!(shuffled >= 14 * RANGE, "{shuffled} faults for 16 ranges in a random order");
    guest.end();
    let counters = counters(stats.path(), "share1");
    let prefaulted = count(&counters, "dax_prefaulted");
    assert!((32..=34).contains(&prefaulted), "{counters:?}");
    let bytes = count(&counters, "dax_prefaulted_bytes");
    assert_eq!(bytes, prefaulted * 2 * MIB as u64, "{counters:?}");
}

#[test]
fn a_file_of_huge_pages_costs_one_fault_a_range_in_any_order() {
    let tree = Tree::with_probe(PROBE);
    fs::create_dir(tree.path("huge")).unwrap();
    let mounted = tree.path("huge");
    if mount("tmpfs", &mounted, "tmpfs", MountFlags::empty(), Some(c"huge=always")).is_err() {
        println!("this host has no huge pages in tmpfs");
        return;
    }
    tree.fill("huge/data", 32 * 2 * MIB);
    let mut guest =
        Bench::start(&tree.at("/s", "dax=always,window=128M"), "/s", &["huge/data"], "256M");
    let (faults, large) = (guest.faults(), guest.counter("pages_2m"));
    guest.time("ranges 0 16 5");
    let (faults, large) = (guest.faults() - faults, guest.counter("pages_2m") - large);
    guest.end();
    unmount(&mounted, UnmountFlags::DETACH).unwrap();
    assert!((16..=32).contains(&faults), "{faults} faults for 16 ranges of 512 small pages");
    assert!(large >= 16, "{large} large pages in KVM's page tables");
}

#[test]
fn with_dax_inode_files_are_mapped_while_they_fit_the_window_and_read_otherwise() {
    let tree = Tree::with_probe(PROBE);
    let stats = tempfile::NamedTempFile::new().unwrap();
    tree.fill("small", 100 << 10);
    tree.fill("large", 40 * MIB);
    for name in ["a", "b", "c", "d"] {
        tree.fill(name, 8 * MIB);
    }
    // 16 ranges, of which the guest keeps 3 free; the probe has some of the others. The second time no file is
    // looked up again: a listing would be a new chance for those that were refused, at the cost of those that
    // nobody has open.
    let share = tree.at("/s", "window=32M,cache=always");
    let script =
        "cd /s; set -- small large a b c d; ./guest-probe bench $* </dev/null; cat $* | wc -c";
    let outcome = Oriel::run(&["-v", &share, "--stats", stats.path().to_str().unwrap()])
        .script(script)
        .finish();
    outcome.exits_with(0).says_no_error();
    let counters = counters(stats.path(), "share0");
    let mapped = count(&counters, "dax_setups");
    assert!((4..=16).contains(&mapped), "{mapped} ranges of mapped files: {counters:?}");
    assert_eq!(count(&counters, "dax_removes"), 0, "no range is taken back: {counters:?}");
    assert!(count(&counters, "bytes_read") >= 40 * MIB as u64, "the rest is read: {counters:?}");
    for name in ["dax_files_read_small", "dax_files_read_large", "dax_files_read_pressure"] {
        assert!(count(&counters, name) > 0, "{name}: {counters:?}");
    }
    assert_eq!(count(&counters, "SETUPMAPPING"), mapped, "none was refused: {counters:?}");
}
