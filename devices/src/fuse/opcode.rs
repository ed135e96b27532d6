//! The operations, in one table.

use super::abi::{IN_HEADER, MAX_REQUEST, NAME_MAX, OUT_HEADER, TARGET_MAX, XATTR_MAX};
use super::filesystem::FileSystem;

/// Whether an operation is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Never, not even with an error: FORGET and its like.
    Never,
    /// Always, with a body of at least so many bytes when it succeeds. A guest that leaves less room gets
    /// an error before anything is done.
    Body(usize),
}

/// Who serves an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Handler {
    /// The session itself.
    Session,
    /// The method of [`FileSystem`] of that name.
    FileSystem(&'static str),
    /// The session's DAX window, for a file that [`FileSystem::map`] opens.
    Window,
    /// Nobody: always `ENOSYS`, which a Linux guest takes once and does not ask again.
    Refused,
}

/// What is known of an operation before it is looked at.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// `opcode` of `struct fuse_in_header`.
    pub opcode: Opcode,
    /// The name without `FUSE_`.
    pub name: &'static str,
    /// The least number of bytes after the header.
    pub least: usize,
    /// The most bytes after the header. It bounds what is copied for one request.
    pub most: usize,
    /// The reply.
    pub answer: Answer,
    /// Who serves it.
    pub handler: Handler,
    /// What is taken and what is refused, or why all of it is. For the table of the README.
    pub note: &'static str,
}

/// Room for a fixed part and a name. Names up to [`PATH`] get as far as the decoder, which answers
/// `ENAMETOOLONG`; what is longer still is a malformed request.
const PATH: usize = 4096;

use Answer::{Body, Never};

macro_rules! handler {
    (session) => {
        Handler::Session
    };
    (window) => {
        Handler::Window
    };
    (refused) => {
        Handler::Refused
    };
    ($method:ident) => {{
        // Fails to compile when the trait has no such method.
        let _ = <dyn FileSystem>::$method;
        Handler::FileSystem(stringify!($method))
    }};
}

macro_rules! opcodes {
    ($($variant:ident = $code:literal $name:literal, $least:expr, $most:expr, $answer:expr,
        $handler:ident, $note:literal;)*) => {
        /// `enum fuse_opcode` of linux/fuse.h.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Opcode {
            $(#[doc = concat!("`FUSE_", $name, "`")] $variant = $code,)*
        }

        /// Every operation this server knows, by rising opcode.
        pub const OPCODES: &[Limits] = &[
            $(Limits {
                opcode: Opcode::$variant,
                name: $name,
                least: $least,
                most: $most,
                answer: $answer,
                handler: handler!($handler),
                note: $note,
            },)*
        ];

        /// Finds an operation by its number; `None` is answered with `ENOSYS`.
        pub fn find(code: u32) -> Option<&'static Limits> {
            let index = match code {
                $($code => const { index_of($code) },)*
                _ => return None,
            };
            OPCODES.get(index)
        }
    };
}

/// Where an operation is in [`OPCODES`].
const fn index_of(code: u32) -> usize {
    let mut index = 0;
    while OPCODES[index].opcode as u32 != code {
        index += 1;
    }
    index
}

