//! What a sandbox with a name has written, in a file beside its socket: frames of [`oriel_init::frames`], so that
//! standard output, standard error and the console stay apart. Of each sandbox there is one file that grows and one
//! that is full, and no more: what is older is gone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use oriel_init::frames::{self, Decoder, Kind, MAX_DATA};

/// A file of this many bytes is full. They are in memory where /run is.
const FULL: u64 = 1 << 20;

/// The log of the sandbox that this process is.
pub struct Log {
    path: PathBuf,
    state: Mutex<State>,
    /// Stay when the sandbox ends.
    keep: AtomicBool,
}

struct State {
    /// `None`: it could not be written.
    file: Option<File>,
    length: u64,
}

impl Log {
    /// A new one at `path`, instead of what an earlier sandbox has left there.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn create(path: &Path) -> Result<Self> {
        remove(path)?;
        let file = new_file(path).with_context(|| path.display().to_string())?;
        let state = Mutex::new(State { file: Some(file), length: 0 });
        Ok(Self { path: path.to_owned(), state, keep: AtomicBool::new(false) })
    }

    /// It stays when the sandbox ends.
    pub fn keep(&self) {
        self.keep.store(true, Ordering::Relaxed);
    }

    /// Appends `bytes`. What cannot be written is lost, and with it all that comes later: a log holds up nobody.
    pub fn write(&self, kind: Kind, bytes: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        for piece in bytes.chunks(MAX_DATA) {
            if let Err(error) = self.write_frame(&mut state, kind, piece) {
                log::warn!("there are no more logs: {}: {error}", self.path.display());
                state.file = None;
            }
        }
    }

    /// The sandbox ends: nothing is written any more, and what is not to be kept, or is empty, is removed.
    pub fn end(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.file = None;
        let kept = self.keep.load(Ordering::Relaxed) && state.length > 0;
        if !kept && let Err(error) = remove(&self.path) {
            log::warn!("{error:#}");
        }
    }

    fn write_frame(&self, state: &mut State, kind: Kind, bytes: &[u8]) -> io::Result<()> {
        let Some(file) = &mut state.file else { return Ok(()) };
        let mut frame = Vec::with_capacity(frames::HEADER + bytes.len());
        frames::put(&mut frame, kind, bytes);
        let length = frame.len() as u64;
        if state.length + length > FULL {
            fs::rename(&self.path, full(&self.path))?;
            *file = new_file(&self.path)?;
            state.length = 0;
        }
        state.length += length;
        file.write_all(&frame)
    }
}

fn new_file(path: &Path) -> io::Result<File> {
    // Nobody else's, and not what a link there leads to.
    OpenOptions::new().append(true).create_new(true).mode(0o600).open(path)
}

/// The file that is full.
fn full(path: &Path) -> PathBuf {
    let mut path = path.as_os_str().to_owned();
    path.push(".old");
    path.into()
}

/// Removes what a sandbox has left. Says whether there was anything.
///
/// # Errors
///
/// The host's.
pub fn remove(path: &Path) -> Result<bool> {
    let mut found = false;
    for path in [path.to_owned(), full(path)] {
        match fs::remove_file(&path) {
            Ok(()) => found = true,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("{} stays", path.display())),
        }
    }
    Ok(found)
}

/// Gives `each` what is in the log at `path`, and then what comes, until `more` says that nothing does: it is asked
/// when all was read, and may wait for a moment.
///
/// # Errors
///
/// When there is no log, or something else; those of `each` and `more`.
pub fn read(
    path: &Path,
    mut each: impl FnMut(Kind, &[u8]) -> Result<()>,
    mut more: impl FnMut() -> Result<bool>,
) -> Result<()> {
    let mut current = Part::open(path)?;
    match Part::open(&full(path)) {
        // Between the two the current one may have become the full one.
        Ok(mut old) if old.identity != current.identity => old.read(&mut each)?,
        Ok(_) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let mut last = false;
    loop {
        current.read(&mut each)?;
        match Part::open(path) {
            Ok(next) if next.identity != current.identity => {
                // It has become full since it was read.
                current.read(&mut each)?;
                current = next;
            }
            // Removed at the end of its sandbox, or not yet made.
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error.into()),
            _ if last => return Ok(()),
            _ => last = !more()?,
        }
    }
}

/// One of the files.
struct Part {
    file: File,
    identity: (u64, u64),
    decoder: Decoder,
}

