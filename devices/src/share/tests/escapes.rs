use std::os::unix::fs::symlink as host_symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{CWD, FileType, Mode};
use rustix::mount::{UnmountFlags, mount_bind, unmount};

use super::*;

#[test]
fn a_symlink_is_an_entry_and_never_a_way() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "secret").unwrap();
    let guest = Guest::new();
    host_symlink(outside.path(), guest.path().join("out")).unwrap();
    host_symlink("/etc/passwd", guest.path().join("passwd")).unwrap();
    host_symlink("/proc/self/fd", guest.path().join("fds")).unwrap();
    for name in ["out", "passwd", "fds"] {
        let entry: EntryOut = guest.lookup(ROOT_ID, name).get();
        assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        for answer in [
            guest.lookup(entry.nodeid, "secret"),
            guest.create(entry.nodeid, "made", libc::O_RDWR, 0o644),
            mkdir(&guest, entry.nodeid, "made", 0o755),
            unlink(&guest, Opcode::Unlink, entry.nodeid, "secret"),
        ] {
            assert_eq!(answer.error, libc::ENOTDIR);
        }
        assert_ne!(guest.open(entry.nodeid, libc::O_RDONLY).error, 0);
        assert_ne!(guest.open(entry.nodeid, libc::O_PATH).error, 0);
        let body = OpenIn::default();
        let answer = guest.call(Opcode::Opendir, entry.nodeid, &[body.as_slice()]);
        assert_eq!(answer.error, libc::ENOTDIR);
        assert_eq!(guest.setup(entry.nodeid, 0, 4096, 2, 0).error, libc::EINVAL);
        // Truncation, too, is of the entry itself.
        let change = SetattrIn { valid: SetattrValid::SIZE.bits(), ..SetattrIn::default() };
        assert_eq!(guest.setattr(entry.nodeid, change).error, libc::EINVAL);
    }
    assert!(std::fs::read_dir(outside.path()).unwrap().count() == 1);
}

#[test]
fn create_never_goes_through_a_symlink_whatever_the_flags() {
    let outside = tempfile::tempdir().unwrap();
    let target = outside.path().join("target");
    let guest = Guest::new();
    host_symlink(&target, guest.path().join("dangling")).unwrap();
    for exists in [false, true] {
        if exists {
            std::fs::write(&target, "keep").unwrap();
        }
        for flags in [
            libc::O_RDWR,
            libc::O_RDWR | libc::O_EXCL,
            libc::O_RDWR | libc::O_TRUNC,
            libc::O_PATH,
            libc::O_RDWR | libc::O_TMPFILE,
            libc::O_RDWR | libc::O_CREAT | libc::O_NOFOLLOW,
        ] {
            let answer = guest.create(ROOT_ID, "dangling", flags, 0o644);
            assert!([libc::EEXIST, libc::ESTALE].contains(&answer.error), "{flags:#x}");
        }
        assert_eq!(target.exists(), exists);
    }
    assert_eq!(std::fs::read(&target).unwrap(), b"keep");
    assert_eq!((guest.share.live_inodes(), guest.share.live_handles()), (1, 0));
}

#[test]
fn a_directory_moved_out_of_the_share_is_no_way_out() {
    let outside = tempfile::tempdir().unwrap();
    let guest = Guest::new();
    std::fs::create_dir(guest.path().join("d")).unwrap();
    let d = guest.node("d");
    std::fs::rename(guest.path().join("d"), outside.path().join("d")).unwrap();
    std::fs::write(outside.path().join("secret"), "").unwrap();
    assert_eq!(guest.lookup(d, "..").error, libc::EINVAL);
    assert_eq!(guest.lookup(d, "../secret").error, libc::EINVAL);
    // What it still has is what it was given, or that is lost to it.
    std::fs::write(outside.path().join("d/inside"), "").unwrap();
    let expected = if super::reach::has_handles(&guest) { 0 } else { libc::ESTALE };
    assert_eq!(guest.lookup(d, "inside").error, expected);
}