opcodes! {
    Lookup        = 1  "LOOKUP",        1,  PATH,              Body(128),
        lookup, "one name of 1 to 255 bytes, neither `.` nor `..`, without `/`; so wherever a name is";
    Forget        = 2  "FORGET",        8,  8,                 Never,
        forget, "more than was given is all";
    Getattr       = 3  "GETATTR",       16, 16,                Body(104),
        getattr, "";
    Setattr       = 4  "SETATTR",       88, 88,                Body(104),
        setattr, "size below 2^63, nanoseconds below 10^9, no unknown bits: all checked before any is done";
    Readlink      = 5  "READLINK",      0,  0,                 Body(0),
        readlink, "";
    Symlink       = 6  "SYMLINK",       2,  PATH + TARGET_MAX + 1, Body(128),
        symlink, "target of 1 to 4095 bytes, stored as it is, never resolved here";
    Mknod         = 8  "MKNOD",         17, 16 + PATH,         Body(128),
        mknod, "regular files, FIFOs, sockets and overlayfs' whiteout (character device 0/0); with `dev` any device";
    Mkdir         = 9  "MKDIR",         9,  8 + PATH,          Body(128),
        mkdir, "";
    Unlink        = 10 "UNLINK",        1,  PATH,              Body(0),
        unlink, "";
    Rmdir         = 11 "RMDIR",         1,  PATH,              Body(0),
        rmdir, "";
    Rename        = 12 "RENAME",        10, 8 + 2 * PATH,      Body(0),
        rename, "";
    Link          = 13 "LINK",          9,  8 + PATH,          Body(128),
        link, "no directories";
    Open          = 14 "OPEN",          8,  8,                 Body(16),
        open, "regular files; access mode, `O_TRUNC`, `O_SYNC` and `O_DSYNC` reach the host";
    Read          = 15 "READ",          40, 40,                Body(0),
        read, "at most the room for the reply, end below 2^63";
    Write         = 16 "WRITE",         40, MAX_REQUEST - IN_HEADER, Body(8),
        write, "at most 1 MiB, and exactly the bytes that came; end below 2^63";
    Statfs        = 17 "STATFS",        0,  0,                 Body(80),
        statfs, "of the file system that the file is on";
    Release       = 18 "RELEASE",       24, 24,                Body(0),
        release, "gives up the locks that belong to the open file";
    Fsync         = 20 "FSYNC",         16, 16,                Body(0),
        fsync, "";
    Setxattr      = 21 "SETXATTR",      9,  8 + PATH + XATTR_MAX, Body(0),
        setxattr, "name of 1 to 255 bytes, value of at most 64 KiB";
    Getxattr      = 22 "GETXATTR",      9,  8 + PATH,          Body(0),
        getxattr, "";
    Listxattr     = 23 "LISTXATTR",     8,  8,                 Body(0),
        listxattr, "";
    Removexattr   = 24 "REMOVEXATTR",   1,  PATH,              Body(0),
        removexattr, "";
    Flush         = 25 "FLUSH",         24, 24,                Body(0),
        flush, "gives up the POSIX locks of the owner; tells what the host's file system says at close, as NFS does";
    Init          = 26 "INIT",          16, 256,               Body(8),
        session, "major version 7; a second one ends the session and begins another";
    Opendir       = 27 "OPENDIR",       8,  8,                 Body(16),
        opendir, "";
    Readdir       = 28 "READDIR",       40, 40,                Body(0),
        readdir, "whole entries, at most 1 MiB; cookies are the host's";
    Releasedir    = 29 "RELEASEDIR",    24, 24,                Body(0),
        releasedir, "";
    Fsyncdir      = 30 "FSYNCDIR",      16, 16,                Body(0),
        fsyncdir, "";
    Getlk         = 31 "GETLK",         48, 48,                Body(24),
        get_lock, "range below 2^63; a holder outside the guest has pid 0";
    Setlk         = 32 "SETLK",         48, 48,                Body(0),
        set_lock, "for reading, for writing or none, range below 2^63; no flag but `FUSE_LK_FLOCK`; with `locks=guest` `ENOSYS`";
    Setlkw        = 33 "SETLKW",        48, 48,                Body(0),
        set_lock, "as SETLK; waits beside its queue, at most 1024 at a time, until INTERRUPT or the session's end";
    Access        = 34 "ACCESS",        8,  8,                 Body(0),
        access, "by the mode bits; a Linux guest decides itself and does not ask";
    Create        = 35 "CREATE",        17, 16 + PATH,         Body(144),
        create, "as OPEN; what is there is only opened if it is a regular file";
    Interrupt     = 36 "INTERRUPT",     8,  8,                 Never,
        session, "ends the waiting of a SETLKW; one that comes before its request is kept in mind";
    Bmap          = 37 "BMAP",          16, 16,                Body(8),
        refused, "block numbers are of use on the block device below, and the guest has none";
    Destroy       = 38 "DESTROY",       0,  0,                 Body(0),
        session, "drops every node, handle and mapping";
    Ioctl         = 39 "IOCTL",         32, 32 + PATH,         Body(16),
        ioctl, "`FS_IOC_GETFLAGS`, `SETFLAGS`, `FSGETXATTR`, `FSSETXATTR`, of fixed size; else `ENOTTY`";
    Poll          = 40 "POLL",          24, 24,                Body(8),
        refused, "the guest then says what poll(2) says of every regular file: ready";
    NotifyReply   = 41 "NOTIFY_REPLY",  0,  MAX_REQUEST - IN_HEADER, Never,
        session, "ignored: nothing was asked";
    BatchForget   = 42 "BATCH_FORGET",  8,  MAX_REQUEST - IN_HEADER, Never,
        forget, "as many as there are, whatever the count says";
    Fallocate     = 43 "FALLOCATE",     32, 32,                Body(0),
        fallocate, "allocate, punch, zero, collapse, insert, unshare, as the host's file system can; end below 2^63";
    Readdirplus   = 44 "READDIRPLUS",   40, 40,                Body(0),
        readdir, "as READDIR; counts a lookup of every entry that it answers";
    Rename2       = 45 "RENAME2",       18, 16 + 2 * PATH,     Body(0),
        rename, "`RENAME_NOREPLACE`, `RENAME_EXCHANGE`, `RENAME_WHITEOUT`";
    Lseek         = 46 "LSEEK",         24, 24,                Body(8),
        lseek, "`SEEK_DATA` and `SEEK_HOLE`; positions are the guest's affair";
    CopyFileRange = 47 "COPY_FILE_RANGE", 56, 56,              Body(8),
        copy_file_range, "at most 64 MiB at a time, by reflink where the host can; no flags";
    Setupmapping  = 48 "SETUPMAPPING",  40, 40,                Body(0),
        window, "whole pages inside the window; to read, or to read and write";
    Removemapping = 49 "REMOVEMAPPING", 4,  4 + 65536,         Body(0),
        window, "1 to 4096 ranges, all checked before any goes";
    Syncfs        = 50 "SYNCFS",        8,  8,                 Body(0),
        syncfs, "the file system that the node is on; where mounts below are not told of, all that nodes are known of";
    Tmpfile       = 51 "TMPFILE",       17, 16 + PATH,         Body(144),
        tmpfile, "as CREATE; `EOPNOTSUPP` where the host's file system has none";
    Statx         = 52 "STATX",         24, 24,                Body(288),
        statx, "basic attributes and the birth time, of these what was asked and the host knows; a mount id is the guest's own";
    CopyFileRange64 = 53 "COPY_FILE_RANGE_64", 56, 56,         Body(8),
        copy_file_range, "as COPY_FILE_RANGE; lengths up to 2^63";
}

