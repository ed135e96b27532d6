//! What a Kata agent does as the first program of its machine, by our own hands: the mounts it makes, the port it
//! listens on, the requests without which no container runs, and how it ends. It knows nothing of Oriel.

use std::collections::HashMap;
use std::fs;
use std::io::Read;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

use anyhow::{Context, Result, bail};
use integration::kata::{Fields, INTERNAL, Message, OK, PORT, REQUEST, RESPONSE, UNIMPLEMENTED};
use integration::kata::{receive, send};
use oriel_init::vsock::Listener;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind_recursive, unmount};

const RUN: &str = "/run/kata-containers";

/// Source, place, kind, options: what the agent mounts before it reads the kernel's command line.
const FIRST: [(&str, &str, &str, &str); 7] = [
    ("proc", "/proc", "proc", "nosuid,nodev,noexec"),
    ("sysfs", "/sys", "sysfs", "nosuid,nodev,noexec"),
    ("dev", "/dev", "devtmpfs", "nosuid"),
    ("tmpfs", "/dev/shm", "tmpfs", "nosuid,nodev"),
    ("devpts", "/dev/pts", "devpts", "nosuid,noexec"),
    ("tmpfs", "/run", "tmpfs", "nosuid,nodev"),
    ("cgroup2", "/sys/fs/cgroup", "cgroup2", "nosuid,nodev,noexec,relatime,nsdelegate"),
];

/// A container: what it is to run, and what runs.
struct Container {
    rootfs: String,
    arguments: Vec<String>,
    child: Option<Child>,
}

type Containers = Arc<Mutex<HashMap<String, Container>>>;

/// The agent, to the end of its machine.
pub fn run() -> Result<()> {
    let names = fs::read_dir("/")?.flatten().map(|entry| entry.file_name());
    let mut names: Vec<_> = names.filter_map(|name| name.into_string().ok()).collect();
    names.sort();
    println!("agent: begins with {}", names.join(" "));
    for (source, place, kind, options) in FIRST {
        mount_as_agent(source, place, kind, options.split(','))?;
    }
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    println!("agent: {}", cmdline.trim_end());
    // devtmpfs has one, and a terminal of a container is to be of the agent's own devpts.
    fs::remove_file("/dev/ptmx").context("/dev/ptmx")?;
    symlink("/dev/pts/ptmx", "/dev/ptmx")?;
    rustix::process::setsid().context("setsid")?;
    // Terminals of its consoles, which it may have or not.
    fs::metadata("/dev/console").context("/dev/console")?;
    let listener = Listener::bind(PORT, 5).context("vsock")?;
    println!("agent: listening");
    let containers = Containers::default();
    loop {
        let (stream, _) = listener.accept().context("vsock")?;
        let containers = Arc::clone(&containers);
        thread::spawn(move || {
            if let Err(error) = serve(stream, &containers) {
                println!("agent: {error:#}");
            }
        });
    }
}

/// Answers the requests of one runtime, each on a thread of its own: one of them is not answered for hours.
fn serve(mut stream: UnixStream, containers: &Containers) -> Result<()> {
    let answers = Arc::new(Mutex::new(stream.try_clone()?));
    loop {
        let Ok((id, kind, request)) = receive(&mut stream) else { return Ok(()) };
        if kind != REQUEST {
            bail!("a frame of kind {kind}");
        }
        let (answers, containers) = (Arc::clone(&answers), Arc::clone(containers));
        thread::spawn(move || {
            let method = format!("{}/{}", request.text(1), request.text(2));
            let answer = request.message(3).map_err(Into::into);
            let answer = answer.and_then(|payload| answer_to(&method, &payload, &containers));
            let (status, message, payload) = match answer {
                Ok(Some(payload)) => (OK, String::new(), payload),
                Ok(None) => (UNIMPLEMENTED, method.clone(), Message::default()),
                Err(error) => (INTERNAL, format!("{error:#}"), Message::default()),
            };
            let status = Message::default().number(1, status).bytes(2, message);
            let response = Message::default().bytes(1, status).bytes(2, payload);
            let mut stream = answers.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = send(&mut *stream, id, RESPONSE, &response) {
                println!("agent: {method}: {error}");
            }
            if method == "grpc.AgentService/DestroySandbox" {
                rustix::fs::sync();
                let ended = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
                println!("agent: cannot power off: {ended:?}");
            }
        });
    }
}

