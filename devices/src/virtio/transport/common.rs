//! The common configuration (4.1.4.3) and the device status (2.1): how a driver and a device agree.

use std::sync::{Arc, Mutex, mpsc};
use std::thread;
use std::time::Duration;

use vm_memory::GuestAddressSpace;

use super::signals::{NO_VECTOR, Signals};
use crate::complaint::complain;
use crate::memory::AtomicGuestMemory;
use crate::sync::lock;
use crate::virtio::queue::Rings;
use crate::virtio::{
    Activation, ActiveQueue, Interrupts, Queue, VIRTIO_F_VERSION_1, VIRTIO_RING_F_EVENT_IDX,
    VIRTIO_RING_F_INDIRECT_DESC, VirtioDevice,
};

/// Device status bits (2.1).
const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const DEVICE_NEEDS_RESET: u8 = 64;
const FAILED: u8 = 128;

/// How long a vCPU waits for the end of the reset that it has begun, so that a driver which does not look whether
/// the status is 0 yet, as it has to, mostly finds it so. No longer, because the vCPU does nothing else meanwhile.
const QUICK_RESET: Duration = Duration::from_millis(100);

/// What every device offers on top of its own features.
const RING_FEATURES: u64 =
    VIRTIO_F_VERSION_1 | VIRTIO_RING_F_EVENT_IDX | VIRTIO_RING_F_INDIRECT_DESC;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Register {
    DeviceFeatureSelect,
    DeviceFeature,
    DriverFeatureSelect,
    DriverFeature,
    ConfigMsixVector,
    NumQueues,
    DeviceStatus,
    ConfigGeneration,
    QueueSelect,
    QueueSize,
    QueueMsixVector,
    QueueEnable,
    QueueNotifyOff,
    QueueDesc,
    QueueDriver,
    QueueDevice,
}

/// Offset and width in bytes of each register of `struct virtio_pci_common_cfg`. Those behind are of
/// features that are not offered (NOTIF_CONFIG_DATA, RING_RESET, ADMIN_VQ) and read as zero.
const REGISTERS: [(u64, usize, Register); 16] = [
    (0, 4, Register::DeviceFeatureSelect),
    (4, 4, Register::DeviceFeature),
    (8, 4, Register::DriverFeatureSelect),
    (12, 4, Register::DriverFeature),
    (16, 2, Register::ConfigMsixVector),
    (18, 2, Register::NumQueues),
    (20, 1, Register::DeviceStatus),
    (21, 1, Register::ConfigGeneration),
    (22, 2, Register::QueueSelect),
    (24, 2, Register::QueueSize),
    (26, 2, Register::QueueMsixVector),
    (28, 2, Register::QueueEnable),
    (30, 2, Register::QueueNotifyOff),
    (32, 8, Register::QueueDesc),
    (40, 8, Register::QueueDriver),
    (48, 8, Register::QueueDevice),
];

/// What the driver has said about one queue.
struct QueueRegisters {
    max_size: u16,
    rings: Rings,
    enabled: bool,
}

impl QueueRegisters {
    fn new(max_size: u16) -> Self {
        Self { max_size, rings: Rings { size: max_size, ..Rings::default() }, enabled: false }
    }
}

struct State {
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    /// Without DEVICE_NEEDS_RESET, which is kept where workers can set it.
    status: u8,
    queue_select: u16,
    queues: Vec<QueueRegisters>,
    /// The device is being reset. The status still reads as before, and nothing can be written: the driver has
    /// to wait until it reads 0 (4.1.4.3.2).
    resetting: bool,
}

impl State {
    fn new(sizes: &[u16]) -> Self {
        Self {
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            status: 0,
            queue_select: 0,
            queues: sizes.iter().copied().map(QueueRegisters::new).collect(),
            resetting: false,
        }
    }

    fn selected(&self) -> Option<&QueueRegisters> {
        self.queues.get(usize::from(self.queue_select))
    }
}

/// The registers, and the device they set up.
pub(super) struct CommonConfiguration {
    device: Arc<dyn VirtioDevice>,
    memory: AtomicGuestMemory,
    signals: Arc<Signals>,
    state: Mutex<State>,
}

impl CommonConfiguration {
    pub(super) fn new(
        device: Arc<dyn VirtioDevice>,
        memory: AtomicGuestMemory,
        signals: Arc<Signals>,
    ) -> Self {
        let state = State::new(device.queue_max_sizes());
        Self { device, memory, signals, state: Mutex::new(state) }
    }

