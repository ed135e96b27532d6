//! What is to be run becomes a [`Command`]: how its program is found, its surroundings, and why it may not start.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use oriel_init::protocol::Process;
use rustix::fs::{Access, AtFlags};
use rustix::process::{Gid, Uid};

use crate::sys;
use crate::users::Ids;

/// Where to look when the environment has no `PATH`: what docker gives a container.
pub(crate) const DEFAULT_PATH: &str =
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The shell's, and docker's, statuses for a command that did not start.
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// It is not the command's fault.
const OURS: u8 = 125;

/// Why a command did not start.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) status: u8,
    /// One line.
    pub(crate) message: String,
}

impl Refusal {
    fn new(status: u8, name: &str, reason: &str) -> Self {
        Self { status, message: format!("exec {name:?}: {reason}") }
    }

    /// It could not be tried, for this reason.
    pub(crate) fn ours(message: String) -> Self {
        Self { status: OURS, message }
    }

    /// Its program was found, and starting it failed.
    pub(crate) fn of_start(process: &Process, cause: &io::Error) -> Self {
        let status = match cause.raw_os_error() {
            Some(libc::ENOENT) => NOT_FOUND,
            // There is no room for a process, whatever its program is; or we did not even try.
            Some(libc::EAGAIN | libc::ENOMEM | libc::ENFILE | libc::EMFILE) | None => OURS,
            Some(_) => NOT_EXECUTABLE,
        };
        // The program is there: what is missing is the interpreter that it names.
        let reason = match cause.kind() {
            io::ErrorKind::NotFound => "its interpreter does not exist".to_owned(),
            io::ErrorKind::PermissionDenied => "permission denied".to_owned(),
            _ if cause.raw_os_error() == Some(libc::ENOEXEC) => "exec format error".to_owned(),
            _ => cause.to_string(),
        };
        Self::new(status, process.args.first().map_or("", String::as_str), &reason)
    }
}

/// Everything but its standard streams: program, arguments, environment, working directory, session and user. It
/// will lead a session, and with a terminal that is the session's.
pub(crate) fn prepare(process: &Process, ids: &Ids) -> Result<Command, Refusal> {
    let Some(name) = process.args.first() else {
        return Err(Refusal::ours("there is no command to run".into()));
    };
    let directory = Path::new(&process.cwd);
    // Now: a failure in the child could not be told from the program's own.
    if !directory.is_dir() {
        let reason = format!("the working directory {} is not there", process.cwd);
        return Err(Refusal::new(NOT_EXECUTABLE, name, &reason));
    }
    let program = match find(name, &process.env, directory) {
        Found::Program(program) => program,
        Found::NotExecutable => {
            return Err(Refusal::new(NOT_EXECUTABLE, name, "permission denied"));
        }
        Found::Nothing if name.contains('/') => {
            return Err(Refusal::new(NOT_FOUND, name, "no such file or directory"));
        }
        Found::Nothing => {
            return Err(Refusal::new(NOT_FOUND, name, "executable file not found in $PATH"));
        }
    };
    let mut command = Command::new(program);
    command.arg0(name).args(process.args.iter().skip(1)).current_dir(directory).env_clear();
    // Only here is known whose home it is.
    command.env("HOME", &ids.home);
    for variable in &process.env {
        // A name may begin with '=', but is not empty.
        match variable.char_indices().skip(1).find(|(_, character)| *character == '=') {
            Some((at, _)) => command.env(&variable[..at], &variable[at + 1..]),
            None => {
                let message = format!("environment variable {variable:?} is not NAME=VALUE");
                return Err(Refusal::ours(message));
            }
        };
    }
    let groups = ids.groups.iter().map(|group| Gid::from_raw(*group)).collect();
    let (uid, gid) = (Uid::from_raw(ids.uid), Gid::from_raw(ids.gid));
    sys::start_as(&mut command, process.terminal, uid, gid, groups, &process.confinement);
    Ok(command)
}

/// Lets the command reopen its own streams (`/dev/stdout`), whoever it is.
pub(crate) fn own(stream: impl AsFd, ids: &Ids) -> io::Result<()> {
    Ok(rustix::fs::fchown(stream, Some(Uid::from_raw(ids.uid)), None)?)
}

enum Found {
    Program(PathBuf),
    NotExecutable,
    Nothing,
}

/// Looks a program up as execvp(3) does, in the command's own `PATH` and from its working directory. Of two
/// values of `PATH` the last one counts.
fn find(name: &str, env: &[String], cwd: &Path) -> Found {
    if name.contains('/') {
        return examine(cwd.join(name));
    }
    if name.is_empty() {
        return Found::Nothing;
    }
    let mut values = env.iter().rev().filter_map(|variable| variable.strip_prefix("PATH="));
    let path = values.next().unwrap_or(DEFAULT_PATH);
    let mut result = Found::Nothing;
    for directory in path.split(':') {
        // An empty entry is the working directory.
        match examine(cwd.join(directory).join(name)) {
            Found::Nothing => {}
            Found::NotExecutable => result = Found::NotExecutable,
            program @ Found::Program(_) => return program,
        }
    }
    result
}

