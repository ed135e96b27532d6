use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use vm_memory::ByteValued;

use super::*;
use crate::dax::Window;
use crate::fuse::abi::*;
use crate::fuse::opcode::Opcode;
use crate::fuse::testing::{EVERYTHING, Guest};
use crate::fuse::{Caller, FileSystem};
use crate::share::{LockPolicy, XattrPolicy};

const READ: u64 = SETUPMAPPING_READ;
const BOTH: u64 = SETUPMAPPING_READ | SETUPMAPPING_WRITE;
const RANGE: u64 = 2 << 20;

/// A guest behind a tree, and the host's directories.
struct Sandbox {
    guest: Guest,
    tree: Arc<Tree>,
    host: tempfile::TempDir,
}

impl Sandbox {
    fn new() -> Self {
        Self::with(|_| {})
    }

    fn with(change: impl FnOnce(&mut Options)) -> Self {
        let mut session = Options::new("/");
        session.dax = DaxPolicy::Always;
        change(&mut session);
        let window = Arc::new(Window::new(8 << 20).unwrap());
        let tree = Arc::new(Tree::new(session, Some(window.clone())));
        let guest = Guest::serving(tree.clone(), window);
        assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
        Self { guest, tree, host: tempfile::tempdir().unwrap() }
    }

    /// A directory of the host's with a file `file` that says its name.
    fn directory(&self, name: &str) -> PathBuf {
        let path = self.host.path().join(name);
        fs::create_dir_all(&path).unwrap();
        fs::write(path.join("file"), name).unwrap();
        path
    }

    fn options(&self, name: &str) -> Options {
        let mut options = Options::new(self.directory(name));
        options.dax = self.tree.session.dax;
        options.xattr = XattrPolicy::On;
        options.file_handles = std::env::var_os("ORIEL_TEST_BY_NAME").is_none();
        options
    }

    fn add(&self, name: &str, path: &str) {
        self.tree.add(path, self.options(name)).unwrap();
    }

    fn content(&self, node: u64) -> Vec<u8> {
        let fh = self.guest.fh(node, libc::O_RDONLY);
        let body = self.guest.read(node, fh, 0, 4096).body;
        release(&self.guest, node, fh);
        body
    }

    fn on_host(&self, path: &str) -> Vec<u8> {
        fs::read(self.host.path().join(path)).unwrap()
    }

    /// The names in a directory of the tree.
    fn names(&self, node: u64) -> Vec<String> {
        let fh = self.guest.opendir(node);
        let names = self.guest.list(false, node, fh, 0, 4096).unwrap();
        names.into_iter().map(|name| String::from_utf8(name.name).unwrap()).collect()
    }

    fn window(&self) -> &Window {
        self.guest.window.as_ref().unwrap()
    }
}

fn release(guest: &Guest, node: u64, fh: u64) {
    let body = ReleaseIn { fh, ..ReleaseIn::default() };
    guest.call(Opcode::Release, node, &[body.as_slice()]).ok();
}

#[test]
fn a_share_appears_under_its_path_and_its_name_goes_with_it() {
    let sandbox = Sandbox::new();
    let guest = &sandbox.guest;
    assert_eq!(sandbox.names(ROOT_ID), [".", ".."]);
    assert_eq!(guest.lookup(ROOT_ID, "a").error, libc::ENOENT);
    sandbox.add("one", "/a/b/one");
    sandbox.add("two", "/a/two/");

    let a: EntryOut = guest.lookup(ROOT_ID, "a").get();
    assert_eq!((a.attr.mode, a.attr.flags), (libc::S_IFDIR | 0o555, 0));
    let two: EntryOut = guest.lookup(a.nodeid, "two").get();
    assert_eq!(two.attr.flags & ATTR_SUBMOUNT, ATTR_SUBMOUNT);
    for entry in [&a, &two] {
        assert_eq!((entry.entry_valid, entry.entry_valid_nsec), (0, 0), "no name is kept");
    }
    assert_eq!(sandbox.names(a.nodeid), [".", "..", "b", "two"]);
    let file = guest.node("a/two/file");
    assert_eq!(sandbox.content(file), b"two");
    assert_eq!(sandbox.content(guest.node("a/b/one/file")), b"one");
    let fh = guest.fh(file, libc::O_RDWR);
    assert_eq!(guest.write(file, fh, 0, b"TWO").error, 0);
    assert_eq!(sandbox.on_host("two/file"), b"TWO");
    assert_eq!(guest.create(two.nodeid, "made", libc::O_RDWR, 0o600).error, 0);
    assert!(sandbox.host.path().join("two/made").exists());

    let b = guest.node("a/b");
    assert_ne!(sandbox.tree.remove("/a/b/one", false), Ok(Removed::Gone), "the guest knows it");
    assert_eq!(guest.lookup(b, "one").error, libc::ESTALE, "the way there is gone as well");
    assert_eq!(guest.lookup(a.nodeid, "b").error, libc::ENOENT);
    assert_eq!(sandbox.names(a.nodeid), [".", "..", "two"]);
    sandbox.add("three", "/a/b");
    assert_eq!(sandbox.content(guest.node("a/b/file")), b"three");
}

