//! Locks, against the host's own and those of a second guest.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::share::options::LockLimits;
use crate::share::{LockPolicy, Share};

const READ: i32 = libc::F_RDLCK;
const WRITE: i32 = libc::F_WRLCK;
const UNLOCK: i32 = libc::F_UNLCK;
const END: u64 = i64::MAX as u64;

/// How long is waited for what must not happen.
const MOMENT: Duration = Duration::from_millis(50);

/// Runs `begin`, and returns when as many requests more as it says wait for a lock.
fn until_they_wait<T>(guest: &Guest, count: usize, begin: impl FnOnce() -> T) -> T {
    let before = guest.share.live_lock_waiters();
    let begun = begin();
    let start = Instant::now();
    while guest.share.live_lock_waiters() < before + count {
        assert!(start.elapsed() < Duration::from_secs(60), "they do not wait");
        std::thread::sleep(Duration::from_millis(1));
    }
    std::thread::sleep(MOMENT);
    begun
}

fn lk(fh: u64, owner: u64, kind: i32, start: u64, end: u64) -> LkIn {
    let lk = FileLock { start, end, type_: kind as u32, pid: 1000 + owner as u32 };
    LkIn { fh, owner, lk, ..LkIn::default() }
}

fn whole(fh: u64, kind: i32) -> LkIn {
    LkIn { lk_flags: LK_FLOCK, ..lk(fh, fh, kind, 0, END) }
}

impl Guest {
    fn setlk(&self, node: u64, request: LkIn) -> i32 {
        let answer = self.call(Opcode::Setlk, node, &[request.as_slice()]);
        assert!(answer.body.is_empty());
        answer.error
    }

    fn getlk(&self, node: u64, request: LkIn) -> (i32, u64, u64, u32) {
        let lk = self.call(Opcode::Getlk, node, &[request.as_slice()]).get::<LkOut>().lk;
        (lk.type_ as i32, lk.start, lk.end, lk.pid)
    }

    /// SETLKW with a `unique` of its own.
    fn setlkw(&self, node: u64, request: LkIn, unique: u64) -> i32 {
        let mut frame = self.frame(Opcode::Setlkw as u32, node, &[request.as_slice()]);
        frame[8..16].copy_from_slice(&unique.to_ne_bytes());
        self.send(&mut frame, unique).unwrap().error
    }

    fn interrupt(&self, unique: u64) {
        let body = InterruptIn { unique };
        let mut frame = self.frame(Opcode::Interrupt as u32, 0, &[body.as_slice()]);
        frame[8..16].copy_from_slice(&(unique | 1).to_ne_bytes());
        assert!(self.send(&mut frame, unique | 1).is_none());
    }

    fn flush(&self, node: u64, fh: u64, lock_owner: u64) {
        let body = FlushIn { fh, lock_owner, ..FlushIn::default() };
        self.call(Opcode::Flush, node, &[body.as_slice()]).ok();
    }
}

/// A second guest with the same directory.
fn neighbour(of: &Guest) -> Guest {
    let path = of.path().to_path_buf();
    Guest::with(|options| options.directory = path)
}

/// A classic lock of this process, as a process of the host has it.
fn host_lock(file: &File, kind: i32, start: i64, len: i64) -> bool {
    let lock =
        libc::flock { l_type: kind as i16, l_whence: 0, l_start: start, l_len: len, l_pid: 0 };
    fcntl(file, libc::F_SETLK, &lock)
}

/// A lock of the open file, on the host.
fn host_ofd_lock(file: &File, kind: i32, start: i64, len: i64) -> bool {
    let lock =
        libc::flock { l_type: kind as i16, l_whence: 0, l_start: start, l_len: len, l_pid: 0 };
    fcntl(file, libc::F_OFD_SETLK, &lock)
}

#[expect(unsafe_code, reason = "fcntl(2) with a struct")]
fn fcntl(file: &File, command: i32, lock: &libc::flock) -> bool {
    // SAFETY: both commands read one `struct flock`.
    unsafe { libc::fcntl(file.as_raw_fd(), command, lock) == 0 }
}

fn host_file(guest: &Guest) -> File {
    File::options().read(true).write(true).open(guest.path().join("file")).unwrap()
}

