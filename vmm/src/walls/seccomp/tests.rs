#![expect(unsafe_code, reason = "system calls that nothing safe makes")]

use std::process::Command;

use super::calls::REFUSED;
use super::*;

/// Of asm-generic/fcntl.h.
const F_SETSIG: usize = 10;
const F_SETOWN_EX: usize = 15;
const LISTENER: usize = libc::SECCOMP_FILTER_FLAG_NEW_LISTENER as usize;

/// Names the role and the call that a copy of this program is to make in it.
const CALL: &str = "ORIEL_TEST_CALL";

fn call(number: libc::c_long, arguments: [usize; 4]) -> libc::c_long {
    let [a, b, c, d] = arguments;
    // SAFETY: all arguments are numbers or null, with which none of these calls touches memory of ours.
    unsafe { libc::syscall(number, a, b, c, d, -1i32, 0) }
}

/// In a role, in a process of its own: whether a call is made, refused or the end.
#[test]
#[ignore = "run by another test, in a process of its own"]
fn a_call_is_made_in_a_role() {
    let Ok(asked) = std::env::var(CALL) else { return };
    let words: Vec<usize> = asked.split(' ').map(|word| word.parse().unwrap()).collect();
    let [role, parent, number, a, b, c, d] = words.as_slice() else { panic!("{asked}") };
    prepare().unwrap();
    let (role, number, arguments) = (ROLES[*role], *number as libc::c_long, [*a, *b, *c, *d]);
    let body = move || {
        let result = call(number, arguments);
        println!("returned {result} {}", io::Error::last_os_error().raw_os_error().unwrap());
    };
    let within = ROLES.get(*parent).copied();
    let started = move || start(role, "tester", body).unwrap().join().unwrap();
    match within {
        Some(parent) => start(parent, "parent", started).unwrap().join().unwrap(),
        None => started(),
    }
}

fn output_of(
    role: Role,
    parent: Option<Role>,
    number: libc::c_long,
    arguments: [usize; 4],
) -> (Option<i32>, String) {
    let output = maker_of(role, parent, number, arguments).output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(said).unwrap())
}

fn maker_of(
    role: Role,
    parent: Option<Role>,
    number: libc::c_long,
    arguments: [usize; 4],
) -> Command {
    let test = "walls::seccomp::tests::a_call_is_made_in_a_role";
    let place = |role| ROLES.iter().position(|other| *other == role).unwrap();
    let [a, b, c, d] = arguments;
    let parent = parent.map_or(ROLES.len(), place);
    let mut maker = Command::new(std::env::current_exe().unwrap());
    maker
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(CALL, format!("{} {parent} {number} {a} {b} {c} {d}", place(role)));
    maker
}

fn ends(role: Role, number: libc::c_long, arguments: [usize; 4]) {
    let (status, said) = output_of(role, None, number, arguments);
    assert_eq!(status, Some(125), "{role:?} {number}: {said}");
    let line = said.lines().find(|line| line.contains("oriel: the sandbox was ended"));
    let named = format!("its thread tester made a system call that it has no use for: {number}");
    assert!(line.is_some_and(|line| line.contains(&named)), "{role:?}: {said}");
    assert!(!said.contains("returned"), "{role:?} {number}: {said}");
}

fn answers(role: Role, number: libc::c_long, arguments: [usize; 4], expected: &str) {
    let (status, said) = output_of(role, None, number, arguments);
    assert_eq!(status, Some(0), "{role:?} {number}: {said}");
    assert!(said.contains(&format!("returned {expected}")), "{role:?} {number}: {said}");
}

#[test]
fn what_somebody_who_takes_over_a_process_wants_is_the_end_of_any_thread() {
    // A process for each pair takes a while: each role with some, and the one that has the most with all.
    for (number, _) in REFUSED {
        ends(Role::Other, *number, [0; 4]);
    }
    for role in ROLES {
        for number in [libc::SYS_execve, libc::SYS_ptrace, libc::SYS_mount] {
            ends(role, number, [0; 4]);
        }
    }
}

