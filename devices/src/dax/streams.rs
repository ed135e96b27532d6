//! Which mappings are part of a file being read from one end to the other.

use std::collections::VecDeque;

use super::table::Key;

/// Readers that are followed at a time, over all files of a window.
const MOST: usize = 64;
/// Readers that are followed in one file. With more, random mappings of a large file would follow one another
/// by chance.
const MOST_OF_ONE_FILE: usize = 4;
/// From this score on, the range that is being mapped will be read in order.
const IN_ORDER: u8 = 2;
/// Ranges that a file must have for a first mapping at its start to say something: whoever begins anywhere
/// would begin there once in so many times.
const TELLING_RANGES: u64 = 8;

/// One reader.
struct Stream {
    file: Key,
    /// Where in the file its next mapping would begin.
    next: u64,
    /// How much speaks for reading in order: one for every mapping that began where the one before ended.
    score: u8,
}

/// The readers of a window's files, the latest first.
///
/// The Linux guest maps 2 MiB when a page of it is touched, so that the order of mappings is the order in
/// which a file is read. A range counts as read in order
///
/// - when it is the third in a row, or the second after the start of the file;
/// - when it is the start of a file that has at least 8 ranges, and nobody reads that file in another order:
///   a program that reads at random would seldom begin there.
#[derive(Default)]
pub(super) struct Streams(VecDeque<Stream>);

impl Streams {
    /// Notes a mapping of `len` bytes at `offset` of a file that ends at
    /// `file_end`, and says whether it will be read in order.
    pub(super) fn note(&mut self, file: Key, offset: u64, len: u64, file_end: u64) -> bool {
        let before = self.0.iter().position(|one| one.file == file && one.next == offset);
        let score = match before.and_then(|at| self.0.remove(at)) {
            Some(stream) => stream.score.saturating_add(1),
            None if offset > 0 => 0,
            None => {
                let telling = file_end / len.max(1) >= TELLING_RANGES
                    && self.of(file).all(|stream| stream.score >= IN_ORDER);
                if telling { IN_ORDER } else { 1 }
            }
        };
        if before.is_none() && self.of(file).count() >= MOST_OF_ONE_FILE {
            let oldest = self.0.iter().rposition(|one| one.file == file);
            oldest.and_then(|at| self.0.remove(at));
        }
        self.0.truncate(MOST - 1);
        self.0.push_front(Stream { file, next: offset.saturating_add(len), score });
        score >= IN_ORDER
    }

    fn of(&self, file: Key) -> impl Iterator<Item = &Stream> {
        self.0.iter().filter(move |stream| stream.file == file)
    }

    /// Forgets all.
    pub(super) fn clear(&mut self) {
        self.0.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RANGE: u64 = 2 << 20;
    const LARGE: u64 = 128 * RANGE;

    fn note(streams: &mut Streams, inode: u64, range: u64, end: u64) -> bool {
        streams.note((1, inode, false), range * RANGE, RANGE, end)
    }

    #[test]
    fn a_large_file_that_is_read_from_its_start_is_read_in_order_from_the_first_range_on() {
        let mut streams = Streams::default();
        assert!((0..128).all(|range| note(&mut streams, 1, range, LARGE)));
        // Once more: it is known how this file is read.
        assert!((0..128).all(|range| note(&mut streams, 1, range, LARGE)));
    }

    #[test]
    fn a_small_file_or_one_read_from_the_middle_has_to_show_it_first() {
        let mut streams = Streams::default();
        let small: Vec<_> = (0..4).map(|range| note(&mut streams, 1, range, 4 * RANGE)).collect();
        assert_eq!(small, [false, true, true, true]);
        let middle: Vec<_> = (50..54).map(|range| note(&mut streams, 2, range, LARGE)).collect();
        assert_eq!(middle, [false, false, true, true]);
        assert!(!note(&mut streams, 3, 0, 4096));
    }

    #[test]
    fn ranges_in_a_random_order_are_hardly_ever_taken_for_one() {
        let mut streams = Streams::default();
        let mut state = 88172645463325252u64;
        let mut wrong = 0;
        for _ in 0..10_000 {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            wrong += usize::from(note(&mut streams, 1, state % 128, LARGE));
        }
        // By chance three in a row, from one of four places: 10000 * (4 / 128)².
        assert!(wrong < 30, "{wrong}");
    }

    #[test]
    fn several_readers_are_told_apart_and_none_is_remembered_for_ever() {
        let mut streams = Streams::default();
        for range in 0..100 {
            assert!(note(&mut streams, 1, range, LARGE));
            assert!(note(&mut streams, 2, range, LARGE));
            assert_eq!(note(&mut streams, 1, 20 + range, 2 * LARGE), range > 1, "{range}");
        }
        for inode in 10..1000 {
            note(&mut streams, inode, 7, LARGE);
            assert!(streams.0.len() <= MOST);
        }
        assert!(!note(&mut streams, 2, 100, LARGE), "forgotten");
        streams.clear();
        assert!(streams.0.is_empty());
    }

    #[test]
    fn numbers_at_the_edge_are_only_numbers() {
        let mut streams = Streams::default();
        for (offset, len, end) in
            [(0, 0, 0), (u64::MAX, u64::MAX, u64::MAX), (0, u64::MAX, 1), (1, 0, u64::MAX)]
        {
            streams.note((0, 0, true), offset, len, end);
        }
        // The score does not wrap.
        for _ in 0..1000 {
            streams.note((0, 0, true), u64::MAX, 1, 0);
        }
    }
}
