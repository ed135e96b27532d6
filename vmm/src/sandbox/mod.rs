//! One sandbox from the command line to its exit status.

mod plan;
mod streams;
mod terminal;

use std::io::Write;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use devices::dax::{DaxWindow, Window};
use devices::fuse::Session;
use devices::serial::SerialPort;
use devices::share::{self, CachePolicy, DaxPolicy, Share};
use devices::virtio::console::{ConsoleDevice, Port, PortInput};
use devices::virtio::fs;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use indicatif::{ProgressBar, ProgressStyle};
use oriel_init::protocol::{
    CONTROL_PORT, Dax, FromGuest, FromHost, STDERR_PORT, STDIN_PORT, STDOUT_PORT,
};
use rustix::process::Signal;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::plan::PlannedShare;
use self::streams::{Console, Messages, Notifier, Output, Tail};
use self::terminal::RawTerminal;
use crate::cli::{Cache, ConsoleTarget, RunArgs, STATUS_SANDBOX, UsageError};
use crate::machine::{Machine, MachineConfig, StopReason};
use crate::{host, kernel};

/// A boot that takes longer than this shows that it goes on.
const PROGRESS_AFTER: Duration = Duration::from_secs(2);
/// As many times must the user ask before a command that does not end is ended with its sandbox.
const PATIENCE: u32 = 3;
/// Input is read from the user no faster than COM1 takes it.
const INPUT_AHEAD: usize = 64 << 10;
const INPUT_PAUSE: Duration = Duration::from_millis(2);

/// What the main thread waits for.
#[derive(Debug, PartialEq, Eq)]
pub enum Event {
    /// A message of `oriel-init`.
    Guest(FromGuest),
    /// The guest cannot go on.
    Stopped(StopReason),
    /// Nobody reads the command's output any more.
    OutputClosed,
    /// All that the guest has sent is where it belongs.
    Drained,
}

/// Runs the sandbox that `args` describe and returns the exit status.
///
/// # Errors
///
/// When it could not be started, or broke down: one line that says why.
pub fn run(args: &RunArgs) -> Result<u8> {
    let shares = plan::shares(args)?;
    let host_cpus = host::cpus();
    if usize::from(args.cpus) > host_cpus {
        bail!("--cpus {}: the host has {host_cpus}; give at most as many", args.cpus);
    }
    let (asked, total) = (args.memory.size >> 20, host::total_memory()? >> 20);
    if asked > total {
        bail!("--memory {asked}M: the host has {total}M in all; give less");
    }
    let kvm = host::open_kvm()?;
    host::raise_open_file_limit();
    // File modes are the guest's to choose; it has applied its own umask already.
    rustix::process::umask(rustix::fs::Mode::empty());

    let progress = Progress::start();
    let image =
        plan::boot_image(args, kernel::find(args.kernel.as_deref(), !args.no_unpack)?, &shares)?;

    let (sender, events) = channel();
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).context("eventfd")?);
    let notifier = Notifier::new(sender, wake.clone());
    let tail = Tail::default();
    let stopped = notifier.clone();
    let config = MachineConfig {
        cpus: args.cpus,
        memory: args.memory.clone(),
        serial: Box::new(Console { target: console_target(args)?, tail: tail.clone() }),
        on_stop: Arc::new(move |reason| stopped.send(Event::Stopped(reason))),
    };
    let mut machine = Machine::new(kvm, config)?;
    let mut sessions = Vec::new();
    for share in &shares {
        let session = add_share(&mut machine, share, args.cpus)?;
        sessions.push((share.tag.clone(), session));
    }
    // A foreign init knows nothing of our ports: it has COM1 alone.
    let foreign = args.initrd.is_some();
    let link = if foreign { None } else { Some(Link::new(&mut machine, &notifier)?) };
    let raw = args.tty.then(RawTerminal::enter).transpose()?;
    machine.start(&image)?;
    drop(image);

    match &link {
        _ if !args.interactive => {}
        Some(link) => forward_input(Sink::Port(link.stdin.clone()))?,
        None => forward_input(Sink::Serial(machine.serial().clone()))?,
    }
    let supervisor = Supervisor {
        wake,
        events,
        notifier,
        signals: Signals::new()?,
        link,
        progress,
        outcome: Outcome::default(),
        terminal: args.tty,
        draining: false,
    };
    supervisor.resize();
    let outcome = supervisor.wait()?;
    machine.stop();
    drop(raw);
    let status = outcome.status(foreign, &tail);
    if let Some(path) = &args.stats {
        write_stats(path, &sessions)?;
    }
    status
}

