//! The socket device (5.10): streams between programs of the guest and programs of the host.
//!
//! In the guest they are sockets of the family AF_VSOCK; on the host they are Unix sockets, found as [`host`]
//! says. One thread ([`worker`]) does all of it and waits for nobody: a program that does not read holds back
//! its own stream ([`stream`]) alone, and streams take turns ([`streams`]). All that waits is bounded.
//!
//! `virtio-vsock` of rust-vmm is not used: it hands out a packet's data as slices of guest memory, which a data
//! buffer in a DAX window must not be touched through (see [`crate::memory`]).

pub mod config;
pub mod device;
mod host;
mod packet;
mod poll;
mod stream;
mod streams;
mod worker;

#[cfg(test)]
mod tests;

pub use config::{Config, ConfigError};
pub use device::VsockDevice;
