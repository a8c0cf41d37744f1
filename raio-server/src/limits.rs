//! What one session, one client and one peer address may have: sessions, connections, open files, requests in
//! flight. Memory is each worker's own business.
//!
//! Connections and files take descriptors of one process. As long as there are some for everybody nobody is
//! limited but by options. The last few are for those who have fewer than are left, at first for any such
//! session, at last for such an address: whoever took all the others is rejected, and the next client is not.
//! The same holds for sessions, by address.

use std::collections::HashMap;
use std::str::FromStr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};

use anyhow::ensure;
use serde::Deserialize;

use crate::peer::Origin;
use crate::size::Size;
use crate::tuning::channels::PARKED_PART;
use crate::tuning::limits::{
    CONNECTION_BYTES, FILE_BYTES, FILE_BYTES_PER_WORKER, QUEUE_PAIR_RESERVE_PART, RESERVE, SESSION_RESERVE,
};
use crate::tuning::main_thread::DESCRIPTORS_OWN;
use raio_transport::sync::lock;

fn file_bytes(workers: usize) -> usize {
    FILE_BYTES + workers * FILE_BYTES_PER_WORKER
}

/// What a session with a connection and an open file may take.
pub fn session_bytes(workers: usize) -> usize {
    CONNECTION_BYTES + file_bytes(workers)
}

/// What a number of sessions take: a connection and a file for each, and what is not theirs.
pub fn descriptors_for(sessions: usize) -> usize {
    DESCRIPTORS_OWN + 2 * sessions
}

/// How many sessions there may be, and how many open files of theirs, when the process may have `limit` open
/// files.
pub fn session_limits(limit: usize, wanted: Option<usize>) -> anyhow::Result<(usize, usize)> {
    let room = limit.saturating_sub(DESCRIPTORS_OWN);
    let sessions = match wanted {
        // Most programs have a connection for control, one for a context, and a file.
        None => (limit / 4).max(1),
        Some(sessions) => {
            let remedy = format!(
                "Raise the hard limit with `ulimit -Hn {}`, or LimitNOFILE= in the unit, or give a smaller \
                 --max-sessions",
                descriptors_for(sessions)
            );
            ensure!(
                sessions <= room,
                "--max-sessions is {sessions}, but this process may have only {limit} open files. {remedy}."
            );
            if descriptors_for(sessions) > limit {
                tracing::warn!(
                    "--max-sessions {sessions} is more than can each have a file open: this process may \
                     have only {limit} open \
                     files. {remedy}."
                );
            }
            sessions
        }
    };
    // At most half for files, and none of what the sessions' connections take: clients that open all they can
    // do not keep others from connecting. But one for each session: it may be of an export that takes no
    // descriptor.
    let files = (limit / 2).min(room.saturating_sub(sessions)).max(sessions);
    Ok((sessions, files))
}

/// How much there is for connections and open files.
#[derive(Clone, Copy, Debug)]
pub struct Room {
    /// Descriptors, those of [`RESERVE`] not counted.
    pub descriptors: usize,
    /// How many of these files may take, until [`Limits::set`].
    pub files: usize,
    /// Memory.
    pub bytes: usize,
    /// How many workers there are.
    pub workers: usize,
}

/// Connections and open files, and the bytes of queue pairs.
#[derive(Clone, Copy, Debug, Default)]
struct Usage {
    connections: usize,
    files: usize,
    queue_pair_bytes: usize,
}

impl Usage {
    fn count(self) -> usize {
        self.connections + self.files
    }

    fn bytes(self, workers: usize) -> usize {
        self.connections * CONNECTION_BYTES + self.files * file_bytes(workers) + self.queue_pair_bytes
    }

    fn without_a_connection(self) -> Self {
        Self { connections: self.connections.saturating_sub(1), ..self }
    }
}

/// What an option says that one session may have, or the clients of one address; or what `clients.toml` says
/// that all sessions of a client may have. None: as much as there is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Caps {
    /// Connections.
    pub connections: Option<usize>,
    /// Open files.
    pub files: Option<usize>,
    /// Requests in flight.
    pub requests: Option<usize>,
    /// Memory for data in flight, shared out among the workers.
    pub memory: Option<Size>,
}

impl Caps {
    /// The name of one that is 0.
    pub fn zero(&self) -> Option<&'static str> {
        let memory = self.memory.map(|Size(bytes)| usize::from(bytes > 0));
        let named = [
            ("connections", self.connections),
            ("files", self.files),
            ("requests", self.requests),
            ("memory", memory),
        ];
        named.into_iter().find(|&(_, cap)| cap == Some(0)).map(|(name, _)| name)
    }

    /// The larger limit of each kind.
    pub fn or(&self, other: &Self) -> Self {
        let more =
            |one: Option<usize>, other| one.zip(other).map(|(one, other): (usize, usize)| one.max(other));
        Self {
            connections: more(self.connections, other.connections),
            files: more(self.files, other.files),
            requests: more(self.requests, other.requests),
            memory: self.memory.zip(other.memory).map(|(Size(one), Size(other))| Size(one.max(other))),
        }
    }
}

