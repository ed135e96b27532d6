//! Unix sockets that this process listens on, and their names in the file system.

use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{Mode, fchmod};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use rustix::process::{Pid, test_kill_process};

/// Bytes of `sun_path` (`linux/un.h`) without its end.
pub const SUN_PATH: usize = 107;
/// Longest path of a socket in bytes: until it can be used its name has a dot and a process id more.
const PATH_MAX: usize = SUN_PATH - ".4194304".len();

/// Most clients that have connected and were not taken yet. The host's kernel cuts it to what it allows.
const BACKLOG: i32 = 4096;

/// Somebody listens at this path.
#[derive(Debug, thiserror::Error)]
#[error("{}: somebody listens there already; name another path", .0.display())]
pub struct InUse(PathBuf);

/// A socket that only this user can connect to. Dropping it takes its name out of the file system.
#[derive(Debug)]
pub struct ListeningSocket {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode number of the name.
    identity: (u64, u64),
}

impl ListeningSocket {
    /// Listens at `path`. What a process left there that was killed is replaced, if it is a socket.
    ///
    /// # Errors
    ///
    /// When something else is there; [`InUse`]; the host's errors.
    pub fn new(path: &Path) -> Result<Self> {
        let name = path.display();
        if path.as_os_str().len() > PATH_MAX {
            bail!("{name} is too long for a socket; name a path of at most {PATH_MAX} bytes");
        }
        let mut new = path.as_os_str().to_owned();
        new.push(format!(".{}", std::process::id()));
        let new = PathBuf::from(new);
        let socket = socket(SocketFlags::empty())?;
        // Before it has a name, so that it never is anybody else's.
        fchmod(&socket, Mode::RUSR | Mode::WUSR).context("socket")?;
        bind(&socket, &SocketAddrUnix::new(&new)?)
            .with_context(|| format!("{name} cannot be made"))?;
        let made = fs::symlink_metadata(&new).with_context(|| format!("{name} is gone"))?;
        let mut listening =
            Self { listener: socket.into(), path: new.clone(), identity: (made.dev(), made.ino()) };
        listen(&listening.listener, BACKLOG).with_context(|| format!("{name}"))?;
        // It has its name only now, so that whoever waits for the name can connect at once.
        match fs::hard_link(&new, path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                remove_left_over(path)?;
                fs::hard_link(&new, path)
            }
            named => named,
        }
        .with_context(|| format!("{name} cannot be made"))?;
        fs::remove_file(&new).with_context(|| format!("{} stays", new.display()))?;
        listening.path = path.to_owned();
        Ok(listening)
    }

    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The socket.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for ListeningSocket {
    fn drop(&mut self) {
        // Somebody may have put something else there meanwhile.
        let own = fs::symlink_metadata(&self.path)
            .is_ok_and(|there| (there.dev(), there.ino()) == self.identity);
        if own && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("{} stays: {error}", self.path.display());
        }
    }
}

fn socket(flags: SocketFlags) -> Result<OwnedFd> {
    let flags = flags | SocketFlags::CLOEXEC;
    socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).context("socket")
}

/// Removes a socket on which nobody listens.
fn remove_left_over(path: &Path) -> Result<()> {
    let name = path.display();
    let there =
        fs::symlink_metadata(path).with_context(|| format!("{name} cannot be looked at"))?;
    if !there.file_type().is_socket() {
        bail!("{name} is there and is no socket; name another path, or remove it");
    }
    if somebody_listens(path).with_context(|| format!("{name} cannot be looked at"))? {
        return Err(InUse(path.to_owned()).into());
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("{name} stays"))
        }
        _ => Ok(()),
    }
}

/// Whether a client could connect. Does not wait for whoever listens there.
fn somebody_listens(path: &Path) -> Result<bool> {
    let probe = socket(SocketFlags::NONBLOCK)?;
    match connect(&probe, &SocketAddrUnix::new(path)?) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        // Also one whose clients queue up.
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Removes from `directory` the sockets that processes have left which were killed: such as end in one of `endings`, and
/// those that had not got their name yet. Everything else stays, and what cannot be removed.
pub fn sweep(directory: &Path, endings: &[&str]) {
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        let name = name.to_string_lossy();
        let named = endings.iter().any(|ending| name.ends_with(ending));
        let left = entry.file_type().is_ok_and(|it| it.is_socket())
            && match name.rsplit_once('.') {
                _ if named => somebody_listens(&path).is_ok_and(|listens| !listens),
                // Its process may be about to listen.
                Some((before, process))
                    if endings.iter().any(|ending| before.ends_with(ending)) =>
                {
                    process.parse().is_ok_and(is_gone)
                }
                _ => false,
            };
        if left && let Err(error) = fs::remove_file(&path) {
            log::debug!("{} stays: {error}", path.display());
        }
    }
}