#[test]
fn arguments_that_no_thread_has_a_use_for_are_the_end_of_it() {
    let executable = (libc::PROT_READ | libc::PROT_EXEC) as usize;
    let private = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as usize;
    let newuser = libc::CLONE_NEWUSER as usize;
    let thread = libc::CLONE_THREAD as usize;
    let socket = libc::SOL_SOCKET as usize;
    for (number, arguments) in [
        (libc::SYS_mmap, [0, 4096, executable, private]),
        (libc::SYS_mprotect, [0, 0, libc::PROT_EXEC as usize, 0]),
        (libc::SYS_clone, [libc::SIGCHLD as usize, 0, 0, 0]),
        (libc::SYS_clone, [newuser | thread, 0, 0, 0]),
        (libc::SYS_unshare, [newuser, 0, 0, 0]),
        (libc::SYS_unshare, [libc::CLONE_NEWNS as usize, 0, 0, 0]),
        (libc::SYS_socket, [libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0, 0]),
        (libc::SYS_socket, [libc::AF_NETLINK as usize, libc::SOCK_RAW as usize, 0, 0]),
        (libc::SYS_prctl, [libc::PR_SET_DUMPABLE as usize, 1, 0, 0]),
        (libc::SYS_tgkill, [1, 1, 0, 0]),
        (libc::SYS_process_vm_readv, [1, 0, 0, 0]),
        (libc::SYS_rt_sigaction, [libc::SIGSYS as usize, 0, 0, 8]),
        (libc::SYS_prlimit64, [0, 0, 4096, 0]),
        // Signals to whomever when something comes; leases of files.
        (libc::SYS_fcntl, [0, libc::F_SETOWN as usize, 1, 0]),
        (libc::SYS_fcntl, [0, F_SETOWN_EX, 0, 0]),
        (libc::SYS_fcntl, [0, F_SETSIG, libc::SIGKILL as usize, 0]),
        (libc::SYS_fcntl, [0, libc::F_SETLEASE as usize, 0, 0]),
        (libc::SYS_fcntl, [0, libc::F_NOTIFY as usize, 0, 0]),
        (libc::SYS_seccomp, [libc::SECCOMP_SET_MODE_FILTER as usize, LISTENER, 0, 0]),
        (libc::SYS_setsockopt, [0, socket, libc::SO_ATTACH_FILTER as usize, 0]),
        (libc::SYS_setsockopt, [0, libc::IPPROTO_TCP as usize, libc::SO_RCVTIMEO as usize, 0]),
    ] {
        ends(Role::Main, number, arguments);
    }
    for role in [Role::Main, Role::Vcpu, Role::Control, Role::Device(Work::Files)] {
        // A character that is typed for the user; a loop device; memory that is not the guest's.
        for request in [libc::TIOCSTI as usize, 0x4c00, 0x4010_ae42] {
            ends(role, libc::SYS_ioctl, [0, request, 0, 0]);
        }
    }
}

