//! Who serves which request: the vCPU that rings, or a thread.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use crate::memory::GuestBuffer;
use crate::sync::lock;
use crate::virtio::VIRTIO_RING_F_EVENT_IDX;
use crate::virtio::fs::dispatch::{BATCH, DEEP, MOST_THREADS};
use crate::virtio::fs::*;
use crate::virtio::testing::*;

const REQUEST: u64 = 0x1000;
const REPLY: u64 = 0x4000;

/// What a server does before it serves a request at once.
type Hook = Arc<dyn Fn() + Send + Sync>;

/// Answers with the request itself. One that begins with `w` waits for the gate, and cannot be served at once.
#[derive(Default)]
struct Counter {
    open: Mutex<bool>,
    opened: Condvar,
    waiting: AtomicUsize,
    /// By which thread each request was served.
    served: Mutex<HashMap<Vec<u8>, Vec<ThreadId>>>,
    hook: Mutex<Option<Hook>>,
}

impl Counter {
    fn note(&self, text: &[u8]) {
        lock(&self.served).entry(text.to_vec()).or_default().push(thread::current().id());
    }

    fn answer(&self, request: &GuestBuffer<'_>, reply: &GuestBuffer<'_>) -> (Vec<u8>, Served) {
        let mut bytes = vec![0; request.len()];
        request.read_at(0, &mut bytes).unwrap();
        reply.write_at(0, &bytes).unwrap();
        let len = bytes.len() as u32;
        (bytes, Served::Done(len))
    }

    fn open_gate(&self) {
        *lock(&self.open) = true;
        self.opened.notify_all();
    }

    fn threads_of(&self, text: &[u8]) -> Vec<ThreadId> {
        lock(&self.served).get(text).cloned().unwrap_or_default()
    }

    fn all(&self) -> usize {
        lock(&self.served).values().map(Vec::len).sum()
    }
}

impl Server for Counter {
    fn serve(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        _deferral: &dyn Deferral,
    ) -> Served {
        let (text, served) = self.answer(request, reply);
        if text.starts_with(b"w") {
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let closed = |open: &mut bool| !*open;
            drop(self.opened.wait_while(lock(&self.open), closed).unwrap());
        }
        self.note(&text);
        served
    }

    fn serve_urgent(&self, _: &GuestBuffer<'_>, _: &GuestBuffer<'_>) -> u32 {
        0
    }

    fn serve_at_once(
        &self,
        request: &GuestBuffer<'_>,
        reply: &GuestBuffer<'_>,
        _deferral: &dyn Deferral,
    ) -> Option<Served> {
        let (text, served) = self.answer(request, reply);
        if text.starts_with(b"w") {
            return None;
        }
        let hook = lock(&self.hook).clone();
        if let Some(hook) = hook {
            hook();
        }
        self.note(&text);
        Some(served)
    }

    fn reset(&self) {}
}

fn machine(dispatch: Dispatch) -> (Arc<Counter>, Arc<FsDevice>, Driver) {
    let counter = Arc::new(Counter::default());
    let config = Config::new("share", 1).unwrap();
    let device = FsDevice::new(config, counter.clone(), None).unwrap();
    let device = Arc::new(device.with_dispatch(dispatch));
    (counter, device.clone(), Driver::new(device))
}

/// Puts a request of two descriptors into a queue.
fn offer(driver: &Driver, queue: &mut DriverQueue, head: u16, text: &[u8]) {
    let memory = driver.memory();
    let request = REQUEST + 0x10 * u64::from(head);
    memory.write_slice(text, GuestAddress(request)).unwrap();
    queue.describe(&memory, head, (request, text.len() as u32, NEXT, head + 1));
    queue.describe(&memory, head + 1, (REPLY + 0x10 * u64::from(head), 0x10, WRITE, 0));
    queue.offer(&memory, head);
}

fn wait_for(what: impl Fn() -> bool) {
    let start = Instant::now();
    while !what() {
        assert!(start.elapsed().as_secs() < 10);
        thread::yield_now();
    }
}

/// A queue whose first thread has gone to sleep.
fn start(driver: &Driver, features: u64) -> DriverQueue {
    let queue = driver.start(features, &[(1, 256)]).remove(0);
    thread::sleep(Duration::from_millis(20));
    queue
}

