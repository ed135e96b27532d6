//! Guest memory, and the buffers in it that a request is read from and a reply is written to.
//!
//! Two kinds of memory stand behind a guest-physical address:
//!
//! - **RAM**, which is always there;
//! - a **DAX window**, whose pages are host file pages. Any of them may vanish while it is looked at,
//!   because another process may truncate the file. A plain load from there may raise SIGBUS in this
//!   process, so the window is only touched through system calls, which return `EFAULT` instead.
//!
//! A guest may legally hand out either kind as a buffer: `write(fd, p, n)` with `p` in a DAX mapping puts
//! a window address in a descriptor (virtio 1.3, 5.11.6.4). All devices translate through
//! [`GuestBuffer`], so all of them get this right.
//!
//! The window's region is told from RAM by its protection: it is entered into the guest memory map as
//! `PROT_NONE`, which is what an empty window is.
#![expect(
    unsafe_code,
    reason = "hands guest pages to readv-like system calls, which need raw pointers"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use smallvec::SmallVec;
use vm_memory::{
    GuestAddress, GuestMemory as _, GuestMemoryAtomic, GuestMemoryMmap, GuestMemoryRegion,
    VolatileSlice,
};

/// One snapshot of the guest-physical address space: RAM and every window at its current place.
pub type GuestMemory = GuestMemoryMmap<()>;

/// The address space as it changes when the guest moves a window's BAR.
pub type AtomicGuestMemory = GuestMemoryAtomic<GuestMemory>;

/// How many segments a buffer holds without allocating: a 128 KiB request of 4 KiB pages and its headers.
const INLINE_SEGMENTS: usize = 36;

/// The largest number of segments one `preadv2` takes (`IOV_MAX` of `linux/uio.h`).
const MAX_IO_VECTORS: usize = 1024;
/// How often a signal may come between before a request fails with `EINTR`: who sends them one after the other wants
/// it to end.
const TRIES: usize = 16;

/// Why a range of guest addresses cannot be used as a buffer.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BufferError {
    /// Some of the range has neither RAM nor a window behind it.
    #[error("guest address {address:#x}+{len:#x} is not memory")]
    NotMemory {
        /// First guest-physical address of the range.
        address: u64,
        /// Its length in bytes.
        len: usize,
    },
    /// The buffer is shorter than what is to be read from or written to it.
    #[error("{wanted} bytes at offset {offset} do not fit a buffer of {len} bytes")]
    TooShort {
        /// Offset in the buffer, in bytes.
        offset: usize,
        /// Number of bytes wanted.
        wanted: usize,
        /// Length of the buffer, in bytes.
        len: usize,
    },
    /// A page of a DAX window was not there when it was copied (`EFAULT`).
    #[error("a page of a DAX window vanished under a copy")]
    Fault,
}

#[derive(Clone, Copy)]
struct Segment<'m> {
    slice: VolatileSlice<'m>,
    /// Where the driver said it is; nothing for host memory.
    address: GuestAddress,
    /// The segment is in a DAX window: touch it by system calls only.
    may_fault: bool,
}

/// A request's readable part or its writable part: memory in order, in pieces, seen as one run of bytes.
///
/// Contents may change at any time (the guest shares the memory): read a header once, then look only at
/// the copy.
#[derive(Default)]
pub struct GuestBuffer<'m> {
    segments: SmallVec<[Segment<'m>; INLINE_SEGMENTS]>,
    len: usize,
}

impl<'m> GuestBuffer<'m> {
    /// An empty buffer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends `len` bytes at `address`. A zero length appends nothing and is not an error.
    ///
    /// # Errors
    ///
    /// [`BufferError::NotMemory`] when some of the range is not memory or wraps; nothing is appended then.
    pub fn push(
        &mut self,
        memory: &'m GuestMemory,
        address: GuestAddress,
        len: usize,
    ) -> Result<(), BufferError> {
        let not_memory = || BufferError::NotMemory { address: address.0, len };
        let before = self.segments.len();
        let mut at = address;
        let mut left = len;
        while left > 0 {
            let piece = memory.to_region_addr(at).and_then(|(region, start)| {
                let count = left.min(usize::try_from(region.len() - start.0).ok()?);
                let slice = region.get_slice(start, count).ok()?;
                Some(Segment { slice, address: at, may_fault: region.prot() == libc::PROT_NONE })
            });
            let next = piece.and_then(|piece| {
                self.segments.push(piece);
                left -= piece.slice.len();
                at.0.checked_add(piece.slice.len() as u64)
            });
            match next {
                Some(next) => at = GuestAddress(next),
                None if left == 0 => {}
                None => {
                    self.segments.truncate(before);
                    return Err(not_memory());
                }
            }
        }
        match self.len.checked_add(len) {
            Some(total) => self.len = total,
            None => {
                self.segments.truncate(before);
                return Err(not_memory());
            }
        }
        Ok(())
    }

