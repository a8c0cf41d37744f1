//! How a connection takes the place of one that has broken: [`crate::channel`] says when it may.
//!
//! ```text
//!   hello --> Waiting: `outcome` arrives, and waits --> settled: it is answered --> Settled
//!               ^ the connections before it end, on any worker; so do the requests that they have left
//! ```
//!
//! The one that waits does so here, not in the admission: it holds nothing, and nothing waits for it.

use std::mem;
use std::sync::Arc;
use std::time::Instant;

use raio_transport::Violation;
use raio_transport::error::Status;
use raio_transport::keys::fingerprint;
use raio_transport::memory::Slot;
use raio_transport::protocol::{Command, Opcode};
use raio_transport::trace::Phase;
use raio_transport::transport::{self, Response, ServerTransport};
use zerocopy::IntoBytes;

use super::command::EXPORT_CHANGED;
use super::connections::{Asked, Connection, Standing};
use super::{EXPIRY, FENCE_CHECK, Mail, Worker};
use crate::audit::{Event, Who};
use crate::channel::slot_of;
use crate::engine::{self, Closing};
use crate::keys::Revocation;
use crate::limits::{AddressAccount, Excess};
use crate::log::log_client;
use crate::open::Opened;
use crate::peer::Origin;
use crate::request::{Request, State, Work, cancelled, failure, success};
use crate::session::{EndReason, Session};
use crate::sessions::{ChannelKey, ConnectionName, Effects, Fence, Member, Succession, Unsettled};
use crate::timeline::Stage;
use crate::tuning::channels::{FENCE_LOGGED_AFTER, FENCES_CHECKED_EVERY};

/// What a client is told whose session was ended.
pub const KILLED: &str = "An administrator of the server has ended the session. Begin another one.";

/// A recorded request that its connection has left behind.
#[derive(Debug)]
pub struct Orphan {
    /// The connection.
    pub member: Member,
    /// Of the address that it was from.
    pub account: AddressAccount,
    /// Its key at the guard, if it changes a file.
    pub guarded: Option<usize>,
}

impl Worker {
    // Requests
    // ----------------------------------------------------------------------------------------------------

    /// Takes in a request of a connection that waits. It may ask for outcomes, once, and cancel that.
    #[cold]
    pub(super) fn command_while_waiting(&mut self, connection: usize, request: &transport::Request) {
        let command = match Command::decode(&request.body) {
            Ok(command) => command,
            Err(violation) => return self.violate(connection, violation),
        };
        if request.region_len != 0 || request.data_len != 0 {
            return self.violate(connection, Violation::Field);
        }
        let opcode = command.opcode();
        let now = self.reactor.clock().now();
        let arrived = self.arrived(opcode);
        let Some(fencing) = &mut self.connections[connection].fencing else { return };
        match command {
            Command::Outcome { ids } if fencing.asked.is_none() => {
                let ids = ids.iter().map(|id| id.get()).collect();
                fencing.asked = Some(Asked { key: request.key, ids, at: now, arrived });
                self.counters.request(opcode);
                self.trace(request.key, Phase::Begin, opcode.operation().name, 0);
                if self.settle_if_possible(connection).is_some() {
                    self.trace(request.key, Phase::Point, "fence", 0);
                    self.check_fences_at(now + FENCE_LOGGED_AFTER);
                }
            }
            Command::Cancel { id } => {
                let asked = fencing.asked.take_if(|asked| asked.key.id == id);
                self.counters.request(opcode);
                self.trace(request.key, Phase::Begin, opcode.operation().name, 0);
                let response = match asked {
                    Some(asked) => {
                        self.respond(asked.key, Opcode::Outcome, asked.arrived, cancelled());
                        success(0)
                    }
                    None => {
                        let text = "The request that was to be cancelled is not outstanding.";
                        failure(Status::storage(libc::ENOENT), text)
                    }
                };
                self.respond(request.key, opcode, arrived, response);
            }
            _ => self.violate(connection, Violation::Field),
        }
    }