impl FromStr for Caps {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "Write one or more of connections=NUMBER, files=NUMBER, requests=NUMBER and \
        memory=SIZE, with commas \
                            between them.";
        let mut caps = Self::default();
        for part in text.split(',') {
            let (name, value) = part.split_once('=').ok_or_else(|| format!("{part:?} has no `=`. {FORM}"))?;
            let number = match name {
                "connections" => &mut caps.connections,
                "files" => &mut caps.files,
                "requests" => &mut caps.requests,
                "memory" if caps.memory.is_none() => {
                    caps.memory = Some(value.parse()?);
                    continue;
                }
                "memory" => return Err("memory is given twice. Give it once.".into()),
                _ => return Err(format!("There is no limit {name:?}. {FORM}")),
            };
            if number.is_some() {
                return Err(format!("{name} is given twice. Give it once."));
            }
            let is_number = !value.is_empty() && value.bytes().all(|b| b.is_ascii_digit());
            let parsed = if is_number { value.parse().ok() } else { None };
            *number = Some(parsed.ok_or_else(|| {
                format!(
                    "{name}={value} is not a whole number that fits. Write digits alone, such as {name}=4."
                )
            })?);
        }
        Ok(caps)
    }
}

/// Who has too much.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Who {
    /// A session.
    Session,
    /// The clients of an address.
    Address,
    /// The sessions of a client.
    Client,
}

/// How many kinds of [`Who`] there are.
pub const WHO_COUNT: usize = 3;

/// Somebody may not have more.
#[derive(Debug, PartialEq, Eq)]
pub struct Excess {
    /// Who.
    pub who: Who,
    /// Why, and what to do: for the client.
    pub text: String,
}

impl Excess {
    /// There are as many as the option allows.
    fn of_cap(who: Who, count: usize, counted: &Counted) -> Self {
        let Counted { what, verb, key, .. } = counted;
        let (owner, limit) = match who {
            Who::Session => ("The session has", format!("{key}= of the server's --limits-per-session")),
            Who::Address => {
                ("The clients of this address have", format!("{key}= of the server's --limits-per-address"))
            }
            Who::Client => (
                "The sessions of this client have",
                format!("{key} of its limits in the server's clients.toml"),
            ),
        };
        let text = format!("{owner} {count} {what}, as many as they may. {verb}, or raise {limit}.");
        Self { who, text }
    }
}

/// A number in an [`Account`] that an option may limit.
struct Counted {
    number: fn(&Account) -> &AtomicUsize,
    cap: fn(&Caps) -> Option<usize>,
    what: &'static str,
    /// What a client can do.
    verb: &'static str,
    key: &'static str,
}

const CONNECTIONS: Counted = Counted {
    number: |account| &account.connections,
    cap: |caps| caps.connections,
    what: "connections",
    verb: "Close some",
    key: "connections",
};
const FILES: Counted = Counted {
    number: |account| &account.files,
    cap: |caps| caps.files,
    what: "files open",
    verb: "Close some",
    key: "files",
};
const REQUESTS: Counted = Counted {
    number: |account| &account.requests,
    cap: |caps| caps.requests,
    what: "requests in flight",
    verb: "Wait for their responses and try again",
    key: "requests",
};

/// What one session has, or the clients of one address have, or the sessions of one client.
#[derive(Debug, Default)]
pub struct Account {
    /// An address's.
    sessions: AtomicUsize,
    connections: AtomicUsize,
    files: AtomicUsize,
    requests: AtomicUsize,
    /// An address's.
    queue_pair_bytes: AtomicUsize,
    /// Where it is entered, if it is an address's or a client's.
    entry: Option<(Arc<Limits>, Holder)>,
    /// A session's: its client's account, and what that may have.
    client: OnceLock<Option<(Arc<Account>, Caps)>>,
}

/// Who has an account that is not a session's.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Holder {
    Address(Origin),
    /// By its name in `clients.toml`.
    Client(String),
}

impl Account {
    /// Which address's it is, if it is one's.
    pub fn address(&self) -> Option<Origin> {
        match self.entry {
            Some((_, Holder::Address(address))) => Some(address),
            _ => None,
        }
    }

    fn client(&self) -> Option<&(Arc<Self>, Caps)> {
        self.client.get()?.as_ref()
    }

