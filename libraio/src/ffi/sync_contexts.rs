//! The contexts of a session that `raio_pread`, `raio_pwrite` and the like share: made when they are first
//! needed, lent to one call at a time, and closed with the session.

#![deny(unsafe_code)]

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use raio_transport::Status;
use raio_transport::sync::lock;

use super::probe::ReadProbe;
use crate::context::Context;
use crate::error::{self, Error};
use crate::file::File;
use crate::operation::{Completion, Operation, SubmitOptions};
use crate::session::Session;
use crate::tuning::{CANCEL_GRACE, STOP_CHECK_INTERVAL, SYNC_CONTEXTS_MAX, SYNC_DEPTH};

/// A session's contexts for synchronous calls.
pub(super) struct SyncContexts {
    session: Arc<Session>,
    pool: Mutex<Pool>,
    /// A context was returned, or the session was stopped.
    changed: Condvar,
}

#[derive(Default)]
struct Pool {
    idle: VecDeque<SyncContext>,
    /// Those lent out, too.
    made: usize,
    is_stopped: bool,
}

struct SyncContext {
    context: Context,
    probe: ReadProbe,
}

/// A context, while a call uses it.
pub(super) struct LentContext<'a> {
    owner: &'a SyncContexts,
    /// None once it must not be used again.
    lent: Option<SyncContext>,
}

impl std::fmt::Debug for SyncContexts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SyncContexts").field("made", &lock(&self.pool).made).finish_non_exhaustive()
    }
}

impl SyncContexts {
    pub(super) fn new(session: Arc<Session>) -> Self {
        Self { session, pool: Mutex::default(), changed: Condvar::new() }
    }

    pub(super) fn session(&self) -> &Session {
        &self.session
    }

    /// Lends a context: an idle one, a new one, or, if there are as many as there may be, the first that is
    /// returned by `deadline`.
    pub(super) fn lend(&self, deadline: Instant) -> Result<LentContext<'_>, Error> {
        let mut pool = lock(&self.pool);
        loop {
            if pool.is_stopped {
                return Err(error::session_stopped());
            }
            let may_make = pool.made < SYNC_CONTEXTS_MAX;
            if let Some(mut idle) = pool.idle.pop_back() {
                if !may_make || !idle.context.has_abandoned() {
                    return Ok(LentContext { owner: self, lent: Some(idle) });
                }
                pool.idle.push_front(idle);
            }
            if may_make {
                break;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(all_busy());
            }
            let waited = self.changed.wait_timeout(pool, left);
            pool = waited.unwrap_or_else(std::sync::PoisonError::into_inner).0;
        }
        pool.made += 1;
        drop(pool);
        // It takes the place back if there is none to be had.
        let mut lent = LentContext { owner: self, lent: None };
        let context = self.session.context(SYNC_DEPTH)?;
        lent.lent = Some(SyncContext { context, probe: ReadProbe::default() });
        Ok(lent)
    }

    /// Closes the contexts. Calls that use one notice, and fail.
    pub(super) fn stop(&self) {
        let mut pool = lock(&self.pool);
        pool.is_stopped = true;
        let idle = std::mem::take(&mut pool.idle);
        drop(pool);
        self.changed.notify_all();
        drop(idle);
    }

    fn is_stopped(&self) -> bool {
        lock(&self.pool).is_stopped
    }
}

impl Drop for LentContext<'_> {
    fn drop(&mut self) {
        let mut pool = lock(&self.owner.pool);
        match self.lent.take_if(|lent| !pool.is_stopped && lent.context.failure().is_none()) {
            Some(mut idle) => match idle.context.has_abandoned() {
                // It is taken last, as some of its credits are in use.
                true => pool.idle.push_front(idle),
                false => pool.idle.push_back(idle),
            },
            None => pool.made -= 1,
        }
        drop(pool);
        self.owner.changed.notify_one();
    }
}

impl LentContext<'_> {
    /// Whether the kernel can read this memory, as far as that can be found out.
    pub(super) fn is_readable(&mut self, address: usize, len: usize) -> bool {
        let Some(SyncContext { probe, .. }) = &mut self.lent else { return true };
        probe.clear();
        probe.check_long(address, len, 0);
        !probe.is_unreadable(0)
    }

    /// Does one operation, and waits for its end until `deadline`. Whatever it returns, the operation's
    /// memory is not used any more: if nothing else helps, the context's connection ends.
    pub(super) fn run(&mut self, file: &File, operation: Operation, deadline: Instant) -> Result<u64, Error> {
        self.run_whole(file, operation, deadline).and_then(|completion| completion.result)
    }

    /// The same, with all that it has come to. It has succeeded.
    pub(super) fn run_whole(
        &mut self,
        file: &File,
        operation: Operation,
        deadline: Instant,
    ) -> Result<Completion, Error> {
        let Some(SyncContext { context, .. }) = &mut self.lent else { return Err(error::session_stopped()) };
        let has_effect = matches!(
            operation,
            Operation::Write { .. }
                | Operation::Truncate { .. }
                | Operation::Copy { .. }
                | Operation::Lock(_)
        );
        let timeout = Some(deadline.saturating_duration_since(Instant::now()));
        let options = SubmitOptions { timeout, ..SubmitOptions::default() };
        context.submit_with(file, operation, options, 0).map_err(|rejected| rejected.error)?;
        context.flush();
        // An operation ends by its timeout, except over RDMA.
        let end = deadline + CANCEL_GRACE * 2;
        let failure = loop {
            if let Some(completion) = context.next() {
                return match &completion.result {
                    Ok(_) => Ok(completion),
                    Err(error) if error.errno() == libc::ETIMEDOUT => {
                        Err(Error { is_unknown: error.is_unknown, ..timed_out(context) })
                    }
                    Err(error) => Err(error.clone()),
                };
            }
            if self.owner.is_stopped() {
                break error::session_stopped();
            }
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break Error { is_unknown: has_effect, ..timed_out(context) };
            }
            match context.wait(1, 1, Some(left.min(STOP_CHECK_INTERVAL))) {
                Err(error) if error.errno() != libc::EINTR => break error,
                _ => {}
            }
        };
        self.lent = None;
        Err(failure)
    }
}

