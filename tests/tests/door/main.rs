//! A share on this machine's own /dev/fuse: as root here, or through `tests/with-kvm` in a machine where one is.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by a panic"
)]

mod caching;
mod identity;
mod idmapped;
mod locks;
mod mounts;
mod operations;
mod readme;
mod smoke;
mod tree;

/// The program that does one file operation after another.
const PROBE: &str = env!("CARGO_BIN_EXE_guest-probe");
