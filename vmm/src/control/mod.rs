//! Talking to a sandbox that runs: a socket for each that has a name, and one JSON object a line in both
//! directions.
//!
//! Here is what both ends know: where the socket is, and what is said. [`server`] is the sandbox's end,
//! [`client`] that of `oriel share`, `oriel stats` and whoever else may.

pub mod client;
mod lines;
pub mod server;

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{logs, socket};

/// The longest line that is read, in bytes. What is said fits several times.
const MAX_LINE: usize = 64 << 10;
/// The longest name. A path with it has to fit a socket's address of 108 bytes.
const MAX_NAME: usize = 48;

/// What a sandbox can be asked. Sizes are bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(
    tag = "request",
    rename_all = "kebab-case",
    rename_all_fields = "kebab-case",
    deny_unknown_fields
)]
pub enum Request {
    /// Make the DAX window of the share at the guest path `share` `size` bytes long.
    ShareResize {
        /// The guest path.
        share: String,
        /// The new size.
        size: u64,
    },
    /// Put a directory of the host's among the shares that come and go: the one whose descriptor comes with the
    /// request (`SCM_RIGHTS`).
    ShareAdd {
        /// The host's directory, an absolute path. Without a descriptor it is found by this, if the sandbox sees any
        /// paths of the host's.
        host: String,
        /// Where it appears, below the guest path of `--shares`.
        path: String,
        /// How, as `--share` has it after its second colon.
        #[serde(default)]
        options: String,
    },
    /// Take one of them away.
    ShareRemove {
        /// Where it is.
        path: String,
        /// End what the guest still has of it.
        #[serde(default)]
        force: bool,
    },
    /// Switch one of them to read-only, or back.
    ShareUpdate {
        /// Where it is.
        path: String,
        /// Which of the two.
        read_only: bool,
    },
    /// Which there are.
    ShareList {},
    /// What the devices counted up to now.
    Stats {},
    /// The same as OpenMetrics text.
    Metrics {},
    /// What the sandbox is, and how far it has come.
    Status {},
    /// Wait for the sandbox's end, which is the answer: `{"status": …}`.
    Wait {},
    /// End the command, as SIGTERM to the sandbox's process does.
    Stop {},
    /// Send the command, and those it has started, this signal of Linux, now or when it is started.
    Signal {
        /// 1 to 64.
        number: i32,
    },
}

/// What it answers: one reply for each request, in order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Reply {
    /// It is done, and this is to be said of it.
    Ok(Value),
    /// It is not done, for this reason: one line.
    Error(String),
}

/// Checks the name of a sandbox.
///
/// # Errors
///
/// What a name is.
pub fn check_name(name: &str) -> Result<(), String> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte);
    let first = name.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric());
    if !first || name.len() > MAX_NAME || !name.bytes().all(allowed) {
        return Err(format!(
            "{name:?} is no name; write 1 to {MAX_NAME} letters, digits, - . or _, a letter or digit first"
        ));
    }
    Ok(())
}

/// Where this user's sockets are.
///
/// # Errors
///
/// When an ordinary user's session has no such place.
pub fn directory() -> Result<PathBuf> {
    if rustix::process::geteuid().is_root() {
        return Ok("/run/oriel".into());
    }
    match std::env::var_os("XDG_RUNTIME_DIR").filter(|path| Path::new(path).is_absolute()) {
        Some(path) => Ok(Path::new(&path).join("oriel")),
        None => bail!(
            "XDG_RUNTIME_DIR is not set, and sockets of sandboxes are there; a login session sets it"
        ),
    }
}

/// What the name of a sandbox's socket ends in.
const SOCKET: &str = ".sock";
/// … and that of the one where streams to its ports begin.
const VSOCK: &str = ".vsock";

/// The socket of the sandbox `name`, which was checked.
fn socket_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}{SOCKET}"))
}

/// Its logs (see [`crate::logs`]).
pub fn log_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}.log"))
}

/// Until it is dropped nobody else looks whether a sandbox runs and then makes or removes what belongs to it.
fn hold(directory: &Path) -> Result<File> {
    let lock = File::open(directory).context("cannot be opened")?;
    flock(&lock, FlockOperation::LockExclusive).context("cannot be locked")?;
    Ok(lock)
}

