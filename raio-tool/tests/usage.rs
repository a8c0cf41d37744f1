//! What the tool prints for `--help` and for command lines that make no sense, word for word.
//!
//! `TRYCMD=overwrite cargo test -p raio-tool --test usage` writes what it prints now to `tests/usage/`.

#[test]
fn help_and_usage_errors_are_as_they_were_reviewed() {
    trycmd::TestCases::new().env("COLUMNS", "100").env("RAIO_URL", "").case("tests/usage/*.trycmd");
}