#[test]
fn what_cannot_be_added_is_refused_in_one_line_and_changes_nothing() {
    let sandbox = Sandbox::new();
    sandbox.add("one", "/a/one");
    let list = || -> Vec<_> {
        sandbox.tree.list().into_iter().map(|member| (member.path, member.directory)).collect()
    };
    let before = list();
    let refused = |path: &str, change: fn(&mut Options), hint: &str| {
        let mut options = sandbox.options("one");
        change(&mut options);
        let error = sandbox.tree.add(path, options).unwrap_err().to_string();
        assert!(error.contains(hint) && !error.contains('\n'), "{path}: {error}");
    };
    let deep = "/x".repeat(17);
    let long = format!("/{}", "x".repeat(256));
    for path in ["", "/", "//", "a", "/a/../b", "/./a", "/..", "/a\0b", &deep, &long] {
        refused(path, |_| {}, "no place for a share");
    }
    refused("/a/one", |_| {}, "/a/one already");
    refused("/a/one/two", |_| {}, "/a/one is a share");
    refused("/a", |_| {}, "shares below /a");
    refused("/b", |options| options.directory = "/nonexistent".into(), "No such file");
    refused("/b", |options| options.directory = "/etc/passwd".into(), "Not a directory");
    refused("/b", |options| options.directory = "/proc".into(), "never shared");
    refused("/b", |options| options.writeback = true, "writeback: cannot differ");
    refused("/b", |options| options.acl = true, "acl: cannot differ");
    refused("/b", |options| options.locks = LockPolicy::Guest, "locks=: cannot differ");
    refused("/b", |options| options.dax = DaxPolicy::Never, "dax=: cannot differ");
    refused("/b", |options| options.direct = DirectPolicy::Host, "direct=host: cannot differ");
    for path in ["/b", "/a", "/a/one/two"] {
        let error = sandbox.tree.remove(path, false).unwrap_err().to_string();
        assert_eq!(error, format!("there is no share at {path}, only at /a/one"));
        let error = sandbox.tree.set_read_only(path, true).unwrap_err().to_string();
        assert!(error.contains("only at /a/one"), "{error}");
    }
    assert_eq!(list(), before);
    assert_eq!(sandbox.tree.remove("/a/one", false), Ok(Removed::Gone));
    let error = sandbox.tree.remove("/a/one", true).unwrap_err().to_string();
    assert_eq!(error, "there is no share at /a/one, nor anywhere else");
    assert_eq!(sandbox.names(ROOT_ID), [".", ".."]);

    let fewer = Sandbox::with(|options| options.dax = DaxPolicy::Inode);
    let mut never = fewer.options("one");
    never.dax = DaxPolicy::Never;
    fewer.tree.add("/never", never).unwrap();
}

#[test]
fn descriptors_of_all_members_come_out_of_one_budget() {
    let sandbox = Sandbox::with(|options| options.max_descriptors = Some(9));
    sandbox.add("one", "/one");
    sandbox.add("two", "/two");
    let error = sandbox.tree.add("/three", sandbox.options("three")).unwrap_err();
    assert!(matches!(&error, TreeError::Host(why) if why.contains("open files")), "{error}");
    let file = sandbox.guest.node("one/file");
    let fh = sandbox.guest.fh(file, libc::O_RDONLY);
    let other = sandbox.guest.node("two/file");
    assert_eq!(sandbox.guest.open(other, libc::O_RDONLY).error, libc::ENFILE);
    release(&sandbox.guest, file, fh);
    assert_eq!(sandbox.guest.open(other, libc::O_RDONLY).error, 0);
    sandbox.tree.remove("/one", true).unwrap();
    sandbox.tree.remove("/two", true).unwrap();
    sandbox.add("three", "/three");
}

