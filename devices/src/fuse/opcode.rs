//! The operations, in one table.

use super::abi::{IN_HEADER, MAX_REQUEST, NAME_MAX, OUT_HEADER, TARGET_MAX, XATTR_MAX};

/// Whether an operation is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Never, not even with an error: FORGET and its like.
    Never,
    /// Always, with a body of at least so many bytes when it succeeds. A guest that leaves less room gets
    /// an error before anything is done.
    Body(usize),
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
}

/// Room for a fixed part and a name. Names up to [`PATH`] get as far as the decoder, which answers
/// `ENAMETOOLONG`; what is longer still is a malformed request.
const PATH: usize = 4096;

use Answer::{Body, Never};

macro_rules! opcodes {
    ($($variant:ident = $code:literal $name:literal, $least:expr, $most:expr, $answer:expr;)*) => {
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
            },)*
        ];

        /// Finds an operation by its number; `None` is answered with `ENOSYS`.
        pub fn find(code: u32) -> Option<&'static Limits> {
            match code {
                $($code => Some(
                    const {
                        &Limits {
                            opcode: Opcode::$variant,
                            name: $name,
                            least: $least,
                            most: $most,
                            answer: $answer,
                        }
                    },
                ),)*
                _ => None,
            }
        }
    };
}

opcodes! {
    Lookup        = 1  "LOOKUP",        1,  PATH,              Body(128);
    Forget        = 2  "FORGET",        8,  8,                 Never;
    Getattr       = 3  "GETATTR",       16, 16,                Body(104);
    Setattr       = 4  "SETATTR",       88, 88,                Body(104);
    Readlink      = 5  "READLINK",      0,  0,                 Body(0);
    Symlink       = 6  "SYMLINK",       2,  PATH + TARGET_MAX + 1, Body(128);
    Mknod         = 8  "MKNOD",         17, 16 + PATH,         Body(128);
    Mkdir         = 9  "MKDIR",         9,  8 + PATH,          Body(128);
    Unlink        = 10 "UNLINK",        1,  PATH,              Body(0);
    Rmdir         = 11 "RMDIR",         1,  PATH,              Body(0);
    Rename        = 12 "RENAME",        10, 8 + 2 * PATH,      Body(0);
    Link          = 13 "LINK",          9,  8 + PATH,          Body(128);
    Open          = 14 "OPEN",          8,  8,                 Body(16);
    Read          = 15 "READ",          40, 40,                Body(0);
    Write         = 16 "WRITE",         40, MAX_REQUEST - IN_HEADER, Body(8);
    Statfs        = 17 "STATFS",        0,  0,                 Body(80);
    Release       = 18 "RELEASE",       24, 24,                Body(0);
    Fsync         = 20 "FSYNC",         16, 16,                Body(0);
    Setxattr      = 21 "SETXATTR",      9,  8 + PATH + XATTR_MAX, Body(0);
    Getxattr      = 22 "GETXATTR",      9,  8 + PATH,          Body(0);
    Listxattr     = 23 "LISTXATTR",     8,  8,                 Body(0);
    Removexattr   = 24 "REMOVEXATTR",   1,  PATH,              Body(0);
    Flush         = 25 "FLUSH",         24, 24,                Body(0);
    Init          = 26 "INIT",          16, 256,               Body(8);
    Opendir       = 27 "OPENDIR",       8,  8,                 Body(16);
    Readdir       = 28 "READDIR",       40, 40,                Body(0);
    Releasedir    = 29 "RELEASEDIR",    24, 24,                Body(0);
    Fsyncdir      = 30 "FSYNCDIR",      16, 16,                Body(0);
    Getlk         = 31 "GETLK",         48, 48,                Body(24);
    Setlk         = 32 "SETLK",         48, 48,                Body(0);
    Setlkw        = 33 "SETLKW",        48, 48,                Body(0);
    Access        = 34 "ACCESS",        8,  8,                 Body(0);
    Create        = 35 "CREATE",        17, 16 + PATH,         Body(144);
    Interrupt     = 36 "INTERRUPT",     8,  8,                 Never;
    Bmap          = 37 "BMAP",          16, 16,                Body(8);
    Destroy       = 38 "DESTROY",       0,  0,                 Body(0);
    Ioctl         = 39 "IOCTL",         32, 32 + PATH,         Body(16);
    Poll          = 40 "POLL",          24, 24,                Body(8);
    NotifyReply   = 41 "NOTIFY_REPLY",  0,  MAX_REQUEST - IN_HEADER, Never;
    BatchForget   = 42 "BATCH_FORGET",  8,  MAX_REQUEST - IN_HEADER, Never;
    Fallocate     = 43 "FALLOCATE",     32, 32,                Body(0);
    Readdirplus   = 44 "READDIRPLUS",   40, 40,                Body(0);
    Rename2       = 45 "RENAME2",       18, 16 + 2 * PATH,     Body(0);
    Lseek         = 46 "LSEEK",         24, 24,                Body(8);
    CopyFileRange = 47 "COPY_FILE_RANGE", 56, 56,              Body(8);
    Setupmapping  = 48 "SETUPMAPPING",  40, 40,                Body(0);
    Removemapping = 49 "REMOVEMAPPING", 4,  4 + 65536,         Body(0);
    Syncfs        = 50 "SYNCFS",        8,  8,                 Body(0);
    Tmpfile       = 51 "TMPFILE",       17, 16 + PATH,         Body(144);
    Statx         = 52 "STATX",         24, 24,                Body(288);
}

// A name of the greatest length must be able to reach the decoder.
const _: () = assert!(PATH > NAME_MAX + 1 && OUT_HEADER == 16);

#[cfg(test)]
mod tests {
    use super::*;

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

    #[test]
    fn limits_are_in_order() {
        assert!(OPCODES.is_sorted_by_key(|limits| limits.opcode as u32));
        assert!(OPCODES.iter().all(|limits| limits.least <= limits.most));
    }
}
