//! The guest's side of `tests/bench`: the first program of every guest of the comparison, whatever machine that is,
//! and a process of the host for the figures of the host itself.
//!
//! It mounts what the kernel's command line says (`bench.type=`, `bench.source=`, `bench.options=`), answers one
//! request after the other, until the machine is ended. With `bench.exit` it powers off at once.

mod memory;
mod names;

use std::fs;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use integration::jobs::{ANSWER, Answer, FIO, READY, Request, Work};
use rustix::mount::{MountFlags, mount};

/// Where the guest's programs are.
const BIN: &str = "/bin";

/// What was done, and how long it took.
pub(crate) type Count = (u64, Duration);

/// Does `work` again and again until `limit`, and counts.
pub(crate) fn repeat(limit: Duration, mut work: impl FnMut(u64) -> Result<bool>) -> Result<Count> {
    // Looking at the clock costs as much as what hits a cache.
    const BETWEEN_LOOKS: u64 = 8;
    let start = Instant::now();
    let mut count = 0;
    while count % BETWEEN_LOOKS != 0 || start.elapsed() < limit {
        if !work(count)? {
            break;
        }
        count += 1;
    }
    Ok((count, start.elapsed()))
}

fn word(cmdline: &str, name: &str) -> Option<String> {
    cmdline
        .split_whitespace()
        .find_map(|word| Some(word.strip_prefix(name)?.strip_prefix('=')?.to_owned()))
}

/// What the first program of a machine does first.
fn set_up() -> Result<()> {
    let plain = MountFlags::empty();
    for (source, target) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/tmpfs")]
    {
        mount(source, target, source, plain, None).with_context(|| format!("mount {target}"))?;
    }
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    if cmdline.split_whitespace().any(|word| word == "bench.exit") {
        println!("{READY}");
        Command::new("/bin/true").status()?;
        power_off();
    }
    for module in fs::read_to_string("/modules/load-order").unwrap_or_default().lines() {
        let file = fs::File::open(Path::new("/modules").join(module))?;
        rustix::system::finit_module(&file, c"", 0).with_context(|| format!("load {module}"))?;
    }
    let (kind, source) = (word(&cmdline, "bench.type"), word(&cmdline, "bench.source"));
    let (kind, source) = (kind.context("bench.type=")?, source.context("bench.source=")?);
    let options = std::ffi::CString::new(word(&cmdline, "bench.options").unwrap_or_default())?;
    // A disk takes a moment to be found.
    let deadline = Instant::now() + Duration::from_secs(20);
    while source.starts_with('/') && !Path::new(&source).exists() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    mount(source.as_str(), "/t", kind.as_str(), plain, Some(options.as_c_str()))
        .with_context(|| format!("mount {source} as {kind}"))?;
    Ok(())
}

/// Lines as they are, and none of them twice.
fn make_raw() -> Result<()> {
    let terminal = std::io::stdin();
    if let Ok(mut modes) = rustix::termios::tcgetattr(&terminal) {
        modes.make_raw();
        rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &modes)?;
    }
    Ok(())
}

fn power_off() -> ! {
    rustix::fs::sync();
    let _ = rustix::system::reboot(rustix::system::RebootCommand::PowerOff);
    std::process::exit(0);
}

fn drop_caches() -> Result<()> {
    rustix::fs::sync();
    fs::write("/proc/sys/vm/drop_caches", "3").context("drop_caches")
}

fn program(words: &[String], directory: &Path) -> Result<Vec<u8>> {
    let (name, arguments) = words.split_first().context("a program")?;
    let output = Command::new(name)
        .args(arguments)
        .current_dir(directory)
        .env("PATH", format!("{BIN}:/usr/bin"))
        .env("HOME", "/")
        .output()
        .with_context(|| name.clone())?;
    let complaint = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(output.status.success(), "{name}: {}: {complaint}", output.status);
    Ok(output.stdout)
}

