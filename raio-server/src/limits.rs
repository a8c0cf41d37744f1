//! How many connections and files clients may have, and how many of them one session or one peer address.
//!
//! Both take descriptors of one process. As long as there are some for everybody nobody is limited but by options. The last few are for
//! those who have fewer than are left: whoever took all the others is rejected, and the next client is not.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Places beyond the ordinary ones, for those who have few; descriptors must be left for them.
pub const RESERVE: usize = 64;
/// So many of them for sessions, whatever address they come from.
const SESSION_RESERVE: usize = RESERVE / 2;

/// What the options say. None: as many as there are.
#[derive(Clone, Copy, Debug, Default)]
pub struct Caps {
    /// Connections from one peer address.
    pub connections_per_address: Option<usize>,
    /// Connections of one session.
    pub connections_per_session: Option<usize>,
    /// Open files of one session.
    pub files_per_session: Option<usize>,
}

/// What all clients have. Locked when a connection begins or ends.
#[derive(Debug)]
pub struct Limits {
    /// What the options say.
    pub caps: Caps,
    /// Descriptors for connections and files, the reserve not counted.
    descriptors_max: usize,
    files_max: usize,
    connections: AtomicUsize,
    files: AtomicUsize,
    by_address: Mutex<HashMap<IpAddr, usize>>,
}

/// A connection's place. Dropping it frees the place.
#[derive(Debug)]
pub struct Place {
    limits: Arc<Limits>,
    address: Option<IpAddr>,
}

/// Whether one who has `own` places may have another, with `used` taken of `max` and a reserve.
fn may_take(used: usize, max: usize, reserve: usize, own: usize) -> bool {
    used < max || own < (max + reserve).saturating_sub(used)
}

impl Limits {
    /// Nothing is taken.
    pub fn new(descriptors_max: usize, files_max: usize, caps: Caps) -> Arc<Self> {
        Arc::new(Self {
            caps,
            descriptors_max,
            files_max,
            connections: AtomicUsize::new(0),
            files: AtomicUsize::new(0),
            by_address: Mutex::default(),
        })
    }

    fn used(&self) -> usize {
        self.connections.load(Ordering::Relaxed) + self.files.load(Ordering::Relaxed)
    }

    /// A place for a connection from this address, if it is known. The error says why there is none.
    pub fn connect(self: &Arc<Self>, address: Option<IpAddr>) -> Result<Place, String> {
        let mut by_address = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let used = self.used();
        if let Some(address) = address {
            let own = by_address.entry(address).or_default();
            let cap = self.caps.connections_per_address;
            let reason = match cap {
                Some(cap) if *own >= cap => Some(format!(
                    "There are {own} connections from {address}, as many as one address may have. Close some, or raise the server's \
                     --max-connections-per-address."
                )),
                _ if used >= self.descriptors_max + SESSION_RESERVE
                    && !may_take(used, self.descriptors_max, RESERVE, *own) =>
                {
                    Some(format!(
                        "The server has as many connections and open files as it may, and {own} of the connections are from {address}. \
                         Close some, or raise its limit with `ulimit -n`."
                    ))
                }
                _ => None,
            };
            match reason {
                Some(reason) => {
                    if *own == 0 {
                        by_address.remove(&address);
                    }
                    return Err(reason);
                }
                None => *own += 1,
            }
        }
        self.connections.fetch_add(1, Ordering::Relaxed);
        Ok(Place { limits: Arc::clone(self), address })
    }

    /// Whether a session that has so many connections and files may keep another connection, which has its place. The error says why not.
    pub fn join(&self, connections: usize, files: usize) -> Result<(), String> {
        if let Some(cap) = self.caps.connections_per_session
            && connections >= cap
        {
            return Err(format!(
                "The session has {connections} connections, as many as one may have. Close some, or raise the server's \
                 --max-connections-per-session."
            ));
        }
        let others = self.used().saturating_sub(1);
        if may_take(others, self.descriptors_max, SESSION_RESERVE, connections + files) {
            return Ok(());
        }
        Err(format!(
            "The server has as many connections and open files as it may, and {connections} and {files} of them are this session's. \
             Close some, or raise its limit with `ulimit -n`."
        ))
    }

