//! The device configuration (5.3.4).

/// Bytes of `struct virtio_console_config`: `cols` and `rows`, which are 0 because F_SIZE is not offered,
/// `max_nr_ports`, and `emerg_wr`, whose feature is not offered either.
const CONFIG_SIZE: usize = 2 + 2 + 4 + 4;

/// Where `max_nr_ports` is.
const MAX_PORTS_OFFSET: usize = 4;

/// Most ports. Each costs two queues and their MSI-X vectors, and the queues must fit the transport.
pub const MAX_PORTS: usize = 32;

/// Longest name of a port in bytes: together with its header it fits the smallest buffer that a driver may
/// be expected to offer for control messages.
pub const MAX_NAME: usize = 64;

/// What cannot be the ports of a console.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// No port, or too many.
    #[error("{0} ports: must be 1 to {MAX_PORTS}")]
    Ports(usize),
    /// A name is empty, too long, or has a NUL in it.
    #[error("the port name {0:?} must be 1 to {MAX_NAME} bytes without NUL")]
    Name(String),
}

/// What the driver can read about the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    bytes: [u8; CONFIG_SIZE],
}

impl Config {
    /// A device with ports of these names.
    ///
    /// # Errors
    ///
    /// [`ConfigError`].
    pub fn new(names: &[&str]) -> Result<Self, ConfigError> {
        if !(1..=MAX_PORTS).contains(&names.len()) {
            return Err(ConfigError::Ports(names.len()));
        }
        let wrong = |name: &&&str| !(1..=MAX_NAME).contains(&name.len()) || name.contains('\0');
        if let Some(name) = names.iter().find(wrong) {
            return Err(ConfigError::Name((*name).to_owned()));
        }
        let mut bytes = [0; CONFIG_SIZE];
        // At most `MAX_PORTS`.
        let count = (names.len() as u32).to_le_bytes();
        for (target, byte) in bytes.iter_mut().skip(MAX_PORTS_OFFSET).zip(count) {
            *target = byte;
        }
        Ok(Self { bytes })
    }

    /// Copies the bytes at `offset`; leaves alone what is past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_config_bytes(&self.bytes, offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ports_are_counted() {
        let config = Config::new(&["a", "b", "c"]).unwrap();
        let mut bytes = [0xee; 14];
        config.read(0, &mut bytes);
        assert_eq!(bytes, [0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0xee, 0xee]);
        config.read(u64::MAX, &mut bytes);
    }

    #[test]
    fn a_name_that_does_not_fit_is_refused() {
        let long = "x".repeat(MAX_NAME + 1);
        for name in ["", "a\0b", &long] {
            assert_eq!(Config::new(&["a", name]), Err(ConfigError::Name(name.into())));
        }
        assert!(Config::new(&[&long[1..]]).is_ok());
        assert_eq!(Config::new(&[]), Err(ConfigError::Ports(0)));
        assert_eq!(Config::new(&["a"; 33]), Err(ConfigError::Ports(33)));
    }
}
