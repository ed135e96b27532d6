//! Packets that no driver sends.

use super::*;

#[test]
fn packets_that_are_no_packets_are_ignored() {
    let mut guest = Guest::ready();
    for len in [0, 1, HEADER_SIZE - 1] {
        guest.send_raw(&vec![0xff; len]);
    }
    // There is nobody to answer these.
    let request = from_guest((1, 2), Op::Request, 0);
    for cid in [0, 1, 2, CID + 1, CID | 1 << 32, u64::MAX] {
        guest.send_header(Header { src_cid: cid, ..request }, &[]);
    }
    guest.expect_silence();
    guest.still_works();
}

#[test]
fn a_stream_to_anybody_but_the_host_is_refused() {
    let mut guest = Guest::ready();
    for cid in [0, 1, 3, CID, 2 | 1 << 32, u64::MAX] {
        let request = from_guest((1, 2), Op::Request, 0);
        guest.send_header(Header { dst_cid: cid, ..request }, &[]);
        let (reset, _) = guest.receive();
        assert_eq!(Op::decode(reset.op), Some(Op::Reset));
        assert_eq!((reset.src_cid, reset.src_port, reset.dst_port), (cid, 1, 2));
    }
}

#[test]
fn a_socket_of_another_type_is_refused() {
    let mut guest = Guest::ready();
    let _listener = guest.listen(1);
    for kind in [0, 2, 3, u16::MAX] {
        let request = from_guest((1, 2), Op::Request, 0);
        guest.send_header(Header { kind, ..request }, &[]);
        let (reset, _) = guest.receive();
        assert_eq!((Op::decode(reset.op), reset.kind), (Some(Op::Reset), kind));
    }
    guest.still_works();
}

#[test]
fn whatever_is_sent_to_a_stream_that_there_is_not_is_answered_by_a_reset() {
    let mut guest = Guest::ready();
    let ports = (5, 6);
    for op in [Op::Response, Op::Shutdown, Op::Data, Op::CreditUpdate, Op::CreditRequest] {
        guest.send(ports, op, &[]);
        guest.expect(ports, Op::Reset);
    }
    for op in [0, 8, 0xffff] {
        guest.send_header(Header { op, ..from_guest(ports, Op::Data, 0) }, &[]);
        guest.expect(ports, Op::Reset);
    }
    // But not a reset, or two devices would never come to an end.
    guest.send(ports, Op::Reset, &[]);
    guest.expect_silence();
}

#[test]
fn what_a_stream_cannot_get_ends_it() {
    let mut guest = Guest::ready();
    for op in [0, 1, 2, 8, 0xffff] {
        let (mut client, ports) = guest.connected(10);
        guest.send_header(Header { op, ..from_guest(ports, Op::Data, 0) }, &[]);
        guest.expect(ports, Op::Reset);
        assert_eq!(rest(&mut client), b"", "operation {op}");
    }
    let (mut client, ports) = guest.connected(10);
    guest.shut_down(ports, Shutdown::SEND);
    guest.send(ports, Op::Data, b"after the end");
    guest.expect(ports, Op::Reset);
    assert_eq!(rest(&mut client), b"");
    guest.still_works();
}

#[test]
fn data_before_the_answer_ends_the_stream() {
    let mut guest = Guest::ready();
    for op in [Op::Data, Op::Shutdown, Op::CreditUpdate, Op::CreditRequest, Op::Request] {
        let mut client = guest.client();
        client.write_all(b"CONNECT 3\n").unwrap();
        let (request, _) = guest.receive();
        let ports = (request.src_port, 3);
        guest.send(ports, op, &[]);
        guest.expect(ports, Op::Reset);
        assert_eq!(rest(&mut client), b"");
    }
}

#[test]
fn a_packet_shorter_than_it_says_ends_the_stream() {
    let mut guest = Guest::ready();
    for len in [6, 1 << 16, u32::MAX] {
        let (mut client, ports) = guest.connected(10);
        guest.send_header(Header { len, ..from_guest(ports, Op::Data, 0) }, b"short");
        guest.expect(ports, Op::Reset);
        assert_eq!(rest(&mut client), b"");
    }
    let (mut client, ports) = guest.connected(10);
    guest.send_header(Header { len: 3, ..from_guest(ports, Op::Data, 0) }, b"longer");
    assert_eq!(read(&mut client, 3), b"lon");
    guest.still_works();
}

#[test]
fn data_from_a_page_that_is_gone_ends_the_stream() {
    let mut guest = Guest::ready();
    let (mut client, ports) = guest.connected(10);
    let memory = guest.driver.memory();
    let header = from_guest(ports, Op::Data, 100).encode();
    memory.write_slice(&header, GuestAddress(buffer(TX, 0))).unwrap();
    let queue = &mut guest.queues[usize::from(TX)];
    queue.describe(&memory, 0, (buffer(TX, 0), header.len() as u32, NEXT, 1));
    queue.describe(&memory, 1, (WINDOW, 100, 0, 0));
    queue.offer(&memory, 0);
    drop(memory);
    guest.driver.notify(TX);
    assert_eq!(guest.wait_used(TX), (0, 0));
    guest.expect(ports, Op::Reset);
    assert_eq!(rest(&mut client), b"");
    guest.still_works();
}

