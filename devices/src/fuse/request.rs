//! From a request's bytes to its parts.
//!
//! The guest can change its memory while the server looks at it, so every byte that decides anything is
//! copied out once, and only the copy is looked at.

use std::ffi::CStr;

use smallvec::SmallVec;
use vm_memory::ByteValued;

use super::abi::{IN_HEADER, InHeader, NAME_MAX};
use super::errno::{Errno, Result};
use super::filesystem::Caller;
use super::opcode::{Limits, Opcode, find};
use crate::memory::GuestBuffer;

/// Bytes of a body that need no allocation: the largest fixed part and two names of common length.
const INLINE_BODY: usize = 512;

/// The header, checked: what it says of lengths holds.
#[derive(Clone, Copy)]
pub struct Header {
    /// As the guest wrote it.
    pub raw: InHeader,
    /// Bytes after the header that belong to the request.
    pub body: usize,
    /// See [`Caller::at_once`].
    pub at_once: bool,
}

impl Header {
    /// `total_extlen`: how many units of 8 bytes at the end of the body are extensions. The header file that
    /// the struct is from has one field for it and the padding behind it; older guests leave both 0.
    pub fn extension_units(&self) -> u16 {
        (self.raw.padding & 0xffff) as u16
    }
}

/// Copies the header. What is missing of it reads as zero, so that even a short request can be answered
/// with the `unique` it named.
pub fn read_raw_header(buffer: &GuestBuffer<'_>) -> Result<InHeader> {
    let mut raw = InHeader::default();
    let there = buffer.len().min(IN_HEADER);
    if let Some(bytes) = raw.as_mut_slice().get_mut(..there) {
        buffer.read_at(0, bytes)?;
    }
    Ok(raw)
}

impl Header {
    /// Who asks, and about what, without what is not in the header.
    pub fn caller(&self) -> Caller {
        Caller {
            nodeid: self.raw.nodeid,
            uid: self.raw.uid,
            gid: self.raw.gid,
            pid: self.raw.pid,
            group: None,
            umask: None,
            at_once: self.at_once,
        }
    }

    /// Checks the lengths of `raw` against the buffer and against the limits of its operation.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a request shorter than its header or than its operation needs, one that claims more
    /// bytes than there are, and one that is longer than its operation can be; `ENOSYS` for an operation
    /// that is unknown.
    pub fn check(raw: InHeader, buffer: &GuestBuffer<'_>) -> Result<(Self, &'static Limits)> {
        if buffer.len() < IN_HEADER {
            return Err(Errno::INVAL);
        }
        let limits = find(raw.opcode).ok_or(Errno::NOSYS)?;
        let len = usize::try_from(raw.len).map_err(|_| Errno::INVAL)?;
        if len > buffer.len() {
            return Err(Errno::INVAL);
        }
        let body = len.checked_sub(IN_HEADER).ok_or(Errno::INVAL)?;
        if body < limits.least || body > limits.most {
            return Err(Errno::INVAL);
        }
        Ok((Self { raw, body, at_once: false }, limits))
    }
}

/// The body of a request, copied out of guest memory, except for the data of a WRITE.
pub struct Body {
    bytes: SmallVec<[u8; INLINE_BODY]>,
}

impl Body {
    /// Copies the body. The length was bounded by [`Header::check`].
    pub fn read(buffer: &GuestBuffer<'_>, header: &Header, opcode: Opcode) -> Result<Self> {
        let len = match opcode {
            Opcode::Write => header.body.min(size_of::<super::abi::WriteIn>()),
            Opcode::NotifyReply => 0,
            _ => header.body,
        };
        let mut bytes = SmallVec::new();
        bytes.resize(len, 0);
        buffer.read_at(IN_HEADER, &mut bytes)?;
        Ok(Self { bytes })
    }

    /// A reader from the start of the body.
    pub fn decoder(&self) -> Decoder<'_> {
        Decoder::new(&self.bytes)
    }
}

/// Takes a body apart from front to back.
pub struct Decoder<'b> {
    rest: &'b [u8],
}

impl<'b> Decoder<'b> {
    /// A reader of `bytes` from the start.
    pub fn new(bytes: &'b [u8]) -> Self {
        Self { rest: bytes }
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }

    /// A reader of the next `len` bytes, which this one passes over.
    ///
    /// # Errors
    ///
    /// `EINVAL` when fewer are left.
    pub fn split_off(&mut self, len: usize) -> Result<Self> {
        let (bytes, rest) = self.rest.split_at_checked(len).ok_or(Errno::INVAL)?;
        self.rest = rest;
        Ok(Self { rest: bytes })
    }

