//! One stream: its two directions, its credit, its end. Knows neither queues nor other streams.
//!
//! Data to the guest goes from the socket straight into the guest's buffers, as the guest gives credit: none of
//! it is kept here. Data to the host goes straight into the socket; what that does not take waits here, at most
//! as much as the guest was told that there is room for.

use std::io;
use std::net;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bitflags::bitflags;
use rustix::net::{RecvFlags, SendFlags, recv, send};

use super::packet::{HEADER_SIZE, HOST_CID, Header, Op, Shutdown, TYPE_STREAM};
use crate::memory::GuestBuffer;

/// How long the guest may take to answer a request. A kernel answers at once whether anybody listens; one that
/// is busy booting, or emulated, may take a moment.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(5);

/// How long the guest may take to confirm that a stream is over, in which its programs may read what they have
/// not read yet. Linux gives its peers as long.
pub(super) const CLOSE_TIME: Duration = Duration::from_secs(8);

/// Most data in one packet: what Linux sends in one.
const MAX_DATA: usize = 64 << 10;

/// By which both sides know a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// What becomes of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Stays,
    /// It is over. `tell`: the guest is to hear of it by a reset.
    Ends { tell: bool },
}

/// How far a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest was asked, or is to be.
    Requested,
    /// Both have agreed.
    Open,
    /// The guest knows that the host's side is gone, and is to confirm it.
    Closing,
    /// The guest has closed it, and only the host has data to take yet.
    Lingering,
}

bitflags! {
    /// What is to be said to the guest.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    struct Owed: u8 {
        const REQUEST = 1;
        const RESPONSE = 2;
        const SHUTDOWN = 4;
        const CREDIT_UPDATE = 8;
        const CREDIT_REQUEST = 16;
    }
}

pub(super) struct Stream {
    socket: UnixStream,
    ports: Ports,
    phase: Phase,
    owed: Owed,
    /// Until when the guest has to answer.
    deadline: Option<Instant>,

    /// There may be something in the socket, or its end.
    readable: bool,
    /// The socket's end was not seen yet.
    host_sends: bool,
    guest_receives: bool,
    /// Bytes sent to the guest, modulo 2^32; and what it says of its room, by which it limits them.
    sent: u32,
    guest_room: u32,
    guest_forwarded: u32,
    /// The guest was asked for credit since there was some the last time.
    asked: bool,

    /// The socket has taken all that was written to it so far.
    writable: bool,
    guest_sends: bool,
    host_receives: bool,
    waiting: Waiting,
    /// Most bytes that may wait: `buf_alloc`.
    window: u32,
    /// Bytes that wait no more, modulo 2^32: `fwd_cnt`; and what the guest knows of that.
    forwarded: u32,
    told: u32,
}

impl Stream {
    /// A stream that the host asks for. At most `window` bytes will wait for the host.
    pub(super) fn to_guest(socket: UnixStream, ports: Ports, window: u32, now: Instant) -> Self {
        let mut stream = Self::new(socket, ports, window, Phase::Requested, Owed::REQUEST);
        stream.deadline = Some(now + ANSWER_TIME);
        stream
    }

    /// A stream that the guest has asked for by `request`.
    pub(super) fn from_guest(
        socket: UnixStream,
        ports: Ports,
        window: u32,
        request: &Header,
    ) -> Self {
        let mut stream = Self::new(socket, ports, window, Phase::Open, Owed::RESPONSE);
        stream.take_credit(request);
        stream
    }

    fn new(socket: UnixStream, ports: Ports, window: u32, phase: Phase, owed: Owed) -> Self {
        Self {
            socket,
            ports,
            phase,
            owed,
            deadline: None,
            readable: true,
            host_sends: true,
            guest_receives: true,
            sent: 0,
            guest_room: 0,
            guest_forwarded: 0,
            asked: false,
            writable: true,
            guest_sends: true,
            host_receives: true,
            waiting: Waiting::default(),
            window,
            forwarded: 0,
            told: 0,
        }
    }

    pub(super) fn ports(&self) -> Ports {
        self.ports
    }

    /// When [`expire`](Self::expire) is to be called.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// Bytes that wait for the host.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// Whether there may be a packet to put into a buffer of the guest.
    pub(super) fn has_packets(&self) -> bool {
        self.phase != Phase::Lingering && (!self.owed.is_empty() || self.has_data())
    }