#[test]
fn handles_of_all_members_come_out_of_one_budget() {
    let sandbox = Sandbox::with(|options| options.max_handles = Some(1));
    sandbox.add("one", "/one");
    sandbox.add("two", "/two");
    let (file, other) = (sandbox.guest.node("one/file"), sandbox.guest.node("two/file"));
    let fh = sandbox.guest.fh(file, libc::O_RDONLY);
    assert_eq!(sandbox.guest.open(other, libc::O_RDONLY).error, libc::ENFILE);
    release(&sandbox.guest, file, fh);
    assert_eq!(sandbox.guest.open(other, libc::O_RDONLY).error, 0);
}

#[test]
fn numbers_of_one_member_mean_nothing_to_another() {
    let sandbox = Sandbox::new();
    let guest = &sandbox.guest;
    sandbox.add("one", "/one");
    sandbox.add("two", "/two");
    let (one, two) = (guest.node("one"), guest.node("two"));
    let (first, second) = (guest.node("one/file"), guest.node("two/file"));
    let (fh, other) = (guest.fh(first, libc::O_RDWR), guest.fh(second, libc::O_RDWR));
    assert_eq!(guest.read(first, other, 0, 10).error, libc::EBADF);
    assert_eq!(guest.write(second, fh, 0, b"x").error, libc::EBADF);
    // The same number in another member, in one that was never, in the tree.
    let lower = first & ((1 << NUMBER_BITS) - 1);
    for (node, error) in [
        (lower, libc::ENOENT),
        (3 << NUMBER_BITS | lower, libc::ENOENT),
        (u64::MAX, libc::ENOENT),
        (0, libc::ENOENT),
        (1 << NUMBER_BITS, libc::ENOENT),
        (first + 100, libc::ENOENT),
    ] {
        assert_eq!(guest.getattr(node).error, error, "{node:#x}");
        guest.forget(node, u64::MAX);
    }
    let body = Rename2In { newdir: two, ..Rename2In::default() };
    let moved = guest.call(Opcode::Rename2, one, &[body.as_slice(), b"file\0new\0"]);
    assert_eq!(moved.error, libc::EXDEV);
    let body = LinkIn { oldnodeid: first };
    assert_eq!(guest.call(Opcode::Link, two, &[body.as_slice(), b"new\0"]).error, libc::EXDEV);
    let copy = CopyFileRangeIn {
        fh_in: fh,
        fh_out: other,
        nodeid_out: second,
        len: 3,
        ..CopyFileRangeIn::default()
    };
    assert_eq!(guest.call(Opcode::CopyFileRange, first, &[copy.as_slice()]).error, libc::EXDEV);
    assert_eq!(guest.setup(second | 1 << 43, 0, 4096, READ, 0).error, libc::ENOENT);
    assert_eq!(sandbox.content(first), b"one");
}

#[test]
fn the_trees_own_directories_can_be_looked_at_and_not_changed() {
    let sandbox = Sandbox::new();
    let guest = &sandbox.guest;
    sandbox.add("one", "/a/one");
    for node in [ROOT_ID, guest.node("a")] {
        let create = CreateIn { flags: libc::O_RDWR as u32, ..CreateIn::default() };
        let rename = Rename2In { newdir: node, ..Rename2In::default() };
        let link = LinkIn { oldnodeid: guest.node("a/one/file") };
        let xattr = SetxattrIn { size: 1, flags: 0 };
        let (mkdir, mknod) = (MkdirIn::default(), MknodIn::default());
        let setattr = SetattrIn::default();
        let changes: [(Opcode, &[&[u8]]); 11] = [
            (Opcode::Mkdir, &[mkdir.as_slice(), b"x\0"]),
            (Opcode::Mknod, &[mknod.as_slice(), b"x\0"]),
            (Opcode::Symlink, &[b"x\0y\0"]),
            (Opcode::Create, &[create.as_slice(), b"x\0"]),
            (Opcode::Tmpfile, &[create.as_slice(), b"x\0"]),
            (Opcode::Unlink, &[b"one\0"]),
            (Opcode::Rmdir, &[b"one\0"]),
            (Opcode::Rename2, &[rename.as_slice(), b"one\0two\0"]),
            (Opcode::Link, &[link.as_slice(), b"x\0"]),
            (Opcode::Setattr, &[setattr.as_slice()]),
            (Opcode::Setxattr, &[xattr.as_slice(), b"user.x\0x"]),
        ];
        for (opcode, parts) in changes {
            assert_eq!(guest.call(opcode, node, parts).error, libc::EROFS, "{opcode:?}");
        }
        assert_eq!(guest.open(node, libc::O_RDONLY).error, libc::EISDIR);
        assert_eq!(guest.call(Opcode::Readlink, node, &[]).error, libc::EINVAL);
        assert_eq!(guest.setup(node, 0, 4096, READ, 0).error, libc::EINVAL);
        for fh in [0, 1, u64::MAX] {
            assert_eq!(guest.read(node, fh, 0, 1).error, libc::EBADF);
            let listed = guest.list(false, node, fh, 0, 4096);
            assert_eq!(listed.is_ok(), fh == 0);
        }
        let xattr = GetxattrIn::default();
        let asked = guest.call(Opcode::Getxattr, node, &[xattr.as_slice(), b"user.x\0"]);
        assert_eq!(asked.error, libc::EOPNOTSUPP);
        assert_eq!(guest.call(Opcode::Statfs, node, &[]).error, 0);
        assert_eq!(guest.call(Opcode::Syncfs, node, &[&[0; 8]]).error, 0);
        let statx = StatxIn { sx_mask: u32::MAX, ..StatxIn::default() };
        let statx: StatxOut = guest.call(Opcode::Statx, node, &[statx.as_slice()]).get();
        assert_eq!(u32::from(statx.stat.mode), libc::S_IFDIR | 0o555);
        for (mask, error) in [(libc::R_OK | libc::X_OK, 0), (libc::W_OK, libc::EROFS)] {
            let access = AccessIn { mask: mask as u32, padding: 0 };
            assert_eq!(guest.call(Opcode::Access, node, &[access.as_slice()]).error, error);
        }
        guest.forget(node, u64::MAX);
        assert_eq!(guest.getattr(node).error, 0, "there as long as it leads somewhere");
    }
}

