//! The console device (5.3): named ports, each a stream of bytes into the guest and one out of it.
//!
//! The device is no console in the sense of a terminal: with VIRTIO_CONSOLE_F_MULTIPORT it has ports, which
//! Linux shows as `/dev/vport<device>p<port>` with their names in `/sys/class/virtio-ports`. No port is ever
//! declared to be a console (VIRTIO_CONSOLE_CONSOLE_PORT). A driver without the feature can use nothing but
//! the output of port 0.
//!
//! - Output: a thread for each port that has an output ([`output`]). A writer that blocks holds back that
//!   port only.
//! - Input and the control messages (5.3.6.2): one thread for the device ([`worker`]), because neither waits
//!   for anybody but the guest.

pub mod config;
mod control;
pub mod device;
pub mod input;
mod output;
mod worker;

#[cfg(test)]
mod tests;

pub use config::ConfigError;
pub use device::{ConsoleDevice, Port};
pub use input::PortInput;
