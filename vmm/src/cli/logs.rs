//! `oriel logs` and `oriel rm`.

use std::os::fd::AsFd;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use oriel_init::frames::Kind;

use super::stop::has_ended;
use crate::control::client::Connection;
use crate::control::{self, check_name};
use crate::{logs, stdio};

/// How often is looked for more.
const PAUSE: Duration = Duration::from_millis(100);

/// Print what the command of a sandbox with a name has written
///
/// Standard output comes to standard output, standard error to standard error; kept are the last one to two MiB.
/// They last as long as the sandbox, and with `oriel run --detach` until a sandbox of the same name is started, or
/// `oriel rm`.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Go on with what is written until the sandbox ends
    #[arg(short, long)]
    follow: bool,

    /// What came over the kernel's console instead, whole lines
    #[arg(long)]
    console: bool,

    /// The sandbox: what its `oriel run --name` says
    sandbox: String,
}

/// Prints them.
pub fn logs(args: &LogsArgs) -> Result<u8> {
    let name = &args.sandbox;
    check_name(name).map_err(|error| anyhow!(error))?;
    let path = control::log_path(&control::directory()?, name);
    if !path.exists() {
        bail!("there are no logs of a sandbox {name:?} ({})", path.display());
    }
    // One that has ended writes no more.
    let process = Connection::open(name).and_then(|sandbox| sandbox.process()).ok();
    let process = process.filter(|_| args.follow);
    let each = |kind, bytes: &[u8]| {
        let target = match (kind, args.console) {
            (Kind::Stdout, false) | (Kind::Console, true) => rustix::stdio::stdout(),
            (Kind::Stderr, false) => rustix::stdio::stderr(),
            _ => return Ok(()),
        };
        stdio::write_all(target, bytes).context("standard output")
    };
    let more = || match &process {
        Some(process) => Ok(!has_ended(process.as_fd(), PAUSE)?),
        None => Ok(false),
    };
    logs::read(&path, each, more)?;
    Ok(0)
}

/// Forget a sandbox that ended: its logs, and what it left when it was killed
#[derive(Debug, Args)]
pub struct RmArgs {
    /// The sandbox: what its `oriel run --name` said
    sandbox: String,
}

/// Removes them.
pub fn rm(args: &RmArgs) -> Result<u8> {
    let name = &args.sandbox;
    check_name(name).map_err(|error| anyhow!(error))?;
    if !control::forget(&control::directory()?, name)? {
        bail!("there is nothing left of a sandbox {name:?}");
    }
    Ok(0)
}
