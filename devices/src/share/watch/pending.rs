//! What the guest is still to be told.

use std::collections::{HashMap, HashSet, VecDeque};

use super::tables::Name;

/// So many things are told at once: few enough to be done in some milliseconds, so that what is told last does not wait.
const BATCH: usize = 256;

/// One thing that the guest is to ask for anew.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A name in a directory.
    Name {
        /// The node id of the directory.
        directory: u64,
        /// The name.
        name: Name,
        /// What the guest is to do about it.
        happened: Happened,
    },
    /// What names there are in a directory, and its attributes.
    Listing {
        /// Its node id.
        directory: u64,
    },
    /// The attributes of a node.
    Node {
        /// Its node id.
        node: u64,
    },
}

/// What has happened to a name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Happened {
    /// The data of what it names are others.
    pub data: bool,
}

impl Happened {
    /// What is lost sight of.
    pub(super) const ANYTHING: Self = Self { data: true };

    fn add(&mut self, other: Self) {
        self.data |= other.data;
    }
}

/// Some of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// In the order in which they are to be done.
    pub items: Vec<Item>,
}

impl Batch {
    /// How many.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// None.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }
}

/// All that is to be told, each thing once.
#[derive(Debug, Default)]
pub(super) struct Pending {
    /// In the order in which they came; those that are told meanwhile are not in `names` any more.
    order: VecDeque<(u64, Name)>,
    names: HashMap<(u64, Name), Happened>,
    listings: HashSet<u64>,
    nodes: HashSet<u64>,
}

impl Pending {
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty() && self.listings.is_empty() && self.nodes.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.names.len() + self.listings.len() + self.nodes.len()
    }

    pub(super) fn name(&mut self, directory: u64, name: &[u8], happened: Happened) {
        let key: (u64, Name) = (directory, name.into());
        match self.names.get_mut(&key) {
            Some(before) => before.add(happened),
            None => {
                self.order.push_back(key.clone());
                self.names.insert(key, happened);
            }
        }
    }

    pub(super) fn listing(&mut self, directory: u64) {
        self.listings.insert(directory);
    }

    pub(super) fn node(&mut self, node: u64) {
        self.nodes.insert(node);
    }

    /// The first of them, names before listings: that a name is gone is what programs ask for first, and a listing is
    /// only right after its names.
    pub(super) fn take(&mut self) -> Batch {
        let mut items = Vec::new();
        while items.len() < BATCH
            && let Some((directory, name)) = self.order.pop_front()
        {
            if let Some(happened) = self.names.remove(&(directory, name.clone())) {
                items.push(Item::Name { directory, name, happened });
            }
        }
        let mut some = |from: &mut HashSet<u64>, item: fn(u64) -> Item| {
            let taken: Vec<u64> =
                from.iter().copied().take(BATCH.saturating_sub(items.len())).collect();
            for number in taken {
                from.remove(&number);
                items.push(item(number));
            }
        };
        if self.names.is_empty() {
            some(&mut self.listings, |directory| Item::Listing { directory });
            some(&mut self.nodes, |node| Item::Node { node });
        }
        Batch { items }
    }

    /// What was not done after all.
    pub(super) fn put_back(&mut self, batch: Batch) {
        for item in batch.items {
            match item {
                Item::Name { directory, name, happened } => {
                    self.name(directory, &name, happened);
                    self.listing(directory);
                }
                Item::Listing { directory } => self.listing(directory),
                Item::Node { node } => self.node(node),
            }
        }
    }
}
