//! The table against a model: for each page of a window, which page of which file is there.

use std::os::fd::AsFd;

use proptest::prelude::*;

use super::*;

/// Pages of the window.
const PAGES: u64 = 32;

#[derive(Clone, Debug)]
enum Change {
    /// A range of a file: where in the window, how many pages, which file, from which of its pages on.
    Map(u64, u64, usize, u64),
    Unmap(u64, u64),
    /// A page that could not be had.
    Lose(u64),
}

fn change() -> impl Strategy<Value = Change> {
    let range = (0..PAGES).prop_flat_map(|at| (Just(at), 1..=PAGES - at));
    prop_oneof![
        3 => (range.clone(), 0..2usize, 0..1000u64)
            .prop_map(|((at, len), file, from)| Change::Map(at, len, file, from)),
        2 => range.prop_map(|(at, len)| Change::Unmap(at, len)),
        1 => (0..PAGES).prop_map(Change::Lose),
    ]
}

fn backing(file: &std::fs::File) -> Arc<Backing> {
    let opened = Opened::new(file.as_fd(), false).unwrap();
    Arc::new(opened.backing(file.as_fd(), |_| Ok(())).unwrap())
}

/// Which file, and which of its pages.
type Page = Option<(usize, u64)>;

/// What these mappings show.
fn pages<'m>(
    mappings: impl Iterator<Item = (u64, &'m Mapping)>,
    files: &[Arc<Backing>; 2],
) -> Vec<(u64, Page)> {
    let mut shown = Vec::new();
    for (at, mapping) in mappings {
        let file = files.iter().position(|file| Arc::ptr_eq(file, &mapping.file)).unwrap();
        assert!(mapping.len > 0 && mapping.shown <= mapping.len);
        for page in 0..mapping.len / PAGE {
            shown.push((at / PAGE + page, Some((file, mapping.file_offset / PAGE + page))));
        }
    }
    shown
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn whatever_is_mapped_and_unmapped_the_table_says_what_a_model_says(
        changes in prop::collection::vec(change(), 1..40),
    ) {
        let files = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        let files = files.each_ref().map(backing);
        let mut state = State::default();
        let mut model: [Page; PAGES as usize] = [None; PAGES as usize];
        let mut lost = BTreeSet::new();
        for change in changes {
            let before = model;
            let (at, len) = match change {
                Change::Map(at, len, ..) | Change::Unmap(at, len) => (at, len),
                Change::Lose(at) => {
                    // Only of what is mapped.
                    if model[at as usize].is_some() {
                        state.unreadable.insert(at * PAGE);
                        lost.insert(at);
                    }
                    continue;
                }
            };
            let left = state.count_without(at * PAGE, len * PAGE);
            let out = if let Change::Map(_, _, file, from) = change {
                let mapping = Mapping {
                    owner: 0,
                    access: Access::Read,
                    len: len * PAGE,
                    file: files[file].clone(),
                    file_offset: from * PAGE,
                    known_end: 0,
                    shown: len * PAGE,
                };
                (0..len).for_each(|page| model[(at + page) as usize] = Some((file, from + page)));
                state.insert(at * PAGE, mapping)
            } else {
                (0..len).for_each(|page| model[(at + page) as usize] = None);
                state.cut_out(at * PAGE, len * PAGE)
            };
            lost.retain(|page| !(at..at + len).contains(page));

            // What comes out is what was in the range, and all of it.
            let mut was: Vec<(u64, Page)> = (at..at + len).map(|page| (page, before[page as usize])).collect();
            was.retain(|(_, page)| page.is_some());
            prop_assert_eq!(pages(out.iter().map(|(at, mapping)| (*at, mapping)), &files), was);
            // What is left is the model, by the table and by single questions.
            let mut now: Vec<(u64, Page)> = (0..).zip(model).collect();
            now.retain(|(_, page)| page.is_some());
            prop_assert_eq!(pages(state.mappings.iter().map(|(at, mapping)| (*at, mapping)), &files), now);
            for (page, expected) in (0..).zip(model) {
                let found = state.at(page * PAGE + 7).map(|(start, mapping)| {
                    let file = files.iter().position(|file| Arc::ptr_eq(file, &mapping.file)).unwrap();
                    (file, mapping.file_offset / PAGE + page - start / PAGE)
                });
                prop_assert_eq!(found, expected);
            }
            let unreadable: BTreeSet<u64> = state.unreadable.iter().map(|at| at / PAGE).collect();
            prop_assert_eq!(&unreadable, &lost);
            // And it costs what was said before.
            let mapped = usize::from(matches!(change, Change::Map(..)));
            prop_assert_eq!(state.count(), left + mapped);
        }
    }
}
