//! Values of options that are more than a word or a number.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use devices::virtio::vsock;

use crate::machine::memory::{Backend, HugePage, MemoryConfig};
use crate::socket::SUN_PATH;

/// Window sizes and RAM sizes are multiples of this: the guest maps files 2 MiB at a time, and huge pages
/// are as large.
pub const SIZE_UNIT: u64 = 2 << 20;
/// Less than this holds no kernel.
const MEMORY_MIN: u64 = 64 << 20;
/// What the path of a port's socket has more than that of the device: `_` and the largest port.
const LONGEST_PORT: usize = "_4294967295".len();
/// A year: longer than any guest runs, and far from where a kernel's clock would overflow.
const DURATION_MAX: Duration = Duration::from_secs(365 * 86400);

/// A size in bytes, such as `512M` or `2G`, in powers of 1024.
pub fn size(text: &str) -> Result<u64, String> {
    parse_size::Config::new().with_binary().parse_size(text).map_err(|_| {
        format!("{text:?} is no size; write a number and K, M, G or T, for example 512M")
    })
}

pub fn size_in_units(text: &str) -> Result<u64, String> {
    let size = size(text)?;
    if size == 0 || !size.is_multiple_of(SIZE_UNIT) {
        return Err(format!(
            "{text:?} is not a multiple of 2 MiB; round it to one, for example 64M"
        ));
    }
    Ok(size)
}

/// A time such as `0`, `500ms`, `2s`, `1m`, `1h` or `1d`.
pub fn duration(text: &str) -> Result<Duration, String> {
    let digits = text.find(|char: char| !char.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let milliseconds = match unit {
        "ms" => Some(1),
        "s" => Some(1000),
        "m" => Some(60 * 1000),
        "h" => Some(3600 * 1000),
        "d" => Some(86400 * 1000),
        "" if number.bytes().all(|digit| digit == b'0') => Some(1),
        _ => None,
    };
    let number = number.parse::<u64>().ok();
    let total = number.zip(milliseconds).and_then(|(number, unit)| number.checked_mul(unit));
    total.map(Duration::from_millis).filter(|duration| *duration <= DURATION_MAX).ok_or_else(|| {
        format!(
            "{text:?} is no time up to 365d; write a number and ms, s, m, h or d, for example 500ms"
        )
    })
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

/// The value of `--vsock`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VsockArg {
    /// Where programs of the host connect, and with `_PORT` behind it where they listen.
    pub path: PathBuf,
    /// The guest's address.
    pub config: vsock::Config,
}

impl FromStr for VsockArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, options) = text.split_once(',').unwrap_or((text, ""));
        if path.is_empty() {
            return Err("write PATH[,cid=N]".into());
        }
        if path.len() + LONGEST_PORT > SUN_PATH {
            return Err(format!(
                "{path:?} is too long for sockets beside it; name one of {} bytes or less",
                SUN_PATH - LONGEST_PORT
            ));
        }
        let cid = match options.split_once('=') {
            None if options.is_empty() => vsock::config::MIN_GUEST_CID,
            Some(("cid", cid)) => cid.parse().map_err(|_| format!("{cid:?} is no context id"))?,
            _ => return Err(format!("{options:?} is no option of a vsock; write cid=N")),
        };
        let config = vsock::Config::new(cid).map_err(|error| error.to_string())?;
        Ok(Self { path: path.into(), config })
    }
}

/// What `--env` says: `NAME=VALUE`, or `NAME` for the host's value. As docker's: a name that the host does not have
/// is not set.
pub fn environment_entry(entry: &str) -> Option<String> {
    if entry.contains('=') {
        return Some(entry.into());
    }
    std::env::var(entry).ok().map(|value| format!("{entry}={value}"))
}

/// `TERM` for a command that gets the user's terminal.
pub fn term() -> String {
    let term = std::env::var("TERM").ok().filter(|term| !term.is_empty());
    format!("TERM={}", term.as_deref().unwrap_or("xterm"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vsock_is_a_path_and_a_context_id() {
        let parse = |text: &str| text.parse::<VsockArg>();
        let arg = parse("/run/x.sock").unwrap();
        assert_eq!((arg.path, arg.config.guest_cid()), ("/run/x.sock".into(), 3));
        assert_eq!(parse("x,cid=77").unwrap().config.guest_cid(), 77);
        let long = "x".repeat(97);
        assert!(parse(&long[1..]).is_ok());
        for (text, hint) in [
            ("", "PATH"),
            (",cid=3", "PATH"),
            (&long, "96 bytes"),
            ("x,cid=2", "reserved"),
            ("x,cid=4294967295", "reserved"),
            ("x,cid=-3", "-3"),
            ("x,port=3", "cid="),
            ("x,", ""),
        ] {
            match parse(text) {
                Err(error) => assert!(error.contains(hint), "{error}"),
                Ok(_) => assert_eq!(text, "x,"),
            }
        }
    }

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
    fn a_time_is_a_whole_number_and_a_unit() {
        let milliseconds = |text| duration(text).map(|time| time.as_millis());
        for (text, expected) in [
            ("0", 0),
            ("0s", 0),
            ("500ms", 500),
            ("2s", 2000),
            ("1m", 60_000),
            ("1h", 3_600_000),
            ("1d", 86_400_000),
            ("365d", 365 * 86_400_000),
        ] {
            assert_eq!(milliseconds(text), Ok(expected), "{text}");
        }
        for wrong in
            ["", "1", "s", "-1s", "1.5s", "1 s", "1S", "1w", "366d", "99999999999999999999s"]
        {
            let error = duration(wrong).unwrap_err();
            assert!(error.contains(&format!("{wrong:?}")) && error.contains("500ms"), "{error}");
        }
    }
}
