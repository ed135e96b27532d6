//! The systems that are compared, and the command line of each. None is tuned where the others are not: what
//! their documentation recommends for speed is on, and all have the same kernel, initrd, memory and processor.

use std::path::PathBuf;

/// The guest's memory in MiB.
pub const MEMORY: usize = 768;
/// DAX windows, in MiB.
pub const WINDOW: usize = 64;
/// How the shared directory is called where a system wants a name.
const TAG: &str = "share";
/// What every kernel is told, besides what to mount.
const CMDLINE: &str = "console=ttyS0 quiet panic=-1 8250.nr_uarts=1 random.trust_cpu=on";

/// How a system is started.
#[derive(Clone, Copy, Debug)]
enum Kind {
    /// No guest: the directory itself.
    Host,
    /// `oriel run`, with these options of the share.
    Oriel { share: &'static str, dax: &'static str },
    /// QEMU with virtiofsd in a process of its own.
    Virtiofsd { cache: &'static str },
    /// QEMU's own 9p server.
    NineP { cache: &'static str },
    /// A disk image with ext4.
    Disk,
    /// alioth, with DAX or without.
    Alioth { dax: bool },
}

/// One of them.
#[derive(Clone, Copy, Debug)]
pub struct System {
    /// Its name in tables and on the command line.
    pub name: &'static str,
    /// What it is.
    pub about: &'static str,
    kind: Kind,
}

/// All of them.
pub const SYSTEMS: &[System] = &[
    System { name: "host", about: "the directory itself, without a guest", kind: Kind::Host },
    System {
        name: "oriel",
        about: "Oriel as it is by default (dax=inode, cache=auto)",
        kind: Kind::Oriel { share: "window=64M", dax: "dax=inode" },
    },
    System {
        name: "oriel-dax",
        about: "Oriel, all files mapped (dax=always)",
        kind: Kind::Oriel { share: "dax=always,window=64M", dax: "dax" },
    },
    System {
        name: "oriel-never",
        about: "Oriel without DAX",
        kind: Kind::Oriel { share: "dax=never", dax: "" },
    },
    System {
        name: "oriel-cached",
        about: "Oriel without DAX, cache=always",
        kind: Kind::Oriel { share: "dax=never,cache=always", dax: "" },
    },
    System {
        name: "oriel-inline",
        about: "Oriel without DAX, dispatch=inline",
        kind: Kind::Oriel { share: "dax=never,dispatch=inline", dax: "" },
    },
    System {
        name: "oriel-worker",
        about: "Oriel without DAX, dispatch=worker",
        kind: Kind::Oriel { share: "dax=never,dispatch=worker", dax: "" },
    },
    System {
        name: "virtiofsd",
        about: "QEMU and virtiofsd, cache=auto",
        kind: Kind::Virtiofsd { cache: "auto" },
    },
    System {
        name: "virtiofsd-always",
        about: "QEMU and virtiofsd, cache=always",
        kind: Kind::Virtiofsd { cache: "always" },
    },
    System {
        name: "9p",
        about: "QEMU's virtio-9p, cache=none",
        kind: Kind::NineP { cache: "none" },
    },
    System {
        name: "9p-loose",
        about: "QEMU's virtio-9p, cache=loose",
        kind: Kind::NineP { cache: "loose" },
    },
    System {
        name: "scsi-qcow2",
        about: "ext4 in a qcow2 image above a snapshot, QEMU's virtio-scsi",
        kind: Kind::Disk,
    },
    System { name: "alioth", about: "alioth without DAX", kind: Kind::Alioth { dax: false } },
    System { name: "alioth-dax", about: "alioth with DAX", kind: Kind::Alioth { dax: true } },
];

/// What there is to start systems from; made by `tests/bench` and by [`crate::inside`].
#[derive(Debug)]
pub struct Parts {
    /// The static programs that were fetched or built: virtiofsd, alioth.
    pub programs: PathBuf,
    /// `bench-guest`.
    pub guest: String,
    /// `oriel`.
    pub oriel: String,
    /// The kernel, an ELF file.
    pub kernel: String,
    /// The initrd that the jobs run in.
    pub initrd: String,
    /// The one that powers off at once.
    pub initrd_of_true: String,
    /// The shared directory.
    pub tree: String,
    /// A directory for sockets and the like.
    pub work: PathBuf,
}

/// What a system runs.
#[derive(Debug)]
pub struct Commands {
    /// Started first, and left running; it makes the file.
    pub helper: Option<(Vec<String>, PathBuf)>,
    /// The machine, with the guest's console as its standard input and output.
    pub machine: Vec<String>,
}

fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split_whitespace().map(str::to_owned)
}

fn qemu(parts: &Parts, initrd: &str, cmdline: &str, devices: &str) -> Vec<String> {
    let mut line: Vec<String> = words(
        "qemu-system-x86_64 -nodefaults -no-user-config -display none -no-reboot -cpu host -smp 1 \
         -serial stdio -bios qboot.rom",
    )
    .collect();
    line.extend(words(&format!("-m {MEMORY} -kernel {} -initrd {initrd}", parts.kernel)));
    line.extend(["-append".to_owned(), format!("{CMDLINE} {cmdline}")]);
    // A device needs memory that can be shared with another process.
    if devices.contains("memory-backend=") {
        line.extend(words(devices));
    } else {
        line.extend(words("-machine q35,accel=kvm"));
        line.extend(words(devices));
    }
    line
}

fn mount(kind: &str, source: &str, options: &str) -> String {
    format!("bench.type={kind} bench.source={source} bench.options={options}")
}

impl System {
    /// The one with this name.
    pub fn named(name: &str) -> Option<&'static Self> {
        SYSTEMS.iter().find(|system| system.name == name)
    }

