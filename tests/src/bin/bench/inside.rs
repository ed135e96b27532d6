//! Where KVM can run guests: makes what is shared, starts one system after the other, asks for one job after the
//! other, and tells what came of it on standard output, an [`Event`] a line.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use integration::jobs::{ANSWER, Answer, READY, Request};

use crate::events::{Event, Figure};
use crate::input;
use crate::jobs::Job;
use crate::systems::{MEMORY, Parts, System};
use crate::trace::{Profile, Tracing, Who, account};

/// A guest that says nothing for so long is given up.
const PATIENCE: Duration = Duration::from_secs(90);

/// What is to be done.
#[derive(Debug)]
pub struct Order {
    pub systems: Vec<&'static System>,
    pub jobs: Vec<Job>,
    pub rounds: usize,
    pub milliseconds: u64,
    /// Whether to measure boots.
    pub boots: bool,
    /// Whether to trace, and tell where the time goes, instead of measuring it.
    pub profile: bool,
}

fn tell(event: &Event) {
    let mut output = std::io::stdout().lock();
    // Who listens has gone away: the next write to it ends this program.
    let _ = serde_json::to_writer(&mut output, event).map(|()| output.write_all(b"\n"));
    let _ = output.flush();
}

/// Puts what was prepared where it is quick and can be written: into memory.
fn lay_out(programs: &Path, work: &Path) -> Result<Parts> {
    let this = std::env::current_exe()?;
    let input = programs.join(input::DIRECTORY);
    let at = |path: PathBuf| path.display().to_string();
    let tree = work.join("tree");
    fs::create_dir(&tree)?;
    input::run(&["tar", "-xf", &at(input.join("tree.tar")), "-C", &at(tree.clone())])?;
    for name in ["base.qcow2", "jobs.cpio", "true.cpio"] {
        fs::copy(input.join(name), work.join(name)).with_context(|| name.to_owned())?;
    }
    fs::copy(programs.join("kernel/vmlinux"), work.join("vmlinux")).context("kernel")?;
    // A snapshot in front of the disk, which takes the writes.
    let (base, disk) = (at(work.join("base.qcow2")), at(work.join("disk.qcow2")));
    input::run(&["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &base, &disk])?;
    Ok(Parts {
        programs: programs.to_owned(),
        guest: at(this.with_file_name("bench-guest")),
        oriel: at(this.with_file_name("oriel")),
        kernel: at(work.join("vmlinux")),
        initrd: at(work.join("jobs.cpio")),
        initrd_of_true: at(work.join("true.cpio")),
        tree: at(tree),
        work: work.to_owned(),
    })
}

/// A system that runs. It ends with this.
struct Running {
    machine: Child,
    helper: Option<Child>,
    input: File,
    lines: Receiver<String>,
    shares_console: bool,
}

/// Starts a program, with its complaints in a file.
fn spawn(line: &[String], log: &Path, console: impl Fn() -> Result<Stdio>) -> Result<Child> {
    let (program, arguments) = line.split_first().context("a command")?;
    let log = File::options().create(true).append(true).open(log)?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(console()?).stdout(console()?).stderr(log);
    command.spawn().with_context(|| program.clone())
}

/// Starts a machine on a terminal, which some insist on, and returns the other end.
fn spawn_on_terminal(line: &[String], log: &Path) -> Result<(Child, File)> {
    let (host, terminal) = integration::open_terminal()?;
    let mut modes = rustix::termios::tcgetattr(&terminal)?;
    modes.make_raw();
    rustix::termios::tcsetattr(&terminal, rustix::termios::OptionalActions::Now, &modes)?;
    let child = spawn(line, log, || Ok(terminal.try_clone()?.into()))?;
    Ok((child, host))
}

impl Running {
    fn start(system: &System, parts: &Parts) -> Result<(Self, Duration)> {
        let commands = system.commands(parts);
        let log = parts.work.join(format!("{}.log", system.name));
        let mut helper = None;
        if let Some((line, file)) = &commands.helper {
            let _ = fs::remove_file(file);
            helper = Some(spawn(line, &log, || Ok(Stdio::null()))?);
            let deadline = Instant::now() + PATIENCE;
            while !file.exists() {
                ensure!(Instant::now() < deadline, "{} does not appear", file.display());
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        let start = Instant::now();
        let (machine, input) = spawn_on_terminal(&commands.machine, &log)?;
        let output = input.try_clone()?;
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut reader = BufReader::new(output);
            let mut line = Vec::new();
            while reader.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                    break;
                }
                line.clear();
            }
        });
        let mut running = Self { machine, helper, input, lines, shares_console: !system.is_host() };
        running.wait_for(READY)?;
        Ok((running, start.elapsed()))
    }

    /// The rest of the first line with `mark` in it.
    fn wait_for(&mut self, mark: &str) -> Result<String> {
        let mut seen = Vec::new();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if let Some(at) = line.find(mark) {
                        return Ok(line[at + mark.len()..].to_owned());
                    }
                    if let Some(at) = line.find(ANSWER) {
                        bail!("{}", &line[at + ANSWER.len()..]);
                    }
                    seen.push(line);
                }
                Err(RecvTimeoutError::Timeout) => {
                    bail!("no answer; its console ends with {:?}", tail(&seen))
                }
                Err(RecvTimeoutError::Disconnected) => {
                    bail!("it ended; its console ends with {:?}", tail(&seen))
                }
            }
        }
    }

    fn ask(&mut self, request: &Request) -> Result<(u64, u64)> {
        let line = serde_json::to_string(request)? + "\n";
        // A serial port has room for 16 bytes, and not every machine waits for the guest to read them.
        for part in line.as_bytes().chunks(8) {
            self.input.write_all(part)?;
            if self.shares_console {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        let answer = self.wait_for(ANSWER)?;
        match serde_json::from_str(&answer).with_context(|| format!("its answer {answer:?}"))? {
            Answer::Done { operations, nanoseconds } => Ok((operations, nanoseconds)),
            Answer::Failed(why) => bail!("{why}"),
        }
    }

    /// The machine, the helper, and what they started: virtiofsd works in a process of its own.
    fn processes(&self) -> Vec<u32> {
        let roots = [Some(&self.machine), self.helper.as_ref()];
        roots.into_iter().flatten().flat_map(|root| family(root.id())).collect()
    }

    /// The threads of each.
    fn threads(&self) -> Vec<(u32, Who)> {
        let machine = family(self.machine.id()).into_iter().map(|process| (process, Who::Machine));
        let server = self.helper.iter().flat_map(|helper| family(helper.id()));
        let of = |(process, who)| {
            let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten();
            let number = |task: fs::DirEntry| task.file_name().to_str()?.parse().ok();
            tasks.flatten().filter_map(move |task| Some((number(task)?, who)))
        };
        machine.chain(server.map(|process| (process, Who::Server))).flat_map(of).collect()
    }

    /// Nanoseconds that all their threads ran.
    fn cpu(&self) -> u64 {
        self.processes().into_iter().filter_map(cpu_of).sum()
    }

    fn exits(&self) -> Option<u64> {
        let name = format!("{}-", self.machine.id());
        let entry = fs::read_dir("/sys/kernel/debug/kvm")
            .ok()?
            .flatten()
            .find(|entry| entry.file_name().to_string_lossy().starts_with(&name))?;
        fs::read_to_string(entry.path().join("exits")).ok()?.trim().parse().ok()
    }

    /// KiB of memory of its processes, but the guest's memory, the window and what is mapped into it.
    fn memory(&self) -> u64 {
        self.processes().into_iter().filter_map(memory_of).sum()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for child in [Some(&mut self.machine), self.helper.as_mut()].into_iter().flatten() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn tail(lines: &[String]) -> String {
    lines[lines.len().saturating_sub(3)..].join(" | ")
}

/// A process and all that it started.
fn family(root: u32) -> Vec<u32> {
    let (mut all, mut at) = (vec![root], 0);
    while let Some(process) = all.get(at).copied() {
        all.extend(children_of(process));
        at += 1;
    }
    all
}

fn children_of(process: u32) -> Vec<u32> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let texts = tasks.filter_map(|task| fs::read_to_string(task.path().join("children")).ok());
    texts
        .flat_map(|text| {
            text.split_whitespace().filter_map(|word| word.parse().ok()).collect::<Vec<_>>()
        })
        .collect()
}

fn cpu_of(process: u32) -> Option<u64> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).ok()?;
    // The first word is the time on a processor in nanoseconds (Documentation/scheduler/sched-stats.rst).
    let one = |path: PathBuf| -> Option<u64> {
        fs::read_to_string(path.join("schedstat")).ok()?.split(' ').next()?.parse().ok()
    };
    Some(tasks.flatten().filter_map(|task| one(task.path())).sum())
}