#[test]
fn a_vcpu_serves_what_it_need_not_wait_for_before_it_goes_on() {
    for dispatch in [Dispatch::Auto, Dispatch::Inline] {
        let (counter, device, driver) = machine(dispatch);
        let mut queue = start(&driver, VIRTIO_RING_F_EVENT_IDX);
        for round in 0..100u16 {
            queue.set_used_event(&driver.memory(), round);
            offer(&driver, &mut queue, 2 * round, b"now");
            // The device asks to be told of each.
            assert_eq!(queue.avail_event(&driver.memory()), round);
            driver.notify(1);
            assert_eq!(queue.take_used(&driver.memory()), Some((2 * u32::from(round), 3)));
        }
        assert_eq!(counter.threads_of(b"now"), vec![thread::current().id(); 100]);
        assert_eq!(driver.controller.triggers()[2], 100);
        let expected = Statistics { inline: 100, ..Statistics::default() };
        assert_eq!(device.statistics(), expected);
    }
}

#[test]
fn threads_serve_all_where_they_are_to() {
    let (counter, device, driver) = machine(Dispatch::Worker);
    let mut queue = start(&driver, 0);
    for round in 0..10u16 {
        offer(&driver, &mut queue, 2 * round, b"now");
        driver.notify(1);
        driver.wait(1, usize::from(round) + 1);
    }
    assert!(!counter.threads_of(b"now").contains(&thread::current().id()));
    let expected = Statistics { by_threads: 10, ..Statistics::default() };
    assert_eq!(device.statistics(), expected);
}

fn polled_machine(polled: Duration) -> (Arc<Counter>, Arc<FsDevice>, Driver) {
    let counter = Arc::new(Counter::default());
    let device = FsDevice::new(Config::new("share", 1).unwrap(), counter.clone(), None).unwrap();
    let device = Arc::new(device.with_dispatch(Dispatch::Poll).with_polled(polled));
    (counter, device.clone(), Driver::new(device))
}

#[test]
fn a_queue_that_is_polled_is_rung_for_once_and_a_reset_does_not_wait_for_the_look() {
    let (counter, device, driver) = polled_machine(Duration::from_secs(600));
    let mut queue = start(&driver, VIRTIO_RING_F_EVENT_IDX);
    let mut rings = 0;
    for round in 0..100u16 {
        offer(&driver, &mut queue, 2 * round, b"now");
        rings += usize::from(ring_if_asked(&driver, &queue, round + 1));
        wait_for(|| queue.used_index(&driver.memory()) == round + 1);
    }
    assert_eq!(rings, 1, "before anybody looked");
    let expected = Statistics { by_threads: 100, ..Statistics::default() };
    assert_eq!(device.statistics(), expected);
    // What waits is waited for by one thread, and another one looks.
    offer(&driver, &mut queue, 200, b"wait");
    wait_for(|| counter.waiting.load(Ordering::SeqCst) == 1);
    wait_for(|| queue.avail_event(&driver.memory()) == 101);
    offer(&driver, &mut queue, 202, b"now");
    assert!(ring_if_asked(&driver, &queue, 102));
    wait_for(|| queue.used_index(&driver.memory()) == 101);
    // For this one it was asked to ring before the other thread was there.
    offer(&driver, &mut queue, 204, b"now");
    ring_if_asked(&driver, &queue, 103);
    wait_for(|| queue.used_index(&driver.memory()) == 102);
    offer(&driver, &mut queue, 206, b"now");
    assert!(!ring_if_asked(&driver, &queue, 104));
    wait_for(|| queue.used_index(&driver.memory()) == 103);
    counter.open_gate();
    wait_for(|| queue.used_index(&driver.memory()) == 104);
    let begin = Instant::now();
    drop((device, driver));
    assert!(begin.elapsed() < Duration::from_secs(60));
    assert_eq!(Arc::strong_count(&counter), 1, "all threads are gone");
}

#[test]
fn a_queue_for_which_nothing_comes_is_polled_no_more_and_rung_for() {
    let (counter, _device, driver) = polled_machine(Duration::from_millis(1));
    let mut queue = start(&driver, VIRTIO_RING_F_EVENT_IDX);
    for round in 0..10u16 {
        wait_for(|| queue.avail_event(&driver.memory()) == round);
        offer(&driver, &mut queue, 2 * round, b"now");
        assert!(ring_if_asked(&driver, &queue, round + 1));
        wait_for(|| queue.used_index(&driver.memory()) == round + 1);
    }
    assert!(!counter.threads_of(b"now").contains(&thread::current().id()));
}