// A name of the greatest length must be able to reach the decoder.
const _: () = assert!(PATH > NAME_MAX + 1 && OUT_HEADER == 16);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuse::abi::ROOT_ID;

    #[test]
    fn every_opcode_is_found_by_its_number_and_no_other() {
        for code in 0..=60u32 {
            let found = find(code);
            assert_eq!(
                found.map(|limits| limits.opcode as u32),
                OPCODES.iter().map(|limits| limits.opcode as u32).find(|known| *known == code)
            );
        }
        assert!(find(u32::MAX).is_none());
        assert!(find(26 << 24).is_none(), "a big-endian INIT is unknown");
    }

    /// The table as the README has it.
    fn markdown() -> String {
        let mut text = String::from("| FUSE operation | served by | limits |\n|---|---|---|\n");
        for limits in OPCODES {
            let by = match limits.handler {
                Handler::Session => "session".to_owned(),
                Handler::FileSystem(method) => format!("`{method}`"),
                Handler::Window => "DAX window".to_owned(),
                Handler::Refused => "`ENOSYS`".to_owned(),
            };
            let (code, name, note) = (limits.opcode as u32, limits.name, limits.note);
            text.push_str(&format!("| {code} {name} | {by} | {note} |\n"));
        }
        text
    }

    #[test]
    fn the_readme_prints_this_table() {
        const BEGIN: &str = "<!-- operations: written by the tests of fuse::opcode -->\n";
        const END: &str = "<!-- end of operations -->\n";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../README.md");
        let readme = std::fs::read_to_string(path).unwrap();
        let (before, rest) = readme.split_once(BEGIN).unwrap();
        let (printed, after) = rest.split_once(END).unwrap();
        let right = markdown();
        if printed == right {
            return;
        }
        if std::env::var_os("UPDATE_README").is_some() {
            std::fs::write(path, [before, BEGIN, &right, END, after].concat()).unwrap();
            return;
        }
        panic!("README.md is behind; UPDATE_README=1 makes this test write:\n\n{right}");
    }

    #[test]
    fn what_is_refused_is_refused_by_the_session() {
        let guest = crate::fuse::testing::Guest::new();
        for limits in OPCODES.iter().filter(|limits| limits.handler == Handler::Refused) {
            let answer = guest.call(limits.opcode, ROOT_ID, &[&vec![0; limits.least]]);
            assert_eq!(answer.error, libc::ENOSYS, "{}", limits.name);
        }
    }

    #[test]
    fn limits_are_in_order() {
        assert!(OPCODES.is_sorted_by_key(|limits| limits.opcode as u32));
        assert!(OPCODES.iter().all(|limits| limits.least <= limits.most));
    }
}
