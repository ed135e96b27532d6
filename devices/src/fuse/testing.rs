//! A guest for tests: sends raw requests to a session and checks the form of every reply.

use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::Duration;

use vm_memory::ByteValued;

use super::abi::*;
use super::filesystem::FileSystem;
use super::later::{Completion, Deferral, Served};
use super::opcode::Opcode;
use super::session::Session;
use crate::dax::{DaxWindow, Window};
use crate::memory::GuestBuffer;
use crate::share::{Options, Share, XattrPolicy};

/// What stands in a reply buffer before the server writes.
const UNTOUCHED: u8 = 0xa5;

/// A reply whose form was checked.
#[derive(Debug)]
pub(crate) struct Answer {
    /// Positive errno, 0 for success.
    pub error: i32,
    /// What follows the header.
    pub body: Vec<u8>,
}

impl Answer {
    fn check(reply: &[u8], unique: u64) -> Self {
        let mut header = OutHeader::default();
        header.as_mut_slice().copy_from_slice(&reply[..16]);
        assert_eq!(header.len as usize, reply.len(), "used length and out.len differ");
        assert_eq!(header.unique, unique, "unique is not echoed");
        assert!((-511..=0).contains(&header.error));
        assert!(header.error == 0 || reply.len() == 16, "an error has a body");
        Self { error: -header.error, body: reply[16..].to_vec() }
    }

    /// A fixed part of the body of a reply that succeeded.
    pub(crate) fn part<T: ByteValued + Default>(&self, offset: usize) -> T {
        assert_eq!(self.error, 0, "the request failed");
        let mut value = T::default();
        let bytes = &self.body[offset..offset + size_of::<T>()];
        value.as_mut_slice().copy_from_slice(bytes);
        value
    }

    /// The whole body as one struct, whose size it has exactly.
    pub(crate) fn get<T: ByteValued + Default>(&self) -> T {
        assert_eq!(self.error, 0, "the request failed");
        assert_eq!(self.body.len(), size_of::<T>());
        self.part(0)
    }

    /// Asserts success without a body.
    pub(crate) fn ok(&self) {
        assert_eq!((self.error, self.body.len()), (0, 0));
    }
}

/// How long any reply may take that is expected.
const PATIENCE: Duration = Duration::from_secs(10);

/// Takes a reply that comes later.
struct LaterReply(mpsc::Sender<Vec<u8>>);

impl Deferral for LaterReply {
    fn defer(&self) -> Box<dyn Completion> {
        Box::new(LaterReply(self.0.clone()))
    }
}

impl Completion for LaterReply {
    fn complete(self: Box<Self>, reply: &[u8]) {
        // A test that does not look is no error.
        let _ = self.0.send(reply.to_vec());
    }
}

/// Serves a request, and waits for a reply that comes later.
pub(crate) fn serve(session: &Session, request: &mut [u8], reply: &mut [u8]) -> u32 {
    let (sender, replies) = mpsc::channel();
    let buffer = GuestBuffer::from_slice(reply);
    let served = session.serve(&GuestBuffer::from_slice(request), &buffer, &LaterReply(sender));
    match served {
        Served::Done(len) => len,
        Served::Later => {
            let later = replies.recv_timeout(PATIENCE).expect("a reply that was to come");
            buffer.write_at(0, &later).unwrap();
            later.len() as u32
        }
    }
}

/// One name of a listing.
#[derive(Debug)]
pub(crate) struct Name {
    pub name: Vec<u8>,
    pub next: u64,
    pub entry: Option<EntryOut>,
}

/// The way to a session: takes a request and the room for its reply, and says how much of it was used.
pub(crate) type Door = Box<dyn Fn(&mut [u8], &mut [u8]) -> u32 + Send + Sync>;

/// A session with a share of a temporary directory behind it.
pub(crate) struct Guest {
    pub directory: tempfile::TempDir,
    pub share: Arc<Share>,
    pub window: Option<Arc<Window>>,
    pub session: Arc<Session>,
    pub pid: u32,
    pub uid: u32,
    pub gid: u32,
    /// Writable bytes of the next requests.
    pub room: usize,
    door: Door,
}

/// Where this is set, no share of a test uses file handles, as on a host that has none.
const BY_NAME: &str = "ORIEL_TEST_BY_NAME";

pub(crate) const EVERYTHING: u64 = u64::MAX;

impl Guest {
    /// A guest with default options that has sent its INIT.
    pub(crate) fn new() -> Self {
        Self::with(|_| {})
    }

    /// The same, with options and a window of 8 MiB.
    pub(crate) fn with(change: impl FnOnce(&mut Options)) -> Self {
        let guest = Self::without_init(change, true);
        assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
        guest
    }

    pub(crate) fn without_init(change: impl FnOnce(&mut Options), window: bool) -> Self {
        Self::without_init_in(std::env::temp_dir(), change, window)
    }

