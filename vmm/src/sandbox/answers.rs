//! What a sandbox answers on its control socket, and what it says of itself there.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use oriel_init::protocol::{FromHost, LAST_SIGNAL};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Event;
use super::link::Link;
use super::metrics::openmetrics;
use super::shares::{ShareStatus, Shares};
use super::streams::Notifier;
use crate::control::Request;

/// How far a sandbox has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// The guest boots, or its init sets up what the command needs.
    Booting,
    /// The command runs, or an init of which nothing is known.
    Running,
    /// The command has ended, or the guest has stopped; its last output is on the way.
    Ending,
}

/// The same, for any thread to look at.
pub struct Progress(AtomicU8);

impl Progress {
    /// In a state.
    pub fn new(state: State) -> Self {
        Self(AtomicU8::new(state as u8))
    }

    /// From now on in this one.
    pub fn set(&self, state: State) {
        self.0.store(state as u8, Ordering::Release);
    }

    fn get(&self) -> State {
        let is = |state: &State| *state as u8 == self.0.load(Ordering::Acquire);
        let known = [State::Booting, State::Running, State::Ending];
        known.into_iter().find(is).unwrap_or(State::Ending)
    }
}

/// How a sandbox ended, for those who wait for it.
#[derive(Default)]
pub struct Ending {
    status: Mutex<Option<Result<u8, String>>>,
    known: Condvar,
}

/// What is told by [`Request::Wait`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ended {
    /// What `oriel run` exits with.
    pub status: u8,
}

/// How often is looked whether somebody still waits.
const STILL_THERE: Duration = Duration::from_secs(1);

impl Ending {
    /// It ended with this status, or broke down.
    pub fn set(&self, status: Result<u8, String>) {
        *self.status.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
        self.known.notify_all();
    }

    fn wait(&self, gone: &dyn Fn() -> bool) -> Result<Ended, String> {
        let mut status = self.status.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(status) = status.clone() {
                return status.map(|status| Ended { status });
            }
            if gone() {
                return Err("nobody waits".into());
            }
            let waited = self.known.wait_timeout(status, STILL_THERE);
            (status, _) = waited.unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// What is told by [`Request::Status`]. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// Its name.
    pub name: String,
    /// The process that is the sandbox: `oriel run`.
    pub pid: u32,
    /// How far it is.
    pub state: State,
    /// Since it was started.
    pub uptime_seconds: u64,
    /// Its vCPUs.
    pub cpus: u8,
    /// Its memory.
    pub memory: u64,
    /// The command; empty for a shell, and for an init that is not ours.
    pub command: Vec<String>,
    /// `oriel-init` is its init: there can be further commands. Where another one is, `oriel-init agent` may be
    /// one of its services; that is not known here.
    pub agent: bool,
    /// The socket where streams to ports of the guest begin, an absolute path.
    pub vsock: Option<PathBuf>,
    /// Its shares, the root first.
    pub shares: Vec<ShareStatus>,
}

/// What of that never changes.
pub struct About {
    /// See [`Status::name`].
    pub name: String,
    /// When it was started.
    pub since: Instant,
    /// See [`Status::cpus`].
    pub cpus: u8,
    /// See [`Status::memory`].
    pub memory: u64,
    /// See [`Status::command`].
    pub command: Vec<String>,
    /// See [`Status::vsock`].
    pub vsock: Option<PathBuf>,
}

/// Who answers.
pub struct Answers {
    /// What it is.
    pub about: About,
    /// How far it is.
    pub progress: Arc<Progress>,
    /// How it ended.
    pub ending: Arc<Ending>,
    /// Its shares.
    pub shares: Arc<Shares>,
    /// To the main thread.
    pub notifier: Notifier,
    /// To `oriel-init`, if that is the guest's init.
    pub link: Option<Link>,
}

impl Answers {
    /// Does what a client of the control socket asks, which may have `given` a descriptor along, and may be `gone`.
    /// Called by many threads at once.
    ///
    /// # Errors
    ///
    /// Why not, in a line.
    pub fn answer(
        &self,
        request: Request,
        given: Option<OwnedFd>,
        gone: &dyn Fn() -> bool,
    ) -> Result<Value, String> {
        match request {
            Request::Wait {} => value(&self.ending.wait(gone)?),
            Request::ShareResize { share, size } => value(&self.shares.resize(&share, size)?),
            Request::ShareAdd { host, path, options } => {
                value(&self.shares.live()?.add(&host, &path, &options, given)?)
            }
            Request::ShareRemove { path, force } => {
                value(&self.shares.live()?.remove(&path, force)?)
            }
            Request::ShareUpdate { path, read_only } => {
                value(&self.shares.live()?.update(&path, read_only)?)
            }
            Request::ShareList {} => value(&self.shares.live()?.list()),
            Request::Stats {} => Ok(self.shares.stats()),
            Request::Metrics {} => Ok(json!({ "openmetrics": openmetrics(&self.shares)? })),
            Request::Status {} => value(&self.status()),
            Request::Stop {} => {
                self.notifier.send(Event::StopAsked);
                Ok(json!({}))
            }
            Request::Signal { number } => self.signal(number),
        }
    }

