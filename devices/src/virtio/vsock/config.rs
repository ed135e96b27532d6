//! The device configuration (5.10.4).

/// The smallest context id that is a guest's: 0 is reserved, 1 is each machine for itself, 2 is the host.
pub const MIN_GUEST_CID: u32 = 3;

/// The largest one: 2^32 - 1 means any.
pub const MAX_GUEST_CID: u32 = u32::MAX - 1;

/// What cannot be the configuration of a socket device.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The context id is reserved.
    #[error("the context id {0} is reserved: must be {MIN_GUEST_CID} to {MAX_GUEST_CID}")]
    ContextId(u32),
}

/// What the driver can read about the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    guest_cid: u32,
}

impl Config {
    /// `guest_cid` is the guest's address. No two guests have to differ in it here: none sees another.
    ///
    /// # Errors
    ///
    /// [`ConfigError`].
    pub fn new(guest_cid: u32) -> Result<Self, ConfigError> {
        if !(MIN_GUEST_CID..=MAX_GUEST_CID).contains(&guest_cid) {
            return Err(ConfigError::ContextId(guest_cid));
        }
        Ok(Self { guest_cid })
    }

    /// The guest's context id. Only the lower 32 bits are ever used (5.10.4).
    pub fn guest_cid(&self) -> u64 {
        self.guest_cid.into()
    }

    /// Copies the bytes at `offset`; leaves alone what is past the end.
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        crate::virtio::read_config_bytes(&self.guest_cid().to_le_bytes(), offset, data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_configuration_is_the_context_id() {
        let config = Config::new(0x1234_5678).unwrap();
        let mut bytes = [0xee; 10];
        config.read(0, &mut bytes);
        assert_eq!(bytes, [0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0xee, 0xee]);
        config.read(u64::MAX, &mut bytes);
    }

    #[test]
    fn a_context_id_that_is_reserved_is_refused() {
        for cid in [0, 1, 2, u32::MAX] {
            assert_eq!(Config::new(cid), Err(ConfigError::ContextId(cid)));
        }
        assert!(Config::new(MIN_GUEST_CID).is_ok());
        assert!(Config::new(MAX_GUEST_CID).is_ok());
    }
}