fn timed_out(context: &Context) -> Error {
    match context.reconnecting() {
        Some(recovery) => error::reconnecting(Some(recovery)),
        None => error::timed_out(),
    }
}

fn all_busy() -> Error {
    let text = format!(
        "Of this session {SYNC_CONTEXTS_MAX} calls of raio_pread() and raio_pwrite() are waiting for the \
         server. Use raio_submit() for I/O in parallel, or raise the call timeout."
    );
    Error::new(Status::transport(libc::ETIMEDOUT), text)
}

#[cfg(test)]
mod tests {
    use std::thread;
    use std::time::Duration;

    use raio_transport::address::Scheme;
    use raio_transport::handshake::Policy;
    use raio_transport::memory::{Buffer, Buffers};

    use super::*;
    use crate::fake_server::FakeServer;
    use crate::session::Options;

    fn start() -> (FakeServer, SyncContexts, File) {
        let server = FakeServer::start(Policy::default());
        server.file("/e/data", (0..100).collect());
        let session = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
        let file = session.open("/e/data", libc::O_RDWR, 0).unwrap();
        (server, SyncContexts::new(Arc::new(session)), file)
    }

    fn read() -> Operation {
        Operation::Read { offset: 10, buffers: Buffers::One(Buffer::Owned(vec![0; 20].into())) }
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(100)
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[test]
    fn calls_one_after_another_use_one_connection() {
        let (_server, contexts, file) = start();
        for _ in 0..10 {
            assert_eq!(contexts.lend(later()).unwrap().run(&file, read(), later()), Ok(20));
        }
        assert_eq!(lock(&contexts.pool).made, 1);
    }

    #[test]
    fn beyond_the_most_contexts_a_call_waits_for_one_that_is_returned() {
        let (_server, contexts, file) = start();
        let mut lent: Vec<_> = (0..SYNC_CONTEXTS_MAX).map(|_| contexts.lend(later()).unwrap()).collect();
        assert_eq!(contexts.lend(soon()).err().unwrap().errno(), libc::ETIMEDOUT);
        thread::scope(|scope| {
            let waits = scope.spawn(|| contexts.lend(later()).unwrap().run(&file, read(), later()));
            thread::sleep(Duration::from_millis(20));
            lent.pop();
            assert_eq!(waits.join().unwrap(), Ok(20));
        });
    }

    #[test]
    fn a_call_that_the_server_does_not_answer_ends_in_time() {
        let (server, contexts, file) = start();
        assert_eq!(contexts.lend(later()).unwrap().run(&file, read(), later()), Ok(20));
        server.hold(true);
        let error = contexts.lend(soon()).unwrap().run(&file, read(), soon()).unwrap_err();
        assert_eq!((error.errno(), error.is_unknown), (libc::ETIMEDOUT, false));
        server.hold(false);
        assert_eq!(contexts.lend(later()).unwrap().run(&file, read(), later()), Ok(20));
        assert_eq!(lock(&contexts.pool).made, 1);
    }

    #[test]
    fn calls_after_one_that_is_not_answered_use_another_connection() {
        let (server, contexts, file) = start();
        let mut lent = contexts.lend(later()).unwrap();
        server.mute(true);
        let write = Operation::Write { offset: 0, buffers: Buffers::One(Buffer::Owned([7; 20].into())) };
        let error = lent.run(&file, write, soon()).unwrap_err();
        assert_eq!((error.errno(), error.is_unknown), (libc::ETIMEDOUT, true));
        drop(lent);
        server.mute(false);
        for _ in 0..5 {
            assert_eq!(contexts.lend(later()).unwrap().run(&file, read(), later()), Ok(20));
        }
        // The first was still waiting for its answer, or has just had it.
        assert!((1..=2).contains(&lock(&contexts.pool).made));
    }

    #[test]
    fn a_call_ends_when_the_session_is_stopped() {
        let (server, contexts, file) = start();
        let mut lent = contexts.lend(later()).unwrap();
        server.hold(true);
        thread::scope(|scope| {
            let waits = scope.spawn(|| lent.run(&file, read(), later()));
            thread::sleep(Duration::from_millis(50));
            contexts.stop();
            assert_eq!(waits.join().unwrap().unwrap_err().errno(), libc::ENOTCONN);
        });
        drop(lent);
        assert_eq!(contexts.lend(later()).err().unwrap().errno(), libc::ENOTCONN);
        assert_eq!(lock(&contexts.pool).made, 0);
    }
}
