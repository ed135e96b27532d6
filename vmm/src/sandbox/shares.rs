//! The shares of a sandbox that runs: what they counted, and what can be changed about them.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::dax::{DaxWindow, GrowError, Window};
use devices::fuse::{Counters, OperationCounts, Session, latency_bound};
use devices::share::Watch;
use devices::virtio::fs::FsDevice;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::live::Live;

/// One share.
pub struct RunningShare {
    /// The device's tag.
    pub tag: String,
    /// Where the guest mounts it.
    pub guest: String,
    /// What serves it.
    pub session: Arc<Session>,
    /// Its DAX window, if it has one.
    pub window: Option<Arc<Window>>,
    /// Why the window was made as large as it was.
    pub window_reason: String,
    /// What the guest sees of it.
    pub device: Arc<FsDevice>,
    /// With `cache=watch`, where the host can: what the guest is kept told of.
    pub watch: Option<Arc<Watch>>,
    /// What can be done to it, where it is the one of `--shares`.
    pub live: Option<Live>,
}

/// How long the requests may take that a guest has left.
const LAST_REQUESTS: Duration = Duration::from_secs(3);

/// How a share came out of [`Request::ShareResize`].
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Resized {
    /// Its guest path.
    pub share: String,
    /// The size of its window now, in bytes.
    pub size: u64,
    /// The guest's driver wanted to know, and does.
    pub driver_told: bool,
}

/// The DAX window of a share. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct WindowStatus {
    /// How much of it there is.
    pub size: u64,
    /// How much there can be.
    pub max_size: u64,
    /// Why it has that size.
    pub reason: String,
}

/// What a share is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ShareStatus {
    /// The device's tag.
    pub tag: String,
    /// Where the guest mounts it.
    pub path: String,
    /// Its window, if it has one.
    pub window: Option<WindowStatus>,
}

impl RunningShare {
    /// All counters with their names: what its session counted, and how its device had requests served.
    pub(super) fn counters(&self) -> Vec<(&'static str, u64)> {
        let of = self.device.statistics();
        let mut all = self.session.snapshot();
        all.extend([
            ("served_inline", of.inline),
            ("handed_over", of.handed_over),
            ("served_by_threads", of.by_threads),
        ]);
        all
    }

    fn window_status(&self) -> Option<WindowStatus> {
        let status = |window: &Arc<Window>| WindowStatus {
            size: window.size(),
            max_size: window.max_size(),
            reason: self.window_reason.clone(),
        };
        self.window.as_ref().map(status)
    }
}

/// What was counted of each operation. The classes of durations are named by the most nanoseconds of each; those
/// in which nothing is are left out.
pub(super) fn operations(counters: &Counters) -> Value {
    let classes = |of: &OperationCounts| -> serde_json::Map<_, _> {
        let name = |class| match latency_bound(class) {
            Some(bound) => bound.as_nanos().to_string(),
            None => "more".to_string(),
        };
        let counted = of.latency.iter().enumerate().filter(|(_, count)| **count > 0);
        counted.map(|(class, count)| (name(class), (*count).into())).collect()
    };
    let object = |of: OperationCounts| {
        let counts = json!({
            "requests": of.requests,
            "errors": of.errors,
            "nanoseconds": of.nanoseconds,
            "latency": classes(&of),
        });
        (of.name.to_string(), counts)
    };
    counters.operations().into_iter().map(object).collect::<serde_json::Map<_, _>>().into()
}

/// All of a sandbox.
pub struct Shares(pub Vec<RunningShare>);

impl Shares {
    /// The guest does not run any more: ends its last requests, and says where the host's kernel does not let them
    /// be ended.
    pub fn retire(&self) {
        let until = Instant::now() + LAST_REQUESTS;
        for share in &self.0 {
            if !share.device.retire(until.saturating_duration_since(Instant::now())) {
                log::warn!(
                    "share {}: a file system of the host does not answer; this process may not be gone before it does",
                    share.guest
                );
            }
        }
    }

    /// One object a share: what it is, what its session counted, and how large its window is.
    pub fn stats(&self) -> Value {
        let shares: Vec<_> = self
            .0
            .iter()
            .map(|share| {
                let counters: serde_json::Map<_, _> = share
                    .counters()
                    .into_iter()
                    .map(|(name, value)| (name.to_string(), value.into()))
                    .collect();
                json!({
                    "tag": share.tag,
                    "path": share.guest,
                    "window": share.window_status(),
                    "counters": counters,
                    "operations": operations(share.session.counters()),
                    "members": share.live.as_ref().map(Live::stats),
                })
            })
            .collect();
        json!({ "shares": shares })
    }

