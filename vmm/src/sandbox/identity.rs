//! Which ids of the host the files of a share may have, and what the guest calls them.

use anyhow::{Context, Result};
use devices::share::{GidMap, HostGid, HostUid, Id, IdMap, IdRange, UidMap};
use rustix::process::{getegid, geteuid};
use rustix::thread::{CapabilitySet, capabilities};

use crate::cli::UsageError;

/// What this process may do with ids.
pub struct Identity {
    uids: Ids,
    gids: Ids,
    /// Whether it can make files that are not its own.
    pub switches: bool,
}

/// Users or groups.
struct Ids {
    own: u32,
    /// First and number of those that the process may take on.
    usable: Vec<(u32, u32)>,
    /// As an ordinary user: a file of this process is the guest root's.
    own_is_root: bool,
}

impl Identity {
    /// Of this process as it is now. `in_namespace` when it has entered a user namespace of its own.
    ///
    /// # Errors
    ///
    /// When /proc/self/uid_map cannot be read.
    pub fn of_process(in_namespace: bool) -> Result<Self> {
        let needed = CapabilitySet::SETUID | CapabilitySet::SETGID;
        let switches = capabilities(None).is_ok_and(|sets| sets.effective.contains(needed));
        let ids = |own: u32, file: &str| -> Result<Ids> {
            let usable = match switches {
                true => {
                    let map = std::fs::read_to_string(file);
                    usable_in(&map.with_context(|| format!("{file} cannot be read"))?)
                }
                false => vec![(own, 1)],
            };
            Ok(Ids { own, usable, own_is_root: in_namespace || !switches })
        };
        Ok(Self {
            uids: ids(geteuid().as_raw(), "/proc/self/uid_map")?,
            gids: ids(getegid().as_raw(), "/proc/self/gid_map")?,
            switches,
        })
    }

    /// The users of a share with these `uid-map=`.
    ///
    /// # Errors
    ///
    /// A range that overlaps another, or has ids that this process may not take on.
    pub fn uid_map(&self, asked: &[IdRange]) -> Result<UidMap, UsageError> {
        self.uids.map("uid-map", asked, self.switches, IdMap::as_root(HostUid(self.uids.own)))
    }

    /// The groups of a share with these `gid-map=`.
    ///
    /// # Errors
    ///
    /// As [`uid_map`](Self::uid_map).
    pub fn gid_map(&self, asked: &[IdRange]) -> Result<GidMap, UsageError> {
        self.gids.map("gid-map", asked, self.switches, IdMap::as_root(HostGid(self.gids.own)))
    }
}

impl Ids {
    fn map<G: Id, H: Id>(
        &self,
        option: &str,
        asked: &[IdRange],
        switches: bool,
        as_root: IdMap<G, H>,
    ) -> Result<IdMap<G, H>, UsageError> {
        let ranges = match (asked, self.own_is_root, switches) {
            ([], true, true) => self.one_after_another(),
            ([], true, false) => return Ok(as_root),
            ([], false, _) => return Ok(IdMap::same()),
            (asked, ..) => asked.to_vec(),
        };
        for range in &ranges {
            self.check(option, range)?;
        }
        IdMap::of_ranges(&ranges).map_err(|error| UsageError(format!("{option}=: {error}")))
    }

    /// The process's own id is 0 in the guest, and those it may take on follow: what a rootless container
    /// has.
    fn one_after_another(&self) -> Vec<IdRange> {
        let mut ranges = vec![IdRange { guest: 0, host: self.own, count: 1 }];
        let mut guest = 1u32;
        for (host, count) in self.usable.iter().filter(|(first, _)| *first != self.own) {
            let count = (*count).min((u32::MAX - 1).saturating_sub(guest));
            ranges.push(IdRange { guest, host: *host, count });
            guest = guest.saturating_add(count);
        }
        ranges.retain(|range| range.count > 0);
        ranges
    }