fn examine(path: PathBuf) -> Found {
    match path.metadata() {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Found::NotExecutable,
        Err(_) => Found::Nothing,
        Ok(metadata) if metadata.is_dir() => Found::NotExecutable,
        Ok(_) => {
            match rustix::fs::accessat(rustix::fs::CWD, &path, Access::EXEC_OK, AtFlags::empty()) {
                Ok(()) => Found::Program(path),
                Err(_) => Found::NotExecutable,
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use oriel_init::container::Confinement;

    use super::*;

    fn found(result: &Found) -> &str {
        match result {
            Found::Program(path) => path.to_str().unwrap(),
            Found::NotExecutable => "not executable",
            Found::Nothing => "nothing",
        }
    }

    #[test]
    fn a_program_is_looked_up_in_the_commands_path() {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name).to_str().unwrap().to_owned();
        for (name, mode) in
            [("one/data", 0o644), ("two/data", 0o755), ("two/tool", 0o755), ("one/only", 0o644)]
        {
            fs::create_dir_all(Path::new(&at(name)).parent().unwrap()).unwrap();
            fs::write(at(name), "").unwrap();
            fs::set_permissions(at(name), fs::Permissions::from_mode(mode)).unwrap();
        }
        fs::create_dir(at("one/tool")).unwrap();
        let cwd = Path::new("/");
        let env = ["HOME=/".to_owned(), format!("PATH={}:{}:{}", at("none"), at("one"), at("two"))];

        assert_eq!(
            found(&find("data", &env, cwd)),
            at("two/data"),
            "what cannot be executed is passed over"
        );
        assert_eq!(found(&find("tool", &env, cwd)), at("two/tool"), "a directory is passed over");
        assert_eq!(found(&find("only", &env, cwd)), "not executable");
        assert_eq!(found(&find("absent", &env, cwd)), "nothing");
        assert_eq!(found(&find("", &env, cwd)), "nothing");
        assert_eq!(
            found(&find(&at("two/tool"), &env, cwd)),
            at("two/tool"),
            "a slash: not looked up"
        );
        assert_eq!(found(&find(&at("one/data"), &env, cwd)), "not executable");
        assert_eq!(found(&find(&at("two/absent"), &env, cwd)), "nothing");
        assert!(found(&find("sh", &[], cwd)).ends_with("/sh"), "the default path");
        assert_eq!(found(&find("./two/tool", &env, root.path())), at("./two/tool"));
        let env = ["PATH=/nowhere".to_owned(), "PATH=:two".to_owned()];
        assert_eq!(
            found(&find("tool", &env, root.path())),
            at("two/tool"),
            "the last, and relative"
        );
    }

    #[test]
    fn what_cannot_be_run_is_said_with_its_status() {
        let process = |args: &[&str], cwd: &str, env: &[&str]| Process {
            args: args.iter().map(|&arg| arg.into()).collect(),
            env: env.iter().map(|&entry| entry.into()).collect(),
            cwd: cwd.into(),
            user: None,
            terminal: false,
            stdin: false,
            confinement: Confinement::default(),
        };
        for (process, status, hint) in [
            (process(&[], "/", &[]), 125, "no command"),
            (process(&["nowhere"], "/", &[]), 127, "exec \"nowhere\": executable file not found"),
            (process(&["/no/where"], "/", &[]), 127, "no such file"),
            (process(&[""], "/", &[]), 127, "not found"),
            (process(&["/etc"], "/", &[]), 126, "permission denied"),
            (process(&["sh"], "/no/where", &[]), 126, "/no/where"),
            (process(&["sh"], "/etc/passwd", &[]), 126, "/etc/passwd"),
            (process(&["sh"], "/", &["A"]), 125, "NAME=VALUE"),
            (process(&["sh"], "/", &["=A"]), 125, "NAME=VALUE"),
        ] {
            let refusal = prepare(&process, &Ids::default()).unwrap_err();
            assert_eq!(refusal.status, status, "{refusal:?}");
            assert!(refusal.message.contains(hint), "{refusal:?}");
        }
        let sh = process(&["sh"], "/", &[]);
        for (error, status) in [
            (libc::ENOENT, 127),
            (libc::ENOEXEC, 126),
            (libc::EACCES, 126),
            (libc::E2BIG, 126),
            (libc::EIO, 126),
            (libc::EAGAIN, 125),
            (libc::ENOMEM, 125),
            (libc::EMFILE, 125),
        ] {
            let error = io::Error::from_raw_os_error(error);
            assert_eq!(Refusal::of_start(&sh, &error).status, status);
        }
        let refusal = Refusal::of_start(&sh, &io::Error::other("the sandbox ends"));
        assert_eq!(refusal.status, 125, "{refusal:?}");
    }
}
