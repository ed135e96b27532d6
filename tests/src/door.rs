//! A share behind the host's own `/dev/fuse`: the same [`Session`] and [`Share`] that a guest sees, at a mount
//! point of this machine. What tests file systems can then test a share, at native speed and without KVM.
//!
//! It takes root, or rather `CAP_SYS_ADMIN`, and a `/dev/fuse` that may be opened.
//!
//! Different from a guest's: there is no DAX window; mounts below the directory are not told to the kernel,
//! because only virtio-fs asks for that; and all requests come through one queue, INTERRUPT and FORGET among them.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use devices::fuse::abi::{InHeader, MAX_REQUEST, MAX_WRITE, OutHeader};
use devices::fuse::{Completion, Counters, Deferral, FileSystem, Served, Session};
use devices::memory::GuestBuffer;
use devices::share::{Options, Share};
use devices::tree::Tree;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;
use vm_memory::ByteValued;

/// Threads that serve requests: more than the processors of a small machine, so that a request that waits for
/// the disk does not hold up the others.
const THREADS: usize = 4;

/// The longest reply: the largest READ and its header.
const MAX_REPLY: usize = MAX_WRITE as usize + size_of::<OutHeader>();

/// How long an unmount waits for those who are about to close their last file.
const PATIENCE: Duration = Duration::from_secs(5);

/// A share that is mounted. Dropping it unmounts.
pub struct Door {
    path: PathBuf,
    server: Arc<Server>,
    threads: Vec<JoinHandle<()>>,
    /// A mount point that was made for it, removed after the unmount.
    _directory: Option<TempDir>,
}

impl Door {
    /// Mounts a share at a new temporary directory.
    ///
    /// Sets the umask of the process to 0, as a share wants it, and the limit of open files to the highest.
    ///
    /// # Errors
    ///
    /// What [`Share::new`] answers; `EACCES` or `ENOENT` for `/dev/fuse`; `EPERM` from mount(2).
    pub fn mount(options: Options) -> io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut door = Self::mount_at(options, directory.path())?;
        door._directory = Some(directory);
        Ok(door)
    }

    /// The same, at a directory that exists.
    ///
    /// # Errors
    ///
    /// As [`mount`](Self::mount).
    pub fn mount_at(options: Options, path: &Path) -> io::Result<Self> {
        rustix::process::umask(rustix::fs::Mode::empty());
        let files = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files })?;

        let root_mode = std::fs::metadata(&options.directory)?.mode();
        let share = Arc::new(Share::new(options)?);
        Self::serve(share.clone(), Some(share), root_mode, path)
    }

    /// Mounts a tree at a new temporary directory.
    ///
    /// # Errors
    ///
    /// As [`mount`](Self::mount).
    pub fn mount_tree(tree: Arc<Tree>) -> io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let mut door = Self::serve(tree, None, libc::S_IFDIR | 0o555, directory.path())?;
        door._directory = Some(directory);
        Ok(door)
    }

    fn serve(
        files: Arc<dyn FileSystem>,
        share: Option<Arc<Share>>,
        root_mode: u32,
        path: &Path,
    ) -> io::Result<Self> {
        let device = OpenOptions::new().read(true).write(true).open("/dev/fuse")?;
        // As a guest mounts it: its kernel checks permissions, and everybody may come in. The ids are of the one
        // who mounts and mean nothing with allow_other.
        let data = format!(
            "fd={},rootmode={root_mode:o},user_id=0,group_id=0,default_permissions,allow_other",
            device.as_raw_fd(),
        );
        let data = CString::new(data)?;
        // Never read-only: it is the share that has to refuse.
        mount("oriel", path, "fuse.oriel", MountFlags::empty(), Some(data.as_c_str()))?;

        let session = Session::new(files, None);
        let device = Arc::new(Device { file: device, failures: Mutex::default() });
        let server = Arc::new(Server { device, share, session });
        let mut door =
            Self { path: path.to_path_buf(), server, threads: Vec::new(), _directory: None };
        for number in 0..THREADS {
            let server = door.server.clone();
            let thread = thread::Builder::new().name(format!("door:{number}"));
            door.threads.push(thread.spawn(move || server.run())?);
        }
        Ok(door)
    }

    /// Where the share is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The share behind it.
    ///
    /// # Panics
    ///
    /// When it is a tree.
    pub fn share(&self) -> &Share {
        self.server.share.as_ref().expect("a share")
    }

    /// What the session did so far.
    pub fn counters(&self) -> &Counters {
        self.server.session.counters()
    }

    /// What must never happen and did: a panic of the server, a reply that the kernel did not take.
    pub fn failures(&self) -> Vec<String> {
        self.server.device.failures().clone()
    }

    /// Calls `act` once, from another thread, when the mount is gone, whoever unmounted it.
    pub fn when_unmounted(&mut self, act: impl FnOnce() + Send + 'static) {
        let threads = std::mem::take(&mut self.threads);
        let server = self.server.clone();
        self.threads.push(thread::spawn(move || {
            join(threads, &server);
            act();
        }));
    }

    /// Unmounts it. When files are open for longer than some seconds, their next use is an error.
    ///
    /// # Errors
    ///
    /// Those of umount(2); `EINVAL` when it is not mounted any more.
    pub fn unmount(&mut self) -> io::Result<()> {
        let patience = Instant::now() + PATIENCE;
        while let Err(error) = unmount(&self.path, UnmountFlags::NOFOLLOW) {
            if error != Errno::BUSY {
                return Err(error.into());
            }
            if Instant::now() > patience {
                unmount(
                    &self.path,
                    UnmountFlags::NOFOLLOW | UnmountFlags::FORCE | UnmountFlags::DETACH,
                )?;
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        join(std::mem::take(&mut self.threads), &self.server);
        Ok(())
    }
}

fn join(threads: Vec<JoinHandle<()>>, server: &Server) {
    for thread in threads {
        if thread.join().is_err() {
            server.device.fail("a thread has panicked".into());
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let unmounted = self.unmount();
        // A test that has failed says why; a second panic would hide it.
        if thread::panicking() {
            return;
        }
        if let Err(error) = unmounted
            && error.raw_os_error() != Some(libc::EINVAL)
        {
            panic!("{} cannot be unmounted: {error}", self.path.display());
        }
        let failures = self.failures();
        assert!(failures.is_empty(), "the share behind /dev/fuse: {failures:#?}");
    }
}

/// What the threads share.
struct Server {
    device: Arc<Device>,
    share: Option<Arc<Share>>,
    session: Session,
}

/// The kernel's side, and what went wrong there.
struct Device {
    file: File,
    failures: Mutex<Vec<String>>,
}

/// Lets the kernel have the reply to a request later.
struct Later<'d>(&'d Arc<Device>, InHeader);

impl Deferral for Later<'_> {
    fn defer(&self) -> Box<dyn Completion> {
        Box::new(LaterReply(self.0.clone(), self.1))
    }
}

