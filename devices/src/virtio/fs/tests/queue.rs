//! A guest whose requests go through the registers and rings of a real device.

use std::sync::Mutex;

use vm_memory::{Bytes, GuestAddress};

use crate::fuse::abi::{MAX_REQUEST, MINOR};
use crate::fuse::testing::{EVERYTHING, Guest};
use crate::share::Options;
use crate::sync::lock;
use crate::virtio::fs::{Config, FsDevice};
use crate::virtio::testing::*;

/// Where requests and replies are: each with room for the largest.
const REQUEST: u64 = 0x28_0000;
const REPLY: u64 = 0x14_0000;
const ROOM: usize = 0x12_0000;
/// What stands behind the writable part.
const GUARD: [u8; 64] = [0x5c; 64];

/// The first request queue.
pub(super) const FIRST: u16 = 1;

/// Bytes before the data of a WRITE, and before that of a READ's reply: headers.
const BEFORE_REQUEST: usize = 80;
const BEFORE_REPLY: usize = 16;

struct Queue {
    /// Where data begins in its page.
    skew: u64,
    driver: Driver,
    queue: DriverQueue,
    index: u16,
    served: usize,
}

impl Queue {
    /// Puts one request into the queue and waits for the device to give it back.
    ///
    /// The chain is cut as Linux cuts it: headers in descriptors of their own, data in pages, in which it
    /// begins where the program's buffer does.
    fn serve(&mut self, request: &[u8], reply: &mut [u8]) -> u32 {
        let memory = self.driver.memory();
        assert!(request.len() <= ROOM && reply.len() + GUARD.len() <= ROOM);
        let request_at = REQUEST + self.skew - BEFORE_REQUEST as u64;
        let reply_at = REPLY + self.skew - BEFORE_REPLY as u64;
        memory.write_slice(request, GuestAddress(request_at)).unwrap();
        memory.write_slice(reply, GuestAddress(reply_at)).unwrap();
        let guard = GuestAddress(reply_at + reply.len() as u64);
        memory.write_slice(&GUARD, guard).unwrap();

        let in_page = 4096 - self.skew as usize;
        let pieces = [
            (request_at, request.len(), [40, BEFORE_REQUEST - 40, in_page], 0),
            (reply_at, reply.len(), [BEFORE_REPLY, in_page, 4096], WRITE),
        ];
        let mut chain: Vec<(u64, u32, u16)> = Vec::new();
        for (mut at, mut left, first, flags) in pieces {
            let mut lengths = first.into_iter().chain(std::iter::repeat(4096));
            while left > 0 {
                let len = left.min(lengths.next().unwrap());
                chain.push((at, len as u32, flags));
                (at, left) = (at + len as u64, left - len);
            }
        }
        if chain.is_empty() {
            chain.push((request_at, 0, 0));
        }
        for (at, (address, len, flags)) in (0..).zip(&chain) {
            let next = if usize::from(at) + 1 < chain.len() { NEXT } else { 0 };
            self.queue.describe(&memory, at, (*address, *len, flags | next, at + 1));
        }
        self.queue.offer(&memory, 0);
        self.driver.notify(self.index);
        self.served += 1;
        self.driver.wait(self.index, self.served);
        let (head, used) = self.queue.take_used(&memory).unwrap();
        assert_eq!(head, 0);

        memory.read_slice(reply, GuestAddress(reply_at)).unwrap();
        let mut behind = [0; GUARD.len()];
        memory.read_slice(&mut behind, guard).unwrap();
        assert_eq!(behind, GUARD, "written past the end of the reply's room");
        assert_eq!(self.driver.status(), 15, "the device is well");
        used
    }
}

/// A guest that has sent nothing yet, with options for the share. It sends everything through queue `index`, from
/// and to buffers that begin `skew` bytes into a page.
pub(super) fn silent_guest(index: u16, skew: u64, change: impl FnOnce(&mut Options)) -> Guest {
    let guest = Guest::without_init(change, true);
    let config = Config::new("share", 1).unwrap();
    let device = FsDevice::new(config, guest.session.clone(), None).unwrap();
    let driver = Driver::new(std::sync::Arc::new(device));
    let queue = driver.start(0, &[(index, 1024)]).remove(0);
    let queue = Mutex::new(Queue { skew, driver, queue, index, served: 0 });
    let mut guest =
        guest.through(Box::new(move |request, reply| lock(&queue).serve(request, reply)));
    guest.room = MAX_REQUEST;
    guest
}

/// The same, which has sent its INIT.
pub(super) fn guest_on(index: u16, skew: u64, change: impl FnOnce(&mut Options)) -> Guest {
    let guest = silent_guest(index, skew, change);
    assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
    guest
}

/// The same with default options, the first request queue and whole pages.
pub(super) fn guest() -> Guest {
    guest_on(FIRST, 0, |_| {})
}
