//! Streams: credit, ends, turns, resets of the device.

use vmm_sys_util::epoll::EventSet;

use super::*;
use crate::memory::GuestBuffer;
use crate::virtio::vsock::host::HostSide;
use crate::virtio::vsock::poll::Poll;
use crate::virtio::vsock::stream::{ANSWER_TIME, CLOSE_TIME};
use crate::virtio::vsock::streams::Streams;

#[test]
fn a_million_bytes_go_each_way_byte_for_byte() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.connected(10);
    let bytes = &noise(1_000_000);
    std::thread::scope(|scope| {
        let mut writer = client.try_clone().unwrap();
        scope.spawn(move || writer.write_all(bytes).unwrap());
        assert!(guest.expect_data(ports, bytes.len()) == *bytes);
    });
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(&mut client, bytes.len()));
        // As much as there is credit for, and what comes is credit.
        let (mut sent, mut forwarded) = (0usize, 0usize);
        for piece in bytes.chunks(60_000) {
            while sent + piece.len() - forwarded > 256 << 10 {
                let update = guest.expect(ports, Op::CreditUpdate);
                forwarded = update.fwd_cnt as usize;
            }
            // The guest has taken what the host has sent: so it says.
            let mut header = from_guest(ports, Op::Data, piece.len());
            header.fwd_cnt = 1_000_000;
            guest.send_header(header, piece);
            sent += piece.len();
        }
        assert!(reader.join().unwrap() == *bytes);
    });
}

#[test]
fn the_host_sends_no_more_than_the_guest_has_room_for() {
    let mut guest = Guest::ready();
    let listener = guest.listen(1);
    let ports = (1, 2);
    let packet = |op, len, room, forwarded| Header {
        buf_alloc: room,
        fwd_cnt: forwarded,
        ..from_guest(ports, op, len)
    };
    guest.send_header(packet(Op::Request, 0, 10, 0), &[]);
    guest.expect(ports, Op::Response);
    let (mut program, _) = listener.accept().unwrap();
    program.write_all(b"0123456789abcdefghijABC").unwrap();
    assert_eq!(guest.expect_data(ports, 10), b"0123456789");
    guest.expect(ports, Op::CreditRequest);
    guest.expect_silence();
    // There is no room, nor is there when it says that it has taken more than it got.
    for forwarded in [0, 11, u32::MAX] {
        guest.send_header(packet(Op::CreditUpdate, 0, 10, forwarded), &[]);
        guest.expect_silence();
    }
    guest.send_header(packet(Op::CreditUpdate, 0, 10, 4), &[]);
    assert_eq!(guest.expect_data(ports, 4), b"abcd");
    guest.expect(ports, Op::CreditRequest);
    // Credit comes with data, too.
    guest.send_header(packet(Op::Data, 1, 20, 14), b"x");
    assert_eq!(guest.expect_data(ports, 9), b"efghijABC");
    assert_eq!(read(&mut program, 1), b"x");
}

#[test]
fn the_guest_may_ask_for_credit() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.connected(10);
    guest.send(ports, Op::Data, b"12345");
    guest.expect_silence();
    guest.send(ports, Op::CreditRequest, &[]);
    let update = guest.expect(ports, Op::CreditUpdate);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (256 << 10, 5));
    assert_eq!(read(&mut client, 5), b"12345");
}

/// Sends until the host takes no more and only `left` of the window is left; says how much.
fn fill_window(guest: &mut Guest, ports: (u32, u32), left: usize) -> usize {
    let piece = noise(4096);
    let (mut sent, mut forwarded) = (0, 0);
    loop {
        guest.send(ports, Op::Data, &piece);
        sent += piece.len();
        while let Some((head, _)) = guest.used(RX) {
            let mut header = [0; HEADER_SIZE];
            let at = GuestAddress(buffer(RX, head as u16));
            guest.driver.memory().read_slice(&mut header, at).unwrap();
            forwarded = Header::decode(header).fwd_cnt as usize;
            guest.offer(RX, head as u16, BUFFER as u32);
        }
        guest.send(ports, Op::CreditRequest, &[]);
        forwarded = forwarded.max(guest.expect(ports, Op::CreditUpdate).fwd_cnt as usize);
        if sent - forwarded + left + piece.len() > 256 << 10 {
            return sent;
        }
    }
}

