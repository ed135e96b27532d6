//! A driver by hand: one queue, requests put into it as they are, no interrupts.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::device::{Bytes, Function, Pages};

/// Offsets in the common configuration.
pub const STATUS: usize = 20;
pub const QUEUE_SELECT: usize = 22;
pub const QUEUE_SIZE: usize = 24;
pub const QUEUE_ENABLE: usize = 28;

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// Descriptors of the queue, which is the first request queue.
pub const SIZE: u16 = 16;
const QUEUE: u64 = 1;

/// Pages of memory: rings, request, reply, a table.
pub const DESCRIPTORS: usize = 0;
pub const AVAILABLE: usize = 0x1000;
const USED: usize = 0x2000;
pub const REQUEST: usize = 0x3000;
pub const REPLY: usize = 0x4000;
pub const TABLE: usize = 0x5000;
const PAGES: usize = 6;

const PATIENCE: Duration = Duration::from_secs(20);

/// A device of which this process is the driver.
pub struct Driver {
    pub function: Function,
    pub registers: Bytes,
    pub memory: Pages,
    /// Where registers of each kind are in BAR 0.
    doorbells: usize,
    bars: [u32; 6],
    /// Of the available ring and the used ring.
    offered: u16,
    taken: u16,
    unique: u64,
}

impl Driver {
    pub fn new(tag: &str) -> Result<Self> {
        let function = Function::of_tag(tag)?;
        function.unbind()?;
        function.put(4, &[6, 0])?;
        let registers = function.registers()?;
        ensure!(function.structure(1)?.1 == 0, "the common configuration is elsewhere");
        let doorbells = function.structure(2)?.1 as usize;
        let mut bars = [0; 6];
        for (index, bar) in (0..).zip(&mut bars) {
            *bar = function.read(0x10 + 4 * index)?;
        }
        let memory = Pages::new(PAGES)?;
        Ok(Self { function, registers, memory, doorbells, bars, offered: 0, taken: 0, unique: 0 })
    }

    /// The address of a BAR as the kernel has placed it; of the window with both halves.
    pub fn bar(&self, index: usize) -> u64 {
        let low = u64::from(self.bars[index] & !15);
        if index == 4 { low | u64::from(self.bars[5]) << 32 } else { low }
    }

    /// Puts a BAR somewhere.
    pub fn place(&self, index: u64, value: u32) -> Result<()> {
        self.function.write(0x10 + 4 * index, value)
    }

    /// Puts all BARs back and lets them be decoded.
    pub fn put_back(&self) -> Result<()> {
        self.function.put(4, &[0, 0])?;
        for (index, bar) in (0..).zip(self.bars) {
            self.place(index, bar)?;
        }
        self.function.put(4, &[6, 0])
    }

    pub fn status(&self) -> u64 {
        self.registers.get::<1>(STATUS)
    }

    pub fn reset(&self) -> Result<()> {
        self.registers.put::<1>(STATUS, 0);
        wait("the reset", || self.status() == 0)
    }

    /// As far as FEATURES_OK.
    pub fn negotiate(&self, features: u64) -> Result<()> {
        self.reset()?;
        self.registers.put::<1>(STATUS, 1);
        self.registers.put::<1>(STATUS, 3);
        for (select, bits) in [(0, features), (1, 1)] {
            self.registers.put::<4>(8, select);
            self.registers.put::<4>(12, bits);
        }
        self.registers.put::<1>(STATUS, 11);
        ensure!(self.status() == 11, "features were not agreed: status {:#x}", self.status());
        Ok(())
    }

    /// Says where the rings are, and enables the queue.
    pub fn enable(&mut self, descriptors: u64, available: u64, used: u64) {
        (0..0x3000).step_by(8).for_each(|at| self.memory.bytes.put::<8>(at, 0));
        (self.offered, self.taken) = (0, 0);
        self.registers.put::<2>(QUEUE_SELECT, QUEUE);
        self.registers.put::<2>(QUEUE_SIZE, SIZE.into());
        for (register, address) in [(32, descriptors), (40, available), (48, used)] {
            self.registers.put::<4>(register, address & 0xffff_ffff);
            self.registers.put::<4>(register + 4, address >> 32);
        }
        self.registers.put::<2>(QUEUE_ENABLE, 1);
    }

    /// Where the rings should be.
    pub fn rings(&self) -> (u64, u64, u64) {
        let address = |at| self.memory.address(at);
        (address(DESCRIPTORS), address(AVAILABLE), address(USED))
    }

    /// A device that is up. Bit 28 of the features: indirect tables.
    pub fn start(&mut self, features: u64) -> Result<()> {
        self.negotiate(features)?;
        let (descriptors, available, used) = self.rings();
        self.enable(descriptors, available, used);
        self.registers.put::<1>(STATUS, 15);
        ensure!(self.status() == 15, "did not start: status {:#x}", self.status());
        Ok(())
    }

