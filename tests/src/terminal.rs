//! A run of the program on a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::OpenptFlags;
use rustix::termios::{Winsize, tcsetwinsize};

use crate::run::Oriel;

/// Nothing that is waited for takes longer.
const TIMEOUT: Duration = Duration::from_secs(60);

/// A program whose standard streams are a terminal, and who sits in front of it.
pub struct Screen {
    child: Child,
    keyboard: File,
    pieces: Receiver<Vec<u8>>,
    heard: String,
}

/// A terminal: the end of who sits in front of it, and the program's.
pub fn open_terminal() -> rustix::io::Result<(File, File)> {
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let host = rustix::pty::openpt(flags)?;
    rustix::pty::unlockpt(&host)?;
    let terminal = rustix::pty::ioctl_tiocgptpeer(&host, flags)?;
    Ok((host.into(), terminal.into()))
}

impl Oriel {
    /// Starts it on a terminal of this size.
    pub fn on_terminal(self, rows: u16, columns: u16) -> Screen {
        let (keyboard, terminal) = open_terminal().expect("a terminal");
        set_size(&keyboard, rows, columns);
        let mut command = self.as_command();
        let stdio = || Stdio::from(terminal.try_clone().expect("dup"));
        let child = command.stdin(stdio()).stdout(stdio()).stderr(stdio()).spawn();
        drop(command);
        let child = child.expect("oriel");
        let mut screen = keyboard.try_clone().expect("dup");
        let (sender, pieces) = channel();
        thread::spawn(move || {
            let mut piece = [0; 4096];
            while let Ok(count) = screen.read(&mut piece) {
                if count == 0 || sender.send(piece[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        Screen { child, keyboard, pieces, heard: String::new() }
    }
}

fn set_size(terminal: impl std::os::fd::AsFd, rows: u16, columns: u16) {
    let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(terminal, size).expect("a size");
}

impl Screen {
    /// Types this.
    pub fn say(&mut self, keys: &str) {
        self.keyboard.write_all(keys.as_bytes()).expect("the keyboard");
    }

    /// Waits until this is on the screen, behind what was heard before.
    pub fn hear(&mut self, text: &str) {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(at) = self.heard.find(text) {
                self.heard.drain(..at + text.len());
                return;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            match self.pieces.recv_timeout(left) {
                Ok(piece) => self.heard += &String::from_utf8_lossy(&piece),
                Err(error) => panic!("{error} for {text:?}; on the screen: {:?}", self.heard),
            }
        }
    }

    /// Gives the terminal another size.
    pub fn resize(&self, rows: u16, columns: u16) {
        set_size(&self.keyboard, rows, columns);
        // What the kernel does for programs of the terminal's own session.
        kill_process(Pid::from_child(&self.child), Signal::WINCH).expect("kill");
    }

    /// Waits for the end, and returns the exit status.
    pub fn finish(mut self) -> i32 {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            if let Some(status) = self.child.try_wait().expect("wait") {
                return status.code().unwrap_or(-1);
            }
            assert!(Instant::now() < deadline, "it does not end: {:?}", self.heard);
            thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
