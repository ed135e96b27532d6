//! A guest that is asked to read files, and KVM's own counters of what that took.

use std::fs;

use crate::run::{Oriel, Running};

/// A guest that runs `guest-probe bench`.
pub struct Bench {
    guest: Running,
}

impl Bench {
    /// Boots a guest of `memory` with one share (`HOST:GUEST:OPTIONS`), which has the probe in it, and lets it
    /// open `files`, names below `directory`.
    pub fn start(share: &str, directory: &str, files: &[&str], memory: &str) -> Self {
        Self::with(&["-v", share, "--memory", memory], directory, files)
    }

    /// The same with any arguments.
    pub fn with(arguments: &[&str], directory: &str, files: &[&str]) -> Self {
        let paths: Vec<String> = files.iter().map(|file| format!("{directory}/{file}")).collect();
        let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
        let probe = format!("{directory}/guest-probe");
        let command = [&[probe.as_str(), "bench"], &paths[..]].concat();
        let run = Oriel::run(&["-i"]).args(arguments).guest(&command);
        let mut guest = run.timeout(std::time::Duration::from_secs(600)).start();
        let opened = guest.hear();
        assert!(opened.starts_with("open "), "{opened}");
        Self { guest }
    }

    /// Asks for one thing of the probe's list and says how long that took, in nanoseconds.
    pub fn time(&mut self, line: &str) -> u64 {
        let answer = self.guest.ask(line);
        let time = answer.split(' ').next().and_then(|word| word.parse().ok());
        time.unwrap_or_else(|| panic!("{line}: {answer}"))
    }

    /// Second-stage faults that KVM has taken for this guest so far.
    pub fn faults(&self) -> u64 {
        kvm_counter(self.guest.process_id(), "pf_taken")
    }

    /// A counter of KVM's.
    pub fn counter(&self, name: &str) -> u64 {
        kvm_counter(self.guest.process_id(), name)
    }

    /// The guest itself.
    pub fn guest(&mut self) -> &mut Running {
        &mut self.guest
    }

    /// Ends it; it must have gone well.
    pub fn end(self) {
        self.guest.finish().exits_with(0);
    }
}

/// A statistic of the virtual machine that a process runs (Documentation/virt/kvm, debugfs), summed over its
/// vCPUs.
pub fn kvm_counter(process: u32, name: &str) -> u64 {
    let root = "/sys/kernel/debug/kvm";
    let machines = fs::read_dir(root)
        .unwrap_or_else(|error| panic!("{root}: {error}; mount debugfs and be root"));
    let machine = machines
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&format!("{process}-")))
        .unwrap_or_else(|| panic!("KVM shows no machine of process {process}"));
    let text = fs::read_to_string(machine.path().join(name))
        .unwrap_or_else(|error| panic!("KVM's counter {name}: {error}"));
    text.trim().parse().expect("a number")
}
