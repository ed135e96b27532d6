//! Oriel beside QEMU with virtiofsd, virtio-9p, a disk image, and alioth: `tests/bench`.
//!
//! This program starts itself once more with `--inside` where KVM can run guests (`tests/with-kvm`), reads what that
//! one measures, shows it as it comes, and writes the report.
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a measurement that cannot be made ends the program"
)]

mod events;
mod input;
mod inside;
mod jobs;
mod report;
mod results;
mod systems;
mod table;
mod trace;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use indicatif::{ProgressBar, ProgressStyle};

use crate::events::Event;
use crate::inside::Order;
use crate::jobs::Job;
use crate::results::Results;
use crate::systems::{SYSTEMS, System};

/// Measures Oriel beside QEMU with virtiofsd, virtio-9p, a disk image, and alioth.
#[derive(Debug, Parser)]
#[command(name = "tests/bench", version)]
struct Arguments {
    /// What to measure: metadata, data, mmap, boot, or a job by its name; everything without
    what: Vec<String>,

    /// The systems, separated by commas; all without
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    systems: Vec<String>,

    /// How often each system is started; figures are medians
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=100))]
    rounds: u16,

    /// How long a job that goes on by itself goes on, in milliseconds
    #[arg(long, default_value_t = 700, value_name = "MS", value_parser = clap::value_parser!(u64).range(50..=60_000))]
    milliseconds: u64,

    /// Instead of measuring, tell where the time of an operation goes: the guest, KVM, the VMM, the server. Without jobs
    /// and systems, those that are held against a bar and missed it
    #[arg(long)]
    profile: bool,

    /// Where to write the figures as JSON
    #[arg(long, default_value = "target/bench/bench.json", value_name = "FILE")]
    json: PathBuf,

    /// Where to write the report
    #[arg(long, default_value = "target/bench/bench.html", value_name = "FILE")]
    html: PathBuf,

    /// List systems and jobs, and exit
    #[arg(long)]
    list: bool,

    #[arg(long, hide = true)]
    inside: bool,

    /// The directory with the programs and the kernel
    #[arg(long, hide = true, default_value = ".")]
    programs: PathBuf,
}

/// What `--profile` looks at unless it is told otherwise.
const PROFILED: &[&str] = &["boot", "stat-miss", "create", "unlink", "randread-direct"];
const PROFILED_SYSTEMS: &[&str] = &["oriel", "oriel-never", "virtiofsd"];

fn order(arguments: &Arguments) -> Result<Order> {
    let mut systems = Vec::new();
    let or = |given: &[String], others: &[&str]| match given.is_empty() && arguments.profile {
        true => others.iter().map(|name| (*name).to_owned()).collect(),
        false => given.to_vec(),
    };
    let what = or(&arguments.what, PROFILED);
    for name in &or(&arguments.systems, PROFILED_SYSTEMS) {
        let names: Vec<&str> = SYSTEMS.iter().map(|system| system.name).collect();
        let system = System::named(name)
            .with_context(|| format!("--systems {name}: there are {}", names.join(", ")))?;
        systems.push(system);
    }
    if systems.is_empty() {
        systems.extend(SYSTEMS);
    }
    let all = jobs::all();
    for what in &what {
        let known = what == "boot" || all.iter().any(|job| job.group == what || job.name == what);
        ensure!(known, "{what} is no job; `tests/bench --list` shows them");
    }
    let wanted = |word: &str| what.iter().any(|what| what == word);
    let everything = what.is_empty();
    Ok(Order {
        systems,
        jobs: all
            .into_iter()
            .filter(|job| everything || wanted(job.group) || wanted(job.name))
            .collect(),
        rounds: if arguments.profile { 1 } else { arguments.rounds.into() },
        profile: arguments.profile,
        // What the request and the answer take on a serial line is to vanish beside it.
        milliseconds: arguments.milliseconds.max(if arguments.profile { 3000 } else { 0 }),
        boots: everything || wanted("boot"),
    })
}

