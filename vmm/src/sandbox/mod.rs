//! One sandbox from the command line to its exit status.

mod answers;
mod identity;
mod link;
mod live;
mod metrics;
mod plan;
mod shares;
mod streams;
mod supervisor;
mod userns;
mod window;

use std::fs::File;
use std::io::Write;
use std::mem::ManuallyDrop;
use std::os::fd::OwnedFd;
use std::path::{self, Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use devices::dax::{DaxWindow, Window};
use devices::fuse::{FileSystem, Session};
use devices::share::{self, DaxPolicy, LockLimits, Share, XattrPolicy};
use devices::tree::Tree;
use devices::virtio::fs::{self, Dispatch};
use devices::virtio::vsock::{self, VsockDevice};
use oriel_init::frames::Kind;
use oriel_init::protocol::{Dax, FromGuest};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::answers::{About, Answers, Ending};
pub use self::answers::{Ended, State, Status};
use self::identity::Identity;
use self::link::{Link, Sink, forward_input};
use self::live::Live;
pub use self::live::{Added, MemberList, MemberState, MemberStatus, RemovedShare, Updated};
use self::plan::{PlannedLive, PlannedShare};
pub use self::shares::Resized;
use self::shares::{RunningShare, Shares};
use self::streams::{Console, Notifier, Tail};
use self::supervisor::{Outcome, Progress, Supervisor};
use crate::cli::detach::Release;
use crate::cli::{ConsoleTarget, RunArgs, ShareOptions, UsageError, UserNamespace};
use crate::control::server::ControlSocket;
use crate::logs::Log;
use crate::machine::{Machine, MachineConfig, StopReason};
use crate::signals::Signals;
use crate::socket::ListeningSocket;
use crate::stdio::duplicate;
use crate::walls::Inside;
use crate::{agent, control, host, kernel, terminal, walls};

/// What the main thread waits for.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A message of `oriel-init`.
    Guest(FromGuest),
    /// The guest cannot go on.
    Stopped(StopReason),
    /// Nobody reads the command's output any more.
    OutputClosed,
    /// The command's output cannot be written, for this reason.
    OutputFailed(String),
    /// All that the guest has sent is where it belongs.
    Drained,
    /// Somebody wants the command to end, by the control socket.
    StopAsked,
}

/// vCPUs for each of the host's CPUs, at most: enough to try what a guest does with several where there is one,
/// and few enough that a guest still gets on, as one that waits for another keeps it from running.
const CPUS_PER_HOST_CPU: usize = 8;