#[test]
fn a_name_that_keeps_changing_into_a_symlink_never_leads_outside() {
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("file"), "outside").unwrap();
    std::fs::write(outside.path().join("own"), "outside").unwrap();
    let guest = Guest::new();
    let path = guest.path().to_owned();
    std::fs::create_dir(path.join("real")).unwrap();
    std::fs::write(path.join("real/file"), "inside").unwrap();
    host_symlink(outside.path(), path.join("swap")).unwrap();
    host_symlink(outside.path().join("own"), path.join("link")).unwrap();
    std::fs::write(path.join("own"), "inside").unwrap();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (a, b) in [("real", "swap"), ("own", "link")] {
                    rustix::fs::renameat_with(
                        rustix::fs::CWD,
                        path.join(a),
                        rustix::fs::CWD,
                        path.join(b),
                        rustix::fs::RenameFlags::EXCHANGE,
                    )
                    .unwrap();
                }
            }
        });
        for _ in 0..2000 {
            let mut seen = Vec::new();
            let answer = guest.lookup(ROOT_ID, "real");
            if answer.error == 0 {
                let directory = answer.get::<EntryOut>().nodeid;
                let answer = guest.lookup(directory, "file");
                if answer.error == 0 {
                    seen.push(answer.get::<EntryOut>().nodeid);
                }
            }
            let answer = guest.create(ROOT_ID, "own", libc::O_RDWR, 0o644);
            if answer.error == 0 {
                let fh = answer.part::<OpenOut>(128).fh;
                let node = answer.part::<EntryOut>(0).nodeid;
                assert_eq!(guest.read(node, fh, 0, 10).body, b"inside");
                release(&guest, Opcode::Release, node, fh).ok();
            }
            for node in seen {
                let fh = guest.fh(node, libc::O_RDONLY);
                assert_eq!(guest.read(node, fh, 0, 10).body, b"inside");
                release(&guest, Opcode::Release, node, fh).ok();
            }
        }
        stop.store(true, Ordering::Relaxed);
    });
}

#[test]
fn flags_that_would_make_a_handle_something_else_are_dropped() {
    let guest = Guest::new();
    std::fs::write(guest.path().join("file"), "data").unwrap();
    let node = guest.node("file");
    for extra in [
        libc::O_PATH,
        libc::O_CREAT | libc::O_EXCL,
        libc::O_TMPFILE,
        libc::O_NOFOLLOW,
        libc::O_DIRECTORY,
        libc::O_ASYNC | libc::O_NONBLOCK | libc::O_NOATIME,
        0x7fff_0000,
    ] {
        let fh = guest.fh(node, libc::O_RDONLY | extra);
        assert_eq!(guest.read(node, fh, 0, 10).body, b"data", "{extra:#x}");
        release(&guest, Opcode::Release, node, fh).ok();
    }
    assert_eq!(guest.open(node, 3).error, libc::EINVAL);
    assert_eq!(std::fs::read(guest.path().join("file")).unwrap(), b"data");
}

#[test]
fn an_interface_of_the_hosts_kernel_below_a_share_is_seen_and_not_entered() {
    let guest = Guest::with(|options| options.directory = "/".into());
    for name in ["proc", "sys"] {
        let entry: EntryOut = guest.lookup(ROOT_ID, name).get();
        assert_eq!(entry.attr.mode & libc::S_IFMT, libc::S_IFDIR);
        guest.getattr(entry.nodeid).get::<AttrOut>();
        let change =
            SetattrIn { valid: SetattrValid::MODE.bits(), mode: 0o755, ..SetattrIn::default() };
        for answer in [
            guest.lookup(entry.nodeid, "self"),
            guest.lookup(entry.nodeid, "kernel"),
            guest.call(Opcode::Opendir, entry.nodeid, &[OpenIn::default().as_slice()]),
            guest.create(entry.nodeid, "made", libc::O_RDWR, 0o644),
            guest.setattr(entry.nodeid, change),
            setxattr(&guest, entry.nodeid, "user.x", b"", 0),
            getxattr(&guest, entry.nodeid, "user.x", 9),
            guest.call(Opcode::Removexattr, entry.nodeid, &[b"user.x\0"]),
            unlink(&guest, Opcode::Rmdir, entry.nodeid, "self"),
        ] {
            assert_eq!(answer.error, libc::EACCES);
        }
    }
}

