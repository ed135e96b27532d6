use std::sync::Arc;

use super::*;
use crate::dax::{DaxWindow, Window};
use crate::share::DaxPolicy;

const READ: u64 = SETUPMAPPING_READ;
const BOTH: u64 = SETUPMAPPING_READ | SETUPMAPPING_WRITE;
const RANGE: u64 = 2 << 20;

fn window(guest: &Guest) -> &Arc<Window> {
    guest.window.as_ref().unwrap()
}

fn peek(guest: &Guest, offset: u64) -> Option<u8> {
    window(guest).peek(offset)
}

fn poke(guest: &Guest, offset: u64, byte: u8) -> bool {
    window(guest).poke(offset, byte)
}

fn guest_with_file() -> (Guest, u64) {
    let guest = Guest::new();
    let data: Vec<u8> = (0..5u8).flat_map(|page| [page + 1; 4096]).collect();
    std::fs::write(guest.path().join("file"), data).unwrap();
    let node = guest.node("file");
    (guest, node)
}

#[test]
fn a_file_appears_in_the_window_by_node_id_and_goes() {
    let (guest, node) = guest_with_file();
    guest.setup(node, 0, RANGE, READ, RANGE).ok();
    assert_eq!(peek(&guest, RANGE), Some(1));
    assert_eq!(peek(&guest, RANGE + 4 * 4096), Some(5));
    assert_eq!(peek(&guest, RANGE + 5 * 4096), None, "past the end");
    assert_eq!(peek(&guest, 0), None);
    // It stays when the node is forgotten: a vCPU may still use it.
    guest.forget(node, 1);
    assert_eq!(peek(&guest, RANGE), Some(1));
    guest.remove(1, &[(RANGE, RANGE)]).ok();
    assert_eq!(peek(&guest, RANGE), None);
}

#[test]
fn the_same_range_again_makes_it_writable_and_is_counted_as_that() {
    let (guest, node) = guest_with_file();
    guest.setup(node, 0, RANGE, READ, 0).ok();
    guest.setup(node, 0, RANGE, BOTH, 0).ok();
    assert!(poke(&guest, 5, 0x55));
    assert_eq!(std::fs::read(guest.path().join("file")).unwrap()[5], 0x55);
    // READ and WRITE see the same pages.
    let fh = guest.fh(node, libc::O_RDWR);
    assert_eq!(guest.read(node, fh, 5, 1).body, [0x55]);
    assert_eq!(guest.write(node, fh, 6, &[0x66]).error, 0);
    assert_eq!(peek(&guest, 6), Some(0x66));
    let counters = guest.session.snapshot();
    for expected in [("SETUPMAPPING", 2), ("dax_setups", 2), ("dax_upgrades", 1), ("dax_live", 1)] {
        assert!(counters.contains(&expected), "{expected:?} in {counters:?}");
    }
}

#[test]
fn mappings_that_the_specification_forbids_are_refused() {
    let (guest, node) = guest_with_file();
    let size = window(&guest).size();
    guest.setup(node, 0, 4096, READ, 0).ok();
    for (foffset, len, flags, moffset) in [
        (0, 0, READ, 0),
        (0, 4096, 0, 0),
        (0, 4096, SETUPMAPPING_WRITE, 0),
        (0, 4096, 4, 0),
        (0, 4096, BOTH | 4, 0),
        (0, 4096, u64::MAX, 0),
        (1, 4096, READ, 0),
        (0, 4097, READ, 0),
        (0, 4096, READ, 2048),
        (0, 4096, READ, size),
        (0, 8192, READ, size - 4096),
        (0, size + 4096, READ, 0),
        (0, u64::MAX - 4095, READ, 8192),
        (0, 4096, READ, u64::MAX - 4095),
        (u64::MAX - 4095, 4096, READ, 0),
        (u64::MAX - 4095, 8192, READ, 0),
        (i64::MAX as u64 - 4095, 4096, READ, 0),
    ] {
        let answer = guest.setup(node, foffset, len, flags, moffset);
        assert_eq!(answer.error, libc::EINVAL, "{foffset:#x} {len:#x} {flags:#x} {moffset:#x}");
    }
    assert_eq!(guest.setup(ROOT_ID, 0, 4096, READ, 0).error, libc::EINVAL, "a directory");
    let fifo: EntryOut = mknod(&guest, "fifo", libc::S_IFIFO | 0o600, 0).get();
    assert_eq!(guest.setup(fifo.nodeid, 0, 4096, READ, 0).error, libc::EINVAL);
    assert_eq!(peek(&guest, 0), Some(1), "what was there is still there");
    assert_eq!(window(&guest).live_mappings(), 1);
}

