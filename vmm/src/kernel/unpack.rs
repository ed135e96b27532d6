//! Unpacking a bzImage on the host.
//!
//! The guest would do it itself, on one virtual CPU before anything else runs; here it is done once and the
//! result kept. What boots then is the kernel proper at its default address, without the randomisation that
//! the unpacking code does.

use std::fs::DirBuilder;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::{Read, Write};
use std::ops::Range;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::contents::Contents;
use super::image::{Format, KernelFile};

/// `setup_header` fields, as offsets in a bzImage.
const SETUP_SECTS_OFFSET: usize = 0x1f1;
const PAYLOAD_OFFSET_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH_OFFSET: usize = 0x24c;
const SECTOR: usize = 512;
/// What `setup_sects` 0 stands for.
const DEFAULT_SETUP_SECTS: usize = 4;

const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];
const ZSTD_MAGIC: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// What names of unpacked kernels begin with.
const CACHED: &str = "vmlinux-";
/// So many are kept, some 50 MiB each: more kernels than this nobody boots in turn.
const KEPT: usize = 4;

/// No kernel is larger. A bound on what a broken or hostile file can make us hold.
const UNPACKED_MAX: u64 = 512 << 20;

/// The kernel inside `file`, or `file` itself when it cannot be taken out (then the guest unpacks it). Kept
/// in the user's cache directory, where that can be written.
pub fn unpacked(file: KernelFile) -> KernelFile {
    match try_unpacked(&file) {
        Ok(kernel) => kernel,
        Err(error) => {
            log::info!("the guest unpacks {} itself: {error:#}", file.path.display());
            file
        }
    }
}

fn try_unpacked(file: &KernelFile) -> Result<KernelFile> {
    let cache = cache_path(&file.contents);
    if let Some(cache) = &cache
        && is_private(cache)
        && let Ok(kernel) = KernelFile::open(cache)
        && kernel.format == Format::Vmlinux
    {
        return Ok(kernel);
    }
    log::info!("unpacking {}", file.path.display());
    let bytes = unpack(&file.contents.bytes()?)?;
    let format = KernelFile::detect(&bytes, bytes.len() as u64).context("what was unpacked")?;
    if format != Format::Vmlinux {
        bail!("what was unpacked is no vmlinux");
    }
    if let Some(cache) = cache
        && let Err(error) = store(&cache, &bytes)
    {
        log::info!("not kept in {}: {error:#}", cache.display());
    }
    Ok(KernelFile { path: file.path.clone(), format, contents: Contents::Bytes(bytes) })
}

/// Named after what it was unpacked from, so that another kernel is another name.
fn cache_path(kernel: &Contents) -> Option<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let directory = variable("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")))?;
    let number = identity(kernel).ok()?;
    Some(directory.join("oriel").join(format!("{CACHED}{number:016x}")))
}

/// Another number whenever a kernel is another one or was written to. For that not all of a file is read: how it begins,
/// its size and the times of its last changes, one of which nobody can set. Not where it is, which a machine that has
/// the file from another one sees otherwise.
fn identity(kernel: &Contents) -> std::io::Result<u64> {
    let mut hasher = DefaultHasher::new();
    match kernel {
        Contents::File(file, size) => {
            let file = file.metadata()?;
            (size, file.mtime(), file.mtime_nsec(), file.ctime(), file.ctime_nsec())
                .hash(&mut hasher);
            hasher.write(&kernel.head()?);
        }
        Contents::Bytes(bytes) => hasher.write(bytes),
    }
    Ok(hasher.finish())
}

/// Whether only this user can have written the file: what is in it boots with the user's shares.
fn is_private(path: &Path) -> bool {
    const WRITABLE_BY_OTHERS: u32 = 0o022;
    let owner = rustix::process::geteuid().as_raw();
    [Some(path), path.parent()].into_iter().flatten().all(|path| {
        std::fs::metadata(path).is_ok_and(|metadata| {
            metadata.uid() == owner && metadata.mode() & WRITABLE_BY_OTHERS == 0
        })
    })
}

/// Writes a whole file or none: another `oriel` may read it at any moment.
fn store(path: &Path, bytes: &[u8]) -> Result<()> {
    let directory = path.parent().context("no directory")?;
    DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    file.persist(path)?;
    forget_oldest(directory);
    Ok(())
}

