//! A share that is mounted once more with other ids (mount_setattr(2), `MOUNT_ATTR_IDMAP`), as containers do.

#![expect(unsafe_code, reason = "mount_setattr(2), for which there is no wrapper")]

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::{Command, Stdio};

use devices::share::{Options, XattrPolicy};
use integration::Door;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};

/// Id 0 of the share is this one in the mount, and the next ones follow.
const FIRST: u32 = 41000;

/// A user namespace that maps ten ids from 0 to those from `FIRST` on.
fn namespace() -> File {
    let mut child = Command::new("unshare")
        .args(["--user", "sh", "-c", "echo; cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    // It is in its namespace once it says something.
    io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut [0]).unwrap();
    let process = Path::new("/proc").join(child.id().to_string());
    for map in ["uid_map", "gid_map"] {
        fs::write(process.join(map), format!("0 {FIRST} 10")).unwrap();
    }
    let namespace = File::open(process.join("ns/user")).unwrap();
    drop(child.stdin.take());
    child.wait().unwrap();
    namespace
}

/// Mounts what is at `from` at `to` too, with the ids of `namespace`.
fn mount_mapped(from: &Path, to: &Path, namespace: &File) -> io::Result<()> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, from, flags)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: namespace.as_raw_fd() as u64,
    };
    // SAFETY: the path is an empty string with its end, and the size is that of the structure, which outlives
    // the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(move_mount(tree.as_fd(), "", CWD, to, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn touch_as(user: u32, path: &Path) -> bool {
    let mut command = Command::new("setpriv");
    command.args([format!("--reuid={user}"), format!("--regid={user}")]).arg("--clear-groups");
    command.arg("touch").arg(path).stderr(Stdio::null()).status().unwrap().success()
}

#[test]
fn a_mount_with_other_ids_shows_them_and_makes_files_with_the_shares() {
    let shared = tempfile::tempdir().unwrap();
    fs::set_permissions(shared.path(), PermissionsExt::from_mode(0o1777)).unwrap();
    fs::write(shared.path().join("there"), "").unwrap();
    chown(shared.path().join("there"), Some(3), Some(4)).unwrap();
    let mut options = Options::new(shared.path());
    options.acl = true;
    options.xattr = XattrPolicy::Mapped;
    let door = Door::mount(options).unwrap();
    let mapped = tempfile::tempdir().unwrap();
    mount_mapped(door.path(), mapped.path(), &namespace()).unwrap();
    let owner = |path: &Path| {
        let stat = fs::metadata(path).unwrap();
        (stat.uid(), stat.gid())
    };
    let there = owner(&mapped.path().join("there"));
    let made = touch_as(FIRST + 5, &mapped.path().join("made"));
    let unmapped = touch_as(7, &mapped.path().join("never"));
    let given = chown(mapped.path().join("there"), Some(FIRST + 6), None).is_ok();
    let in_mount = owner(&mapped.path().join("there"));
    unmount(mapped.path(), UnmountFlags::DETACH).unwrap();

    assert_eq!(there, (FIRST + 3, FIRST + 4));
    assert!(made);
    assert_eq!(owner(&shared.path().join("made")), (5, 5), "on the host");
    assert!(!unmapped, "whoever has no id in the share makes no file there");
    assert!(!shared.path().join("never").exists());
    assert!(given);
    assert_eq!((in_mount, owner(&shared.path().join("there"))), ((FIRST + 6, FIRST + 4), (6, 4)));
}
