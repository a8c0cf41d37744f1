//! A regular file.

use std::sync::Arc;

use super::served::Served;
use super::{Properties, SizeLimit};
use crate::engine::Descriptor;
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
    /// Takes a descriptor of a file that has this status.
    pub fn new(fd: Arc<Descriptor>, info: &FileInfo, size_limit: Option<SizeLimit>) -> Self {
        let direct = || info.direct_align.unwrap_or(DIRECT_ALIGN_DEFAULT).max(1);
        let alignment = if fd.is_direct() { direct() } else { 1 };
        Self { fd, alignment, size_limit }
    }
}

impl Served for RegularFile {
    fn descriptor(&self) -> &Arc<Descriptor> {
        &self.fd
    }

    fn properties(&self) -> Properties {
        Properties { alignment: self.alignment, size_limit: self.size_limit, ..Properties::default() }
    }
}