/// A guest with a file that is open for everything: the guest, the node, the handle.
fn open() -> (Guest, u64, u64) {
    let guest = Guest::new();
    let node = file(&guest, b"content");
    let fh = guest.fh(node, libc::O_RDWR);
    (guest, node, fh)
}

#[test]
fn owners_are_against_each_other_and_the_second_is_told_of_the_first() {
    let (guest, node, fh) = open();
    assert_eq!(guest.setlk(node, lk(fh, 1, WRITE, 10, 19)), 0);
    assert_eq!(guest.setlk(node, lk(fh, 1, WRITE, 10, 19)), 0, "again");
    assert_eq!(guest.setlk(node, lk(fh, 2, READ, 0, END)), libc::EAGAIN);
    assert_eq!(guest.setlk(node, lk(fh, 2, READ, 20, END)), 0);
    assert_eq!(guest.setlk(node, lk(fh, 3, READ, 30, 40)), 0, "many may read");
    assert_eq!(guest.getlk(node, lk(fh, 2, READ, 0, END)), (WRITE, 10, 19, 1001));
    assert_eq!(guest.getlk(node, lk(fh, 1, WRITE, 0, 100)), (READ, 20, END, 1002));
    assert_eq!(guest.getlk(node, lk(fh, 4, READ, 20, 30)), (UNLOCK, 20, 30, 0));
    assert_eq!(guest.getlk(node, lk(fh, 1, WRITE, 0, 19)), (UNLOCK, 0, 19, 0), "its own");
    assert_eq!(guest.setlk(node, lk(fh, 1, UNLOCK, 12, 15)), 0);
    assert_eq!(guest.getlk(node, lk(fh, 2, WRITE, 0, 19)), (WRITE, 10, 11, 1001));
    assert_eq!(guest.setlk(node, lk(fh, 2, WRITE, 12, 15)), 0);
    assert_eq!(guest.share.live_lock_owners(), 3);
    assert_eq!(guest.setlk(node, lk(fh, 99, UNLOCK, 0, END)), 0, "nothing to give up");
    assert_eq!(guest.share.live_lock_owners(), 3);
}

#[test]
fn locks_hold_against_the_host_and_the_hosts_against_the_guest() {
    let (guest, node, fh) = open();
    let host = host_file(&guest);
    assert_eq!(guest.setlk(node, lk(fh, 1, WRITE, 0, 9)), 0);
    for lock in [host_lock, host_ofd_lock] {
        assert!(!lock(&host, READ, 5, 1));
        assert!(lock(&host, WRITE, 10, 10));
        assert_eq!(guest.setlk(node, lk(fh, 1, READ, 0, 10)), libc::EAGAIN);
        let expected = (WRITE, 10, 19, 0);
        assert_eq!(
            guest.getlk(node, lk(fh, 1, READ, 0, END)),
            expected,
            "no process of the guest's"
        );
        assert!(lock(&host, UNLOCK, 0, 0));
        assert_eq!(guest.setlk(node, lk(fh, 1, READ, 0, 10)), 0);
        assert!(lock(&host, READ, 0, 0) && lock(&host, UNLOCK, 0, 0));
        assert_eq!(guest.setlk(node, lk(fh, 1, UNLOCK, 0, END)), 0);
        assert_eq!(guest.setlk(node, lk(fh, 1, WRITE, 0, 9)), 0);
    }
}

#[test]
fn locks_hold_between_guests() {
    let (one, node, fh) = open();
    let two = neighbour(&one);
    let node_two = two.node("file");
    let fh_two = two.fh(node_two, libc::O_RDWR);
    assert_eq!(one.setlk(node, lk(fh, 1, WRITE, 0, 9)), 0);
    assert_eq!(two.setlk(node_two, lk(fh_two, 1, WRITE, 9, 9)), libc::EAGAIN);
    assert_eq!(two.getlk(node_two, lk(fh_two, 1, WRITE, 9, 9)), (WRITE, 0, 9, 0));
    assert_eq!(one.setlk(node, whole(fh, WRITE)), 0);
    assert_eq!(two.setlk(node_two, whole(fh_two, READ)), libc::EAGAIN);
    one.session.reset();
    assert_eq!(two.setlk(node_two, lk(fh_two, 1, WRITE, 9, 9)), 0);
    assert_eq!(two.setlk(node_two, whole(fh_two, READ)), 0);
}

