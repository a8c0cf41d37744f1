//! What a client does about a broken connection, as decisions: no I/O, no clock, no threads.
//!
//! A [`Machine`] says when to connect again, under which epoch, and when to give up. [`at_loss`],
//! [`after_outcome`] and [`at_gone`] say what becomes of each request that was outstanding.
//! [`crate::channel`] moves the bytes and does what they say; a model of the whole can call the same
//! functions.
//!
//! ```text
//! Connected --on_loss--> Lost --step--> Dialing --on_dialed--> Resolving --on_resolved(known)--> Connected
//!                         ^ ^              |                     | | on_resolved(gone)               ^
//!                         | +-on_dial_failed                     | +--> Reopening --on_reopened------+
//!                         +------------------------on_loss-------+--------+
//! Lost, Dialing, Resolving, Reopening --the window is over, or rejected for good--> Failed
//! ```

use std::time::{Duration, Instant};

use crate::error::{Class, Error, Status};
use crate::protocol::{Command, FileHandle, OPEN_EXCLUSIVE, OPEN_TRUNCATE, Opcode};
use crate::random::SplitMix64;

/// The longest pause between two attempts to connect, and the first one.
const PAUSE_MAX: Duration = Duration::from_secs(5);
const PAUSE_FIRST: Duration = Duration::from_millis(100);

/// What becomes of a request whose connection has broken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is sent again, as a new request.
    Again,
    /// It may have been executed, and must not be twice: the server is to say what became of it.
    Ask,
    /// It is over.
    Over(End),
}

/// How a request ends that no response has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct End {
    /// As in a response.
    pub status: Status,
    /// The same.
    pub result: u64,
    /// It may have been executed, whatever the status says.
    pub is_unknown: bool,
}

impl End {
    /// Nothing is to be done any more.
    pub const SUCCESS: Self = Self { status: Status::OK, result: 0, is_unknown: false };
    /// The server does not know what became of it. It will not be executed later.
    const UNKNOWN: Self = Self {
        status: Status { errno: libc::ECONNRESET, class: Class::Transport, retryable: false },
        result: 0,
        is_unknown: true,
    };

    /// It was not executed: the server does not know the operation.
    pub(crate) const UNSUPPORTED: Self = Self {
        status: Status { errno: libc::EOPNOTSUPP, class: Class::Protocol, retryable: false },
        result: 0,
        is_unknown: false,
    };

    fn failed(status: Status) -> Self {
        Self { status, result: 0, is_unknown: false }
    }
}

/// The fate of a request at the moment when its connection breaks. `was_sent` says whether the whole of it
/// was sent: what the server has not received completely it does not execute.
pub fn at_loss(command: &[u8], was_sent: bool) -> Fate {
    match opcode(command) {
        // What it was to cancel goes on.
        Some(Opcode::Cancel) => Fate::Over(End::failed(Status::storage(libc::EAGAIN))),
        // The next connection asks anew.
        Some(Opcode::Outcome | Opcode::Reopen) => {
            Fate::Over(End::failed(Status::transport(libc::ECONNRESET)))
        }
        _ if was_sent && Opcode::is_recorded_on_wire(command) => Fate::Ask,
        _ => Fate::Again,
    }
}

/// The fate of a request about which the server was asked, by its answer
/// ([`crate::protocol::RequestOutcome::answer`]).
pub fn after_outcome(answer: Option<(Status, u64)>) -> Fate {
    match answer {
        None => Fate::Again,
        Some((status, result)) => Fate::Over(End { status, result, is_unknown: false }),
    }
}

/// The fate of a request when the server does not know the channel any more. `fate` is what it was at the
/// loss; `redo` has the client repeat what may have been executed.
pub fn at_gone(command: &[u8], fate: Fate, redo: bool) -> Fate {
    match (opcode(command), fate) {
        (Some(Opcode::Open), Fate::Ask) => match Command::decode(command) {
            // If it was executed, the file is there now, and somebody may have written to it.
            Ok(Command::Open { flags, .. }) if flags & (OPEN_EXCLUSIVE | OPEN_TRUNCATE) == 0 => Fate::Again,
            _ => Fate::Over(End::UNKNOWN),
        },
        (_, Fate::Ask) if redo => Fate::Again,
        (_, Fate::Ask) => Fate::Over(End::UNKNOWN),
        (_, fate) => fate,
    }
}

