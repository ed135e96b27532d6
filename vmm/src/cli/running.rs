//! Commands for a sandbox that runs: `oriel share`, `oriel stats` and `oriel status`.

use std::io::Write;
use std::os::fd::AsFd;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use rustix::fs::{Mode, OFlags};
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::share::MemberArg;
use super::values;
use crate::control::{Request, client};
use crate::sandbox::{
    Added, MemberList, MemberState, MemberStatus, RemovedShare, Resized, State, Status, Updated,
};

/// Change the shares of a sandbox that runs
#[derive(Debug, Args)]
pub struct ShareArgs {
    #[command(subcommand)]
    command: ShareCommand,
}

#[derive(Debug, Subcommand)]
enum ShareCommand {
    Add(AddArgs),
    Remove(RemoveArgs),
    Update(UpdateArgs),
    List(ListArgs),
    Resize(ResizeArgs),
}

/// Add a directory of the host's to a sandbox that runs
///
/// It appears at PATH below the guest path of `oriel run --shares`, as a mount of its own, and the guest sees it as
/// soon as it looks. Options are those of `oriel run --share`, but for those that concern the device: ro, cache=,
/// entry-timeout=, attr-timeout=, negative-timeout=, xattr=, uid-map=, gid-map=, dev, and dax=never. acl, locks= and
/// any other dax= are for all shares there alike, as --shares says.
#[derive(Debug, Args)]
struct AddArgs {
    /// The sandbox: what its `oriel run --name` says
    sandbox: String,

    /// HOST_DIR:/PATH[:OPTION,...]
    share: MemberArg,
}

/// Remove a directory from a sandbox that runs
///
/// Its name is gone at once. What the guest has open, mapped or knows of it works on until the guest lets go of it,
/// as after `umount --lazy`.
#[derive(Debug, Args)]
struct RemoveArgs {
    /// The sandbox: what its `oriel run --name` says
    sandbox: String,

    /// The path that it was added at
    path: String,

    /// End what the guest has of it now, also of one that was removed before: open files are bad descriptors, and
    /// mapped ones zeros
    #[arg(long)]
    force: bool,
}

/// Switch a directory of a sandbox that runs to read-only, or back
///
/// Once it is ro, nothing on the host is changed through it by any way: what the guest has open for writing answers
/// EROFS, and what it stores in files that are mapped (DAX) is its own and in no file.
#[derive(Debug, Args)]
struct UpdateArgs {
    /// The sandbox: what its `oriel run --name` says
    sandbox: String,

    /// The path that it was added at
    path: String,

    /// ro or rw
    access: Access,
}

/// Whether a share can be written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Access {
    /// It cannot.
    Ro,
    /// It can.
    Rw,
}

/// List the directories that were added to a sandbox that runs
#[derive(Debug, Args)]
struct ListArgs {
    /// The sandbox: what its `oriel run --name` says
    sandbox: String,

    /// As JSON
    #[arg(long)]
    json: bool,
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
    match &args.command {
        ShareCommand::Add(args) => add(args),
        ShareCommand::Remove(args) => remove(args),
        ShareCommand::Update(args) => update(args),
        ShareCommand::List(args) => list(args),
        ShareCommand::Resize(args) => resize(args),
    }
}

/// Asks, and takes the answer apart.
fn ask<T: DeserializeOwned>(sandbox: &str, request: &Request) -> Result<T> {
    let reply = client::ask(sandbox, request)?;
    serde_json::from_value(reply).context("an answer of another version")
}

fn add(args: &AddArgs) -> Result<u8> {
    let MemberArg { host, path, options } = args.share.clone();
    // The sandbox may run in another directory.
    let host = std::path::absolute(&host).with_context(|| host.display().to_string())?;
    let text = host.to_str().with_context(|| format!("{host:?} is not UTF-8"))?;
    let request = Request::ShareAdd { host: text.into(), path, options };
    // The sandbox sees nothing of the host by its name.
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::open(&host, flags, Mode::empty()).context(text.to_string())?;
    let reply = client::ask_giving(&args.sandbox, &request, directory.as_fd())?;
    let added: Added = serde_json::from_value(reply).context("an answer of another version")?;
    let access = if added.read_only { ", read-only" } else { "" };
    print(&format!("{}: {text}{access}", added.guest_path))
}

fn remove(args: &RemoveArgs) -> Result<u8> {
    let request = Request::ShareRemove { path: args.path.clone(), force: args.force };
    let removed: RemovedShare = ask(&args.sandbox, &request)?;
    let path = &args.path;
    match removed.state {
        MemberState::Gone => print(&format!("{path}: removed")),
        _ => print(&format!(
            "{path}: removed; the guest knows {} files of it and has {} open, and the host's directory is in use \
             until that is over (or --force)",
            removed.nodes, removed.open
        )),
    }
}

fn update(args: &UpdateArgs) -> Result<u8> {
    let request =
        Request::ShareUpdate { path: args.path.clone(), read_only: args.access == Access::Ro };
    let updated: Updated = ask(&args.sandbox, &request)?;
    let access = if updated.read_only { "read-only" } else { "writable" };
    print(&format!("{}: {access}", args.path))
}

fn list(args: &ListArgs) -> Result<u8> {
    let reply = client::ask(&args.sandbox, &Request::ShareList {})?;
    if args.json {
        return print_json(&reply);
    }
    let list: MemberList = serde_json::from_value(reply).context("an answer of another version")?;
    let line = |member: &MemberStatus| {
        let access = if member.read_only { "ro" } else { "rw" };
        let state = if member.state == MemberState::Attached { "" } else { ", removed" };
        let (path, host) = (&member.path, member.host.display());
        let (nodes, open) = (member.nodes, member.open);
        format!("\n{path}: {host}, {access}{state}, {nodes} files known, {open} open")
    };
    let lines: String = list.shares.iter().map(line).collect();
    print(&format!("below {} in the guest:{lines}", list.guest_path))
}

fn resize(resize: &ResizeArgs) -> Result<u8> {
    let request = Request::ShareResize { share: resize.guest_path.clone(), size: resize.size };
    let done: Resized = ask(&resize.sandbox, &request)?;
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
