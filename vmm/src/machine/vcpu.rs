//! Virtual CPUs: a thread each, which runs the guest and serves its exits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use devices::bus::Bus;
use devices::dax::Window;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{StopReason, watch};
use crate::walls::{self, Role};

/// How long [`stop`] waits between two kicks. One kick can fall just before `KVM_RUN` and be lost.
const KICK_INTERVAL: Duration = Duration::from_millis(5);
/// After this many kicks a thread is left behind: it hangs in a system call of the host.
const KICKS: u32 = 400;

/// How many faults in a row that nothing explains a vCPU may have. A file may have grown again before anyone
/// looked.
const FORGIVEN_FAULTS: u32 = 3;
/// Faults that are further apart than this are not in a row: the guest ran in between, although it may have
/// had no exit. Longer than [`RETRY_INTERVAL`].
const FAULTS_IN_A_ROW: Duration = Duration::from_secs(3);
/// How long a vCPU that found no room on a disk waits before it tries again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// How long it goes on so. Time for somebody to make room.
const FULL_DISK_PATIENCE: Duration = Duration::from_secs(120);

/// What the exits of all vCPUs are served by.
pub struct Exits {
    /// I/O ports.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
    /// Windows in which a file that was truncated on the host may have left the guest a fault.
    pub windows: Vec<Arc<Window>>,
    /// Told, from a vCPU's thread, when the guest cannot go on.
    pub stop: Box<dyn Fn(StopReason) + Send + Sync>,
    /// Set once the guest may run.
    pub released: AtomicBool,
    /// Set once no vCPU shall run any more.
    pub stopping: AtomicBool,
}

impl Exits {
    /// Waits until the guest may run, or shall not any more. For a vCPU's thread.
    fn wait_for_release(&self) {
        while !self.released.load(Ordering::SeqCst) && !self.stopping.load(Ordering::SeqCst) {
            thread::park();
        }
    }
}

/// Runs `vcpu` on a thread of its own from [`release`] on until the machine stops.
///
/// # Errors
///
/// The host's, when it gives no thread.
pub fn start(id: u8, vcpu: VcpuFd, exits: Arc<Exits>) -> Result<JoinHandle<()>> {
    extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    // The handler does nothing: that the signal arrives is what ends KVM_RUN.
    register_signal_handler(SIGRTMIN(), kicked).context("signal handler")?;
    walls::start(Role::Vcpu, format!("vcpu{id}"), move || run(vcpu, &exits)).context("vCPU thread")
}

/// Lets the guest run.
pub fn release(exits: &Exits, threads: &[JoinHandle<()>]) {
    exits.released.store(true, Ordering::SeqCst);
    threads.iter().for_each(|thread| thread.thread().unpark());
}

/// Ends all vCPU threads. One that hangs in the host is left behind with a warning.
pub fn stop(exits: &Exits, threads: Vec<JoinHandle<()>>) {
    exits.stopping.store(true, Ordering::SeqCst);
    threads.iter().for_each(|thread| thread.thread().unpark());
    // All of them together: many that hang take no longer than one.
    for _ in 0..KICKS {
        let mut running = threads.iter().filter(|thread| !thread.is_finished()).peekable();
        if running.peek().is_none() {
            break;
        }
        for thread in running {
            // One that ended meanwhile is seen by the next look.
            let _ = thread.kill(SIGRTMIN());
        }
        std::thread::sleep(KICK_INTERVAL);
    }
    for thread in threads {
        if thread.is_finished() {
            // A panic of the thread was printed by it.
            let _ = thread.join();
        } else {
            log::warn!("a vCPU hangs in the host and is left behind");
        }
    }
}

/// The faults of one vCPU that nothing was found to explain.
#[derive(Default)]
struct Faults {
    in_a_row: u32,
    last: Option<Instant>,
    /// Since when it waits for room on a disk.
    waits_since: Option<Instant>,
}

fn run(mut vcpu: VcpuFd, exits: &Exits) {
    exits.wait_for_release();
    let mut faults = Faults::default();
    while !exits.stopping.load(Ordering::SeqCst) {
        if let Err(reason) = step(&mut vcpu, exits, &mut faults) {
            (exits.stop)(reason);
            return;
        }
    }
}

/// Goes up with everything that is repaired in any window.
fn repairs(exits: &Exits) -> u64 {
    exits.windows.iter().fold(0, |sum, window| sum.wrapping_add(window.repairs()))
}

