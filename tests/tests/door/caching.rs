//! What each cache mode promises: who sees whose change, and when. The README has these promises in a table, with
//! the names of these tests.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use devices::share::{CachePolicy, DaxPolicy, Options};
use integration::Door;
use tempfile::TempDir;

use super::PROBE;

const MODES: [CachePolicy; 4] =
    [CachePolicy::Never, CachePolicy::Metadata, CachePolicy::Auto, CachePolicy::Always];

/// `cache=auto` keeps names and attributes for a second; the kernel counts it in ticks.
const A_SECOND_IS_OVER: Duration = Duration::from_millis(1050);

/// A directory of the host, and the sandboxes that share it.
struct Host {
    directory: TempDir,
}

impl Host {
    fn new() -> Self {
        Self { directory: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.path(name), text).unwrap();
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn sandbox_with(&self, change: impl FnOnce(&mut Options)) -> Sandbox {
        let mut options = Options::new(self.directory.path());
        // There is no window behind /dev/fuse, and what a reply says of files for one costs requests.
        options.dax = DaxPolicy::Never;
        change(&mut options);
        Sandbox { door: Door::mount(options).unwrap() }
    }

    fn sandbox(&self, cache: CachePolicy) -> Sandbox {
        self.sandbox_with(|options| options.cache = cache)
    }
}

/// What a guest would see, seen by this machine's own kernel.
struct Sandbox {
    door: Door,
}

impl Sandbox {
    fn path(&self, name: &str) -> PathBuf {
        self.door.path().join(name)
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap()
    }

    fn exists(&self, name: &str) -> bool {
        self.path(name).symlink_metadata().is_ok()
    }

    fn len(&self, name: &str) -> u64 {
        fs::metadata(self.path(name)).unwrap().len()
    }

    fn list(&self) -> Vec<String> {
        let entries = fs::read_dir(self.door.path()).unwrap();
        let mut names: Vec<_> =
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The requests that reached the share while `act` ran, but those that end something: the kernel sends them
    /// when it likes.
    fn requests(&self, act: impl FnOnce()) -> Vec<(&'static str, u64)> {
        let ends = ["FORGET", "BATCH_FORGET", "RELEASE", "RELEASEDIR", "FLUSH"];
        let snapshot = || self.door.counters().snapshot();
        let before = snapshot();
        act();
        let mut sent = Vec::new();
        for (name, count) in snapshot() {
            let old =
                before.iter().find(|(other, _)| *other == name).map_or(0, |(_, count)| *count);
            let operation = name.bytes().all(|byte| byte.is_ascii_uppercase() || byte == b'_');
            if operation && !ends.contains(&name) && count > old {
                sent.push((name, count - old));
            }
        }
        sent
    }

    /// How many of these were of one operation.
    fn count(&self, operation: &str, act: impl FnOnce()) -> u64 {
        let sent = self.requests(act);
        sent.iter().find(|(name, _)| *name == operation).map_or(0, |(_, count)| *count)
    }
}

/// A process that has a file mapped.
struct Mapped {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
}

impl Mapped {
    fn new(path: &Path) -> Self {
        let mut command = Command::new(PROBE);
        command.arg("map").arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdin = child.stdin.take();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let mut mapped = Self { child, stdin, stdout };
        assert!(mapped.hear().starts_with("mapped "));
        mapped
    }

    fn hear(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line.trim_end().to_string()
    }

    fn ask(&mut self, line: &str) -> String {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
        self.hear()
    }

