//! The first program of an Oriel guest: mounts what the host shares, runs one command, reports its status and
//! waits for the host to end the machine. What it is to do and how it talks to the host is [`oriel_init::protocol`].
//! In a guest with another first program, `oriel-init agent` runs further commands only.

mod agent;
mod children;
mod command;
mod link;
mod modules;
mod mounts;
mod process;
mod service;
mod surroundings;
mod sys;
mod terminal;
mod users;

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use oriel_init::initramfs::BUSYBOX_PATH;
use oriel_init::protocol::{
    CONFIG_PATH, CONTROL_PORT, Config, FromGuest, LOAD_ORDER_PATH, LOADER_DIR, STDERR_PORT,
    STDIN_PORT, STDOUT_PORT,
};

use crate::agent::Agent;
use crate::children::Children;
use crate::command::Refusal;
use crate::link::Port;
use crate::process::{Control, Ports};
use crate::surroundings::Files;

/// How long the hosts of further commands may take to hear of the end of those.
const LAST_WORDS: Duration = Duration::from_millis(500);

fn main() -> ExitCode {
    if !rustix::process::getpid().is_init() {
        return beside_another_init();
    }
    if Path::new(LOAD_ORDER_PATH).exists() {
        let error = make_way();
        eprintln!("oriel-init: {error:#}");
        power_off();
    }
    // Without /dev there is nobody to tell but the kernel's console.
    if let Err(error) = mounts::first() {
        eprintln!("oriel-init: {error:#}");
        power_off();
    }
    match Port::open(CONTROL_PORT) {
        Ok(mut messages) => {
            let last = match run(&mut messages) {
                Ok(Ok(status)) => FromGuest::Exited { status },
                Ok(Err(Refusal { status, message })) => FromGuest::Refused { status, message },
                Err(error) => {
                    mounts::sync();
                    FromGuest::Failed { message: one_line(&error) }
                }
            };
            log(&format!("{last:?}"));
            match link::send(&mut messages, &last) {
                // Powering off would reset the console device, with output in it that the host has not read.
                Ok(()) => wait_for_the_end(),
                Err(error) => log(&one_line(&error)),
            }
        }
        Err(error) => log(&one_line(&error)),
    }
    power_off()
}

/// The agent alone, if that is asked for.
fn beside_another_init() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if arguments != ["agent"] {
        eprintln!(
            "oriel-init is the first program of an Oriel guest; `oriel run` starts it. In a guest with another \
             one, `oriel-init agent` runs the commands of `oriel exec`"
        );
        return ExitCode::FAILURE;
    }
    let Err(error) = service::run();
    eprintln!("oriel-init: {}", one_line(&error));
    ExitCode::FAILURE
}

/// Loads modules and becomes the first program of somebody else's initramfs, which finds nothing of this. Returns
/// why it did not.
fn make_way() -> anyhow::Error {
    let prepare = || -> Result<()> {
        let order = fs::read_to_string(LOAD_ORDER_PATH)
            .with_context(|| format!("cannot read {LOAD_ORDER_PATH}"))?;
        modules::load(&order.lines().map(str::to_owned).collect::<Vec<_>>())?;
        fs::remove_dir_all(LOADER_DIR).with_context(|| format!("cannot remove {LOADER_DIR}"))
    };
    match prepare() {
        // With the words of the kernel's command line that are for it.
        Ok(()) => Command::new("/init").args(std::env::args_os().skip(1)).exec().into(),
        Err(error) => error,
    }
}