fn memory_of(process: u32) -> Option<u64> {
    let text = fs::read_to_string(format!("/proc/{process}/smaps")).ok()?;
    let (mut sum, mut counts) = (0, true);
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words[..] {
            ["Size:", size, ..] => counts &= size.parse::<u64>().ok()? < (32 << 10),
            ["Pss:", size, ..] if counts => sum += size.parse::<u64>().ok()?,
            // A mapping's first line: addresses, access, offset, device, inode, and a path if it has one. What is mapped
            // into a window is shared with the file.
            [range, access, ..] if range.contains('-') && access.len() == 4 => {
                counts = !access.ends_with('s');
            }
            _ => {}
        }
    }
    Some(sum)
}

/// Has done what comes before a job, and returns what is to be asked for then.
fn prepare(
    running: &mut Running,
    job: &Job,
    directory: &str,
    milliseconds: u64,
) -> Result<Request> {
    let directory = job.directory.unwrap_or(directory).to_owned();
    for work in &job.before {
        running.ask(&Request { directory: directory.clone(), milliseconds, work: work.clone() })?;
    }
    Ok(Request { directory, milliseconds, work: job.work.clone() })
}

/// Where the time of one job in one system goes.
fn profile(
    running: &mut Running,
    job: &Job,
    directory: &str,
    milliseconds: u64,
) -> Result<Profile> {
    let request = prepare(running, job, directory, milliseconds)?;
    let members = running.threads();
    let tracing = Tracing::start()?;
    let (operations, _) = running.ask(&request)?;
    ensure!(operations > 0, "nothing was done");
    Ok(account(&tracing.end()?, &members, operations as f64))
}

