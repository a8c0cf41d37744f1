//! The way of every request: decode, find the file, [`crate::authorize`], then the fast path or
//! [`super::pipeline`], both by way of [`super::admission`].
//!
//! What a client cannot know (a file that is not there, a range that is not aligned) is that request's
//! failure, with an error message; what only a broken client says ends the connection.

use std::sync::Arc;

use raio_transport::error::Class;
use raio_transport::protocol::{Command, Direction, FileHandle, Opcode};
use raio_transport::trace::Phase;
use raio_transport::transport::{self, RequestKey, Response};
use raio_transport::{Status, Violation};
use rustix::fs::OFlags;
use tracing::field::display;

use super::Worker;
use super::connections::Connection;
use crate::audit::Audited;
use crate::authorize;
use crate::engine::Closing;
use crate::export::{Export, Located, Location, Target};
use crate::handles::is_handle;
use crate::keys::Rights;
use crate::limits::Excess;
use crate::log::log_client;
use crate::open::{OpenResult, Opened, Opening, Reopens, another_file};
use crate::peer::PeerAddress;
use crate::rejection::{EscapedPath, Rejection};
use crate::request::{Work, WorkerFile, cancelled, failure, shutting_down, status_of};
use crate::session::{Access, NotReopened, OpenFile};
use crate::stored::Stored;
use crate::syscalls::FileInfo;
use crate::throttle::{ClientRates, Flow, Holder};
use crate::tuning::cached_files::OPEN_BYTES;

/// The flags of an open that a worker may make: for reading, by way of the page cache.
const READING: OFlags = OFlags::CLOEXEC.union(OFlags::NOCTTY).union(OFlags::NOFOLLOW);

impl Worker {
    /// Takes in a request of a connection that is open.
    pub(super) fn command(&mut self, connection: usize, request: &transport::Request) {
        let command = match Command::decode(&request.body) {
            Ok(command) => command,
            Err(violation) => return self.violate(connection, violation),
        };
        if command.data_lengths() != (request.region_len, request.data_len) {
            return self.violate(connection, Violation::Length);
        }
        let opcode = command.opcode();
        self.counters.request(opcode);
        let bytes = request.region_len + request.data_len;
        self.trace(request.key, Phase::Begin, opcode.operation().name, bytes.into());
        if !self.connections[connection].has_asked {
            self.begin_grace(connection);
        }
        if self.is_rejecting(connection) {
            return self.respond_now(request.key, opcode, shutting_down());
        }
        let session = self.connections[connection].session;
        let work = match command {
            Command::Open { flags, mode, path } => {
                if !self.has_slot(connection, request.key.id) {
                    return self.violate(connection, Violation::RequestId);
                }
                self.open(connection, flags, mode, path, None)
            }
            Command::Reopen { flags, file, identity, path } => {
                self.reopen(connection, flags, Reopens { handle: file, identity }, path)
            }
            Command::Close(handle) => return self.close(connection, request, handle),
            Command::Cancel { id } => return self.cancel_by_id(connection, request, id),
            Command::Read { file, offset, length } => match self.sessions.file(session, file) {
                Some(file) => {
                    match authorize::read(&file.open, offset, length, self.arena.slot_bytes_max()) {
                        // What is answered on arrival is never in flight.
                        Ok(read) if self.fast_path(connection, request.key, &file.open, read.range()) => {
                            return;
                        }
                        Ok(read) => Ok(Work::Read(file, read)),
                        Err(response) => Err(response),
                    }
                }
                None => Err(unknown_handle()),
            },
            // All that are not of the basic group: the others need no look.
            Command::Discard { .. }
            | Command::WriteZeroes { .. }
            | Command::Allocate { .. }
            | Command::Truncate { .. }
            | Command::Extents { .. }
            | Command::Copy { .. }
            | Command::Checksum { .. }
            | Command::Lock { .. }
            | Command::ListNext { .. }
            | Command::Path(_)
                if !opcode.operation().is_granted(self.connections[connection].features) =>
            {
                Err(not_granted(opcode))
            }
            _ if opcode.operation().is_recorded && !self.has_slot(connection, request.key.id) => {
                return self.violate(connection, Violation::RequestId);
            }
            Command::Path(command) => match self.path(connection, request, &command) {
                Some(work) => work,
                None => return,
            },
            Command::ListNext { listing, is_odd, length } => {
                self.list_next(connection, listing, is_odd, length)
            }
            Command::Copy { source, offset, length, destination, destination_offset } => {
                let mut file = |file| self.sessions.file(session, file);
                match (file(source), file(destination)) {
                    (Some(source), Some(destination)) => {
                        authorize::copy((source, offset), (destination, destination_offset), length)
                    }
                    _ => Err(unknown_handle()),
                }
            }
            Command::Stat(file) => self.stat(connection, file),
            Command::Outcome { ids } => Err(self.outcomes(connection, ids.iter().map(|id| id.get()))),
            Command::Write { file, .. }
            | Command::Fsync { file, .. }
            | Command::Discard { file, .. }
            | Command::WriteZeroes { file, .. }
            | Command::Allocate { file, .. }
            | Command::Truncate { file, .. }
            | Command::Extents { file, .. }
            | Command::Checksum { file, .. }
            | Command::Lock { file, .. } => match self.sessions.file(session, file) {
                Some(file) => authorize::work(&command, file),
                None => Err(unknown_handle()),
            },
        };
        match work {
            Ok(work) => {
                if !self.counts_requests || self.count_request(connection, request, opcode) {
                    self.begin(connection, request.key, opcode, work);
                }
            }
            Err(response) => self.end_at_once(connection, request.key, opcode, response),
        }
    }

