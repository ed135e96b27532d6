//! User and group ids on the two sides, which are different types so that nobody takes one for the other.

use std::marker::PhantomData;

use crate::fuse::{Errno, Result};

/// A kind of id.
pub trait Id: Copy {
    /// The id of a number.
    fn new(number: u32) -> Self;
    /// The number of an id.
    fn number(self) -> u32;
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub struct $name(pub u32);

        impl Id for $name {
            fn new(number: u32) -> Self {
                Self(number)
            }

            fn number(self) -> u32 {
                self.0
            }
        }
    )*};
}

ids! {
    /// A user id as the guest has it.
    GuestUid,
    /// A group id as the guest has it.
    GuestGid,
    /// A user id as the process that serves the share sees it.
    HostUid,
    /// A group id as the process that serves the share sees it.
    HostGid,
}

/// What an id is shown as that the guest has no number for (`DEFAULT_OVERFLOWUID` of linux/highuid.h).
pub const OVERFLOW: u32 = 65534;

/// chown(2) and FUSE take it for "no id".
const NONE: u32 = u32::MAX;

/// As many ranges as the kernel takes for a user namespace (`UID_GID_MAP_MAX_EXTENTS`).
const MOST_RANGES: usize = 340;

/// `count` ids, from `guest` on in the guest and from `host` on on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdRange {
    /// The first, as the guest has it.
    pub guest: u32,
    /// The first, as the host has it.
    pub host: u32,
    /// How many, at least 1.
    pub count: u32,
}

impl IdRange {
    /// `number` counted from `from` on to the same place from `to` on.
    fn shift(&self, number: u32, from: u32, to: u32) -> Option<u32> {
        let place = number.checked_sub(from).filter(|place| *place < self.count)?;
        to.checked_add(place)
    }
}

/// Why ranges make no map.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdMapError {
    /// One has no id in it.
    #[error("a range of no ids")]
    Empty,
    /// One goes up to an id that there is not.
    #[error("a range that ends beyond id 4294967294")]
    TooHigh,
    /// An id is in two of them.
    #[error("two ranges that have an id in common")]
    Overlap,
    /// There are too many.
    #[error("more than {MOST_RANGES} ranges")]
    TooMany,
}

/// What is what on the other side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IdMap<G, H> {
    ranges: Vec<IdRange>,
    /// Whether ids in no range are the same on both sides. Otherwise they are nobody's.
    rest_is_same: bool,
    kinds: PhantomData<(G, H)>,
}

/// Of users.
pub type UidMap = IdMap<GuestUid, HostUid>;
/// Of groups.
pub type GidMap = IdMap<GuestGid, HostGid>;

impl<G: Id, H: Id> IdMap<G, H> {
    /// Every id is the same on both sides.
    pub fn same() -> Self {
        Self { ranges: Vec::new(), rest_is_same: true, kinds: PhantomData }
    }

    /// The host's `id` is 0 in the guest, all others are the same: the files of the one who serves the share
    /// are the guest root's.
    pub fn as_root(id: H) -> Self {
        let range = IdRange { guest: 0, host: id.number(), count: 1 };
        Self { ranges: vec![range], ..Self::same() }
    }

    /// The ids of `ranges`, and no others.
    ///
    /// # Errors
    ///
    /// When a range is empty or too high, two of them overlap on either side, or there are more than 340.
    pub fn of_ranges(ranges: &[IdRange]) -> std::result::Result<Self, IdMapError> {
        if ranges.len() > MOST_RANGES {
            return Err(IdMapError::TooMany);
        }
        for side in [|range: &IdRange| range.guest, |range: &IdRange| range.host] {
            let mut next_free = 0;
            let mut sorted: Vec<_> =
                ranges.iter().map(|range| (side(range), range.count)).collect();
            sorted.sort_unstable();
            for (first, count) in sorted {
                let last = count.checked_sub(1).ok_or(IdMapError::Empty)?;
                let last = first.checked_add(last).filter(|last| *last != NONE);
                let last = last.ok_or(IdMapError::TooHigh)?;
                if first < next_free {
                    return Err(IdMapError::Overlap);
                }
                next_free = last + 1;
            }
        }
        Ok(Self { ranges: ranges.to_vec(), rest_is_same: false, kinds: PhantomData })
    }