/// How a request ends when the channel is given up for this reason.
pub fn at_failure(fate: Fate, status: Status) -> End {
    match fate {
        Fate::Over(end) => end,
        Fate::Again => End::failed(status),
        Fate::Ask => End { status, result: 0, is_unknown: true },
    }
}

/// What becomes of the requests of a file that had a lock when its session ended: a message for people.
pub const LOCK_LOST: &str = "The file had a lock, which was lost with the session: the server was restarted, \
                             or not reached for too long. Others may have changed the file. Open it again, \
                             and lock it again.";

/// How requests of a file end that could not be opened again, for this reason.
pub fn at_reopen_failure(status: Status) -> End {
    let is_another = matches!(
        status.errno,
        libc::ESTALE
            | libc::ENOENT
            | libc::ENOTDIR
            | libc::EISDIR
            | libc::ENODEV
            | libc::ENXIO
            | libc::ELOOP
            | libc::EXDEV
    );
    End::failed(if is_another { Status::storage(libc::ESTALE) } else { status })
}

/// How requests of a file end that had a lock when its session ended: see [`LOCK_LOST`].
pub fn at_lock_lost() -> End {
    End::failed(Status::storage(libc::ENOLCK))
}

/// The files that a command is about: none, one or two.
pub fn files_of(command: &[u8]) -> [Option<FileHandle>; 2] {
    let Ok(command) = Command::decode(command) else { return [None; 2] };
    let file = match command {
        Command::Close(file)
        | Command::Stat(file)
        | Command::Read { file, .. }
        | Command::Write { file, .. }
        | Command::Fsync { file, .. }
        | Command::Discard { file, .. }
        | Command::WriteZeroes { file, .. }
        | Command::Allocate { file, .. }
        | Command::Truncate { file, .. }
        | Command::Extents { file, .. }
        | Command::Checksum { file, .. }
        | Command::Lock { file, .. }
        | Command::Reopen { file, .. } => Some(file),
        Command::Copy { source, destination, .. } => return [Some(source), Some(destination)],
        Command::Open { .. }
        | Command::Cancel { .. }
        | Command::Outcome { .. }
        | Command::ListNext { .. }
        | Command::Path(_) => None,
    };
    [file, None]
}

/// Why a command cannot be sent to a server that has granted these feature bits: see
/// [`crate::protocol::Operation::why_not_granted`].
pub fn why_not_granted(command: &[u8], features: u64) -> Option<String> {
    opcode(command)?.operation().why_not_granted(features)
}

fn opcode(command: &[u8]) -> Option<Opcode> {
    Command::decode(command).ok().map(|command| command.opcode())
}

/// Whether connecting again is of no use after this failure to connect.
pub fn is_final(error: &Error) -> bool {
    match error {
        Error::Rejected { status, .. } => !matches!(
            status.errno,
            // Too many sessions; shutting down; a hello that was damaged on its way, or came too late.
            libc::EUSERS | libc::ESHUTDOWN | libc::EAGAIN | libc::EPROTO | libc::ETIMEDOUT
        ),
        Error::Address(_) | Error::Unsupported(_) => true,
        // A port may answer with anything while its server is restarted.
        Error::Io { .. } | Error::Violation(_) | Error::Closed { .. } => false,
    }
}

/// Where a channel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// It has a connection, and requests can be sent.
    Connected,
    /// It has none, and connects again then.
    Lost(Instant),
    /// A connection is being made.
    Dialing,
    /// The server says what became of the requests of earlier connections.
    Resolving,
    /// It did not know the channel any more. The files are opened again.
    Reopening,
    /// Given up.
    Failed,
}

/// What is to be done now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Nothing: it is connected, or given up.
    None,
    /// Nothing before this time.
    Wait(Instant),
    /// Connect with this epoch, by this deadline.
    Dial(u64, Instant),
    /// The window is over: it has just been given up.
    GiveUp,
}

/// The connections of one channel, one after another.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    state: State,
    window: Duration,
    epoch: u64,
    /// When the window ends, of a channel that is not connected.
    end: Option<Instant>,
    /// Attempts that brought nothing, one after another.
    attempts: u32,
    random: SplitMix64,
}

