//! A block device.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Weak};

use super::{Context, Volume};
use crate::client::Client;
use crate::engine::{Closing, Descriptor, Engine, Lanes, Operation, Pending};
use crate::syscalls::FileInfo;
use crate::tuning::files::DIRECT_ALIGN_DEFAULT;

/// A block device. Its descriptor closes with the last user.
#[derive(Debug)]
pub struct BlockDevice {
    fd: Arc<Descriptor>,
    alignment: u32,
}

impl BlockDevice {
    /// Takes a descriptor of a device that has this status. May wait for the device: not for a worker's
    /// thread.
    pub fn new(fd: OwnedFd, lanes: Lanes, info: &FileInfo) -> Self {
        let sector = rustix::fs::ioctl_blksszget(&fd).ok();
        let fd = Descriptor::new(fd, lanes);
        let direct = || info.direct_align.or(sector).unwrap_or(DIRECT_ALIGN_DEFAULT).max(1);
        let alignment = if fd.is_direct() { direct() } else { 1 };
        Self { fd, alignment }
    }
}

impl Volume for BlockDevice {
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
}