#[test]
fn a_client_that_does_not_read_holds_back_its_own_stream_only() {
    let mut guest = Guest::ready();
    let (mut stuck, ports) = guest.connected(10);
    let sent = fill_window(&mut guest, ports, 0);
    guest.still_works();
    let got = std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(&mut stuck, sent));
        let update = guest.expect(ports, Op::CreditUpdate);
        assert!(update.fwd_cnt > 0);
        reader.join().unwrap()
    });
    assert!(got == noise(4096).repeat(sent / 4096));
}

#[test]
fn data_without_credit_ends_the_stream() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.connected(10);
    fill_window(&mut guest, ports, 0);
    guest.send(ports, Op::Data, &noise(8192));
    guest.expect(ports, Op::Reset);
    guest.send(ports, Op::Data, b"x");
    guest.expect(ports, Op::Reset);
    guest.still_works();
    rest(&mut client);
}

#[test]
fn each_side_may_end_its_direction_alone() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.connected(10);
    client.write_all(b"last words").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect_data(ports, 10), b"last words");
    guest.expect_shutdown(ports, Shutdown::SEND);
    guest.send(ports, Op::Data, b"still here");
    assert_eq!(read(&mut client, 10), b"still here");
    guest.shut_down(ports, Shutdown::SEND);
    assert_eq!(rest(&mut client), b"");
    // Both directions are over now, whoever has closed what.
    guest.expect_shutdown(ports, Shutdown::SEND | Shutdown::RECEIVE);
    guest.send(ports, Op::Reset, &[]);

    let (mut client, ports) = guest.connected(10);
    guest.send(ports, Op::Data, b"last words");
    guest.shut_down(ports, Shutdown::SEND);
    assert_eq!(rest(&mut client), b"last words");
    client.write_all(b"still here").unwrap();
    assert_eq!(guest.expect_data(ports, 10), b"still here");
    drop(client);
    guest.expect_shutdown(ports, Shutdown::SEND | Shutdown::RECEIVE);
    guest.send(ports, Op::Reset, &[]);
    guest.expect_silence();
    guest.still_works();
}

#[test]
fn a_guest_that_reads_no_more_stops_the_writer() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.connected(10);
    guest.shut_down(ports, Shutdown::RECEIVE);
    // The device has shut its end down before it was done with the packet.
    let error = client.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    guest.send(ports, Op::Data, b"goes on");
    assert_eq!(read(&mut client, 7), b"goes on");
    guest.shut_down(ports, Shutdown::SEND);
    guest.expect(ports, Op::Reset);
    assert_eq!(rest(&mut client), b"");
}

#[test]
fn a_guest_that_closes_is_answered_and_the_host_gets_all_it_sent() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.connected(10);
    let sent = fill_window(&mut guest, ports, 0);
    guest.shut_down(ports, Shutdown::SEND | Shutdown::RECEIVE);
    guest.expect(ports, Op::Reset);
    // The guest may use the ports anew while the host has not read yet.
    guest.send(ports, Op::Data, b"x");
    guest.expect(ports, Op::Reset);
    guest.still_works();
    assert!(rest(&mut client) == noise(4096).repeat(sent / 4096));
}

