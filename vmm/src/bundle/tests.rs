use std::fs;
use std::os::unix::net::UnixListener;

use clap::Parser;
use serde_json::json;

use super::*;

#[derive(Parser)]
struct Wrapper {
    #[command(flatten)]
    args: RunArgs,
}

fn args() -> RunArgs {
    Wrapper::parse_from(["run"]).args
}

/// What `runc spec` writes, but for its longer lists.
fn runc() -> Value {
    let capabilities = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];
    json!({
        "ociVersion": "1.0.2-dev",
        "process": {
            "terminal": true,
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh"],
            "env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"],
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities,
                "effective": capabilities,
                "permitted": capabilities,
                "ambient": capabilities
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 512 }],
            "noNewPrivileges": true
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "runc",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc" },
            {
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]
            },
            {
                "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]
            }
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }
            ],
            "maskedPaths": ["/proc/acpi"],
            "readonlyPaths": ["/proc/bus"]
        }
    })
}

fn bundle(config: &Value) -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::create_dir(directory.path().join("rootfs")).unwrap();
    fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
    directory
}

/// `config` with `value` at the JSON pointer, or without what is there.
fn with(mut config: Value, at: &str, value: Value) -> Value {
    let (parent, field) = at.rsplit_once('/').unwrap();
    let parent = config.pointer_mut(parent).unwrap();
    match (parent, value) {
        (Value::Object(fields), Value::Null) => drop(fields.remove(field)),
        (Value::Object(fields), value) => drop(fields.insert(field.into(), value)),
        (Value::Array(items), value) => items.push(value),
        _ => panic!("{at}"),
    }
    config
}

fn lines(mut config: Value) -> Vec<String> {
    fields::check(&mut config).unwrap()
}

#[test]
fn a_bundle_of_runc_becomes_the_arguments_of_a_run() {
    let directory = bundle(&runc());
    let args = load(&args(), directory.path()).unwrap();
    let root = args.root.unwrap();
    assert_eq!(root.host, directory.path().join("rootfs"));
    assert!(root.options.overlay, "mount points are made beside it");
    assert_eq!((args.command, args.workdir, args.tty), (vec!["sh".into()], "/".into(), true));
    assert_eq!(args.hostname, "runc");
    assert_eq!(args.env, ["PATH=/usr/sbin:/usr/bin:/sbin:/bin", "TERM=xterm"]);
    let bundle = args.container.unwrap();
    let confinement = &bundle.confinement;
    assert_eq!(confinement.ids, Some((0, 0, vec![])));
    assert!(confinement.no_new_privileges && confinement.umask.is_none());
    let limit = confinement.limits[0];
    assert_eq!((limit.resource, limit.soft, limit.hard), (libc::RLIMIT_NOFILE, 512, 1024));
    // CAP_KILL is 5, CAP_NET_BIND_SERVICE 10, CAP_AUDIT_WRITE 29.
    let bits = 1 << 5 | 1 << 10 | 1 << 29;
    let capabilities = confinement.capabilities.unwrap();
    assert_eq!(
        (capabilities.bounding, capabilities.ambient, capabilities.inheritable),
        (bits, bits, 0)
    );
    let container = bundle.container(&[]);
    assert!(container.read_only_root);
    assert_eq!(
        (container.masked, container.read_only),
        (vec!["/proc/acpi".into()], vec!["/proc/bus".into()])
    );
    let shown: Vec<_> = container
        .mounts
        .iter()
        .map(|mount| match &mount.what {
            What::Kernel { kind, options, .. } => {
                (mount.path.as_str(), kind.as_str(), options.as_str(), mount.flags)
            }
            other => panic!("{other:?}"),
        })
        .collect();
    let strict = 2 | 1 << 24;
    assert_eq!(
        shown,
        [
            ("/proc", "proc", "", 0),
            ("/dev", "tmpfs", "mode=755,size=65536k", strict),
            ("/sys/fs/cgroup", "cgroup2", "", 1 | 2 | 4 | 8 | 1 << 21),
        ]
    );
}