    fn usage(&self) -> Usage {
        Usage {
            connections: get(&self.connections),
            files: get(&self.files),
            queue_pair_bytes: get(&self.queue_pair_bytes),
        }
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        let Some((limits, holder)) = self.entry.take() else { return };
        let mut accounts = limits.accounts();
        if accounts.get(&holder).is_some_and(|account| account.strong_count() == 0) {
            accounts.remove(&holder);
        }
    }
}

/// An address's account, for a connection from it. None: the address is not known.
pub type AddressAccount = Option<Arc<Account>>;

/// Caps that may change, but for that on memory, which workers have. A request takes no lock for them.
#[derive(Debug)]
struct ChangingCaps {
    connections: AtomicUsize,
    files: AtomicUsize,
    requests: AtomicUsize,
}

impl ChangingCaps {
    fn new(caps: Caps) -> Self {
        let none = || AtomicUsize::new(usize::MAX);
        let this = Self { connections: none(), files: none(), requests: none() };
        this.set(caps);
        this
    }

    fn set(&self, caps: Caps) {
        let caps = [
            (&self.connections, caps.connections),
            (&self.files, caps.files),
            (&self.requests, caps.requests),
        ];
        for (number, cap) in caps {
            number.store(cap.unwrap_or(usize::MAX), Ordering::Relaxed);
        }
    }

    fn get(&self) -> Caps {
        let cap = |number| Some(get(number)).filter(|&cap| cap != usize::MAX);
        Caps {
            connections: cap(&self.connections),
            files: cap(&self.files),
            requests: cap(&self.requests),
            memory: None,
        }
    }
}

/// What all clients have. Locked when a connection begins or ends.
#[derive(Debug)]
pub struct Limits {
    session_caps: ChangingCaps,
    address_caps: ChangingCaps,
    room: Room,
    /// How many descriptors files may take.
    files_max: AtomicUsize,
    connections: AtomicUsize,
    files: AtomicUsize,
    queue_pair_bytes: AtomicUsize,
    accounts: Mutex<HashMap<Holder, Weak<Account>>>,
}

/// A connection's permit: it lasts until the socket is closed. Dropping it frees the permit.
#[derive(Debug)]
pub struct ConnectionPermit {
    limits: Arc<Limits>,
    address: AddressAccount,
}

/// A file's permit. Dropping it frees the permit.
#[derive(Debug)]
pub struct FilePermit {
    limits: Arc<Limits>,
    address: AddressAccount,
}

/// Memory of a queue pair. Dropping it frees the memory.
#[derive(Debug)]
pub struct QueuePairPermit {
    limits: Arc<Limits>,
    address: AddressAccount,
    bytes: usize,
}

impl ConnectionPermit {
    /// The account of the address that the connection is from.
    pub fn address(&self) -> &AddressAccount {
        &self.address
    }
}

fn get(number: &AtomicUsize) -> usize {
    number.load(Ordering::Relaxed)
}

/// Whether a session that has so much, on behalf of an address that has so much, may have more, with `used`
/// taken of `max` and a reserve of [`RESERVE`] times `each`.
fn may_take(used: usize, max: usize, each: usize, session: usize, address: Option<usize>) -> bool {
    used < max
        || session < (max + SESSION_RESERVE * each).saturating_sub(used)
        || address.is_some_and(|own| own < (max + RESERVE * each).saturating_sub(used))
}

impl Limits {
    /// Nothing is taken.
    pub fn new(room: Room, session_caps: Caps, address_caps: Caps) -> Arc<Self> {
        Arc::new(Self {
            session_caps: ChangingCaps::new(session_caps),
            address_caps: ChangingCaps::new(address_caps),
            files_max: AtomicUsize::new(room.files),
            room,
            connections: AtomicUsize::new(0),
            files: AtomicUsize::new(0),
            queue_pair_bytes: AtomicUsize::new(0),
            accounts: Mutex::default(),
        })
    }

    /// From now on somebody may have this. Who has more keeps it.
    pub fn set(&self, session_caps: Caps, address_caps: Caps, files_max: usize) {
        self.session_caps.set(session_caps);
        self.address_caps.set(address_caps);
        self.files_max.store(files_max, Ordering::Relaxed);
    }

    /// Counts one more for somebody who may have no more than this.
    fn count(who: Who, account: &Account, caps: &Caps, counted: &Counted) -> Result<(), Excess> {
        let number = (counted.number)(account);
        let before = number.fetch_add(1, Ordering::Relaxed);
        match (counted.cap)(caps) {
            Some(cap) if before >= cap => {
                number.fetch_sub(1, Ordering::Relaxed);
                Err(Excess::of_cap(who, before, counted))
            }
            _ => Ok(()),
        }
    }

