//! What the machine would bring: interrupt vectors and a window slot that note what happens to them.
#![allow(clippy::unwrap_used, reason = "tests and fuzzers fail so")]

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use vm_memory::GuestAddress;

use super::{InterruptController, MsiMessage, MsiVector, WindowSlot};
use crate::sync::lock;

#[derive(Default)]
struct Vectors {
    /// For each vector, every `connect`.
    connections: Mutex<Vec<Vec<Option<MsiMessage>>>>,
    /// For each vector, how often it interrupted.
    triggers: Mutex<Vec<usize>>,
    triggered: Condvar,
    refuse: AtomicBool,
}

/// An interrupt controller that counts.
#[derive(Clone, Default)]
pub struct Controller(Arc<Vectors>);

struct Vector {
    vectors: Arc<Vectors>,
    index: usize,
}

impl InterruptController for Controller {
    fn allocate_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let mut triggers = lock(&self.0.triggers);
        triggers.push(0);
        lock(&self.0.connections).push(Vec::new());
        Ok(Arc::new(Vector { vectors: self.0.clone(), index: triggers.len() - 1 }))
    }
}

impl MsiVector for Vector {
    fn connect(&self, message: Option<MsiMessage>) -> io::Result<()> {
        if self.vectors.refuse.load(Ordering::Relaxed) {
            return Err(io::Error::other("no more routes"));
        }
        lock(&self.vectors.connections)[self.index].push(message);
        Ok(())
    }

    fn trigger(&self) {
        lock(&self.vectors.triggers)[self.index] += 1;
        self.vectors.triggered.notify_all();
    }
}

impl Controller {
    pub fn connections(&self, vector: usize) -> Vec<Option<MsiMessage>> {
        lock(&self.0.connections)[vector].clone()
    }

    pub fn triggers(&self) -> Vec<usize> {
        lock(&self.0.triggers).clone()
    }

    pub fn refuse(&self, refuse: bool) {
        self.0.refuse.store(refuse, Ordering::Relaxed);
    }

    /// Waits until `vector` has interrupted `count` times, and says how often it has.
    pub fn wait(&self, vector: usize, count: usize) -> usize {
        let triggers = lock(&self.0.triggers);
        let patience = Duration::from_secs(10);
        let (triggers, _) = self
            .0
            .triggered
            .wait_timeout_while(triggers, patience, |triggers| triggers[vector] < count)
            .unwrap();
        triggers[vector]
    }
}

/// A slot that remembers every place it was given.
#[derive(Default)]
pub struct Slot {
    places: Mutex<Vec<Option<u64>>>,
    refuse: AtomicBool,
}

impl WindowSlot for Slot {
    fn place(&self, address: Option<GuestAddress>) -> io::Result<()> {
        if address.is_some() && self.refuse.load(Ordering::Relaxed) {
            return Err(io::Error::other("over memory"));
        }
        lock(&self.places).push(address.map(|address| address.0));
        Ok(())
    }
}

impl Slot {
    /// Takes the places noted since the last call.
    pub fn places(&self) -> Vec<Option<u64>> {
        std::mem::take(&mut lock(&self.places))
    }

    pub fn refuse(&self, refuse: bool) {
        self.refuse.store(refuse, Ordering::Relaxed);
    }
}
