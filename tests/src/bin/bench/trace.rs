//! Where the time goes, from the kernel's own trace (Documentation/trace/ftrace.rst): which thread had the processor, and
//! whether a vCPU's was in the guest, in KVM, in a system call, or in the VMM's code. It costs time itself, some
//! microseconds an event where the processor is emulated, so the parts are to be compared with each other.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::mount::{MountFlags, mount};
use serde::{Deserialize, Serialize};

const ROOT: &str = "/sys/kernel/tracing";
/// What is traced, as files of [`ROOT`].
const EVENTS: &[&str] = &[
    "events/kvm/kvm_entry",
    "events/kvm/kvm_exit",
    "events/sched/sched_switch",
    "events/sched/sched_process_fork",
    "events/syscalls",
];
/// KiB of trace a processor: a boot with QEMU takes 10 MiB.
const BUFFER: &str = "32768";

/// Whose a thread is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// The VMM's.
    Machine,
    /// That of the file server beside it.
    Server,
}

/// Times and counts by name, of one operation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Profile {
    /// In nanoseconds.
    pub times: BTreeMap<String, f64>,
    pub counts: BTreeMap<String, f64>,
}

fn write(file: &str, text: &str) -> Result<()> {
    let path = Path::new(ROOT).join(file);
    fs::write(&path, text).with_context(|| path.display().to_string())
}

/// Tracing goes on. It ends with this.
pub struct Tracing;

impl Tracing {
    pub fn start() -> Result<Self> {
        if !Path::new(ROOT).join("trace").exists() {
            mount("tracefs", ROOT, "tracefs", MountFlags::empty(), None)
                .with_context(|| format!("mount {ROOT}"))?;
        }
        let tracing = Self;
        write("tracing_on", "0")?;
        write("buffer_size_kb", BUFFER)?;
        write("trace_clock", "mono")?;
        write("trace", "")?;
        for event in EVENTS {
            write(&format!("{event}/enable"), "1")?;
        }
        write("tracing_on", "1")?;
        Ok(tracing)
    }

    /// What was traced.
    pub fn end(self) -> Result<String> {
        write("tracing_on", "0")?;
        let text = fs::read_to_string(Path::new(ROOT).join("trace"))?;
        // "# entries-in-buffer/entries-written: 10/12   #P:1"
        let counts = text.lines().find_map(|line| line.split_once("entries-written: "));
        let (kept, all) = counts
            .and_then(|(_, rest)| rest.split_whitespace().next()?.split_once('/'))
            .context("a trace without a head")?;
        ensure!(
            kept == all,
            "the trace has room for {kept} of {all} events; measure for less time"
        );
        Ok(text)
    }
}

impl Drop for Tracing {
    fn drop(&mut self) {
        for event in EVENTS {
            let _ = write(&format!("{event}/enable"), "0");
        }
        // Gives the memory back.
        let _ = write("buffer_size_kb", "1");
    }
}

/// One line of a trace.
#[derive(Debug, PartialEq)]
struct Line<'t> {
    thread: u32,
    processor: u32,
    /// In nanoseconds.
    time: f64,
    event: &'t str,
}

/// `vcpu0-235 [000] d..2. 32.811733: kvm_exit: vcpu 0 reason npf …`
fn line(text: &str) -> Option<Line<'_>> {
    let (task, rest) = text.split_once(" [")?;
    let (processor, rest) = rest.split_once("] ")?;
    let (_, rest) = rest.trim_start().split_once(' ')?;
    let (time, event) = rest.trim_start().split_once(": ")?;
    Some(Line {
        thread: task.trim_end().rsplit_once('-')?.1.parse().ok()?,
        processor: processor.parse().ok()?,
        time: time.parse::<f64>().ok()? * 1e9,
        event,
    })
}

/// The word after `name` in an event.
fn word<'t>(event: &'t str, name: &str) -> Option<&'t str> {
    event.split_once(name)?.1.split([' ', '(']).next()
}

/// What a thread is doing when it has the processor.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Doing {
    Code,
    Call,
    Kvm,
    Guest,
}

