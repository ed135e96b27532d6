//! Shares that come and go below one mount, as a real kernel sees it. (Device numbers of their own are virtio-fs's
//! alone, and so are in the tests of guests.)

use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use devices::share::{DaxPolicy, Options};
use devices::tree::{Removed, Tree};
use integration::Door;
use rustix::mount::{MountFlags, mount_remount};

fn options(directory: &Path) -> Options {
    let mut options = Options::new(directory);
    options.dax = DaxPolicy::Never;
    options
}

fn tree() -> (Arc<Tree>, Door) {
    let tree = Arc::new(Tree::new(options(Path::new("/")), None));
    (tree.clone(), Door::mount_tree(tree).unwrap())
}

fn host(content: &str) -> tempfile::TempDir {
    let host = tempfile::tempdir().unwrap();
    fs::write(host.path().join("file"), content).unwrap();
    host
}

fn until(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed().as_secs() < 10, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_process_sees_shares_come_and_go_at_once_and_keeps_what_it_has_open() {
    let ((tree, door), one, two) = (tree(), host("one"), host("two"));
    let at = |name: &str| door.path().join(name);
    assert_eq!(fs::read_dir(door.path()).unwrap().count(), 0);
    tree.add("/a/b", options(one.path())).unwrap();
    tree.add("/a/c", options(two.path())).unwrap();
    assert_eq!(fs::read(at("a/b/file")).unwrap(), b"one");
    let refused = fs::create_dir(at("a/new")).unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ReadOnlyFilesystem);
    let crossed = fs::rename(at("a/b/file"), at("a/c/moved")).unwrap_err();
    assert_eq!(crossed.kind(), ErrorKind::CrossesDevices);
    let mut names: Vec<_> = walk(door.path());
    names.sort();
    assert_eq!(names, ["a", "a/b", "a/b/file", "a/c", "a/c/file"]);

    let mut open = File::options().read(true).write(true).open(at("a/b/file")).unwrap();
    assert!(matches!(tree.remove("/a/b", false), Ok(Removed::InUse { open: 1, .. })));
    assert_eq!(fs::read(at("a/b/file")).unwrap_err().kind(), ErrorKind::NotFound);
    let mut text = String::new();
    open.read_to_string(&mut text).unwrap();
    open.write_all(b"!").unwrap();
    assert_eq!(
        (text.as_str(), fs::read(one.path().join("file")).unwrap()),
        ("one", b"one!".into())
    );
    // Another in its place at once.
    tree.add("/a/b", options(two.path())).unwrap();
    assert_eq!(fs::read(at("a/b/file")).unwrap(), b"two");
    drop(open);
    // A guest lets go of a whole mount. Here it is one mount for all, and what nobody uses stays in the kernel's
    // cache, until that is emptied.
    mount_remount(door.path(), MountFlags::empty(), c"").unwrap();
    until("nothing of it is left", || tree.list().iter().all(|member| !member.removed));
}

#[test]
fn who_has_a_file_open_for_writing_cannot_write_once_the_share_is_read_only() {
    let ((tree, door), one) = (tree(), host("one"));
    tree.add("/one", options(one.path())).unwrap();
    let mut open = File::options().append(true).open(door.path().join("one/file")).unwrap();
    open.write_all(b"1").unwrap();
    tree.set_read_only("/one", true).unwrap();
    for refused in [
        open.write_all(b"2"),
        open.set_len(0),
        fs::remove_file(door.path().join("one/file")),
        File::create(door.path().join("one/new")).map(drop),
    ] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    }
    open.sync_all().unwrap();
    tree.set_read_only("/one", false).unwrap();
    open.write_all(b"3").unwrap();
    assert_eq!(fs::read(one.path().join("file")).unwrap(), b"one13");
}

#[test]
fn by_force_what_is_open_ends_and_the_others_go_on() {
    let ((tree, door), one, two) = (tree(), host("one"), host("two"));
    tree.add("/one", options(one.path())).unwrap();
    tree.add("/two", options(two.path())).unwrap();
    let mut open = File::open(door.path().join("one/file")).unwrap();
    assert_eq!(tree.remove("/one", true), Ok(Removed::Gone));
    let mut text = String::new();
    assert_eq!(open.read_to_string(&mut text).unwrap_err().raw_os_error(), Some(libc::ESTALE));
    assert_eq!(fs::read(door.path().join("two/file")).unwrap(), b"two");
    assert_eq!(tree.list().len(), 1);
}

/// All names below a directory. What comes and goes meanwhile may be in it or not.
fn walk(directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    let mut left = vec![directory.to_path_buf()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(&next).into_iter().flatten().flatten() {
            let path = entry.path();
            names.push(path.strip_prefix(directory).unwrap().to_str().unwrap().to_string());
            if path.is_dir() {
                left.push(path);
            }
        }
    }
    names
}

#[test]
fn processes_walk_and_write_while_shares_come_and_go() {
    let ((tree, door), hosts) = (tree(), ["a", "b", "c"].map(host));
    let (stop, read) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !stop.load(Relaxed) {
                    for name in walk(door.path()) {
                        if let Ok(bytes) = fs::read(door.path().join(&name)) {
                            assert!(bytes.len() <= 8, "{name}");
                            read.fetch_add(1, Relaxed);
                        }
                        let _ = fs::write(door.path().join(&name), "changed");
                    }
                }
            });
        }
        let start = Instant::now();
        let mut round = 0;
        while start.elapsed() < Duration::from_secs(2) || read.load(Relaxed) == 0 {
            assert!(start.elapsed().as_secs() < 30, "nobody reads");
            round += 1;
            for (index, host) in hosts.iter().enumerate() {
                tree.add(&format!("/d/{index}"), options(host.path())).unwrap();
            }
            std::thread::sleep(Duration::from_millis(round % 4));
            for index in 0..hosts.len() {
                let path = format!("/d/{index}");
                tree.set_read_only(&path, round % 2 == 0).unwrap();
                tree.remove(&path, index == 0).unwrap();
            }
        }
        stop.store(true, Relaxed);
    });
    assert_eq!(fs::read_dir(door.path()).unwrap().count(), 0);
    assert!(fs::read_dir(door.path().join("d")).is_err());
    assert!(door.failures().is_empty(), "{:?}", door.failures());
}