fn is_gone(process: i32) -> bool {
    Pid::from_raw(process).is_some_and(|it| test_kill_process(it) == Err(Errno::SRCH))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    #[test]
    fn a_socket_is_the_users_alone_and_goes_with_its_process() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let socket = ListeningSocket::new(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let client = UnixStream::connect(&path).unwrap();
        socket.listener().accept().unwrap();
        drop((socket, client));
        assert!(!path.exists());
    }

    #[test]
    fn what_killed_processes_left_is_swept_and_nothing_else() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        let left_at = |name: &str| drop(UnixListener::bind(at(name)).unwrap());
        let lives = ListeningSocket::new(&at("lives.sock")).unwrap();
        // No process has so large a number.
        let starts = format!("starts.sock.{}", std::process::id());
        for name in ["box.sock", "box.vsock", "box.sock.4194305", "box.other", &starts] {
            left_at(name);
        }
        fs::write(at("file.sock"), "mine").unwrap();
        fs::write(at("box.log"), "said").unwrap();
        symlink(at("box.other"), at("link.sock")).unwrap();
        sweep(directory.path(), &[".sock", ".vsock"]);
        let mut names: Vec<_> = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let mut kept =
            ["box.log", "box.other", "file.sock", "link.sock", "lives.sock", &starts].to_vec();
        kept.sort_unstable();
        assert_eq!(names, kept);
        drop(lives);
        sweep(&at("absent"), &[".sock"]);
    }

    #[test]
    fn whoever_sees_the_name_can_connect() {
        let directory = tempfile::tempdir().unwrap();
        for round in 0..50 {
            let path = directory.path().join(format!("{round}"));
            let client = thread::spawn({
                let path = path.clone();
                move || {
                    loop {
                        match UnixStream::connect(&path) {
                            Err(error) if error.kind() == ErrorKind::NotFound => {}
                            connected => return connected.map(drop),
                        }
                    }
                }
            });
            let _socket = ListeningSocket::new(&path).unwrap();
            client.join().unwrap().unwrap();
        }
    }

    #[test]
    fn what_a_killed_process_left_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let _socket = ListeningSocket::new(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_socket_in_use_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let _socket = ListeningSocket::new(&path).unwrap();
        let error = ListeningSocket::new(&path).unwrap_err();
        assert!(error.to_string().contains("somebody listens"), "{error:#}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn what_is_no_socket_is_never_removed() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("file");
        fs::write(&file, "mine").unwrap();
        let link = directory.path().join("link");
        let stale = directory.path().join("stale");
        drop(UnixListener::bind(&stale).unwrap());
        symlink(&stale, &link).unwrap();
        for path in [&file, &link, &directory.path().to_owned()] {
            let error = ListeningSocket::new(path).unwrap_err();
            assert!(error.to_string().contains("no socket"), "{error:#}");
        }
        assert_eq!(fs::read(&file).unwrap(), b"mine");
        assert!(stale.exists() && link.is_symlink());
        // Nor at the end, when somebody has put it there.
        let path = directory.path().join("socket");
        let socket = ListeningSocket::new(&path).unwrap();
        fs::rename(&file, &path).unwrap();
        drop(socket);
        assert_eq!(fs::read(&path).unwrap(), b"mine");
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let room = PATH_MAX - directory.path().as_os_str().len() - 1;
        ListeningSocket::new(&directory.path().join("x".repeat(room))).unwrap();
        let long = directory.path().join("x".repeat(room + 1));
        assert!(ListeningSocket::new(&long).unwrap_err().to_string().contains("at most"));
        assert!(ListeningSocket::new(&directory.path().join("absent/socket")).is_err());
    }
}
