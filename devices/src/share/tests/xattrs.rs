//! Extended attributes and ACLs, as the guest has them and as the host keeps them.

use std::os::unix::fs::MetadataExt;

use rustix::fs::{XattrFlags, getxattr as host_getxattr, listxattr, setxattr as host_setxattr};

use super::*;
use crate::share::{GidMap, IdRange, UidMap, XattrPolicy};

fn mapped() -> Guest {
    Guest::with(|options| options.xattr = XattrPolicy::Mapped)
}

/// An attribute of `file` as the host has it.
fn on_host(guest: &Guest, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 4096];
    let len = host_getxattr(guest.path().join("file"), name, &mut value[..]).ok()?;
    value.truncate(len);
    Some(value)
}

fn host_names(guest: &Guest) -> Vec<String> {
    let mut names = vec![0; 65536];
    let len = listxattr(guest.path().join("file"), &mut names[..]).unwrap();
    let names = names[..len].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names.map(|name| String::from_utf8(name.to_vec()).unwrap()).collect()
}

fn list(guest: &Guest, nodeid: u64) -> Vec<String> {
    let body = GetxattrIn { size: 65536, padding: 0 };
    let body = guest.call(Opcode::Listxattr, nodeid, &[body.as_slice()]).body;
    let names = body.split(|byte| *byte == 0).filter(|name| !name.is_empty());
    let mut names: Vec<_> = names.map(|name| String::from_utf8(name.to_vec()).unwrap()).collect();
    names.sort();
    names
}

fn removexattr(guest: &Guest, nodeid: u64, name: &str) -> Answer {
    guest.call(Opcode::Removexattr, nodeid, &[name.as_bytes(), b"\0"])
}

#[test]
fn a_mapped_attribute_never_becomes_the_hosts() {
    let guest = mapped();
    let node = file(&guest, b"");
    let names = ["security.capability", "security.selinux", "security.x", "trusted.overlay.opaque"];
    for name in names {
        setxattr(&guest, node, name, name.as_bytes(), 0).ok();
        assert_eq!(getxattr(&guest, node, name, 100).body, name.as_bytes());
        assert_eq!(getxattr(&guest, node, name, 0).get::<GetxattrOut>().size, name.len() as u32);
        assert_eq!(setxattr(&guest, node, name, b"", 1).error, libc::EEXIST);
        assert_eq!(on_host(&guest, name), None, "{name} is not the host's");
        assert_eq!(on_host(&guest, &format!("user.oriel.{name}")), Some(name.into()));
    }
    setxattr(&guest, node, "user.own", b"as it is", 0).ok();
    assert_eq!(on_host(&guest, "user.own"), Some(b"as it is".to_vec()));
    assert!(host_names(&guest).iter().all(|name| name.starts_with("user.")));
    assert_eq!(
        list(&guest, node),
        [
            "security.capability",
            "security.selinux",
            "security.x",
            "trusted.overlay.opaque",
            "user.own"
        ]
    );
    for name in names {
        removexattr(&guest, node, name).ok();
        assert_eq!(removexattr(&guest, node, name).error, libc::ENODATA);
    }
    assert_eq!(list(&guest, node), ["user.own"]);
}