    /// Whether it has no guest.
    pub fn is_host(&self) -> bool {
        matches!(self.kind, Kind::Host)
    }

    /// What to start for the jobs.
    pub fn commands(&self, parts: &Parts) -> Commands {
        let mut helper = None;
        let machine = match self.kind {
            Kind::Host => {
                vec![parts.guest.clone(), "serve".into()]
            }
            Kind::Oriel { share, dax } => {
                let share = format!("{}:/t:{share},tag={TAG}", parts.tree);
                oriel(parts, &parts.initrd, &["-v", &share], &mount("virtiofs", TAG, dax))
            }
            Kind::Virtiofsd { cache } => {
                let socket = parts.work.join("virtiofsd.sock");
                let program = parts.programs.join("virtiofsd").display().to_string();
                let mut line = vec![program, format!("--socket-path={}", socket.display())];
                line.push(format!("--shared-dir={}", parts.tree));
                line.push(format!("--cache={cache}"));
                line.extend(words("--allow-direct-io --xattr --log-level=error"));
                if cache == "auto" {
                    line.push("--allow-mmap".into());
                }
                helper = Some((line, socket.clone()));
                let devices = format!(
                    "-machine q35,accel=kvm,memory-backend=memory \
                     -object memory-backend-memfd,id=memory,size={MEMORY}M,share=on \
                     -chardev socket,id=server,path={} \
                     -device vhost-user-fs-pci,chardev=server,tag={TAG},queue-size=1024",
                    socket.display()
                );
                qemu(parts, &parts.initrd, &mount("virtiofs", TAG, ""), &devices)
            }
            Kind::NineP { cache } => {
                let devices = format!(
                    "-fsdev local,id=server,path={},security_model=none,multidevs=remap \
                     -device virtio-9p-pci,fsdev=server,mount_tag={TAG}",
                    parts.tree
                );
                let options = format!("trans=virtio,version=9p2000.L,msize=512000,cache={cache}");
                qemu(parts, &parts.initrd, &mount("9p", TAG, &options), &devices)
            }
            Kind::Disk => {
                let devices = format!(
                    "-drive if=none,id=disk,file={},format=qcow2,discard=unmap \
                     -device virtio-scsi-pci -device scsi-hd,drive=disk",
                    parts.work.join("disk.qcow2").display()
                );
                qemu(parts, &parts.initrd, &mount("ext4", "/dev/sda", ""), &devices)
            }
            Kind::Alioth { dax } => {
                let window = if dax { WINDOW << 20 } else { 0 };
                let program = parts.programs.join("alioth").display().to_string();
                let mut line = vec![program, "-l".into(), "error".into(), "boot".into()];
                line.extend(words(&format!(
                    "--pvh {} --initramfs {} --memory size={MEMORY}M --cpu count=1 \
                     --fs dir,tag={TAG},path={},dax_window={window}",
                    parts.kernel, parts.initrd, parts.tree
                )));
                let options = if dax { "dax" } else { "" };
                line.push("--cmdline".into());
                line.push(format!("{CMDLINE} {}", mount("virtiofs", TAG, options)));
                line
            }
        };
        Commands { helper, machine }
    }

    /// What runs a guest that does nothing but to start /bin/true, and ends; where the system is a machine of its own.
    pub fn run_true(&self, parts: &Parts) -> Option<Vec<String>> {
        match self.name {
            "oriel" => Some(oriel(parts, &parts.initrd_of_true, &[], "bench.exit")),
            "virtiofsd" => Some(qemu(parts, &parts.initrd_of_true, "bench.exit", "")),
            _ => None,
        }
    }
}

fn oriel(parts: &Parts, initrd: &str, more: &[&str], cmdline: &str) -> Vec<String> {
    let memory = format!("{MEMORY}M");
    let mut line = vec![parts.oriel.clone(), "run".into(), "-i".into()];
    line.extend(["--kernel", &parts.kernel, "--initrd", initrd, "-m", &memory].map(str::to_owned));
    line.extend(more.iter().map(|word| (*word).to_owned()));
    // What CMDLINE says is said by itself.
    line.extend(["--cmdline".to_owned(), cmdline.to_owned()]);
    line
}
