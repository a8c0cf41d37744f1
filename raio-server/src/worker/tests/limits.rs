//! Limits on requests, where these end as soon as they begin.

use super::*;

const MAX: usize = 4;

/// A client whose session may have [`MAX`] requests in flight, and a file whose requests complete at once.
fn bench() -> Bench {
    let options = Options::parse_from(["raio_server", "--export", "n=null:1M", "--memory", "128M"]);
    let config = options.check(1).expect("the options make sense");
    let exports = Exports::open(&config.exports, Pool::start().unwrap()).expect("it can be exported");
    let caps = format!("requests={MAX}").parse().expect("it makes sense");
    let mut worker = worker_within(Limits::new(ROOM, caps, Caps::default()), exports, &config);
    let mut client = connect(&mut worker);
    let file = open(&mut worker, &mut client, OPEN_READ | OPEN_WRITE, b"/n");
    Bench { worker, client, file, next_block: 0, _directory: None }
}

impl Bench {
    /// Sends requests together.
    fn fsync(&mut self, count: usize) {
        for tag in 0..count {
            self.send(tag as u64, &Command::Fsync { file: self.file, data_only: false });
        }
    }
}

#[test]
fn a_client_may_keep_as_many_requests_in_flight_as_its_session_may_have() {
    let mut bench = bench();
    bench.fsync(MAX);
    for round in 0..100 {
        // The next ones go out as soon as room for them is known.
        let mut replies = Vec::new();
        while replies.is_empty() {
            run_once(&mut bench.worker);
            bench.client.receive(&mut replies);
        }
        assert!(replies.iter().all(|reply| reply.status.is_ok()), "round {round}: {replies:?}");
        bench.fsync(replies.len());
    }
}

#[test]
fn requests_that_come_together_are_in_flight_together_however_soon_they_end() {
    let mut bench = bench();
    bench.fsync(MAX + 1);
    let replies = bench.replies(MAX + 1);
    let rejected: Vec<_> = replies.iter().filter(|reply| !reply.status.is_ok()).collect();
    assert_eq!(rejected.len(), 1, "{replies:?}");
    assert_eq!((rejected[0].status.errno, rejected[0].status.retryable), (libc::EAGAIN, true));
}