#[test]
fn what_is_the_hosts_is_hidden_when_attributes_are_mapped() {
    let guest = mapped();
    let node = file(&guest, b"");
    let host = |name: &str, value: &[u8]| {
        host_setxattr(guest.path().join("file"), name, value, XattrFlags::empty())
    };
    host("user.oriel.other", b"1").unwrap();
    host("user.oriel.user.x", b"1").unwrap();
    host("user.oriel.security.x", b"there").unwrap();
    if is_root() {
        host("trusted.secret", b"1").unwrap();
        host("security.x", b"the host's").unwrap();
        assert_eq!(getxattr(&guest, node, "trusted.secret", 100).error, libc::ENODATA);
    }
    assert_eq!(list(&guest, node), ["security.x"]);
    assert_eq!(getxattr(&guest, node, "security.x", 100).body, b"there");
    // The prefix is no way around: in the guest it is a name like any other, and another one on the host.
    for name in ["user.oriel.other", "user.oriel.security.x", "user.oriel.user.x"] {
        assert_eq!(getxattr(&guest, node, name, 100).error, libc::ENODATA, "{name}");
        assert_eq!(removexattr(&guest, node, name).error, libc::ENODATA, "{name}");
        setxattr(&guest, node, name, b"inner", 0).ok();
        assert_eq!(on_host(&guest, &format!("user.oriel.{name}")), Some(b"inner".to_vec()));
    }
    assert_eq!(on_host(&guest, "user.oriel.other"), Some(b"1".to_vec()));
    assert_eq!(getxattr(&guest, node, "security.x", 100).body, b"there");
    for name in ["user.oriel.", "user.", "security.", "trusted.", "system.x", "x", "userx.y"] {
        assert_eq!(setxattr(&guest, node, name, b"", 0).error, libc::EOPNOTSUPP, "{name}");
        assert_eq!(getxattr(&guest, node, name, 9).error, libc::EOPNOTSUPP, "{name}");
        assert_eq!(removexattr(&guest, node, name).error, libc::EOPNOTSUPP, "{name}");
    }
}

#[test]
fn a_name_that_would_be_too_long_on_the_host_is_out_of_range() {
    let guest = mapped();
    let node = file(&guest, b"");
    let long = |kind: &str, len: usize| format!("{kind}{}", "x".repeat(len - kind.len()));
    for (name, error) in [
        (long("user.", 255), 0),
        (long("trusted.", 244), 0),
        (long("trusted.", 245), libc::ERANGE),
        (long("security.", 255), libc::ERANGE),
        (long("user.oriel.", 244), 0),
        (long("user.oriel.", 245), libc::ERANGE),
        (long("user.", 256), libc::ERANGE),
    ] {
        assert_eq!(setxattr(&guest, node, &name, b"", 0).error, error, "{}", name.len());
        let missing = if error == 0 { 0 } else { error };
        assert_eq!(getxattr(&guest, node, &name, 9).error, missing, "{}", name.len());
        removexattr(&guest, node, &name);
    }
}

#[test]
fn every_change_of_a_file_takes_its_mapped_capabilities() {
    const NAME: &str = "security.capability";
    let guest = mapped();
    let node = file(&guest, b"content");
    std::fs::write(guest.path().join("source"), "copied").unwrap();
    let source = guest.node("source");
    let from = guest.fh(source, libc::O_RDONLY);
    let fh = guest.fh(node, libc::O_RDWR);
    let check = |what: &str, change: &dyn Fn() -> Answer| {
        setxattr(&guest, node, NAME, b"capabilities", 0).ok();
        setxattr(&guest, node, "user.kept", b"1", 0).ok();
        assert_eq!(change().error, 0, "{what}");
        assert_eq!(getxattr(&guest, node, NAME, 100).error, libc::ENODATA, "{what}");
        assert_eq!(list(&guest, node), ["user.kept"]);
    };
    check("write", &|| guest.write(node, fh, 0, b"x"));
    check("truncate", &|| {
        guest.setattr(
            node,
            SetattrIn { valid: SetattrValid::SIZE.bits(), size: 3, ..SetattrIn::default() },
        )
    });
    check("truncate a handle", &|| {
        let valid = (SetattrValid::SIZE | SetattrValid::FH).bits();
        guest.setattr(node, SetattrIn { valid, fh, size: 3, ..SetattrIn::default() })
    });
    check("open", &|| guest.open(node, libc::O_WRONLY | libc::O_TRUNC));
    check("fallocate", &|| fallocate(&guest, node, fh, 0, 0, 100));
    check("chown", &|| {
        let stat = std::fs::metadata(guest.path().join("file")).unwrap();
        let valid = (SetattrValid::UID | SetattrValid::GID).bits();
        guest.setattr(
            node,
            SetattrIn { valid, uid: stat.uid(), gid: stat.gid(), ..SetattrIn::default() },
        )
    });
    check("copy", &|| {
        let body = CopyFileRangeIn {
            fh_in: from,
            nodeid_out: node,
            fh_out: fh,
            len: 6,
            ..CopyFileRangeIn::default()
        };
        guest.call(Opcode::CopyFileRange, source, &[body.as_slice()])
    });
    // A page that is written back was changed earlier; a new mode is no change of the content.
    setxattr(&guest, node, NAME, b"capabilities", 0).ok();
    assert_eq!(guest.write_with(node, fh, 0, b"x", 0, WRITE_CACHE).error, 0);
    let mode = SetattrIn { valid: SetattrValid::MODE.bits(), mode: 0o755, ..SetattrIn::default() };
    assert_eq!(guest.setattr(node, mode).error, 0);
    assert_eq!(guest.open(node, libc::O_RDWR).error, 0);
    assert_eq!(getxattr(&guest, node, NAME, 100).body, b"capabilities");
}

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// An ACL of `(tag, permissions, id)`.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

