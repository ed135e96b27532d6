//! What the guest may keep, because the directory that it is in is watched.

use std::collections::HashMap;
use std::sync::Arc;

use super::super::file_handle::FileHandle;

/// A name.
pub(super) type Name = Arc<[u8]>;

/// A directory that is watched.
#[derive(Debug)]
pub(super) struct Directory {
    handle: Arc<FileHandle>,
    /// What the guest was told of: the node of each name, 0 for one that is not there or is being looked up.
    pub(super) names: HashMap<Name, u64>,
}

/// All of them. Some 100 bytes for each name.
#[derive(Debug, Default)]
pub(super) struct Tables {
    /// By node id.
    pub(super) directories: HashMap<u64, Directory>,
    by_handle: HashMap<Arc<FileHandle>, u64>,
    /// Of what is no directory: where the guest was told of it.
    nodes: HashMap<u64, (u64, Name)>,
    pub(super) names: usize,
}

impl Tables {
    pub(super) fn watches(&self, directory: u64) -> bool {
        self.directories.contains_key(&directory)
    }

    pub(super) fn insert(&mut self, directory: u64, handle: FileHandle) {
        let handle = Arc::new(handle);
        self.by_handle.insert(handle.clone(), directory);
        self.directories.insert(directory, Directory { handle, names: HashMap::new() });
    }

    /// Forgets a directory, with all its names. `true`: it was watched under
    /// this number alone.
    pub(super) fn remove(&mut self, directory: u64) -> bool {
        let Some(removed) = self.directories.remove(&directory) else { return false };
        // It may have another number by now.
        if self.by_handle.get(&removed.handle) == Some(&directory) {
            self.by_handle.remove(&removed.handle);
        }
        self.names = self.names.saturating_sub(removed.names.len());
        for node in removed.names.values() {
            if self.nodes.get(node).is_some_and(|(parent, _)| *parent == directory) {
                self.nodes.remove(node);
            }
        }
        !self.by_handle.contains_key(&removed.handle)
    }

    pub(super) fn by_handle(&self, handle: &FileHandle) -> Option<u64> {
        self.by_handle.get(handle).copied()
    }

    /// The guest is told of a name: from now on what happens to it matters. `false`: there is no room.
    pub(super) fn tell(&mut self, directory: u64, name: &[u8], most: usize) -> bool {
        let Some(watched) = self.directories.get_mut(&directory) else { return false };
        if watched.names.contains_key(name) {
            return true;
        }
        if self.names >= most {
            return false;
        }
        self.names += 1;
        watched.names.insert(name.into(), 0);
        true
    }

    /// The node of a name that was told.
    pub(super) fn told(&self, directory: u64, name: &[u8]) -> Option<u64> {
        self.directories.get(&directory)?.names.get(name).copied()
    }

    /// A name that was told is this node's, 0 when it is not there; `alone`: its only name. `false`: it was forgotten
    /// meanwhile, and is to be told anew.
    pub(super) fn found(&mut self, directory: u64, name: &[u8], node: u64, alone: bool) -> bool {
        let Some(watched) = self.directories.get_mut(&directory) else { return false };
        let Some((key, _)) = watched.names.get_key_value(name) else { return false };
        let key = key.clone();
        if let Some(of) = watched.names.get_mut(name) {
            *of = node;
        }
        if node != 0 && alone {
            self.nodes.insert(node, (directory, key));
        }
        true
    }

    /// Whether what happens to a node's attributes is heard of, by the directory that its only name is in.
    pub(super) fn has_node(&self, node: u64) -> bool {
        self.nodes.contains_key(&node)
    }

    /// Its name is another one now, or none.
    pub(super) fn lose_node(&mut self, node: u64) {
        self.nodes.remove(&node);
    }

    /// The guest has forgotten it.
    pub(super) fn forget(&mut self, node: u64) {
        let Some((directory, name)) = self.nodes.remove(&node) else { return };
        let Some(watched) = self.directories.get_mut(&directory) else { return };
        if watched.names.get(&name) == Some(&node) {
            watched.names.remove(&name);
            self.names = self.names.saturating_sub(1);
        }
    }

    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}