#[test]
fn whole_file_locks_belong_to_the_handle() {
    let (guest, node, fh) = open();
    let second = guest.fh(node, libc::O_RDONLY);
    let host = host_file(&guest);
    let nonblocking = |operation| rustix::fs::flock(&host, operation).is_ok();
    use rustix::fs::FlockOperation::*;
    assert_eq!(guest.setlk(node, whole(fh, WRITE)), 0);
    assert_eq!(guest.setlk(node, whole(second, READ)), libc::EAGAIN);
    assert!(!nonblocking(NonBlockingLockShared));
    assert_eq!(guest.setlk(node, whole(fh, READ)), 0);
    assert_eq!(guest.setlk(node, whole(second, READ)), 0);
    assert!(nonblocking(NonBlockingLockShared) && nonblocking(Unlock));
    assert_eq!(guest.setlk(node, lk(fh, 1, WRITE, 0, END)), 0, "another kind of lock");
    assert_eq!(guest.setlk(node, whole(fh, UNLOCK)), 0);
    let release_flags = RELEASE_FLOCK_UNLOCK;
    let body = ReleaseIn { fh: second, release_flags, ..ReleaseIn::default() };
    guest.call(Opcode::Release, node, &[body.as_slice()]).ok();
    assert!(nonblocking(NonBlockingLockExclusive));
    assert_eq!(guest.setlk(node, whole(second, READ)), libc::EBADF);
}

#[test]
fn what_is_no_lock_is_refused_and_nothing_is_set() {
    let (guest, node, fh) = open();
    let other = {
        std::fs::write(guest.path().join("other"), "").unwrap();
        guest.node("other")
    };
    let directory = guest.opendir(ROOT_ID);
    for opcode in [Opcode::Setlk, Opcode::Setlkw, Opcode::Getlk] {
        let error = |node, request: LkIn| guest.call(opcode, node, &[request.as_slice()]).error;
        for (request, expected) in [
            (lk(fh, 1, WRITE, 1, 0), libc::EINVAL),
            (lk(fh, 1, WRITE, 0, END + 1), libc::EINVAL),
            (lk(fh, 1, WRITE, u64::MAX, u64::MAX), libc::EINVAL),
            (lk(fh, 1, 3, 0, 0), libc::EINVAL),
            (lk(fh, 1, -1, 0, 0), libc::EINVAL),
            (LkIn { lk_flags: 2, ..lk(fh, 1, WRITE, 0, 0) }, libc::EINVAL),
            (LkIn { lk_flags: u32::MAX, ..lk(fh, 1, WRITE, 0, 0) }, libc::EINVAL),
            (LkIn { lk_flags: LK_FLOCK, ..lk(fh, 1, 7, 0, 0) }, libc::EINVAL),
            (lk(fh + 9, 1, WRITE, 0, 0), libc::EBADF),
            (lk(directory, 1, WRITE, 0, 0), libc::EBADF),
        ] {
            assert_eq!(error(node, request), expected, "{opcode:?} {request:?}");
        }
        assert_eq!(error(other, lk(fh, 1, WRITE, 0, 0)), libc::EBADF, "of another file");
        assert_eq!(error(ROOT_ID, lk(directory, 1, READ, 0, 0)), libc::EBADF);
    }
    let answer = guest.call(Opcode::Getlk, node, &[whole(fh, READ).as_slice()]);
    assert_eq!(answer.error, libc::EINVAL, "nothing asks so for locks of flock(2)");
    assert_eq!(guest.share.live_lock_owners(), 0);
    assert!(host_lock(&host_file(&guest), WRITE, 0, 0));
}

#[test]
fn the_last_byte_of_all_can_be_locked() {
    let (guest, node, fh) = open();
    assert_eq!(guest.setlk(node, lk(fh, 1, WRITE, END, END)), 0);
    assert_eq!(guest.getlk(node, lk(fh, 2, READ, 0, END)), (WRITE, END, END, 1001));
    assert_eq!(guest.setlk(node, lk(fh, 2, WRITE, 0, END - 1)), 0);
    assert_eq!(guest.getlk(node, lk(fh, 1, READ, 5, 5)), (WRITE, 0, END - 1, 1002));
}