/// Removes those that were unpacked before the last [`KEPT`]: of kernels that are there no more, most likely.
fn forget_oldest(directory: &Path) {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    let mut cached: Vec<_> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(CACHED))
        .filter_map(|entry| Some((entry.metadata().ok()?.modified().ok()?, entry.path())))
        .collect();
    cached.sort();
    let many = cached.len().saturating_sub(KEPT);
    for (_, path) in cached.iter().take(many) {
        // Somebody else may have removed it just now. Whoever boots it has it open.
        let _ = std::fs::remove_file(path);
    }
}

/// Takes the kernel out of a bzImage.
fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image)
        .and_then(|payload| image.get(payload))
        .context("the bzImage's header points outside of it")?;
    let mut bytes = Vec::new();
    if payload.starts_with(GZIP_MAGIC) {
        let unpacker = flate2::read::GzDecoder::new(payload);
        unpacker.take(UNPACKED_MAX).read_to_end(&mut bytes).context("gzip")?;
    } else if payload.starts_with(ZSTD_MAGIC) {
        let unpacker = ruzstd::decoding::StreamingDecoder::new(payload)?;
        unpacker.take(UNPACKED_MAX).read_to_end(&mut bytes).context("zstd")?;
    } else if KernelFile::detect(payload, payload.len() as u64).is_ok() {
        bytes.extend_from_slice(payload);
    } else {
        bail!("it is packed in neither gzip nor zstd");
    }
    Ok(bytes)
}

/// Where the packed kernel is in a bzImage that begins with `head`; `None` when that ends before it can be told.
pub(super) fn payload(head: &[u8]) -> Option<Range<usize>> {
    let word = |at: usize| {
        let bytes = head.get(at..at.checked_add(4)?)?;
        usize::try_from(u32::from_le_bytes(bytes.try_into().ok()?)).ok()
    };
    let sectors = match usize::from(*head.get(SETUP_SECTS_OFFSET)?) {
        0 => DEFAULT_SETUP_SECTS,
        sectors => sectors,
    };
    let start = SECTOR * (sectors + 1) + word(PAYLOAD_OFFSET_OFFSET)?;
    Some(start..start.checked_add(word(PAYLOAD_LENGTH_OFFSET)?)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image_with(payload: &[u8]) -> Vec<u8> {
        let mut image = vec![0; SECTOR * 2];
        image[SETUP_SECTS_OFFSET] = 1;
        image[PAYLOAD_OFFSET_OFFSET] = 16;
        image[PAYLOAD_LENGTH_OFFSET..][..4].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        image.extend([0; 16]);
        image.extend(payload);
        image
    }

    #[test]
    fn a_gzip_payload_is_unpacked() {
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        packer.write_all(b"a kernel").unwrap();
        let mut payload = packer.finish().unwrap();
        payload.extend([0; 4]); // what the kernel's build appends
        assert_eq!(unpack(&image_with(&payload)).unwrap(), b"a kernel");
    }

    #[test]
    fn a_cached_kernel_that_others_may_write_is_not_trusted() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("oriel/vmlinux");
        store(&file, b"kernel").unwrap();
        assert!(is_private(&file));
        for path in [file.parent().unwrap(), &file] {
            let before = std::fs::metadata(path).unwrap().permissions();
            std::fs::set_permissions(path, PermissionsExt::from_mode(0o777)).unwrap();
            assert!(!is_private(&file));
            std::fs::set_permissions(path, before).unwrap();
        }
    }

    #[test]
    fn a_kernel_that_was_written_to_is_another_and_the_oldest_are_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vmlinuz");
        std::fs::write(&path, b"kernel").unwrap();
        let number = || identity(&Contents::open(&path).unwrap()).unwrap();
        let before = number();
        assert_eq!(before, number());
        std::thread::sleep(std::time::Duration::from_millis(20));
        std::fs::write(&path, b"Kernel").unwrap();
        assert_ne!(before, number());

        let cache = directory.path().join("cache");
        for name in ["a", "b", "c", "d", "e", "f"] {
            store(&cache.join(format!("{CACHED}{name}")), b"kernel").unwrap();
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        let mut left: Vec<_> = std::fs::read_dir(&cache)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        left.sort();
        assert_eq!(left, ["c", "d", "e", "f"].map(|name| format!("{CACHED}{name}")));
    }

    #[test]
    fn a_broken_image_is_an_error() {
        for payload in [&b"BZh9"[..], GZIP_MAGIC, ZSTD_MAGIC, b""] {
            assert!(unpack(&image_with(payload)).is_err());
        }
        let mut image = image_with(b"x");
        image[PAYLOAD_LENGTH_OFFSET + 3] = 0xff;
        assert!(unpack(&image).is_err());
        assert!(unpack(&[]).is_err());
    }
}
