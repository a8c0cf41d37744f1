//! How far a transfer is: a bar on a terminal, or lines of JSON, on standard error.

use std::io::IsTerminal;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use clap::ValueEnum;
use indicatif::{ProgressBar, ProgressStyle};
use raio_transport::sync::lock;
use serde_json::json;

use crate::output::{per_second, say};

/// Which progress is shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Style {
    /// A bar if standard error is a terminal
    #[default]
    Auto,
    /// A line of JSON each second
    Json,
    /// None
    Never,
}

/// How far it is.
pub struct Progress {
    what: &'static str,
    size: Option<u64>,
    started: Instant,
    shown: Shown,
}

enum Shown {
    Bar(ProgressBar),
    /// When the last line was written.
    Json(Mutex<Instant>),
    /// As a part of another progress, and the bytes that were done before this part.
    Part(Arc<Progress>, u64),
    Nothing,
}

impl Progress {
    /// Of a transfer of `size` bytes, None if that is not known. `what` is a verb, such as "copy".
    pub fn new(style: Style, what: &'static str, size: Option<u64>) -> Self {
        let shown = match style {
            Style::Json => Shown::Json(Mutex::new(Instant::now())),
            Style::Auto if std::io::stderr().is_terminal() => Shown::Bar(bar(what, size)),
            Style::Auto | Style::Never => Shown::Nothing,
        };
        Self { what, size, started: Instant::now(), shown }
    }

    /// Of a part of something, of which `done` bytes are done.
    pub fn of_part(whole: &Arc<Self>, done: u64) -> Self {
        let shown = Shown::Part(Arc::clone(whole), done);
        Self { what: whole.what, size: None, started: whole.started, shown }
    }

    /// It has come this far.
    pub fn show(&self, bytes: u64) {
        match &self.shown {
            Shown::Bar(bar) => bar.set_position(bytes),
            Shown::Json(last) => {
                let mut last = lock(last);
                if last.elapsed() >= Duration::from_secs(1) {
                    *last = Instant::now();
                    say(&self.line(bytes, self.started.elapsed()).to_string());
                }
            }
            Shown::Part(whole, done) => whole.show(done + bytes),
            Shown::Nothing => {}
        }
    }

    /// It has ended.
    pub fn finish(&self) {
        if let Shown::Bar(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }

    fn line(&self, bytes: u64, elapsed: Duration) -> serde_json::Value {
        let rate = per_second(bytes, elapsed);
        let eta = self.size.filter(|_| rate > 0.0).map(|size| size.saturating_sub(bytes) as f64 / rate);
        json!({
            "progress": self.what,
            "bytes": bytes,
            "size": self.size,
            "seconds": elapsed.as_secs_f64(),
            "bytes_per_second": rate,
            "eta_seconds": eta,
        })
    }
}

fn bar(what: &'static str, size: Option<u64>) -> ProgressBar {
    let (bar, template) = match size {
        Some(size) => (
            ProgressBar::new(size),
            "{msg} {percent:>3}% [{bar:30}] {binary_bytes} of {binary_total_bytes}, \
             {binary_bytes_per_sec}, {eta} left",
        ),
        None => (ProgressBar::no_length(), "{msg} {spinner} {binary_bytes}, {binary_bytes_per_sec}"),
    };
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    bar.with_style(style.progress_chars("=> ")).with_message(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_rate_and_the_time_that_is_left() {
        let progress = Progress::new(Style::Json, "copy", Some(400));
        let line = progress.line(100, Duration::from_secs(2));
        assert_eq!((&line["bytes_per_second"], &line["eta_seconds"]), (&json!(50.0), &json!(6.0)));
        let unknown = Progress::new(Style::Json, "copy", None).line(100, Duration::from_secs(2));
        assert!(unknown["size"].is_null() && unknown["eta_seconds"].is_null());
    }
}