    /// Counts one more for a session and its client, or for neither.
    fn count_for_session(&self, session: &Account, counted: &Counted) -> Result<(), Excess> {
        Self::count(Who::Session, session, &self.session_caps.get(), counted)?;
        let Some((client, caps)) = session.client() else { return Ok(()) };
        Self::count(Who::Client, client, caps, counted)
            .inspect_err(|_| _ = (counted.number)(session).fetch_sub(1, Ordering::Relaxed))
    }

    /// Takes back what [`Limits::count_for_session`] has counted.
    fn uncount_for_session(session: &Account, counted: &Counted) {
        let client = session.client().map(|(client, _)| &**client);
        for account in std::iter::once(session).chain(client) {
            (counted.number)(account).fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Counts one more for a session, its client and an address, or for none of them.
    fn count_for_all(
        &self,
        session: &Account,
        address: &AddressAccount,
        counted: &Counted,
    ) -> Result<(), Excess> {
        self.count_for_session(session, counted)?;
        let Some(account) = address else { return Ok(()) };
        Self::count(Who::Address, account, &self.address_caps.get(), counted)
            .inspect_err(|_| Self::uncount_for_session(session, counted))
    }

    fn accounts(&self) -> std::sync::MutexGuard<'_, HashMap<Holder, Weak<Account>>> {
        lock(&self.accounts)
    }

    fn used(&self) -> Usage {
        Usage {
            connections: get(&self.connections),
            files: get(&self.files),
            queue_pair_bytes: get(&self.queue_pair_bytes),
        }
    }

    /// What there is too little of for a session that has so much, on behalf of an address that has so
    /// many, to have another: what its operator would raise.
    fn shortage(&self, used: Usage, session: Usage, address: Option<Usage>) -> Option<&'static str> {
        let Room { descriptors, bytes, workers, .. } = self.room;
        let bytes_of = |usage: Usage| usage.bytes(workers);
        if !may_take(used.count(), descriptors, 1, session.count(), address.map(Usage::count)) {
            Some("limit with `ulimit -n`")
        } else if !may_take(bytes_of(used), bytes, CONNECTION_BYTES, bytes_of(session), address.map(bytes_of))
        {
            Some("--memory")
        } else {
            None
        }
    }

    fn account(self: &Arc<Self>, holder: Holder) -> Arc<Account> {
        let mut accounts = self.accounts();
        if let Some(account) = accounts.get(&holder).and_then(Weak::upgrade) {
            return account;
        }
        let mut account = Account::default();
        account.entry = Some((Arc::clone(self), holder.clone()));
        let account = Arc::new(account);
        accounts.insert(holder, Arc::downgrade(&account));
        account
    }

    /// Notes a session's client: its name, and the limits of all its sessions together. None: it has no
    /// client.
    /// Called for each connection before it joins; the first call counts.
    pub fn assign(self: &Arc<Self>, session: &Account, client: Option<(&str, Caps)>) {
        session.client.get_or_init(|| {
            let (name, caps) = client?;
            Some((self.account(Holder::Client(name.to_owned())), caps))
        });
    }

