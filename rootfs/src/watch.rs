//! What passes about shares with `cache=watch`: what the host has seen change, which the guest's kernel is to ask for
//! anew.
//!
//! The host connects to [`WATCH_PORT`] once for each such share, and sends [`ToWatcher`] in
//! [`frames`](crate::frames); each is answered by one [`FromWatcher`] before the next is sent.

use serde::{Deserialize, Serialize};

/// The port of the guest where the agent hears of changes: the next one after that for commands.
pub const WATCH_PORT: u32 = 513;

/// The host's messages.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ToWatcher {
    /// The first: what follows is about the share with this tag.
    Begin {
        /// The device's.
        tag: String,
    },
    /// This has changed.
    Changed(Vec<Change>),
}

/// A change. Nodes are numbers that the guest's kernel has been given by the device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Change {
    /// What a name in a directory is, or its attributes.
    Name {
        /// The directory's node.
        directory: u64,
        /// The name, each byte as the character of that number: names need not be UTF-8, and mostly are ASCII.
        name: String,
        /// Its data as well.
        data: bool,
    },
    /// Which names are in a directory.
    Listing {
        /// Its node.
        directory: u64,
    },
    /// Attributes.
    Node {
        /// The node.
        node: u64,
    },
}

/// The agent's answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FromWatcher {
    /// To [`ToWatcher::Begin`]: it can be done.
    Ready {
        /// The thread that does it, by the number that requests of the device have.
        thread: u32,
    },
    /// To [`ToWatcher::Begin`]: it cannot, and the stream ends.
    Refused {
        /// Why: one line.
        message: String,
    },
    /// To [`ToWatcher::Changed`]: the kernel has asked.
    Done,
}

/// Bytes as a text of as many characters.
pub fn text(bytes: &[u8]) -> String {
    bytes.iter().copied().map(char::from).collect()
}

/// And back. None for a text that is none of those.
pub fn bytes(text: &str) -> Option<Vec<u8>> {
    text.chars().map(|character| u8::try_from(u32::from(character)).ok()).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_name_of_any_bytes_comes_out_as_it_went_in() {
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(bytes(&text(&all)).unwrap(), all);
        assert_eq!(text(b"name"), "name");
        assert_eq!(bytes("\u{100}"), None);
        let name = text(&all);
        let change = Change::Name { directory: 1 << 60, name, data: true };
        let json = serde_json::to_vec(&change).unwrap();
        assert_eq!(serde_json::from_slice::<Change>(&json).unwrap(), change);
    }
}