/// Runs the guest up to one exit and serves it.
fn step(vcpu: &mut VcpuFd, exits: &Exits, faults: &mut Faults) -> Result<(), StopReason> {
    let crashed = |what: String| Err(StopReason::Crashed(what));
    let entered = repairs(exits);
    let exit = vcpu.run();
    if !matches!(exit, Err(_) | Ok(VcpuExit::MemoryFault { .. } | VcpuExit::Intr)) {
        *faults = Faults::default();
    }
    match exit {
        Ok(VcpuExit::IoOut(port, data)) => {
            // A repeated string instruction hands over several units at once; those that matter are bytes.
            let unit = if is_register_width(data.len()) { data.len() } else { 1 };
            data.chunks(unit).for_each(|piece| exits.ports.write(port.into(), piece));
            Ok(())
        }
        Ok(VcpuExit::IoIn(port, data)) => {
            let unit = if is_register_width(data.len()) { data.len() } else { 1 };
            data.chunks_mut(unit).for_each(|piece| exits.ports.read(port.into(), piece));
            Ok(())
        }
        Ok(VcpuExit::MmioRead(address, data)) => {
            exits.mmio.read(address, data);
            Ok(())
        }
        Ok(VcpuExit::MmioWrite(address, data)) => {
            exits.mmio.write(address, data);
            Ok(())
        }
        // A triple fault is how a PC resets when nothing else is left.
        Ok(VcpuExit::Shutdown) => Err(StopReason::Reset),
        // EFAULT, from a kernel that says more of it.
        Ok(VcpuExit::MemoryFault { .. }) => repair(exits, faults, entered),
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Ok(()),
        Ok(VcpuExit::InternalError) => {
            crashed("KVM cannot emulate an instruction of the guest".into())
        }
        Ok(VcpuExit::FailEntry(reason, cpu)) => {
            crashed(format!("KVM cannot enter the guest on CPU {cpu} (reason {reason:#x})"))
        }
        Ok(other) => crashed(format!("unexpected exit {other:?}")),
        Err(error) => match error.errno() {
            libc::EINTR | libc::EAGAIN => Ok(()),
            libc::EFAULT => repair(exits, faults, entered),
            _ => crashed(format!("KVM_RUN: {error}")),
        },
    }
}

/// A page behind a guest address could not be had by a vCPU that entered the guest when [`repairs`] said
/// `entered`. If that is because a mapped file shrank or cannot be read, there are zeros now in its place,
/// and the guest goes on. If a disk is full, it waits.
///
/// # Errors
///
/// What the guest stops for: a fault, again and again, that nothing explains, and no room for too long.
fn repair(exits: &Exits, faults: &mut Faults, entered: u64) -> Result<(), StopReason> {
    let failed = |error| StopReason::Crashed(format!("DAX window: {error}"));
    if faults.last.is_some_and(|last| last.elapsed() > FAULTS_IN_A_ROW) {
        *faults = Faults::default();
    }
    let mut repaired = 0;
    for window in &exits.windows {
        repaired += window.repair_truncated().map_err(failed)?;
    }
    if repaired > 0 {
        watch::say_shrunk(repaired);
    }
    // Also when another vCPU repaired it since.
    if repaired > 0 || repairs(exits) != entered {
        *faults = Faults::default();
        return Ok(());
    }
    // Not at every try while it waits: it reads all that is mapped.
    if faults.waits_since.is_none() {
        for window in &exits.windows {
            repaired += window.cover_unreadable().map_err(failed)?;
        }
        if repaired > 0 {
            return Ok(());
        }
    }
    let waited = match exits.windows.iter().find_map(|window| window.full_file_system()) {
        Some(file) => wait_for_room(exits, faults, file),
        None => {
            faults.in_a_row += 1;
            if faults.in_a_row > FORGIVEN_FAULTS {
                let what = "the guest touched memory that the host does not have";
                return Err(StopReason::Crashed(what.into()));
            }
            Ok(())
        }
    };
    faults.last = Some(Instant::now());
    waited
}

