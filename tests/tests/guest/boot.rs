//! From nothing to a command and back.

use integration::{Oriel, Tree};

#[test]
fn a_guest_boots_runs_a_command_and_powers_off() {
    let script = r#"
        echo "kernel=$(uname -s)"
        echo "machine=$(uname -m)"
        echo "hostname=$(hostname)"
        echo "user=$(id -u):$(id -g)"
        echo "directory=$(pwd)"
        echo "processors=$(grep -c ^processor /proc/cpuinfo)"
        echo "hypervisor=$(grep -cw hypervisor /proc/cpuinfo)"
        echo "kvmclock=$(cat /sys/devices/system/clocksource/clocksource0/available_clocksource)"
        echo "init=$(cat /proc/1/comm)"
        echo "filesystems=$(grep -c virtiofs /proc/mounts)"
        echo "loopback=$(ip -o addr show lo | grep -c 127.0.0.1)"
        echo "null=$(echo x >/dev/null && echo works)"
        echo "fd=$(echo works | cat /dev/stdin)"
        echo "stdin=$(wc -c)"
        echo "warnings=$(dmesg | grep -cE 'BUG:|WARNING:|Oops|call trace')"
        a=$(date +%s); sleep 1; b=$(date +%s)
        echo "clock_advanced=$([ $((b - a)) -ge 1 ] && [ $((b - a)) -le 3 ] && echo yes)"
        echo "time=$a"
    "#;
    let before = std::time::SystemTime::now();
    let outcome = Oriel::run(&[]).script(script).finish();
    outcome.exits_with(0).says_no_error().guest_says(&[
        ("kernel", "Linux", "a Linux kernel runs"),
        ("machine", "x86_64", "in 64-bit mode"),
        ("hostname", "oriel", "the default host name"),
        ("user", "0:0", "commands are root's by default"),
        ("directory", "/", "the default working directory"),
        ("processors", "1", "one CPU by default"),
        ("hypervisor", "1", "CPUID says that there is a hypervisor"),
        ("init", "init", "the guest's init"),
        ("filesystems", "0", "nothing of the host is shared unasked"),
        ("loopback", "1", "the loopback interface is up"),
        ("null", "works", "/dev/null"),
        ("fd", "works", "/dev/stdin"),
        ("stdin", "0", "standard input is empty without --interactive"),
        ("warnings", "0", "the guest's kernel has nothing to complain of"),
        ("clock_advanced", "yes", "the clock goes at its pace"),
    ]);
    let seconds = before.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let time = outcome.number("time");
    outcome.check(time.abs_diff(seconds) < 120, "the guest knows what time it is");
}

#[test]
fn two_cpus_are_both_online_and_take_interrupts() {
    let tree = Tree::with_probe(super::PROBE);
    let script = r#"
        echo "nproc=$(nproc)"
        echo "processors=$(grep -c ^processor /proc/cpuinfo)"
        echo "online=$(cat /sys/devices/system/cpu/online)"
        echo "ids=$(grep '^apicid' /proc/cpuinfo | sort -u | wc -l)"
        for cpu in 0 1; do
            before=$(awk -v c=$((cpu + 2)) '$1 == "LOC:" { print $c }' /proc/interrupts)
            taskset $((1 << cpu)) sh -c 'i=0; while [ $i -lt 3000 ]; do i=$((i + 1)); done; sleep 0.2; ls /s >/dev/null'
            after=$(awk -v c=$((cpu + 2)) '$1 == "LOC:" { print $c }' /proc/interrupts)
            echo "timer$cpu=$([ "$after" -gt "$before" ] && echo ticks)"
        done
        echo "share_interrupts=$(grep -c virtio /proc/interrupts)"
        echo "probe=$(/s/guest-probe files /s >/s/log && grep -c '=ok$' /s/log)"
        echo "wrong=$(grep -v -e '=ok$' -e ^statfs -e ^operations /s/log | wc -l)"
        echo 0 >/sys/devices/system/cpu/cpu1/online && echo "offline=$(nproc)"
        echo 1 >/sys/devices/system/cpu/cpu1/online && echo "again=$(nproc)"
        taskset 2 ls /s >/dev/null && echo "served_again=yes"
    "#;
    let outcome = Oriel::run(&["--cpus", "2", "-v", &tree.at("/s", "")]).script(script).finish();
    outcome.exits_with(0).guest_says(&[
        ("nproc", "2", "a program may use both"),
        ("processors", "2", "/proc/cpuinfo lists both"),
        ("online", "0-1", "both are online"),
        ("ids", "2", "each has an APIC id of its own"),
        ("timer0", "ticks", "the first has a timer"),
        ("timer1", "ticks", "the second has a timer"),
        ("wrong", "0", "file operations of several threads on two CPUs"),
        ("offline", "1", "a CPU can be taken offline"),
        ("again", "2", "and comes back"),
        ("served_again", "yes", "and a share serves it"),
    ]);
    outcome.check(outcome.number("share_interrupts") > 0, "the share has interrupts");
}

#[test]
fn a_guest_that_reboots_is_a_sandbox_that_broke_down() {
    let outcome = Oriel::run(&[]).script("echo before; sync; reboot -f; sleep 60").finish();
    outcome.exits_with(125);
    outcome
        .check(outcome.stderr.contains("the guest reset itself"), "the message says what happened");
}

#[test]
fn a_guest_that_powers_off_under_its_command_is_told_of() {
    let outcome = Oriel::run(&[]).script("poweroff -f; sleep 60").finish();
    outcome.exits_with(125);
    let said = outcome.stderr.contains("powered off before the command ended");
    outcome.check(said, "the message says what happened");
}

#[test]
fn a_panic_ends_the_sandbox_and_shows_the_console() {
    let script = "echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 60";
    let outcome = Oriel::run(&[]).script(script).finish();
    outcome.exits_with(125);
    outcome.check(outcome.stderr.contains("Kernel panic"), "the console's end shows the panic");
    outcome.check(outcome.console.contains("Kernel panic"), "and so does --console");
}
