//! The signal that gets a thread of this crate out of a system call in which it waits.
//!
//! Its handler does nothing: that the signal arrives is what ends the call (there is no `SA_RESTART`), where the
//! host's kernel lets it be ended.

use std::io;
use std::sync::OnceLock;

use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler};

/// The number of the signal. The one before it kicks vCPUs.
pub(crate) fn signal() -> libc::c_int {
    SIGRTMIN() + 1
}

/// Gives the signal its handler, once in the process. Without one it would kill.
///
/// # Errors
///
/// The host's.
pub(crate) fn prepare() -> io::Result<()> {
    extern "C" fn kicked(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    static PREPARED: OnceLock<std::result::Result<(), i32>> = OnceLock::new();
    let prepare = || register_signal_handler(signal(), kicked).map_err(|error| error.errno());
    PREPARED.get_or_init(prepare).map_err(io::Error::from_raw_os_error)
}