    /// Takes in a request of a client that was told that nothing is known of its earlier ones. Whatever it
    /// sends now but a cancel, which does not wait for answers, shows that it has heard it.
    #[cold]
    pub(super) fn command_when_told(&mut self, connection: usize, request: &transport::Request) {
        let opcode = Command::decode(&request.body).map(|command| command.opcode());
        if opcode.is_ok_and(|opcode| opcode != Opcode::Cancel) {
            let connection = &mut self.connections[connection];
            connection.standing = Standing::Settled;
            connection.knows_earlier = true;
            self.shared.sessions.heard(&connection.member);
        }
        self.command(connection, request);
    }

    /// What became of requests of the connections before this one.
    pub(super) fn outcomes(&self, connection: usize, ids: impl ExactSizeIterator<Item = u32>) -> Response {
        let Connection { outcomes, knows_earlier, .. } = &self.connections[connection];
        if !knows_earlier {
            let text = "The server does not know the channel: it has been restarted, or the time for which \
                        it keeps a channel is over. The connection begins a new one.";
            return failure(Status::policy(libc::ESTALE), text);
        }
        let count = ids.len() as u64;
        let no_channel = crate::channel::Outcomes::default();
        let outcomes = outcomes.as_ref().unwrap_or(&no_channel);
        let all: Vec<_> = ids.map(|id| outcomes.of(id)).collect();
        Response { body: all.as_bytes().into(), ..success(count) }
    }

    /// Whether a recorded request may have this id: if the connection has a channel, it must name a slot.
    pub(super) fn has_slot(&self, connection: usize, id: u64) -> bool {
        let Connection { outcomes, queue_depth, .. } = &self.connections[connection];
        outcomes.is_none() || slot_of(id, *queue_depth).is_some()
    }

    /// A recorded request ends with this answer. If it was cancelled though its client has not asked for
    /// that, its connection was seen to have broken, and nothing was done.
    pub(super) fn record_outcome(
        &mut self,
        connection: usize,
        id: u64,
        is_cancelled: bool,
        answer: &Response,
    ) {
        if let Some(outcomes) = &mut self.connections[connection].outcomes
            && (is_cancelled || has_effect(answer))
        {
            outcomes.record(id as u32, answer.status, answer.result);
        }
    }

    // Orphans
    // ----------------------------------------------------------------------------------------------------

    /// A request ends whose connection has gone.
    #[cold]
    pub(super) fn orphan_ended(&mut self, key: usize, answer: &Response) {
        let request = &self.requests[key];
        let (is_cancelled, id) = (request.is_cancelled, request.key.id);
        if answer.status.is_ok() {
            self.count_work(None, request.opcode, &request.work, answer.status, answer.result);
        }
        self.end_request(key);
        let Some(Orphan { member, guarded, .. }) = self.orphans.remove(&key) else { return };
        if let Some(guarded) = guarded {
            self.leave_guard(guarded);
        }
        let is_recorded =
            matches!(member.channel, ChannelKey::Numbered(_)) && (is_cancelled || has_effect(answer));
        let ended = is_recorded.then_some((id as u32, answer.status, answer.result));
        let now = self.reactor.clock().now();
        let effects = self.shared.sessions.orphan_ended(&member, ended, now);
        self.carry_out(effects);
    }

    /// A file was opened for a connection that has gone. The next one of its channel finds it.
    pub(super) fn give_handle_to_orphan(&self, key: usize, opened: Opened) -> Response {
        let Some(Orphan { member, account, .. }) = self.orphans.get(&key) else { return success(0) };
        let audited = opened.file.audited.clone();
        let file = Arc::new(opened.file);
        match member.session.insert(Arc::clone(&file), account) {
            Ok(handle) if file.is_revoked() => {
                self.audit_open(audited.as_deref(), libc::ESTALE);
                drop(member.session.close(handle));
                failure(Status::storage(libc::ESTALE), EXPORT_CHANGED)
            }
            Ok(handle) => {
                self.audit_open(audited.as_deref(), 0);
                success(handle.0.into())
            }
            Err(Excess { who, text }) => {
                self.counters.rejected_files[who as usize].add(1);
                self.audit_open(audited.as_deref(), libc::EMFILE);
                failure(Status::storage(libc::EMFILE), &text)
            }
        }
    }

