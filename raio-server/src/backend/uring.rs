//! The backend over the reactor's io_uring.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use raio_transport::protocol::FileStatus;
use raio_transport::reactor::{Event, Op, OpId, Payload, Reactor, Token};

use super::{Backend, Completion, Handle, OWNER, Operation, Outcome, file_info};

/// Passes operations on to the ring.
#[derive(Debug, Default)]
pub struct Uring {
    ended: VecDeque<Completion>,
}

impl Backend for Uring {
    fn submit(
        &mut self,
        reactor: &mut Reactor,
        key: u64,
        file: &Handle,
        operation: Operation,
    ) -> Option<OpId> {
        let Handle { fd, file } = file;
        let file = || file.clone();
        let op = match operation {
            Operation::Read { target, offset } => Op::Read { file: file(), target, offset },
            Operation::Write { source, offset } => Op::Write { file: file(), source, offset },
            Operation::Fsync { data_only } => Op::Fsync { file: file(), data_only },
            Operation::Fallocate { how, offset, length } => {
                Op::Fallocate { file: file(), how, offset, length }
            }
            Operation::Stat => Op::Stat { file: Arc::clone(fd) },
            Operation::Open { path, how } => Op::Open { directory: Some(file()), path, how },
        };
        Some(reactor.submit(Token { owner: OWNER, value: key }, op))
    }

    fn close(&mut self, reactor: &mut Reactor, key: u64, fd: OwnedFd) {
        reactor.submit(Token { owner: OWNER, value: key }, Op::Close { fd });
    }

    fn cancel(&mut self, reactor: &mut Reactor, _key: u64, id: Option<OpId>) {
        if let Some(id) = id {
            reactor.cancel(id);
        }
    }

    fn handle(&mut self, event: Event) {
        let outcome = match event.payload {
            Payload::Slot(range) => Outcome::Slot(range),
            Payload::Fd(fd) => Outcome::Fd(fd),
            Payload::Stat(stat) => Outcome::Stat(Box::new(file_info!(*stat))),
            Payload::None | Payload::Received(_) | Payload::Batch(_) | Payload::Timer => Outcome::None,
        };
        self.ended.push_back(Completion { key: event.token.value, result: event.result, outcome });
    }

    fn next(&mut self) -> Option<Completion> {
        self.ended.pop_front()
    }
}