    /// A reader of the last `len` bytes, which this one does not reach any more.
    ///
    /// # Errors
    ///
    /// `EINVAL` when fewer are left.
    pub fn split_end(&mut self, len: usize) -> Result<Self> {
        let front = self.rest.len().checked_sub(len).ok_or(Errno::INVAL)?;
        let mut end = Self { rest: self.rest };
        *self = end.split_off(front)?;
        Ok(end)
    }

    /// The next fixed part.
    ///
    /// # Errors
    ///
    /// `EINVAL` when fewer bytes are left.
    pub fn take<T: ByteValued + Default>(&mut self) -> Result<T> {
        let (bytes, rest) = self.rest.split_at_checked(size_of::<T>()).ok_or(Errno::INVAL)?;
        let mut value = T::default();
        value.as_mut_slice().copy_from_slice(bytes);
        self.rest = rest;
        Ok(value)
    }

    /// The next string with its NUL, of any content and at most `most` bytes without the NUL.
    ///
    /// # Errors
    ///
    /// `EINVAL` without a NUL, `ENAMETOOLONG` above `most`.
    pub fn string(&mut self, most: usize) -> Result<&'b CStr> {
        let Ok(string) = CStr::from_bytes_until_nul(self.rest) else {
            return Err(if self.rest.len() > most { Errno::NAMETOOLONG } else { Errno::INVAL });
        };
        let len = string.count_bytes();
        if len > most {
            return Err(Errno::NAMETOOLONG);
        }
        self.rest = self.rest.get(len + 1..).unwrap_or_default();
        Ok(string)
    }

    /// The next name: one component of a path, in any encoding.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a name that is empty, `.`, `..`, has a `/` or no NUL; `ENAMETOOLONG` above 255 bytes.
    /// Nothing that gets through can name anything but an entry of the one directory it is used in.
    pub fn name(&mut self) -> Result<&'b CStr> {
        let name = self.string(NAME_MAX)?;
        let bytes = name.to_bytes();
        if bytes.is_empty() || bytes == b"." || bytes == b".." || bytes.contains(&b'/') {
            return Err(Errno::INVAL);
        }
        Ok(name)
    }

    /// The name that ends the request.
    ///
    /// # Errors
    ///
    /// As [`name`](Self::name), and `EINVAL` when bytes follow: then the name had a NUL inside.
    pub fn last_name(&mut self) -> Result<&'b CStr> {
        let name = self.name()?;
        self.end()?;
        Ok(name)
    }

    /// The string that ends the request.
    ///
    /// # Errors
    ///
    /// As [`string`](Self::string), and `EINVAL` when bytes follow.
    pub fn last_string(&mut self, most: usize) -> Result<&'b CStr> {
        let string = self.string(most)?;
        self.end()?;
        Ok(string)
    }

    /// All that is left.
    pub fn rest(&mut self) -> &'b [u8] {
        std::mem::take(&mut self.rest)
    }

    fn end(&self) -> Result<()> {
        if self.is_empty() { Ok(()) } else { Err(Errno::INVAL) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(bytes: &[u8]) -> Result<&CStr> {
        Decoder { rest: bytes }.last_name()
    }

    #[test]
    fn a_name_is_one_component_in_any_encoding() {
        assert_eq!(name(b"a\0").unwrap(), c"a");
        assert_eq!(name(b"...\0").unwrap(), c"...");
        assert_eq!(name(b"\xff\xfe\0").unwrap().to_bytes(), b"\xff\xfe");
        let longest = [vec![b'x'; 255], vec![0]].concat();
        assert_eq!(name(&longest).unwrap().count_bytes(), 255);
    }

    #[test]
    fn a_name_that_is_none_is_refused() {
        for bad in [
            b"".as_slice(),
            b"\0",
            b"a",
            b".\0",
            b"..\0",
            b"/\0",
            b"/etc\0",
            b"a/b\0",
            b"a/\0",
            b"a\0b\0",
            b"a\0\0",
        ] {
            assert_eq!(name(bad), Err(Errno::INVAL), "{bad:?}");
        }
        let long = [vec![b'x'; 256], vec![0]].concat();
        assert_eq!(name(&long), Err(Errno::NAMETOOLONG));
        assert_eq!(name(&[b'x'; 300]), Err(Errno::NAMETOOLONG));
    }

    #[test]
    fn a_fixed_part_is_never_read_past_the_end() {
        let mut decoder = Decoder { rest: &[1, 0, 0] };
        assert!(decoder.take::<u32>().is_err());
        assert_eq!(decoder.take::<u16>().unwrap(), 1);
        assert!(decoder.take::<u16>().is_err());
        assert_eq!(decoder.rest(), &[0]);
    }
}
