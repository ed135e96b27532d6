//! What passes between the host and `oriel-init`.
//!
//! The host puts a [`Config`] as JSON into the initramfs at [`CONFIG_PATH`]. Once the guest runs, the
//! ports of a virtio-console device carry the rest, each found by its name:
//!
//! | port | to the guest | to the host |
//! |---|---|---|
//! | [`STDIN_PORT`] | standard input, or the keyboard | – |
//! | [`STDOUT_PORT`] | – | standard output; everything, with a terminal |
//! | [`STDERR_PORT`] | – | standard error |
//! | [`CONTROL_PORT`] | [`FromHost`], one JSON object a line | [`FromGuest`], the same |
//!
//! Standard input has a port of its own because its end is the port's: Linux neither reads from nor writes to
//! a port that the host has closed. The host may send at any time: nothing is lost before the guest listens.
//! With a terminal, the host sends the size at the start: `oriel-init` waits a moment for it.
//!
//! The guest ends with [`FromGuest::Exited`], [`FromGuest::Refused`] or [`FromGuest::Failed`] and then waits: it has
//! put all output into its queues, but does not know when the host has read them. The host reads them and ends the
//! machine.
//!
//! Further commands come over vsock, when [`Config::agent`] says so: `oriel-init` listens on [`AGENT_PORT`], and
//! each stream is one command. What passes there is cut into [`frames`](crate::frames). The host begins with an
//! [`Exec`]; then come [`FromHost`] and standard input as they arise, and back come output and [`FromAgent`]. The
//! last is [`FromAgent::Exited`], behind all output, or [`FromAgent::Refused`]. The host sends no more standard
//! input than [`STDIN_WINDOW`] and what [`FromAgent::Room`] adds to it, so that a command that does not read keeps
//! no signal from being read.

use serde::{Deserialize, Serialize};

use crate::container::{Confinement, Container};

/// The port of the command's standard input.
pub const STDIN_PORT: &str = "org.oriel.stdin";
/// The port of its standard output.
pub const STDOUT_PORT: &str = "org.oriel.stdout";
/// The port of its standard error.
pub const STDERR_PORT: &str = "org.oriel.stderr";
/// The port of the messages.
pub const CONTROL_PORT: &str = "org.oriel.control";

/// Where the host puts the [`Config`] in the initramfs.
pub const CONFIG_PATH: &str = "/oriel/config.json";

/// Where the initramfs holds kernel modules, which are loaded in the order of [`Config::modules`].
pub const MODULES_DIR: &str = "/oriel/modules";

/// What is Oriel's in an initramfs.
pub const LOADER_DIR: &str = "/oriel";

/// Where `oriel-init` lies in an archive that is put before a foreign initramfs: the first program, which loads what
/// [`LOAD_ORDER_PATH`] lists and then makes way for `/init`.
pub const LOADER_PATH: &str = "/oriel/init";

/// Names of files below [`MODULES_DIR`], a line each.
pub const LOAD_ORDER_PATH: &str = "/oriel/load-order";

/// The port of the guest where `oriel-init` listens for further commands. Below 1024, so that only root can take
/// it; rexecd(8) has this number in TCP.
pub const AGENT_PORT: u32 = 512;

/// Bytes of standard input that may be on the way to a further command, or wait for it. Two of the largest
/// frames and more would keep a pipe busy; four are room for a scheduler's pause.
pub const STDIN_WINDOW: usize = 256 << 10;

/// Most further commands at once, those included whose host is gone. Each costs `oriel-init` a thread and less
/// than a megabyte.
pub const MOST_EXECS: usize = 64;

/// Linux's signals are 1 to this.
pub const LAST_SIGNAL: i32 = 64;

