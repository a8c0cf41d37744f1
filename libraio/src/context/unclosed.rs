//! Closes, also of listings, that no answer has confirmed yet.

use std::sync::Arc;

use raio_transport::error::{Class, Status};
use raio_transport::protocol::Command;

use crate::session::Shared;

/// A close that the server may not have. Dropped like this, with its context or because it has failed, it is
/// sent by another connection: a close does no harm where nothing is open any more.
#[derive(Debug)]
pub(super) struct Unclosed(Option<(Arc<Shared>, Command<'static>)>);

impl Unclosed {
    pub(super) fn new(session: &Arc<Shared>, close: Command<'static>) -> Self {
        Self(Some((Arc::clone(session), close)))
    }

    /// The server has done it.
    pub(super) fn done(mut self) {
        self.0 = None;
    }

    /// The server has answered it in this way. Other failures than these would be the same the next time.
    pub(super) fn answered(self, status: Status) {
        if status.is_ok() || (status.class != Class::Transport && status.errno != libc::ECANCELED) {
            self.done();
        }
    }
}

impl Drop for Unclosed {
    fn drop(&mut self) {
        if let Some((session, close)) = self.0.take()
            && !session.is_inherited()
        {
            session.close_later(close);
        }
    }
}
