//! The mounts of a bundle: file systems of the guest's kernel, directories of the host, and files of the host.

use std::fs::{self, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use devices::share::is_pseudo;
use oci_spec::runtime::Mount;
use oriel_init::container;
use oriel_init::initramfs::FileCopy;
use rustix::mount::MountFlags;
use serde_json::Value;

use crate::cli::{ShareArg, ShareOptions};

/// The largest file that the guest has a copy of: it is in the guest's memory, twice while it boots.
const MAX_FILE: u64 = 1 << 20;

/// Each directory is a device, of which PCI takes 32; some are the machine's own. The user's shares count.
const MAX_SHARES: usize = 24;

/// Of how many files there are copies.
const MAX_FILES: usize = 64;

/// File systems of the guest's kernel that show nothing but the guest's own.
const KERNEL: [&str; 14] = [
    "proc",
    "sysfs",
    "tmpfs",
    "devpts",
    "mqueue",
    "cgroup2",
    "cgroup",
    "ramfs",
    "devtmpfs",
    "securityfs",
    "debugfs",
    "tracefs",
    "bpf",
    "hugetlbfs",
];

/// Options of mount(8) that are bits of mount(2), and whether they set them.
const FLAGS: [(&str, bool, MountFlags); 25] = [
    ("ro", true, MountFlags::RDONLY),
    ("rw", false, MountFlags::RDONLY),
    ("nosuid", true, MountFlags::NOSUID),
    ("suid", false, MountFlags::NOSUID),
    ("nodev", true, MountFlags::NODEV),
    ("dev", false, MountFlags::NODEV),
    ("noexec", true, MountFlags::NOEXEC),
    ("exec", false, MountFlags::NOEXEC),
    ("sync", true, MountFlags::SYNCHRONOUS),
    ("async", false, MountFlags::SYNCHRONOUS),
    ("dirsync", true, MountFlags::DIRSYNC),
    ("noatime", true, MountFlags::NOATIME),
    ("atime", false, MountFlags::NOATIME),
    ("nodiratime", true, MountFlags::NODIRATIME),
    ("diratime", false, MountFlags::NODIRATIME),
    ("relatime", true, MountFlags::RELATIME),
    ("norelatime", false, MountFlags::RELATIME),
    ("strictatime", true, MountFlags::STRICTATIME),
    ("nostrictatime", false, MountFlags::STRICTATIME),
    ("lazytime", true, MountFlags::LAZYTIME),
    ("nolazytime", false, MountFlags::LAZYTIME),
    ("silent", true, MountFlags::SILENT),
    ("loud", false, MountFlags::SILENT),
    ("defaults", false, MountFlags::empty()),
    ("nosymfollow", true, MountFlags::NOSYMFOLLOW),
];

/// What a bundle mounts.
pub struct Mounts {
    /// In their order.
    pub bound: Vec<Bound>,
    /// Directories of the host.
    pub shares: Vec<ShareArg>,
    /// Copies of files of the host, with the ids that they have there.
    pub files: Vec<FileCopy>,
}

/// A mount.
#[derive(Clone, Debug)]
pub struct Bound {
    /// Of what.
    pub what: What,
    /// Where.
    pub path: String,
    /// `MS_` bits.
    pub flags: u32,
}

/// What is mounted.
#[derive(Clone, Debug)]
pub enum What {
    /// The share with this index.
    Share(usize),
    /// What is no share.
    Other(container::What),
}

/// What the options of a mount say.
struct Options {
    flags: MountFlags,
    bind: bool,
    recursive: bool,
    /// They are the file system's.
    own: Vec<String>,
}

/// Plans `mounts` of the bundle in `directory`. Shares have these `options`, and there are `beside` others.
///
/// # Errors
///
/// What cannot be mounted, in a line.
pub fn plan(
    directory: &Path,
    mounts: Vec<Value>,
    options: &ShareOptions,
    beside: usize,
    warnings: &mut Vec<String>,
) -> Result<Mounts> {
    let mut planned = Mounts { bound: Vec::new(), shares: Vec::new(), files: Vec::new() };
    for (index, mount) in mounts.into_iter().enumerate() {
        let name = format!("mounts[{index}]");
        let mount: Mount =
            serde_json::from_value(mount).map_err(|error| anyhow!("{name}: {error}"))?;
        let path = destination(mount.destination()).with_context(|| name.clone())?;
        let name = format!("{name} ({path})");
        planned.add(directory, &mount, path, options, &name, warnings).context(name.clone())?;
        if let Some(Bound { what: What::Share(index), .. }) = planned.bound.last()
            && index + beside >= MAX_SHARES
        {
            bail!(
                "{name}: source: there are {MAX_SHARES} directories already, the most, those of --share included; \
                 bind one that holds several"
            );
        }
    }
    Ok(planned)
}

fn destination(path: &Path) -> Result<String> {
    let text = path.to_str().filter(|text| !text.contains('\0'));
    let up = path.components().any(|part| part == Component::ParentDir);
    match text.filter(|text| text.starts_with('/') && !up) {
        Some(text) => Ok(text.into()),
        None => bail!("destination: {path:?}: write an absolute path without .."),
    }
}

impl Mounts {
    fn add(
        &mut self,
        directory: &Path,
        mount: &Mount,
        path: String,
        shared: &ShareOptions,
        name: &str,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        for (field, mappings) in
            [("uidMappings", mount.uid_mappings()), ("gidMappings", mount.gid_mappings())]
        {
            if mappings.as_ref().is_some_and(|mappings| !mappings.is_empty()) {
                bail!(
                    "{field}: mounts have no ids of their own here; leave it, or give a --share with uid-map="
                );
            }
        }
        let kind = mount.typ().as_deref().unwrap_or_default();
        let options =
            Options::parse(mount.options().as_deref().unwrap_or_default(), name, warnings)?;
        let flags = options.flags.bits();
        if !options.bind && kind != "bind" {
            let what = kernel(kind, mount, &options)?;
            self.bound.push(Bound { what: What::Other(what), path, flags });
            return Ok(());
        }
        if !options.own.is_empty() {
            bail!(
                "options: {:?}: a bind mount has none like that; leave it",
                options.own.join(",")
            );
        }
        let source =
            mount.source().as_ref().context("source: is missing; name the host's directory")?;
        let host = directory.join(source);
        if let Some(kind) = own_kernels(&host) {
            warnings.push(format!(
                "{name}: source: {source:?}: of it the guest has its own, and not the host's"
            ));
            let what = container::What::Kernel {
                kind: kind.into(),
                source: kind.into(),
                options: String::new(),
            };
            self.bound.push(Bound { what: What::Other(what), path, flags });
            return Ok(());
        }
        let metadata = fs::metadata(&host)
            .map_err(|error| anyhow!("source: {source:?}: {error}; name what is there"))?;
        let what = if metadata.is_dir() {
            if !options.recursive && has_mounts_below(&host) {
                warnings.push(format!(
                    "{name}: what is mounted below {source:?} comes along, as with rbind"
                ));
            }
            let mut shared = shared.clone();
            shared.read_only = options.flags.contains(MountFlags::RDONLY);
            self.shares.push(ShareArg { host, guest: path.clone(), options: shared });
            What::Share(self.shares.len() - 1)
        } else if metadata.is_file() {
            let bytes = read(&host).with_context(|| format!("source: {source:?}"))?;
            let Some(bytes) = bytes.filter(|_| self.files.len() < MAX_FILES) else {
                bail!(
                    "source: {source:?}: of a file the guest has a copy, and it takes {MAX_FILES} of {} MiB; share \
                     the directory that it is in",
                    MAX_FILE >> 20
                );
            };
            if !options.flags.contains(MountFlags::RDONLY) {
                warnings.push(format!(
                    "{name}: source: {source:?}: the guest has a copy of the file, and what it writes there stays in it"
                ));
            }
            let file = self.files.len().to_string();
            self.files.push(FileCopy {
                name: file.clone(),
                bytes,
                mode: metadata.mode() & 0o7777,
                uid: metadata.uid(),
                gid: metadata.gid(),
            });
            What::Other(container::What::File(file))
        } else {
            let kind = metadata.file_type();
            let what = if kind.is_socket() { "a socket" } else { "a device or a FIFO" };
            bail!(
                "source: {source:?}: is {what}, and of the host's; a guest cannot have it; leave the mount"
            );
        };
        self.bound.push(Bound { what, path, flags });
        Ok(())
    }
}

fn kernel(kind: &str, mount: &Mount, options: &Options) -> Result<container::What> {
    if !KERNEL.contains(&kind) {
        bail!(
            "type: {kind:?}: only {} and bind can be mounted; mount it on the host, and bind that",
            KERNEL.join(", ")
        );
    }
    // A guest has version 2 alone, as do containers of a host that has.
    let kind = if kind == "cgroup" { "cgroup2" } else { kind };
    let source = mount.source().as_ref().and_then(|source| source.to_str()).unwrap_or(kind);
    Ok(container::What::Kernel {
        kind: kind.into(),
        source: source.into(),
        options: options.own.join(","),
    })
}

impl Options {
    fn parse(words: &[String], name: &str, warnings: &mut Vec<String>) -> Result<Self> {
        let mut options =
            Self { flags: MountFlags::empty(), bind: false, recursive: false, own: Vec::new() };
        for word in words {
            if let Some((.., set, flag)) = FLAGS.iter().find(|(option, ..)| option == word) {
                options.flags.set(*flag, *set);
                continue;
            }
            match word.as_str() {
                "bind" => options.bind = true,
                "rbind" => (options.bind, options.recursive) = (true, true),
                // What the host mounts there appears in the guest, and nothing goes the other way.
                "private" | "rprivate" | "slave" | "rslave" | "unbindable" | "runbindable" => {}
                "shared" | "rshared" => warnings.push(format!(
                    "{name}: options: {word:?} is left out: no mount of the guest is seen by the host"
                )),
                "tmpcopyup" => warnings.push(format!(
                    "{name}: options: {word:?} is left out: the file system is empty at first"
                )),
                "idmap" | "ridmap" => {
                    bail!("options: {word:?}: mounts have no ids of their own here; leave it");
                }
                word if word.contains([',', '\0']) => bail!("options: {word:?} is more than one; write them apart"),
                word => options.own.push(word.into()),
            }
        }
        Ok(options)
    }
}

/// What is in the file at `host`; `None` when that is more than [`MAX_FILE`], whatever size the file says it has.
///
/// # Errors
///
/// The host's; that it is a file of an interface of its kernel, where a read may wait for ever.
fn read(host: &Path) -> Result<Option<Vec<u8>>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(host)?;
    if is_pseudo(&file)? {
        bail!("is the host kernel's own (proc, sysfs, …), and no file; leave the mount");
    }
    let mut bytes = Vec::new();
    file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
    Ok((bytes.len() as u64 <= MAX_FILE).then_some(bytes))
}

/// What is the kernel's on the host is the guest kernel's in the guest.
fn own_kernels(host: &Path) -> Option<&'static str> {
    let host: PathBuf = host.components().collect();
    [
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/sys/fs/cgroup", "cgroup2"),
        ("/dev/pts", "devpts"),
        ("/dev/mqueue", "mqueue"),
    ]
    .into_iter()
    .find_map(|(path, kind)| (host == Path::new(path)).then_some(kind))
}

/// Whether the host has mounted anything below a directory. In doubt it has not.
fn has_mounts_below(directory: &Path) -> bool {
    let Ok(directory) = directory.canonicalize() else { return false };
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    // proc_pid_mountinfo(5): the fifth field is where it is; blanks in it are written as octal numbers.
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points.map(Path::new).any(|point| point != directory && point.starts_with(&directory))
}