#[test]
fn a_request_that_waits_holds_up_neither_the_vcpu_nor_the_queue() {
    for dispatch in [Dispatch::Auto, Dispatch::Inline, Dispatch::Worker] {
        let (counter, device, driver) = machine(dispatch);
        let mut queue = start(&driver, VIRTIO_RING_F_EVENT_IDX);
        offer(&driver, &mut queue, 0, b"wait");
        driver.notify(1);
        wait_for(|| counter.waiting.load(Ordering::SeqCst) == 1);
        for head in 1..4u16 {
            wait_for(|| queue.avail_event(&driver.memory()) == head);
            offer(&driver, &mut queue, 2 * head, b"now");
            driver.notify(1);
            wait_for(|| counter.threads_of(b"now").len() == usize::from(head));
        }
        assert_eq!(counter.threads_of(b"wait"), []);
        counter.open_gate();
        wait_for(|| queue.used_index(&driver.memory()) == 4);
        let of = device.statistics();
        assert_eq!((of.inline + of.by_threads, of.inline > 0), (4, dispatch != Dispatch::Worker));
        assert_eq!(of.handed_over, u64::from(dispatch != Dispatch::Worker));
    }
}

#[test]
fn as_many_wait_at_a_time_as_there_may_be_threads_and_the_rest_after_them() {
    for dispatch in [Dispatch::Auto, Dispatch::Worker] {
        let (counter, device, driver) = machine(dispatch);
        let mut queue = start(&driver, VIRTIO_RING_F_EVENT_IDX);
        let count = MOST_THREADS + 4;
        for head in 0..count as u16 {
            offer(&driver, &mut queue, 2 * head, b"wait");
            driver.notify(1);
            let there = (usize::from(head) + 1).min(MOST_THREADS);
            wait_for(|| counter.waiting.load(Ordering::SeqCst) == there);
        }
        if dispatch == Dispatch::Auto {
            offer(&driver, &mut queue, 100, b"now");
            driver.notify(1);
            assert_eq!(counter.threads_of(b"now"), [thread::current().id()]);
        }
        assert_eq!(counter.waiting.load(Ordering::SeqCst), MOST_THREADS);
        counter.open_gate();
        let all = count as u16 + u16::from(dispatch == Dispatch::Auto);
        wait_for(|| queue.used_index(&driver.memory()) == all);
        assert_eq!(device.statistics().by_threads, count as u64);
        drop((device, driver));
        assert_eq!(Arc::strong_count(&counter), 1, "all threads are gone");
    }
}

#[test]
fn a_deep_queue_is_left_to_threads_unless_all_is_to_be_inline() {
    for (dispatch, inline) in [(Dispatch::Auto, 0), (Dispatch::Inline, u64::from(DEEP) + 1)] {
        let (_counter, device, driver) = machine(dispatch);
        let mut queue = start(&driver, 0);
        for head in 0..=DEEP {
            offer(&driver, &mut queue, 2 * head, b"now");
        }
        driver.notify(1);
        wait_for(|| queue.used_index(&driver.memory()) == DEEP + 1);
        assert_eq!(device.statistics().inline, inline);
        // One fewer is not deep.
        for head in 0..DEEP {
            offer(&driver, &mut queue, 2 * head, b"now");
        }
        thread::sleep(Duration::from_millis(20));
        driver.notify(1);
        wait_for(|| queue.used_index(&driver.memory()) == 2 * DEEP + 1);
        assert!(device.statistics().inline >= inline, "{:?}", device.statistics());
    }
}

#[test]
fn a_guest_that_keeps_the_queue_full_gets_its_vcpu_back() {
    for dispatch in [Dispatch::Auto, Dispatch::Inline] {
        let (counter, device, driver) = machine(dispatch);
        let queue = Arc::new(Mutex::new(start(&driver, 0)));
        offer(&driver, &mut lock(&queue), 0, b"now");
        // With each request that is served, another vCPU sends one, until it has sent a thousand.
        let (memory, more, sent) = (driver.memory.clone(), queue.clone(), AtomicUsize::new(1));
        *lock(&counter.hook) = Some(Arc::new(move || {
            use vm_memory::GuestAddressSpace;
            let count = sent.fetch_add(1, Ordering::SeqCst);
            if count < 1000 {
                let head = 2 * (count % 100) as u16;
                let memory = memory.memory();
                let mut queue = lock(&more);
                let (request, reply) = (REQUEST + 0x10 * u64::from(head), REPLY);
                memory.write_slice(b"now", GuestAddress(request)).unwrap();
                queue.describe(&memory, head, (request, 3, NEXT, head + 1));
                queue.describe(&memory, head + 1, (reply, 0x10, WRITE, 0));
                queue.offer(&memory, head);
            }
        }));
        driver.notify(1);
        assert!(counter.threads_of(b"now").len() < 1000 || device.statistics().by_threads > 0);
        wait_for(|| counter.all() == 1000);
        assert_eq!(device.statistics().inline, BATCH as u64);
        assert_eq!(device.statistics().by_threads, 1000 - BATCH as u64);
    }
}

