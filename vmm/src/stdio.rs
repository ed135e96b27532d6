//! This process's standard streams, which are somebody else's files, too.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

/// A descriptor of our own for a standard stream.
///
/// # Errors
///
/// When the stream is closed.
pub fn duplicate(stream: impl AsFd) -> Result<OwnedFd> {
    rustix::io::fcntl_dupfd_cloexec(stream, 3).context("a standard stream is closed")
}

/// Writes all of `bytes`, however long that takes.
///
/// # Errors
///
/// The host's.
pub fn write_all(target: impl AsFd, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(&target, bytes) {
            Ok(count) => bytes = bytes.get(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            // The user's terminal may be non-blocking because another program made it so.
            Err(Errno::AGAIN) => wait(target.as_fd(), PollFlags::OUT)?,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads what there is; 0 is the end, also that of a terminal which is gone.
///
/// # Errors
///
/// The host's.
pub fn read(source: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        match rustix::io::read(&source, &mut *buffer) {
            Ok(count) => return Ok(count),
            Err(Errno::IO) => return Ok(0),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => wait(source.as_fd(), PollFlags::IN)?,
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait(fd: BorrowedFd<'_>, flags: PollFlags) -> io::Result<()> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use rustix::pipe::{PipeFlags, pipe_with};

    use super::*;

    #[test]
    fn streams_that_do_not_block_are_waited_for() {
        let (reader, writer) = pipe_with(PipeFlags::NONBLOCK).unwrap();
        let sent = vec![7u8; 1 << 20];
        let expected = sent.clone();
        let thread = thread::spawn(move || write_all(&writer, &sent));
        let mut received: Vec<u8> = Vec::new();
        let mut buffer = [0; 5000];
        loop {
            match read(&reader, &mut buffer).unwrap() {
                0 => break,
                count => received.extend(&buffer[..count]),
            }
        }
        thread.join().unwrap().unwrap();
        assert!(received == expected);
        let (reader, writer) = pipe_with(PipeFlags::empty()).unwrap();
        drop(reader);
        assert_eq!(write_all(&writer, b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }
}
