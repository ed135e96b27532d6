//! OCI runtime bundles.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use integration::{Oriel, Outcome, Tree, text};
use serde_json::{Value, json};

/// A bundle with busybox in its root, and what a configuration of `runc spec` says.
struct Bundle {
    tree: Tree,
    config: Value,
}

/// Each of them boots in an emulated machine.
const SLOW: Duration = Duration::from_secs(120);

impl Bundle {
    fn new(script: &str) -> Self {
        let tree = Tree::new();
        fs::create_dir_all(tree.path("rootfs/bin")).unwrap();
        fs::create_dir(tree.path("rootfs/etc")).unwrap();
        integration::copy_executable(&integration::busybox(), &tree.path("rootfs/bin/busybox"));
        for name in
            ["sh", "cat", "id", "stat", "mount", "touch", "ls", "grep", "head", "tty", "hostname"]
        {
            std::os::unix::fs::symlink("busybox", tree.path(&format!("rootfs/bin/{name}")))
                .unwrap();
        }
        tree.write("rootfs/etc/passwd", b"root:x:0:0::/root:/bin/sh\n1000:x:0:0::/evil:/bin/sh\nada:x:1000:1000::/home/ada:/bin/sh\n");
        let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
        let config = json!({
            "ociVersion": "1.2.0",
            "process": {
                "terminal": false,
                "user": { "uid": 0, "gid": 0 },
                "args": ["sh", "-c", script],
                "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
                "cwd": "/",
                "capabilities": {
                    "bounding": capabilities, "effective": capabilities, "permitted": capabilities
                },
                "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
                "noNewPrivileges": true
            },
            "root": { "path": "rootfs", "readonly": true },
            "hostname": "runc",
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                  "options": ["nosuid", "strictatime", "mode=755", "size=65536k"] },
                { "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                  "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"] },
                { "destination": "/dev/shm", "type": "tmpfs", "source": "shm",
                  "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"] },
                { "destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
                  "options": ["nosuid", "noexec", "nodev"] },
                { "destination": "/sys", "type": "sysfs", "source": "sysfs",
                  "options": ["nosuid", "noexec", "nodev", "ro"] },
                { "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                  "options": ["nosuid", "noexec", "nodev", "relatime", "ro"] }
            ],
            "linux": {
                "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
                "namespaces": [
                    { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" },
                    { "type": "mount" }, { "type": "cgroup" }
                ],
                "maskedPaths": [
                    "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                    "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"
                ],
                "readonlyPaths": [
                    "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
                ]
            }
        });
        Self { tree, config }
    }

    fn mount(&mut self, mount: Value) {
        self.config["mounts"].as_array_mut().unwrap().push(mount);
    }

    fn describe(&self, options: &[&str]) -> Oriel {
        self.tree.write("config.json", self.config.to_string().as_bytes());
        Oriel::run(&["--bundle", self.tree.text()]).args(options).timeout(SLOW)
    }

    fn finish(&self, options: &[&str]) -> Outcome {
        self.describe(options).finish()
    }
}