    /// The work that a stat means, or the response: at once if the kernel has it in memory.
    #[inline(never)]
    fn stat(&mut self, connection: usize, handle: FileHandle) -> Result<Work, Response> {
        let session = self.connections[connection].session;
        let Some(file) = self.sessions.file(session, handle) else { return Err(unknown_handle()) };
        if file.open.flow.is_none()
            && !self.admission.is_waiting(connection)
            && let Some(info) = file.open.volume.try_stat()
        {
            return Err(status_of(&file, info));
        }
        authorize::work(&Command::Stat(handle), file)
    }

    /// Answers a request for which there is nothing to do, or that has failed.
    #[cold]
    fn end_at_once(&mut self, connection: usize, request: RequestKey, opcode: Opcode, response: Response) {
        // What has failed has done nothing, unless it is an open.
        let is_done = response.status.is_ok() || opcode == Opcode::Open;
        if is_done && opcode.operation().is_recorded {
            self.record_outcome(connection, request.id, false, &response);
        }
        self.count_for_client(connection, Direction::None, response.status, 0);
        match self.opened_at_once.take() {
            Some(export) => self.respond_now_on(connection, export, request, opcode, response),
            None => self.respond_now(request, opcode, response),
        }
    }

    /// Answers a request in the iteration that has taken it in: see [`Worker::respond`].
    pub(super) fn respond_now(&mut self, name: RequestKey, opcode: Opcode, response: Response) {
        let arrived = self.arrived(opcode);
        self.respond(name, opcode, arrived, response);
    }

    /// The same of one of an open connection, on an export that has counted it.
    pub(super) fn respond_now_on(
        &mut self,
        connection: usize,
        export: usize,
        name: RequestKey,
        opcode: Opcode,
        response: Response,
    ) {
        let arrived = self.arrived(opcode);
        self.respond_on((Some(connection), Some(export)), name, opcode, arrived, response);
    }

    /// Counts one more request of a connection's session and address, or answers it: they have as many as
    /// they may.
    #[cold]
    fn count_request(&mut self, connection: usize, request: &transport::Request, opcode: Opcode) -> bool {
        let by = &self.connections[connection];
        let counted = self.sessions[by.session].session.begin_request(by.account());
        if let Err(Excess { who, text }) = &counted {
            self.counters.rejected_requests[*who as usize].add(1);
            let status = Status { retryable: true, ..Status::policy(libc::EAGAIN) };
            self.respond_now(request.key, opcode, failure(status, text));
        }
        counted.is_ok()
    }