#[test]
fn a_file_of_the_hosts_kernel_that_is_mounted_over_one_of_a_share_is_not_opened_and_not_mapped() {
    super::mounts::with_mounts(|guest| {
        let place = guest.path().join("version");
        std::fs::write(&place, "covered").unwrap();
        mount_bind("/proc/version", &place).unwrap();
        let node = guest.node("version");
        let change =
            SetattrIn { valid: SetattrValid::SIZE.bits(), size: 0, ..SetattrIn::default() };
        for answer in [
            guest.open(node, libc::O_RDONLY),
            guest.open(node, libc::O_RDWR),
            guest.setup(node, 0, 4096, SETUPMAPPING_READ, 0),
            guest.setup(node, 0, 4096, SETUPMAPPING_READ | SETUPMAPPING_WRITE, 0),
            guest.setattr(node, change),
            getxattr(guest, node, "user.x", 9),
        ] {
            assert_eq!(answer.error, libc::EACCES);
        }
        assert_eq!(guest.window.as_ref().unwrap().live_mappings(), 0);
        unmount(&place, UnmountFlags::DETACH).unwrap();
    });
}

#[test]
fn what_is_neither_file_nor_directory_is_never_opened() {
    let guest = Guest::new();
    let path = guest.path();
    rustix::fs::mknodat(CWD, path.join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
    let _listening = std::os::unix::net::UnixListener::bind(path.join("socket")).unwrap();
    let mut names = vec!["fifo", "socket"];
    // /dev/null's number. Only root of the host itself makes one.
    let null = rustix::fs::makedev(1, 3);
    let made =
        rustix::fs::mknodat(CWD, path.join("device"), FileType::CharacterDevice, Mode::RWXU, null);
    names.extend(made.is_ok().then_some("device"));
    for name in names {
        let node = guest.node(name);
        for flags in [libc::O_RDONLY, libc::O_WRONLY, libc::O_RDWR, libc::O_PATH, libc::O_NONBLOCK]
        {
            // Opened, the FIFO would block: nobody is at its other end.
            assert_ne!(guest.open(node, flags).error, 0, "{name} {flags:#x}");
            assert_ne!(guest.create(ROOT_ID, name, flags, 0o600).error, 0, "{name} {flags:#x}");
        }
        let opened = guest.call(Opcode::Opendir, node, &[OpenIn::default().as_slice()]);
        assert_eq!(opened.error, libc::ENOTDIR, "{name}");
        assert_eq!(guest.setup(node, 0, 4096, 1, 0).error, libc::EINVAL, "{name}");
        let change = SetattrIn { valid: SetattrValid::SIZE.bits(), ..SetattrIn::default() };
        assert_ne!(guest.setattr(node, change).error, 0, "{name}");
        // All else is of the entry itself.
        let change =
            SetattrIn { valid: SetattrValid::MODE.bits(), mode: 0o640, ..SetattrIn::default() };
        assert_eq!(guest.setattr(node, change).get::<AttrOut>().attr.mode & 0o777, 0o640);
        link(&guest, node, ROOT_ID, "other").get::<EntryOut>();
        unlink(&guest, Opcode::Unlink, ROOT_ID, "other").ok();
    }
    assert_eq!(guest.share.live_handles(), 0);
}

#[test]
fn an_interface_of_the_hosts_kernel_is_no_share() {
    for path in ["/proc", "/proc/self", "/sys/kernel"] {
        assert!(crate::share::Share::new(crate::share::Options::new(path)).is_err());
    }
}
