//! A guest whose program takes a device from its kernel and drives it by hand, as no driver does.

use std::time::Duration;

use integration::{Oriel, Tree};
use rustix::fs::{CWD, FileType, Mode, mknodat};

use super::PROBE;

/// Where the attacked share's device is taken from the kernel. The other share has the program.
const TAKE: &str = "umount /victim; /s/guest-probe";

/// A guest with two shares, of which one is for the attack.
fn guest(victim: &Tree, other: &Tree, script: &str) -> Oriel {
    Oriel::run(&["-v", &victim.at("/victim", "tag=victim,window=8M,dax=always")])
        .args(&["-v", &other.at("/s", "cache=never")])
        .timeout(Duration::from_secs(240))
        .script(script)
}

/// A LOOKUP of `file` in the root, as it is in a queue (`fuse_in_header`), with a number that no other request has.
fn lookup_of_file() -> Vec<u8> {
    let (len, opcode, unique, root) = (45u32, 1u32, 0x6e6f_6f74_6865_7221u64, 1u64);
    let mut bytes = [len, opcode].map(u32::to_ne_bytes).concat();
    bytes.extend([unique, root].map(u64::to_ne_bytes).concat());
    // User, group, process, and what is not used.
    bytes.extend([0; 16]);
    bytes.extend(b"file\0");
    bytes
}

fn trees() -> (Tree, Tree) {
    let (victim, other) = (Tree::new(), Tree::with_probe(PROBE));
    victim.write("file", b"inside the file, and long enough to be read");
    victim.write("request", &lookup_of_file());
    mknodat(CWD, victim.path("fifo"), FileType::Fifo, Mode::from(0o666), 0).unwrap();
    other.write("other", b"of another share");
    (victim, other)
}

#[test]
fn a_driver_that_means_harm_gets_what_it_deserves_and_others_go_on() {
    let (victim, other) = trees();
    // In the end the kernel has the device again, and mounts it.
    let script = format!(
        "{TAKE} hostile victim && mount -t virtiofs victim /victim && \
         echo after=$(cat /victim/file) && echo more >/victim/new && echo other=$(cat /s/other)"
    );
    let outcome = guest(&victim, &other, &script).finish();
    outcome.exits_with(0);
    let count = outcome.number("cases");
    let text = outcome.text();
    let wrong: Vec<_> = text
        .lines()
        .filter_map(|line| line.split_once('='))
        .filter(|(name, said)| !["cases", "after", "other"].contains(name) && *said != "ok")
        .collect();
    outcome.check(wrong.is_empty(), &format!("all cases are ok, but {wrong:?}"));
    let fine = text.lines().filter(|line| line.ends_with("=ok")).count() as u64;
    outcome.check(fine == count && count > 50, "all were tried");
    outcome.guest_says(&[
        ("after", "inside the file, and long enough to be read", "the kernel has the device again"),
        ("other", "of another share", "the other share goes on"),
    ]);
    assert_eq!(victim.read("new"), b"more\n");
    assert_eq!(std::fs::read_dir(victim.path("")).unwrap().count(), 4, "nothing else was made");
}

#[test]
fn a_guest_that_touches_nothing_in_a_window_ends_itself_with_a_message() {
    let (victim, other) = trees();
    let script = format!("{TAKE} touch-window victim; echo lived=$?");
    let outcome = guest(&victim, &other, &script).finish();
    outcome.check(outcome.status != 0, "the sandbox does not go on as if nothing had been");
    outcome.check(outcome.text().contains("touching"), "it got as far as that");
    outcome.check(!outcome.text().contains("lived=0"), "nothing was read there");
    let what = "the guest touched memory that the host does not have";
    outcome.check(outcome.stderr.contains(what), "it says what has happened");
}