#[test]
fn a_listing_in_pieces_has_each_name_once_whatever_comes_and_goes() {
    let sandbox = Sandbox::new();
    let guest = &sandbox.guest;
    for name in ["d", "c", "b", "a"] {
        sandbox.add(name, &format!("/{name}"));
    }
    let fh = guest.opendir(ROOT_ID);
    let mut seen = Vec::new();
    let mut offset = 0;
    for round in 0.. {
        // Room for one entry.
        let (plus, size) = if round % 2 == 0 { (true, 160) } else { (false, 40) };
        let names = guest.list(plus, ROOT_ID, fh, offset, size).unwrap();
        let Some(last) = names.last() else { break };
        offset = last.next;
        seen.extend(names.iter().map(|name| String::from_utf8_lossy(&name.name).into_owned()));
        match round {
            0 => sandbox.add("e", "/e"),
            1 => drop(sandbox.tree.remove("/a", false).unwrap()),
            _ => {}
        }
    }
    assert_eq!(seen, [".", "..", "d", "c", "b", "e"]);
    assert_eq!(guest.list(false, ROOT_ID, fh, 0, 8).unwrap_err(), libc::EINVAL, "no room");
    let plus = guest.list(true, ROOT_ID, fh, 0, 4096).unwrap();
    let entry = plus[2].entry.unwrap();
    assert_eq!(entry.nodeid, guest.node("d"));
    assert_eq!(entry.attr.flags & ATTR_SUBMOUNT, ATTR_SUBMOUNT);
    for forged in [offset, u64::MAX, u64::MAX - 1] {
        assert!(guest.list(false, ROOT_ID, fh, forged, 4096).unwrap().is_empty());
    }
}

#[test]
fn what_is_removed_works_on_for_who_has_it_and_is_gone_when_they_let_go() {
    let sandbox = Sandbox::new();
    let guest = &sandbox.guest;
    sandbox.add("one", "/one");
    let (root, file) = (guest.node("one"), guest.node("one/file"));
    let fh = guest.fh(file, libc::O_RDWR);
    guest.setup(file, 0, RANGE, BOTH, 0).ok();
    let in_use = sandbox.tree.remove("/one", false).unwrap();
    assert_eq!(in_use, Removed::InUse { nodes: 2, open: 1 });
    assert_eq!(guest.lookup(ROOT_ID, "one").error, libc::ENOENT);
    assert!(sandbox.tree.remove("/one", false).is_err(), "twice");

    assert_eq!(guest.read(file, fh, 0, 10).body, b"one");
    assert_eq!(guest.write(file, fh, 0, b"ONE").error, 0);
    assert!(sandbox.window().poke(1, b'x'));
    assert_eq!(sandbox.on_host("one/file"), b"OxE");
    assert_eq!(guest.lookup(root, "file").error, 0, "as after umount --lazy");
    let info = &sandbox.tree.list()[0];
    assert!(info.removed && info.path == "/one" && info.open == 1);
    // Another at the same path is another.
    sandbox.add("two", "/one");
    let (next, other) = (guest.node("one"), guest.node("one/file"));
    assert_ne!(next, root);
    assert_eq!(sandbox.content(other), b"two");
    assert_eq!(guest.read(file, fh, 0, 10).body, b"OxE");

    guest.forget(root, u64::MAX);
    guest.forget(file, u64::MAX);
    assert_eq!(sandbox.tree.list().len(), 2, "it is open");
    release(guest, file, fh);
    assert_eq!(sandbox.tree.list().len(), 1);
    assert_eq!(sandbox.window().live_files(), 0, "and so is what was mapped of it");
    // Late words about it change nothing.
    for node in [root, file] {
        assert_eq!(guest.getattr(node).error, libc::ESTALE);
        guest.forget(node, 1);
    }
    assert_eq!(guest.read(file, fh, 0, 10).error, libc::ESTALE);
    assert_eq!(sandbox.content(other), b"two");
    let statistics = sandbox.tree.statistics();
    assert!(statistics.contains(&("members", 1)) && statistics.contains(&("members_removed", 0)));
}

