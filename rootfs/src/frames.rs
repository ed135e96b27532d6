//! Several kinds of data in one stream: frames of a kind (1 byte), a length (4 bytes, little-endian), and as many
//! bytes.
//!
//! | kind | | most bytes |
//! |---|---|---|
//! | 0 | a message of [`protocol`](crate::protocol), as JSON | what the reader takes |
//! | 1 | standard input; none is its end | [`MAX_DATA`] |
//! | 2 | standard output; everything, with a terminal | [`MAX_DATA`] |
//! | 3 | standard error | [`MAX_DATA`] |
//! | 4 | the kernel's console, in logs | [`MAX_DATA`] |
//!
//! Neither end trusts the other: a length is looked at before anything is kept for it.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Most data in a frame: what one read takes.
pub const MAX_DATA: usize = 64 << 10;

/// The longest message to `oriel-init`: half of what Linux takes for arguments and environment of a program
/// (`ARG_MAX`, a quarter of an 8 MiB stack), which is where it would fail anyway.
pub const MAX_TO_AGENT: usize = 1 << 20;

/// The longest message to the host.
pub const MAX_TO_HOST: usize = 16 << 10;

/// Kind and length.
pub const HEADER: usize = 5;

/// What a frame holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// JSON.
    Message = 0,
    /// Standard input.
    Stdin = 1,
    /// Standard output.
    Stdout = 2,
    /// Standard error.
    Stderr = 3,
    /// The kernel's console.
    Console = 4,
}

impl Kind {
    fn decode(byte: u8) -> Result<Self, FrameError> {
        [Self::Message, Self::Stdin, Self::Stdout, Self::Stderr, Self::Console]
            .into_iter()
            .find(|kind| *kind as u8 == byte)
            .ok_or(FrameError::Kind(byte))
    }
}

/// A frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What it holds.
    pub kind: Kind,
    /// The bytes.
    pub bytes: Vec<u8>,
}

impl Frame {
    /// The message in it.
    ///
    /// # Errors
    ///
    /// When it is none of this type.
    pub fn message<T: DeserializeOwned>(&self) -> Result<T, FrameError> {
        if self.kind != Kind::Message {
            return Err(FrameError::NoMessage("data".into()));
        }
        serde_json::from_slice(&self.bytes)
            .map_err(|error| FrameError::NoMessage(error.to_string()))
    }
}

/// What is no frame.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The kind is unknown.
    #[error("a frame of the unknown kind {0}")]
    Kind(u8),
    /// It is longer than it may be.
    #[error("a frame of {length} bytes, {max} are the most")]
    TooLong {
        /// What it says.
        length: usize,
        /// What is taken.
        max: usize,
    },
    /// It holds no message, or another one than is expected.
    #[error("no message: {0}")]
    NoMessage(String),
}

/// Appends a frame of data to `to`. The reader takes at most [`MAX_DATA`] bytes.
pub fn put(to: &mut Vec<u8>, kind: Kind, bytes: &[u8]) {
    to.push(kind as u8);
    // No caller has a gigabyte.
    to.extend((bytes.len() as u32).to_le_bytes());
    to.extend(bytes);
}

/// Appends a message to `to`.
pub fn put_message(to: &mut Vec<u8>, message: &impl Serialize) {
    // Structures of strings and numbers: there is nothing that could not be written as JSON.
    put(to, Kind::Message, &serde_json::to_vec(message).unwrap_or_default());
}

/// Cuts what comes into frames, whatever pieces it comes in. Holds less than one frame and one piece.
#[derive(Debug)]
pub struct Decoder {
    bytes: Vec<u8>,
    start: usize,
    max_message: usize,
}

impl Decoder {
    /// One that takes messages of at most `max_message` bytes.
    pub fn new(max_message: usize) -> Self {
        Self { bytes: Vec::new(), start: 0, max_message }
    }

    /// Takes a piece. All frames are to be taken out before the next.
    pub fn push(&mut self, piece: &[u8]) {
        self.bytes.drain(..self.start);
        self.start = 0;
        self.bytes.extend(piece);
    }

