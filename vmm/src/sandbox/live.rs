//! The shares that come and go while the sandbox runs: what `oriel share` does to the tree of `--shares`.

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use devices::tree::{MemberInfo, Removed, Tree, TreeError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::FileLimits;
use super::identity::Identity;
use super::served;
use super::shares::operations;
use crate::cli::{MemberOptions, ShareOptions};

/// The tree, and all that it takes to add to it.
pub struct Live {
    /// What the device serves.
    pub tree: Arc<Tree>,
    /// Where the guest mounts it.
    pub guest: String,
    /// What `--shares` says.
    pub options: ShareOptions,
    /// How many files all of its shares together may hold open.
    pub limits: FileLimits,
    /// Whose files are whose.
    pub identity: Arc<Identity>,
    /// Names of the host's are none here: whoever adds a directory gives it.
    pub elsewhere: bool,
}

/// What became of [`Request::ShareAdd`](crate::control::Request::ShareAdd).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Added {
    /// Where a guest finds it that mounts the tree where `--shares` says.
    pub guest_path: String,
    /// Nothing can be changed through it.
    pub read_only: bool,
}

/// Whether a share is in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemberState {
    /// It is.
    Attached,
    /// It was taken out, and the guest still has something of it.
    Removed,
    /// Nothing is left of it.
    Gone,
}

/// A share of the tree.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemberStatus {
    /// Where it is in the tree, or was.
    pub path: String,
    /// The host's directory.
    pub host: PathBuf,
    /// Nothing can be changed through it.
    pub read_only: bool,
    /// Whether it is in the tree.
    pub state: MemberState,
    /// How many files of it the guest knows.
    pub nodes: usize,
    /// How many files and directories of it the guest has open.
    pub open: usize,
}

/// All of them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemberList {
    /// Where the guest mounts the tree.
    pub guest_path: String,
    /// By path, those that were removed last.
    pub shares: Vec<MemberStatus>,
}

/// What became of [`Request::ShareRemove`](crate::control::Request::ShareRemove).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct RemovedShare {
    /// Whether something is left of it.
    pub state: MemberState,
    /// How many files of it the guest knows.
    pub nodes: usize,
    /// How many files and directories of it the guest has open.
    pub open: usize,
}

/// What became of [`Request::ShareUpdate`](crate::control::Request::ShareUpdate).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Updated {
    /// Nothing can be changed through it.
    pub read_only: bool,
}

impl Live {
    /// Adds a directory, `given` by its descriptor or found by its name. `options` are as in `--share`.
    ///
    /// # Errors
    ///
    /// Why not, in a line.
    pub fn add(
        &self,
        host: &str,
        path: &str,
        options: &str,
        given: Option<OwnedFd>,
    ) -> Result<Added, String> {
        let directory = Path::new(host);
        if !directory.is_absolute() {
            return Err(format!("the host directory {host:?} is not an absolute path"));
        }
        let asked = options.parse::<MemberOptions>()?;
        let options = asked.among(&self.options);
        let named = |error: &dyn std::fmt::Display| format!("{host}: {error}");
        let mut served = served(directory, &options, 0, &self.limits, &self.identity)
            .map_err(|error| named(&error))?;
        // The share opens it anew, so that no right of the giver's to the directory is used.
        let at = |given: &OwnedFd| format!("/proc/self/fd/{}", given.as_raw_fd()).into();
        served.found_at = given.as_ref().map(at);
        if given.is_none() && self.elsewhere {
            return Err(format!(
                "{host}: this sandbox sees nothing of the host by its name; send a descriptor of the directory with \
                 the request (SCM_RIGHTS), as `oriel share add` does, or run it with --no-sandbox"
            ));
        }
        self.tree.add(path, served).map_err(|error| match error {
            TreeError::Host(why) => named(&why),
            error => error.to_string(),
        })?;
        let guest_path = self.guest_path(path);
        Ok(Added { guest_path, read_only: options.read_only || self.options.read_only })
    }

    /// Where a guest finds what is at a path of the tree, when it mounts the tree where `--shares` says.
    pub fn guest_path(&self, path: &str) -> String {
        format!("{}/{}", self.guest.trim_end_matches('/'), path.trim_matches('/'))
    }

    /// Takes one away.
    ///
    /// # Errors
    ///
    /// Why not, in a line.
    pub fn remove(&self, path: &str, force: bool) -> Result<RemovedShare, String> {
        Ok(match self.tree.remove(path, force).map_err(|error| error.to_string())? {
            Removed::Gone => RemovedShare { state: MemberState::Gone, nodes: 0, open: 0 },
            Removed::InUse { nodes, open } => {
                RemovedShare { state: MemberState::Removed, nodes, open }
            }
        })
    }

    /// Switches one to read-only or back.
    ///
    /// # Errors
    ///
    /// Why not, in a line.
    pub fn update(&self, path: &str, read_only: bool) -> Result<Updated, String> {
        self.tree.set_read_only(path, read_only).map_err(|error| error.to_string())?;
        Ok(Updated { read_only })
    }

