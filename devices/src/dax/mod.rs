//! The DAX window: a stretch of guest-physical addresses behind which host file pages are mapped.

mod budget;
mod owners;
mod policy;
mod prefault;
mod probe;
mod streams;
mod table;
pub mod window;

use std::io;
use std::os::fd::BorrowedFd;

pub use policy::Policy;
pub use prefault::GuestPageTables;
pub use window::{GrowError, Window};

/// What a window holds and did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Stretches of files that are mapped now.
    pub mappings: u64,
    /// Bytes of files that are mapped now.
    pub mapped_bytes: u64,
    /// Places where zeros were put for pages that a file has lost or the host cannot read, and places where
    /// the file's pages came back.
    pub repairs: u64,
    /// Ranges for which pages were entered ahead of the guest's faults.
    pub prefaulted: u64,
    /// Bytes of these pages.
    pub prefaulted_bytes: u64,
}

/// The window as the FUSE server sees it (virtio 1.3, 5.11.6.4): where it lives in guest or host memory is
/// not the server's business.
///
/// All methods may be called from any thread at any time. Each call is atomic towards the others: two
/// calls on overlapping ranges leave the result of one order or the other.
///
/// At no moment is there a hole in the host mapping that an unrelated `mmap` of this process could take,
/// with one exception: before Linux 6.12 an `mmap` with `MAP_FIXED` that fails late (the file system refuses
/// the mapping) has already taken away what was there. The range is reserved anew at once, but not
/// atomically. A file is therefore tried elsewhere before it is mapped here for the first time.
///
/// Offsets and lengths are bytes. They are the guest's own numbers: the implementation checks them.
pub trait DaxWindow: Send + Sync {
    /// Size in bytes, a multiple of 2 MiB. May become more, never less.
    fn size(&self) -> u64;

    /// The most that [`size`](Self::size) will ever say. Always the same answer.
    fn max_size(&self) -> u64 {
        self.size()
    }

    /// Maps for owner 0: see [`map_for`](Self::map_for).
    ///
    /// # Errors
    ///
    /// As [`map_for`](Self::map_for).
    fn map(
        &self,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
        writable: bool,
    ) -> io::Result<()> {
        self.map_for(0, offset, len, file, file_offset, writable)
    }

    /// Puts `len` bytes of `file` from `file_offset` at `offset` in the window, shared with the host's page
    /// cache, over whatever was there. May reach past the end of the file. The window keeps its own
    /// reference to the file. `owner` is any number, by which the mapping can be found again.
    ///
    /// # Errors
    ///
    /// `EINVAL` when an offset or the length is not a multiple of 4 KiB, when `len` is 0, when the range
    /// leaves the window or overflows; else the errno of `mmap` (`EACCES` for a writable mapping of a file
    /// that is not open for writing, `ENOMEM` when the window or the process has too many mappings,
    /// `ENODEV` for a file system that cannot be mapped so, hugetlbfs among them). The window is unchanged
    /// after an error.
    fn map_for(
        &self,
        owner: u32,
        offset: u64,
        len: u64,
        file: BorrowedFd<'_>,
        file_offset: u64,
        writable: bool,
    ) -> io::Result<()>;

    /// Does the same with the file that is mapped at `like`, for the same owner and with the same access, without
    /// asking the host anything about it. `None`, and nothing was done, when no such file is mapped there, or what is
    /// to be mapped ends past its end, as far as that is known.
    ///
    /// # Errors
    ///
    /// As [`map_for`](Self::map_for).
    fn map_like(
        &self,
        like: u64,
        owner: u32,
        offset: u64,
        len: u64,
        file_offset: u64,
        writable: bool,
    ) -> Option<io::Result<()>> {
        let _ = (like, owner, offset, len, file_offset, writable);
        None
    }

    /// Takes the way to their files from all writable mappings of an owner, or gives it back.
    ///
    /// Without it, a mapping shows its file as before, and what the guest stores there is the guest's own: in
    /// memory of this process, in no file, and nobody else's to see. It is lost when the way is given back. A
    /// file that the host does not open for that any more is replaced by zeros (and stays without, the other way
    /// round). Mappings that are made later are not affected. Asks the host, and may block as long as a file's
    /// server does. Idempotent.
    ///
    /// # Errors
    ///
    /// The host's, when the way could not be taken from some mapping (`ENOMEM`): it is still there, and so is what
    /// can be reached by it. To be tried again.
    fn set_writable(&self, owner: u32, writable: bool) -> io::Result<()>;

    /// Whether the guest has a mapping of a file, by device and inode number, from which that was taken: what it
    /// stores there is in no file.
    fn is_severed(&self, owner: u32, file: (u64, u64)) -> bool;

    /// Takes away all mappings of an owner and puts zeros in their place, which are the guest's own until the
    /// range is mapped anew or unmapped. Idempotent.
    fn take_away(&self, owner: u32);

    /// The range at `offset` was mapped by [`map`](Self::map), and the guest is about to hear of it: the
    /// moment to make ready what it will touch next. Called without the locks under which `map` is called;
    /// the mapping may be gone already. May take as long as a guest needs to touch all of it.
    fn mapped(&self, _offset: u64) {}

    /// Takes away whatever is mapped in the range. A range where nothing is mapped is fine.
    ///
    /// # Errors
    ///
    /// `EINVAL` as for [`map`](Self::map).
    fn unmap(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The guest is about to be told the size of a file. A window that has put something else in the place
    /// of pages which a file had lost looks whether the file has them again: a guest touches pages only up
    /// to the size that it was told. For any other window there is nothing to do. Called before most
    /// replies, so it must cost nothing when nothing was lost.
    fn file_may_have_grown(&self) {}

    /// Whether [`file_may_have_grown`](Self::file_may_have_grown) has something to do, for which it asks the host.
    fn asks_the_host(&self) -> bool {
        false
    }

    /// What there is to say of the window in numbers.
    fn statistics(&self) -> Statistics {
        Statistics::default()
    }

    /// Takes away everything: DESTROY, a device reset, a second INIT. Idempotent.
    fn clear(&self);
}