/// Figures of one job in one system.
fn measure(running: &mut Running, job: &Job, directory: &str, milliseconds: u64) -> Result<Figure> {
    let request = prepare(running, job, directory, milliseconds)?;
    let (cpu, exits) = (running.cpu(), running.exits());
    let (operations, nanoseconds) = running.ask(&request)?;
    ensure!(operations > 0, "nothing was done");
    let each = |total: u64| total as f64 / operations as f64;
    Ok(Figure {
        nanoseconds: each(nanoseconds),
        cpu: each(running.cpu().saturating_sub(cpu)),
        exits: exits.zip(running.exits()).map(|(before, after)| each(after - before)),
    })
}

/// Runs a guest from its start to its end: when it was ready, when it had ended, and its process.
fn run_to_end(line: &[String], log: &Path) -> Result<(Duration, Duration, u32)> {
    let start = Instant::now();
    let (mut child, output) = spawn_on_terminal(line, log)?;
    let mut ready = None;
    // It ends with an error, as terminals do whose other end is closed.
    for text in BufReader::new(output).split(b'\n').map_while(Result::ok) {
        if ready.is_none() && String::from_utf8_lossy(&text).contains(READY) {
            ready = Some(start.elapsed());
        }
    }
    child.wait()?;
    Ok((ready.context("the guest did not start")?, start.elapsed(), child.id()))
}

fn boot(system: &System, order: &Order, parts: &Parts, round: usize) {
    let Some(line) = system.run_true(parts) else { return };
    let log = parts.work.join("true.log");
    let name = |job: &str| (round, system.name.to_owned(), job.to_owned());
    let missed = |error: anyhow::Error| tell(&Event::Missed(name("boot"), format!("{error:#}")));
    if order.profile {
        let traced = || -> Result<Profile> {
            let tracing = Tracing::start()?;
            let (_, _, process) = run_to_end(&line, &log)?;
            Ok(account(&tracing.end()?, &[(process, Who::Machine)], 1.0))
        };
        return match traced() {
            Ok(profile) => tell(&Event::Profiled(name("run-true"), profile)),
            Err(error) => missed(error),
        };
    }
    let figure =
        |time: Duration| Figure { nanoseconds: time.as_nanos() as f64, cpu: 0.0, exits: None };
    match run_to_end(&line, &log) {
        Ok((ready, end, _)) => {
            tell(&Event::Measured(name("boot"), figure(ready)));
            tell(&Event::Measured(name("run-true"), figure(end)));
        }
        Err(error) => missed(error),
    }
}

