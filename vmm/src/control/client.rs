//! The other end: one request to a sandbox.

use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use serde_json::Value;

use super::{Reply, Request, check_name, directory, socket_path};

/// How long a sandbox may take over a request. None waits for the guest.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks the sandbox `name` of this user.
///
/// # Errors
///
/// When there is none, or it does not do what it is asked: one line that says why.
pub fn ask(name: &str, request: &Request) -> Result<Value> {
    check_name(name).map_err(|error| anyhow!(error))?;
    ask_at(&directory()?, name, request)
}

pub(super) fn ask_at(directory: &Path, name: &str, request: &Request) -> Result<Value> {
    let path = socket_path(directory, name);
    let mut stream = UnixStream::connect(&path).map_err(|error| match error.kind() {
        ErrorKind::NotFound | ErrorKind::ConnectionRefused => {
            anyhow!("no sandbox {name:?} runs ({}); start one with --name", path.display())
        }
        _ => anyhow!("sandbox {name:?}: {}: {error}", path.display()),
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    // One that does not listen may still have said why.
    let said = stream.write_all(&line);
    let mut line = String::new();
    let heard = BufReader::new(stream).read_line(&mut line);
    if heard.with_context(|| format!("sandbox {name:?} does not answer"))? == 0 {
        said.with_context(|| format!("sandbox {name:?}"))?;
        bail!("sandbox {name:?} ended");
    }
    match serde_json::from_str(&line).with_context(|| format!("sandbox {name:?}"))? {
        Reply::Ok(value) => Ok(value),
        Reply::Error(why) => bail!("sandbox {name:?}: {why}"),
    }
}
