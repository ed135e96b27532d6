//! A user namespace in which an ordinary user's process may take on the ids of /etc/subuid and /etc/subgid.
#![expect(unsafe_code, reason = "unshare(2) is unsafe in rustix")]

use std::io::Write;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};
use rustix::process::{Gid, Uid, getegid, geteuid, getpid};
use rustix::thread::{UnshareFlags, set_thread_res_gid, unshare_unsafe};

/// Waits for a line before it becomes the program of its arguments: started before the namespace is entered,
/// because only from outside may newuidmap(1) do what its set-user-id bit allows, and run after it.
const WAIT_THEN_RUN: &str = "read -r go && exec \"$@\"";

/// Makes this process one that can take on the user's subordinate ids. In the namespace every id has the number
/// that it has outside, so no other part of the program needs to know. It has all capabilities over it, over
/// nothing else, and the access to files and devices that the user has.
///
/// Root has all ids as it is, and nothing happens. Says whether anything did.
///
/// Call it before there is a second thread.
///
/// # Errors
///
/// One line: what the host lacks or forbids, and what to do about it.
pub fn enter() -> Result<bool> {
    let (uid, gid) = (geteuid(), getegid());
    if uid.is_root() {
        return Ok(false);
    }
    let names = Names { uid: uid.as_raw(), name: user_name(uid) };
    let uids = names.ranges("/etc/subuid")?;
    let gids = names.ranges("/etc/subgid")?;
    let helpers = [
        Helper::start("newuidmap", uid.as_raw(), &uids)?,
        Helper::start("newgidmap", gid.as_raw(), &gids)?,
    ];
    // SAFETY: CLONE_NEWUSER changes the credentials of the calling thread, which is the only one (or this
    // fails with EINVAL), and no table of descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWUSER) }.context(
        "--userns auto: the host allows this user no user namespace (see sysctl user.max_user_namespaces and \
         kernel.unprivileged_userns_clone); leave --userns",
    )?;
    for helper in helpers {
        helper.run()?;
    }
    check_that_capabilities_count(gid, &gids)?;
    Ok(true)
}

/// A host may hand out user namespaces and then forbid all that one would want them for.
fn check_that_capabilities_count(own: Gid, gids: &[(u32, u32)]) -> Result<()> {
    let Some((first, _)) = gids.first() else {
        return Ok(());
    };
    // The saved id alone: it is used for nothing, and only CAP_SETGID may choose it.
    let saved = Gid::from_raw(*first);
    set_thread_res_gid(own, own, saved).and_then(|()| set_thread_res_gid(own, own, own)).context(
        "--userns auto: the host gives no capabilities in a user namespace (see sysctl \
         kernel.apparmor_restrict_unprivileged_userns); leave --userns",
    )
}

/// newuidmap(1) or newgidmap(1), about to run.
struct Helper {
    program: &'static str,
    child: Child,
}

impl Helper {
    fn start(program: &'static str, own: u32, ranges: &[(u32, u32)]) -> Result<Self> {
        let path = find(program).with_context(|| {
            format!(
                "--userns auto: {program} is missing; install it (Debian: apt-get install uidmap)"
            )
        })?;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", WAIT_THEN_RUN, "sh"]).arg(path).arg(getpid().to_string());
        for (first, count) in [(own, 1)].iter().chain(ranges) {
            command.args([first, first, count].map(u32::to_string));
        }
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let child = command.spawn().context("--userns auto: /bin/sh cannot be run")?;
        Ok(Self { program, child })
    }

    fn run(mut self) -> Result<()> {
        let program = self.program;
        if let Some(mut stdin) = self.child.stdin.take() {
            // If it is gone, its status says so.
            let _ = stdin.write_all(b"go\n");
        }
        let output =
            self.child.wait_with_output().with_context(|| format!("--userns auto: {program}"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!("--userns auto: {program} refuses: {}", said.trim().replace('\n', "; "));
        }
        Ok(())
    }
}

fn find(program: &str) -> Option<PathBuf> {
    // An ordinary user's PATH may lack the sbin directories, where some hosts have it.
    let path = std::env::var_os("PATH").unwrap_or_default();
    let more = ["/usr/bin", "/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path)
        .chain(more)
        .map(|place| place.join(program))
        .find(|file| file.is_file())
}

fn user_name(uid: Uid) -> Option<String> {
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    name_in(&passwd, uid.as_raw()).or_else(|| std::env::var("LOGNAME").ok())
}

/// The name of a user, from the text of /etc/passwd (passwd(5)).
fn name_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_string())
    })
}

/// How a user may stand in /etc/subuid.
struct Names {
    uid: u32,
    name: Option<String>,
}

impl Names {
    fn ranges(&self, file: &str) -> Result<Vec<(u32, u32)>> {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let ranges = self.ranges_in(&text);
        if ranges.is_empty() {
            let name = self.name.clone().unwrap_or_else(|| self.uid.to_string());
            let option = if file.ends_with("uid") { "subuids" } else { "subgids" };
            bail!(
                "--userns auto: {file} has no ids for {name}; have root add some (usermod --add-{option} \
                 100000-165535 {name})"
            );
        }
        Ok(ranges)
    }

    /// First id and number of ids, from the text of /etc/subuid (subuid(5)).
    fn ranges_in(&self, text: &str) -> Vec<(u32, u32)> {
        let range = |line: &str| {
            let mut fields = line.trim().split(':');
            let who = fields.next()?;
            let mine = self.name.as_deref() == Some(who) || who.parse() == Ok(self.uid);
            let (first, count) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            (mine && count > 0).then_some((first, count))
        };
        text.lines().filter_map(range).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subordinate_ids_are_found_by_name_and_by_number() {
        let names = Names { uid: 1000, name: Some("ann".into()) };
        let text =
            "bob:1:2\nann:100000:65536\n1000:300000:10\n1001:5:5\nann:x:1\nann:7\nann:9:0\n#\n";
        assert_eq!(names.ranges_in(text), [(100_000, 65536), (300_000, 10)]);
        assert!(Names { uid: 7, name: None }.ranges_in(text).is_empty());
    }

    #[test]
    fn a_user_has_the_name_of_its_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nann:x:1000:1000::/home/ann:/bin/sh\nbad\n";
        assert_eq!(name_in(passwd, 1000).as_deref(), Some("ann"));
        assert_eq!(name_in(passwd, 1), None);
    }
}
