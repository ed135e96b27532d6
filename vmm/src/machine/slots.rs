//! KVM memslots: RAM, which stays where it is, and DAX windows, which the guest moves with their BARs.
#![expect(unsafe_code, reason = "a memslot hands host memory to the guest by its address")]

use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use devices::dax::{DaxWindow, GuestPageTables, Window};
use devices::memory::{AtomicGuestMemory, GuestMemory};
use devices::pci::WindowSlot;
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    Address, GuestAddress, GuestAddressSpace, GuestMemory as _, GuestMemoryRegion, GuestRegionMmap,
};

use super::prefault::Prefaulter;

/// The slots of one machine.
pub struct Slots {
    vm: Arc<VmFd>,
    memory: AtomicGuestMemory,
    next: AtomicU32,
    // Held while pages are entered and while a slot changes: see `Prefaulter::populate`. Taken after a
    // window's `place`.
    prefaulter: Mutex<Option<Prefaulter>>,
}

impl Slots {
    /// Gives the guest its RAM: a slot for each region of `memory`. The memory lives as long as the slots.
    ///
    /// # Errors
    ///
    /// KVM's.
    pub fn new(vm: Arc<VmFd>, memory: GuestMemory) -> Result<Arc<Self>> {
        let slots = Self {
            vm,
            memory: AtomicGuestMemory::new(memory),
            next: AtomicU32::new(0),
            prefaulter: Mutex::new(None),
        };
        for region in slots.memory.memory().iter() {
            let slot = slots.next.fetch_add(1, Ordering::Relaxed);
            let address = region.start_addr();
            let host = region.as_ptr();
            slots.set(slot, address, region.len(), host).with_context(|| {
                format!("memslot for {} MiB of RAM at {:#x}", region.len() >> 20, address.0)
            })?;
        }
        Ok(Arc::new(slots))
    }

    /// The guest's address space as devices translate through it.
    pub fn memory(&self) -> &AtomicGuestMemory {
        &self.memory
    }

    /// A slot for `window`, shown nowhere yet.
    pub fn window(self: &Arc<Self>, window: Arc<Window>) -> Arc<WindowMemory> {
        let slot = self.next.fetch_add(1, Ordering::Relaxed);
        let memory = Arc::new(WindowMemory {
            slots: self.clone(),
            slot,
            window: window.clone(),
            place: Mutex::new(None),
        });
        let tables: Arc<dyn GuestPageTables> = memory.clone();
        window.set_page_tables(Arc::downgrade(&tables));
        memory
    }

    /// From now on pages of windows are entered ahead of the guest's faults by this.
    pub fn set_prefaulter(&self, prefaulter: Prefaulter) {
        *self.prefaulter() = Some(prefaulter);
    }

    fn prefaulter(&self) -> MutexGuard<'_, Option<Prefaulter>> {
        self.prefaulter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Shows `len` bytes of host memory at `address`; `len` 0 takes the slot away.
    fn set(&self, slot: u32, address: GuestAddress, len: u64, host: *mut u8) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: address.raw_value(),
            memory_size: len,
            userspace_addr: host as u64,
        };
        let _nobody_prefaults = self.prefaulter();
        // SAFETY: the host range is guest RAM or a window's reservation. Both are owned through `self`
        // (RAM by `memory`, the window by its `WindowMemory`, which deletes the slot when dropped), and the
        // machine stops its vCPUs before it lets go of either.
        unsafe { self.vm.set_user_memory_region(region) }?;
        Ok(())
    }
}

/// A DAX window's memslot and its region in the guest's address space, at one place at a time.
///
/// Both have all that is reserved for the window from the start. KVM cannot make a slot longer, and so nothing
/// changes here when the window grows; a part behind its end that the guest touches is as empty as a hole in it.
/// The slot's own bookkeeping costs KVM some bytes for each 2 MiB.
pub struct WindowMemory {
    slots: Arc<Slots>,
    slot: u32,
    window: Arc<Window>,
    place: Mutex<Option<GuestAddress>>,
}

impl WindowMemory {
    fn region(&self, address: GuestAddress) -> io::Result<Arc<GuestRegionMmap>> {
        let size = usize::try_from(self.window.max_size()).map_err(io::Error::other)?;
        // SAFETY: the window's reservation is `size` bytes at this address and stays as long as `self`,
        // which outlives every snapshot of the memory map in use: devices are stopped before the machine
        // drops its windows. PROT_NONE marks it as a window (see `devices::memory`).
        let region = unsafe {
            MmapRegionBuilder::new(size)
                .with_raw_mmap_pointer(self.window.host_address())
                .with_mmap_prot(libc::PROT_NONE)
                .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
                .build()
        };
        let region = region.map_err(io::Error::other)?;
        let region = GuestRegionMmap::new(region, address)
            .ok_or_else(|| io::Error::other("the window passes the end of the address space"))?;
        Ok(Arc::new(region))
    }
}

impl WindowSlot for WindowMemory {
    fn place(&self, address: Option<GuestAddress>) -> io::Result<()> {
        let mut place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        if *place == address {
            return Ok(());
        }
        let guard = self.slots.memory.lock().unwrap_or_else(PoisonError::into_inner);
        let mut map = (*self.slots.memory.memory()).clone();
        if let Some(old) = *place {
            let removed = map.remove_region(old, self.window.max_size());
            (map, _) = removed.map_err(io::Error::other)?;
        }
        if let Some(new) = address {
            // Refuses what overlaps RAM or another window.
            map = map.insert_region(self.region(new)?).map_err(io::Error::other)?;
        }
        let (host, size) = (self.window.host_address(), self.window.max_size());
        if let Some(old) = *place {
            self.slots.set(self.slot, old, 0, host)?;
        }
        if let Some(new) = address
            && let Err(error) = self.slots.set(self.slot, new, size, host)
        {
            // KVM does not move a slot in one step: put it back where the caller thinks it is.
            if let Some(old) = *place {
                self.slots.set(self.slot, old, size, host)?;
            }
            return Err(error);
        }
        guard.replace(map);
        *place = address;
        Ok(())
    }
}

impl GuestPageTables for WindowMemory {
    fn populate(&self, offset: u64, len: u64) -> io::Result<()> {
        // Held so that the window stays where it is.
        let place = self.place.lock().unwrap_or_else(PoisonError::into_inner);
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.window.size());
        match (*place, self.slots.prefaulter().as_mut()) {
            (Some(address), Some(prefaulter)) if inside => {
                prefaulter.populate(address.raw_value() + offset, len)
            }
            _ => Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP)),
        }
    }
}

impl Drop for WindowMemory {
    fn drop(&mut self) {
        if let Err(error) = self.place(None) {
            log::error!("the DAX window's memslot stays: {error}");
        }
    }
}
