//! What cannot work is refused in one line that says what and why, and nothing is left behind.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use integration::{Oriel, Tree, text};

/// Status of a command line that cannot be understood.
const USAGE: i32 = 2;
/// Status of a sandbox that could not be started.
const SANDBOX: i32 = 125;

fn refused(args: &[&str], status: i32, words: &[&str]) {
    Oriel::refused(args).guest(&["true"]).finish().refuses(status, words);
}

#[test]
fn a_kernel_that_cannot_be_used_is_refused() {
    let tree = Tree::new();
    let path = |name: &str| text(&tree.path(name)).to_string();
    refused(
        &["--kernel", "/no/such/kernel"],
        SANDBOX,
        &["--kernel", "/no/such/kernel", "No such file"],
    );
    refused(&["--kernel", "/etc/passwd"], SANDBOX, &["--kernel", "/etc/passwd", "bzImage"]);
    refused(&["--kernel", "/etc"], SANDBOX, &["--kernel", "/etc"]);
    tree.write("empty", b"");
    refused(&["--kernel", &path("empty")], SANDBOX, &["--kernel", &path("empty")]);
    let kernel = fs::read(integration::vmlinuz()).unwrap();
    tree.write("secret", &kernel[..4096]);
    fs::set_permissions(tree.path("secret"), fs::Permissions::from_mode(0o000)).unwrap();
    // Root reads every file; somebody else does not.
    let outcome = Oriel::refused(&["--kernel", &path("secret")])
        .guest(&["true"])
        .under(&["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"])
        .default_console()
        .finish();
    outcome.refuses(SANDBOX, &["--kernel", &path("secret"), "Permission denied"]);
}

#[test]
fn half_a_kernel_is_refused() {
    let tree = Tree::new();
    let kernel = fs::read(integration::vmlinuz()).unwrap();
    tree.write("half", &kernel[..kernel.len() / 2]);
    let path = tree.path("half");
    refused(&["--kernel", text(&path)], SANDBOX, &["--kernel", text(&path)]);
}

#[test]
fn a_program_that_is_no_kernel_is_refused() {
    // For x86-64, and ELF.
    let outcome = Oriel::refused(&["--kernel", super::PROBE]).guest(&["true"]).finish();
    outcome.refuses(SANDBOX, &["--kernel", super::PROBE]);
    outcome.check(!outcome.stderr.contains("--memory"), "more memory would not help");
}

#[test]
fn a_place_for_statistics_that_cannot_be_written_is_refused_first() {
    let outcome = Oriel::refused(&["--stats", "/no/such/dir/file"]).guest(&["true"]).finish();
    outcome.refuses(SANDBOX, &["--stats", "/no/such/dir/file"]);
}

#[test]
fn an_initrd_that_cannot_be_used_is_refused() {
    Oriel::refused(&["--initrd", "/no/such/initrd"])
        .finish()
        .refuses(SANDBOX, &["--initrd", "/no/such/initrd", "No such file"]);
    Oriel::refused(&["--initrd", "none", "--root", "/:overlay"])
        .finish()
        .refuses(USAGE, &["--root", "overlay"]);
    Oriel::refused(&["--initrd", "none", "-e", "A=b"])
        .finish()
        .refuses(USAGE, &["--initrd", "--env"]);
}

#[test]
fn a_directory_that_cannot_be_shared_is_refused() {
    refused(&["-v", "/no/such/dir:/s"], SANDBOX, &["--share", "/no/such/dir", "exists"]);
    refused(&["-v", "/etc/passwd:/s"], SANDBOX, &["--share", "/etc/passwd", "not a directory"]);
    refused(&["--root", "/no/such/dir"], SANDBOX, &["--root", "/no/such/dir"]);
    refused(&["--root", "/etc/passwd:ro"], SANDBOX, &["--root", "/etc/passwd", "not a directory"]);
    refused(&["-v", "/tmp"], USAGE, &["--share", "/tmp", "HOST_DIR:GUEST_PATH"]);
    refused(&["-v", "/tmp:s"], USAGE, &["--share", "/tmp:s", "absolute"]);
    refused(&["-v", "/tmp:/"], USAGE, &["--share", "/tmp:/", "--root"]);
    refused(&["-v", "/tmp:/a/../b"], USAGE, &["--share", "/a/../b", ".."]);
}