#[test]
fn a_read_only_share_and_a_read_only_handle_take_locks_for_reading_only() {
    let writer = Guest::new();
    file(&writer, b"");
    let path = writer.path().to_path_buf();
    let guest = Guest::with(|options| {
        options.directory = path;
        options.read_only = true;
    });
    let node = guest.node("file");
    let fh = guest.fh(node, libc::O_RDONLY);
    assert_eq!(guest.setlk(node, lk(fh, 1, READ, 0, 9)), 0);
    assert_eq!(guest.setlk(node, lk(fh, 1, WRITE, 0, 9)), libc::EBADF);
    assert_eq!(guest.setlkw(node, lk(fh, 1, WRITE, 0, 9), 7), libc::EBADF);
    assert!(!host_lock(&host_file(&writer), WRITE, 0, 0), "and it holds");
    // flock(2) does not ask how a file is open.
    assert_eq!(guest.setlk(node, whole(fh, WRITE)), 0);
}

#[test]
fn a_lock_is_upgraded_without_a_moment_in_between() {
    let guest = Guest::new();
    let node = file(&guest, b"");
    let reading = guest.fh(node, libc::O_RDONLY);
    let writing = guest.fh(node, libc::O_RDWR);
    let host = host_file(&guest);
    assert_eq!(guest.setlk(node, lk(reading, 1, READ, 0, 9)), 0);
    assert_eq!(guest.setlk(node, lk(reading, 1, READ, 20, 29)), 0);
    // Another owner reads as well: no upgrade, and nothing is lost.
    assert_eq!(guest.setlk(node, lk(reading, 2, READ, 5, 5)), 0);
    assert_eq!(guest.setlk(node, lk(writing, 1, WRITE, 0, 9)), libc::EAGAIN);
    assert!(!host_ofd_lock(&host, WRITE, 0, 1) && !host_ofd_lock(&host, WRITE, 29, 1));
    assert_eq!(guest.setlk(node, lk(reading, 2, UNLOCK, 0, END)), 0);
    assert_eq!(guest.setlk(node, lk(writing, 1, WRITE, 0, 9)), 0);
    assert!(!host_ofd_lock(&host, READ, 0, 1) && host_ofd_lock(&host, READ, 29, 1));
    assert_eq!(guest.getlk(node, lk(writing, 2, WRITE, 15, 40)), (READ, 20, 29, 1001));
}

#[test]
fn closing_a_file_gives_up_the_locks_of_the_process_and_of_no_other() {
    let (guest, node, fh) = open();
    let second = guest.fh(node, libc::O_RDONLY);
    let host = host_file(&guest);
    assert_eq!(guest.setlk(node, lk(fh, 1, READ, 0, 9)), 0);
    assert_eq!(guest.setlk(node, lk(fh, 2, READ, 0, 19)), 0);
    // Any descriptor of the file, not only that of the lock.
    guest.flush(node, second, 1);
    assert_eq!(guest.getlk(node, lk(fh, 3, WRITE, 0, END)), (READ, 0, 19, 1002));
    guest.flush(node, fh, 1);
    guest.flush(node, fh, 77);
    assert_eq!(guest.share.live_lock_owners(), 1);
    guest.flush(node, fh, 2);
    assert_eq!(guest.share.live_lock_owners(), 0);
    assert!(host_ofd_lock(&host, WRITE, 0, 0));
}

#[test]
fn the_locks_of_an_open_file_go_with_its_handle() {
    let (guest, node, fh) = open();
    // The guest's own F_OFD_SETLK: the owner is the open file, and no FLUSH ever names it.
    let owner = 0xffff_8880_1234_5678;
    assert_eq!(guest.setlk(node, lk(fh, owner, WRITE, 0, 9)), 0);
    let second = guest.fh(node, libc::O_RDWR);
    assert_eq!(guest.setlk(node, lk(second, 1, WRITE, 10, 19)), 0);
    guest.flush(node, fh, 1234);
    assert_eq!(guest.share.live_lock_owners(), 2);
    release(&guest, Opcode::Release, node, fh).ok();
    assert_eq!(guest.getlk(node, lk(second, 3, WRITE, 0, END)), (WRITE, 10, 19, 1001));
    assert_eq!(guest.share.live_lock_owners(), 1);
}

