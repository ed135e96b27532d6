//! The README against the tests: a promise there names the test that proves it.

use std::fs;
use std::path::{Path, PathBuf};

fn project() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

/// The sources that have tests in them.
fn sources() -> Vec<PathBuf> {
    let mut sources = Vec::new();
    let mut folders: Vec<_> = ["devices/src", "vmm/src", "rootfs/src", "tests/tests"]
        .map(|name| project().join(name))
        .into();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => folders.push(path),
                Some(kind) if kind == "rs" => sources.push(path),
                _ => {}
            }
        }
    }
    sources
}

/// Names of functions that are tests.
fn tests() -> Vec<String> {
    let mut names = Vec::new();
    for source in sources() {
        let text = fs::read_to_string(source).unwrap();
        let mut is_test = false;
        for line in text.lines().map(str::trim) {
            if line.starts_with("fn ") && is_test {
                let name = line.trim_start_matches("fn ").split('(').next().unwrap();
                names.push(name.to_string());
            }
            // Other attributes may stand between.
            is_test = line == "#[test]" || is_test && line.starts_with("#[");
        }
    }
    names
}

/// What looks like a sentence in snake case between backticks: four words or more (`copy_file_range` is none).
fn named(readme: &str) -> Vec<&str> {
    let words = readme.split('`').skip(1).step_by(2);
    words
        .filter(|word| {
            let sentence = word.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'_');
            sentence && word.split('_').filter(|part| !part.is_empty()).count() >= 4
        })
        .collect()
}

#[test]
fn every_test_that_the_readme_names_exists() {
    let readme = fs::read_to_string(project().join("README.md")).unwrap();
    let tests = tests();
    assert!(tests.iter().any(|name| name == "every_test_that_the_readme_names_exists"));
    let named = named(&readme);
    assert!(named.len() >= 15, "the table of promises names its tests: {named:?}");
    let missing: Vec<_> =
        named.iter().filter(|name| !tests.iter().any(|test| test == *name)).collect();
    assert!(missing.is_empty(), "the README names tests that do not exist: {missing:#?}");
}

#[test]
fn the_table_of_promises_names_every_test_of_caching() {
    let readme = fs::read_to_string(project().join("README.md")).unwrap();
    let named = named(&readme);
    let caching = fs::read_to_string(project().join("tests/tests/door/caching.rs")).unwrap();
    let after: Vec<_> = caching.split("#[test]\nfn ").skip(1).collect();
    let left_out: Vec<_> = after
        .iter()
        .filter_map(|text| text.split('(').next())
        .filter(|name| !named.contains(name))
        .collect();
    assert!(after.len() >= 15 && left_out.is_empty(), "no promise says it: {left_out:#?}");
}
