//! The guest's file systems: those of the kernel, the root, and the shares.

use std::ffi::CStr;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use oriel_init::container::What;
use oriel_init::protocol::{Config, Dax, Root, Share};
use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::log;

/// In the initramfs: where the root is put together.
const NEW_ROOT: &str = "/oriel/root";
const LOWER: &str = "/oriel/lower";
const UPPER: &str = "/oriel/upper";

/// How long the guest waits for its shares at the end while nothing more is written to them.
const PATIENCE: Duration = Duration::from_secs(10);
/// How often it looks whether more is.
const LOOK: Duration = Duration::from_millis(500);

/// Mounts without which nothing can be done, first in the initramfs. They are moved into the root later.
const FIRST: [(&str, &str); 3] = [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev")];

/// Mounts that any program may expect, in the final root: file system, place, flags, options. Each of them is
/// done if it can be.
const FURTHER: [(&str, &str, MountFlags, &CStr); 7] = [
    ("devpts", "/dev/pts", NOSUID_NOEXEC, c"gid=5,mode=620,ptmxmode=666"),
    ("tmpfs", "/dev/shm", NOSUID_NODEV, c"mode=1777"),
    ("mqueue", "/dev/mqueue", NOSUID_NODEV, c""),
    ("tmpfs", "/run", NOSUID_NODEV, c"mode=755"),
    ("tmpfs", "/tmp", NOSUID_NODEV, c"mode=1777"),
    ("securityfs", "/sys/kernel/security", NOSUID_NODEV, c""),
    ("cgroup2", "/sys/fs/cgroup", NOSUID_NODEV, c""),
];
const NOSUID_NODEV: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV);
const NOSUID_NOEXEC: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);

/// Links that scripts expect in /dev, and that devtmpfs does not make.
const DEVICE_LINKS: [(&str, &str); 4] = [
    ("/proc/self/fd", "/dev/fd"),
    ("/proc/self/fd/0", "/dev/stdin"),
    ("/proc/self/fd/1", "/dev/stdout"),
    ("/proc/self/fd/2", "/dev/stderr"),
];

/// Mounts /proc, /sys and /dev in the initramfs.
pub(crate) fn first() -> Result<()> {
    for (kind, place) in FIRST {
        rustix::mount::mount(kind, place, kind, MountFlags::empty(), None)
            .with_context(|| format!("cannot mount {kind} at {place}"))?;
    }
    Ok(())
}

/// Mounts the root share, lays an overlay over it if asked, and makes it `/`.
pub(crate) fn enter_root(root: &Root) -> Result<()> {
    create(NEW_ROOT)?;
    if root.overlay {
        create(LOWER)?;
        create(UPPER)?;
        mount_share(&root.share, LOWER, MountFlags::empty())?;
        rustix::mount::mount("tmpfs", UPPER, "tmpfs", MountFlags::empty(), c"mode=755")
            .context("cannot mount a tmpfs for the root's overlay")?;
        create(&format!("{UPPER}/upper"))?;
        create(&format!("{UPPER}/work"))?;
        let options =
            c"lowerdir=/oriel/lower,upperdir=/oriel/upper/upper,workdir=/oriel/upper/work";
        rustix::mount::mount("overlay", NEW_ROOT, "overlay", MountFlags::empty(), options)
            .context("cannot mount an overlay over the root share (the kernel needs overlayfs, built in or as a module)")?;
    } else {
        mount_share(&root.share, NEW_ROOT, MountFlags::empty())?;
    }

    for (_, place) in FIRST {
        let inside = format!("{NEW_ROOT}{place}");
        create(&inside)?;
        rustix::mount::mount_move(place, &inside)
            .with_context(|| format!("cannot move {place} into the root"))?;
    }
    // What is left of the initramfs lies hidden below the new root.
    std::env::set_current_dir(NEW_ROOT)
        .and_then(|()| Ok(rustix::mount::mount_move(".", "/")?))
        .and_then(|()| Ok(rustix::process::chroot(".")?))
        .and_then(|()| std::env::set_current_dir("/"))
        .context("cannot switch to the root file system")
}

/// Mounts in the final root what programs expect; what cannot be is logged.
pub(crate) fn further() {
    for (kind, place, flags, options) in FURTHER {
        // A directory of sysfs is there or it is not.
        if !place.starts_with("/sys/")
            && let Err(error) = fs::create_dir_all(place)
        {
            log(&format!("cannot create {place}: {error}"));
        }
        if let Err(error) = rustix::mount::mount(kind, place, kind, flags, options) {
            log(&format!("cannot mount {kind} at {place}: {error}"));
        }
    }
    for (target, link) in DEVICE_LINKS {
        // There already where the root was another machine's /dev.
        let _ = std::os::unix::fs::symlink(target, link);
    }
}

