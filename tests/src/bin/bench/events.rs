//! What the part that runs guests tells the part that a person looks at: an event a line, as JSON.

use serde::{Deserialize, Serialize};

use crate::trace::Profile;

/// Where a figure belongs: the round, the system, the job.
pub type Place = (usize, String, String);

/// One measurement, for one operation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// How long it took; of `memory`, KiB.
    pub nanoseconds: f64,
    /// How long the processes of the system ran for it on the host, guest included.
    pub cpu: f64,
    /// The exits of the guest that KVM counted.
    pub exits: Option<f64>,
}

/// An event.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    /// The machine, and the versions of everything.
    Machine(Vec<(String, String)>),
    /// A command line of a system.
    Command(String, String),
    /// A measurement.
    Measured(Place, Figure),
    /// Where the time of an operation went.
    Profiled(Place, Profile),
    /// One that could not be made, and why.
    Missed(Place, String),
    /// A system is done for a round.
    Finished(usize, String),
}
