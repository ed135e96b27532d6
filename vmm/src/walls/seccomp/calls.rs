//! Which system calls each role makes, and with which arguments.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use devices::threads::Work;
use kvm_bindings::{
    KVMIO, kvm_irq_routing, kvm_irqfd, kvm_pre_fault_memory, kvm_sregs, kvm_userspace_memory_region,
};
use seccompiler::{
    SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};
use vmm_sys_util::ioctl::{_IOC_NONE, _IOC_READ, _IOC_WRITE, ioctl_expr};

use super::Role;

/// A system call and its name.
type Call = (libc::c_long, &'static str);

macro_rules! calls {
    ($($name:ident)*) => { &[$((libc::$name, stringify!($name))),*] };
}

/// What the C library and Rust's do in any thread: memory, locks, time, signals (whose handlers send a byte to the main
/// thread), the end. Those of [`arguments`] with some arguments only.
const ANY: &[Call] = calls![
    SYS_mmap SYS_munmap SYS_mremap SYS_mprotect SYS_madvise SYS_brk
    SYS_futex SYS_sched_yield SYS_sched_getaffinity SYS_rseq SYS_set_robust_list
    SYS_clock_gettime SYS_clock_nanosleep SYS_nanosleep SYS_restart_syscall SYS_getrandom
    SYS_rt_sigaction SYS_rt_sigprocmask SYS_rt_sigreturn SYS_sigaltstack SYS_tgkill
    SYS_getpid SYS_gettid SYS_prctl SYS_exit SYS_exit_group SYS_sendto
];

/// Bytes between descriptors that are open and memory, the guest's included (which may go away while it is used, and is
/// then reached as that of another process would be), and waiting for them.
const BYTES: &[Call] = calls![
    SYS_read SYS_write SYS_readv SYS_writev SYS_close SYS_poll SYS_ppoll SYS_lseek
    SYS_process_vm_readv SYS_process_vm_writev SYS_fcntl SYS_fstat
];

/// A log that is full is given another name, and a new one is made.
const LOGS: &[Call] = calls![SYS_openat SYS_rename];

/// More threads, with filters of their own.
const THREADS: &[Call] = calls![SYS_clone SYS_clone3 SYS_seccomp];

/// Sockets that are there, and such as connect.
const SOCKETS: &[Call] = calls![
    SYS_accept4 SYS_connect SYS_socket SYS_socketpair SYS_shutdown SYS_getsockopt SYS_setsockopt
    SYS_recvfrom SYS_recvmsg SYS_sendmsg
];

/// Waiting for many descriptors.
const EVENTS: &[Call] = calls![
    SYS_epoll_create1 SYS_epoll_ctl SYS_epoll_wait SYS_epoll_pwait SYS_eventfd2
];

/// What is mapped of files: how long they are now, and whether they can be read.
const WATCHING: &[Call] = calls![
    SYS_fstat SYS_newfstatat SYS_statx SYS_fstatfs SYS_pread64 SYS_lseek
];

/// What a share does to files, the identity in whose name included, and what it takes to wait for a lock.
const FILES: &[Call] = calls![
    SYS_openat SYS_openat2 SYS_name_to_handle_at SYS_open_by_handle_at SYS_dup
    SYS_statx SYS_newfstatat SYS_statfs SYS_fstatfs SYS_readlinkat SYS_getdents64
    SYS_preadv SYS_preadv2 SYS_pwritev SYS_pwritev2 SYS_pread64 SYS_pwrite64
    SYS_fallocate SYS_ftruncate SYS_fsync SYS_fdatasync SYS_syncfs SYS_copy_file_range
    SYS_fadvise64 SYS_flock
    SYS_mkdirat SYS_mknodat SYS_symlinkat SYS_linkat SYS_unlinkat SYS_renameat2 SYS_renameat
    SYS_fchmod SYS_fchmodat SYS_fchownat SYS_fchown SYS_utimensat
    SYS_getxattr SYS_setxattr SYS_listxattr SYS_removexattr
    SYS_fgetxattr SYS_fsetxattr SYS_flistxattr SYS_fremovexattr
    SYS_setfsuid SYS_setfsgid SYS_getgroups SYS_setgroups SYS_capget SYS_capset
    SYS_getuid SYS_geteuid SYS_getgid SYS_getegid SYS_umask SYS_unshare SYS_prlimit64
    SYS_timer_create SYS_timer_settime SYS_timer_delete SYS_ioctl
];

/// What a mapping does to find out what of a file is in the page cache, of which the C library knows nothing yet.
const MAPPINGS: &[Call] = &[(SYS_CACHESTAT, "cachestat")];
/// `__NR_cachestat`, since Linux 6.5.
const SYS_CACHESTAT: libc::c_long = 451;

/// Being told of what the host changes.
const CHANGES: &[Call] = calls![
    SYS_fanotify_init SYS_fanotify_mark SYS_inotify_init1 SYS_inotify_add_watch
    SYS_inotify_rm_watch
];

/// The end of a sandbox: sockets and logs are removed, the terminal is as it was, who has started it is told.
const ENDING: &[Call] =
    calls![SYS_unlink SYS_newfstatat SYS_statx SYS_lstat SYS_ioctl SYS_dup2 SYS_dup3];

/// What a panic does beyond [`ANY`] to say where it was. A role that lacks one is told that there is no such call.
const BACKTRACE: &[Call] = calls![SYS_openat SYS_readlink SYS_getcwd SYS_stat SYS_statx SYS_fstat];

/// Putting a sandbox together, once the walls are raised: looking at the host's numbers, and giving up more.
const BEGINNING: &[Call] =
    calls![SYS_readlink SYS_getcwd SYS_uname SYS_sysinfo SYS_getppid SYS_pipe2];

/// Requests of ioctl(2).
mod request {
    use super::*;

    const fn number(direction: u32, kind: u32, number: u32, size: usize) -> u64 {
        ioctl_expr(direction, kind, number, size as u32)
    }

    /// Of linux/fs.h: attributes of files, those that `chattr` changes and those of projects.
    pub const FILES: [u64; 4] = [
        number(_IOC_READ, b'f' as u32, 1, size_of::<libc::c_long>()),
        number(_IOC_WRITE, b'f' as u32, 2, size_of::<libc::c_long>()),
        number(_IOC_READ, b'X' as u32, 31, 28),
        number(_IOC_WRITE, b'X' as u32, 32, 28),
    ];
    /// Of linux/kvm.h: entering pages ahead of faults, for who maps files.
    pub const PREFAULT: [u64; 2] = [
        number(_IOC_WRITE, KVMIO, 0x84, size_of::<kvm_sregs>()),
        number(_IOC_READ | _IOC_WRITE, KVMIO, 0xd5, size_of::<kvm_pre_fault_memory>()),
    ];
    /// The guest runs. First where it is allowed: no call is as frequent.
    pub const RUN: u64 = number(_IOC_NONE, KVMIO, 0x80, 0);
    /// The guest moves windows and interrupts about.
    pub const MOVE: [u64; 3] = [
        number(_IOC_WRITE, KVMIO, 0x46, size_of::<kvm_userspace_memory_region>()),
        number(_IOC_WRITE, KVMIO, 0x6a, size_of::<kvm_irq_routing>()),
        number(_IOC_WRITE, KVMIO, 0x76, size_of::<kvm_irqfd>()),
    ];
    /// Whether a socket blocks.
    pub const SOCKET: u64 = libc::FIONBIO;
    /// The user's terminal: its settings and its size.
    pub const TERMINAL: [u64; 6] = [
        libc::TCGETS,
        libc::TCSETS,
        libc::TCSETSF,
        libc::TCGETS2,
        libc::TCSETSF2,
        libc::TIOCGWINSZ,
    ];
}

/// What prctl(2) is called for: names of threads and of memory, what adding a filter does first, and not to end any more
/// with who has started a sandbox.
const PRCTL: [libc::c_int; 5] = [
    libc::PR_SET_NAME,
    libc::PR_GET_NAME,
    libc::PR_SET_VMA,
    libc::PR_SET_NO_NEW_PRIVS,
    libc::PR_SET_PDEATHSIG,
];

/// What fcntl(2) is called for: copies of descriptors, their flags, locks of open files. Not to have signals sent, to
/// whomever, when something comes, nor for leases.
const FCNTL: [libc::c_int; 8] = [
    libc::F_DUPFD_CLOEXEC,
    libc::F_GETFD,
    libc::F_SETFD,
    libc::F_GETFL,
    libc::F_SETFL,
    libc::F_OFD_GETLK,
    libc::F_OFD_SETLK,
    libc::F_OFD_SETLKW,
];

/// Namespaces that clone(2) makes.
const NAMESPACES: libc::c_int = libc::CLONE_NEWNS
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWCGROUP
    | CLONE_NEWTIME;
/// `CLONE_NEWTIME` of linux/sched.h.
const CLONE_NEWTIME: libc::c_int = 0x80;

/// The calls of a role.
fn of(role: Role) -> Vec<&'static [Call]> {
    let mut lists = vec![ANY, BYTES, BACKTRACE];
    match role {
        Role::Device(Work::Files) => lists.extend([FILES, MAPPINGS, CHANGES, THREADS]),
        Role::Device(Work::Bytes) => lists.extend([LOGS]),
        Role::Device(Work::Sockets) => lists.extend([SOCKETS, EVENTS, calls![SYS_ioctl]]),
        Role::Watch => lists.extend([WATCHING]),
        // Starts the threads of queues and consoles, and serves requests and the console's port itself; ends streams of
        // sockets with their device.
        Role::Vcpu => {
            lists.extend([FILES, MAPPINGS, CHANGES, LOGS, THREADS]);
            lists.push(calls![SYS_shutdown SYS_epoll_ctl]);
        }
        Role::Control => lists.extend([FILES, CHANGES, LOGS, SOCKETS, THREADS]),
        Role::Main => lists.extend([FILES, CHANGES, LOGS, SOCKETS, EVENTS, THREADS, ENDING]),
        Role::Other => lists.extend([
            FILES, MAPPINGS, CHANGES, LOGS, SOCKETS, EVENTS, WATCHING, THREADS, ENDING, BEGINNING,
        ]),
    }
    lists
}

