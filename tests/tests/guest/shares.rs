//! Shares: options, file operations, and what the host sees of them.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use integration::{Oriel, Outcome, Tree, noise};
use serde_json::Value;

use super::PROBE;

/// What a share's device counted.
pub fn counters(stats: &std::path::Path, tag: &str) -> serde_json::Map<String, Value> {
    let text = fs::read_to_string(stats).expect("--stats wrote a file");
    let value: Value = serde_json::from_str(&text).expect("--stats wrote JSON");
    let shares = value["shares"].as_array().expect("a list of shares");
    let share = shares.iter().find(|share| share["tag"] == tag).expect("a share of that tag");
    share["counters"].as_object().expect("counters").clone()
}

#[test]
fn shares_differ_in_their_options() {
    let trees: Vec<Tree> = (0..5).map(|_| Tree::with_probe(PROBE)).collect();
    for tree in &trees {
        tree.write("file", b"text of the host\n");
    }
    let stats = tempfile::NamedTempFile::new().unwrap();
    let script = r#"
        for name in plain never always ro deep/in/it; do
            echo "mount.$name=$(grep " /$name " /proc/mounts)"
            echo "text.$name=$(cat /$name/file)"
        done
        for name in plain never always deep/in/it; do echo "$name" >/$name/answer; done
        echo "tags=$(cat /sys/fs/virtiofs/*/tag | sort | xargs)"
        mount -o remount,rw /ro
        echo "remounted=$(grep -c ' /ro virtiofs rw' /proc/mounts)"
        /ro/guest-probe read-only /ro
        echo "list=$(ls /ro | xargs)"
    "#;
    let outcome = Oriel::run(&[
        "-v",
        &trees[0].at("/plain", "tag=first"),
        "--share",
        &trees[1].at("/never", "dax=never,cache=never"),
    ])
    .args(&["--volume", &trees[2].at("/always", "dax=always,cache=always,window=64M,queues=1")])
    .args(&["-v", &trees[3].at("/ro", "ro")])
    .args(&["-v", &trees[4].at("/deep/in/it", "cache=metadata,window=2M,queues=3")])
    .args(&["--stats", stats.path().to_str().unwrap()])
    .script(script)
    .finish();
    outcome.exits_with(0).says_no_error().guest_says(&[
        ("tags", "first share1 share2 share3 share4", "each has its tag"),
        ("remounted", "1", "the guest has made it writable for itself"),
        ("write", "ok", "the host refuses to open for writing"),
        ("truncate", "ok", "the host refuses to truncate"),
        ("create", "ok", "the host refuses a file"),
        ("mkdir", "ok", "the host refuses a directory"),
        ("unlink", "ok", "the host refuses to unlink"),
        ("rename", "ok", "the host refuses to rename"),
        ("link", "ok", "the host refuses a link"),
        ("symlink", "ok", "the host refuses a symbolic link"),
        ("chmod", "ok", "the host refuses a mode"),
        ("utimes", "ok", "the host refuses times"),
        ("setxattr", "ok", "the host refuses an attribute"),
        ("list", "file guest-probe", "nothing has changed"),
    ]);
    for (name, option) in [
        ("plain", "dax=inode"),
        ("always", "dax=always"),
        ("ro", "dax=inode"),
        ("deep/in/it", "dax=inode"),
    ] {
        let mount = outcome.value(&format!("mount.{name}"));
        outcome.check(mount.contains(option), &format!("{name} is mounted with {option}"));
    }
    outcome.check(!outcome.value("mount.never").contains("dax"), "dax=never has none");
    for (tree, name) in [(0, "plain"), (1, "never"), (2, "always"), (4, "deep/in/it")] {
        let text = outcome.value(&format!("text.{name}"));
        outcome.check(text == "text of the host", &format!("the guest reads {name}"));
        assert_eq!(
            trees[tree].read("answer"),
            format!("{name}\n").as_bytes(),
            "the guest writes {name}"
        );
    }
    assert_eq!(trees[3].names("."), ["file", "guest-probe"], "nothing is new on the host");
    assert!(
        counters(stats.path(), "first")["INIT"].as_u64() == Some(1),
        "the counters name requests"
    );
    let never = counters(stats.path(), "share1");
    assert_eq!(never["dax_setups"].as_u64(), Some(0), "dax=never maps nothing");
    assert!(never["READ"].as_u64() > Some(0), "dax=never reads");
}