    /// What was counted of each.
    pub fn stats(&self) -> Value {
        let counted = |member: MemberInfo| {
            json!({
                "path": member.path,
                "bytes_read": member.counters.bytes_read.load(Relaxed),
                "bytes_written": member.counters.bytes_written.load(Relaxed),
                "operations": operations(&member.counters),
            })
        };
        self.tree.list().into_iter().map(counted).collect()
    }

    /// All of them.
    pub fn list(&self) -> MemberList {
        let status = |member: MemberInfo| MemberStatus {
            path: member.path,
            host: member.directory,
            read_only: member.read_only,
            state: if member.removed { MemberState::Removed } else { MemberState::Attached },
            nodes: member.nodes,
            open: member.open,
        };
        let shares = self.tree.list().into_iter().map(status).collect();
        MemberList { guest_path: self.guest.clone(), shares }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::LiveArg;

    fn live(arg: &str) -> Live {
        let LiveArg { guest, options } = arg.parse().unwrap();
        let identity = Arc::new(Identity::of_process(false).unwrap());
        let limits = FileLimits { descriptors: 64, handles: 64, lock_owners: 8 };
        let session = served(Path::new("/"), &options, 0, &limits, &identity).unwrap();
        let tree = Arc::new(Tree::new(session, None));
        Live { tree, guest, options, limits, identity, elsewhere: false }
    }

    #[test]
    fn shares_are_added_listed_switched_and_removed() {
        let live = live("/run/shares:acl,dax=always");
        let directory = tempfile::tempdir().unwrap();
        let host = directory.path().to_str().unwrap();
        let added = live.add(host, "/a/b", "", None).unwrap();
        let expected = Added { guest_path: "/run/shares/a/b".into(), read_only: false };
        assert_eq!(added, expected);
        assert!(live.add(host, "/ro", "ro,cache=never,attr-timeout=2s", None).unwrap().read_only);
        assert_eq!(live.update("/a/b", true), Ok(Updated { read_only: true }));
        let list = live.list();
        assert_eq!(list.guest_path, "/run/shares");
        let shown = |at: usize| (list.shares[at].path.as_str(), list.shares[at].read_only);
        assert_eq!((shown(0), shown(1)), (("/a/b", true), ("/ro", true)));
        assert_eq!(list.shares[0].state, MemberState::Attached);
        let stats = live.stats();
        assert_eq!(stats[0]["path"], "/a/b");
        assert_eq!((&stats[0]["bytes_read"], &stats[0]["operations"]), (&json!(0), &json!({})));
        assert_eq!(live.remove("/a/b", false).unwrap().state, MemberState::Gone);
        assert_eq!(live.remove("/ro", true).unwrap().state, MemberState::Gone);
        assert!(live.list().shares.is_empty());
    }

    #[test]
    fn what_cannot_be_done_is_told_in_a_line_with_its_name() {
        let live = live("/run/shares");
        let directory = tempfile::tempdir().unwrap();
        let host = directory.path().to_str().unwrap();
        live.add(host, "/a", "", None).unwrap();
        for (host, path, options, hint) in [
            ("relative", "/x", "", "absolute"),
            ("", "/x", "", "absolute"),
            ("/nonexistent", "/x", "", "/nonexistent: No such"),
            ("/etc/passwd", "/x", "", "/etc/passwd: Not a directory"),
            ("/proc", "/x", "", "/proc: "),
            (host, "/x/../y", "", "no place"),
            (host, "x", "", "no place"),
            (host, "/a", "", "already"),
            (host, "/a/b", "", "/a is a share"),
            (host, "/x", "rx", "rx"),
            (host, "/x", "tag=t", "tag: concerns the whole device"),
            (host, "/x", "window=4M", "window: concerns"),
            (host, "/x", "queues=2", "queues: concerns"),
            (host, "/x", "overlay", "overlay"),
            (host, "/x", "acl", "acl: cannot differ"),
            (host, "/x", "locks=guest", "locks=: cannot differ"),
            (host, "/x", "dax=always", "dax=: cannot differ"),
            (host, "/x", "cache=always,writeback", "writeback: cannot differ"),
            (host, "/x", "cache=never,dax=never,direct=host", "direct=host: cannot differ"),
            (host, "/x", "uid-map=0:0:1,uid-map=0:1:1", "uid-map"),
        ] {
            let error = live.add(host, path, options, None).unwrap_err();
            assert!(
                error.contains(hint) && !error.contains('\n'),
                "{host}:{path}:{options}: {error}"
            );
        }
        live.add(host, "/never", "dax=never", None).unwrap();
        for error in [live.remove("/b", false).err(), live.update("/b", true).err()] {
            assert!(error.unwrap().contains("only at /a, /never"));
        }
    }
}