#[test]
fn directories_are_shares_and_files_are_copies_in_the_order_of_the_mounts() {
    let config = with(
        runc(),
        "/mounts/-",
        json!({
            "destination": "/data", "type": "bind", "source": "data", "options": ["rbind", "ro", "nosuid"]
        }),
    );
    let config = with(
        config,
        "/mounts/-",
        json!({
            "destination": "/etc/hosts", "source": "hosts", "options": ["bind", "ro", "rprivate"]
        }),
    );
    let config = with(
        config,
        "/linux/uidMappings",
        json!([
            { "containerID": 0, "hostID": 0, "size": 1 }
        ]),
    );
    let directory = bundle(&config);
    fs::create_dir(directory.path().join("data")).unwrap();
    fs::write(directory.path().join("hosts"), "127.0.0.1 localhost\n").unwrap();
    let mut before = args();
    before.shares.push("/tmp:/mine".parse().unwrap());
    let args = load(&before, directory.path()).unwrap();
    assert_eq!(args.shares.len(), 2);
    let share = &args.shares[1];
    assert_eq!(
        (share.host.clone(), share.guest.as_str()),
        (directory.path().join("data"), "/data")
    );
    assert!(share.options.read_only);
    assert_eq!(share.options.uid_map.len(), 1);
    let bundle = args.container.unwrap();
    assert_eq!(bundle.binds(), 1);
    assert_eq!(bundle.files[0].bytes, b"127.0.0.1 localhost\n");
    let dax = oriel_init::protocol::Dax::Inode;
    let share = Share { tag: "share1".into(), path: "/data".into(), read_only: true, dax };
    let mounts = bundle.container(std::slice::from_ref(&share)).mounts;
    assert_eq!(mounts[3], Mount { what: What::Share(share), path: "/data".into(), flags: 3 });
    assert_eq!(
        mounts[4],
        Mount { what: What::File("0".into()), path: "/etc/hosts".into(), flags: 1 }
    );
}

#[test]
fn what_is_left_out_is_said_field_by_field() {
    let said = lines(runc());
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].starts_with("linux.resources.devices is left out: "), "{said:?}");
    for (at, value, name) in [
        ("/linux/seccomp", json!({ "defaultAction": "SCMP_ACT_ERRNO" }), "linux.seccomp"),
        ("/linux/devices", json!([{ "path": "/dev/fuse" }]), "linux.devices"),
        ("/linux/resources/memory", json!({ "limit": 1 }), "linux.resources.memory"),
        ("/linux/resources/pids", json!({ "limit": 1 }), "linux.resources.pids"),
        ("/linux/cgroupsPath", json!("/a"), "linux.cgroupsPath"),
        ("/linux/mountLabel", json!("x"), "linux.mountLabel"),
        ("/linux/rootfsPropagation", json!("rslave"), "linux.rootfsPropagation"),
        ("/linux/intelRdt", json!({ "closID": "x" }), "linux.intelRdt"),
        ("/linux/personality", json!({ "domain": "LINUX32" }), "linux.personality"),
        ("/linux/timeOffsets", json!({ "boottime": { "secs": 1 } }), "linux.timeOffsets"),
        ("/linux/nextYear", json!(7), "linux.nextYear"),
        ("/process/apparmorProfile", json!("x"), "process.apparmorProfile"),
        ("/process/selinuxLabel", json!("x"), "process.selinuxLabel"),
        ("/process/oomScoreAdj", json!(-5), "process.oomScoreAdj"),
        ("/process/scheduler", json!({ "policy": "SCHED_FIFO" }), "process.scheduler"),
        ("/process/ioPriority", json!({ "class": "IOPRIO_CLASS_RT" }), "process.ioPriority"),
        ("/process/execCPUAffinity", json!({ "initial": "1" }), "process.execCPUAffinity"),
        ("/process/consoleSize", json!({ "height": 1, "width": 1 }), "process.consoleSize"),
        ("/process/user/username", json!("x"), "process.user.username"),
        ("/root/more", json!("x"), "root.more"),
        ("/nextYear", json!({ "x": 1 }), "nextYear"),
    ] {
        let said = lines(with(runc(), at, value));
        let found = said.iter().filter(|line| line.starts_with(&format!("{name} is left out: ")));
        assert_eq!((found.count(), said.len()), (1, 2), "{name}: {said:?}");
    }
    // What says nothing, and what means nothing to a runtime.
    for (at, value) in [
        ("/hooks", json!({ "prestart": [] })),
        ("/annotations", json!({ "com.example.key": "x" })),
        ("/linux/seccomp", Value::Null),
        ("/linux/cgroupsPath", json!("")),
        ("/linux/resources/memory", json!({})),
    ] {
        assert_eq!(lines(with(runc(), at, value)).len(), 1, "{at}");
    }
    let mut warnings = Vec::new();
    check_namespaces(&[], &mut warnings).unwrap();
    assert!(warnings[0].contains("network"), "{warnings:?}");
}

