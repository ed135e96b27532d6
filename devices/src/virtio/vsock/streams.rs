//! All streams of a device: whose turn it is, and what is said of streams that are no more.

use std::collections::{HashMap, VecDeque};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::host::{HostSide, SOCKET_EVENTS};
use super::packet::{HEADER_SIZE, HOST_CID, Header, Op, TYPE_STREAM};
use super::poll::Poll;
use super::stream::{Fate, Ports, Stream};
use crate::memory::GuestBuffer;

/// Most streams at once, those included whose last data the host has not taken yet. Each is a file descriptor.
pub(super) const MAX_STREAMS: usize = 1024;

/// Bytes that may wait for the host: [`WINDOW`] in each stream while there are few, [`SMALL_WINDOW`] in those
/// that come when there are [`FEW`]. In all 64 MiB at most. A window is four of Linux's largest packets, so
/// that the guest need not wait for credit.
const WINDOW: u32 = 256 << 10;
const SMALL_WINDOW: u32 = 32 << 10;
const FEW: usize = 128;

/// Most resets that wait for buffers of the guest before its packets wait, too. Each costs a few bytes.
const MAX_RESETS: usize = 256;

/// The host's ports of streams that the host begins: the middle of the range, where no service is.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

pub(super) struct Streams {
    guest_cid: u64,
    /// By the number under which [`Poll`] knows the socket.
    streams: HashMap<u64, Listed>,
    /// Those the guest knows of.
    by_ports: HashMap<Ports, u64>,
    /// Those that may have packets for the guest, in turn; each once.
    turns: VecDeque<u64>,
    /// Packets for streams that are no more.
    resets: VecDeque<Header>,
    next_port: u32,
    /// No deadline is before this.
    deadline: Option<Instant>,
}

struct Listed {
    stream: Stream,
    has_turn: bool,
}

impl Streams {
    pub(super) fn new(guest_cid: u64) -> Self {
        Self {
            guest_cid,
            streams: HashMap::new(),
            by_ports: HashMap::new(),
            turns: VecDeque::new(),
            resets: VecDeque::new(),
            next_port: FIRST_PORT,
            deadline: None,
        }
    }

    /// Whether another stream would be one too many.
    pub(super) fn is_full(&self) -> bool {
        self.streams.len() >= MAX_STREAMS
    }

    /// No packet of the guest is to be taken now: its answer would have no place.
    pub(super) fn is_choked(&self) -> bool {
        self.resets.len() >= MAX_RESETS
    }

    /// Whether there may be packets for the guest.
    pub(super) fn has_packets(&self) -> bool {
        !self.resets.is_empty() || !self.turns.is_empty()
    }

    /// Whether data waits for the host.
    pub(super) fn has_waiting(&self) -> bool {
        self.streams.values().any(|listed| listed.stream.waiting() > 0)
    }

