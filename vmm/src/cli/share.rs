//! The values of `--share` and `--root`.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use devices::share::{CachePolicy, DirectPolicy, IdRange, LockPolicy, XattrPolicy};
use devices::virtio::fs::Dispatch;
use oriel_init::protocol::Dax;

use super::values::{duration, size_in_units};

/// Length of a tag (virtio 1.3, 5.11.4).
const TAG_MAX: usize = 36;
/// More queues than this would each cost a thread and an interrupt without a vCPU to use them.
const QUEUES_MAX: u16 = 64;

/// What follows the paths of `--share` and `--root`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ShareOptions {
    /// The host refuses writes.
    pub read_only: bool,
    /// Name of the virtio-fs device; chosen when not given.
    pub tag: Option<String>,
    /// What the guest may keep.
    pub cache: CachePolicy,
    /// For how long it may believe that a name is there; the cache mode says when not given.
    pub entry_timeout: Option<Duration>,
    /// For how long it may believe attributes.
    pub attr_timeout: Option<Duration>,
    /// For how long it may believe that a name is not there.
    pub negative_timeout: Option<Duration>,
    /// How many directories are watched with `cache=watch`; as many as is usual when not given.
    pub watches: Option<usize>,
    /// The guest collects writes.
    pub writeback: bool,
    /// The guest may make device nodes.
    pub device_nodes: bool,
    /// Which extended attributes there are; mapped on a share that may be written to when not given, and
    /// otherwise the host's.
    pub xattr: Option<XattrPolicy>,
    /// POSIX ACLs.
    pub acl: bool,
    /// Users of the guest and of the host; how they relate without any depends on who runs this.
    pub uid_map: Vec<IdRange>,
    /// Groups of the guest and of the host.
    pub gid_map: Vec<IdRange>,
    /// Whom the guest's locks concern.
    pub locks: LockPolicy,
    /// Which files the guest maps.
    pub dax: Dax,
    /// What a guest's O_DIRECT does on the host.
    pub direct: DirectPolicy,
    /// Bytes of the DAX window; 0 with `dax=never`; chosen when not given.
    pub window: Option<u64>,
    /// Pages of files that are read in order are entered ahead of the guest's faults.
    pub prefault: bool,
    /// Bytes that it can grow to; as large as it is when not given.
    pub window_max: Option<u64>,
    /// Request queues; as many as vCPUs when not given.
    pub queues: Option<u16>,
    /// Who serves its requests.
    pub dispatch: Dispatch,
    /// Root only: writes stay in the guest.
    pub overlay: bool,
}

impl Default for ShareOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            tag: None,
            cache: CachePolicy::default(),
            entry_timeout: None,
            attr_timeout: None,
            negative_timeout: None,
            watches: None,
            writeback: false,
            device_nodes: false,
            xattr: None,
            acl: false,
            uid_map: Vec::new(),
            gid_map: Vec::new(),
            locks: LockPolicy::default(),
            dax: Dax::Inode,
            direct: DirectPolicy::default(),
            window: None,
            prefault: true,
            window_max: None,
            queues: None,
            dispatch: Dispatch::default(),
            overlay: false,
        }
    }
}

