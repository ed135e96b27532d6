//! An OCI runtime bundle: a directory with a `config.json` and a root file system, as `runc spec`, podman and containerd
//! make them. It becomes the arguments of `oriel run` as far as there are such, and a [`Container`] for the rest. What
//! is in `config.json` and does not become anything is said: see [`fields`].

mod fields;
mod mounts;
mod process;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use devices::share::{GidMap, HostGid, HostUid, IdRange, UidMap};
use oci_spec::runtime::{LinuxIdMapping, LinuxNamespace, LinuxNamespaceType, Root};
use oriel_init::container::{Confinement, Container, Mount, What, sysctl_path};
use oriel_init::initramfs::FileCopy;
use oriel_init::protocol::Share;
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::mounts::{Bound, Mounts};
use crate::cli::{RootArg, RunArgs, ShareOptions};

/// No bundle says as much: those of podman have some 30 KiB.
const MAX_CONFIG: u64 = 4 << 20;

/// The longest name of a host or domain that Linux takes.
const MAX_NAME: usize = 64;

/// What a bundle has that `oriel run` has no argument for.
#[derive(Clone, Debug)]
pub struct Bundle {
    container: Container,
    /// What each of the container's mounts shows.
    bound: Vec<Bound>,
    /// The last so many shares are the bundle's.
    binds: usize,
    /// Files that the guest has copies of, with the ids that they have on the host.
    files: Vec<FileCopy>,
    /// Which users of the guest are which of the host, in its shares as in its files.
    pub uid_map: Vec<IdRange>,
    /// And groups.
    pub gid_map: Vec<IdRange>,
    /// What its command may do.
    pub confinement: Confinement,
}

impl Bundle {
    /// How many of the last shares are mounted by [`container`](Self::container), and by nobody else.
    pub fn binds(&self) -> usize {
        self.binds
    }

    /// Files that the guest has copies of, as they are owned there.
    pub fn files(&self, uids: &UidMap, gids: &GidMap) -> Vec<FileCopy> {
        let files = self.files.iter().cloned().map(|file| FileCopy {
            uid: uids.to_guest(HostUid(file.uid)).0,
            gid: gids.to_guest(HostGid(file.gid)).0,
            ..file
        });
        files.collect()
    }

    /// What the guest is told, whose `binds` are these.
    pub fn container(&self, binds: &[Share]) -> Container {
        let mut container = self.container.clone();
        let bound = self.bound.iter().filter_map(|bound| {
            let what = match &bound.what {
                mounts::What::Share(index) => What::Share(binds.get(*index)?.clone()),
                mounts::What::Other(what) => what.clone(),
            };
            Some(Mount { what, path: bound.path.clone(), flags: bound.flags })
        });
        container.mounts = bound.collect();
        container
    }
}

/// Reads the bundle in `directory`: `args`, and what it says instead of them and beside them. Warns of what it says in
/// vain.
///
/// # Errors
///
/// What keeps it from being run, in a line that names the field.
pub fn load(args: &RunArgs, directory: &Path) -> Result<RunArgs> {
    read(args, directory).with_context(|| format!("--bundle {}", directory.display()))
}

fn read(args: &RunArgs, directory: &Path) -> Result<RunArgs> {
    let mut config = parse(&directory.join("config.json")).context("config.json")?;
    for line in fields::check(&mut config).context("config.json")? {
        log::warn!("--bundle {}: config.json: {line}", directory.display());
    }
    let mut config = Config(config);
    let root: Root = config.section("root")?.context(
        "config.json: root: is missing; name the directory of the root file system in root.path",
    )?;
    let process = config.section("process")?.context(
        "config.json: process: is missing; say what is to be run in process.args and process.cwd",
    )?;
    let process = process::plan(&process).context("config.json: process")?;
    let mut warnings = Vec::new();
    check_namespaces(&config.list("linux", "namespaces")?, &mut warnings)?;

    let mut args = args.clone();
    let options = ShareOptions {
        uid_map: ranges("linux.uidMappings", &config.list("linux", "uidMappings")?)?,
        gid_map: ranges("linux.gidMappings", &config.list("linux", "gidMappings")?)?,
        ..ShareOptions::default()
    };
    let rootfs = directory.join(root.path());
    let shown = root.path().display();
    match rootfs.metadata() {
        Ok(metadata) if metadata.is_dir() => {}
        Ok(_) => bail!("config.json: root.path: {shown:?} is no directory; unpack the image there"),
        Err(error) => bail!("config.json: root.path: {shown:?}: {error}; unpack the image there"),
    }
    let mounts: Vec<Value> = config.top("mounts")?;
    let beside = args.shares.len() + usize::from(args.live.is_some());
    let Mounts { bound, shares, files } =
        mounts::plan(directory, mounts, &options, beside, &mut warnings).context("config.json")?;
    for line in warnings {
        log::warn!("--bundle {}: config.json: {line}", directory.display());
    }
    let read_only_root = root.readonly().unwrap_or(false);
    // Mount points are made in it all the same, in the guest's memory.
    let (uid_map, gid_map) = (options.uid_map.clone(), options.gid_map.clone());
    let options = ShareOptions { overlay: read_only_root, ..options };
    args.root = Some(RootArg { host: rootfs, options });
    let name = |field| -> Result<Option<String>> {
        let name: Option<String> = config.get(field)?;
        match name.filter(|name| !name.is_empty()) {
            Some(name) if name.len() > MAX_NAME || name.contains('\0') => {
                bail!("config.json: {field}: {name:?}: write at most {MAX_NAME} characters")
            }
            name => Ok(name),
        }
    };
    if let Some(name) = name("hostname")? {
        args.hostname = name;
    }
    let sysctls: BTreeMap<String, String> = config.inner("linux", "sysctl")?.unwrap_or_default();
    if let Some(wrong) = sysctls.keys().find(|name| sysctl_path(name).is_none()) {
        bail!("config.json: linux.sysctl: {wrong:?}: write a name such as net.ipv4.ip_forward");
    }
    let container = Container {
        mounts: Vec::new(),
        sysctls,
        masked: config.list("linux", "maskedPaths")?,
        read_only: config.list("linux", "readonlyPaths")?,
        read_only_root,
        domain_name: name("domainname")?,
    };
    args.tty = process.terminal;
    args.command = process.args;
    args.env = process.env;
    args.workdir = process.cwd;
    let binds = shares.len();
    args.shares.extend(shares);
    let confinement = process.confinement;
    args.container = Some(Bundle { container, bound, binds, files, uid_map, gid_map, confinement });
    Ok(args)
}

