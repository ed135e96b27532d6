//! What the host and `oriel-init` tell each other, and the initramfs that carries `oriel-init`.

pub mod container;
pub mod frames;
pub mod initramfs;
pub mod protocol;
pub mod vsock;
pub mod watch;