struct LaterReply(Arc<Device>, InHeader);

impl Completion for LaterReply {
    fn complete(self: Box<Self>, reply: &[u8]) {
        self.0.reply(reply, &self.1);
    }
}

impl Server {
    /// The body of a thread: one request after another until the unmount.
    fn run(&self) {
        let mut request = vec![0; MAX_REQUEST];
        let mut reply = vec![0; MAX_REPLY];
        loop {
            let len = match rustix::io::read(&self.device.file, &mut request) {
                Ok(len) => len,
                // ENOENT: the request was interrupted before it could be read.
                Err(Errno::INTR | Errno::NOENT | Errno::AGAIN) => continue,
                Err(Errno::NODEV | Errno::CONNABORTED) => break,
                Err(error) => {
                    self.device.fail(format!("/dev/fuse cannot be read: {error}"));
                    break;
                }
            };
            self.serve(&mut request[..len], &mut reply);
        }
        // The kernel sends no DESTROY. Every thread gets here.
        self.session.reset();
    }

    fn serve(&self, request: &mut [u8], reply: &mut [u8]) {
        let mut header = InHeader::default();
        header.as_mut_slice().copy_from_slice(&request[..size_of::<InHeader>()]);
        let served = {
            let request = GuestBuffer::from_slice(request);
            let target = GuestBuffer::from_slice(reply);
            let later = Later(&self.device, header);
            catch_unwind(AssertUnwindSafe(|| self.session.serve(&request, &target, &later)))
        };
        let used = match served {
            Ok(Served::Done(used)) => used as usize,
            Ok(Served::Later) => return,
            Err(_) => {
                self.device.fail(format!("a panic over {header:?}"));
                let error = OutHeader { len: 16, error: -libc::EIO, unique: header.unique };
                reply[..16].copy_from_slice(error.as_slice());
                16
            }
        };
        if used > 0 {
            self.device.reply(&reply[..used], &header);
        }
    }
}

impl Device {
    fn reply(&self, reply: &[u8], header: &InHeader) {
        match rustix::io::write(&self.file, reply) {
            // ENOENT: whoever asked was killed meanwhile.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) => {}
            Err(error) => {
                self.fail(format!("{error}: {} bytes in reply to {header:?}", reply.len()))
            }
        }
    }

    fn fail(&self, what: String) {
        eprintln!("door: {what}");
        self.failures().push(what);
    }

    fn failures(&self) -> MutexGuard<'_, Vec<String>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