impl ShareOptions {
    fn parse(text: &str, root: bool) -> Result<Self, String> {
        let mut options = Self::default();
        let (mut window, mut window_max) = (None, None);
        for option in text.split(',').filter(|option| !option.is_empty()) {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            // So that the message names the option, not only what is wrong with its value.
            let named = |message: String| format!("{key}=: {message}");
            let time = || duration(value).map_err(named).map(Some);
            match (key, value) {
                ("ro", "") => options.read_only = true,
                ("rw", "") => options.read_only = false,
                ("overlay", "") if root => options.overlay = true,
                ("writeback", "") => options.writeback = true,
                ("dev", "") => options.device_nodes = true,
                ("acl", "") => options.acl = true,
                ("xattr", mode) => options.xattr = Some(parse_xattr(mode)?),
                ("uid-map", range) => options.uid_map.push(parse_range(range).map_err(named)?),
                ("gid-map", range) => options.gid_map.push(parse_range(range).map_err(named)?),
                ("tag", tag) => options.tag = Some(parse_tag(tag)?),
                ("cache", mode) => options.cache = parse_cache(mode)?,
                ("entry-timeout", _) => options.entry_timeout = time()?,
                ("attr-timeout", _) => options.attr_timeout = time()?,
                ("negative-timeout", _) => options.negative_timeout = time()?,
                ("watches", count) => options.watches = Some(parse_watches(count)?),
                ("locks", whose) => options.locks = parse_locks(whose)?,
                ("dax", mode) => options.dax = parse_dax(mode)?,
                ("direct", "buffered") => options.direct = DirectPolicy::Buffered,
                ("direct", "host") => options.direct = DirectPolicy::Host,
                ("direct", mode) => {
                    return Err(format!("{mode:?} is no way of O_DIRECT; write buffered or host"));
                }
                ("window", "auto") => window = Some(None),
                ("window", size) => window = Some(Some(size_in_units(size).map_err(named)?)),
                ("prefault", mode) => options.prefault = parse_prefault(mode)?,
                ("window-max", size) => window_max = Some(size_in_units(size).map_err(named)?),
                ("queues", count) => options.queues = Some(parse_queues(count)?),
                ("dispatch", who) => options.dispatch = parse_dispatch(who)?,
                _ => {
                    let overlay = if root { "overlay, " } else { "" };
                    return Err(format!(
                        "{option:?} is no option of a share; write ro, rw, {overlay}acl, dev, writeback, \
                         tag=, cache=, entry-timeout=, attr-timeout=, negative-timeout=, watches=, xattr=, uid-map=, \
                         gid-map=, locks=, dax=, direct=, window=, window-max=, prefault=, queues= or \
                         dispatch="
                    ));
                }
            }
        }
        if options.dax == Dax::Never {
            if window.is_some() || window_max.is_some() {
                return Err("a window is of no use with dax=never; leave one of the two".into());
            }
            window = Some(Some(0));
        }
        options.window = window.flatten();
        options.window_max = window_max;
        options.check()?;
        Ok(options)
    }

    /// What contradicts itself.
    fn check(&self) -> Result<(), String> {
        if let (Some(window), Some(max)) = (self.window, self.window_max)
            && max < window
        {
            return Err(format!(
                "window-max={}M is less than the window of {}M; give more, or a smaller window=",
                max >> 20,
                window >> 20
            ));
        }
        if self.overlay && self.read_only {
            return Err(
                "an overlay is for writing and ro is against it; leave one of the two".into()
            );
        }
        let (read_only, why) = match self.overlay {
            true => (true, "overlay"),
            false => (self.read_only, "ro"),
        };
        if self.writeback && read_only {
            return Err(format!(
                "writeback: nothing is written to a share with {why}; leave one of the two"
            ));
        }
        if self.device_nodes && read_only {
            return Err(format!(
                "dev: nothing is made on a share with {why}; leave one of the two"
            ));
        }
        if self.acl && self.xattr == Some(XattrPolicy::Off) {
            return Err("acl: ACLs are extended attributes, and xattr=off is against them; leave one of the two"
                .into());
        }
        if self.direct == DirectPolicy::Host && self.dax != Dax::Never {
            return Err("direct=host: what is mapped from the host's page cache is not read or written past \
                        it; give dax=never as well, or leave it at direct=buffered"
                .into());
        }
        if self.watches.is_some() && self.cache != CachePolicy::Watch {
            return Err(
                "watches: directories are watched with cache=watch only; give it as well".into()
            );
        }
        if self.cache == CachePolicy::Watch && self.overlay {
            return Err(
                "cache=watch: the guest's overlay keeps what lies below it; leave one of the two"
                    .into(),
            );
        }
        if self.writeback && self.cache != CachePolicy::Always {
            return Err("writeback: the guest then goes by its own sizes and times, so nobody else may change \
                        the directory; say so with cache=always, or leave writeback"
                .into());
        }
        Ok(())
    }
}

fn parse_tag(tag: &str) -> Result<String, String> {
    let printable = tag.bytes().all(|byte| byte.is_ascii_graphic() && byte != b',');
    if tag.is_empty() || tag.len() > TAG_MAX || !printable {
        return Err(format!("{tag:?} is no tag; write 1 to {TAG_MAX} printable characters"));
    }
    Ok(tag.into())
}

fn parse_cache(mode: &str) -> Result<CachePolicy, String> {
    match mode {
        "never" => Ok(CachePolicy::Never),
        "metadata" => Ok(CachePolicy::Metadata),
        "auto" => Ok(CachePolicy::Auto),
        "always" => Ok(CachePolicy::Always),
        "watch" => Ok(CachePolicy::Watch),
        _ => {
            Err(format!("{mode:?} is no cache mode; write never, metadata, auto, always or watch"))
        }
    }
}

