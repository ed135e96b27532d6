//! The terminal of a command: a pseudoterminal.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::process::Command;

use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::command::own;
use crate::log;
use crate::users::Ids;

/// Gives `command` a terminal, and returns both ends of it: the host's, and the command's, which is to be kept until
/// the command has ended. While nobody has that open, the host's end fails as if all were over, and a command may well
/// close its terminal and open it again (`/dev/tty`).
pub(crate) fn give(command: &mut Command, ids: &Ids) -> io::Result<(File, OwnedFd)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let host = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&host)?;
    let guest: OwnedFd = rustix::pty::ioctl_tiocgptpeer(&host, flags)?;
    own(&guest, ids)?;
    command.stdin(guest.try_clone()?).stdout(guest.try_clone()?).stderr(guest.try_clone()?);
    Ok((File::from(host), guest))
}

/// Tells the terminal how large it is, and those in its foreground when that is new to them.
pub(crate) fn set_size(terminal: &File, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    if let Err(error) = rustix::termios::tcsetwinsize(terminal, size) {
        log(&format!("cannot set the terminal's size: {error}"));
    }
}
