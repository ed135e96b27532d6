//! Programs of the host that connect, and those that listen.

use super::*;
use crate::virtio::vsock::host::{CONNECT_TIME, HostSide, MAX_HALF_OPEN};
use crate::virtio::vsock::poll::Poll;

#[test]
fn a_client_reaches_a_port_of_the_guest() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    client.write_all(b"connect 1024\nearly").unwrap();
    let (request, data) = guest.receive();
    assert_eq!(Op::decode(request.op), Some(Op::Request));
    assert_eq!((request.src_cid, request.dst_port, request.kind), (2, 1024, TYPE_STREAM));
    assert_eq!((request.buf_alloc, request.fwd_cnt), (256 << 10, 0));
    assert_eq!(data, b"");
    guest.expect_silence();
    let ports = (request.src_port, 1024);
    guest.send(ports, Op::Response, &[]);
    assert_eq!(guest.expect_data(ports, 5), b"early");
    guest.send(ports, Op::Data, b"hello");
    assert_eq!(line(&mut client), format!("OK {}\n", ports.0));
    assert_eq!(read(&mut client, 5), b"hello");
    client.write_all(b"and back").unwrap();
    assert_eq!(guest.expect_data(ports, 8), b"and back");
}

#[test]
fn the_process_itself_reaches_a_port_of_the_guest() {
    let guest = Guest::new();
    let early = guest.device.connect(513).unwrap_err();
    assert_eq!(early.kind(), std::io::ErrorKind::NotConnected, "the guest has no driver yet");
    let mut guest = Guest::ready();
    let mut stream = guest.device.connect(513).unwrap();
    let (request, _) = guest.receive();
    let ports = (request.src_port, 513);
    assert_eq!((Op::decode(request.op), request.dst_port), (Some(Op::Request), 513));
    guest.send(ports, Op::Response, &[]);
    assert_eq!(line(&mut stream), format!("OK {}\n", ports.0));
    stream.write_all(b"changed").unwrap();
    assert_eq!(guest.expect_data(ports, 7), b"changed");
    // Where nobody listens, that is the end.
    let mut refused = guest.device.connect(514).unwrap();
    let (request, _) = guest.receive();
    guest.send((request.src_port, 514), Op::Reset, &[]);
    assert_eq!(rest(&mut refused), b"");
    guest.still_works();
}

#[test]
fn a_line_may_come_in_pieces() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    for piece in ["CON", "NECT 7", "7", "\n"] {
        guest.expect_silence();
        client.write_all(piece.as_bytes()).unwrap();
    }
    let (request, _) = guest.receive();
    assert_eq!(request.dst_port, 77);
}

#[test]
fn a_client_whose_port_nobody_listens_on_is_closed_at_once() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    let (request, _) = guest.receive();
    guest.send((request.src_port, 1), Op::Reset, &[]);
    assert_eq!(rest(&mut client), b"");
    guest.expect_silence();
    guest.still_works();
}

#[test]
fn a_client_that_comes_before_the_driver_is_closed_at_once() {
    let mut guest = Guest::new();
    for _ in 0..100 {
        let mut client = guest.client();
        client.write_all(b"CONNECT 1024\n").unwrap();
        assert_eq!(rest(&mut client), b"");
    }
    guest.start(0);
    guest.offer_all();
    guest.still_works();
}

#[test]
fn a_client_that_talks_nonsense_is_closed_at_once() {
    let mut guest = Guest::ready();
    for line in ["\n", "GET / HTTP/1.0\r\n", "CONNECT many\n", "CONNECT 99999999999\n"] {
        let mut client = guest.client();
        client.write_all(line.as_bytes()).unwrap();
        // Closed with unread bytes in it, which the client may see as a reset.
        assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)), "{line:?}");
    }
    let mut client = guest.client();
    // The device may close before it is all written.
    let _ = client.write_all(&[b'C'; 100]);
    assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
    guest.expect_silence();
    guest.still_works();
}

#[test]
fn a_thousand_half_open_clients_hold_back_nobody() {
    let mut guest = Guest::ready();
    let mut clients: Vec<_> = (0..1000).map(|_| guest.client()).collect();
    guest.still_works();
    // Those that have waited longest were closed.
    let open = |client: &mut UnixStream| {
        client.set_nonblocking(true).unwrap();
        !matches!(client.read(&mut [0]), Ok(0))
    };
    let open = clients.iter_mut().filter_map(|client| open(client).then_some(())).count();
    assert!(open <= MAX_HALF_OPEN, "{open}");
}

#[test]
fn a_client_that_says_nothing_is_closed_after_a_while() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vsock");
    let listener = UnixListener::bind(&path).unwrap();
    let (mut poll, _waiter) = Poll::new().unwrap();
    let mut host = HostSide::new(Some((listener, &path))).unwrap();
    let mut client = UnixStream::connect(&path).unwrap();
    let now = Instant::now();
    host.accept(&mut poll, now);
    client.write_all(b"CONN").unwrap();
    assert!(host.event(0).is_none());
    client.set_nonblocking(true).unwrap();
    host.expire(&mut poll, now + CONNECT_TIME - Duration::from_millis(1));
    assert_eq!(client.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(host.deadline(), Some(now + CONNECT_TIME));
    host.expire(&mut poll, now + CONNECT_TIME);
    assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
    assert_eq!(host.deadline(), None);
}

#[test]
fn a_client_that_goes_before_the_answer_takes_its_stream_along() {
    let mut guest = Guest::ready();
    let mut client = guest.client();
    client.write_all(b"CONNECT 5\n").unwrap();
    let (request, _) = guest.receive();
    drop(client);
    let ports = (request.src_port, 5);
    guest.expect(ports, Op::Reset);
    // The answer was on its way.
    guest.send(ports, Op::Response, &[]);
    guest.expect(ports, Op::Reset);
    guest.still_works();
}

#[test]
fn the_guest_reaches_a_program_that_listens() {
    let mut guest = Guest::ready();
    let listener = guest.listen(52);
    let ports = (52, 4000);
    guest.send(ports, Op::Request, &[]);
    let response = guest.expect(ports, Op::Response);
    assert_eq!(response.buf_alloc, 256 << 10);
    let (mut program, _) = listener.accept().unwrap();
    program.write_all(b"from the host").unwrap();
    assert_eq!(guest.expect_data(ports, 13), b"from the host");
    guest.send(ports, Op::Data, b"from the guest");
    assert_eq!(read(&mut program, 14), b"from the guest");
}

#[test]
fn the_guest_is_refused_where_nobody_listens() {
    let mut guest = Guest::ready();
    guest.send((1, 4000), Op::Request, &[]);
    guest.expect((1, 4000), Op::Reset);
    std::fs::write(guest.directory.path().join("vsock_2"), "no socket").unwrap();
    guest.send((2, 4000), Op::Request, &[]);
    guest.expect((2, 4000), Op::Reset);
    drop(guest.listen(3));
    guest.send((3, 4000), Op::Request, &[]);
    guest.expect((3, 4000), Op::Reset);
    guest.still_works();
}

#[test]
fn a_program_that_accepts_nobody_does_not_hold_the_guest() {
    let mut guest = Guest::ready();
    let listener = guest.listen(52);
    rustix::net::listen(&listener, 1).unwrap();
    let mut refused = 0;
    for port in 0..10 {
        guest.send((52, port), Op::Request, &[]);
        let (answer, _) = guest.receive();
        refused += usize::from(Op::decode(answer.op) == Some(Op::Reset));
    }
    assert!(refused > 0, "when it has no room for more");
    guest.still_works();
}
