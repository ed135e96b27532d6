//! `oriel run`.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::share::{LiveArg, RootArg, ShareArg};
use super::values::{ConsoleTarget, InitrdSource, VsockArg};
use super::{UsageError, detach};
use crate::bundle::Bundle;
use crate::machine::memory::MemoryConfig;
use crate::{bundle, control, sandbox};

/// Whether `oriel` runs in a user namespace of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum UserNamespace {
    /// It does not.
    Host,
    /// An ordinary user's does, in which it may take on the user's subordinate ids.
    Auto,
}

/// Boot a sandbox, run COMMAND in it, and exit with its status
///
/// The guest boots in a moment, runs the command and powers off. Without --root it has a small userland of
/// its own (busybox) and sees nothing of the host but what --share names.
#[derive(Clone, Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct RunArgs {
    /// Share a host directory: HOST_DIR:GUEST_PATH[:OPTION,...]
    ///
    /// Options, separated by commas:
    ///
    /// ro: the host refuses writes.
    ///
    /// cache=never|metadata|auto|always: what the guest may keep. never: nothing; metadata: names and
    /// attributes for a day, no data; auto (the default): names and attributes for a second, and data until
    /// the file is opened again; always: everything for a day, for a directory that nobody else changes.
    ///
    /// entry-timeout=TIME, attr-timeout=TIME, negative-timeout=TIME: for how long the guest may believe that
    /// a name is there, what a file's attributes are, and that a name is not there, instead of what the
    /// cache mode says; a number and ms, s, m, h or d.
    ///
    /// writeback: the guest collects writes in its own memory; only with cache=always.
    ///
    /// xattr=off|on|mapped: extended attributes: none; user.*, trusted.* and security.capability, which are the
    /// host's; or user.* as they are, and trusted.* and security.* kept on the host as user.oriel.*, where they
    /// mean nothing to it. Default: mapped, and on for a share that is not written to (ro, overlay).
    ///
    /// acl: POSIX ACLs of the host count in the guest, which may set them.
    ///
    /// uid-map=GUEST:HOST:COUNT, gid-map=GUEST:HOST:COUNT (both may be repeated): which user and group ids of
    /// the guest are which of the host. What is in no range is shown as 65534, and files cannot be given to it.
    /// Default: as root, the same on both sides; as another user, that user's files are the guest root's, and
    /// whatever the guest makes is that user's.
    ///
    /// dev: the guest may make device nodes, which are the host's devices to those who open them there.
    ///
    /// locks=host|guest: whether the guest's locks on files (fcntl, flock) hold against the host's processes and
    /// other sandboxes (the default), or among the guest's own processes only.
    ///
    /// direct=buffered|host: what a program's O_DIRECT does on the host, whatever its alignment: buffered (the
    /// default) ends in the guest, and data goes through the host's page cache; host passes that by too, where
    /// its file system takes the request. host only with dax=never.
    ///
    /// dax=never|inode|always: which files are mapped straight from the host's page cache: none, those above
    /// 128 KiB for which the window has room (inode, the default), or all.
    ///
    /// window=SIZE|auto: address space for those mappings, a multiple of 2M; costs the guest 1/64 of it in
    /// RAM. auto (the default): room for the files of the directory, from 64M to the guest's memory.
    /// window-max=SIZE: how large `oriel share resize` may make it while the guest runs.
    ///
    /// prefault=auto|never: whether pages of files that are read in order are entered into the guest's page
    /// tables ahead of its faults.
    ///
    /// dispatch=auto|inline|worker|poll: who serves the guest's requests. auto (the default): the guest's CPU that sent
    /// one serves it itself where it need not wait, on file systems of this machine's disks and memory, while few
    /// are queued; threads serve the rest. inline: on all file systems and however many are queued. worker: threads
    /// serve all. poll: threads serve all, and each queue's looks for the next request for a millisecond before it
    /// sleeps: a processor of the host for each queue while it is busy.
    ///
    /// queues=N: request queues, default one for each CPU. tag=NAME: the device's name in the guest.
    #[arg(short = 'v', long = "share", visible_alias = "volume", value_name = "SHARE")]
    pub shares: Vec<ShareArg>,

    /// Make a place for shares that come and go while the sandbox runs: GUEST_PATH[:OPTION,...]
    ///
    /// It is one device. What `oriel share add` puts there appears below GUEST_PATH, with options of its own.
    /// Options here are those that concern all of it, as in --share: tag=NAME (default: shares), dax=, window=,
    /// window-max=, prefault=, queues=, dispatch=, locks=, acl, and ro: nothing below can be written to.
    #[arg(long = "shares", value_name = "GUEST_PATH")]
    pub live: Option<LiveArg>,

    /// Use a host directory that holds a Linux userland as root: HOST_DIR[:OPTION,...]
    ///
    /// Options are those of --share, and overlay: writes stay in the guest's memory and end with it.
    /// `--root /:overlay` runs the command in the host's own userland: fast to try, but everything this
    /// user may read on the host, secrets included, can then be read by the guest.
    #[arg(long, value_name = "ROOT")]
    pub root: Option<RootArg>,

    /// Run an OCI runtime bundle: a directory with a config.json and a root file system
    ///
    /// What config.json says takes the place of --root, COMMAND, --env, --workdir, --user, --hostname and --tty. Its
    /// bind mounts are shares. What it says in vain is told, a line for each field.
    #[arg(long, value_name = "DIR", conflicts_with_all = [
        "root", "command", "env", "workdir", "user", "hostname", "tty", "initrd"
    ])]
    pub bundle: Option<PathBuf>,

    /// What was in the bundle.
    #[arg(skip)]
    pub container: Option<Bundle>,

    /// Name of the sandbox, by which `oriel share` and `oriel stats` find it while it runs
    ///
    /// The name is a socket's: NAME.sock in /run/oriel (root) or $XDG_RUNTIME_DIR/oriel, which answers requests
    /// of this user and of root.
    #[arg(long, value_name = "NAME")]
    pub name: Option<String>,

    /// User namespace: host (none of its own) or auto (one with the ids of /etc/subuid and /etc/subgid)
    ///
    /// With auto, files of an ordinary user's guest can have many owners: the user's own are the guest root's,
    /// and the guest's ids from 1 on are those of /etc/subuid and /etc/subgid. It takes newuidmap(1). Root needs
    /// none.
    #[arg(long, value_enum, default_value_t = UserNamespace::Host, value_name = "host|auto")]
    pub userns: UserNamespace,

    /// Do not confine the process that runs the guest
    ///
    /// By default it gives up, before the guest's first instruction, what it does not need of the host: see
    /// SECURITY.md. Without, a guest that finds a mistake in it has all that this user has.
    #[arg(long)]
    pub no_sandbox: bool,

    /// Number of CPUs, at most the host's
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub cpus: u8,

    /// Memory: SIZE[,backend=anon|memfd|file:PATH|hugetlb:2M|hugetlb:1G]
    ///
    /// Pages are taken from the host as the guest touches them; huge pages must have been reserved. A file
    /// backend makes an unnamed file in a directory such as /dev/shm.
    #[arg(short, long, default_value = "1G", value_name = "SIZE")]
    pub memory: MemoryConfig,

    /// Set an environment variable; NAME alone takes the host's value
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    pub env: Vec<String>,

    /// Working directory of the command
    #[arg(short, long, default_value = "/", value_name = "PATH")]
    pub workdir: String,

    /// User of the command: a name of the guest's /etc/passwd or a number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    pub user: Option<String>,

    /// Host name of the guest
    #[arg(long, default_value = "oriel", value_name = "NAME")]
    pub hostname: String,

    /// Forward standard input to the command
    #[arg(short, long)]
    pub interactive: bool,

    /// Give the command a terminal
    #[arg(short, long)]
    pub tty: bool,

    /// Print the name and return once the command runs, which goes on by itself
    ///
    /// Its output is for `oriel logs`, and its standard input is at its end. `oriel exec` runs further commands
    /// beside it, and `oriel stop` ends it.
    #[arg(short, long, requires = "name")]
    pub detach: bool,

    /// Kernel: a vmlinux or a bzImage for x86-64
    ///
    /// Without it, the one that kernel-config/fetch brought is used.
    #[arg(long, env = "ORIEL_KERNEL", value_name = "FILE")]
    pub kernel: Option<PathBuf>,

    /// Let a bzImage unpack itself in the guest: slower, with its address randomisation
    #[arg(long)]
    pub no_unpack: bool,

    /// Boot this initrd instead of Oriel's own; `none` lets the kernel mount the root share itself
    ///
    /// Such a guest mounts its shares by their tags and takes no COMMAND; --tty and --interactive connect
    /// the console.
    #[arg(long, value_name = "FILE|none", conflicts_with = "command")]
    pub initrd: Option<InitrdSource>,

    /// Load the modules beside the kernel before the first program of --initrd FILE runs
    ///
    /// They are those that kernel-config/fetch brings: vsock, overlayfs, virtio-rng. That is for an initrd that
    /// expects them in the kernel, as agents of containers do; it is not changed, and its /init is the first
    /// program as ever.
    #[arg(long)]
    pub initrd_modules: bool,

    /// Words to add to the kernel's command line
    #[arg(long, default_value = "", value_name = "WORDS", allow_hyphen_values = true)]
    pub cmdline: String,

    /// Connect sockets of the host and of the guest's address family vsock: PATH[,cid=N]
    ///
    /// A program of the host connects to the Unix socket PATH, writes `CONNECT PORT` and a line end, and reads
    /// a line that begins with OK once a program of the guest has taken the stream; when none listens there,
    /// the connection is closed. What the guest connects to port P of the host (context id 2) arrives at the
    /// Unix socket PATH_P. The guest's own context id is N, 3 by default.
    #[arg(long, value_name = "PATH")]
    pub vsock: Option<VsockArg>,

    /// Where the kernel's console goes: none, stdout, stderr or a file
    ///
    /// Default: none (its end is shown when the sandbox breaks down), or stdout with --initrd.
    #[arg(long, value_name = "WHERE")]
    pub console: Option<ConsoleTarget>,

    /// At the end, write what each share's device counted to this file, as JSON
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,

    /// The command and its arguments; a shell when there is none
    #[arg(trailing_var_arg = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  oriel run -- uname -a
  oriel run -v ./src:/src -w /src -- make
  oriel run -v ~/data:/data:ro -- sha256sum /data/big
  oriel run --root /srv/debian:overlay --cpus 4 --memory 4G -it -- bash
  oriel run --bundle ./bundle

