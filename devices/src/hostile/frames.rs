//! FUSE requests with real node ids and handles through a real ring.

use std::sync::Mutex;

use libc::*;
use vm_memory::ByteValued;

use super::{cases, share};
use crate::fuse::abi::{
    BatchForgetIn, CopyFileRangeIn, FallocateIn, FileLock, ForgetOne, IoctlIn, LkIn, LseekIn,
    MknodIn, ROOT_ID, ReadIn, Rename2In, SETUPMAPPING_READ, SETUPMAPPING_WRITE, SetattrIn,
    SetattrValid, SetupmappingIn, WriteIn,
};
use crate::fuse::opcode::Opcode;
use crate::share::Options;
use crate::sync::lock;
use crate::testing::{Machine, init, request};
use crate::virtio::testing::DriverQueue;

/// A guest that knows its share: the nodes of the file, the directory, the FIFO and the symlink, and a handle of
/// each of the first two.
struct Guest {
    machine: Machine,
    queue: Mutex<DriverQueue>,
    directory: tempfile::TempDir,
    file: u64,
    dir: u64,
    fifo: u64,
    link: u64,
    fh: u64,
    dh: u64,
}

impl Guest {
    fn new(change: fn(&mut Options)) -> Self {
        let (directory, share) = share(change);
        let machine = Machine::fs(share);
        let queue = machine.driver.start(0, &[(1, 8)]).remove(0);
        let mut guest = Self {
            machine,
            queue: Mutex::new(queue),
            directory,
            file: 0,
            dir: 0,
            fifo: 0,
            link: 0,
            fh: 0,
            dh: 0,
        };
        assert_eq!(guest.raw(&init(u64::MAX)).0, 0);
        let node = |name: &[u8]| guest.word(Opcode::Lookup, ROOT_ID, &[name, b"\0"].concat());
        let (file, dir, fifo, link) = (node(b"file"), node(b"dir"), node(b"fifo"), node(b"link"));
        let fh = guest.word(Opcode::Open, file, &[2, 0, 0, 0, 0, 0, 0, 0]);
        let fh = if fh == 0 { guest.word(Opcode::Open, file, &[0; 8]) } else { fh };
        let dh = guest.word(Opcode::Opendir, dir, &[0; 8]);
        (guest.file, guest.dir, guest.fifo, guest.link) = (file, dir, fifo, link);
        (guest.fh, guest.dh) = (fh, dh);
        guest
    }

    /// Error and body of the reply to these bytes; no reply is an error of 0 without a body.
    fn raw(&self, bytes: &[u8]) -> (i32, Vec<u8>) {
        let mut reply = self.machine.serve(&mut lock(&self.queue), 1, bytes, 0x2000);
        if reply.is_empty() {
            return (0, reply);
        }
        assert_eq!(u32::from_ne_bytes(reply[..4].try_into().unwrap()) as usize, reply.len());
        if let Some(unique) = bytes.get(8..16) {
            assert_eq!(&reply[8..16], unique);
        }
        let error = i32::from_ne_bytes(reply[4..8].try_into().unwrap());
        assert!(error == 0 || reply.len() == 16);
        (-error, reply.split_off(16))
    }

    /// The errno of a request.
    fn errno(&self, opcode: Opcode, node: u64, body: &[u8]) -> i32 {
        self.raw(&request(opcode, node, 99, body)).0
    }

    /// The first word of the reply to a request.
    fn word(&self, opcode: Opcode, node: u64, body: &[u8]) -> u64 {
        let (_, reply) = self.raw(&request(opcode, node, 99, body));
        reply.get(..8).map_or(0, |word| u64::from_ne_bytes(word.try_into().unwrap()))
    }

