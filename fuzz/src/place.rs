//! A directory to share, what is beside it and must not be seen, and what the host does to both.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use devices::share::{CachePolicy, DaxPolicy, LockPolicy, Options, Share, XattrPolicy};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tempfile::TempDir;

use crate::input::Input;

/// No file of a guest gets larger, so that nothing it allocates fills the host.
const LARGEST_FILE: u64 = 32 << 20;

/// Where shares are made: in memory, if possible.
fn parent() -> &'static Path {
    static PARENT: OnceLock<PathBuf> = OnceLock::new();
    PARENT.get_or_init(|| {
        rustix::process::umask(rustix::fs::Mode::empty());
        let limit = Rlimit { current: Some(LARGEST_FILE), ..getrlimit(Resource::Fsize) };
        setrlimit(Resource::Fsize, limit).unwrap();
        // As the program does: what is too large is an error, and no signal that ends it.
        let noted = Arc::<AtomicBool>::default();
        signal_hook::flag::register(rustix::process::Signal::XFSZ.as_raw(), noted).unwrap();
        let memory = PathBuf::from("/dev/shm");
        if memory.is_dir() { memory } else { std::env::temp_dir() }
    })
}

/// What no guest may ever read: another one in each process, so that no input can have it.
fn secret() -> &'static [u8] {
    static SECRET: OnceLock<Vec<u8>> = OnceLock::new();
    SECRET.get_or_init(|| {
        let mut bytes = vec![0; 16];
        use std::io::Read;
        fs::File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
        bytes
    })
}

/// The directory of one script.
pub struct Place {
    directory: TempDir,
    outside: Vec<(i64, i64, u64, u64, u32)>,
}

impl Place {
    pub fn new() -> Self {
        let directory = tempfile::tempdir_in(parent()).unwrap();
        let place = Self { directory, outside: Vec::new() };
        let (share, outside) = (place.share(), place.directory.path().join("outside"));
        fs::create_dir(&outside).unwrap();
        fs::write(outside.join("secret"), secret()).unwrap();
        fs::create_dir_all(share.join("dir/sub")).unwrap();
        fs::write(share.join("file"), "some text that is in a file").unwrap();
        fs::write(share.join("dir/other"), vec![0x5a; 5000]).unwrap();
        symlink("../outside/secret", share.join("link")).unwrap();
        symlink(&outside, share.join("dir/way")).unwrap();
        let fifo = share.join("fifo");
        let kind = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, kind, 0o666.into(), 0).unwrap();
        Self { outside: place.seen(), ..place }
    }

    fn share(&self) -> PathBuf {
        self.directory.path().join("share")
    }

    /// Where sockets may be.
    pub fn sockets(&self) -> PathBuf {
        self.directory.path().to_owned()
    }

    /// The share, with options out of the input.
    pub fn serve(&self, input: &mut Input<'_>) -> Arc<Share> {
        let mut options = Options::new(self.share());
        let bits = input.byte();
        options.read_only = bits & 7 == 7;
        options.file_handles = bits & 8 == 0;
        options.acl = bits & 16 != 0;
        options.writeback = bits & 32 != 0;
        options.locks = if bits & 64 == 0 { LockPolicy::Host } else { LockPolicy::Guest };
        options.trust_file_systems = bits & 128 != 0;
        let bits = input.byte();
        options.cache =
            [CachePolicy::Auto, CachePolicy::Always, CachePolicy::Never, CachePolicy::Metadata]
                [usize::from(bits & 3)];
        if matches!(options.cache, CachePolicy::Never | CachePolicy::Metadata) {
            options.writeback = false;
        }
        options.dax = if bits & 4 == 0 { DaxPolicy::Always } else { DaxPolicy::Inode };
        options.xattr = [XattrPolicy::On, XattrPolicy::Mapped, XattrPolicy::Off, XattrPolicy::On]
            [usize::from(bits >> 3 & 3)];
        if options.xattr == XattrPolicy::Off {
            options.acl = false;
        }
        // Few enough that a script gets there.
        if bits & 32 != 0 {
            options.max_inodes = Some(6);
            options.max_handles = Some(4);
            options.max_descriptors = Some(4);
            options.max_buffers = Some(8192);
        }
        Arc::new(Share::new(options).unwrap())
    }

    /// The host does something to its files.
    pub fn host_acts(&self, what: u8) {
        let share = self.share();
        // A guest may have been there before.
        let _ = match what % 8 {
            0 => fs::rename(share.join("dir"), self.directory.path().join("moved")),
            1 => fs::rename(self.directory.path().join("moved"), share.join("dir")),
            2 => fs::remove_file(share.join("file")),
            3 => fs::remove_file(share.join("file"))
                .and_then(|()| symlink("../outside/secret", share.join("file"))),
            4 => fs::remove_dir_all(share.join("dir"))
                .and_then(|()| symlink("../outside", share.join("dir"))),
            5 => cut(&share.join("file")),
            6 => fs::rename(share.join("dir/other"), share.join("file")),
            _ => fs::create_dir(share.join("dir")),
        };
    }

    /// What can be seen of outside, but for the times at which it was read.
    fn seen(&self) -> Vec<(i64, i64, u64, u64, u32)> {
        let outside = self.directory.path().join("outside");
        [outside.clone(), outside.join("secret")]
            .map(|path| {
                let found = fs::symlink_metadata(path).unwrap();
                (found.ctime(), found.ctime_nsec(), found.size(), found.nlink(), found.mode())
            })
            .to_vec()
    }

    /// Nothing of outside is in this reply.
    pub fn check_reply(&self, reply: &[u8]) {
        let leaks = reply.windows(secret().len()).any(|bytes| bytes == secret());
        assert!(!leaks, "a file outside of the share was read");
    }

    /// Nothing of outside was changed.
    pub fn check_outside(&self) {
        assert_eq!(self.seen(), self.outside, "something outside of the share was changed");
    }
}

/// Makes a file shorter. What the guest made of it must not lead outside here, nor make this wait.
fn cut(path: &Path) -> std::io::Result<()> {
    use rustix::fs::{Mode, OFlags, ftruncate, open};
    let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = open(path, flags, Mode::empty())?;
    Ok(ftruncate(&file, 10)?)
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}
