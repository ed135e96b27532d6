//! Looks after the DAX windows while the guest runs.
//!
//! A vCPU that touches a page which the host cannot give need not come back from `KVM_RUN` with an error
//! ([`vcpu`](super::vcpu) handles it if it does). Where the guest can be interrupted, KVM takes the fault for a page
//! that is not there yet, waits for it beside the vCPU, and lets the guest try again, without end. The guest's program
//! hangs, the rest of the guest goes on, and nobody is told: so somebody has to look.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kvm_ioctls::VcpuFd;

use super::faults::FaultCounters;
use super::vcpu::Exits;
use crate::walls::{self, Role};

/// How long a program of the guest may hang over a page of a file that shrank. Each look asks the host once for each
/// mapped file, and nothing while no file is mapped.
const INTERVAL: Duration = Duration::from_millis(100);

/// From so many unanswered faults of a vCPU in one interval on, it repeats one. Each waits for a thread of the host
/// and takes some ten microseconds; a guest whose pages have to be read from a disk has about as many answers as
/// faults.
const REPEATED: i64 = 5;

/// And from so many of the faults that it took: one that it repeats leaves it no time for others. Many vCPUs that enter
/// pages at once make each other try again (`mmu_invalidate_retry`), but most of what they try succeeds.
const MOST_OF_ALL: i64 = 2;

/// From this look on at a guest that hangs, all that is mapped is read, to find what a disk cannot give. That is
/// work for the disk, and what is found sooner is no disk's fault.
const LOOKS_BEFORE_DISKS: u32 = 8;

/// Between two lines in the log about the same.
const SAY_AGAIN: Duration = Duration::from_secs(10);

/// Starts the thread, which looks until the machine stops.
///
/// # Errors
///
/// The host's, when it gives no thread.
pub fn start(exits: Arc<Exits>, vcpus: &[VcpuFd]) -> Result<()> {
    if exits.windows.is_empty() {
        return Ok(());
    }
    let counters = vcpus.iter().map(FaultCounters::of).collect::<Result<Vec<_>, _>>();
    let counters = counters.unwrap_or_else(|error| {
        log::debug!("KVM does not show its counters of faults: {error}");
        Vec::new()
    });
    let mut hangs = Hangs::new(counters);
    let watch = move || {
        while !exits.stopping.load(Ordering::SeqCst) {
            std::thread::sleep(INTERVAL);
            for window in &exits.windows {
                report_shrunk(window.cover_shrunk());
            }
            // Without a mapping nobody can hang over one, and KVM's counters cost a few system calls.
            if exits.windows.iter().any(|window| window.is_used()) {
                hangs.look(&exits);
            }
        }
    };
    walls::start(Role::Watch, "dax-watch", watch).context("window thread")?;
    Ok(())
}

/// Says that files shrank, now and then: a guest can make its own shrink as often as it likes. Each is counted.
pub(super) fn say_shrunk(places: usize) {
    static SAID: Mutex<Option<Instant>> = Mutex::new(None);
    let mut said = SAID.lock().unwrap_or_else(PoisonError::into_inner);
    if said.is_none_or(|said| said.elapsed() >= SAY_AGAIN) {
        *said = Some(Instant::now());
        log::warn!("a file shrank under {places} DAX mappings; the guest reads zeros there");
    }
}

/// Says in how many places something was repaired.
fn report_shrunk(places: std::io::Result<usize>) -> usize {
    match places {
        Ok(0) => {}
        Ok(places) => say_shrunk(places),
        Err(error) => {
            log::error!("DAX window: {error}");
            return 0;
        }
    }
    places.unwrap_or(0)
}

/// vCPUs that repeat a fault.
struct Hangs {
    counters: Vec<FaultCounters>,
    /// What each had taken and not answered when last looked at.
    before: Vec<(i64, i64)>,
    /// Looks in a row at which some vCPU repeated a fault.
    looks: u32,
}

impl Hangs {
    fn new(counters: Vec<FaultCounters>) -> Self {
        let before = vec![(0, 0); counters.len()];
        Self { counters, before, looks: 0 }
    }

    /// Looks once, and repairs what can be repaired if a vCPU hangs: with every second, fourth, eighth … look at the
    /// same one, because what does not help costs time.
    fn look(&mut self, exits: &Exits) {
        let mut repeats = false;
        for (counters, before) in self.counters.iter().zip(&mut self.before) {
            let Ok(now) = counters.taken_and_unanswered() else { continue };
            let taken = now.0.wrapping_sub(before.0);
            let unanswered = now.1.wrapping_sub(before.1);
            repeats |= unanswered >= REPEATED && unanswered.saturating_mul(MOST_OF_ALL) >= taken;
            *before = now;
        }
        self.looks = if repeats { self.looks.saturating_add(1) } else { 0 };
        if self.looks >= 2 && self.looks.is_power_of_two() {
            self.repair(exits);
        }
    }

    fn repair(&self, exits: &Exits) {
        let mut repaired = 0;
        for window in &exits.windows {
            repaired += report_shrunk(window.repair_truncated());
        }
        if repaired > 0 || self.looks < LOOKS_BEFORE_DISKS {
            return;
        }
        for window in &exits.windows {
            match window.cover_unreadable() {
                // Each was logged.
                Ok(places) => repaired += places,
                Err(error) => log::error!("DAX window: {error}"),
            }
        }
        let full = exits.windows.iter().find_map(|window| window.full_file_system());
        if repaired == 0
            && let Some((device, inode)) = full
        {
            log::error!(
                "a disk of the host is full, and the guest writes to a file there (device {device:#x}, inode \
                 {inode}): it waits for room"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::atomic::AtomicBool;

    use devices::bus::Bus;
    use devices::dax::{DaxWindow, Window};

    use super::super::faults::tests::{counters, set};
    use super::*;

    #[test]
    fn a_vcpu_that_repeats_a_fault_gets_zeros_where_a_file_ends_and_others_do_not() {
        let window = Arc::new(Window::new(2 << 20).unwrap());
        let file = tempfile::tempfile().unwrap();
        window.map(0, 8192, file.as_fd(), 0, false).unwrap();
        let exits = Exits {
            ports: Bus::default(),
            mmio: Bus::default(),
            windows: vec![window.clone()],
            stop: Box::new(|_| {}),
            released: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        };
        let ((one, _), (other, values)) = (counters(), counters());
        let mut hangs = Hangs::new(vec![one, other]);
        let mut look = |taken: u64, fixed: u64| {
            set(&values, "pf_taken", taken);
            set(&values, "pf_fixed", fixed);
            // Without a mapping nobody can hang over one, and KVM's counters cost a few system calls.
            if exits.windows.iter().any(|window| window.is_used()) {
                hangs.look(&exits);
            }
            window.repairs()
        };
        assert_eq!(look(1000, 997), 0, "a few are on their way");
        assert_eq!(look(2000, 1600), 0);
        assert_eq!(look(3000, 2200), 0, "most are answered: vCPUs that get in each other's way");
        assert_eq!(look(3000, 2990), 0);
        assert_eq!(look(3020, 3000), 0, "once is nothing");
        assert_eq!(look(3030, 3010), 0);
        assert_eq!(look(3100, 3000), 0);
        assert_eq!(look(3200, 3000), 1, "twice in a row");
        for round in 1..100 {
            assert_eq!(look(3200 + 10 * round, 3000), 1, "nothing is left to repair");
        }
    }
}
