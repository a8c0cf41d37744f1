//! The limit on open files of this process, which is what bounds how many connections it can have.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Raises the limit as far as the process may without being privileged, and if that is less than `wanted` as
/// far as it may at all. Returns the new limit.
pub fn raise(wanted: usize) -> usize {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
    let wanted = wanted as u64;
    if maximum.is_some_and(|maximum| maximum < wanted) {
        // Root may, unless it is confined.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: Some(wanted), maximum: Some(wanted) });
    }
    getrlimit(Resource::Nofile).current.map_or(usize::MAX, |limit| limit as usize)
}