#[test]
fn forget_destroy_and_reset_give_up_all_locks() {
    let ends: [fn(&Guest, u64); 4] = [
        |guest, node| guest.forget(node, 1),
        |guest, _| guest.call(Opcode::Destroy, 0, &[]).ok(),
        |guest, _| guest.session.reset(),
        |guest, _| assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0),
    ];
    for (number, end) in ends.iter().enumerate() {
        let (guest, node, fh) = open();
        let host = host_file(&guest);
        assert_eq!(guest.setlk(node, lk(fh, 1, WRITE, 0, END)), 0);
        if number > 0 {
            assert_eq!(guest.setlk(node, whole(fh, WRITE)), 0);
        }
        end(&guest, node);
        assert_eq!(guest.share.live_lock_owners(), 0);
        assert!(host_ofd_lock(&host, WRITE, 0, 0), "{number}");
        let flock = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        assert!(rustix::fs::flock(&host, flock).is_ok(), "{number}");
    }
}

#[test]
fn a_lock_is_waited_for_and_others_are_served_meanwhile() {
    let (guest, node, fh) = open();
    let host = host_file(&guest);
    for (kind, request) in [("range", lk(fh, 1, WRITE, 0, 9)), ("whole", whole(fh, WRITE))] {
        assert!(host_ofd_lock(&host, READ, 0, 0));
        rustix::fs::flock(&host, rustix::fs::FlockOperation::LockShared).unwrap();
        std::thread::scope(|scope| {
            let waiting =
                until_they_wait(&guest, 1, || scope.spawn(|| guest.setlkw(node, request, 2)));
            assert!(!waiting.is_finished(), "{kind}");
            assert_eq!(guest.getattr(node).error, 0);
            assert_eq!(guest.setlk(node, lk(fh, 1, WRITE, 0, 9)), libc::EAGAIN, "the same owner");
            assert!(host_ofd_lock(&host, UNLOCK, 0, 0));
            rustix::fs::flock(&host, rustix::fs::FlockOperation::Unlock).unwrap();
            assert_eq!(waiting.join().unwrap(), 0, "{kind}");
        });
        if kind == "range" {
            assert!(!host_ofd_lock(&host, READ, 9, 1) && host_ofd_lock(&host, READ, 10, 1));
            assert_eq!(guest.setlk(node, lk(fh, 1, UNLOCK, 0, END)), 0);
        }
    }
    assert_eq!(guest.setlkw(node, lk(fh, 1, READ, 0, 9), 4), 0, "nothing to wait for");
}

#[test]
fn an_interrupted_wait_is_eintr_and_leaves_what_was_locked_before() {
    let (guest, node, fh) = open();
    let host = host_file(&guest);
    assert!(host_ofd_lock(&host, READ, 0, 0));
    rustix::fs::flock(&host, rustix::fs::FlockOperation::LockShared).unwrap();
    assert_eq!(guest.setlk(node, lk(fh, 1, READ, 0, 9)), 0);
    for unique in (0..200).map(|round| 2 * round) {
        let request = if unique % 4 == 0 { lk(fh, 1, WRITE, 0, 9) } else { whole(fh, WRITE) };
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| guest.setlkw(node, request, unique));
            // At every stage of its beginning: also before it waits, and before it is known at all.
            std::thread::sleep(Duration::from_micros(unique * 2));
            guest.interrupt(unique);
            assert_eq!(waiting.join().unwrap(), libc::EINTR);
        });
    }
    assert_eq!(guest.getlk(node, lk(fh, 2, WRITE, 0, END)).0, READ);
    assert!(host_ofd_lock(&host, UNLOCK, 0, 0));
    assert_eq!(guest.getlk(node, lk(fh, 2, WRITE, 0, END)), (READ, 0, 9, 1001));
}