/// Runs the sandbox that `args` describe and returns the exit status.
///
/// # Errors
///
/// When it could not be started, or broke down: one line that says why.
pub fn run(args: &RunArgs) -> Result<u8> {
    let since = Instant::now();
    let shares = plan::shares(args)?;
    let live = plan::live(args, &shares)?;
    // Before there is anything that would be left behind.
    let signals = Signals::new()?;
    // Before this user is another one.
    let named = args.name.as_deref().map(|name| Named::new(name, args)).transpose()?;
    // Before all that starts a thread.
    let entered = args.userns == UserNamespace::Auto && userns::enter()?;
    let identity = Arc::new(Identity::of_process(entered)?);
    let host_cpus = host::cpus();
    let most = host_cpus.saturating_mul(CPUS_PER_HOST_CPU);
    if usize::from(args.cpus) > most {
        bail!("--cpus {}: the host has {host_cpus}; give at most {most}", args.cpus);
    }
    if usize::from(args.cpus) > host_cpus {
        log::warn!("--cpus {}: the host has {host_cpus}, which they share", args.cpus);
    }
    let (asked, total) = (args.memory.size >> 20, host::total_memory()? >> 20);
    if asked > total {
        bail!("--memory {asked}M: the host has {total}M in all; give less");
    }
    if args.tty && args.interactive {
        terminal::check()?;
    }
    let stats = args.stats.as_deref().map(StatsFile::create).transpose()?;
    let kvm = host::open_kvm()?;
    let vsock = args.vsock.as_ref().map(|vsock| &vsock.path);
    let own_socket = vsock.map(|path| ListeningSocket::new(path).context("--vsock")).transpose()?;
    host::raise_open_file_limit();

    let image = plan::boot_image(
        args,
        kernel::find(args.kernel.as_deref(), !args.no_unpack)?,
        &shares,
        &identity,
    )?;

    let (sender, events) = channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("eventfd")?);
    let notifier = Notifier::new(sender, wake.clone());
    let tail = Tail::default();
    let stopped = notifier.clone();
    let config = MachineConfig {
        cpus: args.cpus,
        memory: args.memory.clone(),
        serial: Box::new(Console {
            target: console_target(args)?,
            log: named.as_ref().map(|named| named.log.clone()),
            line: Vec::new(),
            tail: tail.clone(),
        }),
        on_stop: Arc::new(move |reason| stopped.send(Event::Stopped(reason))),
    };
    // Never dropped: a worker may hang in a file system of the host that does not answer, and to wait for it
    // would be to hang too. The end of the process, which is near, gives everything back. Besides, to take a window or an
    // interrupt from KVM is not among the calls that the main thread has by then.
    let mut machine = ManuallyDrop::new(Machine::new(kvm, config)?);
    let released = named.as_ref().filter(|_| args.detach).map(|named| Release::new(&named.name));
    let released = released.transpose()?;
    let places = places(own_socket.as_ref(), named.as_ref())?;
    let logs = named.as_ref().map(|named| named.directory.clone());
    // Names of the host's mean nothing from here on.
    let inside = match args.no_sandbox {
        false => walls::raise(&plan::walls(&shares, live.as_ref(), places, logs, entered))?,
        true => {
            log::warn!(
                "--no-sandbox: a guest that takes over this process has all that this user has"
            );
            Inside::open()
        }
    };
    let progress = Progress::start();
    let sources = shares
        .iter()
        .enumerate()
        .map(|(number, share)| Source::Directory { share, found_at: inside.place_of(number) });
    let live = live.iter().map(|live| Source::Live { live, elsewhere: inside.is_elsewhere() });
    let sources: Vec<_> = sources.chain(live).collect();
    let mut running = Vec::new();
    for source in &sources {
        let limits = FileLimits::for_each_of(sources.len());
        running.push(add_share(&mut machine, source, args.cpus, limits, &identity)?);
    }
    let running = Arc::new(Shares(running));
    // A foreign init knows nothing of our ports: it has COM1 alone.
    let foreign = args.initrd.is_some();
    let log = named.as_ref().map(|named| &named.log);
    let link =
        if foreign { None } else { Some(Link::new(&mut machine, &notifier, log, args.detach)?) };
    let beside = named.as_ref().and_then(|named| named.vsock.as_ref());
    let vsock_socket = own_socket.as_ref().or(beside);
    let vsock = plan::has_vsock(args).then(|| add_vsock(&mut machine, args, vsock_socket));
    let vsock = vsock.transpose()?;
    machine.add_rng()?;
    // File modes are the guest's to choose; it has applied its own umask already. What this process makes for
    // itself (caches, logs) was made before, with the user's umask.
    rustix::process::umask(rustix::fs::Mode::empty());
    machine.start(&image)?;
    drop(image);
    for share in &running.0 {
        if let (Some(watch), Some(vsock)) = (&share.watch, &vsock) {
            agent::keep_told(watch.clone(), share.tag.clone(), vsock.clone())?;
        }
    }
    let state = if foreign { State::Running } else { State::Booting };
    let state = Arc::new(answers::Progress::new(state));
    let ending = Arc::new(Ending::default());
    if let (Some(named), Some(name)) = (&named, &args.name) {
        let about = About {
            name: name.clone(),
            since,
            cpus: args.cpus,
            memory: args.memory.size,
            command: args.command.clone(),
            vsock: vsock_socket.map(|socket| path::absolute(socket.path())).transpose()?,
        };
        let (progress, shares, notifier) = (state.clone(), running.clone(), notifier.clone());
        let ending = ending.clone();
        let answers = Answers { about, progress, ending, shares, notifier, link: link.clone() };
        let answer = move |request, given: Option<OwnedFd>, gone: &dyn Fn() -> bool| {
            answers.answer(request, given, gone)
        };
        named.control.serve(Arc::new(answer))?;
    }

    let mut keyboard = None;
    match &link {
        _ if !args.interactive => {}
        Some(link) if args.tty => keyboard = Some(Sink::Port(link.stdin.clone())),
        Some(link) => forward_input(Sink::Port(link.stdin.clone()))?,
        None => forward_input(Sink::Serial(machine.serial().clone()))?,
    }
    let mut supervisor = Supervisor {
        wake,
        events,
        notifier,
        signals,
        link,
        vsock,
        progress,
        state,
        outcome: Outcome::default(),
        released,
        log: named.as_ref().map(|named| named.log.clone()),
        terminal: args.tty,
        raw: None,
        interactive: args.interactive,
        keyboard,
        draining: false,
    };
    supervisor.resize();
    if foreign {
        // It does not say when it is ready.
        supervisor.detach()?;
        supervisor.progress.finish();
    }
    walls::enter(walls::Role::Main)?;
    // Not before: from here on no thread has the calls of all kinds.
    machine.release();
    let outcome = supervisor.wait()?;
    machine.stop();
    running.retire();
    let status = outcome.status(foreign, &tail);
    let written = stats.map_or(Ok(()), |stats| stats.write(&running));
    // How the sandbox broke down matters more than what was counted up to then.
    let status = status.and_then(|status| written.map(|()| status));
    let told = status.as_ref().map(|status| *status);
    let told = told.map_err(|error| terminal::printable(&format!("{error:#}")));
    if let Some(named) = &named {
        if let (Err(error), true) = (&told, outcome.detached) {
            // Nobody else hears of it.
            named.log.write(Kind::Stderr, format!("oriel: {error}\n").as_bytes());
        }
        ending.set(told);
        named.control.finish(LAST_ANSWERS);
    }
    status
}

