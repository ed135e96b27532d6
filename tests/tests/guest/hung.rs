//! A file system of the host that does not answer, below a share.

use std::time::{Duration, Instant};

use integration::{Oriel, Tree};
use rustix::process::{Pid, Signal, kill_process};

use super::lost_pages::serve;

#[test]
fn a_file_system_that_hangs_holds_up_neither_other_shares_nor_the_end_of_the_sandbox() {
    let (tree, other, served) = (Tree::new(), Tree::new(), Tree::new());
    other.write("file", b"well\n");
    let mut mounted = serve(&tree, &served);
    let script = r#"while read -r command; do eval "$command" 2>&1; done"#;
    let mut guest = Oriel::run(&["-i", "-v", &tree.at("/s", "cache=never,dax=never")])
        .args(&["-v", &other.at("/o", "cache=never")])
        .script(script)
        .start();
    assert_eq!(guest.ask("head -c 5 /s/net/far | wc -c"), "5");

    let server = Pid::from_child(mounted.server());
    kill_process(server, Signal::STOP).unwrap();
    guest.say("cat /s/net/far >/dev/null &");
    for _ in 0..3 {
        assert_eq!(guest.ask("sleep 0.3; cat /o/file"), "well");
    }
    assert_eq!(guest.ask("echo made >/o/new && kill -0 $! && echo waits"), "waits");
    assert_eq!(other.read("new"), b"made\n");

    let end = Instant::now();
    let outcome = guest.finish();
    outcome.exits_with(0);
    assert!(end.elapsed() < Duration::from_secs(30), "{:?}", end.elapsed());
    outcome.check(outcome.stderr.contains("does not answer"), "the host is told");
}