#[test]
fn a_removal_with_one_bad_range_removes_nothing() {
    let (guest, node) = guest_with_file();
    let size = window(&guest).size();
    guest.setup(node, 0, 8192, READ, 0).ok();
    for bad in [
        (1, 4096),
        (0, 1),
        (0, 0),
        (size, 4096),
        (0, size + 4096),
        (u64::MAX - 4095, 4096),
        (4096, u64::MAX - 4095),
    ] {
        assert_eq!(guest.remove(2, &[(0, 4096), bad]).error, libc::EINVAL, "{bad:?}");
    }
    for (count, ranges) in [(0, 0), (0, 1), (2, 1), (u32::MAX, 1), (1, 0)] {
        let ranges = vec![(0, 4096); ranges];
        assert_eq!(guest.remove(count, &ranges).error, libc::EINVAL, "{count}");
    }
    assert_eq!(peek(&guest, 0), Some(1));
    // More ranges than the count says are not looked at; what is not mapped may be removed.
    guest.remove(1, &[(4096, 4096), (0, 4096)]).ok();
    assert_eq!((peek(&guest, 0), peek(&guest, 4096)), (Some(1), None));
    guest.remove(256, &vec![(0, size); 256]).ok();
    assert_eq!((peek(&guest, 0), window(&guest).live_mappings()), (None, 0));
}

#[test]
fn a_file_that_may_not_be_written_is_not_mapped_writable() {
    if is_root() {
        return; // Root may write everything.
    }
    let (guest, node) = guest_with_file();
    let path = guest.path().join("file");
    std::fs::set_permissions(path, std::os::unix::fs::PermissionsExt::from_mode(0o400)).unwrap();
    assert_eq!(guest.setup(node, 0, 4096, BOTH, 0).error, libc::EACCES);
    guest.setup(node, 0, 4096, READ, 0).ok();
}

#[test]
fn a_truncated_file_costs_the_guest_zeros_and_nothing_else() {
    let (guest, node) = guest_with_file();
    guest.setup(node, 0, RANGE, BOTH, 0).ok();
    std::fs::File::options()
        .write(true)
        .open(guest.path().join("file"))
        .unwrap()
        .set_len(0)
        .unwrap();
    assert_eq!(peek(&guest, 4096), None);
    assert_eq!(window(&guest).repair_truncated().unwrap(), 1);
    assert_eq!(peek(&guest, 4096), Some(0));
    let fh = guest.fh(node, libc::O_RDWR);
    assert_eq!(guest.write(node, fh, 0, &[9; 8192]).error, 0);
    assert_eq!(peek(&guest, 4096), Some(9), "the file's page is back");
    // The same when the host made it longer, as soon as the guest is told of the size.
    std::fs::write(guest.path().join("file"), [7; 12288]).unwrap();
    assert_eq!(window(&guest).repair_truncated().unwrap(), 1);
    assert_eq!(guest.getattr(node).get::<AttrOut>().attr.size, 12288);
    assert_eq!(peek(&guest, 8192), Some(7));
}

#[test]
fn mapping_and_removing_at_once_ends_with_an_empty_window() {
    let (guest, node) = guest_with_file();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let guest = &guest;
            scope.spawn(move || {
                for round in 0..300 {
                    let at = (round + thread) % 4 * 4096;
                    match round % 3 {
                        0 => guest.setup(node, 0, 8192, BOTH, at).ok(),
                        1 => guest.setup(node, 4096, 4096, READ, at).ok(),
                        _ => guest.remove(1, &[(at, 8192)]).ok(),
                    }
                }
            });
        }
    });
    guest.session.reset();
    assert_eq!(window(&guest).live_mappings(), 0);
    assert!((0..8).all(|page| peek(&guest, page * 4096).is_none()));
}

/// An overlay of a lower directory and an empty upper one, mounted nowhere. None where this process may not
/// or the host's file system cannot.
struct Overlay {
    mount: std::os::fd::OwnedFd,
    layers: tempfile::TempDir,
}

impl Overlay {
    fn new(data: &[u8]) -> Option<Self> {
        use rustix::mount::{
            FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string,
            fsmount, fsopen,
        };
        let layers = tempfile::tempdir().unwrap();
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).ok()?;
        for (option, name) in [("lowerdir", "lower"), ("upperdir", "upper"), ("workdir", "work")] {
            let path = layers.path().join(name);
            std::fs::create_dir(&path).unwrap();
            fsconfig_set_string(&context, option, &*path).ok()?;
        }
        std::fs::write(layers.path().join("lower/file"), data).unwrap();
        fsconfig_create(&context).ok()?;
        let flags = FsMountFlags::FSMOUNT_CLOEXEC;
        let mount = fsmount(&context, flags, MountAttrFlags::empty()).ok()?;
        Some(Self { mount, layers })
    }

    fn path(&self) -> std::path::PathBuf {
        format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&self.mount)).into()
    }

    fn is_copied_up(&self) -> bool {
        self.layers.path().join("upper/file").exists()
    }
}

fn flags_of(attr: &Attr) -> u32 {
    attr.flags & ATTR_DAX
}

