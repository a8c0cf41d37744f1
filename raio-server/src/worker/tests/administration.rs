//! What an administrator sees of two workers, and has them do.

use serde_json::Value;

use super::channels::{Pair, executing, offer, pair};
use super::*;
use crate::control::{Control, Order, WorkerView};
use crate::http::Next;
use crate::reply::Wake;

const SLOW: Duration = Duration::from_millis(5);

/// Two workers for which a request is slow after [`SLOW`], and an administrator.
struct Bench {
    pair: Pair,
    control: Control,
    orders: Receiver<Order>,
}

impl Bench {
    fn new() -> Self {
        let mut pair = pair(false);
        for worker in &mut pair.workers {
            worker.slow = SlowRequests::new(SLOW);
        }
        let (sender, orders) = reactor::mailbox(pair.workers[0].reactor.waker());
        let shared = Arc::clone(&pair.workers[0].shared);
        let senders = shared.workers.get().expect("they are known");
        let views = senders.iter().zip(&pair.workers).map(|(senders, worker)| WorkerView {
            senders: senders.clone(),
            counters: Arc::clone(&worker.counters),
            cpu: Some(worker.index),
        });
        let (views, wake): (_, Wake) = (views.collect(), Arc::new(|| ()));
        let control = Control::new(Arc::clone(&shared), views, sender, wake);
        Self { pair, control, orders }
    }

    fn sessions(&self) -> Vec<Value> {
        let answer = parse(&self.control.sessions(None, Instant::now()));
        let Value::Array(sessions) = answer["sessions"].clone() else { panic!("{answer}") };
        assert_eq!(answer["total"], sessions.len());
        sessions
    }

    /// Runs the workers until something is there.
    fn get<T>(&mut self, mut poll: impl FnMut(Instant) -> Next<T>) -> T {
        loop {
            if let Next::Ready(it) = poll(Instant::now()) {
                return it;
            }
            self.pair.run();
        }
    }

    fn slow(&mut self) -> Value {
        let mut list = self.control.slow(Instant::now());
        self.get(|now| list.poll(now));
        parse(&self.control.slow_answer(&list, Instant::now()))
    }
}

fn parse(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error} in {text}"))
}

#[test]
fn a_session_that_is_killed_ends_on_all_workers_and_its_client_hears_why() {
    let mut bench = Bench::new();
    let mut other = bench.pair.connect(1, &offer(2, 1));
    let mut victim = bench.pair.connect(0, &offer(1, 1));
    let (_, file) = bench.pair.open(&mut victim);
    let id = bench.sessions().iter().find(|it| it["open_files"] == 1).expect("it is there")["id"].clone();
    let id = id.as_str().expect("a text");
    victim.write(file, 7);
    bench.pair.until("the image has it", |workers| executing(workers) == 1);

    let mut kill = bench.control.kill(&id[..8], "user 0", Instant::now()).expect("there is one");
    assert_eq!(bench.get(|now| kill.ended(now)), Ok(id.to_owned()), "by the id of the audit log");
    assert!(bench.pair.reply(&mut victim).is_none(), "its connection is closed");
    let why = victim.client.failure().expect("it has ended").to_string();
    assert!(why.contains("An administrator of the server has ended the session"), "{why}");
    // It does not begin anew by connecting again, while something of it executes and later.
    for epoch in 2..4 {
        let error = bench.pair.try_connect(1, &offer(1, epoch)).err().expect("it is rejected");
        let raio_transport::Error::Rejected { status, text } = &error else { panic!("{error}") };
        assert_eq!(status.errno, libc::ECONNABORTED, "{text}");
        assert!(raio_transport::resume::is_final(&error), "the client does not try again");
        bench.pair.release();
        bench.pair.until("it is over", |workers| executing(workers) == 0);
    }
    assert_eq!(bench.sessions().len(), 1);
    let Err(error) = bench.control.kill(id, "user 0", Instant::now()) else { panic!("it has ended") };
    assert_eq!(error.status, 404, "{}", error.text);
    bench.pair.open(&mut other);
    bench.pair.connect(0, &offer(3, 1));
}