#[test]
fn vcpus_that_ring_one_queue_at_once_serve_each_request_once() {
    for dispatch in [Dispatch::Auto, Dispatch::Inline, Dispatch::Worker] {
        let (counter, device, driver) = machine(dispatch);
        let queue = Mutex::new(start(&driver, VIRTIO_RING_F_EVENT_IDX));
        let sent = AtomicUsize::new(0);
        thread::scope(|scope| {
            for vcpu in 0..4u16 {
                let (driver, queue, sent) = (&driver, &queue, &sent);
                scope.spawn(move || {
                    for round in 0..16u16 {
                        let text = format!("{vcpu} {round}");
                        let head = 2 * (16 * vcpu + round);
                        offer(driver, &mut lock(queue), head, text.as_bytes());
                        sent.fetch_add(1, Ordering::SeqCst);
                        driver.notify(1);
                    }
                });
            }
        });
        wait_for(|| counter.all() == 64);
        for threads in lock(&counter.served).values() {
            assert_eq!(threads.len(), 1);
        }
        wait_for(|| lock(&queue).used_index(&driver.memory()) == 64);
        let of = device.statistics();
        assert_eq!((of.inline + of.by_threads, of.handed_over), (64, 0));
    }
}

#[test]
fn a_reset_waits_for_a_vcpu_that_is_serving() {
    let (counter, device, driver) = machine(Dispatch::Auto);
    let mut queue = start(&driver, 0);
    let inside = Arc::new((Mutex::new(false), AtomicUsize::new(0)));
    let gate = inside.clone();
    *lock(&counter.hook) = Some(Arc::new(move || {
        gate.1.fetch_add(1, Ordering::SeqCst);
        wait_for(|| *lock(&gate.0));
    }));
    offer(&driver, &mut queue, 0, b"now");
    offer(&driver, &mut queue, 2, b"later");
    thread::scope(|scope| {
        let serving = scope.spawn(|| driver.notify(1));
        wait_for(|| inside.1.load(Ordering::SeqCst) == 1);
        let resetting = scope.spawn(|| driver.set_status(0));
        thread::sleep(Duration::from_millis(20));
        assert!(!resetting.is_finished());
        // Another vCPU's ring has no effect, and does not hang.
        driver.notify(1);
        *lock(&inside.0) = true;
        resetting.join().unwrap();
        serving.join().unwrap();
    });
    assert_eq!(driver.status(), 0);
    assert_eq!(queue.used_index(&driver.memory()), 0, "nothing is given back");
    assert_eq!(counter.threads_of(b"later"), []);
    assert_eq!(driver.controller.triggers()[2], 0);
    // And it starts anew.
    let mut queue = start(&driver, 0);
    offer(&driver, &mut queue, 0, b"again");
    driver.notify(1);
    assert_eq!(queue.take_used(&driver.memory()), Some((0, 5)));
    drop((device, driver));
    assert_eq!(Arc::strong_count(&counter), 1);
}

#[test]
fn a_broken_chain_or_a_panic_on_a_vcpu_costs_the_queue_and_not_the_vcpu() {
    let (counter, _device, driver) = machine(Dispatch::Auto);
    let mut queue = start(&driver, 0);
    queue.describe(&driver.memory(), 0, (REQUEST, 4, NEXT, 0));
    queue.offer(&driver.memory(), 0);
    driver.notify(1);
    driver.wait_until_broken();
    let mut queue = start(&driver, 0);
    *lock(&counter.hook) = Some(Arc::new(|| panic!("as the test asks")));
    offer(&driver, &mut queue, 0, b"now");
    driver.notify(1);
    assert_eq!(driver.status() & 64, 64);
    assert_eq!(queue.take_used(&driver.memory()), None);
}

