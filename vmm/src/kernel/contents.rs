//! What is put into a guest's memory before it starts: read straight from its file, and nowhere before. A kernel is
//! some 50 MiB, and to clear and fill so much memory twice would take longer than much of what a guest does at its
//! start.

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;

use anyhow::Result;
use devices::memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

/// So much of a file is looked at to see what it is: the headers of kernels are in its first page.
const HEAD: u64 = 64 << 10;

/// Bytes for a guest's memory.
pub enum Contents {
    /// All of a file, which is so many bytes long.
    File(File, u64),
    /// Of no file, or of one that can be read only once.
    Bytes(Vec<u8>),
}

impl Contents {
    /// Opens a file; what is not a regular one, such as a pipe, is read.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn open(path: &Path) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        // Files of the host's kernel say that they are empty.
        if metadata.is_file() && metadata.len() > 0 {
            return Ok(Self::File(file, metadata.len()));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(Self::Bytes(bytes))
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        match self {
            Self::File(_, len) => *len,
            Self::Bytes(bytes) => bytes.len() as u64,
        }
    }

    /// What it begins with: as much as tells what it is.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn head(&self) -> io::Result<Cow<'_, [u8]>> {
        self.first(HEAD)
    }

    /// All of it, in this process's memory.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn bytes(&self) -> io::Result<Cow<'_, [u8]>> {
        self.first(u64::MAX)
    }

    fn first(&self, count: u64) -> io::Result<Cow<'_, [u8]>> {
        match self {
            Self::Bytes(bytes) => {
                let count = usize::try_from(count).unwrap_or(usize::MAX).min(bytes.len());
                Ok(bytes.get(..count).unwrap_or_default().into())
            }
            Self::File(file, _) => {
                let mut bytes = Vec::new();
                from_its_beginning(file)?.take(count).read_to_end(&mut bytes)?;
                Ok(bytes.into())
            }
        }
    }

    /// Puts all of it into guest memory.
    ///
    /// # Errors
    ///
    /// When there is no memory at `address`, or the file has become shorter.
    pub fn load(&self, memory: &GuestMemory, address: GuestAddress) -> Result<()> {
        match self {
            Self::Bytes(bytes) => Ok(memory.write_slice(bytes, address)?),
            Self::File(file, len) => {
                let (mut file, len) = (from_its_beginning(file)?, usize::try_from(*len)?);
                Ok(memory.read_exact_volatile_from(address, &mut file, len)?)
            }
        }
    }
}

/// The same open file, at its beginning: nobody else reads it by its offset meanwhile.
///
/// # Errors
///
/// The host's.
pub fn from_its_beginning(file: &File) -> io::Result<File> {
    let mut file = file.try_clone()?;
    file.rewind()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use devices::memory::GuestMemory;

    use super::*;

    #[test]
    fn a_file_goes_into_guest_memory_as_it_is_and_one_that_became_shorter_is_an_error() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)]).unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let bytes: Vec<u8> = (0..100_000u32).map(|number| number as u8).collect();
        std::fs::write(&path, &bytes).unwrap();
        let contents = Contents::open(&path).unwrap();
        assert_eq!(contents.len(), 100_000);
        assert_eq!(*contents.head().unwrap(), bytes[..HEAD as usize]);
        assert_eq!(*contents.bytes().unwrap(), bytes);
        // Twice: what was read before makes no difference.
        for address in [GuestAddress(4096), GuestAddress(500_000)] {
            contents.load(&memory, address).unwrap();
            let mut loaded = vec![0; bytes.len()];
            memory.read_slice(&mut loaded, address).unwrap();
            assert_eq!(loaded, bytes);
        }
        assert!(contents.load(&memory, GuestAddress(1 << 20)).is_err(), "no memory there");
        File::options().write(true).open(&path).unwrap().set_len(10).unwrap();
        assert!(contents.load(&memory, GuestAddress(0)).is_err());
    }

    #[test]
    fn what_can_be_read_only_once_is_read() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        std::io::Write::write_all(&mut writer, b"initrd").unwrap();
        drop(writer);
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&reader));
        let contents = Contents::open(Path::new(&path)).unwrap();
        assert_eq!((contents.len(), &*contents.head().unwrap()), (6, &b"initrd"[..]));
        assert!(Contents::open(Path::new("/proc/version")).unwrap().len() > 0, "says 0");
    }
}
