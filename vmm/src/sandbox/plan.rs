//! From the command line to what is on the machine and what its init does.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use devices::share::{CachePolicy, XattrPolicy};
use oriel_init::initramfs;
use oriel_init::protocol::{Config, Dax, LOADER_PATH, Process, Root, Share};

use super::identity::Identity;
use super::window::WindowChoice;
use crate::bundle::Bundle;
use crate::cli::{InitrdSource, LiveArg, RunArgs, ShareOptions, UsageError, values};
use crate::kernel::{Assets, BootImage, Contents, Kernel};
use crate::walls;

/// What every kernel is told. `panic=-1`: reset at once, which ends the sandbox, instead of hanging.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 8250.nr_uarts=1 random.trust_cpu=on";
/// The environment of a container, as docker has it.
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const ROOT_TAG: &str = "root";

/// A directory of the host and the device that shows it.
pub struct PlannedShare {
    /// The host's directory, opened later; it exists.
    pub host: PathBuf,
    /// Where the guest sees it.
    pub guest: String,
    /// The device's tag.
    pub tag: String,
    /// How.
    pub options: ShareOptions,
    /// Its DAX window.
    pub window: WindowChoice,
    /// No other share changes anything in it.
    pub alone: bool,
}

/// The device whose shares come and go.
pub struct PlannedLive {
    /// Where the guest sees it.
    pub guest: String,
    /// The device's tag.
    pub tag: String,
    /// What concerns all of its shares.
    pub options: ShareOptions,
    /// Its DAX window.
    pub window: WindowChoice,
}

/// All shares: the root first, if there is one.
///
/// # Errors
///
/// Two equal tags; a directory that is not there or is not one.
pub fn shares(args: &RunArgs) -> Result<Vec<PlannedShare>> {
    let mut planned: Vec<PlannedShare> = Vec::new();
    let root = args
        .root
        .iter()
        .map(|root| ("--root", &root.host, "/", &root.options, ROOT_TAG.to_string()));
    let shares = args.shares.iter().enumerate().map(|(index, share)| {
        ("--share", &share.host, share.guest.as_str(), &share.options, format!("share{index}"))
    });
    for (option, host, guest, options, default_tag) in root.chain(shares) {
        let tag = options.tag.clone().unwrap_or(default_tag);
        if planned.iter().any(|other| other.tag == tag) {
            return Err(UsageError(format!(
                "{option} {}: another share has the tag {tag:?}; name this one with tag=",
                host.display()
            ))
            .into());
        }
        check_directory(host).with_context(|| format!("{option} {}", host.display()))?;
        let window = WindowChoice::asked(options.window.unwrap_or(0), options.window_max);
        let (host, guest, options) = (host.clone(), guest.to_string(), options.clone());
        planned.push(PlannedShare { host, guest, tag, options, window, alone: true });
    }
    let places: Vec<_> = planned
        .iter()
        .map(|share| share.host.canonicalize().unwrap_or_else(|_| share.host.clone()))
        .collect();
    let writable = |share: &PlannedShare| !share.options.read_only && !share.options.overlay;
    let writable: Vec<_> = planned.iter().map(writable).collect();
    for (own, share) in planned.iter_mut().enumerate() {
        let place = places.get(own);
        let meets = |(other, at): (usize, &PathBuf)| {
            other != own
                && writable.get(other) == Some(&true)
                && place.is_some_and(|place| place.starts_with(at) || at.starts_with(place))
        };
        // What is added later may be anywhere.
        share.alone = args.live.is_none() && !places.iter().enumerate().any(meets);
    }
    let undecided = |share: &PlannedShare| share.options.window.is_none();
    let windows = planned.iter().filter(|share| undecided(share)).count();
    for share in planned.iter_mut().filter(|share| undecided(share)) {
        let ShareOptions { dax, cache, window_max, .. } = share.options;
        // Small files are read where the guest keeps what it has read.
        let reads = dax == Dax::Inode
            && matches!(cache, CachePolicy::Auto | CachePolicy::Always | CachePolicy::Watch);
        let memory = args.memory.size / windows.max(1) as u64;
        share.window = WindowChoice::fitting(&share.host, reads, memory, window_max);
        let (bytes, reason) = (share.window.bytes >> 20, &share.window.reason);
        log::info!("{}: a DAX window of {bytes} MiB: {reason}", share.host.display());
    }
    Ok(planned)
}

/// The device of `--shares`.
///
/// # Errors
///
/// A tag that another share has.
pub fn live(args: &RunArgs, shares: &[PlannedShare]) -> Result<Option<PlannedLive>> {
    let Some(live) = &args.live else { return Ok(None) };
    let tag = live_tag(live);
    if shares.iter().any(|other| other.tag == tag) {
        let guest = &live.guest;
        return Err(UsageError(format!(
            "--shares {guest}: another share has the tag {tag:?}; name this one with tag="
        ))
        .into());
    }
    let window = match live.options.window {
        Some(bytes) => WindowChoice::asked(bytes, live.options.window_max),
        None => WindowChoice::unknown(args.memory.size, live.options.window_max),
    };
    Ok(Some(PlannedLive { guest: live.guest.clone(), tag, options: live.options.clone(), window }))
}