/// Owner, one user, the owning group, one group, mask, others: as acl(5) orders them.
fn named(user: u32, group: u32) -> Vec<u8> {
    let none = u32::MAX;
    acl(&[(1, 7, none), (2, 6, user), (4, 5, none), (8, 4, group), (16, 7, none), (32, 0, none)])
}

/// Also sets any other attribute of a guest that has negotiated ACLs, whose requests are longer.
fn set_acl(guest: &Guest, node: u64, name: &str, value: &[u8], setxattr_flags: u32) -> Answer {
    let body = SetxattrIn { size: value.len() as u32, flags: 0 };
    let more = SetxattrIn2 { setxattr_flags, padding: 0 };
    let name = [name.as_bytes(), b"\0"].concat();
    guest.call(Opcode::Setxattr, node, &[body.as_slice(), more.as_slice(), &name, value])
}

#[test]
fn an_acl_names_the_guests_ids_in_the_guest_and_the_hosts_on_the_host() {
    let range = |host| [IdRange { guest: 0, host, count: 1000 }];
    let own = rustix::process::geteuid().as_raw();
    let guest = Guest::with(|options| {
        options.acl = true;
        options.uids = UidMap::of_ranges(&range(own)).unwrap();
        options.gids = GidMap::of_ranges(&range(own + 5000)).unwrap();
    });
    let node = file(&guest, b"");
    set_acl(&guest, node, ACCESS, &named(5, 6), 0).ok();
    assert_eq!(on_host(&guest, ACCESS), Some(named(own + 5, own + 5006)));
    assert_eq!(getxattr(&guest, node, ACCESS, 100).body, named(5, 6));
    assert_eq!(getxattr(&guest, node, ACCESS, 0).get::<GetxattrOut>().size, 52);
    assert!(list(&guest, node).contains(&ACCESS.to_string()));
    // The mask is the mode's group bits: the host has let it take effect.
    assert_eq!(guest.getattr(node).get::<AttrOut>().attr.mode & 0o777, 0o770);

    assert_eq!(set_acl(&guest, node, ACCESS, &named(1000, 6), 0).error, libc::EPERM);
    assert_eq!(set_acl(&guest, node, ACCESS, &named(5, 65534), 0).error, libc::EPERM);
    let value = named(own + 5000, own + 5006);
    let path = guest.path().join("file");
    host_setxattr(path, ACCESS, &value, XattrFlags::empty()).unwrap();
    assert_eq!(getxattr(&guest, node, ACCESS, 100).body, named(65534, 6));
    removexattr(&guest, node, ACCESS).ok();
    assert_eq!(getxattr(&guest, node, ACCESS, 100).error, libc::ENODATA);
}