fn one_round(system: &System, order: &Order, parts: &Parts, round: usize) {
    let name = |job: &str| (round, system.name.to_owned(), job.to_owned());
    if order.boots {
        boot(system, order, parts, round);
    }
    if order.jobs.is_empty() {
        return;
    }
    let mut running = match Running::start(system, parts) {
        Ok((running, _)) => running,
        Err(error) => {
            let log = fs::read_to_string(parts.work.join(format!("{}.log", system.name)));
            let last = log.unwrap_or_default().lines().last().unwrap_or("").to_owned();
            return tell(&Event::Missed(name("start"), format!("{error:#}; it says {last:?}")));
        }
    };
    let directory = if system.is_host() { parts.tree.as_str() } else { "/t" };
    for job in order.jobs.iter().filter(|job| job.is_for(system)) {
        let running = &mut running;
        let event = match order.profile {
            true => profile(running, job, directory, order.milliseconds)
                .map(|profile| Event::Profiled(name(job.name), profile)),
            false => measure(running, job, directory, order.milliseconds)
                .map(|figure| Event::Measured(name(job.name), figure)),
        };
        match event {
            Ok(event) => tell(&event),
            Err(error) => {
                tell(&Event::Missed(name(job.name), format!("{error:#}")));
                if running.machine.try_wait().is_ok_and(|ended| ended.is_some()) {
                    break;
                }
            }
        }
    }
    let memory = running.memory() as f64;
    if !system.is_host() && memory > 0.0 {
        tell(&Event::Measured(
            name("memory"),
            Figure { nanoseconds: memory, cpu: 0.0, exits: None },
        ));
    }
    // What is left behind by a job that failed.
    for left in ["work", "unpacked"] {
        let _ = fs::remove_dir_all(Path::new(&parts.tree).join(left));
    }
}

/// A command line as a shell takes it.
fn typed(line: &[String]) -> String {
    let plain = |word: &String| {
        !word.is_empty()
            && word.chars().all(|one| one.is_ascii_alphanumeric() || "-_=./:,+@%".contains(one))
    };
    let quoted = |word: &String| match plain(word) {
        true => word.clone(),
        false => format!("'{}'", word.replace('\'', "'\\''")),
    };
    line.iter().map(quoted).collect::<Vec<_>>().join(" ")
}

fn first_line(program: impl AsRef<OsStr>, argument: &str) -> String {
    let output = Command::new(program).arg(argument).output();
    let text = output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    text.lines().next().unwrap_or("").to_owned()
}

/// Does what `order` says.
pub fn run_all(order: &Order, programs: &Path) -> Result<()> {
    let work = tempfile::Builder::new().prefix("oriel-bench").tempdir()?;
    let parts = lay_out(programs, work.path())?;
    let model = fs::read_to_string("/proc/cpuinfo")?;
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(':').nth(1).map(str::trim));
    tell(&Event::Machine(vec![
        ("processor".into(), model.unwrap_or("unknown").into()),
        ("processors".into(), std::thread::available_parallelism()?.to_string()),
        ("kernel".into(), rustix::system::uname().release().to_string_lossy().into_owned()),
        (
            "guest's kernel".into(),
            fs::read_to_string(programs.join("kernel/version"))?.trim().into(),
        ),
        ("guest's memory".into(), format!("{MEMORY} MiB")),
        ("QEMU".into(), first_line("qemu-system-x86_64", "--version")),
        ("virtiofsd".into(), first_line(programs.join("virtiofsd"), "--version")),
        ("alioth".into(), first_line(programs.join("alioth"), "--version")),
        ("fio".into(), first_line(programs.join("fio"), "--version")),
        ("files".into(), "on a tmpfs".into()),
    ]));
    for system in &order.systems {
        let commands = system.commands(&parts);
        let helper = commands.helper.map(|(line, _)| line);
        for line in helper.into_iter().chain([commands.machine]).chain(system.run_true(&parts)) {
            tell(&Event::Command(system.name.into(), typed(&line)));
        }
    }
    for round in 0..order.rounds {
        let mut systems = order.systems.clone();
        systems.rotate_left(round % order.systems.len().max(1));
        for system in systems {
            one_round(system, order, &parts, round);
            tell(&Event::Finished(round, system.name.into()));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use integration::jobs::Work;

    use super::*;

    #[test]
    fn a_command_line_can_be_typed() {
        let line = ["a", "--b=c", "d e", "it's", ""].map(str::to_owned);
        assert_eq!(typed(&line), r"a --b=c 'd e' 'it'\''s' ''");
    }

    #[test]
    fn a_request_survives_its_line() {
        let request =
            Request { directory: "/t".into(), milliseconds: 5, work: Work::Read("file".into()) };
        let line = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<Request>(&line).unwrap(), request);
    }
}
