//! Every field of the runtime-spec has a test, and docs/coverage.md says which.

use std::fs;

use runx_tests::coverage::{Coverage, repository};

#[test]
fn every_field_has_a_test_and_every_comment_names_a_field() {
    if runx_tests::in_machine() {
        return runx_tests::skip("the sources are not in the machine");
    }
    let coverage = Coverage::read();
    let missing: Vec<_> = coverage.fields.iter().filter(|field| !coverage.tests.contains_key(*field)).collect();
    let unknown: Vec<_> = coverage.tests.keys().filter(|field| !coverage.fields.contains(field)).collect();
    assert!(missing.is_empty(), "no test covers {missing:?}");
    assert!(unknown.is_empty(), "tests/fields.txt lacks {unknown:?}");
}

#[test]
fn the_table_is_up_to_date() {
    if runx_tests::in_machine() {
        return runx_tests::skip("the sources are not in the machine");
    }
    let path = repository().join("docs/coverage.md");
    let table = Coverage::read().table();
    if std::env::var_os("RUNX_UPDATE_DOCS").is_some() {
        fs::write(&path, &table).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == table,
        "docs/coverage.md is old: run RUNX_UPDATE_DOCS=1 cargo test -p runx-tests --test coverage"
    );
}