#[test]
fn files_that_are_never_opened_have_acls_and_attributes_as_on_the_host() {
    let guest = Guest::with(|options| {
        options.acl = true;
        options.xattr = XattrPolicy::On;
    });
    let fifo: EntryOut = super::mknod(&guest, "fifo", libc::S_IFIFO | 0o600, 0).get();
    let link: EntryOut = super::symlink(&guest, ROOT_ID, "link", "nowhere").get();
    set_acl(&guest, fifo.nodeid, ACCESS, &named(5, 6), 0).ok();
    assert_eq!(getxattr(&guest, fifo.nodeid, ACCESS, 100).body, named(5, 6));
    assert_eq!(list(&guest, fifo.nodeid), [ACCESS]);
    assert_eq!(set_acl(&guest, link.nodeid, ACCESS, &named(5, 6), 0).error, libc::EOPNOTSUPP);
    for node in [fifo.nodeid, link.nodeid] {
        assert_eq!(set_acl(&guest, node, "user.x", b"v", 0).error, libc::EPERM, "{node}");
        assert_eq!(getxattr(&guest, node, "user.x", 9).error, libc::ENODATA, "{node}");
    }
    if !rustix::process::geteuid().is_root() {
        return; // trusted.* is root's.
    }
    for (node, name) in [(fifo.nodeid, "fifo"), (link.nodeid, "link")] {
        set_acl(&guest, node, "trusted.x", b"v", 0).ok();
        assert_eq!(getxattr(&guest, node, "trusted.x", 9).body, b"v", "{name}");
        assert!(list(&guest, node).contains(&"trusted.x".into()), "{name}");
        let mut value = [0; 9];
        let path = guest.path().join(name);
        assert_eq!(rustix::fs::lgetxattr(path, "trusted.x", &mut value), Ok(1), "{name}");
        removexattr(&guest, node, "trusted.x").ok();
        assert_eq!(getxattr(&guest, node, "trusted.x", 9).error, libc::ENODATA, "{name}");
    }
}

#[test]
fn what_is_no_acl_is_not_set() {
    let guest = Guest::with(|options| options.acl = true);
    let node = file(&guest, b"");
    let good = named(5, 6);
    for len in [1, 3, 5, 11, 13, 51] {
        assert_eq!(
            set_acl(&guest, node, ACCESS, &good[..len], 0).error,
            libc::EINVAL,
            "{len} bytes"
        );
    }
    assert_eq!(set_acl(&guest, node, ACCESS, &acl(&[(1, 8, 0)]), 0).error, libc::EINVAL);
    assert_eq!(set_acl(&guest, node, ACCESS, &acl(&[(64, 7, 0)]), 0).error, libc::EINVAL);
    assert_eq!(
        set_acl(&guest, node, ACCESS, &acl(&[(2, 7, 5)]), 0).error,
        libc::EINVAL,
        "not whole"
    );
    assert_eq!(set_acl(&guest, node, ACCESS, &[9, 0, 0, 0], 0).error, libc::EOPNOTSUPP);
    let many: Vec<_> = (0..8190).map(|id| (2, 7, id)).collect();
    assert_ne!(set_acl(&guest, node, ACCESS, &acl(&many), 0).error, 0);
    assert_eq!(set_acl(&guest, node, DEFAULT, &good, 0).error, libc::EACCES, "not of a file");
    assert_eq!(on_host(&guest, ACCESS), None);
}

#[test]
fn an_acl_set_by_a_stranger_takes_sgid_along() {
    let guest = Guest::with(|options| options.acl = true);
    let node = file(&guest, b"");
    let mode = || std::fs::metadata(guest.path().join("file")).unwrap().mode() & 0o7777;
    for (flags, expected) in [(0, 0o2000), (SETXATTR_ACL_KILL_SGID, 0)] {
        let path = guest.path().join("file");
        std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o2755))
            .unwrap();
        set_acl(&guest, node, ACCESS, &named(5, 6), flags).ok();
        assert_eq!(mode() & 0o2000, expected);
        assert_eq!(mode() & 0o777, 0o770);
    }
}

