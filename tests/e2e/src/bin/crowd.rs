//! `crowd URL PATH CLIENTS SECONDS`: so many clients of a file whose 64-bit words are their own number, each with one read of 4 KiB in
//! flight, all in one thread. Prints what they had as JSON. A wrong byte, or a connection that ends, is an error.

use std::time::{Duration, Instant};

use raio_e2e::Crowd;

/// Before anything is counted.
const WARM_UP: Duration = Duration::from_millis(500);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, path, clients, seconds] = &arguments[..] else {
        return Err("usage: crowd URL PATH CLIENTS SECONDS".into());
    };
    let mut crowd = Crowd::connect(url, path, clients.parse()?)?;
    let length = Duration::from_secs_f64(seconds.parse()?);
    let begin = Instant::now();
    crowd.run(|| begin.elapsed() >= WARM_UP)?;
    crowd.forget();
    let begin = Instant::now();
    crowd.run(|| begin.elapsed() >= length)?;
    let seconds = begin.elapsed().as_secs_f64();

    let mut us: Vec<f64> = crowd.latencies.iter().map(|latency| latency.as_secs_f64() * 1e6).collect();
    us.sort_by(f64::total_cmp);
    let at = |part: f64| us[((us.len() - 1) as f64 * part) as usize];
    let answers = crowd.answers();
    let result = serde_json::json!({
        "iops": us.len() as f64 / seconds,
        "mean_us": us.iter().sum::<f64>() / us.len() as f64,
        "p50_us": at(0.5),
        "p99_us": at(0.99),
        "p999_us": at(0.999),
        "max_us": at(1.0),
        "answers_min": answers.iter().min(),
        "answers_max": answers.iter().max(),
    });
    println!("{result}");
    Ok(())
}
