//! Every device as a driver meets it, and a request that it must be able to serve whatever came before: for what
//! plays a hostile guest, in tests and fuzzers.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests and fuzzers fail so")]

use std::io::{self, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::dax;
use crate::fuse::abi::{IN_HEADER, InHeader, ROOT_ID};
use crate::fuse::opcode::Opcode;
use crate::fuse::{FileSystem, Session};
use crate::pci::testing::Slot;
use crate::virtio::console::{ConsoleDevice, Port};
use crate::virtio::fs::{Config, Dispatch, FsDevice, Window};
use crate::virtio::rng::RngDevice;
use crate::virtio::testing::{Driver, DriverQueue, NEXT, WRITE};
use crate::virtio::vsock::{self, VsockDevice};

/// Where good requests are, and the room for what is answered. Queues are below.
const REQUEST: u64 = 0x30_0000;
const REPLY: u64 = 0x30_1000;

/// The guest's context id.
pub const CID: u64 = 77;

/// Which device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Fs,
    Console,
    Rng,
    Vsock,
}

/// A device and its driver.
pub struct Machine {
    pub kind: Kind,
    pub driver: Driver,
    /// Of a file system: where its window is.
    pub slot: Arc<Slot>,
    vsock: Option<Arc<VsockDevice>>,
}

/// Output that nobody looks at.
struct Nowhere;

impl Write for Nowhere {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Machine {
    /// A file system with a window of 4 MiB. vCPUs serve its requests where they can, so that the same is done in
    /// the same order every time.
    pub fn fs(fs: Arc<dyn FileSystem>) -> Self {
        let window = Arc::new(dax::Window::new(4 << 20).unwrap());
        let session = Session::new(fs, Some(window.clone()));
        let slot = Arc::new(Slot::default());
        let shown = Window { dax: window, slot: slot.clone() };
        let config = Config::new("share", 1).unwrap();
        let device = FsDevice::new(config, Arc::new(session), Some(shown)).unwrap();
        let device = device.with_dispatch(Dispatch::Inline);
        Self { kind: Kind::Fs, driver: Driver::new(Arc::new(device)), slot, vsock: None }
    }

    /// A console with two ports, and input for the first.
    pub fn console() -> Self {
        let port = |name: &str| Port { name: name.into(), output: Some(Box::new(Nowhere)) };
        let device = ConsoleDevice::new(vec![port("first"), port("second")]).unwrap();
        device.input(0).unwrap().try_send(b"typed");
        let driver = Driver::new(Arc::new(device));
        Self { kind: Kind::Console, driver, slot: Arc::default(), vsock: None }
    }

    /// An entropy device.
    pub fn rng() -> Self {
        let driver = Driver::new(Arc::new(RngDevice::new().unwrap()));
        Self { kind: Kind::Rng, driver, slot: Arc::default(), vsock: None }
    }

    /// A socket device, whose sockets are in a directory: `vsock` and `vsock_PORT`.
    pub fn vsock(directory: &Path) -> Self {
        let path = directory.join("vsock");
        let listener = UnixListener::bind(&path).unwrap();
        let config = vsock::Config::new(CID as u32).unwrap();
        let device = Arc::new(VsockDevice::new(config, listener, &path).unwrap());
        let driver = Driver::new(device.clone());
        Self { kind: Kind::Vsock, driver, slot: Arc::default(), vsock: Some(device) }
    }

    /// The features of the device type that its driver takes.
    pub fn features(&self) -> u64 {
        match self.kind {
            // MULTIPORT.
            Kind::Console => 2,
            Kind::Vsock => 1,
            Kind::Fs | Kind::Rng => 0,
        }
    }

    /// How many queues it has.
    pub fn queues(&self) -> u16 {
        self.driver.read::<2>(18) as u16
    }

    /// Waits until the device has done what it was asked to do, or does no more. A queue that nobody serves holds
    /// this up for a moment only.
    pub fn settle(&self, queues: &[DriverQueue]) {
        if let Some(device) = &self.vsock {
            return device.finish(Duration::from_millis(20));
        }
        let since = Instant::now();
        let memory = self.driver.memory();
        let used = || queues.iter().map(|queue| queue.used_index(&memory)).collect::<Vec<_>>();
        let (mut last, mut quiet) = (used(), Instant::now());
        while quiet.elapsed() < Duration::from_micros(200)
            && since.elapsed() < Duration::from_millis(5)
        {
            std::thread::yield_now();
            let now = used();
            if now != last {
                (last, quiet) = (now, Instant::now());
            }
        }
    }

