//! A distribution that boots as it does anywhere: its stock kernel with drivers as modules, its initramfs with
//! systemd, its udev. `rootfs/image` makes it.

use std::fs;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use integration::{Oriel, Tree, system, text};

use super::agent::Sandbox;

/// A minute where KVM is emulated and the machine has nothing else to do.
const BOOT: Duration = Duration::from_secs(300);

/// Files of a root are mapped in pieces of 2 MiB, and a boot looks at some 300 of them.
const WINDOW: &str = "window=512M";

#[test]
fn a_distribution_boots_from_the_share_with_systemd_and_powers_off() {
    let root = Tree::new();
    let archive = system("root.tar");
    let unpack = Command::new("tar").args(["-C", root.text(), "-xpf", text(&archive)]).status();
    assert!(unpack.unwrap().success(), "{} is unpacked", archive.display());
    let unit = "[Unit]\nDescription=Report\nAfter=multi-user.target\n\
                [Service]\nType=oneshot\nExecStart=/bin/sh /report.sh\n";
    root.write("etc/systemd/system/report.service", unit.as_bytes());
    let wanted = root.path("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wanted).unwrap();
    symlink("../report.service", wanted.join("report.service")).unwrap();
    let script = r#"
        exec >/report 2>&1
        echo "root=$(grep ' / ' /proc/mounts)"
        echo "init=$(cat /proc/1/comm)"
        echo "target=$(systemctl is-active multi-user.target)"
        echo "failed=$(systemctl --failed --no-legend | wc -l)"
        echo "initrd=$(journalctl -b | grep -c 'Running in initrd')"
        echo "switched=$(journalctl -b | grep -c 'Switching root')"
        for module in virtio_pci virtiofs fuse virtio_rng vmw_vsock_virtio_transport; do
            echo "$module=$(lsmod | grep -c "^$module ")"
        done
        echo "rng=$(cat /sys/class/misc/hw_random/rng_current)"
        echo "vsock=$([ -c /dev/vsock ] && echo there)"
        echo "udev=$(udevadm info -q property -p /sys/bus/virtio/devices/virtio0 | grep ^MODALIAS)"
        echo "warnings=$(journalctl -b -k -p err -q | wc -l)"
        sync
        systemctl --no-block poweroff
    "#;
    root.write("report.sh", script.as_bytes());

    let stats = Tree::new();
    let outcome = Oriel::run(&["--kernel", text(&system("vmlinux"))])
        .args(&["--initrd", text(&system("initramfs"))])
        .args(&["--root", &format!("{}:tag=rootfs,{WINDOW}", root.text())])
        .args(&["--cmdline", "root=virtiofs:rootfs rootflags=dax rw"])
        .args(&["--vsock", text(&stats.path("vsock")), "--stats", text(&stats.path("stats"))])
        .timeout(BOOT)
        .finish();
    outcome.exits_with(0).says_no_error();
    outcome.check(outcome.console.contains("reboot: Power down"), "systemd-shutdown powers off");
    let report = String::from_utf8(root.read("report")).unwrap();
    println!("a boot up to the power-off: {:.1?}\n{report}", outcome.took);
    let value = |name: &str| {
        let line = report.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
        line.unwrap_or_else(|| panic!("{name} is not in the report:\n{report}"))
    };
    for (name, expected, what) in [
        ("init", "systemd", "the first program"),
        ("target", "active", "all that is to be started was"),
        ("failed", "0", "no unit has failed"),
        ("initrd", "1", "systemd ran in the initramfs"),
        ("switched", "1", "and went over to the share"),
        ("virtio_pci", "1", "a module"),
        ("virtiofs", "1", "a module"),
        ("fuse", "1", "a module"),
        ("virtio_rng", "1", "a module that nobody but udev asks for"),
        ("vmw_vsock_virtio_transport", "1", "another"),
        ("rng", "virtio_rng.0", "it drives the device"),
        ("vsock", "there", "and that one has a node"),
        ("warnings", "0", "the kernel has nothing to complain of"),
    ] {
        assert_eq!(value(name), expected, "{name}: {what}\n{report}");
    }
    assert!(value("root").starts_with("rootfs / virtiofs rw"), "{report}");
    assert!(value("root").contains("dax=always"), "{report}");
    assert!(value("udev").starts_with("MODALIAS=virtio:"), "{report}");
    let stats: serde_json::Value = serde_json::from_slice(&stats.read("stats")).unwrap();
    let mapped = stats["shares"][0]["counters"]["dax_setups"].as_u64();
    assert!(mapped > Some(50), "its programs are mapped: {mapped:?}");
}

#[test]
fn the_agent_is_a_service_of_a_systemd_that_stays_in_the_initramfs() {
    let tree = Tree::new();
    tree.write("file", b"of the host\n");
    let (kernel, initramfs) = (system("vmlinux"), system("agent.initramfs"));
    let arguments = ["--kernel", text(&kernel), "--initrd", text(&initramfs)];
    let share = tree.at("/wherever", "tag=data");
    let start = Instant::now();
    let sandbox = Sandbox::start("service", &[&arguments[..], &["-v", &share]].concat(), &[]);
    // Nobody waits for an agent that may never come.
    while sandbox.exec(&[], &["true"]).status != 0 {
        assert!(start.elapsed() < BOOT, "the agent comes with the system");
        thread::sleep(Duration::from_millis(200));
    }
    println!("from start to agent: {:.1?}", start.elapsed());
    let outcome = sandbox.script(
        &[],
        r#"
        echo "init=$(cat /proc/1/comm)"
        echo "unit=$(systemctl show -P SubState oriel-agent.service)"
        echo "failed=$(systemctl --failed --no-legend | wc -l)"
        echo "parent=$(cat /proc/$PPID/comm)"
        echo "root=$(grep -c ' / rootfs ' /proc/mounts)"
        mkdir /data && mount -t virtiofs -o dax data /data && echo "file=$(cat /data/file)"
        echo "from the guest" >/data/answer
        exit 42
    "#,
    );
    outcome.exits_with(42).says_no_error().guest_says(&[
        ("init", "systemd", "the first program"),
        ("unit", "running", "the agent has said that it is ready"),
        ("failed", "0", "no unit has failed"),
        ("parent", "oriel-init", "commands are the agent's"),
        ("root", "1", "the root is the initramfs"),
        ("file", "of the host", "a share"),
    ]);
    assert_eq!(tree.read("answer"), b"from the guest\n");
    let outcome = sandbox.exec(&["-e", "OWN=own"], &["env"]);
    let mut names: Vec<_> = outcome
        .text()
        .lines()
        .filter_map(|line| Some(line.split_once('=')?.0.to_string()))
        .collect();
    names.sort();
    assert_eq!(names, ["HOME", "OWN", "PATH"], "nothing of the service's surroundings");
    let outcome = sandbox.exec(&["-t"], &["sh", "-c", "[ -t 0 ] && stty size >/dev/null && tty"]);
    outcome.exits_with(0);
    outcome.check(outcome.text().starts_with("/dev/pts/"), "a terminal");
    let piped = sandbox.describe("exec", &["-i"], &["cat"]).input(b"through the guest").finish();
    piped.exits_with(0);
    assert_eq!(piped.stdout, b"through the guest");
    // What it says when the agent goes before the command is not of interest here.
    sandbox.exec(&[], &["systemctl", "--no-block", "poweroff"]);
    let outcome = sandbox.oriel.finish();
    outcome.exits_with(0).says_no_error();
    outcome.check(outcome.console.contains("reboot: Power down"), "systemd-shutdown powers off");
}
