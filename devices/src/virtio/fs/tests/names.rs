//! What a guest can send that is wrong, each through a real ring: names.

use vm_memory::ByteValued;

use super::queue::guest;
use crate::fuse::abi::*;
use crate::fuse::opcode::Opcode;
use crate::fuse::testing::Guest;

/// What comes before the name, and what follows it.
type Around = (Opcode, Vec<u8>, &'static [u8]);

/// Every operation that takes a name.
fn operations() -> Vec<Around> {
    let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
    let rename = RenameIn { newdir: ROOT_ID };
    let rename2 = Rename2In { newdir: ROOT_ID, ..Rename2In::default() };
    vec![
        (Opcode::Lookup, vec![], b""),
        (Opcode::Create, create.as_slice().to_vec(), b""),
        (Opcode::Mknod, MknodIn { mode: 0o600, ..MknodIn::default() }.as_slice().to_vec(), b""),
        (Opcode::Mkdir, MkdirIn { mode: 0o700, umask: 0 }.as_slice().to_vec(), b""),
        (Opcode::Symlink, vec![], b"target\0"),
        (Opcode::Unlink, vec![], b""),
        (Opcode::Rmdir, vec![], b""),
        (Opcode::Rename, rename.as_slice().to_vec(), b"new\0"),
        (Opcode::Rename, [rename.as_slice(), b"old\0"].concat(), b""),
        (Opcode::Rename2, rename2.as_slice().to_vec(), b"new\0"),
        (Opcode::Rename2, [rename2.as_slice(), b"old\0"].concat(), b""),
    ]
}

fn send(guest: &Guest, (opcode, before, after): &Around, name: &[u8]) -> i32 {
    guest.call(*opcode, ROOT_ID, &[before, name, after]).error
}

#[test]
fn a_name_that_is_no_single_component_is_refused_by_every_operation() {
    let guest = guest();
    std::fs::write(guest.path().join("old"), "").unwrap();
    std::fs::create_dir(guest.path().join("d")).unwrap();
    let link = LinkIn { oldnodeid: guest.node("old") };
    let mut operations = operations();
    operations.push((Opcode::Link, link.as_slice().to_vec(), b""));
    for operation in &operations {
        for name in [
            &b"\0"[..],
            b".\0",
            b"..\0",
            b"/\0",
            b"/etc/passwd\0",
            b"../old\0",
            b"d/../old\0",
            b"d/\0",
            b"./old\0",
            b"//\0",
        ] {
            assert_eq!(send(&guest, operation, name), libc::EINVAL, "{:?} {name:?}", operation.0);
        }
        let long = [vec![b'x'; 256], vec![0]].concat();
        assert_eq!(send(&guest, operation, &long), libc::ENAMETOOLONG, "{:?}", operation.0);
        let longest = [vec![b'x'; 4000], vec![0]].concat();
        assert_eq!(send(&guest, operation, &longest), libc::ENAMETOOLONG, "{:?}", operation.0);
    }
    let mut left: Vec<_> =
        std::fs::read_dir(guest.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    left.sort();
    assert_eq!(left, ["d", "old"], "nothing was made, moved or removed");
}

#[test]
fn a_name_that_does_not_end_or_ends_twice_is_refused_by_every_operation() {
    let guest = guest();
    std::fs::write(guest.path().join("old"), "").unwrap();
    let link = LinkIn { oldnodeid: guest.node("old") };
    let tmpfile = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
    let mut operations = operations();
    operations.push((Opcode::Link, link.as_slice().to_vec(), b""));
    operations.push((Opcode::Tmpfile, tmpfile.as_slice().to_vec(), b""));
    for (opcode, before, after) in operations.iter().filter(|(_, _, after)| after.is_empty()) {
        for name in [&b"old"[..], b"old\0more", b"old\0\0", b"old\0more\0"] {
            let error = guest.call(*opcode, ROOT_ID, &[before, name, after]).error;
            assert_eq!(error, libc::EINVAL, "{opcode:?} {name:?}");
        }
    }
    assert_eq!(std::fs::read_dir(guest.path()).unwrap().count(), 1);
}

#[test]
fn a_name_in_any_encoding_is_a_name() {
    let guest = guest();
    let create = CreateIn { flags: libc::O_RDWR as u32, mode: 0o600, ..CreateIn::default() };
    for name in [&b"\xff\xfe\x80\0"[..], b"...\0", b" \n\t\0", b"-rf\0", b"..a\0"] {
        assert_eq!(guest.call(Opcode::Create, ROOT_ID, &[create.as_slice(), name]).error, 0);
        assert_eq!(guest.call(Opcode::Lookup, ROOT_ID, &[name]).error, 0);
        guest.call(Opcode::Unlink, ROOT_ID, &[name]).ok();
    }
}

#[test]
fn a_symlinks_target_is_stored_as_it_is_and_never_followed() {
    let guest = guest();
    let outside = tempfile::tempdir().unwrap();
    std::fs::write(outside.path().join("secret"), "secret").unwrap();
    let secret = outside.path().join("secret");
    let longest = "t".repeat(4095);
    for target in [secret.to_str().unwrap(), "../..", "/", "/proc/self/mem", &longest] {
        let made: EntryOut =
            guest.call(Opcode::Symlink, ROOT_ID, &[b"link\0", target.as_bytes(), b"\0"]).get();
        assert_eq!(guest.call(Opcode::Readlink, made.nodeid, &[]).body, target.as_bytes());
        // The link is what is found and what is not opened.
        let found: EntryOut = guest.lookup(ROOT_ID, "link").get();
        assert_eq!(found.attr.mode & libc::S_IFMT, libc::S_IFLNK);
        assert_ne!(guest.open(made.nodeid, libc::O_RDWR).error, 0);
        assert_ne!(guest.create(ROOT_ID, "link", libc::O_RDWR | libc::O_TRUNC, 0o600).error, 0);
        assert_ne!(guest.lookup(made.nodeid, "secret").error, 0);
        guest.call(Opcode::Unlink, ROOT_ID, &[b"link\0"]).ok();
    }
    assert_eq!(std::fs::read(&secret).unwrap(), b"secret");
    for target in [&b"\0"[..], &[[b't'; 4096].as_slice(), b"\0"].concat(), b"no end"] {
        assert_ne!(guest.call(Opcode::Symlink, ROOT_ID, &[b"link\0", target]).error, 0);
    }
    assert!(std::fs::symlink_metadata(guest.path().join("link")).is_err());
}