/// Everything `oriel-init` has to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// File names below [`MODULES_DIR`], in the order in which to load them. One that is loaded or built in
    /// already is no error.
    pub modules: Vec<String>,
    /// The root file system; without one the initramfs itself is it.
    pub root: Option<Root>,
    /// Further shares, mounted in this order below the root, mount points created where missing.
    pub shares: Vec<Share>,
    /// The guest's host name.
    pub hostname: String,
    /// What is mounted and set in the root of an OCI bundle, instead of what every command finds.
    pub container: Option<Container>,
    /// The command to run.
    pub process: Process,
    /// Listen on [`AGENT_PORT`].
    pub agent: bool,
}

/// The root file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Root {
    /// The share that holds it. `path` is ignored.
    pub share: Share,
    /// Lay a tmpfs over it, so that writes stay in the guest and end with it (overlayfs).
    pub overlay: bool,
}

/// One virtio-fs device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// The device's tag.
    pub tag: String,
    /// Where it is mounted: an absolute path.
    pub path: String,
    /// Mounted read-only. (The host enforces it in any case.)
    pub read_only: bool,
    /// How the guest uses the DAX window.
    pub dax: Dax,
}

/// The `dax` mount option of virtio-fs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dax {
    /// `dax=never`: no window, or the window is not used.
    Never,
    /// `dax=inode`: files that the host marks.
    Inode,
    /// `dax=always`: every regular file; the mount fails without a window.
    Always,
}

/// The command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Program and arguments; the program is looked up in `PATH` when it holds no slash.
    pub args: Vec<String>,
    /// The environment, as `NAME=VALUE`. `HOME` is added from the root's `/etc/passwd` where it is not named.
    pub env: Vec<String>,
    /// Working directory, an absolute path inside the root.
    pub cwd: String,
    /// `USER[:GROUP]`, each a name from the root's `/etc/passwd` or `/etc/group`, or a number. `None` is
    /// root.
    pub user: Option<String>,
    /// Give it a terminal as its controlling terminal.
    pub terminal: bool,
    /// Forward standard input. Otherwise it reads end of file at once.
    pub stdin: bool,
    /// What it may do.
    pub confinement: Confinement,
}

/// A further command, as the host asks for it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Exec {
    /// Program and arguments.
    pub args: Vec<String>,
    /// What is in its environment beside what the first command has, and instead of it.
    pub env: Vec<String>,
    /// Working directory, an absolute path; the first command's without one.
    pub cwd: Option<String>,
    /// As [`Process::user`]; the first command's without one.
    pub user: Option<String>,
    /// Give it a terminal as its controlling terminal.
    pub terminal: bool,
    /// Rows and columns of the terminal.
    pub size: Option<(u16, u16)>,
    /// Forward standard input. Otherwise it reads end of file at once.
    pub stdin: bool,
}

/// A message about a further command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromAgent {
    /// The command runs.
    Started,
    /// It has taken so many bytes of standard input.
    Room {
        /// At least 1.
        bytes: u32,
    },
    /// It ended, and what it wrote was sent. Nothing follows.
    Exited {
        /// As in [`FromGuest::Exited`].
        status: u8,
    },
    /// It was not started. Nothing follows.
    Refused {
        /// 126 when it cannot be executed, 127 when it was not found, else 125.
        status: u8,
        /// Why: one line.
        message: String,
    },
}

/// A message from the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromHost {
    /// Send this signal to the command.
    Signal {
        /// Linux signal number.
        number: i32,
    },
    /// The terminal has this size.
    Resize {
        /// Height in characters.
        rows: u16,
        /// Width in characters.
        columns: u16,
    },
}

/// A message from the guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromGuest {
    /// The command runs: everything is mounted, and its program was executed.
    Started,
    /// The command ended, and all it wrote has been sent. The guest waits for its end.
    Exited {
        /// What `oriel run` exits with: the command's status, 128 + n when signal n killed it.
        status: u8,
    },
    /// The command was not started. The guest waits for its end.
    Refused {
        /// As in [`FromAgent::Refused`].
        status: u8,
        /// Why: one line.
        message: String,
    },
    /// The sandbox could not be set up. The guest waits for its end.
    Failed {
        /// One line: what could not be done, with the name and the errno.
        message: String,
    },
}
