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

/// A stream is noise, the same in each piece, but for the piece's number: one that is lost or comes twice is
/// noticed, and to make and to compare them costs little beside carrying them.
const PIECE: usize = 1 << 20;

fn number(piece: &mut [u8], number: u64) {
    for (target, byte) in piece.iter_mut().zip(number.to_le_bytes()) {
        *target = byte;
    }
}

/// Writes `length` bytes that [`check_stream`] knows.
///
/// # Errors
///
/// The stream's.
pub fn write_stream(stream: &mut impl Write, length: u64) -> io::Result<()> {
    let mut piece = noise(PIECE, 7);
    let mut left = length;
    for index in 0.. {
        let count = PIECE.min(usize::try_from(left).unwrap_or(usize::MAX));
        if count == 0 {
            break;
        }
        number(&mut piece, index);
        stream.write_all(&piece[..count])?;
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
    let mut expected = noise(PIECE, 7);
    let mut piece = Vec::with_capacity(PIECE);
    let mut received = 0;
    for index in 0.. {
        piece.clear();
        stream.take(PIECE as u64).read_to_end(&mut piece)?;
        if piece.is_empty() {
            break;
        }
        number(&mut expected, index);
        if expected[..piece.len()] != piece {
            return Err(io::Error::other(format!("piece {index} is not as it was sent")));
        }
        received += piece.len() as u64;
    }
    Ok(received)
}