#[test]
fn on_overlayfs_no_file_is_marked_for_dax_and_every_answer_says_so() {
    let Some(overlay) = Overlay::new(&[1; 4096]) else { return };
    for (policy, expected) in [(DaxPolicy::Inode, 0), (DaxPolicy::Always, ATTR_DAX)] {
        let guest = Guest::with(|options| {
            options.directory = overlay.path();
            options.dax = policy;
        });
        let entry: EntryOut = guest.lookup(ROOT_ID, "file").get();
        assert_eq!(flags_of(&entry.attr), expected, "LOOKUP");
        assert_eq!(flags_of(&guest.getattr(entry.nodeid).get::<AttrOut>().attr), expected);
        let made: EntryOut = mknod(&guest, "made", libc::S_IFREG | 0o600, 0).get();
        assert_eq!(flags_of(&made.attr), expected, "MKNOD");
        std::fs::remove_file(overlay.path().join("made")).unwrap();
    }
    let guest = Guest::with(|options| options.dax = DaxPolicy::Inode);
    std::fs::write(guest.path().join("file"), "x").unwrap();
    let entry: EntryOut = guest.lookup(ROOT_ID, "file").get();
    assert_eq!(flags_of(&entry.attr), ATTR_DAX, "elsewhere");
}

#[test]
fn a_mapping_of_a_lower_file_of_overlayfs_shows_what_is_written_afterwards() {
    let Some(overlay) = Overlay::new(&[1; 8192]) else { return };
    let guest = Guest::with(|options| {
        options.directory = overlay.path();
        options.dax = DaxPolicy::Always;
    });
    let node = guest.node("file");
    guest.setup(node, 0, RANGE, READ, 0).ok();
    assert!(overlay.is_copied_up());
    let fh = guest.fh(node, libc::O_RDWR);
    assert_eq!(guest.write(node, fh, 10, &[9; 20]).error, 0);
    assert_eq!((peek(&guest, 9), peek(&guest, 10)), (Some(1), Some(9)));
    assert!(!poke(&guest, 0, 5), "the mapping is read-only all the same");
}

#[test]
fn a_read_only_share_of_overlayfs_copies_nothing_up_and_a_new_mapping_shows_the_hosts_copy() {
    let Some(overlay) = Overlay::new(&[1; 8192]) else { return };
    let guest = Guest::with(|options| {
        options.directory = overlay.path();
        options.dax = DaxPolicy::Always;
        options.read_only = true;
    });
    let node = guest.node("file");
    guest.setup(node, 0, 4096, READ, 0).ok();
    guest.setup(node, 4096, 4096, READ, 4096).ok();
    assert!(!overlay.is_copied_up());
    assert_eq!(window(&guest).live_files(), 1);
    std::fs::write(overlay.path().join("file"), [7; 8192]).unwrap();
    assert!(overlay.is_copied_up());
    assert_eq!(peek(&guest, 0), Some(1), "the old file, as documented");
    guest.setup(node, 0, 4096, READ, 0).ok();
    assert_eq!((peek(&guest, 0), peek(&guest, 4096)), (Some(7), Some(1)));
}

/// Both ways to reach a node, because a copy has other numbers where the layers are of several file systems.
#[test]
fn a_file_of_overlayfs_that_is_copied_up_while_it_is_open_stays_the_same_file() {
    for file_handles in [true, false] {
        let Some(overlay) = Overlay::new(&[1; 8192]) else { return };
        let guest = Guest::with(|options| {
            options.directory = overlay.path();
            options.file_handles = file_handles;
        });
        let entry: EntryOut = guest.lookup(ROOT_ID, "file").get();
        let node = entry.nodeid;
        let reader = guest.fh(node, libc::O_RDONLY);
        assert_eq!(guest.read(node, reader, 0, 1).body, [1]);
        assert!(!overlay.is_copied_up());
        let writer = guest.fh(node, libc::O_RDWR);
        assert!(overlay.is_copied_up());
        assert_eq!(guest.write(node, writer, 0, &[9; 10]).error, 0);
        // Who had it open before, who looks again, and who opens it now.
        assert_eq!(guest.read(node, reader, 9, 2).body, [9, 1]);
        let again: EntryOut = guest.lookup(ROOT_ID, "file").get();
        assert_eq!((again.nodeid, again.attr.ino), (node, entry.attr.ino));
        let fresh = guest.fh(node, libc::O_RDONLY);
        assert_eq!(guest.read(node, fresh, 9, 2).body, [9, 1]);
        for fh in [reader, fresh] {
            release(&guest, Opcode::Release, node, fh).ok();
        }
        let valid = SetattrValid::SIZE.bits();
        let cut = guest.setattr(node, SetattrIn { valid, size: 5, ..SetattrIn::default() });
        assert_eq!(cut.get::<AttrOut>().attr.size, 5);
        // By another name, and by none.
        rename(&guest, (ROOT_ID, "file"), (ROOT_ID, "moved"), 0).ok();
        assert_eq!(guest.getattr(node).get::<AttrOut>().attr.size, 5);
        unlink(&guest, Opcode::Unlink, ROOT_ID, "moved").ok();
        assert_eq!(guest.write(node, writer, 5, &[7]).error, 0);
        assert_eq!(guest.read(node, writer, 4, 10).body, [9, 7]);
        release(&guest, Opcode::Release, node, writer).ok();
        assert_eq!(guest.getattr(node).get::<AttrOut>().attr.size, 6);
        guest.forget(node, 2);
        assert_eq!((guest.share.live_descriptors(), guest.share.live_inodes()), (0, 1));
    }
}
