//! The guest kernel: where it is, what kind of file it is, and how it gets into guest memory.

mod find;
mod image;
mod unpack;

pub use self::find::{Assets, Kernel, find};
pub use self::image::BootImage;
