//! That the door itself works, in every cache mode.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};

use devices::share::{CachePolicy, Options};
use integration::{Door, noise};

use super::PROBE;

pub const MODES: [CachePolicy; 4] =
    [CachePolicy::Never, CachePolicy::Metadata, CachePolicy::Auto, CachePolicy::Always];

/// A share of an empty directory, open to every user.
pub fn door(change: impl FnOnce(&mut Options)) -> (tempfile::TempDir, Door) {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let mut options = Options::new(directory.path());
    options.xattr = devices::share::XattrPolicy::On;
    change(&mut options);
    let door = Door::mount(options).unwrap();
    (directory, door)
}

fn is_mounted(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == path.to_str())
}

#[test]
fn every_file_operation_works_in_every_cache_mode() {
    for cache in MODES {
        for writeback in [false, true] {
            let (_directory, door) = door(|options| {
                options.cache = cache;
                options.writeback = writeback;
            });
            let probe = Command::new(PROBE).arg("files").arg(door.path()).output().unwrap();
            let said = String::from_utf8_lossy(&probe.stdout);
            // What is no result is a figure.
            let (figures, results): (Vec<_>, Vec<_>) = said.lines().partition(|line| {
                line.rsplit('=').next().is_some_and(|n| n.parse::<u64>().is_ok())
            });
            let caching = matches!(cache, CachePolicy::Auto | CachePolicy::Always);
            let as_expected = |line: &str| match line.split_once('=') {
                // A kernel that holds data back calls everything data: the first hole is the end.
                Some(("sparse_seek", result)) if writeback && caching => {
                    result == "hole at 1048579"
                }
                Some((_, result)) => result == "ok",
                None => false,
            };
            let wrong: Vec<_> = results.iter().filter(|line| !as_expected(line)).collect();
            let number = format!("operations={}", results.len());
            assert!(
                probe.status.success() && wrong.is_empty() && figures.contains(&&*number),
                "{cache:?}, writeback {writeback}: {wrong:#?} {figures:?} {}",
                String::from_utf8_lossy(&probe.stderr)
            );
        }
    }
}

#[test]
fn both_sides_see_the_same_files() {
    let (directory, door) = door(|_| {});
    let host = |name: &str| directory.path().join(name);
    let share = |name: &str| door.path().join(name);

    fs::create_dir(share("directory")).unwrap();
    fs::write(share("directory/one"), noise(3 << 20, 1)).unwrap();
    assert!(fs::read(host("directory/one")).unwrap() == noise(3 << 20, 1));
    fs::write(host("directory/two"), noise(5 << 20, 2)).unwrap();
    assert!(fs::read(share("directory/two")).unwrap() == noise(5 << 20, 2));
    fs::rename(share("directory/one"), share("three")).unwrap();
    assert_eq!(
        fs::metadata(share("three")).unwrap().ino(),
        fs::metadata(host("three")).unwrap().ino()
    );
    fs::hard_link(share("three"), share("four")).unwrap();
    assert_eq!(fs::metadata(host("three")).unwrap().nlink(), 2);
    fs::remove_file(share("three")).unwrap();
    let names = |path: &Path| {
        let entries = fs::read_dir(path).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
        names.sort();
        names
    };
    assert_eq!(names(door.path()), ["directory", "four"]);
    assert_eq!(names(directory.path()), ["directory", "four"]);
}

#[test]
fn what_is_stored_to_a_mapping_arrives_on_the_host_in_every_cache_mode() {
    for cache in MODES {
        let (directory, door) = door(|options| options.cache = cache);
        fs::write(door.path().join("mapped"), vec![7; 10_000]).unwrap();
        let mut probe = Command::new(PROBE)
            .arg("map")
            .arg(door.path().join("mapped"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = probe.stdin.take().unwrap();
        stdin.write_all(b"get 0\nput 0 1\nput 9999 2\nget 9999\nsync\n").unwrap();
        drop(stdin);
        let output = probe.wait_with_output().unwrap();
        assert_eq!(
            String::from_utf8_lossy(&output.stdout),
            "mapped 10000\n7\ndone\ndone\n2\ndone\n",
            "{cache:?}"
        );
        let bytes = fs::read(directory.path().join("mapped")).unwrap();
        assert_eq!((bytes.len(), bytes[0], bytes[1], bytes[9999]), (10_000, 1, 7, 2), "{cache:?}");
    }
}

#[test]
fn a_read_only_share_refuses_by_itself() {
    let directory = tempfile::tempdir().unwrap();
    fs::write(directory.path().join("file"), "text").unwrap();
    let mut options = Options::new(directory.path());
    options.read_only = true;
    let door = Door::mount(options).unwrap();
    assert_eq!(fs::read(door.path().join("file")).unwrap(), b"text");
    for refused in [
        fs::write(door.path().join("file"), "other"),
        fs::write(door.path().join("new"), "new"),
        fs::remove_file(door.path().join("file")),
        fs::create_dir(door.path().join("directory")),
        fs::rename(door.path().join("file"), door.path().join("moved")),
    ] {
        assert_eq!(refused.unwrap_err().raw_os_error(), Some(libc::EROFS));
    }
}

#[test]
fn an_unmount_leaves_nothing() {
    let (_directory, mut door) = door(|_| {});
    let path = door.path().to_path_buf();
    for number in 0..100 {
        fs::write(path.join(number.to_string()), "x").unwrap();
    }
    assert!(is_mounted(&path));
    assert!(door.share().live_inodes() > 100);
    door.unmount().unwrap();
    assert!(!is_mounted(&path));
    assert_eq!((door.share().live_inodes(), door.share().live_handles()), (1, 0));
    drop(door);
    assert!(!path.exists());
}

#[test]
fn a_file_that_is_open_does_not_keep_a_door_from_closing() {
    let (_directory, door) = door(|_| {});
    let path = door.path().to_path_buf();
    let mut file = fs::File::create(path.join("open")).unwrap();
    drop(door);
    assert!(!is_mounted(&path));
    assert!(file.write_all(b"x").and_then(|()| file.sync_all()).is_err());
}
