//! The files that a context has used, by descriptor.

#![deny(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_int;
use std::sync::Arc;

use super::descriptor;
use crate::error::Error;
use crate::file::File;

/// Files by descriptor. What was looked up stays valid until any descriptor is closed
/// ([`descriptor::epoch`]).
#[derive(Default)]
pub(super) struct FileCache {
    epoch: u64,
    known: HashMap<c_int, Arc<File>>,
    last: Option<(c_int, Arc<File>)>,
}

impl FileCache {
    /// The file `fd` of the session `session`.
    pub(super) fn get(&mut self, fd: c_int, session: c_int) -> Result<&File, Error> {
        let epoch = descriptor::epoch();
        if self.epoch != epoch {
            self.known.clear();
            self.last = None;
            self.epoch = epoch;
        }
        if self.last.as_ref().is_none_or(|(last, _)| *last != fd) {
            let file = match self.known.get(&fd) {
                Some(file) => Arc::clone(file),
                None => {
                    let (file, owner) = descriptor::file(fd)?;
                    if owner != session {
                        return Err(Error::call(
                            libc::EBADF,
                            format!(
                                "Descriptor {fd} is a file of another session. Submit it to a context of \
                                 that session."
                            ),
                        ));
                    }
                    self.known.insert(fd, Arc::clone(&file));
                    file
                }
            };
            self.last = Some((fd, file));
        }
        match &self.last {
            Some((_, file)) => Ok(file),
            None => unreachable!("set above"),
        }
    }
}