#[test]
fn what_cannot_be_run_is_refused_in_a_line_that_names_the_field_and_the_remedy() {
    let mount = |mount: Value| with(runc(), "/mounts/-", mount);
    let bind = |source: &str| json!({ "destination": "/x", "type": "bind", "source": source });
    for (config, hints) in [
        (with(runc(), "/process", Value::Null), &["process: is missing", "process.args"][..]),
        (with(runc(), "/process/args", json!([])), &["process: args", "empty"]),
        (with(runc(), "/process/args", Value::Null), &["process: args"]),
        (with(runc(), "/process/args", json!("sh")), &["process: ", "\"sh\""]),
        (with(runc(), "/process/cwd", json!("src")), &["cwd", "src", "absolute"]),
        (with(runc(), "/process/env", json!(["A"])), &["env", "\"A\"", "NAME=VALUE"]),
        (with(runc(), "/process/env", json!(["A=\0"])), &["NUL"]),
        (with(runc(), "/process/user/umask", json!(0o1000)), &["umask", "512"]),
        (with(runc(), "/process/user/uid", json!(-1)), &["process: ", "-1"]),
        (
            with(
                runc(),
                "/process/rlimits",
                json!([{ "type": "RLIMIT_NOFILE", "soft": 2, "hard": 1 }]),
            ),
            &["RLIMIT_NOFILE", "above"],
        ),
        (
            with(
                runc(),
                "/process/rlimits",
                json!([{ "type": "RLIMIT_LUCK", "soft": 1, "hard": 1 }]),
            ),
            &["RLIMIT_LUCK"],
        ),
        (with(runc(), "/process/capabilities", json!({ "bounding": ["CAP_FLY"] })), &["CAP_FLY"]),
        (with(runc(), "/process", json!("sh")), &["process", "no object"]),
        (with(runc(), "/root", Value::Null), &["root: is missing", "root.path"]),
        (with(runc(), "/root/path", json!("nowhere")), &["root.path", "nowhere", "unpack"]),
        (with(runc(), "/root/path", json!("config.json")), &["root.path", "no directory"]),
        (with(runc(), "/ociVersion", json!("2.0.0")), &["ociVersion", "2.0.0"]),
        (with(runc(), "/ociVersion", Value::Null), &["ociVersion"]),
        (
            with(runc(), "/hooks", json!({ "poststart": [{ "path": "/bin/true" }] })),
            &["hooks", "leave"],
        ),
        (with(runc(), "/windows", json!({ "layerFolders": ["x"] })), &["windows", "platform"]),
        (with(runc(), "/vm", json!({ "kernel": { "path": "/x" } })), &["vm", "oriel run"]),
        (with(runc(), "/hostname", json!("x".repeat(65))), &["hostname", "64"]),
        (
            with(runc(), "/linux/namespaces", json!([{ "type": "ipc", "path": "/proc/7/ns/ipc" }])),
            &["linux.namespaces[0].path", "/proc/7/ns/ipc"],
        ),
        (
            with(runc(), "/linux/namespaces", json!([{ "type": "space" }])),
            &["linux.namespaces", "space"],
        ),
        (
            with(
                runc(),
                "/linux/gidMappings",
                json!([{ "containerID": 1, "hostID": 4294967295u32, "size": 2 }]),
            ),
            &["linux.gidMappings", "4294967295"],
        ),
        (
            mount(json!({ "destination": "/x", "type": "nfs" })),
            &["mounts[3] (/x)", "\"nfs\"", "bind"],
        ),
        (mount(json!({ "destination": "/x" })), &["mounts[3] (/x)", "type"]),
        (
            mount(json!({ "destination": "x", "type": "tmpfs" })),
            &["mounts[3]", "\"x\"", "absolute"],
        ),
        (mount(json!({ "destination": "/a/../b", "type": "tmpfs" })), &["mounts[3]", ".."]),
        (mount(json!({ "type": "tmpfs" })), &["mounts[3]", "destination"]),
        (mount(bind("nowhere")), &["mounts[3] (/x)", "source", "nowhere"]),
        (
            mount(json!({ "destination": "/x", "type": "bind" })),
            &["mounts[3] (/x)", "source: is missing"],
        ),
        (mount(bind("socket")), &["mounts[3] (/x)", "a socket"]),
        (mount(bind("/dev/null")), &["mounts[3] (/x)", "a device"]),
        (mount(bind("large")), &["mounts[3] (/x)", "1 MiB"]),
        // A read of the first would wait for the kernel's next word, and no size tells.
        (mount(bind("/proc/kmsg")), &["mounts[3] (/x)", "/proc/kmsg", "kernel's own"]),
        (mount(bind("/proc/self/maps")), &["mounts[3] (/x)", "kernel's own"]),
        (
            with(runc(), "/linux/sysctl", json!({ "kernel/../../self/oom_score_adj": "0" })),
            &["linux.sysctl", "kernel/../../self"],
        ),
        (with(runc(), "/linux/sysctl", json!({ "/etc/x": "0" })), &["linux.sysctl", "/etc/x"]),
        (
            mount(
                json!({ "destination": "/x", "type": "bind", "source": "rootfs", "options": ["idmap"] }),
            ),
            &["mounts[3] (/x)", "idmap"],
        ),
        (
            mount(
                json!({ "destination": "/x", "type": "bind", "source": "rootfs", "options": ["size=1m"] }),
            ),
            &["mounts[3] (/x)", "size=1m"],
        ),
    ] {
        let directory = bundle(&config);
        let _socket = UnixListener::bind(directory.path().join("socket")).unwrap();
        fs::write(directory.path().join("large"), vec![0; (1 << 20) + 1]).unwrap();
        let error = format!("{:#}", load(&args(), directory.path()).err().unwrap());
        assert!(error.starts_with("--bundle /"), "{error}");
        assert!(error.contains("config.json: ") && !error.contains('\n'), "{error}");
        for hint in hints {
            assert!(error.contains(hint), "{hint}: {error}");
        }
    }
}

