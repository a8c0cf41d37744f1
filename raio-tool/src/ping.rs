//! `raio ping`: how soon a server answers.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use clap::Args;
use hdrhistogram::Histogram;
use raio::{Buffer, Buffers, Operation};
use raio_transport::size;
use serde::Serialize;

use crate::failure::Failure;
use crate::global::Global;
use crate::location::Location;
use crate::output;
use crate::place::RemoteFile;
use crate::target::Probe;
use crate::tuning::CONNECT_TIMEOUT;

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    /// A server, which is pinged over TCP, or a file there, which is read [default: $RAIO_URL]
    #[arg(value_name = "URL_OR_PATH")]
    target: Option<OsString>,
    /// How often
    #[arg(long, short, value_name = "NUMBER", default_value_t = 1000)]
    #[arg(value_parser = clap::value_parser!(u32).range(1..=10_000_000))]
    count: u32,
    /// Milliseconds between two
    #[arg(long, value_name = "MS", default_value_t = 0)]
    interval: u32,
    /// Of a file: length of each read, at its beginning
    #[arg(long, value_name = "SIZE", default_value = "4k", value_parser = size::parse)]
    size: u64,
}

/// The result, as `--json` prints it. Times are in microseconds.
#[derive(Debug, Serialize)]
struct Report {
    target: String,
    /// ping or read.
    what: &'static str,
    count: u64,
    min_us: f64,
    mean_us: f64,
    p50_us: f64,
    p90_us: f64,
    p99_us: f64,
    p999_us: f64,
    max_us: f64,
    /// Pairs of the upper end of a range of times and how many were in it.
    histogram_us: Vec<(u64, u64)>,
}

pub fn run(global: &Global, options: &Options) -> Result<(), Failure> {
    let timeout = global.timeout.unwrap_or(CONNECT_TIMEOUT);
    let mut times =
        Histogram::<u64>::new(3).map_err(|error| Failure::new(format!("No histogram: {error}.")))?;
    let (target, what) = match &options.target {
        Some(target) if Location::parse(target).is_ok() => {
            let location = Location::parse(target)?;
            let file = RemoteFile::open(global, &location, libc::O_RDONLY, 0)?;
            let (mut context, handle) = file.context(1)?;
            let failed = |error: &raio::Error| Failure::remote(format!("Cannot read {location}"), error);
            let mut memory = vec![0; options.size as usize];
            for _ in 0..options.count {
                let started = Instant::now();
                let buffers = Buffers::One(Buffer::Owned(std::mem::take(&mut memory).into()));
                let read = Operation::Read { offset: 0, buffers };
                context.submit(&handle, read, 0).map_err(|rejected| failed(&rejected.error))?;
                let completion = loop {
                    context.wait(1, usize::MAX, None).map_err(|error| failed(&error))?;
                    if let Some(completion) = context.next() {
                        break completion;
                    }
                };
                completion.result.map_err(|error| failed(&error))?;
                note(&mut times, started.elapsed());
                if let Some(Buffers::One(Buffer::Owned(bytes))) = completion.buffers {
                    memory = bytes.into_vec();
                }
                pause(options);
            }
            (location.to_string(), "read")
        }
        target => {
            let url = match target {
                Some(target) => {
                    let url = target.to_str().ok_or_else(|| Failure::usage("The URL is not UTF-8."))?;
                    url.to_owned()
                }
                None => global.url()?,
            };
            let mut probe = Probe::connect(global, &url)?;
            for _ in 0..options.count {
                note(&mut times, probe.ping(timeout)?);
                pause(options);
            }
            (url, "ping")
        }
    };
    let report = Report::of(target, what, &times);
    if global.json { output::print_json(&report) } else { output::print(&report.text()) }
}

fn note(times: &mut Histogram<u64>, time: Duration) {
    // It grows as it must.
    let _ = times.record(time.as_nanos() as u64);
}

fn pause(options: &Options) {
    if options.interval > 0 {
        std::thread::sleep(Duration::from_millis(options.interval.into()));
    }
}

impl Report {
    fn of(target: String, what: &'static str, times: &Histogram<u64>) -> Self {
        let us = |ns: u64| ns as f64 / 1e3;
        let at = |quantile| us(times.value_at_quantile(quantile));
        let buckets = times.iter_log(1000, 2.0);
        let buckets =
            buckets.map(|it| (it.value_iterated_to().div_ceil(1000), it.count_since_last_iteration()));
        Self {
            target,
            what,
            count: times.len(),
            min_us: us(times.min()),
            mean_us: times.mean() / 1e3,
            p50_us: at(0.5),
            p90_us: at(0.9),
            p99_us: at(0.99),
            p999_us: at(0.999),
            max_us: us(times.max()),
            histogram_us: buckets.filter(|&(_, count)| count > 0).collect(),
        }
    }

    fn text(&self) -> String {
        let mut text = format!(
            "{} {}s of {}\nµs: min {:.1}, mean {:.1}, p50 {:.1}, p90 {:.1}, p99 {:.1}, p99.9 {:.1}, \
             max {:.1}\n",
            self.count,
            self.what,
            self.target,
            self.min_us,
            self.mean_us,
            self.p50_us,
            self.p90_us,
            self.p99_us,
            self.p999_us,
            self.max_us
        );
        let most = self.histogram_us.iter().map(|&(_, count)| count).max().unwrap_or(1);
        for &(end, count) in &self.histogram_us {
            let bar = "#".repeat((count * 50).div_ceil(most) as usize);
            text += &format!("{:>12} {count:>9} {bar}\n", format!("< {end} µs"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_time_is_in_the_histogram_and_within_its_range() {
        let mut times = Histogram::new(3).unwrap();
        for us in [10, 20, 20, 3000] {
            note(&mut times, Duration::from_micros(us));
        }
        let report = Report::of("h".into(), "ping", &times);
        assert_eq!(report.histogram_us.iter().map(|&(_, count)| count).sum::<u64>(), 4);
        let (end, count) = *report.histogram_us.last().unwrap();
        assert!((3000..6200).contains(&end) && count == 1, "{:?}", report.histogram_us);
        assert!((9.9..10.1).contains(&report.min_us) && (2990.0..3010.0).contains(&report.max_us));
        assert!(report.text().contains("4 pings of h"));
    }
}
