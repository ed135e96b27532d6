//! A hostile driver: one test for each thing that a Linux driver would never do, by the sections of
//! `docs/bad-input.md`. Each says what must come of it, and then that the device serves a good request, if need be
//! after a reset. `cargo test -p devices hostile::` runs and counts them; what takes more than a few lines (races,
//! faults of the host) is tested beside the code it concerns.

mod changes;
mod frames;
mod registers;
mod rings;
mod window;

use std::os::unix::fs::symlink;
use std::sync::Arc;

use tempfile::TempDir;

use crate::share::{Options, Share, XattrPolicy};
use crate::testing::Machine;

/// Makes a test of each case: its name, and what is given to the function that runs it.
macro_rules! cases {
    ($run:ident: $($name:ident => $case:expr;)*) => {
        $(#[test] fn $name() { $run($case); })*
    };
}
use cases;

/// What a share has in these tests: `file` with 10 bytes, `dir/inner`, a FIFO, and a symlink that leads out.
fn share(change: impl FnOnce(&mut Options)) -> (TempDir, Arc<Share>) {
    rustix::process::umask(rustix::fs::Mode::empty());
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("share");
    std::fs::create_dir_all(path.join("dir")).unwrap();
    std::fs::write(path.join("file"), "0123456789").unwrap();
    std::fs::write(path.join("dir/inner"), "inside").unwrap();
    std::fs::write(directory.path().join("secret"), "not shared").unwrap();
    symlink("../secret", path.join("link")).unwrap();
    let fifo = rustix::fs::FileType::Fifo;
    rustix::fs::mknodat(rustix::fs::CWD, path.join("fifo"), fifo, 0o666.into(), 0).unwrap();
    let mut options = Options::new(path);
    options.xattr = XattrPolicy::Mapped;
    change(&mut options);
    (directory, Arc::new(Share::new(options).unwrap()))
}

/// A file system device in front of such a share.
fn file_system() -> (TempDir, Machine) {
    let (directory, share) = share(|_| {});
    (directory, Machine::fs(share))
}
