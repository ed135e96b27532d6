//! The share as a guest sees it: raw requests over a temporary directory.

mod attributes;
mod caching;
mod control;
mod directories;
mod disks;
mod escapes;
mod files;
mod identity;
mod locks;
mod mappings;
mod mounts;
mod names;
mod near;
mod races;
mod reach;
mod read_only;
mod tables;
mod xattrs;

use crate::fuse::abi::*;
use crate::fuse::opcode::Opcode;
use crate::fuse::testing::{Answer, EVERYTHING, Guest};
use crate::share::testing::Mounted;
use vm_memory::ByteValued;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn mkdir(guest: &Guest, parent: u64, name: &str, mode: u32) -> Answer {
    let body = MkdirIn { mode, umask: 0 };
    let name = [name.as_bytes(), b"\0"].concat();
    guest.call(Opcode::Mkdir, parent, &[body.as_slice(), &name])
}

fn mknod(guest: &Guest, name: &str, mode: u32, rdev: u32) -> Answer {
    let body = MknodIn { mode, rdev, ..MknodIn::default() };
    let name = [name.as_bytes(), b"\0"].concat();
    guest.call(Opcode::Mknod, ROOT_ID, &[body.as_slice(), &name])
}

fn symlink(guest: &Guest, parent: u64, name: &str, target: &str) -> Answer {
    let names = [name.as_bytes(), b"\0", target.as_bytes(), b"\0"].concat();
    guest.call(Opcode::Symlink, parent, &[&names])
}

fn rename(guest: &Guest, from: (u64, &str), to: (u64, &str), flags: u32) -> Answer {
    let body = Rename2In { newdir: to.0, flags, padding: 0 };
    let names = [from.1.as_bytes(), b"\0", to.1.as_bytes(), b"\0"].concat();
    guest.call(Opcode::Rename2, from.0, &[body.as_slice(), &names])
}

fn link(guest: &Guest, nodeid: u64, parent: u64, name: &str) -> Answer {
    let body = LinkIn { oldnodeid: nodeid };
    let name = [name.as_bytes(), b"\0"].concat();
    guest.call(Opcode::Link, parent, &[body.as_slice(), &name])
}

fn unlink(guest: &Guest, opcode: Opcode, parent: u64, name: &str) -> Answer {
    guest.call(opcode, parent, &[name.as_bytes(), b"\0"])
}

fn fallocate(guest: &Guest, nodeid: u64, fh: u64, mode: i32, offset: u64, length: u64) -> Answer {
    let body = FallocateIn { fh, offset, length, mode: mode as u32, padding: 0 };
    guest.call(Opcode::Fallocate, nodeid, &[body.as_slice()])
}

fn setxattr(guest: &Guest, nodeid: u64, name: &str, value: &[u8], flags: u32) -> Answer {
    let body = SetxattrIn { size: value.len() as u32, flags };
    let name = [name.as_bytes(), b"\0"].concat();
    guest.call(Opcode::Setxattr, nodeid, &[body.as_slice(), &name, value])
}

fn getxattr(guest: &Guest, nodeid: u64, name: &str, size: u32) -> Answer {
    let body = GetxattrIn { size, padding: 0 };
    let name = [name.as_bytes(), b"\0"].concat();
    guest.call(Opcode::Getxattr, nodeid, &[body.as_slice(), &name])
}

fn release(guest: &Guest, opcode: Opcode, nodeid: u64, fh: u64) -> Answer {
    let body = ReleaseIn { fh, ..ReleaseIn::default() };
    guest.call(opcode, nodeid, &[body.as_slice()])
}

/// Makes the file `file` on the host and looks it up.
fn file(guest: &Guest, content: &[u8]) -> u64 {
    std::fs::write(guest.path().join("file"), content).unwrap();
    guest.node("file")
}
