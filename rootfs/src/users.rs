//! Who the command runs as: `USER[:GROUP]` looked up in the root's `/etc/passwd` and `/etc/group`.

use std::fs;

use anyhow::{Result, bail};
use oriel_init::protocol::Process;

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

/// Who `process` runs as: looks its user up in the files of the root file system, if it has one by name, and else its
/// home alone. With neither name nor numbers it is root.
pub(crate) fn of(process: &Process) -> Result<Ids> {
    match (&process.user, &process.confinement.ids) {
        (None, Some((uid, gid, groups))) => {
            Ok(Ids { uid: *uid, gid: *gid, groups: groups.clone(), home: home(*uid, &passwd()) })
        }
        (user, _) => resolve(user.as_deref().unwrap_or("0"), &passwd(), &read("/etc/group")),
    }
}

fn passwd() -> String {
    read("/etc/passwd")
}

/// A root without these files still has numbers.
fn read(path: &str) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
}

/// The home of a user who is a number, whatever names there are.
fn home(uid: u32, passwd: &str) -> String {
    let mut accounts = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let own = accounts.find(|fields| fields.get(2).is_some_and(|id| id.parse() == Ok(uid)));
    let home = own.as_ref().and_then(|fields| fields.get(5)).filter(|home| !home.is_empty());
    home.map_or_else(|| NO_HOME.to_owned(), |home| (*home).to_owned())
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
    use oriel_init::container::Confinement;

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
    }

    #[test]
    fn a_number_is_that_user_whatever_is_named_so() {
        assert_eq!(home(5, PASSWD), "/");
        assert_eq!(home(77, PASSWD), "/", "77 is 5's name");
        assert_eq!((home(1000, PASSWD), home(4, PASSWD)), ("/home/ada".into(), "/".into()));
        let ids = Some((77, 6, vec![1, 2]));
        let mut process = Process {
            args: vec![],
            env: vec![],
            cwd: "/".into(),
            user: None,
            terminal: false,
            stdin: false,
            confinement: Confinement { ids, ..Confinement::default() },
        };
        let found = of(&process).unwrap();
        assert_eq!((found.uid, found.gid, found.groups), (77, 6, vec![1, 2]));
        process.user = Some("2000:3000".into());
        assert_eq!(of(&process).unwrap().uid, 2000, "asked for by name");
        process.user = None;
        process.confinement.ids = None;
        assert_eq!(of(&process).unwrap().uid, 0);
    }
}