    // Open
    // ----------------------------------------------------------------------------------------------------

    fn open(
        &mut self,
        connection: usize,
        flags: u32,
        mode: u32,
        path: &[u8],
        reopens: Option<Reopens>,
    ) -> Result<Work, Response> {
        let Connection { arrival, name, session, who, .. } = &self.connections[connection];
        let peer = arrival.peer.map(display);
        tracing::debug!(peer, name, "A client opens {} (flags {flags:#x}).", EscapedPath(path));
        let rights = self.shared.rights(&self.sessions[*session].session.identity);
        let access = Access::from_flags(flags);
        let audited = who.as_ref().map(|who| Audited::new(who, path, access.name()));
        match self.shared.exports.current().resolve(&rights, flags, mode, path) {
            Err(rejection) => Err(self.open_rejected(Some(connection), audited.as_deref(), rejection)),
            Ok(Target::Ready(..)) if self.holds_back_opens() => {
                let status = Status { retryable: true, ..Status::policy(libc::EAGAIN) };
                Err(failure(status, "The server's audit log takes nothing now. Try again later."))
            }
            Ok(Target::Ready(_, file, _))
                if reopens.is_some_and(|reopens| reopens.identity != file.identity) =>
            {
                Err(self.open_rejected(Some(connection), audited.as_deref(), another_file(path)))
            }
            Ok(Target::Ready(export, mut file, info)) => {
                (file.audited, file.flow) = (audited, self.flow(connection, &export, &rights));
                Err(self.give_handle(connection, *file, info, reopens))
            }
            Ok(Target::Path { at: Located { at, owner, bytes_max }, flags, mode }) => {
                let flow = self.flow(connection, &at.export, &rights);
                let opening = Opening {
                    stored: self.stored(&at, bytes_max),
                    at,
                    owner,
                    flags,
                    mode,
                    access,
                    waits_for_lease: false,
                    reopens,
                    audited,
                    flow,
                };
                match self.open_cached(connection, &opening) {
                    Some(response) => Err(response),
                    None => Ok(Work::Open(Arc::new(opening))),
                }
            }
        }
    }

    /// Opens a small file, for reading, that the kernel has in memory. None: it is for the pool to open.
    fn open_cached(&mut self, connection: usize, opening: &Opening) -> Option<Response> {
        let Opening { at, flags, reopens, audited, flow, .. } = opening;
        let only_reads = (*flags - READING).is_empty();
        if !only_reads || reopens.is_some() || self.has_to_wait(connection, flow.as_ref(), audited.as_ref()) {
            return None;
        }
        let export = &*at.export;
        let response = match self.cached.open(export, at, flags.contains(OFlags::NOFOLLOW))? {
            Ok(file) => {
                let info = file.info;
                let mut file = opening.small_file(export, file);
                file.audited = audited.clone();
                self.give_handle(connection, file, info, None)
            }
            Err(errno) => self.open_rejected(Some(connection), audited.as_deref(), at.failed("open", errno)),
        };
        self.count_for_export(Opcode::Open, Some(export.place()), Direction::None, response.status, 0);
        self.opened_at_once = Some(export.place());
        self.admission.spend(OPEN_BYTES);
        Some(response)
    }

    /// Where the bytes are counted that clients store at a location, if they are limited, and the limit.
    pub(super) fn stored(&self, at: &Location, bytes_max: Option<u64>) -> Option<(Arc<Stored>, u64)> {
        let directory = at.confinement.as_ref().map_or("", |confinement| &confinement.directory);
        bytes_max
            .map(|bytes_max| (self.shared.stored.get((at.export.place(), directory.to_owned())), bytes_max))
    }

