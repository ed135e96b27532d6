//! Prints what inotify(7) says of a directory: a line for each event, its name and that of the entry.

use std::io::{Write, stdout};
use std::mem::MaybeUninit;
use std::path::Path;

use anyhow::Result;
use rustix::fs::inotify::{CreateFlags, ReadFlags, Reader, WatchFlags, add_watch, init};

/// What is listened for, and what it is called.
const EVENTS: [(ReadFlags, &str); 7] = [
    (ReadFlags::CREATE, "create"),
    (ReadFlags::DELETE, "delete"),
    (ReadFlags::MODIFY, "modify"),
    (ReadFlags::CLOSE_WRITE, "close-write"),
    (ReadFlags::ATTRIB, "attrib"),
    (ReadFlags::MOVED_FROM, "moved-from"),
    (ReadFlags::MOVED_TO, "moved-to"),
];

pub fn listen(directory: &Path) -> Result<()> {
    let inotify = init(CreateFlags::CLOEXEC)?;
    let wanted = EVENTS.iter().fold(0, |all, (event, _)| all | event.bits());
    add_watch(&inotify, directory, WatchFlags::from_bits_retain(wanted))?;
    writeln!(stdout(), "listening")?;
    let mut buffer = [MaybeUninit::uninit(); 4096];
    let mut reader = Reader::new(&inotify, &mut buffer);
    loop {
        let event = reader.next()?;
        let name = event.file_name().map(|name| name.to_string_lossy().into_owned());
        for (_, called) in EVENTS.iter().filter(|(of, _)| event.events().contains(*of)) {
            writeln!(stdout(), "{called} {}", name.as_deref().unwrap_or("."))?;
        }
    }
}
