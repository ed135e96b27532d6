//! The input, taken from front to back. At its end everything is zero.

/// Where buffers are in the memory of a guest: behind its queues.
pub const ARENA: u64 = 0x20_0000;

/// The rest of an input.
pub struct Input<'d>(&'d [u8]);

/// Numbers around which mistakes are.
const EDGES: [u64; 24] = [
    1,
    2,
    0x7f,
    0xff,
    0xfff,
    0x1000,
    0x1001,
    0x7fff,
    0xffff,
    0x1_0000,
    0x1f_ffff,
    0x20_0000,
    0x3f_ffff,
    0x40_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_f000,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_f000,
    0x7fff_ffff_ffff_ffff,
    0x8000_0000_0000_0000,
    0xffff_ffff_ffff_f000,
    0xffff_ffff_ffff_ffff,
];

impl<'d> Input<'d> {
    pub fn new(data: &'d [u8]) -> Self {
        Self(data)
    }

    /// Whether there is anything left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let (taken, rest) = self.0.split_at(N.min(self.0.len()));
        bytes[..taken.len()].copy_from_slice(taken);
        self.0 = rest;
        bytes
    }

    pub fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    pub fn short(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// True once in `times`.
    pub fn rarely(&mut self, times: u8) -> bool {
        self.byte() % times == times - 1
    }

    /// Up to `most` bytes, as many as one byte says.
    pub fn bytes(&mut self, most: usize) -> &'d [u8] {
        let len = usize::from(self.byte()).min(most).min(self.0.len());
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken
    }

    /// One of them.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[usize::from(self.byte()) % choices.len()]
    }

    /// A number of 64 bits: mostly a small one or one at an edge.
    pub fn number(&mut self) -> u64 {
        match self.byte() % 8 {
            0 => 0,
            1 => self.byte().into(),
            2 => self.short().into(),
            3 => u32::from_le_bytes(self.array()).into(),
            4 => u64::from_le_bytes(self.array()),
            // Two fields of 32 bits.
            5 => u64::from(self.byte()) | u64::from(self.byte()) << 32,
            6 => self.pick(&EDGES),
            _ => self.pick(&EDGES).wrapping_add(u64::from(self.byte())).wrapping_sub(128),
        }
    }
}