/// How long those who wait for the sandbox's end may take to hear of it.
const LAST_ANSWERS: Duration = Duration::from_secs(1);

/// How many files one share may hold open, so that all together leave the process some.
struct FileLimits {
    descriptors: usize,
    handles: usize,
    lock_owners: usize,
}

impl FileLimits {
    /// Half of what the process may open for `shares` shares, half of that for their handles; a sixteenth for
    /// those who have locks on them; the rest is for windows and for the process itself.
    fn for_each_of(shares: usize) -> Self {
        let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
        let files = files.map_or(usize::MAX, |files| usize::try_from(files).unwrap_or(usize::MAX));
        let each = files / shares.max(1);
        Self { descriptors: each / 2, handles: each / 4, lock_owners: each / 16 }
    }
}

/// What a sandbox with a name has, beside one without.
struct Named {
    name: String,
    /// Where its sockets and logs are.
    directory: PathBuf,
    /// What it and its command write.
    log: Arc<Log>,
    control: ControlSocket,
    /// Where streams to its ports begin, unless it was given another place.
    vsock: Option<ListeningSocket>,
}

impl Named {
    fn new(name: &str, args: &RunArgs) -> Result<Self> {
        let option = || format!("--name {name}");
        let directory = control::directory().with_context(option)?;
        control::sweep(&directory);
        let control = ControlSocket::new(&directory, name).with_context(option)?;
        let path = args.vsock.is_none().then(|| control::vsock_path(&directory, name));
        let vsock =
            path.map(|path| ListeningSocket::new(&path)).transpose().with_context(option)?;
        let path = control::log_path(&directory, name);
        let log = Arc::new(Log::create(&path).with_context(option)?);
        Ok(Self { name: name.to_owned(), directory, log, control, vsock })
    }
}