/// The calls that a role is told do not exist.
pub fn missing(role: Role) -> Result<SeccompFilter> {
    // Has its flags in memory, where no filter sees them. The C library then takes clone(2).
    let mut rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let opens = of(role).iter().any(|list| [FILES, LOGS].contains(list));
    if !opens {
        rules.extend(BACKTRACE.iter().map(|(call, _)| (*call, Vec::new())));
        // Of what is open already.
        for call in of(role).into_iter().filter(|list| *list != BACKTRACE).flatten() {
            rules.remove(&call.0);
        }
        rules.insert(libc::SYS_clone3, Vec::new());
    }
    filter(rules, SeccompAction::Allow, SeccompAction::Errno(libc::ENOSYS as u32))
}

/// The calls that a role may make.
pub fn allowed(role: Role) -> Result<SeccompFilter> {
    let mut rules: BTreeMap<_, _> =
        of(role).into_iter().flatten().map(|(call, _)| (*call, Vec::new())).collect();
    for (call, only) in arguments(role)? {
        if let Some(rule) = rules.get_mut(&call) {
            *rule = only;
        }
    }
    filter(rules, SeccompAction::Trap, SeccompAction::Allow)
}

fn filter(
    rules: BTreeMap<libc::c_long, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    action: SeccompAction,
) -> Result<SeccompFilter> {
    SeccompFilter::new(rules, otherwise, action, TargetArch::x86_64).context("seccomp")
}

