//! What this process gives up before the guest's first instruction, so that a guest which takes it over gets
//! little with it.
//!
//! [`raise`] is called once, while there is one thread, after all that is found by a name of the host's was opened:
//! kernel, consoles, guest memory. From then on there are
//!
//! - other limits ([`limits`]), and `no_new_privs`;
//! - other mounts, if the process may mount ([`namespace`]): the shared directories, those in which its sockets and
//!   logs are, and nothing else of the host;
//! - only the capabilities that serving the shares takes ([`capabilities`]);
//! - the rules of Landlock ([`files`]), as far as this kernel has them and they let the shares work;
//! - the system calls that each kind of thread makes ([`seccomp`]): who starts one says which kind it is ([`start`]).
//!
//! [`report`] says which of them this host has.

mod capabilities;
mod files;
mod limits;
mod namespace;
mod seccomp;

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::thread::{CapabilitySet, set_no_new_privs};

pub use self::capabilities::Needs;
pub use self::seccomp::{Role, enter, start};

/// A directory that the guest is to have.
pub struct Shared<'p> {
    /// Its name on the host.
    pub host: &'p Path,
    /// Nothing is ever written to it.
    pub read_only: bool,
}

/// What there is to be inside of the walls.
pub struct Plan<'p> {
    /// The directories that the guest has from the start.
    pub shares: Vec<Shared<'p>>,
    /// Directories in which this process has sockets and logs of its own to remove, and of other programs' to
    /// connect to.
    pub places: Vec<PathBuf>,
    /// That of them with logs, of which new ones are made.
    pub logs: Option<PathBuf>,
    /// Directories may come later.
    pub live: bool,
    /// Files may be reached by their handles: the process is not in a user namespace of its own.
    pub handles: bool,
    /// What is done to the shared directories.
    pub needs: Needs,
}

/// How the host looks from inside.
#[derive(Default)]
pub struct Inside {
    /// Where each of [`Plan::shares`] is now, when that is not where it was.
    shares: Vec<PathBuf>,
    /// There are no names of the host's any more.
    moved: bool,
}

impl Inside {
    /// Without walls.
    pub fn open() -> Self {
        Self::default()
    }

    /// Where one of [`Plan::shares`] is, if not under its name.
    pub fn place_of(&self, share: usize) -> Option<PathBuf> {
        self.shares.get(share).cloned()
    }

    /// Whether a name of the host's is of no use.
    pub fn is_elsewhere(&self) -> bool {
        self.moved
    }
}

/// Raises the walls. Call it while there is no second thread.
///
/// # Errors
///
/// When one that this host must have is refused, with what to do about it.
pub fn raise(plan: &Plan<'_>) -> Result<Inside> {
    let start = Instant::now();
    let raised = raise_all(plan).context(
        "this process cannot be confined (`oriel check` says what the host has; --no-sandbox does without)",
    );
    log::debug!("walls: {} µs", start.elapsed().as_micros());
    raised
}

fn raise_all(plan: &Plan<'_>) -> Result<Inside> {
    limits::lower()?;
    set_no_new_privs(true).context("no_new_privs")?;
    let mut inside = Inside::default();
    if capabilities::has(CapabilitySet::SYS_ADMIN) {
        inside.shares = namespace::enter(&plan.shares, &plan.places)?;
        inside.moved = true;
    }
    let kept = capabilities::keep(plan.needs)?;
    let rules = files::Rules::of(plan, &inside, kept);
    let landlock = files::restrict(&rules)?;
    seccomp::prepare()?;
    log::info!(
        "walls: {}; {landlock}; {}; filters of system calls",
        mounts(&inside),
        capabilities::described(kept)
    );
    if !inside.moved && !landlock.files {
        log::info!(
            "walls: nothing but the shares themselves keeps this process from the user's other files"
        );
    }
    Ok(inside)
}

fn mounts(inside: &Inside) -> &'static str {
    if inside.moved { "mounts of its own" } else { "the host's mounts (not root)" }
}

/// A wall and what this host has of it: its name, whether it is there, and what there is to say.
pub type Line = (&'static str, bool, String);

/// Which walls this host has for this user. Changes this process: for one that ends soon.
pub fn report() -> Vec<Line> {
    // First, because it wants to be alone, and the other takes a thread.
    let mounts = match capabilities::has(CapabilitySet::SYS_ADMIN) {
        true => match namespace::enter(&[], &[]) {
            Ok(_) => (true, "mounts of its own: of the host only what is shared".into()),
            Err(error) => (false, format!("{error:#}; sandboxes need --no-sandbox")),
        },
        false => (
            false,
            "only root (or --userns auto) can have mounts of its own; Landlock keeps this user's sandboxes from \
             other files, but not with --shares"
                .into(),
        ),
    };
    let landlock = files::available();
    let seccomp = match seccomp::available() {
        true => (true, "each thread makes the system calls that it needs and no others"),
        false => (
            false,
            "the host's kernel has no filters (CONFIG_SECCOMP_FILTER); sandboxes need --no-sandbox",
        ),
    };
    vec![
        ("mounts", mounts.0, mounts.1),
        ("landlock", landlock.0, landlock.1),
        ("seccomp", seccomp.0, seccomp.1.into()),
    ]
}