    /// A guest read of any width at any offset: each byte is that of the register it is in, or 0.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let state = lock(&self.state);
        for (start, width, register) in touched(offset, data.len()) {
            let bytes = self.get(&state, register).to_le_bytes();
            for (at, byte) in (start..).zip(bytes.iter().take(width)) {
                let place = at.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
                if let Some(target) = place.and_then(|at| data.get_mut(at)) {
                    *target = *byte;
                }
            }
        }
    }

    /// A guest write of any width at any offset: each register it touches keeps the bytes that are not
    /// written. This is also how the halves of an 8 byte register are written one after the other.
    pub(super) fn write(self: &Arc<Self>, offset: u64, data: &[u8]) {
        for (start, width, register) in touched(offset, data.len()) {
            let mut state = lock(&self.state);
            let mut bytes = self.get(&state, register).to_le_bytes();
            for (at, target) in (start..).zip(bytes.iter_mut().take(width)) {
                let place = at.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
                if let Some(byte) = place.and_then(|at| data.get(at)) {
                    *target = *byte;
                }
            }
            let value = u64::from_le_bytes(bytes);
            if state.resetting {
                log::debug!("{register:?} is written during a reset: ignored");
            } else if register == Register::DeviceStatus && value == 0 {
                if state.status & DRIVER_OK == 0 {
                    // The device is not in use. Nor could its status tell how long this takes: it may read 0.
                    self.forget(&mut state);
                    continue;
                }
                state.resetting = true;
                drop(state);
                self.reset();
            } else {
                self.set(&mut state, register, value);
            }
        }
    }

    fn get(&self, state: &State, register: Register) -> u64 {
        let queue = state.selected();
        match register {
            Register::DeviceFeatureSelect => state.device_feature_select.into(),
            Register::DeviceFeature => half(self.offered(), state.device_feature_select),
            Register::DriverFeatureSelect => state.driver_feature_select.into(),
            Register::DriverFeature => half(state.driver_features, state.driver_feature_select),
            Register::ConfigMsixVector => self.signals.config_vector().into(),
            Register::NumQueues => state.queues.len() as u64,
            Register::DeviceStatus if self.signals.is_broken() => {
                (state.status | DEVICE_NEEDS_RESET).into()
            }
            Register::DeviceStatus => state.status.into(),
            Register::ConfigGeneration => self.signals.generation().into(),
            Register::QueueSelect => state.queue_select.into(),
            Register::QueueSize => queue.map_or(0, |queue| queue.rings.size.into()),
            Register::QueueMsixVector => match queue {
                Some(_) => self.signals.queue_vector(state.queue_select).into(),
                None => NO_VECTOR.into(),
            },
            Register::QueueEnable => queue.map_or(0, |queue| queue.enabled.into()),
            // Each queue has a doorbell of its own, at its index.
            Register::QueueNotifyOff => queue.map_or(0, |_| state.queue_select.into()),
            Register::QueueDesc => queue.map_or(0, |queue| queue.rings.descriptors),
            Register::QueueDriver => queue.map_or(0, |queue| queue.rings.driver),
            Register::QueueDevice => queue.map_or(0, |queue| queue.rings.device),
        }
    }

    fn set(&self, state: &mut State, register: Register, value: u64) {
        match register {
            Register::DeviceFeatureSelect => state.device_feature_select = value as u32,
            Register::DriverFeatureSelect => state.driver_feature_select = value as u32,
            Register::DriverFeature => {
                if state.status & FEATURES_OK == 0 {
                    let shift = match state.driver_feature_select {
                        0 => 0,
                        1 => 32,
                        // No feature is up there.
                        _ => return,
                    };
                    state.driver_features &= !(u64::from(u32::MAX) << shift);
                    state.driver_features |= value << shift;
                }
            }
            Register::ConfigMsixVector => self.signals.set_config_vector(value as u16),
            Register::DeviceStatus => self.set_status(state, value as u8),
            Register::QueueSelect => state.queue_select = value as u16,
            Register::DeviceFeature
            | Register::NumQueues
            | Register::ConfigGeneration
            | Register::QueueNotifyOff => {}
            Register::QueueSize
            | Register::QueueMsixVector
            | Register::QueueEnable
            | Register::QueueDesc
            | Register::QueueDriver
            | Register::QueueDevice => self.set_queue(state, register, value),
        }
    }

    /// Registers of the selected queue. They are frozen once the queue is enabled or the driver is ready:
    /// the device works with what was checked then.
    fn set_queue(&self, state: &mut State, register: Register, value: u64) {
        let (select, live) = (state.queue_select, state.status & DRIVER_OK != 0);
        let Some(queue) = state.queues.get_mut(usize::from(select)) else {
            return;
        };
        if queue.enabled || live {
            log::debug!("{register:?} of queue {select} in use is written: ignored");
            return;
        }
        match register {
            Register::QueueSize => {
                let size = value as u16;
                if size.is_power_of_two() && size <= queue.max_size {
                    queue.rings.size = size;
                } else {
                    log::debug!("queue {select} cannot have {size} descriptors: ignored");
                }
            }
            Register::QueueMsixVector => self.signals.set_queue_vector(select, value as u16),
            // Only 1 has a meaning: a queue is disabled by a reset of the device.
            Register::QueueEnable if value == 1 => match queue.rings.check(&self.memory.memory()) {
                Ok(()) => queue.enabled = true,
                Err(error) => {
                    // Once: the guest can try again as often as it likes.
                    if !self.signals.is_broken() {
                        complain!("queue {select} cannot be enabled: {error}");
                    }
                    self.signals.needs_reset();
                }
            },
            Register::QueueDesc => queue.rings.descriptors = value,
            Register::QueueDriver => queue.rings.driver = value,
            Register::QueueDevice => queue.rings.device = value,
            _ => {}
        }
    }

    /// The driver sets more status bits. None can be cleared, but by a reset.
    fn set_status(&self, state: &mut State, value: u8) {
        // The driver writes back what it has read, with bits that are not its own.
        let value = value & !DEVICE_NEEDS_RESET;
        let added = value & !state.status;
        if state.status & !value != 0 {
            log::debug!("status {value:#x} after {:#x}: ignored", state.status);
            return;
        }
        state.status |= added & (ACKNOWLEDGE | FAILED);
        if added & FAILED != 0 {
            complain!("the driver of a virtio device has given up");
            self.signals.set_running(false);
        }
        // Each of the next bits needs the one before (3.1.1); one that comes too early is not kept.
        if added & DRIVER != 0 && state.status & ACKNOWLEDGE != 0 {
            state.status |= DRIVER;
        }
        if added & FEATURES_OK != 0 && state.status & DRIVER != 0 {
            let unknown = state.driver_features & !self.offered();
            if unknown == 0 && state.driver_features & VIRTIO_F_VERSION_1 != 0 {
                state.status |= FEATURES_OK;
            } else {
                log::debug!("features {:#x}: not agreed", state.driver_features);
            }
        }
        if added & DRIVER_OK != 0 && state.status & (FEATURES_OK | FAILED) == FEATURES_OK {
            state.status |= DRIVER_OK;
            self.activate(state);
        }
    }

    /// Hands the queues to the device. The lock on the registers is held: nothing that a device does here
    /// comes back to them.
    fn activate(&self, state: &State) {
        self.signals.set_driver_ok();
        if self.signals.is_broken() {
            complain!("a virtio device with a broken queue stays inactive");
            self.signals.notify_configuration();
            return;
        }
        let memory = self.memory.memory();
        let enabled = (0..).zip(&state.queues).filter(|(_, queue)| queue.enabled);
        let queues: Result<Vec<_>, _> = enabled
            .map(|(index, queue)| {
                let queue = Queue::new(queue.rings, state.driver_features, &memory)?;
                Ok::<_, crate::virtio::queue::RingError>(ActiveQueue { index, queue })
            })
            .collect();
        let queues = match queues {
            Ok(queues) => queues,
            Err(error) => {
                complain!("a virtio device stays inactive: {error}");
                return self.signals.needs_reset();
            }
        };
        let activated = self.device.activate(Activation {
            memory: self.memory.clone(),
            queues,
            interrupts: self.signals.clone(),
            features: state.driver_features,
        });
        match activated {
            Ok(()) => self.signals.set_running(true),
            Err(error) => {
                complain!(host: "a virtio device could not be started: {error}");
                self.signals.needs_reset();
            }
        }
    }

    /// Takes everything back. The caller has set `resetting`, which keeps everyone else out; the lock is
    /// free meanwhile, so that all vCPUs can read registers as long as this takes.
    ///
    /// A device waits for the requests that it is serving, and those for the host. When the host does not
    /// answer, that must not be the end of a vCPU: so it happens on a thread of its own, which may do what the vCPU's
    /// may.
    fn reset(self: &Arc<Self>) {
        self.signals.set_running(false);
        let (done, ended) = mpsc::channel();
        let this = self.clone();
        let body = move || {
            this.finish_reset();
            drop(this);
            // Nobody is there any more when it took long.
            let _ = done.send(());
        };
        match thread::Builder::new().name("virtio-reset".into()).spawn(body) {
            Ok(_) => {
                let _ = ended.recv_timeout(QUICK_RESET);
            }
            Err(error) => {
                complain!(host: "no thread to reset a virtio device, a vCPU does it: {error}");
                self.finish_reset();
            }
        }
    }

    fn finish_reset(&self) {
        self.device.reset();
        self.forget(&mut lock(&self.state));
    }

    fn forget(&self, state: &mut State) {
        self.signals.reset();
        *state = State::new(self.device.queue_max_sizes());
    }

    fn offered(&self) -> u64 {
        self.device.features() | RING_FEATURES
    }
}

/// The registers that an access touches, in order.
fn touched(offset: u64, len: usize) -> impl Iterator<Item = (u64, usize, Register)> {
    let end = offset.saturating_add(len as u64);
    REGISTERS
        .into_iter()
        .filter(move |(start, width, _)| offset < start + *width as u64 && *start < end)
}

/// 32 of 64 feature bits; there are none above.
fn half(features: u64, select: u32) -> u64 {
    match select {
        0 => features & u64::from(u32::MAX),
        1 => features >> 32,
        _ => 0,
    }
}