    /// A buffer over host memory, for a server that is driven without a guest (a test, `/dev/fuse`).
    pub fn from_slice(bytes: &'m mut [u8]) -> Self {
        let mut buffer = Self { segments: SmallVec::new(), len: bytes.len() };
        buffer.segments.push(Segment {
            slice: VolatileSlice::from(bytes),
            address: GuestAddress(0),
            may_fault: false,
        });
        buffer
    }

    /// The same buffer as guest addresses and lengths, to be found again later in another snapshot of the
    /// memory: see [`BufferPlace`].
    pub fn place(&self) -> BufferPlace {
        let parts = self.segments.iter().map(|segment| (segment.address, segment.slice.len()));
        BufferPlace { parts: parts.collect() }
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no byte in it.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether any of it is in a DAX window.
    pub fn touches_window(&self) -> bool {
        self.segments.iter().any(|segment| segment.may_fault)
    }

    /// Whether some of the `len` bytes at `offset` are in a DAX window.
    pub fn is_in_window(&self, offset: usize, len: usize) -> bool {
        self.range(offset, len).is_ok_and(|mut pieces| pieces.any(|piece| piece.may_fault))
    }

    /// Copies `bytes.len()` bytes at `offset` out of the buffer.
    ///
    /// # Errors
    ///
    /// [`BufferError::TooShort`], or [`BufferError::Fault`] (then `bytes` is partly written).
    pub fn read_at(&self, offset: usize, bytes: &mut [u8]) -> Result<(), BufferError> {
        let mut done = 0;
        for segment in self.range(offset, bytes.len())? {
            let len = segment.slice.len();
            // `range` yields exactly `bytes.len()` bytes, so the piece is always there.
            let Some(target) = bytes.get_mut(done..done + len) else {
                break;
            };
            if segment.may_fault {
                copy_guarded(Direction::FromWindow, &segment.slice, target.as_mut_ptr(), len)?;
            } else {
                segment.slice.copy_to(target);
            }
            done += len;
        }
        Ok(())
    }

    /// Copies `bytes` into the buffer at `offset`.
    ///
    /// # Errors
    ///
    /// [`BufferError::TooShort`], or [`BufferError::Fault`] (then the buffer is partly written).
    pub fn write_at(&self, offset: usize, bytes: &[u8]) -> Result<(), BufferError> {
        let mut done = 0;
        for segment in self.range(offset, bytes.len())? {
            let len = segment.slice.len();
            let Some(source) = bytes.get(done..done + len) else {
                break;
            };
            if segment.may_fault {
                copy_guarded(Direction::ToWindow, &segment.slice, source.as_ptr().cast_mut(), len)?;
            } else {
                segment.slice.copy_from(source);
            }
            done += len;
        }
        Ok(())
    }

    /// Reads up to `len` bytes of `file` at `file_offset` straight into the buffer at `offset`, and says
    /// how many came: fewer than `len` only at the end of the file or after an error with some bytes read.
    ///
    /// `flags` are `preadv2`'s (`RWF_NOWAIT`, …). A window page that is gone is `EFAULT`, not a signal.
    ///
    /// # Errors
    ///
    /// The host's errno; `EINVAL` when the range is not inside the buffer; with `RWF_NOWAIT`, `EAGAIN` also when
    /// some bytes were read and the next would have to be waited for.
    pub fn read_from_file(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        file_offset: u64,
        flags: i32,
    ) -> io::Result<usize> {
        self.transfer(offset, len, file_offset, |vectors, at| {
            // SAFETY: the vectors describe memory that outlives `self`; the kernel writes only to it and
            // answers EFAULT where a page is missing. The memory is shared with the guest and only ever
            // used as volatile bytes, so a write behind Rust's back breaks no reference.
            unsafe {
                libc::preadv2(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, at, flags)
            }
        })
    }

    /// Writes up to `len` bytes of the buffer at `offset` into `file` at `file_offset`, and says how many
    /// went. `flags` are `pwritev2`'s (`RWF_APPEND`, …).
    ///
    /// # Errors
    ///
    /// As [`read_from_file`](Self::read_from_file).
    pub fn write_to_file(
        &self,
        offset: usize,
        len: usize,
        file: BorrowedFd<'_>,
        file_offset: u64,
        flags: i32,
    ) -> io::Result<usize> {
        self.transfer(offset, len, file_offset, |vectors, at| {
            // SAFETY: as in `read_from_file`; the kernel only reads from the vectors.
            unsafe {
                libc::pwritev2(file.as_raw_fd(), vectors.as_ptr(), vectors.len() as i32, at, flags)
            }
        })
    }

    /// Receives up to `len` bytes of a stream socket straight into the buffer at `offset`, by one system call
    /// that does not wait, and says how many came; 0 is the end of the stream. A window page that is gone is
    /// `EFAULT`. File descriptors that the peer passes along are closed.
    ///
    /// # Errors
    ///
    /// The host's errno, `WouldBlock` when nothing is there; `EINVAL` when the range is not inside the buffer.
    pub fn receive(&self, offset: usize, len: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        self.exchange(offset, len, |message| {
            // SAFETY: the vectors in the message describe memory that outlives `self`, as in
            // `read_from_file`; there is no name and no ancillary buffer in it.
            unsafe { libc::recvmsg(socket.as_raw_fd(), message, libc::MSG_DONTWAIT) }
        })
    }

    /// Sends up to `len` bytes of the buffer at `offset` to a stream socket, by one system call that does not
    /// wait and raises no signal, and says how many went.
    ///
    /// # Errors
    ///
    /// The host's errno, `WouldBlock` when there is no room; `EINVAL` when the range is not inside the buffer.
    pub fn send(&self, offset: usize, len: usize, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
        self.exchange(offset, len, |message| {
            // SAFETY: as in `receive`; the kernel only reads from the vectors.
            unsafe { libc::sendmsg(socket.as_raw_fd(), message, flags) }
        })
    }

    /// Makes one `call`, again only when a signal came between.
    fn exchange(
        &self,
        offset: usize,
        len: usize,
        call: impl Fn(*mut libc::msghdr) -> isize,
    ) -> io::Result<usize> {
        let mut vectors = self.vectors(offset, len)?;
        // SAFETY: all zeros is a message without a name, vectors or ancillary data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = vectors.as_mut_ptr();
        message.msg_iovlen = vectors.len();
        loop {
            if let Ok(count) = usize::try_from(call(&mut message)) {
                return Ok(count);
            }
            let error = io::Error::last_os_error();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }

    /// Repeats `call` until `len` bytes are done, nothing more comes, or an error.
    fn transfer(
        &self,
        offset: usize,
        len: usize,
        file_offset: u64,
        call: impl Fn(&[libc::iovec], i64) -> isize,
    ) -> io::Result<usize> {
        let mut done = 0;
        let mut interrupted = 0;
        while done < len {
            let at = file_offset
                .checked_add(done as u64)
                .and_then(|at| i64::try_from(at).ok())
                .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
            let vectors = self.vectors(offset + done, len - done)?;
            let count = call(&vectors, at);
            match usize::try_from(count) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(_) => {
                    let error = io::Error::last_os_error();
                    if error.kind() == io::ErrorKind::Interrupted && interrupted < TRIES {
                        interrupted += 1;
                        continue;
                    }
                    // Who does not wait has to know that there is more: a short count would be the end of the file.
                    if done > 0 && error.kind() != io::ErrorKind::WouldBlock {
                        break;
                    }
                    return Err(error);
                }
            }
        }
        Ok(done)
    }

    /// A range as the kernel takes it, cut off where there are too many pieces for one system call.
    fn vectors(
        &self,
        offset: usize,
        len: usize,
    ) -> io::Result<SmallVec<[libc::iovec; INLINE_SEGMENTS]>> {
        let pieces = self
            .range(offset, len)
            .map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?
            .take(MAX_IO_VECTORS);
        let vector = |segment: Segment<'m>| libc::iovec {
            iov_base: segment.slice.ptr_guard_mut().as_ptr().cast(),
            iov_len: segment.slice.len(),
        };
        Ok(pieces.map(vector).collect())
    }

