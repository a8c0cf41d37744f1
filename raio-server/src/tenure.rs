//! As long as an export is what it is.
//!
//! A tenure begins with an export, and is over when the export is removed, or changed so that what clients
//! have open of it must close: while the server runs, see `crate::reload`. What is opened counts as a use of
//! the tenure until close(2) has returned, so that the server can say when a file system may be unmounted.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// See the module documentation.
#[derive(Debug, Default)]
pub struct Tenure {
    is_over: AtomicBool,
    uses: AtomicUsize,
}

impl Tenure {
    /// The export is not served any more. What is open of it is to be closed.
    pub fn end(&self) {
        self.is_over.store(true, Ordering::SeqCst);
    }

    /// Whether it is over.
    pub fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    /// How much is open of it, or is about to be.
    pub fn uses(&self) -> usize {
        self.uses.load(Ordering::SeqCst)
    }
}

/// Something that is open of an export, or a call that may open it.
#[derive(Debug)]
pub struct Use(Arc<Tenure>);

impl Use {
    /// One more. It counts from here on: whoever then sees that the tenure is not over may go on, for who
    /// ends it looks for uses behind that.
    pub fn of(tenure: &Arc<Tenure>) -> Self {
        tenure.uses.fetch_add(1, Ordering::SeqCst);
        Self(Arc::clone(tenure))
    }

    /// Whether it is of this tenure.
    pub fn is_of(&self, tenure: &Arc<Tenure>) -> bool {
        Arc::ptr_eq(&self.0, tenure)
    }
}

impl Drop for Use {
    fn drop(&mut self) {
        self.0.uses.fetch_sub(1, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uses_are_counted_until_they_end() {
        let tenure = Arc::new(Tenure::default());
        let uses: Vec<_> = (0..3).map(|_| Use::of(&tenure)).collect();
        tenure.end();
        assert!(tenure.is_over());
        assert_eq!(tenure.uses(), 3);
        drop(uses);
        assert_eq!(tenure.uses(), 0);
    }
}
