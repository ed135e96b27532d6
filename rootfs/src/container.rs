//! What an OCI bundle has beside a root and a command, as the host tells it to `oriel-init`: part of
//! [`Config`](crate::protocol::Config).

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::protocol::Share;

/// Where the initramfs holds files that the guest has copies of: [`What::File`].
pub const FILES_DIR: &str = "/oriel/files";

/// The surroundings of a container's commands. They are all that is mounted beside the root, `/proc`, `/sys` and
/// `/dev`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// Mounted in this order below the root, mount points made where missing.
    pub mounts: Vec<Mount>,
    /// Kernel parameters, as sysctl(8) names them.
    pub sysctls: BTreeMap<String, String>,
    /// Paths that are hidden, where they are there.
    pub masked: Vec<String>,
    /// Paths that nothing is changed below, where they are there.
    pub read_only: Vec<String>,
    /// Nothing is changed in the root, but for what is mounted in it.
    pub read_only_root: bool,
    /// The NIS domain name.
    pub domain_name: Option<String>,
}

/// The file of the kernel parameter that sysctl(8) calls `name`, and none for what is no such name. The first separator
/// in it, `.` or `/`, is the one between its parts, and the other is part of them: of `net.ipv4.conf.eth0/1.forwarding`
/// the interface is `eth0.1`.
pub fn sysctl_path(name: &str) -> Option<String> {
    let dots = name.chars().find(|letter| matches!(letter, '.' | '/')) == Some('.');
    let swapped = name.chars().map(|letter| match letter {
        '.' if dots => '/',
        '/' if dots => '.',
        letter => letter,
    });
    let path: String = swapped.collect();
    let wrong = |part: &str| matches!(part, "" | "." | "..") || part.contains('\0');
    (!path.split('/').any(wrong)).then(|| format!("/proc/sys/{path}"))
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Of what.
    pub what: What,
    /// Where: an absolute path inside the root.
    pub path: String,
    /// The `MS_` bits of mount(2).
    pub flags: u32,
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// A file system of the guest's kernel.
    Kernel {
        /// Its type.
        kind: String,
        /// Its source, which means something to nobody but who reads /proc/mounts.
        source: String,
        /// Its own options, separated by commas.
        options: String,
    },
    /// A directory of the host.
    Share(Share),
    /// A copy of a file of the host: the one of this name in [`FILES_DIR`].
    File(String),
}

/// What a command may do.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Confinement {
    /// User and group, and supplementary groups, where no other user is asked for by name.
    pub ids: Option<(u32, u32, Vec<u32>)>,
    /// Permissions that new files do not get; 0o022 without one.
    pub umask: Option<u32>,
    /// Limits of resources.
    pub limits: Vec<Limit>,
    /// Its capabilities; a user's own without any.
    pub capabilities: Option<Capabilities>,
    /// Programs that it executes give it no privileges.
    pub no_new_privileges: bool,
}

/// A limit of setrlimit(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limit {
    /// Linux's number of the resource.
    pub resource: u32,
    /// What counts.
    pub soft: u64,
    /// How far that can be raised.
    pub hard: u64,
}

/// Sets of capabilities: bits of Linux's numbers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// What programs can give it at most.
    pub bounding: u64,
    /// What counts.
    pub effective: u64,
    /// What it may use.
    pub permitted: u64,
    /// What programs that ask for it inherit.
    pub inheritable: u64,
    /// What all programs inherit.
    pub ambient: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_parameter_is_found_as_sysctl_finds_it_and_nothing_else_is() {
        for (name, path) in [
            ("kernel.msgmax", "/proc/sys/kernel/msgmax"),
            ("kernel/msgmax", "/proc/sys/kernel/msgmax"),
            ("net.ipv4.conf.eth0/1.forwarding", "/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
            ("net/ipv4/conf/eth0.1/forwarding", "/proc/sys/net/ipv4/conf/eth0.1/forwarding"),
        ] {
            assert_eq!(sysctl_path(name).as_deref(), Some(path));
        }
        for name in [
            "",
            ".",
            "..",
            "/kernel/msgmax",
            ".kernel.msgmax",
            "kernel..msgmax",
            "kernel/../../self/mem",
            "kernel.//.//.self.mem",
            "kernel./.msgmax",
            "kernel.msgmax.",
            "kernel.msg\0max",
        ] {
            assert_eq!(sysctl_path(name), None, "{name:?}");
        }
    }
}
