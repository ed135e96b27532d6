//! File systems that are interfaces of the host's kernel and hold no files.
//!
//! Their "regular files" do things: `/proc/PID/mem` is a process's memory, ours among them, and
//! `/proc/sys/kernel/core_pattern` names a program that the host runs; a read of `/proc/kmsg` blocks for
//! ever. A guest that was given a directory with such a mount below it (`/`, say) was not given that.

use std::os::fd::AsFd;

use rustix::fs::fstatfs;

use crate::fuse::Result;

/// `f_type` of statfs(2), by `linux/magic.h` and the file systems' own sources.
const PSEUDO: &[(u32, &str)] = &[
    (0x0000_1cd1, "devpts"),
    (0x0000_9fa0, "proc"),
    (0x0027_e0eb, "cgroup"),
    (0x0765_5821, "resctrl"),
    (0x1980_0202, "mqueue"),
    (0x4249_4e4d, "binfmt_misc"),
    (0x4341_5d53, "smackfs"),
    (0x5a3c_69f0, "apparmorfs"),
    (0x6165_676c, "pstore"),
    (0x6265_6570, "configfs"),
    (0x6265_6572, "sysfs"),
    (0x6367_7270, "cgroup2"),
    (0x6462_6720, "debugfs"),
    (0x6573_5543, "fusectl"),
    (0x6c6f_6f70, "binder"),
    (0x6e73_6673, "nsfs"),
    (0x7363_6673, "securityfs"),
    (0x7472_6163, "tracefs"),
    (0x9584_58f6, "hugetlbfs"),
    (0xabba_1974, "xenfs"),
    (0xcafe_4a11, "bpf"),
    (0xde5e_81e4, "efivarfs"),
    (0xf97c_ff8c, "selinuxfs"),
];

/// Whether the file behind `fd` is in one of them.
///
/// # Errors
///
/// The host's.
pub fn is_pseudo(fd: impl AsFd) -> Result<bool> {
    Ok(is_pseudo_type(fstatfs(fd)?.f_type as u32))
}

/// Whether it is one of them, by its `f_type`: a 32-bit number, sign-extended by some kernels.
pub(super) fn is_pseudo_type(kind: u32) -> bool {
    PSEUDO.iter().any(|(magic, _)| *magic == kind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn proc_and_sysfs_are_told_from_files() {
        let open = |path| std::fs::File::open(path).unwrap();
        assert!(is_pseudo(open("/proc")).unwrap());
        assert!(is_pseudo(open("/proc/self/maps")).unwrap());
        assert!(is_pseudo(open("/sys")).unwrap());
        assert!(!is_pseudo(tempfile::tempfile().unwrap()).unwrap());
        assert!(!is_pseudo(open("/")).unwrap());
    }
}
