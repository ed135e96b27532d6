//! What arrives on disks: shared directories on file systems that the tests make.

use super::mounts::with_mounts;
use super::*;
use crate::share::testing::Disk;
use rustix::mount::mount_bind;

const MIB: usize = 1 << 20;

/// Writes so many MiB to a new file of a directory, and leaves it closed.
fn write(guest: &Guest, parent: u64, name: &str, mebibytes: usize) -> u64 {
    let made = guest.create(parent, name, libc::O_RDWR, 0o600);
    let (entry, open): (EntryOut, OpenOut) = (made.part(0), made.part(128));
    let data = vec![0x5a; MIB];
    for piece in 0..mebibytes {
        let written = guest.write(entry.nodeid, open.fh, (piece * MIB) as u64, &data);
        assert_eq!(written.get::<WriteOut>().size, 1 << 20);
    }
    release(guest, Opcode::Release, entry.nodeid, open.fh).ok();
    entry.nodeid
}

fn syncfs(guest: &Guest, node: u64) {
    guest.call(Opcode::Syncfs, node, &[&[0; 8]]).ok();
}

/// ext4 gives data a place on the disk when it is synced, or when it is half a minute old.
#[test]
fn syncfs_brings_data_to_the_disk_of_each_file_system_that_it_is_for() {
    with_mounts(|guest| {
        let disks = || Some([Disk::new("ext4", 512)?, Disk::new("ext4", 512)?]);
        let Some([outer, inner]) = disks() else {
            eprintln!("skipped: there is no mkfs.ext4, or no loop device");
            return;
        };
        let sub = guest.path().join("sub");
        std::fs::create_dir(&sub).unwrap();
        mount_bind(outer.path(), &sub).unwrap();
        std::fs::create_dir(sub.join("inner")).unwrap();
        mount_bind(inner.path(), sub.join("inner")).unwrap();
        let reached = || [outer.reached(), inner.reached()];
        let both = (8 * MIB) as u64;

        // A guest that is told of mounts asks for each.
        let nodes = [guest.node("sub"), guest.node("sub/inner")];
        let before = reached();
        for node in nodes {
            write(guest, node, "told", 8);
        }
        for at in 0..2 {
            syncfs(guest, nodes[at]);
            assert!(reached()[at] >= before[at] + both);
        }

        // One that is not asks once.
        let path = guest.path().to_owned();
        let other = Guest::with(|options| {
            options.directory = path;
            options.submounts = false;
            options.file_handles = guest.share.options().file_handles;
        });
        let nodes = [other.node("sub"), other.node("sub/inner")];
        let before = reached();
        for node in nodes {
            write(&other, node, "untold", 8);
        }
        syncfs(&other, ROOT_ID);
        let after = reached();
        for at in 0..2 {
            assert!(after[at] >= before[at] + both, "{before:?} {after:?}");
        }
        other.session.reset();
        rustix::mount::unmount(sub.join("inner"), rustix::mount::UnmountFlags::DETACH).unwrap();
    });
}

#[test]
fn a_copy_takes_no_room_where_the_hosts_file_system_shares_blocks() {
    for kind in ["btrfs", "xfs"] {
        let Some(disk) = Disk::new(kind, 512) else {
            eprintln!(
                "skipped: there is no mkfs.{kind}, no loop device, or no {kind} in the kernel"
            );
            continue;
        };
        let path = disk.path().to_owned();
        let guest = Guest::with(|options| options.directory = path);
        let length = 64 * MIB as u64;
        let from = write(&guest, ROOT_ID, "from", 64);
        // Data has its room only then.
        syncfs(&guest, ROOT_ID);
        let free = || {
            let stat: StatfsOut = guest.call(Opcode::Statfs, ROOT_ID, &[]).get();
            stat.st.bfree * u64::from(stat.st.frsize)
        };
        let before = free();

        let fh_in = guest.fh(from, libc::O_RDONLY);
        let made = guest.create(ROOT_ID, "to", libc::O_RDWR, 0o600);
        let (entry, open): (EntryOut, OpenOut) = (made.part(0), made.part(128));
        let body = CopyFileRangeIn {
            fh_in,
            nodeid_out: entry.nodeid,
            fh_out: open.fh,
            len: length,
            ..CopyFileRangeIn::default()
        };
        let answer = guest.call(Opcode::CopyFileRange, from, &[body.as_slice()]);
        assert_eq!(u64::from(answer.get::<WriteOut>().size), length, "{kind}: in one go");
        syncfs(&guest, ROOT_ID);
        let taken = before.saturating_sub(free());
        assert!(taken < length / 8, "{kind}: the copy takes {taken} bytes");
        let [a, b] = ["from", "to"].map(|name| std::fs::read(disk.path().join(name)).unwrap());
        assert!(a == b && a.len() as u64 == length, "{kind}");
        // What shares blocks is two files all the same.
        assert_eq!(guest.write(entry.nodeid, open.fh, 5, b"changed").get::<WriteOut>().size, 7);
        assert!(std::fs::read(disk.path().join("from")).unwrap() == a, "{kind}");
        guest.session.reset();
    }
}