/// The guest most likely wrote to a hole of a sparse file on a full disk. There is no page for it, and
/// whatever stood in its place would lose what it writes: so the vCPU tries again until there is room.
fn wait_for_room(
    exits: &Exits,
    faults: &mut Faults,
    (device, inode): (u64, u64),
) -> Result<(), StopReason> {
    let since = *faults.waits_since.get_or_insert_with(|| {
        log::error!(
            "a disk of the host is full, and the guest writes to a file there (device {device:#x}, \
             inode {inode}): it waits for room, at most {} seconds",
            FULL_DISK_PATIENCE.as_secs()
        );
        Instant::now()
    });
    if since.elapsed() > FULL_DISK_PATIENCE {
        let what = format!(
            "the disk is full under a file that the guest writes to (device {device:#x}, inode {inode})"
        );
        return Err(StopReason::Crashed(what));
    }
    let until = Instant::now() + RETRY_INTERVAL;
    while Instant::now() < until && !exits.stopping.load(Ordering::SeqCst) {
        std::thread::sleep(KICK_INTERVAL);
    }
    Ok(())
}

fn is_register_width(len: usize) -> bool {
    matches!(len, 1 | 2 | 4)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use devices::dax::DaxWindow;

    use super::*;

    fn exits(window: &Arc<Window>) -> Exits {
        Exits {
            ports: Bus::default(),
            mmio: Bus::default(),
            windows: vec![window.clone()],
            stop: Box::new(|_| {}),
            released: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        }
    }

    #[test]
    fn nothing_of_the_guest_runs_before_it_is_released() {
        let window = Arc::new(Window::new(2 << 20).unwrap());
        let exits = Arc::new(exits(&window));
        let (waiter, (ran, runs)) = (exits.clone(), std::sync::mpsc::channel());
        let threads = [thread::spawn(move || {
            waiter.wait_for_release();
            ran.send(()).unwrap();
        })];
        // Woken for nothing, as a thread may be.
        threads[0].thread().unpark();
        assert!(runs.recv_timeout(Duration::from_millis(50)).is_err());
        release(&exits, &threads);
        assert!(runs.recv_timeout(Duration::from_secs(10)).is_ok());
    }

    #[test]
    fn a_machine_that_was_not_released_is_stopped_at_once() {
        let window = Arc::new(Window::new(2 << 20).unwrap());
        let exits = Arc::new(exits(&window));
        let waiter = exits.clone();
        register_signal_handler(SIGRTMIN(), ignore).unwrap();
        let (gone, ended) = std::sync::mpsc::channel();
        let waits = thread::spawn(move || {
            waiter.wait_for_release();
            gone.send(()).unwrap();
        });
        stop(&exits, vec![waits]);
        assert!(ended.try_recv().is_ok());
    }

    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}

    #[test]
    fn a_fault_that_another_vcpu_repaired_does_not_count() {
        let window = Arc::new(Window::new(2 << 20).unwrap());
        let exits = exits(&window);
        let file = tempfile::tempfile().unwrap();
        window.map(0, 4096, file.as_fd(), 0, false).unwrap();
        let entered = repairs(&exits);
        let mut faults = Faults::default();
        // This one repairs, and the others come after it.
        for _ in 0..20 {
            assert!(repair(&exits, &mut faults, entered).is_ok());
        }
        assert_eq!(faults.in_a_row, 0);
    }

    #[test]
    fn a_fault_that_nothing_explains_ends_the_guest_after_a_few_times_in_a_row() {
        let window = Arc::new(Window::new(2 << 20).unwrap());
        let exits = exits(&window);
        let mut faults = Faults::default();
        let fault = |faults: &mut Faults| repair(&exits, faults, repairs(&exits));
        for _ in 0..FORGIVEN_FAULTS {
            assert!(fault(&mut faults).is_ok());
        }
        // The guest ran for a while, with no exit.
        faults.last = Instant::now().checked_sub(2 * FAULTS_IN_A_ROW);
        for _ in 0..FORGIVEN_FAULTS {
            assert!(fault(&mut faults).is_ok());
        }
        assert!(matches!(fault(&mut faults), Err(StopReason::Crashed(_))));
    }

    #[test]
    fn a_vcpu_waits_for_room_on_a_full_disk_and_not_for_ever() {
        let window = Arc::new(Window::new(2 << 20).unwrap());
        let exits = exits(&window);
        exits.stopping.store(true, Ordering::SeqCst);
        let mut faults = Faults::default();
        assert!(wait_for_room(&exits, &mut faults, (1, 2)).is_ok());
        faults.waits_since = Instant::now().checked_sub(2 * FULL_DISK_PATIENCE);
        let Err(StopReason::Crashed(what)) = wait_for_room(&exits, &mut faults, (1, 2)) else {
            panic!("waits for ever");
        };
        assert!(what.contains("disk is full"), "{what}");
    }
}