#[test]
fn only_what_is_an_id_of_one_session_kills() {
    let mut bench = Bench::new();
    let _members = [1, 2].map(|number| bench.pair.connect(0, &offer(number, 1)));
    for (id, status) in [("", 400), ("abcdef", 400), ("0000000g", 400), ("0000000000000000", 404)] {
        let Err(refusal) = bench.control.kill(id, "user 0", Instant::now()) else { panic!("it is none") };
        assert_eq!(refusal.status, status, "{id}: {}", refusal.text);
    }
    assert_eq!(bench.sessions().len(), 2);
}

#[test]
fn what_a_session_does_is_counted_on_all_workers() {
    let mut bench = Bench::new();
    bench.pair.release();
    let mut member = bench.pair.connect(0, &offer(1, 1));
    let (_, file) = bench.pair.open(&mut member);
    let idle = bench.sessions().remove(0);
    assert_eq!((idle["requests"].as_u64(), idle["connections"].as_u64()), (Some(1), Some(1)));
    for at in 0..3 {
        member.write(file, at);
        assert!(bench.pair.reply(&mut member).is_some());
    }
    member.read(file, 0);
    assert!(bench.pair.reply(&mut member).is_some());
    member.send(&Command::Stat(FileHandle(77)));
    assert!(bench.pair.reply(&mut member).is_some_and(|reply| !reply.status.is_ok()));
    let it = bench.sessions().remove(0);
    let numbers = ["requests", "errors", "read_bytes", "written_bytes", "in_flight", "open_files"];
    let block = BLOCK as u64;
    assert_eq!(numbers.map(|name| it[name].as_u64()), [6, 1, block, 3 * block, 0, 1].map(Some), "{it}");
    assert!(it["latency_us"]["count"].as_u64() > Some(0) && it["latency_us"]["max"].as_f64() > Some(0.0));
    assert_eq!((&it["transports"][0], it["client"].is_null()), (&Value::from("tcp"), true));
    // Its connection goes on at another worker.
    drop(member);
    let mut again = bench.pair.connect(1, &offer(1, 2));
    again.ask(&[]);
    assert!(bench.pair.reply(&mut again).is_some());
    let it = bench.sessions().remove(0);
    assert_eq!((it["requests"].as_u64(), it["connections"].as_u64()), (Some(7), Some(1)), "{it}");
}

#[test]
fn who_does_most_comes_first_and_no_more_than_were_asked_for() {
    let mut bench = Bench::new();
    bench.pair.release();
    let mut members = [1, 2, 3].map(|number| bench.pair.connect(0, &offer(number, 1)));
    let (_, file) = bench.pair.open(&mut members[1]);
    members[1].write(file, 0);
    assert!(bench.pair.reply(&mut members[1]).is_some());
    let top = || parse(&bench.control.sessions(Some(2), Instant::now()));
    let first = top();
    let sessions = first["sessions"].as_array().expect("a list");
    assert_eq!((sessions.len(), first["total"].as_u64()), (2, Some(3)));
    assert_eq!(sessions[0]["written_bytes"], BLOCK);
    // Since then another one has done more.
    let (_, file) = bench.pair.open(&mut members[2]);
    members[2].read(file, 0);
    assert!(bench.pair.reply(&mut members[2]).is_some());
    let top = || parse(&bench.control.sessions(Some(2), Instant::now()));
    assert_eq!(top()["sessions"][0]["read_bytes"], BLOCK);
}

#[test]
fn a_slow_request_is_shown_while_it_runs_and_after_its_end_with_where_its_time_went() {
    let mut bench = Bench::new();
    let mut member = bench.pair.connect(0, &offer(1, 1));
    let (_, file) = bench.pair.open(&mut member);
    assert_eq!(bench.slow()["slow"].as_array().map(Vec::len), Some(0), "the open was quick");
    member.write(file, 7);
    bench.pair.until("the image has it", |workers| executing(workers) == 1);
    std::thread::sleep(2 * SLOW);
    let running = bench.slow()["slow"][0].clone();
    assert_eq!((&running["operation"], &running["is_running"]), (&"write".into(), &true.into()));
    bench.pair.release();
    assert!(bench.pair.reply(&mut member).is_some());
    let slow = bench.slow();
    let ended = &slow["slow"][0];
    assert_eq!(slow["slow"].as_array().map(Vec::len), Some(1), "{slow}");
    assert_eq!((ended["is_running"].as_bool(), ended["result"].is_null()), (Some(false), true));
    assert_eq!((&ended["export"], &ended["bytes"]), (&"v".into(), &BLOCK.into()));
    assert_eq!(ended["session"], bench.sessions()[0]["id"]);
    let stages = ended["stages"].as_array().expect("a list");
    let executing = stages.iter().find(|stage| stage["name"] == "executing").expect("a stage");
    assert!(executing["us"].as_u64() >= Some(2 * SLOW.as_micros() as u64), "{ended}");
    let us = |stage: &Value| stage["us"].as_u64().unwrap_or(0);
    assert_eq!(ended["total_us"].as_u64(), Some(stages.iter().map(us).sum()));
}