    /// The pieces of memory behind `len` bytes at `offset`, in order.
    fn range(
        &self,
        offset: usize,
        len: usize,
    ) -> Result<impl Iterator<Item = Segment<'m>> + '_, BufferError> {
        let end = offset.checked_add(len).filter(|end| *end <= self.len);
        let too_short = BufferError::TooShort { offset, wanted: len, len: self.len };
        let end = end.ok_or(too_short)?;
        let mut start = 0usize;
        Ok(self.segments.iter().filter_map(move |segment| {
            let first = start;
            // Cannot overflow: the sum of all lengths is `self.len`.
            start += segment.slice.len();
            let from = offset.max(first);
            let to = end.min(start);
            if from >= to {
                return None;
            }
            let slice = segment.slice.subslice(from - first, to - from).ok()?;
            // Inside a range of guest memory, which does not wrap.
            let address = GuestAddress(segment.address.0.wrapping_add((from - first) as u64));
            Some(Segment { slice, address, may_fault: segment.may_fault })
        }))
    }
}

/// Where a buffer was, for one that is written to long after the request was taken from its queue. It holds no
/// memory: the guest may move a window meanwhile, and then finds the bytes in the place that has the address
/// by that time.
#[derive(Debug)]
pub struct BufferPlace {
    parts: Box<[(GuestAddress, usize)]>,
}