fn fio(options: &[String], directory: &Path, limit: Duration) -> Result<Count> {
    let name = if Path::new("/bin/fio").exists() { "/bin/fio" } else { "fio" };
    let mut words = vec![name.to_owned()];
    words.extend(FIO.map(str::to_owned));
    words.push(format!("--runtime={}ms", limit.as_millis()));
    words.extend_from_slice(options);
    let output = program(&words, directory)?;
    let text = String::from_utf8_lossy(&output);
    let json: serde_json::Value =
        serde_json::from_str(text.get(text.find('{').context("no JSON")?..).unwrap_or(""))?;
    let job = &json["jobs"][0];
    let sum = |name: &str| {
        job["read"][name].as_u64().unwrap_or(0) + job["write"][name].as_u64().unwrap_or(0)
    };
    let longest = job["read"]["runtime"].as_u64().max(job["write"]["runtime"].as_u64());
    Ok((sum("total_ios"), Duration::from_millis(longest.context("fio's runtime")?)))
}

fn read_all(path: &Path) -> Result<Count> {
    let file = fs::File::open(path)?;
    let mut buffer = vec![0; 1 << 20];
    let (start, mut at) = (Instant::now(), 0);
    loop {
        let count = std::os::unix::fs::FileExt::read_at(&file, &mut buffer, at)?;
        if count == 0 {
            return Ok((at >> 20, start.elapsed()));
        }
        at += count as u64;
    }
}

fn fill(path: &Path, mebibytes: usize) -> Result<Count> {
    let (start, size) = (Instant::now(), mebibytes << 20);
    if fs::metadata(path).is_ok_and(|metadata| metadata.len() == size as u64) {
        return Ok((1, start.elapsed()));
    }
    let mut file = fs::File::create(path)?;
    for _ in 0..mebibytes {
        file.write_all(&vec![0x5a; 1 << 20])?;
    }
    Ok((mebibytes as u64, start.elapsed()))
}

fn answer(request: &Request) -> Result<Count> {
    let directory = PathBuf::from(&request.directory);
    let limit = Duration::from_millis(request.milliseconds);
    match &request.work {
        Work::Fio(options) => fio(options, &directory, limit),
        Work::Drop => {
            let start = Instant::now();
            drop_caches()?;
            Ok((1, start.elapsed()))
        }
        Work::Read(name) => read_all(&directory.join(name)),
        Work::StatMiss(name) => names::stat_all(&directory.join(name), limit),
        Work::StatHit(name) => names::stat_one(&directory.join(name), limit),
        Work::Create(most) => names::create(&directory, *most, limit),
        Work::Rename => names::rename(&directory, limit),
        Work::Unlink => names::unlink(&directory, limit),
        Work::List(name) => names::list(&directory.join(name), limit),
        Work::Run(words) => repeat(limit, |_| program(words, &directory).map(|_| true)),
        Work::Unpack(archive) => names::unpack(&directory, archive),
        Work::FirstTouch(name) => memory::first_touch(&directory.join(name)),
        Work::SecondTouch(name) => memory::second_touch(&directory.join(name), limit),
        Work::TouchMemory(mebibytes) => memory::touch_memory(*mebibytes, limit),
        Work::Fill(name, mebibytes) => fill(&directory.join(name), *mebibytes),
    }
}

fn serve() -> Result<()> {
    println!("{READY}");
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let answer = match serde_json::from_str(&line)
            .context("a request")
            .and_then(|request| answer(&request))
        {
            Ok((operations, time)) => {
                Answer::Done { operations, nanoseconds: time.as_nanos() as u64 }
            }
            Err(error) => Answer::Failed(format!("{error:#}").replace('\n', " ")),
        };
        let mut output = std::io::stdout().lock();
        writeln!(output, "{ANSWER}{}", serde_json::to_string(&answer)?)?;
        output.flush()?;
    }
    Ok(())
}

fn main() -> Result<()> {
    if !rustix::process::getpid().is_init() {
        return match std::env::args().nth(1).as_deref() {
            Some("serve") => serve(),
            _ => bail!(
                "bench-guest is the first program of a guest of tests/bench, or, with `serve`, a process"
            ),
        };
    }
    if let Err(error) = set_up().and_then(|()| make_raw()).and_then(|()| serve()) {
        let failed = Answer::Failed(format!("{error:#}"));
        println!("{ANSWER}{}", serde_json::to_string(&failed)?);
    }
    power_off()
}
