//! The entropy device (5.4): one queue, into whose buffers go random bytes of the host's kernel. It has no
//! features and no configuration.

pub mod device;
mod worker;

#[cfg(test)]
mod tests;

pub use device::RngDevice;
