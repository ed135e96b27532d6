//! The command of a bundle.

use anyhow::{Result, bail};
use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities, PosixRlimitType, Process};
use oriel_init::container::{self, Confinement, Limit};

/// What is run.
pub struct PlannedProcess {
    pub args: Vec<String>,
    pub env: Vec<String>,
    pub cwd: String,
    pub terminal: bool,
    pub confinement: Confinement,
}

/// Permissions that a umask can take.
const MAX_UMASK: u32 = 0o777;

/// Linux's capabilities in the order of their numbers (linux/capability.h).
const CAPABILITIES: [Capability; 41] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::DacReadSearch,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setpcap,
    Capability::LinuxImmutable,
    Capability::NetBindService,
    Capability::NetBroadcast,
    Capability::NetAdmin,
    Capability::NetRaw,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::SysModule,
    Capability::SysRawio,
    Capability::SysChroot,
    Capability::SysPtrace,
    Capability::SysPacct,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysNice,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Mknod,
    Capability::Lease,
    Capability::AuditWrite,
    Capability::AuditControl,
    Capability::Setfcap,
    Capability::MacOverride,
    Capability::MacAdmin,
    Capability::Syslog,
    Capability::WakeAlarm,
    Capability::BlockSuspend,
    Capability::AuditRead,
    Capability::Perfmon,
    Capability::Bpf,
    Capability::CheckpointRestore,
];

/// Plans what `process` says.
///
/// # Errors
///
/// What cannot be run, in a line that names the field.
pub fn plan(process: &Process) -> Result<PlannedProcess> {
    let args = process.args().clone().unwrap_or_default();
    if args.first().is_none_or(|program| program.is_empty()) {
        bail!("args: is empty; name the program and its arguments");
    }
    let cwd = process.cwd().to_str().filter(|cwd| cwd.starts_with('/'));
    let Some(cwd) = cwd else {
        bail!("cwd: {:?}: write an absolute path inside the root", process.cwd());
    };
    let env = process.env().clone().unwrap_or_default();
    if let Some(wrong) =
        env.iter().find(|entry| !entry.get(1..).is_some_and(|rest| rest.contains('=')))
    {
        bail!("env: {wrong:?}: write NAME=VALUE");
    }
    for text in args.iter().chain(&env).map(String::as_str).chain([cwd]) {
        if text.contains('\0') {
            bail!("{text:?}: a program takes no NUL; leave it");
        }
    }
    let user = process.user();
    if let Some(umask) = user.umask().filter(|umask| *umask > MAX_UMASK) {
        bail!("user.umask: {umask}: write at most {MAX_UMASK} (0777)");
    }
    let mut limits = Vec::new();
    for limit in process.rlimits().iter().flatten() {
        let resource = resource(limit.typ());
        if limit.soft() > limit.hard() {
            bail!("rlimits: {}: soft {} is above hard {}", limit.typ(), limit.soft(), limit.hard());
        }
        if limits.iter().any(|other: &Limit| other.resource == resource) {
            bail!("rlimits: {}: is there twice; leave one", limit.typ());
        }
        limits.push(Limit { resource, soft: limit.soft(), hard: limit.hard() });
    }
    let groups = user.additional_gids().clone().unwrap_or_default();
    Ok(PlannedProcess {
        args,
        env,
        cwd: cwd.into(),
        terminal: process.terminal().unwrap_or(false),
        confinement: Confinement {
            ids: Some((user.uid(), user.gid(), groups)),
            umask: user.umask(),
            limits,
            // As runc has it, none are given where none are named.
            capabilities: Some(
                process.capabilities().as_ref().map(capabilities).unwrap_or_default(),
            ),
            no_new_privileges: process.no_new_privileges().unwrap_or(false),
        },
    })
}

fn capabilities(sets: &LinuxCapabilities) -> container::Capabilities {
    let bits = |set: &Option<Capabilities>| {
        let number =
            |capability: &Capability| CAPABILITIES.iter().position(|one| one == capability);
        set.iter().flatten().filter_map(number).fold(0, |bits, number| bits | 1 << number)
    };
    container::Capabilities {
        bounding: bits(sets.bounding()),
        effective: bits(sets.effective()),
        permitted: bits(sets.permitted()),
        inheritable: bits(sets.inheritable()),
        ambient: bits(sets.ambient()),
    }
}

/// Linux's number (asm-generic/resource.h).
fn resource(kind: PosixRlimitType) -> u32 {
    match kind {
        PosixRlimitType::RlimitCpu => libc::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => libc::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => libc::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => libc::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => libc::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => libc::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => libc::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => libc::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => libc::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => libc::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => libc::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => libc::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => libc::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => libc::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => libc::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => libc::RLIMIT_RTTIME,
    }
}