/// Puts a virtio-fs device on the machine.
fn add_share(machine: &mut Machine, share: &PlannedShare, cpus: u8) -> Result<Arc<Session>> {
    let name = share.host.display();
    let options = &share.options;
    let window = match options.window {
        0 => None,
        size => {
            let window = Window::new(size).with_context(|| {
                format!("--share {name}: no address space for a window of {} MiB", size >> 20)
            })?;
            Some(Arc::new(window))
        }
    };
    let mut served = share::Options::new(&share.host);
    served.read_only = options.read_only;
    served.xattr = true;
    // overlayfs refuses a lower directory that would be mounted on first use.
    served.submounts = !options.overlay;
    served.cache = match options.cache {
        Cache::Never => CachePolicy::Never,
        Cache::Metadata => CachePolicy::Metadata,
        Cache::Auto => CachePolicy::Auto,
        Cache::Always => CachePolicy::Always,
    };
    served.dax = match options.dax {
        Dax::Never => DaxPolicy::Never,
        Dax::Inode => DaxPolicy::Inode,
        Dax::Always => DaxPolicy::Always,
    };
    let files = Share::new(served).with_context(|| format!("--share {name}"))?;
    let region = window.clone().map(|window| window as Arc<dyn DaxWindow>);
    let session = Arc::new(Session::new(Arc::new(files), region));
    let queues = options.queues.unwrap_or_else(|| cpus.into());
    let config = fs::Config::new(&share.tag, queues)
        .map_err(|error| UsageError(format!("--share {name}: {error}")))?;
    machine.add_fs(config, session.clone(), window).with_context(|| {
        format!(
            "--share {name}: the guest has no room for a window of {} MiB; give it a smaller window=",
            options.window >> 20
        )
    })?;
    Ok(session)
}

fn duplicate(stream: impl AsFd) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(stream, 3).context("a standard stream is closed")
}