    /// Every name that is none, in front of which stands `before` and behind it `after`.
    #[track_caller]
    fn refuses_names(&self, opcode: Opcode, before: &[u8], after: &[u8]) {
        let long = vec![b'x'; 256];
        let names: [(&[u8], i32); 9] = [
            (b"", EINVAL),
            (b".", EINVAL),
            (b"..", EINVAL),
            (b"/", EINVAL),
            (b"/etc/passwd", EINVAL),
            (b"dir/inner", EINVAL),
            (b"../secret", EINVAL),
            (b"file/", EINVAL),
            (&long, ENAMETOOLONG),
        ];
        for (name, errno) in names {
            let body = [before, name, b"\0", after].concat();
            assert_eq!(self.errno(opcode, ROOT_ID, &body), errno, "{}", name.escape_ascii());
        }
        // One that does not end, and one that ends twice.
        assert_eq!(self.errno(opcode, ROOT_ID, &[before, b"new"].concat()), EINVAL);
        let twice = [before, b"new\0\0", after].concat();
        assert_eq!(self.errno(opcode, ROOT_ID, &twice), EINVAL);
    }

    /// What is shared is as it was, and so is what is beside it.
    fn nothing_has_changed(&self) {
        let path = self.directory.path();
        assert_eq!(std::fs::read(path.join("secret")).unwrap(), b"not shared");
        assert_eq!(std::fs::read(path.join("share/file")).unwrap(), b"0123456789");
        assert_eq!(std::fs::read_dir(path).unwrap().count(), 2, "nothing is beside the share");
        assert_eq!(std::fs::read_dir(path.join("share")).unwrap().count(), 4);
        assert_eq!(std::fs::read_dir(path.join("share/dir")).unwrap().count(), 1);
    }

    fn finish(&self) {
        // The session goes on.
        assert_eq!(self.errno(Opcode::Getattr, ROOT_ID, &[0; 16]), 0);
        self.machine.still_works();
    }
}

/// A guest that tries something by which nothing changes.
fn attempt(case: fn(&Guest)) {
    let guest = Guest::new(|_| {});
    case(&guest);
    guest.nothing_has_changed();
    guest.finish();
}

/// The same on a share that is read-only.
fn attempt_read_only(case: fn(&Guest)) {
    let guest = Guest::new(|options| options.read_only = true);
    case(&guest);
    guest.nothing_has_changed();
    guest.finish();
}

fn read(fh: u64, offset: u64, size: u32) -> ReadIn {
    ReadIn { fh, offset, size, ..ReadIn::default() }
}

fn write(fh: u64, offset: u64, size: u32, data: &[u8]) -> Vec<u8> {
    let head = WriteIn { fh, offset, size, ..WriteIn::default() };
    [head.as_slice(), data].concat()
}

fn setattr(valid: SetattrValid, change: impl FnOnce(&mut SetattrIn)) -> SetattrIn {
    let mut body = SetattrIn { valid: valid.bits(), ..SetattrIn::default() };
    change(&mut body);
    body
}

fn mapping(flags: u64, foffset: u64, len: u64, moffset: u64) -> SetupmappingIn {
    SetupmappingIn { fh: u64::MAX, foffset, len, flags, moffset }
}

fn lock_of(guest: &Guest, start: u64, end: u64, kind: u32, flags: u32) -> LkIn {
    let lk = FileLock { start, end, type_: kind, pid: 1 };
    LkIn { fh: guest.fh, owner: 1, lk, lk_flags: flags, padding: 0 }
}

fn allocation(guest: &Guest, offset: u64, length: u64, mode: u32) -> FallocateIn {
    FallocateIn { fh: guest.fh, offset, length, mode, padding: 0 }
}

fn copy(guest: &Guest, fh_out: u64, len: u64, flags: u64) -> CopyFileRangeIn {
    CopyFileRangeIn {
        fh_in: guest.fh,
        nodeid_out: guest.file,
        fh_out,
        len,
        flags,
        ..CopyFileRangeIn::default()
    }
}

/// The operations that have a handle first, and the rest of their bodies.
fn with_handle(fh: u64) -> Vec<(Opcode, Vec<u8>)> {
    let rest = |len: usize| [&fh.to_ne_bytes()[..], &vec![0; len]].concat();
    vec![
        (Opcode::Read, read(fh, 0, 10).as_slice().to_vec()),
        (Opcode::Write, write(fh, 0, 1, b"x")),
        (Opcode::Release, rest(16)),
        (Opcode::Flush, rest(16)),
        (Opcode::Fsync, rest(8)),
        (
            Opcode::Fallocate,
            FallocateIn { fh, length: 1, ..FallocateIn::default() }.as_slice().to_vec(),
        ),
        (
            Opcode::Lseek,
            LseekIn { fh, whence: SEEK_DATA as u32, ..LseekIn::default() }.as_slice().to_vec(),
        ),
    ]
}

