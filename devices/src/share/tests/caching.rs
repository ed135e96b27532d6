//! What the guest is told that it may keep. What a real kernel then does is tested on /dev/fuse and in guests.

use std::time::Duration;

use super::*;
use crate::share::{CachePolicy, Options};

const DAY: u64 = 86400;

#[test]
fn open_tells_the_guest_what_it_may_cache() {
    for (cache, file_flags, dir_flags) in [
        (CachePolicy::Never, FOPEN_DIRECT_IO, 0),
        (CachePolicy::Metadata, FOPEN_DIRECT_IO, FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE),
        (CachePolicy::Auto, 0, FOPEN_CACHE_DIR),
        (CachePolicy::Always, FOPEN_KEEP_CACHE, FOPEN_CACHE_DIR | FOPEN_KEEP_CACHE),
    ] {
        let guest = Guest::with(|options| options.cache = cache);
        let node = file(&guest, b"");
        let open: OpenOut = guest.open(node, libc::O_RDONLY).get();
        assert_eq!(open.open_flags, file_flags, "{cache:?}");
        let created = guest.create(ROOT_ID, "created", libc::O_RDWR, 0o600);
        assert_eq!(created.part::<OpenOut>(128).open_flags, file_flags, "{cache:?}");
        let body = OpenIn::default();
        let open: OpenOut = guest.call(Opcode::Opendir, ROOT_ID, &[body.as_slice()]).get();
        assert_eq!(open.open_flags, dir_flags, "{cache:?}");
    }
}

/// Seconds for which a name, the attributes and a missing name are valid, in each way to be told of them.
fn times(change: impl FnOnce(&mut Options)) -> (Duration, Duration, Option<Duration>) {
    let guest = Guest::with(change);
    let node = file(&guest, b"");
    let valid = |entry: &EntryOut| {
        (
            Duration::new(entry.entry_valid, entry.entry_valid_nsec),
            Duration::new(entry.attr_valid, entry.attr_valid_nsec),
        )
    };
    let (names, attributes) = valid(&guest.lookup(ROOT_ID, "file").get());
    let made = guest.create(ROOT_ID, "created", libc::O_RDWR, 0o600).part::<EntryOut>(0);
    assert_eq!(valid(&made), (names, attributes));
    assert_eq!(valid(&mkdir(&guest, ROOT_ID, "d", 0o700).get()), (names, attributes));
    let fh = guest.opendir(ROOT_ID);
    let listed = guest.list(true, ROOT_ID, fh, 0, 4096).unwrap();
    let listed = listed.iter().find(|name| name.name == b"file").unwrap();
    assert_eq!(valid(&listed.entry.unwrap()), (names, attributes));

    let attr: AttrOut = guest.getattr(node).get();
    assert_eq!(Duration::new(attr.attr_valid, attr.attr_valid_nsec), attributes);
    let attr: AttrOut = guest.setattr(node, SetattrIn::default()).get();
    assert_eq!(Duration::new(attr.attr_valid, attr.attr_valid_nsec), attributes);
    let statx: StatxOut = guest.call(Opcode::Statx, node, &[StatxIn::default().as_slice()]).get();
    assert_eq!(Duration::new(statx.attr_valid, statx.attr_valid_nsec), attributes);

    let missing = guest.lookup(ROOT_ID, "missing");
    let negative = match missing.error {
        libc::ENOENT => None,
        _ => {
            let entry: EntryOut = missing.get();
            assert_eq!(entry.nodeid, 0, "a missing name is no node");
            assert_eq!((entry.attr_valid, entry.attr.ino), (0, 0));
            Some(valid(&entry).0)
        }
    };
    (names, attributes, negative)
}

#[test]
fn each_cache_mode_has_its_times() {
    let of = |cache| times(|options| options.cache = cache);
    let second = Duration::from_secs(1);
    let day = Duration::from_secs(DAY);
    assert_eq!(of(CachePolicy::Never), (Duration::ZERO, Duration::ZERO, None));
    assert_eq!(of(CachePolicy::Auto), (second, second, None));
    assert_eq!(of(CachePolicy::Metadata), (day, day, Some(day)));
    assert_eq!(of(CachePolicy::Always), (day, day, Some(day)));
}

#[test]
fn each_time_can_be_set_apart_from_the_mode() {
    let (entry, attr, negative) =
        (Duration::from_millis(2500), Duration::from_millis(1), Duration::from_secs(60));
    for cache in [CachePolicy::Never, CachePolicy::Metadata, CachePolicy::Auto, CachePolicy::Always]
    {
        let set = times(|options| {
            options.cache = cache;
            options.entry_timeout = Some(entry);
            options.attr_timeout = Some(attr);
            options.negative_timeout = Some(negative);
        });
        assert_eq!(set, (entry, attr, Some(negative)), "{cache:?}");
    }
    let none = times(|options| {
        options.cache = CachePolicy::Always;
        options.negative_timeout = Some(Duration::ZERO);
    });
    assert_eq!(none.2, None, "nothing to keep is an error");
}

#[test]
fn a_missing_name_is_no_lookup_and_another_error_stays_one() {
    let guest = Guest::with(|options| options.cache = CachePolicy::Always);
    let nodes = guest.share.live_inodes();
    assert_eq!(guest.lookup(ROOT_ID, "missing").get::<EntryOut>().nodeid, 0);
    assert_eq!(guest.share.live_inodes(), nodes);
    let node = file(&guest, b"");
    assert_eq!(guest.lookup(node, "x").error, libc::ENOTDIR);
    assert_eq!(guest.lookup(77, "x").error, libc::ENOENT, "that the directory is none is an error");
    // What is made after that is there.
    std::fs::write(guest.path().join("missing"), "").unwrap();
    assert_ne!(guest.lookup(ROOT_ID, "missing").get::<EntryOut>().nodeid, 0);
}