#[test]
fn with_force_all_of_it_ends_at_once() {
    let sandbox = Sandbox::new();
    let guest = &sandbox.guest;
    sandbox.add("one", "/one");
    sandbox.add("two", "/two");
    let (root, file, kept) = (guest.node("one"), guest.node("one/file"), guest.node("two/file"));
    let fh = guest.fh(file, libc::O_RDWR);
    guest.setup(file, 0, RANGE, BOTH, 0).ok();
    guest.setup(file, 0, RANGE, READ, RANGE).ok();
    guest.setup(kept, 0, RANGE, BOTH, 2 * RANGE).ok();
    assert!(guest.session.snapshot().contains(&("dax_live", 3)));
    assert_eq!(sandbox.tree.remove("/one", true), Ok(Removed::Gone));
    assert!(guest.session.snapshot().contains(&("dax_live", 1)), "what is gone is not counted");
    for node in [root, file] {
        assert_eq!(guest.getattr(node).error, libc::ESTALE);
    }
    assert_eq!(guest.write(file, fh, 0, b"ONE").error, libc::ESTALE);
    assert_eq!(guest.setup(file, 0, RANGE, READ, 0).error, libc::ESTALE);
    for at in [0, RANGE] {
        assert_eq!(sandbox.window().peek(at), Some(0), "zeros, not a fault");
    }
    assert!(sandbox.window().poke(0, b'x'));
    assert_eq!(sandbox.on_host("one/file"), b"one");
    assert_eq!(sandbox.window().peek(2 * RANGE), Some(b't'), "others stay");
    assert_eq!(sandbox.window().live_files(), 1);
    guest.remove(2, &[(0, RANGE), (RANGE, RANGE)]).ok();
    assert_eq!(sandbox.window().peek(0), None);

    // What was removed without it can be ended later.
    let fh = guest.fh(kept, libc::O_RDWR);
    sandbox.tree.remove("/two", false).unwrap();
    assert_eq!(guest.read(kept, fh, 0, 10).body, b"two");
    assert_eq!(sandbox.tree.remove("/two", true), Ok(Removed::Gone));
    assert_eq!(guest.read(kept, fh, 0, 10).error, libc::ESTALE);
    assert!(sandbox.tree.list().is_empty());
    assert_eq!(sandbox.window().live_mappings(), 0);
}

#[test]
fn a_lock_that_is_granted_after_its_share_was_removed_with_force_is_refused() {
    let sandbox = Sandbox::new();
    let guest = &sandbox.guest;
    sandbox.add("one", "/one");
    let node = guest.node("one/file");
    let host = fs::File::open(sandbox.host.path().join("one/file")).unwrap();
    let lk = FileLock { start: 0, end: i64::MAX as u64, type_: libc::F_WRLCK as u32, pid: 9 };
    let request = |fh| LkIn { fh, owner: fh, lk, lk_flags: LK_FLOCK, ..LkIn::default() };
    let held = request(guest.fh(node, libc::O_RDWR));
    assert_eq!(guest.call(Opcode::Setlk, node, &[held.as_slice()]).error, 0);
    assert!(host.try_lock().is_err());
    let waits = request(guest.fh(node, libc::O_RDWR));
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| guest.call(Opcode::Setlkw, node, &[waits.as_slice()]).error);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert!(!waiter.is_finished());
        // The lock that was held goes with its share. Where the other gets it, it is told that it has it no more.
        assert_eq!(sandbox.tree.remove("/one", true), Ok(Removed::Gone));
        assert_eq!(waiter.join().unwrap(), libc::EBADF);
    });
    host.lock().unwrap();
    assert_eq!(guest.call(Opcode::Setlk, node, &[held.as_slice()]).error, libc::ESTALE);
}