fn parse_watches(count: &str) -> Result<usize, String> {
    match count.parse() {
        Ok(count) => Ok(count),
        Err(_) => Err(format!("watches={count:?}: write how many directories may be watched")),
    }
}

fn parse_xattr(mode: &str) -> Result<XattrPolicy, String> {
    match mode {
        "off" => Ok(XattrPolicy::Off),
        "on" => Ok(XattrPolicy::On),
        "mapped" => Ok(XattrPolicy::Mapped),
        _ => Err(format!(
            "{mode:?} is no way to have extended attributes; write xattr=off, on or mapped"
        )),
    }
}

/// `GUEST:HOST:COUNT`. Whether ranges fit together is for later, when all are known.
fn parse_range(text: &str) -> Result<IdRange, String> {
    let numbers: Vec<u32> = text.split(':').map_while(|number| number.parse().ok()).collect();
    match numbers[..] {
        [guest, host, count] if count > 0 && text.split(':').count() == 3 => {
            Ok(IdRange { guest, host, count })
        }
        _ => Err(format!(
            "{text:?} is no range of ids; write GUEST:HOST:COUNT, for example 0:100000:65536"
        )),
    }
}

fn parse_locks(whose: &str) -> Result<LockPolicy, String> {
    match whose {
        "host" => Ok(LockPolicy::Host),
        "guest" => Ok(LockPolicy::Guest),
        _ => Err(format!("locks={whose:?} is nobody's; write locks=host or locks=guest")),
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

fn parse_prefault(mode: &str) -> Result<bool, String> {
    match mode {
        "auto" => Ok(true),
        "never" => Ok(false),
        _ => Err(format!("{mode:?} is no prefault mode; write auto or never")),
    }
}

fn parse_dispatch(who: &str) -> Result<Dispatch, String> {
    match who {
        "auto" => Ok(Dispatch::Auto),
        "inline" => Ok(Dispatch::Inline),
        "worker" => Ok(Dispatch::Worker),
        "poll" => Ok(Dispatch::Poll),
        _ => {
            Err(format!("{who:?} serves no requests; write dispatch=auto, inline, worker or poll"))
        }
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
        check_guest_path(guest)?;
        let options = ShareOptions::parse(parts.next().unwrap_or(""), false)?;
        Ok(Self { host: host.into(), guest: guest.into(), options })
    }
}

fn check_guest_path(guest: &str) -> Result<(), String> {
    let absolute = guest.starts_with('/') && guest != "/";
    if !absolute || Path::new(guest).components().any(|part| part.as_os_str() == "..") {
        return Err(format!(
            "the guest path {guest:?} is not absolute, or is / (that is --root), or goes through .."
        ));
    }
    Ok(())
}

/// The keys of some options.
fn keys(options: &str) -> impl Iterator<Item = &str> {
    let options = options.split(',').filter(|option| !option.is_empty());
    options.map(|option| option.split_once('=').map_or(option, |(key, _)| key))
}

/// Options of `--shares` that are not of a share there: they are the device's.
const OF_DEVICE: [&str; 6] = ["tag", "window", "window-max", "prefault", "queues", "dispatch"];
/// Options of `--shares` that count for its shares too: they are the session's.
const OF_SESSION: [&str; 5] = ["ro", "rw", "dax", "locks", "acl"];

/// The value of `--shares`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LiveArg {
    /// Where the guest sees it.
    pub guest: String,
    /// What concerns all of it.
    pub options: ShareOptions,
}

impl FromStr for LiveArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (guest, options) = text.split_once(':').unwrap_or((text, ""));
        check_guest_path(guest)?;
        let known = |key: &&str| OF_DEVICE.contains(key) || OF_SESSION.contains(key);
        if let Some(key) = keys(options).find(|key| !known(key)) {
            return Err(format!(
                "{key:?} is no option of --shares; write ro, acl, tag=, dax=, window=, window-max=, prefault=, \
                 queues=, dispatch= or locks=, and others with each share that is added"
            ));
        }
        Ok(Self { guest: guest.into(), options: ShareOptions::parse(options, false)? })
    }
}

/// Options of a share that is added to those of `--shares`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberOptions {
    options: ShareOptions,
    dax_given: bool,
    locks_given: bool,
}

impl FromStr for MemberOptions {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(key) = keys(text).find(|key| OF_DEVICE.contains(key)) {
            return Err(format!("{key}: concerns the whole device; it is said by --shares"));
        }
        let given = |key| keys(text).any(|other| other == key);
        let options = ShareOptions::parse(text, false)?;
        Ok(Self { options, dax_given: given("dax"), locks_given: given("locks") })
    }
}