/// All operations in a guest, and their results as the host sees them.
fn operations(options: &str) -> Outcome {
    let tree = Tree::with_probe(PROBE);
    fs::create_dir(tree.path("work")).unwrap();
    let script = "/s/guest-probe files /s/work; /s/guest-probe locks /s/work";
    let outcome = Oriel::run(&["-v", &tree.at("/s", options)]).script(script).finish();
    outcome.exits_with(0);
    let wrong: Vec<_> = outcome
        .text()
        .lines()
        .filter(|line| !line.ends_with("=ok"))
        .filter(|line| !line.starts_with("statfs_bytes=") && !line.starts_with("operations="))
        .map(String::from)
        .collect();
    outcome.check(wrong.is_empty(), &format!("{options}: every operation works: {wrong:#?}"));
    let right = outcome.text().lines().filter(|line| line.ends_with("=ok")).count() as u64;
    // The two locks are extra.
    outcome.check(right == outcome.number("operations") + 2, "no operation was left out");

    let read = |name: &str| tree.read(&format!("work/{name}"));
    let data = |name: &str| fs::symlink_metadata(tree.path(&format!("work/{name}"))).unwrap();
    assert_eq!(read("plain"), b"HELLO, world\nmore\n", "written, appended, overwritten");
    assert_eq!(read("truncated")[..5000], noise(10_000, 3)[..5000], "truncated");
    assert_eq!(read("truncated").len(), 9000, "grown");
    assert_eq!(read("new"), b"replaced", "renamed over");
    assert_eq!((read("here"), read("there")), (b"there".to_vec(), b"here".to_vec()), "exchanged");
    assert_eq!(data("link").nlink(), 1, "one link left");
    assert!(data("symlink").is_symlink(), "a symbolic link");
    assert_eq!(data("mode").mode() & 0o7777, 0o4751, "the mode");
    assert_eq!((data("owned").uid(), data("owned").gid()), (1234, 4321), "the owner");
    assert_eq!(data("dated").mtime(), 1_234_567_890, "the time");
    assert!(data("fifo").file_type().is_fifo(), "a fifo");
    assert!(data("socket").file_type().is_socket(), "a socket");
    assert!(!tree.path("work/device").exists(), "no device node on the host");
    let mut value = [0u8; 16];
    let length = rustix::fs::getxattr(tree.path("work/attributed"), "user.one", &mut value[..]);
    assert_eq!(
        length.map(|length| value[..length].to_vec()),
        Ok(b"first".to_vec()),
        "an attribute"
    );
    assert_eq!(data("allocated").len(), 1 << 20, "allocated");
    // Reading a hole of tmpfs through a mapping fills it.
    if options.contains("dax=never") {
        assert!(data("punched").blocks() * 512 <= 65536 - 8192, "a hole on the host");
    }
    assert!(data("sparse").blocks() < 64, "sparse on the host");
    assert_eq!(read("tmpfile"), b"named later", "an unnamed file with a name");
    assert_eq!(read("copy"), noise(300_000, 9), "copied");
    assert_eq!(tree.names("work/many"), ["0000"], "of the thousand one is left");
    for number in 0..4 {
        assert_eq!(read(&format!("parallel{number}")), noise(200_000, number), "writer {number}");
    }
    assert!(!tree.path("work/gone").exists(), "unlinked while open");
    outcome
}

#[test]
fn every_file_operation_works_with_dax() {
    operations("dax=always");
}

#[test]
fn every_file_operation_works_without_a_cache() {
    operations("dax=never,cache=never");
}

#[test]
fn every_file_operation_works_with_the_defaults() {
    let outcome = operations("");
    let host = rustix::fs::statvfs("/tmp").unwrap();
    let bytes = outcome.number("statfs_bytes");
    assert_eq!(bytes, host.f_blocks * host.f_frsize, "the size of the file system is the host's");
}

#[test]
fn what_the_host_changes_the_guest_sees() {
    let tree = Tree::new();
    tree.write("file", b"one\n");
    fs::create_dir(tree.path("sub")).unwrap();
    let script = r#"
        cat /s/file; while read -r command; do eval "$command" 2>&1; done
    "#;
    let mut guest =
        Oriel::run(&["-i", "-v", &tree.at("/s", "cache=never,dax=never")]).script(script).start();
    assert_eq!(guest.hear(), "one");
    tree.write("file", b"number two\n");
    assert_eq!(guest.ask("cat /s/file"), "number two", "a change");
    tree.write("new", b"new\n");
    assert_eq!(guest.ask("cat /s/new"), "new", "a new file");
    fs::rename(tree.path("new"), tree.path("sub/newer")).unwrap();
    assert_eq!(guest.ask("ls /s | xargs"), "file sub", "a listing after a rename");
    assert_eq!(guest.ask("cat /s/sub/newer"), "new", "a renamed file");
    fs::remove_file(tree.path("file")).unwrap();
    let gone = guest.ask("cat /s/file");
    assert!(gone.contains("No such file"), "a removed file: {gone}");
    // A symbolic link is the guest's to follow, in the guest's tree.
    std::os::unix::fs::symlink("/etc/hostname", tree.path("link")).unwrap();
    let link = guest.ask("cat /s/link || true");
    assert!(
        link.contains("No such file"),
        "a link out of the share leads nowhere on the host: {link}"
    );
    fs::rename(tree.path("sub"), tree.path("sub2")).unwrap();
    assert_eq!(guest.ask("cd /s/sub2 && cat newer; cd /"), "new", "a renamed directory");
    guest.finish().exits_with(0);
}
