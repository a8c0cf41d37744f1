//! What an open file has when its export was removed, or has become another: nothing. Its handle stays, so
//! that no other file gets it, until the client closes it.

use std::sync::{Arc, Weak};

use super::{Context, Properties, Volume};
use crate::client::Client;
use crate::engine::{Closing, Completion, Engine, Operation, Outcome, Pending};

/// Every operation on it fails with ESTALE, as it is submitted.
#[derive(Debug)]
pub struct Revoked;

impl Volume for Revoked {
    fn submit(
        &self,
        context: &mut Context<'_>,
        key: u64,
        _client: &Weak<Client>,
        operation: Operation,
    ) -> Option<Pending> {
        let outcome = match operation {
            Operation::Read { target: range, .. } | Operation::Write { source: range, .. } => {
                Outcome::Slot(range)
            }
            _ => Outcome::None,
        };
        context.engine.completions().push(Completion { key, result: Err(libc::ESTALE), outcome });
        None
    }

    /// It is too late.
    fn cancel(&self, _context: &mut Context<'_>, _key: u64, _pending: Pending) {}

    fn close(self: Arc<Self>, _engine: &mut dyn Engine, closing: Closing) {
        closing.complete(Ok(()));
    }

    fn properties(&self) -> Properties {
        Properties { may_hang: false, has_locks: false, ..Properties::default() }
    }
}