#[test]
fn an_interrupt_of_nothing_is_nothing_and_hundreds_of_them_are_no_more() {
    let (guest, node, fh) = open();
    for unique in 0..1000 {
        guest.interrupt(unique);
    }
    guest.interrupt(u64::MAX);
    // The ones long ago are forgotten.
    assert!(host_ofd_lock(&host_file(&guest), UNLOCK, 0, 0));
    assert_eq!(guest.setlkw(node, lk(fh, 1, WRITE, 0, 9), 999), 0, "it need not wait");
    let host = host_file(&guest);
    assert!(host_ofd_lock(&host, WRITE, 20, 1));
    std::thread::scope(|scope| {
        let waiting = until_they_wait(&guest, 1, || {
            scope.spawn(|| guest.setlkw(node, lk(fh, 1, WRITE, 20, 20), 500))
        });
        assert!(!waiting.is_finished());
        assert!(host_ofd_lock(&host, UNLOCK, 0, 0));
        assert_eq!(waiting.join().unwrap(), 0);
    });
}

#[test]
fn the_end_of_a_session_ends_the_waiting_and_sets_nothing() {
    for reset in [false, true] {
        let (guest, node, fh) = open();
        let host = host_file(&guest);
        assert!(host_ofd_lock(&host, WRITE, 0, 0));
        rustix::fs::flock(&host, rustix::fs::FlockOperation::LockExclusive).unwrap();
        std::thread::scope(|scope| {
            let guest = &guest;
            let wait = |owner| {
                let request =
                    if owner % 2 == 0 { lk(fh, owner, WRITE, 0, 9) } else { whole(fh, WRITE) };
                scope.spawn(move || guest.setlkw(node, request, owner))
            };
            let waiting: Vec<_> = until_they_wait(guest, 16, || (0..16).map(wait).collect());
            let start = Instant::now();
            if reset {
                guest.session.reset();
            } else {
                guest.call(Opcode::Destroy, 0, &[]).ok();
            }
            assert!(start.elapsed() < Duration::from_secs(1));
            for waiting in waiting {
                assert_eq!(waiting.join().unwrap(), libc::EINTR);
            }
        });
        assert!(host_ofd_lock(&host, UNLOCK, 0, 0));
        let second = host_file(&guest);
        assert!(host_ofd_lock(&second, WRITE, 0, 0), "nobody has got it");
    }
}

#[test]
fn no_lock_outlives_a_session_that_ends_while_locks_are_set() {
    let (guest, ..) = open();
    let host = host_file(&guest);
    for _ in 0..50 {
        let node = guest.node("file");
        let fh = guest.fh(node, libc::O_RDWR);
        std::thread::scope(|scope| {
            for owner in 0..6u64 {
                let guest = &guest;
                scope.spawn(move || {
                    let mut unique = owner * 1_000_000;
                    loop {
                        unique += 2;
                        // Two want each byte.
                        let request = lk(fh, owner, WRITE, owner / 2, owner / 2);
                        match guest.setlkw(node, request, unique) {
                            0 => {}
                            _ => break,
                        }
                        let request = lk(fh, owner, UNLOCK, 0, END);
                        guest.setlk(node, request);
                    }
                });
            }
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(guest.init(7, MINOR, EVERYTHING).error, 0);
        });
        assert_eq!(guest.share.live_lock_owners(), 0);
        assert!(host_ofd_lock(&host, WRITE, 0, 0) && host_ofd_lock(&host, UNLOCK, 0, 0));
    }
}

#[test]
fn a_process_that_closes_a_file_while_it_waits_loses_its_locks_and_goes_on_waiting() {
    let (guest, node, fh) = open();
    let host = host_file(&guest);
    assert!(host_ofd_lock(&host, WRITE, 0, 1));
    assert_eq!(guest.setlk(node, lk(fh, 1, WRITE, 50, 59)), 0);
    std::thread::scope(|scope| {
        let waiting = until_they_wait(&guest, 1, || {
            scope.spawn(|| guest.setlkw(node, lk(fh, 1, WRITE, 0, 9), 2))
        });
        guest.flush(node, fh, 1);
        assert!(host_ofd_lock(&host, WRITE, 50, 10), "gone at once");
        assert!(!waiting.is_finished());
        assert!(host_ofd_lock(&host, UNLOCK, 0, 0));
        assert_eq!(waiting.join().unwrap(), 0);
    });
    assert_eq!(guest.getlk(node, lk(fh, 2, WRITE, 0, END)), (WRITE, 0, 9, 1001));
}