    fn leave_guard(&mut self, guarded: usize) {
        for worker in self.shared.orphan_guard.leave(guarded) {
            if worker == self.index {
                self.release_held();
            } else {
                self.tell(worker, Mail::Release);
            }
        }
    }

    /// Whether a request waits for others to end: it overlaps an orphan, as both change the same bytes; or it
    /// is an open that the audit log has no room for.
    pub(super) fn is_held_back(&self, work: &Work) -> bool {
        match work {
            Work::Open(_) => self.holds_back_opens(),
            Work::Path(task) if task.audited.is_some() && self.holds_back_opens() => true,
            work => work.is_recorded() && self.shared.orphan_guard.is_active() && self.overlaps_orphan(work),
        }
    }

    /// Whether the audit log is to be written before anything more is opened.
    pub(super) fn holds_back_opens(&self) -> bool {
        self.shared.audit.as_ref().is_some_and(|audit| audit.holds_back_opens())
    }

    #[cold]
    fn overlaps_orphan(&self, work: &Work) -> bool {
        work.changes()
            .is_some_and(|(object, range)| self.shared.orphan_guard.holds_back(object, &range, self.index))
    }

    /// Holds a request back. Mostly it has not asked for memory; over TCP nothing more is read from its
    /// connection then.
    #[cold]
    pub(super) fn hold(&mut self, request: usize, slot: Option<Slot>) {
        match self.requests[request].work {
            Work::Open(_) => self.counters.audit_waits.add(1),
            Work::Path(_) if self.holds_back_opens() => self.counters.audit_waits.add(1),
            _ => self.counters.orphan_waits.add(1),
        }
        self.held.push((request, slot));
        let now = self.reactor.clock().now();
        if self.requests.enter(request, Stage::Held, now) == State::Fetching {
            self.admission.set_fetching(self.requests[request].export, false);
        }
        self.promise_life_sign();
        self.trace(self.requests[request].key, Phase::Point, "held", 0);
    }

    /// Takes out a request that is held back. False if it is not.
    pub(super) fn take_held(&mut self, request: usize) -> bool {
        let at = self.held.iter().position(|&(held, _)| held == request);
        at.is_some_and(|at| {
            self.held.remove(at);
            true
        })
    }

    /// Has those requests go on that need not be held back any more.
    #[cold]
    pub(super) fn release_held(&mut self) {
        for (request, slot) in mem::take(&mut self.held) {
            let Request { connection, work, .. } = &self.requests[request];
            if connection.is_none() {
                continue;
            }
            if self.is_held_back(work) {
                self.held.push((request, slot));
                continue;
            }
            self.is_busy = true;
            if slot.is_some() {
                self.execute(request, slot);
            } else {
                self.demand(request);
            }
        }
    }

    // Channels
    // ----------------------------------------------------------------------------------------------------

    /// Does what is to be done because of what has happened to a channel.
    pub(super) fn carry_out(&mut self, effects: Effects) {
        // What has happened beside is logged by who knows the client.
        let Effects { close, wake, files, ended, evicted, expires, .. } = effects;
        if evicted > 0 {
            let no_client: Option<Origin> = None;
            log_client!(
                info,
                origin no_client,
                "channels-evicted",
                "{evicted} channels of clients that have not come back yet were forgotten: others needed the \
                 room. Raise --memory or --max-sessions if such clients are to find theirs."
            );
        }
        for connection in close {
            if connection.worker == self.index {
                self.close_fenced(connection);
            } else {
                self.tell(connection.worker, Mail::Fence(connection));
            }
        }
        for connection in wake {
            if connection.worker == self.index {
                self.settle(connection);
            } else {
                self.tell(connection.worker, Mail::Settle(connection));
            }
        }
        if let Some(audit) = &self.shared.audit {
            files.iter().filter_map(|(file, _)| file.audited.as_deref()).for_each(|file| audit.closed(file));
            for session in ended {
                let who = Who::new(self.shared.keys.as_deref(), &session.identity);
                audit.record(&Arc::new(who.with_session("", session.id)), Event::End);
            }
        }
        for (file, permit) in files {
            let completer = self.engine.completions().completer(engine::DETACHED);
            file.close_volume(&mut *self.engine, Closing::new(completer, permit));
            self.closing += 1;
        }
        if let Some(at) = expires
            && self.expires.is_none_or(|earliest| at < earliest)
        {
            self.expires = Some(at);
            self.reactor.timer(at, EXPIRY);
        }
    }

