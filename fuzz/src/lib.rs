//! What the fuzzers have in common: how they read their input, and a share for the guest to attack.
//!
//! Each target (`targets/`) takes its input for a script: what a hostile guest does, step by step, to a device
//! that was just made. At the end the device must serve a good request, if need be after a reset. Numbers of the
//! input choose rather than say, so that most scripts get past the first check: known operations, names that are
//! there, node ids and handles out of earlier replies. They can also be anything at all.

pub mod frames;
pub mod input;
pub mod place;
