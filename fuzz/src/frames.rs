//! FUSE requests that are nearly right.

use devices::fuse::abi::{IN_HEADER, InHeader, ROOT_ID};
use devices::fuse::opcode::{OPCODES, Opcode};
use vm_memory::ByteValued;

use crate::input::Input;

/// Names that are there, might be, or must not be.
const NAMES: [&[u8]; 20] = [
    b"file",
    b"dir",
    b"other",
    b"sub",
    b"link",
    b"fifo",
    b"new",
    b"a",
    b"\xff\xfe",
    b"",
    b".",
    b"..",
    b"../outside/secret",
    b"/etc/passwd",
    b"dir/other",
    b"way",
    b"secret",
    b"user.x",
    b"security.capability",
    b"system.posix_acl_access",
];

/// What the guest was told.
pub struct Known {
    pub nodes: Vec<u64>,
    pub handles: Vec<u64>,
    unique: u64,
}

impl Default for Known {
    fn default() -> Self {
        Self { nodes: vec![ROOT_ID], handles: Vec::new(), unique: 0 }
    }
}

/// How the body of an operation begins: bytes before names, names, where a handle is and where a node id is.
fn shape(opcode: Opcode, least: usize) -> (usize, usize, Option<usize>, Option<usize>) {
    use Opcode::*;
    match opcode {
        Lookup | Unlink | Rmdir | Removexattr => (0, 1, None, None),
        Symlink => (0, 2, None, None),
        Mkdir | Setxattr | Getxattr => (8, 1, None, None),
        Mknod | Create | Tmpfile => (16, 1, None, None),
        Link => (8, 1, None, Some(0)),
        Rename => (8, 2, None, Some(0)),
        Rename2 => (16, 2, None, Some(0)),
        Getattr | Setattr | Statx => (least, 0, Some(8), None),
        BatchForget => (least, 0, None, Some(8)),
        Removemapping | Forget | Open | Opendir | Listxattr | Init | Interrupt | Access
        | Syncfs => (least, 0, None, None),
        // The second handle of a copy is behind a node id.
        CopyFileRange | CopyFileRange64 => (least, 0, Some(24), Some(16)),
        _ => (least, 0, Some(0), None),
    }
}

impl Known {
    /// The next request of the script, with its opcode.
    pub fn request(&mut self, input: &mut Input<'_>) -> (u32, Vec<u8>) {
        let index = usize::from(input.byte());
        let known = OPCODES.get(index % (OPCODES.len() + 1));
        let code = known.map_or_else(|| input.number() as u32, |limits| limits.opcode as u32);
        let node = self.node(input);
        let style = input.byte();
        let mut body = Vec::new();
        if let Some(limits) = known {
            let (fixed, names, handle, other) = shape(limits.opcode, limits.least);
            while body.len() < fixed {
                body.extend(input.number().to_le_bytes());
            }
            body.truncate(fixed);
            let mut put = |at: Option<usize>, value: u64| {
                if let Some(field) = at.and_then(|at| body.get_mut(at..at + 8)) {
                    field.copy_from_slice(&value.to_le_bytes());
                }
            };
            // The first handle of a copy, too.
            if style & 1 == 0 && handle.is_some() {
                put(Some(0).filter(|_| handle == Some(24)), self.handle(input));
                put(handle, self.handle(input));
            }
            if style & 2 == 0 && other.is_some() {
                put(other, self.node(input));
            }
            for _ in 0..names {
                self.name(input, &mut body);
            }
        }
        if style & 4 != 0 {
            body.extend_from_slice(input.bytes(255));
        }
        if style & 8 != 0 {
            body.resize(body.len() + 16 * usize::from(input.byte()), input.byte());
        }
        if matches!(known, Some(limits) if limits.opcode == Opcode::Write) && style & 16 == 0 {
            // As many bytes as it says.
            let len = body.len().saturating_sub(40) as u32;
            if let Some(size) = body.get_mut(16..20) {
                size.copy_from_slice(&len.to_le_bytes());
            }
        }
        self.unique += 1;
        let mut header = InHeader {
            len: (IN_HEADER + body.len()) as u32,
            opcode: code,
            unique: self.unique,
            nodeid: node,
            uid: if style & 32 == 0 { 0 } else { 1000 },
            gid: if style & 32 == 0 { 0 } else { 1000 },
            pid: 1,
            padding: 0,
        };
        if style & 64 != 0 {
            header.len = input.number() as u32;
            header.padding = input.byte().into();
        }
        if style & 128 != 0 {
            header.uid = input.number() as u32;
            header.unique = input.number();
        }
        (code, [header.as_slice(), &body].concat())
    }

    fn node(&self, input: &mut Input<'_>) -> u64 {
        let index = usize::from(input.byte());
        if index < 224 { self.nodes[index % self.nodes.len()] } else { input.number() }
    }

    fn handle(&self, input: &mut Input<'_>) -> u64 {
        let index = usize::from(input.byte());
        match self.handles.len() {
            1.. if index < 224 => self.handles[index % self.handles.len()],
            _ => input.number(),
        }
    }

    fn name(&self, input: &mut Input<'_>, body: &mut Vec<u8>) {
        let which = input.byte();
        match usize::from(which) {
            known @ ..200 => body.extend_from_slice(NAMES[known % NAMES.len()]),
            200..220 => body.extend(std::iter::repeat_n(b'x', 250 + usize::from(input.byte()))),
            220..230 => return body.extend_from_slice(b"unfinished"),
            _ => body.extend_from_slice(input.bytes(255)),
        }
        body.push(0);
    }

    /// Takes node ids and handles out of a reply that says that all went well.
    pub fn learn(&mut self, opcode: u32, reply: &[u8]) {
        use Opcode::*;
        let word = |at: usize| {
            let bytes = reply.get(at..at + 8)?;
            Some(u64::from_le_bytes(bytes.try_into().ok()?))
        };
        let failed = reply.get(4..8) != Some(&[0; 4]);
        let known = OPCODES.iter().find(|limits| limits.opcode as u32 == opcode);
        let Some(limits) = known.filter(|_| !failed) else { return };
        let is = |any: &[Opcode]| any.contains(&limits.opcode);
        if is(&[Lookup, Mknod, Mkdir, Symlink, Link, Create, Tmpfile]) {
            self.nodes.extend(word(16));
        }
        if is(&[Create, Tmpfile]) {
            self.handles.extend(word(16 + 128));
        }
        if is(&[Open, Opendir]) {
            self.handles.extend(word(16));
        }
    }
}

/// What every reply must be: as long as it says, with the number of its request, and an error without a body.
pub fn check_reply(request: &[u8], reply: &[u8]) {
    if reply.is_empty() {
        return;
    }
    let len = u32::from_le_bytes(reply[..4].try_into().unwrap());
    let error = i32::from_le_bytes(reply[4..8].try_into().unwrap());
    assert_eq!(len as usize, reply.len(), "used length and out.len differ");
    assert_eq!(reply[8..16], request[8..16], "unique is not echoed");
    assert!((-511..=0).contains(&error));
    assert!(error == 0 || reply.len() == 16, "an error has a body");
}
