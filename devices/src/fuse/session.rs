//! One guest's use of one file system, from INIT to DESTROY.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::abi::{BatchForgetIn, ForgetOne, InHeader, InitFlags, InterruptIn};
use super::counters::Counters;
use super::errno::{Errno, Result};
use super::filesystem::FileSystem;
use super::init;
use super::later::{Deferral, Deferred, Served, Wait, Waiting};
use super::mapping::Mappings;
use super::opcode::{Answer, Limits, Opcode};
use super::reply::Reply;
use super::request::{Body, Header, read_raw_header};
use crate::dax::DaxWindow;
use crate::memory::GuestBuffer;

/// What takes longer than this was not served at once: some hundred times what such a request takes, and less than a
/// person notices.
const AT_ONCE: Duration = Duration::from_millis(50);

/// So many nodes are forgotten at once.
const FORGOTTEN_AT_ONCE: usize = 64;

/// Serves the requests of a virtio-fs device's queues. Shared by all threads that do so.
///
/// Requests are served in any order and at once; the guest orders what it needs ordered. The session begins
/// with INIT and ends with DESTROY, with a second INIT, or with [`reset`](Self::reset).
pub struct Session {
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) mappings: Option<Mappings>,
    pub(super) counters: Arc<Counters>,
    begun: AtomicBool,
    /// The flags that the last INIT agreed on.
    agreed: AtomicU64,
    waiting: Waiting,
}

impl Session {
    /// A session that waits for its INIT. Without a `window`, there is no DAX.
    pub fn new(fs: Arc<dyn FileSystem>, window: Option<Arc<dyn DaxWindow>>) -> Self {
        let counters = Arc::new(Counters::default());
        Self {
            fs,
            mappings: window.map(Mappings::new),
            begun: AtomicBool::new(false),
            agreed: AtomicU64::new(0),
            waiting: Waiting::new(counters.clone()),
            counters,
        }
    }

    /// Serves one request from `request` (the chain's readable part) into `reply` (its writable part).
    ///
    /// May block as long as the host's file system does, but not for a lock: a request that has to wait for
    /// one is answered through `deferral`. Called from any thread, any number at once.
    pub fn serve(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        deferral: &dyn Deferral,
    ) -> Served {
        self.serve_request(request, reply, Some(deferral), false).unwrap_or(Served::Done(0))
    }

    /// The same for a thread that must not wait, such as a vCPU's. `None` when it would have to: then nothing
    /// was done, and the request is to be served by [`serve`](Self::serve).
    pub fn serve_at_once(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        deferral: &dyn Deferral,
    ) -> Option<Served> {
        self.serve_request(request, reply, Some(deferral), true)
    }

    /// Serves one request of the high priority queue, as [`serve`](Self::serve) does, and returns the length
    /// of the reply. Only what has no reply is served: FORGET, BATCH_FORGET and INTERRUPT (virtio 1.3,
    /// 5.11.6.2). All else is `EINVAL`, so that nothing there ever takes long.
    pub fn serve_urgent(&self, request: &GuestBuffer<'_>, reply: &GuestBuffer<'_>) -> u32 {
        urgent_length(self.serve_request(request, reply, None, false)).unwrap_or(0)
    }

    /// As [`serve_urgent`](Self::serve_urgent), for a thread that must not wait: see
    /// [`serve_at_once`](Self::serve_at_once).
    pub fn serve_urgent_at_once(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
    ) -> Option<u32> {
        urgent_length(self.serve_request(request, reply, None, true))
    }

