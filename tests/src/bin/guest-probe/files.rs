//! Every file operation once.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use integration::noise;
use rustix::fs as sys;
use rustix::fs::{
    AtFlags, CWD, FallocateFlags, FileType, FlockOperation, Mode, OFlags, RenameFlags, Timespec,
    Timestamps, XattrFlags,
};
use rustix::io::Errno;

/// Prints `name=ok` or what went wrong.
fn report(name: &str, result: Result<()>) {
    match result {
        Ok(()) => println!("{name}=ok"),
        Err(error) => println!("{name}={error:#}"),
    }
}

fn fails_with<T>(result: Result<T, Errno>, expected: Errno) -> Result<()> {
    match result {
        Err(errno) if errno == expected => Ok(()),
        Err(errno) => anyhow::bail!("{errno} instead of {expected}"),
        Ok(_) => anyhow::bail!("it worked, instead of {expected}"),
    }
}

fn io_fails_with<T>(result: std::io::Result<T>, expected: Errno) -> Result<()> {
    fails_with(
        result.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::NOMSG)),
        expected,
    )
}

type Operation = (&'static str, fn(&Path) -> Result<()>);

const OPERATIONS: &[Operation] = &[
    ("create_and_write", |dir| {
        let mut file = File::create_new(dir.join("plain"))?;
        file.write_all(b"hello, ")?;
        file.write_all(b"world\n")?;
        io_fails_with(File::create_new(dir.join("plain")), Errno::EXIST)
    }),
    ("read", |dir| {
        let text = fs::read(dir.join("plain"))?;
        ensure!(text == b"hello, world\n", "read {text:?}");
        io_fails_with(File::open(dir.join("absent")), Errno::NOENT)
    }),
    ("append", |dir| {
        let mut file = OpenOptions::new().append(true).open(dir.join("plain"))?;
        file.write_all(b"more\n")?;
        ensure!(file.metadata()?.len() == 18, "length {}", file.metadata()?.len());
        Ok(())
    }),
    ("positioned_io", |dir| {
        let file = OpenOptions::new().read(true).write(true).open(dir.join("plain"))?;
        file.write_all_at(b"HELLO", 0)?;
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 0)?;
        ensure!(&bytes == b"HELLO", "read {bytes:?}");
        Ok(())
    }),
    ("truncate", |dir| {
        let file = File::create(dir.join("truncated"))?;
        file.write_all_at(&noise(10_000, 3), 0)?;
        file.set_len(5000)?;
        file.set_len(9000)?;
        let bytes = fs::read(dir.join("truncated"))?;
        ensure!(bytes.len() == 9000, "length {}", bytes.len());
        ensure!(bytes[..5000] == noise(10_000, 3)[..5000], "what was kept is not the same");
        ensure!(bytes[5000..].iter().all(|byte| *byte == 0), "what was cut off came back");
        Ok(())
    }),
    ("open_truncates", |dir| {
        fs::write(dir.join("emptied"), "text")?;
        drop(OpenOptions::new().write(true).truncate(true).open(dir.join("emptied"))?);
        ensure!(fs::metadata(dir.join("emptied"))?.len() == 0, "not empty");
        Ok(())
    }),
    ("rename", |dir| {
        fs::write(dir.join("old"), "renamed")?;
        fs::rename(dir.join("old"), dir.join("new"))?;
        ensure!(!dir.join("old").exists(), "the old name is still there");
        ensure!(fs::read(dir.join("new"))? == b"renamed", "other content");
        fs::write(dir.join("over"), "replaced")?;
        fs::rename(dir.join("over"), dir.join("new"))?;
        ensure!(fs::read(dir.join("new"))? == b"replaced", "not replaced");
        Ok(())
    }),
    ("rename_noreplace", |dir| {
        fs::write(dir.join("here"), "here")?;
        fs::write(dir.join("there"), "there")?;
        let (here, there) = (dir.join("here"), dir.join("there"));
        fails_with(
            sys::renameat_with(CWD, &here, CWD, &there, RenameFlags::NOREPLACE),
            Errno::EXIST,
        )?;
        sys::renameat_with(CWD, &here, CWD, dir.join("elsewhere"), RenameFlags::NOREPLACE)?;
        fs::rename(dir.join("elsewhere"), here)?;
        Ok(())
    }),
    ("rename_exchange", |dir| {
        let (here, there) = (dir.join("here"), dir.join("there"));
        sys::renameat_with(CWD, &here, CWD, &there, RenameFlags::EXCHANGE)?;
        ensure!(fs::read(here)? == b"there" && fs::read(there)? == b"here", "not exchanged");
        Ok(())
    }),
    ("hard_link", |dir| {
        fs::write(dir.join("linked"), "one file")?;
        fs::hard_link(dir.join("linked"), dir.join("link"))?;
        let (one, two) = (fs::metadata(dir.join("linked"))?, fs::metadata(dir.join("link"))?);
        ensure!(one.ino() == two.ino() && two.nlink() == 2, "{} links", two.nlink());
        fs::remove_file(dir.join("linked"))?;
        ensure!(fs::metadata(dir.join("link"))?.nlink() == 1, "the count of links stays");
        Ok(())
    }),
    ("symbolic_link", |dir| {
        symlink("plain", dir.join("symlink"))?;
        ensure!(fs::read_link(dir.join("symlink"))? == Path::new("plain"), "another target");
        ensure!(fs::read(dir.join("symlink"))? == fs::read(dir.join("plain"))?, "not followed");
        // It points where it points in the guest, and never to the host's file.
        symlink("/guest-only", dir.join("absolute"))?;
        Ok(())
    }),
    ("directories", |dir| {
        fs::create_dir(dir.join("made"))?;
        io_fails_with(fs::create_dir(dir.join("made")), Errno::EXIST)?;
        fs::write(dir.join("made/file"), "x")?;
        io_fails_with(fs::remove_dir(dir.join("made")), Errno::NOTEMPTY)?;
        fs::remove_file(dir.join("made/file"))?;
        fs::remove_dir(dir.join("made"))?;
        fs::create_dir_all(dir.join("deep/er/and/deeper"))?;
        fs::write(dir.join("deep/er/and/deeper/file"), "deep")?;
        fs::rename(dir.join("deep/er"), dir.join("moved"))?;
        ensure!(fs::read(dir.join("moved/and/deeper/file"))? == b"deep", "lost in the move");
        Ok(())
    }),
    ("unlink_while_open", |dir| {
        let mut file =
            OpenOptions::new().read(true).write(true).create_new(true).open(dir.join("gone"))?;
        file.write_all(b"still here")?;
        fs::remove_file(dir.join("gone"))?;
        io_fails_with(fs::metadata(dir.join("gone")), Errno::NOENT)?;
        file.seek(SeekFrom::Start(0))?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        ensure!(text == "still here" && file.metadata()?.nlink() == 0, "{text:?}");
        Ok(())
    }),
    ("mode", |dir| {
        fs::write(dir.join("mode"), "")?;
        fs::set_permissions(dir.join("mode"), fs::Permissions::from_mode(0o4751))?;
        let mode = fs::metadata(dir.join("mode"))?.mode() & 0o7777;
        ensure!(mode == 0o4751, "mode {mode:o}");
        Ok(())
    }),
    ("owner", |dir| {
        fs::write(dir.join("owned"), "")?;
        std::os::unix::fs::chown(dir.join("owned"), Some(1234), Some(4321))?;
        let data = fs::metadata(dir.join("owned"))?;
        ensure!((data.uid(), data.gid()) == (1234, 4321), "{}:{}", data.uid(), data.gid());
        Ok(())
    }),
    ("times", |dir| {
        fs::write(dir.join("dated"), "")?;
        let times = Timestamps {
            last_access: Timespec { tv_sec: 1_000_000_000, tv_nsec: 0 },
            last_modification: Timespec { tv_sec: 1_234_567_890, tv_nsec: 123_456_789 },
        };
        sys::utimensat(CWD, dir.join("dated"), &times, AtFlags::empty())?;
        let data = fs::metadata(dir.join("dated"))?;
        ensure!(
            data.mtime() == 1_234_567_890 && data.mtime_nsec() == 123_456_789,
            "{}",
            data.mtime()
        );
        ensure!(data.atime() == 1_000_000_000, "access {}", data.atime());
        Ok(())
    }),
    ("fifo", |dir| {
        sys::mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::from_raw_mode(0o640), 0)?;
        ensure!(fs::metadata(dir.join("fifo"))?.file_type().is_fifo(), "no fifo");
        let path = dir.join("fifo");
        let reader = std::thread::spawn(move || fs::read(path));
        fs::write(dir.join("fifo"), "through the fifo")?;
        let text = reader.join().ok().context("the reader")??;
        ensure!(text == b"through the fifo", "{text:?}");
        Ok(())
    }),
    ("unix_socket", |dir| {
        let listener = std::os::unix::net::UnixListener::bind(dir.join("socket"))?;
        let mut client = std::os::unix::net::UnixStream::connect(dir.join("socket"))?;
        client.write_all(b"hi")?;
        drop(client);
        let mut text = String::new();
        listener.accept()?.0.read_to_string(&mut text)?;
        ensure!(text == "hi", "{text:?}");
        Ok(())
    }),
    ("device_node_refused", |dir| {
        // A node on the share would be a device of the host.
        let device = sys::makedev(1, 3);
        let made = sys::mknodat(
            CWD,
            dir.join("device"),
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o600),
            device,
        );
        fails_with(made, Errno::PERM)
    }),
    ("extended_attributes", |dir| {
        fs::write(dir.join("attributed"), "")?;
        let path = dir.join("attributed");
        sys::setxattr(&path, "user.one", b"first", XattrFlags::empty())?;
        sys::setxattr(&path, "user.two", b"", XattrFlags::empty())?;
        fails_with(sys::setxattr(&path, "user.one", b"x", XattrFlags::CREATE), Errno::EXIST)?;
        let mut buffer = [0; 256];
        let length = sys::getxattr(&path, "user.one", &mut buffer[..])?;
        ensure!(&buffer[..length] == b"first", "{:?}", &buffer[..length]);
        fails_with(sys::getxattr(&path, "user.one", &mut [0u8; 2][..]), Errno::RANGE)?;
        let length = sys::listxattr(&path, &mut buffer[..])?;
        let names = String::from_utf8_lossy(&buffer[..length]).into_owned();
        ensure!(names.contains("user.one\0") && names.contains("user.two\0"), "{names:?}");
        sys::removexattr(&path, "user.two")?;
        fails_with(sys::getxattr(&path, "user.two", &mut buffer[..]), Errno::NODATA)
    }),
    ("fallocate", |dir| {
        let file = File::create(dir.join("allocated"))?;
        sys::fallocate(&file, FallocateFlags::empty(), 0, 1 << 20)?;
        let data = file.metadata()?;
        ensure!(data.len() == 1 << 20 && data.blocks() >= 2048, "{} blocks", data.blocks());
        sys::fallocate(&file, FallocateFlags::KEEP_SIZE, 1 << 20, 65536)?;
        ensure!(file.metadata()?.len() == 1 << 20, "the length changed");
        Ok(())
    }),
    ("punch_hole", |dir| {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(dir.join("punched"))?;
        file.write_all_at(&[7; 65536], 0)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        sys::fallocate(&file, flags, 8192, 8192)?;
        let mut bytes = vec![0; 65536];
        file.read_exact_at(&mut bytes, 0)?;
        ensure!(bytes[8192..16384].iter().all(|byte| *byte == 0), "the hole is not empty");
        ensure!(bytes[8191] == 7 && bytes[16384] == 7, "the hole is too large");
        Ok(())
    }),
    ("sparse_seek", |dir| {
        let file = File::create(dir.join("sparse"))?;
        file.write_all_at(b"start", 0)?;
        file.write_all_at(b"end", 1 << 20)?;
        let hole = sys::seek(&file, sys::SeekFrom::Hole(0))?;
        ensure!((4096..1 << 20).contains(&hole), "hole at {hole}");
        let data = sys::seek(&file, sys::SeekFrom::Data(hole))?;
        ensure!(data == 1 << 20, "data at {data}");
        Ok(())
    }),
    ("large_offset", |dir| {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(dir.join("large"))?;
        file.write_all_at(b"far out", 5 << 30)?;
        let mut bytes = [0; 7];
        file.read_exact_at(&mut bytes, 5 << 30)?;
        ensure!(&bytes == b"far out" && file.metadata()?.len() == (5 << 30) + 7, "{bytes:?}");
        fs::remove_file(dir.join("large"))?;
        Ok(())
    }),
    ("statfs", |dir| {
        let data = sys::statvfs(dir)?;
        ensure!(data.f_blocks > 0 && data.f_bfree <= data.f_blocks, "{} blocks", data.f_blocks);
        ensure!(data.f_namemax == 255, "names of {}", data.f_namemax);
        println!("statfs_bytes={}", data.f_blocks * data.f_frsize);
        Ok(())
    }),
    ("fsync", |dir| {
        let mut file = File::create(dir.join("synced"))?;
        file.write_all(b"safe")?;
        file.sync_all()?;
        file.sync_data()?;
        File::open(dir)?.sync_all()?;
        sys::syncfs(&file)?;
        Ok(())
    }),
    ("temporary_file", |dir| {
        let mode = Mode::from_raw_mode(0o600);
        let file = sys::openat(CWD, dir, OFlags::TMPFILE | OFlags::RDWR, mode)?;
        let file = File::from(file);
        file.write_all_at(b"named later", 0)?;
        let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        sys::linkat(CWD, name, CWD, dir.join("tmpfile"), AtFlags::SYMLINK_FOLLOW)?;
        ensure!(fs::read(dir.join("tmpfile"))? == b"named later", "other content");
        Ok(())
    }),
    ("copy_file_range", |dir| {
        fs::write(dir.join("source"), noise(300_000, 9))?;
        let (from, to) = (File::open(dir.join("source"))?, File::create(dir.join("copy"))?);
        let (mut input, mut output) = (0, 0);
        while output < 300_000 {
            let length = 300_000 - output as usize;
            let copied =
                sys::copy_file_range(&from, Some(&mut input), &to, Some(&mut output), length)?;
            ensure!(copied > 0, "nothing more copied at {output}");
        }
        ensure!(fs::read(dir.join("copy"))? == noise(300_000, 9), "other content");
        Ok(())
    }),
    ("long_names", |dir| {
        let name = "n".repeat(255);
        fs::write(dir.join(&name), "long")?;
        ensure!(fs::read(dir.join(&name))? == b"long", "other content");
        io_fails_with(fs::write(dir.join("n".repeat(256)), ""), Errno::NAMETOOLONG)?;
        fs::remove_file(dir.join(name))?;
        use std::os::unix::ffi::OsStrExt;
        let odd = std::ffi::OsStr::from_bytes(b"\xff odd\n\x01name");
        fs::write(dir.join(odd), "odd")?;
        ensure!(fs::read(dir.join(odd))? == b"odd", "other content");
        Ok(())
    }),
    ("a_thousand_files", |dir| {
        fs::create_dir(dir.join("many"))?;
        for number in 0..1000 {
            fs::write(dir.join(format!("many/{number:04}")), format!("{number}"))?;
        }
        let mut names = Vec::new();
        for entry in fs::read_dir(dir.join("many"))? {
            let entry = entry?;
            ensure!(entry.file_type()?.is_file(), "{:?} is no file", entry.file_name());
            names.push(entry.file_name().into_string().ok().context("a name")?);
        }
        names.sort();
        ensure!(names.len() == 1000, "{} names", names.len());
        let all = (0..1000).all(|number| names[number] == format!("{number:04}"));
        ensure!(all, "not the names that were made");
        Ok(())
    }),
    ("removed_while_listed", |dir| {
        for entry in fs::read_dir(dir.join("many"))? {
            let entry = entry?;
            if entry.file_name() != "0000" {
                fs::remove_file(entry.path())?;
            }
        }
        let left = fs::read_dir(dir.join("many"))?.count();
        ensure!(left == 1, "{left} are left");
        Ok(())
    }),
    ("parallel_writers", |dir| {
        let writers: Vec<_> = (0..4u64)
            .map(|number| {
                let path = dir.join(format!("parallel{number}"));
                std::thread::spawn(move || -> Result<()> {
                    let data = noise(200_000, number);
                    let mut file = File::create(&path)?;
                    for chunk in data.chunks(7919) {
                        file.write_all(chunk)?;
                    }
                    ensure!(fs::read(&path)? == data, "other content");
                    Ok(())
                })
            })
            .collect();
        for writer in writers {
            writer.join().ok().context("a writer")??;
        }
        Ok(())
    }),
];

