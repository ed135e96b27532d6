//! A sandbox as Kata makes one: mounts that appear below a share, and an agent that nobody here wrote as the first
//! program. That agent cannot be had where these tests run: ours does what it does, as far as a sandbox notices.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use integration::kata::{Fields, Message, OK, PORT, REQUEST, RESPONSE, UNIMPLEMENTED};
use integration::kata::{receive, send};
use integration::{Oriel, Running, Tree, busybox, copy_executable, text};
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount_bind, mount_change, mount_remount,
    unmount,
};

use super::kernels::archive;
use super::live_shares::Mounted;
use crate::PROBE;

/// Where the guest mounts the share.
const CONTAINERS: &str = "/run/kata-containers/shared/containers";

/// A boot where KVM is emulated and the machine has other work.
const BOOT: Duration = Duration::from_secs(120);

/// A staging directory, and a read-only view of it that is served: mounts made in the first appear in the second.
struct Host {
    base: Mounted,
    _tree: Tree,
}

impl Host {
    fn new() -> Self {
        let tree = Tree::new();
        let base = Mounted::new(tree.path("sandbox"));
        mount_change(&base.0, MountPropagationFlags::PRIVATE).unwrap();
        let host = Self { base, _tree: tree };
        for name in ["mounts", "shared", "private", "volume"] {
            fs::create_dir(host.path(name)).unwrap();
        }
        let (staging, served) = (host.path("mounts"), host.path("shared"));
        mount_bind(&staging, &staging).unwrap();
        mount_change(&staging, MountPropagationFlags::SHARED).unwrap();
        mount_bind(&staging, &served).unwrap();
        mount_change(&served, MountPropagationFlags::DOWNSTREAM).unwrap();
        mount_remount(&served, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
        host
    }

    fn path(&self, name: &str) -> PathBuf {
        self.base.0.join(name)
    }

    /// The option that shows it.
    fn share(&self, options: &str) -> String {
        format!("{}:{CONTAINERS}:tag=kataShared,{options}", self.path("shared").display())
    }

    /// Shows `volume` read-only at a place of the staging directory: by way of a mount that is, for one does not
    /// become it where it has been propagated to.
    fn show_volume(&self, name: &str) {
        let private = self.path("private");
        mount_bind(self.path("volume"), &private).unwrap();
        mount_remount(&private, MountFlags::BIND | MountFlags::RDONLY, c"").unwrap();
        let place = self.path("mounts").join(name);
        fs::create_dir_all(&place).unwrap();
        mount_bind(&private, &place).unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for name in ["private", "shared", "mounts"] {
            let _ = unmount(self.path(name), UnmountFlags::DETACH);
        }
    }
}

#[test]
fn what_a_host_mounts_into_a_share_as_kata_does_is_there_with_its_own_access() {
    let host = Host::new();
    fs::write(host.path("volume/file"), "volume\n").unwrap();
    let share = host.share("dax=always,window=8M");
    let mut guest = Oriel::run(&["-i", "-v", &share]).guest(&["sh"]).start();
    guest.say(&format!("cd {CONTAINERS}"));
    assert_eq!(guest.ask("grep -c '^kataShared /run/kata' /proc/mounts"), "1");
    assert_eq!(guest.ask("grep '^kataShared' /proc/mounts | grep -o dax=always"), "dax=always");
    let refused = |guest: &mut Running, path: &str| {
        guest.ask(&format!("touch {path} 2>&1 | grep -o 'Read-only.*' || echo it works"))
    };
    assert_eq!(refused(&mut guest, "new"), "Read-only file system");

    // A container's root file system, and a volume that is read-only: both appear while the guest runs.
    let rootfs = Mounted::new(host.path("mounts/c1/rootfs"));
    fs::write(rootfs.0.join("file"), "rootfs\n").unwrap();
    host.show_volume("c1-volume");
    assert_eq!(guest.ask("sleep 1.2; cat c1/rootfs/file"), "rootfs");
    assert_eq!(guest.ask("echo guest >c1/rootfs/made; cat c1/rootfs/made"), "guest");
    assert_eq!(fs::read(rootfs.0.join("made")).unwrap(), b"guest\n");
    assert_eq!(guest.ask("cat c1-volume/file"), "volume");
    assert_eq!(refused(&mut guest, "c1-volume/new"), "Read-only file system");
    assert_eq!(refused(&mut guest, "c1-volume/file"), "Read-only file system");
    assert_eq!(refused(&mut guest, "c1/new"), "Read-only file system");

    // The container ends. Files of it are still mapped (dax=always), so the host unmounts it as Kata does.
    unmount(&rootfs.0, UnmountFlags::DETACH).unwrap();
    assert_eq!(guest.ask("sleep 1.2; ls c1/rootfs | wc -l"), "0");
    guest.finish().exits_with(0);
    let _ = unmount(host.path("mounts/c1-volume"), UnmountFlags::DETACH);
}

/// A Kata runtime's end of a stream to the agent.
struct Runtime {
    stream: UnixStream,
    last: u32,
}

impl Runtime {
    /// Tries as fast as it is refused, as runtimes do.
    fn connect(socket: &Path) -> Self {
        let start = Instant::now();
        loop {
            assert!(start.elapsed() < BOOT, "the agent listens after a while");
            if let Some(stream) = Self::try_connect(socket) {
                println!("from start to agent: {:.1?}", start.elapsed());
                return Self { stream, last: 1 };
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn try_connect(socket: &Path) -> Option<UnixStream> {
        let mut stream = UnixStream::connect(socket).ok()?;
        stream.set_read_timeout(Some(BOOT)).unwrap();
        // In the letters of Dragonball's.
        stream.write_all(format!("connect {PORT}\n").as_bytes()).ok()?;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            if stream.read(&mut byte).ok()? == 0 {
                return None;
            }
            line.extend(byte);
        }
        assert!(line.starts_with(b"OK"), "{line:?}");
        Some(stream)
    }

    /// Sends a request; its answer has this number.
    fn ask(&mut self, service: &str, method: &str, payload: &Message) -> u32 {
        // A client's are odd.
        self.last += 2;
        let request = Message::default().bytes(1, service).bytes(2, method).bytes(3, payload);
        send(&mut self.stream, self.last, REQUEST, &request).unwrap();
        self.last
    }

    /// Sends a request and waits for its answer: a status, why, and the message.
    fn try_call(&mut self, method: &str, payload: &Message) -> (u64, String, Fields) {
        let service = if method == "Check" { "grpc.Health" } else { "grpc.AgentService" };
        let number = self.ask(service, method, payload);
        let (id, kind, response) = receive(&mut self.stream).unwrap();
        assert_eq!((id, kind), (number, RESPONSE));
        let status = response.message(1).unwrap();
        (status.number(1), status.text(2), response.message(2).unwrap())
    }

    fn call(&mut self, method: &str, payload: &Message) -> Fields {
        let (status, why, answer) = self.try_call(method, payload);
        assert_eq!(status, OK, "{method}: {why}");
        answer
    }

    /// Runs a script in a container to its end: its output and status.
    fn run(&mut self, id: &str, root: &str, storages: &[Message], script: &str) -> (String, u64) {
        let process = ["sh", "-c", script];
        let process = process.iter().fold(Message::default(), |all, word| all.bytes(4, word));
        let root = Message::default().bytes(1, root);
        let spec = Message::default().bytes(2, process).bytes(3, root);
        let named = Message::default().bytes(1, id).bytes(2, id);
        let create = storages.iter().fold(named.clone(), |all, storage| all.bytes(5, storage));
        self.call("CreateContainer", &create.bytes(6, spec));
        self.call("StartContainer", &named);
        let output = self.call("ReadStdout", &named.clone().number(3, 1 << 20)).text(1);
        let status = self.call("WaitProcess", &named).number(1);
        self.call("RemoveContainer", &named);
        (output, status)
    }
}

/// What is to be mounted: driver, source, kind, options, place.
fn storage(driver: &str, source: &str, kind: &str, options: &[&str], place: &str) -> Message {
    let storage = Message::default().bytes(1, driver).bytes(3, source).bytes(4, kind);
    let storage = options.iter().fold(storage, |all, option| all.bytes(5, option));
    storage.bytes(6, place)
}

/// A userland for a container.
fn fill(directory: &Path) {
    fs::create_dir_all(directory.join("bin")).unwrap();
    copy_executable(&busybox(), &directory.join("bin/busybox"));
    for name in ["sh", "cat", "touch"] {
        std::os::unix::fs::symlink("busybox", directory.join("bin").join(name)).unwrap();
    }
}

#[test]
fn a_foreign_agent_is_the_first_program_and_runs_containers_of_the_share() {
    let host = Host::new();
    let tree = Tree::new();
    let (initrd, socket) = (tree.path("initrd"), tree.path("kata.hvsock"));
    archive(&initrd, &[("init", 0o100755, &fs::read(PROBE).unwrap()), ("etc", 0o040755, b"")]);
    // As Kata's are.
    assert!(Command::new("gzip").args(["-1", text(&initrd)]).status().unwrap().success());
    let oriel = Oriel::run(&["--initrd", text(&tree.path("initrd.gz")), "--initrd-modules"])
        .args(&["--vsock", text(&socket), "-v", &host.share("window=8M")])
        .args(&["--cmdline", "reboot=k panic=1 agent.log=debug agent.log_vport=1025"])
        .default_console()
        .timeout(2 * BOOT)
        .start();
    let begin = Instant::now();
    while !socket.exists() {
        assert!(begin.elapsed() < BOOT, "the socket is there before the guest is");
        thread::sleep(Duration::from_millis(10));
    }
    let mut runtime = Runtime::connect(&socket);
    assert_eq!(runtime.call("Check", &Message::default()).number(1), 1, "SERVING");
    assert_eq!(runtime.try_call("Dream", &Message::default()).0, UNIMPLEMENTED);
    // Asked on the same stream, and not answered as long as nothing of the kind happens.
    runtime.ask("grpc.AgentService", "GetOOMEvent", &Message::default());
    let shared = storage(
        "virtio-fs",
        "kataShared",
        "virtiofs",
        &["dax", "nodev"],
        &format!("{CONTAINERS}/"),
    );
    let memory = ["noexec", "nosuid", "nodev", "mode=1777", "size=65536k"];
    let memory = storage("ephemeral", "shm", "tmpfs", &memory, "/run/kata-containers/sandbox/shm");
    runtime.call("CreateSandbox", &Message::default().bytes(3, shared).bytes(3, memory));

    // A container whose files the host mounts now.
    let rootfs = Mounted::new(host.path("mounts/c1/rootfs"));
    fill(&rootfs.0);
    fs::write(rootfs.0.join("file"), "of the host\n").unwrap();
    let root = format!("{CONTAINERS}/c1/rootfs");
    let (output, status) = runtime.run("c1", &root, &[], "cat /file; echo guest >/made; exit 3");
    assert_eq!((output.as_str(), status), ("of the host\n", 3));
    assert_eq!(fs::read(rootfs.0.join("made")).unwrap(), b"guest\n");

    // One whose files may be read only.
    fill(&host.path("volume"));
    host.show_volume("c2/rootfs");
    let root = format!("{CONTAINERS}/c2/rootfs");
    let (_, status) = runtime.run("c2", &root, &[], "touch /new || exit 7");
    assert_eq!(status, 7, "the host refuses it");
    assert!(!host.path("volume/new").exists());

    // One of layers that are laid over each other in the guest.
    let layers = Mounted::new(host.path("mounts/c3/layers"));
    fill(&layers.0.join("lower"));
    fs::create_dir(layers.0.join("upper")).unwrap();
    fs::write(layers.0.join("upper/file"), "of the upper layer\n").unwrap();
    let options = format!("lowerdir={CONTAINERS}/c3/layers/upper:{CONTAINERS}/c3/layers/lower");
    let place = "/run/kata-containers/c3/merged";
    let overlay = storage("overlayfs", "overlay", "overlay", &[&options], place);
    let (output, status) = runtime.run("c3", place, &[overlay], "cat /file");
    assert_eq!((output.as_str(), status), ("of the upper layer\n", 0));

    runtime.call("DestroySandbox", &Message::default());
    let outcome = oriel.finish();
    outcome.exits_with(0).says_no_error();
    let words = "agent.log=debug agent.log_vport=1025";
    // What the kernel itself puts there, and what was in the archive.
    for line in ["begins with dev etc init root\r\n", words, "listening"] {
        outcome.check(outcome.text().contains(line), &format!("its console has {line:?}"));
    }
}