/// The whole life of the guest, up to the command's status or why there was no command.
fn run(messages: &mut Port) -> Result<Result<u8, Refusal>> {
    let config = fs::read(CONFIG_PATH).with_context(|| format!("cannot read {CONFIG_PATH}"))?;
    let config: Config =
        serde_json::from_slice(&config).with_context(|| format!("cannot decode {CONFIG_PATH}"))?;
    modules::load(&config.modules)?;
    let files = config.container.as_ref().map(Files::open).transpose()?;
    match &config.root {
        Some(root) => mounts::enter_root(root)?,
        None => install_busybox(),
    }
    let streams = Ports {
        stdin: config.process.stdin.then(|| Port::open(STDIN_PORT)).transpose()?,
        stdout: Port::open(STDOUT_PORT)?,
        stderr: Port::open(STDERR_PORT)?,
    };
    match (&config.container, &files) {
        (Some(container), Some(files)) => surroundings::make(container, files)?,
        _ => mounts::further(),
    }
    mounts::shares(&config.shares)?;
    let cwd = &config.process.cwd;
    if let Some(container) = &config.container {
        // As runc has it.
        fs::create_dir_all(cwd)
            .with_context(|| format!("cannot create the working directory {cwd}"))?;
        surroundings::close(container)?;
    }
    rustix::system::sethostname(config.hostname.as_bytes())
        .with_context(|| format!("cannot set the host name to {:?}", config.hostname))?;
    if let Err(error) = sys::loopback_up() {
        log(&format!("cannot set the loopback interface up: {error}"));
    }
    let ids = users::of(&config.process)?;
    // Now, and not in the child: a failure there could not be told from the command's own.
    std::env::set_current_dir(cwd)
        .with_context(|| format!("cannot enter the working directory {cwd}"))?;
    let children = Children::start().context("cannot start a thread")?;
    let control = Arc::new(Control::new(Arc::clone(&children)));
    let (port, listener) = (messages.try_clone()?, Arc::clone(&control));
    thread::Builder::new()
        .name("messages".into())
        .spawn(move || link::receive(port, |message| listener.take(message)))
        .context("cannot start a thread")?;
    let agent = Agent::new(config.process.clone(), children);
    if config.agent
        && let Err(error) = agent.listen()
    {
        // The first command does not need it.
        log(&format!("there will be no further commands: vsock: {error}"));
    }
    let started = || link::send(messages, &FromGuest::Started);
    let status = process::run(&config.process, &ids, &control, streams, started)?;
    agent.finish(LAST_WORDS);
    std::env::set_current_dir("/").context("cannot leave the working directory")?;
    mounts::leave(config);
    Ok(status)
}

/// The commands of a guest that lives in the initramfs.
fn install_busybox() {
    if !Path::new(BUSYBOX_PATH).exists() {
        return;
    }
    let result = Command::new(BUSYBOX_PATH)
        .args(["--install", "-s"])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status();
    match result {
        Ok(status) if status.success() => {}
        Ok(status) => log(&format!("busybox --install: {status}")),
        Err(error) => log(&format!("cannot run busybox: {error}")),
    }
}

/// An error and its causes as the one line that the host prints.
fn one_line(error: &anyhow::Error) -> String {
    format!("{error:#}").replace('\n', " ")
}

/// Writes a line to the kernel's log, where it shows up on COM1 among the kernel's own.
fn log(line: &str) {
    // Once: a container hides it. There is nowhere to complain when this fails.
    static KERNEL: OnceLock<Option<File>> = OnceLock::new();
    let kernel = KERNEL.get_or_init(|| OpenOptions::new().write(true).open("/dev/kmsg").ok());
    if let Some(mut kernel) = kernel.as_ref() {
        // Level 6, informational.
        let _ = kernel.write_all(format!("<6>oriel-init: {line}\n").as_bytes());
    }
}

fn power_off() -> ! {
    rustix::fs::sync();
    if let Err(error) = rustix::system::reboot(rustix::system::RebootCommand::PowerOff) {
        log(&format!("cannot power off: {error}"));
    }
    wait_for_the_end()
}

/// The kernel panics when its first program ends, and the host has all it needs.
fn wait_for_the_end() -> ! {
    loop {
        thread::sleep(Duration::from_secs(3600));
    }
}