fn list() {
    println!("Systems:");
    for system in SYSTEMS {
        println!("  {:18} {}", system.name, system.about);
    }
    println!("Jobs:");
    println!("  {:18} {:9} exec to the guest's first program, and to the end", "boot", "");
    for job in jobs::all() {
        println!("  {:18} {:9} {}", job.name, job.group, job.about);
    }
}

/// A line above the bar; where there is no terminal, the line alone.
fn say(progress: &ProgressBar, line: &str) {
    progress.suspend(|| eprintln!("{line}"));
}

/// Runs the other half, and takes what it says.
fn follow(order: &Order) -> Result<Results> {
    let this = std::env::current_exe()?;
    let mut child = Command::new("tests/with-kvm")
        .arg(this)
        .arg("--inside")
        .args(std::env::args_os().skip(1))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("tests/with-kvm")?;
    let style = ProgressStyle::with_template("{elapsed_precise} {wide_bar} {pos}/{len} {msg}")?;
    let per_round: usize = order.systems.len();
    let progress = ProgressBar::new((per_round * order.rounds) as u64).with_style(style);
    let mut results = Results::default();
    let mut shown: Vec<String> = Vec::new();
    for line in BufReader::new(child.stdout.take().context("a pipe")?).lines() {
        let line = line?;
        let Ok(event) = serde_json::from_str::<Event>(&line) else {
            say(&progress, &line);
            continue;
        };
        match &event {
            Event::Measured((round, system, job), figure) => {
                progress.set_message(format!("round {}: {system} {job}", round + 1));
                shown.push(format!("{job} {}", table::figure(job, figure.nanoseconds)));
            }
            Event::Profiled((round, system, job), _) => {
                progress.set_message(format!("round {}: {system} {job}", round + 1));
            }
            Event::Missed((_, system, job), why) => {
                say(&progress, &format!("{system} {job}: {why}"))
            }
            Event::Finished(round, system) => {
                say(&progress, &format!("round {} {system}: {}", round + 1, shown.join(", ")));
                shown.clear();
                progress.inc(1);
            }
            Event::Machine(_) | Event::Command(..) => {}
        }
        results.take(event);
    }
    progress.finish_and_clear();
    let status = child.wait()?;
    ensure!(status.success(), "the part that runs guests ended with {status}");
    Ok(results)
}

fn write(path: &PathBuf, text: &str) -> Result<()> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory)?;
    }
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

fn run(arguments: &Arguments) -> Result<bool> {
    let order = order(arguments)?;
    if arguments.list {
        list();
        return Ok(true);
    }
    if arguments.inside {
        inside::run_all(&order, &arguments.programs)?;
        return Ok(true);
    }
    eprintln!("bench: making what is shared");
    input::prepare(&arguments.programs)?;
    let results = follow(&order)?;
    if order.profile {
        for (job, profiles) in &results.profiles {
            println!("{}\n", table::profile(job, profiles));
        }
        return Ok(!results.profiles.is_empty());
    }
    let names: Vec<&str> = order.systems.iter().map(|system| system.name).collect();
    let jobs: Vec<&str> = ["boot", "run-true"]
        .into_iter()
        .chain(order.jobs.iter().map(|job: &Job| job.name))
        .chain(["memory"])
        .filter(|job| names.iter().any(|system| results.time(system, job).is_some()))
        .collect();
    if jobs.is_empty() {
        bail!("nothing was measured");
    }
    println!("{}", table::medians(&results, &jobs, &names));
    let bars = results.bars();
    println!("{}", table::bars(&bars));
    let systems: Vec<(&str, &str)> =
        order.systems.iter().map(|system| (system.name, system.about)).collect();
    write(&arguments.json, &serde_json::to_string_pretty(&results)?)?;
    write(
        &arguments.html,
        &report::html(&results, &order.jobs, &systems, order.rounds, "tests/bench")?,
    )?;
    println!("{} and {}", arguments.json.display(), arguments.html.display());
    Ok(bars.iter().all(|bar| bar.holds))
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        // A bar was missed.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::from(2)
        }
    }
}
