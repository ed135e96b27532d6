//! Oriel: a small virtual machine monitor whose sandboxes' files are the host's own.
//!
//! From the top down: [`cli`] reads the command line, [`sandbox`] turns it into a machine and follows it to
//! its end, [`kernel`] finds and loads what boots, [`machine`] is the machine itself. [`host`] knows what
//! this host can do, [`socket`] makes sockets, and [`control`] talks to sandboxes that run. What the guest
//! touches is in the `devices` crate.

mod cli;
mod control;
mod host;
mod kernel;
mod machine;
mod sandbox;
mod socket;

fn main() -> std::process::ExitCode {
    cli::main()
}
