//! seccomp(2): the system calls that each kind of thread makes, and no others.
//!
//! [`prepare`] makes a filter for each [`Role`] and puts that of [`Role::Other`] on the calling thread: all that it starts
//! inherit it. [`enter`] and [`start`] add that of a role; filters only add up, so a role has no call that those who start
//! its threads lack ([`calls`] sees to that by how its lists are made). A call that a filter does not know ends the
//! process at once, with a line that says whose it was ([`refusal`]).

mod calls;
mod refusal;

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;
use std::thread::{Builder, JoinHandle};

use anyhow::{Context, Result};
use devices::threads::{Work, set_gate};
use seccompiler::BpfProgram;

use crate::cli::STATUS_SANDBOX;

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Putting the sandbox together, and what a library starts for itself: all that any of the others does.
    Other,
    /// Waiting for the end, signals, the terminal; standard input and the last output.
    Main,
    /// Running the guest, and serving its requests.
    Vcpu,
    /// Looking after what is mapped for the guest.
    Watch,
    /// Answering clients of the control socket.
    Control,
    /// Of the devices.
    Device(Work),
}

const ROLES: [Role; 8] = [
    Role::Other,
    Role::Main,
    Role::Vcpu,
    Role::Watch,
    Role::Control,
    Role::Device(Work::Files),
    Role::Device(Work::Bytes),
    Role::Device(Work::Sockets),
];

/// The filters of [`ROLES`]; not set without walls.
static FILTERS: OnceLock<Vec<(Role, Filters)>> = OnceLock::new();

thread_local! {
    /// That of the calling thread, once it has entered one. Whoever starts a thread of its own role passes its filter on,
    /// and so no number of threads that start each other piles up filters without end.
    static ROLE: Cell<Option<Role>> = const { Cell::new(None) };
}

/// A role's filters. The kernel asks all and takes the strictest answer.
struct Filters {
    /// Refuses some calls with `ENOSYS`: those that the C library and Rust's can do without.
    missing: BpfProgram,
    /// Ends the process with all calls but these.
    allowed: BpfProgram,
}

impl Filters {
    fn of(role: Role) -> Result<Self> {
        let missing = calls::missing(role)?.try_into().context("seccomp")?;
        let allowed = calls::allowed(role)?.try_into().context("seccomp")?;
        Ok(Self { missing, allowed })
    }

    fn apply(&self) -> Result<()> {
        // First, because the other one need not know the calls that it takes to add one.
        for program in [&self.missing, &self.allowed] {
            seccompiler::apply_filter(program).context("seccomp")?;
        }
        Ok(())
    }
}

/// Makes the filters, and puts the widest on the calling thread and on those that it will start, for good. Call it while
/// there is no other.
///
/// # Errors
///
/// When the host's kernel has no seccomp.
pub fn prepare() -> Result<()> {
    let filters = ROLES.map(|role| Ok((role, Filters::of(role)?)));
    let filters = filters.into_iter().collect::<Result<Vec<_>>>()?;
    refusal::catch()?;
    // Before the first, which does not let it be opened any more.
    for (_, filters) in filters.iter().filter(|(role, _)| *role == Role::Other) {
        filters.apply()?;
    }
    let _ = FILTERS.set(filters);
    set_gate(|work| Box::new(gate(Role::Device(work))));
    Ok(())
}

/// Leaves the calling thread only what its role needs, for good. Does nothing without walls.
///
/// # Errors
///
/// The host's.
pub fn enter(role: Role) -> Result<()> {
    let mut all = FILTERS.get().into_iter().flatten();
    if let Some((_, filters)) = all.find(|(of, _)| *of == role) {
        filters.apply()?;
        ROLE.set(Some(role));
    }
    Ok(())
}

/// Starts a thread that has only what its role needs.
///
/// # Errors
///
/// The host's, when it gives no thread.
pub fn start<T: Send + 'static>(
    role: Role,
    name: impl Into<String>,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let gate = gate(role);
    Builder::new().name(name.into()).spawn(move || {
        gate();
        body()
    })
}

/// For a thread that the calling one starts. Without its filter it does nothing, and the process ends: that takes a host
/// without memory.
fn gate(role: Role) -> impl FnOnce() + Send + 'static {
    let inherited = ROLE.get() == Some(role);
    move || {
        if inherited {
            ROLE.set(Some(role));
        } else if let Err(error) = enter(role) {
            log::error!("a thread cannot be confined: {error:#}");
            std::process::exit(STATUS_SANDBOX.into());
        }
    }
}

/// Whether this kernel has seccomp with all that is asked of it.
pub fn available() -> bool {
    let actions = std::fs::read_to_string("/proc/sys/kernel/seccomp/actions_avail");
    actions.is_ok_and(|actions| {
        ["trap", "errno"].iter().all(|wanted| actions.split_whitespace().any(|it| it == *wanted))
    })
}

#[cfg(test)]
mod tests;