#[test]
fn who_would_wait_for_ever_is_told_so_and_others_wait() {
    let (guest, node, fh) = open();
    std::fs::write(guest.path().join("other"), "").unwrap();
    let other = guest.node("other");
    let other_fh = guest.fh(other, libc::O_RDWR);
    std::thread::scope(|scope| {
        let wait = |node, request, unique| {
            let guest = &guest;
            until_they_wait(guest, 1, move || {
                scope.spawn(move || guest.setlkw(node, request, unique))
            })
        };
        for owner in 1..=3 {
            assert_eq!(guest.setlk(node, lk(fh, owner, WRITE, owner, owner)), 0);
        }
        assert_eq!(guest.setlk(other, lk(other_fh, 4, READ, 0, END)), 0);
        // 1 waits for 2, 2 for 3; 3 for 4, on another file.
        let one = wait(node, lk(fh, 1, READ, 2, 2), 100);
        let two = wait(node, lk(fh, 2, WRITE, 3, 9), 102);
        let three = wait(other, lk(other_fh, 3, WRITE, 7, 7), 104);
        for span in [1..=1, 2..=2, 3..=3, 0..=END] {
            let (first, last) = span.into_inner();
            let request = lk(fh, 4, WRITE, first, last);
            assert_eq!(guest.setlkw(node, request, 106), libc::EDEADLK, "{first} to {last}");
        }
        assert_eq!(guest.setlk(node, lk(fh, 4, WRITE, 1, 1)), libc::EAGAIN, "nobody waits for it");
        // 5 has nothing that anybody waits for.
        let five = wait(node, lk(fh, 5, READ, 1, 3), 108);
        assert_eq!(guest.share.live_lock_waiters(), 4);

        // And all get what they wait for, in the order of the chain.
        assert_eq!(guest.setlk(other, lk(other_fh, 4, UNLOCK, 0, END)), 0);
        assert_eq!(three.join().unwrap(), 0);
        assert_eq!(guest.setlk(node, lk(fh, 3, UNLOCK, 0, END)), 0);
        assert_eq!(two.join().unwrap(), 0);
        assert_eq!(guest.setlk(node, lk(fh, 2, UNLOCK, 0, END)), 0);
        assert_eq!(one.join().unwrap(), 0);
        assert_eq!(guest.setlk(node, lk(fh, 1, UNLOCK, 0, END)), 0);
        assert_eq!(five.join().unwrap(), 0);
    });
    // What was waited for is forgotten: the other way round there is no circle now.
    assert_eq!(guest.share.live_lock_waiters(), 0);
    assert_eq!(guest.setlk(node, lk(fh, 5, UNLOCK, 0, END)), 0);
    assert_eq!(guest.setlkw(node, lk(fh, 4, WRITE, 0, END), 110), 0);
}

