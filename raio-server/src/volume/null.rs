//! Nothing: reads are zeros, and what is written is lost.

use std::sync::{Arc, Weak};

use super::{Context, Properties, SizeLimit, Volume};
use crate::client::Client;
use crate::engine::{Closing, Completion, Engine, Operation, Outcome, Pending};
use crate::syscalls::FileInfo;

/// A `null:` export. Every operation ends as it is submitted.
#[derive(Debug)]
pub struct Null {
    size: u64,
}

impl Null {
    /// It pretends to have this size.
    pub fn new(size: u64) -> Self {
        Self { size }
    }

    /// How many of `len` bytes from an offset lie within it.
    fn within(&self, offset: u64, len: usize) -> usize {
        let left = self.size.saturating_sub(offset);
        len.min(usize::try_from(left).unwrap_or(usize::MAX))
    }

    fn run(&self, operation: Operation) -> (Result<u32, i32>, Outcome) {
        let (n, outcome) = match operation {
            Operation::Read { mut target, offset } => {
                let n = self.within(offset, target.len);
                target.bytes_mut()[..n].fill(0);
                (n, Outcome::Slot(target))
            }
            Operation::Write { source, .. } => (source.len, Outcome::Slot(source)),
            Operation::Fsync { .. } => (0, Outcome::None),
            Operation::Discard { length, .. }
            | Operation::WriteZeroes { length, .. }
            | Operation::Allocate { length, .. } => (0, Outcome::Cleared(length)),
            Operation::Extents { offset, length } => (0, Outcome::Extents(Vec::new(), offset + length)),
            Operation::Truncate { .. } => return (Err(libc::EINVAL), Outcome::None),
            // Rejected before: it has no descriptor.
            Operation::Copy { .. } | Operation::Checksum { .. } | Operation::Lock(_) => {
                return (Err(libc::EOPNOTSUPP), Outcome::None);
            }
            Operation::Stat => (0, Outcome::Stat(Box::new(FileInfo::synthetic(self.size)))),
        };
        (Ok(n as u32), outcome)
    }
}

impl Volume for Null {
    fn submit(
        &self,
        context: &mut Context<'_>,
        key: u64,
        _client: &Weak<Client>,
        operation: Operation,
    ) -> Option<Pending> {
        let (result, outcome) = self.run(operation);
        context.engine.completions().push(Completion { key, result, outcome });
        None
    }

    /// It is too late.
    fn cancel(&self, _context: &mut Context<'_>, _key: u64, _pending: Pending) {}

    fn close(self: Arc<Self>, _engine: &mut dyn Engine, closing: Closing) {
        closing.complete(Ok(()));
    }

    fn try_read_cached(&self, _engine: &mut dyn Engine, bytes: &mut [u8], offset: u64) -> Option<()> {
        (self.within(offset, bytes.len()) == bytes.len()).then(|| bytes.fill(0))
    }

    fn try_stat(&self) -> Option<FileInfo> {
        Some(FileInfo::synthetic(self.size))
    }

    fn properties(&self) -> Properties {
        let size_limit = Some(SizeLimit { bytes: self.size, errno: libc::ENOSPC });
        Properties { size_limit, may_hang: false, has_locks: false, ..Properties::default() }
    }
}

#[cfg(test)]
mod tests {
    use raio_transport::memory::Arena;
    use raio_transport::transport::SlotRange;

    use super::*;

    #[test]
    fn reads_are_zeros_up_to_its_size() {
        let mut arena = Arena::new(1 << 20, 1 << 20).unwrap();
        let mut read = |offset| {
            let mut slot = arena.alloc(4096).unwrap();
            slot.bytes_mut().fill(7);
            let target = SlotRange { slot, start: 0, len: 20 };
            let (n, outcome) = Null::new(100).run(Operation::Read { target, offset });
            let Outcome::Slot(range) = outcome else { panic!("the slot is lost") };
            let n = n.unwrap() as usize;
            assert!(range.slot.bytes()[..n].iter().all(|&byte| byte == 0));
            assert_eq!(range.slot.bytes()[n], 7, "more than it said");
            n
        };
        assert_eq!([read(0), read(90), read(100), read(u64::MAX)], [20, 10, 0, 0]);
    }
}