#[test]
fn a_request_that_is_handed_over_and_changed_meanwhile_is_checked_again() {
    let (counter, _device, driver) = machine(Dispatch::Auto);
    let mut queue = start(&driver, 0);
    // All threads are busy.
    for head in 0..MOST_THREADS as u16 {
        offer(&driver, &mut queue, 2 * head, b"wait");
        driver.notify(1);
        wait_for(|| counter.waiting.load(Ordering::SeqCst) == usize::from(head) + 1);
    }
    offer(&driver, &mut queue, 100, b"wait");
    driver.notify(1);
    queue.describe(&driver.memory(), 100, (RAM, 4, NEXT, 101));
    counter.open_gate();
    driver.wait_until_broken();
}

/// A machine that has no thread to give but the first.
fn machine_with_one_thread(
    dispatch: Dispatch,
) -> (Arc<Counter>, Arc<FsDevice>, Driver, Arc<AtomicUsize>) {
    let counter = Arc::new(Counter::default());
    let tries = Arc::new(AtomicUsize::new(0));
    let tried = tries.clone();
    let device = FsDevice::new(Config::new("share", 1).unwrap(), counter.clone(), None).unwrap();
    // The first two are those of the two queues.
    let device = device.with_dispatch(dispatch).with_spawn(Arc::new(move |name, body| match tried
        .fetch_add(1, Ordering::SeqCst)
    {
        0 | 1 => crate::virtio::fs::thread::spawn(name, body),
        _ => Err(std::io::ErrorKind::WouldBlock.into()),
    }));
    let device = Arc::new(device);
    (counter, device.clone(), Driver::new(device), tries)
}

/// Rings as a driver with EVENT_IDX does that has put one request into the queue, which has `now` then (2.7.10).
fn ring_if_asked(driver: &Driver, queue: &DriverQueue, now: u16) -> bool {
    let asked = queue.avail_event(&driver.memory()).wrapping_add(1) == now;
    if asked {
        driver.notify(1);
    }
    asked
}

#[test]
fn a_thread_that_cannot_be_started_holds_up_nothing_that_need_not_wait() {
    for dispatch in [Dispatch::Auto, Dispatch::Inline] {
        let (counter, device, driver, tries) = machine_with_one_thread(dispatch);
        let mut queue = driver.start(VIRTIO_RING_F_EVENT_IDX, &[(0, 16), (1, 256)]).remove(1);
        thread::sleep(Duration::from_millis(20));
        offer(&driver, &mut queue, 0, b"wait");
        assert!(ring_if_asked(&driver, &queue, 1));
        wait_for(|| counter.waiting.load(Ordering::SeqCst) == 1);
        wait_for(|| queue.avail_event(&driver.memory()) == 1);
        // Many at a time, for which another thread is wanted.
        for head in 1..=10u16 {
            offer(&driver, &mut queue, 2 * head, b"now");
        }
        driver.notify(1);
        assert_eq!(counter.threads_of(b"now"), vec![thread::current().id(); 10]);
        // One that waits has to do so for the thread that there is, and holds up nobody.
        offer(&driver, &mut queue, 22, b"wait");
        assert!(ring_if_asked(&driver, &queue, 12));
        let before = tries.load(Ordering::SeqCst);
        for head in 12..20u16 {
            offer(&driver, &mut queue, 2 * head, b"now");
            assert!(ring_if_asked(&driver, &queue, head + 1));
        }
        assert_eq!(counter.threads_of(b"now").len(), 18);
        assert!(tries.load(Ordering::SeqCst) > before, "it is tried again");
        counter.open_gate();
        wait_for(|| queue.used_index(&driver.memory()) == 20);
        let of = device.statistics();
        assert_eq!((of.inline, of.handed_over, of.by_threads), (18, 2, 2));
    }
}

#[test]
fn a_thread_that_cannot_be_started_is_tried_again_at_the_next_ring() {
    let (counter, _device, driver, tries) = machine_with_one_thread(Dispatch::Worker);
    let mut queue = driver.start(VIRTIO_RING_F_EVENT_IDX, &[(0, 16), (1, 256)]).remove(1);
    thread::sleep(Duration::from_millis(20));
    offer(&driver, &mut queue, 0, b"wait");
    driver.notify(1);
    wait_for(|| counter.waiting.load(Ordering::SeqCst) == 1);
    for head in 1..10u16 {
        wait_for(|| queue.avail_event(&driver.memory()) == head);
        offer(&driver, &mut queue, 2 * head, b"now");
        assert!(ring_if_asked(&driver, &queue, head + 1));
    }
    assert!(tries.load(Ordering::SeqCst) >= 2 + 9);
    counter.open_gate();
    wait_for(|| queue.used_index(&driver.memory()) == 10);
}