#[test]
fn options_of_a_share_are_checked() {
    refused(&["-v", "/tmp:/s:rx"], USAGE, &["--share", "rx", "cache="]);
    refused(&["-v", "/tmp:/s:overlay"], USAGE, &["--share", "overlay"]);
    refused(&["-v", "/tmp:/s:dax=maybe"], USAGE, &["--share", "maybe", "inode"]);
    refused(&["-v", "/tmp:/s:cache=some"], USAGE, &["--share", "some", "metadata"]);
    refused(&["-v", "/tmp:/s:queues=0"], USAGE, &["--share", "queues"]);
    refused(&["-v", "/tmp:/s:queues=65"], USAGE, &["--share", "65", "64"]);
    refused(&["-v", "/tmp:/s:tag="], USAGE, &["--share", "tag"]);
    let long = format!("/tmp:/s:tag={}", "t".repeat(37));
    refused(&["-v", &long], USAGE, &["--share", "36"]);
    refused(
        &["-v", "/tmp:/a:tag=x", "-v", "/var:/b:tag=x"],
        USAGE,
        &["--share", "/var", "\"x\"", "tag="],
    );
    refused(&["-v", "/tmp:/a", "-v", "/var:/a"], USAGE, &["--share", "/a", "two"]);
    refused(&["-v", "/tmp:/s:window=3M"], USAGE, &["--share", "3M", "2 MiB"]);
    refused(&["-v", "/tmp:/s:window=0"], USAGE, &["--share", "window=0", "2 MiB"]);
    refused(&["-v", "/tmp:/s:window=x"], USAGE, &["--share", "x", "512M"]);
    refused(&["-v", "/tmp:/s:window=2M,dax=never"], USAGE, &["--share", "dax=never"]);
}

#[test]
fn a_window_that_has_no_room_is_refused() {
    for window in ["64T", "127T", "1024T", "16777214T"] {
        refused(
            &["-v", &format!("/tmp:/s:window={window}")],
            SANDBOX,
            &["--share", "/tmp", "window"],
        );
    }
}

#[test]
fn memory_and_cpus_that_the_host_does_not_have_are_refused() {
    refused(&["--memory", "900G"], SANDBOX, &["--memory", "921600M", "host has"]);
    refused(&["--memory", "16777214T"], SANDBOX, &["--memory", "host has"]);
    refused(&["--memory", "32M"], USAGE, &["--memory", "32M", "64M"]);
    refused(&["--memory", "129M"], USAGE, &["--memory", "129M", "2 MiB"]);
    refused(&["--memory", "lots"], USAGE, &["--memory", "lots", "512M"]);
    refused(&["--memory", "1G,backend=disk"], USAGE, &["--memory", "disk", "memfd"]);
    refused(&["--memory", "1G,backend=file:"], USAGE, &["--memory", "file:", "file:PATH"]);
    refused(&["--memory", "512M,backend=hugetlb:1G"], USAGE, &["--memory", "512M", "1024 MiB"]);
    refused(&["--memory", "1G,backend=file:/no/such/dir"], SANDBOX, &["--memory", "/no/such/dir"]);
    refused(&["--cpus", "0"], USAGE, &["--cpus", "0"]);
    refused(&["--cpus", "255"], SANDBOX, &["--cpus", "255", "host has", "at most"]);
    refused(&["--cpus", "256"], USAGE, &["--cpus", "256"]);
    refused(&["--cpus", "two"], USAGE, &["--cpus", "two"]);
}

#[test]
fn words_that_are_no_options_are_refused() {
    let outcome = Oriel::refused(&["--no-such-option"]).finish();
    outcome.exits_with(USAGE);
    outcome.check(outcome.stderr.contains("--no-such-option"), "it is named");
    outcome.check(outcome.stdout.is_empty(), "on standard error");
    refused(&["--workdir", "here"], USAGE, &["--workdir", "here", "absolute"]);
    refused(&["--hostname", ""], USAGE, &["--hostname"]);
    refused(&["--env", "=x"], USAGE, &["--env", "=x"]);
    let outcome = Oriel::command(&["walk"]).finish();
    outcome.exits_with(USAGE);
    outcome.check(outcome.stderr.contains("walk"), "an unknown command is named");
    let outcome = Oriel::command(&["--log-level", "loud", "check"]).finish();
    outcome.refuses(USAGE, &["--log-level", "loud"]);
    let outcome = Oriel::command(&["run", "--console", "/no/such/dir/file", "--", "true"]).finish();
    outcome.refuses(SANDBOX, &["--console", "/no/such/dir/file"]);
}

