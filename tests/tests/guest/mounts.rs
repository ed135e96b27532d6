//! What the host mounts below a shared directory.

use std::thread::sleep;
use std::time::{Duration, Instant};

use integration::{Oriel, Tree};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change,
    mount_remount, unmount,
};

#[test]
fn what_the_host_mounts_below_a_share_is_a_mount_in_the_guest_and_comes_and_goes() {
    let tree = Tree::new();
    let sub = tree.path("sub");
    std::fs::create_dir(&sub).unwrap();
    tree.write("sub/covered", b"covered\n");
    // A mount is as writable as it was when it appeared.
    let elsewhere = Tree::new();
    let mount_it = |flags| {
        let aside = elsewhere.path("aside");
        std::fs::create_dir_all(&aside).unwrap();
        mount("none", &aside, "tmpfs", MountFlags::empty(), c"mode=755").unwrap();
        mount_change(&aside, MountPropagationFlags::PRIVATE).unwrap();
        elsewhere.write("aside/file", b"mounted\n");
        mount_remount(&aside, MountFlags::BIND | flags, c"").unwrap();
        mount_bind(&aside, &sub).unwrap();
        unmount(&aside, UnmountFlags::DETACH).unwrap();
    };
    mount_it(MountFlags::empty());
    let script = r#"
        other() { [ $(stat -c %d /s) != $(stat -c %d /s/sub) ] && echo another; }
        while read -r command; do eval "$command" 2>&1; done
    "#;
    let mut guest = Oriel::run(&["-i", "-v", &tree.at("/s", "")]).script(script).start();
    for read_only in [false, true] {
        assert_eq!(guest.ask("cat /s/sub/file"), "mounted");
        assert_eq!(guest.ask("other || echo the same"), "another", "device number");
        assert_eq!(guest.ask("grep -c ' /s/sub virtiofs' /proc/mounts"), "1");
        let refused = guest.ask("touch /s/sub/made 2>&1 | grep -o 'Read-only.*' || echo done");
        assert_eq!(refused, if read_only { "Read-only file system" } else { "done" });

        // The guest has it mounted, has read a file of it and written one. The host's umount(8) works all the
        // same, once the guest's kernel has let go of what was open.
        let start = Instant::now();
        while let Err(error) = unmount(&sub, UnmountFlags::empty()) {
            assert!(start.elapsed().as_secs() < 20, "{error}");
            sleep(Duration::from_millis(20));
        }
        // By the guest's own clock, which may be slower than the host's.
        assert_eq!(guest.ask("sleep 1.2; cat /s/sub/covered"), "covered");
        assert_eq!(guest.ask("other || echo the same"), "the same", "device number");
        mount_it(MountFlags::RDONLY);
        assert_eq!(guest.ask("sleep 1.2; echo awake"), "awake");
    }
    guest.finish().exits_with(0);
    unmount(&sub, UnmountFlags::DETACH).unwrap();
}
