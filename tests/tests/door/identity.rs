//! Whose files are whose: the same script, by the same users, in a directory of this machine and in a share of
//! another one must leave the same behind.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;
use std::process::Command;

use devices::share::{CachePolicy, GidMap, IdRange, Options, UidMap, XattrPolicy};
use integration::Door;
use rustix::fs::{XattrFlags, getxattr, setxattr};

const MODES: [CachePolicy; 4] =
    [CachePolicy::Never, CachePolicy::Metadata, CachePolicy::Auto, CachePolicy::Always];

/// Users and groups of no account.
const ANN: u32 = 41001;
const BOB: u32 = 41002;
const STAFF: u32 = 42001;

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs a shell script in a directory as a user with one supplementary group more than its own, and says what it
/// said, errors among it.
fn run(directory: &Path, user: u32, groups: &str, script: &str) -> String {
    let output = Command::new("setpriv")
        .args([format!("--reuid={user}"), format!("--regid={user}")])
        .args(match groups {
            "" => vec!["--clear-groups".to_string()],
            groups => vec![format!("--groups={groups}")],
        })
        // A user without rights is one in all respects.
        .args(if user == 0 { vec![] } else { vec!["--inh-caps=-all"] })
        .args(["sh", "-c", &format!("exec 2>&1; {script}")])
        .current_dir(directory)
        .output()
        .unwrap();
    String::from_utf8_lossy(&output.stdout).into()
}

/// What somebody who looks finds: kind, mode, owner and group of each file, and its ACLs.
fn look(directory: &Path) -> String {
    let script = "find . | sort | while read -r f; do stat -c '%n %F %A %u:%g' \"$f\"; done; getfacl -Rpn . 2>&1";
    run(directory, 0, "", script)
}

/// An empty directory that everybody may write to.
fn directory() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::set_permissions(directory.path(), PermissionsExt::from_mode(0o1777)).unwrap();
    directory
}

fn door(directory: &Path, change: impl FnOnce(&mut Options)) -> Door {
    let mut options = Options::new(directory);
    options.xattr = XattrPolicy::Mapped;
    change(&mut options);
    Door::mount(options).unwrap()
}

/// Each step is a user, its supplementary groups, and a script.
fn same_as_on_the_host(steps: &[(u32, &str, &str)], change: impl Fn(&mut Options)) {
    if !is_root() {
        panic!("these tests act as several users: run them as root");
    }
    let host = directory();
    let expected: Vec<_> = steps
        .iter()
        .map(|(user, groups, script)| run(host.path(), *user, groups, script))
        .collect();
    for cache in MODES {
        let shared = directory();
        let door = door(shared.path(), |options| {
            change(options);
            options.cache = cache;
        });
        for ((user, groups, script), expected) in steps.iter().zip(&expected) {
            let said = run(door.path(), *user, groups, script);
            assert_eq!(said, *expected, "{cache:?}: {script}");
        }
        assert_eq!(look(door.path()), look(host.path()), "{cache:?}: in the share");
        assert_eq!(look(shared.path()), look(host.path()), "{cache:?}: on the host");
    }
}

const MAKE: &str = "umask 027; mkdir d; : >f; mkfifo p; ln -s f l; umask 0; mkdir d0; : >f0; umask 077; mkdir d77; \
                    : >f77; install -d -m 2755 sgid; install -m 4750 /bin/true suid; ls -ln suid | cut -c1-10";

#[test]
fn users_make_files_with_their_ids_modes_and_umasks_as_on_the_host() {
    let acl = |options: &mut Options| options.acl = true;
    let steps = [(0, "", "mkdir a b; chmod 1777 a b"), (ANN, "", "cd a; "), (BOB, "", "cd b; ")];
    let scripts: Vec<_> = steps.iter().map(|(_, _, start)| format!("{start}{MAKE}")).collect();
    let steps: Vec<_> = steps
        .iter()
        .zip(&scripts)
        .map(|((user, groups, start), script)| {
            (*user, *groups, if *user == 0 { *start } else { script.as_str() })
        })
        .collect();
    same_as_on_the_host(&steps, |_| {});
    same_as_on_the_host(&steps, acl);
}

#[test]
fn setgid_directories_count_for_members_and_strangers_as_on_the_host() {
    let make = "umask 0; mkdir d; : >f; ln -s x l; install -d -m 2775 d2; install -m 2755 /bin/true s; \
                install -m 2644 /bin/true s0; : >g; chmod 2755 g; mkdir d/sub; mkfifo p";
    let staff = "42001";
    same_as_on_the_host(
        &[
            (
                0,
                "",
                "for who in member stranger owner; do mkdir $who; chgrp 42001 $who; chmod 3777 $who; done",
            ),
            (ANN, staff, &format!("cd member; {make}")),
            (ANN, "42002", &format!("cd stranger; {make}")),
            (0, "", &format!("cd owner; {make}")),
        ],
        |_| {},
    );
    assert_eq!(STAFF.to_string(), staff);
}

#[test]
fn set_id_bits_go_with_a_write_a_truncation_and_a_chown_as_on_the_host() {
    let files = "for f in w t o c k m; do cp /bin/true $f; chown 41001:41001 $f; chmod 6777 $f; done; \
                 for f in nw nt; do cp /bin/true $f; chgrp 42001 $f; chmod 2766 $f; done";
    let change = "echo x >>w; truncate -s 5 t; : >o; dd if=/dev/zero of=k bs=1 count=1 conv=notrunc 2>/dev/null; \
                  echo x >>nw; truncate -s 5 nt; cp /bin/true m";
    same_as_on_the_host(
        &[(0, "", files), (BOB, "", change), (0, "", "chown 41002:41002 c")],
        |_| {},
    );
    // By root, who may keep some.
    same_as_on_the_host(&[(0, "", files), (0, "", change)], |_| {});
}

