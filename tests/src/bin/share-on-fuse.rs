//! Mounts a share on this machine's own `/dev/fuse`, for suites and by hand.

use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::mpsc::{Receiver, channel};
use std::thread;

use anyhow::{Context, Result, bail};
use devices::share::{CachePolicy, DaxPolicy, DirectPolicy, LockPolicy, Options, XattrPolicy};
use integration::Door;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

const USAGE: &str = "\
Usage: share-on-fuse [-o OPTION,…] HOST_DIR MOUNT_POINT [-- COMMAND [ARG…]]

Serves HOST_DIR at MOUNT_POINT, as root, by the code that serves a guest. With COMMAND, until that ends, and exits
with its status; otherwise until SIGTERM, SIGINT, SIGHUP or an unmount. Exits with 70 when the server has failed.

Options: ro, cache=never|metadata|auto|always, writeback, xattr=on|mapped|off (on), acl, dev, direct=host,
         locks=host|guest, inodes=N, handles=N, by-name (no file handles)";

/// `EX_SOFTWARE` of sysexits.h.
const SOFTWARE: u8 = 70;

enum Event {
    Ended(std::io::Result<ExitStatus>),
    Signal,
    Unmounted,
}

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("share-on-fuse: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<ExitCode> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let (options, words) = match words[..] {
        ["-o", options, ref rest @ ..] => (options, rest),
        ref rest => ("", rest),
    };
    let (directory, path, command) = match *words {
        [directory, path] => (directory, path, None),
        [directory, path, "--", program, ref args @ ..] => (directory, path, Some((program, args))),
        _ => bail!("{USAGE}"),
    };
    let options = parse(Options::new(directory), options)?;

    let (sender, events) = channel();
    // Before the mount: a signal in between must not leave it behind.
    let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let to_main = sender.clone();
    thread::spawn(move || {
        for _ in signals.forever() {
            let _ = to_main.send(Event::Signal);
        }
    });
    let mut door = Door::mount_at(options, Path::new(path))
        .with_context(|| format!("{directory} cannot be mounted at {path}"))?;
    let child = match command {
        None => None,
        Some((program, args)) => {
            let mut child =
                Command::new(program).args(args).spawn().context(program.to_string())?;
            let pid = rustix::process::Pid::from_child(&child);
            let to_main = sender.clone();
            thread::spawn(move || to_main.send(Event::Ended(child.wait())));
            Some(pid)
        }
    };
    door.when_unmounted(move || drop(sender.send(Event::Unmounted)));

    let status = wait(&events, child);
    if let Err(error) = door.unmount()
        && error.raw_os_error() != Some(libc::EINVAL)
    {
        eprintln!("share-on-fuse: {path} cannot be unmounted: {error}");
    }
    let code = match status? {
        _ if !door.failures().is_empty() => SOFTWARE,
        None => 0,
        Some(status) => shell_status(status),
    };
    // What failed was said when it happened; Drop would panic over it.
    std::process::exit(code.into())
}

/// Until there is a reason to end. A signal is passed on to the command, which then ends or does not.
fn wait(
    events: &Receiver<Event>,
    child: Option<rustix::process::Pid>,
) -> Result<Option<ExitStatus>> {
    loop {
        match (events.recv()?, child) {
            (Event::Ended(status), _) => return Ok(Some(status?)),
            (Event::Unmounted, None) | (Event::Signal, None) => return Ok(None),
            (Event::Unmounted, Some(_)) => {}
            (Event::Signal, Some(pid)) => {
                // It may have ended just now.
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
            }
        }
    }
}

fn shell_status(status: ExitStatus) -> u8 {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1)
}

fn parse(mut options: Options, text: &str) -> Result<Options> {
    // What a guest's root file system needs, and what suites test.
    options.xattr = XattrPolicy::On;
    for option in text.split(',').filter(|option| !option.is_empty()) {
        let (key, value) = option.split_once('=').unwrap_or((option, ""));
        match (key, value) {
            ("ro", "") => options.read_only = true,
            ("writeback", "") => options.writeback = true,
            ("dev", "") => options.device_nodes = true,
            ("direct", "host") => {
                options.direct = DirectPolicy::Host;
                options.dax = DaxPolicy::Never;
            }
            ("xattr", "on") => options.xattr = XattrPolicy::On,
            ("xattr", "mapped") => options.xattr = XattrPolicy::Mapped,
            ("xattr", "off") => options.xattr = XattrPolicy::Off,
            ("acl", "") => options.acl = true,
            ("cache", "never") => options.cache = CachePolicy::Never,
            ("cache", "metadata") => options.cache = CachePolicy::Metadata,
            ("cache", "auto") => options.cache = CachePolicy::Auto,
            ("cache", "watch") => options.cache = CachePolicy::Watch,
            ("cache", "always") => options.cache = CachePolicy::Always,
            ("locks", "host") => options.locks = LockPolicy::Host,
            ("locks", "guest") => options.locks = LockPolicy::Guest,
            ("inodes", number) => options.max_inodes = Some(number.parse().context("inodes=")?),
            ("handles", number) => options.max_handles = Some(number.parse().context("handles=")?),
            ("by-name", "") => options.file_handles = false,
            _ => bail!("{option:?} is no option\n\n{USAGE}"),
        }
    }
    Ok(options)
}
