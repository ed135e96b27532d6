//! Commands for a sandbox that runs: `oriel share` and `oriel stats`.

use std::io::Write;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use super::values;
use crate::control::{Request, client};
use crate::sandbox::Resized;

/// Change the shares of a sandbox that runs
#[derive(Debug, Args)]
pub struct ShareArgs {
    #[command(subcommand)]
    command: ShareCommand,
}

#[derive(Debug, Subcommand)]
enum ShareCommand {
    Resize(ResizeArgs),
}

/// Make the DAX window of a share larger, up to its window-max
///
/// A guest whose driver has Oriel's patch (kernel-config/patches) uses the larger window at once, with the share
/// mounted. Any other takes it up when it sets up the device the next time: umount the share, write the name of
/// its device to unbind and then to bind in /sys/bus/virtio/drivers/virtiofs, and mount it again.
#[derive(Debug, Args)]
struct ResizeArgs {
    /// The sandbox: what its `oriel run --name` says
    sandbox: String,

    /// Where the guest sees the share; / is the root
    guest_path: String,

    /// The new size, a multiple of 2M
    #[arg(value_parser = values::size_in_units)]
    size: u64,
}

/// Does what the command says.
pub fn share(args: &ShareArgs) -> Result<u8> {
    let ShareCommand::Resize(resize) = &args.command;
    let request = Request::ShareResize { share: resize.guest_path.clone(), size: resize.size };
    let reply = client::ask(&resize.sandbox, &request)?;
    let done: Resized = serde_json::from_value(reply).context("an answer of another version")?;
    let size = done.size >> 20;
    match done.driver_told {
        true => println!("{}: the window has {size} MiB, and the guest was told", done.share),
        false => println!(
            "{}: the window has {size} MiB; the guest's driver sees it when it sets up the device again: umount, \
             unbind, bind, mount (oriel share resize --help)",
            done.share
        ),
    }
    Ok(0)
}

/// Print what each share's device of a sandbox that runs has counted, as JSON
///
/// It is what `oriel run --stats` writes at the end.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The sandbox: what its `oriel run --name` says
    sandbox: String,
}

/// Prints them.
pub fn stats(args: &StatsArgs) -> Result<u8> {
    let stats = client::ask(&args.sandbox, &Request::Stats {})?;
    let text = serde_json::to_string_pretty(&stats)?;
    writeln!(std::io::stdout(), "{text}").context("standard output")?;
    Ok(0)
}
