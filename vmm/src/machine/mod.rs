//! The machine: memory, interrupts, CPUs and buses, put together and run.
//!
//! [`Machine::new`] makes an empty one, [`Machine::add_fs`] adds a virtio-fs device for each share,
//! [`Machine::add_console`] the ports that a command's streams go through, [`Machine::add_vsock`] sockets
//! between guest and host, [`Machine::add_rng`] a source of random bytes, and [`Machine::start`] loads a kernel
//! and lets the vCPUs go. All that the guest can touch is in the `devices` crate; here is what only KVM can
//! give it.

mod acpi;
mod cpuid;
mod faults;
mod irq;
pub mod layout;
pub mod memory;
mod prefault;
mod registers;
mod slots;
mod vcpu;
mod watch;

use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use devices::bus::Bus;
use devices::dax::Window;
use devices::pci::{AddressWindow, AddressWindows, PciRoot, root};
use devices::power::{self, Power, PowerRequest};
use devices::serial::{self, SerialPort};
use devices::virtio::console::ConsoleDevice;
use devices::virtio::fs::{self, Dispatch, FsDevice, Server};
use devices::virtio::rng::RngDevice;
use devices::virtio::vsock::VsockDevice;
use devices::virtio::{VirtioDevice, VirtioPci};
use kvm_bindings::CpuId;
use kvm_ioctls::{Kvm, VmFd};
use vm_memory::GuestAddressSpace;

use self::irq::{Interrupts, MsiController};
use self::memory::MemoryConfig;
use self::prefault::Prefaulter;
use self::slots::Slots;
use self::vcpu::Exits;
use crate::kernel::BootImage;

/// Why a machine stopped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StopReason {
    /// The guest powered itself off.
    PowerOff,
    /// The guest reset itself; also a kernel that panicked, and a triple fault.
    Reset,
    /// The guest cannot be run any further, for this reason.
    Crashed(String),
}

/// What a machine is made with.
pub struct MachineConfig {
    /// Number of vCPUs, at least 1.
    pub cpus: u8,
    /// Guest RAM.
    pub memory: MemoryConfig,
    /// Where COM1 sends: the kernel's console.
    pub serial: Box<dyn Write + Send>,
    /// Called once or more, from vCPU threads, when the guest stopped.
    pub on_stop: Arc<dyn Fn(StopReason) + Send + Sync>,
}

/// A machine that is being built or runs.
///
/// Fields are dropped in order: vCPUs are stopped first (see `Drop`), then devices go, then windows and
/// memory, then the VM.
pub struct Machine {
    running: Option<(Arc<Exits>, Vec<JoinHandle<()>>)>,
    serial: Arc<SerialPort>,
    pci: Arc<PciRoot>,
    windows: Vec<Arc<Window>>,
    interrupts: Arc<Interrupts>,
    slots: Arc<Slots>,
    address_windows: AddressWindows,
    on_stop: Arc<dyn Fn(StopReason) + Send + Sync>,
    cpus: u8,
    cpuid: CpuId,
    vm: Arc<VmFd>,
    kvm: Kvm,
}

