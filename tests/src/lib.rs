//! Runs `oriel` as a user would and looks at what came of it.
//!
//! A boot costs seconds where KVM is emulated, so a test boots once and checks much: its guest prints
//! `name=value` lines, which [`Outcome::guest_says`] checks one by one. Whatever goes wrong is shown with
//! everything that is known of the run: command line, status, standard error and the guest's console.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test fails by a panic"
)]

mod bench;
pub mod door;
mod guest;
pub mod jobs;
pub mod kata;
mod locker;
pub mod model;
mod run;
mod terminal;
mod tree;
pub mod vsock;

pub use bench::{Bench, kvm_counter};
pub use door::Door;
pub use guest::{busybox, system, vmlinux, vmlinuz};
pub use locker::Locker;
pub use run::{Oriel, Outcome, Running, text};
pub use terminal::{Screen, open_terminal};
pub use tree::{Random, Tree, copy_executable, noise, sha256};
