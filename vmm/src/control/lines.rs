//! Lines on a Unix socket, each with a descriptor or without (`SCM_RIGHTS` of unix(7)).

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Bytes that are read at a time.
const PIECE: usize = 4 << 10;
/// Of more descriptors in one message than this the host's kernel closes the rest.
const MOST_DESCRIPTORS: usize = 4;

/// What somebody says.
pub struct Lines<'s> {
    stream: &'s UnixStream,
    /// What was read and given to nobody yet.
    read: Vec<u8>,
    /// The last descriptor that came, and where in `read` its line begins.
    given: Option<(usize, OwnedFd)>,
    longest: usize,
}

/// A line without its end.
#[derive(Debug)]
pub struct Line {
    /// What it says.
    pub bytes: Vec<u8>,
    /// What came along.
    pub given: Option<OwnedFd>,
}

impl<'s> Lines<'s> {
    /// Of `stream`, none of them longer than `longest` bytes.
    pub fn new(stream: &'s UnixStream, longest: usize) -> Self {
        Self { stream, read: Vec::new(), given: None, longest }
    }

    /// The next line; `None` at the end of what is said. What has no line end before that is a line as well.
    ///
    /// # Errors
    ///
    /// `InvalidData` for one that is too long, and then nobody knows where the next one begins; the host's.
    pub fn next(&mut self) -> io::Result<Option<Line>> {
        let mut searched = 0;
        loop {
            let unsearched = self.read.get(searched..).unwrap_or_default();
            if let Some(at) = unsearched.iter().position(|byte| *byte == b'\n') {
                let rest = self.read.split_off(searched + at + 1);
                let mut bytes = std::mem::replace(&mut self.read, rest);
                let given = match self.given.take() {
                    Some((begin, given)) if begin >= bytes.len() => {
                        self.given = Some((begin - bytes.len(), given));
                        None
                    }
                    given => given.map(|(_, given)| given),
                };
                bytes.pop();
                return Ok(Some(Line { bytes, given }));
            }
            if self.read.len() > self.longest {
                return Err(io::ErrorKind::InvalidData.into());
            }
            searched = self.read.len();
            if self.read_more()? == 0 {
                let bytes = std::mem::take(&mut self.read);
                let line = Line { bytes, given: self.given.take().map(|(_, given)| given) };
                return Ok((!line.bytes.is_empty()).then_some(line));
            }
        }
    }

    fn read_more(&mut self) -> io::Result<usize> {
        let mut piece = [0; PIECE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got = rustix::io::retry_on_intr(|| {
            let mut pieces = [IoSliceMut::new(&mut piece)];
            recvmsg(self.stream, &mut pieces, &mut ancillary, RecvFlags::CMSG_CLOEXEC)
        })?;
        self.read.extend_from_slice(piece.get(..got.bytes).unwrap_or_default());
        // The host's kernel reads no further than what a descriptor was sent with, but it may begin before.
        let before_last = self.read.strip_suffix(b"\n").unwrap_or(&self.read);
        let begin = before_last.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(descriptors) = message
                && let Some(given) = descriptors.last()
            {
                self.given = Some((begin, given));
            }
        }
        Ok(got.bytes)
    }
}

/// Writes all of `bytes`, the first of them with the descriptor.
///
/// # Errors
///
/// The host's.
pub fn send(stream: &UnixStream, bytes: &[u8], given: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut rest = bytes;
    let descriptors: Vec<_> = given.into_iter().collect();
    let mut first = true;
    while !rest.is_empty() {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if first && !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let sent = rustix::io::retry_on_intr(|| {
            sendmsg(stream.as_fd(), &[IoSlice::new(rest)], &mut ancillary, SendFlags::NOSIGNAL)
        })?;
        first = false;
        rest = rest.get(sent..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_descriptor_comes_with_the_line_that_it_was_sent_with() {
        let (mut speaker, hearer) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let inode = file.metadata().unwrap().ino();
        speaker.write_all(b"one\ntw").unwrap();
        speaker.write_all(b"o\n").unwrap();
        send(&speaker, b"three\n", Some(file.as_fd())).unwrap();
        speaker.write_all(b"\nlast").unwrap();
        drop((speaker, file));
        let mut lines = Lines::new(&hearer, 5);
        let mut next = || lines.next().unwrap().map(|line| (line.bytes, line.given));
        for expected in [&b"one"[..], b"two"] {
            let (bytes, given) = next().unwrap();
            assert_eq!((bytes.as_slice(), given.is_none()), (expected, true));
        }
        let (bytes, given) = next().unwrap();
        assert_eq!(bytes, b"three");
        let given = std::fs::File::from(given.unwrap());
        assert_eq!(given.metadata().unwrap().ino(), inode);
        assert_eq!(next().unwrap().0, b"");
        let (bytes, given) = next().unwrap();
        assert_eq!((bytes.as_slice(), given.is_none()), (&b"last"[..], true));
        assert!(next().is_none());
    }

    #[test]
    fn of_many_descriptors_none_stays_open_but_one() {
        let (speaker, hearer) = UnixStream::pair().unwrap();
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        for _ in 0..100 {
            let many = [writer.as_fd(); 20];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(20))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&many)));
            let bytes = [IoSlice::new(b"x\n")];
            sendmsg(&speaker, &bytes, &mut ancillary, SendFlags::empty()).unwrap();
            let given = Lines::new(&hearer, 5).next().unwrap().unwrap().given;
            assert!(given.is_some());
        }
        drop((speaker, hearer, writer));
        // Its end, because nobody can write any more.
        assert_eq!(rustix::io::read(&reader, &mut [0; 1]).unwrap(), 0);
    }

    #[test]
    fn what_is_too_long_is_not_kept() {
        let (mut speaker, hearer) = UnixStream::pair().unwrap();
        speaker.write_all(&[b'x'; 10_000]).unwrap();
        let error = Lines::new(&hearer, 5).next().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