fn console_target(args: &RunArgs) -> Result<Option<OwnedFd>> {
    let default = if args.initrd.is_some() { ConsoleTarget::Stdout } else { ConsoleTarget::None };
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

/// The way to `oriel-init` and its command: the console device (see `oriel_init::protocol`).
struct Link {
    console: Arc<ConsoleDevice>,
    stdin: PortInput,
    control: PortInput,
}

impl Link {
    fn new(machine: &mut Machine, notifier: &Notifier) -> Result<Self> {
        let stdout = Output::new(duplicate(rustix::stdio::stdout())?, notifier.clone());
        let stderr = Output::new(duplicate(rustix::stdio::stderr())?, notifier.clone());
        let ports: [(_, Option<Box<dyn Write + Send>>); 4] = [
            (STDIN_PORT, None),
            (STDOUT_PORT, Some(Box::new(stdout))),
            (STDERR_PORT, Some(Box::new(stderr))),
            (CONTROL_PORT, Some(Box::new(Messages::new(notifier.clone())))),
        ];
        let ports = ports.map(|(name, output)| Port { name: name.to_string(), output });
        let console = Arc::new(ConsoleDevice::new(ports.into()).context("virtio-console device")?);
        machine.add_console(console.clone())?;
        let input = |port| console.input(port).context("virtio-console device");
        let (stdin, control) = (input(0)?, input(3)?);
        Ok(Self { console, stdin, control })
    }

    fn tell(&self, message: &FromHost) {
        match serde_json::to_string(message) {
            // The guest reads its messages at once, unless it is up to no good.
            Ok(line) if !self.control.try_send(format!("{line}\n").as_bytes()) => {
                log::warn!("the guest does not listen: {line} is lost");
            }
            Ok(_) => {}
            Err(error) => log::error!("message not sent: {error}"),
        }
    }
}

/// Where standard input goes.
enum Sink {
    Port(PortInput),
    Serial(Arc<SerialPort>),
}

impl Sink {
    /// Returns when there is room for more. `false`: nobody takes it any more.
    fn send(&self, bytes: &[u8]) -> bool {
        match self {
            Self::Port(port) => port.send(bytes).is_ok(),
            Self::Serial(port) => {
                port.send(bytes);
                while port.queued() > INPUT_AHEAD {
                    std::thread::sleep(INPUT_PAUSE);
                }
                true
            }
        }
    }
}

/// Reads standard input on a thread of its own: it may be a file, which epoll does not take, and it may
/// never end.
fn forward_input(sink: Sink) -> Result<()> {
    let forward = move || {
        let mut buffer = vec![0; INPUT_AHEAD];
        loop {
            match rustix::io::read(rustix::stdio::stdin(), &mut buffer) {
                Ok(0) | Err(rustix::io::Errno::IO) => break,
                Ok(count) => {
                    if !sink.send(buffer.get(..count).unwrap_or_default()) {
                        break;
                    }
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => {
                    log::warn!("standard input: {error}");
                    break;
                }
            }
        }
        // A serial line has no end.
        if let Sink::Port(port) = sink {
            port.close();
        }
    };
    std::thread::Builder::new().name("stdin".into()).spawn(forward).context("input thread")?;
    Ok(())
}

/// What is known of how the sandbox ended.
#[derive(Default)]
struct Outcome {
    message: Option<FromGuest>,
    reason: Option<StopReason>,
    /// The user's signal that ended it from outside.
    killed: Option<i32>,
}

impl Outcome {
    fn status(&self, foreign: bool, tail: &Tail) -> Result<u8> {
        if let Some(signal) = self.killed {
            return Ok(128u8.saturating_add(u8::try_from(signal).unwrap_or(u8::MAX)));
        }
        match (&self.message, &self.reason) {
            (Some(FromGuest::Exited { status }), _) => return Ok(*status),
            (Some(FromGuest::Failed { message }), _) => bail!("{message}"),
            (_, Some(StopReason::PowerOff)) if foreign => return Ok(0),
            _ => {}
        }
        let text = tail.text();
        if !foreign && !text.trim().is_empty() {
            eprintln!("--- the end of the guest's console ---\n{}\n---", text.trim_end());
        }
        match &self.reason {
            Some(StopReason::Crashed(what)) => bail!("the guest cannot go on: {what}"),
            Some(StopReason::PowerOff) => bail!("the guest powered off before the command ended"),
            Some(StopReason::Reset) => bail!(
                "the guest reset itself (status {STATUS_SANDBOX}): a reboot, or a kernel that panicked; see \
                 --console"
            ),
            None => bail!("the sandbox was left"),
        }
    }
}

/// The signals that are the user's to send, each a pipe that the event loop watches.
struct Signals(Vec<(i32, UnixStream)>);

impl Signals {
    fn new() -> Result<Self> {
        let watched = [Signal::INT, Signal::TERM, Signal::HUP, Signal::QUIT, Signal::WINCH];
        let mut pipes = Vec::new();
        for signal in watched.map(Signal::as_raw) {
            let (reader, writer) = UnixStream::pair().context("signal pipe")?;
            reader.set_nonblocking(true).context("signal pipe")?;
            signal_hook::low_level::pipe::register(signal, writer).context("signal handler")?;
            pipes.push((signal, reader));
        }
        Ok(Self(pipes))
    }
}

/// Follows a running sandbox to its end.
struct Supervisor {
    wake: Arc<EventFd>,
    events: Receiver<Event>,
    notifier: Notifier,
    signals: Signals,
    /// When `oriel-init` is at its other end.
    link: Option<Link>,
    progress: Progress,
    outcome: Outcome,
    terminal: bool,
    /// The guest is at its end, and its output is on the way.
    draining: bool,
}

impl Supervisor {
    fn wait(self) -> Result<Outcome> {
        let mut manager = EventManager::<Box<Watch>>::new().context("event loop")?;
        let watch = Box::new(Watch { supervisor: self, patience: PATIENCE, done: false });
        let id = manager.add_subscriber(watch);
        loop {
            manager.run().context("event loop")?;
            if manager.subscriber_mut(id).context("event loop")?.done {
                break;
            }
        }
        let watch = manager.remove_subscriber(id).context("event loop")?;
        watch.supervisor.progress.finish();
        Ok(watch.supervisor.outcome)
    }

    /// Tells the guest the terminal's size.
    fn resize(&self) {
        if let (true, Some(link), Some((rows, columns))) =
            (self.terminal, &self.link, terminal::size())
        {
            link.tell(&FromHost::Resize { rows, columns });
        }
    }

    /// The guest says no more, but what it has said may not be written yet, and may not be for long: nobody
    /// has to read our output now. That is waited for on a thread, so that signals still count.
    fn drain(&mut self) {
        if std::mem::replace(&mut self.draining, true) {
            return;
        }
        let (console, notifier) =
            (self.link.as_ref().map(|link| link.console.clone()), self.notifier.clone());
        let drain = move || {
            if let Some(console) = console {
                console.finish();
            }
            notifier.send(Event::Drained);
        };
        if let Err(error) = std::thread::Builder::new().name("drain".into()).spawn(drain) {
            log::error!("output may be lost: {error}");
            self.notifier.send(Event::Drained);
        }
    }
}

struct Watch {
    supervisor: Supervisor,
    patience: u32,
    done: bool,
}

impl Watch {
    fn handle(&mut self, event: Event) {
        let supervisor = &mut self.supervisor;
        match event {
            Event::Guest(FromGuest::Started) => {
                supervisor.progress.finish();
                supervisor.outcome.message.get_or_insert(FromGuest::Started);
            }
            Event::Guest(message) => {
                // The first word counts: nothing that the guest says later undoes it.
                let ended = matches!(
                    supervisor.outcome.message,
                    Some(FromGuest::Exited { .. } | FromGuest::Failed { .. })
                );
                if !ended {
                    supervisor.outcome.message = Some(message);
                }
                supervisor.drain();
            }
            Event::Stopped(reason) => {
                supervisor.outcome.reason.get_or_insert(reason);
                supervisor.drain();
            }
            Event::Drained => self.done = true,
            Event::OutputClosed => self.signal_guest(Signal::PIPE.as_raw()),
        }
    }

    fn signal_guest(&self, number: i32) {
        if let Some(link) = &self.supervisor.link {
            link.tell(&FromHost::Signal { number });
        }
    }

    /// A signal goes to the command, once there is one. Without one, or when it does not end by it, it ends
    /// the sandbox.
    fn signal(&mut self, number: i32) {
        if number == Signal::WINCH.as_raw() {
            return self.supervisor.resize();
        }
        let running = self.supervisor.outcome.message == Some(FromGuest::Started)
            && !self.supervisor.draining;
        self.patience = self.patience.saturating_sub(1);
        if running && self.patience > 0 {
            self.signal_guest(number);
        } else {
            self.supervisor.outcome.killed = Some(number);
            self.done = true;
        }
    }
}

impl MutEventSubscriber for Watch {
    fn process(&mut self, events: Events, _: &mut EventOps) {
        let source = events.fd();
        let signals = &self.supervisor.signals.0;
        let signal = signals.iter().find(|(_, pipe)| pipe.as_raw_fd() == source);
        if let Some((number, pipe)) = signal {
            let number = *number;
            let mut bytes = [0; 64];
            // Several of one signal are one.
            let _ = rustix::io::read(pipe, &mut bytes);
            return self.signal(number);
        }
        if let Err(error) = self.supervisor.wake.read() {
            log::debug!("woken for nothing: {error}");
        }
        while let Ok(event) = self.supervisor.events.try_recv() {
            self.handle(event);
        }
    }

    fn init(&mut self, ops: &mut EventOps) {
        let pipes = self.supervisor.signals.0.iter().map(|(_, pipe)| pipe.as_raw_fd());
        let sources = pipes.chain([self.supervisor.wake.as_raw_fd()]);
        for source in sources {
            if let Err(error) = ops.add(Events::new_raw(source, EventSet::IN)) {
                log::error!("event loop: {error:?}");
            }
        }
    }
}

/// Says that a slow boot goes on, on a terminal only.
struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn start() -> Self {
        let bar = ProgressBar::no_length();
        if let Ok(style) = ProgressStyle::with_template("{spinner} booting the sandbox ({elapsed})")
        {
            bar.set_style(style);
        }
        bar.enable_steady_tick(PROGRESS_AFTER);
        Self { bar }
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// One object a share: tag, and what its session counted.
fn write_stats(path: &std::path::Path, sessions: &[(String, Arc<Session>)]) -> Result<()> {
    let shares: Vec<_> = sessions
        .iter()
        .map(|(tag, session)| {
            let counters: serde_json::Map<_, _> = session
                .counters()
                .snapshot()
                .into_iter()
                .map(|(name, value)| (name.to_string(), value.into()))
                .collect();
            serde_json::json!({ "tag": tag, "counters": counters })
        })
        .collect();
    let text = serde_json::to_string_pretty(&serde_json::json!({ "shares": shares }))?;
    std::fs::write(path, text + "\n")
        .with_context(|| format!("--stats {}: cannot be written", path.display()))
}