#[test]
fn a_worker_that_is_stuck_leaves_out_its_part_and_is_told_of() {
    let mut bench = Bench::new();
    let now = Instant::now();
    bench.control.look(now);
    let mut list = bench.control.slow(now);
    run_once(&mut bench.pair.workers[0]);
    let later = now + Duration::from_secs(2);
    assert!(matches!(list.poll(now), Next::At(until) if until > now && until < later));
    assert!(matches!(list.poll(later), Next::Ready(())));
    let answer = parse(&bench.control.slow_answer(&list, later));
    assert_eq!(answer["missing_workers"], serde_json::json!([1]));
    let workers = parse(&bench.control.workers(later));
    let stuck =
        |at: usize| (workers["workers"][at]["stuck"].as_bool(), workers["workers"][at]["stuck_ms"].as_u64());
    assert_eq!((stuck(0), stuck(1)), ((Some(false), Some(0)), (Some(true), Some(2000))));
    assert_eq!(bench.control.stalled(later)[0].name, "1");
    // A session is ended by one that goes on.
    bench.pair.connect(0, &offer(1, 1));
}

#[test]
fn a_trace_is_of_the_requests_while_it_is_recorded_and_there_is_one_at_a_time() {
    let mut bench = Bench::new();
    bench.pair.release();
    let mut member = bench.pair.connect(0, &offer(1, 1));
    let (_, file) = bench.pair.open(&mut member);
    let refusal =
        |bench: &Bench, seconds| bench.control.trace(seconds, Instant::now()).err().map(|it| it.status);
    assert_eq!([refusal(&bench, 0), refusal(&bench, 61)], [Some(400), Some(400)]);
    let start = Instant::now();
    let Ok(mut trace) = bench.control.trace(1, start) else { panic!("there is none yet") };
    assert_eq!(refusal(&bench, 1), Some(409));
    bench.pair.run();
    member.write(file, 7);
    assert!(bench.pair.reply(&mut member).is_some());
    let mut text = String::new();
    let end = start + Duration::from_secs(1);
    loop {
        match trace.next_part(end) {
            Next::Ready(Some(part)) => text += &part,
            Next::Ready(None) => break,
            Next::At(_) => bench.pair.run(),
        }
    }
    assert!(bench.pair.workers.iter().all(|worker| !worker.tracer.is_on()), "they record no more");
    let parsed = parse(&text);
    let events = parsed["traceEvents"].as_array().expect("a list");
    let begun: Vec<_> =
        events.iter().filter(|event| event["ph"] == "b").map(|event| &event["name"]).collect();
    assert_eq!(begun, ["write"], "{text}");
    assert_eq!(events.iter().filter(|event| event["name"] == "thread_name").count(), 2);
    drop(trace);
    // One that nobody waits for any more ends, too.
    assert!(bench.control.trace(60, Instant::now()).is_ok(), "the other one has ended");
    bench.pair.run();
    assert!(bench.pair.workers.iter().all(|worker| !worker.tracer.is_on()));
}

#[test]
fn exports_have_their_counters_and_the_main_thread_gets_its_orders() {
    let mut bench = Bench::new();
    bench.pair.release();
    let mut member = bench.pair.connect(0, &offer(1, 1));
    bench.pair.open(&mut member);
    let exports = parse(&bench.control.exports());
    let it = &exports["exports"][0];
    assert_eq!((&it["name"], &it["state"], &it["open_files"]), (&"v".into(), &"available".into(), &1.into()));
    assert!(bench.orders.take().is_none());
    bench.control.drain();
    assert!(matches!(bench.orders.take(), Some(Order::Drain)));
}