/// Calls that are allowed with some arguments only: one of the rules must hold.
fn arguments(role: Role) -> Result<Vec<(libc::c_long, Vec<SeccompRule>)>> {
    let own = u64::from(std::process::id());
    let not_executable = || one(masked(2, libc::PROT_EXEC, 0));
    let mut rules = vec![
        // Threads of this process, in its own namespaces.
        (libc::SYS_clone, one(masked(0, libc::CLONE_THREAD | NAMESPACES, libc::CLONE_THREAD))?),
        (libc::SYS_unshare, one(is(0, libc::CLONE_FS as u64))?),
        (libc::SYS_socket, one(is(0, libc::AF_UNIX as u64))?),
        (libc::SYS_socketpair, one(is(0, libc::AF_UNIX as u64))?),
        (libc::SYS_mmap, not_executable()?),
        (libc::SYS_mprotect, not_executable()?),
        // Whoever makes a refused call is not to hear of it.
        (libc::SYS_rt_sigaction, one(is_not(0, libc::SIGSYS as u64))?),
        (libc::SYS_tgkill, one(is(0, own))?),
        // To whom a socket is connected.
        (libc::SYS_sendto, one(whole(4, 0))?),
        (libc::SYS_process_vm_readv, one(is(0, own))?),
        (libc::SYS_process_vm_writev, one(is(0, own))?),
        // For the calling thread, and with nobody who decides in the kernel's place.
        (libc::SYS_seccomp, vec![both(is(0, libc::SECCOMP_SET_MODE_FILTER.into()), is(1, 0))?]),
        (libc::SYS_fcntl, any_of(1, FCNTL.map(|command| command as u64))?),
        // How long to wait for the other end.
        (
            libc::SYS_setsockopt,
            vec![socket_option(libc::SO_RCVTIMEO)?, socket_option(libc::SO_SNDTIMEO)?],
        ),
        (libc::SYS_prctl, any_of(0, PRCTL.map(|option| option as u64))?),
        // To ask, not to set.
        (libc::SYS_prlimit64, one(whole(2, 0))?),
    ];
    if let Some(requests) = requests(role) {
        rules.push((libc::SYS_ioctl, any_of(1, requests)?));
    }
    Ok(rules)
}