    /// Without a `deferral` the request is an urgent one. `None`, only for one that is to be served `at_once`, when
    /// it cannot.
    fn serve_request(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        deferral: Option<&dyn Deferral>,
        at_once: bool,
    ) -> Option<Served> {
        // A page of a file may have to be read before it can be touched.
        if at_once && (request.touches_window() || reply.touches_window()) {
            return None;
        }
        let since = Instant::now();
        // A header that cannot even be read (its window page is gone) is answered without its `unique`.
        let (raw, read) = match read_raw_header(request) {
            Ok(raw) => (raw, Ok(())),
            Err(errno) => (InHeader::default(), Err(errno)),
        };
        let reply = Reply::new(reply, raw.unique);
        let checked = read.and_then(|()| Header::check(raw, request));
        let (header, limits) = match checked {
            Ok(checked) => checked,
            Err(errno) => {
                Counters::add(&self.counters.malformed, 1);
                if super::opcode::find(raw.opcode)
                    .is_some_and(|known| known.answer == Answer::Never)
                {
                    return Some(Served::Done(0));
                }
                Counters::add(&self.counters.errors, 1);
                return Some(Served::Done(reply.finish(Err(errno))));
            }
        };
        if at_once && !self.may_be_tried(limits.opcode, &header) {
            return None;
        }
        let header = Header { at_once, ..header };
        if limits.answer == Answer::Never {
            self.counters.count(limits.opcode);
            self.unanswered(limits, &header, request);
            let took = since.elapsed();
            self.note_time(&header, took);
            self.counters.finish(limits.opcode, took, false);
            return Some(Served::Done(0));
        }
        if !at_once {
            self.counters.count(limits.opcode);
        }
        let result = match deferral {
            Some(deferral) => self.answered(limits, &header, request, &reply, deferral, since),
            None => Err(Errno::INVAL),
        };
        if at_once {
            self.note_time(&header, since.elapsed());
            // Who serves it then counts it.
            if matches!(result, Err(Errno::WOULD_WAIT)) {
                return None;
            }
            self.counters.count(limits.opcode);
        }
        let Some(result) = result.transpose() else {
            // Whoever answers it later counts how long it took.
            return Some(Served::Later);
        };
        let failed = result.is_err();
        let used = reply.finish(result);
        let took = since.elapsed();
        self.counters.finish(limits.opcode, took, failed);
        if let Some(part) = self.fs.counters_of(header.raw.nodeid) {
            part.count(limits.opcode);
            part.finish(limits.opcode, took, failed);
        }
        Some(Served::Done(used))
    }

    /// What was tried without waiting took this long.
    fn note_time(&self, header: &Header, took: Duration) {
        if header.at_once && took > AT_ONCE {
            Counters::add(&self.counters.slow_at_once, 1);
            self.fs.was_slow(header.raw.nodeid);
        }
    }

    /// Whether a thread that must not wait may try a request. Most of those that it may are done then.
    fn may_be_tried(&self, opcode: Opcode, header: &Header) -> bool {
        // Before the replies after a repair the host is asked how long files are.
        if self.mappings.as_ref().is_some_and(Mappings::asks_the_host) {
            return false;
        }
        match opcode {
            // Their work has no bound that is short: what is held for the session, what is dirty, what is copied or
            // allocated. And what waits for a lock takes a thread.
            Opcode::Init
            | Opcode::Destroy
            | Opcode::Fsync
            | Opcode::Fsyncdir
            | Opcode::Syncfs
            | Opcode::Fallocate
            | Opcode::CopyFileRange
            | Opcode::CopyFileRange64
            | Opcode::Ioctl
            | Opcode::Setlkw => false,
            Opcode::Interrupt | Opcode::NotifyReply => true,
            Opcode::Forget => self.fs.all_answer_at_once(true),
            Opcode::BatchForget => {
                header.body
                    <= size_of::<BatchForgetIn>() + FORGOTTEN_AT_ONCE * size_of::<ForgetOne>()
                    && self.fs.all_answer_at_once(true)
            }
            // Under the lock of the mappings files of all nodes are looked at.
            Opcode::Setupmapping | Opcode::Removemapping => self.fs.all_answer_at_once(false),
            _ => self.fs.answers_at_once(header.raw.nodeid),
        }
    }

    /// Device reset: the guest is gone. Drops every node, handle and lock and empties the window; the next
    /// request must be INIT. Requests that wait for a lock are asked to stop. Does not wait for them, nor for
    /// requests that are being served: what they hold goes when they end. Idempotent.
    pub fn reset(&self) {
        self.begun.store(false, Ordering::Release);
        // Before the locks go that they wait for: those need not be granted any more.
        self.waiting.clear();
        // The nodes first. A SETUPMAPPING that saw the session before it ended, and sleeps, then wakes up
        // to a node id that is never valid again, or has its file open from before and is turned away by
        // `Mappings::clear`. The other way round it could map the old file into the cleared window.
        self.fs.clear();
        if let Some(mappings) = &self.mappings {
            mappings.clear();
        }
    }