    /// The same, whose directory is made in another one.
    pub(crate) fn without_init_in(
        place: impl AsRef<Path>,
        change: impl FnOnce(&mut Options),
        window: bool,
    ) -> Self {
        rustix::process::umask(rustix::fs::Mode::empty());
        let directory = tempfile::tempdir_in(place).unwrap();
        let mut options = Options::new(directory.path());
        options.xattr = XattrPolicy::On;
        options.file_handles = std::env::var_os(BY_NAME).is_none();
        change(&mut options);
        let share = Arc::new(Share::new(options).unwrap());
        let window = window.then(|| Arc::new(Window::new(8 << 20).unwrap()));
        Self::of(share.clone(), share, directory, window)
    }

    /// A guest of another file system, which has not sent its INIT. Its share is of no use.
    pub(crate) fn serving(fs: Arc<dyn FileSystem>, window: Arc<Window>) -> Self {
        rustix::process::umask(rustix::fs::Mode::empty());
        let directory = tempfile::tempdir().unwrap();
        let share = Arc::new(Share::new(Options::new(directory.path())).unwrap());
        Self::of(fs, share, directory, Some(window))
    }

    fn of(
        fs: Arc<dyn FileSystem>,
        share: Arc<Share>,
        directory: tempfile::TempDir,
        window: Option<Arc<Window>>,
    ) -> Self {
        let session =
            Arc::new(Session::new(fs, window.clone().map(|window| window as Arc<dyn DaxWindow>)));
        let server = session.clone();
        Self {
            door: Box::new(move |request, reply| serve(&server, request, reply)),
            directory,
            share,
            window,
            session,
            pid: 1,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            room: 2 << 20,
        }
    }

    /// The same guest, whose requests take another way to the session.
    pub(crate) fn through(self, door: Door) -> Self {
        Self { door, ..self }
    }

    pub(crate) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// INIT with 64-bit flags.
    pub(crate) fn init(&self, major: u32, minor: u32, flags: u64) -> Answer {
        let body = InitIn { major, minor, max_readahead: 131072, flags: flags as u32 };
        let more = InitIn2 { flags2: (flags >> 32) as u32, ..InitIn2::default() };
        self.call(Opcode::Init, 0, &[body.as_slice(), more.as_slice()])
    }

    /// Sends a request of any opcode and bytes, as they are, and checks the form of the reply. Waits for one
    /// that comes later.
    pub(crate) fn send(&self, request: &mut [u8], unique: u64) -> Option<Answer> {
        let mut bytes = vec![UNTOUCHED; self.room];
        let used = (self.door)(request, &mut bytes);
        let (written, rest) = bytes.split_at(used as usize);
        if used == 0 {
            assert!(rest.iter().all(|byte| *byte == UNTOUCHED));
            return None;
        }
        Some(Answer::check(written, unique))
    }

    pub(crate) fn frame(&self, opcode: u32, nodeid: u64, parts: &[&[u8]]) -> Vec<u8> {
        let body = parts.concat();
        let header = InHeader {
            len: (IN_HEADER + body.len()) as u32,
            opcode,
            unique: 0x1122_3344_5566_7788,
            nodeid,
            uid: self.uid,
            gid: self.gid,
            pid: self.pid,
            padding: 0,
        };
        [header.as_slice(), &body].concat()
    }

    pub(crate) fn raw(&self, opcode: u32, nodeid: u64, parts: &[&[u8]]) -> Option<Answer> {
        let mut request = self.frame(opcode, nodeid, parts);
        self.send(&mut request, 0x1122_3344_5566_7788)
    }

    /// Sends a request with extensions behind its body.
    pub(crate) fn call_extended(
        &self,
        opcode: Opcode,
        nodeid: u64,
        parts: &[&[u8]],
        extension: &[u32],
    ) -> Answer {
        let extension: Vec<u8> = extension.iter().flat_map(|word| word.to_ne_bytes()).collect();
        let mut request = self.frame(opcode as u32, nodeid, &[parts, &[&extension]].concat());
        // `total_extlen`, in units of 8 bytes.
        let units = (extension.len() / 8) as u16;
        request[36..38].copy_from_slice(&units.to_ne_bytes());
        self.send(&mut request, 0x1122_3344_5566_7788).unwrap()
    }

    /// Has a request served by a thread that must not wait. `None` when it would have to, and has done nothing.
    pub(crate) fn at_once(&self, opcode: Opcode, nodeid: u64, parts: &[&[u8]]) -> Option<Answer> {
        let mut request = self.frame(opcode as u32, nodeid, parts);
        let mut bytes = vec![UNTOUCHED; self.room];
        let (sender, _) = mpsc::channel();
        let served = self.session.serve_at_once(
            &GuestBuffer::from_slice(&mut request),
            &GuestBuffer::from_slice(&mut bytes),
            &LaterReply(sender),
        );
        let Served::Done(used) = served? else { panic!("{opcode:?} is answered later") };
        Some(Answer::check(&bytes[..used as usize], 0x1122_3344_5566_7788))
    }

    /// Sends a well-formed request.
    pub(crate) fn call(&self, opcode: Opcode, nodeid: u64, parts: &[&[u8]]) -> Answer {
        self.raw(opcode as u32, nodeid, parts).unwrap()
    }