    /// What the client of a connection has of an export, if that is limited.
    pub(super) fn flow(&self, connection: usize, export: &Export, rights: &Rights) -> Option<Arc<Flow>> {
        let granted = rights.rates(export.name());
        let rates = granted.map_or(ClientRates::NONE, |(_, rates)| rates);
        if !self.shared.throttles.limits(export.place(), &rates) {
            return None;
        }
        let holder = match granted {
            Some((client, _)) => Holder::Client(client.to_owned()),
            None => Holder::Address(self.connections[connection].peer().map(PeerAddress::origin)),
        };
        self.shared.throttles.flow(holder, export.place(), &rates, self.reactor.clock().now())
    }

    /// Opens a file under the handle that an earlier server gave it, unless it has it already.
    fn reopen(
        &mut self,
        connection: usize,
        flags: u32,
        reopens: Reopens,
        path: &[u8],
    ) -> Result<Work, Response> {
        if !is_handle(reopens.handle) {
            let text = "No server gives files this handle.";
            return Err(failure(Status::storage(libc::EINVAL), text));
        }
        let session = self.connections[connection].session;
        match self.sessions.file(session, reopens.handle) {
            Some(file) if file.open.is_same(reopens.identity, Access::from_flags(flags)) => {
                Ok(Work::Stat(file, reopens.handle.0.into()))
            }
            Some(_) => {
                let who = self.connections[connection].who.as_ref();
                let access = Access::from_flags(flags).name();
                let audited = who.map(|who| Audited::new(who, path, access));
                self.audit_open(audited.as_deref(), libc::EEXIST);
                Err(handle_taken())
            }
            None => self.open(connection, flags, 0, path, Some(reopens)),
        }
    }

    /// An open has ended.
    pub(super) fn open_ended(&mut self, key: usize, result: OpenResult) {
        if let Err(rejection) = &result
            && rejection.status.errno == libc::EAGAIN
            && self.wait_for_lease(key, None)
        {
            return;
        }
        let (reopens, audited, flow) = match &self.requests[key].work {
            Work::Open(opening) => (opening.reopens, opening.audited.clone(), opening.flow.clone()),
            _ => (None, None, None),
        };
        let result = result.map(|mut opened| {
            (opened.file.audited, opened.file.flow) = (audited.clone(), flow);
            if let Some(mount) = opened.mount {
                self.cached.learn(mount);
            }
            opened
        });
        let response = match (result, self.requests[key].connection) {
            (Ok(Opened { file, info, .. }), Some(connection)) => {
                self.give_handle(connection, file, info, reopens)
            }
            (Ok(opened), None) => self.give_handle_to_orphan(key, opened),
            // The holder of the lease was asked to give it up, and nothing else was done.
            (Err(Rejection { status: Status { errno: libc::EAGAIN, .. }, .. }), None) => cancelled(),
            (Err(rejection), connection) => self.open_rejected(connection, audited.as_deref(), rejection),
        };
        self.answer(key, response);
    }

    fn open_rejected(
        &self,
        connection: Option<usize>,
        audited: Option<&Audited>,
        rejection: Rejection,
    ) -> Response {
        let Rejection { status, text } = rejection;
        if let Some(Connection { arrival, member, name, .. }) = connection.map(|key| &self.connections[key]) {
            self.audit_open(audited, status.errno);
            let peer = arrival.peer;
            // What the file system says is the client's business, what the operator has decided is theirs.
            if status.class == Class::Policy {
                log_client!(
                    info,
                    peer,
                    "open-rejected",
                    client = self.shared.client_name(&member.session.identity),
                    name,
                    "An open was rejected: {text}"
                );
            } else {
                tracing::debug!(peer = peer.map(display), name, "An open has failed: {text}");
            }
        }
        failure(status, &text)
    }

    /// Records an open, if there is an audit log.
    pub(super) fn audit_open(&self, audited: Option<&Audited>, errno: i32) {
        if let (Some(audit), Some(audited)) = (&self.shared.audit, audited) {
            audit.opened(audited, errno);
        }
    }