#[test]
fn a_bundle_as_runc_makes_it_runs() {
    let mut bundle = Bundle::new(
        r#"
        echo "id=$(id -u):$(id -g)"
        echo "caps=$(grep CapBnd /proc/self/status | cut -f2) $(grep CapEff /proc/self/status | cut -f2)"
        echo "nnp=$(grep NoNewPrivs /proc/self/status | cut -f2)"
        echo "files=$(ulimit -n) $(ulimit -Hn)"
        echo "host=$(hostname)"
        echo "home=$HOME"
        echo "cwd=$(pwd)"
        echo "work=$(cat /work/new/file)"
        echo "write=$( (touch /new) 2>&1 | grep -c 'Read-only')"
        echo "null=$(stat -c '%a %F' /dev/null)"
        echo "zero=$(head -c 3 /dev/zero | wc -c)"
        echo "links=$(readlink /dev/fd) $(readlink /dev/ptmx)"
        echo "ttys=$(ls /dev/ttyS0 /dev/kmsg 2>&1 | grep -c 'No such')"
        echo "sys=$( (echo x >/sys/kernel/uevent_helper) 2>&1 | grep -c 'Read-only')"
        echo "group=$(ls /sys/fs/cgroup | grep -c cgroup.procs)"
        echo "kcore=$(cat /proc/kcore | wc -c)"
        echo "firmware=$(ls /sys/firmware | wc -l)"
        echo "trigger=$( (echo h >/proc/sysrq-trigger) 2>&1 | grep -c 'Read-only')"
        echo "shm=$(stat -c %a /dev/shm)"
        echo "mounts=$(grep -c ' /dev/mqueue mqueue ' /proc/mounts) $(grep -c ' /tmp ' /proc/mounts)"
        exit 7
        "#,
    );
    for name in ["cut", "wc", "readlink"] {
        std::os::unix::fs::symlink("busybox", bundle.tree.path(&format!("rootfs/bin/{name}")))
            .unwrap();
    }
    bundle.config["process"]["cwd"] = json!("/some/where");
    fs::create_dir(bundle.tree.path("shared")).unwrap();
    bundle.tree.write("shared/file", b"shared");
    let share = format!("{}:/work/new", text(&bundle.tree.path("shared")));
    let outcome = bundle.finish(&["-v", &share]);
    outcome.exits_with(7).guest_says(&[
        ("id", "0:0", "process.user"),
        ("caps", "0000000020000420 0000000020000420", "process.capabilities"),
        ("nnp", "1", "process.noNewPrivileges"),
        ("files", "1024 1024", "process.rlimits"),
        ("host", "runc", "hostname"),
        ("home", "/root", "HOME is the user's"),
        ("cwd", "/some/where", "process.cwd, which is made in a root that is read-only"),
        ("work", "shared", "a share of the user's, at a mount point that is made"),
        ("write", "1", "root.readonly"),
        ("null", "666 character special file", "a device of every container"),
        ("zero", "3", "that works"),
        ("links", "/proc/self/fd pts/ptmx", "links of every container"),
        ("ttys", "2", "no other device"),
        ("sys", "1", "a read-only mount"),
        ("group", "1", "a mount of type cgroup"),
        ("kcore", "0", "linux.maskedPaths, a file"),
        ("firmware", "0", "linux.maskedPaths, a directory"),
        ("trigger", "1", "linux.readonlyPaths"),
        ("shm", "1777", "options of a tmpfs"),
        ("mounts", "1 0", "what is mounted is what the bundle says"),
    ]);
    // One line for the one field that is left out.
    assert_eq!(outcome.stderr.lines().count(), 1, "{}", outcome.report());
    assert!(outcome.stderr.contains("linux.resources.devices is left out"), "{}", outcome.stderr);
    let names = ["bin", "etc"];
    assert_eq!(bundle.tree.names("rootfs"), names, "no mount point is made on the host");
}

