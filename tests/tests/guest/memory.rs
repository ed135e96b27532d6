//! Guest memory: how much, and what is behind it.

use std::fs;

use integration::{Oriel, Outcome, Tree};

const MIB: u64 = 1 << 20;
const SCRIPT: &str = r#"
    echo "total=$(awk '/^MemTotal/ { print $2 }' /proc/meminfo)"
    grep 'System RAM' /proc/iomem | while IFS=' -' read -r first last rest; do
        echo "range $((0x$first)) $((0x$last))"
    done
    mount -t tmpfs -o size=90% tmpfs /mnt 2>/dev/null || { mkdir -p /mnt; mount -t tmpfs -o size=90% tmpfs /mnt; }
    size=$FILL
    dd if=/dev/zero of=/mnt/fill bs=1M count=$size 2>/dev/null
    echo "filled=$(stat -c %s /mnt/fill)"
    echo "tail=$(tail -c 1 /mnt/fill | od -An -tu1 | tr -d ' ')"
"#;

/// Boots with `memory` and checks how much there is; `fill` MiB of it are touched.
fn boot(memory: &str, size: u64, fill: u64) -> Outcome {
    let outcome =
        Oriel::run(&["--memory", memory, "-e", &format!("FILL={fill}")]).script(SCRIPT).finish();
    outcome.exits_with(0).says_no_error();
    let ranges = ranges(&outcome);
    let sum: u64 = ranges.iter().map(|(first, last)| last + 1 - first).sum();
    // The legacy hole below 1 MiB, and a page at the end of each region.
    outcome
        .check(sum <= size && sum + MIB > size, &format!("{sum} bytes of RAM are {size} as asked"));
    let total = outcome.number("total") * 1024;
    // What the kernel holds itself: its image, and 1/64 for its map of pages.
    outcome
        .check(total < size && total + 64 * MIB + size / 32 > size, "MemTotal is what was asked");
    outcome.check(outcome.number("filled") == fill * MIB, "the memory can be filled");
    outcome
}

fn ranges(outcome: &Outcome) -> Vec<(u64, u64)> {
    let number = |word: Option<&str>| word.and_then(|word| word.parse().ok()).expect("a number");
    let text = outcome.text();
    let lines = text.lines().filter_map(|line| line.strip_prefix("range "));
    lines
        .map(|line| line.split_once(' ').unwrap())
        .map(|(a, b)| (number(Some(a)), number(Some(b))))
        .collect()
}

#[test]
fn a_small_guest_fits_in_128_mib() {
    boot("128M", 128 * MIB, 16);
}

#[test]
fn memory_above_the_32_bit_hole_is_there_and_works() {
    // Linux takes memory from the top: what is touched first is above 4 GiB.
    let outcome = boot("4G,backend=memfd", 4096 * MIB, 128);
    let above = ranges(&outcome).iter().any(|(first, _)| *first >= 4096 * MIB);
    outcome.check(above, "some RAM is above 4 GiB");
    let hole = ranges(&outcome)
        .iter()
        .all(|(_, last)| *last < 4096 * MIB - 16 * MIB || *last >= 4096 * MIB);
    outcome.check(hole, "none where the interrupt controllers are");
}

#[test]
fn a_file_backend_leaves_no_file() {
    let directory = tempfile::tempdir_in("/dev/shm").unwrap();
    let path = directory.path().to_str().unwrap();
    let run = Oriel::run(&["--memory", &format!("192M,backend=file:{path}")]);
    let mut running = run.args(&["-i"]).script("echo ready; read answer; echo got $answer").start();
    assert_eq!(running.hear(), "ready", "the guest runs on a file");
    let named = fs::read_dir(path).unwrap().count();
    let maps = fs::read_to_string(format!("/proc/{}/maps", running.process_id())).unwrap();
    assert_eq!(named, 0, "the file has no name even while the guest runs");
    assert!(maps.contains(path), "the memory is a file of that directory: {maps}");
    assert_eq!(running.ask("on"), "got on");
    running.finish().exits_with(0).says_no_error();
    assert_eq!(fs::read_dir(path).unwrap().count(), 0, "nothing is left");
    boot(&format!("256M,backend=file:{path}"), 256 * MIB, 64);
    assert_eq!(fs::read_dir(path).unwrap().count(), 0, "nothing is left");
}

/// One test, for they share the host's pages.
#[test]
fn huge_pages_back_a_guest_and_are_given_back() {
    for (name, size, kind, asked) in
        [("2048kB", 2 * MIB, "hugetlb:2M", 256), ("1048576kB", 1024 * MIB, "hugetlb:1G", 1024)]
    {
        let directory = format!("/sys/kernel/mm/hugepages/hugepages-{name}");
        let read = |file: &str| -> u64 {
            fs::read_to_string(format!("{directory}/{file}")).unwrap().trim().parse().unwrap()
        };
        if !fs::exists(&directory).unwrap() {
            println!("this host has no huge pages of {name}");
            continue;
        }
        let memory = format!("{asked}M,backend={kind}");
        let pages = asked * MIB / size;
        if read("free_hugepages") == 0 {
            let outcome = Oriel::refused(&["--memory", &memory]).guest(&["true"]).finish();
            outcome.refuses(125, &["--memory", "huge", "nr_hugepages"]);
        }
        let reserved = read("nr_hugepages");
        if fs::write(format!("{directory}/nr_hugepages"), (reserved + pages).to_string()).is_err()
            || read("free_hugepages") < pages
        {
            println!("this host has no {pages} huge pages of {name} to give");
            fs::write(format!("{directory}/nr_hugepages"), reserved.to_string()).ok();
            continue;
        }
        let free = read("free_hugepages");
        boot(&memory, asked * MIB, 64);
        assert_eq!(read("free_hugepages"), free, "{kind}: all pages are given back");
        fs::write(format!("{directory}/nr_hugepages"), reserved.to_string()).unwrap();
        println!("{kind}: done");
    }
}

#[test]
fn an_anonymous_gibibyte_costs_the_host_what_the_guest_touches() {
    let tree = Tree::new();
    let share = tree.at("/s", "dax=never");
    let mut running =
        Oriel::run(&["-i", "-v", &share]).script("echo ready; read x; echo $x").start();
    assert_eq!(running.hear(), "ready");
    let status = fs::read_to_string(format!("/proc/{}/status", running.process_id())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident: u64 = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(
        resident < 400 << 10,
        "{resident} KiB are resident of a guest of 1 GiB that did nothing"
    );
    assert_eq!(running.ask("bye"), "bye");
    running.finish().exits_with(0);
}