impl BufferPlace {
    /// The buffer in `memory`, as it is now.
    ///
    /// # Errors
    ///
    /// [`BufferError::NotMemory`] when some of it is not there any more.
    pub fn buffer<'m>(&self, memory: &'m GuestMemory) -> Result<GuestBuffer<'m>, BufferError> {
        let mut buffer = GuestBuffer::new();
        for (address, len) in &self.parts {
            buffer.push(memory, *address, *len)?;
        }
        Ok(buffer)
    }
}

enum Direction {
    FromWindow,
    ToWindow,
}

/// Copies between a window and this process's own memory by a system call, which answers a missing page
/// with an error where a load or store would raise SIGBUS.
fn copy_guarded(
    direction: Direction,
    window: &VolatileSlice<'_>,
    own: *mut u8,
    len: usize,
) -> Result<(), BufferError> {
    let mut done = 0;
    while done < len {
        let local = libc::iovec { iov_base: own.wrapping_add(done).cast(), iov_len: len - done };
        let remote = libc::iovec {
            iov_base: window.ptr_guard_mut().as_ptr().wrapping_add(done).cast(),
            iov_len: len - done,
        };
        // SAFETY: `own` is valid for `len` bytes (both callers pass a slice of that length), the window's
        // slice is `len` bytes long by the same callers, and the process named is this one.
        let count = unsafe {
            let own_pid = libc::getpid();
            match direction {
                Direction::FromWindow => libc::process_vm_readv(own_pid, &local, 1, &remote, 1, 0),
                Direction::ToWindow => libc::process_vm_writev(own_pid, &local, 1, &remote, 1, 0),
            }
        };
        match usize::try_from(count) {
            Ok(count) if count > 0 => done += count,
            _ => return Err(BufferError::Fault),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    use vm_memory::mmap::MmapRegionBuilder;
    use vm_memory::{Bytes, GuestRegionMmap};

    use super::*;

    fn two_regions() -> GuestMemory {
        GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])
            .unwrap()
    }

    #[test]
    fn a_buffer_spans_adjacent_regions() {
        let memory = two_regions();
        let mut buffer = GuestBuffer::new();
        buffer.push(&memory, GuestAddress(0xff0), 0x20).unwrap();
        buffer.write_at(0, &[7; 0x20]).unwrap();
        let mut bytes = [0; 0x20];
        memory.read_slice(&mut bytes, GuestAddress(0xff0)).unwrap();
        assert_eq!(bytes, [7; 0x20]);
    }

    #[test]
    fn a_range_that_leaves_memory_is_refused_whole() {
        let memory = two_regions();
        let mut buffer = GuestBuffer::new();
        for (address, len) in [(0x1ff0, 0x11), (0x2000, 1), (u64::MAX, 2), (0, usize::MAX)] {
            let error = buffer.push(&memory, GuestAddress(address), len).unwrap_err();
            assert_eq!(error, BufferError::NotMemory { address, len });
            assert!(buffer.is_empty());
        }
    }

    #[test]
    fn a_place_is_found_again_in_the_memory_as_it_is_then() {
        let memory = two_regions();
        let mut buffer = GuestBuffer::new();
        buffer.push(&memory, GuestAddress(0xff8), 0x10).unwrap();
        buffer.push(&memory, GuestAddress(0x10), 4).unwrap();
        let place = buffer.place();
        let later = two_regions();
        let found = place.buffer(&later).unwrap();
        assert_eq!(found.len(), 0x14);
        found.write_at(0xe, &[1, 2, 3, 4]).unwrap();
        let read = |memory: &GuestMemory, at| memory.read_obj::<u16>(GuestAddress(at)).unwrap();
        assert_eq!((read(&later, 0x1006), read(&later, 0x10)), (0x0201, 0x0403));
        assert_eq!((read(&memory, 0x1006), read(&memory, 0x10)), (0, 0), "not the one of before");
        let (less, _) = later.remove_region(GuestAddress(0x1000), 0x1000).unwrap();
        assert!(matches!(place.buffer(&less), Err(BufferError::NotMemory { .. })));
    }

    #[test]
    fn reading_past_the_end_is_an_error() {
        let mut bytes = [0; 8];
        let buffer = GuestBuffer::from_slice(&mut bytes);
        for (offset, wanted) in [(0, 9), (8, 1), (usize::MAX, 1)] {
            let error = buffer.read_at(offset, &mut vec![0; wanted]).unwrap_err();
            assert_eq!(error, BufferError::TooShort { offset, wanted, len: 8 });
        }
    }

    #[test]
    fn file_data_goes_straight_between_file_and_pieces() {
        let memory = two_regions();
        let mut buffer = GuestBuffer::new();
        buffer.push(&memory, GuestAddress(0x10), 3).unwrap();
        buffer.push(&memory, GuestAddress(0x1100), 5).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"..hello world").unwrap();
        assert_eq!(buffer.read_from_file(0, 8, file.as_fd(), 2, 0).unwrap(), 8);
        let mut bytes = [0; 8];
        buffer.read_at(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"hello wo");
        assert_eq!(buffer.read_from_file(0, 8, file.as_fd(), 10, 0).unwrap(), 3);
        assert_eq!(buffer.write_to_file(3, 5, file.as_fd(), 0, 0).unwrap(), 5);
        file.rewind().unwrap();
        let mut start = [0; 5];
        file.read_exact(&mut start).unwrap();
        assert_eq!(&start, b"lo wo");
    }

    #[test]
    fn socket_data_goes_straight_between_socket_and_pieces() {
        let memory = two_regions();
        let mut buffer = GuestBuffer::new();
        buffer.push(&memory, GuestAddress(0x10), 3).unwrap();
        buffer.push(&memory, GuestAddress(0x1100), 5).unwrap();
        let (ours, mut theirs) = std::os::unix::net::UnixStream::pair().unwrap();
        let would_block = |result: io::Result<usize>| result.unwrap_err().kind();
        assert_eq!(would_block(buffer.receive(0, 8, ours.as_fd())), io::ErrorKind::WouldBlock);
        theirs.write_all(b"hello").unwrap();
        assert_eq!(buffer.receive(1, 7, ours.as_fd()).unwrap(), 5);
        assert_eq!(buffer.send(2, 4, ours.as_fd()).unwrap(), 4);
        let mut bytes = [0; 4];
        theirs.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ello");
        assert_eq!(buffer.send(2, 7, ours.as_fd()).unwrap_err().raw_os_error(), Some(libc::EINVAL));
        drop(theirs);
        assert_eq!(buffer.receive(0, 8, ours.as_fd()).unwrap(), 0);
        assert_eq!(buffer.send(0, 8, ours.as_fd()).unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_window_page_past_the_end_of_its_file_is_a_fault_not_a_signal() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        // SAFETY: a fresh shared mapping at an address the kernel chooses.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                8192,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(address, libc::MAP_FAILED);
        // SAFETY: the mapping above is 8192 bytes long and stays until the end of the process.
        let region = unsafe {
            MmapRegionBuilder::new(8192)
                .with_raw_mmap_pointer(address.cast())
                .with_mmap_prot(libc::PROT_NONE)
                .build()
                .unwrap()
        };
        let region = GuestRegionMmap::new(region, GuestAddress(0)).unwrap();
        let memory = GuestMemory::from_regions(vec![region]).unwrap();
        let mut buffer = GuestBuffer::new();
        buffer.push(&memory, GuestAddress(4000), 200).unwrap();
        assert_eq!(buffer.write_at(0, &[1; 96]), Ok(()));
        assert_eq!(buffer.write_at(0, &[1; 200]), Err(BufferError::Fault));
        assert_eq!(buffer.read_at(96, &mut [0; 104]), Err(BufferError::Fault));
    }
}