/// What podman writes, but for its longer lists.
#[test]
fn a_bundle_of_podman_is_run_with_a_line_for_each_field_that_is_left_out() {
    let directory = bundle(&json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": false,
            "user": { "uid": 0, "gid": 0, "umask": 18, "additionalGids": [0, 1, 10] },
            "args": ["/bin/sh", "-c", "true"],
            "env": ["PATH=/usr/bin:/bin", "container=podman", "HOME=/root", "HOSTNAME=0123456789ab"],
            "cwd": "/",
            "capabilities": {
                "bounding": ["CAP_CHOWN", "CAP_SYS_CHROOT"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]
            },
            "rlimits": [
                { "type": "RLIMIT_NOFILE", "hard": 1048576, "soft": 1048576 },
                { "type": "RLIMIT_NPROC", "hard": 4194304, "soft": 4194304 }
            ],
            "oomScoreAdj": 0
        },
        "root": { "path": "rootfs" },
        "hostname": "0123456789ab",
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"] },
            {
                "destination": "/dev", "type": "tmpfs", "source": "tmpfs",
                "options": ["nosuid", "noexec", "strictatime", "mode=755", "size=65536k"]
            },
            { "destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "ro"] },
            {
                "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
            },
            { "destination": "/etc/hosts", "type": "bind", "source": "hosts", "options": ["bind", "rprivate"] },
            { "destination": "/dev/shm", "type": "bind", "source": "shm", "options": ["bind", "rprivate", "nosuid"] },
            {
                "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
                "options": ["rprivate", "nosuid", "noexec", "nodev", "relatime", "ro"]
            }
        ],
        "hooks": { "prestart": null },
        "annotations": { "io.container.manager": "libpod" },
        "linux": {
            "sysctl": { "net.ipv4.ping_group_range": "0 0" },
            "resources": { "devices": [{ "allow": false, "access": "rwm" }], "pids": { "limit": 2048 } },
            "cgroupsPath": "machine.slice:libpod:0123",
            "namespaces": [
                { "type": "pid" }, { "type": "network", "path": "/run/netns/netns-0123" }, { "type": "ipc" },
                { "type": "uts" }, { "type": "mount" }, { "type": "cgroup" }
            ],
            "seccomp": { "defaultAction": "SCMP_ACT_ERRNO", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [] },
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/bus"]
        }
    }));
    fs::create_dir(directory.path().join("shm")).unwrap();
    fs::write(directory.path().join("hosts"), "").unwrap();
    let path = directory.path().join("config.json");
    let said = lines(parse(&path).unwrap());
    let names: Vec<_> = said.iter().filter_map(|line| line.split(' ').next()).collect();
    assert_eq!(
        names,
        ["linux.cgroupsPath", "linux.resources.devices", "linux.resources.pids", "linux.seccomp"]
    );
    let args = load(&args(), directory.path()).unwrap();
    assert!(!args.root.unwrap().options.overlay, "it can be written to");
    assert_eq!(args.shares[0].guest, "/dev/shm");
    let bundle = args.container.unwrap();
    let confinement = &bundle.confinement;
    assert_eq!((&confinement.ids, confinement.umask), (&Some((0, 0, vec![0, 1, 10])), Some(0o22)));
    assert_eq!((bundle.files.len(), bundle.binds()), (1, 1));
    let mut warnings = Vec::new();
    let namespaces = json!([{ "type": "network", "path": "/run/netns/x" }, { "type": "pid" }, { "type": "ipc" },
                            { "type": "uts" }]);
    let namespaces: Vec<LinuxNamespace> = serde_json::from_value(namespaces).unwrap();
    check_namespaces(&namespaces, &mut warnings).unwrap();
    assert_eq!(warnings, ["linux.namespaces[0].path is left out: the guest has no network"]);
}

