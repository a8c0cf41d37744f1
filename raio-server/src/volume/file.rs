//! A regular file.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use super::{Context, SizeLimit, Volume};
use crate::client::Client;
use crate::engine::{Closing, Descriptor, Engine, Lanes, Operation, Pending};
use crate::syscalls::FileInfo;
use crate::tuning::files::DIRECT_ALIGN_DEFAULT;

/// A regular file. Its descriptor closes with the last user.
#[derive(Debug)]
pub struct RegularFile {
    fd: Arc<Descriptor>,
    alignment: u32,
    size_limit: Option<SizeLimit>,
}

impl RegularFile {
    /// Takes a descriptor of a file that has this status. May wait for the file system: not for a worker's
    /// thread.
    pub fn new(fd: OwnedFd, lanes: Lanes, info: &FileInfo, size_limit: Option<SizeLimit>) -> Self {
        let fd = Descriptor::new(fd, lanes);
        let direct = || info.direct_align.unwrap_or(DIRECT_ALIGN_DEFAULT).max(1);
        let alignment = if fd.is_direct() { direct() } else { 1 };
        Self { fd, alignment, size_limit }
    }
}

impl Volume for RegularFile {
    fn submit(
        &self,
        context: &mut Context<'_>,
        key: u64,
        client: &Weak<Client>,
        operation: Operation,
    ) -> Option<Pending> {
        context.engine.submit(context.reactor, key, client, &self.fd, operation)
    }

    fn submit_blocking(
        &self,
        context: &mut Context<'_>,
        key: u64,
        client: &Weak<Client>,
        operation: Operation,
    ) -> Option<Pending> {
        Some(context.engine.submit_blocking(key, client, &self.fd, operation))
    }

    fn cancel(&self, context: &mut Context<'_>, key: u64, pending: Pending) {
        context.engine.cancel(context.reactor, key, pending);
    }

    fn close(&self, closing: Closing) {
        self.fd.close(closing);
    }

    fn try_read_cached(&self, engine: &mut dyn Engine, bytes: &mut [u8], offset: u64) -> Option<()> {
        engine.try_read_cached(&self.fd, bytes, offset)
    }

    fn alignment(&self) -> u32 {
        self.alignment
    }

    fn size_limit(&self) -> Option<SizeLimit> {
        self.size_limit
    }
}
