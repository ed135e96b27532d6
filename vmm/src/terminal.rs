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

/// Rows and columns of the terminal, if there is one.
pub fn size() -> Option<(u16, u16)> {
    let Winsize { ws_row, ws_col, .. } = tcgetwinsize(rustix::stdio::stdout()).ok()?;
    (ws_row > 0 && ws_col > 0).then_some((ws_row, ws_col))
}