    pub fn describe(&self, at: usize, (address, len, flags, next): (u64, u32, u16, u16)) {
        let bytes = &self.memory.bytes;
        bytes.put::<8>(at, address);
        bytes.put::<4>(at + 8, len.into());
        bytes.put::<2>(at + 12, flags.into());
        bytes.put::<2>(at + 14, next.into());
    }

    pub fn offer(&mut self, head: u16) {
        let slot = AVAILABLE + 4 + 2 * usize::from(self.offered % SIZE);
        self.memory.bytes.put::<2>(slot, head.into());
        self.offered = self.offered.wrapping_add(1);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.memory.bytes.put::<2>(AVAILABLE + 2, self.offered.into());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    pub fn ring(&self) {
        self.registers.put::<2>(self.doorbells + 4 * QUEUE as usize, QUEUE);
    }

    /// Rings a doorbell that may be none.
    pub fn ring_at<const N: usize>(&self, offset: usize, value: u64) {
        self.registers.put::<N>(self.doorbells + offset, value);
    }

    /// Waits for the next used buffer and says how long it is.
    pub fn wait_used(&mut self) -> Result<usize> {
        wait("a reply", || self.memory.bytes.get::<2>(USED + 2) != u64::from(self.taken))?;
        let at = USED + 4 + 8 * usize::from(self.taken % SIZE);
        self.taken = self.taken.wrapping_add(1);
        Ok(self.memory.bytes.get::<4>(at + 4) as usize)
    }

    /// The device says that it needs a reset, and has given nothing back.
    pub fn wait_until_broken(&self) -> Result<()> {
        wait("DEVICE_NEEDS_RESET", || self.status() & 64 != 0)?;
        ensure!(self.memory.bytes.get::<2>(USED + 2) == 0, "something was given back");
        Ok(())
    }

    /// Sends bytes as they are, and gives the reply.
    pub fn send(&mut self, bytes: &[u8]) -> Result<Vec<u8>> {
        let (request, reply) = (self.memory.address(REQUEST), self.memory.address(REPLY));
        self.memory.bytes.write(REQUEST, bytes);
        self.describe(DESCRIPTORS, (request, bytes.len() as u32, NEXT, 1));
        self.describe(DESCRIPTORS + 16, (reply, 4096, WRITE, 0));
        self.offer(0);
        self.ring();
        let used = self.wait_used()?;
        ensure!(used <= 4096, "a reply of {used} bytes");
        Ok(self.memory.bytes.read(REPLY, used))
    }

    /// A request with these bytes behind its header.
    pub fn frame(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        self.unique += 2;
        let mut bytes = Vec::new();
        for word in [40 + body.len() as u32, opcode] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(self.unique.to_ne_bytes());
        bytes.extend(node.to_ne_bytes());
        bytes.extend([0; 16]);
        bytes.extend_from_slice(body);
        bytes
    }

    /// Sends a request: errno and body of the reply.
    pub fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<(i32, Vec<u8>)> {
        let frame = self.frame(opcode, node, body);
        let mut reply = self.send(&frame)?;
        ensure!(reply.len() >= 16, "a reply of {} bytes", reply.len());
        ensure!(reply[8..16] == frame[8..16], "unique is not echoed");
        let error = i32::from_ne_bytes(reply[4..8].try_into()?);
        Ok((-error, reply.split_off(16)))
    }

    /// The request is refused with this errno.
    pub fn refused(&mut self, errno: i32, opcode: u32, node: u64, body: &[u8]) -> Result<()> {
        let (error, _) = self.call(opcode, node, body)?;
        ensure!(error == errno, "operation {opcode} is answered by {error} and not {errno}");
        Ok(())
    }

    /// INIT.
    pub fn init(&mut self) -> Result<()> {
        let mut body: Vec<u8> =
            [7u32, 45, 131_072, u32::MAX, u32::MAX].map(u32::to_ne_bytes).concat();
        body.resize(64, 0);
        self.refused(0, 26, 0, &body)
    }

    /// A device that is up and has a session.
    pub fn begin(&mut self) -> Result<()> {
        self.start(0)?;
        self.init()
    }

    /// The node of a name in the root.
    pub fn lookup(&mut self, name: &str) -> Result<u64> {
        let (error, body) = self.call(1, 1, &[name.as_bytes(), b"\0"].concat())?;
        ensure!(error == 0, "{name} is not found: {error}");
        Ok(u64::from_ne_bytes(body[..8].try_into()?))
    }

    /// After all that was done to it the device works, and the other share does, too.
    pub fn works(&mut self) -> Result<()> {
        self.put_back()?;
        self.begin()?;
        self.lookup("file")?;
        other_works()
    }
}

/// The other share, of which nothing is cached, is served by its device.
pub fn other_works() -> Result<()> {
    let other = fs::read("/s/other")?;
    ensure!(other == b"of another share", "another share says {other:?}");
    Ok(())
}

fn wait(what: &str, is: impl Fn() -> bool) -> Result<()> {
    let since = Instant::now();
    while !is() {
        if since.elapsed() > PATIENCE {
            bail!("{what} does not come");
        }
        std::thread::yield_now();
    }
    Ok(())
}
