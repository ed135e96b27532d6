//! A file in memory, looked at and changed line by line as standard input says.
#![expect(unsafe_code, reason = "memory-mapped files, and a child that may die of one")]

use std::fs::{File, OpenOptions};
use std::io::BufRead;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::mm::{MapFlags, MsyncFlags, ProtFlags, mmap, msync};

/// A shared writable mapping that stays until the process ends.
struct Mapping {
    start: *mut u8,
    length: usize,
    file: File,
}

impl Mapping {
    fn new(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().read(true).write(true).open(path)?;
        let length = usize::try_from(file.metadata()?.len())?;
        let access = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the kernel chooses an address at which nothing else is.
        let start =
            unsafe { mmap(std::ptr::null_mut(), length, access, MapFlags::SHARED, &file, 0)? };
        Ok(Self { start: start.cast(), length, file })
    }

    fn at(&self, offset: usize) -> Result<*mut u8> {
        ensure!(offset < self.length, "{offset} is behind the end");
        Ok(self.start.wrapping_add(offset))
    }

    fn get(&self, offset: usize) -> Result<u8> {
        let place = self.at(offset)?;
        // SAFETY: inside the mapping, which nobody unmaps. Others change it at any time, hence volatile.
        Ok(unsafe { place.read_volatile() })
    }

    fn put(&self, offset: usize, value: u8) -> Result<()> {
        let place = self.at(offset)?;
        // SAFETY: as in `get`.
        unsafe { place.write_volatile(value) };
        Ok(())
    }

    /// Reads a byte in a child process: the file may have become shorter.
    fn touch(&self, offset: usize) -> Result<String> {
        let place = self.at(offset)?;
        // SAFETY: this process has one thread, and the child only reads memory and exits.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: a fault ends the child, which is what is asked here.
            let value = unsafe { place.read_volatile() };
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(value.into()) };
        }
        ensure!(child > 0, "fork failed");
        let mut status = 0;
        // SAFETY: `status` lives across the call.
        let waited = unsafe { libc::waitpid(child, &mut status, 0) };
        ensure!(waited == child, "waitpid failed");
        Ok(match libc::WIFSIGNALED(status) {
            true => format!("signal {}", libc::WTERMSIG(status)),
            false => format!("value {}", libc::WEXITSTATUS(status)),
        })
    }

    /// Uses a page of the mapping as the buffer of a read or write of another file: how many bytes went, or
    /// what went wrong.
    fn transfer(&self, offset: usize, path: &str, store: bool) -> Result<String> {
        let place = self.at(offset)?;
        let flags = if store { libc::O_WRONLY | libc::O_CREAT } else { libc::O_RDONLY };
        let path = std::ffi::CString::new(path)?;
        // SAFETY: the path is a string that lives across the call.
        let file = unsafe { libc::open(path.as_ptr(), flags, 0o600) };
        ensure!(file >= 0, "open: {}", std::io::Error::last_os_error());
        // SAFETY: the kernel checks the buffer, and writes to it what any other process might.
        let count = unsafe {
            match store {
                true => libc::write(file, place.cast(), 4096),
                false => libc::read(file, place.cast(), 4096),
            }
        };
        let error = std::io::Error::last_os_error();
        // SAFETY: opened above.
        unsafe { libc::close(file) };
        Ok(match error.raw_os_error() {
            Some(errno) if count < 0 => format!("errno {errno}"),
            _ => count.to_string(),
        })
    }

    fn sync(&self) -> Result<()> {
        // SAFETY: the whole mapping, which is still there.
        unsafe { msync(self.start.cast(), self.length, MsyncFlags::SYNC)? };
        Ok(())
    }
}

/// `get OFFSET`, `put OFFSET VALUE`, `touch OFFSET`, `sync`, `size`, `grow SIZE`, `store OFFSET FILE` and
/// `load OFFSET FILE` (the page as the buffer of a write or read): an answer a line. Ends with standard input,
/// or at `end`.
pub fn serve(path: &Path) -> Result<()> {
    let mapping = Mapping::new(path).with_context(|| path.display().to_string())?;
    println!("mapped {}", mapping.length);
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["get", offset] => println!("{}", mapping.get(offset.parse()?)?),
            ["put", offset, value] => {
                mapping.put(offset.parse()?, value.parse()?)?;
                println!("done");
            }
            ["touch", offset] => println!("{}", mapping.touch(offset.parse()?)?),
            ["store", offset, path] => {
                println!("{}", mapping.transfer(offset.parse()?, path, true)?)
            }
            ["load", offset, path] => {
                println!("{}", mapping.transfer(offset.parse()?, path, false)?)
            }
            ["end"] => return Ok(()),
            ["sync"] => {
                mapping.sync()?;
                println!("done");
            }
            ["size"] => println!("{}", mapping.file.metadata()?.len()),
            ["grow", size] => {
                mapping.file.set_len(size.parse()?)?;
                println!("done");
            }
            _ => bail!("{line:?}"),
        }
    }
    Ok(())
}
