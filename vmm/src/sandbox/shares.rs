//! The shares of a sandbox that runs: what they counted, and what can be changed about them.

use std::path::Path;
use std::sync::Arc;

use devices::dax::{DaxWindow, GrowError, Window};
use devices::fuse::Session;
use devices::virtio::fs::FsDevice;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::control::Request;

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
}

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

/// All of a sandbox.
pub struct Shares(pub Vec<RunningShare>);

impl Shares {
    /// Does what a client of the control socket asks.
    ///
    /// # Errors
    ///
    /// Why not, in a line.
    pub fn answer(&self, request: Request) -> Result<Value, String> {
        match request {
            Request::ShareResize { share, size } => {
                let resized = self.resize(&share, size)?;
                serde_json::to_value(resized).map_err(|error| error.to_string())
            }
            Request::Stats {} => Ok(self.stats()),
        }
    }

    /// One object a share: what it is, what its session counted, and how large its window is.
    pub fn stats(&self) -> Value {
        let shares: Vec<_> = self
            .0
            .iter()
            .map(|share| {
                let counters: serde_json::Map<_, _> = share
                    .session
                    .snapshot()
                    .into_iter()
                    .map(|(name, value)| (name.to_string(), value.into()))
                    .collect();
                let window = share.window.as_ref().map(|window| {
                    let (size, max) = (window.size(), window.max_size());
                    json!({ "size": size, "max-size": max, "reason": share.window_reason })
                });
                json!({
                    "tag": share.tag, "path": share.guest, "window": window, "counters": counters,
                })
            })
            .collect();
        json!({ "shares": shares })
    }

    fn resize(&self, path: &str, size: u64) -> Result<Resized, String> {
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
mod tests {
    use devices::share::{Options, Share};
    use devices::virtio::fs;

    use super::*;

    const MIB: u64 = 1 << 20;

    fn shares() -> Shares {
        let running = |tag: &str, guest: &str, window: Option<Arc<Window>>| {
            let files = Share::new(Options::new("/")).unwrap();
            let region = window.clone().map(|window| window as Arc<dyn DaxWindow>);
            let session = Arc::new(Session::new(Arc::new(files), region));
            let config = fs::Config::new(tag, 1).unwrap();
            let device = Arc::new(FsDevice::new(config, session.clone(), None).unwrap());
            let (tag, guest, window_reason) = (tag.into(), guest.into(), "as asked".into());
            RunningShare { tag, guest, session, window, window_reason, device }
        };
        let window = Arc::new(Window::growable(4 * MIB, 16 * MIB).unwrap());
        Shares(vec![running("root", "/", None), running("data", "/data", Some(window))])
    }

    #[test]
    fn a_window_is_resized_by_its_guest_path() {
        let shares = shares();
        let resize =
            |share: &str, size| shares.answer(Request::ShareResize { share: share.into(), size });
        let expected = json!({ "share": "/data", "size": 8 * MIB, "driver-told": false });
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
        let stats = shares.answer(Request::Stats {}).unwrap();
        assert_eq!(stats["shares"][0]["window"], Value::Null);
        let window = json!({ "size": 8 * MIB, "max-size": 16 * MIB, "reason": "as asked" });
        assert_eq!(stats["shares"][1]["window"], window);
        assert_eq!(stats["shares"][1]["path"], "/data");
        assert_eq!(stats["shares"][1]["counters"]["dax_live"], 0);
    }
}
