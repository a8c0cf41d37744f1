//! In-process transport for tests.