/// The machine, which is never dropped, has the log as well.
impl Drop for Named {
    fn drop(&mut self) {
        self.log.end();
    }
}

/// The directories in which this process has something.
fn places(vsock: Option<&ListeningSocket>, named: Option<&Named>) -> Result<Vec<PathBuf>> {
    let mut places: Vec<_> = named.iter().map(|named| named.directory.clone()).collect();
    if let Some(socket) = vsock {
        let path = path::absolute(socket.path())?;
        places.extend(path.parent().map(Path::to_owned));
    }
    Ok(places)
}

/// Puts a socket device on the machine.
fn add_vsock(
    machine: &mut Machine,
    args: &RunArgs,
    socket: Option<&ListeningSocket>,
) -> Result<Arc<VsockDevice>> {
    let config = match &args.vsock {
        Some(vsock) => vsock.config,
        None => vsock::Config::new(vsock::config::MIN_GUEST_CID).context("virtio-vsock device")?,
    };
    let device = match socket {
        Some(socket) => {
            let listener = socket.listener().try_clone().context("virtio-vsock device")?;
            VsockDevice::new(config, listener, socket.path())
        }
        None => VsockDevice::without_clients(config),
    };
    let device = Arc::new(device.context("virtio-vsock device")?);
    machine.add_vsock(device.clone())?;
    Ok(device)
}

/// How the directory of a share is to be served, with a window of so many bytes.
fn served(
    directory: &Path,
    options: &ShareOptions,
    window: u64,
    limits: &FileLimits,
    identity: &Identity,
) -> Result<share::Options, UsageError> {
    let mut served = share::Options::new(directory);
    // With an overlay nothing is ever written to the directory, whatever the guest does about its overlay.
    served.read_only = options.read_only || options.overlay;
    // Where nothing is written, the guest may see what is there: a root file system has file capabilities.
    let by_default = if served.read_only { XattrPolicy::On } else { XattrPolicy::Mapped };
    served.xattr = options.xattr.unwrap_or(by_default);
    served.acl = options.acl;
    served.uids = identity.uid_map(&options.uid_map)?;
    served.gids = identity.gid_map(&options.gid_map)?;
    served.switch_identity = Some(identity.switches);
    served.max_descriptors = Some(limits.descriptors);
    served.max_handles = Some(limits.handles);
    // overlayfs refuses a lower directory that would be mounted on first use.
    served.submounts = !options.overlay;
    served.cache = options.cache;
    served.entry_timeout = options.entry_timeout;
    served.attr_timeout = options.attr_timeout;
    served.negative_timeout = options.negative_timeout;
    served.watch_limits.directories = options.watches.unwrap_or(served.watch_limits.directories);
    served.writeback = options.writeback;
    served.device_nodes = options.device_nodes;
    served.direct = options.direct;
    served.locks = options.locks;
    served.max_locks = Some(LockLimits::with_owners(limits.lock_owners));
    served.dax = match options.dax {
        Dax::Never => DaxPolicy::Never,
        Dax::Inode => DaxPolicy::Inode,
        Dax::Always => DaxPolicy::Always,
    };
    served.window = Some(window);
    served.trust_file_systems = options.dispatch == Dispatch::Inline;
    Ok(served)
}

