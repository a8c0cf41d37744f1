//! Operations on paths: who may do what where, before they go to the pool, and what comes of them.

use std::ffi::CString;
use std::sync::Arc;

use raio_transport::error::Class;
use raio_transport::memory::Slot;
use raio_transport::protocol::path::PathCommand;
use raio_transport::protocol::{Direction, FLAG_NOFOLLOW, FLAG_SET_MODE, FileStatus, Opcode};
use raio_transport::transport::{self, RequestKey, Response, ServerTransport, SlotRange};
use raio_transport::{Status, random};
use rustix::fs::FileType;
use zerocopy::IntoBytes;

use super::Worker;
use super::admission::{Decision, Demand};
use super::connections::Connection;
use super::pipeline::unsent_bytes;
use crate::audit::Audited;
use crate::export::{Export, Exports, Found, Located, special_bits};
use crate::limits::Excess;
use crate::listing::{Listing, fill_with_exports};
use crate::log::log_client;
use crate::names::{Other, PathAnswer, PathEnd, PathTask, creates, next_page, verb};
use crate::rejection::Rejection;
use crate::request::{ListNext, Work, failure, success};
use crate::tenure::Use;
use crate::throttle::Flow;
use crate::tuning::cached_files;
use crate::tuning::listings::PAGE_BYTES_MIN;

impl Worker {
    /// The work that an operation on a path means, or the response. None: it was answered.
    // Apart from the way of reads, which is short.
    #[inline(never)]
    pub(super) fn path(
        &mut self,
        connection: usize,
        request: &transport::Request,
        command: &PathCommand<'_>,
    ) -> Option<Result<Work, Response>> {
        let work = self.path_work(connection, command);
        if let Ok(Work::Path(task)) = &work
            && self.answer_from_cache(connection, request.key, task)
        {
            return None;
        }
        Some(work)
    }

    /// Carries out and answers what the kernel's memory can answer without waiting. Whether it has; if not,
    /// nothing has happened.
    fn answer_from_cache(&mut self, connection: usize, name: RequestKey, task: &Arc<PathTask>) -> bool {
        let PathTask { opcode, at, .. } = &**task;
        let is_get = match opcode {
            Opcode::StatPath => false,
            Opcode::Get if task.length <= cached_files::BYTES_MAX => true,
            _ => return false,
        };
        if self.has_to_wait(connection, task.flow.as_ref(), task.audited.as_ref()) {
            return false;
        }
        let bytes = task.length as usize;
        let export = &*at.export;
        let nofollow = task.flags & FLAG_NOFOLLOW != 0;
        let slot = if is_get && bytes > 0 {
            let demand = Demand { connection, bytes, export: None };
            let unsent = &unsent_bytes(&self.transport, &self.connections);
            if self.admission.decide(&demand, &self.arena, unsent) != Decision::Admit {
                return false;
            }
            let Some(slot) = self.arena.alloc(bytes) else { return false };
            Some(slot)
        } else {
            None
        };
        let mut data = slot.map(|slot| SlotRange { slot, start: 0, len: bytes });
        let found = if is_get {
            let room = data.as_mut().map_or(&mut [][..], SlotRange::bytes_mut);
            self.cached.get(export, at, nofollow, room)
        } else {
            self.cached.stat(export, at, nofollow).map(|info| info.map(|info| (0, info)))
        };
        let response = match found {
            None => return false,
            Some(Ok((read, info))) => {
                if let Some(data) = &mut data {
                    data.len = read;
                }
                self.audit_operation(task.audited.as_deref(), Some(read as u64), 0);
                Response { body: info.status.as_bytes().into(), data, ..success(read as u64) }
            }
            Some(Err(errno)) => {
                let rejection = at.failed(verb(*opcode), errno);
                self.path_rejected(Some(connection), task.audited.as_deref(), rejection)
            }
        };
        let moved = if is_get { response.result } else { 0 };
        let direction = if is_get { Direction::ToClient } else { Direction::None };
        self.count_for_export(*opcode, Some(at.export.place()), direction, response.status, moved);
        self.count_for_client(connection, direction, response.status, moved);
        self.counters.fast_path.add(1);
        if response.status.is_ok() {
            self.connections[connection].counters.read(moved);
        }
        self.respond_now_on(connection, at.export.place(), name, *opcode, response);
        if self.admission.spend(bytes.max(cached_files::STATUS_BYTES)) && !self.settings.spin.is_zero() {
            self.transport.flush_early(&mut self.reactor);
        }
        true
    }

