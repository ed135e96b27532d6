//! What the default cache mode promises, in a guest: through the guest's own page cache and through the DAX window.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use integration::{Oriel, Tree};

use super::PROBE;

#[test]
fn by_default_a_guest_sees_mapped_data_at_once_and_the_rest_within_a_second() {
    let tree = Tree::with_probe(PROBE);
    // Large enough to be mapped; smaller files are read.
    tree.write("mapped", &vec![1; 256 << 10]);
    tree.write("gone", b"gone\n");
    tree.write("changed", b"before\n");
    // With set-id bits it is not mapped: its data go through the guest's page cache.
    tree.write("cached", b"before\n");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o4755);
    fs::set_permissions(tree.path("cached"), mode).unwrap();
    // The first line that is no command of the probe's ends it, and the shell goes on.
    let script = r#"
        cat /s/changed /s/cached /s/gone
        /s/guest-probe map /s/mapped 2>/dev/null; echo ended
        while read -r command; do eval "$command" 2>&1; done
    "#;
    let mut guest = Oriel::run(&["-i", "-v", &tree.at("/s", "")]).script(script).start();
    for line in ["before", "before", "gone", "mapped 262144"] {
        assert_eq!(guest.hear(), line);
    }
    let host = OpenOptions::new().read(true).write(true).open(tree.path("mapped")).unwrap();
    for round in 0..50u8 {
        host.write_all_at(&[round + 2], 4097).unwrap();
        assert_eq!(guest.ask("get 4097"), (round + 2).to_string(), "the host's write, at once");
        assert_eq!(guest.ask(&format!("put 4098 {}", round + 3)), "done");
        let mut byte = [0];
        host.read_exact_at(&mut byte, 4098).unwrap();
        assert_eq!(byte[0], round + 3, "the guest's store, at once");
    }
    assert_eq!(guest.ask("end"), "ended");
    assert_eq!(guest.ask("test -e /s/new || echo missing"), "missing");
    tree.write("new", b"new\n");
    assert_eq!(guest.ask("cat /s/new"), "new", "a new name at once");
    assert_eq!(guest.ask("echo from the guest >/s/answer; echo done"), "done");
    assert_eq!(tree.read("answer"), b"from the guest\n", "what the guest does is there");

    fs::remove_file(tree.path("gone")).unwrap();
    for name in ["changed", "cached"] {
        let file = OpenOptions::new().write(true).truncate(true).open(tree.path(name)).unwrap();
        file.write_all_at(b"after it\n", 0).unwrap();
    }
    // By the guest's own clock, which may be slower than the host's.
    assert_eq!(guest.ask("sleep 1.2; cat /s/changed"), "after it");
    assert_eq!(guest.ask("cat /s/cached"), "after it");
    assert_eq!(guest.ask("test -e /s/gone || echo it is"), "it is");
    guest.finish().exits_with(0);
}