/// Where a share comes from.
enum Source<'p> {
    /// A directory, and where it is now when that is not its name on the host.
    Directory { share: &'p PlannedShare, found_at: Option<PathBuf> },
    /// Directories that come and go. `elsewhere`: by no name of the host's.
    Live { live: &'p PlannedLive, elsewhere: bool },
}

/// Puts a virtio-fs device on the machine.
fn add_share(
    machine: &mut Machine,
    source: &Source<'_>,
    cpus: u8,
    limits: FileLimits,
    identity: &Arc<Identity>,
) -> Result<RunningShare> {
    let (name, tag, guest, options, choice) = match source {
        Source::Directory { share, .. } => {
            let name = format!("--share {}", share.host.display());
            (name, &share.tag, &share.guest, &share.options, &share.window)
        }
        Source::Live { live, .. } => {
            let name = format!("--shares {}", live.guest);
            (name, &live.tag, &live.guest, &live.options, &live.window)
        }
    };
    let window = match choice.bytes {
        0 => None,
        size => {
            let max = choice.max;
            let window = Window::growable(size, max).with_context(|| {
                format!("{name}: no address space for a window of {} MiB", max >> 20)
            })?;
            if !options.prefault {
                window.never_prefault();
            }
            Some(Arc::new(window))
        }
    };
    let (directory, found_at) = match source {
        Source::Directory { share, found_at } => (share.host.as_path(), found_at.clone()),
        // Nothing is served of it.
        Source::Live { .. } => (Path::new("/"), None),
    };
    let mut served = served(directory, options, choice.bytes, &limits, identity)
        .map_err(|error| UsageError(format!("{name}: {error}")))?;
    served.found_at = found_at;
    let mut watch = None;
    let region = window.clone().map(|window| window as Arc<dyn DaxWindow>);
    let mut live = None;
    let files: Arc<dyn FileSystem> = match source {
        Source::Directory { share, .. } => {
            served.alone = share.alone;
            let share = Share::new(served).with_context(|| name.clone())?;
            watch = share.watch().cloned();
            Arc::new(share)
        }
        Source::Live { elsewhere, .. } => {
            let tree = Arc::new(Tree::new(served, region.clone()));
            let (guest, options) = (guest.clone(), options.clone());
            let identity = identity.clone();
            let elsewhere = *elsewhere;
            live = Some(Live { tree: tree.clone(), guest, options, limits, identity, elsewhere });
            tree
        }
    };
    let session = Arc::new(Session::new(files, region));
    let queues = options.queues.unwrap_or_else(|| cpus.into());
    let config =
        fs::Config::new(tag, queues).map_err(|error| UsageError(format!("{name}: {error}")))?;
    let device = machine.add_fs(config, session.clone(), window.clone(), options.dispatch);
    let device = device.with_context(|| {
        format!(
            "{name}: the guest has no room for a window of {} MiB; give it a smaller window= or window-max=",
            choice.max >> 20
        )
    })?;
    let (tag, guest, window_reason) = (tag.clone(), guest.clone(), choice.reason.clone());
    Ok(RunningShare { tag, guest, session, window, window_reason, device, watch, live })
}

fn console_target(args: &RunArgs) -> Result<Option<OwnedFd>> {
    let default = if args.initrd.is_some() && !args.detach {
        ConsoleTarget::Stdout
    } else {
        ConsoleTarget::None
    };
    Ok(match args.console.as_ref().unwrap_or(&default) {
        ConsoleTarget::None => None,
        ConsoleTarget::Stdout => Some(duplicate(rustix::stdio::stdout())?),
        ConsoleTarget::Stderr => Some(duplicate(rustix::stdio::stderr())?),
        ConsoleTarget::File(path) => {
            let file = std::fs::File::create(path)
                .with_context(|| format!("--console {}: cannot be written", path.display()))?;
            Some(file.into())
        }
    })
}

/// The file of `--stats`, made before the guest starts: a command that ran shall not be lost to a typing
/// error.
struct StatsFile<'a> {
    path: &'a Path,
    file: File,
}

impl<'a> StatsFile<'a> {
    fn create(path: &'a Path) -> Result<Self> {
        let file = File::create(path)
            .with_context(|| format!("--stats {}: cannot be written", path.display()))?;
        Ok(Self { path, file })
    }

    fn write(mut self, shares: &Shares) -> Result<()> {
        let text = serde_json::to_string_pretty(&shares.stats())?;
        writeln!(self.file, "{text}")
            .with_context(|| format!("--stats {}: cannot be written", self.path.display()))
    }
}