    /// Whether a request may not be answered as it arrives, whatever the kernel has in memory: it does not
    /// overtake its connection's own requests, and may have to wait for a rate, or for the audit log.
    pub(super) fn has_to_wait(
        &self,
        connection: usize,
        flow: Option<&Arc<Flow>>,
        audited: Option<&Arc<Audited>>,
    ) -> bool {
        flow.is_some()
            || self.admission.is_waiting(connection)
            || (audited.is_some() && self.holds_back_opens())
    }

    fn path_work(&mut self, connection: usize, command: &PathCommand<'_>) -> Result<Work, Response> {
        let Connection { session, who, .. } = &self.connections[connection];
        let opcode = command.opcode;
        let is_page = opcode == Opcode::List;
        if is_page && command.length < PAGE_BYTES_MIN.into() {
            return Err(too_small());
        }
        let rights = self.shared.rights(&self.sessions[*session].session.identity);
        let is_root = command.path.iter().all(|&byte| byte == b'/');
        match opcode {
            Opcode::List if is_root => return Ok(Work::ListExports(command.length as u32)),
            Opcode::StatPath if is_root => return Err(Response { body: root_status(), ..success(0) }),
            _ => {}
        }
        let is_audited = opcode.operation().is_recorded || matches!(opcode, Opcode::Get | Opcode::List);
        let audited = who.as_ref().filter(|_| is_audited);
        let audited =
            audited.map(|who| Audited::operation(who, command.path, command.other, opcode.operation().name));
        let exports = self.shared.exports.current();
        let located = Self::locate(&exports, &rights, command);
        let task = match located {
            Ok((Found::Volume(_, _, info), _)) if opcode == Opcode::StatPath => {
                return Err(Response { body: info.status.as_bytes().into(), ..success(0) });
            }
            Ok((Found::Volume(export, ..), _)) => {
                let name = export.name();
                let text = format!("Export {name} has no file system: open /{name} itself.");
                Err(Rejection { status: Status::storage(libc::EOPNOTSUPP), text })
            }
            Ok((Found::Location(Located { at, owner, bytes_max }), other)) => {
                let mut task = PathTask::new(command, at, other);
                task.owner = owner;
                task.stored = self.stored(&task.at, bytes_max);
                Ok(task)
            }
            Err(rejection) => Err(rejection),
        };
        match task {
            Ok(mut task) => {
                task.flow = self.flow(connection, &task.at.export, &rights);
                task.audited = audited;
                if opcode == Opcode::List {
                    task.listing = random::number().max(1);
                }
                // What others have left is removed where this server writes, and by its own number alone.
                task.server = task.at.export.number();
                Ok(Work::Path(Arc::new(task)))
            }
            Err(rejection) => Err(self.path_rejected(Some(connection), audited.as_deref(), rejection)),
        }
    }

