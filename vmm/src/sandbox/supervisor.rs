//! Following a running sandbox to its end.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use devices::virtio::vsock::VsockDevice;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use indicatif::{ProgressBar, ProgressStyle};
use oriel_init::protocol::{FromGuest, FromHost};
use rustix::process::Signal;
use vmm_sys_util::eventfd::EventFd;

use super::link::{Link, Sink, forward_input};
use super::streams::{Notifier, Tail};
use super::{Event, State, answers};
use crate::cli::detach::Release;
use crate::cli::{self, STATUS_SANDBOX};
use crate::logs::Log;
use crate::machine::StopReason;
use crate::signals::{self, Patience, Signals};
use crate::terminal::{self, RawTerminal};
use crate::walls::{self, Role};

/// A boot that takes longer than this shows that it goes on.
const PROGRESS_AFTER: Duration = Duration::from_secs(2);
/// How long host programs may take to read the last data that the guest has sent over vsock. Nobody has to read
/// there at all.
const LAST_DATA: Duration = Duration::from_secs(1);

/// What is known of how the sandbox ended.
#[derive(Default)]
pub struct Outcome {
    /// The last word of `oriel-init`.
    pub message: Option<FromGuest>,
    /// Why the machine stopped.
    pub reason: Option<StopReason>,
    /// Why the command's output could not be written.
    pub lost_output: Option<String>,
    /// The user's signal that ended it from outside.
    pub killed: Option<i32>,
    /// Whoever has started this process was left: it has no standard streams.
    pub detached: bool,
}

