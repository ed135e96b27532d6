//! `oriel ps`.

use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use crate::control::client::{self, Connection};
use crate::control::{self, Request};
use crate::sandbox::{State, Status};

/// How long a sandbox may take to say what it is. It does so at once, unless its process was stopped.
const PATIENCE: Duration = Duration::from_secs(2);

/// Most characters of a command.
const COMMAND_WIDTH: usize = 60;

/// List the sandboxes of this user that run and have a name
#[derive(Debug, Args)]
pub struct PsArgs {
    /// Names alone, one a line
    #[arg(short, long)]
    quiet: bool,
}

/// Prints them.
pub fn ps(args: &PsArgs) -> Result<u8> {
    control::sweep(&control::directory()?);
    let mut rows = vec![["NAME", "PID", "STATE", "UPTIME", "COMMAND"].map(String::from)];
    for name in client::names()? {
        // It was killed meanwhile.
        let Ok(mut sandbox) = Connection::open(&name) else { continue };
        let status = sandbox.waits(PATIENCE).and_then(|()| sandbox.ask_for(&Request::Status {}));
        match status {
            Ok(status) => rows.push(row(&status)),
            Err(error) => {
                log::info!("{error:#}");
                rows.push([&name, "?", "silent", "?", "?"].map(String::from));
            }
        }
    }
    let mut out = std::io::stdout().lock();
    let text = match args.quiet {
        true => rows.iter().skip(1).map(|[name, ..]| format!("{name}\n")).collect(),
        false => table(&rows),
    };
    out.write_all(text.as_bytes()).context("standard output")?;
    Ok(0)
}

fn row(status: &Status) -> [String; 5] {
    let state = match status.state {
        State::Booting => "booting",
        State::Running => "running",
        State::Ending => "ending",
    };
    let command = status.command.join(" ");
    // A terminal would obey what is in it.
    let mut shown: String = command.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if let Some((at, _)) = shown.char_indices().nth(COMMAND_WIDTH) {
        shown.truncate(at);
        shown.push('…');
    }
    let uptime = uptime(Duration::from_secs(status.uptime_seconds));
    [status.name.clone(), status.pid.to_string(), state.into(), uptime, shown]
}

/// The two largest units.
fn uptime(time: Duration) -> String {
    let seconds = time.as_secs();
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{}m", minutes % 60),
        _ => format!("{days}d{}h", hours % 24),
    }
}

/// Columns as wide as they have to be; the last one is as it is.
fn table(rows: &[[String; 5]]) -> String {
    let width = |column: usize| {
        rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max()
    };
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            line += &format!("{cell:<width$}   ", width = width(column).unwrap_or(0));
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_short_and_printable() {
        let status = |command: &[&str]| Status {
            name: "box".into(),
            pid: 7,
            state: State::Running,
            uptime_seconds: 61,
            cpus: 1,
            memory: 1 << 30,
            shares: vec![],
            command: command.iter().map(|&word| word.into()).collect(),
            agent: true,
            vsock: None,
        };
        let plain = row(&status(&["sh", "-c", "a\x1b[2J\nb"]));
        assert_eq!(plain, ["box", "7", "running", "1m1s", "sh -c a [2J b"]);
        let long = row(&status(&["ä".repeat(100).as_str()]));
        assert_eq!(long[4], format!("{}…", "ä".repeat(COMMAND_WIDTH)));
        let rows = [["NAME", "PID", "STATE", "UPTIME", "COMMAND"].map(String::from), plain];
        let expected = "NAME   PID   STATE     UPTIME   COMMAND\nbox    7     running   1m1s     sh -c a [2J b\n";
        assert_eq!(table(&rows), expected);
    }

    #[test]
    fn an_uptime_has_its_two_largest_units() {
        for (seconds, text) in [
            (0, "0s"),
            (59, "59s"),
            (3599, "59m59s"),
            (3600, "1h0m"),
            (86_399, "23h59m"),
            (90_000, "1d1h"),
        ] {
            assert_eq!(uptime(Duration::from_secs(seconds)), text);
        }
    }
}