#[test]
fn a_queue_whose_threads_all_wait_is_watched_however_much_is_in_it() {
    for dispatch in [Dispatch::Auto, Dispatch::Inline, Dispatch::Worker] {
        let (counter, _device, driver) = machine(dispatch);
        let mut queue = start(&driver, VIRTIO_RING_F_EVENT_IDX);
        let threads = MOST_THREADS as u16;
        for head in 0..threads {
            offer(&driver, &mut queue, 2 * head, b"wait");
            driver.notify(1);
            wait_for(|| counter.waiting.load(Ordering::SeqCst) == usize::from(head) + 1);
        }
        let more = threads + BATCH as u16 + 8;
        for head in threads..more {
            offer(&driver, &mut queue, 2 * head, b"now");
        }
        driver.notify(1);
        let at_once = |count| if dispatch == Dispatch::Worker { 0 } else { count };
        assert_eq!(counter.threads_of(b"now").len(), at_once(BATCH));
        offer(&driver, &mut queue, 2 * more, b"now");
        assert!(ring_if_asked(&driver, &queue, more + 1), "{dispatch:?}");
        assert_eq!(counter.threads_of(b"now").len(), at_once(BATCH + 9));
        counter.open_gate();
        wait_for(|| queue.used_index(&driver.memory()) == more + 1);
    }
}

#[test]
fn a_vcpu_that_is_serving_lets_the_others_ring() {
    let (counter, _device, driver) = machine(Dispatch::Auto);
    let mut queue = start(&driver, VIRTIO_RING_F_EVENT_IDX);
    let first = AtomicUsize::new(0);
    let (inside, leave) = (Arc::new(AtomicUsize::new(0)), Arc::new(Mutex::new(false)));
    let (entered, gate) = (inside.clone(), leave.clone());
    *lock(&counter.hook) = Some(Arc::new(move || {
        if first.fetch_add(1, Ordering::SeqCst) == 0 {
            entered.store(1, Ordering::SeqCst);
            wait_for(|| *lock(&gate));
        }
    }));
    offer(&driver, &mut queue, 0, b"one");
    offer(&driver, &mut queue, 2, b"two");
    thread::scope(|scope| {
        let serving = scope.spawn(|| driver.notify(1));
        wait_for(|| inside.load(Ordering::SeqCst) == 1);
        offer(&driver, &mut queue, 4, b"three");
        assert!(ring_if_asked(&driver, &queue, 3));
        assert_eq!(counter.threads_of(b"three"), [thread::current().id()]);
        *lock(&leave) = true;
        serving.join().unwrap();
    });
    assert_eq!(queue.used_index(&driver.memory()), 3);
}

#[test]
fn what_goes_wrong_after_a_reset_is_not_told_to_the_next_driver() {
    let (counter, _device, driver) = machine(Dispatch::Auto);
    let mut queue = start(&driver, 0);
    let inside = Arc::new((Mutex::new(false), AtomicUsize::new(0)));
    let gate = inside.clone();
    *lock(&counter.hook) = Some(Arc::new(move || {
        gate.1.fetch_add(1, Ordering::SeqCst);
        wait_for(|| *lock(&gate.0));
        panic!("as the test asks");
    }));
    offer(&driver, &mut queue, 0, b"now");
    thread::scope(|scope| {
        let serving = scope.spawn(|| driver.notify(1));
        wait_for(|| inside.1.load(Ordering::SeqCst) == 1);
        let resetting = scope.spawn(|| driver.set_status(0));
        thread::sleep(Duration::from_millis(20));
        *lock(&inside.0) = true;
        resetting.join().unwrap();
        serving.join().unwrap();
    });
    driver.wait_until_reset();
    *lock(&counter.hook) = None;
    let mut queue = start(&driver, 0);
    assert_eq!(driver.status() & 64, 0);
    offer(&driver, &mut queue, 0, b"again");
    driver.notify(1);
    assert_eq!(queue.take_used(&driver.memory()), Some((0, 5)));
}
