//! The device configuration (5.11.4).

/// Bytes of the tag field.
const TAG_SIZE: usize = 36;

/// Bytes of `struct virtio_fs_config`: the tag, `num_request_queues`, and `notify_buf_size`, which is 0
/// because the notification queue is not offered.
const CONFIG_SIZE: usize = TAG_SIZE + 4 + 4;

/// Most request queues. Each costs an MSI-X vector, a thread and an event file descriptor; a guest uses no
/// more than it has CPUs.
pub const MAX_REQUEST_QUEUES: u16 = 256;

/// The shared memory region (the DAX window) may become longer while the driver is active; a configuration
/// change notification tells when it has. Experimental and Oriel's own: no specification knows it, and only
/// the driver of `kernel-config/patches` accepts it. The last of the bits for device types (2.2) that Linux
/// can negotiate, while the standard's features of this device count up from 0.
pub const VIRTIO_FS_F_WINDOW_GROWS: u64 = 1 << 63;

/// What cannot be the configuration of a file system.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// The tag is empty, too long, or has a NUL in it.
    #[error("the tag {0:?} must be 1 to {TAG_SIZE} bytes of UTF-8 without NUL")]
    Tag(String),
    /// No or too many request queues.
    #[error("{0} request queues: must be 1 to {MAX_REQUEST_QUEUES}")]
    RequestQueues(u16),
}

/// What the driver can read about the file system.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    bytes: [u8; CONFIG_SIZE],
    request_queues: u16,
}

impl Config {
    /// `tag` is the name by which the guest mounts the file system.
    ///
    /// # Errors
    ///
    /// [`ConfigError`].
    pub fn new(tag: &str, request_queues: u16) -> Result<Self, ConfigError> {
        if !(1..=TAG_SIZE).contains(&tag.len()) || tag.contains('\0') {
            return Err(ConfigError::Tag(tag.to_owned()));
        }
        if !(1..=MAX_REQUEST_QUEUES).contains(&request_queues) {
            return Err(ConfigError::RequestQueues(request_queues));
        }
        let mut bytes = [0; CONFIG_SIZE];
        let (field, rest) = bytes.split_at_mut(TAG_SIZE);
        // Padded with NUL when shorter than the field.
        for (target, byte) in field.iter_mut().zip(tag.bytes()) {
            *target = byte;
        }
        let count = u32::from(request_queues).to_le_bytes();
        for (target, byte) in rest.iter_mut().zip(count) {
            *target = byte;
        }
        Ok(Self { bytes, request_queues })
    }

    /// Number of request queues.
    pub fn request_queues(&self) -> u16 {
        self.request_queues
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
    fn the_tag_is_padded_and_the_queues_are_counted() {
        let config = Config::new("share", 3).unwrap();
        let mut bytes = [0xee; 48];
        config.read(0, &mut bytes);
        assert_eq!(&bytes[..5], b"share");
        assert_eq!(bytes[5..36], [0; 31]);
        assert_eq!(bytes[36..44], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[44..], [0xee; 4], "past the end");
        config.read(u64::MAX, &mut bytes);
    }

    #[test]
    fn a_tag_that_does_not_fit_is_refused() {
        let long = "x".repeat(37);
        for tag in ["", "a\0b", &long] {
            let error = Config::new(tag, 1).unwrap_err();
            assert_eq!(error, ConfigError::Tag(tag.to_owned()));
        }
        assert!(Config::new(&long[..36], 1).is_ok());
        assert_eq!(Config::new("a", 0), Err(ConfigError::RequestQueues(0)));
        assert_eq!(Config::new("a", 257), Err(ConfigError::RequestQueues(257)));
    }
}
