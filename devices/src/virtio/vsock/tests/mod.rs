//! The whole device through its registers and rings, with a driver that does as Linux does, or worse.

mod clients;
mod hostile;
mod streams;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::packet::{HEADER_SIZE, HOST_CID, Header, Op, Shutdown, TYPE_STREAM};
use super::*;
use crate::virtio::VIRTIO_RING_F_EVENT_IDX;
use crate::virtio::testing::*;

const CID: u64 = 77;
const RX: u16 = 0;
const TX: u16 = 1;
const EVENT: u16 = 2;
const SIZE: u16 = 8;
/// Room for the largest packet.
const BUFFER: u64 = 0x1_1000;

/// What the guest says of its room.
const ROOM: u32 = 1 << 20;

/// A driver, and a directory for the host's sockets.
struct Guest {
    driver: Driver,
    device: Arc<VsockDevice>,
    queues: Vec<DriverQueue>,
    directory: TempDir,
}

/// Descriptor `head` of a queue has this buffer.
fn buffer(queue: u16, head: u16) -> u64 {
    0x20_0000 + BUFFER * u64::from(SIZE * queue + head)
}

impl Guest {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let config = Config::new(CID as u32).unwrap();
        let device = Arc::new(VsockDevice::new(config, listener, &path).unwrap());
        let driver = Driver::new(device.clone());
        Self { driver, device, queues: Vec::new(), directory }
    }

    /// With queues, and no buffers in them.
    fn bare() -> Self {
        let mut guest = Self::new();
        guest.start(VIRTIO_RING_F_EVENT_IDX);
        guest
    }

    /// With buffers for packets.
    fn ready() -> Self {
        let mut guest = Self::bare();
        guest.offer_all();
        guest
    }

    fn start(&mut self, features: u64) {
        let queues: Vec<_> = (RX..=EVENT).map(|index| (index, SIZE)).collect();
        self.queues = self.driver.start(features | 1, &queues);
    }

    fn offer_all(&mut self) {
        (0..SIZE).for_each(|head| self.offer(RX, head, BUFFER as u32));
    }

    fn offer(&mut self, index: u16, head: u16, len: u32) {
        let memory = self.driver.memory();
        let queue = &mut self.queues[usize::from(index)];
        queue.describe(&memory, head, (buffer(index, head), len, WRITE, 0));
        queue.offer(&memory, head);
        self.driver.notify(index);
    }

    fn used(&mut self, index: u16) -> Option<(u32, u32)> {
        self.queues[usize::from(index)].take_used(&self.driver.memory())
    }

    fn wait_used(&mut self, index: u16) -> (u32, u32) {
        let start = Instant::now();
        loop {
            if let Some(used) = self.used(index) {
                return used;
            }
            assert!(start.elapsed().as_secs() < 10, "queue {index}");
            std::thread::yield_now();
        }
    }

    /// Sends bytes as a packet, in pieces, and does not wait. They are in the buffer of descriptor 0.
    fn put(&mut self, bytes: &[u8]) {
        let memory = self.driver.memory();
        let at = buffer(TX, 0);
        memory.write_slice(bytes, GuestAddress(at)).unwrap();
        let queue = &mut self.queues[usize::from(TX)];
        let len = bytes.len() as u32;
        let first = len.min(HEADER_SIZE as u32 + 3);
        queue.describe(&memory, 0, (at, first, NEXT, 1));
        queue.describe(&memory, 1, (at + u64::from(first), len - first, 0, 0));
        queue.offer(&memory, 0);
        self.driver.notify(TX);
    }

    /// Sends bytes as a packet, and waits until they are taken.
    fn send_raw(&mut self, bytes: &[u8]) {
        self.put(bytes);
        assert_eq!(self.wait_used(TX), (0, 0));
    }

    fn send_header(&mut self, header: Header, data: &[u8]) {
        self.send_raw(&[&header.encode(), data].concat());
    }

    /// Sends a packet of the stream between these ports.
    fn send(&mut self, ports: (u32, u32), op: Op, data: &[u8]) {
        self.send_header(from_guest(ports, op, data.len()), data);
    }

    fn shut_down(&mut self, ports: (u32, u32), what: Shutdown) {
        let header = Header { flags: what.bits(), ..from_guest(ports, Op::Shutdown, 0) };
        self.send_header(header, &[]);
    }

    /// Receives the next packet, and gives the buffer back.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, len) = self.wait_used(RX);
        let mut bytes = vec![0; len as usize];
        let at = GuestAddress(buffer(RX, head as u16));
        self.driver.memory().read_slice(&mut bytes, at).unwrap();
        self.offer(RX, head as u16, BUFFER as u32);
        let data = bytes.split_off(HEADER_SIZE);
        let header = Header::decode(bytes.try_into().unwrap());
        assert_eq!(header.len as usize, data.len());
        assert_eq!(header.dst_cid, CID);
        (header, data)
    }

    /// Receives a packet that is this operation in the stream between these ports.
    #[track_caller]
    fn expect(&mut self, ports: (u32, u32), op: Op) -> Header {
        let (header, data) = self.receive();
        assert_eq!(Op::decode(header.op), Some(op), "{header:?}");
        assert_eq!((header.src_port, header.dst_port), ports, "{header:?}");
        assert_eq!((header.src_cid, header.kind), (HOST_CID, TYPE_STREAM));
        assert_eq!(data, b"");
        header
    }

    /// Receives data until there is as much, all of one stream.
    #[track_caller]
    fn expect_data(&mut self, ports: (u32, u32), len: usize) -> Vec<u8> {
        let mut all = Vec::new();
        while all.len() < len {
            let (header, data) = self.receive();
            assert_eq!(Op::decode(header.op), Some(Op::Data), "{header:?}");
            assert_eq!((header.src_port, header.dst_port), ports);
            all.extend(data);
        }
        assert_eq!(all.len(), len);
        all
    }

    #[track_caller]
    fn expect_shutdown(&mut self, ports: (u32, u32), what: Shutdown) {
        let header = self.expect(ports, Op::Shutdown);
        assert_eq!(Shutdown::from_bits_truncate(header.flags), what);
    }

    /// No packet comes for a while.
    #[track_caller]
    fn expect_silence(&mut self) {
        std::thread::sleep(Duration::from_millis(30));
        assert_eq!(self.used(RX), None);
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("vsock")
    }

    /// A program of the host that has connected to the device.
    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.path()).unwrap();
        client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        client
    }

    /// A stream that a client has begun. The guest's port is `port`.
    fn connected(&mut self, port: u32) -> (UnixStream, (u32, u32)) {
        let mut client = self.client();
        writeln!(client, "CONNECT {port}").unwrap();
        let (request, _) = self.receive();
        assert_eq!(Op::decode(request.op), Some(Op::Request));
        assert_eq!(request.dst_port, port);
        let ports = (request.src_port, port);
        self.send(ports, Op::Response, &[]);
        assert_eq!(line(&mut client), format!("OK {}\n", ports.0));
        (client, ports)
    }

    /// A program of the host that listens for a port of the host.
    fn listen(&self, port: u32) -> UnixListener {
        UnixListener::bind(self.directory.path().join(format!("vsock_{port}"))).unwrap()
    }

    /// The device still does what it is for.
    #[track_caller]
    fn still_works(&mut self) {
        let (mut client, ports) = self.connected(9);
        client.write_all(b"ping").unwrap();
        assert_eq!(self.expect_data(ports, 4), b"ping");
        self.send(ports, Op::Data, b"pong");
        assert_eq!(read(&mut client, 4), b"pong");
        drop(client);
        self.expect_shutdown(ports, Shutdown::all());
        self.send(ports, Op::Reset, &[]);
        assert_eq!(self.driver.status(), 15);
    }
}

