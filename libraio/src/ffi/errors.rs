//! Errors as C has them: errno, a message for each thread, and a message for each event that failed. No panic
//! crosses into C: every function runs its body here, and fails with EIO.

use std::cell::UnsafeCell;
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_long};
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use crate::error::Error;
use crate::tuning::MESSAGE_BYTES;

thread_local! {
    // Without a destructor: it is there as long as its thread.
    static MESSAGE: UnsafeCell<[u8; MESSAGE_BYTES]> = const { UnsafeCell::new([0; MESSAGE_BYTES]) };
}

/// Sets what [`raio_errmsg`] returns in this thread.
pub(super) fn set_message(text: &str) {
    let mut end = text.len().min(MESSAGE_BYTES - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    MESSAGE.with(|message| {
        // SAFETY: only this thread has it, and no reference to it outlives a line of this file.
        let message = unsafe { &mut *message.get() };
        message[..end].copy_from_slice(&text.as_bytes()[..end]);
        message[end] = 0;
    });
}

/// Runs a call. Returns its result, or the errno of its failure.
pub(super) fn run<T>(body: impl FnOnce() -> Result<T, Error>) -> Result<T, c_int> {
    set_message("");
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            set_message(&error.text);
            Err(error.errno())
        }
        Err(_) => {
            set_message("Internal error in libraio. Please report it.");
            Err(libc::EIO)
        }
    }
}

/// Sets errno, and returns `value`.
pub(super) fn fail<T>(errno: c_int, value: T) -> T {
    // SAFETY: the location is this thread's errno.
    unsafe { *libc::__errno_location() = errno };
    value
}

/// For functions that return -1 and set errno.
pub(super) fn int(body: impl FnOnce() -> Result<c_int, Error>) -> c_int {
    run(body).unwrap_or_else(|errno| fail(errno, -1))
}

/// For functions that return the negated errno.
pub(super) fn long(body: impl FnOnce() -> Result<c_long, Error>) -> c_long {
    run(body).unwrap_or_else(|errno| -c_long::from(errno))
}

/// For functions that return a count, or -1 and set errno.
pub(super) fn ssize(body: impl FnOnce() -> Result<isize, Error>) -> isize {
    run(body).unwrap_or_else(|errno| fail(errno, -1))
}

/// The same where a count can be larger than memory.
pub(super) fn longlong(body: impl FnOnce() -> Result<u64, Error>) -> i64 {
    run(|| body().map(|count| count as i64)).unwrap_or_else(|errno| fail(errno, -1))
}

pub(super) fn invalid(text: impl Into<String>) -> Error {
    Error::call(libc::EINVAL, text)
}

/// A C string as bytes.
///
/// # Safety
/// `text` is null or a C string that outlives the result.
pub(super) unsafe fn c_str<'a>(text: *const c_char, what: &str) -> Result<&'a [u8], Error> {
    if text.is_null() {
        return Err(invalid(format!("The {what} is NULL. Pass one.")));
    }
    // SAFETY: not null, and a C string as the caller vouches.
    Ok(unsafe { CStr::from_ptr(text) }.to_bytes())
}

/// A path, or what else names something, of the caller's.
///
/// # Safety
/// As [`c_str`].
pub(super) unsafe fn named<'a>(text: *const c_char, what: &str) -> Result<&'a Path, Error> {
    // SAFETY: the caller's contract is the same.
    unsafe { c_str(text, what) }.map(|text| Path::new(OsStr::from_bytes(text)))
}

/// An offset of the caller's.
pub(super) fn checked_offset(offset: i64) -> Result<u64, Error> {
    u64::try_from(offset)
        .map_err(|_| invalid("The offset is negative. Pass one counted from the start of the file."))
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_errmsg() -> *const c_char {
    MESSAGE.with(|message| message.get().cast::<c_char>().cast_const())
}

/// Messages of the last collected events, by the address of their iocb, in the order of the events.
#[derive(Default)]
pub(super) struct FailureTexts {
    texts: Vec<(usize, CString)>,
    /// Where the last search ended: the next is likely to be for the one behind it.
    at: usize,
}

impl FailureTexts {
    pub(super) fn clear(&mut self) {
        self.texts.clear();
        self.at = 0;
    }

    pub(super) fn add(&mut self, iocb: usize, text: &str) {
        let text = text.bytes().filter(|&byte| byte != 0).collect::<Vec<_>>();
        self.texts.push((iocb, CString::new(text).unwrap_or_default()));
    }

    /// Makes an iocb's event an earlier one: its text stays valid, but is not found any more.
    pub(super) fn supersede(&mut self, iocb: usize) {
        self.texts.iter_mut().filter(|(known, _)| *known == iocb).for_each(|(known, _)| *known = 0);
    }

    pub(super) fn find(&mut self, iocb: usize) -> Option<&CStr> {
        let len = self.texts.len();
        self.at = (self.at..len).chain(0..self.at.min(len)).find(|&at| self.texts[at].0 == iocb)?;
        let text = &self.texts[self.at].1;
        self.at += 1;
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_has_its_own_message_in_whatever_order_they_are_asked_for() {
        let mut texts = FailureTexts::default();
        for iocb in 1..4 {
            texts.add(iocb, &format!("{iocb}\0!"));
        }
        for iocb in [1, 2, 3, 3, 1, 2] {
            assert_eq!(texts.find(iocb).unwrap().to_str(), Ok(format!("{iocb}!").as_str()));
        }
        assert_eq!(texts.find(4), None);
        texts.supersede(2);
        texts.add(2, "again");
        assert_eq!(texts.find(2), Some(c"again"));
        texts.clear();
        assert_eq!(texts.find(2), None);
    }

    #[test]
    fn a_panic_is_an_errno_and_a_message() {
        let message = || {
            // SAFETY: it is a C string of this thread's.
            unsafe { CStr::from_ptr(raio_errmsg()) }.to_str().unwrap().to_owned()
        };
        assert_eq!(run::<()>(|| Err(invalid("Do not."))), Err(libc::EINVAL));
        assert_eq!(message(), "Do not.");
        assert_eq!(run(|| Ok(5)), Ok(5));
        assert_eq!(message(), "");
        assert_eq!(run::<()>(|| panic!("a test")), Err(libc::EIO));
        assert!(message().contains("report"));
        set_message(&"\u{e4}".repeat(MESSAGE_BYTES));
        assert_eq!(message().len(), MESSAGE_BYTES - 2, "cut between characters");
    }
}
