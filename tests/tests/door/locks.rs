//! Locks between two doors to one directory, which are to each other what two sandboxes are, and the host.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use devices::fuse::opcode::Opcode;
use devices::share::{LockPolicy, Options};
use integration::{Door, Locker};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;

use super::PROBE;

/// How long anything may take that is expected.
const PATIENCE: Duration = Duration::from_secs(20);

fn locker(file: &Path) -> Locker {
    Locker::start(PROBE, file)
}

/// A directory with a file, and two doors to it.
struct House {
    directory: tempfile::TempDir,
    doors: [Door; 2],
}

impl House {
    fn new(change: impl Fn(&mut Options)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("file"), "some text").unwrap();
        let door = || {
            let mut options = Options::new(directory.path());
            change(&mut options);
            Door::mount(options).unwrap()
        };
        Self { doors: [door(), door()], directory }
    }

    /// The file, by one of the doors.
    fn file(&self, door: usize) -> PathBuf {
        self.doors[door].path().join("file")
    }

    fn on_host(&self) -> PathBuf {
        self.directory.path().join("file")
    }

    /// A process at each door and one on the host.
    fn processes(&self) -> [Locker; 3] {
        [locker(&self.file(0)), locker(&self.file(1)), locker(&self.on_host())]
    }
}

#[test]
fn a_lock_holds_against_the_other_door_and_the_host_and_theirs_against_it() {
    let house = House::new(|_| {});
    let mut processes = house.processes();
    for owner in 0..3 {
        let pid = processes[owner].pid();
        for kind in ["set", "ofd"] {
            processes[owner].act(&format!("{kind} write 10 10"), "ok");
            for other in (0..3).filter(|other| *other != owner) {
                let other_process = &mut processes[other];
                other_process.act(&format!("{kind} read 0 0"), "busy");
                other_process.act("flock write", "ok");
                other_process.act("flock none", "ok");
                other_process.act("set write 0 10", "ok");
                other_process.act("set none 0 0", "ok");
                // Whose lock it is cannot be said from one side to the other.
                let foreign = match (kind, owner, other) {
                    ("ofd", _, 2) | (_, 0 | 1, 2) => "write 10 10 -1",
                    _ => "write 10 10 0",
                };
                other_process.act("get write 5 10", foreign);
            }
            processes[owner].act(&format!("{kind} none 0 0"), "ok");
        }
        assert!(pid > 0);
    }
}

#[test]
fn a_process_is_told_which_other_one_at_its_door_has_the_lock() {
    let house = House::new(|_| {});
    let mut one = locker(&house.file(0));
    let mut two = locker(&house.file(0));
    one.act("set read 100 0", "ok");
    two.act("get write 0 0", &format!("read 100 0 {}", one.pid()));
    two.act("set read 150 10", "ok");
    two.act("set write 150 10", "busy");
    one.act("get write 150 10", &format!("read 150 10 {}", two.pid()));
    two.act("set none 0 0", "ok");
    two.act("get read 0 0", "free");
}

#[test]
fn a_lock_of_the_whole_file_is_against_the_other_door_and_the_host() {
    let house = House::new(|_| {});
    let [mut one, mut two, mut host] = house.processes();
    one.act("flock write", "ok");
    two.act("flock read", "busy");
    host.act("flock read", "busy");
    one.act("flock read", "ok");
    two.act("flock read", "ok");
    host.act("flock write", "busy");
    one.act("flock none", "ok");
    two.act("reopen", "ok");
    host.act("flock write", "ok");
    one.act("flock read", "busy");
    two.act("flock read", "busy");
}

#[test]
fn who_waits_gets_the_lock_when_it_is_given_up() {
    let house = House::new(|_| {});
    let mut processes = house.processes();
    for (wait, release) in [("wait", "set"), ("ofdwait", "ofd"), ("flockwait", "flock")] {
        for (owner, waiter) in [(2, 0), (0, 1), (1, 2)] {
            processes[owner].act(&format!("{release} write 0 0"), "ok");
            processes[waiter].begin(&format!("{wait} write 0 0"));
            processes[waiter].says_nothing();
            processes[owner].act(&format!("{release} none 0 0"), "ok");
            processes[waiter].says("ok");
            processes[owner].act(&format!("{release} read 0 0"), "busy");
            processes[waiter].act(&format!("{release} none 0 0"), "ok");
        }
    }
}

#[test]
fn locks_go_with_the_process_that_has_them() {
    let house = House::new(|_| {});
    let mut host = locker(&house.on_host());
    for lock in ["set write 0 0", "ofd write 0 0", "flock write"] {
        let mut process = locker(&house.file(0));
        process.act(lock, "ok");
        host.act(lock, "busy");
        process.kill();
        let wait =
            lock.replace("set", "wait").replace("ofd", "ofdwait").replace("flock", "flockwait");
        // The kernel closes the last file in the background.
        host.act(&wait, "ok");
        host.act(&lock.replace("write", "none"), "ok");
    }
    assert_eq!(house.doors[0].share().live_lock_owners(), 0);
}

#[test]
fn locks_go_with_the_door() {
    let mut house = House::new(|_| {});
    let [mut one, two, mut host] = house.processes();
    drop(two);
    one.act("set write 0 10", "ok");
    one.act("flock write", "ok");
    host.act("set read 0 10", "busy");
    host.act("flock read", "busy");
    // The file is still open there.
    house.doors[0].unmount().unwrap();
    host.act("set read 0 10", "ok");
    host.act("flock read", "ok");
}