Exit status: the command's own; 128+N when signal N killed it; 127 when it was not found, 126 when it
could not be executed; 125 when the sandbox could not be started or broke down; 2 for a wrong command line.";

/// Runs the sandbox to its end and returns the exit status.
pub fn run(args: &RunArgs) -> Result<u8> {
    check(args)?;
    if args.detach && !detach::is_sandbox() {
        return detach::start();
    }
    if args.detach {
        detach::leave_session()?;
    }
    match &args.bundle {
        Some(directory) => {
            let args = bundle::load(args, directory)?;
            check_places(&args)?;
            sandbox::run(&args)
        }
        None => sandbox::run(args),
    }
}

/// What is wrong whatever the host.
fn check(args: &RunArgs) -> Result<(), UsageError> {
    let usage = |message: String| Err(UsageError(message));
    if args.cpus == 0 {
        return usage("--cpus 0: a guest needs a CPU; give 1 or more".into());
    }
    if let Some(Err(error)) = args.name.as_deref().map(control::check_name) {
        return usage(format!("--name: {error}"));
    }
    if !args.workdir.starts_with('/') {
        return usage(format!("--workdir {:?}: write an absolute path", args.workdir));
    }
    if args.hostname.is_empty() || args.hostname.len() > 64 {
        return usage(format!("--hostname {:?}: write 1 to 64 characters", args.hostname));
    }
    if let Some(wrong) = args.env.iter().find(|entry| entry.is_empty() || entry.starts_with('=')) {
        return usage(format!("--env {wrong:?}: write NAME=VALUE or NAME"));
    }
    let foreign = args.initrd.is_some();
    if foreign && (!args.env.is_empty() || args.user.is_some() || args.workdir != "/") {
        return usage(
            "--initrd: --env, --user and --workdir are for Oriel's own init; leave them".into(),
        );
    }
    if args.initrd_modules && !matches!(args.initrd, Some(InitrdSource::File(_))) {
        return usage("--initrd-modules: they are for another's initrd; add --initrd FILE".into());
    }
    if args.detach && args.interactive {
        return usage("--detach, --interactive: nobody is there to type; leave one of them".into());
    }
    let console = args.console.as_ref();
    if args.detach && matches!(console, Some(ConsoleTarget::Stdout | ConsoleTarget::Stderr)) {
        return usage(
            "--detach: the console can go to a file; `oriel logs --console` shows it, too".into(),
        );
    }
    let root = args.root.as_ref();
    if foreign && root.is_some_and(|root| root.options.overlay) {
        return usage(
            "--root …,overlay: only Oriel's own init makes the overlay; leave --initrd".into(),
        );
    }
    check_places(args)
}

