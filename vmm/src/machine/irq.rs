//! Interrupts: I/O APIC pins for the serial port, message-signalled ones for PCI, all by irqfd.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use devices::pci::{InterruptController, MsiMessage, MsiVector};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use kvm_ioctls::VmFd;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::layout;

/// Pins of one legacy interrupt controller.
const PIC_PINS: u32 = 8;

/// All interrupt routes of one machine. KVM takes the whole table at once, so it is kept here.
pub struct Interrupts {
    vm: Arc<VmFd>,
    routes: Mutex<Routes>,
}

struct Routes {
    next_gsi: u32,
    messages: BTreeMap<u32, MsiMessage>,
}

impl Interrupts {
    /// Routes of a machine whose in-kernel interrupt chip exists already.
    pub fn new(vm: Arc<VmFd>) -> Arc<Self> {
        let routes = Routes { next_gsi: layout::IO_APIC_PINS, messages: BTreeMap::new() };
        Arc::new(Self { vm, routes: Mutex::new(routes) })
    }

    /// An eventfd that pulses I/O APIC pin `pin`. The binding ends with the machine.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn line(&self, pin: u32) -> io::Result<EventFd> {
        self.bind(pin)
    }

    fn bind(&self, gsi: u32) -> io::Result<EventFd> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        self.vm.register_irqfd(&event, gsi)?;
        Ok(event)
    }

    fn connect(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut routes = self.routes.lock().unwrap_or_else(PoisonError::into_inner);
        let before = match message {
            Some(message) => routes.messages.insert(gsi, message),
            None => routes.messages.remove(&gsi),
        };
        if before == message {
            return Ok(());
        }
        let result = self.apply(&routes.messages);
        if result.is_err() {
            routes.messages.remove(&gsi);
        }
        result
    }

    fn apply(&self, messages: &BTreeMap<u32, MsiMessage>) -> io::Result<()> {
        let pins = (0..layout::IO_APIC_PINS).flat_map(pin_routes);
        let messages = messages.iter().map(|(gsi, message)| {
            let mut entry = kvm_irq_routing_entry {
                gsi: *gsi,
                type_: KVM_IRQ_ROUTING_MSI,
                ..Default::default()
            };
            entry.u.msi.address_lo = message.address as u32;
            entry.u.msi.address_hi = (message.address >> 32) as u32;
            entry.u.msi.data = message.data;
            entry
        });
        let entries: Vec<_> = pins.chain(messages).collect();
        let table = KvmIrqRouting::from_entries(&entries)
            .map_err(|error| io::Error::other(format!("{} routes: {error:?}", entries.len())))?;
        Ok(self.vm.set_gsi_routing(&table)?)
    }
}

/// A pin leads to the I/O APIC, and the first sixteen to the legacy controllers as well, as on a PC.
fn pin_routes(pin: u32) -> impl Iterator<Item = kvm_irq_routing_entry> {
    let route = |irqchip, pin_of_chip| {
        let mut entry = kvm_irq_routing_entry {
            gsi: pin,
            type_: KVM_IRQ_ROUTING_IRQCHIP,
            ..Default::default()
        };
        entry.u.irqchip.irqchip = irqchip;
        entry.u.irqchip.pin = pin_of_chip;
        entry
    };
    let legacy = match pin / PIC_PINS {
        0 => Some(route(KVM_IRQCHIP_PIC_MASTER, pin)),
        1 => Some(route(KVM_IRQCHIP_PIC_SLAVE, pin - PIC_PINS)),
        _ => None,
    };
    legacy.into_iter().chain([route(KVM_IRQCHIP_IOAPIC, pin)])
}

/// The vectors' way in. A newtype, because a vector keeps the routes alive.
pub struct MsiController(pub Arc<Interrupts>);

impl InterruptController for MsiController {
    fn allocate_vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let gsi = {
            let mut routes = self.0.routes.lock().unwrap_or_else(PoisonError::into_inner);
            let gsi = routes.next_gsi;
            routes.next_gsi += 1;
            gsi
        };
        let event = self.0.bind(gsi)?;
        Ok(Arc::new(Vector { interrupts: self.0.clone(), gsi, event }))
    }
}

struct Vector {
    interrupts: Arc<Interrupts>,
    gsi: u32,
    event: EventFd,
}

impl MsiVector for Vector {
    fn connect(&self, message: Option<MsiMessage>) -> io::Result<()> {
        self.interrupts.connect(self.gsi, message)
    }

    fn trigger(&self) {
        if let Err(error) = self.event.write(1) {
            // The counter is full: as many interrupts as fit are on their way already.
            log::debug!("interrupt {} not sent: {error}", self.gsi);
        }
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        if let Err(error) = self.interrupts.vm.unregister_irqfd(&self.event, self.gsi) {
            log::debug!("irqfd {}: {error}", self.gsi);
        }
    }
}