#[test]
fn switched_to_read_only_nothing_changes_on_the_host_by_any_way() {
    let sandbox = Sandbox::new();
    let guest = &sandbox.guest;
    sandbox.add("one", "/one");
    let (root, file) = (guest.node("one"), guest.node("one/file"));
    let fh = guest.fh(file, libc::O_RDWR);
    guest.setup(file, 0, RANGE, BOTH, 0).ok();
    // Part of it is another member's by now, and part is as it was.
    sandbox.add("two", "/two");
    let other = guest.node("two/file");
    guest.setup(file, 0, 2 * RANGE, BOTH, RANGE).ok();
    guest.setup(other, 0, RANGE, BOTH, RANGE).ok();
    let rest = 2 * RANGE;
    fs::File::options()
        .write(true)
        .open(sandbox.host.path().join("one/file"))
        .unwrap()
        .set_len(2 * RANGE)
        .unwrap();
    assert!(sandbox.window().poke(0, b'O') && sandbox.window().poke(rest, b'R'));

    sandbox.tree.set_read_only("/one", true).unwrap();
    sandbox.tree.set_read_only("/one", true).unwrap();
    assert!(sandbox.tree.list()[0].read_only);
    let before = sandbox.on_host("one/file");
    assert_eq!((before[0], before[RANGE as usize]), (b'O', b'R'));
    let size = SetattrIn { valid: SetattrValid::SIZE.bits(), ..SetattrIn::default() };
    let with_handle = SetattrIn {
        valid: (SetattrValid::SIZE | SetattrValid::FH).bits(),
        fh,
        ..SetattrIn::default()
    };
    let allocate = FallocateIn { fh, length: 9000, ..FallocateIn::default() };
    let copy = CopyFileRangeIn {
        fh_in: fh,
        fh_out: fh,
        nodeid_out: file,
        offset_out: 4096,
        len: 1,
        ..CopyFileRangeIn::default()
    };
    let xattr = SetxattrIn { size: 1, flags: 0 };
    let errors = [
        guest.write(file, fh, 0, b"x").error,
        guest.write_with(file, fh, 0, b"x", 0, WRITE_CACHE).error,
        guest.setattr(file, size).error,
        guest.setattr(file, with_handle).error,
        guest.call(Opcode::Fallocate, file, &[allocate.as_slice()]).error,
        guest.call(Opcode::CopyFileRange, file, &[copy.as_slice()]).error,
        guest.open(file, libc::O_RDWR).error,
        guest.open(file, libc::O_RDONLY | libc::O_TRUNC).error,
        guest.create(root, "made", libc::O_RDWR, 0o600).error,
        guest.call(Opcode::Unlink, root, &[b"file\0"]).error,
        guest.call(Opcode::Setxattr, file, &[xattr.as_slice(), b"user.x\0x"]).error,
        guest.setup(file, 0, RANGE, BOTH, 0).error,
    ];
    assert_eq!(errors, [libc::EROFS; 12]);
    // Through the window: the guest goes on, and the file stays.
    assert_eq!(sandbox.window().peek(0), Some(b'O'));
    assert!(sandbox.window().poke(0, b'!') && sandbox.window().poke(rest, b'!'));
    assert_eq!(sandbox.window().peek(0), Some(b'!'), "its own");
    assert_eq!(sandbox.on_host("one/file"), before);
    assert!(sandbox.window().poke(RANGE, b'!'));
    assert_eq!(sandbox.on_host("two/file"), b"!wo", "the other one is as it was");
    // What does not change anything works.
    assert_eq!(guest.read(file, fh, 0, 3).body, &before[..3]);
    let sync = FsyncIn { fh, ..FsyncIn::default() };
    let synced = guest.call(Opcode::Fsync, file, &[sync.as_slice()]);
    assert_eq!(synced.error, libc::EROFS, "what the guest has stored is nowhere");
    guest.setup(file, 0, RANGE, READ, 3 * RANGE).ok();
    assert_eq!(sandbox.window().peek(3 * RANGE), Some(b'O'));

    sandbox.tree.set_read_only("/one", false).unwrap();
    assert_eq!(sandbox.window().peek(0), Some(b'O'), "the file's again");
    assert!(sandbox.window().poke(0, b'W'));
    assert_eq!(guest.write(file, fh, 1, b"w").error, 0);
    assert_eq!(&sandbox.on_host("one/file")[..2], b"Ww");
    assert!(!sandbox.window().poke(3 * RANGE, b'!'), "what was mapped to be read still is");
    guest.call(Opcode::Fsync, file, &[sync.as_slice()]).ok();
    guest.remove(2, &[(0, RANGE), (2 * RANGE, RANGE)]).ok();
    sandbox.tree.set_read_only("/one", true).unwrap();
    guest.call(Opcode::Fsync, file, &[sync.as_slice()]).ok();
}