#[test]
fn waiting_ends_with_the_door() {
    let mut house = House::new(|_| {});
    let [mut one, mut two, mut host] = house.processes();
    host.act("set write 0 0", "ok");
    host.act("flock write", "ok");
    one.begin("wait write 0 0");
    two.begin("flockwait write");
    one.says_nothing();
    two.says_nothing();
    let start = Instant::now();
    for door in &mut house.doors {
        door.unmount().unwrap();
    }
    assert!(start.elapsed() < PATIENCE);
    drop((one, two));
    host.act("set none 0 0", "ok");
    host.act("flock none", "ok");
    let mut other = locker(&house.on_host());
    other.act("set write 0 0", "ok");
    other.act("flock write", "ok");
}

#[test]
fn a_door_serves_others_while_many_wait_and_each_gets_its_turn() {
    const WAITERS: usize = 64;
    let house = House::new(|_| {});
    let host = File::open(house.on_host()).unwrap();
    flock(&host, FlockOperation::LockExclusive).unwrap();
    let path = house.file(0);
    thread::scope(|scope| {
        let waiters: Vec<_> = (0..WAITERS)
            .map(|_| {
                scope.spawn(|| {
                    let file = File::open(&path).unwrap();
                    flock(&file, FlockOperation::LockExclusive).unwrap();
                })
            })
            .collect();
        let waiting = || house.doors[0].counters().requests(Opcode::Setlkw);
        let start = Instant::now();
        while waiting() < WAITERS as u64 {
            assert!(start.elapsed() < PATIENCE);
            thread::sleep(Duration::from_millis(5));
        }
        let start = Instant::now();
        for number in 0..100 {
            let path = house.doors[0].path().join(format!("other{number}"));
            fs::write(&path, "text").unwrap();
            assert_eq!(fs::read(&path).unwrap(), b"text");
        }
        assert!(start.elapsed() < PATIENCE);
        assert!(waiters.iter().all(|waiter| !waiter.is_finished()));
        flock(&host, FlockOperation::Unlock).unwrap();
        for waiter in waiters {
            waiter.join().unwrap();
        }
    });
}

#[test]
fn closing_any_descriptor_of_the_file_gives_up_the_locks_of_the_process() {
    let house = House::new(|_| {});
    let [mut one, mut two, mut host] = house.processes();
    one.act("set write 0 10", "ok");
    one.act("flock write", "ok");
    one.act("touch", "ok");
    two.act("set write 0 10", "ok");
    host.act("flock read", "busy");
    // One of an open file stays until that is closed.
    one.act("ofd write 20 10", "ok");
    one.act("touch", "ok");
    two.act("set read 20 10", "busy");
    one.act("reopen", "ok");
    two.act("wait read 20 10", "ok");
    host.act("set write 30 0", "ok");
}

#[test]
fn a_child_has_none_of_its_parents_record_locks_and_all_of_its_open_files() {
    let house = House::new(|_| {});
    let mut one = locker(&house.file(0));
    one.act("set write 0 10", "ok");
    one.act("child set read 0 10", "busy");
    one.act("child set write 20 10", "ok");
    // That one went with the child, which closed the file; the parent's did not.
    one.act("set write 20 10", "ok");
    one.act("child get write 0 1", &format!("write 0 10 {}", one.pid()));
    one.act("flock write", "ok");
    one.act("child flock write", "ok");
    one.act("child flock read", "ok");
    let mut host = locker(&house.on_host());
    host.act("flock read", "ok");
    host.act("flock write", "busy");
}

#[test]
fn a_signal_interrupts_who_waits_and_leaves_what_it_had() {
    let house = House::new(|_| {});
    let [mut one, mut two, mut host] = house.processes();
    host.act("set read 0 0", "ok");
    host.act("flock read", "ok");
    one.act("set read 0 10", "ok");
    for (process, wait) in [(&mut one, "wait write 0 10"), (&mut two, "flockwait write")] {
        for _ in 0..20 {
            process.begin(wait);
            thread::sleep(Duration::from_millis(5));
            process.signal(Signal::INT);
            process.says("interrupted");
        }
    }
    host.act("set none 0 0", "ok");
    host.act("get write 0 0", "read 0 10 -1");
    assert!(house.doors.iter().all(|door| door.counters().requests(Opcode::Interrupt) > 0));
}

#[test]
fn who_is_killed_while_waiting_ends_at_once_and_never_gets_the_lock() {
    let house = House::new(|_| {});
    let mut host = locker(&house.on_host());
    for (lock, wait) in [("set write 0 0", "wait write 0 0"), ("flock write", "flockwait write")] {
        host.act(lock, "ok");
        let mut one = locker(&house.file(0));
        one.begin(wait);
        one.says_nothing();
        let took = one.kill();
        assert!(took < Duration::from_secs(2), "{took:?}");
        host.act(&lock.replace("write", "none"), "ok");
        let mut two = locker(&house.file(1));
        two.act(lock, "ok");
        two.act("reopen", "ok");
    }
}

#[test]
fn a_read_only_share_takes_locks_for_reading() {
    let house = House::new(|options| options.read_only = true);
    let [mut one, mut two, mut host] = house.processes();
    one.act("set read 0 10", "ok");
    two.act("set read 0 10", "ok");
    host.act("set write 0 10", "busy");
    one.act("set write 0 10", "Bad file descriptor (os error 9)");
    one.act("flock write", "ok");
    host.act("flock read", "busy");
}

#[test]
fn locks_of_the_guest_concern_the_processes_at_one_door_only() {
    let house = House::new(|options| options.locks = LockPolicy::Guest);
    let [mut one, mut two, mut host] = house.processes();
    let mut beside = locker(&house.file(0));
    for lock in ["set write 0 0", "flock write"] {
        one.act(lock, "ok");
        beside.act(lock, "busy");
        two.act(lock, "ok");
        host.act(lock, "ok");
    }
    assert_eq!(house.doors[0].counters().requests(Opcode::Setlk), 0);
}
