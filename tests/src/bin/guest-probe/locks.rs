//! Locks, one command after another: what a process does that uses a file together with others.
#![expect(
    unsafe_code,
    reason = "fcntl(2) with a struct, fork(2), and a signal handler that does nothing"
)]

use std::fs::{File, OpenOptions};
use std::io::{BufRead, Write, stdin, stdout};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

/// Reads commands from standard input and prints one line for each:
///
/// - `KIND TYPE [START LEN]`, where KIND is `set` or `wait` (fcntl), `ofd` or `ofdwait` (fcntl, of the open
///   file), `flock` or `flockwait`, and TYPE is `read`, `write` or `none`: sets a lock and says `ok` or the error;
/// - `get TYPE START LEN`: says `free`, or the lock in the way and whose process it is;
/// - `touch`: opens the file once more and closes it again;
/// - `reopen`: closes the file and opens it anew;
/// - `child COMMAND`: has a child process do it that was forked for it.
///
/// SIGINT interrupts what waits.
pub fn serve(path: &Path) -> Result<()> {
    extern "C" fn nothing(_: libc::c_int) {}
    // SAFETY: all zeros is no flag, so no SA_RESTART, and an empty mask; the handler does nothing.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        libc::sigaction(libc::SIGINT, &action, std::ptr::null_mut());
    }
    let open = || {
        let both = OpenOptions::new().read(true).write(true).open(path);
        both.or_else(|_| File::open(path)).with_context(|| path.display().to_string())
    };
    let mut file = open()?;
    println!("ready");
    for line in stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        let answer = match words[..] {
            ["touch"] => open().map(|_| "ok".into())?,
            ["reopen"] => {
                // The old one goes first: two at a time would be something else.
                drop(file);
                file = open()?;
                "ok".into()
            }
            ["child", ref rest @ ..] => in_child(&file, rest)?,
            ref command => act(&file, command)?,
        };
        println!("{answer}");
        stdout().flush()?;
    }
    Ok(())
}

fn act(file: &File, words: &[&str]) -> Result<String> {
    let [kind, kind_of_lock, range @ ..] = words else { bail!("no command: {words:?}") };
    let number = |at: usize| range.get(at).map_or(Ok(0), |word| word.parse::<i64>());
    let kind_of_lock = match *kind_of_lock {
        "read" => libc::F_RDLCK,
        "write" => libc::F_WRLCK,
        "none" => libc::F_UNLCK,
        other => bail!("no lock: {other}"),
    };
    let mut lock = libc::flock {
        l_type: kind_of_lock as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: number(0)?,
        l_len: number(1)?,
        l_pid: 0,
    };
    let mut fcntl = |command| {
        // SAFETY: all commands used here take one `struct flock`, which lives until the call returns.
        match unsafe { libc::fcntl(file.as_raw_fd(), command, &mut lock) } {
            0 => Ok(()),
            _ => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
        }
    };
    let whole = |now, later, wait| {
        let operation = match kind_of_lock {
            libc::F_UNLCK => FlockOperation::Unlock,
            _ if wait => later,
            _ => now,
        };
        flock(file.as_fd(), operation)
    };
    let (shared, exclusive) = (FlockOperation::LockShared, FlockOperation::LockExclusive);
    let later = if kind_of_lock == libc::F_RDLCK { shared } else { exclusive };
    let now = match kind_of_lock {
        libc::F_RDLCK => FlockOperation::NonBlockingLockShared,
        _ => FlockOperation::NonBlockingLockExclusive,
    };
    let result = match *kind {
        "set" => fcntl(libc::F_SETLK),
        "wait" => fcntl(libc::F_SETLKW),
        "ofd" => fcntl(libc::F_OFD_SETLK),
        "ofdwait" => fcntl(libc::F_OFD_SETLKW),
        "flock" => whole(now, later, false),
        "flockwait" => whole(now, later, true),
        "get" => {
            fcntl(libc::F_GETLK)?;
            return Ok(match i32::from(lock.l_type) {
                libc::F_UNLCK => "free".into(),
                kind => {
                    let kind = if kind == libc::F_RDLCK { "read" } else { "write" };
                    format!("{kind} {} {} {}", lock.l_start, lock.l_len, lock.l_pid)
                }
            });
        }
        other => bail!("no command: {other}"),
    };
    Ok(match result {
        Ok(()) => "ok".into(),
        Err(Errno::AGAIN | Errno::ACCESS) => "busy".into(),
        Err(Errno::INTR) => "interrupted".into(),
        Err(error) => error.to_string(),
    })
}

/// Forks, and says what the child had to say.
fn in_child(file: &File, words: &[&str]) -> Result<String> {
    let (reader, mut writer) = std::io::pipe()?;
    // SAFETY: this process has one thread, so the child may do whatever it could do.
    match unsafe { libc::fork() } {
        -1 => bail!("fork: {}", std::io::Error::last_os_error()),
        0 => {
            let answer = act(file, words).unwrap_or_else(|error| format!("{error:#}"));
            let _ = writer.write_all(answer.as_bytes());
            // SAFETY: ends the child here and now, which is what it is for.
            unsafe { libc::_exit(0) }
        }
        child => {
            drop(writer);
            let answer = std::io::read_to_string(reader)?;
            // SAFETY: waits for the child that was just made; a null pointer asks for no status.
            unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
            Ok(answer)
        }
    }
}