#[test]
fn a_tree_that_is_read_only_has_no_other_members() {
    let sandbox = Sandbox::with(|options| options.read_only = true);
    sandbox.add("one", "/one");
    let file = sandbox.guest.node("one/file");
    assert_eq!(sandbox.guest.open(file, libc::O_RDWR).error, libc::EROFS);
    assert_eq!(sandbox.tree.set_read_only("/one", false), Err(TreeError::AllReadOnly));
    sandbox.tree.set_read_only("/one", true).unwrap();
    assert_eq!(sandbox.content(file), b"one");
}

#[test]
fn what_one_member_does_without_is_not_taken_from_the_others() {
    let sandbox = Sandbox::new();
    let mut without = sandbox.options("one");
    without.xattr = XattrPolicy::Off;
    sandbox.tree.add("/one", without).unwrap();
    sandbox.add("two", "/two");
    let ask = |path: &str| {
        let body = GetxattrIn::default();
        let node = sandbox.guest.node(path);
        sandbox.guest.call(Opcode::Getxattr, node, &[body.as_slice(), b"user.x\0"]).error
    };
    assert_eq!(ask("one/file"), libc::EOPNOTSUPP, "ENOSYS would be for all");
    assert_eq!(ask("two/file"), libc::ENODATA);
}

#[test]
fn each_member_has_its_own_counters() {
    let sandbox = Sandbox::new();
    sandbox.add("one", "/one");
    sandbox.add("two", "/two");
    let file = sandbox.guest.node("one/file");
    assert_eq!(sandbox.content(file), b"one");
    let fh = sandbox.guest.fh(file, libc::O_WRONLY);
    assert_eq!(sandbox.guest.write(file, fh, 0, b"ONE!").error, 0);
    assert_eq!(sandbox.guest.open(file, 3).error, libc::EINVAL);
    let members = sandbox.tree.list();
    let of = |member: usize, opcode| members[member].counters.requests(opcode);
    assert_eq!((of(0, Opcode::Lookup), of(0, Opcode::Open), of(0, Opcode::Read)), (1, 3, 1));
    assert_eq!((of(1, Opcode::Lookup), of(1, Opcode::Open)), (0, 0));
    let one = &members[0].counters;
    assert_eq!((one.bytes_read.load(Relaxed), one.bytes_written.load(Relaxed)), (3, 4));
    let open = one.operations().into_iter().find(|of| of.name == "OPEN").unwrap();
    assert_eq!((open.errors, open.latency.iter().sum::<u64>()), (1, 3));
    // The lookup of the member itself is the tree's.
    assert_eq!(sandbox.guest.session.counters().requests(Opcode::Lookup), 2);
}

#[test]
fn a_new_session_finds_the_members_and_nothing_of_the_old_one() {
    let sandbox = Sandbox::new();
    let guest = &sandbox.guest;
    sandbox.add("one", "/one");
    sandbox.add("two", "/two");
    let (file, left) = (guest.node("one/file"), guest.node("two/file"));
    let fh = guest.fh(file, libc::O_RDWR);
    sandbox.tree.remove("/two", false).unwrap();
    assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
    assert_eq!(sandbox.tree.list().len(), 1, "nobody uses what was removed");
    for node in [file, left] {
        assert_eq!(guest.getattr(node).error, libc::ESTALE);
    }
    assert_eq!(guest.read(file, fh, 0, 1).error, libc::EBADF);
    assert_eq!(sandbox.content(guest.node("one/file")), b"one");
}

