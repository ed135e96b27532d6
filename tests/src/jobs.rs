//! What `bench` asks of `bench-guest`: one line of JSON each way.

use serde::{Deserialize, Serialize};

/// What the line with an answer begins with: the console that carries it carries the kernel's messages too.
pub const ANSWER: &str = "@bench ";
/// What `bench-guest` says once the directory is mounted: the guest's first user instructions are behind it.
pub const READY: &str = "@bench ready";

/// What fio is always told. Threads, because a process each would need shared memory of the kernel's older kind.
pub const FIO: [&str; 7] = [
    "--name=bench",
    "--output-format=json",
    "--time_based",
    "--group_reporting",
    "--thread",
    "--invalidate=0",
    "--allow_file_create=0",
];

/// One thing to measure, in one directory.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Request {
    /// Where: a directory of the guest.
    pub directory: String,
    /// For how long, in milliseconds; what is counted goes on until then.
    pub milliseconds: u64,
    /// What.
    pub work: Work,
}

/// A kind of work. Files are those of [`Tree`](crate::Tree)s that `bench` makes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Work {
    /// fio, with these options more; operations are its I/Os.
    Fio(Vec<String>),
    /// The guest's caches are dropped, and dirty data written. An operation.
    Drop,
    /// A file is read from one end to the other. An operation is 1 MiB.
    Read(String),
    /// stat(2) of names that were never looked at, the numbered files of a directory.
    StatMiss(String),
    /// stat(2) of one name.
    StatHit(String),
    /// Files are made, 1 KiB is written to each, and closed; at most so many.
    Create(u64),
    /// One of them gets another name, and back.
    Rename,
    /// They are removed.
    Unlink,
    /// A directory is read with all its names; an operation is a name.
    List(String),
    /// A program with its arguments, in the directory; an operation is a run.
    Run(Vec<String>),
    /// An archive is unpacked, until all of it is; an operation is a file.
    Unpack(String),
    /// Each page of a file is touched once, in order, through a new mapping. An operation is a page.
    FirstTouch(String),
    /// Pages of a file all of whose pages were touched, at random, through that mapping.
    SecondTouch(String),
    /// The same of so many MiB of memory.
    TouchMemory(usize),
    /// So many MiB of a file are written, where it is not there yet.
    Fill(String, usize),
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// How much was done.
    Done {
        /// Operations, as [`Work`] counts them.
        operations: u64,
        /// How long they took.
        nanoseconds: u64,
    },
    /// Why not.
    Failed(String),
}

/// The name of a numbered file of a directory.
pub fn numbered(number: u64) -> String {
    format!("f{number:06}")
}
