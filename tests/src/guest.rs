//! What guests are made of, and where they can run.

use std::ffi::OsString;
use std::fs;
use std::hash::Hasher;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use crate::run::Oriel;

/// Where `kernel-config/fetch` puts kernel and busybox.
fn data() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(directory) = variable("ORIEL_DATA") {
        return directory.into();
    }
    let data = variable("XDG_DATA_HOME").map(PathBuf::from);
    let home = || PathBuf::from(variable("HOME").unwrap_or_default()).join(".local/share");
    data.unwrap_or_else(home).join("oriel")
}

fn existing(path: PathBuf) -> PathBuf {
    assert!(path.is_file(), "no {}: run kernel-config/fetch", path.display());
    path
}

/// The distribution's kernel, packed.
pub fn vmlinuz() -> PathBuf {
    existing(data().join("vmlinuz"))
}

/// A file of the distribution that boots with systemd, as `rootfs/image` has made it.
///
/// # Panics
///
/// When it is not there.
pub fn system(file: &str) -> PathBuf {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../rootfs/image");
    let output = Command::new(script).arg("--print-directory").output().expect("rootfs/image");
    let directory = String::from_utf8(output.stdout).expect("a path in UTF-8");
    let path = Path::new(directory.trim_end()).join(file);
    assert!(path.is_file(), "no {}: run rootfs/image", path.display());
    path
}

/// The directory of its modules.
pub(crate) fn modules() -> PathBuf {
    data().join("modules")
}

/// A static busybox.
pub fn busybox() -> PathBuf {
    existing(data().join("busybox"))
}

/// The distribution's kernel, unpacked: what `oriel` keeps of it.
pub fn vmlinux() -> PathBuf {
    let directory = warm_cache().clone().unwrap_or_else(default_cache);
    kept_kernel(&directory).expect("oriel keeps the kernel that it unpacked")
}

fn default_cache() -> PathBuf {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    let home = || PathBuf::from(variable("HOME").unwrap_or_default()).join(".cache");
    variable("XDG_CACHE_HOME").map(PathBuf::from).unwrap_or_else(home)
}

fn kept_kernel(cache: &Path) -> Option<PathBuf> {
    // Named after what it was unpacked from.
    let mut hasher = std::hash::DefaultHasher::new();
    hasher.write(&fs::read(vmlinuz()).ok()?);
    let path = cache.join("oriel").join(format!("vmlinux-{:016x}", hasher.finish()));
    path.is_file().then_some(path)
}

static CACHE: OnceLock<Option<PathBuf>> = OnceLock::new();

/// Has the kernel unpacked once. In an emulated machine the home directory cannot be written, and each run
/// would unpack it again; `Some` is the cache directory to use instead.
pub(crate) fn warm_cache() -> &'static Option<PathBuf> {
    CACHE.get_or_init(|| {
        let usual = default_cache();
        if kept_kernel(&usual).is_some() {
            return None;
        }
        let directory = std::env::temp_dir().join("oriel-integration-cache");
        if kept_kernel(&directory).is_none() {
            let check = Oriel::command(&["check"]).env("XDG_CACHE_HOME", &directory).finish();
            assert!(kept_kernel(&directory).is_some(), "{}", check.report());
        }
        Some(directory)
    })
}

/// What every run has in its environment.
pub(crate) fn environment() -> Vec<(OsString, OsString)> {
    let cache = CACHE.get().and_then(Clone::clone);
    cache.map(|directory| ("XDG_CACHE_HOME".into(), directory.into())).into_iter().collect()
}

/// Fails where no guest can run, rather than passing for nothing.
pub(crate) fn need_kvm() {
    static ABLE: OnceLock<bool> = OnceLock::new();
    let able = ABLE.get_or_init(|| {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let flags = info.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
        let extension = flags.split_whitespace().any(|flag| flag == "svm" || flag == "vmx");
        extension && fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_ok()
    });
    assert!(
        able,
        "no guest can run on this machine: /dev/kvm cannot be opened, or the processor has neither svm \
         nor vmx. Run the tests through tests/with-kvm:\n  \
         CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$PWD/tests/with-kvm cargo test -p integration -- \
         --test-threads=2"
    );
}