    /// Whether a flag was agreed on. Only of use to a request that saw the session begun.
    pub(super) fn agreed_on(&self, flag: InitFlags) -> bool {
        InitFlags::from_bits_truncate(self.agreed.load(Ordering::Relaxed)).contains(flag)
    }

    /// What the session did so far.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// See [`FileSystem::window_has_grown`].
    pub fn window_has_grown(&self, size: u64) {
        self.fs.window_has_grown(size);
    }

    /// The counters with their names, and what the window and the file system add to them.
    pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
        let mut all = self.counters.snapshot();
        all.extend(self.mappings.iter().flat_map(Mappings::statistics));
        all.extend(self.fs.statistics());
        all
    }

    /// The operations without a reply. There is nobody to tell of an error.
    fn unanswered(&self, limits: &Limits, header: &Header, request: &GuestBuffer<'_>) {
        if !self.begun.load(Ordering::Acquire) {
            return;
        }
        let done =
            Body::read(request, header, limits.opcode).and_then(|body| match limits.opcode {
                Opcode::Forget | Opcode::BatchForget => {
                    self.forget(limits.opcode, header, body.decoder())
                }
                Opcode::Interrupt => {
                    let input: InterruptIn = body.decoder().take()?;
                    self.waiting.interrupt(input.unique);
                    Ok(())
                }
                // NOTIFY_REPLY: nothing was asked.
                _ => Ok(()),
            });
        if done.is_err() {
            Counters::add(&self.counters.malformed, 1);
        }
    }

    fn answered(
        &self,
        limits: &Limits,
        header: &Header,
        request: &GuestBuffer<'_>,
        reply: &Reply<'_, '_>,
        deferral: &dyn Deferral,
        since: Instant,
    ) -> Result<Option<usize>> {
        let Answer::Body(least) = limits.answer else {
            return Err(Errno::NOSYS);
        };
        // Before anything is done: an operation whose result cannot be told must not happen.
        if reply.room().is_none_or(|room| room < least) {
            return Err(Errno::INVAL);
        }
        match limits.opcode {
            Opcode::Init => {
                let body = Body::read(request, header, limits.opcode)?;
                self.init(&body, reply).map(Some)
            }
            Opcode::Setlkw => {
                // Before the session is asked for: one that ends now must not be waited in.
                let epoch = self.waiting.epoch();
                if !self.begun.load(Ordering::Acquire) {
                    return Err(Errno::IO);
                }
                let body = Body::read(request, header, limits.opcode)?;
                let request = Deferred { opcode: limits.opcode, unique: header.raw.unique, since };
                let wait = Wait { waiting: &self.waiting, epoch, request, deferral };
                self.set_lock_waiting(header, body.decoder(), wait)
            }
            _ if !self.begun.load(Ordering::Acquire) => Err(Errno::IO),
            Opcode::Destroy => {
                self.reset();
                Ok(Some(0))
            }
            opcode => {
                let body = Body::read(request, header, opcode)?;
                let result = self.dispatch(opcode, header, body.decoder(), request, reply);
                // The reply's body may name a file's size, but the guest does not see it before `finish`.
                if let (Some(mappings), false) = (&self.mappings, opcode == Opcode::Read) {
                    mappings.file_may_have_grown();
                }
                result.map(Some)
            }
        }
    }

    /// INIT. A second one ends the session that is there (virtio 1.3, 5.11.6.1): the guest was rebooted or
    /// started another kernel, and what the first one held is lost to it.
    fn init(&self, body: &Body, reply: &Reply<'_, '_>) -> Result<usize> {
        let negotiated =
            init::negotiate(&mut body.decoder(), self.fs.preferences(), self.mappings.is_some())?;
        // Also at the first INIT: a request that a reset overtook may have left something.
        self.reset();
        let len = reply.put_bytes(0, negotiated.body())?;
        if negotiated.begun {
            log::debug!("FUSE session begins: {:?}", negotiated.flags);
            Counters::add(&self.counters.sessions, 1);
            self.agreed.store(negotiated.flags.bits(), Ordering::Relaxed);
            self.begun.store(true, Ordering::Release);
        }
        Ok(len)
    }
}

/// Of an urgent request, which is never answered later.
fn urgent_length(served: Option<Served>) -> Option<u32> {
    served.map(|served| match served {
        Served::Done(len) => len,
        Served::Later => 0,
    })
}

#[cfg(test)]
#[path = "session_test.rs"]
mod tests;
