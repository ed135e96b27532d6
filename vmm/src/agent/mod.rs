//! The host's end of `oriel-init`'s agent: further commands in a sandbox that runs, and what changes on the host.
//!
//! What is said is [`oriel_init::protocol`]. The guest is not trusted: its frames are bounded and checked, and
//! all that it can do by them is write to the standard streams and choose the exit status.

mod connect;
mod session;
mod watch;

pub use self::connect::connect;
pub use self::session::{Streams, run, start};
pub use self::watch::keep_told;