fn parse(path: &Path) -> Result<Value> {
    let file =
        File::open(path).context("cannot be read; a bundle has one, `runc spec` writes it")?;
    let mut bytes = Vec::new();
    file.take(MAX_CONFIG + 1).read_to_end(&mut bytes).context("cannot be read")?;
    if bytes.len() as u64 > MAX_CONFIG {
        bail!("is longer than {} MiB; it is no OCI configuration", MAX_CONFIG >> 20);
    }
    serde_json::from_slice(&bytes)
        .map_err(|error| anyhow!("is no JSON: {error}; `runc spec` writes one that is"))
}

/// What is left of `config.json`: what is known and supported.
struct Config(Value);

impl Config {
    fn get<T: DeserializeOwned>(&self, field: &str) -> Result<Option<T>> {
        decode(field, self.0.get(field))
    }

    fn section<T: DeserializeOwned>(&mut self, field: &str) -> Result<Option<T>> {
        self.get(field)
    }

    fn top<T: DeserializeOwned + Default>(&self, field: &str) -> Result<T> {
        Ok(self.get(field)?.unwrap_or_default())
    }

    fn inner<T: DeserializeOwned>(&self, section: &str, field: &str) -> Result<Option<T>> {
        let value = self.0.get(section).and_then(|section| section.get(field));
        decode(&format!("{section}.{field}"), value)
    }

    fn list<T: DeserializeOwned>(&self, section: &str, field: &str) -> Result<Vec<T>> {
        Ok(self.inner(section, field)?.unwrap_or_default())
    }
}

/// A field that may be left out, or be null.
fn decode<T: DeserializeOwned>(field: &str, value: Option<&Value>) -> Result<Option<T>> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(None) };
    let decoded = serde_json::from_value(value.clone());
    decoded.map(Some).map_err(|error| anyhow!("config.json: {field}: {error}"))
}

/// The guest is all of a container's namespaces, and there is no way into those of the host.
fn check_namespaces(namespaces: &[LinuxNamespace], warnings: &mut Vec<String>) -> Result<()> {
    for (index, namespace) in namespaces.iter().enumerate() {
        let path = namespace.path().as_ref().filter(|path| !path.as_os_str().is_empty());
        let field = format!("linux.namespaces[{index}].path");
        match path {
            None => {}
            // podman names one for each container that has a network.
            Some(_) if namespace.typ() == LinuxNamespaceType::Network => {
                warnings.push(format!("{field} is left out: the guest has no network"));
            }
            Some(path) => bail!(
                "config.json: {field}: {path:?}: a guest cannot enter a namespace of the host; leave path"
            ),
        }
    }
    let all = [
        (LinuxNamespaceType::Pid, "pid"),
        (LinuxNamespaceType::Network, "network"),
        (LinuxNamespaceType::Ipc, "ipc"),
        (LinuxNamespaceType::Uts, "uts"),
    ];
    let missing = |kind| !namespaces.iter().any(|one| one.typ() == kind);
    let shared: Vec<_> =
        all.into_iter().filter(|(kind, _)| missing(*kind)).map(|(_, name)| name).collect();
    if !shared.is_empty() {
        warnings.push(format!(
            "linux.namespaces: without {} those of the host would be used; the guest has its own",
            shared.join(", ")
        ));
    }
    Ok(())
}

fn ranges(field: &str, mappings: &[LinuxIdMapping]) -> Result<Vec<IdRange>> {
    let range = |mapping: &LinuxIdMapping| {
        let (guest, host) = (mapping.container_id(), mapping.host_id());
        let count = mapping.size();
        if count == 0
            || guest.checked_add(count - 1).is_none()
            || host.checked_add(count - 1).is_none()
        {
            bail!("config.json: {field}: {guest}, {host}, {count} is no range of ids");
        }
        Ok(IdRange { guest, host, count })
    };
    mappings.iter().map(range).collect()
}

#[cfg(test)]
mod tests;
