//! Power-off and reset: the sleep and reset registers of a hardware-reduced ACPI platform (ACPI 6.5, 4.8.3.7
//! and 4.8.3.6). The FADT tells the guest where they are.

use crate::bus::BusDevice;

/// Number of I/O ports.
pub const PORTS: u64 = 3;
/// Offset of SLEEP_CONTROL_REG.
pub const SLEEP_CONTROL: u64 = 0;
/// Offset of SLEEP_STATUS_REG.
pub const SLEEP_STATUS: u64 = 1;
/// Offset of RESET_REG.
pub const RESET: u64 = 2;
/// What the guest writes to RESET_REG (the FADT's RESET_VALUE).
pub const RESET_VALUE: u8 = 1;
/// SLP_TYP of soft-off, as the DSDT's `\_S5` says.
pub const SLEEP_TYPE_S5: u8 = 5;

/// SLP_EN of SLEEP_CONTROL_REG.
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// What the guest asked of its power.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerRequest {
    /// Soft-off (S5).
    Off,
    /// Reset.
    Reset,
}

/// The registers. `request` is called on the vCPU's thread, each time the guest asks.
pub struct Power<F> {
    request: F,
}

impl<F: Fn(PowerRequest) + Send + Sync> Power<F> {
    /// Registers that report to `request`.
    pub fn new(request: F) -> Self {
        Self { request }
    }
}

impl<F: Fn(PowerRequest) + Send + Sync> BusDevice for Power<F> {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        // WAK_STS is never set: there is no sleep to wake from.
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let [value] = *data else { return };
        let sleep_type = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
        match offset {
            SLEEP_CONTROL if value & SLEEP_ENABLE != 0 && sleep_type == SLEEP_TYPE_S5 => {
                (self.request)(PowerRequest::Off);
            }
            RESET if value == RESET_VALUE => (self.request)(PowerRequest::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[test]
    fn only_the_documented_values_do_anything() {
        let requests = Mutex::new(Vec::new());
        let power = Power::new(|request| requests.lock().unwrap().push(request));
        for value in 0..=255 {
            power.write(SLEEP_CONTROL, &[value]);
            power.write(SLEEP_STATUS, &[value]);
            power.write(RESET, &[value]);
        }
        power.write(RESET, &[RESET_VALUE, 0]);
        let requests = requests.lock().unwrap();
        let count = |kind| requests.iter().filter(|request| **request == kind).count();
        assert_eq!(count(PowerRequest::Reset), 1);
        // SLP_TYP and SLP_EN leave four of the eight bits free.
        assert_eq!(count(PowerRequest::Off), 16);
    }
}