/// Removes the sockets of sandboxes that were killed. Their logs stay: somebody may want to know why.
pub fn sweep(directory: &Path) {
    match hold(directory) {
        Ok(_lock) => socket::sweep(directory, &[SOCKET, VSOCK]),
        Err(error) => log::debug!("{}: {error:#}", directory.display()),
    }
}

/// Removes what the sandbox `name` has left. Says whether there was anything.
///
/// # Errors
///
/// When it runs, or may; the host's.
pub fn forget(directory: &Path, name: &str) -> Result<bool> {
    if !directory.exists() {
        return Ok(false);
    }
    let _lock = hold(directory)?;
    let path = socket_path(directory, name);
    match UnixStream::connect(&path) {
        Ok(_) => bail!("sandbox {name:?} runs; end it by `oriel stop {name}`"),
        Err(error)
            if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) => {}
        Err(error) => return Err(error).with_context(|| format!("{}", path.display())),
    }
    let mut found = logs::remove(&log_path(directory, name))?;
    for path in [socket_path(directory, name), vsock_path(directory, name)] {
        match fs::remove_file(&path) {
            Ok(()) => found = true,
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("{} stays", path.display())),
        }
    }
    Ok(found)
}

/// The socket of its streams over vsock, where it was given no other.
pub fn vsock_path(directory: &Path, name: &str) -> PathBuf {
    directory.join(format!("{name}{VSOCK}"))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_name_is_a_file_name_and_nothing_else() {
        for name in ["a", "build-7", "A.b_c", "0", &"x".repeat(48)] {
            assert!(check_name(name).is_ok(), "{name}");
        }
        for name in ["", ".", "..", "-a", "a/b", "a b", "ä", "a\n", "a\0", &"x".repeat(49)] {
            assert!(check_name(name).unwrap_err().contains("is no name"), "{name}");
        }
    }

    #[test]
    fn a_sandbox_that_runs_is_not_forgotten_and_one_that_was_killed_is() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        let left = || fs::read_dir(directory).unwrap().count();
        let listener =
            std::os::unix::net::UnixListener::bind(socket_path(directory, "box")).unwrap();
        fs::write(log_path(directory, "box"), "said").unwrap();
        let error = forget(directory, "box").unwrap_err();
        assert!(error.to_string().contains("oriel stop box"), "{error:#}");
        assert_eq!(left(), 2);
        drop(listener);
        assert!(forget(directory, "box").unwrap());
        assert_eq!(left(), 0);
        assert!(!forget(directory, "box").unwrap());
        assert!(!forget(&directory.join("absent"), "box").unwrap());
    }

    #[test]
    fn what_is_said_has_the_form_that_is_documented() {
        let resize = Request::ShareResize { share: "/data".into(), size: 1 << 30 };
        let text = json!({ "request": "share-resize", "share": "/data", "size": 1073741824u64 });
        assert_eq!(serde_json::to_value(&resize).unwrap(), text);
        assert_eq!(serde_json::from_value::<Request>(text).unwrap(), resize);
        let add = json!({ "request": "share-add", "host": "/srv", "path": "/a" });
        let (host, path) = ("/srv".to_string(), "/a".to_string());
        let options = String::new();
        let expected = Request::ShareAdd { host, path: path.clone(), options };
        assert_eq!(serde_json::from_value::<Request>(add).unwrap(), expected);
        let remove = json!({ "request": "share-remove", "path": "/a" });
        let expected = Request::ShareRemove { path: path.clone(), force: false };
        assert_eq!(serde_json::from_value::<Request>(remove).unwrap(), expected);
        let update = json!({ "request": "share-update", "path": "/a", "read-only": true });
        let expected = Request::ShareUpdate { path, read_only: true };
        assert_eq!(serde_json::from_value::<Request>(update).unwrap(), expected);
        for (request, name) in [
            (Request::ShareList {}, "share-list"),
            (Request::Stats {}, "stats"),
            (Request::Metrics {}, "metrics"),
            (Request::Status {}, "status"),
            (Request::Wait {}, "wait"),
            (Request::Stop {}, "stop"),
        ] {
            assert_eq!(serde_json::to_value(request).unwrap(), json!({ "request": name }));
        }
        assert_eq!(serde_json::to_value(Reply::Ok(json!({}))).unwrap(), json!({ "ok": {} }));
        let error = Reply::Error("why".into());
        assert_eq!(serde_json::to_value(error).unwrap(), json!({ "error": "why" }));
    }
}
