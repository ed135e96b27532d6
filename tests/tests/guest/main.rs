//! Real guests, through the public command line. They need a KVM that can run one: `tests/with-kvm`.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by a panic"
)]

mod agent;
mod boot;
mod bundles;
mod caching;
mod clients;
mod commands;
mod dax;
mod dispatch;
mod host_faults;
mod hostile;
mod hung;
mod identity;
mod kata;
mod kernels;
mod kills;
mod live_shares;
mod locks;
mod lost_pages;
mod memory;
mod mistakes;
mod mounts;
mod roots;
mod shares;
mod systemd;
mod vsock;
mod walls;
mod watch;
mod windows;

/// The program that runs in guests.
const PROBE: &str = env!("CARGO_BIN_EXE_guest-probe");
