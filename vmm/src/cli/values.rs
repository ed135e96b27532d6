//! Values of options that are more than a word or a number.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use oriel_init::protocol::Dax;

use crate::machine::memory::{Backend, HugePage, MemoryConfig};

/// Window sizes and RAM sizes are multiples of this: the guest maps files 2 MiB at a time, and huge pages
/// are as large.
pub const SIZE_UNIT: u64 = 2 << 20;
/// Less than this holds no kernel.
const MEMORY_MIN: u64 = 64 << 20;
/// Length of a tag (virtio 1.3, 5.11.4).
const TAG_MAX: usize = 36;
/// Window of a share that names none. The guest spends 1/64 of it as bookkeeping in its own RAM.
const WINDOW_DEFAULT: u64 = 512 << 20;
/// More queues than this would each cost a thread and an interrupt without a vCPU to use them.
const QUEUES_MAX: u16 = 64;

/// A size in bytes, such as `512M` or `2G`, in powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    parse_size::Config::new().with_binary().parse_size(text).map_err(|_| {
        format!("{text:?} is no size; write a number and K, M, G or T, for example 512M")
    })
}

fn size_in_units(text: &str) -> Result<u64, String> {
    let size = size(text)?;
    if size == 0 || !size.is_multiple_of(SIZE_UNIT) {
        return Err(format!(
            "{text:?} is not a multiple of 2 MiB; round it to one, for example 64M"
        ));
    }
    Ok(size)
}

impl FromStr for MemoryConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (amount, options) = text.split_once(',').unwrap_or((text, ""));
        let size = size_in_units(amount)?;
        if size < MEMORY_MIN {
            return Err(format!("{amount:?} is too little to boot a kernel; give 64M or more"));
        }
        let backend = match options.split_once('=') {
            None if options.is_empty() => Backend::Anonymous,
            Some(("backend", backend)) => parse_backend(backend)?,
            _ => return Err(format!("{options:?} is no option of memory; write backend=…")),
        };
        if let Backend::HugeTlb(page) = backend
            && !size.is_multiple_of(page.bytes())
        {
            let page = page.bytes() >> 20;
            return Err(format!("{amount:?} is no multiple of the huge page of {page} MiB"));
        }
        Ok(Self { size, backend })
    }
}

fn parse_backend(text: &str) -> Result<Backend, String> {
    match text.split_once(':').unwrap_or((text, "")) {
        ("anon", "") => Ok(Backend::Anonymous),
        ("memfd", "") => Ok(Backend::Memfd),
        ("hugetlb", "" | "2M") => Ok(Backend::HugeTlb(HugePage::Size2M)),
        ("hugetlb", "1G") => Ok(Backend::HugeTlb(HugePage::Size1G)),
        ("file", path) if !path.is_empty() => Ok(Backend::File(path.into())),
        _ => Err(format!(
            "{text:?} is no memory backend; write anon, memfd, file:PATH, hugetlb:2M or hugetlb:1G"
        )),
    }
}

/// What the guest may keep of what it was told about a share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cache {
    /// Nothing: every look goes to the host.
    Never,
    /// Names and attributes for a while, data never.
    Metadata,
    /// Names and attributes for a second, data until the file is opened again.
    Auto,
    /// Everything for a day: for directories that nobody else changes.
    Always,
}

/// What follows the paths of `--share` and `--root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareOptions {
    /// The host refuses writes.
    pub read_only: bool,
    /// Name of the virtio-fs device; chosen when not given.
    pub tag: Option<String>,
    /// Caching.
    pub cache: Cache,
    /// Which files the guest maps.
    pub dax: Dax,
    /// Bytes of the DAX window; 0 with `dax=never`.
    pub window: u64,
    /// Request queues; as many as vCPUs when not given.
    pub queues: Option<u16>,
    /// Root only: writes stay in the guest.
    pub overlay: bool,
}