impl Part {
    fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let identity = (metadata.dev(), metadata.ino());
        // There are no messages.
        Ok(Self { file, identity, decoder: Decoder::new(0) })
    }

    /// Reads what there is behind what was read before.
    fn read(&mut self, each: &mut impl FnMut(Kind, &[u8]) -> Result<()>) -> Result<()> {
        let mut buffer = vec![0; MAX_DATA];
        loop {
            let count = self.file.read(&mut buffer)?;
            if count == 0 {
                return Ok(());
            }
            self.decoder.push(buffer.get(..count).unwrap_or_default());
            while let Some(frame) = self.decoder.frame().context("that is no log")? {
                each(frame.kind, &frame.bytes)?;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn all(path: &Path) -> Vec<(Kind, Vec<u8>)> {
        let mut heard = Vec::new();
        let each = |kind, bytes: &[u8]| {
            heard.push((kind, bytes.to_vec()));
            Ok(())
        };
        read(path, each, || Ok(false)).unwrap();
        heard
    }

    #[test]
    fn what_was_written_is_read_apart() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("box.log");
        let log = Log::create(&path).unwrap();
        log.write(Kind::Stdout, b"one\0");
        log.write(Kind::Stderr, b"two");
        log.write(Kind::Console, b"");
        log.write(Kind::Stdout, &[7; MAX_DATA + 1]);
        let heard = all(&path);
        assert_eq!(heard[0], (Kind::Stdout, b"one\0".to_vec()));
        assert_eq!(heard[1], (Kind::Stderr, b"two".to_vec()));
        assert_eq!([&heard[2], &heard[3]].map(|(_, bytes)| bytes.len()), [MAX_DATA, 1]);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        log.end();
        log.write(Kind::Stdout, b"late");
        assert!(!path.exists());
        assert!(read(&path, |_, _| Ok(()), || Ok(false)).is_err());
    }

    #[test]
    fn it_is_bounded_and_its_end_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("box.log");
        let log = Log::create(&path).unwrap();
        log.keep();
        for number in 0..100_000u32 {
            log.write(Kind::Stdout, format!("{number:050}\n").as_bytes());
        }
        let sizes: u64 = fs::read_dir(&directory)
            .unwrap()
            .map(|entry| entry.unwrap().metadata().unwrap().len())
            .sum();
        assert!((FULL..=2 * FULL).contains(&sizes), "{sizes}");
        let heard: Vec<u32> = all(&path)
            .iter()
            .map(|(_, line)| std::str::from_utf8(line).unwrap().trim().parse().unwrap())
            .collect();
        assert_eq!(heard.last(), Some(&99_999));
        assert!(
            heard.windows(2).all(|pair| pair[1] == pair[0] + 1),
            "and nothing in it is missing"
        );
        log.end();
        assert!(path.exists(), "it was to be kept");
        // The next one has nothing of it, and leaves nothing when it has nothing.
        let log = Log::create(&path).unwrap();
        log.keep();
        assert_eq!(all(&path), []);
        log.end();
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }

    #[test]
    fn what_comes_is_followed_over_the_change_of_files() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("box.log");
        let log = Log::create(&path).unwrap();
        let (mut written, mut heard) = (0u64, 0u64);
        let more = || {
            written += 1;
            log.write(Kind::Stdout, &vec![1; 60_000]);
            Ok(written < 100)
        };
        let each = |_, bytes: &[u8]| {
            heard += bytes.len() as u64;
            Ok(())
        };
        read(&path, each, more).unwrap();
        assert_eq!(heard, 100 * 60_000);
    }

    #[test]
    fn what_is_no_log_is_refused_and_links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("box.log"), directory.path().join("other"));
        fs::write(&other, "mine").unwrap();
        assert!(read(&other, |_, _| Ok(()), || Ok(false)).is_err() || fs::read(&other).is_ok());
        symlink(&other, &path).unwrap();
        let log = Log::create(&path).unwrap();
        log.write(Kind::Stdout, b"x");
        assert_eq!(fs::read(&other).unwrap(), b"mine");
        fs::write(&path, [99; 100]).unwrap();
        let error = read(&path, |_, _| Ok(()), || Ok(false)).unwrap_err();
        assert!(error.to_string().contains("no log"), "{error:#}");
        assert!(Log::create(Path::new("/nonexistent/log")).is_err());
    }
}
