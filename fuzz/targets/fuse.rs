//! FUSE requests to a session with a directory of the host behind it, which the host changes meanwhile.
#![no_main]

use std::sync::Arc;

use devices::dax::{DaxWindow, Window};
use devices::fuse::opcode::Opcode;
use devices::fuse::{Completion, Deferral, Served, Session};
use devices::memory::GuestBuffer;
use devices::testing::{init, request};
use fuzz::frames::{Known, check_reply};
use fuzz::input::Input;
use fuzz::place::Place;
use libfuzzer_sys::fuzz_target;

/// More requests than this say nothing new.
const LONGEST: usize = 64;

/// Nobody waits for what comes later.
struct Later;

impl Deferral for Later {
    fn defer(&self) -> Box<dyn Completion> {
        Box::new(Self)
    }
}

impl Completion for Later {
    fn complete(self: Box<Self>, reply: &[u8]) {
        assert_eq!(reply.len(), 16);
    }
}

struct Guest {
    place: Place,
    session: Session,
    reply: Vec<u8>,
}

impl Guest {
    /// Has a request served, and checks what can be said of any reply.
    fn send(&mut self, request: &mut [u8], room: usize, way: u8) -> Option<&[u8]> {
        let copy = request.to_vec();
        self.reply.fill(0xa5);
        let used = {
            let request = GuestBuffer::from_slice(request);
            let reply = GuestBuffer::from_slice(&mut self.reply[..room]);
            let served = match way % 8 {
                0 => Some(Served::Done(self.session.serve_urgent(&request, &reply))),
                1 => self.session.serve_at_once(&request, &reply, &Later),
                _ => Some(self.session.serve(&request, &reply, &Later)),
            };
            match served {
                Some(Served::Done(used)) => used as usize,
                Some(Served::Later) | None => 0,
            }
        };
        assert!(used <= room);
        assert!(self.reply[room..].iter().take(64).all(|byte| *byte == 0xa5), "past the room");
        let reply = &self.reply[..used];
        if copy.len() >= 16 {
            check_reply(&copy, reply);
        }
        self.place.check_reply(reply);
        Some(reply).filter(|reply| !reply.is_empty())
    }
}

fuzz_target!(|data: &[u8]| {
    let mut input = Input::new(data);
    let place = Place::new();
    let share = place.serve(&mut input);
    let window: Arc<dyn DaxWindow> = Arc::new(Window::new(4 << 20).unwrap());
    let session = Session::new(share, Some(window));
    let mut guest = Guest { place, session, reply: vec![0; 140 << 10] };
    let mut known = Known::default();
    if !input.rarely(16) {
        let flags = if input.rarely(8) { input.number() } else { u64::MAX };
        guest.send(&mut init(flags), 4096, 2);
    }
    for _ in 0..LONGEST {
        if input.is_empty() {
            break;
        }
        if input.rarely(16) {
            guest.place.host_acts(input.byte());
            continue;
        }
        let way = input.byte();
        let (opcode, mut request) = known.request(&mut input);
        let room = match way >> 5 {
            0 => usize::from(input.byte()),
            1 => usize::from(input.short()),
            _ => 139 << 10,
        };
        let cut = if way & 8 == 0 { request.len() } else { usize::from(input.byte()) };
        let len = cut.min(request.len());
        if let Some(reply) = guest.send(&mut request[..len], room, way) {
            known.learn(opcode, reply);
        }
    }
    // Whatever happened, a new session works.
    guest.send(&mut init(u64::MAX), 4096, 2).unwrap();
    let mut getattr = request(Opcode::Getattr, 1, 7, &[0; 16]);
    let reply = guest.send(&mut getattr, 4096, 2).unwrap();
    assert_eq!((reply.len(), &reply[4..8]), (16 + 104, &[0; 4][..]));
    guest.session.reset();
    guest.place.check_outside();
});