    fn give_handle(
        &mut self,
        connection: usize,
        open: OpenFile,
        info: FileInfo,
        reopens: Option<Reopens>,
    ) -> Response {
        let local = self.connections[connection].session;
        let audited = open.audited.clone();
        let open = Arc::new(open);
        let account = self.connections[connection].account();
        let session = &self.sessions[local].session;
        let given = match reopens {
            None => session.insert(Arc::clone(&open), account).map(|handle| (handle, open)),
            Some(Reopens { handle, .. }) => match session.reopen(handle, open, account) {
                Ok(open) => Ok((handle, open)),
                Err(NotReopened::Taken) => {
                    self.audit_open(audited.as_deref(), libc::EEXIST);
                    return handle_taken();
                }
                Err(NotReopened::Excess(excess)) => Err(excess),
            },
        };
        let (handle, open) = match given {
            Ok(given) => given,
            Err(Excess { who, text }) => {
                self.counters.rejected_files[who as usize].add(1);
                self.audit_open(audited.as_deref(), libc::EMFILE);
                return failure(Status::storage(libc::EMFILE), &text);
            }
        };
        if open.is_revoked() {
            // Its export has been changed since it was looked up, and who revokes files may have been here
            // before.
            self.audit_open(audited.as_deref(), libc::ESTALE);
            drop(session.close(handle));
            return failure(Status::storage(libc::ESTALE), EXPORT_CHANGED);
        }
        // This worker may have it already, by a reopen that came at the same time.
        let known = if reopens.is_some() { self.sessions.file(local, handle) } else { None };
        self.audit_open(audited.as_deref(), 0);
        let file = known.unwrap_or_else(|| self.sessions.remember(local, WorkerFile::new(handle, open)));
        Response { result: handle.0.into(), ..status_of(&file, info) }
    }

    // Close and cancel
    // ----------------------------------------------------------------------------------------------------

    fn close(&mut self, connection: usize, request: &transport::Request, handle: FileHandle) {
        let session = self.connections[connection].session;
        let Some((file, permit)) = self.sessions[session].session.close(handle) else {
            return self.respond_now(request.key, Opcode::Close, unknown_handle());
        };
        if let (Some(audit), Some(file)) = (&self.shared.audit, &file.audited) {
            audit.closed(file);
        }
        let id = self.sessions[session].session.id;
        self.sessions.forget(id, handle);
        self.tell_others(id, handle);
        let key = self.begin(connection, request.key, Opcode::Close, Work::Close);
        // Another worker, or a request in flight, may be its last user.
        let closing = Closing::new(self.engine.completions().completer(key as u64), permit);
        file.close_volume(&mut *self.engine, closing);
    }

    fn cancel_by_id(&mut self, connection: usize, request: &transport::Request, id: u64) {
        let Some(key) = self.requests.by_id(connection, id) else {
            let text = "The request that was to be cancelled is not outstanding.";
            let response = failure(Status::storage(libc::ENOENT), text);
            return self.respond_now(request.key, Opcode::Cancel, response);
        };
        if self.requests[key].cancel_request.is_some() {
            let text = "The request is being cancelled already.";
            let response = failure(Status::storage(libc::EALREADY), text);
            return self.respond_now(request.key, Opcode::Cancel, response);
        }
        self.requests[key].cancel_request = Some(Box::new((request.key, self.arrived(Opcode::Cancel))));
        self.cancel(connection, key);
    }
}

/// For the client of a request that has begun on an export which has become another, or is gone.
pub(super) const EXPORT_CHANGED: &str =
    "The server's operator has changed or removed the export. Open the file again.";

fn handle_taken() -> Response {
    failure(
        Status::storage(libc::EEXIST),
        "Another file of this session has that handle. Open the file anew.",
    )
}

#[cold]
fn not_granted(opcode: Opcode) -> Response {
    let (name, group) = (opcode.operation().name, opcode.operation().group.name());
    let text = format!(
        "This connection was not granted {name}: its client has not asked for the operations of the group \
         {group:?} when it connected. Use a newer client."
    );
    failure(Status::protocol(libc::EOPNOTSUPP), &text)
}

fn unknown_handle() -> Response {
    failure(Status::storage(libc::EBADF), "No file of this session has that handle. Open it first.")
}