fn live_tag(live: &LiveArg) -> String {
    live.options.tag.clone().unwrap_or_else(|| "shares".into())
}

fn check_directory(path: &Path) -> Result<()> {
    let metadata =
        std::fs::metadata(path).context("name a directory that exists and may be read")?;
    if !metadata.is_dir() {
        bail!("this is not a directory; name the directory that holds it");
    }
    Ok(())
}

/// What is loaded into the guest: kernel, initrd, command line. `identity` is the one that serves the shares.
///
/// # Errors
///
/// A missing file, named; ids of a bundle that are not this user's to give.
pub fn boot_image(
    args: &RunArgs,
    kernel: Kernel,
    shares: &[PlannedShare],
    identity: &Identity,
) -> Result<BootImage> {
    let mut cmdline = CMDLINE.to_string();
    let initrd = match &args.initrd {
        None => vec![Contents::Bytes(own_initrd(args, &kernel, shares, identity)?)],
        Some(InitrdSource::None) => {
            if let Some(root) = args.root.is_some().then(|| shares.first()).flatten() {
                let access = if root.options.read_only { "ro" } else { "rw" };
                cmdline += &format!(" root={} rootfstype=virtiofs {access}", root.tag);
                if root.options.dax != Dax::Never {
                    cmdline += &format!(" rootflags={}", dax_option(root));
                }
            }
            Vec::new()
        }
        Some(InitrdSource::File(path)) => {
            let name = path.display();
            let file =
                Contents::open(path).with_context(|| format!("--initrd {name}: cannot be read"))?;
            if args.initrd_modules {
                let directory = kernel.modules.as_deref().context(
                    "--initrd-modules: there are none beside the kernel, where kernel-config/fetch puts them",
                )?;
                cmdline += &format!(" rdinit={LOADER_PATH}");
                // Linux unpacks one archive after the other, whatever each is packed with.
                let loader = initramfs::build_loader(&Assets::find()?.init, directory);
                vec![Contents::Bytes(loader.context("--initrd-modules")?), file]
            } else {
                vec![file]
            }
        }
    };
    if !args.cmdline.is_empty() {
        cmdline = format!("{cmdline} {}", args.cmdline);
    }
    Ok(BootImage { kernel: kernel.file, initrd, cmdline })
}

/// What the process keeps of the host. `places` are the directories of its sockets and logs, `logs` is that of its logs; `in_namespace` when it
/// has entered a user namespace of its own.
pub fn walls<'p>(
    shares: &'p [PlannedShare],
    live: Option<&PlannedLive>,
    places: Vec<PathBuf>,
    logs: Option<PathBuf>,
    in_namespace: bool,
) -> walls::Plan<'p> {
    let writes = |options: &ShareOptions| !options.read_only && !options.overlay;
    // Of those that come later nothing is known but that.
    let live_writes = live.is_some_and(|live| writes(&live.options));
    let all = || shares.iter().map(|share| &share.options);
    let asked_for_on = |options: &ShareOptions| options.xattr == Some(XattrPolicy::On);
    let needs = walls::Needs {
        writes: live_writes || all().any(writes),
        device_nodes: live_writes || all().any(|options| options.device_nodes),
        file_capabilities: live_writes
            || all().any(|options| writes(options) && asked_for_on(options)),
        // In a user namespace of its own the capability is not over the host's files, and would serve nothing.
        trusted: !in_namespace && all().any(asked_for_on),
    };
    let shared = |share: &'p PlannedShare| walls::Shared {
        host: &share.host,
        read_only: !writes(&share.options),
    };
    let shares = shares.iter().map(shared).collect();
    walls::Plan { shares, places, logs, live: live.is_some(), handles: !in_namespace, needs }
}

/// Whether the guest has a socket device. By its name a sandbox is found for further commands, and they come over
/// vsock; so does what has changed in a share.
pub fn has_vsock(args: &RunArgs) -> bool {
    args.vsock.is_some() || args.name.is_some() || is_watched(args)
}

/// Whether a share has `cache=watch`.
pub fn is_watched(args: &RunArgs) -> bool {
    let shares = args.shares.iter().map(|share| &share.options);
    let mut all = args.root.iter().map(|root| &root.options).chain(shares);
    all.any(|options| options.cache == CachePolicy::Watch)
}

fn dax_option(share: &PlannedShare) -> &'static str {
    use oriel_init::protocol::Dax;
    match share.options.dax {
        Dax::Never => "dax=never",
        Dax::Inode => "dax=inode",
        Dax::Always => "dax=always",
    }
}

