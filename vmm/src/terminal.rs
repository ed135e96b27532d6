//! The user's terminal while the command has it.

use anyhow::{Context, Result};
use rustix::termios::{
    OptionalActions, Termios, Winsize, isatty, tcgetattr, tcgetwinsize, tcsetattr,
};

use crate::cli::UsageError;

/// Makes sure that the user has a terminal to give.
///
/// # Errors
///
/// When standard input is none.
pub fn check() -> Result<(), UsageError> {
    if isatty(rustix::stdio::stdin()) {
        return Ok(());
    }
    Err(UsageError("--tty: standard input is no terminal; leave --tty, or --interactive".into()))
}

/// Standard input in raw mode: every key goes to the guest. Put back when dropped.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// # Errors
    ///
    /// When standard input is no terminal.
    pub fn enter() -> Result<Self> {
        let input = rustix::stdio::stdin();
        let before = tcgetattr(input).context("terminal settings")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(input, OptionalActions::Flush, &raw).context("terminal settings")?;
        Ok(Self { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let input = rustix::stdio::stdin();
        if let Err(error) = tcsetattr(input, OptionalActions::Flush, &self.before) {
            log::warn!("the terminal stays as it is (`stty sane` helps): {error}");
        }
    }
}

/// A line as it may be shown on a terminal, whoever has written it: without what a terminal would obey.
pub fn printable(text: &str) -> String {
    let escape = |character: char| match character.is_control() {
        true => character.escape_default().to_string(),
        false => character.to_string(),
    };
    text.chars().map(escape).collect()
}

/// Rows and columns of the terminal, if there is one.
pub fn size() -> Option<(u16, u16)> {
    let Winsize { ws_row, ws_col, .. } = tcgetwinsize(rustix::stdio::stdout()).ok()?;
    (ws_row > 0 && ws_col > 0).then_some((ws_row, ws_col))
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn a_terminal_obeys_nothing_that_is_printable() {
        assert_eq!(printable("a\x1b[2J\nü\u{9b}\r\t"), "a\\u{1b}[2J\\nü\\u{9b}\\r\\t");
    }
}
