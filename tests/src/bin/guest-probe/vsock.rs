//! Programs of the guest that talk with programs of the host.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use integration::vsock::{ECHO, SILENT, SINK, SOURCE, check_stream, write_stream};
use oriel_init::vsock::{HOST, Listener, connect};

/// Listens on the ports of the tests, says so, and connects to the host as standard input asks: an answer a
/// line. Ends with standard input.
pub fn serve() -> Result<()> {
    listen(ECHO, |mut stream| {
        io::copy(&mut stream.try_clone()?, &mut stream)?;
        Ok(stream.shutdown(Shutdown::Write)?)
    })?;
    listen(SINK, |mut stream| {
        let received = check_stream(&mut stream)?;
        Ok(writeln!(stream, "{received}")?)
    })?;
    listen(SOURCE, |mut stream| {
        let mut line = String::new();
        BufReader::new(stream.try_clone()?).read_line(&mut line)?;
        Ok(write_stream(&mut stream, line.trim().parse()?)?)
    })?;
    // Held, and not read.
    let silent = Listener::bind(SILENT, 128)?;
    thread::spawn(move || {
        let mut held = Vec::new();
        while let Ok((stream, _)) = silent.accept() {
            held.push(stream);
        }
    });
    println!("listening");
    for line in io::stdin().lock().lines() {
        match ask_host(&line?) {
            Ok(answer) => println!("{answer}"),
            Err(error) => println!("error {error:#}"),
        }
    }
    Ok(())
}

fn listen(port: u32, serve: fn(UnixStream) -> Result<()>) -> Result<()> {
    let listener = Listener::bind(port, 128).with_context(|| format!("port {port}"))?;
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            thread::spawn(move || {
                if let Err(error) = serve(stream) {
                    eprintln!("port {port}: {error:#}");
                }
            });
        }
    });
    Ok(())
}

/// `echo PORT TEXT`, `send PORT BYTES`, `receive PORT BYTES`, `many PORT COUNT`, `connect CID PORT`.
fn ask_host(line: &str) -> Result<String> {
    let words: Vec<&str> = line.split_whitespace().collect();
    match words[..] {
        ["echo", port, text] => {
            let mut stream = connect(HOST, port.parse()?)?;
            stream.write_all(text.as_bytes())?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        }
        ["send", port, bytes] => {
            let mut stream = connect(HOST, port.parse()?)?;
            write_stream(&mut stream, bytes.parse()?)?;
            stream.shutdown(Shutdown::Write)?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer.trim().into())
        }
        ["receive", port, bytes] => {
            let mut stream = connect(HOST, port.parse()?)?;
            writeln!(stream, "{bytes}")?;
            Ok(check_stream(&mut stream)?.to_string())
        }
        ["many", port, count] => {
            let port = port.parse()?;
            let streams: io::Result<Vec<_>> =
                (0..count.parse()?).map(|_: u32| connect(HOST, port)).collect();
            let mut streams = streams?;
            for (index, stream) in streams.iter_mut().enumerate() {
                write!(stream, "{index:04}")?;
            }
            for (index, stream) in streams.iter_mut().enumerate().rev() {
                let mut answer = [0; 4];
                stream.read_exact(&mut answer)?;
                ensure!(answer == *format!("{index:04}").as_bytes(), "{answer:?} at {index}");
            }
            Ok(streams.len().to_string())
        }
        ["connect", cid, port] => {
            connect(cid.parse()?, port.parse()?)?;
            Ok("connected".into())
        }
        _ => bail!("{line:?}"),
    }
}

/// Standard input goes to a port of the host, and what comes back to standard output.
pub fn pipe(port: &str) -> Result<()> {
    let mut stream = connect(HOST, port.parse()?)?;
    let mut back = stream.try_clone()?;
    let reader = thread::spawn(move || io::copy(&mut back, &mut io::stdout().lock()));
    io::copy(&mut io::stdin().lock(), &mut stream)?;
    stream.shutdown(Shutdown::Write)?;
    reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
    Ok(())
}