fn own_initrd(
    args: &RunArgs,
    kernel: &Kernel,
    shares: &[PlannedShare],
    identity: &Identity,
) -> Result<Vec<u8>> {
    let assets = Assets::find()?;
    if args.root.is_none() && assets.busybox.is_none() {
        bail!(
            "there is no busybox for a guest without --root; run kernel-config/fetch, or give a --root"
        );
    }
    let overlay = args.root.as_ref().is_some_and(|root| root.options.overlay);
    // What nothing here needs is not loaded: each costs the guest time.
    let needed = |module: &String| {
        overlay && module.starts_with("overlay")
            || has_vsock(args) && module.contains("vsock")
            || module.starts_with("virtio_rng")
    };
    let modules = match &kernel.modules {
        Some(directory) => initramfs::load_order(directory)?.into_iter().filter(needed).collect(),
        None => Vec::new(),
    };
    let config = config(args, shares, modules);
    let files = args.container.as_ref().map(|bundle| files(bundle, identity)).transpose()?;
    let files = files.unwrap_or_default();
    let contents = initramfs::Contents {
        init: &assets.init,
        modules_dir: kernel.modules.as_deref(),
        busybox: assets.busybox.as_deref().filter(|_| args.root.is_none()),
        files: &files,
        config: &config,
    };
    initramfs::build(&contents).context("initramfs")
}

/// The files that the guest has copies of, whose owners are those that they would have in a share.
fn files(bundle: &Bundle, identity: &Identity) -> Result<Vec<initramfs::FileCopy>, UsageError> {
    let (uids, gids) = (identity.uid_map(&bundle.uid_map)?, identity.gid_map(&bundle.gid_map)?);
    Ok(bundle.files(&uids, &gids))
}

fn config(args: &RunArgs, shares: &[PlannedShare], modules: Vec<String>) -> Config {
    let root = args.root.as_ref().map(|root| &root.options);
    let share = |planned: &PlannedShare, path: &str| Share {
        tag: planned.tag.clone(),
        path: path.into(),
        read_only: planned.options.read_only || planned.options.overlay,
        dax: planned.options.dax,
    };
    let mut planned = shares.iter();
    let root = root.and_then(|options| {
        let share = share(planned.next()?, "/");
        Some(Root { share, overlay: options.overlay })
    });
    let live = args.live.iter().map(|live| Share {
        tag: live_tag(live),
        path: live.guest.clone(),
        read_only: live.options.read_only,
        dax: live.options.dax,
    });
    let shares = planned.zip(&args.shares).map(|(planned, arg)| share(planned, &arg.guest));
    let mut shares: Vec<_> = shares.collect();
    let container = args.container.as_ref().map(|bundle| {
        let binds = shares.split_off(shares.len().saturating_sub(bundle.binds()));
        bundle.container(&binds)
    });
    shares.extend(live);
    let args_or_shell = match args.command.as_slice() {
        [] => vec!["sh".to_string()],
        command => command.to_vec(),
    };
    let process = Process {
        args: args_or_shell,
        env: match &args.container {
            Some(_) => args.env.clone(),
            None => environment(args),
        },
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        terminal: args.tty,
        stdin: args.interactive,
        confinement: args
            .container
            .as_ref()
            .map(|bundle| bundle.confinement.clone())
            .unwrap_or_default(),
    };
    let hostname = args.hostname.clone();
    Config { modules, root, shares, hostname, container, process, agent: has_vsock(args) }
}