/// What is answered to a request; `None`: there is no such method.
fn answer_to(method: &str, request: &Fields, containers: &Containers) -> Result<Option<Message>> {
    let empty = Message::default();
    let container = request.text(1);
    let table = || containers.lock().unwrap_or_else(PoisonError::into_inner);
    Ok(Some(match method {
        // SERVING.
        "grpc.Health/Check" => empty.number(1, 1),
        "grpc.AgentService/CreateSandbox" => {
            for storage in request.all(3) {
                mount_storage(&Fields::parse(storage)?)?;
            }
            empty
        }
        // Until there is one.
        "grpc.AgentService/GetOOMEvent" => loop {
            thread::park();
        },
        "grpc.AgentService/CreateContainer" => {
            for storage in request.all(5) {
                mount_storage(&Fields::parse(storage)?)?;
            }
            let spec = request.message(6)?;
            let process = spec.message(2)?;
            let arguments = process.all(4).map(|word| String::from_utf8_lossy(word).into());
            let rootfs = format!("{RUN}/{container}/rootfs");
            fs::create_dir_all(&rootfs)?;
            let source = spec.message(3)?.text(1);
            mount_bind_recursive(&source, &rootfs).with_context(|| source.clone())?;
            let made = Container { rootfs, arguments: arguments.collect(), child: None };
            table().insert(container, made);
            empty
        }
        "grpc.AgentService/StartContainer" => {
            let mut table = table();
            let container = table.get_mut(&container).context("no such container")?;
            // A program of the container's own does the chroot.
            let command = format!("{}/bin/busybox", container.rootfs);
            let mut command = Command::new(command);
            command.args(["chroot", &container.rootfs]).args(&container.arguments);
            command.env_clear().env("PATH", "/bin").stdin(Stdio::null()).stdout(Stdio::piped());
            container.child = Some(command.spawn().context("the container's program")?);
            empty
        }
        "grpc.AgentService/ReadStdout" => {
            let mut pipe = {
                let mut table = table();
                let child =
                    table.get_mut(&container).and_then(|container| container.child.as_mut());
                child.and_then(|child| child.stdout.take()).context("EOF")?
            };
            let mut bytes = Vec::new();
            pipe.read_to_end(&mut bytes)?;
            empty.bytes(1, bytes)
        }
        "grpc.AgentService/WaitProcess" => {
            let mut child = {
                let mut table = table();
                let container = table.get_mut(&container).context("no such container")?;
                container.child.take().context("it does not run")?
            };
            let status = child.wait()?.code().unwrap_or(255);
            empty.number(1, u64::try_from(status)?)
        }
        "grpc.AgentService/RemoveContainer" => {
            let removed = table().remove(&container).context("no such container")?;
            unmount(&removed.rootfs, UnmountFlags::empty()).context("rootfs")?;
            empty
        }
        "grpc.AgentService/DestroySandbox" => empty,
        _ => return Ok(None),
    }))
}

/// Driver, source, kind of file system, options and place; the driver is the agent's own affair.
fn mount_storage(storage: &Fields) -> Result<()> {
    let options: Vec<_> =
        storage.all(5).map(|option| String::from_utf8_lossy(option).into_owned()).collect();
    let (source, kind, place) = (storage.text(3), storage.text(4), storage.text(6));
    mount_as_agent(&source, &place, &kind, options.iter().map(String::as_str))
}

/// Options that are flags of mount(2) are given as such, the rest to the file system.
fn mount_as_agent<'a>(
    source: &str,
    place: &str,
    kind: &str,
    options: impl Iterator<Item = &'a str>,
) -> Result<()> {
    let mut flags = MountFlags::empty();
    let mut rest = Vec::new();
    for option in options {
        match option {
            "nosuid" => flags |= MountFlags::NOSUID,
            "nodev" => flags |= MountFlags::NODEV,
            "noexec" => flags |= MountFlags::NOEXEC,
            "relatime" => flags |= MountFlags::RELATIME,
            "ro" => flags |= MountFlags::RDONLY,
            other => rest.push(other),
        }
    }
    let data = std::ffi::CString::new(rest.join(","))?;
    fs::create_dir_all(place).with_context(|| format!("cannot create {place}"))?;
    mount(source, place, kind, flags, Some(data.as_c_str()))
        .with_context(|| format!("mount {kind} {source} at {place}, options {rest:?}"))
}