#[test]
fn data_into_a_page_that_is_gone_ends_the_stream() {
    let mut guest = Guest::bare();
    let listener = guest.listen(1);
    let ports = (1, 2);
    guest.send(ports, Op::Request, &[]);
    guest.offer(RX, 0, 100);
    guest.wait_used(RX);
    let (mut program, _) = listener.accept().unwrap();
    let memory = guest.driver.memory();
    let queue = &mut guest.queues[usize::from(RX)];
    queue.describe(&memory, 1, (buffer(RX, 1), 44, NEXT | WRITE, 2));
    queue.describe(&memory, 2, (WINDOW, 100, WRITE, 0));
    queue.offer(&memory, 1);
    drop(memory);
    program.write_all(b"lost").unwrap();
    guest.driver.notify(RX);
    // The buffer serves for the reset.
    assert_eq!(guest.wait_used(RX), (1, 44));
    let mut header = [0; HEADER_SIZE];
    guest.driver.memory().read_slice(&mut header, GuestAddress(buffer(RX, 1))).unwrap();
    assert_eq!(Header::decode(header).op, Op::Reset as u16);
    assert!(matches!(program.read(&mut [0]), Ok(0) | Err(_)));
}

#[test]
fn buffers_that_hold_no_packet_are_given_back() {
    let mut guest = Guest::bare();
    let mut client = guest.client();
    client.write_all(b"CONNECT 3\n").unwrap();
    for (head, len) in [(0, 0), (1, 1), (2, 43), (3, 44)] {
        guest.offer(RX, head, len);
        assert_eq!(guest.wait_used(RX), (head.into(), 0));
    }
    guest.offer(RX, 4, 45);
    assert_eq!(guest.wait_used(RX), (4, 44));
}

#[test]
fn a_guest_that_offers_no_buffers_is_not_heard_for_ever() {
    let mut guest = Guest::bare();
    let packet = from_guest((5, 6), Op::Data, 0).encode();
    let mut taken = 0;
    // Each wants an answer.
    loop {
        guest.put(&packet);
        let start = Instant::now();
        let mut used = guest.used(TX);
        while used.is_none() && start.elapsed() < Duration::from_millis(300) {
            std::thread::yield_now();
            used = guest.used(TX);
        }
        if used.is_none() {
            break;
        }
        taken += 1;
        assert!(taken < 10_000, "there is no end");
    }
    assert!(taken >= 256);
    // As soon as it does, it is heard again.
    guest.offer_all();
    for _ in 0..=taken {
        guest.expect((5, 6), Op::Reset);
    }
    assert_eq!(guest.wait_used(TX), (0, 0));
    guest.still_works();
}

#[test]
fn there_are_no_more_streams_than_so_many() {
    let mut guest = Guest::ready();
    let listener = guest.listen(1);
    let mut accepted = Vec::new();
    let mut refused = 0;
    for port in 0..1100 {
        guest.send((1, port), Op::Request, &[]);
        let (answer, _) = guest.receive();
        if Op::decode(answer.op) == Some(Op::Response) {
            // What may wait for all of them together stays within 64 MiB.
            let window = if accepted.len() < 128 { 256 << 10 } else { 32 << 10 };
            assert_eq!(answer.buf_alloc, window);
            accepted.push(listener.accept().unwrap().0);
        } else {
            refused += 1;
        }
    }
    assert_eq!((accepted.len(), refused), (1024, 76));
    let mut client = guest.client();
    client.write_all(b"CONNECT 1\n").unwrap();
    assert_eq!(rest(&mut client), b"");
    guest.send((1, 0), Op::Reset, &[]);
    guest.still_works();
}

#[test]
fn a_port_pair_that_is_in_use_is_no_second_stream() {
    let mut guest = Guest::ready();
    let _listener = guest.listen(1);
    guest.send((1, 2), Op::Request, &[]);
    guest.expect((1, 2), Op::Response);
    guest.send((1, 2), Op::Request, &[]);
    guest.expect((1, 2), Op::Reset);
}

#[test]
fn every_queue_that_is_broken_makes_the_device_need_a_reset() {
    for index in RX..=EVENT {
        let mut guest = Guest::ready();
        let (mut client, _) = guest.connected(10);
        if index == EVENT {
            // It is looked at when there is something to tell.
            guest.start(0);
        }
        let memory = guest.driver.memory();
        let queue = &mut guest.queues[usize::from(index)];
        queue.describe(&memory, 0, (RAM, 100, if index == TX { 0 } else { WRITE }, 0));
        (0..SIZE + 1).for_each(|_| queue.offer(&memory, 0));
        drop(memory);
        guest.driver.notify(index);
        let _ = client.write_all(b"something to say");
        guest.driver.wait_until_broken();
        assert!(matches!(client.read(&mut [0]), Ok(0) | Err(_)));
        // A reset helps.
        guest.start(0);
        guest.offer_all();
        guest.still_works();
    }
}

#[test]
fn noise_is_survived() {
    let mut guest = Guest::ready();
    let _listener = guest.listen(1);
    let mut noise = Noise(11);
    let mut streams = Vec::new();
    for _ in 0..3000 {
        let mut header = from_guest(
            (noise.pick(&[1, 5, 1 << 30]), noise.below(4) as u32),
            Op::Data,
            noise.below(20) as usize,
        );
        header.op = noise.below(9) as u16;
        header.flags = noise.below(5) as u32;
        header.buf_alloc = noise.pick(&[0, 1, 100, ROOM, u32::MAX]);
        header.fwd_cnt = noise.number() as u32;
        let data = vec![0x55; noise.below(30) as usize];
        guest.send_header(header, &data);
        while let Some((head, _)) = guest.used(RX) {
            guest.offer(RX, head as u16, noise.pick(&[0, 44, 60, BUFFER as u32]));
        }
        if noise.below(50) == 0 {
            let mut client = guest.client();
            client.write_all(b"CONNECT 1\nsome data").unwrap();
            streams.push(client);
        }
    }
    assert_eq!(guest.driver.status(), 15);
    guest.start(0);
    guest.offer_all();
    guest.still_works();
}