/// What the role may ask with ioctl(2), if it has the call. `None`: anything.
fn requests(role: Role) -> Option<Vec<u64>> {
    Some(match role {
        // Makes the vCPUs. No thread is so any more once they run.
        Role::Other => return None,
        Role::Vcpu => [request::RUN]
            .into_iter()
            .chain(request::PREFAULT)
            .chain(request::MOVE)
            .chain(request::FILES)
            .collect(),
        Role::Device(Work::Files) => request::PREFAULT.into_iter().chain(request::FILES).collect(),
        Role::Control => request::FILES.into_iter().chain([request::SOCKET]).collect(),
        Role::Main => {
            request::TERMINAL.into_iter().chain(request::FILES).chain([request::SOCKET]).collect()
        }
        Role::Device(Work::Sockets) => vec![request::SOCKET],
        Role::Device(Work::Bytes) | Role::Watch => Vec::new(),
    })
}

type Condition = seccompiler::Result<SeccompCondition>;

/// Of the lower half of an argument: none of those above has more, and the kernel looks at no more of them.
fn condition(argument: u8, operator: SeccompCmpOp, value: u64) -> Condition {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)?)
}

fn is(argument: u8, value: u64) -> Condition {
    condition(argument, SeccompCmpOp::Eq, value)
}

fn is_not(argument: u8, value: u64) -> Condition {
    condition(argument, SeccompCmpOp::Ne, value)
}

fn masked(argument: u8, mask: libc::c_int, value: libc::c_int) -> Condition {
    condition(argument, SeccompCmpOp::MaskedEq(mask as u64), value as u64)
}

/// All of the argument, as of a pointer.
fn whole(argument: u8, value: u64) -> Condition {
    Ok(SeccompCondition::new(argument, SeccompCmpArgLen::Qword, SeccompCmpOp::Eq, value)?)
}