#[test]
fn locks_are_bounded() {
    let limits = LockLimits { owners: 3, records: 6, waiters: 2 };
    let guest = Guest::with(|options| options.max_locks = Some(limits));
    let node = file(&guest, b"");
    let fh = guest.fh(node, libc::O_RDWR);
    // Owners. One without a lock makes room for another.
    for owner in 1..=3 {
        assert_eq!(guest.setlk(node, lk(fh, owner, READ, 0, 9)), 0);
    }
    assert_eq!(guest.setlk(node, lk(fh, 4, READ, 0, 9)), libc::ENOLCK);
    assert_eq!(guest.setlk(node, lk(fh, 2, UNLOCK, 0, END)), 0);
    assert_eq!(guest.setlk(node, lk(fh, 4, READ, 0, 9)), 0);
    assert_eq!(guest.share.live_lock_owners(), 3);
    // Ranges: three are there. What splits one costs another.
    for start in [20, 30] {
        assert_eq!(guest.setlk(node, lk(fh, 1, READ, start, start)), 0);
    }
    assert_eq!(guest.setlk(node, lk(fh, 1, UNLOCK, 5, 5)), 0);
    assert_eq!(guest.setlk(node, lk(fh, 1, READ, 40, 40)), libc::ENOLCK);
    assert_eq!(guest.setlk(node, lk(fh, 1, UNLOCK, 2, 2)), libc::ENOLCK);
    assert_eq!(guest.setlk(node, lk(fh, 1, READ, 31, 31)), 0, "that is one with its neighbour");
    assert_eq!(guest.setlk(node, lk(fh, 1, UNLOCK, 0, END)), 0);
    assert_eq!(guest.setlk(node, lk(fh, 1, READ, 40, 40)), 0);
    guest.flush(node, fh, 1);
    guest.flush(node, fh, 3);
    guest.flush(node, fh, 4);
    // Waiters, and that all of them are given back.
    let host = host_file(&guest);
    for round in 0..3 {
        assert!(host_ofd_lock(&host, WRITE, 0, 0));
        std::thread::scope(|scope| {
            let guest = &guest;
            let wait = |at| scope.spawn(move || guest.setlkw(node, lk(fh, at, READ, 0, 9), at));
            let waiting = until_they_wait(guest, 2, || [1, 2].map(wait));
            assert_eq!(guest.setlkw(node, lk(fh, 3, READ, 0, 9), 3), libc::ENOLCK, "{round}");
            assert_eq!(guest.setlkw(node, whole(fh, WRITE), 4), 0, "it need not wait");
            assert!(host_ofd_lock(&host, UNLOCK, 0, 0));
            for waiting in waiting {
                assert_eq!(waiting.join().unwrap(), 0);
            }
        });
        for owner in [1, 2] {
            guest.flush(node, fh, owner);
        }
        assert_eq!(guest.setlk(node, whole(fh, UNLOCK)), 0);
    }
}

#[test]
fn the_descriptors_of_owners_are_given_back() {
    let (guest, node, fh) = open();
    let of_file = || {
        let target = guest.path().join("file");
        let links = std::fs::read_dir("/proc/self/fd").unwrap();
        let links = links.filter_map(|link| std::fs::read_link(link.unwrap().path()).ok());
        links.filter(|link| *link == target).count()
    };
    let before = of_file();
    for owner in 0..50 {
        assert_eq!(guest.setlk(node, lk(fh, owner, READ, 0, owner)), 0);
    }
    assert_eq!(of_file(), before + 50);
    for owner in 0..50 {
        guest.flush(node, fh, owner);
    }
    assert_eq!(of_file(), before);
}

#[test]
fn with_locks_of_the_guest_the_host_has_none() {
    let guest = Guest::with(|options| options.locks = LockPolicy::Guest);
    let node = file(&guest, b"");
    let fh = guest.fh(node, libc::O_RDWR);
    for opcode in [Opcode::Setlk, Opcode::Setlkw, Opcode::Getlk] {
        let request = lk(fh, 1, WRITE, 0, 9);
        assert_eq!(guest.call(opcode, node, &[request.as_slice()]).error, libc::ENOSYS);
    }
    assert!(host_ofd_lock(&host_file(&guest), WRITE, 0, 0));
}

#[test]
fn a_share_can_be_locked_by_many_threads_at_once() {
    fn check<T: Send + Sync>(_: &Arc<T>) {}
    let (guest, node, fh) = open();
    check::<Share>(&guest.share);
    // A counter in the file, changed under a lock: no change is lost.
    std::fs::write(guest.path().join("file"), 0u64.to_ne_bytes()).unwrap();
    std::thread::scope(|scope| {
        for owner in 0..8u64 {
            let guest = &guest;
            scope.spawn(move || {
                for round in 0..50 {
                    let unique = 2 * (owner * 1000 + round);
                    assert_eq!(guest.setlkw(node, lk(fh, owner, WRITE, 0, 7), unique), 0);
                    let bytes = guest.read(node, fh, 0, 8).body;
                    let number = u64::from_ne_bytes(bytes.try_into().unwrap()) + 1;
                    guest.write(node, fh, 0, &number.to_ne_bytes());
                    assert_eq!(guest.setlk(node, lk(fh, owner, UNLOCK, 0, 7)), 0);
                }
            });
        }
    });
    let bytes = std::fs::read(guest.path().join("file")).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes.try_into().unwrap()), 400);
    assert_eq!(guest.getlk(node, lk(fh, 99, WRITE, 0, END)).0, UNLOCK);
}