impl MemberOptions {
    /// With those of `--shares` where nothing else is said.
    pub fn among(self, all: &ShareOptions) -> ShareOptions {
        let mut options = self.options;
        if !self.dax_given {
            options.dax = all.dax;
        }
        if !self.locks_given {
            options.locks = all.locks;
        }
        options
    }
}

/// The value of `oriel share add`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemberArg {
    /// The host's directory.
    pub host: PathBuf,
    /// Where it appears.
    pub path: String,
    /// How; checked.
    pub options: String,
}

impl FromStr for MemberArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.splitn(3, ':');
        let (host, path) = match (parts.next(), parts.next()) {
            (Some(host), Some(path)) if !host.is_empty() && path.starts_with('/') => (host, path),
            _ => return Err("write HOST_DIR:/PATH[:OPTION,…]".into()),
        };
        let options = parts.next().unwrap_or("").to_string();
        options.parse::<MemberOptions>()?;
        Ok(Self { host: host.into(), path: path.into(), options })
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
        Ok(Self { host: host.into(), options: ShareOptions::parse(options, true)? })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(text: &str) -> ShareOptions {
        format!("a:/b:{text}").parse::<ShareArg>().unwrap().options
    }

    #[test]
    fn a_share_is_two_paths_and_options() {
        let share: ShareArg = "./src:/src".parse().unwrap();
        assert_eq!((share.host.as_path(), share.guest.as_str()), (Path::new("./src"), "/src"));
        assert_eq!(share.options.dax, Dax::Inode);
        assert_eq!(share.options.cache, CachePolicy::Auto);
        let expected = ShareOptions {
            read_only: true,
            tag: Some("t".into()),
            cache: CachePolicy::Never,
            dax: Dax::Always,
            window: Some(4 << 20),
            queues: Some(2),
            locks: LockPolicy::Guest,
            ..options("")
        };
        let text = "ro,tag=t,cache=never,dax=always,window=4M,queues=2,locks=guest";
        assert_eq!(options(text), expected);
        assert_eq!(
            (options("").locks, options("locks=host").locks),
            (LockPolicy::Host, LockPolicy::Host)
        );
        assert_eq!(options("dax=never").window, Some(0));
        assert_eq!((options("").window, options("window=auto").window), (None, None));
        assert!(options("prefault=auto").prefault && !options("prefault=never").prefault);
        let dispatch = ["", "dispatch=inline", "dispatch=worker", "dispatch=poll"];
        let expected = [Dispatch::Auto, Dispatch::Inline, Dispatch::Worker, Dispatch::Poll];
        assert_eq!(dispatch.map(|text| options(text).dispatch), expected);
        assert_eq!(options("dax=never,direct=host").direct, DirectPolicy::Host);
        assert_eq!(options("direct=buffered").direct, DirectPolicy::Buffered);
        let grows = options("window=4M,window-max=8G");
        assert_eq!((grows.window, grows.window_max), (Some(4 << 20), Some(8 << 30)));
    }

    #[test]
    fn caching_is_a_mode_and_three_times() {
        let plain = options("");
        assert_eq!(
            (plain.entry_timeout, plain.attr_timeout, plain.negative_timeout),
            (None, None, None)
        );
        let timed = options("cache=never,entry-timeout=2s,attr-timeout=500ms,negative-timeout=0");
        assert_eq!(timed.entry_timeout, Some(Duration::from_secs(2)));
        assert_eq!(timed.attr_timeout, Some(Duration::from_millis(500)));
        assert_eq!(timed.negative_timeout, Some(Duration::ZERO));
        assert!(options("cache=always,writeback,dev").writeback);
    }

    #[test]
    fn identity_is_ranges_acls_and_attributes() {
        let plain = options("");
        assert_eq!((plain.xattr, plain.acl), (None, false));
        let all =
            options("acl,xattr=mapped,uid-map=0:1000:1,uid-map=1:100000:65536,gid-map=0:100:1");
        assert!(all.acl);
        assert_eq!(all.xattr, Some(XattrPolicy::Mapped));
        let ranges: Vec<_> =
            all.uid_map.iter().map(|range| (range.guest, range.host, range.count)).collect();
        assert_eq!(ranges, [(0, 1000, 1), (1, 100_000, 65536)]);
        assert_eq!(all.gid_map.len(), 1);
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
            ("a:/b:direct=host", "dax=never"),
            ("a:/b:direct=yes", "buffered or host"),
            ("a:/b:window=4M,dax=never", "dax=never"),
            ("a:/b:window-max=4M,dax=never", "dax=never"),
            ("a:/b:window=4M,window-max=2M", "window-max=2M"),
            ("a:/b:window-max=5M", "2 MiB"),
            ("a:/b:queues=0", "queues"),
            ("a:/b:tag=", "tag"),
            ("a:/b:cache=some", "cache"),
            ("a:/b:watches=3", "cache=watch"),
            ("a:/b:cache=watch,watches=x", "watches"),
            ("a:/b:dax=on", "DAX"),
            ("a:/b:prefault=always", "prefault"),
            ("a:/b:dispatch=vcpu", "dispatch=auto"),
            ("a:/b:locks", "locks=host"),
            ("a:/b:locks=none", "locks=guest"),
            ("a:/b:entry-timeout=1", "entry-timeout"),
            ("a:/b:attr-timeout=", "attr-timeout"),
            ("a:/b:negative-timeout=-1s", "negative-timeout"),
            ("a:/b:writeback", "cache=always"),
            ("a:/b:writeback,cache=never", "cache=always"),
            ("a:/b:writeback,cache=always,ro", "with ro"),
            ("a:/b:dev,ro", "with ro"),
            ("a:/b:dev=1", "dev=1"),
            ("a:/b:xattr=", "xattr"),
            ("a:/b:xattr=some", "mapped"),
            ("a:/b:acl,xattr=off", "xattr=off"),
            ("a:/b:uid-map=", "uid-map"),
            ("a:/b:uid-map=0:0", "GUEST:HOST:COUNT"),
            ("a:/b:uid-map=0:0:0", "GUEST:HOST:COUNT"),
            ("a:/b:gid-map=0:0:1:", "gid-map"),
            ("a:/b:gid-map=0:x:1", "gid-map"),
            ("a:/b:gid-map=0:-1:1", "gid-map"),
            ("a:/b:gid-map=0:4294967296:1", "gid-map"),
        ] {
            let error = text.parse::<ShareArg>().unwrap_err();
            assert!(error.contains(hint) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn a_place_for_shares_has_the_options_of_its_device_and_a_share_there_all_others() {
        let live: LiveArg =
            "/run/s:tag=kataShared,dax=always,window=4M,locks=guest".parse().unwrap();
        assert_eq!((live.guest.as_str(), live.options.dax), ("/run/s", Dax::Always));
        assert_eq!(live.options.tag.as_deref(), Some("kataShared"));
        for (text, hint) in [
            ("", "absolute"),
            ("run", "absolute"),
            ("/", "absolute"),
            ("/a/../b", ".."),
            ("/s:cache=never", "cache"),
            ("/s:xattr=on", "xattr"),
            ("/s:writeback", "writeback"),
            ("/s:overlay", "overlay"),
            ("/s:window=3M", "2 MiB"),
            ("/s:tag=", "tag"),
        ] {
            let error = text.parse::<LiveArg>().unwrap_err();
            assert!(error.contains(hint) && !error.contains('\n'), "{text}: {error}");
        }
        let member: MemberArg = "./src:/a/src:ro,cache=never".parse().unwrap();
        assert_eq!((member.host.as_path(), member.path.as_str()), (Path::new("./src"), "/a/src"));
        let options: MemberOptions = member.options.parse().unwrap();
        let options = options.among(&live.options);
        assert!(options.read_only);
        assert_eq!((options.dax, options.locks), (Dax::Always, LockPolicy::Guest));
        let other: MemberOptions = "dax=never,locks=host".parse().unwrap();
        let other = other.among(&live.options);
        assert_eq!((other.dax, other.locks), (Dax::Never, LockPolicy::Host));
        for text in ["", "a", "a:b", ":/b", "a:/b:tag=x", "a:/b:window=4M", "a:/b:rx"] {
            assert!(text.parse::<MemberArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_root_takes_a_colon_or_a_comma() {
        for text in ["/:overlay", "/,overlay"] {
            let root: RootArg = text.parse().unwrap();
            assert!(root.options.overlay);
            assert_eq!(root.host, Path::new("/"));
        }
        for wrong in [
            "/:overlay,ro",
            "/:overlay,cache=watch",
            "/:overlay,dev",
            "/:overlay,cache=always,writeback",
        ] {
            assert!(wrong.parse::<RootArg>().is_err(), "{wrong}");
        }
    }
}