    /// Starts the device over and has it serve a good request.
    pub fn still_works(&self) {
        let driver = &self.driver;
        match self.kind {
            Kind::Fs => {
                let mut queues = driver.start(0, &[(1, 8)]);
                self.serve(&mut queues[0], 1, &init(u64::MAX), 256);
                let getattr = request(Opcode::Getattr, ROOT_ID, 7, &[0; 16]);
                let reply = self.serve(&mut queues[0], 1, &getattr, 256);
                assert_eq!((reply.len(), &reply[4..8]), (16 + 104, &[0; 4][..]), "GETATTR");
            }
            Kind::Console => {
                let mut queues = driver.start(0, &[(1, 8)]);
                self.serve(&mut queues[0], 1, b"output", 0);
            }
            Kind::Rng => {
                let mut queues = driver.start(0, &[(0, 8)]);
                assert_eq!(self.serve(&mut queues[0], 0, &[], 64).len(), 64);
            }
            Kind::Vsock => {
                let mut queues = driver.start(1, &[(0, 8), (1, 8)]);
                self.serve(&mut queues[1], 1, &packet(1, (2, 3), &[]), 0);
                // Nobody listens.
                let reset = self.serve(&mut queues[0], 0, &[], 44);
                assert_eq!(reset[30..32], [3, 0], "VIRTIO_VSOCK_OP_RST");
            }
        }
    }

    /// Has one request served.
    pub fn serve(&self, queue: &mut DriverQueue, index: u16, request: &[u8], room: u32) -> Vec<u8> {
        let memory = self.driver.memory();
        memory.write_slice(request, GuestAddress(REQUEST)).unwrap();
        let len = request.len() as u32;
        let next = if room > 0 { NEXT } else { 0 };
        queue.describe(&memory, 0, (REQUEST, len, next, 1));
        queue.describe(&memory, 1, (REPLY, room, WRITE, 0));
        // A driver has no empty buffer.
        queue.offer(&memory, u16::from(len == 0));
        self.driver.notify(index);
        let since = Instant::now();
        let used = loop {
            if let Some((_, used)) = queue.take_used(&memory) {
                break used;
            }
            assert!(since.elapsed() < Duration::from_secs(20), "a good request is not served");
            std::thread::yield_now();
        };
        assert!(used <= room, "more than there is room for");
        let mut reply = vec![0; used as usize];
        memory.read_slice(&mut reply, GuestAddress(REPLY)).unwrap();
        reply
    }
}

/// A FUSE request as it should be, of the root user.
pub fn request(opcode: Opcode, nodeid: u64, unique: u64, body: &[u8]) -> Vec<u8> {
    let header = InHeader {
        len: (IN_HEADER + body.len()) as u32,
        opcode: opcode as u32,
        unique,
        nodeid,
        uid: 0,
        gid: 0,
        pid: 1,
        padding: 0,
    };
    [header.as_slice(), body].concat()
}

/// The INIT of a guest that wants what these flags say, of all that there is.
pub fn init(flags: u64) -> Vec<u8> {
    let words = [7u32, 45, 131_072, flags as u32, (flags >> 32) as u32];
    let mut body: Vec<u8> = words.into_iter().flat_map(u32::to_ne_bytes).collect();
    body.resize(64, 0);
    request(Opcode::Init, 0, 0, &body)
}

/// A packet of the guest (5.10.6), of a stream between these ports of host and guest.
pub fn packet(op: u16, (host, guest): (u32, u32), data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend(CID.to_le_bytes());
    bytes.extend(2u64.to_le_bytes());
    for word in [guest, host, data.len() as u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend(1u16.to_le_bytes());
    bytes.extend(op.to_le_bytes());
    // Flags, then how much the guest has room for, and that it has taken nothing.
    for word in [0, 1 << 20, 0u32] {
        bytes.extend(word.to_le_bytes());
    }
    bytes.extend_from_slice(data);
    bytes
}