    /// The letter at an offset.
    fn letter(&mut self, offset: usize) -> char {
        char::from(self.ask(&format!("get {offset}")).parse::<u8>().unwrap())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        self.stdin = None;
        let _ = self.child.wait();
    }
}

fn is_listing(sent: &[(&str, u64)]) -> bool {
    sent.iter().any(|(name, _)| name.starts_with("READDIR"))
}

/// Asks `seen` for up to ten seconds.
fn within_seconds(what: &str, seen: impl Fn() -> bool) {
    let start = Instant::now();
    while !seen() {
        assert!(start.elapsed() < Duration::from_secs(10), "{what}");
        sleep(Duration::from_millis(20));
    }
}

// --- Guest to host, and so to the host's other guests.

#[test]
fn what_a_guest_does_is_on_the_host_when_the_call_returns() {
    for cache in MODES {
        let host = Host::new();
        let guest = host.sandbox(cache);
        fs::create_dir(guest.path("d")).unwrap();
        fs::write(guest.path("d/new"), "text").unwrap();
        assert_eq!(host.read("d/new"), "text", "{cache:?}");
        let mut file = OpenOptions::new().append(true).open(guest.path("d/new")).unwrap();
        file.write_all(b" and more").unwrap();
        assert_eq!(host.read("d/new"), "text and more", "{cache:?}: before it is closed");
        fs::rename(guest.path("d/new"), guest.path("moved")).unwrap();
        assert!(host.path("moved").exists() && !host.path("d/new").exists(), "{cache:?}");
        fs::set_permissions(guest.path("moved"), PermissionsExt::from_mode(0o640)).unwrap();
        file.set_len(4).unwrap();
        let there = fs::metadata(host.path("moved")).unwrap();
        assert_eq!((there.mode() & 0o777, there.len()), (0o640, 4), "{cache:?}");
        fs::remove_file(guest.path("moved")).unwrap();
        assert!(!host.path("moved").exists(), "{cache:?}");
    }
}

#[test]
fn with_writeback_data_is_on_the_host_after_close_or_fsync() {
    let host = Host::new();
    let guest = host.sandbox_with(|options| {
        options.cache = CachePolicy::Always;
        options.writeback = true;
    });
    let mut file = File::create(guest.path("file")).unwrap();
    let sent = guest.count("WRITE", || {
        for _ in 0..100 {
            file.write_all(b"0123456789").unwrap();
        }
    });
    assert_eq!(sent, 0, "the guest collects writes");
    let synced = guest.count("WRITE", || file.sync_all().unwrap());
    assert_eq!(synced, 1, "a hundred writes are one");
    assert_eq!(host.read("file"), "0123456789".repeat(100));
    file.write_all(b"end").unwrap();
    drop(file);
    assert_eq!(host.read("file").len(), 1003);
}

#[test]
fn a_stored_byte_is_on_the_host_after_msync() {
    for cache in MODES {
        let host = Host::new();
        host.write("file", "abc");
        let guest = host.sandbox(cache);
        let mut mapped = Mapped::new(&guest.path("file"));
        assert_eq!(mapped.ask(&format!("put 1 {}", b'X')), "done");
        assert_eq!(mapped.ask("sync"), "done");
        assert_eq!(host.read("file"), "aXc", "{cache:?}");
        assert_eq!(mapped.ask(&format!("put 2 {}", b'Y')), "done");
        drop(mapped);
        within_seconds("what was stored is written when the mapping ends", || {
            host.read("file") == "aXY"
        });
    }
}

// --- Host to guest.

#[test]
fn with_never_each_look_asks_the_host() {
    let host = Host::new();
    host.write("file", "text");
    let guest = host.sandbox(CachePolicy::Never);
    for round in 0..3 {
        let sent = guest.requests(|| assert!(guest.exists("file")));
        assert!(sent.contains(&("LOOKUP", 1)), "{round}: {sent:?}");
        assert_eq!(guest.count("LOOKUP", || assert!(!guest.exists("missing"))), 1, "{round}");
        assert_eq!(guest.count("OPENDIR", || drop(guest.list())), 1, "{round}");
        assert!(guest.count("READDIRPLUS", || drop(guest.list())) > 0, "{round}");
    }
    let file = File::open(guest.path("file")).unwrap();
    let mut bytes = [0; 4];
    for round in 0..3 {
        let sent = guest.requests(|| file.read_exact_at(&mut bytes, 0).unwrap());
        assert_eq!(sent, [("READ", 1)], "{round}: each read is one of the host's");
    }
}

#[test]
fn with_never_the_hosts_changes_are_seen_at_once() {
    let host = Host::new();
    let guest = host.sandbox(CachePolicy::Never);
    host.write("file", "one");
    assert_eq!(guest.read("file"), "one");
    let mut open = File::open(guest.path("file")).unwrap();
    for round in 0..50 {
        let text = format!("round {round}");
        host.write("file", &text);
        assert_eq!(guest.len("file"), text.len() as u64);
        assert_eq!(guest.read("file"), text);
        let mut same = String::new();
        open.seek(SeekFrom::Start(0)).unwrap();
        open.read_to_string(&mut same).unwrap();
        assert_eq!(same, text, "in a file that is open");
        let name = format!("name {round}");
        assert!(!guest.exists(&name));
        host.write(&name, "");
        assert!(guest.exists(&name) && guest.list().contains(&name));
        fs::rename(host.path(&name), host.path("moved")).unwrap();
        assert!(!guest.exists(&name) && guest.exists("moved") && !guest.list().contains(&name));
        fs::remove_file(host.path("moved")).unwrap();
        assert!(!guest.exists("moved"));
    }
}

#[test]
fn with_never_a_mapping_shows_what_the_host_has_when_it_is_made() {
    // With metadata it is the same: neither keeps data.
    for cache in [CachePolicy::Never, CachePolicy::Metadata] {
        let host = Host::new();
        host.write("file", "one");
        let guest = host.sandbox(cache);
        let mut first = Mapped::new(&guest.path("file"));
        assert_eq!(first.letter(0), 'o');
        host.write("file", "two");
        let mut second = Mapped::new(&guest.path("file"));
        assert_eq!(second.letter(0), 't', "{cache:?}");
        assert_eq!(first.letter(0), 't', "they are one memory");
    }
}

#[test]
fn with_metadata_names_and_attributes_are_asked_for_once_and_data_each_time() {
    let host = Host::new();
    host.write("file", "text");
    let guest = host.sandbox(CachePolicy::Metadata);
    assert!(guest.exists("file") && !guest.exists("missing"));
    assert_eq!(guest.list(), ["file"]);
    sleep(A_SECOND_IS_OVER);
    let sent = guest.requests(|| {
        assert!(guest.exists("file") && !guest.exists("missing"));
        assert_eq!(guest.len("file"), 4);
    });
    assert_eq!(sent, [], "names that are there and not, and attributes");
    let listed = guest.requests(|| assert_eq!(guest.list(), ["file"]));
    assert!(!is_listing(&listed), "the directory is opened and not read: {listed:?}");

    let file = File::open(guest.path("file")).unwrap();
    let mut bytes = [0; 4];
    for text in ["one.", "two."] {
        host.write("file", text);
        let sent = guest.requests(|| file.read_exact_at(&mut bytes, 0).unwrap());
        assert_eq!(sent, [("READ", 1)]);
        assert_eq!(bytes, text.as_bytes());
    }
}

#[test]
fn with_auto_a_new_name_is_seen_at_once() {
    let host = Host::new();
    let guest = host.sandbox(CachePolicy::Auto);
    for round in 0..50 {
        let name = round.to_string();
        assert!(!guest.exists(&name) && !guest.list().contains(&name));
        host.write(&name, "text");
        assert!(guest.exists(&name));
        assert!(guest.list().contains(&name), "each listing is a new one");
        assert_eq!(guest.read(&name), "text");
    }
}

#[test]
fn with_auto_names_and_attributes_are_asked_for_once_a_second() {
    let host = Host::new();
    host.write("file", "text");
    let guest = host.sandbox(CachePolicy::Auto);
    let look = || {
        fs::metadata(guest.path("file")).unwrap();
    };
    look();
    let start = Instant::now();
    let sent = guest.requests(look);
    if start.elapsed() < Duration::from_millis(900) {
        assert_eq!(sent, []);
    }
    sleep(A_SECOND_IS_OVER);
    assert!(guest.count("LOOKUP", look) > 0);
}

#[test]
fn with_auto_the_hosts_changes_are_seen_within_a_second() {
    let host = Host::new();
    for name in ["gone", "moved", "changed", "replaced"] {
        host.write(name, "before");
    }
    let guest = host.sandbox(CachePolicy::Auto);
    let open = File::open(guest.path("changed")).unwrap();
    let mut bytes = [0; 6];
    open.read_exact_at(&mut bytes, 0).unwrap();
    for name in ["gone", "moved", "changed", "replaced"] {
        assert_eq!(guest.read(name), "before");
    }
    fs::remove_file(host.path("gone")).unwrap();
    fs::rename(host.path("moved"), host.path("elsewhere")).unwrap();
    host.write("changed", "after it");
    host.write("new", "after it, too");
    fs::rename(host.path("new"), host.path("replaced")).unwrap();
    sleep(A_SECOND_IS_OVER);
    assert!(!guest.exists("gone") && !guest.exists("moved") && guest.exists("elsewhere"));
    assert_eq!((guest.len("changed"), guest.len("replaced")), (8, 13));
    assert_eq!(guest.read("replaced"), "after it, too");
    open.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"after ", "in a file that is open");
    assert_eq!(guest.read("changed"), "after it");
}

#[test]
fn with_auto_data_is_read_once_and_again_when_the_file_is_opened() {
    let host = Host::new();
    host.write("file", "text");
    let guest = host.sandbox_with(|options| {
        // So that the clock of a slow machine has no part in it.
        options.entry_timeout = Some(Duration::from_secs(60));
        options.attr_timeout = Some(Duration::from_secs(60));
    });
    let file = File::open(guest.path("file")).unwrap();
    let mut bytes = [0; 4];
    assert_eq!(guest.count("READ", || file.read_exact_at(&mut bytes, 0).unwrap()), 1);
    assert_eq!(guest.requests(|| file.read_exact_at(&mut bytes, 0).unwrap()), []);
    host.write("file", "TEXT");
    let again = File::open(guest.path("file")).unwrap();
    assert_eq!(guest.count("READ", || again.read_exact_at(&mut bytes, 0).unwrap()), 1);
    assert_eq!(&bytes, b"TEXT");
}

#[test]
fn with_auto_and_no_attr_timeout_an_open_sees_what_was_closed_before_it() {
    let host = Host::new();
    host.write("file", "");
    let [one, two] =
        [(); 2].map(|()| host.sandbox_with(|options| options.attr_timeout = Some(Duration::ZERO)));
    for round in 0..50 {
        let text = "x".repeat(round * 7 + 1);
        let (writer, reader) = if round % 2 == 0 { (&one, &two) } else { (&two, &one) };
        fs::write(writer.path("file"), &text).unwrap();
        assert_eq!(reader.read("file"), text, "written by a sandbox");
        let text = "y".repeat(round * 3 + 1);
        host.write("file", &text);
        assert_eq!(reader.read("file"), text, "written by the host");
    }
}

#[test]
fn with_auto_a_mapping_shows_what_a_later_read_shows() {
    let host = Host::new();
    host.write("file", "one");
    let guest = host.sandbox(CachePolicy::Auto);
    let mut mapped = Mapped::new(&guest.path("file"));
    assert_eq!(mapped.letter(0), 'o');
    host.write("file", "two");
    sleep(A_SECOND_IS_OVER);
    assert_eq!(guest.read("file"), "two");
    assert_eq!(mapped.letter(0), 't');
}

#[test]
fn with_always_everything_is_asked_for_once() {
    let host = Host::new();
    host.write("file", "text");
    let guest = host.sandbox(CachePolicy::Always);
    let look = || {
        assert!(guest.exists("file") && !guest.exists("missing"));
        assert_eq!(guest.len("file"), 4);
    };
    assert_eq!(guest.list(), ["file"]);
    assert_eq!(guest.read("file"), "text");
    // Who has read asks for the new access time once.
    look();
    sleep(A_SECOND_IS_OVER);
    assert_eq!(guest.requests(look), []);
    let listed = guest.requests(|| assert_eq!(guest.list(), ["file"]));
    assert!(!is_listing(&listed), "the directory is opened and not read: {listed:?}");
    let sent = guest.requests(|| assert_eq!(guest.read("file"), "text"));
    assert!(!sent.iter().any(|(name, _)| *name == "READ"), "opened and not read: {sent:?}");
    // Nobody else was to change the directory; who does so all the same is not seen.
    host.write("file", "TEXT");
    host.write("missing", "");
    assert_eq!(guest.read("file"), "text");
    assert!(!guest.exists("missing"));
}

#[test]
fn what_a_guest_does_itself_it_sees_at_once_in_every_mode() {
    for cache in MODES {
        let host = Host::new();
        let guest = host.sandbox(cache);
        for round in 0..20 {
            let name = round.to_string();
            assert!(!guest.exists(&name), "{cache:?}");
            fs::write(guest.path(&name), &name).unwrap();
            assert!(guest.exists(&name) && guest.list().contains(&name), "{cache:?}");
            assert_eq!(guest.read(&name), name, "{cache:?}");
            fs::rename(guest.path(&name), guest.path("moved")).unwrap();
            assert!(!guest.exists(&name) && guest.list() == ["moved"], "{cache:?}");
            fs::write(guest.path("moved"), "longer than before").unwrap();
            assert_eq!(guest.len("moved"), 18, "{cache:?}");
            fs::remove_file(guest.path("moved")).unwrap();
            assert!(!guest.exists("moved") && guest.list().is_empty(), "{cache:?}");
        }
    }
}

#[test]
fn each_timeout_counts_by_itself() {
    let host = Host::new();
    host.write("file", "text");
    let long = Duration::from_secs(60);
    let of = |entry, attr, negative| {
        let guest = host.sandbox_with(|options| {
            options.cache = CachePolicy::Never;
            options.entry_timeout = Some(entry);
            options.attr_timeout = Some(attr);
            options.negative_timeout = Some(negative);
        });
        let names = || {
            guest.exists("missing");
            guest.exists("missing");
        };
        let missing = guest.count("LOOKUP", names);
        guest.exists("file");
        let sent = guest.requests(|| {
            guest.exists("file");
        });
        let looked_up = sent.iter().any(|(name, _)| *name == "LOOKUP");
        let asked = sent.iter().any(|(name, _)| *name == "GETATTR" || *name == "STATX");
        (looked_up, asked, missing)
    };
    let none = Duration::ZERO;
    assert_eq!(of(long, long, none), (false, false, 2));
    assert_eq!(of(long, long, long), (false, false, 1));
    assert_eq!(of(long, none, none), (false, true, 2));
    // A look-up brings the attributes along, and they count.
    assert_eq!(of(none, long, none), (true, false, 2));
    assert!(of(none, none, none).0);
}

// --- Guest to guest.

#[test]
fn with_never_two_sandboxes_see_each_other_at_once() {
    let host = Host::new();
    let [one, two] = [(); 2].map(|()| host.sandbox(CachePolicy::Never));
    for round in 0..50 {
        let (writer, reader) = if round % 2 == 0 { (&one, &two) } else { (&two, &one) };
        let (name, text) = (format!("name {round}"), format!("{round}: {}", "x".repeat(round)));
        assert!(!reader.exists(&name));
        fs::write(writer.path(&name), &text).unwrap();
        assert_eq!(reader.read(&name), text);
        let mut open = OpenOptions::new().append(true).open(writer.path(&name)).unwrap();
        open.write_all(b"more").unwrap();
        assert_eq!(reader.read(&name), format!("{text}more"));
        fs::remove_file(writer.path(&name)).unwrap();
        assert!(!reader.exists(&name) && !reader.list().contains(&name));
    }
}

#[test]
fn with_auto_two_sandboxes_see_each_other_within_a_second() {
    let host = Host::new();
    let [one, two] = [(); 2].map(|()| host.sandbox(CachePolicy::Auto));
    fs::write(one.path("file"), "one").unwrap();
    assert_eq!(two.read("file"), "one", "a new name at once");
    fs::write(one.path("file"), "number two").unwrap();
    fs::write(two.path("other"), "x").unwrap();
    assert!(one.exists("other"));
    fs::remove_file(two.path("other")).unwrap();
    sleep(A_SECOND_IS_OVER);
    assert_eq!(two.read("file"), "number two");
    assert!(!one.exists("other"));
}

#[test]
fn only_one_of_two_sandboxes_makes_a_name_in_every_mode() {
    for cache in MODES {
        let host = Host::new();
        let [one, two] = [(); 2].map(|()| host.sandbox(cache));
        let make = |guest: &Sandbox, name: &str| {
            OpenOptions::new().write(true).create_new(true).open(guest.path(name)).map(drop)
        };
        for round in 0..20 {
            let name = round.to_string();
            // Both know that it is not there.
            assert!(!one.exists(&name) && !two.exists(&name));
            make(&one, &name).unwrap();
            let second = make(&two, &name).unwrap_err();
            assert_eq!(second.kind(), ErrorKind::AlreadyExists, "{cache:?}");
        }
    }
}

#[test]
fn appends_of_two_sandboxes_and_the_host_are_all_kept_in_every_mode() {
    for cache in MODES {
        let host = Host::new();
        host.write("log", "");
        let guests = [(); 2].map(|()| host.sandbox(cache));
        let mut paths: Vec<_> = guests.iter().map(|guest| guest.path("log")).collect();
        paths.push(host.path("log"));
        std::thread::scope(|scope| {
            for (writer, path) in paths.iter().enumerate() {
                scope.spawn(move || {
                    let mut log = OpenOptions::new().append(true).open(path).unwrap();
                    for line in 0..200 {
                        log.write_all(format!("{writer} {line}\n").as_bytes()).unwrap();
                    }
                });
            }
        });
        let text = host.read("log");
        assert_eq!(text.lines().count(), 600, "{cache:?}");
        for writer in 0..3 {
            let start = format!("{writer} ");
            let lines: Vec<_> = text.lines().filter_map(|line| line.strip_prefix(&start)).collect();
            let expected: Vec<_> = (0..200).map(|line| line.to_string()).collect();
            assert_eq!(lines, expected, "{cache:?}: all of writer {writer}, in order");
        }
    }
}