#[test]
fn the_end_waits_for_nobody_to_read_of_it() {
    let (_reader, mut writer) = io::pipe().unwrap();
    rustix::io::ioctl_fionbio(&writer, true).unwrap();
    while io::Write::write(&mut writer, &[b'x'; 4096]).is_ok() {}
    rustix::io::ioctl_fionbio(&writer, false).unwrap();
    let mut maker = maker_of(Role::Main, None, libc::SYS_execve, [0; 4]);
    let mut child = maker.stdout(std::process::Stdio::null()).stderr(writer).spawn().unwrap();
    let start = std::time::Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > std::time::Duration::from_secs(30) {
            child.kill().unwrap();
            panic!("it waits for a reader");
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    assert_eq!(status.code(), Some(125));
}

#[test]
fn what_one_kind_of_thread_does_another_may_not() {
    let (bytes, sockets) = (Role::Device(Work::Bytes), Role::Device(Work::Sockets));
    for role in [Role::Vcpu, Role::Device(Work::Files), bytes, Role::Watch] {
        ends(role, libc::SYS_socket, [libc::AF_UNIX as usize, 0, 0, 0]);
        ends(role, libc::SYS_connect, [0; 4]);
    }
    for role in [bytes, sockets, Role::Watch] {
        for number in [libc::SYS_openat2, libc::SYS_unlinkat, libc::SYS_setfsuid, libc::SYS_clone] {
            ends(role, number, [0; 4]);
        }
    }
    let run = [usize::MAX, 0xae80, 0, 0];
    for role in [Role::Device(Work::Files), bytes, sockets, Role::Watch, Role::Control, Role::Main]
    {
        ends(role, libc::SYS_ioctl, run);
    }
    answers(Role::Vcpu, libc::SYS_ioctl, run, "-1 9");
    for command in [libc::F_GETFL, libc::F_SETFL, libc::F_DUPFD_CLOEXEC] {
        answers(bytes, libc::SYS_fcntl, [usize::MAX, command as usize, 0, 0], "-1 9");
    }
    let (level, option) = (libc::SOL_SOCKET as usize, libc::SO_SNDTIMEO as usize);
    answers(Role::Control, libc::SYS_setsockopt, [usize::MAX, level, option, 0], "-1 9");
}

#[test]
fn what_has_another_way_is_refused_and_not_the_end() {
    let (missing, bad) = ("-1 38", "-1 9");
    for role in [Role::Other, Role::Main, Role::Vcpu, Role::Control, Role::Device(Work::Files)] {
        answers(role, libc::SYS_clone3, [0; 4], missing);
    }
    // As for the names in a backtrace.
    for role in [Role::Device(Work::Sockets), Role::Watch] {
        answers(role, libc::SYS_openat, [usize::MAX, 0, 0, 0], missing);
        answers(role, libc::SYS_readlink, [0; 4], missing);
    }
    answers(Role::Watch, libc::SYS_fstat, [usize::MAX, 0, 0, 0], bad);
}

#[test]
fn a_thread_makes_its_calls_whoever_starts_it() {
    let files = Role::Device(Work::Files);
    let bad_handle = [usize::MAX, 0, 0, 0];
    // That the lists are parts of each other is seen where they are; here, that filters on filters let them be.
    for (parent, role, call) in [
        (Role::Vcpu, files, libc::SYS_fchmod),
        (Role::Vcpu, Role::Device(Work::Bytes), libc::SYS_readv),
        (files, files, libc::SYS_fchmod),
        (Role::Control, Role::Control, libc::SYS_accept4),
        (Role::Main, Role::Main, libc::SYS_dup3),
        (Role::Main, Role::Device(Work::Bytes), libc::SYS_readv),
    ] {
        let (status, said) = output_of(role, Some(parent), call, bad_handle);
        assert_eq!(status, Some(0), "{parent:?} {role:?}: {said}");
        assert!(said.contains("returned -1 9"), "{parent:?} {role:?}: {said}");
    }
}

#[test]
fn a_panic_says_where_it_was_in_every_role() {
    let test = "walls::seccomp::tests::a_thread_panics_in_each_role";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env("RUST_BACKTRACE", "1")
        .env(CALL, "all")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
    assert_eq!(said.matches("in a role").count(), ROLES.len(), "{said}");
    assert_eq!(said.matches("stack backtrace").count(), ROLES.len(), "{said}");
}

#[test]
#[ignore = "run by another test, in a process of its own"]
fn a_thread_panics_in_each_role() {
    if std::env::var(CALL).is_err() {
        return;
    }
    prepare().unwrap();
    for role in ROLES {
        assert!(start(role, "tester", || panic!("in a role")).unwrap().join().is_err());
    }
}

#[test]
fn what_threads_do_in_general_goes_on() {
    let test = "walls::seccomp::tests::threads_live_in_each_role";
    let output = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .env(CALL, "all")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(0), "{said}");
}

#[test]
#[ignore = "run by another test, in a process of its own"]
fn threads_live_in_each_role() {
    if std::env::var(CALL).is_err() {
        return;
    }
    let before = std::time::Instant::now();
    prepare().unwrap();
    eprintln!("prepared in {} µs", before.elapsed().as_micros());
    for role in ROLES {
        let body = || {
            drop(vec![1u8; 64 << 20]);
            std::thread::sleep(std::time::Duration::from_millis(1));
            std::collections::HashMap::from([(1, 2)]).len()
        };
        let before = std::time::Instant::now();
        assert_eq!(start(role, "tester", body).unwrap().join().unwrap(), 1);
        eprintln!("{role:?} {} µs", before.elapsed().as_micros());
    }
    // Who starts its own kind piles up no filters: the kernel would refuse some hundred of them.
    fn next(left: usize) {
        let files = Role::Device(Work::Files);
        if left > 0 {
            start(files, "tester", move || next(left - 1)).unwrap().join().unwrap();
        }
    }
    next(100);
}
