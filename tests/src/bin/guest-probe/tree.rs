//! Works on a tree of files together with others, and says how it looks. Commands on standard input, a line each.

use std::io::{BufRead, Write, stdin, stdout};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use integration::model;

use crate::number;

/// How long something is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

pub fn serve(root: &Path) -> Result<()> {
    let mut lines = stdin().lock().lines();
    while let Some(line) = lines.next().transpose()? {
        let words: Vec<_> = line.split(' ').collect();
        let answer = match words[..] {
            // So many operations, which follow from the seed.
            ["work", seed, count] => {
                model::operate(root, number(seed)?, number(count)?);
                "done".into()
            }
            ["look"] => match model::look(root) {
                Ok(lines) => model::digest(&lines),
                Err(error) => format!("error: {error}"),
            },
            ["dump"] => {
                model::look(root).map_or_else(|error| error.to_string(), |all| all.join("; "))
            }
            // Asks as fast as it can until a file has so many bytes, and says when that was, in microseconds since 1970.
            ["size", file, size] => when(root, |root| {
                root.join(file).metadata().is_ok_and(|of| of.len().to_string() == size)
            })?,
            // The time that it takes to ask the host, the shortest of several: a name that is new each time.
            ["round-trip", count] => {
                let mut times: Vec<_> = (0..number(count)?)
                    .map(|at| {
                        let path = root.join(format!("none-{at}-{}", std::process::id()));
                        let since = Instant::now();
                        let _ = path.symlink_metadata();
                        since.elapsed().as_micros()
                    })
                    .collect();
                times.sort_unstable();
                times.get(times.len() / 2).copied().unwrap_or_default().to_string()
            }
            ["end"] => return Ok(()),
            _ => bail!("work, look, dump, size, round-trip or end, not {line:?}"),
        };
        writeln!(stdout(), "{answer}")?;
    }
    Ok(())
}

/// Waits until something is so, and says for how many microseconds.
fn when(root: &Path, is_so: impl Fn(&Path) -> bool) -> Result<String> {
    // The other side waits for this line before it does what is waited for.
    writeln!(stdout(), "asking")?;
    let since = Instant::now();
    while !is_so(root) {
        if since.elapsed() > PATIENCE {
            bail!("it never came");
        }
        std::thread::sleep(Duration::from_micros(50));
    }
    Ok(since.elapsed().as_micros().to_string())
}
