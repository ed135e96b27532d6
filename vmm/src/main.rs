//! Oriel: a small virtual machine monitor whose sandboxes' files are the host's own.
//!
//! From the top down: [`cli`] reads the command line, [`sandbox`] turns it into a machine and follows it to
//! its end, [`bundle`] reads what other tools have to be run, [`kernel`] finds and loads what boots, [`machine`] is the
//! machine itself. [`host`] knows what this host can do, [`walls`] what a sandbox gives up before it runs, [`socket`] makes
//! sockets, [`stdio`], [`terminal`] and [`signals`] are what the user has in
//! hand, [`logs`] keeps what a sandbox writes, [`control`] talks to sandboxes that run, and [`agent`] to the `oriel-init` inside. What the guest touches
//! is in the `devices` crate.

mod agent;
mod bundle;
mod cli;
mod control;
mod host;
mod kernel;
mod logs;
mod machine;
mod sandbox;
mod signals;
mod socket;
mod stdio;
mod terminal;
mod walls;

fn main() -> std::process::ExitCode {
    cli::main()
}
