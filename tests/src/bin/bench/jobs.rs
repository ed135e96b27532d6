//! What is measured in each system.

use integration::jobs::{FIO, Work};

use crate::systems::{System, WINDOW};

/// The file that fits the window, in MiB, and the one four times as large as the window.
pub const FILE: usize = WINDOW / 2;
pub const BIG: usize = WINDOW * 4;
/// Numbered files in the directory whose names are looked at, and in the one that is listed.
pub const NAMES: u64 = 10_000;
pub const LISTED: u64 = 10_000;

/// What looks for changes in the repository. It looks at times and sizes only, for all else is another in each system; and
/// it leaves the index as it is, which would save the next one work.
pub const STATUS: &str = "git -C repository -c safe.directory=* -c core.fsmonitor=false -c core.checkStat=minimal \
     -c core.trustctime=false --no-optional-locks status -s --no-renames";

/// A measurement.
#[derive(Clone, Debug)]
pub struct Job {
    /// Its name in tables and on the command line.
    pub name: &'static str,
    /// What it does.
    pub about: &'static str,
    /// Its group on the command line.
    pub group: &'static str,
    /// What is done before, and not measured.
    pub before: Vec<Work>,
    /// What is measured.
    pub work: Work,
    /// In which directory of the guest, other than the shared one.
    pub directory: Option<&'static str>,
}

fn fio(name: &str, megabytes: usize, options: &str) -> Work {
    let mut words = vec![format!("--filename={name}"), format!("--size={megabytes}m")];
    words.extend(options.split_whitespace().map(|word| format!("--{word}")));
    Work::Fio(words)
}

/// All of them, in the order in which they run in a guest.
pub fn all() -> Vec<Job> {
    let mut jobs = Vec::new();
    let mut add = |group, name, about, before: Vec<Work>, work| {
        jobs.push(Job { name, about, group, before, work, directory: None });
    };
    let warm = || vec![Work::Read("file".into()), Work::Read("file".into())];
    let file = |options| fio("file", FILE, options);

    add(
        "metadata",
        "stat-miss",
        "stat(2) of names never looked at",
        vec![],
        Work::StatMiss("names".into()),
    );
    add("metadata", "stat-hit", "stat(2) of one name", vec![], Work::StatHit("file".into()));
    add("metadata", "create", "create, write 1 KiB, close", vec![], Work::Create(100_000));
    add("metadata", "rename", "rename(2) in a directory", vec![], Work::Rename);
    add("metadata", "unlink", "unlink(2)", vec![], Work::Unlink);
    add(
        "metadata",
        "readdir",
        "a name of a directory of 10,000",
        vec![Work::Drop],
        Work::List("listed".into()),
    );
    let status: Vec<String> = STATUS.split_whitespace().map(str::to_owned).collect();
    add(
        "metadata",
        "git-status",
        "git status of 500 files, with all caches dropped",
        vec![Work::Drop],
        Work::Run(status),
    );
    add(
        "metadata",
        "untar",
        "a small file out of an archive",
        vec![],
        Work::Unpack("small.tar".into()),
    );

    add(
        "data",
        "seeds-read",
        "the first report's job: fio -rw=read -bs=4k -ioengine=psync -iodepth=1",
        vec![],
        file("rw=read bs=4k ioengine=psync iodepth=1"),
    );
    add(
        "data",
        "seeds-write",
        "its other: fio -direct=1 -rw=write -bs=1M -ioengine=psync",
        vec![],
        file("direct=1 rw=write bs=1M iodepth=1 ioengine=psync"),
    );
    add(
        "data",
        "read-1m-direct",
        "1 MiB in order, O_DIRECT",
        vec![],
        file("direct=1 rw=read bs=1M ioengine=psync"),
    );
    add(
        "data",
        "randread-direct",
        "4 KiB at random, O_DIRECT",
        vec![],
        file("direct=1 rw=randread bs=4k ioengine=psync norandommap"),
    );
    add(
        "data",
        "randwrite-direct",
        "4 KiB at random, O_DIRECT",
        vec![],
        file("direct=1 rw=randwrite bs=4k ioengine=psync norandommap"),
    );
    add(
        "data",
        "libaio-16-read",
        "4 KiB at random, O_DIRECT, 16 at once",
        vec![],
        file("direct=1 rw=randread bs=4k ioengine=libaio iodepth=16 norandommap"),
    );
    add(
        "data",
        "libaio-16-write",
        "4 KiB at random, O_DIRECT, 16 at once",
        vec![],
        file("direct=1 rw=randwrite bs=4k ioengine=libaio iodepth=16 norandommap"),
    );
    add(
        "data",
        "randread-4-jobs",
        "4 KiB at random, O_DIRECT, four threads",
        vec![],
        file("direct=1 rw=randread bs=4k ioengine=psync norandommap numjobs=4"),
    );
    add(
        "data",
        "randread-warm",
        "4 KiB at random from a file that was read",
        warm(),
        file("rw=randread bs=4k ioengine=psync norandommap"),
    );
    add(
        "data",
        "randwrite",
        "4 KiB at random",
        warm(),
        file("rw=randwrite bs=4k ioengine=psync norandommap"),
    );
    add(
        "data",
        "oversubscribed",
        "4 KiB at random from four times the window",
        vec![Work::Drop],
        fio("big", BIG, "rw=randread bs=4k ioengine=psync norandommap"),
    );

    add(
        "mmap",
        "mmap-randread",
        "fio's mmap engine, 4 KiB at random",
        warm(),
        file("rw=randread bs=4k ioengine=mmap norandommap"),
    );
    add(
        "mmap",
        "first-touch",
        "pages of a file, each for the first time, in order",
        vec![Work::Drop],
        Work::FirstTouch("file".into()),
    );
    add(
        "mmap",
        "second-touch",
        "pages of a mapped file, at random",
        vec![],
        Work::SecondTouch("file".into()),
    );

    // What the guest can do at best.
    jobs.push(Job {
        name: "tmpfs-randread",
        about: "as randread-warm, in the guest's tmpfs",
        group: "data",
        before: vec![Work::Fill("file".into(), FILE), Work::Read("file".into())],
        work: file("rw=randread bs=4k ioengine=psync norandommap"),
        directory: Some("/tmpfs"),
    });
    jobs.push(Job {
        name: "memory-touch",
        about: "as second-touch, of the guest's own memory",
        group: "mmap",
        before: vec![],
        work: Work::TouchMemory(FILE),
        directory: None,
    });
    jobs
}

impl Job {
    /// The command that it is, or else what `bench-guest` is asked to do.
    pub fn typed(&self) -> String {
        match &self.work {
            Work::Fio(options) => format!("fio {} {}", FIO.join(" "), options.join(" ")),
            Work::Run(words) => words.join(" "),
            other => serde_json::to_string(other).unwrap_or_default(),
        }
    }

    /// Whether it says anything of `system`.
    pub fn is_for(&self, system: &System) -> bool {
        // The guest's own memory is the same in all of them: one without a share's window is enough beside one with.
        match self.name {
            "tmpfs-randread" | "memory-touch" => {
                matches!(system.name, "oriel" | "oriel-never" | "virtiofsd")
            }
            _ => true,
        }
    }
}