    fn check(&self, option: &str, range: &IdRange) -> Result<(), UsageError> {
        let (first, last) = (u64::from(range.host), u64::from(range.host) + u64::from(range.count));
        let usable = |(start, count): &(u32, u32)| {
            u64::from(*start) <= first && last <= u64::from(*start) + u64::from(*count)
        };
        if self.usable.iter().any(usable) {
            return Ok(());
        }
        let usable: Vec<_> = self.usable.iter().map(shown).collect();
        let remedy = if self.own_is_root && self.usable.len() == 1 {
            " (--userns auto adds those of /etc/subuid and /etc/subgid)"
        } else {
            ""
        };
        Err(UsageError(format!(
            "{option}={}:{}:{}: the host's ids {} are not this user's to give; name some of {}{remedy}",
            range.guest,
            range.host,
            range.count,
            shown(&(range.host, range.count)),
            usable.join(", ")
        )))
    }
}

fn shown(range: &(u32, u32)) -> String {
    let (first, count) = *range;
    match u64::from(first) + u64::from(count) {
        end if count > 1 => format!("{first}-{}", end - 1),
        _ => first.to_string(),
    }
}

/// The ids that have a number in a user namespace, from the text of /proc/self/uid_map (user_namespaces(7)).
fn usable_in(map: &str) -> Vec<(u32, u32)> {
    let range = |line: &str| {
        let mut fields = line.split_whitespace();
        let first = fields.next()?.parse().ok()?;
        Some((first, fields.nth(1)?.parse().ok()?))
    };
    map.lines().filter_map(range).collect()
}

#[cfg(test)]
mod tests {
    use devices::share::{GuestUid, OVERFLOW};

    use super::*;

    fn range(guest: u32, host: u32, count: u32) -> IdRange {
        IdRange { guest, host, count }
    }

    fn identity(uids: Ids, switches: bool) -> Identity {
        Identity { uids, gids: Ids { own: 0, usable: vec![], own_is_root: false }, switches }
    }

    fn root() -> Identity {
        let usable = usable_in("         0          0 4294967295\n");
        identity(Ids { own: 0, usable, own_is_root: false }, true)
    }

    fn ordinary() -> Identity {
        identity(Ids { own: 1000, usable: vec![(1000, 1)], own_is_root: true }, false)
    }

    fn in_namespace() -> Identity {
        let usable = usable_in("1000 1000 1\n 100000 100000 65536\n");
        identity(Ids { own: 1000, usable, own_is_root: true }, true)
    }

    #[test]
    fn roots_ids_are_the_guests_unless_ranges_say_otherwise() {
        assert_eq!(root().uid_map(&[]).unwrap(), UidMap::same());
        let map = root().uid_map(&[range(0, 100_000, 65536)]).unwrap();
        assert_eq!(map.to_guest(HostUid(100_005)), GuestUid(5));
        assert_eq!(map.to_guest(HostUid(0)), GuestUid(OVERFLOW));
        let error = root().uid_map(&[range(0, 0, 5), range(4, 100, 1)]).unwrap_err();
        assert!(error.0.contains("uid-map"), "{}", error.0);
    }

    #[test]
    fn an_ordinary_users_files_are_the_guest_roots() {
        let map = ordinary().uid_map(&[]).unwrap();
        assert_eq!(map.to_guest(HostUid(1000)), GuestUid(0));
        assert_eq!(map.to_guest(HostUid(33)), GuestUid(33));
        let map = ordinary().uid_map(&[range(1000, 1000, 1)]).unwrap();
        assert_eq!(map.to_guest(HostUid(1000)), GuestUid(1000));
        let error = ordinary().uid_map(&[range(0, 999, 2)]).unwrap_err();
        assert!(error.0.contains("999-1000") && error.0.contains("--userns"), "{}", error.0);
    }

    #[test]
    fn in_a_namespace_the_subordinate_ids_follow_the_users_own() {
        let map = in_namespace().uid_map(&[]).unwrap();
        for (guest, host) in [(0, 1000), (1, 100_000), (65536, 165_535)] {
            assert_eq!(map.to_guest(HostUid(host)), GuestUid(guest));
            assert_eq!(map.to_host(GuestUid(guest)), Ok(HostUid(host)));
        }
        assert!(map.to_host(GuestUid(65537)).is_err());
        assert!(in_namespace().uid_map(&[range(5, 165_535, 1)]).is_ok());
        let error = in_namespace().uid_map(&[range(5, 165_535, 2)]).unwrap_err();
        assert!(error.0.contains("100000-165535"), "{}", error.0);
    }
}