    pub(crate) fn lookup(&self, parent: u64, name: &str) -> Answer {
        self.call(Opcode::Lookup, parent, &[name.as_bytes(), b"\0"])
    }

    /// The node of a path below the root.
    pub(crate) fn node(&self, path: &str) -> u64 {
        path.split('/')
            .fold(ROOT_ID, |parent, name| self.lookup(parent, name).get::<EntryOut>().nodeid)
    }

    pub(crate) fn forget(&self, nodeid: u64, nlookup: u64) {
        let none = self.raw(Opcode::Forget as u32, nodeid, &[ForgetIn { nlookup }.as_slice()]);
        assert!(none.is_none());
    }

    pub(crate) fn open(&self, nodeid: u64, flags: i32) -> Answer {
        let body = OpenIn { flags: flags as u32, fuse_flags: 0 };
        self.call(Opcode::Open, nodeid, &[body.as_slice()])
    }

    pub(crate) fn fh(&self, nodeid: u64, flags: i32) -> u64 {
        self.open(nodeid, flags).get::<OpenOut>().fh
    }

    pub(crate) fn opendir(&self, nodeid: u64) -> u64 {
        let body = OpenIn::default();
        self.call(Opcode::Opendir, nodeid, &[body.as_slice()]).get::<OpenOut>().fh
    }

    pub(crate) fn create(&self, parent: u64, name: &str, flags: i32, mode: u32) -> Answer {
        let body = CreateIn { flags: flags as u32, mode, umask: 0o22, fuse_flags: 0 };
        let name = [name.as_bytes(), b"\0"].concat();
        self.call(Opcode::Create, parent, &[body.as_slice(), &name])
    }

    pub(crate) fn read(&self, nodeid: u64, fh: u64, offset: u64, size: u32) -> Answer {
        let body = ReadIn { fh, offset, size, ..ReadIn::default() };
        self.call(Opcode::Read, nodeid, &[body.as_slice()])
    }

    pub(crate) fn write(&self, nodeid: u64, fh: u64, offset: u64, data: &[u8]) -> Answer {
        self.write_with(nodeid, fh, offset, data, 0, 0)
    }

    pub(crate) fn write_with(
        &self,
        nodeid: u64,
        fh: u64,
        offset: u64,
        data: &[u8],
        flags: i32,
        fuse_flags: u32,
    ) -> Answer {
        let body = WriteIn {
            fh,
            offset,
            size: data.len() as u32,
            fuse_flags,
            flags: flags as u32,
            ..WriteIn::default()
        };
        self.call(Opcode::Write, nodeid, &[body.as_slice(), data])
    }

    pub(crate) fn getattr(&self, nodeid: u64) -> Answer {
        let body = GetattrIn::default();
        self.call(Opcode::Getattr, nodeid, &[body.as_slice()])
    }

    pub(crate) fn setattr(&self, nodeid: u64, change: SetattrIn) -> Answer {
        self.call(Opcode::Setattr, nodeid, &[change.as_slice()])
    }

    pub(crate) fn setup(
        &self,
        nodeid: u64,
        foffset: u64,
        len: u64,
        flags: u64,
        moffset: u64,
    ) -> Answer {
        let body = SetupmappingIn { fh: u64::MAX, foffset, len, flags, moffset };
        self.call(Opcode::Setupmapping, nodeid, &[body.as_slice()])
    }

    pub(crate) fn remove(&self, count: u32, ranges: &[(u64, u64)]) -> Answer {
        let mut bytes = count.to_ne_bytes().to_vec();
        for (moffset, len) in ranges {
            bytes.extend_from_slice(&moffset.to_ne_bytes());
            bytes.extend_from_slice(&len.to_ne_bytes());
        }
        self.call(Opcode::Removemapping, ROOT_ID, &[&bytes])
    }

    /// One reply of a listing.
    pub(crate) fn list(
        &self,
        plus: bool,
        nodeid: u64,
        fh: u64,
        offset: u64,
        size: u32,
    ) -> Result<Vec<Name>, i32> {
        let body = ReadIn { fh, offset, size, ..ReadIn::default() };
        let opcode = if plus { Opcode::Readdirplus } else { Opcode::Readdir };
        let answer = self.call(opcode, nodeid, &[body.as_slice()]);
        if answer.error != 0 {
            return Err(answer.error);
        }
        assert!(answer.body.len() <= size as usize);
        let mut names = Vec::new();
        let mut at = 0;
        while at < answer.body.len() {
            let entry = plus.then(|| answer.part::<EntryOut>(at));
            at += if plus { 128 } else { 0 };
            let dirent: Dirent = answer.part(at);
            at += 24;
            let len = dirent.namelen as usize;
            names.push(Name { name: answer.body[at..at + len].to_vec(), next: dirent.off, entry });
            at += len.next_multiple_of(8);
        }
        assert_eq!(at, answer.body.len(), "an entry is cut");
        Ok(names)
    }
}
