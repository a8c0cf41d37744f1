//! For tests: what a ring answers to submissions and registrations that no reactor makes.

use std::os::fd::AsRawFd;
use std::time::Duration;

use io_uring::{opcode, squeue, types};

use super::Ring;

/// `user_data` of an attempt.
const ATTEMPT: u64 = u64::MAX - 2;
/// None takes nearly as long.
const TIMEOUT: Duration = Duration::from_secs(5);

impl Ring {
    /// Tries each, with nothing of the reactor's in flight but the poll on its waker. Returns what it is and
    /// the errno, 0 if it succeeded.
    pub fn attempt(&mut self) -> Vec<(&'static str, i32)> {
        const PATH: *const libc::c_char = c"/etc/shadow".as_ptr();
        static OPEN_HOW: types::OpenHow = types::OpenHow::new();
        static ADDRESS: libc::sockaddr_in = libc::sockaddr_in {
            sin_family: libc::AF_INET as u16,
            sin_port: 1u16.to_be(),
            sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes([127, 0, 0, 1]) },
            sin_zero: [0; 8],
        };
        let here = types::Fd(libc::AT_FDCWD);
        let eventfd = types::Fd(self.waker.eventfd().as_raw_fd());
        let entries: [(&str, squeue::Entry); 6] = [
            ("openat", opcode::OpenAt::new(here, PATH).build()),
            ("openat2", opcode::OpenAt2::new(here, PATH, &raw const OPEN_HOW).build()),
            ("socket", opcode::Socket::new(libc::AF_INET, libc::SOCK_STREAM, 0).build()),
            (
                "connect",
                opcode::Connect::new(
                    eventfd,
                    (&raw const ADDRESS).cast(),
                    size_of::<libc::sockaddr_in>() as libc::socklen_t,
                )
                .build(),
            ),
            ("nop", opcode::Nop::new().build()),
            (
                "poll with ASYNC",
                opcode::PollAdd::new(eventfd, libc::POLLOUT as u32).build().flags(squeue::Flags::ASYNC),
            ),
        ];
        let mut answers: Vec<_> =
            entries.into_iter().map(|(name, entry)| (name, self.attempt_entry(entry))).collect();
        let registered = self.ring.submitter().register_eventfd(self.waker.eventfd().as_raw_fd());
        answers.push(("register eventfd", errno(registered.err().and_then(|error| error.raw_os_error()))));
        answers
    }

    fn attempt_entry(&mut self, entry: squeue::Entry) -> i32 {
        // What it points at is static.
        self.push(entry.user_data(ATTEMPT));
        loop {
            self.enter(1, Some(TIMEOUT));
            let results: Vec<_> = self.ring.completion().map(|cqe| (cqe.user_data(), cqe.result())).collect();
            assert!(!results.is_empty(), "an attempt does not end");
            for (user_data, result) in results {
                if user_data == ATTEMPT {
                    return errno((result < 0).then_some(-result));
                }
                self.waker.drain();
                self.watch_waker();
            }
        }
    }
}

fn errno(failure: Option<i32>) -> i32 {
    failure.unwrap_or(0)
}