/// Does all operations in `dir`, each on files of its own as far as it goes.
pub fn everything(dir: &Path) -> Result<()> {
    for (name, operation) in OPERATIONS {
        report(name, operation(dir));
    }
    println!("operations={}", OPERATIONS.len());
    Ok(())
}

/// Locks between two open files of one guest.
pub fn locks(dir: &Path) -> Result<()> {
    let path = dir.join("locked");
    fs::write(&path, "x")?;
    report(
        "flock",
        (|| {
            let (one, two) = (File::open(&path)?, File::open(&path)?);
            sys::flock(&one, FlockOperation::NonBlockingLockExclusive)?;
            fails_with(sys::flock(&two, FlockOperation::NonBlockingLockShared), Errno::AGAIN)?;
            sys::flock(&one, FlockOperation::Unlock)?;
            sys::flock(&two, FlockOperation::NonBlockingLockShared)?;
            Ok(())
        })(),
    );
    report(
        "record_lock",
        (|| {
            let file = OpenOptions::new().read(true).write(true).open(&path)?;
            sys::fcntl_lock(&file, FlockOperation::NonBlockingLockExclusive)?;
            sys::fcntl_lock(&file, FlockOperation::Unlock)?;
            Ok(())
        })(),
    );
    Ok(())
}

/// Everything that changes something, in a directory that does not allow it: the file `file` is there.
pub fn refused(dir: &Path) -> Result<()> {
    let file = dir.join("file");
    let attempts: [Operation; 11] = [
        ("write", |file| io_fails_with(OpenOptions::new().write(true).open(file), Errno::ROFS)),
        ("truncate", |file| {
            fails_with(sys::open(file, OFlags::RDONLY | OFlags::TRUNC, Mode::empty()), Errno::ROFS)
        }),
        ("create", |file| io_fails_with(File::create_new(file.with_file_name("new")), Errno::ROFS)),
        ("mkdir", |file| io_fails_with(fs::create_dir(file.with_file_name("new")), Errno::ROFS)),
        ("unlink", |file| io_fails_with(fs::remove_file(file), Errno::ROFS)),
        ("rename", |file| io_fails_with(fs::rename(file, file.with_file_name("new")), Errno::ROFS)),
        ("link", |file| {
            io_fails_with(fs::hard_link(file, file.with_file_name("new")), Errno::ROFS)
        }),
        ("symlink", |file| io_fails_with(symlink("x", file.with_file_name("new")), Errno::ROFS)),
        ("chmod", |file| {
            io_fails_with(fs::set_permissions(file, fs::Permissions::from_mode(0o777)), Errno::ROFS)
        }),
        ("utimes", |file| {
            let now = Timespec { tv_sec: 0, tv_nsec: sys::UTIME_NOW };
            let times = Timestamps { last_access: now, last_modification: now };
            fails_with(sys::utimensat(CWD, file, &times, AtFlags::empty()), Errno::ROFS)
        }),
        ("setxattr", |file| {
            fails_with(sys::setxattr(file, "user.x", b"x", XattrFlags::empty()), Errno::ROFS)
        }),
    ];
    for (name, attempt) in attempts {
        report(name, attempt(&file));
    }
    Ok(())
}

/// Writes `size` bytes of noise to `file` in large pieces, as the host can compute them too.
pub fn write_noise(size: &str, file: &Path) -> Result<()> {
    const PIECE: usize = 1 << 20;
    let size: usize = size.parse().context("a size")?;
    let mut file = File::create(file)?;
    let piece = noise(PIECE, 77);
    for at in (0..size).step_by(PIECE) {
        file.write_all(&piece[..PIECE.min(size - at)])?;
    }
    Ok(())
}
