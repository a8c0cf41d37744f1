//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Waits for the lock, for data that a panic under the lock leaves whole: a poisoned lock is as good as any
/// other.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