impl ShareOptions {
    fn parse(text: &str, root: bool) -> Result<Self, String> {
        let mut options = Self {
            read_only: false,
            tag: None,
            cache: Cache::Auto,
            dax: Dax::Inode,
            window: WINDOW_DEFAULT,
            queues: None,
            overlay: false,
        };
        let mut window = None;
        for option in text.split(',').filter(|option| !option.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            match (key, value) {
                ("ro", "") => options.read_only = true,
                ("rw", "") => options.read_only = false,
                ("overlay", "") if root => options.overlay = true,
                ("tag", tag) => options.tag = Some(parse_tag(tag)?),
                ("cache", mode) => options.cache = parse_cache(mode)?,
                ("dax", mode) => options.dax = parse_dax(mode)?,
                ("window", size) => window = Some(size_in_units(size)?),
                ("queues", count) => options.queues = Some(parse_queues(count)?),
                _ => {
                    let overlay = if root { "overlay, " } else { "" };
                    return Err(format!(
                        "{option:?} is no option of a share; write ro, rw, {overlay}tag=, cache=, dax=, \
                         window= or queues="
                    ));
                }
            }
        }
        options.window = match (options.dax, window) {
            (Dax::Never, Some(_)) => {
                return Err("a window is of no use with dax=never; leave one of the two".into());
            }
            (Dax::Never, None) => 0,
            (_, window) => window.unwrap_or(options.window),
        };
        Ok(options)
    }
}

fn parse_tag(tag: &str) -> Result<String, String> {
    let printable = tag.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',');
    if tag.is_empty() || tag.len() > TAG_MAX || !printable {
        return Err(format!("{tag:?} is no tag; write 1 to {TAG_MAX} printable characters"));
    }
    Ok(tag.into())
}

fn parse_cache(mode: &str) -> Result<Cache, String> {
    match mode {
        "never" => Ok(Cache::Never),
        "metadata" => Ok(Cache::Metadata),
        "auto" => Ok(Cache::Auto),
        "always" => Ok(Cache::Always),
        _ => Err(format!("{mode:?} is no cache mode; write never, metadata, auto or always")),
    }
}

fn parse_dax(mode: &str) -> Result<Dax, String> {
    match mode {
        "never" => Ok(Dax::Never),
        "inode" => Ok(Dax::Inode),
        "always" => Ok(Dax::Always),
        _ => Err(format!("{mode:?} is no DAX mode; write never, inode or always")),
    }
}

fn parse_queues(count: &str) -> Result<u16, String> {
    let queues = count.parse().ok().filter(|queues| (1..=QUEUES_MAX).contains(queues));
    queues.ok_or_else(|| format!("{count:?} is no number of queues; write 1 to {QUEUES_MAX}"))
}

/// The value of `--share`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareArg {
    /// The host's directory.
    pub host: PathBuf,
    /// Where the guest sees it.
    pub guest: String,
    /// How.
    pub options: ShareOptions,
}

impl FromStr for ShareArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.splitn(3, ':');
        let (host, guest) = match (parts.next(), parts.next()) {
            (Some(host), Some(guest)) if !host.is_empty() && !guest.is_empty() => (host, guest),
            _ => return Err("write HOST_DIR:GUEST_PATH[:OPTION,…]".into()),
        };
        let absolute = guest.starts_with('/') && guest != "/";
        if !absolute || Path::new(guest).components().any(|part| part.as_os_str() == "..") {
            return Err(format!(
                "the guest path {guest:?} is not absolute, or is / (that is --root), or goes through .."
            ));
        }
        let options = ShareOptions::parse(parts.next().unwrap_or(""), false)?;
        Ok(Self { host: host.into(), guest: guest.into(), options })
    }
}

/// The value of `--root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootArg {
    /// The host's directory.
    pub host: PathBuf,
    /// How.
    pub options: ShareOptions,
}