#[test]
fn members_come_and_go_while_they_are_used_and_nothing_is_left() {
    let sandbox = Sandbox::new();
    let free = sandbox.tree.common.descriptors_in_use();
    for name in ["a", "b", "c"] {
        sandbox.directory(name);
    }
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for name in ["a", "b", "c"] {
            let (sandbox, stop) = (&sandbox, &stop);
            scope.spawn(move || {
                let guest = &sandbox.guest;
                while !stop.load(Relaxed) {
                    let root = guest.lookup(ROOT_ID, name);
                    if root.error != 0 {
                        std::thread::yield_now();
                        continue;
                    }
                    let root = root.get::<EntryOut>().nodeid;
                    let found = guest.lookup(root, "file");
                    if found.error == 0 {
                        let node = found.get::<EntryOut>().nodeid;
                        let opened = guest.open(node, libc::O_RDWR);
                        guest.setup(node, 0, 4096, BOTH, 0);
                        if opened.error == 0 {
                            let fh = opened.get::<OpenOut>().fh;
                            guest.write(node, fh, 0, name.as_bytes());
                            let body = ReleaseIn { fh, ..ReleaseIn::default() };
                            guest.call(Opcode::Release, node, &[body.as_slice()]);
                        }
                        guest.forget(node, 1);
                    }
                    guest.forget(root, 1);
                }
            });
        }
        for round in 0..120 {
            for name in ["a", "b", "c"] {
                let path = format!("/{name}");
                sandbox.add(name, &path);
                std::thread::yield_now();
                if round % 3 == 0 {
                    sandbox.tree.set_read_only(&path, true).unwrap();
                }
                let force = round % 2 == 0;
                let removed = sandbox.tree.remove(&path, force).unwrap();
                assert!(!force || removed == Removed::Gone);
            }
        }
        stop.store(true, Relaxed);
    });
    // A lookup that crossed the removal may have left a count behind.
    for member in sandbox.tree.list() {
        assert!(member.removed);
        sandbox.tree.remove(&member.path, true).unwrap();
    }
    assert!(sandbox.tree.list().is_empty());
    assert_eq!(sandbox.tree.common.descriptors_in_use(), free);
    assert_eq!((sandbox.window().live_mappings(), sandbox.window().live_files()), (0, 0));
}

/// A window from which nothing can be taken away.
struct Stuck;

impl DaxWindow for Stuck {
    fn size(&self) -> u64 {
        RANGE
    }

    fn map_for(
        &self,
        _: u32,
        _: u64,
        _: u64,
        _: std::os::fd::BorrowedFd<'_>,
        _: u64,
        _: bool,
    ) -> std::io::Result<()> {
        Ok(())
    }

    fn set_writable(&self, _: u32, writable: bool) -> std::io::Result<()> {
        if writable { Ok(()) } else { Err(std::io::Error::from_raw_os_error(libc::ENOMEM)) }
    }

    fn is_severed(&self, _: u32, _: (u64, u64)) -> bool {
        false
    }

    fn take_away(&self, _: u32) {}

    fn unmap(&self, _: u64, _: u64) -> std::io::Result<()> {
        Ok(())
    }

    fn clear(&self) {}
}

#[test]
fn a_switch_to_read_only_that_leaves_something_writable_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let tree = Tree::new(Options::new("/"), Some(Arc::new(Stuck)));
    tree.add("/one", Options::new(directory.path())).unwrap();
    let error = tree.set_read_only("/one", true).unwrap_err();
    assert!(matches!(&error, TreeError::Mapped { path, .. } if path == "/one"));
    assert!(error.to_string().contains("can still write"), "{error}");
    assert!(tree.list()[0].read_only, "for all requests it is");
    assert_eq!(tree.set_read_only("/one", false), Ok(()));
}

#[test]
fn what_was_promised_to_a_member_is_free_again_when_it_is_gone() {
    let directory = tempfile::tempdir().unwrap();
    fs::File::create(directory.path().join("file")).unwrap().set_len(4 * RANGE).unwrap();
    let session = Options { window: Some(16 * RANGE), ..Options::new("/") };
    let tree = Tree::new(session, None);
    tree.add("/one", Options::new(directory.path())).unwrap();
    let promised = || {
        let all = tree.statistics();
        all.iter().find(|(name, _)| *name == "dax_promised_bytes").unwrap().1
    };
    let member = tree.member(1 << NUMBER_BITS).unwrap();
    assert_eq!(tree.remove("/one", false).unwrap(), Removed::Gone);
    // A request that was being served meanwhile.
    let caller = Caller { nodeid: member.root(), ..caller() };
    member.share.lookup(caller, c"file").unwrap();
    assert_eq!(promised(), 4 * RANGE);
    drop(member);
    assert_eq!(promised(), 0);
}

fn caller() -> Caller {
    Caller { nodeid: 0, uid: 0, gid: 0, pid: 1, group: None, umask: None, at_once: false }
}