    /// Where a command's path is, and what else it names.
    fn locate<'a>(
        exports: &'a Exports,
        rights: &crate::keys::Rights,
        command: &PathCommand<'_>,
    ) -> Result<(Found<'a>, Other), Rejection> {
        let &PathCommand { opcode, path, other, .. } = command;
        let changes = opcode.operation().is_recorded;
        let what = verb(opcode);
        let found = exports.locate(rights, what, changes, creates(opcode), path)?;
        let sets_mode = matches!(opcode, Opcode::Put | Opcode::Mkdir) || command.has(FLAG_SET_MODE);
        if sets_mode && command.mode & !0o777 != 0 {
            return Err(special_bits());
        }
        let other = match (opcode, &found) {
            (Opcode::Rename | Opcode::Link, Found::Location(from)) => {
                match exports.locate(rights, what, true, true, other)? {
                    Found::Location(to) if Arc::ptr_eq(&to.at.export, &from.at.export) => Other::Path(to.at),
                    _ => {
                        let text = "Both paths must be in the same export. Copy the file, and remove it.";
                        return Err(Rejection {
                            status: Status::storage(libc::EXDEV),
                            text: text.to_owned(),
                        });
                    }
                }
            }
            _ if other.is_empty() => Other::Nothing,
            _ => Other::Name(CString::new(other).unwrap_or_default()),
        };
        Ok((found, other))
    }

    /// The work that a list_next means, or the response.
    #[inline(never)]
    pub(super) fn list_next(
        &mut self,
        connection: usize,
        id: u64,
        is_odd: bool,
        length: u32,
    ) -> Result<Work, Response> {
        let session = &self.sessions[self.connections[connection].session].session;
        if length == 0 {
            session.end_listing(id);
            return Err(success(0));
        }
        if length < PAGE_BYTES_MIN {
            return Err(too_small());
        }
        match session.listing(id) {
            Some(listing) => Ok(Work::ListNext(listing, ListNext { is_odd, length })),
            None => Err(failure(
                Status::storage(libc::ESTALE),
                "The server does not know this listing: it was restarted, or the session has begun too many \
                 others. List the directory again.",
            )),
        }
    }

    /// Lists the exports that the client may use.
    pub(super) fn list_exports(&mut self, key: usize, slot: Option<Slot>) {
        let Some(connection) = self.requests[key].connection else { return };
        let identity = &self.sessions[self.connections[connection].session].session.identity;
        let rights = self.shared.rights(identity);
        let exports = self.shared.exports.current();
        let exports = exports.visible(&rights);
        let response = slot.and_then(|slot| {
            let len = self.requests[key].work.slot_len();
            let mut range = SlotRange { slot, start: 0, len };
            range.len = fill_with_exports(exports.map(shown), range.bytes_mut())?;
            Some(Response { data: Some(range), ..success(0) })
        });
        let none =
            || failure(Status::storage(libc::ERANGE), "There is no room for the names of all exports.");
        let response = response.unwrap_or_else(none);
        self.answer(key, response);
    }

    /// Begins an operation on a path, with its data or the memory for what it brings.
    pub(super) fn begin_path(&mut self, key: usize, task: Arc<PathTask>, slot: Option<Slot>) {
        let mut room = self.room(key, slot);
        let export = &task.at.export;
        let lanes = export.lanes();
        let use_of_export = Use::of(export.tenure());
        let lane = if task.waits_for_lease { lanes.lease } else { lanes.control };
        self.call(key, lane, move || -> PathEnd {
            let export = &task.at.export;
            let is_over = export.tenure().is_over();
            let result = if is_over { Err(export.is_over()) } else { task.run(export, &mut room) };
            drop(use_of_export);
            (result, room)
        });
    }

    /// Begins to read a page of a listing.
    pub(super) fn begin_list_next(
        &mut self,
        key: usize,
        listing: Arc<Listing>,
        is_odd: bool,
        slot: Option<Slot>,
    ) {
        let mut room = self.room(key, slot);
        let lane = listing.lanes.control;
        self.call(key, lane, move || -> PathEnd {
            let page = next_page(&listing, is_odd, &mut room);
            (page.map_err(listing_failed), room)
        });
    }

    fn room(&self, key: usize, slot: Option<Slot>) -> Option<SlotRange> {
        slot.map(|slot| SlotRange { slot, start: 0, len: self.requests[key].work.slot_len() })
    }

    /// An operation on a path has ended.
    pub(super) fn path_ended(&mut self, key: usize, (result, room): PathEnd) {
        if let Err(rejection) = &result
            && rejection.status.errno == libc::EAGAIN
            && self.wait_for_lease(key, room)
        {
            return;
        }
        let request = &self.requests[key];
        let (connection, work) = (request.connection, &request.work);
        let audited = if let Work::Path(task) = work { task.audited.clone() } else { None };
        let is_first = matches!(work, Work::Path(_));
        let has_bytes = matches!(request.opcode, Opcode::Get | Opcode::Put);
        let response = match result {
            Ok(PathAnswer { result, body, data, listing, mount }) => {
                if let Some(mount) = mount {
                    self.cached.learn(mount);
                }
                let kept =
                    listing.filter(|_| is_first).map(|listing| self.keep_listing(connection, &listing));
                match kept.transpose() {
                    Ok(_) => {
                        self.audit_operation(audited.as_deref(), has_bytes.then_some(result), 0);
                        Response { status: Status::OK, result, body: (&body[..]).into(), data }
                    }
                    Err(Excess { who, text }) => {
                        self.counters.rejected_files[who as usize].add(1);
                        let status = Status::storage(libc::EMFILE);
                        self.path_rejected(connection, audited.as_deref(), Rejection { status, text })
                    }
                }
            }
            Err(rejection) => self.path_rejected(connection, audited.as_deref(), rejection),
        };
        self.answer(key, response);
    }

    /// Keeps a listing that goes on in the session of its client. Without a connection no more is asked for.
    fn keep_listing(&self, connection: Option<usize>, listing: &Arc<Listing>) -> Result<(), Excess> {
        let Some(connection) = connection else { return Ok(()) };
        let account = self.connections[connection].account();
        let session = &self.sessions[self.connections[connection].session].session;
        session.begin_listing(listing, account)?;
        if listing.lanes.tenure.is_over() {
            // It may be too late for who ends those of an export that has gone.
            session.end_listing(listing.id);
        }
        Ok(())
    }

    /// Records an operation, if there is an audit log.
    fn audit_operation(&self, audited: Option<&Audited>, bytes: Option<u64>, errno: i32) {
        if let (Some(audit), Some(audited)) = (&self.shared.audit, audited) {
            audit.operated(audited, bytes, errno);
        }
    }

    fn path_rejected(
        &self,
        connection: Option<usize>,
        audited: Option<&Audited>,
        Rejection { status, text }: Rejection,
    ) -> Response {
        self.audit_operation(audited, None, status.errno);
        if let Some(Connection { arrival, member, name, .. }) = connection.map(|key| &self.connections[key])
            && status.class == Class::Policy
        {
            let peer = arrival.peer;
            log_client!(
                info,
                peer,
                "operation-rejected",
                client = self.shared.client_name(&member.session.identity),
                name,
                "An operation was rejected: {text}"
            );
        }
        failure(status, &text)
    }
}

fn listing_failed(errno: rustix::io::Errno) -> Rejection {
    let errno = errno.raw_os_error();
    let error = std::io::Error::from_raw_os_error(errno);
    Rejection { status: Status::storage(errno), text: format!("Listing failed on the server: {error}.") }
}

fn too_small() -> Response {
    let text = format!("A page of a listing needs room for at least {PAGE_BYTES_MIN} bytes.");
    failure(Status::storage(libc::EINVAL), &text)
}

/// An export as an entry of the list of exports: its name, type, and size if that is known.
fn shown(export: &Export) -> (&str, FileType, Option<u64>) {
    (export.name(), export.kind(), export.volume_size())
}

/// The status of the list of exports.
fn root_status() -> raio_transport::transport::Body {
    let status = FileStatus {
        mode: (libc::S_IFDIR | 0o555).into(),
        links: 2.into(),
        block_bytes: 4096.into(),
        direct_align: 1.into(),
        ..FileStatus::default()
    };
    status.as_bytes().into()
}
