//! File handles: names that the host's file systems give their files, good for as long as the file is there.
//!
//! A handle has the inode number and a generation inside, so a number that is used again is another file. It
//! holds nothing open. Handles are made here by `name_to_handle_at` of a file that a LOOKUP found, and stay
//! here: the guest never sees one, and none ever comes from it.

use std::os::fd::{AsFd, OwnedFd};

use super::sys::{RawHandle, name_to_handle, open_by_handle};
use crate::fuse::Result;

/// So long are the handles of most: ext4 and f2fs 8 bytes, XFS and tmpfs 12, btrfs 20. Those of network file
/// systems are longer.
const SHORT: usize = 20;

/// A handle, as small as it can be kept: there is one for each file that the guest knows.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) enum FileHandle {
    /// Zeros follow the `len` bytes that count.
    Short { len: u8, kind: i16, bytes: [u8; SHORT] },
    /// Any other.
    Long(Box<(i32, Box<[u8]>)>),
}

impl FileHandle {
    /// The handle of the file behind a descriptor.
    ///
    /// # Errors
    ///
    /// `EOPNOTSUPP` where the file system has none, and others of the host.
    pub(super) fn of(fd: impl AsFd) -> Result<Self> {
        Ok(Self::from_raw(&name_to_handle(fd)?))
    }

    /// The one that the host's kernel has written so.
    pub(super) fn of_bytes(kind: i32, bytes: &[u8]) -> Self {
        Self::from_raw(&RawHandle::new(kind, bytes))
    }

    /// An `O_PATH` descriptor of the file, seen through the mount that `mount` is on. `mount` must be open
    /// for reading.
    ///
    /// # Errors
    ///
    /// `ESTALE` when the file is no more; `EPERM` without CAP_DAC_READ_SEARCH.
    pub(super) fn open(&self, mount: impl AsFd) -> Result<OwnedFd> {
        Ok(open_by_handle(mount, &self.to_raw())?)
    }

    fn from_raw(raw: &RawHandle) -> Self {
        let bytes = raw.bytes.get(..raw.len as usize).unwrap_or(&raw.bytes);
        let mut short = [0; SHORT];
        match (short.get_mut(..bytes.len()), u8::try_from(bytes.len()), i16::try_from(raw.kind)) {
            (Some(room), Ok(len), Ok(kind)) => {
                room.copy_from_slice(bytes);
                Self::Short { len, kind, bytes: short }
            }
            _ => Self::Long(Box::new((raw.kind, bytes.into()))),
        }
    }

    fn to_raw(&self) -> RawHandle {
        let (kind, bytes) = match self {
            Self::Short { len, kind, bytes } => {
                (i32::from(*kind), bytes.get(..usize::from(*len)).unwrap_or(bytes))
            }
            Self::Long(long) => (long.0, &*long.1),
        };
        RawHandle::new(kind, bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::super::sys::MAX_HANDLE;
    use super::*;
    use crate::fuse::Errno;

    #[test]
    fn a_handle_opens_its_file_until_the_file_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "data").unwrap();
        let file = std::fs::File::open(&path).unwrap();
        let (Ok(handle), Ok(again)) = (FileHandle::of(&file), FileHandle::of(&file)) else {
            return;
        };
        assert_eq!(handle, again);
        let ino = file.metadata().unwrap().ino();
        drop(file);
        let mount = std::fs::File::open(directory.path()).unwrap();
        let opened = match handle.open(&mount) {
            Err(Errno::PERM) => return,
            opened => std::fs::File::from(opened.unwrap()),
        };
        assert_eq!(opened.metadata().unwrap().ino(), ino);
        drop(opened);
        std::fs::remove_file(&path).unwrap();
        // Most file systems use the number again at once; the handle is another.
        std::fs::write(&path, "data").unwrap();
        let new = std::fs::File::open(&path).unwrap();
        assert_ne!(FileHandle::of(&new).unwrap(), handle);
        assert_eq!(handle.open(&mount).unwrap_err(), Errno::STALE);
    }

    #[test]
    fn handles_of_any_length_are_compared_and_kept_whole() {
        for len in [1, 8, 19, 20, 21, 128] {
            let of = |last: u8| {
                let mut raw = RawHandle { len, kind: 1, bytes: [7; MAX_HANDLE] };
                raw.bytes[len as usize - 1] = last;
                FileHandle::from_raw(&raw)
            };
            assert_eq!(of(1), of(1));
            assert_ne!(of(1), of(2));
            let raw = of(3).to_raw();
            assert_eq!((raw.len, raw.kind, raw.bytes[len as usize - 1]), (len, 1, 3));
        }
        let kind = i32::from(i16::MAX) + 1;
        let raw = RawHandle { len: 8, kind, bytes: [7; MAX_HANDLE] };
        assert_eq!(FileHandle::from_raw(&raw).to_raw().kind, kind);
        assert_eq!(size_of::<FileHandle>(), 24);
    }
}
