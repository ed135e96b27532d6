//! The device, and the whole way of a request: from a descriptor chain to a host file and back.

mod costs;
mod dax;
mod device;
mod direct;
mod dispatch;
mod frames;
mod hung;
mod identity;
mod locks;
mod names;
mod nodes;
mod operations;
mod queue;
mod session;
mod window;