#[test]
fn who_may_chown_and_chmod_is_decided_as_on_the_host() {
    let try_all = "chown 41002 f; chgrp 42001 f; chgrp 42002 f; chmod 2755 f; chmod 7777 other; rm other; \
                   chmod g+s g; stat -c '%A %u:%g' f other g";
    same_as_on_the_host(
        &[
            (0, "", "echo 1 >other; chmod 644 other; echo 2 >g; chown 41001:42002 g"),
            (ANN, "42001", &format!(": >f; {try_all}")),
        ],
        |_| {},
    );
}

#[test]
fn acls_are_set_inherited_and_obeyed_as_on_the_host() {
    same_as_on_the_host(
        &[
            (
                0,
                "",
                "echo secret >f; chmod 600 f; mkdir d; chmod 700 d; echo x >d/x; chmod 666 d/x",
            ),
            (BOB, "", "cat f; cat d/x; ls d"),
            (0, "", "setfacl -m u:41002:r f; setfacl -m u:41002:rx,d:u:41001:rwx,d:g:42001:rx d"),
            (BOB, "", "cat f; cat d/x; ls d; echo more >>f; : >d/new"),
            (0, "", "umask 077; : >d/made; mkdir d/sub; : >d/sub/deep"),
            (0, "", "chmod 770 d; setfacl -m u:41001:rwx d"),
            (
                ANN,
                "",
                "umask 027; : >d/anns; mkdir d/annsub; setfacl -m u:41002:rw d/anns; setfacl -b f",
            ),
            (BOB, "", "echo b >>d/anns; cat d/anns; setfacl -m u:41002:rw f"),
            (0, "", "setfacl -x u:41002 f; setfacl -k d; chmod 2755 d/made; chown 0:42001 d/made"),
            (BOB, "", "cat f"),
        ],
        |options| options.acl = true,
    );
}

#[test]
fn with_ranges_a_share_has_its_own_users() {
    if !is_root() {
        panic!("this test acts as several users: run it as root");
    }
    let shared = directory();
    let range = |host| [IdRange { guest: 0, host, count: 50_000 }];
    let door = door(shared.path(), |options| {
        options.acl = true;
        options.uids = UidMap::of_ranges(&range(1_000_000)).unwrap();
        options.gids = GidMap::of_ranges(&range(2_000_000)).unwrap();
    });
    chown(shared.path(), Some(1_000_000), Some(2_000_000)).unwrap();
    let said =
        run(door.path(), ANN, "", ": >f; mkdir d; setfacl -m u:41002:r f; stat -c %u:%g . f d");
    assert_eq!(said, "0:0\n41001:41001\n41001:41001\n");
    let on_host = fs::metadata(shared.path().join("f")).unwrap();
    assert_eq!((on_host.uid(), on_host.gid()), (1_041_001, 2_041_001));
    let acl = run(shared.path(), 0, "", "getfacl -pn f | grep user:");
    assert_eq!(acl, "user::rw-\nuser:1041002:r--\n");
    let acl = run(door.path(), 0, "", "getfacl -pn f | grep user:");
    assert_eq!(acl, "user::rw-\nuser:41002:r--\n");

    assert_eq!(run(door.path(), 0, "", "chown 7:8 f; chown -h 9 f; stat -c %u:%g f"), "9:8\n");
    assert_eq!(fs::metadata(shared.path().join("f")).unwrap().uid(), 1_000_009);
    for refused in ["chown 50000 f", "chgrp 65534 f", "setfacl -m u:50001:r f"] {
        let said = run(door.path(), 0, "", refused);
        assert!(said.contains("not permitted"), "{refused}: {said}");
    }
    let said = run(door.path(), 50_001, "", "touch g; mkdir e; ln -s x l");
    assert_eq!(said.matches("not permitted").count(), 3, "{said}");
    fs::write(shared.path().join("roots"), "").unwrap();
    assert_eq!(run(door.path(), 0, "", "stat -c %u:%g roots"), "65534:65534\n");
}

#[test]
fn file_capabilities_of_a_mapped_share_stay_there_and_go_when_the_file_changes() {
    /// `security.capability`, version 2: cap_net_raw, permitted and effective.
    const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 32, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const NAME: &str = "security.capability";
    if !is_root() {
        panic!("only root may give capabilities");
    }
    for cache in MODES {
        let shared = directory();
        let door = door(shared.path(), |options| options.cache = cache);
        let inside = |name: &str| getxattr(door.path().join("f"), name, &mut [0; 100][..]);
        let outside = |name: &str| getxattr(shared.path().join("f"), name, &mut [0; 100][..]);
        let give = || {
            let path = door.path().join("f");
            setxattr(path, NAME, &CAPABILITY, XattrFlags::empty()).unwrap();
            assert!(inside(NAME).is_ok(), "{cache:?}");
        };
        fs::write(door.path().join("f"), "text").unwrap();
        fs::set_permissions(door.path().join("f"), PermissionsExt::from_mode(0o777)).unwrap();
        give();
        assert!(outside(NAME).is_err() && outside("user.oriel.security.capability").is_ok());
        for change in ["echo more >>f", "truncate -s 3 f", ": >f"] {
            give();
            assert_eq!(run(door.path(), BOB, "", change), "");
            assert!(outside("user.oriel.security.capability").is_err(), "{cache:?}: {change}");
            assert!(inside(NAME).is_err(), "{cache:?}: {change}");
        }
        give();
        assert_eq!(run(door.path(), 0, "", "chown 41001 f"), "");
        assert!(inside(NAME).is_err(), "{cache:?}: chown");
    }
}