    /// The shares that come and go.
    ///
    /// # Errors
    ///
    /// When there is no place for any, in a line.
    pub fn live(&self) -> Result<&Live, String> {
        self.0.iter().find_map(|share| share.live.as_ref()).ok_or_else(|| {
            "shares can be added where `oriel run` was told --shares GUEST_PATH, and it was not"
                .into()
        })
    }

    /// What is to be said of each at any time.
    pub fn status(&self) -> Vec<ShareStatus> {
        let status = |share: &RunningShare| ShareStatus {
            tag: share.tag.clone(),
            path: share.guest.clone(),
            window: share.window_status(),
        };
        self.0.iter().map(status).collect()
    }

    /// Makes the window of the share at a guest path larger.
    ///
    /// # Errors
    ///
    /// Why not, in a line.
    pub fn resize(&self, path: &str, size: u64) -> Result<Resized, String> {
        // /data/ is /data.
        let found = self.0.iter().find(|share| Path::new(&share.guest) == Path::new(path));
        let Some(share) = found else {
            let paths: Vec<_> = self.0.iter().map(|share| share.guest.as_str()).collect();
            return Err(match paths.as_slice() {
                [] => format!("there is no share at {path:?}, nor anywhere else"),
                paths => format!("there is no share at {path:?}; there is {}", paths.join(", ")),
            });
        };
        let name = &share.guest;
        let window = share
            .window
            .as_ref()
            .ok_or_else(|| format!("{name} has no window: it is dax=never"))?;
        window.grow(size).map_err(|error| match error {
            GrowError::Beyond { .. } => {
                format!("{name}: {error}; what is reserved is said at its start by window-max=")
            }
            error => format!("{name}: {error}"),
        })?;
        let driver_told = share.device.window_has_grown();
        // Another client may have been faster.
        Ok(Resized { share: name.clone(), size: window.size(), driver_told })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use devices::share::{Options, Share};
    use devices::virtio::fs;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// Two, one of them with a window.
    pub(in crate::sandbox) fn shares() -> Shares {
        let running = |tag: &str, guest: &str, window: Option<Arc<Window>>| {
            let files = Share::new(Options::new("/")).unwrap();
            let region = window.clone().map(|window| window as Arc<dyn DaxWindow>);
            let session = Arc::new(Session::new(Arc::new(files), region));
            let config = fs::Config::new(tag, 1).unwrap();
            let device = Arc::new(FsDevice::new(config, session.clone(), None).unwrap());
            let (tag, guest, window_reason) = (tag.into(), guest.into(), "as asked".into());
            RunningShare {
                tag,
                guest,
                session,
                window,
                window_reason,
                device,
                watch: None,
                live: None,
            }
        };
        let window = Arc::new(Window::growable(4 * MIB, 16 * MIB).unwrap());
        Shares(vec![running("root", "/", None), running("data", "/data", Some(window))])
    }

    #[test]
    fn a_window_is_resized_by_its_guest_path() {
        let shares = shares();
        let resize = |share: &str, size| shares.resize(share, size);
        let expected = Resized { share: "/data".into(), size: 8 * MIB, driver_told: false };
        assert_eq!(resize("/data/", 8 * MIB), Ok(expected));
        for (share, size, hints) in [
            ("/date", 8 * MIB, &["/date", "/, /data"][..]),
            ("data", 8 * MIB, &["no share"]),
            ("", 8 * MIB, &["no share"]),
            ("/\n", 8 * MIB, &["\\n"]),
            ("/", 8 * MIB, &["dax=never"]),
            ("/data", 4 * MIB, &["/data", "4 MiB", "8 MiB", "only grows"]),
            ("/data", 0, &["only grows"]),
            ("/data", 18 * MIB, &["18 MiB", "16 MiB", "window-max"]),
            ("/data", u64::MAX - 2 * MIB + 1, &["window-max"]),
            ("/data", 9 * MIB, &["2 MiB"]),
            ("/data", u64::MAX, &["2 MiB"]),
        ] {
            let error = resize(share, size).unwrap_err();
            assert!(hints.iter().all(|hint| error.contains(hint)), "{error}");
            assert!(!error.contains('\n'));
        }
        let stats = shares.stats();
        assert_eq!(stats["shares"][0]["window"], Value::Null);
        let window = json!({ "size": 8 * MIB, "max-size": 16 * MIB, "reason": "as asked" });
        assert_eq!(stats["shares"][1]["window"], window);
        assert_eq!(stats["shares"][1]["path"], "/data");
        assert_eq!(stats["shares"][1]["counters"]["dax_live"], 0);
    }
}
