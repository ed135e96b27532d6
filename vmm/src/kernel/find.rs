//! Which kernel, and the guest files that came with it.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::image::{Format, KernelFile};
use super::unpack;

/// What brings a kernel.
const REMEDY: &str = "run kernel-config/fetch (or `make kernel`), or name one with --kernel";

/// Directories in which `kernel-config/fetch` and `make install` put what guests need, best first.
pub fn asset_directories() -> Vec<PathBuf> {
    let variable = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(directory) = variable("ORIEL_DATA") {
        return vec![directory.into()];
    }
    let home = variable("HOME").map(PathBuf::from);
    let data = variable("XDG_DATA_HOME")
        .map(PathBuf::from)
        .or_else(|| home.map(|home| home.join(".local/share")));
    let shared = ["/usr/local/share", "/usr/share"].map(PathBuf::from);
    data.into_iter().chain(shared).map(|directory| directory.join("oriel")).collect()
}

/// The kernel to boot and its modules.
pub struct Kernel {
    /// The file, ready to load.
    pub file: KernelFile,
    /// Modules built for it, with a file `load-order` that lists them.
    pub modules: Option<PathBuf>,
}

/// Finds and reads the kernel: `wanted`, or the one that the scripts brought. A bzImage is unpacked where we
/// can (see [`unpack`]) unless `unpack` is false.
///
/// # Errors
///
/// One line: which file, what is wrong with it, and what brings a kernel.
pub fn find(wanted: Option<&Path>, unpack: bool) -> Result<Kernel> {
    let path = match wanted {
        Some(path) => path.to_path_buf(),
        None => installed()?,
    };
    let mut file = KernelFile::open(&path).map_err(|error| match wanted {
        Some(_) => error.context(format!("--kernel {}", path.display())),
        None => error.context(REMEDY),
    })?;
    let modules = path.parent().map(|directory| directory.join("modules"));
    let modules = modules.filter(|directory| directory.join("load-order").is_file());
    if unpack && file.format == Format::BzImage {
        file = unpack::unpacked(file);
    }
    Ok(Kernel { file, modules })
}

fn installed() -> Result<PathBuf> {
    let directories = asset_directories();
    // Our own build has everything built in and nothing to unpack.
    let names = ["vmlinux", "vmlinuz"];
    let mut candidates = directories.iter().flat_map(|dir| names.map(|name| dir.join(name)));
    match candidates.find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => {
            let places: Vec<_> = directories.iter().map(|dir| dir.display().to_string()).collect();
            bail!("no guest kernel in {}; {REMEDY}", places.join(", "))
        }
    }
}

/// Files of the guest's side that the host carries.
pub struct Assets {
    /// `oriel-init`, a static program.
    pub init: PathBuf,
    /// `busybox`, a static program; only a guest without a root of its own needs it.
    pub busybox: Option<PathBuf>,
}

impl Assets {
    /// Finds them: `oriel-init` beside this program, in `../lib/oriel`, or where `$ORIEL_INIT` says;
    /// `busybox` beside the kernel that the scripts brought.
    ///
    /// # Errors
    ///
    /// When there is no `oriel-init`.
    pub fn find() -> Result<Self> {
        let busybox = asset_directories().into_iter().map(|dir| dir.join("busybox"));
        let busybox = busybox.into_iter().find(|path| path.is_file());
        if let Some(init) = std::env::var_os("ORIEL_INIT") {
            return Ok(Self { init: init.into(), busybox });
        }
        let program = std::env::current_exe().context("where am I?")?;
        let beside = program.parent().context("a program in no directory")?;
        let places = [beside.join("oriel-init"), beside.join("../lib/oriel/oriel-init")];
        let init = places.iter().find(|path| path.is_file()).with_context(|| {
            format!(
                "no oriel-init beside {}; build it (`make build`) or set $ORIEL_INIT",
                program.display()
            )
        })?;
        Ok(Self { init: init.clone(), busybox })
    }
}
