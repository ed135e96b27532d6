//! Requests that hang in the host: below the share is a file system whose server does not answer.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use vm_memory::{ByteValued, Bytes, GuestAddress};

use crate::fuse::abi::*;
use crate::fuse::opcode::{self, Opcode};
use crate::fuse::testing::{EVERYTHING, Guest};
use crate::virtio::fs::{Config, FsDevice};
use crate::virtio::testing::*;

/// Where each queue's request and reply are: a queue's number times this, and half of it further on.
const ROOM: u64 = 0x1000;
const REPLIES: u64 = ROOM / 2;
/// Longer than a vCPU waits for a reset, and than a request may take before it is kicked.
const LONG: Duration = Duration::from_millis(1500);

/// What the server does with a read that its client does not want any longer.
#[derive(Clone, Copy, PartialEq)]
enum Manners {
    /// Gives it up.
    Polite,
    /// Nothing: who waits for it cannot even be killed.
    Stubborn,
}

/// A file system with one file, `file`, the reading of which does not end. Until this is dropped.
struct Hung {
    path: PathBuf,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    asked: AtomicBool,
    answer: AtomicBool,
    end: AtomicBool,
}

impl Hung {
    /// None where this process may not mount.
    fn mount(path: &Path, manners: Manners) -> Option<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse").ok()?;
        let options =
            format!("fd={},rootmode=40755,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let options = CString::new(options).unwrap();
        std::fs::create_dir(path).unwrap();
        mount("hung", path, "fuse.hung", MountFlags::empty(), Some(options.as_c_str())).ok()?;
        let state = Arc::new(State::default());
        let server = state.clone();
        let thread = std::thread::spawn(move || serve(&device, &server, manners));
        Some(Self { path: path.to_owned(), state, thread: Some(thread) })
    }

    fn wait_until_asked(&self) {
        wait_for(|| self.state.asked.load(Ordering::SeqCst));
    }

    /// The read ends, with an error.
    fn answer(&self) {
        self.state.answer.store(true, Ordering::SeqCst);
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        let _ = unmount(&self.path, UnmountFlags::DETACH);
        // With the server all that waits for it ends.
        self.state.end.store(true, Ordering::SeqCst);
        self.thread.take().unwrap().join().unwrap();
    }
}

fn wait_for(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed() < Duration::from_secs(10));
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// The server: as little of FUSE as a read takes.
fn serve(mut device: &File, state: &State, manners: Manners) {
    let mut bytes = vec![0; 1 << 17];
    let mut hanging = None;
    while !state.end.load(Ordering::SeqCst) {
        if state.answer.load(Ordering::SeqCst)
            && let Some(unique) = hanging.take()
        {
            reply(device, unique, libc::EIO, &[]);
        }
        let moment = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };
        let mut ready = [PollFd::from_borrowed_fd(device.as_fd(), PollFlags::IN)];
        if poll(&mut ready, Some(&moment)) != Ok(1) {
            continue;
        }
        let Ok(len) = device.read(&mut bytes) else { continue };
        let header: InHeader = part(&bytes);
        let body = &bytes[size_of::<InHeader>()..len];
        let mut attr = Attr { ino: 1, mode: libc::S_IFDIR | 0o755, nlink: 2, ..Attr::default() };
        if header.nodeid == 2 || header.opcode == Opcode::Lookup as u32 {
            attr = Attr { ino: 2, mode: libc::S_IFREG | 0o644, nlink: 1, size: 4096, ..attr };
        }
        match opcode::find(header.opcode).map(|known| known.opcode) {
            Some(Opcode::Init) => {
                let init =
                    InitOut { major: 7, minor: MINOR, max_write: 4096, ..InitOut::default() };
                reply(device, header.unique, 0, init.as_slice());
            }
            Some(Opcode::Lookup) if body == b"file\0" => {
                let entry = EntryOut { nodeid: 2, attr, ..EntryOut::default() };
                reply(device, header.unique, 0, entry.as_slice());
            }
            Some(Opcode::Lookup) => reply(device, header.unique, libc::ENOENT, &[]),
            Some(Opcode::Getattr) => {
                let attr = AttrOut { attr, ..AttrOut::default() };
                reply(device, header.unique, 0, attr.as_slice());
            }
            Some(Opcode::Open | Opcode::Opendir) => {
                let open = OpenOut { open_flags: FOPEN_DIRECT_IO, ..OpenOut::default() };
                reply(device, header.unique, 0, open.as_slice());
            }
            Some(Opcode::Statfs) => reply(device, header.unique, 0, &[0; 80]),
            Some(Opcode::Read) => {
                hanging = Some(header.unique);
                state.asked.store(true, Ordering::SeqCst);
            }
            Some(Opcode::Interrupt) => {
                if manners == Manners::Polite
                    && let Some(unique) = hanging.take()
                {
                    reply(device, unique, libc::EINTR, &[]);
                }
            }
            Some(Opcode::Forget | Opcode::BatchForget) => {}
            Some(Opcode::Release | Opcode::Releasedir) => reply(device, header.unique, 0, &[]),
            _ => reply(device, header.unique, libc::ENOSYS, &[]),
        }
    }
}

fn part<T: ByteValued + Default>(bytes: &[u8]) -> T {
    let mut value = T::default();
    value.as_mut_slice().copy_from_slice(&bytes[..size_of::<T>()]);
    value
}

