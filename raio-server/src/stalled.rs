//! What does not go on, and why: workers that do not finish an iteration, lanes whose jobs do not end, and
//! requests that no memory becomes free for.
//!
//! Whoever asks looks at the workers: one that may be asleep is woken, and has gone on if it has finished an
//! iteration by the next look. So nothing is done while nobody asks.

use std::sync::Arc;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use raio_transport::sync::lock;
use serde::Serialize;

use crate::engine::Lanes;
use crate::export::Export;
use crate::pool::Load;
use crate::stats::Counters;
use crate::tuning::main_thread::STUCK_AFTER;
use crate::tuning::stalled::{LANE_AFTER, LEASE_AFTER, SLOTS_AFTER, WORKER_AFTER};

/// Something that does not go on.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub struct Stalled {
    /// `worker`, `lane` or `slot`.
    pub what: &'static str,
    /// Which: `3`, `data of a`.
    pub name: String,
    /// For how long, in milliseconds.
    pub since_ms: u64,
    /// What has happened, and what to do about it.
    pub why: String,
}

/// What was seen of a worker.
#[derive(Clone, Copy, Debug, Default)]
struct Seen {
    /// When it was woken, after that many iterations.
    woken: Option<(Instant, u64)>,
    /// Since when requests have waited for memory, at each look.
    waits_since: Option<Instant>,
}

/// See the module documentation.
#[derive(Debug)]
pub struct Pulse(Mutex<Vec<Seen>>);

impl Pulse {
    /// Of so many workers, at which nobody has looked.
    pub fn new(workers: usize) -> Self {
        Self(Mutex::new(vec![Seen::default(); workers]))
    }

    /// Looks at all workers, and wakes those that have gone on since they were woken last.
    pub fn look<'a>(
        &self,
        workers: impl Iterator<Item = &'a Counters>,
        now: Instant,
        mut wake: impl FnMut(usize),
    ) {
        for (at, (seen, counters)) in lock(&self.0).iter_mut().zip(workers).enumerate() {
            let iterations = counters.iterations.get();
            if seen.woken.is_none_or(|(_, before)| before != iterations) {
                seen.woken = Some((now, iterations));
                wake(at);
            }
            seen.waits_since =
                if counters.need_slot.get() > 0 { seen.waits_since.or(Some(now)) } else { None };
        }
    }

    /// For how long each worker has not finished an iteration, if that is known to be long.
    pub fn stuck<'a>(
        &self,
        workers: impl Iterator<Item = &'a Counters>,
        now: Instant,
    ) -> Vec<Option<Duration>> {
        let all = lock(&self.0);
        let since = |(seen, counters): (&Seen, &Counters)| {
            let (woken, before) = seen.woken?;
            let for_long = now.saturating_duration_since(woken);
            (counters.iterations.get() == before && for_long >= STUCK_AFTER).then_some(for_long)
        };
        all.iter().zip(workers).map(since).collect()
    }

    /// Whether it is known of each worker if it goes on.
    pub fn is_known<'a>(&self, workers: impl Iterator<Item = &'a Counters>, now: Instant) -> bool {
        let all = lock(&self.0);
        all.iter().zip(workers).all(|(seen, counters)| {
            seen.woken.is_some_and(|(woken, before)| {
                counters.iterations.get() != before || now.saturating_duration_since(woken) >= STUCK_AFTER
            })
        })
    }

    /// Since when requests have waited for memory, at any worker.
    fn waits_since(&self) -> Option<Instant> {
        lock(&self.0).iter().filter_map(|seen| seen.waits_since).min()
    }
}