    /// Ends the sessions of these keys' clients.
    pub(super) fn revoke(&mut self, revocation: &Revocation) {
        let now = self.reactor.clock().now();
        let effects = self.shared.sessions.revoke(|identity| revocation.concerns(identity), now);
        self.carry_out(effects);
    }

    /// Ends a session because an administrator wants it. Whether there was one.
    pub(super) fn kill(&mut self, session: &Arc<Session>, by: &str) -> bool {
        let now = self.reactor.clock().now();
        let Some(effects) = self.shared.sessions.kill(session, now) else { return false };
        if let Some(audit) = &self.shared.audit {
            let who = Who::new(self.shared.keys.as_deref(), &session.identity);
            let who = who.at(session.activity.origin().0).with_session("", session.id);
            audit.record(&Arc::new(who), Event::Kill { by: by.to_owned() });
        }
        tracing::info!(
            name: "session-killed",
            session = fingerprint(&session.id.0),
            "A session was ended by {by}."
        );
        self.carry_out(effects);
        true
    }

    fn tell(&self, worker: usize, mail: Mail) {
        if let Some(senders) = self.shared.workers.get().and_then(|workers| workers.get(worker)) {
            senders.mailbox.send(mail);
        }
    }

    /// Closes a connection whose place another one has taken.
    pub(super) fn close_fenced(&mut self, name: ConnectionName) {
        let Some(key) = self.connections.named(name) else { return };
        let connection = &mut self.connections[key];
        if matches!(connection.standing, Standing::Closing(_)) {
            return;
        }
        connection.standing = Standing::Closing(None);
        let (errno, text) = match connection.member.session.end_reason() {
            EndReason::Revoked => {
                (libc::EACCES, "The server's operator has changed what this client's key may do.")
            }
            EndReason::Killed => (libc::ECONNABORTED, KILLED),
            EndReason::None => {
                (libc::ESTALE, "A newer connection of the client has taken the place of this one.")
            }
        };
        let status = Status::policy(errno);
        self.transport.close(&mut self.reactor, connection.id, status, text);
    }

    /// What a connection waits for may be over.
    pub(super) fn settle(&mut self, name: ConnectionName) {
        if let Some(key) = self.connections.named(name) {
            let _ = self.settle_if_possible(key);
        }
    }

    /// Answers the outcome request of a connection if what it waits for is over. If it has asked, and must
    /// wait on, returns what for.
    fn settle_if_possible(&mut self, key: usize) -> Option<Unsettled> {
        let connection = &mut self.connections[key];
        let fencing = connection.fencing.as_mut().filter(|fencing| fencing.asked.is_some())?;
        if connection.standing != Standing::Waiting {
            return None;
        }
        let outcomes = match self.shared.sessions.settle(&connection.member, &mut fencing.fence) {
            Ok(outcomes) => outcomes,
            Err(unsettled) => return Some(unsettled),
        };
        let fencing = mem::take(&mut connection.fencing)?;
        connection.knows_earlier = fencing.fence.is_known;
        connection.standing = if fencing.fence.is_known { Standing::Settled } else { Standing::Told };
        if matches!(connection.member.channel, ChannelKey::Numbered(_)) {
            connection.outcomes = Some(outcomes);
        }
        if let Some(Asked { key: name, ids, arrived, .. }) = fencing.asked {
            self.log_return(key, &fencing.fence, ids.len());
            let response = self.outcomes(key, ids.into_iter());
            self.respond(name, Opcode::Outcome, arrived, response);
        }
        None
    }

