//! The guest kernel: where it is, what kind of file it is, and how it gets into guest memory.

mod contents;
mod find;
mod image;
mod unpack;

pub use self::contents::Contents;
pub use self::find::{Assets, Kernel, find};
pub use self::image::BootImage;
