//! What a test costs the calling thread: memory that it asks for, and system calls.
#![expect(unsafe_code, reason = "an allocator that counts, and a handler for system calls")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::{Cell, UnsafeCell};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
    static CALLS: Calls = const { Calls::new() };
}

struct Counting;

fn count_allocation() {
    // Nothing when the thread is at its end.
    let _ = ALLOCATIONS.try_with(|count| count.set(count.get() + 1));
}

// SAFETY: every call goes to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_allocation();
        // SAFETY: the caller's promises are those that are wanted.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count_allocation();
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// How often the calling thread asks for memory in `work`.
pub(crate) fn allocations(work: impl FnOnce()) -> u64 {
    let before = ALLOCATIONS.get();
    work();
    ALLOCATIONS.get() - before
}

/// The most calls that are remembered.
const MOST: usize = 64;
/// `SYSCALL_DISPATCH_FILTER_ALLOW` and `_BLOCK` of linux/prctl.h.
const ALLOW: u8 = 0;
const BLOCK: u8 = 1;

/// What the handler and the thread that it interrupts share.
struct Calls {
    selector: UnsafeCell<u8>,
    seen: UnsafeCell<([i64; MOST], usize)>,
}

impl Calls {
    const fn new() -> Self {
        Self { selector: UnsafeCell::new(ALLOW), seen: UnsafeCell::new(([0; MOST], 0)) }
    }
}

/// A system call of the thread: notes its number, and makes it in the thread's place.
extern "C" fn called(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    CALLS.with(|calls| {
        // SAFETY: the kernel gives a handler with SA_SIGINFO a context; nobody else has a reference to it. The cells are
        // this thread's, which is in here. The call is the one that the thread was about to make, with its arguments.
        unsafe {
            *calls.selector.get() = ALLOW;
            let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
            let at = |register: libc::c_int| registers[register as usize];
            let number = at(libc::REG_RAX);
            let result: i64;
            std::arch::asm!(
                "syscall",
                inlateout("rax") number => result,
                in("rdi") at(libc::REG_RDI),
                in("rsi") at(libc::REG_RSI),
                in("rdx") at(libc::REG_RDX),
                in("r10") at(libc::REG_R10),
                in("r8") at(libc::REG_R8),
                in("r9") at(libc::REG_R9),
                lateout("rcx") _,
                lateout("r11") _,
            );
            registers[libc::REG_RAX as usize] = result;
            let (numbers, count) = &mut *calls.seen.get();
            if let Some(slot) = numbers.get_mut(*count) {
                *slot = number;
                *count += 1;
            }
            *calls.selector.get() = BLOCK;
        }
    });
}

/// What the kernel keeps of a signal's handler.
#[repr(C)]
#[derive(Default)]
struct KernelAction {
    handler: usize,
    flags: u64,
    /// What the handler returns to: code that makes the one system call that must not be caught.
    restorer: usize,
    mask: u64,
}

/// The numbers of the system calls that the calling thread makes in `work`, at most 64. `None` where the host cannot
/// tell (before Linux 5.11).
pub(crate) fn system_calls(work: impl FnOnce()) -> Option<Vec<i64>> {
    /// `PR_SET_SYSCALL_USER_DISPATCH` and `PR_SYS_DISPATCH_OFF`, `_ON` of linux/prctl.h.
    const DISPATCH: libc::c_int = 59;
    const OFF: libc::c_ulong = 0;
    const ON: libc::c_ulong = 1;
    /// Bytes of the code at `restorer`.
    const RESTORER: libc::c_ulong = 16;
    CALLS.with(|calls| {
        // SAFETY: the handler is as sigaction(2) wants it and stays for good; the selector is the thread's own and lives
        // longer than the dispatch, which is ended here even if `work` panics.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = called as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            assert_eq!(libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()), 0);
            let mut kept = KernelAction::default();
            let none = std::ptr::null::<KernelAction>();
            let read = libc::syscall(
                libc::SYS_rt_sigaction,
                libc::SIGSYS,
                none,
                &raw mut kept,
                size_of::<u64>(),
            );
            assert_eq!(read, 0);
            *calls.seen.get() = ([0; MOST], 0);
            let selector = calls.selector.get();
            if libc::prctl(DISPATCH, ON, kept.restorer, RESTORER, selector) != 0 {
                return None;
            }
            *selector = BLOCK;
            let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(work));
            *selector = ALLOW;
            assert_eq!(libc::prctl(DISPATCH, OFF, 0, 0, 0), 0);
            if let Err(panic) = result {
                std::panic::resume_unwind(panic);
            }
            let (numbers, count) = &*calls.seen.get();
            Some(numbers[..*count].to_vec())
        }
    })
}

#[test]
fn what_a_thread_costs_is_counted() {
    assert_eq!(allocations(|| ()), 0);
    assert_eq!(allocations(|| drop(std::hint::black_box(Box::new(1)))), 1);
    if let Some(calls) = system_calls(|| ()) {
        assert_eq!(calls, []);
        let calls = system_calls(|| {
            let _ = rustix::process::getppid();
            assert_eq!(std::fs::read_link("/proc/self/fd/-1").unwrap_err().raw_os_error(), Some(2));
        });
        assert_eq!(calls.unwrap(), [libc::SYS_getppid, libc::SYS_readlink]);
    }
}
