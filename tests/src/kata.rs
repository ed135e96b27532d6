//! As much of what a Kata runtime and its agent say to each other as a sandbox has to carry: frames of ttrpc
//! (containerd/ttrpc, PROTOCOL.md) with protobuf in them, and a few messages of `agent.proto`, `oci.proto` and
//! `health.proto`, by the numbers that their fields have there.

use std::io::{self, Error, Read, Write};

/// Where a Kata agent listens.
pub const PORT: u32 = 1024;

/// Kinds of frames.
pub const REQUEST: u8 = 1;
/// What answers one.
pub const RESPONSE: u8 = 2;

/// What gRPC calls these.
pub const OK: u64 = 0;
/// It was tried, and went wrong.
pub const INTERNAL: u64 = 13;
/// No such method.
pub const UNIMPLEMENTED: u64 = 12;

/// ttrpc's own limit of a message.
const MESSAGE_MAX: usize = 4 << 20;

/// How protobuf says what a field is (the lowest three bits of its key).
const VARINT: u64 = 0;
const LENGTH_DELIMITED: u64 = 2;

/// A message in the making.
#[derive(Clone, Debug, Default)]
pub struct Message(pub Vec<u8>);

impl Message {
    /// Adds a number.
    pub fn number(mut self, field: u64, value: u64) -> Self {
        self.varint(field << 3 | VARINT);
        self.varint(value);
        self
    }

    /// Adds bytes, a text or another message.
    pub fn bytes(mut self, field: u64, value: impl AsRef<[u8]>) -> Self {
        let value = value.as_ref();
        self.varint(field << 3 | LENGTH_DELIMITED);
        self.varint(value.len() as u64);
        self.0.extend(value);
        self
    }

    fn varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }
}

impl AsRef<[u8]> for Message {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// A message that came: its fields in their order.
#[derive(Clone, Debug, Default)]
pub struct Fields(Vec<(u64, Vec<u8>, u64)>);

impl Fields {
    /// Takes it apart.
    ///
    /// # Errors
    ///
    /// When it is no protobuf of the two kinds that occur here.
    pub fn parse(mut bytes: &[u8]) -> io::Result<Self> {
        let mut fields = Vec::new();
        while !bytes.is_empty() {
            let key = varint(&mut bytes)?;
            let value = varint(&mut bytes)?;
            let data = match key & 7 {
                VARINT => Vec::new(),
                LENGTH_DELIMITED => {
                    let length = usize::try_from(value).unwrap_or(usize::MAX);
                    let data = bytes.get(..length).ok_or_else(|| Error::other("cut off"))?;
                    bytes = &bytes[length..];
                    data.to_vec()
                }
                kind => return Err(Error::other(format!("a field of kind {kind}"))),
            };
            fields.push((key >> 3, data, value));
        }
        Ok(Self(fields))
    }

    /// A number; 0 where there is none.
    pub fn number(&self, field: u64) -> u64 {
        self.0.iter().rfind(|(number, ..)| *number == field).map_or(0, |(_, _, value)| *value)
    }

    /// Bytes; none where there are none.
    pub fn bytes(&self, field: u64) -> &[u8] {
        self.all(field).last().map_or(&[], |bytes| bytes)
    }

    /// A text.
    pub fn text(&self, field: u64) -> String {
        String::from_utf8_lossy(self.bytes(field)).into()
    }

    /// A message.
    ///
    /// # Errors
    ///
    /// As [`Fields::parse`].
    pub fn message(&self, field: u64) -> io::Result<Self> {
        Self::parse(self.bytes(field))
    }

    /// All that a repeated field has.
    pub fn all(&self, field: u64) -> impl Iterator<Item = &[u8]> {
        let found = self.0.iter().filter(move |(number, ..)| *number == field);
        found.map(|(_, bytes, _)| bytes.as_slice())
    }
}

fn varint(bytes: &mut &[u8]) -> io::Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or_else(|| Error::other("cut off"))?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Error::other("a number that is too long"))
}

/// Writes a frame: the length of its data, its stream, its kind, no flags, its data.
///
/// # Errors
///
/// The stream's.
pub fn send(to: &mut impl Write, stream: u32, kind: u8, message: &Message) -> io::Result<()> {
    let mut frame = (message.0.len() as u32).to_be_bytes().to_vec();
    frame.extend(stream.to_be_bytes());
    frame.extend([kind, 0]);
    frame.extend(&message.0);
    to.write_all(&frame)
}

/// Reads a frame: its stream, its kind, its data.
///
/// # Errors
///
/// The stream's, also at its end.
pub fn receive(from: &mut impl Read) -> io::Result<(u32, u8, Fields)> {
    let mut header = [0; 10];
    from.read_exact(&mut header)?;
    let word = |at: usize| {
        let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
        u32::from_be_bytes(bytes)
    };
    let length = word(0) as usize;
    if length > MESSAGE_MAX {
        return Err(Error::other(format!("a message of {length} bytes")));
    }
    let mut data = vec![0; length];
    from.read_exact(&mut data)?;
    Ok((word(4), header[8], Fields::parse(&data)?))
}