#[test]
fn a_default_acl_takes_the_place_of_the_umask() {
    let guest = Guest::with(|options| options.acl = true);
    let d: EntryOut = mkdir(&guest, ROOT_ID, "d", 0o755).get();
    let none = u32::MAX;
    let default = acl(&[(1, 7, none), (2, 7, 5), (4, 5, none), (16, 7, none), (32, 5, none)]);
    set_acl(&guest, d.nodeid, DEFAULT, &default, 0).ok();
    let body = CreateIn { flags: libc::O_RDWR as u32, mode: 0o666, umask: 0o77, fuse_flags: 0 };
    assert_eq!(guest.call(Opcode::Create, d.nodeid, &[body.as_slice(), b"f\0"]).error, 0);
    let made = std::fs::metadata(guest.path().join("d/f")).unwrap();
    assert_eq!(made.mode() & 0o777, 0o664, "the mask is cut by the mode, and nothing by the umask");
    let sub = MkdirIn { mode: 0o777, umask: 0o77 };
    let sub: EntryOut = guest.call(Opcode::Mkdir, d.nodeid, &[sub.as_slice(), b"sub\0"]).get();
    assert_eq!(getxattr(&guest, sub.nodeid, DEFAULT, 100).body, default, "it is inherited");
}

#[test]
fn without_the_option_there_are_no_acls() {
    for xattr in [XattrPolicy::On, XattrPolicy::Mapped] {
        let guest = Guest::with(|options| options.xattr = xattr);
        let node = file(&guest, b"");
        let path = guest.path().join("file");
        host_setxattr(path, ACCESS, &named(5, 6), XattrFlags::empty()).unwrap();
        assert_eq!(list(&guest, node), Vec::<String>::new());
        for name in [ACCESS, DEFAULT] {
            assert_eq!(setxattr(&guest, node, name, &named(5, 6), 0).error, libc::EOPNOTSUPP);
            assert_eq!(getxattr(&guest, node, name, 100).error, libc::EOPNOTSUPP);
            assert_eq!(removexattr(&guest, node, name).error, libc::EOPNOTSUPP);
        }
    }
}

#[test]
fn acls_need_attributes_and_a_file_system_that_has_them() {
    let new = |path: &std::path::Path, xattr| {
        let mut options = crate::share::Options::new(path);
        options.acl = true;
        options.xattr = xattr;
        crate::share::Share::new(options).err().map(|error| error.to_string())
    };
    let directory = tempfile::tempdir().unwrap();
    assert_eq!(new(directory.path(), XattrPolicy::Mapped), None);
    let error = new(directory.path(), XattrPolicy::Off).unwrap();
    assert!(error.contains("xattr=off"), "{error}");
}

/// The host keeps extended attributes of such a file from its owner. So does it when capabilities should go.
#[test]
fn an_ordinary_users_file_that_nobody_may_read_or_write_is_written_by_who_has_made_it() {
    let serve = || {
        let guest = Guest::with(|options| {
            options.xattr = XattrPolicy::Mapped;
            options.switch_identity = Some(false);
        });
        let made = guest.create(ROOT_ID, "file", libc::O_RDWR, 0);
        let (entry, open): (EntryOut, OpenOut) = (made.part(0), made.part(128));
        assert_eq!(entry.attr.mode & 0o7777, 0);
        let node = entry.nodeid;
        assert_eq!(getxattr(&guest, node, "user.x", 9).error, libc::EACCES);
        assert_eq!(guest.write(node, open.fh, 0, b"content").get::<WriteOut>().size, 7);
        fallocate(&guest, node, open.fh, 0, 0, 100).ok();
        let valid = (SetattrValid::SIZE | SetattrValid::FH).bits();
        let cut = SetattrIn { valid, fh: open.fh, size: 3, ..SetattrIn::default() };
        assert_eq!(guest.setattr(node, cut).get::<AttrOut>().attr.size, 3);
        assert_eq!(guest.read(node, open.fh, 0, 9).body, b"con");
        release(&guest, Opcode::Release, node, open.fh).ok();
        assert_eq!(guest.open(node, libc::O_RDONLY).error, libc::EACCES);
    };
    // Requests are served by the thread that makes them, and to files this one is an ordinary user's from now on.
    let as_nobody = || {
        if is_root() {
            crate::share::sys::set_fsuid(65534);
        }
        serve();
    };
    std::thread::scope(|scope| scope.spawn(as_nobody).join().unwrap());
}