fn one(condition: Condition) -> Result<Vec<SeccompRule>> {
    let rule = condition.and_then(|condition| Ok(SeccompRule::new(vec![condition])?));
    Ok(vec![rule.context("seccomp")?])
}

fn both(first: Condition, second: Condition) -> Result<SeccompRule> {
    let rule = first.and_then(|first| Ok(SeccompRule::new(vec![first, second?])?));
    rule.context("seccomp")
}

fn socket_option(option: libc::c_int) -> Result<SeccompRule> {
    both(is(1, libc::SOL_SOCKET as u64), is(2, option as u64))
}

fn any_of(argument: u8, values: impl IntoIterator<Item = u64>) -> Result<Vec<SeccompRule>> {
    let rules = values.into_iter().map(|value| one(is(argument, value)));
    Ok(rules.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// The name of a call that some role makes, else nothing. Allocates nothing.
pub fn name(call: libc::c_int) -> &'static str {
    let lists = [
        ANY, BYTES, LOGS, THREADS, SOCKETS, EVENTS, WATCHING, FILES, MAPPINGS, CHANGES, ENDING,
        BACKTRACE, BEGINNING, REFUSED,
    ];
    let known = lists.into_iter().flatten().find(|(number, _)| *number == libc::c_long::from(call));
    known.map_or("", |(_, name)| name.strip_prefix("SYS_").unwrap_or(name))
}

/// Such as somebody makes who has taken over a process.
pub const REFUSED: &[Call] = calls![
    SYS_execve SYS_execveat SYS_fork SYS_vfork SYS_ptrace SYS_kill SYS_tkill SYS_setns SYS_mount
    SYS_umount2 SYS_pivot_root SYS_chroot SYS_open_tree SYS_move_mount SYS_fsopen SYS_bpf
    SYS_perf_event_open SYS_userfaultfd SYS_io_uring_setup SYS_keyctl SYS_add_key SYS_setuid
    SYS_setgid SYS_setresuid SYS_init_module SYS_kexec_load SYS_reboot SYS_bind SYS_listen
    SYS_pidfd_open SYS_pidfd_getfd SYS_shmget SYS_personality SYS_modify_ldt SYS_pkey_mprotect
];

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// Who starts threads of which kind: see `walls::start` and `devices::threads::spawn`.
    const STARTED: [(Role, Role); 6] = [
        (Role::Vcpu, Role::Device(Work::Files)),
        (Role::Vcpu, Role::Device(Work::Bytes)),
        (Role::Device(Work::Files), Role::Device(Work::Files)),
        (Role::Control, Role::Control),
        (Role::Main, Role::Main),
        // Standard input.
        (Role::Main, Role::Device(Work::Bytes)),
    ];

    fn numbers(role: Role) -> BTreeSet<libc::c_long> {
        of(role).into_iter().flatten().map(|(call, _)| *call).collect()
    }

    #[test]
    fn who_starts_a_thread_has_all_that_it_needs() {
        let others = super::super::ROLES.map(|role| (Role::Other, role));
        for (parent, child) in STARTED.into_iter().chain(others) {
            let lacks: Vec<_> = numbers(child).difference(&numbers(parent)).copied().collect();
            assert!(lacks.is_empty(), "{parent:?} {child:?}: {lacks:?}");
            let Some(own) = requests(parent) else { continue };
            let lacks: Vec<_> =
                requests(child).unwrap().into_iter().filter(|one| !own.contains(one)).collect();
            assert!(lacks.is_empty(), "{parent:?} {child:?}: {lacks:x?}");
        }
    }

    #[test]
    fn who_starts_threads_may_start_them() {
        for (parent, child) in STARTED {
            let own = numbers(parent);
            for (call, name) in THREADS {
                assert!(own.contains(call), "{parent:?} {child:?}: {name}");
            }
        }
    }
}