/// A shell that changes its own view of the host first.
fn under(change: &str) -> Vec<String> {
    ["unshare", "-m", "sh", "-ec", &format!("{change}; exec \"$@\""), "sh"]
        .map(String::from)
        .to_vec()
}

fn refused_under(change: &str, words: &[&str]) {
    let wrapper = under(change);
    let wrapper: Vec<&str> = wrapper.iter().map(String::as_str).collect();
    Oriel::refused(&[]).guest(&["true"]).under(&wrapper).finish().refuses(SANDBOX, words);
    let check = Oriel::command(&["check"]).under(&wrapper).finish();
    check.exits_with(1);
    check.check(check.text().contains("MISSING  kvm"), "check says what is missing");
    check.check(check.text().contains(words[words.len() - 1]), "check says why");
}

#[test]
fn a_host_without_kvm_is_told_so() {
    refused_under(
        "mount -t tmpfs tmpfs /dev; : >/dev/null",
        &["/dev/kvm", "is missing", "virtualization"],
    );
    refused_under("mount --bind /dev/null /dev/kvm", &["/dev/kvm"]);
}

#[test]
fn a_host_that_only_emulates_is_told_so() {
    refused_under(
        "sed 's/ svm / /; s/ vmx / /' /proc/cpuinfo >/tmp/cpuinfo-$$; mount --bind /tmp/cpuinfo-$$ /proc/cpuinfo; \
         rm /tmp/cpuinfo-$$ 2>/dev/null || :",
        &["/dev/kvm", "only emulates", "svm"],
    );
}

#[test]
fn a_user_who_may_not_use_kvm_is_told_so() {
    refused_under(
        "mount -t tmpfs tmpfs /dev; mknod -m 0600 /dev/kvm c 10 232; mknod -m 0666 /dev/null c 1 3; \
         set -- setpriv --reuid=65534 --regid=65534 --clear-groups \"$@\"",
        &["/dev/kvm", "usermod", "this user"],
    );
}

#[test]
fn what_is_refused_leaves_nothing_behind() {
    let listing = |directory: &str| {
        let mut names: Vec<String> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
            .filter(|name| name.contains("oriel"))
            .collect();
        names.sort();
        names
    };
    let places = ["/tmp", "/dev/shm", "/run"];
    let before = places.map(listing);
    refused(
        &["--kernel", "/etc/passwd", "-m", "128M,backend=file:/dev/shm"],
        SANDBOX,
        &["/etc/passwd"],
    );
    refused(&["-v", "/tmp:/s:window=64T", "-m", "128M,backend=memfd"], SANDBOX, &["/tmp"]);
    Oriel::run(&["-m", "128M,backend=file:/dev/shm"]).guest(&["true"]).finish().exits_with(0);
    assert_eq!(places.map(listing), before, "no file is left");
}

#[test]
fn check_says_what_the_host_can_do() {
    let outcome = Oriel::command(&["check"]).finish();
    outcome.exits_with(0).says_no_error();
    for word in [
        "ok       kvm",
        "ok       kernel",
        "ok       init",
        "ok       busybox",
        "hugetlb:2M",
        "user",
    ] {
        outcome.check(outcome.text().contains(word), &format!("it mentions {word:?}"));
    }
    outcome.check(!outcome.text().contains("MISSING"), "nothing is missing");
}

#[test]
fn the_program_explains_itself() {
    for shell in ["bash", "zsh", "fish"] {
        let outcome = Oriel::command(&["completions", shell]).finish();
        outcome.exits_with(0).says_no_error();
        outcome.check(outcome.text().contains("oriel"), &format!("completions for {shell}"));
    }
    for words in [&["man"][..], &["man", "run"]] {
        let outcome = Oriel::command(words).finish();
        outcome.exits_with(0).says_no_error();
        outcome.check(outcome.text().contains(".TH"), "a page in roff");
    }
    Oriel::command(&["man", "nothing"]).finish().refuses(USAGE, &["nothing"]);
    let outcome = Oriel::command(&["run", "--help"]).finish();
    outcome.exits_with(0);
    for option in ["--share", "--root", "--memory", "--kernel", "--initrd", "Exit status"] {
        outcome.check(outcome.text().contains(option), &format!("--help explains {option}"));
    }
    let outcome = Oriel::command(&["--version"]).finish();
    outcome.exits_with(0);
    outcome.check(outcome.text().starts_with("oriel "), "--version");
}
