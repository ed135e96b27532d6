//! Guests of an ordinary user: whose files are whose.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use integration::{Oriel, Tree};

/// A user of this machine for the length of a test, with subordinate ids from [`SUBORDINATE`] on.
const USER: u32 = 4242;
const SUBORDINATE: u32 = 100_000;

/// A shell that gives itself the user's accounts and a /dev/kvm for everybody, sees to it that nobody else notices,
/// and becomes the user, with a copy of the program where that one gets to it.
const AS_USER: &str = "\
    d=$(mktemp -d); mount -t tmpfs -o mode=0755 tmpfs $d; \
    mknod -m 0666 $d/kvm c 10 232; mount --bind $d/kvm /dev/kvm; \
    cp -a /etc $d/etc; mount --bind $d/etc /etc; \
    echo ann:x:4242:4242::/:/bin/sh >>/etc/passwd; \
    for file in subuid subgid; do echo ann:100000:65536 >/etc/$file; done; \
    mkdir $d/bin; cp $1 ${1%/*}/oriel-init $d/bin; shift; \
    exec setpriv --reuid=4242 --regid=4242 --clear-groups env HOME=/nonexistent $d/bin/oriel \"$@\"";

/// A directory of the user's, with a file of its own and one of root's.
fn tree() -> Tree {
    let tree = Tree::new();
    tree.write("own", b"own\n");
    tree.write("roots", b"root's\n");
    for name in [".", "own"] {
        chown(tree.path(name), Some(USER), Some(USER)).unwrap();
    }
    fs::set_permissions(tree.path("."), PermissionsExt::from_mode(0o1777)).unwrap();
    tree
}

fn run(data: &Tree, args: &[&str], script: &str) -> integration::Outcome {
    let wrapper = ["unshare", "-m", "sh", "-ec", AS_USER, "sh"];
    let run = Oriel::run(args).script(script).env("ORIEL_DATA", data.text());
    run.under(&wrapper).default_console().finish()
}

fn owner(path: &Path) -> (u32, u32) {
    let stat = fs::symlink_metadata(path).unwrap();
    (stat.uid(), stat.gid())
}

#[test]
fn an_ordinary_users_files_are_the_guest_roots() {
    let (data, tree) = (Tree::guest_data(), tree());
    let script = r#"
        echo "own=$(stat -c %u:%g /s/own)"
        echo "roots=$(stat -c %u:%g /s/roots)"
        echo new >/s/new && mkdir /s/d && ln -s x /s/l
        echo "new=$(stat -c %u:%g /s/new /s/d /s/l | xargs)"
        chown 0:0 /s/new && echo "chown.root=ok"
        chown 7 /s/new 2>/dev/null || echo "chown.other=refused"
        echo x 2>/dev/null >>/s/roots || echo "roots.write=refused"
    "#;
    let outcome = run(&data, &["-v", &tree.at("/s", "")], script);
    outcome.exits_with(0).guest_says(&[
        ("own", "0:0", "the user's files are the guest root's"),
        ("roots", "0:0", "and so are those of the host's root, whose number it is"),
        ("new", "0:0 0:0 0:0", "what the guest makes"),
        ("chown.root", "ok", "to whom it belongs"),
        ("chown.other", "refused", "an ordinary user gives no files away"),
        ("roots.write", "refused", "the host decides what the user may do"),
    ]);
    for name in ["new", "d", "l"] {
        assert_eq!(owner(&tree.path(name)), (USER, USER), "{name} on the host");
    }
}

#[test]
fn in_a_user_namespace_the_guests_users_own_their_files() {
    let (data, tree) = (Tree::guest_data(), tree());
    let args = ["--userns", "auto", "-v", &tree.at("/s", "acl")];
    if !["/usr/bin/newuidmap", "/usr/sbin/newuidmap", "/bin/newuidmap"]
        .iter()
        .any(|path| Path::new(path).exists())
    {
        run(&data, &args, "true")
            .refuses(125, &["--userns", "newuidmap", "apt-get install uidmap"]);
        return;
    }
    let script = r#"
        echo "own=$(stat -c %u:%g /s/own)"
        echo "roots=$(stat -c %u:%g /s/roots)"
        mkdir /s/d && echo new >/s/d/new && chown 1000:1001 /s/d/new && chmod 6755 /s/d/new
        echo "new=$(stat -c %u:%g:%a /s/d/new)"
        chown 70000 /s/d/new 2>/dev/null || echo "beyond=refused"
        chown 5 /s/roots 2>/dev/null || echo "steal=refused"
        echo "done=ok"
    "#;
    let outcome = run(&data, &args, script);
    outcome.exits_with(0).guest_says(&[
        ("own", "0:0", "the user's files are the guest root's"),
        ("roots", "65534:65534", "the host's root is nobody here"),
        ("new", "1000:1001:6755", "files have owners"),
        ("beyond", "refused", "ids end with the subordinate ones"),
        ("steal", "refused", "only of the user's own files"),
        ("done", "ok", "the script ended"),
    ]);
    let new = tree.path("d/new");
    assert_eq!(owner(&new), (SUBORDINATE + 999, SUBORDINATE + 1000), "on the host");
    assert_eq!(owner(&tree.path("d")), (USER, USER));
    assert_eq!(owner(&tree.path("roots")), (0, 0));

    // As another user of the guest, with the umask and the ids of that one.
    let args = [&args[..], &["--user", "1000:1000"]].concat();
    let outcome =
        run(&data, &args, "umask 027; echo mine >/s/mine; mkdir /s/mydir; echo status=$?");
    outcome.exits_with(0).guest_says(&[("status", "0", "in a directory for everybody")]);
    assert_eq!(owner(&tree.path("mine")), (SUBORDINATE + 999, SUBORDINATE + 999));
    assert_eq!(fs::metadata(tree.path("mine")).unwrap().mode() & 0o777, 0o640);
    assert_eq!(fs::metadata(tree.path("mydir")).unwrap().mode() & 0o777, 0o750);
}
