//! The end of a process that made a system call which its filter does not know.
#![expect(unsafe_code, reason = "the handler of a signal reads what the kernel tells of it")]

use anyhow::{Context, Result};
use vmm_sys_util::signal::register_signal_handler;

use super::calls;
use crate::cli::STATUS_SANDBOX;

/// From now on such a call ends the process with a line that names it. A thread that does not let the signal through is
/// killed by the kernel, and no filter lets one have another handler.
///
/// # Errors
///
/// The host's.
pub fn catch() -> Result<()> {
    register_signal_handler(libc::SIGSYS, refused).context("SIGSYS")
}

/// The beginning of `siginfo_t` for SIGSYS (`asm-generic/siginfo.h`).
#[repr(C)]
struct Refusal {
    signal: libc::c_int,
    errno: libc::c_int,
    code: libc::c_int,
    address: *const libc::c_void,
    call: libc::c_int,
}

/// The process may have been taken over: nothing of the program is run any more, its ends of scopes included.
extern "C" fn refused(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a pointer to a `siginfo_t`, whose beginning has this form for SIGSYS.
    let call = unsafe { (*info.cast::<Refusal>()).call };
    let mut thread = [0u8; 16];
    // SAFETY: the kernel writes at most 16 bytes, with a NUL at the end.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let mut digits = [b' '; 10];
    let name = calls::name(call);
    let words: [&[u8]; 7] = [
        // The terminal may be raw, where a line does not begin at its left.
        b"\r\noriel: the sandbox was ended: its thread ",
        thread.split(|byte| *byte == 0).next().unwrap_or_default(),
        b" made a system call that it has no use for: ",
        decimal(call, &mut digits),
        if name.is_empty() { b"" } else { b", " },
        name.as_bytes(),
        b" (a mistake of oriel's, or the guest has taken it over; `stty sane` mends the terminal)\r\n",
    ];
    let mut line = [0u8; 256];
    let mut len = 0;
    for (to, from) in line.iter_mut().zip(words.into_iter().flatten()) {
        *to = *from;
        len += 1;
    }
    let mut room = libc::pollfd { fd: libc::STDERR_FILENO, events: libc::POLLOUT, revents: 0 };
    // A pipe that nobody reads, or a terminal that was told to stop, is not waited for: the process is to end.
    // SAFETY: one entry is given and there is one.
    if unsafe { libc::poll(&mut room, 1, 0) } == 1 {
        // SAFETY: no more bytes are read than there are. What cannot be written is lost.
        unsafe { libc::write(libc::STDERR_FILENO, line.as_ptr().cast(), len) };
    }
    // SAFETY: ends the process, and returns to nobody.
    unsafe { libc::_exit(STATUS_SANDBOX.into()) }
}

/// Allocates nothing.
fn decimal(number: libc::c_int, digits: &mut [u8; 10]) -> &[u8] {
    let mut rest = number.unsigned_abs();
    let mut first = digits.len();
    for (at, digit) in digits.iter_mut().enumerate().rev() {
        *digit = b'0' + (rest % 10) as u8;
        (first, rest) = (at, rest / 10);
        if rest == 0 {
            break;
        }
    }
    digits.get(first..).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::decimal;

    #[test]
    fn numbers_are_written_in_decimal() {
        for (number, text) in [(0, "0"), (7, "7"), (101, "101"), (i32::MAX, "2147483647")] {
            assert_eq!(decimal(number, &mut [0; 10]), text.as_bytes());
        }
    }
}