impl Machine {
    /// A machine with RAM, interrupt controllers and a serial port, without a kernel.
    ///
    /// # Errors
    ///
    /// What the host refused, and what to do about it.
    pub fn new(kvm: Kvm, config: MachineConfig) -> Result<Self> {
        let vm = Arc::new(kvm.create_vm().context("KVM_CREATE_VM")?);
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP).context("identity map")?;
        vm.set_tss_address(layout::KVM_TSS).context("KVM_SET_TSS_ADDR")?;
        vm.create_irq_chip().context("KVM_CREATE_IRQCHIP")?;
        let slots = Slots::new(vm.clone(), memory::allocate(&config.memory)?)?;
        let cpuid = cpuid::supported(&kvm)?;
        let mmio64 = layout::mmio64(config.memory.size, cpuid::address_bits(&cpuid));
        let address_windows = AddressWindows { mmio32: layout::MMIO32, mmio64 };
        let pci = Arc::new(PciRoot::new(address_windows.clone()));
        let interrupts = Interrupts::new(vm.clone());
        let line = interrupts.line(layout::SERIAL_LINE).context("serial interrupt")?;
        let serial = Arc::new(SerialPort::new(line, config.serial));
        Ok(Self {
            running: None,
            serial,
            pci,
            windows: Vec::new(),
            interrupts,
            slots,
            address_windows,
            on_stop: config.on_stop,
            cpus: config.cpus,
            cpuid,
            vm,
            kvm,
        })
    }

    /// Adds a virtio-fs device that is served by `server`, on the threads that `dispatch` says, with a DAX window if
    /// there is one, and returns it.
    ///
    /// # Errors
    ///
    /// When the guest's address space or the PCI bus has no room, or the host refuses.
    pub fn add_fs(
        &mut self,
        config: fs::Config,
        server: Arc<dyn Server>,
        window: Option<Arc<Window>>,
        dispatch: Dispatch,
    ) -> Result<Arc<FsDevice>> {
        let shown = window.as_ref().map(|window| fs::Window {
            dax: window.clone(),
            slot: self.slots.window(window.clone()),
        });
        let device = FsDevice::new(config, server, shown).context("virtio-fs device")?;
        let device = Arc::new(device.with_dispatch(dispatch));
        self.add_device(device.clone()).context("virtio-fs device")?;
        self.windows.extend(window);
        Ok(device)
    }

    /// Adds a console device. Who gave it keeps it, to send input and to wait for the last output.
    ///
    /// # Errors
    ///
    /// When the PCI bus has no room, or the host refuses.
    pub fn add_console(&mut self, device: Arc<ConsoleDevice>) -> Result<()> {
        self.add_device(device).context("virtio-console device")
    }

    /// Adds a socket device. Who gave it keeps it, to wait for the last data.
    ///
    /// # Errors
    ///
    /// When the PCI bus has no room, or the host refuses.
    pub fn add_vsock(&mut self, device: Arc<VsockDevice>) -> Result<()> {
        self.add_device(device).context("virtio-vsock device")
    }

    /// Adds an entropy device.
    ///
    /// # Errors
    ///
    /// When the PCI bus has no room, or the host refuses.
    pub fn add_rng(&mut self) -> Result<()> {
        let device = RngDevice::new().context("virtio-rng device")?;
        self.add_device(Arc::new(device)).context("virtio-rng device")
    }

    fn add_device(&self, device: Arc<dyn VirtioDevice>) -> Result<()> {
        let controller = MsiController(self.interrupts.clone());
        let function = VirtioPci::new(device, self.slots.memory().clone(), &controller)?;
        self.pci.add(Arc::new(function))?;
        Ok(())
    }

    /// COM1.
    pub fn serial(&self) -> &Arc<SerialPort> {
        &self.serial
    }

    /// Loads `image` and makes the vCPUs, which do not run before [`Machine::release`].
    ///
    /// # Errors
    ///
    /// When the image does not fit or the host refuses. The machine cannot be started again.
    pub fn start(&mut self, image: &BootImage) -> Result<()> {
        ensure!(self.running.is_none(), "the machine runs already");
        let memory = self.slots.memory().memory();
        let acpi = acpi::write_tables(&memory, self.cpus, &self.address_windows.mmio64)?;
        registers::write_reset_vector(&memory)?;
        let entry = image.load(&memory, acpi)?;
        let mut vcpus = Vec::new();
        for id in 0..self.cpus {
            let vcpu = self.vm.create_vcpu(id.into()).context("KVM_CREATE_VCPU")?;
            let cpuid = cpuid::for_cpu(&self.kvm, &self.cpuid, id, self.cpus)?;
            vcpu.set_cpuid2(&cpuid).context("KVM_SET_CPUID2")?;
            registers::set_common_state(&vcpu)?;
            vcpus.push(vcpu);
        }
        if let Some(boot) = vcpus.first() {
            registers::set_boot_state(boot, &memory, entry)?;
        }
        if !self.windows.is_empty() {
            // For the one after the guest's. Without it every page costs a fault.
            match Prefaulter::new(&self.kvm, &self.vm, &self.cpuid, self.cpus) {
                Ok(Some(prefaulter)) => self.slots.set_prefaulter(prefaulter),
                Ok(None) => {}
                Err(error) => log::warn!("DAX pages are not entered ahead of faults: {error:#}"),
            }
        }
        let exits = Arc::new(self.exits()?);
        watch::start(exits.clone(), &vcpus)?;
        // From the first thread on, dropping the machine stops them.
        let (_, threads) = self.running.insert((exits.clone(), Vec::new()));
        for (id, vcpu) in (0..).zip(vcpus) {
            threads.push(vcpu::start(id, vcpu, exits.clone())?);
        }
        Ok(())
    }

    /// Both buses, with everybody on them.
    fn exits(&self) -> Result<Exits> {
        let mut ports = Bus::new();
        ports.attach(layout::SERIAL_PORT.into(), serial::PORTS, self.serial.clone())?;
        let on_stop = self.on_stop.clone();
        let power = Power::new(move |request| {
            on_stop(match request {
                PowerRequest::Off => StopReason::PowerOff,
                PowerRequest::Reset => StopReason::Reset,
            });
        });
        ports.attach(layout::POWER_PORTS.into(), power::PORTS, Arc::new(power))?;
        ports.attach(layout::PCI_CONFIG_PORTS, root::PORT_COUNT, self.pci.ports())?;

        let mut mmio = Bus::new();
        mmio.attach(layout::ECAM.start, root::ECAM_SIZE, self.pci.ecam())?;
        let AddressWindows { mmio32, mmio64 } = &self.address_windows;
        let windows = [(mmio32, AddressWindow::Mmio32), (mmio64, AddressWindow::Mmio64)];
        for (range, window) in windows {
            if !range.is_empty() {
                let len = range.end - range.start;
                mmio.attach(range.start, len, self.pci.mmio(window))?;
            }
        }
        let on_stop = self.on_stop.clone();
        Ok(Exits {
            ports,
            mmio,
            windows: self.windows.clone(),
            stop: Box::new(move |reason| on_stop(reason)),
            released: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        })
    }

    /// Lets the guest run, once the machine was started. Takes no call of KVM's: the thread that made the vCPUs may have
    /// given those up.
    pub fn release(&self) {
        if let Some((exits, threads)) = &self.running {
            vcpu::release(exits, threads);
        }
    }

    /// Stops the vCPUs. Idempotent; nothing of the guest runs afterwards.
    pub fn stop(&mut self) {
        if let Some((exits, threads)) = self.running.take() {
            vcpu::stop(&exits, threads);
        }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}
