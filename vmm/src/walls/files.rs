//! Landlock (landlock(7)): which files this process may open and change, and that it neither connects to the network
//! nor signals other processes.
//!
//! The rules are made once and for all, which leaves two cases in which there are none about files:
//!
//! - Directories come later (`--shares`): no rule can name them.
//! - Files are reached by their handles (as root). A file that nobody has looked up since it left the host's memory
//!   then has no path, and Landlock refuses what has none.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, Result};
use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, LandlockStatus, PathBeneath, PathFd, Ruleset,
    RulesetAttr, RulesetCreatedAttr, RulesetStatus, Scope,
};
use rustix::thread::CapabilitySet;

use super::{Inside, Plan};

/// What is known of Landlock here. A newer kernel may do more, which nobody has tried.
const KNOWN: ABI = ABI::V7;

/// What is to be allowed.
pub struct Rules {
    /// `None`: all files.
    files: Option<Vec<(PathBuf, BitFlags<AccessFs>)>>,
}

/// What came of it.
#[derive(Debug, PartialEq, Eq)]
pub struct Restricted {
    /// The kernel has it.
    pub enforced: bool,
    /// There are rules about files.
    pub files: bool,
}

impl fmt::Display for Restricted {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.write_str(match (self.enforced, self.files) {
            (false, _) => "no Landlock on this host",
            (true, false) => "Landlock for network and signals",
            (true, true) => "Landlock for files, network and signals",
        })
    }
}

impl Rules {
    /// For what was planned, by a process that has these capabilities left.
    pub fn of(plan: &Plan<'_>, inside: &Inside, kept: CapabilitySet) -> Self {
        let handles = plan.handles && kept.contains(CapabilitySet::DAC_READ_SEARCH);
        if plan.live || handles {
            return Self { files: None };
        }
        let read = AccessFs::ReadFile | AccessFs::ReadDir;
        // Not to execute, and no ioctl of a device.
        let write = AccessFs::from_all(KNOWN) & !(AccessFs::Execute | AccessFs::IoctlDev);
        let remove = AccessFs::RemoveFile.into();
        let own = |place: &PathBuf| match plan.logs.as_ref() == Some(place) {
            true => AccessFs::WriteFile | AccessFs::MakeReg | remove,
            false => remove,
        };
        let share = |(number, share): (usize, &super::Shared<'_>)| {
            let at = inside.place_of(number).unwrap_or_else(|| share.host.to_owned());
            (at, if share.read_only { read } else { write })
        };
        let places = plan.places.iter().map(|place| (place.clone(), own(place)));
        Self { files: Some(plan.shares.iter().enumerate().map(share).chain(places).collect()) }
    }
}

/// Applies the rules to this thread and to those that it starts, as far as the kernel has them.
///
/// # Errors
///
/// A directory that cannot be opened; the host's.
pub fn restrict(rules: &Rules) -> Result<Restricted> {
    let ruleset = Ruleset::default()
        .handle_access(AccessNet::from_all(KNOWN))
        .and_then(|rules| rules.scope(Scope::from_all(KNOWN)));
    let mut ruleset = ruleset.context("Landlock")?;
    if rules.files.is_some() {
        ruleset = ruleset.handle_access(AccessFs::from_all(KNOWN)).context("Landlock")?;
    }
    let mut created = ruleset.create().context("Landlock")?;
    for (path, access) in rules.files.iter().flatten() {
        let directory = PathFd::new(path).context("Landlock")?;
        created = created.add_rule(PathBeneath::new(directory, *access)).context("Landlock")?;
    }
    let status = created.restrict_self().context("Landlock")?;
    let enforced = status.ruleset != RulesetStatus::NotEnforced;
    Ok(Restricted { enforced, files: enforced && rules.files.is_some() })
}