    /// The client of a session and the bytes that its requests may hold at a worker, if they are limited.
    pub fn client_memory<'a>(&self, session: &'a Account) -> Option<(&'a str, usize)> {
        let (client, caps) = session.client()?;
        match &client.entry {
            Some((_, Holder::Client(name))) => {
                let Size(bytes) = caps.memory?;
                Some((name.as_str(), (bytes / self.room.workers.max(1) as u64) as usize))
            }
            _ => None,
        }
    }

    /// A permit for a connection from this address, if it is known.
    pub fn connect(self: &Arc<Self>, address: Option<Origin>) -> Result<ConnectionPermit, Excess> {
        let account = address.map(|address| self.account(Holder::Address(address)));
        if let (Some(own), Some(address)) = (&account, address) {
            // Nobody else takes permits of connections, so there is no race.
            let (used, usage) = (self.used(), own.usage());
            Self::count(Who::Address, own, &self.address_caps.get(), &CONNECTIONS)?;
            // The session is not known yet. It may be one that has nothing.
            if let Some(what) = self.shortage(used, Usage::default(), Some(usage)) {
                own.connections.fetch_sub(1, Ordering::Relaxed);
                let text = format!(
                    "The server has as many connections and open files as it may, and {} of the connections \
                     are from {address}. \
                     Close some, or raise its {what}.",
                    usage.connections
                );
                return Err(Excess { who: Who::Address, text });
            }
        }
        self.connections.fetch_add(1, Ordering::Relaxed);
        Ok(ConnectionPermit { limits: Arc::clone(self), address: account })
    }

    /// The clients of an address begin another session, where there are `used` of `max`. The address counts
    /// it until [`Limits::end_session`]. There are more than `max` for addresses that have few: as many as
    /// that, and [`RESERVE`].
    pub fn begin_session(&self, used: usize, max: usize, address: &AddressAccount) -> Result<(), Excess> {
        let own = address.as_ref().map(|account| get(&account.sessions));
        let left = (max + RESERVE.min(max)).saturating_sub(used);
        if used >= max && own.is_none_or(|own| own >= left) {
            let theirs = own.map_or(String::new(), |own| format!(", {own} of them from this address"));
            let text = format!(
                "The server has as many sessions as it takes ({used}){theirs}. Come back when one has \
                 ended, or raise its --max-sessions."
            );
            return Err(Excess { who: Who::Address, text });
        }
        address.iter().for_each(|account| _ = account.sessions.fetch_add(1, Ordering::Relaxed));
        Ok(())
    }

    /// A session has ended.
    pub fn end_session(&self, address: &AddressAccount) {
        address.iter().for_each(|account| _ = account.sessions.fetch_sub(1, Ordering::Relaxed));
    }

    /// A session may keep another connection, which has its permit. The session counts it until
    /// [`Limits::leave`].
    pub fn join(&self, session: &Account, address: &AddressAccount) -> Result<(), Excess> {
        let usage = session.usage();
        self.count_for_session(session, &CONNECTIONS)?;
        let of_address = address.as_ref().map(|account| account.usage().without_a_connection());
        let Some(what) = self.shortage(self.used().without_a_connection(), usage, of_address) else {
            return Ok(());
        };
        self.leave(session);
        let Usage { connections, files, .. } = usage;
        let text = format!(
            "The server has as many connections and open files as it may, and {connections} and {files} of \
             them are this session's. \
             Close some, or raise its {what}."
        );
        Err(Excess { who: Who::Session, text })
    }

    /// A connection of a session has ended.
    pub fn leave(&self, session: &Account) {
        Self::uncount_for_session(session, &CONNECTIONS);
    }

    /// A permit for a file of a session, opened by a connection from an address. The session counts it until
    /// [`Limits::close`], the others as long as the permit lasts.
    pub fn open(self: &Arc<Self>, session: &Account, address: &AddressAccount) -> Result<FilePermit, Excess> {
        // Workers that look at the same time may go beyond it by one each, which does no harm.
        let (own, all) = (session.usage(), self.used());
        let of_address = address.as_ref().map(|account| account.usage());
        let files_of_address = of_address.map(|usage| usage.files);
        let shortage = if may_take(all.files, get(&self.files_max), 1, own.files, files_of_address) {
            self.shortage(all, own, of_address)
        } else {
            Some("limit with `ulimit -n`")
        };
        self.count_for_all(session, address, &FILES)?;
        self.files.fetch_add(1, Ordering::Relaxed);
        let permit = FilePermit { limits: Arc::clone(self), address: address.clone() };
        let Some(what) = shortage else { return Ok(permit) };
        self.close(session);
        let text = format!(
            "The server has as many files open as it may, {} of them for this session. Close some, or raise \
             its {what}.",
            own.files
        );
        Err(Excess { who: Who::Session, text })
    }

    /// A session has given up a file.
    pub fn close(&self, session: &Account) {
        Self::uncount_for_session(session, &FILES);
    }

    /// Memory for a queue pair of a connection from this address, if it is known. All may have all but the
    /// last part; that is for addresses whose queue pairs have less than is left. The error is for the
    /// client.
    pub fn queue_pair(
        self: &Arc<Self>,
        address: Option<Origin>,
        bytes: usize,
    ) -> Result<QueuePairPermit, String> {
        let address = address.map(|address| self.account(Holder::Address(address)));
        let own = address.as_ref().map(|account| get(&account.queue_pair_bytes));
        // Counted before it is looked at: several workers together do not go beyond it.
        self.queue_pair_bytes.fetch_add(bytes, Ordering::Relaxed);
        address.iter().for_each(|account| _ = account.queue_pair_bytes.fetch_add(bytes, Ordering::Relaxed));
        let permit = QueuePairPermit { limits: Arc::clone(self), address, bytes };
        let (used, max) = (self.used().bytes(self.room.workers), self.room.bytes);
        let left = max.checked_sub(used);
        if left.is_some_and(|left| left >= max / QUEUE_PAIR_RESERVE_PART || own.is_some_and(|own| own < left))
        {
            return Ok(permit);
        }
        Err(format!(
            "The server has no memory for another queue pair: connections, open files and queue pairs have \
             {} of {} KiB. Use TCP, close \
             some, or raise its --memory.",
            (used - bytes) >> 10,
            max >> 10
        ))
    }

    /// Bytes that channels without a connection may take together.
    pub fn parked_bytes_max(&self) -> usize {
        self.room.bytes / PARKED_PART
    }

    /// Whether requests must be counted: an option limits them.
    pub fn counts_requests(&self) -> bool {
        self.session_caps.get().requests.is_some() || self.address_caps.get().requests.is_some()
    }

    /// A request of a session begins. If requests are counted, all count it until [`Limits::end_request`].
    pub fn begin_request(&self, session: &Account, address: &AddressAccount) -> Result<(), Excess> {
        self.count_for_all(session, address, &REQUESTS)
    }

    /// A request is over.
    pub fn end_request(&self, session: &Account, address: &AddressAccount) {
        Self::uncount_for_session(session, &REQUESTS);
        if let Some(account) = address {
            account.requests.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Connections and open files, of all sessions.
    #[cfg(any(test, feature = "test-worker"))]
    pub fn places(&self) -> usize {
        self.used().count()
    }

    /// Open files of all sessions.
    pub fn files(&self) -> usize {
        get(&self.files)
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.limits.connections.fetch_sub(1, Ordering::Relaxed);
        if let Some(account) = &self.address {
            account.connections.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for QueuePairPermit {
    fn drop(&mut self) {
        self.limits.queue_pair_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        if let Some(account) = &self.address {
            account.queue_pair_bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        }
    }
}

impl Drop for FilePermit {
    fn drop(&mut self) {
        self.limits.files.fetch_sub(1, Ordering::Relaxed);
        if let Some(account) = &self.address {
            account.files.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(descriptors: usize, files: usize) -> Room {
        Room { descriptors, files, bytes: 1 << 30, workers: 2 }
    }

    fn uncapped(descriptors: usize, files: usize) -> Arc<Limits> {
        Limits::new(room(descriptors, files), Caps::default(), Caps::default())
    }

    fn address(text: &str) -> Option<Origin> {
        text.parse().ok().map(Origin::Ip)
    }

    /// A session that opens all the files that it can, from an address. Returns it, and them.
    fn open_all(limits: &Arc<Limits>, address: &AddressAccount) -> (Account, Vec<FilePermit>) {
        let session = Account::default();
        let files = std::iter::from_fn(|| limits.open(&session, address).ok()).collect();
        (session, files)
    }

    #[test]
    fn the_last_places_are_for_those_who_have_few() {
        let limits = uncapped(100, 50);
        let (greedy, other) = (address("10.0.0.1"), address("10.0.0.2"));
        let session = Account::default();
        let mut permits = Vec::new();
        while let Ok(permit) = limits.connect(greedy) {
            if limits.join(&session, permit.address()).is_err() {
                break;
            }
            permits.push(permit);
        }
        assert_eq!(permits.len(), 100, "nobody else wants any");
        // Other sessions from there have the next, and other addresses the last.
        let connect = |address| {
            let permit = limits.connect(address).ok()?;
            limits.join(&Account::default(), permit.address()).ok().map(|()| permit)
        };
        permits.extend(std::iter::from_fn(|| connect(greedy)));
        assert_eq!(permits.len(), 100 + SESSION_RESERVE);
        assert!(limits.connect(greedy).unwrap_err().text.contains("10.0.0.1"));
        let theirs: Vec<_> = std::iter::from_fn(|| connect(other)).collect();
        assert_eq!(theirs.len(), SESSION_RESERVE / 2);
        permits.truncate(99);
        assert!(limits.connect(greedy).is_ok());
        drop((permits, theirs));
        assert_eq!((limits.used().count(), limits.accounts().len()), (0, 0));
    }

    #[test]
    fn the_last_files_are_for_those_who_have_few() {
        let limits = uncapped(1000, 50);
        let [here, there] = ["10.0.0.1", "10.0.0.2"].map(|ip| limits.connect(address(ip)).unwrap());
        let (greedy, files) = open_all(&limits, here.address());
        assert!((50..50 + SESSION_RESERVE).contains(&files.len()), "{}", files.len());
        let error = limits.open(&greedy, here.address()).unwrap_err();
        assert!(error.text.contains(&format!("{} of them", files.len())), "{error:?}");
        // Sessions from there take what sessions may take, and other addresses still have some.
        let mut others = Vec::new();
        loop {
            let (_, files) = open_all(&limits, here.address());
            if files.is_empty() {
                break;
            }
            others.push(files);
        }
        let (_, theirs) = open_all(&limits, there.address());
        assert!(!others.is_empty() && theirs.len() > RESERVE / 8, "{}", theirs.len());
        drop((files, others, theirs));
        assert_eq!(limits.files(), 0);
    }

    #[test]
    fn places_are_limited_by_memory_too() {
        let limits = Limits::new(
            Room { bytes: 100 * CONNECTION_BYTES, ..room(10_000, 10_000) },
            Caps::default(),
            Caps::default(),
        );
        let [here, there] = ["10.0.0.1", "10.0.0.2"].map(|ip| limits.connect(address(ip)).unwrap());
        let (greedy, files) = open_all(&limits, here.address());
        let each = file_bytes(2);
        assert!((98 * CONNECTION_BYTES / each..130 * CONNECTION_BYTES / each).contains(&files.len()));
        let error = limits.open(&greedy, here.address()).unwrap_err();
        assert!(error.text.ends_with("raise its --memory."), "{error:?}");
        let further = limits.connect(address("10.0.0.1")).unwrap();
        let error = limits.join(&greedy, further.address()).unwrap_err();
        assert!(error.text.ends_with("raise its --memory."), "{error:?}");
        let permit = limits.connect(address("10.0.0.2")).unwrap();
        limits.join(&Account::default(), permit.address()).unwrap();
        drop(limits.open(&Account::default(), there.address()).unwrap());
    }

    #[test]
    fn queue_pairs_take_no_more_than_there_is_and_leave_some_for_others() {
        const BYTES: usize = 3 << 20;
        let limits =
            Limits::new(Room { bytes: 32 * BYTES, ..room(100, 100) }, Caps::default(), Caps::default());
        let all =
            |ip| -> Vec<_> { std::iter::from_fn(|| limits.queue_pair(address(ip), BYTES).ok()).collect() };
        let greedy = all("10.0.0.1");
        assert_eq!(greedy.len(), 28);
        let text = limits.queue_pair(address("10.0.0.1"), BYTES).unwrap_err();
        assert!(text.ends_with("raise its --memory."), "{text}");
        assert!(limits.queue_pair(None, BYTES).is_err());
        // Connections have their permits all the same.
        let permit = limits.connect(address("10.0.0.1")).unwrap();
        limits.join(&Account::default(), permit.address()).unwrap();
        let other = all("10.0.0.2");
        assert_eq!(other.len(), 2);
        assert_eq!(all("10.0.0.3").len(), 1);
        drop((greedy, other, permit));
        assert_eq!((limits.used().bytes(2), limits.accounts().len()), (0, 0));
        assert_eq!(all("10.0.0.2").len(), 28);
    }

    #[test]
    fn who_has_one_place_gets_the_next_until_there_is_none() {
        let limits = uncapped(2000, 1000);
        let permits: Vec<_> = (0..1000)
            .map(|_| {
                let (permit, session) = (limits.connect(address("10.0.0.1")).unwrap(), Account::default());
                limits.join(&session, permit.address()).unwrap();
                let file = limits.open(&session, permit.address()).unwrap();
                (permit, file)
            })
            .collect();
        assert_eq!((permits.len(), limits.files()), (1000, 1000));
    }

    #[test]
    fn an_account_lasts_as_long_as_anything_is_counted_in_it() {
        let caps = Caps { files: Some(1), ..Caps::default() };
        let limits = Limits::new(room(100, 100), Caps::default(), caps);
        let connect = || limits.connect(address("::1")).unwrap();
        let session = Account::default();
        let owner = connect().address().clone();
        let file = limits.open(&session, &owner).unwrap();
        // The connection has gone, the file is there.
        assert_eq!(limits.open(&session, connect().address()).unwrap_err().who, Who::Address);
        drop((file, owner));
        assert!(limits.accounts().is_empty());
        assert!(limits.open(&session, connect().address()).is_ok());
    }

    #[test]
    fn caps_name_their_option() {
        let one = Caps { connections: Some(1), files: Some(1), requests: Some(1), memory: None };
        let limits = Limits::new(room(100, 100), Caps::default(), one);
        let permit = limits.connect(address("::1")).unwrap();
        let error = limits.connect(address("::1")).unwrap_err();
        assert!(error.text.contains("connections= of the server's --limits-per-address"), "{error:?}");
        let mut errors = Vec::new();
        let mut twice =
            |limits: &Limits, act: &dyn Fn(&Account) -> Result<Option<FilePermit>, Excess>, key: &str| {
                let session = Account::default();
                let _first = act(&session).unwrap();
                let Excess { who, text } = act(&session).unwrap_err();
                let option = if who == Who::Session { "session" } else { "address" };
                assert!(text.contains(&format!("{key}= of the server's --limits-per-{option}.")), "{text}");
                errors.push(who);
                let _ = limits;
            };
        twice(&limits, &|session| limits.open(session, permit.address()).map(Some), "files");
        twice(&limits, &|session| limits.begin_request(session, permit.address()).map(|()| None), "requests");
        let limits = Limits::new(room(100, 100), one, Caps::default());
        let permit = limits.connect(address("::1")).unwrap();
        twice(&limits, &|session| limits.join(session, permit.address()).map(|()| None), "connections");
        twice(&limits, &|session| limits.open(session, permit.address()).map(Some), "files");
        twice(&limits, &|session| limits.begin_request(session, permit.address()).map(|()| None), "requests");
        assert_eq!(errors, [Who::Address, Who::Address, Who::Session, Who::Session, Who::Session]);
    }

    #[test]
    fn all_sessions_of_a_client_count_together_wherever_they_come_from() {
        let limits = uncapped(100, 100);
        let caps = Caps { connections: Some(2), files: Some(2), requests: Some(2), memory: Some(Size(10)) };
        let permits = ["10.0.0.1", "10.0.0.2"].map(|ip| limits.connect(address(ip)).unwrap());
        let sessions = [(); 3].map(|()| Account::default());
        let [one, two, other] = &sessions;
        limits.assign(one, Some(("db1", caps)));
        limits.assign(two, Some(("db1", caps)));
        limits.assign(other, Some(("db2", caps)));
        // What came first stays.
        limits.assign(one, None);
        let [here, there] = permits.each_ref().map(|permit| permit.address());
        for session in [one, two] {
            limits.join(session, here).unwrap();
            limits.begin_request(session, there).unwrap();
        }
        let files = [one, two].map(|session| limits.open(session, there).unwrap());
        for (error, key) in [
            (limits.join(two, there).unwrap_err(), "connections"),
            (limits.open(one, here).unwrap_err(), "files"),
            (limits.begin_request(two, here).unwrap_err(), "requests"),
        ] {
            assert_eq!(error.who, Who::Client);
            assert!(
                error.text.ends_with(&format!("raise {key} of its limits in the server's clients.toml."))
            );
        }
        limits.join(other, here).unwrap();
        drop(limits.open(other, here).unwrap());
        limits.close(other);
        assert_eq!(limits.client_memory(one), Some(("db1", 5)));
        // What was rejected is not counted, and what is over neither.
        limits.leave(one);
        limits.close(two);
        limits.end_request(one, there);
        limits.join(two, here).unwrap();
        drop(limits.open(one, here).unwrap());
        limits.begin_request(two, here).unwrap();
        drop((files, permits));
        assert_eq!(limits.accounts().len(), 2);
        drop(sessions);
        assert!(limits.accounts().is_empty());
    }

    #[test]
    fn who_may_have_as_much_as_any_of_two_has_no_limit_that_one_of_them_lacks() {
        let caps = |text: &str| text.parse::<Caps>().unwrap();
        let both = caps("connections=3,files=9,memory=1M").or(&caps("connections=7,requests=4,memory=2M"));
        assert_eq!(both, caps("connections=7,memory=2M"));
        assert_eq!((caps("files=0").zero(), both.zero()), (Some("files"), None));
    }

    #[test]
    fn limits_are_pairs_of_a_name_and_a_number() {
        let caps = "memory=64k,connections=1,requests=3,files=2".parse();
        let (connections, files, requests) = (Some(1), Some(2), Some(3));
        assert_eq!(caps, Ok(Caps { connections, files, requests, memory: Some(Size(64 << 10)) }));
        assert_eq!("files=7".parse(), Ok(Caps { files: Some(7), ..Caps::default() }));
        for (text, needle) in [
            ("", "has no `=`"),
            ("files", "\"files\" has no `=`"),
            ("file=3", "no limit \"file\""),
            ("files=3,files=4", "files is given twice"),
            ("memory=1M,memory=1M", "memory is given twice"),
            ("files=+3", "files=+3 is not a whole number"),
            ("files=", "such as files=4"),
            ("memory=1x", "not a size"),
        ] {
            let error = text.parse::<Caps>().unwrap_err();
            assert!(error.contains(needle) && error.ends_with('.'), "{text}: {error}");
        }
    }

    #[test]
    fn the_limit_on_open_files_is_shared_out_among_connections_and_files() {
        assert_eq!(session_limits(1 << 20, None).unwrap(), (1 << 18, 1 << 19));
        assert_eq!(session_limits(1024, None).unwrap(), (256, 512));
        // One file each, and not one descriptor more.
        assert_eq!(session_limits(descriptors_for(32_768), Some(32_768)).unwrap(), (32_768, 32_768));
        assert_eq!(session_limits(1 << 20, Some(5)).unwrap(), (5, 1 << 19));
    }

    #[test]
    fn more_sessions_than_descriptors_are_rejected_with_the_number_that_it_takes() {
        let error = session_limits(1024, Some(1000)).unwrap_err().to_string();
        assert!(error.contains("--max-sessions is 1000") && error.contains("ulimit -Hn 2256"), "{error}");
    }
}