fn reply(mut device: &File, unique: u64, error: i32, body: &[u8]) {
    let len = size_of::<OutHeader>() + body.len();
    let header = OutHeader { len: len as u32, error: -error, unique };
    // Whoever asked may be gone.
    let _ = device.write(&[header.as_slice(), body].concat());
}

/// A device in front of a share, and in that share a file system that hangs.
struct Machine {
    device: Arc<FsDevice>,
    driver: Driver,
    queues: Vec<DriverQueue>,
    guest: Guest,
    // Dropped last: nothing that hangs there ends before.
    hung: Hung,
}

impl Machine {
    /// One whose first request queue has a request that hangs. None where this process may not mount.
    fn with_a_request_that_hangs(manners: Manners) -> Option<Self> {
        let guest = Guest::without_init(|_| {}, true);
        let hung = Hung::mount(&guest.path().join("sub"), manners)?;
        let config = Config::new("share", 2).unwrap();
        let device = Arc::new(FsDevice::new(config, guest.session.clone(), None).unwrap());
        let driver = Driver::new(device.clone());
        let queues = driver.start(0, &[(0, 16), (1, 16), (2, 16)]);
        let mut machine = Self { device, driver, queues, guest, hung };
        // What leads to the file goes past the queues.
        assert_eq!(machine.guest.init(7, MINOR, EVERYTHING).error, 0);
        let node = machine.guest.node("sub/file");
        let fh = machine.guest.fh(node, libc::O_RDONLY);
        let read = ReadIn { fh, size: 1024, ..ReadIn::default() };
        machine.offer(1, Opcode::Read, node, read.as_slice());
        machine.hung.wait_until_asked();
        Some(machine)
    }

    /// Puts a request into a queue.
    fn offer(&mut self, index: u16, opcode: Opcode, node: u64, body: &[u8]) {
        let memory = self.driver.memory();
        let at = ROOM * (1 + u64::from(index));
        let request = self.guest.frame(opcode as u32, node, &[body]);
        memory.write_slice(&request, GuestAddress(at)).unwrap();
        let queue = &mut self.queues[usize::from(index)];
        queue.describe(&memory, 0, (at, request.len() as u32, NEXT, 1));
        queue.describe(&memory, 1, (at + REPLIES, REPLIES as u32, WRITE, 0));
        queue.offer(&memory, 0);
        self.driver.notify(index);
    }

    /// Waits for the only reply of a queue, and says how long it is.
    fn served(&mut self, index: u16) -> u32 {
        self.driver.wait(index, 1);
        self.queues[usize::from(index)].take_used(&self.driver.memory()).unwrap().1
    }

    fn reply(&self, index: u16) -> Vec<u8> {
        let mut bytes = vec![0; REPLIES as usize];
        let at = ROOM * (1 + u64::from(index)) + REPLIES;
        self.driver.memory().read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }

    /// The device works again, after a reset.
    fn works(&mut self) {
        let interrupts = self.driver.controller.triggers()[2];
        self.queues = self.driver.start(0, &[(0, 16), (1, 16), (2, 16)]);
        let init = InitIn { major: 7, minor: MINOR, max_readahead: 0, flags: 0 };
        let body = [init.as_slice(), InitIn2::default().as_slice()].concat();
        self.offer(1, Opcode::Init, 0, &body);
        self.driver.wait(1, interrupts + 1);
        assert_eq!(self.reply(1)[4..8], [0; 4], "INIT succeeds");
    }
}

#[test]
fn a_reset_while_the_host_does_not_answer_holds_up_no_vcpu_and_ends_with_the_answer() {
    let Some(mut machine) = Machine::with_a_request_that_hangs(Manners::Stubborn) else { return };
    // Meanwhile the other queues go on.
    machine.offer(2, Opcode::Getattr, ROOT_ID, GetattrIn::default().as_slice());
    assert_ne!(machine.served(2), 0);
    machine.offer(0, Opcode::Forget, 99, ForgetIn { nlookup: 1 }.as_slice());
    assert_eq!(machine.served(0), 0);

    let before = machine.reply(1);
    let since = Instant::now();
    machine.driver.set_status(0);
    assert!(since.elapsed() < Duration::from_secs(1), "{:?}", since.elapsed());
    std::thread::sleep(LONG);
    assert_eq!(
        machine.driver.status(),
        15,
        "the request may still reach memory: it is no reset yet"
    );
    assert!(machine.reply(1) == before);

    machine.hung.answer();
    machine.driver.wait_until_reset();
    let before = machine.reply(1);
    std::thread::sleep(Duration::from_millis(20));
    assert!(machine.reply(1) == before, "memory is the driver's again");
    machine.works();
}

#[test]
fn a_reset_ends_what_waits_for_a_server_that_lets_its_clients_give_up() {
    let Some(mut machine) = Machine::with_a_request_that_hangs(Manners::Polite) else { return };
    machine.driver.set_status(0);
    machine.driver.wait_until_reset();
    machine.works();
}

#[test]
fn a_device_that_is_not_used_any_more_is_not_waited_for_without_end() {
    let Some(machine) = Machine::with_a_request_that_hangs(Manners::Stubborn) else { return };
    let since = Instant::now();
    assert!(!machine.device.retire(Duration::from_millis(1200)));
    assert!(since.elapsed() < Duration::from_secs(4), "{:?}", since.elapsed());
    // Nor when the guest waits for it as well.
    machine.driver.set_status(0);
    assert!(!machine.device.retire(Duration::from_millis(1)));
    machine.hung.answer();
    machine.driver.wait_until_reset();
    assert!(machine.device.retire(Duration::ZERO));
}
