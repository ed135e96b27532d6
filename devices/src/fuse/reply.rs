//! From a result to the bytes of a reply.

use std::os::fd::BorrowedFd;

use vm_memory::ByteValued;

use super::abi::{OUT_HEADER, OutHeader};
use super::errno::{Errno, Result};
use crate::memory::GuestBuffer;

/// The writable part of a request, and the `unique` that its reply echoes.
///
/// The body goes in first and the header last, at offset 0, when the length is known. Nothing is ever
/// written past the writable part.
pub struct Reply<'r, 'm> {
    buffer: &'r GuestBuffer<'m>,
    unique: u64,
}

impl<'r, 'm> Reply<'r, 'm> {
    /// A reply to request `unique`.
    pub fn new(buffer: &'r GuestBuffer<'m>, unique: u64) -> Self {
        Self { buffer, unique }
    }

    /// How many bytes of body there is room for; `None` when there is not even room for a header.
    pub fn room(&self) -> Option<usize> {
        self.buffer.len().checked_sub(OUT_HEADER)
    }

    /// The place of the body.
    pub fn body(&self) -> Payload<'r, 'm> {
        Payload { buffer: self.buffer, offset: OUT_HEADER, len: self.room().unwrap_or(0) }
    }

    /// Writes `bytes` at `offset` of the body.
    ///
    /// # Errors
    ///
    /// `EINVAL` when they do not fit.
    pub fn put_bytes(&self, offset: usize, bytes: &[u8]) -> Result<usize> {
        let at = OUT_HEADER.checked_add(offset).ok_or(Errno::INVAL)?;
        self.buffer.write_at(at, bytes)?;
        offset.checked_add(bytes.len()).ok_or(Errno::INVAL)
    }

    /// Writes `value` at the start of the body and returns the body's length.
    ///
    /// # Errors
    ///
    /// As [`put_bytes`](Self::put_bytes).
    pub fn put<T: ByteValued>(&self, value: &T) -> Result<usize> {
        self.put_bytes(0, value.as_slice())
    }

    /// Writes the header for a body of the given length, or for an error, and returns the reply's length:
    /// the used length of the descriptor chain. 0 when there is no room for a header.
    pub fn finish(&self, body: Result<usize>) -> u32 {
        let (len, error) = match body {
            Ok(body) => (OUT_HEADER.saturating_add(body), 0),
            Err(errno) => (OUT_HEADER, -errno.raw()),
        };
        let Ok(len) = u32::try_from(len) else {
            return 0;
        };
        let header = OutHeader { len, error, unique: self.unique };
        match self.buffer.write_at(0, header.as_slice()) {
            Ok(()) => len,
            Err(_) => 0,
        }
    }
}

/// A stretch of a guest buffer that file data goes into or comes from, without a copy in between.
pub struct Payload<'r, 'm> {
    buffer: &'r GuestBuffer<'m>,
    offset: usize,
    len: usize,
}

impl<'r, 'm> Payload<'r, 'm> {
    /// `len` bytes at `offset` of `buffer`.
    ///
    /// # Errors
    ///
    /// `EINVAL` when they are not inside.
    pub fn new(buffer: &'r GuestBuffer<'m>, offset: usize, len: usize) -> Result<Self> {
        match offset.checked_add(len) {
            Some(end) if end <= buffer.len() => Ok(Self { buffer, offset, len }),
            _ => Err(Errno::INVAL),
        }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The same, cut to at most `len` bytes.
    #[must_use]
    pub fn cut(self, len: usize) -> Self {
        Self { len: self.len.min(len), ..self }
    }

    /// What is left of it behind the first `done` bytes.
    #[must_use]
    pub fn rest(&self, done: usize) -> Self {
        let done = done.min(self.len);
        Self { buffer: self.buffer, offset: self.offset + done, len: self.len - done }
    }

    /// Whether some of it is in a DAX window.
    pub fn is_in_window(&self) -> bool {
        self.buffer.is_in_window(self.offset, self.len)
    }

    /// Fills it from `file` at `offset` and says how many bytes came; fewer only at the end of the file.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn read_from(&self, file: BorrowedFd<'_>, offset: u64, flags: i32) -> Result<usize> {
        Ok(self.buffer.read_from_file(self.offset, self.len, file, offset, flags)?)
    }

    /// Writes it to `file` at `offset` and says how many bytes went.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn write_to(&self, file: BorrowedFd<'_>, offset: u64, flags: i32) -> Result<usize> {
        Ok(self.buffer.write_to_file(self.offset, self.len, file, offset, flags)?)
    }
}