impl Outcome {
    /// The exit status. `foreign`: the init is not ours and says nothing; `tail` is the console's end.
    ///
    /// # Errors
    ///
    /// How the sandbox broke down.
    pub fn status(&self, foreign: bool, tail: &Tail) -> Result<u8> {
        if let Some(error) = &self.lost_output {
            bail!("the command's output cannot be written: {error}");
        }
        if let (Some(signal), false) =
            (self.killed, matches!(self.message, Some(FromGuest::Exited { .. })))
        {
            return Ok(signals::status_of(signal));
        }
        match (&self.message, &self.reason) {
            (Some(FromGuest::Exited { status }), _) => return Ok(*status),
            (Some(FromGuest::Refused { status, message }), _) => {
                return Ok(cli::refused(*status, message));
            }
            (Some(FromGuest::Failed { message }), _) => bail!("{message}"),
            (_, Some(StopReason::PowerOff)) if foreign => return Ok(0),
            _ => {}
        }
        let text = tail.text();
        if !foreign && !text.trim().is_empty() {
            let lines: Vec<_> = text.trim_end().lines().map(terminal::printable).collect();
            eprintln!("--- the end of the guest's console ---\n{}\n---", lines.join("\n"));
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

/// Follows a running sandbox to its end.
pub struct Supervisor {
    /// Readable when there are events.
    pub wake: Arc<EventFd>,
    /// What happened.
    pub events: Receiver<Event>,
    /// To send events to itself.
    pub notifier: Notifier,
    /// The user's signals.
    pub signals: Signals,
    /// When `oriel-init` is at its other end.
    pub link: Option<Link>,
    /// The sockets between guest and host.
    pub vsock: Option<Arc<VsockDevice>>,
    /// Shown until the command starts.
    pub progress: Progress,
    /// Told to whoever asks.
    pub state: Arc<answers::Progress>,
    /// What is known so far.
    pub outcome: Outcome,
    /// The sandbox goes on by itself once the command runs.
    pub released: Option<Release>,
    /// Where its output goes then.
    pub log: Option<Arc<Log>>,
    /// The command has a terminal.
    pub terminal: bool,
    /// It reads from the user, whose terminal is then raw while the command runs. Before and after, ^C is a
    /// signal to us.
    pub interactive: bool,
    /// Where standard input goes once the terminal is raw: keys that are typed before mean something else, as Ctrl-D
    /// does.
    pub keyboard: Option<Sink>,
    /// The user's terminal, once it is raw.
    pub raw: Option<RawTerminal>,
    /// The guest is at its end, and its output is on the way.
    pub draining: bool,
}

impl Supervisor {
    /// Waits for the end.
    ///
    /// # Errors
    ///
    /// The host's, of the event loop.
    pub fn wait(self) -> Result<Outcome> {
        let mut manager = EventManager::<Box<Watch>>::new().context("event loop")?;
        let patience = Patience::default();
        let watch = Box::new(Watch { supervisor: self, patience, done: false });
        let id = manager.add_subscriber(watch);
        loop {
            let pause =
                manager.subscriber_mut(id).context("event loop")?.supervisor.progress.show();
            manager.run_with_timeout(pause).context("event loop")?;
            if manager.subscriber_mut(id).context("event loop")?.done {
                break;
            }
        }
        let watch = manager.remove_subscriber(id).context("event loop")?;
        watch.supervisor.progress.finish();
        Ok(watch.supervisor.outcome)
    }

    /// Leaves whoever has started this process, if that was asked for and was not done yet.
    ///
    /// # Errors
    ///
    /// When they do not wait for it.
    pub fn detach(&mut self) -> Result<()> {
        if let Some(release) = self.released.take() {
            release.now().context("--detach")?;
            self.outcome.detached = true;
            if let Some(log) = &self.log {
                log.keep();
            }
        }
        Ok(())
    }

    /// The command runs, and what is typed from now on is for it.
    fn take_keyboard(&mut self) {
        if self.terminal && self.interactive {
            match RawTerminal::enter() {
                Ok(raw) => self.raw = Some(raw),
                Err(error) => log::warn!("{error:#}"),
            }
        }
        if let Some(sink) = self.keyboard.take()
            && let Err(error) = forward_input(sink)
        {
            log::error!("{error:#}");
        }
    }

    /// Tells the guest the terminal's size.
    pub fn resize(&self) {
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
        self.state.set(State::Ending);
        let console = self.link.as_ref().map(|link| link.console.clone());
        let (vsock, notifier) = (self.vsock.clone(), self.notifier.clone());
        let drain = move || {
            if let Some(vsock) = vsock {
                vsock.finish(LAST_DATA);
            }
            if let Some(console) = console {
                console.finish();
            }
            notifier.send(Event::Drained);
        };
        if let Err(error) = walls::start(Role::Main, "drain", drain) {
            log::error!("output may be lost: {error}");
            self.notifier.send(Event::Drained);
        }
    }
}

struct Watch {
    supervisor: Supervisor,
    patience: Patience,
    done: bool,
}

impl Watch {
    fn handle(&mut self, event: Event) {
        let supervisor = &mut self.supervisor;
        match event {
            // Said before, or after the end: a terminal that is raw already is not taken for what it was before.
            Event::Guest(FromGuest::Started) if supervisor.outcome.message.is_some() => {}
            Event::Guest(FromGuest::Started) => {
                supervisor.progress.finish();
                // One that is at its end stays there, whatever the guest says.
                if !supervisor.draining {
                    supervisor.state.set(State::Running);
                }
                supervisor.outcome.message = Some(FromGuest::Started);
                if let Err(error) = supervisor.detach() {
                    log::info!("{error:#}");
                    supervisor.outcome.killed = Some(Signal::TERM.as_raw());
                    self.done = true;
                    return;
                }
                supervisor.take_keyboard();
            }
            Event::Guest(message) => {
                // The first word counts: nothing that the guest says later undoes it.
                let ended = matches!(
                    supervisor.outcome.message,
                    Some(
                        FromGuest::Exited { .. }
                            | FromGuest::Refused { .. }
                            | FromGuest::Failed { .. }
                    )
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
            Event::OutputFailed(error) => {
                supervisor.outcome.lost_output.get_or_insert(error);
                self.done = true;
            }
            Event::StopAsked => self.signal(Signal::TERM.as_raw()),
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
        let enough = self.patience.ends_by(number);
        if running && !enough {
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
        if let Some(number) = self.supervisor.signals.take(source) {
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
        let wake = self.supervisor.wake.as_raw_fd();
        for source in self.supervisor.signals.sources().chain([wake]) {
            if let Err(error) = ops.add(Events::new_raw(source, EventSet::IN)) {
                log::error!("event loop: {error:?}");
            }
        }
    }
}

/// Says that a slow boot goes on, on a terminal only. The main thread moves it on: one that the library starts for that
/// would have no kind, and so the calls of all kinds, for as long as the guest likes to boot.
pub struct Progress {
    bar: ProgressBar,
    /// When it moves on.
    next: Instant,
}

impl Progress {
    /// Begins to count.
    pub fn start() -> Self {
        Self::on(ProgressBar::no_length())
    }

    fn on(bar: ProgressBar) -> Self {
        if let Ok(style) = ProgressStyle::with_template("{spinner} booting the sandbox ({elapsed})")
        {
            bar.set_style(style);
        }
        Self { bar, next: Instant::now() + PROGRESS_AFTER }
    }

    /// Moves it on when it is time to, and says how many milliseconds there are until the next time. Negative: there is
    /// none.
    fn show(&mut self) -> i32 {
        if self.bar.is_hidden() || self.bar.is_finished() {
            return -1;
        }
        let now = Instant::now();
        if now >= self.next {
            self.bar.tick();
            self.next = now + PROGRESS_AFTER;
        }
        // Rounded up, so that it is time then.
        let pause = self.next.saturating_duration_since(now).as_millis().saturating_add(1);
        i32::try_from(pause).unwrap_or(i32::MAX)
    }

    /// Takes it off the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::Mutex;

    use indicatif::{ProgressDrawTarget, TermLike};

    use super::*;

    /// Keeps what was written since the last line was cleared.
    #[derive(Clone, Debug, Default)]
    struct Screen(Arc<Mutex<String>>);

    impl TermLike for Screen {
        fn width(&self) -> u16 {
            80
        }
        fn move_cursor_up(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_down(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_right(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn move_cursor_left(&self, _: usize) -> io::Result<()> {
            Ok(())
        }
        fn write_line(&self, text: &str) -> io::Result<()> {
            self.write_str(text)
        }
        fn write_str(&self, text: &str) -> io::Result<()> {
            self.0.lock().unwrap().push_str(text);
            Ok(())
        }
        fn clear_line(&self) -> io::Result<()> {
            self.0.lock().unwrap().clear();
            Ok(())
        }
        fn flush(&self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_slow_boot_is_shown_from_the_calling_thread_until_the_command_starts() {
        let screen = Screen::default();
        let shown = || screen.0.lock().unwrap().trim().to_string();
        let target = ProgressDrawTarget::term_like(Box::new(screen.clone()));
        let mut progress = Progress::on(ProgressBar::with_draw_target(None, target));
        let pause = Duration::from_millis(progress.show().try_into().unwrap());
        assert!(pause > PROGRESS_AFTER / 2 && pause <= PROGRESS_AFTER + Duration::from_millis(1));
        assert_eq!(shown(), "");
        progress.next = Instant::now();
        assert!(progress.show() > 0);
        assert!(shown().contains("booting the sandbox"), "{}", shown());
        progress.finish();
        assert_eq!((progress.show(), shown().as_str()), (-1, ""));
        let hidden = ProgressBar::with_draw_target(None, ProgressDrawTarget::hidden());
        assert_eq!(Progress::on(hidden).show(), -1);
    }
}