impl Machine {
    /// A channel whose first connection, with this epoch, has been made. It is given up when it has been
    /// without a useful one for as long as `window`. Pauses between attempts are drawn from `seed`.
    pub fn new(epoch: u64, window: Duration, seed: u64) -> Self {
        Self { state: State::Connected, window, epoch, end: None, attempts: 0, random: SplitMix64::new(seed) }
    }

    /// Where it is.
    pub fn state(&self) -> State {
        self.state
    }

    /// That of the latest attempt to connect.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// When it is given up, unless it is connected before.
    pub fn end(&self) -> Option<Instant> {
        self.end.filter(|_| !matches!(self.state, State::Connected | State::Failed))
    }

    /// Since when it has been without a useful connection, unless it is connected or given up.
    pub fn since(&self) -> Option<Instant> {
        self.end().map(|end| end - self.window)
    }

    /// The connection has broken. If it was not of use ([`Machine::was_useful`]) the attempt to connect
    /// counts as one that has failed, and the window goes on.
    pub fn on_loss(&mut self, now: Instant, was_useful: bool) {
        let is_new = match self.state {
            State::Connected => was_useful || self.end.is_none(),
            State::Lost(_) | State::Failed => return,
            State::Dialing | State::Resolving | State::Reopening => false,
        };
        if is_new {
            self.attempts = 0;
            self.end = Some(now + self.window);
            self.state = State::Lost(now);
        } else {
            self.retry(now);
        }
    }

    /// Whether a connection that breaks was of use: requests were answered over it (`has_answered`), and
    /// the server did not break the protocol (`is_violation`); or it was whole for `good_for`, as long as
    /// that can be known, before the trouble with it began. So neither a server that accepts connections and
    /// drops them, nor one request that breaks each of them, is tried for ever; and trouble long after the
    /// last one has a window of its own.
    pub fn was_useful(&self, has_answered: bool, is_violation: bool, good_for: Duration) -> bool {
        has_answered && !is_violation || good_for > PAUSE_MAX.min(self.window)
    }

    /// An attempt to connect has failed.
    pub fn on_dial_failed(&mut self, now: Instant, is_final: bool) {
        match self.state {
            State::Dialing if is_final => self.state = State::Failed,
            State::Dialing => self.retry(now),
            _ => {}
        }
    }

    fn retry(&mut self, now: Instant) {
        let pause = PAUSE_FIRST.saturating_mul(1 << self.attempts.min(16)).min(PAUSE_MAX);
        self.attempts = self.attempts.saturating_add(1);
        let nanos = (u128::from(self.random.next_u64()) * (pause.as_nanos() + 1)) >> 64;
        self.state = State::Lost(now + Duration::from_nanos(nanos as u64));
    }

    /// What is to be done at `now`.
    pub fn step(&mut self, now: Instant) -> Step {
        let end = match (self.state, self.end) {
            (State::Connected | State::Failed, _) | (_, None) => return Step::None,
            (_, Some(end)) => end,
        };
        if now >= end {
            self.state = State::Failed;
            return Step::GiveUp;
        }
        match self.state {
            State::Lost(at) if now >= at => {
                self.state = State::Dialing;
                // Before the attempt, whatever comes of it: the server may see a hello of which its client
                // never hears.
                self.epoch += 1;
                Step::Dial(self.epoch, end)
            }
            State::Lost(at) => Step::Wait(at.min(end)),
            _ => Step::Wait(end),
        }
    }

    /// The attempt may have offered this epoch, too.
    pub fn on_epoch(&mut self, epoch: u64) {
        self.epoch = self.epoch.max(epoch);
    }

    /// The server has welcomed the client.
    pub fn on_dialed(&mut self) {
        if self.state == State::Dialing {
            self.state = State::Resolving;
        }
    }

    /// Every request of earlier connections has a fate, and none of them can still happen. `must_reopen` says
    /// whether the files must be opened again.
    pub fn on_resolved(&mut self, must_reopen: bool) {
        if self.state == State::Resolving {
            self.state = if must_reopen { State::Reopening } else { State::Connected };
        }
    }

    /// The files are open again, or never will be.
    pub fn on_reopened(&mut self) {
        if self.state == State::Reopening {
            self.state = State::Connected;
        }
    }

    /// It is given up, for another reason than that the window is over.
    pub fn give_up(&mut self) {
        self.state = State::Failed;
    }
}

#[cfg(test)]
mod tests;