    fn signal(&self, number: i32) -> Result<Value, String> {
        if !(1..=LAST_SIGNAL).contains(&number) {
            return Err(format!("signal {number}: there are 1 to {LAST_SIGNAL}"));
        }
        let Some(link) = &self.link else {
            return Err("its init is not oriel-init (--initrd), and takes no signals".into());
        };
        link.tell(&FromHost::Signal { number });
        Ok(json!({}))
    }

    fn status(&self) -> Status {
        let about = &self.about;
        Status {
            name: about.name.clone(),
            pid: std::process::id(),
            state: self.progress.get(),
            uptime_seconds: about.since.elapsed().as_secs(),
            cpus: about.cpus,
            memory: about.memory,
            command: about.command.clone(),
            agent: self.link.is_some(),
            vsock: about.vsock.clone(),
            shares: self.shares.status(),
        }
    }
}

/// As JSON.
pub(super) fn value(of: &impl Serialize) -> Result<Value, String> {
    serde_json::to_value(of).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;

    use vmm_sys_util::eventfd::EventFd;

    use super::super::shares::tests::shares;
    use super::*;

    #[test]
    fn a_sandbox_says_what_it_is_and_stops_when_it_is_asked() {
        let (sender, events) = channel();
        let wake = Arc::new(EventFd::new(0).unwrap());
        let answers = Answers {
            about: About {
                name: "box".into(),
                since: Instant::now(),
                cpus: 2,
                memory: 1 << 30,
                command: vec!["make".into(), "-j2".into()],
                vsock: None,
            },
            progress: Arc::new(Progress::new(State::Booting)),
            ending: Arc::default(),
            shares: Arc::new(shares()),
            notifier: Notifier::new(sender, wake.clone()),
            link: None,
        };
        let answer = |request| answers.answer(request, None, &|| false);
        let status = answer(Request::Status {}).unwrap();
        assert_eq!(status["state"], "booting");
        assert_eq!((&status["cpus"], &status["memory"]), (&json!(2), &json!(1u64 << 30)));
        assert_eq!(status["command"], json!(["make", "-j2"]));
        assert_eq!(status["pid"], std::process::id());
        assert_eq!(status["shares"][1]["tag"], "data");
        let back: Status = serde_json::from_value(status).unwrap();
        assert_eq!(back.shares.len(), 2);
        assert!(!back.agent);
        for state in [State::Running, State::Ending] {
            answers.progress.set(state);
            let status = answer(Request::Status {}).unwrap();
            assert_eq!(status["state"], value(&state).unwrap());
        }
        let text = answer(Request::Metrics {}).unwrap();
        assert!(text["openmetrics"].as_str().unwrap().ends_with("# EOF\n"));
        assert!(answer(Request::Stats {}).unwrap()["shares"].is_array());
        assert_eq!(answer(Request::Stop {}), Ok(json!({})));
        assert_eq!(events.try_recv(), Ok(Event::StopAsked));
        assert_eq!(wake.read().unwrap(), 1);
        for (number, hint) in
            [(9, "--initrd"), (0, "signal 0"), (65, "signal 65"), (-9, "signal -9")]
        {
            let error = answer(Request::Signal { number }).unwrap_err();
            assert!(error.contains(hint), "{error}");
        }
        assert!(answers.answer(Request::Wait {}, None, &|| true).is_err(), "nobody waits any more");
        thread::scope(|scope| {
            let waits = scope.spawn(|| answer(Request::Wait {}));
            answers.ending.set(Ok(7));
            assert_eq!(waits.join().unwrap(), Ok(json!({ "status": 7 })));
        });
        answers.ending.set(Err("broke down".into()));
        assert_eq!(answer(Request::Wait {}), Err("broke down".into()));
    }
}