/// Whether the user's shares hide one another, or one of the bundle. A bundle may mount one over the other itself.
fn check_places(args: &RunArgs) -> Result<(), UsageError> {
    let binds = args.container.as_ref().map_or(0, Bundle::binds);
    let (own, bundled) = args.shares.split_at(args.shares.len().saturating_sub(binds));
    let mut taken: Vec<_> = bundled.iter().map(|share| Path::new(&share.guest)).collect();
    let live = args.live.iter().map(|live| live.guest.as_str());
    for path in own.iter().map(|share| share.guest.as_str()).chain(live) {
        if taken.contains(&Path::new(path)) {
            return Err(UsageError(format!(
                "--share …:{path}: two shares are mounted there; move one"
            )));
        }
        taken.push(Path::new(path));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Wrapper {
        #[command(flatten)]
        args: RunArgs,
    }

    fn parse(words: &[&str]) -> Result<RunArgs, clap::Error> {
        Wrapper::try_parse_from([&["run"], words].concat()).map(|wrapper| wrapper.args)
    }

    #[test]
    fn the_command_begins_with_the_first_word_that_is_no_option() {
        for words in [&["-i", "make", "-j4", "--cpus"][..], &["-i", "--", "make", "-j4", "--cpus"]]
        {
            let args = parse(words).unwrap();
            assert!(args.interactive);
            assert_eq!(args.command, ["make", "-j4", "--cpus"]);
        }
        assert!(parse(&["--cpu", "1", "make"]).is_err(), "an unknown option is no command");
        assert!(parse(&["--initrd", "none", "make"]).is_err());
        assert!(parse(&["-d", "make"]).is_err(), "nobody would find it");
    }

    #[test]
    fn contradictions_are_wrong_command_lines() {
        for (words, hint) in [
            (&["--cpus", "0"][..], "--cpus"),
            (&["--name", "a/b"], "--name"),
            (&["-w", "src"], "--workdir"),
            (&["--hostname", ""], "--hostname"),
            (&["-e", "=x"], "--env"),
            (&["--initrd", "none", "-u", "me"], "--user"),
            (&["--initrd", "none", "--initrd-modules"], "--initrd FILE"),
            (&["--initrd-modules", "make"], "--initrd FILE"),
            (&["--initrd", "none", "--root", "/:overlay"], "overlay"),
            (&["-v", "/a:/x", "-v", "/b:/x"], "/x"),
            (&["-v", "/a:/x", "-v", "/b:/x/"], "/x"),
            (&["-v", "/a:/x", "--shares", "/x"], "/x"),
            (&["-d", "-i", "--name", "x"], "--interactive"),
            (&["-d", "--name", "x", "--console", "stdout"], "--console"),
        ] {
            let error = check(&parse(words).unwrap()).unwrap_err();
            assert!(error.0.contains(hint), "{}", error.0);
        }
    }
    #[test]
    fn a_share_of_the_users_does_not_hide_one_of_the_bundle() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("rootfs")).unwrap();
        let bind =
            serde_json::json!({ "destination": "/data", "type": "bind", "source": "rootfs" });
        let config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["true"], "cwd": "/" },
            "root": { "path": "rootfs" },
            "mounts": [bind, bind]
        });
        std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        let load = |words: &[&str]| bundle::load(&parse(words).unwrap(), directory.path()).unwrap();
        check_places(&load(&["-v", "/a:/x"])).unwrap();
        for words in [&["-v", "/a:/data"][..], &["-v", "/a:/data/"], &["--shares", "/data"]] {
            let error = check_places(&load(words)).unwrap_err();
            assert!(error.0.contains(":/data"), "{}", error.0);
        }
    }
}
