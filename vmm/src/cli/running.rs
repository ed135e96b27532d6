//! Commands for a sandbox that runs: `oriel share`, `oriel stats` and `oriel status`.

use std::io::Write;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use serde_json::Value;

use super::values;
use crate::control::{Request, client};
use crate::sandbox::{Resized, State, Status};

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

/// Print what each share's device of a sandbox that runs has counted
///
/// As JSON it is what `oriel run --stats` writes at the end: for each share its counters, and for each operation of
/// FUSE how many requests came, how many failed, and how many took how long.
#[derive(Debug, Args)]
pub struct StatsArgs {
    /// The sandbox: what its `oriel run --name` says
    sandbox: String,

    /// As JSON; this is the default
    #[arg(long)]
    json: bool,

    /// As OpenMetrics text, which Prometheus reads
    #[arg(long, conflicts_with = "json")]
    openmetrics: bool,
}

/// Prints them.
pub fn stats(args: &StatsArgs) -> Result<u8> {
    if args.openmetrics {
        let reply = client::ask(&args.sandbox, &Request::Metrics {})?;
        let text = reply["openmetrics"].as_str().context("an answer of another version")?;
        return print(text.trim_end());
    }
    print_json(&client::ask(&args.sandbox, &Request::Stats {})?)
}

/// Print what a sandbox that runs is, and how far it has come
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// The sandbox: what its `oriel run --name` says
    sandbox: String,

    /// As JSON
    #[arg(long)]
    json: bool,
}

/// Prints it.
pub fn status(args: &StatusArgs) -> Result<u8> {
    let reply = client::ask(&args.sandbox, &Request::Status {})?;
    if args.json {
        return print_json(&reply);
    }
    let status: Status = serde_json::from_value(reply).context("an answer of another version")?;
    let state = match status.state {
        State::Booting => "booting",
        State::Running => "running",
        State::Ending => "ending",
    };
    let mut text = format!(
        "{}: {state}, process {}, for {} s, {} CPUs, {} MiB",
        status.name,
        status.pid,
        status.uptime_seconds,
        status.cpus,
        status.memory >> 20
    );
    if !status.command.is_empty() {
        text += &format!("\ncommand: {}", status.command.join(" "));
    }
    if let Some(vsock) = &status.vsock {
        text += &format!("\nvsock: {}", vsock.display());
    }
    for share in &status.shares {
        let window = match &share.window {
            Some(window) => format!("window of {} MiB", window.size >> 20),
            None => "no window".to_string(),
        };
        text += &format!("\nshare: {}, tag {}, {window}", share.path, share.tag);
    }
    print(&text)
}

fn print_json(value: &Value) -> Result<u8> {
    print(&serde_json::to_string_pretty(value)?)
}

fn print(text: &str) -> Result<u8> {
    writeln!(std::io::stdout(), "{text}").context("standard output")?;
    Ok(0)
}
