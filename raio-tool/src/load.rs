//! `raio load`: opens many sessions with a raio server, reads and writes on them, checks every byte, closes
//! them, and reports the results. It works directly over channels, without libraio, so that tens of thousands
//! of sessions fit into one thread.
//!
//! ```text
//!   options -> plan -> session (opens, a few threads) -> traffic (reads and writes, one thread) -> report
//! ```

mod content;
mod options;
mod report;
mod session;
mod traffic;
mod tuning;

use std::io::BufRead;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::sync::mpsc::RecvTimeoutError;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use raio_transport::{Error, open_files};

use self::options::Plan;
use self::report::{Opened, Progress, Report, grouped};
use self::session::Session;
use self::traffic::Traffic;
use self::tuning::DESCRIPTORS_OWN;
use crate::failure::{Failure, sentence};
use crate::global::Global;
use crate::output;

pub use self::options::Options;

/// Does what the options say. Returns what the program exits with once the report is printed.
pub fn run(global: &Global, options: Options) -> Result<ExitCode, Failure> {
    let plan = options.check(global).map_err(|error| Failure::usage(format!("{error:#}")))?;
    let report = carry_out(&plan).map_err(|error| Failure::new(format!("{error:#}")))?;
    for complaint in report.complaints() {
        output::say(&format!("raio: {complaint}"));
    }
    let text = if global.json { format!("{}\n", report.json(&plan)) } else { report.text(&plan) };
    output::print(&text)?;
    Ok(ExitCode::from(report.exit_code()))
}

fn carry_out(plan: &Plan) -> anyhow::Result<Report> {
    let wanted = plan.sessions + DESCRIPTORS_OWN;
    let limit = open_files::raise(wanted);
    ensure!(
        limit >= wanted,
        "{} sessions take {} open files, but this process may have only {}, which is enough for {} \
         sessions. Raise the hard limit \
         as root (`ulimit -Hn {wanted}`, or LimitNOFILE= in a unit), or give --sessions {}.",
        grouped(plan.sessions as u64),
        grouped(wanted as u64),
        grouped(limit as u64),
        grouped(limit.saturating_sub(DESCRIPTORS_OWN) as u64),
        limit.saturating_sub(DESCRIPTORS_OWN)
    );
    let mut progress = Progress::new();
    let (first, file_size) = Session::open_first(plan).map_err(|error| anyhow::anyhow!(sentence(&error)))?;
    let io_max = first.client.grant().data_bytes_max;
    ensure!(
        plan.io_bytes <= io_max,
        "--io-size is {} bytes, and the server takes at most {io_max}. Give no more, or raise its --io-max.",
        plan.io_bytes
    );
    ensure!(
        plan.depth <= first.client.grant().queue_depth,
        "--depth is {}, and the server grants {}. Give no more, or raise its --queue-depth.",
        plan.depth,
        first.client.grant().queue_depth
    );
    let size = plan.size.unwrap_or(file_size);
    ensure!(
        size <= file_size && size >= u64::from(plan.io_bytes),
        "{} has {file_size} bytes, which is too little. Have it written with --fill and --size, or give a \
         smaller --size or --io-size.",
        plan.path
    );

    let (sessions, opened) = open_sessions(plan, first, &mut progress);
    if plan.hold {
        progress.say(&format!("{} sessions are open; waiting for a line", grouped(sessions.len() as u64)));
        progress.end_line();
        let mut line = String::new();
        std::io::stdin().lock().read_line(&mut line).context("Cannot read standard input")?;
    }
    let traffic = Traffic::new(plan, sessions, size).context("Cannot watch the sessions")?;
    let done = traffic.run(|outcome, elapsed| progress.load(outcome, elapsed));
    progress.end_line();
    let (outcome, sessions) = done.context("Cannot wait for the sessions")?;
    let started = Instant::now();
    drop(sessions);
    Ok(Report { opened, outcome, closed_in: started.elapsed() })
}

/// Opens the other sessions. What cannot be opened is in the account.
fn open_sessions(plan: &Plan, first: Session, progress: &mut Progress) -> (Vec<Session>, Opened) {
    let mut sessions = vec![first];
    let mut account = Opened::default();
    let started = Instant::now();
    // The first one is open already.
    let (next, is_over) = (AtomicUsize::new(1), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let receiver = session::open_all(scope, plan, &next, &is_over);
        let mut tick = started + Duration::from_secs(1);
        loop {
            match receiver.recv_timeout(tick.saturating_duration_since(Instant::now())) {
                Ok(Ok(session)) => sessions.push(session),
                Ok(Err(Error::Rejected { text, .. })) => {
                    account.rejected += 1;
                    account.first_refusal.get_or_insert(text);
                }
                Ok(Err(error)) => {
                    account.error.get_or_insert(error.to_string());
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
            if Instant::now() >= tick {
                tick += Duration::from_secs(1);
                progress.say(&format!(
                    "{} of {} sessions are open",
                    grouped(sessions.len() as u64),
                    grouped(plan.sessions as u64)
                ));
            }
        }
    });
    progress.end_line();
    account.count = sessions.len();
    account.elapsed = started.elapsed();
    (sessions, account)
}