/// Mounts the shares other than the root.
pub(crate) fn shares(shares: &[Share]) -> Result<()> {
    for share in shares {
        if !share.path.starts_with('/') {
            bail!("cannot mount share {} at {}: the path is not absolute", share.tag, share.path);
        }
        create(&share.path).with_context(|| format!("cannot mount share {}", share.tag))?;
        mount_share(share, &share.path, MountFlags::empty())?;
    }
    Ok(())
}

/// Creates a mount point, unless it exists.
fn create(path: &str) -> Result<()> {
    fs::create_dir_all(path).with_context(|| {
        // mkdir says EROFS, and for what exists and is no directory EEXIST.
        format!("cannot create the mount point {path}")
    })
}

/// Mounts a share, with these flags and those of its own.
pub(crate) fn mount_share(share: &Share, place: &str, flags: MountFlags) -> Result<()> {
    let (option, options): (_, Option<&CStr>) = match share.dax {
        Dax::Never => ("", None),
        Dax::Inode => (" with dax=inode", Some(c"dax=inode")),
        Dax::Always => (" with dax=always", Some(c"dax=always")),
    };
    let own = if share.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let flags = flags | own;
    rustix::mount::mount(share.tag.as_str(), place, "virtiofs", flags, options).map_err(|error| {
        let hint = match error {
            Errno::INVAL if !has_device(&share.tag) => ": no virtio-fs device has this tag",
            Errno::INVAL if options.is_some() => ": the device has no DAX window",
            Errno::NODEV => ": the kernel has no virtio-fs",
            _ => "",
        };
        let error = io::Error::from(error);
        anyhow::anyhow!("cannot mount share {} at {}{option}{hint}: {error}", share.tag, share.path)
    })
}

/// Whether a device of this tag is known; true where the kernel is too old (6.9) to tell.
fn has_device(tag: &str) -> bool {
    let Ok(devices) = fs::read_dir("/sys/fs/virtiofs") else {
        return true;
    };
    devices.flatten().any(|device| {
        let known = fs::read_to_string(device.path().join("tag")).unwrap_or_default();
        known.trim_end_matches('\n') == tag
    })
}

/// Unmounts the shares again and makes the rest read-only, so that every file is closed before the power goes.
pub(crate) fn leave(config: Config) {
    patiently(move || {
        rustix::fs::sync();
        let mounts = config.container.iter().flat_map(|container| &container.mounts);
        let bound = mounts.filter(|mount| matches!(mount.what, What::Share(_)));
        let shares = config.shares.iter().map(|share| &share.path);
        let places: Vec<_> = bound.map(|mount| &mount.path).chain(shares).collect();
        for place in places.into_iter().rev() {
            if let Err(error) =
                rustix::mount::unmount(Path::new(place), rustix::mount::UnmountFlags::empty())
            {
                log(&format!("cannot unmount {place}: {error}"));
            }
        }
        // The root of an initramfs cannot, and need not.
        let _ = rustix::mount::mount_remount("/", MountFlags::RDONLY, c"");
    });
}

/// Writes to the shares what is not written yet.
pub(crate) fn sync() {
    patiently(rustix::fs::sync);
}

/// Waits for the end of `work`, but for a file system of the host that does not answer no longer than
/// [`PATIENCE`]. What has been written by then the host has.
fn patiently(work: impl FnOnce() + Send + 'static) {
    let (done, ended) = mpsc::channel();
    let body = move || {
        work();
        let _ = done.send(());
    };
    if let Err(error) = thread::Builder::new().name("leave".into()).spawn(body) {
        return log(&format!("cannot start a thread: {error}"));
    }
    let (mut least, mut since) = (u64::MAX, Instant::now());
    while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
        let left = unwritten(&fs::read_to_string("/proc/meminfo").unwrap_or_default());
        if left < least {
            (least, since) = (left, Instant::now());
        } else if since.elapsed() > PATIENCE {
            return log("a share does not answer, and is left");
        }
    }
}

/// KiB that the kernel has to write yet, by its /proc/meminfo.
fn unwritten(meminfo: &str) -> u64 {
    let lines = meminfo.lines().filter_map(|line| {
        let (name, value) = line.split_once(':')?;
        let counts = ["Dirty", "Writeback", "WritebackTmp"].contains(&name);
        value.trim().trim_end_matches(" kB").parse::<u64>().ok().filter(|_| counts)
    });
    lines.fold(0, u64::saturating_add)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_to_be_written_is_dirty_or_on_its_way() {
        let meminfo =
            "MemTotal:  9 kB\nDirty:   120 kB\nWriteback:   8 kB\nWritebackTmp: 1 kB\nSlab: x\n";
        assert_eq!(unwritten(meminfo), 129);
        assert_eq!(unwritten(""), 0);
    }

    #[test]
    fn the_end_is_waited_for_where_it_comes() {
        let (sender, receiver) = mpsc::channel();
        patiently(move || {
            thread::sleep(2 * LOOK);
            sender.send(7).unwrap();
        });
        assert_eq!(receiver.try_recv(), Ok(7));
    }
}
