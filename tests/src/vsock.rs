//! Both ends of streams over vsock.

use std::io::{self, Read, Write};

use crate::noise;

/// Sends back what it gets.
pub const ECHO: u32 = 1000;
/// Takes a stream of [`write_stream`], and answers with its length.
pub const SINK: u32 = 1001;
/// Takes a number in a line, and answers with such a stream.
pub const SOURCE: u32 = 1002;
/// Takes connections and reads nothing.
pub const SILENT: u32 = 1003;

/// Each piece of a stream is noise of its own, so that a piece that is lost or comes twice is noticed.
const PIECE: usize = 1 << 20;

/// Writes `length` bytes that [`check_stream`] knows.
///
/// # Errors
///
/// The stream's.
pub fn write_stream(stream: &mut impl Write, length: u64) -> io::Result<()> {
    let mut left = length;
    for seed in 0.. {
        let count = PIECE.min(usize::try_from(left).unwrap_or(usize::MAX));
        if count == 0 {
            break;
        }
        stream.write_all(&noise(count, seed))?;
        left -= count as u64;
    }
    stream.flush()
}

/// Reads to the end, and says how many bytes came.
///
/// # Errors
///
/// The stream's, and when they are not those that [`write_stream`] writes.
pub fn check_stream(stream: &mut impl Read) -> io::Result<u64> {
    let mut received = 0;
    for seed in 0.. {
        let mut piece = Vec::new();
        stream.take(PIECE as u64).read_to_end(&mut piece)?;
        if piece.is_empty() {
            break;
        }
        if noise(piece.len(), seed) != piece {
            return Err(io::Error::other(format!(
                "piece {seed} of the stream is not as it was sent"
            )));
        }
        received += piece.len() as u64;
    }
    Ok(received)
}