impl FromStr for RootArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // A comma does as well as a colon: there is no guest path to set apart.
        let (host, options) = text.split_once([':', ',']).unwrap_or((text, ""));
        if host.is_empty() {
            return Err("write HOST_DIR[:OPTION,…]".into());
        }
        let options = ShareOptions::parse(options, true)?;
        if options.overlay && options.read_only {
            return Err(
                "an overlay is for writing and ro is against it; leave one of the two".into()
            );
        }
        Ok(Self { host: host.into(), options })
    }
}

/// Where the kernel's console goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConsoleTarget {
    /// Nowhere; its end is shown when the sandbox breaks down.
    None,
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
    /// A file.
    File(PathBuf),
}

impl FromStr for ConsoleTarget {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "" => return Err("write none, stdout, stderr or a file name".into()),
            "none" => Self::None,
            "stdout" => Self::Stdout,
            "stderr" => Self::Stderr,
            file => Self::File(file.into()),
        })
    }
}

/// The value of `--initrd`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum InitrdSource {
    /// No initrd: the kernel mounts the root share itself.
    None,
    /// A file.
    File(PathBuf),
}

impl FromStr for InitrdSource {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "" => return Err("write a file name, or none".into()),
            "none" => Self::None,
            file => Self::File(file.into()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_a_size_and_a_backend() {
        let parse = |text: &str| text.parse::<MemoryConfig>();
        let anonymous = MemoryConfig { size: 1 << 30, backend: Backend::Anonymous };
        assert_eq!(parse("1G"), Ok(anonymous.clone()));
        assert_eq!(parse("1024m,backend=anon"), Ok(anonymous));
        let file = Backend::File("/dev/shm".into());
        assert_eq!(parse("64M,backend=file:/dev/shm").unwrap().backend, file);
        let huge = Backend::HugeTlb(HugePage::Size1G);
        assert_eq!(parse("2G,backend=hugetlb:1G").unwrap().backend, huge);
        for wrong in
            ["", "x", "-1G", "63M", "2M", "1G,back=x", "1G,backend=disk", "512M,backend=hugetlb:1G"]
        {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_share_is_two_paths_and_options() {
        let share: ShareArg = "./src:/src".parse().unwrap();
        assert_eq!((share.host.as_path(), share.guest.as_str()), (Path::new("./src"), "/src"));
        assert_eq!(share.options.dax, Dax::Inode);
        let share: ShareArg =
            "a:/b:ro,tag=t,cache=never,dax=always,window=4M,queues=2".parse().unwrap();
        let expected = ShareOptions {
            read_only: true,
            tag: Some("t".into()),
            cache: Cache::Never,
            dax: Dax::Always,
            window: 4 << 20,
            queues: Some(2),
            overlay: false,
        };
        assert_eq!(share.options, expected);
        assert_eq!("a:/b:dax=never".parse::<ShareArg>().unwrap().options.window, 0);
    }

    #[test]
    fn what_is_wrong_with_a_share_is_said() {
        for (text, hint) in [
            ("a", "HOST_DIR:GUEST_PATH"),
            (":/b", "HOST_DIR:GUEST_PATH"),
            ("a:b", "absolute"),
            ("a:/", "--root"),
            ("a:/b/../..", ".."),
            ("a:/b:rx", "rx"),
            ("a:/b:overlay", "overlay"),
            ("a:/b:window=3M", "2 MiB"),
            ("a:/b:window=0", "2 MiB"),
            ("a:/b:window=4M,dax=never", "dax=never"),
            ("a:/b:queues=0", "queues"),
            ("a:/b:tag=", "tag"),
            ("a:/b:cache=some", "cache"),
            ("a:/b:dax=on", "DAX"),
        ] {
            let error = text.parse::<ShareArg>().unwrap_err();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }

    #[test]
    fn a_root_takes_a_colon_or_a_comma() {
        for text in ["/:overlay", "/,overlay"] {
            let root: RootArg = text.parse().unwrap();
            assert!(root.options.overlay);
            assert_eq!(root.host, Path::new("/"));
        }
        assert!("/:overlay,ro".parse::<RootArg>().is_err());
    }
}