#[test]
fn a_client_that_closes_has_sent_all() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.connected(10);
    let bytes = noise(100_000);
    client.write_all(&bytes).unwrap();
    drop(client);
    // The guest may hear that nobody reads before it has got all.
    let mut got = Vec::new();
    let mut gone = Shutdown::empty();
    while got.len() < bytes.len() || gone != Shutdown::all() {
        let (header, data) = guest.receive();
        match Op::decode(header.op) {
            Some(Op::Data) => got.extend(data),
            Some(Op::Shutdown) => {
                gone |= Shutdown::from_bits_truncate(header.flags);
                assert!(!gone.contains(Shutdown::SEND) || got.len() == bytes.len());
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(got == bytes);
    // What the guest had sent meanwhile is nobody's, and no error.
    guest.send(ports, Op::Data, b"too late");
    guest.expect_silence();
    guest.send(ports, Op::Reset, &[]);
    guest.expect_silence();
    guest.still_works();
}

/// A table of streams with one that a client has asked for, at a moment, without a thread.
struct Table {
    _directory: TempDir,
    streams: Streams,
    host: HostSide,
    poll: Poll,
    client: UnixStream,
    now: Instant,
}

impl Table {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let host = HostSide::new(Some((UnixListener::bind(&path).unwrap(), &path))).unwrap();
        let (poll, _) = Poll::new().unwrap();
        let (ours, client) = UnixStream::pair().unwrap();
        let (mut streams, now) = (Streams::new(CID), Instant::now());
        streams.request(7, ours, 1024, now);
        Self { _directory: directory, streams, host, poll, client, now }
    }

    /// The next packet.
    fn receive(&mut self) -> Option<Header> {
        let mut bytes = [0; 100];
        let buffer = GuestBuffer::from_slice(&mut bytes);
        self.streams.fill(&buffer, self.now)?;
        let mut header = [0; HEADER_SIZE];
        buffer.read_at(0, &mut header).unwrap();
        Some(Header::decode(header))
    }

    fn op(&mut self) -> Option<Op> {
        Op::decode(self.receive()?.op)
    }

    /// Nothing happens until so long from now, and then a reset.
    fn expires_after(&mut self, time: Duration) {
        assert_eq!(self.streams.deadline(), Some(self.now + time));
        self.streams.expire(self.now + time - Duration::from_millis(1));
        assert_eq!(self.op(), None);
        self.streams.expire(self.now + time);
        assert_eq!(self.op(), Some(Op::Reset));
        assert_eq!(self.streams.deadline(), None);
        assert_eq!(self.op(), None);
    }
}

#[test]
fn a_guest_that_does_not_answer_is_not_waited_for() {
    let mut table = Table::new();
    assert_eq!(table.op(), Some(Op::Request));
    table.expires_after(ANSWER_TIME);
    assert_eq!(rest(&mut table.client), b"");
}

#[test]
fn a_guest_that_does_not_confirm_the_end_is_not_waited_for() {
    let mut table = Table::new();
    let request = table.receive().unwrap();
    let mut response = from_guest((request.src_port, request.dst_port), Op::Response, 0).encode();
    let packet = GuestBuffer::from_slice(&mut response);
    table.streams.take(&packet, &table.host, &mut table.poll);
    assert!(line(&mut table.client).starts_with("OK "));
    assert_eq!(table.streams.deadline().map(|deadline| deadline > table.now), Some(true));
    table.client.shutdown(std::net::Shutdown::Both).unwrap();
    table.streams.event(7, EventSet::IN | EventSet::HANG_UP);
    assert_eq!(table.op(), Some(Op::Shutdown));
    table.streams.expire(table.now);
    table.expires_after(CLOSE_TIME);
}

#[test]
fn a_guest_that_was_not_asked_yet_hears_nothing_of_a_client_that_gave_up() {
    let mut table = Table::new();
    table.streams.expire(table.now + ANSWER_TIME);
    assert_eq!(rest(&mut table.client), b"");
    assert_eq!(table.op(), None);
}

#[test]
fn streams_take_turns() {
    let mut guest = Guest::bare();
    guest.offer_all();
    let mut clients: Vec<_> = (0..4).map(|port| guest.connected(port)).collect();
    // Takes the buffers away, and lets everybody write more than one packet holds.
    for _ in 0..SIZE {
        clients[0].0.write_all(b"x").unwrap();
        guest.wait_used(RX);
    }
    for (client, _) in &mut clients {
        client.write_all(&noise(100 * 56)).unwrap();
    }
    std::thread::sleep(Duration::from_millis(50));
    let mut turns = Vec::new();
    for round in 0..200 {
        guest.offer(RX, round % SIZE, 100);
        let (head, _) = guest.wait_used(RX);
        let mut header = [0; HEADER_SIZE];
        let at = GuestAddress(buffer(RX, head as u16));
        guest.driver.memory().read_slice(&mut header, at).unwrap();
        turns.push(Header::decode(header).dst_port);
    }
    for round in turns.chunks(4) {
        let mut ports = round.to_vec();
        ports.sort_unstable();
        assert_eq!(ports, [0, 1, 2, 3], "{turns:?}");
    }
}

#[test]
fn hundreds_of_streams_work_at_once() {
    let mut guest = Guest::ready();
    let mut clients: Vec<_> = (0..300).map(|_| guest.connected(10)).collect();
    for (index, (client, ports)) in clients.iter_mut().enumerate() {
        client.write_all(format!("{index:04}").as_bytes()).unwrap();
        guest.send(*ports, Op::Data, format!("{index:04}").as_bytes());
    }
    for _ in 0..300 {
        let (header, data) = guest.receive();
        let index: usize = std::str::from_utf8(&data).unwrap().parse().unwrap();
        assert_eq!(header.src_port, clients[index].1.0);
    }
    for (index, (client, _)) in clients.iter_mut().enumerate() {
        assert_eq!(read(client, 4), format!("{index:04}").as_bytes());
    }
}

#[test]
fn a_reset_of_the_device_ends_all_streams_and_the_guest_is_told() {
    let mut guest = Guest::ready();
    guest.offer(EVENT, 0, 4);
    let (mut client, _) = guest.connected(10);
    guest.driver.reset();
    assert_eq!(rest(&mut client), b"");
    guest.start(0);
    guest.offer(EVENT, 0, 3);
    guest.offer(EVENT, 1, 8);
    guest.offer_all();
    assert_eq!(guest.wait_used(EVENT), (0, 0), "too small");
    assert_eq!(guest.wait_used(EVENT), (1, 4));
    let event: u32 = guest.driver.memory().read_obj(GuestAddress(buffer(EVENT, 1))).unwrap();
    assert_eq!(event, 0, "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    guest.still_works();
    guest.offer(EVENT, 2, 4);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(guest.used(EVENT), None, "once");
}

#[test]
fn a_reset_without_streams_is_nothing_to_tell() {
    let mut guest = Guest::ready();
    guest.start(0);
    guest.offer(EVENT, 0, 4);
    guest.offer_all();
    guest.still_works();
    assert_eq!(guest.used(EVENT), None);
}

#[test]
fn a_device_that_finishes_has_delivered_everything() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.connected(10);
    let sent = fill_window(&mut guest, ports, 0);
    let start = Instant::now();
    guest.device.finish(Duration::from_millis(50));
    assert!(start.elapsed() >= Duration::from_millis(50), "nobody reads");
    let device = guest.device.clone();
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| read(&mut client, sent));
        device.finish(Duration::from_secs(60));
        assert!(reader.join().unwrap() == noise(4096).repeat(sent / 4096));
    });
    assert!(start.elapsed() < Duration::from_secs(30));
}

#[test]
fn a_device_that_is_dropped_closes_its_sockets() {
    let mut guest = Guest::ready();
    let (mut client, _) = guest.connected(10);
    let mut half_open = guest.client();
    let Guest { driver, device, .. } = guest;
    drop((driver, device));
    assert_eq!(rest(&mut client), b"");
    assert!(matches!(half_open.read(&mut [0]), Ok(0) | Err(_)));
}
