//! The second-stage faults of a vCPU, as KVM counts them.

use std::fs::File;
use std::io;
use std::os::fd::FromRawFd;
use std::os::unix::fs::FileExt;

use kvm_bindings::KVMIO;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl;
use vmm_sys_util::ioctl_io_nr;

// linux/kvm.h, since Linux 5.14: a file with a vCPU's statistics (Documentation/virt/kvm/api.rst).
ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);

/// Faults that KVM took.
const TAKEN: &str = "pf_taken";
/// … and how it answered them: with a page, by doing the access itself, or not at all because the page was there
/// by then. What is left is an access that is tried again.
const ANSWERED: [&str; 3] = ["pf_fixed", "pf_emulate", "pf_spurious"];

/// `struct kvm_stats_header`: six words of 32 bits.
const HEADER: usize = 24;
/// `struct kvm_stats_desc` without the name that follows it.
const DESCRIPTION: usize = 16;
/// Longer names and more statistics than KVM has.
const MOST_NAME: usize = 256;
const MOST_STATISTICS: u32 = 1024;

/// Where a vCPU's counters of faults are.
pub struct FaultCounters {
    file: File,
    taken: u64,
    answered: [u64; ANSWERED.len()],
}

impl FaultCounters {
    /// Those of `vcpu`.
    ///
    /// # Errors
    ///
    /// `ENOTTY` or `EINVAL` from a KVM that does not show them, `InvalidData` from one that counts something else.
    pub fn of(vcpu: &VcpuFd) -> io::Result<Self> {
        // SAFETY: the call has no argument and changes nothing.
        #[expect(unsafe_code, reason = "an ioctl that kvm-ioctls does not have")]
        let fd = unsafe { ioctl(vcpu, KVM_GET_STATS_FD()) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a descriptor that the call has just made, which nobody else knows.
        #[expect(unsafe_code, reason = "takes the descriptor over")]
        let file = unsafe { File::from_raw_fd(fd) };
        Self::in_file(file)
    }

    fn in_file(file: File) -> io::Result<Self> {
        let mut header = [0; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let [_, name_size, count, _, descriptions, data] = words(&header);
        let name_size = name_size as usize;
        if name_size > MOST_NAME || count > MOST_STATISTICS {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut description = vec![0; DESCRIPTION + name_size];
        let mut place = |wanted: &str| -> io::Result<u64> {
            for number in 0..u64::from(count) {
                let at = u64::from(descriptions) + number * description.len() as u64;
                file.read_exact_at(&mut description, at)?;
                let (fixed, name) = description.split_at(DESCRIPTION);
                let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
                if name == wanted.as_bytes() {
                    let [_, _, offset, _] = words(fixed);
                    return Ok(u64::from(data) + u64::from(offset));
                }
            }
            Err(io::ErrorKind::InvalidData.into())
        };
        let taken = place(TAKEN)?;
        let mut answered = [0; ANSWERED.len()];
        for (answered, name) in answered.iter_mut().zip(ANSWERED) {
            *answered = place(name)?;
        }
        Ok(Self { file, taken, answered })
    }

    /// How many faults KVM took, and how many of them it has not answered yet. The latter goes down where it had to
    /// wait for a page, and up without end while an access is repeated for which there is none.
    ///
    /// # Errors
    ///
    /// The host's.
    pub fn taken_and_unanswered(&self) -> io::Result<(i64, i64)> {
        let value = |at| -> io::Result<i64> {
            let mut value = [0; 8];
            self.file.read_exact_at(&mut value, at)?;
            Ok(i64::from_ne_bytes(value))
        };
        let taken = value(self.taken)?;
        let mut left = taken;
        for at in self.answered {
            left = left.wrapping_sub(value(at)?);
        }
        Ok((taken, left))
    }
}

/// The first words of 32 bits; 0 where there are no more.
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = bytes.try_into().map_or(0, u32::from_ne_bytes);
    }
    words
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const NAMES: [&str; 5] = ["halt_exits", "pf_fixed", "pf_taken", "pf_spurious", "pf_emulate"];
    const NAME_SIZE: usize = 48;
    const DATA: u64 = (HEADER + NAMES.len() * (DESCRIPTION + NAME_SIZE)) as u64;

    /// A file as KVM's, all of whose values are 0.
    pub fn statistics(names: &[&str]) -> File {
        let file = tempfile::tempfile().unwrap();
        let header = [0, NAME_SIZE as u32, names.len() as u32, 0, HEADER as u32, DATA as u32];
        let mut bytes: Vec<u8> = header.iter().flat_map(|word| word.to_ne_bytes()).collect();
        for (number, name) in (0..).zip(names) {
            let words: [u32; 4] = [0, 1 << 16, 8 * number, 0];
            bytes.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
            bytes.extend(name.bytes().chain(std::iter::repeat(0)).take(NAME_SIZE));
        }
        file.write_all_at(&bytes, 0).unwrap();
        file.write_all_at(&[0; 8 * NAMES.len()], DATA).unwrap();
        file
    }

    pub fn set(file: &File, name: &str, value: u64) {
        let number = NAMES.iter().position(|known| *known == name).unwrap();
        file.write_all_at(&value.to_ne_bytes(), DATA + 8 * number as u64).unwrap();
    }

    /// Counters in a file that [`set`] changes.
    pub fn counters() -> (FaultCounters, File) {
        let file = statistics(&NAMES);
        (FaultCounters::in_file(file.try_clone().unwrap()).unwrap(), file)
    }

    #[test]
    fn what_is_not_answered_is_what_is_left_of_what_was_taken() {
        let (counters, file) = counters();
        assert_eq!(counters.taken_and_unanswered().unwrap(), (0, 0));
        for (name, value, left) in [
            ("pf_taken", 10, 10),
            ("pf_fixed", 5, 5),
            ("pf_emulate", 2, 3),
            ("pf_spurious", 4, -1),
            ("halt_exits", 1000, -1),
            ("pf_taken", u64::MAX, -12),
        ] {
            set(&file, name, value);
            assert_eq!(counters.taken_and_unanswered().unwrap().1, left, "{name}");
        }
    }

    #[test]
    fn a_file_that_lacks_a_counter_or_is_not_such_a_file_is_an_error() {
        for missing in NAMES.iter().skip(1) {
            let names: Vec<&str> = NAMES.iter().filter(|name| *name != missing).copied().collect();
            assert!(FaultCounters::in_file(statistics(&names)).is_err(), "{missing}");
        }
        for bytes in [&[][..], &[0xff; HEADER], &[0xff; 1000], &[0; 1000]] {
            let file = tempfile::tempfile().unwrap();
            file.write_all_at(bytes, 0).unwrap();
            assert!(FaultCounters::in_file(file).is_err());
        }
    }
}
