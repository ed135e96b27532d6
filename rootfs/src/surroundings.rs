//! What a container's bundle has mounted, set and hidden in its root.

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result};
use oriel_init::container::{Container, FILES_DIR, Mount, What, sysctl_path};
use rustix::fs::{CWD, FileType, Mode, StatVfsMountFlags, makedev, mknodat};
use rustix::io::Errno;
use rustix::mount::{MountFlags, MoveMountFlags, OpenTreeFlags};

use crate::mounts;

/// Device nodes that every container has (runtime-spec, "Default Devices"): name, major and minor number.
const DEVICES: [(&str, u32, u32); 6] = [
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
    ("tty", 5, 0),
];

/// And links.
const LINKS: [(&str, &str); 5] = [
    ("/proc/self/fd", "fd"),
    ("/proc/self/fd/0", "stdin"),
    ("/proc/self/fd/1", "stdout"),
    ("/proc/self/fd/2", "stderr"),
    ("pts/ptmx", "ptmx"),
];

/// Files of the initramfs, which is out of sight once the root was entered.
pub(crate) struct Files(Vec<(String, OwnedFd)>);

impl Files {
    /// Takes hold of those that `container` mounts.
    pub(crate) fn open(container: &Container) -> Result<Self> {
        let names = container.mounts.iter().filter_map(|mount| match &mount.what {
            What::File(name) => Some(name),
            _ => None,
        });
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let open = |name: &String| {
            let path = Path::new(FILES_DIR).join(name);
            let file = rustix::mount::open_tree(CWD, &path, flags)
                .with_context(|| format!("cannot take hold of {}", path.display()))?;
            Ok((name.clone(), file))
        };
        names.map(open).collect::<Result<_>>().map(Self)
    }
}

/// Makes `container`'s surroundings in the root, where mount points and directories can still be made: see [`close`].
pub(crate) fn make(container: &Container, files: &Files) -> Result<()> {
    for mount in &container.mounts {
        make_mount(mount, files).with_context(|| format!("cannot mount at {}", mount.path))?;
    }
    for (name, value) in &container.sysctls {
        let path = sysctl_path(name).with_context(|| format!("{name:?} is no sysctl's name"))?;
        fs::write(path, value).with_context(|| format!("cannot set sysctl {name} to {value:?}"))?;
    }
    if let Some(name) = &container.domain_name {
        rustix::system::setdomainname(name.as_bytes())
            .with_context(|| format!("cannot set the domain name to {name:?}"))?;
    }
    Ok(())
}

/// Hides and protects what `container`'s commands are not to see or change, once all that they have is there. Nothing
/// needs anything of the host's after that: what is in /dev, /proc and /sys may be hidden.
pub(crate) fn close(container: &Container) -> Result<()> {
    for path in &container.masked {
        unless_absent(mask(path)).with_context(|| format!("cannot hide {path}"))?;
    }
    for path in &container.read_only {
        unless_absent(protect(path)).with_context(|| format!("cannot make {path} read-only"))?;
    }
    if container.read_only_root {
        remount("/", MountFlags::RDONLY).context("cannot make the root read-only")?;
    }
    Ok(())
}

fn make_mount(mount: &Mount, files: &Files) -> Result<()> {
    let flags = MountFlags::from_bits_retain(mount.flags);
    let path = mount.path.as_str();
    match &mount.what {
        What::Kernel { kind, source, options } => {
            fs::create_dir_all(path)?;
            let data = std::ffi::CString::new(options.as_str())?;
            match rustix::mount::mount(source.as_str(), path, kind.as_str(), flags, data.as_c_str())
            {
                // The guest's own is there already, and the kernel has but one of it.
                Err(Errno::BUSY) => remount(path, flags)?,
                mounted => mounted.with_context(|| format!("{kind} with {options:?}"))?,
            }
            if kind == "tmpfs" && Path::new(path) == Path::new("/dev") {
                fill_dev().context("its devices")?;
            }
        }
        What::Share(share) => {
            fs::create_dir_all(path)?;
            mounts::mount_share(share, path, flags)?;
        }
        What::File(name) => {
            let (_, file) =
                files.0.iter().find(|(known, _)| known == name).context("no such file")?;
            if let Some(parent) = Path::new(path).parent() {
                fs::create_dir_all(parent)?;
            }
            make_file(path)?;
            let empty =
                MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
            rustix::mount::move_mount(file.as_fd(), "", CWD, path, empty)?;
            if !flags.is_empty() {
                remount(path, flags)?;
            }
        }
    }
    Ok(())
}

/// Makes a file at `path`, or where a link there leads, unless something is there. That is not opened: it may be a
/// FIFO, which has its writer wait, or a file that cannot be written to.
fn make_file(path: &str) -> std::io::Result<()> {
    match fs::metadata(path) {
        Ok(_) => Ok(()),
        // Not waiting is for what somebody else has put there since.
        Err(error) if error.kind() == ErrorKind::NotFound => {
            let mut options = OpenOptions::new();
            options.append(true).create(true).custom_flags(libc::O_NONBLOCK).open(path).map(drop)
        }
        Err(error) => Err(error),
    }
}

/// A fresh /dev has nothing in it.
fn fill_dev() -> Result<()> {
    for (name, major, minor) in DEVICES {
        let path = Path::new("/dev").join(name);
        let mode = Mode::from_raw_mode(0o666);
        mknodat(CWD, &path, FileType::CharacterDevice, mode, makedev(major, minor))?;
        // Whatever the umask is.
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    }
    for (target, link) in LINKS {
        symlink(target, Path::new("/dev").join(link))?;
    }
    Ok(())
}

/// Hides what is at `path`: a directory seems empty, and so does a file.
fn mask(path: &str) -> std::io::Result<()> {
    if fs::metadata(path)?.is_dir() {
        Ok(rustix::mount::mount("tmpfs", path, "tmpfs", MountFlags::RDONLY, c"size=0k")?)
    } else {
        Ok(rustix::mount::mount_bind("/dev/null", path)?)
    }
}

/// Nothing is changed at `path`, or below it.
fn protect(path: &str) -> std::io::Result<()> {
    rustix::mount::mount_bind_recursive(path, path)?;
    remount(path, MountFlags::RDONLY)
}

/// Adds these flags to what is mounted at `path`.
fn remount(path: &str, flags: MountFlags) -> std::io::Result<()> {
    let now = rustix::fs::statvfs(path)?.f_flag;
    let kept = [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
    ];
    let kept = kept.into_iter().filter(|(there, _)| now.contains(*there));
    let flags = kept.fold(flags, |flags, (_, flag)| flags | flag);
    Ok(rustix::mount::mount_remount(path, flags | MountFlags::BIND, c"")?)
}

fn unless_absent(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Ok(())
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_made_where_nothing_is_and_nothing_is_opened_where_something_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name).to_str().unwrap().to_owned();
        make_file(&path("new")).unwrap();
        assert!(fs::metadata(path("new")).unwrap().is_file());
        fs::write(path("there"), "contents").unwrap();
        make_file(&path("there")).unwrap();
        assert_eq!(fs::read(path("there")).unwrap(), b"contents");
        symlink("elsewhere", path("link")).unwrap();
        make_file(&path("link")).unwrap();
        assert!(fs::metadata(path("elsewhere")).unwrap().is_file());
        // Without a reader, to open it for writing would wait for ever.
        mknodat(CWD, path("fifo"), FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        make_file(&path("fifo")).unwrap();
        assert!(make_file(&path("there/below")).is_err());
    }
}