/// The lanes of an export with their names, and what each has to do.
pub fn lanes(lanes: &Lanes) -> [(&'static str, Load); 5] {
    let Lanes { control, lease, flush, ranges, data, .. } = lanes;
    [("open", control), ("lease", lease), ("sync", flush), ("copy", ranges), ("data", data)]
        .map(|(name, lane)| (name, lane.load()))
}

/// The same as JSON.
pub fn lanes_json(of: &Lanes) -> String {
    let lanes = lanes(of).map(|(name, Load { running, waiting, oldest })| {
        let oldest_ms = oldest.unwrap_or_default().as_millis();
        format!("\"{name}\":{{\"running\":{running},\"waiting\":{waiting},\"oldest_ms\":{oldest_ms}}}")
    });
    format!("{{{}}}", lanes.join(","))
}

/// Why an export does not answer, if that is so: requests on it hang.
pub fn why_unavailable(export: &Export) -> Option<String> {
    let hangs = |(name, load): (&'static str, Load)| lane_stalled(export, name, load);
    lanes(export.lanes()).into_iter().filter(|(name, _)| *name != "lease").find_map(hangs).map(|it| it.why)
}

/// Everything that does not go on.
pub fn all<'a>(
    pulse: &Pulse,
    workers: impl Iterator<Item = &'a Counters>,
    exports: &[Arc<Export>],
    now: Instant,
) -> Vec<Stalled> {
    let stuck = pulse.stuck(workers, now).into_iter().enumerate();
    let stuck = stuck.filter_map(|(at, stuck)| worker_stalled(at, stuck?));
    let hang = exports.iter().flat_map(|export| {
        lanes(export.lanes()).into_iter().filter_map(move |(name, load)| lane_stalled(export, name, load))
    });
    let waits = pulse.waits_since().map(|since| now.saturating_duration_since(since));
    stuck.chain(hang).chain(waits.and_then(slots_stalled)).collect()
}

fn worker_stalled(worker: usize, stuck: Duration) -> Option<Stalled> {
    (stuck >= WORKER_AFTER).then(|| Stalled {
        what: "worker",
        name: worker.to_string(),
        since_ms: stuck.as_millis() as u64,
        why: format!(
            "Worker {worker} has not finished an iteration for {}: something makes its thread wait, or it \
             gets no processor. Look at /proc/PID/task/TID/stack of the thread raio-{worker}.",
            seconds(stuck)
        ),
    })
}

fn lane_stalled(export: &Export, lane: &str, load: Load) -> Option<Stalled> {
    let after = if lane == "lease" { LEASE_AFTER } else { LANE_AFTER };
    let oldest = load.oldest.filter(|oldest| *oldest >= after)?;
    let name = export.name();
    let cause = match export.root() {
        _ if lane == "lease" => {
            "whoever has a lease on the file (Samba, knfsd) does not give it up".to_owned()
        }
        Some(root) => {
            let path = root.path().to_string_lossy();
            format!("the disk or file system of {path} does not answer, or cannot keep up")
        }
        None => "this machine cannot keep up".to_owned(),
    };
    Some(Stalled {
        what: "lane",
        name: format!("{lane} of {name}"),
        since_ms: oldest.as_millis() as u64,
        why: format!(
            "Lane {lane} of export {name}: {} jobs run, {} wait, the oldest for {}: {cause}.",
            load.running,
            load.waiting,
            seconds(oldest)
        ),
    })
}

fn slots_stalled(waits: Duration) -> Option<Stalled> {
    (waits >= SLOTS_AFTER).then(|| Stalled {
        what: "slot",
        name: "memory".to_owned(),
        since_ms: waits.as_millis() as u64,
        why: format!(
            "Requests have waited for memory for {}. Raise --memory, unless a lane is what holds it.",
            seconds(waits)
        ),
    })
}

fn seconds(time: Duration) -> String {
    if time < Duration::from_secs(10) {
        format!("{:.1} s", time.as_secs_f64())
    } else {
        format!("{} s", time.as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Job;
    use crate::pool::Pool;
    use crate::volume::Null;

    fn at(start: Instant, ms: u64) -> Instant {
        start + Duration::from_millis(ms)
    }

    #[test]
    fn a_worker_that_finishes_no_iteration_after_it_was_woken_is_stuck() {
        let (pulse, start) = (Pulse::new(2), Instant::now());
        let workers = [Counters::new(0, 0), Counters::new(0, 0)];
        let all = || workers.iter();
        assert!(!pulse.is_known(all(), start));
        let mut woken = Vec::new();
        let mut look = |ms| {
            pulse.look(all(), at(start, ms), |worker| woken.push(worker));
            std::mem::take(&mut woken)
        };
        assert_eq!(look(0), [0, 1]);
        workers[0].iterations.add(1);
        assert!(!pulse.is_known(all(), at(start, 50)), "worker 1 has time yet");
        assert_eq!(look(50), [0], "one that was woken is not woken again");
        assert_eq!(pulse.stuck(all(), at(start, 99)), [None, None]);
        workers[0].iterations.add(1);
        let stuck = Some(Duration::from_millis(2500));
        assert!(pulse.is_known(all(), at(start, 2500)));
        assert_eq!(pulse.stuck(all(), at(start, 2500)), [None, stuck]);
        let stalled = super::all(&pulse, all(), &[], at(start, 2500));
        assert_eq!((stalled.len(), stalled[0].what, stalled[0].since_ms), (1, "worker", 2500));
        assert!(stalled[0].why.starts_with("Worker 1 has not finished an iteration for 2.5 s: "));
        workers[1].iterations.add(1);
        assert_eq!(pulse.stuck(all(), at(start, 2600)), [None, None], "it goes on");
    }

    #[test]
    fn requests_that_wait_for_memory_at_each_look_are_told_of() {
        let (pulse, start) = (Pulse::new(1), Instant::now());
        let worker = [Counters::new(0, 0)];
        let look = |ms| {
            pulse.look(worker.iter(), at(start, ms), |_| ());
            worker[0].iterations.add(1);
            super::all(&pulse, worker.iter(), &[], at(start, ms))
        };
        worker[0].need_slot.set(3);
        assert_eq!(look(0), []);
        let stalled = look(SLOTS_AFTER.as_millis() as u64);
        assert_eq!((stalled.len(), stalled[0].what), (1, "slot"));
        worker[0].need_slot.set(0);
        assert_eq!(look(90_000), []);
        worker[0].need_slot.set(1);
        assert_eq!(look(90_001), [], "it begins anew");
    }

    #[test]
    fn a_lane_whose_oldest_job_does_not_end_says_what_holds_it_up() {
        let pool: &'static Pool<Job> = Pool::without_threads();
        let export = Export::of_volume("a", Null::new(1), 1, Lanes::new(pool));
        let load = |oldest| Load { running: 16, waiting: 40, oldest: Some(oldest) };
        assert_eq!(lane_stalled(&export, "data", load(Duration::from_secs(1))), None);
        let stalled = lane_stalled(&export, "data", load(Duration::from_secs(31))).unwrap();
        assert_eq!((stalled.name.as_str(), stalled.since_ms), ("data of a", 31_000));
        let text = "Lane data of export a: 16 jobs run, 40 wait, the oldest for 31 s: this machine";
        assert!(stalled.why.starts_with(text), "{}", stalled.why);
        assert_eq!(lane_stalled(&export, "lease", load(Duration::from_secs(31))), None);
        let stalled = lane_stalled(&export, "lease", load(Duration::from_secs(60))).unwrap();
        assert!(stalled.why.contains("Samba"), "{}", stalled.why);
        let none = "{\"running\":0,\"waiting\":0,\"oldest_ms\":0}";
        let json = lanes_json(export.lanes());
        assert!(json.starts_with(&format!("{{\"open\":{none},\"lease\":{none},")), "{json}");
        assert_eq!((why_unavailable(&export), lanes(export.lanes())[4].1), (None, Load::default()));
    }
}