/// Adds it all up, and divides it by what was done. `members` are the threads of the system that there were when tracing
/// began, or the one that it began with.
pub fn account(text: &str, members: &[(u32, Who)], operations: f64) -> Profile {
    let mut profile = Profile::default();
    let mut who: HashMap<u32, Who> = members.iter().copied().collect();
    let vcpus: HashSet<u32> = text
        .lines()
        .filter_map(line)
        .filter(|line| line.event.starts_with("kvm_entry:"))
        .map(|line| line.thread)
        .collect();
    let mut doing: HashMap<u32, Doing> = HashMap::new();
    // By processor: the thread it runs, and since when that does what it does.
    let mut running: HashMap<u32, (u32, f64)> = HashMap::new();
    for Line { thread, processor, time, event } in text.lines().filter_map(line) {
        if let Some((thread, since)) = running.get(&processor) {
            let state = doing.get(thread).copied().unwrap_or(Doing::Code);
            let name = match (who.get(thread), vcpus.contains(thread), state) {
                _ if *thread == 0 => "idle",
                (None, ..) => "others on the host",
                (Some(Who::Server), _, Doing::Code) => "server, its code",
                (Some(Who::Server), ..) => "server, system calls",
                (Some(Who::Machine), _, Doing::Guest) => "guest",
                (Some(Who::Machine), _, Doing::Kvm) => "KVM",
                (Some(Who::Machine), true, Doing::Code) => "VMM's vCPU, its code",
                (Some(Who::Machine), true, Doing::Call) => "VMM's vCPU, system calls",
                (Some(Who::Machine), false, _) => "VMM, other threads",
            };
            *profile.times.entry(name.to_owned()).or_default() += (time - since) / operations;
        }
        let mut current = thread;
        let member = who.get(&thread).copied();
        let mut count = |name: String| {
            if member.is_some() {
                *profile.counts.entry(name).or_default() += 1.0 / operations;
            }
        };
        if event.starts_with("kvm_entry:") {
            doing.insert(thread, Doing::Guest);
        } else if event.starts_with("kvm_exit:") {
            doing.insert(thread, Doing::Kvm);
            count(format!("exit: {}", word(event, "reason ").unwrap_or("?")));
        } else if event.starts_with("sched_switch:") {
            let next = event.rsplit_once("next_pid=").and_then(|(_, rest)| rest.split(' ').next());
            current = next.and_then(|next| next.parse().ok()).unwrap_or(thread);
            count("switches to another thread".into());
        } else if event.starts_with("sched_process_fork:") {
            let child = word(event, "child_pid=").and_then(|child| child.parse().ok());
            if let (Some(child), Some(member)) = (child, member) {
                who.insert(child, member);
            }
        } else if event.starts_with("sys_") && event.contains(" -> ") {
            doing.insert(thread, Doing::Code);
        } else if let Some(call) =
            event.strip_prefix("sys_").and_then(|call| call.split('(').next())
        {
            // That of a vCPU is KVM_RUN, from which it enters the guest.
            doing.insert(thread, if call == "ioctl" { Doing::Kvm } else { Doing::Call });
            match member {
                _ if call == "ioctl" => {}
                Some(Who::Server) => count(format!("server's call: {call}")),
                _ => count(format!("VMM's call: {call}")),
            }
        }
        running.insert(processor, (current, time));
    }
    profile
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_between_two_events_is_that_of_what_the_thread_did() {
        let text = "\
# entries-in-buffer/entries-written: 9/9   #P:1
          vcpu0-235     [000] d..2.     1.000000: kvm_entry: vcpu 0, rip 0xf
          vcpu0-235     [000] d..2.     1.000010: kvm_exit: vcpu 0 reason npf rip 0x1 info1 0x0
          vcpu0-235     [000] .....     1.000015: sys_ioctl -> 0x0
          vcpu0-235     [000] .....     1.000017: sys_openat2(dfd: 3, filename: 7f, how: 7f, usize: 18)
          vcpu0-235     [000] .....     1.000020: sys_openat2 -> 0x5
          vcpu0-235     [000] d..2.     1.000021: sched_switch: prev_comm=vcpu0 prev_pid=235 prev_prio=120 prev_state=S ==> next_comm=a b next_pid=300 next_prio=120
            a b-300     [000] .....     1.000041: sched_switch: prev_comm=a b prev_pid=300 prev_prio=120 prev_state=S ==> next_comm=swapper/0 next_pid=0 next_prio=120
         <idle>-0       [000] d..2.     1.000141: sched_switch: prev_comm=swapper/0 prev_pid=0 prev_prio=120 prev_state=R ==> next_comm=x next_pid=9 next_prio=120
              x-9       [000] d..2.     1.000142: sched_process_fork: comm=x pid=9 child_comm=x child_pid=10
";
        let profile = account(text, &[(235, Who::Machine), (300, Who::Server)], 1.0);
        let times: BTreeMap<&str, u64> = profile
            .times
            .iter()
            .map(|(name, time)| (name.as_str(), (time / 1e3).round() as u64))
            .collect();
        let expected = [
            ("guest", 10),
            ("KVM", 5),
            ("VMM's vCPU, its code", 3),
            ("VMM's vCPU, system calls", 3),
            ("server, its code", 20),
            ("idle", 100),
            ("others on the host", 1),
        ];
        assert_eq!(times, expected.into());
        let counts =
            [("VMM's call: openat2", 1.0), ("exit: npf", 1.0), ("switches to another thread", 2.0)];
        assert_eq!(profile.counts, counts.map(|(name, count)| (name.to_owned(), count)).into());
    }
}