    fn has_data(&self) -> bool {
        let flows = self.phase == Phase::Open && self.host_sends && self.guest_receives;
        flows && self.readable && (self.credit() > 0 || !self.asked)
    }

    /// Bytes that the guest has room for. None, when it says that it has forwarded more than it was sent.
    fn credit(&self) -> u32 {
        let on_the_way = self.sent.wrapping_sub(self.guest_forwarded);
        self.guest_room.saturating_sub(on_the_way)
    }

    /// Keeps the stream for what the host has to take yet, although it is over for the guest. `false`: there is
    /// nothing to keep it for.
    pub(super) fn linger(&mut self) -> bool {
        let complete = !self.guest_sends && self.phase != Phase::Requested;
        self.phase = Phase::Lingering;
        self.deadline = None;
        complete && self.waiting.len() > 0
    }

    // From the guest.

    /// Takes a packet of the guest. `packet` is the header and what is behind it, at least `header.len` bytes.
    pub(super) fn take(&mut self, header: &Header, packet: &GuestBuffer<'_>) -> Fate {
        self.take_credit(header);
        let violation = |stream: &Self, what: &str| {
            log::debug!("vsock {:?}: the guest {what}", stream.ports);
            Fate::Ends { tell: true }
        };
        match (self.phase, Op::decode(header.op)) {
            (_, Some(Op::Reset)) => Fate::Ends { tell: false },
            (Phase::Requested, Some(Op::Response)) => self.open(),
            (Phase::Requested, _) => violation(self, "has not answered yet, and sends"),
            (_, Some(Op::Data)) if !self.guest_sends => violation(self, "has ended, and sends"),
            (_, Some(Op::Data)) if header.len as usize > self.room() => {
                violation(self, "sends more than it has credit for")
            }
            (_, Some(Op::Data)) => self.take_data(header.len as usize, packet),
            (_, Some(Op::Shutdown)) => {
                self.take_shutdown(Shutdown::from_bits_truncate(header.flags))
            }
            (_, Some(Op::CreditUpdate)) => Fate::Stays,
            (_, Some(Op::CreditRequest)) => {
                self.owed.insert(Owed::CREDIT_UPDATE);
                Fate::Stays
            }
            (_, Some(Op::Request | Op::Response) | None) => {
                violation(self, "sends what has no meaning in an open stream")
            }
        }
    }

    fn take_credit(&mut self, header: &Header) {
        self.guest_room = header.buf_alloc;
        self.guest_forwarded = header.fwd_cnt;
        if self.credit() > 0 {
            self.asked = false;
        }
    }

    /// Bytes that the guest may send, whatever it knows of.
    fn room(&self) -> usize {
        (self.window as usize).saturating_sub(self.waiting.len())
    }

    /// The guest has agreed: says so to the client.
    fn open(&mut self) -> Fate {
        self.phase = Phase::Open;
        self.deadline = None;
        let line = format!("OK {}\n", self.ports.host);
        // Nothing was written to the socket before: it has room.
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match send(&self.socket, line.as_bytes(), flags) {
            Ok(sent) if sent == line.len() => Fate::Stays,
            _ => Fate::Ends { tell: true },
        }
    }

