//! Volumes with a descriptor: the worker's engine serves it.

use std::fmt::Debug;
use std::sync::{Arc, Weak};

use super::{Context, Properties, Volume};
use crate::client::Client;
use crate::engine::{Closing, Descriptor, Engine, Operation, Pending};
use crate::syscalls::FileInfo;

/// A volume whose operations are its descriptor's. The other methods are as in [`Volume`].
pub(super) trait Served: Debug + Send + Sync {
    fn descriptor(&self) -> &Arc<Descriptor>;

    /// The descriptor closes with its last user.
    fn close(self: Arc<Self>, engine: &mut dyn Engine, closing: Closing) {
        let descriptor = Arc::clone(self.descriptor());
        drop(self);
        engine.close(descriptor, closing);
    }

    fn properties(&self) -> Properties;
}

impl<V: Served> Volume for V {
    fn submit(
        &self,
        context: &mut Context<'_>,
        key: u64,
        client: &Weak<Client>,
        operation: Operation,
    ) -> Option<Pending> {
        context.engine.submit(context.reactor, key, client, self.descriptor(), operation)
    }

    fn submit_blocking(
        &self,
        context: &mut Context<'_>,
        key: u64,
        client: &Weak<Client>,
        operation: Operation,
    ) -> Option<Pending> {
        Some(context.engine.submit_blocking(key, client, self.descriptor(), operation))
    }

    fn cancel(&self, context: &mut Context<'_>, key: u64, pending: Pending) {
        context.engine.cancel(context.reactor, key, pending);
    }

    fn close(self: Arc<Self>, engine: &mut dyn Engine, closing: Closing) {
        Served::close(self, engine, closing);
    }

    fn try_read_cached(&self, engine: &mut dyn Engine, bytes: &mut [u8], offset: u64) -> Option<()> {
        engine.try_read_cached(self.descriptor(), bytes, offset)
    }

    fn try_stat(&self) -> Option<FileInfo> {
        self.descriptor().try_stat()
    }

    fn file_descriptor(&self) -> Option<&Arc<Descriptor>> {
        Some(self.descriptor())
    }

    fn properties(&self) -> Properties {
        Served::properties(self)
    }
}