#[test]
fn what_is_no_configuration_is_refused() {
    let directory = bundle(&runc());
    for (text, hint) in [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("hello", "is no JSON"),
        ("\u{fffd}", "is no JSON"),
        ("[]", "is no object"),
        ("7", "is no object"),
        ("{}", "ociVersion"),
        (&"[".repeat(100_000), "is no JSON"),
        (&" ".repeat(5 << 20), "4 MiB"),
    ] {
        fs::write(directory.path().join("config.json"), text).unwrap();
        let error = format!("{:#}", load(&args(), directory.path()).err().unwrap());
        assert!(error.contains("config.json: ") && error.contains(hint), "{error}");
        assert!(!error.contains('\n'));
    }
    fs::remove_file(directory.path().join("config.json")).unwrap();
    let error = format!("{:#}", load(&args(), directory.path()).err().unwrap());
    assert!(error.contains("cannot be read") && error.contains("runc spec"), "{error}");
    let error = format!("{:#}", load(&args(), Path::new("/nonexistent")).err().unwrap());
    assert!(error.contains("--bundle /nonexistent"), "{error}");
}

#[test]
fn what_the_kernel_shows_of_itself_is_the_guests_own() {
    let config = with(
        runc(),
        "/mounts/-",
        json!({
            "destination": "/sys", "type": "none", "source": "/sys", "options": ["rbind", "nosuid", "ro"]
        }),
    );
    let args = load(&args(), bundle(&config).path()).unwrap();
    assert!(args.shares.is_empty());
    let mounts = args.container.unwrap().container(&[]).mounts;
    assert!(matches!(&mounts[3].what, What::Kernel { kind, .. } if kind == "sysfs"));
}

#[test]
fn a_file_has_the_owner_in_the_guest_that_it_would_have_in_a_share() {
    let mut config = with(
        runc(),
        "/mounts/-",
        json!({ "destination": "/x", "type": "bind", "source": "hosts", "options": ["ro"] }),
    );
    config["linux"]["uidMappings"] = json!([{ "containerID": 0, "hostID": 100000, "size": 10 }]);
    let directory = bundle(&config);
    fs::write(directory.path().join("hosts"), "").unwrap();
    std::os::unix::fs::chown(directory.path().join("hosts"), Some(100_005), Some(1000)).unwrap();
    let bundle = load(&args(), directory.path()).unwrap().container.unwrap();
    let owner = |uids: &UidMap, gids: &GidMap| {
        let files = bundle.files(uids, gids);
        (files[0].uid, files[0].gid)
    };
    assert_eq!(owner(&UidMap::same(), &GidMap::same()), (100_005, 1000));
    let ranges = UidMap::of_ranges(&bundle.uid_map).unwrap();
    assert!(bundle.gid_map.is_empty());
    assert_eq!(owner(&ranges, &GidMap::as_root(HostGid(1000))), (5, 0));
    let others = GidMap::of_ranges(&[IdRange { guest: 0, host: 7, count: 1 }]).unwrap();
    assert_eq!(owner(&UidMap::as_root(HostUid(1)), &others), (100_005, 65534));
}

#[test]
fn the_users_shares_count_among_the_directories_that_there_can_be() {
    let mut config = runc();
    for number in 0..23 {
        let destination = format!("/x{number}");
        let bind = json!({ "destination": destination, "type": "bind", "source": "rootfs" });
        config = with(config, "/mounts/-", bind);
    }
    let directory = bundle(&config);
    let load = |words: &[&str]| {
        let args = Wrapper::parse_from([&["run"], words].concat()).args;
        load(&args, directory.path())
    };
    assert_eq!(load(&["-v", "/tmp:/t"]).unwrap().shares.len(), 24);
    for words in [&["-v", "/tmp:/t", "-v", "/tmp:/u"][..], &["-v", "/tmp:/t", "--shares", "/u"]] {
        let error = format!("{:#}", load(words).err().unwrap());
        assert!(error.contains("mounts[25] (/x22)") && error.contains("--share"), "{error}");
    }
}