    fn take_data(&mut self, len: usize, packet: &GuestBuffer<'_>) -> Fate {
        let mut done = 0;
        // What waits goes first.
        while self.host_receives && self.writable && self.waiting.len() == 0 && done < len {
            match packet.send(HEADER_SIZE + done, len - done, self.socket.as_fd()) {
                Ok(0) => self.writable = false,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.writable = false,
                // A page of a DAX window is gone.
                Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
                    return Fate::Ends { tell: true };
                }
                Err(_) => self.host_is_gone(),
            }
        }
        if !self.host_receives {
            // The guest is told. What it has sent meanwhile has nobody to take it.
            done = len;
        }
        self.forward(done);
        if self.waiting.append(packet, HEADER_SIZE + done, len - done).is_err() {
            return Fate::Ends { tell: true };
        }
        self.offer_credit();
        Fate::Stays
    }

    fn take_shutdown(&mut self, what: Shutdown) -> Fate {
        if what.contains(Shutdown::RECEIVE) && self.guest_receives {
            self.guest_receives = false;
            // Whoever writes there gets EPIPE. An error means that nobody can any more.
            let _ = self.socket.shutdown(net::Shutdown::Read);
        }
        if what.contains(Shutdown::SEND) && self.guest_sends {
            self.guest_sends = false;
            self.end_socket();
        }
        // Closed in both directions by the guest, which waits for a reset as the answer.
        if self.guest_receives || self.guest_sends {
            Fate::Stays
        } else {
            Fate::Ends { tell: true }
        }
    }

    /// Ends the socket behind the last byte.
    fn end_socket(&mut self) {
        if !self.guest_sends && self.waiting.len() == 0 {
            let _ = self.socket.shutdown(net::Shutdown::Write);
        }
    }

    fn forward(&mut self, count: usize) {
        // At most a window.
        self.forwarded = self.forwarded.wrapping_add(count as u32);
    }

    /// Tells the guest of room once it knows of less than half.
    fn offer_credit(&mut self) {
        let received = self.forwarded.wrapping_add(self.waiting.len() as u32);
        let known = self.window.saturating_sub(received.wrapping_sub(self.told));
        if self.forwarded != self.told && known < self.window / 2 {
            self.owed.insert(Owed::CREDIT_UPDATE);
        }
    }

    // From the host.

    /// The socket may have something to read.
    pub(super) fn host_has_sent(&mut self) {
        self.readable = true;
    }

    /// The socket takes more.
    pub(super) fn host_has_room(&mut self) -> Fate {
        self.writable = true;
        while self.writable && self.waiting.len() > 0 {
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match send(&self.socket, self.waiting.bytes(), flags) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => self.writable = false,
                Ok(count) => {
                    self.waiting.consume(count);
                    self.forward(count);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => self.host_is_gone(),
            }
        }
        self.end_socket();
        self.offer_credit();
        self.fate_of_a_rest()
    }

    /// Both directions of the socket are over; what is in it can be read yet.
    pub(super) fn host_has_hung_up(&mut self) -> Fate {
        if self.phase == Phase::Requested {
            // Nobody waits for the answer. A guest that was not asked need not be told.
            return Fate::Ends { tell: !self.owed.contains(Owed::REQUEST) };
        }
        self.readable = true;
        self.host_is_gone();
        // When all was read, one packet says all.
        let peeked = recv(&self.socket, &mut [0; 1], RecvFlags::PEEK | RecvFlags::DONTWAIT);
        if self.host_sends && matches!(peeked, Ok((0, _))) {
            self.host_ends();
        }
        self.fate_of_a_rest()
    }

    fn fate_of_a_rest(&self) -> Fate {
        if self.phase == Phase::Lingering && self.waiting.len() == 0 {
            return Fate::Ends { tell: false };
        }
        Fate::Stays
    }

    /// The host takes no more.
    fn host_is_gone(&mut self) {
        if self.host_receives {
            self.host_receives = false;
            self.forward(self.waiting.len());
            self.waiting = Waiting::default();
            self.owed.insert(Owed::SHUTDOWN);
        }
    }

    /// The deadline has passed.
    pub(super) fn expire(&self) -> Fate {
        let said = self.phase != Phase::Requested || !self.owed.contains(Owed::REQUEST);
        Fate::Ends { tell: said }
    }

    // To the guest.

    /// Puts the next packet into `buffer` and says how many bytes it has: 0 when the buffer is too small for any,
    /// and `None` when there is no packet after all.
    ///
    /// # Errors
    ///
    /// When data is lost, and with it the stream.
    pub(super) fn fill(
        &mut self,
        guest_cid: u64,
        buffer: &GuestBuffer<'_>,
        now: Instant,
    ) -> io::Result<Option<u32>> {
        if buffer.len() <= HEADER_SIZE {
            // No data fits. Linux offers pages.
            return Ok(Some(0));
        }
        let mut header = self.header(guest_cid);
        let op = match self.next_control() {
            Some(op) => op,
            None => match self.fill_data(buffer)? {
                Some(len) => {
                    header.len = len;
                    Op::Data
                }
                // It may have been the end, or that there is no credit.
                None => match self.next_control().or_else(|| self.next_credit()) {
                    Some(op) => op,
                    None => return Ok(None),
                },
            },
        };
        if op == Op::Shutdown {
            header.flags = self.say_shutdown(now).bits();
        }
        header.op = op as u16;
        buffer.write_at(0, &header.encode()).map_err(io::Error::other)?;
        // Every packet tells the credit.
        self.told = self.forwarded;
        self.owed.remove(Owed::CREDIT_UPDATE);
        // At most `MAX_DATA`.
        Ok(Some(HEADER_SIZE as u32 + header.len))
    }

    fn header(&self, guest_cid: u64) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            len: 0,
            kind: TYPE_STREAM,
            op: 0,
            flags: 0,
            buf_alloc: self.window,
            fwd_cnt: self.forwarded,
        }
    }

    fn next_control(&mut self) -> Option<Op> {
        self.pay(&[
            (Owed::REQUEST, Op::Request),
            (Owed::RESPONSE, Op::Response),
            (Owed::SHUTDOWN, Op::Shutdown),
        ])
    }

    /// Behind data, which tells the credit, too.
    fn next_credit(&mut self) -> Option<Op> {
        self.pay(&[
            (Owed::CREDIT_REQUEST, Op::CreditRequest),
            (Owed::CREDIT_UPDATE, Op::CreditUpdate),
        ])
    }

    fn pay(&mut self, debts: &[(Owed, Op)]) -> Option<Op> {
        let (debt, op) = debts.iter().find(|(debt, _)| self.owed.contains(*debt))?;
        self.owed.remove(*debt);
        Some(*op)
    }

    fn say_shutdown(&mut self, now: Instant) -> Shutdown {
        let mut what = Shutdown::empty();
        what.set(Shutdown::RECEIVE, !self.host_receives);
        what.set(Shutdown::SEND, !self.host_sends);
        if what.is_all() && self.phase == Phase::Open {
            self.phase = Phase::Closing;
            self.deadline = Some(now + CLOSE_TIME);
        }
        what
    }

    /// Puts data behind the place of the header. `None` when there is none now.
    fn fill_data(&mut self, buffer: &GuestBuffer<'_>) -> io::Result<Option<u32>> {
        if !self.has_data() {
            return Ok(None);
        }
        let credit = self.credit();
        if credit == 0 {
            self.asked = true;
            self.owed.insert(Owed::CREDIT_REQUEST);
            return Ok(None);
        }
        let room = buffer.len().saturating_sub(HEADER_SIZE).min(MAX_DATA).min(credit as usize);
        match buffer.receive(HEADER_SIZE, room, self.socket.as_fd()) {
            Ok(0) => self.host_ends(),
            Ok(count) => {
                // At most `MAX_DATA`.
                self.sent = self.sent.wrapping_add(count as u32);
                return Ok(Some(count as u32));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(error) if error.raw_os_error() == Some(libc::EFAULT) => return Err(error),
            // The client has gone without having read all; all that it sent was read before.
            Err(_) => {
                self.host_is_gone();
                self.host_ends();
            }
        }
        Ok(None)
    }

    fn host_ends(&mut self) {
        self.host_sends = false;
        self.owed.insert(Owed::SHUTDOWN);
    }
}

/// Bytes on their way to the host.
#[derive(Default)]
struct Waiting {
    bytes: Vec<u8>,
    start: usize,
}

impl Waiting {
    fn len(&self) -> usize {
        self.bytes.len().saturating_sub(self.start)
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// Copies `len` bytes at `offset` of a packet behind what is there.
    fn append(
        &mut self,
        packet: &GuestBuffer<'_>,
        offset: usize,
        len: usize,
    ) -> Result<(), crate::memory::BufferError> {
        // Moves no byte more than once on the average.
        if self.start > self.bytes.len() / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let before = self.bytes.len();
        self.bytes.resize(before + len, 0);
        packet.read_at(offset, self.bytes.get_mut(before..).unwrap_or_default())
    }

    fn consume(&mut self, count: usize) {
        self.start += count;
        if self.start >= self.bytes.len() {
            // Memory is for streams that need it.
            *self = Self::default();
        }
    }
}
