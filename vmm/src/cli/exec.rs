//! `oriel exec`.

use anyhow::Result;
use clap::Args;
use oriel_init::protocol::Exec;

use super::{UsageError, values};
use crate::agent::{self, Streams};
use crate::signals::Signals;
use crate::stdio::duplicate;
use crate::terminal;

/// Run a further command in a sandbox that runs, and exit with its status
///
/// The command has the surroundings of the sandbox's first one, and its own streams, status and, with --tty, its
/// own terminal. A sandbox that boots is waited for. Signals are forwarded; the third SIGINT, SIGTERM or SIGQUIT
/// within ten seconds ends the waiting.
#[derive(Debug, Args)]
#[command(after_long_help = EXAMPLES)]
pub struct ExecArgs {
    /// Forward standard input to the command
    #[arg(short, long)]
    interactive: bool,

    /// Give the command a terminal
    #[arg(short, long)]
    tty: bool,

    /// Return once the command runs, which goes on by itself: its input is at its end, and nobody reads its output
    #[arg(short, long, conflicts_with_all = ["interactive", "tty"])]
    detach: bool,

    /// Set an environment variable; NAME alone takes the host's value
    #[arg(short, long = "env", value_name = "NAME[=VALUE]")]
    env: Vec<String>,

    /// Working directory of the command, instead of the first one's
    #[arg(short, long, value_name = "PATH")]
    workdir: Option<String>,

    /// User of the command, instead of the first one's: a name of the guest's /etc/passwd or a number
    #[arg(short, long, value_name = "USER[:GROUP]")]
    user: Option<String>,

    /// The sandbox: what its `oriel run --name` says
    sandbox: String,

    /// The command and its arguments
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, required = true)]
    command: Vec<String>,
}

const EXAMPLES: &str = "\
Examples:
  oriel exec box ps
  oriel exec -it box sh
  oriel exec -d box sh -c 'exec server >/src/log 2>&1'
  tar -c . | oriel exec -i -w /src box tar -x

Exit status: the command's own; 128+N when signal N killed it; 127 when it was not found, 126 when it
could not be executed; 125 when there is no such sandbox or it ended; 2 for a wrong command line.

A command whose `oriel exec` was killed goes on, its input at its end and its output read by nobody; with
--tty its terminal is gone, and it gets SIGHUP.";

/// Runs the command to its end and returns its status.
pub fn exec(args: &ExecArgs) -> Result<u8> {
    let exec = request(args)?;
    if args.tty && args.interactive {
        terminal::check()?;
    }
    let stdin = args.interactive.then(|| duplicate(rustix::stdio::stdin())).transpose()?;
    let stdout = duplicate(rustix::stdio::stdout())?;
    let stderr = duplicate(rustix::stdio::stderr())?;
    let stream = agent::connect(&args.sandbox)?;
    let streams = Streams { stdin, stdout, stderr };
    match args.detach {
        true => agent::start(stream, &exec, streams),
        false => agent::run(stream, &exec, streams, Some(Signals::new()?)),
    }
}

/// What the agent is asked for.
fn request(args: &ExecArgs) -> Result<Exec, UsageError> {
    if let Some(workdir) = args.workdir.as_ref().filter(|workdir| !workdir.starts_with('/')) {
        return Err(UsageError(format!("--workdir {workdir:?}: write an absolute path")));
    }
    if let Some(wrong) = args.env.iter().find(|entry| entry.is_empty() || entry.starts_with('=')) {
        return Err(UsageError(format!("--env {wrong:?}: write NAME=VALUE or NAME")));
    }
    let term = args.tty.then(values::term);
    let own = args.env.iter().filter_map(|entry| values::environment_entry(entry));
    Ok(Exec {
        args: args.command.clone(),
        env: term.into_iter().chain(own).collect(),
        cwd: args.workdir.clone(),
        user: args.user.clone(),
        terminal: args.tty,
        size: args.tty.then(terminal::size).flatten(),
        stdin: args.interactive,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Wrapper {
        #[command(flatten)]
        args: ExecArgs,
    }

    fn parse(words: &[&str]) -> Result<ExecArgs, clap::Error> {
        Wrapper::try_parse_from([&["exec"], words].concat()).map(|wrapper| wrapper.args)
    }

    #[test]
    fn what_is_behind_the_name_is_the_command() {
        for words in [
            &["-i", "-e", "A=1", "-w", "/x", "-u", "me", "box", "ls", "-i", "--env", "box"][..],
            &["-ie", "A=1", "-w", "/x", "-u", "me", "box", "--", "ls", "-i", "--env", "box"],
        ] {
            let args = parse(words).unwrap();
            assert_eq!(args.sandbox, "box");
            let exec = request(&args).unwrap();
            assert_eq!(exec.args, ["ls", "-i", "--env", "box"]);
            assert_eq!((exec.env, exec.cwd), (vec!["A=1".into()], Some("/x".into())));
            assert_eq!((exec.user, exec.stdin, exec.terminal), (Some("me".into()), true, false));
        }
        let exec = request(&parse(&["-t", "-e", "TERM=mine", "box", "-x"]).unwrap()).unwrap();
        assert_eq!(exec.args, ["-x"]);
        assert!(exec.env[0].starts_with("TERM=") && exec.env[1] == "TERM=mine");
        assert!(parse(&["box"]).is_err(), "a command is needed");
        assert!(parse(&["-d", "box", "ls"]).unwrap().detach);
        assert!(parse(&["-d", "-t", "box", "ls"]).is_err(), "its terminal would be gone at once");
        assert!(parse(&[]).is_err());
    }

    #[test]
    fn contradictions_are_wrong_command_lines() {
        for (words, hint) in
            [(&["-w", "x", "box", "ls"][..], "--workdir"), (&["-e", "=x", "box", "ls"], "--env")]
        {
            let error = request(&parse(words).unwrap()).unwrap_err();
            assert!(error.0.contains(hint), "{}", error.0);
        }
    }
}