/// The defaults, and over them what `--env` says: the last of a name counts.
fn environment(args: &RunArgs) -> Vec<String> {
    let mut env = vec![PATH.to_string(), format!("HOSTNAME={}", args.hostname)];
    if args.tty {
        env.push(values::term());
    }
    for entry in args.env.iter().filter_map(|entry| values::environment_entry(entry)) {
        let name = entry.split_inclusive('=').next().unwrap_or_default().to_string();
        env.retain(|other| !other.starts_with(&name));
        env.push(entry);
    }
    env
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Wrapper {
        #[command(flatten)]
        args: RunArgs,
    }

    fn args(words: &[&str]) -> RunArgs {
        Wrapper::parse_from([&["run"], words].concat()).args
    }

    #[test]
    fn tags_are_given_and_never_twice() {
        let planned =
            shares(&args(&["--root", "/", "-v", "/tmp:/t", "-v", "/tmp:/u:tag=x"])).unwrap();
        let tags: Vec<_> = planned.iter().map(|share| share.tag.as_str()).collect();
        assert_eq!(tags, ["root", "share0", "x"]);
        let error = shares(&args(&["-v", "/tmp:/t:tag=x", "-v", "/tmp:/u:tag=x"])).err().unwrap();
        assert!(error.downcast_ref::<UsageError>().is_some(), "{error:#}");
    }

    #[test]
    fn the_place_for_shares_is_a_device_like_any_other() {
        let args = args(&["-v", "/tmp:/t", "--shares", "/s:tag=kataShared,window=4M,ro"]);
        let planned = shares(&args).unwrap();
        let live = live(&args, &planned).unwrap().unwrap();
        assert_eq!((live.guest.as_str(), live.tag.as_str()), ("/s", "kataShared"));
        assert_eq!(live.window.bytes, 4 << 20);
        let config = config(&args, &planned, vec![]);
        assert_eq!(config.shares.len(), 2);
        assert_eq!((config.shares[1].path.as_str(), config.shares[1].read_only), ("/s", true));
        for (share, place) in [("/tmp:/t:tag=x", "/s:tag=x"), ("/tmp:/t:tag=shares", "/s")] {
            let args = super::tests::args(&["-v", share, "--shares", place]);
            let error = super::live(&args, &shares(&args).unwrap()).err().unwrap();
            assert!(error.downcast_ref::<UsageError>().is_some(), "{error:#}");
        }
    }

    #[test]
    fn the_process_keeps_what_its_shares_need() {
        let needs = |words: &[&str]| {
            let args = args(words);
            let shares = shares(&args).unwrap();
            let live = live(&args, &shares).unwrap();
            walls(&shares, live.as_ref(), Vec::new(), None, false).needs
        };
        let none = walls::Needs::default();
        let writes = walls::Needs { writes: true, ..none };
        assert_eq!(needs(&[]), none);
        assert_eq!(needs(&["--root", "/:overlay", "-v", "/tmp:/t:ro"]), none);
        assert_eq!(needs(&["-v", "/tmp:/t:ro", "-v", "/tmp:/u"]), writes);
        assert_eq!(needs(&["-v", "/tmp:/t:dev"]), walls::Needs { device_nodes: true, ..writes });
        assert_eq!(needs(&["-v", "/tmp:/t:ro,xattr=on"]), walls::Needs { trusted: true, ..none });
        let all = walls::Needs { file_capabilities: true, trusted: true, ..writes };
        assert_eq!(needs(&["-v", "/tmp:/t:xattr=on"]), all);
        assert_eq!(needs(&["--shares", "/s:ro"]), none);
        let live = walls::Needs { device_nodes: true, file_capabilities: true, ..writes };
        assert_eq!(needs(&["--shares", "/s"]), live);
        let args = args(&["--root", "/:overlay", "-v", "/tmp:/t"]);
        let shares = shares(&args).unwrap();
        let plan = walls(&shares, None, Vec::new(), None, false);
        assert_eq!(
            plan.shares.iter().map(|share| share.read_only).collect::<Vec<_>>(),
            [true, false]
        );
    }

    #[test]
    fn files_of_a_bundle_have_owners_as_the_process_that_serves_its_shares_sees_them() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("rootfs")).unwrap();
        let config = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": { "user": { "uid": 0, "gid": 0 }, "args": ["true"], "cwd": "/" },
            "root": { "path": "rootfs" },
            "mounts": [{ "destination": "/x", "type": "bind", "source": "config.json" }]
        });
        std::fs::write(directory.path().join("config.json"), config.to_string()).unwrap();
        let bundle = crate::bundle::load(&args(&[]), directory.path()).unwrap().container.unwrap();
        // Whoever runs this, as root or not: what it has made is the guest root's.
        let identity = Identity::of_process(false).unwrap();
        let files = files(&bundle, &identity).unwrap();
        assert_eq!((files.len(), files[0].uid, files[0].gid), (1, 0, 0));
    }

    #[test]
    fn what_is_no_directory_is_named() {
        for path in ["/nonexistent", "/etc/passwd"] {
            let error = shares(&args(&["-v", &format!("{path}:/t")])).err().unwrap();
            assert!(format!("{error:#}").contains(path), "{error:#}");
        }
    }

    #[test]
    fn the_last_value_of_a_variable_counts() {
        let env =
            environment(&args(&["-e", "A=1", "-e", "PATH=/x", "-e", "A=2", "-e", "NOT_SET_HERE"]));
        assert_eq!(env, ["HOSTNAME=oriel", "PATH=/x", "A=2"]);
    }

    #[test]
    fn the_config_names_what_the_guest_mounts() {
        let args = args(&["--root", "/:overlay", "-v", "/tmp:/t:ro", "--", "ls", "-l"]);
        let config = config(&args, &shares(&args).unwrap(), vec![]);
        assert!(config.root.unwrap().overlay);
        assert_eq!(config.shares.len(), 1);
        assert!(config.shares[0].read_only);
        assert_eq!(config.shares[0].path, "/t");
        assert_eq!(config.process.args, ["ls", "-l"]);
    }
}
