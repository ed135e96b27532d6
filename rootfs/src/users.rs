//! Who the command runs as: `USER[:GROUP]` looked up in the root's `/etc/passwd` and `/etc/group`.

use std::fs;

use anyhow::{Result, bail};

/// The ids of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ids {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// The home directory.
    pub(crate) home: String,
}

/// The home of a user that `/etc/passwd` does not know.
const NO_HOME: &str = "/";

/// Looks `user` up in the files of the root file system; `None` is root.
pub(crate) fn lookup(user: Option<&str>) -> Result<Ids> {
    // A root without these files still has numbers.
    let read = |path| {
        fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    };
    resolve(user.unwrap_or("0"), &read("/etc/passwd"), &read("/etc/group"))
}

/// The rules are those of docker: a name is looked for before a number; a number need not be in the files
/// (its group is then 0); a group that is named replaces the user's own and all supplementary ones.
fn resolve(spec: &str, passwd: &str, group: &str) -> Result<Ids> {
    let (user, group_name) = match spec.split_once(':') {
        Some((user, group)) => (user, Some(group).filter(|group| !group.is_empty())),
        None => (spec, None),
    };

    // name:password:uid:gid:comment:home:…
    let account = |wanted: &dyn Fn(&str, u32) -> bool| {
        passwd.lines().find_map(|line| {
            let mut fields = line.split(':');
            let (name, uid, gid) =
                (fields.next()?, fields.nth(1)?.parse().ok()?, fields.next()?.parse().ok()?);
            let home = fields.nth(1).filter(|home| !home.is_empty()).unwrap_or(NO_HOME);
            wanted(name, uid).then(|| (name.to_owned(), uid, gid, home.to_owned()))
        })
    };
    let number = user.parse::<u32>().ok();
    let found = account(&|name, _| name == user).or_else(|| account(&|_, uid| Some(uid) == number));
    let (name, uid, own_gid, home) = match (found, number) {
        (Some((name, uid, gid, home)), _) => (Some(name), uid, gid, home),
        (None, Some(uid)) => (None, uid, 0, NO_HOME.to_owned()),
        (None, None) if user.is_empty() => (None, 0, 0, NO_HOME.to_owned()),
        (None, None) => bail!("no user {user} in the root's /etc/passwd"),
    };

    // name:password:gid:member,member…
    let all = || {
        group.lines().filter_map(|line| {
            let mut fields = line.split(':');
            let (name, gid) = (fields.next()?, fields.nth(1)?.parse::<u32>().ok()?);
            Some((name, gid, fields.next().unwrap_or_default()))
        })
    };
    if let Some(wanted) = group_name {
        let by_name = all().find(|(name, ..)| *name == wanted).map(|(_, gid, _)| gid);
        let Some(gid) = by_name.or_else(|| wanted.parse().ok()) else {
            bail!("no group {wanted} in the root's /etc/group");
        };
        return Ok(Ids { uid, gid, groups: Vec::new(), home });
    }
    let is_member = |members: &str| {
        name.as_deref().is_some_and(|name| members.split(',').any(|one| one == name))
    };
    let groups = all().filter(|(.., members)| is_member(members)).map(|(_, gid, _)| gid).collect();
    Ok(Ids { uid, gid: own_gid, groups, home })
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nada:x:1000:100:Ada:/home/ada:/bin/sh\n77:x:5:6::/:\n";
    const GROUP: &str =
        "root:x:0:\nusers:x:100:\nwheel:x:10:root,ada\nvideo:x:44:ada\nnot:x:45:adam";

    fn ids(uid: u32, gid: u32, groups: &[u32]) -> Ids {
        let home = if uid == 1000 { "/home/ada" } else { NO_HOME };
        Ids { uid, gid, groups: groups.to_vec(), home: home.to_owned() }
    }

    #[test]
    fn a_name_brings_its_groups() {
        assert_eq!(resolve("ada", PASSWD, GROUP).unwrap(), ids(1000, 100, &[10, 44]));
        assert_eq!(resolve("1000", PASSWD, GROUP).unwrap(), ids(1000, 100, &[10, 44]));
        assert_eq!(resolve("ada:", PASSWD, GROUP).unwrap(), ids(1000, 100, &[10, 44]));
    }

    #[test]
    fn a_group_that_is_named_replaces_them() {
        assert_eq!(resolve("ada:video", PASSWD, GROUP).unwrap(), ids(1000, 44, &[]));
        assert_eq!(resolve("ada:7", PASSWD, GROUP).unwrap(), ids(1000, 7, &[]));
    }

    #[test]
    fn a_number_needs_no_entry() {
        assert_eq!(resolve("2000", PASSWD, GROUP).unwrap(), ids(2000, 0, &[]));
        assert_eq!(resolve("2000:3000", "", "").unwrap(), ids(2000, 3000, &[]));
        assert_eq!(
            resolve("77", PASSWD, GROUP).unwrap(),
            ids(5, 6, &[]),
            "a name comes before a number"
        );
    }

    #[test]
    fn what_is_unknown_is_named() {
        assert!(resolve("eve", PASSWD, GROUP).unwrap_err().to_string().contains("user eve"));
        assert!(resolve("ada:eve", PASSWD, GROUP).unwrap_err().to_string().contains("group eve"));
        assert!(resolve("-1", PASSWD, GROUP).is_err());
        assert_eq!(resolve("0", PASSWD, GROUP).unwrap().home, "/root");
        assert_eq!(lookup(None).unwrap().uid, 0);
    }
}