const PAGE: u64 = 4096;

cases! { attempt:
    names_to_look_up_that_are_none => |guest| guest.refuses_names(Opcode::Lookup, &[], &[]);
    names_to_make_directories_of_that_are_none => |guest| guest.refuses_names(Opcode::Mkdir, &[0; 8], &[]);
    names_to_make_nodes_of_that_are_none => |guest| {
        let body = MknodIn { mode: S_IFREG | 0o600, ..MknodIn::default() };
        guest.refuses_names(Opcode::Mknod, body.as_slice(), &[]);
    };
    names_to_create_that_are_none => |guest| {
        let body = [O_RDWR as u32, 0o600, 0, 0].map(u32::to_ne_bytes).concat();
        guest.refuses_names(Opcode::Create, &body, &[]);
    };
    names_of_symlinks_that_are_none => |guest| guest.refuses_names(Opcode::Symlink, &[], b"target\0");
    names_to_link_to_that_are_none => |guest| guest.refuses_names(Opcode::Link, &guest.file.to_ne_bytes(), &[]);
    names_to_unlink_that_are_none => |guest| guest.refuses_names(Opcode::Unlink, &[], &[]);
    names_of_directories_to_remove_that_are_none => |guest| guest.refuses_names(Opcode::Rmdir, &[], &[]);
    old_names_that_are_none => |guest| guest.refuses_names(Opcode::Rename, &ROOT_ID.to_ne_bytes(), b"new\0");
    new_names_that_are_none => |guest| {
        guest.refuses_names(Opcode::Rename, &[&ROOT_ID.to_ne_bytes()[..], b"file\0"].concat(), &[]);
    };
    old_names_of_an_exchange_that_are_none => |guest| {
        let body = Rename2In { newdir: ROOT_ID, flags: RENAME_EXCHANGE, padding: 0 };
        guest.refuses_names(Opcode::Rename2, body.as_slice(), b"file\0");
    };
    new_names_of_an_exchange_that_are_none => |guest| {
        let body = Rename2In { newdir: ROOT_ID, flags: RENAME_EXCHANGE, padding: 0 };
        guest.refuses_names(Opcode::Rename2, &[body.as_slice(), b"file\0"].concat(), &[]);
    };
    operations_before_an_init => |guest| {
        guest.errno(Opcode::Destroy, 0, &[]);
        for opcode in [Opcode::Lookup, Opcode::Getattr, Opcode::Statfs] {
            let body: &[u8] = match opcode {
                Opcode::Lookup => b"file\0",
                Opcode::Getattr => &[0; 16],
                _ => &[],
            };
            assert_eq!(guest.errno(opcode, ROOT_ID, body), EIO);
        }
        assert_eq!(guest.raw(&init(u64::MAX)).0, 0);
    };
    nodes_of_the_session_before => |guest| {
        assert_eq!(guest.raw(&init(u64::MAX)).0, 0, "a second INIT");
        assert_eq!(guest.errno(Opcode::Getattr, guest.file, &[0; 16]), ESTALE);
        assert_eq!(guest.errno(Opcode::Read, guest.file, read(guest.fh, 0, 10).as_slice()), EBADF);
    };
    operations_that_there_are_not => |guest| {
        for code in [0u32, 7, 19, 54, 100, 4095, 4096, u32::MAX] {
            let mut bytes = request(Opcode::Getattr, ROOT_ID, 5, &[0; 16]);
            bytes[4..8].copy_from_slice(&code.to_ne_bytes());
            assert_eq!(guest.raw(&bytes).0, ENOSYS, "{code}");
        }
    };
    lengths_that_are_not_those_of_the_request => |guest| {
        for len in [0u32, 1, 39, 40, 55, 57, 4096, u32::MAX] {
            let mut bytes = request(Opcode::Getattr, ROOT_ID, 5, &[0; 16]);
            bytes[..4].copy_from_slice(&len.to_ne_bytes());
            assert_eq!(guest.raw(&bytes).0, EINVAL, "{len}");
        }
    };
    requests_that_are_cut_anywhere => |guest| {
        let whole = request(Opcode::Getattr, ROOT_ID, 5, &[0; 16]);
        for len in 1..whole.len() {
            let reply = guest.machine.serve(&mut lock(&guest.queue), 1, &whole[..len], 256);
            assert_eq!((reply.len(), &reply[4..8]), (16, &(-EINVAL).to_ne_bytes()[..]), "{len}");
        }
    };
    nodes_that_were_never_given => |guest| {
        for node in [0, 77, 1 << 44, 1 << 63, u64::MAX] {
            assert_eq!(guest.errno(Opcode::Getattr, node, &[0; 16]), ENOENT, "{node:#x}");
            assert_eq!(guest.errno(Opcode::Lookup, node, b"file\0"), ENOENT);
            assert_eq!(guest.errno(Opcode::Link, ROOT_ID, &[&node.to_ne_bytes()[..], b"new\0"].concat()), ENOENT);
        }
    };
    a_node_that_was_forgotten => |guest| {
        for node in [guest.fifo, guest.link] {
            guest.errno(Opcode::Forget, node, &u64::MAX.to_ne_bytes());
            assert_eq!(guest.errno(Opcode::Getattr, node, &[0; 16]), ESTALE);
        }
    };
    the_root_forgotten => |guest| {
        guest.errno(Opcode::Forget, ROOT_ID, &u64::MAX.to_ne_bytes());
        assert_eq!(guest.errno(Opcode::Getattr, ROOT_ID, &[0; 16]), 0);
    };
    more_forgotten_than_there_are => |guest| {
        let head = BatchForgetIn { count: u32::MAX, dummy: 0 };
        let one = ForgetOne { nodeid: guest.link, nlookup: u64::MAX };
        let body = [head.as_slice(), one.as_slice(), &[0xff; 7]].concat();
        assert_eq!(guest.errno(Opcode::BatchForget, 0, &body), 0, "no reply");
        assert_eq!(guest.errno(Opcode::Readlink, guest.link, &[]), ESTALE);
    };
    handles_that_were_never_given => |guest| {
        for fh in [0, 77, guest.fh + 1000, guest.fh | 1 << 40, u64::MAX] {
            for (opcode, body) in with_handle(fh) {
                assert_eq!(guest.errno(opcode, guest.file, &body), EBADF, "{opcode:?} {fh:#x}");
            }
        }
    };
    a_handle_that_was_closed => |guest| {
        let close = [&guest.fh.to_ne_bytes()[..], &[0; 16]].concat();
        assert_eq!(guest.errno(Opcode::Release, guest.file, &close), 0);
        for (opcode, body) in with_handle(guest.fh) {
            assert_eq!(guest.errno(opcode, guest.file, &body), EBADF, "{opcode:?}");
        }
    };
    a_handle_of_another_node => |guest| {
        for (opcode, body) in with_handle(guest.fh) {
            assert_eq!(guest.errno(opcode, guest.link, &body), EBADF, "{opcode:?}");
        }
    };
    a_directorys_handle_for_a_file => |guest| {
        for (opcode, body) in with_handle(guest.dh) {
            assert_eq!(guest.errno(opcode, guest.dir, &body), EBADF, "{opcode:?}");
        }
    };
    a_files_handle_for_a_directory => |guest| {
        let body = read(guest.fh, 0, 4096);
        for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
            assert_eq!(guest.errno(opcode, guest.file, body.as_slice()), ENOTDIR);
            assert_eq!(guest.errno(opcode, guest.dir, body.as_slice()), EBADF);
        }
    };
    a_file_where_a_directory_should_be => |guest| {
        assert_eq!(guest.errno(Opcode::Lookup, guest.file, b"x\0"), ENOTDIR);
        assert_eq!(guest.errno(Opcode::Mkdir, guest.file, b"\0\0\0\0\0\0\0\0x\0"), ENOTDIR);
        assert_eq!(guest.errno(Opcode::Opendir, guest.file, &[0; 8]), ENOTDIR);
        assert_eq!(guest.errno(Opcode::Unlink, guest.file, b"x\0"), ENOTDIR);
    };
    a_symlink_where_a_directory_should_be => |guest| {
        assert_eq!(guest.errno(Opcode::Lookup, guest.link, b"secret\0"), ENOTDIR);
        assert_eq!(guest.errno(Opcode::Opendir, guest.link, &[0; 8]), ENOTDIR);
    };
    what_is_no_file_opened => |guest| {
        for flags in [O_RDONLY, O_WRONLY, O_RDWR, O_NONBLOCK, O_PATH, O_DIRECTORY, -1] {
            let body = [&flags.to_ne_bytes()[..], &[0; 4]].concat();
            for node in [guest.fifo, guest.link, guest.dir] {
                assert_ne!(guest.errno(Opcode::Open, node, &body), 0, "{flags:#o} {node}");
            }
        }
    };
    device_nodes_made => |guest| {
        for (mode, rdev) in [(S_IFBLK, 0x800), (S_IFCHR, 0x103), (S_IFBLK, 0), (S_IFCHR, u32::MAX)] {
            let body = MknodIn { mode: mode | 0o666, rdev, ..MknodIn::default() };
            let body = [body.as_slice(), b"device\0"].concat();
            assert_eq!(guest.errno(Opcode::Mknod, ROOT_ID, &body), EPERM, "{mode:#o} {rdev:#x}");
        }
    };
    nodes_of_no_kind_made => |guest| {
        for mode in [S_IFDIR, S_IFLNK, 0o170000, 0o030000, u32::MAX] {
            let body = MknodIn { mode, ..MknodIn::default() };
            let body = [body.as_slice(), b"nothing\0"].concat();
            let errno = guest.errno(Opcode::Mknod, ROOT_ID, &body);
            assert!(errno == EINVAL || errno == EPERM, "{mode:#o}: {errno}");
        }
    };
    a_directory_linked => |guest| {
        let body = [&guest.dir.to_ne_bytes()[..], b"again\0"].concat();
        assert_eq!(guest.errno(Opcode::Link, ROOT_ID, &body), EPERM);
    };
    symlinks_with_no_target_or_one_too_long => |guest| {
        assert_eq!(guest.errno(Opcode::Symlink, ROOT_ID, b"new\0\0"), ENOENT);
        assert_eq!(guest.errno(Opcode::Symlink, ROOT_ID, b"new\0target"), EINVAL);
        let body = [b"new\0".as_slice(), &[b'x'; 4000], &[b'y'; 96], b"\0"].concat();
        assert_ne!(guest.errno(Opcode::Symlink, ROOT_ID, &body), 0);
    };
    renames_with_flags_that_there_are_not => |guest| {
        for flags in [8, 1 << 31, u32::MAX, RENAME_EXCHANGE | RENAME_NOREPLACE] {
            let body = Rename2In { newdir: ROOT_ID, flags, padding: 0 };
            let body = [body.as_slice(), b"file\0new\0"].concat();
            assert_eq!(guest.errno(Opcode::Rename2, ROOT_ID, &body), EINVAL, "{flags:#x}");
        }
    };
    a_directory_moved_into_itself => |guest| {
        let body = [&guest.dir.to_ne_bytes()[..], b"dir\0deeper\0"].concat();
        assert_eq!(guest.errno(Opcode::Rename, ROOT_ID, &body), EINVAL);
    };
    reads_beyond_the_end_of_offsets => |guest| {
        for (offset, size) in [(1 << 63, 1), (u64::MAX, 1), (i64::MAX as u64, 2), (i64::MAX as u64 - 1, u32::MAX)] {
            assert_eq!(guest.errno(Opcode::Read, guest.file, read(guest.fh, offset, size).as_slice()), EINVAL, "{offset:#x}");
        }
    };
    reads_of_more_than_there_is_room_for => |guest| {
        let (error, data) = guest.raw(&request(Opcode::Read, guest.file, 3, read(guest.fh, 0, u32::MAX).as_slice()));
        assert_eq!((error, &data[..]), (0, &b"0123456789"[..]));
    };
    writes_beyond_the_end_of_offsets => |guest| {
        for offset in [i64::MAX as u64, 1 << 63, u64::MAX] {
            let errno = guest.errno(Opcode::Write, guest.file, &write(guest.fh, offset, 1, b"x"));
            assert!(errno == EINVAL || errno == EFBIG, "{offset:#x}: {errno}");
        }
    };
    writes_of_another_size_than_there_is_data => |guest| {
        for size in [0, 1, 3, 4096, u32::MAX] {
            assert_eq!(guest.errno(Opcode::Write, guest.file, &write(guest.fh, 0, size, b"xx")), EINVAL, "{size}");
        }
    };
    sizes_that_no_file_has => |guest| {
        for size in [1 << 63, u64::MAX] {
            let body = setattr(SetattrValid::SIZE, |body| body.size = size);
            let errno = guest.errno(Opcode::Setattr, guest.file, body.as_slice());
            assert!(errno == EINVAL || errno == EFBIG, "{size:#x}: {errno}");
        }
    };
    times_that_are_none => |guest| {
        for valid in [SetattrValid::ATIME, SetattrValid::MTIME] {
            let body = setattr(valid, |body| (body.atimensec, body.mtimensec) = (1_000_000_000, u32::MAX));
            assert_eq!(guest.errno(Opcode::Setattr, guest.file, body.as_slice()), EINVAL);
        }
    };
    attributes_that_there_are_not => |guest| {
        for valid in [1 << 12, 1 << 31] {
            let body = SetattrIn { valid, ..SetattrIn::default() };
            assert_eq!(guest.errno(Opcode::Setattr, guest.file, body.as_slice()), EINVAL, "{valid:#x}");
        }
    };
    the_size_of_what_has_none => |guest| {
        let body = setattr(SetattrValid::SIZE, |_| {});
        for node in [guest.dir, guest.fifo, guest.link] {
            assert_ne!(guest.errno(Opcode::Setattr, node, body.as_slice()), 0);
        }
    };
    listings_from_cookies_that_are_made_up => |guest| {
        for offset in [1, 77, 1 << 32, i64::MAX as u64, 1 << 63, u64::MAX] {
            for opcode in [Opcode::Readdir, Opcode::Readdirplus] {
                // Whatever it is, it is one reply.
                guest.errno(opcode, guest.dir, read(guest.dh, offset, 4096).as_slice());
            }
        }
    };
    listings_without_room => |guest| {
        for size in [0, 1, 23] {
            assert_eq!(guest.errno(Opcode::Readdir, guest.dir, read(guest.dh, 0, size).as_slice()), EINVAL, "{size}");
        }
    };
    attributes_of_the_hosts_security => |guest| {
        for name in ["security.selinux", "security.ima", "system.none", "oriel", "user.oriel.x"] {
            let body = [&1u32.to_ne_bytes()[..], &[0; 4], name.as_bytes(), b"\0x"].concat();
            guest.errno(Opcode::Setxattr, guest.file, &body);
            let path = guest.directory.path().join("share/file");
            let mut value = [0; 16];
            assert!(rustix::fs::getxattr(path, name, &mut value[..]).is_err(), "{name} is the host's");
        }
    };
    values_of_attributes_that_are_not_there => |guest| {
        for size in [2u32, 65536, 65537, u32::MAX] {
            let body = [&size.to_ne_bytes()[..], &[0; 4], b"user.x\0v"].concat();
            assert_ne!(guest.errno(Opcode::Setxattr, guest.file, &body), 0, "{size}");
        }
    };
    locks_that_are_none => |guest| {
        for (start, end, kind, flags) in [
            (2, 1, F_WRLCK as u32, 0),
            (1 << 63, u64::MAX, F_WRLCK as u32, 0),
            (0, 1, 3, 0),
            (0, 1, u32::MAX, 0),
            (0, 1, F_RDLCK as u32, 2),
            (0, 1, F_RDLCK as u32, u32::MAX),
        ] {
            let body = lock_of(guest, start, end, kind, flags);
            for opcode in [Opcode::Setlk, Opcode::Setlkw] {
                assert_eq!(guest.errno(opcode, guest.file, body.as_slice()), EINVAL, "{start} {end} {kind} {flags}");
            }
        }
    };
    allocations_that_are_none => |guest| {
        for (offset, length, mode) in [(0, 0, 0), (1 << 63, 1, 0), (i64::MAX as u64, 1, 0), (u64::MAX, u64::MAX, 0), (0, 1, 1 << 20), (0, 1, u32::MAX)] {
            let body = allocation(guest, offset, length, mode);
            assert_ne!(guest.errno(Opcode::Fallocate, guest.file, body.as_slice()), 0, "{offset} {length} {mode}");
        }
    };
    seeks_that_are_none => |guest| {
        for whence in [5, 9, u32::MAX] {
            let body = LseekIn { fh: guest.fh, offset: 0, whence, padding: 0 };
            assert_eq!(guest.errno(Opcode::Lseek, guest.file, body.as_slice()), EINVAL, "{whence}");
        }
    };
    copies_with_flags_or_a_handle_that_there_is_not => |guest| {
        assert_eq!(guest.errno(Opcode::CopyFileRange, guest.file, copy(guest, guest.fh, 1, 1).as_slice()), EINVAL);
        assert_eq!(guest.errno(Opcode::CopyFileRange, guest.file, copy(guest, 1 << 50, 1, 0).as_slice()), EBADF);
        assert_eq!(guest.errno(Opcode::CopyFileRange, guest.file, copy(guest, guest.dh, 1, 0).as_slice()), EBADF);
    };
    ioctls_that_are_not_for_guests => |guest| {
        // FS_IOC_FIEMAP, FICLONE, FIFREEZE, BLKDISCARD, TIOCSTI, and no number at all.
        for cmd in [0xc020_660b, 0x4004_9409, 0xc004_5877, 0x1277, 0x5412, 0, u32::MAX] {
            let body = IoctlIn { fh: guest.fh, cmd, in_size: 4, out_size: 64, ..IoctlIn::default() };
            let body = [body.as_slice(), &[0; 4]].concat();
            assert_eq!(guest.errno(Opcode::Ioctl, guest.file, &body), ENOTTY, "{cmd:#x}");
        }
    };
    ioctls_that_ask_for_memory => |guest| {
        let body = IoctlIn { fh: guest.fh, flags: 2, cmd: 0x8008_6601, in_size: u32::MAX, out_size: u32::MAX, ..IoctlIn::default() };
        assert_ne!(guest.errno(Opcode::Ioctl, guest.file, body.as_slice()), 0);
    };
    what_is_refused_as_a_whole => |guest| {
        assert_eq!(guest.errno(Opcode::Bmap, guest.file, &[0; 16]), ENOSYS);
        assert_eq!(guest.errno(Opcode::Poll, guest.file, &[0; 24]), ENOSYS);
    };
    interrupts_of_nothing => |guest| {
        for unique in 0..200u64 {
            assert_eq!(guest.errno(Opcode::Interrupt, 0, &unique.to_ne_bytes()), 0, "no reply");
        }
    };
    answers_to_what_was_not_asked => |guest| {
        assert_eq!(guest.errno(Opcode::NotifyReply, ROOT_ID, &[0xff; 100]), 0, "no reply");
    };
    mappings_that_are_none => |guest| {
        for (foffset, len, moffset) in [
            (0, 0, 0), (1, PAGE, 0), (0, PAGE + 1, 0), (0, PAGE, 1), (0, PAGE, 4 << 20),
            (0, 8 << 20, 0), (0, !(PAGE - 1), PAGE), (1 << 63, PAGE, 0), (!(PAGE - 1), PAGE, 0),
        ] {
            let body = mapping(SETUPMAPPING_READ, foffset, len, moffset);
            assert_eq!(guest.errno(Opcode::Setupmapping, guest.file, body.as_slice()), EINVAL, "{foffset:#x} {len:#x} {moffset:#x}");
        }
    };
    mappings_for_nothing_or_for_what_there_is_not => |guest| {
        for flags in [0, SETUPMAPPING_WRITE, 4, SETUPMAPPING_READ | 8, u64::MAX] {
            let body = mapping(flags, 0, PAGE, 0);
            assert_eq!(guest.errno(Opcode::Setupmapping, guest.file, body.as_slice()), EINVAL, "{flags:#x}");
        }
    };
    mappings_of_what_is_no_file => |guest| {
        for node in [guest.dir, guest.fifo, guest.link, ROOT_ID] {
            let body = mapping(SETUPMAPPING_READ, 0, PAGE, 0);
            assert_eq!(guest.errno(Opcode::Setupmapping, node, body.as_slice()), EINVAL, "{node}");
        }
    };
    removals_of_no_range_or_of_more_than_came => |guest| {
        for count in [0u32, 2, 4097, u32::MAX] {
            let body = [&count.to_ne_bytes()[..], &0u64.to_ne_bytes(), &PAGE.to_ne_bytes()].concat();
            assert_eq!(guest.errno(Opcode::Removemapping, guest.file, &body), EINVAL, "{count}");
        }
    };
    removals_of_what_is_no_range => |guest| {
        for (moffset, len) in [(1, PAGE), (0, 1), (0, 0), (4 << 20, PAGE), (0, 8 << 20), (!(PAGE - 1), PAGE)] {
            let body = [&1u32.to_ne_bytes()[..], &u64::to_ne_bytes(moffset), &u64::to_ne_bytes(len)].concat();
            assert_eq!(guest.errno(Opcode::Removemapping, guest.file, &body), EINVAL, "{moffset:#x} {len:#x}");
        }
    };
}