    /// Logs that a client has reconnected; `asked` is the number of outcomes that it has asked for.
    fn log_return(&self, key: usize, fence: &Fence, asked: usize) {
        let connection = &self.connections[key];
        let (peer, name) = (connection.peer(), &connection.name);
        let client = self.shared.client_name(&connection.member.session.identity);
        match fence.succeeds {
            _ if !fence.is_known => log_client!(
                info,
                peer,
                "channel-unknown",
                client,
                name,
                "A client has come back to a channel that is not known, and has asked what became of {asked} \
                 requests. The server was restarted, or has forgotten the channel."
            ),
            Succession::None => {}
            Succession::After(away) => log_client!(
                info,
                peer,
                "client-returned",
                client,
                name,
                "A client has come back {away} ms after its connection was lost, and has asked what became \
                 of {asked} requests.",
                away = away.as_millis()
            ),
            Succession::AtOnce => log_client!(
                info,
                peer,
                "client-returned-early",
                client,
                name,
                "A client has come back before the end of its last connection was seen, and has asked what \
                 became of {asked} requests."
            ),
        }
    }

    /// Forgets the channels of all workers whose time is over.
    #[cold]
    pub(super) fn expire(&mut self) {
        self.expires = None;
        let effects = self.shared.sessions.expire(self.reactor.clock().now());
        let (expired, ended) = (effects.expired, effects.ended.len());
        if expired > 0 {
            tracing::info!(
                name: "channels-expired",
                "{expired} channels are forgotten, and {ended} sessions have ended: their clients did not \
                 come back in time."
            );
        }
        self.carry_out(effects);
    }

    /// Looks which connections have waited for long, then or before. There is one timer for all: a client may
    /// ask, and cancel that, as often as it likes.
    fn check_fences_at(&mut self, at: Instant) {
        if !mem::replace(&mut self.checks_fences, true) {
            self.reactor.timer(at, FENCE_CHECK);
        }
    }

    /// Logs which connections have waited for long, each once, and what for.
    #[cold]
    pub(super) fn check_fences(&mut self) {
        self.checks_fences = false;
        let now = self.reactor.clock().now();
        let mut next = None;
        let waiting: Vec<_> = self.connections.iter().map(|(key, _)| key).collect();
        for key in waiting {
            let connection = &mut self.connections[key];
            let Some(fencing) = connection.fencing.as_mut().filter(|fencing| !fencing.is_logged) else {
                continue;
            };
            let Some(asked) = &fencing.asked else { continue };
            let late_at = asked.at + FENCE_LOGGED_AFTER;
            if now < late_at {
                next = Some(next.map_or(late_at, |next: Instant| next.min(late_at)));
                continue;
            }
            fencing.is_logged = true;
            // What it waits for may be over, and its mail on the way.
            let Some(unsettled) = self.settle_if_possible(key) else { continue };
            let Unsettled { connections, orphans, sessions } = unsettled;
            let connection = &self.connections[key];
            let peer = connection.peer();
            log_client!(
                warn,
                peer,
                "client-waits",
                client = self.shared.client_name(&connection.member.session.identity),
                name = connection.name,
                "A client waits for what its broken connections have left, for {FENCE_LOGGED_AFTER:?} so \
                 far: {connections} connections that a worker has not closed, {orphans} requests that a disk \
                 or file system has not finished, {sessions} sessions that it has given up."
            );
        }
        if let Some(next) = next {
            self.check_fences_at(next.max(now + FENCES_CHECKED_EVERY));
        }
    }
}

/// Whether something was done, or was tried.
fn has_effect(answer: &Response) -> bool {
    answer.status != Status::DAMAGED && answer.status.errno != libc::ECANCELED || answer.result > 0
}