#[test]
fn a_bundle_has_its_directories_files_users_and_kernel_parameters() {
    let mut bundle = Bundle::new(
        r#"
        echo "id=$(id -u):$(id -g) $(id -G)"
        echo "umask=$(umask)"
        echo "cwd=$(pwd)"
        echo "home=$HOME"
        echo "read=$(cat /data/file)"
        echo "below=$(cat /run/x/data/file)"
        echo "ro=$( (touch /run/x/data/no) 2>&1 | grep -c 'Read-only')"
        touch /data/made && echo "made=yes"
        echo "suid=$(grep ' /data ' /proc/mounts | grep -c nosuid)"
        echo "hosts=$(cat /etc/hosts)"
        echo "denied=$(grep ' /etc/hosts ' /proc/mounts | grep -c ' ro[, ]')"
        echo more >>/etc/resolv.conf
        echo "written=$(cat /etc/resolv.conf | tr '\n' ,)"
        echo "max=$(cat /proc/sys/kernel/msgmax)"
        echo "forwarding=$(cat /proc/sys/net/ipv4/conf/lo/forwarding)"
        echo "domain=$(cat /proc/sys/kernel/domainname)"
        echo "caps=$(grep CapEff /proc/self/status | cut -f2) $(grep CapAmb /proc/self/status | cut -f2)"
        "#,
    );
    for name in ["cut", "tr"] {
        std::os::unix::fs::symlink("busybox", bundle.tree.path(&format!("rootfs/bin/{name}")))
            .unwrap();
    }
    let tree = &bundle.tree;
    fs::create_dir(tree.path("data")).unwrap();
    std::os::unix::fs::chown(tree.path("data"), Some(1000), Some(1001)).unwrap();
    tree.write("data/file", b"contents");
    tree.write("hosts", b"127.0.0.1 here");
    tree.write("resolv.conf", b"nameserver ::1\n");
    std::os::unix::fs::chown(tree.path("resolv.conf"), Some(1000), None).unwrap();
    let hosts = text(&tree.path("hosts")).to_string();
    bundle.mount(json!({ "destination": "/data", "type": "bind", "source": "data",
                         "options": ["rbind", "nosuid", "rprivate"] }));
    bundle.mount(json!({ "destination": "/run", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"] }));
    bundle.mount(json!({ "destination": "/run/x/data", "type": "bind", "source": "data",
                         "options": ["rbind", "ro"] }));
    bundle.mount(json!({ "destination": "/etc/hosts", "type": "bind", "source": hosts,
                         "options": ["bind", "ro"] }));
    bundle
        .mount(json!({ "destination": "/etc/resolv.conf", "type": "bind", "source": "resolv.conf",
                         "options": ["bind"] }));
    bundle.config["root"]["readonly"] = json!(false);
    bundle.config["process"]["user"] =
        json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 77], "umask": 0o27 });
    bundle.config["process"]["cwd"] = json!("/work/here");
    bundle.config["process"]["capabilities"] = json!({
        "bounding": ["CAP_KILL", "CAP_CHOWN"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"],
        "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"]
    });
    bundle.config["linux"]["sysctl"] =
        json!({ "kernel.msgmax": "65536", "net/ipv4/conf/lo/forwarding": "1" });
    bundle.config["domainname"] = json!("example");
    bundle.tree.write("rootfs/etc/resolv.conf", b"");
    let fifo = bundle.tree.path("rootfs/etc/hosts");
    rustix::fs::mknodat(
        rustix::fs::CWD,
        &fifo,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let outcome = bundle.finish(&[]);
    outcome.exits_with(0).guest_says(&[
        (
            "id",
            "1000:1001 1001 5 77",
            "process.user; nobody is another because of a name in /etc/passwd",
        ),
        ("umask", "0027", "process.user.umask"),
        ("cwd", "/work/here", "process.cwd, which is made"),
        ("home", "/home/ada", "HOME is the user's"),
        ("read", "contents", "a directory of the host"),
        ("below", "contents", "in the order of the mounts"),
        ("ro", "1", "ro"),
        ("made", "yes", "the other one can be written to"),
        ("suid", "1", "flags of a bind mount"),
        ("hosts", "127.0.0.1 here", "a file of the host, over a FIFO that nobody opens"),
        ("denied", "1", "which nobody can change"),
        ("written", "nameserver ::1,more,", "a copy of a file, its owner's"),
        ("max", "65536", "linux.sysctl"),
        ("forwarding", "1", "linux.sysctl, with the other separator"),
        ("domain", "example", "domainname"),
        ("caps", "0000000000000020 0000000000000020", "capabilities of a user"),
    ]);
    let made = fs::metadata(bundle.tree.path("data/made")).unwrap();
    assert_eq!((made.uid(), made.gid(), made.mode() & 0o777), (1000, 1001, 0o640));
    assert_eq!(bundle.tree.read("resolv.conf"), b"nameserver ::1\n");
    assert!(bundle.tree.path("rootfs/work/here").is_dir(), "as runc makes it");
}

#[test]
fn a_bundle_has_a_terminal_further_commands_and_an_end() {
    let mut bundle =
        Bundle::new("tty; stty size; echo $((6*7)); read line; echo got $line; exit 9");
    std::os::unix::fs::symlink("busybox", bundle.tree.path("rootfs/bin/stty")).unwrap();
    std::os::unix::fs::symlink("busybox", bundle.tree.path("rootfs/bin/sleep")).unwrap();
    bundle.config["process"]["terminal"] = json!(true);
    let mut screen = bundle.describe(&["-i"]).on_terminal(33, 101);
    for text in ["/dev/pts/0", "33 101", "42"] {
        screen.hear(text);
    }
    screen.say("hello\n");
    screen.hear("got hello");
    assert_eq!(screen.finish(), 9);

    bundle.config["process"]["terminal"] = json!(false);
    bundle.config["process"]["args"] = json!(["sleep", "1000"]);
    let name = format!("test-bundle-{}", std::process::id());
    let runtime = tempfile::tempdir().unwrap();
    let oriel = |args: &[&str]| {
        Oriel::command(args).env("XDG_RUNTIME_DIR", runtime.path()).timeout(SLOW).finish()
    };
    let run = bundle.describe(&["-d", "--name", &name]).default_console();
    // The mark is somebody else's: it detaches all the same.
    let run = run.env("XDG_RUNTIME_DIR", runtime.path()).env("ORIEL_DETACHED", "1");
    let outcome = run.finish();
    outcome.exits_with(0);
    assert_eq!(outcome.text(), format!("{name}\n"));
    let outcome = oriel(&["exec", &name, "sh", "-c", "grep CapEff /proc/self/status; ulimit -n"]);
    assert_eq!(outcome.text(), "CapEff:\t0000000020000420\n1024\n", "confined as the first is");
    let mut screen = Oriel::command(&["exec", "-it", &name, "tty"])
        .env("XDG_RUNTIME_DIR", runtime.path())
        .on_terminal(24, 80);
    screen.hear("/dev/pts/0");
    assert_eq!(screen.finish(), 0);
    oriel(&["stop", "-t", "0", &name]).exits_with(0);
    oriel(&["rm", &name]);
}

#[test]
fn a_bundle_that_cannot_be_run_is_refused() {
    let mut bundle = Bundle::new("true");
    let refuses = |bundle: &Bundle, words: &[&str]| {
        let bundle = bundle.describe(&[]).finish();
        bundle.refuses(125, words);
    };
    let whole = bundle.config.clone();
    // The line that the whole one has is for what is left out.
    bundle.config["linux"]["resources"] = Value::Null;
    let quiet = bundle.config.clone();
    bundle.config["process"] = Value::Null;
    refuses(&bundle, &["--bundle", "config.json: process: is missing"]);
    bundle.config = quiet.clone();
    bundle.config["root"]["path"] = json!("nowhere");
    refuses(&bundle, &["--bundle", "root.path", "nowhere", "unpack"]);
    bundle.config = quiet.clone();
    bundle.mount(json!({ "destination": "/x", "type": "nfs", "source": "server:/x" }));
    refuses(&bundle, &["--bundle", "mounts[7] (/x)", "nfs", "bind"]);
    bundle.config = whole;
    bundle.tree.write("config.json", b"no");
    let run = || Oriel::refused(&["--bundle", bundle.tree.text()]);
    run().finish().refuses(125, &["--bundle", "config.json: is no JSON", "runc spec"]);
    Oriel::refused(&["--bundle", "/no/such/bundle"]).finish().refuses(125, &["/no/such/bundle"]);
    for options in [
        &["--root", "/"][..],
        &["-e", "A=b"],
        &["-u", "x"],
        &["-w", "/x"],
        &["--hostname", "x"],
        &["-t"],
    ] {
        run().args(options).finish().refuses(2, &["--bundle", options[0].trim_start_matches('-')]);
    }
    run().guest(&["true"]).finish().refuses(2, &["--bundle"]);
    run().args(&["--initrd", "none"]).finish().refuses(2, &["--bundle", "--initrd"]);
}
