use std::collections::HashSet;

use super::*;

/// Lists a whole directory with small buffers.
fn all(guest: &Guest, plus: bool, fh: u64, size: u32) -> Vec<Vec<u8>> {
    let mut names = Vec::new();
    let mut offset = 0;
    loop {
        let part = guest.list(plus, ROOT_ID, fh, offset, size).unwrap();
        let Some(last) = part.last() else {
            return names;
        };
        offset = last.next;
        names.extend(part.into_iter().map(|name| name.name));
    }
}

#[test]
fn a_large_directory_is_listed_whole_with_small_buffers() {
    let guest = Guest::with(|options| options.max_inodes = Some(5000));
    for at in 0..1200 {
        let name = format!("{at}-{}", "n".repeat(at % 60));
        std::os::unix::fs::symlink("x", guest.path().join(name)).unwrap();
    }
    let fh = guest.opendir(ROOT_ID);
    for (plus, size) in [(false, 300), (false, 4096), (true, 300), (true, 4096), (true, 1 << 20)] {
        if plus
            && rustix::process::getrlimit(rustix::process::Resource::Nofile).current < Some(2000)
        {
            continue;
        }
        let names = all(&guest, plus, fh, size);
        let unique: HashSet<_> = names.iter().collect();
        assert_eq!((names.len(), unique.len()), (1202, 1202), "{plus} {size}");
    }
}

#[test]
fn readdirplus_counts_a_lookup_of_every_entry_it_names_and_no_other() {
    let guest = Guest::new();
    for at in 0..20 {
        std::fs::write(guest.path().join(format!("file{at}")), "").unwrap();
    }
    let fh = guest.opendir(ROOT_ID);
    let names = guest.list(true, ROOT_ID, fh, 0, 160 * 7).unwrap();
    assert_eq!(names.len(), 7);
    let nodes: Vec<u64> = names
        .iter()
        .filter(|name| name.name != b"." && name.name != b"..")
        .map(|name| name.entry.unwrap().nodeid)
        .collect();
    assert!(nodes.iter().all(|node| *node > ROOT_ID));
    assert_eq!(guest.share.live_inodes(), 1 + nodes.len());
    for node in &nodes {
        guest.forget(*node, 1);
    }
    assert_eq!(guest.share.live_inodes(), 1);
    // A plain listing counts nothing, and "." and ".." never do.
    all(&guest, false, fh, 4096);
    assert_eq!(guest.share.live_inodes(), 1);
    for name in guest.list(true, ROOT_ID, fh, 0, 4096).unwrap() {
        if name.name == b"." || name.name == b".." {
            assert_eq!(name.entry.unwrap().nodeid, 0);
        }
    }
}

#[test]
fn a_name_that_vanishes_takes_no_other_with_it() {
    let guest = Guest::new();
    for at in 0..200 {
        std::fs::write(guest.path().join(at.to_string()), "").unwrap();
    }
    let fh = guest.opendir(ROOT_ID);
    let first = guest.list(true, ROOT_ID, fh, 0, 2000).unwrap();
    let seen: HashSet<Vec<u8>> = first.iter().map(|name| name.name.clone()).collect();
    let rest: Vec<String> = (0..200)
        .map(|at: i32| at.to_string())
        .filter(|name| !seen.contains(name.as_bytes()))
        .collect();
    for name in rest.iter().step_by(2) {
        std::fs::remove_file(guest.path().join(name)).unwrap();
    }
    let mut listed = HashSet::new();
    let mut offset = first.last().unwrap().next;
    loop {
        let part = guest.list(true, ROOT_ID, fh, offset, 2000).unwrap();
        let Some(last) = part.last() else { break };
        offset = last.next;
        listed.extend(part.into_iter().map(|name| name.name));
    }
    assert!(rest.iter().skip(1).step_by(2).all(|name| listed.contains(name.as_bytes())));
}

#[test]
fn a_listing_starts_anew_from_the_start() {
    let guest = Guest::new();
    let fh = guest.opendir(ROOT_ID);
    assert_eq!(all(&guest, false, fh, 4096).len(), 2);
    std::fs::write(guest.path().join("new"), "").unwrap();
    assert_eq!(all(&guest, false, fh, 4096).len(), 3);
}

#[test]
fn cookies_and_sizes_that_the_guest_made_up_are_harmless() {
    let mut guest = Guest::new();
    std::fs::write(guest.path().join("file"), "").unwrap();
    let fh = guest.opendir(ROOT_ID);
    for offset in [1, 12345, i64::MAX as u64, 1 << 63, u64::MAX] {
        let _ = guest.list(false, ROOT_ID, fh, offset, 4096);
        let _ = guest.list(true, ROOT_ID, fh, offset, 4096);
    }
    for size in [0, 1, 23, 31] {
        assert_eq!(guest.list(false, ROOT_ID, fh, 0, size).unwrap_err(), libc::EINVAL);
    }
    assert_eq!(guest.list(false, ROOT_ID, fh, 0, 32).unwrap().len(), 1);
    assert_eq!(guest.list(false, ROOT_ID, fh, 0, u32::MAX).unwrap().len(), 3);
    guest.room = 16 + 40;
    assert_eq!(guest.list(false, ROOT_ID, fh, 0, u32::MAX).unwrap().len(), 1);
    assert_eq!(all(&guest, false, fh, 4096).len(), 3);
}

