use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, symlink as host_symlink};

use super::*;

#[test]
fn a_lookup_finds_what_is_there_with_its_attributes() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), "hello").unwrap();
    let entry: EntryOut = guest.lookup(ROOT_ID, "file").get();
    let host = std::fs::metadata(guest.path().join("file")).unwrap();
    assert_eq!((entry.attr.ino, entry.attr.size), (host.ino(), 5));
    assert_eq!((entry.attr.mode, entry.attr.nlink), (host.mode(), 1));
    assert_eq!(
        (entry.attr.mtime, entry.attr.mtimensec),
        (host.mtime() as u64, host.mtime_nsec() as u32)
    );
    assert_eq!((entry.entry_valid, entry.attr_valid), (1, 1));
    assert_eq!(entry.attr.flags, ATTR_DAX);
    assert_eq!(guest.lookup(ROOT_ID, "missing").error, libc::ENOENT);
    assert_eq!(guest.lookup(entry.nodeid, "below").error, libc::ENOTDIR);
}

#[test]
fn names_of_any_encoding_work() {
    let guest = Guest::new();
    let name = std::ffi::OsStr::from_bytes(b"\xff\x80 \n");
    std::fs::write(guest.path().join(name), "").unwrap();
    let found = guest.call(Opcode::Lookup, ROOT_ID, &[b"\xff\x80 \n\0"]);
    assert_eq!(found.error, 0);
}

#[test]
fn everything_can_be_made_and_removed() {
    let guest = Guest::new();
    let entry: EntryOut = mkdir(&guest, ROOT_ID, "d", 0o751).get();
    assert_eq!(entry.attr.mode, libc::S_IFDIR | 0o751);
    assert_eq!(mkdir(&guest, ROOT_ID, "d", 0o755).error, libc::EEXIST);

    for (name, kind) in
        [("fifo", libc::S_IFIFO), ("socket", libc::S_IFSOCK), ("regular", libc::S_IFREG)]
    {
        let entry: EntryOut = mknod(&guest, name, kind | 0o640, 0).get();
        assert_eq!(entry.attr.mode, kind | 0o640);
        // Only the regular file can be opened; the host never waits for a FIFO's other end.
        let expected = if kind == libc::S_IFREG { 0 } else { libc::EACCES };
        assert_eq!(guest.open(entry.nodeid, libc::O_RDWR).error, expected);
    }
    let fifo = std::fs::symlink_metadata(guest.path().join("fifo")).unwrap();
    assert!(fifo.file_type().is_fifo());

    let entry: EntryOut = symlink(&guest, entry.nodeid, "s", "/anywhere/../at all").get();
    let target = guest.call(Opcode::Readlink, entry.nodeid, &[]);
    assert_eq!(target.body, b"/anywhere/../at all");
    assert_eq!(guest.call(Opcode::Readlink, ROOT_ID, &[]).error, libc::EINVAL);
    assert_eq!(symlink(&guest, ROOT_ID, "empty", "").error, libc::ENOENT);

    assert_eq!(unlink(&guest, Opcode::Rmdir, ROOT_ID, "d").error, libc::ENOTEMPTY);
    assert_eq!(unlink(&guest, Opcode::Unlink, ROOT_ID, "d").error, libc::EISDIR);
    assert_eq!(unlink(&guest, Opcode::Rmdir, ROOT_ID, "fifo").error, libc::ENOTDIR);
    let d = guest.node("d");
    unlink(&guest, Opcode::Unlink, d, "s").ok();
    unlink(&guest, Opcode::Rmdir, ROOT_ID, "d").ok();
    assert!(!guest.path().join("d").exists());
}

#[test]
fn device_nodes_are_refused_but_whiteouts_are_not() {
    let guest = Guest::new();
    for kind in [libc::S_IFCHR, libc::S_IFBLK] {
        assert_eq!(mknod(&guest, "dev", kind | 0o666, 0x103).error, libc::EPERM);
    }
    assert_eq!(mknod(&guest, "dev", libc::S_IFBLK, 0).error, libc::EPERM);
    assert_eq!(mknod(&guest, "dev", libc::S_IFDIR, 0).error, libc::EINVAL);
    assert_eq!(mknod(&guest, "dev", libc::S_IFLNK, 0).error, libc::EINVAL);
    assert_eq!(mknod(&guest, "dev", libc::S_IFMT, 0).error, libc::EINVAL);
    let entry: EntryOut = mknod(&guest, "whiteout", libc::S_IFCHR, 0).get();
    assert_eq!(entry.attr.rdev, 0);
    assert_eq!(guest.open(entry.nodeid, libc::O_RDONLY).error, libc::EACCES);
}