/// A packet of the guest; ports are the host's and the guest's.
fn from_guest((host, guest): (u32, u32), op: Op, len: usize) -> Header {
    Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest,
        dst_port: host,
        len: len as u32,
        kind: TYPE_STREAM,
        op: op as u16,
        flags: 0,
        buf_alloc: ROOM,
        fwd_cnt: 0,
    }
}

fn noise(len: usize) -> Vec<u8> {
    let mut noise = Noise(7);
    (0..len).map(|_| noise.number() as u8).collect()
}

fn read(stream: &mut UnixStream, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).unwrap();
    bytes
}

fn line(stream: &mut UnixStream) -> String {
    let mut line = String::new();
    while !line.ends_with('\n') {
        line.push(char::from(read(stream, 1)[0]));
    }
    line
}

/// What comes until the end.
fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_driver_sees_a_socket_device() {
    let guest = Guest::new();
    let driver = &guest.driver;
    assert_eq!(driver.config_dword(0), 0x1053_1af4);
    let at = driver.find(4).unwrap().offset;
    assert_eq!(driver.read::<8>(at), CID, "guest_cid");
    assert_eq!(driver.read::<2>(18), 3, "queues");
    assert_eq!(driver.offered() & 0xff_ffff, 1, "streams and nothing else");
}