    /// The next frame, when all of it is there.
    ///
    /// # Errors
    ///
    /// [`FrameError`]: where the next frame begins is anybody's guess.
    pub fn frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let rest = self.bytes.get(self.start..).unwrap_or_default();
        let Some(([kind, length @ ..], rest)) = rest.split_first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let kind = Kind::decode(*kind)?;
        let length = u32::from_le_bytes(*length) as usize;
        let max = if kind == Kind::Message { self.max_message } else { MAX_DATA };
        if length > max {
            return Err(FrameError::TooLong { length, max });
        }
        let Some(bytes) = rest.get(..length) else { return Ok(None) };
        self.start += HEADER + length;
        Ok(Some(Frame { kind, bytes: bytes.to_vec() }))
    }

    /// Whether the middle of a frame is reached.
    pub fn is_amid(&self) -> bool {
        self.bytes.len() > self.start
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::protocol::{Exec, FromAgent, FromHost};

    fn all(decoder: &mut Decoder) -> Vec<Frame> {
        std::iter::from_fn(|| decoder.frame().unwrap()).collect()
    }

    #[test]
    fn frames_come_out_as_they_went_in_whatever_the_pieces() {
        let exec = Exec { args: vec!["a b".into(), "\u{0}ü".into()], ..Exec::default() };
        let data: Vec<u8> = (0..=255).cycle().take(MAX_DATA).collect();
        let mut bytes = Vec::new();
        put_message(&mut bytes, &exec);
        put(&mut bytes, Kind::Stdin, &data);
        put(&mut bytes, Kind::Stdin, &[]);
        put_message(&mut bytes, &FromHost::Signal { number: 15 });
        for size in [1, 2, 7, 4096, bytes.len()] {
            let mut decoder = Decoder::new(MAX_TO_AGENT);
            let mut frames = Vec::new();
            for piece in bytes.chunks(size) {
                decoder.push(piece);
                frames.extend(all(&mut decoder));
            }
            assert_eq!(frames.len(), 4);
            assert_eq!(frames[0].message::<Exec>(), Ok(exec.clone()));
            assert_eq!(frames[1], Frame { kind: Kind::Stdin, bytes: data.clone() });
            assert_eq!(frames[2], Frame { kind: Kind::Stdin, bytes: vec![] });
            assert_eq!(frames[3].message(), Ok(FromHost::Signal { number: 15 }));
            assert!(!decoder.is_amid());
        }
    }

    #[test]
    fn what_is_no_frame_is_refused_before_it_is_there() {
        let refused = |bytes: &[u8]| {
            let mut decoder = Decoder::new(100);
            decoder.push(bytes);
            decoder.frame().unwrap_err()
        };
        assert_eq!(refused(&[5, 0, 0, 0, 0]), FrameError::Kind(5));
        assert_eq!(refused(&[255, 255, 255, 255, 255]), FrameError::Kind(255));
        assert_eq!(refused(&[0, 101, 0, 0, 0]), FrameError::TooLong { length: 101, max: 100 });
        let length = u32::MAX as usize;
        assert_eq!(
            refused(&[2, 255, 255, 255, 255]),
            FrameError::TooLong { length, max: MAX_DATA }
        );
        let length = MAX_DATA + 1;
        assert_eq!(refused(&[1, 1, 0, 1, 0]), FrameError::TooLong { length, max: MAX_DATA });
        // Parts are waited for.
        let mut decoder = Decoder::new(100);
        for part in [&[0][..], &[100, 0, 0, 0], &[b'{'; 99]] {
            decoder.push(part);
            assert_eq!(decoder.frame(), Ok(None));
            assert!(decoder.is_amid());
        }
        decoder.push(b"}");
        assert!(decoder.frame().unwrap().unwrap().message::<FromAgent>().is_err());
    }

    #[test]
    fn a_message_of_another_kind_is_none() {
        let message = |text: &str| Frame { kind: Kind::Message, bytes: text.into() };
        for text in [
            "",
            "{}",
            "[]",
            "\"started\"x",
            "{\"room\":{\"bytes\":-1}}",
            "{\"exited\":{\"status\":256}}",
        ] {
            let error = message(text).message::<FromAgent>().unwrap_err();
            assert!(matches!(error, FrameError::NoMessage(_)), "{text}");
        }
        assert_eq!(message("\"started\"").message(), Ok(FromAgent::Started));
        let data = Frame { kind: Kind::Stdout, bytes: b"\"started\"".to_vec() };
        assert!(data.message::<FromAgent>().is_err());
        let more = "{\"args\":[],\"env\":[],\"terminal\":false,\"stdin\":false,\"more\":1}";
        assert!(message(more).message::<Exec>().unwrap_err().to_string().contains("more"));
    }
}
