//! What cannot be done to a tree.

use super::MOST_MEMBERS;
use super::directories::DEPTH;

/// Why a tree is as it was. The text is one line, for whoever asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// A path that cannot be one.
    #[error(
        "{0:?} is no place for a share; write an absolute path of 1 to {DEPTH} names, each of at most 255 bytes, \
         none of them . or .."
    )]
    Path(String),
    /// There is a member.
    #[error("there is a share at {0} already; remove it first, or choose another place")]
    Taken(String),
    /// The way there leads through a member.
    #[error("{0} is a share, and none can be put into another; choose another place")]
    Inside(String),
    /// It is a directory of the tree.
    #[error("there are shares below {0}; choose another place")]
    Holds(String),
    /// There is no member.
    #[error("there is no share at {path}, {}", only(.there))]
    Missing {
        /// Where none is.
        path: String,
        /// Where there are some.
        there: Vec<String>,
    },
    /// There are as many as there can be.
    #[error(
        "there are {MOST_MEMBERS} shares, the most there can be; those that were removed and are still used count, \
         until they are removed with --force"
    )]
    Full,
    /// There were as many as there can be.
    #[error("this sandbox has had as many shares as it can ever have; start another one")]
    UsedUp,
    /// An option that concerns the session.
    #[error("{0}: cannot differ among shares behind one device; it is as --shares says")]
    Differs(&'static str),
    /// The tree is read-only as a whole.
    #[error("all shares are read-only here, because --shares says ro")]
    AllReadOnly,
    /// The host cannot serve the directory.
    #[error("{0}")]
    Host(String),
    /// Some changes are slow.
    #[error(
        "{path} is read-only for all that comes, but {count} changes that began before have not ended; ask again"
    )]
    Changing {
        /// Where.
        path: String,
        /// How many.
        count: usize,
    },
    /// What is mapped to be written could not be taken from the guest.
    #[error(
        "{path} is read-only for all requests, but the guest can still write to files that it has mapped: {why}; ask \
         again"
    )]
    Mapped {
        /// Where.
        path: String,
        /// What the host says.
        why: String,
    },
    /// Some requests are slow.
    #[error(
        "{0} is removed, but requests that began before have not ended; the host's directory is in use until then"
    )]
    Serving(String),
}

fn only(there: &[String]) -> String {
    match there {
        [] => "nor anywhere else".into(),
        there => format!("only at {}", there.join(", ")),
    }
}