mod read_only {
    use super::*;

    fn refuses(guest: &Guest, opcode: Opcode, node: u64, body: &[u8]) {
        assert_eq!(guest.errno(opcode, node, body), EROFS, "{opcode:?}");
    }

    cases! { attempt_read_only:
        a_file_is_not_opened_to_write => |guest| {
            for flags in [O_WRONLY, O_RDWR, O_RDONLY | O_TRUNC] {
                refuses(guest, Opcode::Open, guest.file, &[&flags.to_ne_bytes()[..], &[0; 4]].concat());
            }
        };
        nothing_is_made => |guest| {
            refuses(guest, Opcode::Mkdir, ROOT_ID, b"\xff\x01\0\0\0\0\0\0new\0");
            let body = MknodIn { mode: S_IFREG | 0o600, ..MknodIn::default() };
            refuses(guest, Opcode::Mknod, ROOT_ID, &[body.as_slice(), b"new\0"].concat());
            refuses(guest, Opcode::Symlink, ROOT_ID, b"new\0target\0");
            let create = [O_RDWR as u32, 0o600, 0, 0].map(u32::to_ne_bytes).concat();
            refuses(guest, Opcode::Create, ROOT_ID, &[&create[..], b"new\0"].concat());
            refuses(guest, Opcode::Tmpfile, ROOT_ID, &[&create[..], b"new\0"].concat());
            refuses(guest, Opcode::Link, ROOT_ID, &[&guest.file.to_ne_bytes()[..], b"new\0"].concat());
        };
        nothing_is_removed_or_moved => |guest| {
            refuses(guest, Opcode::Unlink, ROOT_ID, b"file\0");
            refuses(guest, Opcode::Rmdir, ROOT_ID, b"dir\0");
            refuses(guest, Opcode::Rename, ROOT_ID, &[&ROOT_ID.to_ne_bytes()[..], b"file\0new\0"].concat());
        };
        no_attribute_changes => |guest| {
            for valid in [SetattrValid::MODE, SetattrValid::SIZE, SetattrValid::MTIME_NOW | SetattrValid::MTIME] {
                refuses(guest, Opcode::Setattr, guest.file, setattr(valid, |_| {}).as_slice());
            }
            refuses(guest, Opcode::Setxattr, guest.file, &[&1u32.to_ne_bytes()[..], &[0; 4], b"user.x\0v"].concat());
            refuses(guest, Opcode::Removexattr, guest.file, b"user.x\0");
        };
        nothing_is_written_through_a_handle_to_read => |guest| {
            for (opcode, body) in [
                (Opcode::Write, write(guest.fh, 0, 1, b"x")),
                (Opcode::Fallocate, allocation(guest, 0, 100, 0).as_slice().to_vec()),
                (Opcode::CopyFileRange, copy(guest, guest.fh, 1, 0).as_slice().to_vec()),
            ] {
                let errno = guest.errno(opcode, guest.file, &body);
                assert!(errno == EROFS || errno == EBADF, "{opcode:?}: {errno}");
            }
        };
        no_mapping_is_writable => |guest| {
            let body = mapping(SETUPMAPPING_READ | SETUPMAPPING_WRITE, 0, PAGE, 0);
            refuses(guest, Opcode::Setupmapping, guest.file, body.as_slice());
        };
    }
}