    /// The host's id for one of the guest's.
    ///
    /// # Errors
    ///
    /// `EPERM` when it has none: no file of the share can be that user's or group's. `EINVAL` for the number
    /// that means "none".
    pub fn to_host(&self, id: G) -> Result<H> {
        let number = id.number();
        if number == NONE {
            return Err(Errno::INVAL);
        }
        let found =
            self.ranges.iter().find_map(|range| range.shift(number, range.guest, range.host));
        match found {
            Some(host) => Ok(H::new(host)),
            None if self.rest_is_same => Ok(H::new(number)),
            None => Err(Errno::PERM),
        }
    }

    /// The guest's id for one of the host's; [`OVERFLOW`] when it has none.
    pub fn to_guest(&self, id: H) -> G {
        let number = id.number();
        let found =
            self.ranges.iter().find_map(|range| range.shift(number, range.host, range.guest));
        let rest = if self.rest_is_same { number } else { OVERFLOW };
        G::new(found.unwrap_or(rest))
    }

    /// The ranges; empty for [`same`](Self::same).
    pub fn ranges(&self) -> &[IdRange] {
        &self.ranges
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(guest: u32, host: u32, count: u32) -> IdRange {
        IdRange { guest, host, count }
    }

    #[test]
    fn ids_in_a_range_are_shifted_and_all_others_are_nobodys() {
        let map = UidMap::of_ranges(&[range(0, 1000, 1), range(1, 100_000, 65536)]).unwrap();
        for (guest, host) in [(0, 1000), (1, 100_000), (1000, 100_999), (65536, 165_535)] {
            assert_eq!(map.to_host(GuestUid(guest)), Ok(HostUid(host)));
            assert_eq!(map.to_guest(HostUid(host)), GuestUid(guest));
        }
        for guest in [65537, u32::MAX - 1] {
            assert_eq!(map.to_host(GuestUid(guest)), Err(Errno::PERM));
        }
        for host in [0, 1, 999, 1001, 99_999, 165_536, u32::MAX] {
            assert_eq!(map.to_guest(HostUid(host)), GuestUid(65534));
        }
        assert_eq!(map.to_host(GuestUid(u32::MAX)), Err(Errno::INVAL));
        let last = UidMap::of_ranges(&[range(u32::MAX - 1, 5, 1)]).unwrap();
        assert_eq!(last.to_host(GuestUid(u32::MAX - 1)), Ok(HostUid(5)));
    }

    #[test]
    fn without_ranges_ids_are_the_same() {
        let map = GidMap::same();
        assert_eq!(map.to_host(GuestGid(7)), Ok(HostGid(7)));
        assert_eq!(map.to_guest(HostGid(u32::MAX)), GuestGid(u32::MAX));
        assert_eq!(map.to_host(GuestGid(u32::MAX)), Err(Errno::INVAL));
        let map = GidMap::as_root(HostGid(1000));
        assert_eq!(map.to_host(GuestGid(0)), Ok(HostGid(1000)));
        assert_eq!(map.to_guest(HostGid(1000)), GuestGid(0));
        assert_eq!(map.to_guest(HostGid(44)), GuestGid(44));
    }

    #[test]
    fn ranges_that_make_no_map_are_refused() {
        let refused = |ranges: &[IdRange]| UidMap::of_ranges(ranges).unwrap_err();
        assert_eq!(refused(&[range(0, 0, 0)]), IdMapError::Empty);
        assert_eq!(refused(&[range(0, u32::MAX, 1)]), IdMapError::TooHigh);
        assert_eq!(refused(&[range(u32::MAX, 0, 1)]), IdMapError::TooHigh);
        assert_eq!(refused(&[range(0, 5, u32::MAX)]), IdMapError::TooHigh);
        assert_eq!(refused(&[range(0, 0, 10), range(9, 100, 1)]), IdMapError::Overlap);
        assert_eq!(refused(&[range(0, 0, 10), range(10, 9, 1)]), IdMapError::Overlap);
        let many: Vec<_> = (0..341).map(|id| range(id, id, 1)).collect();
        assert_eq!(refused(&many), IdMapError::TooMany);
        assert!(UidMap::of_ranges(&many[1..]).is_ok());
        // Nobody's files are anybody's.
        assert_eq!(UidMap::of_ranges(&[]).unwrap().to_guest(HostUid(0)), GuestUid(65534));
    }
}
