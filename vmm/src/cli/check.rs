//! `oriel check`.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::kernel::{self, Assets};
use crate::{host, walls};

/// Exit status when something that every sandbox needs is missing.
const STATUS_MISSING: u8 = 1;

/// Say what this host can do, what is missing, and how to get it
///
/// Exits with 0 when `oriel run` can work and with 1 when it cannot.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// The kernel to look at, as `oriel run` takes it; a bzImage is unpacked, and kept for it
    #[arg(long, env = "ORIEL_KERNEL", value_name = "FILE")]
    kernel: Option<PathBuf>,
}

struct Report {
    usable: bool,
}

impl Report {
    fn good(&self, what: &str, detail: impl std::fmt::Display) {
        println!("  ok       {what:<12} {detail}");
    }

    fn missing(&mut self, what: &str, detail: impl std::fmt::Display) {
        self.usable = false;
        println!("  MISSING  {what:<12} {detail}");
    }

    fn note(&self, what: &str, detail: impl std::fmt::Display) {
        println!("  note     {what:<12} {detail}");
    }
}

/// Prints the report.
pub fn check(args: &CheckArgs) -> Result<u8> {
    let mut report = Report { usable: true };
    match host::open_kvm() {
        Ok(kvm) => {
            let vcpus = kvm.get_nr_vcpus();
            let extension = match host::virtualization() {
                Some(host::Virtualization::Svm) => "svm",
                Some(host::Virtualization::Vmx) => "vmx",
                None => "none",
            };
            report.good("kvm", format_args!("/dev/kvm on {extension}, up to {vcpus} vCPUs"));
        }
        Err(error) => report.missing("kvm", format_args!("{error:#}")),
    }
    match kernel::find(args.kernel.as_deref(), true) {
        Ok(kernel) => {
            let size = kernel.file.contents.len() >> 20;
            let path = kernel.file.path.display();
            report.good("kernel", format_args!("{path} ({:?}, {size} MiB)", kernel.file.format));
            if kernel.modules.is_none() {
                report
                    .note("modules", "none beside the kernel; overlay and vsock must be built in");
            }
        }
        Err(error) => report.missing("kernel", format_args!("{error:#}")),
    }
    match Assets::find() {
        Ok(assets) => {
            report.good("init", assets.init.display());
            match assets.busybox {
                Some(path) => report.good("busybox", path.display()),
                None => report.note(
                    "busybox",
                    "not found: `oriel run` needs --root (kernel-config/fetch brings one)",
                ),
            }
        }
        Err(error) => report.missing("init", format_args!("{error:#}")),
    }
    let memory = host::total_memory()? >> 20;
    report.good("host", format_args!("{} CPUs, {memory} MiB of RAM", host::cpus()));
    for (size, name) in [("2048kB", "hugetlb:2M"), ("1048576kB", "hugetlb:1G")] {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{size}/free_hugepages");
        match std::fs::read_to_string(&path) {
            Ok(free) if free.trim() != "0" => {
                report.good(name, format_args!("{} pages free", free.trim()));
            }
            _ => report.note(name, format_args!("no free pages ({path})")),
        }
    }
    if rustix::process::geteuid().is_root() {
        report.note("user", "root: files that the guest makes belong to the guest's user ids");
    } else {
        report.note("user", "not root: files that the guest makes belong to you");
    }
    // Last: it changes this process.
    for (what, there, detail) in walls::report() {
        if there { report.good(what, detail) } else { report.note(what, detail) }
    }
    Ok(if report.usable { 0 } else { STATUS_MISSING })
}
