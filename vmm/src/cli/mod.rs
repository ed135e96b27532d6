//! The command line.

mod check;
pub mod detach;
mod exec;
mod logs;
mod ps;
mod run;
mod running;
mod share;
mod stop;
pub mod values;

use std::io::Write;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

pub use self::run::{RunArgs, UserNamespace};
pub use self::share::{LiveArg, MemberOptions, RootArg, ShareArg, ShareOptions};
pub use self::values::{ConsoleTarget, InitrdSource};
use crate::terminal::printable;

/// Exit status of a command line that cannot be understood.
pub const STATUS_USAGE: u8 = 2;
/// Exit status of a sandbox that could not be started, or that broke down: docker's and podman's.
pub const STATUS_SANDBOX: u8 = 125;

/// Run a command in a virtual machine whose files are the host's own.
///
/// Oriel boots a Linux kernel on KVM and implements the virtio-fs device inside its own process: host
/// directories appear in the guest without an image, a copy or a daemon, and file pages are mapped straight
/// into the guest (DAX).
#[derive(Debug, Parser)]
#[command(name = "oriel", version, max_term_width = 100)]
#[command(after_help = "Start with `oriel check`, then `oriel run -- uname -a`.")]
struct Cli {
    /// What to write to standard error: error, warn, info, debug or trace
    #[arg(long, global = true, env = "ORIEL_LOG", default_value = "warn", value_name = "LEVEL")]
    log_level: log::LevelFilter,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Run(Box<RunArgs>),
    Exec(exec::ExecArgs),
    Wait(stop::WaitArgs),
    Ps(ps::PsArgs),
    Logs(logs::LogsArgs),
    Stop(stop::StopArgs),
    Rm(logs::RmArgs),
    Share(running::ShareArgs),
    Stats(running::StatsArgs),
    Status(running::StatusArgs),
    Check(check::CheckArgs),
    /// Print a completion script for a shell
    ///
    /// For example: `oriel completions bash > /etc/bash_completion.d/oriel`
    Completions {
        /// The shell
        shell: Shell,
    },
    /// Print the manual page of oriel, or of one of its commands, in roff
    ///
    /// For example: `oriel man run | man -l -`
    Man {
        /// The command
        command: Option<String>,
    },
}

/// Reads the command line and does what it says.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage_error(&error),
    };
    env_logger::Builder::new()
        .filter_level(cli.log_level)
        .format_timestamp(None)
        .format_target(false)
        .format(|out, record| {
            // What a guest or a file name has put in there included.
            writeln!(out, "[{:<5}] {}", record.level(), printable(&record.args().to_string()))
        })
        .init();
    ignore_file_size_limit();
    let result = match cli.command {
        Command::Run(args) => run::run(&args),
        Command::Exec(args) => exec::exec(&args),
        Command::Wait(args) => stop::wait(&args),
        Command::Ps(args) => ps::ps(&args),
        Command::Logs(args) => logs::logs(&args),
        Command::Stop(args) => stop::stop(&args),
        Command::Rm(args) => logs::rm(&args),
        Command::Share(args) => running::share(&args),
        Command::Stats(args) => running::stats(&args),
        Command::Status(args) => running::status(&args),
        Command::Check(args) => check::check(&args),
        Command::Completions { shell } => {
            let mut command = Cli::command();
            clap_complete::generate(shell, &mut command, "oriel", &mut std::io::stdout());
            Ok(0)
        }
        Command::Man { command } => print_man_page(command.as_deref()),
    };
    match result {
        Ok(status) => ExitCode::from(status),
        Err(error) => {
            eprintln!("oriel: {}", printable(&format!("{error:#}")));
            let usage = error.downcast_ref::<UsageError>().is_some();
            ExitCode::from(if usage { STATUS_USAGE } else { STATUS_SANDBOX })
        }
    }
}

/// With `ulimit -f`, a write of the guest's beyond the limit shall be its error and not our end.
fn ignore_file_size_limit() {
    let noted = std::sync::Arc::default();
    if let Err(error) = signal_hook::flag::register(rustix::process::Signal::XFSZ.as_raw(), noted) {
        log::warn!("a file larger than `ulimit -f` will end the sandbox: {error}");
    }
}

/// Says why a guest did not start a command, and returns the exit status of that.
pub fn refused(status: u8, message: &str) -> u8 {
    eprintln!("oriel: {}", printable(message));
    // Others mean something else.
    if [STATUS_SANDBOX, 126, 127].contains(&status) { status } else { STATUS_SANDBOX }
}

/// Options that contradict each other: found after parsing, but still a wrong command line.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct UsageError(pub String);

fn print_man_page(name: Option<&str>) -> anyhow::Result<u8> {
    let mut command = Cli::command();
    command.build();
    let page = match name {
        None => command,
        Some(name) => command
            .find_subcommand(name)
            .ok_or_else(|| UsageError(format!("man {name}: there is no such command")))?
            .clone()
            .name(format!("oriel-{name}")),
    };
    clap_mangen::Man::new(page).render(&mut std::io::stdout())?;
    Ok(0)
}

/// Says in one line what is wrong: clap's message without its usage, which `--help` shows.
fn usage_error(error: &clap::Error) -> ExitCode {
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            // Nobody is left to tell when standard output is closed.
            let _ = error.print();
            ExitCode::SUCCESS
        }
        ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
            ExitCode::from(STATUS_USAGE)
        }
        _ => {
            eprintln!("oriel: {}", one_line(&error.to_string()));
            ExitCode::from(STATUS_USAGE)
        }
    }
}

fn one_line(message: &str) -> String {
    let message = message.strip_prefix("error: ").unwrap_or(message);
    let is_usage = |line: &&str| line.starts_with("Usage:") || line.starts_with("For more");
    let lines = message.lines().map(str::trim).take_while(|line| !is_usage(line));
    lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_wrong_command_line_is_told_in_one_line() {
        for words in [
            &["oriel", "run", "--cpu", "1"][..],
            &["oriel", "run", "--memory", "1X"],
            &["oriel", "run", "--memory"],
            &["oriel", "start"],
        ] {
            let line = one_line(&Cli::try_parse_from(words).unwrap_err().to_string());
            assert!(!line.contains('\n') && !line.contains("Usage"), "{line}");
            let wrong = words.last().unwrap();
            assert!(line.contains(wrong) || line.contains("--cpu"), "{line}");
        }
    }

    #[test]
    fn every_option_has_help() {
        let mut command = Cli::command();
        command.build();
        for command in command.get_subcommands() {
            assert!(command.get_about().is_some(), "{}", command.get_name());
            for argument in command.get_arguments() {
                assert!(argument.get_help().is_some(), "{} {}", command.get_name(), argument);
            }
        }
    }
}