#[test]
fn directories_are_synced_and_are_no_files() {
    let guest = Guest::new();
    let fh = guest.opendir(ROOT_ID);
    let body = FsyncIn { fh, ..FsyncIn::default() };
    guest.call(Opcode::Fsyncdir, ROOT_ID, &[body.as_slice()]).ok();
    let answer = guest.call(Opcode::Fsync, ROOT_ID, &[body.as_slice()]);
    assert_eq!(answer.error, libc::EBADF);
    std::fs::write(guest.path().join("file"), "").unwrap();
    let file = guest.node("file");
    let body = OpenIn::default();
    let answer = guest.call(Opcode::Opendir, file, &[body.as_slice()]);
    assert_eq!(answer.error, libc::ENOTDIR);
}

/// Lists from a cookie on, as a guest does whose process reads with a buffer for `taken` names: of each reply
/// it takes so many, and asks for the rest again. Calls `meanwhile` with what it took after each.
fn list_on(
    guest: &Guest,
    nodeid: u64,
    (plus, size, taken): (bool, u32, usize),
    mut offset: u64,
    mut meanwhile: impl FnMut(&[Vec<u8>]),
) -> Vec<Vec<u8>> {
    let fh = guest.opendir(nodeid);
    let mut names = Vec::new();
    loop {
        let part = guest.list(plus, nodeid, fh, offset, size).unwrap();
        for one in part.iter().filter_map(|one| one.entry).filter(|entry| entry.nodeid != 0) {
            guest.forget(one.nodeid, 1);
        }
        let part: Vec<_> = part.into_iter().take(taken).collect();
        let Some(last) = part.last() else {
            release(guest, Opcode::Releasedir, nodeid, fh).ok();
            return names;
        };
        offset = last.next;
        let part: Vec<_> = part.into_iter().map(|name| name.name).collect();
        meanwhile(&part);
        names.extend(part);
        assert!(names.len() < 100_000, "a listing without end");
    }
}

/// Lists a directory of `count` names while names vanish from it, those just listed and others, and checks
/// that each that stayed is listed, and once.
fn lose_none(guest: &mut Guest, path: &std::path::Path, nodeid: u64, count: u32) {
    std::fs::write(path.join("one"), "").unwrap();
    for way in [
        (false, 4096, usize::MAX),
        (true, 4096, usize::MAX),
        (false, 4096, 50),
        (true, 4096, 7),
        (false, 300, usize::MAX),
        (true, 600, usize::MAX),
        (false, 128 << 10, usize::MAX),
        (true, 128 << 10, usize::MAX),
    ] {
        guest.room = 16 + way.1 as usize;
        for at in 0..count {
            // Names of one file are made faster than files. Those that stayed are there.
            let _ = std::fs::hard_link(path.join("one"), path.join(format!("name{at}")));
        }
        let mut gone = HashSet::new();
        let mut spare = (0..count).step_by(5);
        let names = list_on(guest, nodeid, way, 0, |part| {
            // What was listed, as rm -r does, and what may be listed yet or not, from all over the directory.
            let listed = part.iter().filter(|name| name.ends_with(b"7") || name.ends_with(b"3"));
            let other = spare.by_ref().take(part.len() / 4).map(|at| format!("name{at}").into());
            for name in listed.cloned().chain(other) {
                let _ = std::fs::remove_file(path.join(std::str::from_utf8(&name).unwrap()));
                gone.insert(name);
            }
        });
        let seen: HashSet<_> = names.iter().collect();
        assert_eq!(seen.len(), names.len(), "{way:?}: a name came twice");
        for at in 0..count {
            let name = format!("name{at}").into_bytes();
            assert!(gone.contains(&name) || seen.contains(&name), "{way:?}: name{at} was lost");
        }
    }
}

#[test]
fn no_name_of_ten_thousand_is_lost_while_others_are_deleted() {
    let mut guest = Guest::new();
    let path = guest.path().to_owned();
    lose_none(&mut guest, &path, ROOT_ID, 10_000);
}

#[test]
fn no_name_is_lost_where_the_host_numbers_the_entries() {
    // On ramfs a cookie is the number of the entry in the list: what is deleted before it moves it.
    for kind in ["ramfs", "tmpfs"] {
        let mut guest = Guest::new();
        let Some(mounted) = Mounted::new(&guest.path().join("mounted"), kind) else { return };
        let node = guest.node("mounted");
        lose_none(&mut guest, mounted.path(), node, 2000);
    }
}

#[test]
fn a_listing_can_be_taken_up_at_any_cookie_and_begun_anew() {
    let guest = Guest::new();
    for at in 0..1000 {
        std::fs::write(guest.path().join(at.to_string()), "").unwrap();
    }
    let fh = guest.opendir(ROOT_ID);
    let mut order = Vec::new();
    let mut offset = 0;
    loop {
        let part = guest.list(false, ROOT_ID, fh, offset, 4096).unwrap();
        let Some(last) = part.last() else { break };
        offset = last.next;
        order.extend(part.into_iter().map(|name| (name.name, name.next)));
    }
    assert_eq!(order.len(), 1002);
    // seekdir(3) to where telldir(3) was, back and forth, of this descriptor and of a fresh one.
    let fresh = guest.opendir(ROOT_ID);
    for at in [500, 3, 1000, 501, 999, 120, 121, 0, 700] {
        for fh in [fh, fresh] {
            let part = guest.list(at % 2 == 0, ROOT_ID, fh, order[at].1, 4096).unwrap();
            let expected = order[at + 1..].iter().map(|(name, _)| name);
            assert!(part.iter().map(|one| &one.name).eq(expected.take(part.len())), "{at}");
            assert_eq!(part.is_empty(), at + 1 == order.len());
        }
    }
    // rewinddir(3) sees what is new.
    std::fs::write(guest.path().join("new"), "").unwrap();
    assert_eq!(all(&guest, false, fh, 4096).len(), 1003);
}
