//! Waiting for a lock, on a thread of its own.
//!
//! The host's kernel has no other way to wait for a lock than to block in a system call. So each request that
//! waits has a thread for as long as it does. There is a bounded number of them, and of the threads that serve
//! queues none ever waits.
//!
//! A thread that is to stop waiting is woken by an [`Alarm`], which goes on until it is heard: there is no way
//! to see whether the thread sleeps already or is about to. What it waits for may be granted at that very
//! moment; then it is granted, and the one who asked is told so.

use std::sync::mpsc;
use std::thread::Builder;

use super::sys::Alarm;
use crate::complaint::complain;
use crate::fuse::{Errno, Interrupt, LockReply, Pending, Result, Wait};
use crate::threads::{self, Work};

/// Bytes of a waiting thread's stack. It makes a system call and logs at most.
const STACK_SIZE: usize = 128 << 10;

/// Calls `attempt`, which blocks, on a new thread until it answers anything but `EINTR` and `EAGAIN`, or until
/// the request is interrupted. All that `attempt` holds is given back before the guest gets its answer.
///
/// # Errors
///
/// `ENOLCK` when the host gives no thread; `EINTR` when the request was interrupted before it began.
pub(super) fn start(
    wait: Wait<'_>,
    mut attempt: impl FnMut() -> Result<()> + Send + 'static,
) -> Result<LockReply> {
    let (sender, receiver) = mpsc::channel::<Pending>();
    let body = move || {
        // Nothing comes when the request did not begin to wait after all.
        let Ok(pending) = receiver.recv() else { return };
        let result = block(pending.interrupt(), &mut attempt);
        drop(attempt);
        pending.finish(result);
    };
    let builder = Builder::new().name("lock-waiter".into()).stack_size(STACK_SIZE);
    threads::spawn_by(builder, Work::Files, body).map_err(|error| {
        complain!(host: "no thread to wait for a lock: {error}");
        Errno::NOLCK
    })?;
    // If the thread is gone by now, the request is dropped here, and so answered.
    let _ = sender.send(wait.begin()?);
    Ok(LockReply::Waiting)
}

fn block(interrupt: &Interrupt, attempt: &mut impl FnMut() -> Result<()>) -> Result<()> {
    let alarm = Alarm::new().map_err(|error| {
        complain!(host: "no timer to end waiting for a lock: {error}");
        Errno::NOLCK
    })?;
    interrupt.arm(move || alarm.ring());
    let result = loop {
        // After it is armed: who asks from now on rings, and who asked before is seen here.
        if interrupt.asked() {
            break Err(Errno::INTR);
        }
        match attempt() {
            Err(Errno::INTR | Errno::AGAIN) => {}
            result => break result,
        }
    };
    // Silent from here on.
    interrupt.disarm();
    result
}