/// Whether this kernel has it, and what of it.
pub fn available() -> (bool, String) {
    // Of a thread that ends with it.
    let status = std::thread::spawn(|| {
        let ruleset = Ruleset::default().scope(Scope::Signal)?.create()?;
        ruleset.restrict_self()
    });
    match status.join().map(|status| status.map(|status| status.landlock)) {
        Ok(Ok(LandlockStatus::Available { effective_abi, .. })) => {
            let mut what = vec!["files"];
            if effective_abi >= ABI::V4 {
                what.push("network");
            }
            if effective_abi >= ABI::V6 {
                what.push("signals");
            }
            (true, format!("Landlock {effective_abi:?}: {}", what.join(", ")))
        }
        Ok(Ok(LandlockStatus::NotEnabled)) => {
            (false, "off: add landlock to lsm= of the host's kernel".into())
        }
        _ => (false, "the host's kernel has none (Linux 5.13 and newer do)".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::ErrorKind;
    use std::net::TcpStream;

    use super::super::{Needs, Shared};
    use super::*;

    #[test]
    fn a_thread_with_rules_opens_what_is_shared_and_nothing_else() {
        let (read, write) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (place, sockets) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        fs::write(sockets.path().join("socket"), "").unwrap();
        fs::write(read.path().join("file"), "one").unwrap();
        std::os::unix::fs::symlink("/etc/passwd", write.path().join("link")).unwrap();
        let shared = |path, read_only| Shared { host: path, read_only };
        let plan = Plan {
            shares: vec![shared(read.path(), true), shared(write.path(), false)],
            places: vec![place.path().to_owned(), sockets.path().to_owned()],
            logs: Some(place.path().to_owned()),
            live: false,
            handles: true,
            needs: Needs::default(),
        };
        let rules = Rules::of(&plan, &Inside::open(), CapabilitySet::empty());
        let (read, write, place) = (read.path(), write.path(), place.path());
        let sockets = sockets.path();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                rustix::thread::set_no_new_privs(true).unwrap();
                let restricted = restrict(&rules).unwrap();
                if !restricted.enforced {
                    return;
                }
                assert!(restricted.files);
                let denied = |result: std::io::Result<()>| {
                    assert_eq!(result.unwrap_err().kind(), ErrorKind::PermissionDenied);
                };
                assert_eq!(fs::read(read.join("file")).unwrap(), b"one");
                denied(fs::write(read.join("file"), "two"));
                denied(fs::remove_file(read.join("file")));
                fs::write(write.join("new"), "two").unwrap();
                fs::rename(write.join("new"), write.join("newer")).unwrap();
                denied(fs::read("/etc/passwd").map(drop));
                denied(fs::read(write.join("link")).map(drop));
                denied(fs::read_dir("/").map(drop));
                // Of its own places it reads nothing.
                fs::write(place.join("log"), "").unwrap();
                denied(fs::read(place.join("log")).map(drop));
                fs::remove_file(place.join("log")).unwrap();
                // In a directory of sockets it makes and changes nothing.
                denied(fs::write(sockets.join("new"), ""));
                denied(fs::write(sockets.join("socket"), ""));
                fs::remove_file(sockets.join("socket")).unwrap();
                if let Err(error) = TcpStream::connect("127.0.0.1:9") {
                    let kind = error.kind();
                    assert!(matches!(
                        kind,
                        ErrorKind::PermissionDenied | ErrorKind::ConnectionRefused
                    ));
                }
            });
        });
    }

    #[test]
    fn where_rules_would_be_in_the_way_there_are_none_about_files() {
        let plan = |live, handles| Plan {
            shares: vec![],
            places: vec![],
            logs: None,
            live,
            handles,
            needs: Needs::default(),
        };
        let files = |plan: &Plan<'_>, kept| Rules::of(plan, &Inside::open(), kept).files.is_some();
        assert!(files(&plan(false, true), CapabilitySet::empty()));
        assert!(!files(&plan(true, false), CapabilitySet::empty()));
        assert!(!files(&plan(false, true), CapabilitySet::DAC_READ_SEARCH));
        assert!(files(&plan(false, false), CapabilitySet::DAC_READ_SEARCH));
    }
}
