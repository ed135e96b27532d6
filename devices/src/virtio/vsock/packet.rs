//! Packets (5.10.6): `struct virtio_vsock_hdr`, and behind it the data.

use bitflags::bitflags;

/// Bytes of `struct virtio_vsock_hdr`.
pub(super) const HEADER_SIZE: usize = 44;

/// The host's context id (5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
pub(super) const TYPE_STREAM: u16 = 1;

/// What a packet is for (5.10.6, `VIRTIO_VSOCK_OP_*`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    /// Asks for a stream.
    Request = 1,
    /// Agrees to one.
    Response = 2,
    /// There is no such stream, or no longer.
    Reset = 3,
    /// Ends one direction or both; [`Shutdown`] says which.
    Shutdown = 4,
    /// Carries data (`RW`).
    Data = 5,
    /// Tells how much room there is.
    CreditUpdate = 6,
    /// Asks for that.
    CreditRequest = 7,
}

impl Op {
    pub(super) fn decode(op: u16) -> Option<Self> {
        use Op::*;
        let known = [Request, Response, Reset, Shutdown, Data, CreditUpdate, CreditRequest];
        known.into_iter().find(|known| *known as u16 == op)
    }
}

bitflags! {
    /// What the sender of a [`Op::Shutdown`] does no more (5.10.6.6.1). Hints add up over several packets.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(super) struct Shutdown: u32 {
        /// It takes no more data.
        const RECEIVE = 1;
        /// It sends no more data.
        const SEND = 2;
    }
}

/// `struct virtio_vsock_hdr`, decoded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of data behind the header.
    pub(super) len: u32,
    /// `type`.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// Bytes the sender has room for in all.
    pub(super) buf_alloc: u32,
    /// Bytes the sender has taken out of that room since the beginning, modulo 2^32.
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn decode(bytes: [u8; HEADER_SIZE]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    pub(super) fn encode(&self) -> [u8; HEADER_SIZE] {
        let fields: [&[u8]; 10] = [
            &self.src_cid.to_le_bytes(),
            &self.dst_cid.to_le_bytes(),
            &self.src_port.to_le_bytes(),
            &self.dst_port.to_le_bytes(),
            &self.len.to_le_bytes(),
            &self.kind.to_le_bytes(),
            &self.op.to_le_bytes(),
            &self.flags.to_le_bytes(),
            &self.buf_alloc.to_le_bytes(),
            &self.fwd_cnt.to_le_bytes(),
        ];
        let mut bytes = [0; HEADER_SIZE];
        for (target, byte) in bytes.iter_mut().zip(fields.into_iter().flatten()) {
            *target = *byte;
        }
        bytes
    }
}

/// Takes the next `N` bytes; there are as many, the fields add up to [`HEADER_SIZE`].
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    match rest.split_first_chunk() {
        Some((field, behind)) => {
            *rest = behind;
            *field
        }
        None => [0; N],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_laid_out_as_specified() {
        let header = Header {
            src_cid: 0x0102_0304_0506_0708,
            dst_cid: 2,
            src_port: 0x1112_1314,
            dst_port: 0x2122_2324,
            len: 0x3132_3334,
            kind: TYPE_STREAM,
            op: Op::Data as u16,
            flags: 0x4142_4344,
            buf_alloc: 0x5152_5354,
            fwd_cnt: 0x6162_6364,
        };
        let bytes = header.encode();
        assert_eq!(bytes[..8], [8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[8..16], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..24], [0x14, 0x13, 0x12, 0x11, 0x24, 0x23, 0x22, 0x21]);
        assert_eq!(bytes[24..28], [0x34, 0x33, 0x32, 0x31]);
        assert_eq!(bytes[28..32], [1, 0, 5, 0]);
        assert_eq!(bytes[32..36], [0x44, 0x43, 0x42, 0x41]);
        assert_eq!(bytes[36..40], [0x54, 0x53, 0x52, 0x51]);
        assert_eq!(bytes[40..], [0x64, 0x63, 0x62, 0x61]);
        assert_eq!(Header::decode(bytes), header);
    }

    #[test]
    fn operations_without_a_meaning_are_none() {
        assert_eq!(Op::decode(0), None);
        assert_eq!(Op::decode(5), Some(Op::Data));
        assert_eq!(Op::decode(7), Some(Op::CreditRequest));
        assert_eq!(Op::decode(8), None);
        assert_eq!(Op::decode(u16::MAX), None);
    }
}
