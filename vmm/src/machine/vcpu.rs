//! Virtual CPUs: a thread each, which runs the guest and serves its exits.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result};
use devices::bus::Bus;
use devices::dax::Window;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::StopReason;

/// How long [`stop`] waits between two kicks. One kick can fall just before `KVM_RUN` and be lost.
const KICK_INTERVAL: Duration = Duration::from_millis(5);
/// After this many kicks a thread is left behind: it hangs in a system call of the host.
const KICKS: u32 = 400;

/// How many faults in a row that left nothing to repair a vCPU may have.
const FORGIVEN_FAULTS: u32 = 1;

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
    /// Set once no vCPU shall run any more.
    pub stopping: AtomicBool,
}

/// Runs `vcpu` on a thread of its own until the machine stops.
///
/// # Errors
///
/// The host's, when it gives no thread.
pub fn start(id: u8, vcpu: VcpuFd, exits: Arc<Exits>) -> Result<JoinHandle<()>> {
    extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    // The handler does nothing: that the signal arrives is what ends KVM_RUN.
    register_signal_handler(SIGRTMIN(), kicked).context("signal handler")?;
    std::thread::Builder::new()
        .name(format!("vcpu{id}"))
        .spawn(move || run(vcpu, &exits))
        .context("vCPU thread")
}

/// Ends all vCPU threads. One that hangs in the host is left behind with a warning.
pub fn stop(exits: &Exits, threads: Vec<JoinHandle<()>>) {
    exits.stopping.store(true, Ordering::SeqCst);
    for thread in threads {
        for _ in 0..KICKS {
            if thread.is_finished() || thread.kill(SIGRTMIN()).is_err() {
                break;
            }
            std::thread::sleep(KICK_INTERVAL);
        }
        if thread.is_finished() {
            // A panic of the thread was printed by it.
            let _ = thread.join();
        } else {
            log::warn!("a vCPU hangs in the host and is left behind");
        }
    }
}

fn run(mut vcpu: VcpuFd, exits: &Exits) {
    let mut faults = 0;
    while !exits.stopping.load(Ordering::SeqCst) {
        if let Err(reason) = step(&mut vcpu, exits, &mut faults) {
            (exits.stop)(reason);
            return;
        }
    }
}

/// Runs the guest up to one exit and serves it.
fn step(vcpu: &mut VcpuFd, exits: &Exits, faults: &mut u32) -> Result<(), StopReason> {
    let crashed = |what: String| Err(StopReason::Crashed(what));
    let exit = vcpu.run();
    if exit.is_ok() {
        *faults = 0;
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
            libc::EFAULT => repair(exits, faults),
            _ => crashed(format!("KVM_RUN: {error}")),
        },
    }
}

/// A page behind a guest address could not be had. If that is because a mapped file shrank, there are zeros
/// now where the file ended, and the guest goes on. `faults` counts the times in a row that nothing was
/// found to repair: another vCPU may have repaired the same fault a moment ago, so one is forgiven.
fn repair(exits: &Exits, faults: &mut u32) -> Result<(), StopReason> {
    let mut repaired = 0;
    for window in &exits.windows {
        match window.repair_truncated() {
            Ok(ranges) => repaired += ranges,
            Err(error) => return Err(StopReason::Crashed(format!("DAX window: {error}"))),
        }
    }
    if repaired > 0 {
        *faults = 0;
        log::warn!("a file shrank under {repaired} DAX mappings; the guest reads zeros there");
        return Ok(());
    }
    *faults += 1;
    if *faults > FORGIVEN_FAULTS {
        let what = "the guest touched memory that the host does not have";
        return Err(StopReason::Crashed(what.into()));
    }
    Ok(())
}

fn is_register_width(len: usize) -> bool {
    matches!(len, 1 | 2 | 4)
}