#[test]
fn a_target_up_to_the_greatest_length_is_stored_as_it_is() {
    let guest = Guest::new();
    let longest = "x".repeat(4095);
    let entry: EntryOut = symlink(&guest, ROOT_ID, "long", &longest).get();
    let target = guest.call(Opcode::Readlink, entry.nodeid, &[]);
    assert_eq!(target.body, longest.as_bytes());
    let answer = symlink(&guest, ROOT_ID, "longer", &"x".repeat(4096));
    assert_eq!(answer.error, libc::ENAMETOOLONG);
}

#[test]
fn renames_replace_exchange_and_refuse() {
    let guest = Guest::new();
    for name in ["a", "b"] {
        std::fs::write(guest.path().join(name), name).unwrap();
    }
    std::fs::create_dir(guest.path().join("d")).unwrap();
    let d = guest.node("d");
    let read = |name: &str| std::fs::read_to_string(guest.path().join(name)).unwrap();

    rename(&guest, (ROOT_ID, "a"), (ROOT_ID, "b"), libc::RENAME_EXCHANGE).ok();
    assert_eq!((read("a"), read("b")), ("b".into(), "a".into()));
    let refused = rename(&guest, (ROOT_ID, "a"), (ROOT_ID, "b"), libc::RENAME_NOREPLACE);
    assert_eq!(refused.error, libc::EEXIST);
    for flags in [8, 1 << 31, u32::MAX, libc::RENAME_NOREPLACE | libc::RENAME_EXCHANGE] {
        let refused = rename(&guest, (ROOT_ID, "a"), (ROOT_ID, "b"), flags);
        assert_eq!(refused.error, libc::EINVAL, "{flags:#x}");
    }
    rename(&guest, (ROOT_ID, "a"), (d, "moved"), libc::RENAME_WHITEOUT).ok();
    let left = std::fs::symlink_metadata(guest.path().join("a")).unwrap();
    assert!(left.file_type().is_char_device() && left.rdev() == 0);

    let body = RenameIn { newdir: ROOT_ID };
    let answer = guest.call(Opcode::Rename, d, &[body.as_slice(), b"moved\0b\0"]);
    answer.ok();
    assert_eq!(read("b"), "b");
    let answer = guest.call(Opcode::Rename, d, &[body.as_slice(), b"moved\0b\0c\0"]);
    assert_eq!(answer.error, libc::EINVAL);
}

#[test]
fn a_link_is_another_name_of_the_same_node() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("a"), "").unwrap();
    host_symlink("nowhere", guest.path().join("s")).unwrap();
    let a = guest.node("a");
    let entry: EntryOut = link(&guest, a, ROOT_ID, "b").get();
    assert_eq!((entry.nodeid, entry.attr.nlink), (a, 2));
    assert_eq!(link(&guest, a, ROOT_ID, "b").error, libc::EEXIST);
    // A symlink itself, not what it points to.
    let s = guest.node("s");
    let entry: EntryOut = link(&guest, s, ROOT_ID, "s2").get();
    assert_eq!((entry.nodeid, entry.attr.mode & libc::S_IFMT), (s, libc::S_IFLNK));
    assert_eq!(link(&guest, ROOT_ID, ROOT_ID, "root").error, libc::EPERM);
    assert_eq!(link(&guest, 99, ROOT_ID, "x").error, libc::ENOENT);
}

#[test]
fn every_operation_with_a_name_refuses_what_is_not_one() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("a"), "").unwrap();
    let a = guest.node("a");
    let long = "x".repeat(256);
    for (bad, error) in [
        ("", libc::EINVAL),
        (".", libc::EINVAL),
        ("..", libc::EINVAL),
        ("/", libc::EINVAL),
        ("/etc/passwd", libc::EINVAL),
        ("d/e", libc::EINVAL),
        ("a/", libc::EINVAL),
        (long.as_str(), libc::ENAMETOOLONG),
    ] {
        let answers = [
            guest.lookup(ROOT_ID, bad),
            mkdir(&guest, ROOT_ID, bad, 0o755),
            mknod(&guest, bad, libc::S_IFREG, 0),
            symlink(&guest, ROOT_ID, bad, "t"),
            link(&guest, a, ROOT_ID, bad),
            unlink(&guest, Opcode::Unlink, ROOT_ID, bad),
            unlink(&guest, Opcode::Rmdir, ROOT_ID, bad),
            guest.create(ROOT_ID, bad, libc::O_RDWR, 0o644),
            rename(&guest, (ROOT_ID, bad), (ROOT_ID, "b"), 0),
            rename(&guest, (ROOT_ID, "a"), (ROOT_ID, bad), 0),
        ];
        for (at, answer) in answers.iter().enumerate() {
            assert_eq!(answer.error, error, "{bad:?}, operation {at}");
        }
    }
    assert_eq!(guest.share.live_inodes(), 2);
}
