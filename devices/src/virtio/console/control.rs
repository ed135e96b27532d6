//! Control messages (5.3.6.2): `struct virtio_console_control`, and behind it the name in PORT_NAME.

/// Bytes of `struct virtio_console_control`: `id`, `event`, `value`.
pub(super) const HEADER_SIZE: usize = 4 + 2 + 2;

const VIRTIO_CONSOLE_DEVICE_READY: u16 = 0;
const VIRTIO_CONSOLE_PORT_ADD: u16 = 1;
const VIRTIO_CONSOLE_PORT_READY: u16 = 3;
const VIRTIO_CONSOLE_PORT_OPEN: u16 = 6;
const VIRTIO_CONSOLE_PORT_NAME: u16 = 7;

/// What the driver says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FromDriver {
    /// It has set itself up and wants to hear of the ports.
    DeviceReady(bool),
    /// It has set up a port.
    PortReady(u32, bool),
    /// Somebody in the guest has opened a port, or closed it.
    PortOpen(u32, bool),
}

impl FromDriver {
    /// `None` for what the driver has nothing to say with. A value is a flag: 1 is yes.
    pub(super) fn decode(bytes: [u8; HEADER_SIZE]) -> Option<Self> {
        let value = u64::from_le_bytes(bytes);
        let (id, event, yes) = (value as u32, (value >> 32) as u16, value >> 48 == 1);
        match event {
            VIRTIO_CONSOLE_DEVICE_READY => Some(Self::DeviceReady(yes)),
            VIRTIO_CONSOLE_PORT_READY => Some(Self::PortReady(id, yes)),
            VIRTIO_CONSOLE_PORT_OPEN => Some(Self::PortOpen(id, yes)),
            _ => None,
        }
    }
}

/// What the device says of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ToDriver<'a> {
    /// It exists.
    Add,
    /// Somebody on the host is at its other end, or no longer.
    Open(bool),
    /// This is its name.
    Name(&'a str),
}

impl ToDriver<'_> {
    pub(super) fn encode(self, id: u32) -> Vec<u8> {
        let (event, value, name) = match self {
            Self::Add => (VIRTIO_CONSOLE_PORT_ADD, 1u16, ""),
            Self::Open(open) => (VIRTIO_CONSOLE_PORT_OPEN, open.into(), ""),
            Self::Name(name) => (VIRTIO_CONSOLE_PORT_NAME, 1, name),
        };
        let mut bytes = id.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(value.to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes
    }
}

/// What is to be said of a port yet. Flags and no queue of messages, so that a driver that asks again and
/// again and never listens costs nothing.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Unsaid {
    pub(super) add: bool,
    /// Whatever the port's state is by then.
    pub(super) open: bool,
    pub(super) name: bool,
}

impl Unsaid {
    /// Takes the next thing to say of a port that is called `name` and is `open`.
    ///
    /// That it is open comes before its name: Linux shows a port in sysfs once it has a name, and answers a
    /// read of a port that is not open with end of file. Whoever finds the port by its name can read it.
    pub(super) fn next<'a>(&self, name: &'a str, open: bool) -> Option<(ToDriver<'a>, Self)> {
        if self.add {
            Some((ToDriver::Add, Self { add: false, ..*self }))
        } else if self.open {
            Some((ToDriver::Open(open), Self { open: false, ..*self }))
        } else if self.name {
            Some((ToDriver::Name(name), Self { name: false, ..*self }))
        } else {
            None
        }
    }
}
