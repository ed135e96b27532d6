//! What is mapped on behalf of one owner: its way to the files taken and given back, and all of it taken away.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Arc;

use rustix::fs::{CWD, Mode, OFlags, openat};

use super::table::{Access, Backing, Mapping, Opened, State};
use super::window::Window;

impl Window {
    /// See [`DaxWindow::set_writable`](super::DaxWindow::set_writable).
    pub(super) fn switch(&self, owner: u32, writable: bool) -> io::Result<()> {
        let (from, to) = match writable {
            true => (Access::Severed, Access::Write),
            false => (Access::Write, Access::Severed),
        };
        let concerned = |mapping: &Mapping| mapping.owner == owner && mapping.access == from;
        let files = self.state().files_of(concerned);
        // Not under the lock: the host is asked.
        let twins: HashMap<_, _> = files
            .iter()
            .filter_map(|file| match self.twin(file, writable) {
                Ok(twin) => Some((Arc::as_ptr(file), twin)),
                Err(error) => {
                    let (device, inode, _) = file.key;
                    log::warn!(
                        "a file that is mapped (device {device:#x}, inode {inode}) cannot be opened anew: {error}; {}",
                        if writable { "the guest's copy stays" } else { "the guest reads zeros there" }
                    );
                    None
                }
            })
            .collect();
        let mut before = Vec::new();
        let mut result = Ok(());
        let mut state = self.state();
        let all = state.mappings.iter().filter(|(_, mapping)| concerned(mapping));
        let all: Vec<_> = all.map(|(at, mapping)| (*at, mapping.clone())).collect();
        for (at, mapping) in all {
            let len = mapping.len;
            let switched = twins.get(&Arc::as_ptr(&mapping.file)).map(|file| Mapping {
                access: to,
                file: file.clone(),
                ..mapping
            });
            match switched {
                Some(mapping) if self.place(at, &mapping).is_ok() => {
                    state.add_file(&mapping.file);
                    before.extend(state.insert(at, mapping));
                }
                // As it was: the guest has its copy, or what the host has left of it.
                Some(_) if writable => self.restore(&mut state, at, len),
                None if writable => {}
                // One that stays does not keep the others from going.
                _ => match self.zeros_instead(&mut state, at, len) {
                    Ok(gone) => before.extend(gone),
                    Err(error) => result = Err(error),
                },
            }
        }
        self.settle(&mut state);
        // Closes files, which may block: without the lock.
        drop(state);
        drop(before);
        result
    }

    /// The same file, open for reading only or for both.
    fn twin(&self, file: &Backing, writable: bool) -> io::Result<Arc<Backing>> {
        let path = format!("/proc/self/fd/{}", file.fd.as_raw_fd());
        let mode = if writable { OFlags::RDWR } else { OFlags::RDONLY };
        let flags = mode | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = openat(CWD, path, flags, Mode::empty())?;
        let opened = Opened::new(fd.as_fd(), writable)?;
        let known = self.state().known(&opened);
        match known {
            Some(backing) => Ok(backing),
            // It is mapped already: nothing has to be tried.
            None => Ok(Arc::new(opened.backing(fd.as_fd(), |_| Ok(()))?)),
        }
    }

    /// See [`DaxWindow::take_away`](super::DaxWindow::take_away).
    pub(super) fn replace_by_zeros(&self, owner: u32) {
        let mut state = self.state();
        let all = state.mappings.iter().filter(|(_, mapping)| mapping.owner == owner);
        let all: Vec<_> = all.map(|(at, mapping)| (*at, mapping.len)).collect();
        let mut before = Vec::new();
        for (at, len) in all {
            match self.zeros_instead(&mut state, at, len) {
                Ok(gone) => before.extend(gone),
                Err(error) => {
                    log::error!("what is mapped in a DAX window cannot be taken away: {error}");
                }
            }
        }
        self.settle(&mut state);
        // As above.
        drop(state);
        drop(before);
    }

    /// Puts zeros over whole mappings and takes them out of the table; where there is no memory for that, nothing.
    ///
    /// # Errors
    ///
    /// The errno of `mmap`: all is as it was.
    fn zeros_instead(
        &self,
        state: &mut State,
        at: u64,
        len: u64,
    ) -> io::Result<Vec<(u64, Mapping)>> {
        self.place_zeros(at, len).or_else(|_| self.reserve(at, len))?;
        Ok(state.cut_out(at, len))
    }
}