    /// The next time to call [`expire`](Self::expire).
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Ends what has waited for too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let late = |(id, listed): (&u64, &Listed)| {
            listed.stream.deadline().filter(|deadline| *deadline <= now).map(|_| *id)
        };
        let late: Vec<u64> = self.streams.iter().filter_map(late).collect();
        for id in late {
            self.with(id, |stream| stream.expire());
        }
        self.deadline = self.streams.values().filter_map(|listed| listed.stream.deadline()).min();
    }

    /// Forgets all streams, as the guest has: only what the host has to take yet stays. `true`: there were some
    /// that the guest knew of.
    pub(super) fn reset(&mut self) -> bool {
        let known = !self.by_ports.is_empty();
        self.streams.retain(|_, listed| listed.stream.linger());
        self.streams.values_mut().for_each(|listed| listed.has_turn = false);
        self.by_ports.clear();
        self.turns.clear();
        self.resets.clear();
        known
    }

    // The host.

    /// Asks the guest for a stream to its port for the client at `socket`, which is registered as `id`. Not to
    /// be called when [full](Self::is_full).
    pub(super) fn request(&mut self, id: u64, socket: UnixStream, port: u32, now: Instant) {
        let mut ports = Ports { host: self.next_port, guest: port };
        // There are far fewer streams than ports.
        while self.by_ports.contains_key(&ports) {
            ports.host = port_after(ports.host);
        }
        self.next_port = port_after(ports.host);
        let stream = Stream::to_guest(socket, ports, self.window(), now);
        self.insert(id, stream);
    }

    /// Something has happened at a socket.
    pub(super) fn event(&mut self, id: u64, events: EventSet) {
        self.with(id, |stream| {
            if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
                stream.host_has_sent();
            }
            if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
                stream.host_has_hung_up()
            } else if events.contains(EventSet::OUT) {
                stream.host_has_room()
            } else {
                Fate::Stays
            }
        });
    }

    // The guest.

    /// Takes a packet.
    pub(super) fn take(&mut self, packet: &GuestBuffer<'_>, host: &HostSide, poll: &mut Poll) {
        let mut bytes = [0; HEADER_SIZE];
        if packet.read_at(0, &mut bytes).is_err() {
            log::debug!("vsock: a packet without a header is ignored");
            return;
        }
        let header = Header::decode(bytes);
        if header.src_cid != self.guest_cid {
            // There is nobody to answer.
            log::debug!("vsock: a packet that is not from the guest is ignored");
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.refuse(&header);
        }
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        // A packet that is shorter than it says is nothing that a stream could go on with.
        let whole = packet.len().saturating_sub(HEADER_SIZE) >= header.len as usize;
        match self.by_ports.get(&ports) {
            Some(id) if whole => self.with(*id, |stream| stream.take(&header, packet)),
            Some(id) => self.with(*id, |_| Fate::Ends { tell: true }),
            None if Op::decode(header.op) == Some(Op::Request) => {
                self.accept(ports, &header, host, poll);
            }
            None => self.refuse(&header),
        }
    }

    /// The guest wants to reach a port of the host.
    fn accept(&mut self, ports: Ports, request: &Header, host: &HostSide, poll: &mut Poll) {
        if self.is_full() {
            log::debug!("vsock: {MAX_STREAMS} streams are enough");
            return self.refuse(request);
        }
        let connected = host.connect(ports.host).and_then(|socket| {
            let id = poll.add(&socket, SOCKET_EVENTS)?;
            Ok((id, socket))
        });
        match connected {
            Ok((id, socket)) => {
                let stream = Stream::from_guest(socket, ports, self.window(), request);
                self.insert(id, stream);
            }
            Err(error) => {
                log::debug!("vsock: port {} of the host: {error}", ports.host);
                self.refuse(request);
            }
        }
    }

    /// Puts the next packet into `buffer` and says how many bytes it has, 0 when the buffer is too small. `None`:
    /// there is no packet. Streams take turns, a packet each.
    pub(super) fn fill(&mut self, buffer: &GuestBuffer<'_>, now: Instant) -> Option<u32> {
        loop {
            if let Some(reset) = self.resets.front() {
                if buffer.write_at(0, &reset.encode()).is_err() {
                    return Some(0);
                }
                self.resets.pop_front();
                return Some(HEADER_SIZE as u32);
            }
            let id = self.turns.pop_front()?;
            let Some(listed) = self.streams.get_mut(&id) else { continue };
            listed.has_turn = false;
            let filled = listed.stream.fill(self.guest_cid, buffer, now);
            let lost = filled.is_err();
            self.with(id, |_| if lost { Fate::Ends { tell: true } } else { Fate::Stays });
            if let Ok(Some(len)) = filled {
                return Some(len);
            }
        }
    }

    // Both.

    fn window(&self) -> u32 {
        if self.streams.len() < FEW { WINDOW } else { SMALL_WINDOW }
    }

    fn insert(&mut self, id: u64, stream: Stream) {
        self.by_ports.insert(stream.ports(), id);
        self.streams.insert(id, Listed { stream, has_turn: false });
        self.with(id, |_| Fate::Stays);
    }

    /// Does something to a stream, and what follows from it.
    fn with(&mut self, id: u64, act: impl FnOnce(&mut Stream) -> Fate) {
        let Some(listed) = self.streams.get_mut(&id) else { return };
        let fate = act(&mut listed.stream);
        self.deadline = self.deadline.into_iter().chain(listed.stream.deadline()).min();
        match fate {
            Fate::Stays if listed.stream.has_packets() && !listed.has_turn => {
                listed.has_turn = true;
                self.turns.push_back(id);
            }
            Fate::Stays => {}
            Fate::Ends { tell } => {
                let ports = listed.stream.ports();
                if tell {
                    self.resets.push_back(reset(self.guest_cid, HOST_CID, ports, TYPE_STREAM));
                }
                // One that lingers is not in there any more, but its ports may be.
                if self.by_ports.get(&ports) == Some(&id) {
                    self.by_ports.remove(&ports);
                }
                if std::mem::take(&mut listed.has_turn) {
                    self.turns.retain(|other| *other != id);
                }
                if !listed.stream.linger() {
                    self.streams.remove(&id);
                }
            }
        }
    }

    /// Answers a packet for a stream that there is not.
    fn refuse(&mut self, header: &Header) {
        if Op::decode(header.op) != Some(Op::Reset) {
            let ports = Ports { host: header.dst_port, guest: header.src_port };
            self.resets.push_back(reset(self.guest_cid, header.dst_cid, ports, header.kind));
        }
    }
}

fn reset(guest_cid: u64, from: u64, ports: Ports, kind: u16) -> Header {
    Header {
        src_cid: from,
        dst_cid: guest_cid,
        src_port: ports.host,
        dst_port: ports.guest,
        kind,
        op: Op::Reset as u16,
        ..Header::default()
    }
}

fn port_after(port: u32) -> u32 {
    if port >= LAST_PORT { FIRST_PORT } else { port + 1 }
}
