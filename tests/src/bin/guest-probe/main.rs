//! What the tests run inside guests, where there is no other program: file operations that a shell does not
//! have, memory-mapped files, and sockets.
//!
//! It prints `name=value` lines. What fails is printed as the error.

mod bench;
mod files;
mod hostile;
mod kata;
mod litmus;
mod locks;
mod log;
mod map;
mod tree;
mod vsock;
mod wander;

use std::process::ExitCode;

fn number(word: &str) -> anyhow::Result<u64> {
    word.parse().map_err(|_| anyhow::anyhow!("{word:?} is no number"))
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match words[..] {
        _ if std::process::id() == 1 => kata::run(),
        ["files", directory] => files::everything(directory.as_ref()),
        ["lock", file] => locks::serve(file.as_ref()),
        ["locks", directory] => files::locks(directory.as_ref()),
        ["read-only", directory] => files::refused(directory.as_ref()),
        ["log", directory, from] => {
            number(from).and_then(|from| log::write(directory.as_ref(), from))
        }
        ["log-check", directory, last] => {
            number(last).and_then(|last| log::check(directory.as_ref(), last))
        }
        ["map", file] => map::serve(file.as_ref()),
        ["bench", ref files @ ..] => bench::serve(files),
        ["litmus", file, side, from, rounds] => number(side).and_then(|side| {
            litmus::play(file.as_ref(), side as usize, number(from)?, number(rounds)?)
        }),
        ["litmus", file] => litmus::look(file.as_ref()),
        ["cut", file, size] => number(size).and_then(|size| {
            Ok(std::fs::OpenOptions::new().write(true).open(file)?.set_len(size)?)
        }),
        ["tree", directory] => tree::serve(directory.as_ref()),
        ["noise", size, file] => files::write_noise(size, file.as_ref()),
        ["pages", size, file] => wander::write(size, file.as_ref()),
        ["wander", file] => wander::wander(file.as_ref()),
        ["hostile", tag] => hostile::attack(tag),
        ["touch-window", tag] => hostile::touch_window(tag),
        ["vsock"] => vsock::serve(),
        ["vsock-pipe", port] => vsock::pipe(port),
        _ => Err(anyhow::anyhow!(
            "guest-probe files|lock|locks|log|log-check|read-only|map|bench|litmus|cut|tree|noise|pages|wander|hostile|\
             touch-window|vsock|vsock-pipe …, not {words:?}"
        )),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("guest-probe: {error:#}");
            ExitCode::FAILURE
        }
    }
}
