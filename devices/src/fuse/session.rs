//! One guest's use of one file system, from INIT to DESTROY.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use super::abi::{InHeader, InitFlags};
use super::counters::Counters;
use super::errno::{Errno, Result};
use super::filesystem::FileSystem;
use super::init;
use super::mapping::Mappings;
use super::opcode::{Answer, Limits, Opcode};
use super::reply::Reply;
use super::request::{Body, Header, read_raw_header};
use crate::dax::DaxWindow;
use crate::memory::GuestBuffer;

/// Serves the requests of a virtio-fs device's queues. Shared by all threads that do so.
///
/// Requests are served in any order and at once; the guest orders what it needs ordered. The session begins
/// with INIT and ends with DESTROY, with a second INIT, or with [`reset`](Self::reset).
pub struct Session {
    pub(super) fs: Arc<dyn FileSystem>,
    pub(super) mappings: Option<Mappings>,
    pub(super) counters: Counters,
    begun: AtomicBool,
    /// The flags that the last INIT agreed on.
    agreed: AtomicU64,
}

impl Session {
    /// A session that waits for its INIT. Without a `window`, there is no DAX.
    pub fn new(fs: Arc<dyn FileSystem>, window: Option<Arc<dyn DaxWindow>>) -> Self {
        Self {
            fs,
            mappings: window.map(Mappings::new),
            counters: Counters::default(),
            begun: AtomicBool::new(false),
            agreed: AtomicU64::new(0),
        }
    }

    /// Serves one request from `request` (the chain's readable part) into `reply` (its writable part), and
    /// returns the used length: exactly the bytes of the reply (`out.len`), 0 where no reply is due or
    /// possible.
    ///
    /// May block as long as the host's file system does. Called from any thread, any number at once.
    pub fn serve(&self, request: &GuestBuffer<'_>, reply: &GuestBuffer<'_>) -> u32 {
        // A header that cannot even be read (its window page is gone) is answered without its `unique`.
        let (raw, read) = match read_raw_header(request) {
            Ok(raw) => (raw, Ok(())),
            Err(errno) => (InHeader::default(), Err(errno)),
        };
        let reply = Reply::new(reply, raw.unique);
        let checked = read.and_then(|()| Header::check(raw, request));
        let result = match checked {
            Ok((header, limits)) => {
                self.counters.count(limits.opcode);
                if limits.answer == Answer::Never {
                    self.unanswered(limits, &header, request);
                    return 0;
                }
                self.answered(limits, &header, request, &reply)
            }
            Err(errno) => {
                Counters::add(&self.counters.malformed, 1);
                if super::opcode::find(raw.opcode)
                    .is_some_and(|known| known.answer == Answer::Never)
                {
                    return 0;
                }
                Err(errno)
            }
        };
        if result.is_err() {
            Counters::add(&self.counters.errors, 1);
        }
        reply.finish(result)
    }

    /// Device reset: the guest is gone. Drops every node and handle and empties the window; the next request
    /// must be INIT. Does not wait for requests that are being served: what they hold goes when they end.
    /// Idempotent.
    pub fn reset(&self) {
        self.begun.store(false, Ordering::Release);
        // The nodes first. A SETUPMAPPING that saw the session before it ended, and sleeps, then wakes up
        // to a node id that is never valid again, or has its file open from before and is turned away by
        // `Mappings::clear`. The other way round it could map the old file into the cleared window.
        self.fs.clear();
        if let Some(mappings) = &self.mappings {
            mappings.clear(&self.counters);
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

    /// The counters with their names, and what the window and the file system add to them.
    pub fn snapshot(&self) -> Vec<(&'static str, u64)> {
        let mut all = self.counters.snapshot();
        all.extend(self.mappings.iter().flat_map(Mappings::statistics));
        all.extend(self.fs.statistics());
        all
    }

    /// The operations without a reply. There is nobody to tell of an error.
    fn unanswered(&self, limits: &Limits, header: &Header, request: &GuestBuffer<'_>) {
        let forget = matches!(limits.opcode, Opcode::Forget | Opcode::BatchForget);
        // INTERRUPT: requests are not interruptible, and the guest does not wait for an answer.
        // NOTIFY_REPLY: nothing was asked.
        if forget && self.begun.load(Ordering::Acquire) {
            let done = Body::read(request, header, limits.opcode)
                .and_then(|body| self.forget(limits.opcode, header, body.decoder()));
            if done.is_err() {
                Counters::add(&self.counters.malformed, 1);
            }
        }
    }

    fn answered(
        &self,
        limits: &Limits,
        header: &Header,
        request: &GuestBuffer<'_>,
        reply: &Reply<'_, '_>,
    ) -> Result<usize> {
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
                self.init(&body, reply)
            }
            _ if !self.begun.load(Ordering::Acquire) => Err(Errno::IO),
            Opcode::Destroy => {
                self.reset();
                Ok(0)
            }
            opcode => {
                let body = Body::read(request, header, opcode)?;
                let result = self.dispatch(opcode, header, body.decoder(), request, reply);
                // The reply's body may name a file's size, but the guest does not see it before `finish`.
                if let (Some(mappings), false) = (&self.mappings, opcode == Opcode::Read) {
                    mappings.file_may_have_grown();
                }
                result
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

#[cfg(test)]
#[path = "session_test.rs"]
mod tests;