    /// A place for a file of a session that has so many connections and files. The error says why there is none.
    pub fn open(&self, connections: usize, files: usize) -> Result<(), String> {
        if let Some(cap) = self.caps.files_per_session
            && files >= cap
        {
            return Err(format!(
                "The session has {files} files open, as many as one may have. Close some, or raise the server's \
                 --max-files-per-session."
            ));
        }
        // Workers that look at the same time may go beyond it by one each, which does no harm.
        if !may_take(self.files.load(Ordering::Relaxed), self.files_max, RESERVE, files)
            || !may_take(self.used(), self.descriptors_max, SESSION_RESERVE, connections + files)
        {
            return Err(format!(
                "The server has as many files open as it may, {files} of them for this session. Close some, or raise its limit with \
                 `ulimit -n`."
            ));
        }
        self.files.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// A file's place is free again.
    pub fn close(&self) {
        self.files.fetch_sub(1, Ordering::Relaxed);
    }

    /// Open files of all sessions.
    pub fn files(&self) -> usize {
        self.files.load(Ordering::Relaxed)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.limits.connections.fetch_sub(1, Ordering::Relaxed);
        let Some(address) = self.address else { return };
        let mut by_address = self.limits.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = by_address.get_mut(&address) {
            *own -= 1;
            if *own == 0 {
                by_address.remove(&address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_places_are_for_those_who_have_few() {
        let limits = Limits::new(100, 50, Caps::default());
        let (greedy, other) = ("10.0.0.1".parse().ok(), "10.0.0.2".parse().ok());
        let mut places: Vec<_> =
            (0..100 + SESSION_RESERVE).map(|_| limits.connect(greedy).unwrap()).collect();
        assert!(limits.connect(greedy).unwrap_err().contains("10.0.0.1"));
        let theirs: Vec<_> = std::iter::from_fn(|| limits.connect(other).ok()).collect();
        assert_eq!(theirs.len(), SESSION_RESERVE / 2);
        places.truncate(99);
        assert!(limits.connect(greedy).is_ok());
        drop((places, theirs));
        assert_eq!((limits.used(), limits.by_address.lock().unwrap().len()), (0, 0));

        let open_all = || (0..).take_while(|&files| limits.open(1, files).is_ok()).count();
        let files = open_all();
        assert!((50..50 + RESERVE / 2).contains(&files), "{files}");
        assert!(limits.open(1, files).unwrap_err().contains(&format!("{files} of them")));
        let theirs = open_all();
        assert!(theirs > RESERVE / 4, "{theirs}");
        (0..files + theirs).for_each(|_| limits.close());
        assert_eq!(limits.files(), 0);
    }

    #[test]
    fn who_has_one_place_gets_the_next_until_there_is_none() {
        let limits = Limits::new(2000, 1000, Caps::default());
        let address = "10.0.0.1".parse().ok();
        let places: Vec<_> = (0..1000)
            .map(|_| {
                let place = limits.connect(address).unwrap();
                limits.join(0, 0).unwrap();
                limits.open(1, 0).unwrap();
                place
            })
            .collect();
        assert_eq!((places.len(), limits.files()), (1000, 1000));
    }

    #[test]
    fn caps_name_their_option() {
        let one = Some(1);
        let caps =
            Caps { connections_per_address: one, connections_per_session: one, files_per_session: one };
        let limits = Limits::new(100, 100, caps);
        let address = "::1".parse().ok();
        let _place = limits.connect(address).unwrap();
        assert!(limits.connect(address).unwrap_err().contains("--max-connections-per-address"));
        assert!(limits.join(1, 0).unwrap_err().contains("--max-connections-per-session"));
        assert!(limits.open(1, 1).unwrap_err().contains("--max-files-per-session"));
    }
}
