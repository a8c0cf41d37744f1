//! `raio top`: what a running server does, live, by its admin socket.
//!
//! ```text
//!   admin socket -> a thread that asks -> answer (samples) -> model (rates, rows) -> view (terminal, text)
//! ```

mod answer;
mod model;
mod view;

use std::io::{self, IsTerminal};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender, TryRecvError};
use std::time::{Duration, Instant};

use clap::Args;
use jiff::Timestamp;
use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use signal_hook::consts::SIGTERM;

use self::answer::{Sample, Sessions, SlowRequests, Stats, Workers};
use self::model::{Pair, Sort, Summary, Table, View};
use self::view::Screen;
use crate::admin::{Socket, client::Admin};
use crate::failure::Failure;
use crate::global::Global;
use crate::interrupt::Interrupt;
use crate::output;
use crate::tuning::top::{ANSWER_TIMEOUT, INTERVALS, KEY_CHECK_INTERVAL, SESSIONS_MAX};

/// Command-line options.
#[derive(Args, Debug)]
pub struct Options {
    #[command(flatten)]
    socket: Socket,
    /// Seconds between two samples
    #[arg(long, short, value_name = "SECONDS", default_value = "1", value_parser = interval)]
    interval: f64,
    /// The table that is shown at first
    #[arg(long, value_enum, default_value_t = View::Sessions)]
    view: View,
    /// What its rows are sorted by: those with the most first, but names from a to z [default: bytes; workers
    /// by name, and the latest slow request first]
    #[arg(long, value_enum)]
    sort: Option<Sort>,
    /// Print one sample, over one interval, and end; needs no terminal
    #[arg(long)]
    once: bool,
}

/// What may be an interval.
fn interval(text: &str) -> Result<f64, String> {
    let (least, most) = (INTERVALS[0], INTERVALS[INTERVALS.len() - 1]);
    let seconds = text.parse().ok().filter(|seconds| (least..=most).contains(seconds));
    seconds.ok_or_else(|| format!("{text:?} is no interval. Write seconds, from {least} to {most}."))
}

pub fn run(global: &Global, options: &Options, interrupt: &Interrupt) -> Result<(), Failure> {
    let timeout = global.timeout.unwrap_or(ANSWER_TIMEOUT);
    let admin = options.socket.connect()?.with_timeout(timeout);
    if options.once || global.json {
        return print(global, options, admin, interrupt);
    }
    if !io::stdout().is_terminal() || !io::stdin().is_terminal() {
        return Err(Failure::usage(
            "This is no terminal. Give --once for one sample, or --json for a line each.",
        ));
    }
    show(global, options, admin, interrupt)
}

/// Asks the server for what a table needs.
fn ask(admin: &mut Admin, view: View) -> Result<Sample, Failure> {
    let stats = Stats::deserialize(admin.get("/stats")?).map_err(|error| unexpected(&error))?;
    let mut sample =
        Sample { at: Instant::now(), stats, sessions: Vec::new(), workers: Vec::new(), slow: Vec::new() };
    match view {
        View::Sessions => {
            sample.sessions = list::<Sessions>(admin, &format!("/sessions?top={SESSIONS_MAX}"))?.sessions;
        }
        View::Workers => sample.workers = list::<Workers>(admin, "/workers")?.workers,
        View::Slow => sample.slow = list::<SlowRequests>(admin, "/slow")?.slow,
        View::Exports | View::Disks => {}
    }
    Ok(sample)
}

fn list<T: DeserializeOwned>(admin: &mut Admin, path: &str) -> Result<T, Failure> {
    T::deserialize(admin.get(path)?).map_err(|error| unexpected(&error))
}

fn unexpected(error: &serde_json::Error) -> Failure {
    Failure::new(format!("The server has answered something else than this version expects ({error})."))
}

/// What is shown of a sample, with the one before.
fn shown(
    now: &Sample,
    before: Option<&Sample>,
    view: View,
    sort: Option<Sort>,
    reverse: bool,
) -> (Summary, Table) {
    let pair = Pair::new(now, before);
    let mut table = pair.table(view);
    table.sort(sort, reverse);
    (pair.summary(), table)
}

/// Prints a sample of one interval, or with `--json` a line for each interval.
fn print(global: &Global, options: &Options, mut admin: Admin, interrupt: &Interrupt) -> Result<(), Failure> {
    let mut before = ask(&mut admin, options.view)?;
    loop {
        let due = before.at + Duration::from_secs_f64(options.interval);
        while let Some(left) = due.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            interrupt.check()?;
            std::thread::sleep(left.min(KEY_CHECK_INTERVAL));
        }
        let now = ask(&mut admin, options.view)?;
        let (summary, table) = shown(&now, Some(&before), options.view, options.sort, false);
        if global.json {
            let line = model::json(&Timestamp::now().to_string(), &summary, &table);
            let line = line.map_err(|error| Failure::new(format!("Cannot write JSON: {error}.")))?;
            output::print_json(&line)?;
        } else {
            output::print(&view::plain(&summary, &table, global.bytes))?;
        }
        if options.once {
            return Ok(());
        }
        before = now;
    }
}

/// Asks the server for samples of the views that come, until nobody takes them. So the keys work while the
/// server does not answer.
fn asking(mut admin: Admin, views: &Receiver<View>, samples: &Sender<(View, Result<Sample, Failure>)>) {
    while let Ok(view) = views.recv() {
        if samples.send((view, ask(&mut admin, view))).is_err() {
            return;
        }
    }
}

/// Shows it on the terminal until the user, a signal or an error ends it.
fn show(global: &Global, options: &Options, admin: Admin, interrupt: &Interrupt) -> Result<(), Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    // SIGHUP ends the process as it is: there is no terminal any more to be restored, and crossterm would
    // read its end again and again.
    signal_hook::flag::register(SIGTERM, Arc::clone(&stop))
        .map_err(|error| Failure::io("Cannot handle signals", &error))?;
    let (views, asked) = mpsc::channel();
    let (answers, samples) = mpsc::channel();
    std::thread::Builder::new()
        .name("raio-top".into())
        .spawn(move || asking(admin, &asked, &answers))
        .map_err(|error| Failure::io("Cannot start a thread", &error))?;
    // Restores the terminal in a panic, too.
    let mut terminal =
        ratatui::try_init().map_err(|error| Failure::io("Cannot set up the terminal", &error))?;
    let mut live = Live {
        screen: Screen {
            exact: global.bytes,
            has_colours: output::has_colours(),
            ..Screen::new(options.view, options.sort, options.interval)
        },
        now: None,
        before: None,
        lost_at: None,
        next_at: Instant::now(),
        is_asking: false,
    };
    let is_stopped = || stop.load(Ordering::Relaxed) || interrupt.check().is_err();
    let result = live.run(&mut terminal, &views, &samples, &is_stopped);
    let restored = ratatui::try_restore().map_err(|error| Failure::io("Cannot restore the terminal", &error));
    result.and(restored)
}

/// What is shown, and when the server is asked next.
struct Live {
    screen: Screen,
    now: Option<Sample>,
    before: Option<Sample>,
    lost_at: Option<Instant>,
    next_at: Instant,
    is_asking: bool,
}

impl Live {
    fn run(
        &mut self,
        terminal: &mut DefaultTerminal,
        views: &Sender<View>,
        samples: &Receiver<(View, Result<Sample, Failure>)>,
        is_stopped: &dyn Fn() -> bool,
    ) -> Result<(), Failure> {
        let failed = |error: io::Error| Failure::io("Cannot use the terminal", &error);
        while !is_stopped() {
            if !self.is_asking && !self.screen.is_paused && Instant::now() >= self.next_at {
                self.next_at = Instant::now() + Duration::from_secs_f64(self.screen.interval);
                self.is_asking = views.send(self.screen.view).is_ok();
            }
            terminal.draw(|frame| self.screen.draw(frame)).map_err(failed)?;
            if event::poll(KEY_CHECK_INTERVAL).map_err(failed)? {
                // A terminal of another size is drawn anew in any case.
                if let Event::Key(key) = event::read().map_err(failed)?
                    && key.kind == KeyEventKind::Press
                    && self.is_end(key)
                {
                    return Ok(());
                }
            }
            match samples.try_recv() {
                Ok((view, answer)) => self.answered(view, answer),
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => {
                    return Err(Failure::new("The thread that asks the server has ended."));
                }
            }
            self.screen.lost = match (self.screen.lost.take(), self.lost_at) {
                (Some((why, _)), Some(at)) => Some((why, at.elapsed().as_secs_f64())),
                _ => None,
            };
        }
        Ok(())
    }

    fn answered(&mut self, view: View, answer: Result<Sample, Failure>) {
        self.is_asking = false;
        match answer {
            // Another table was chosen since: that one is asked for now.
            Ok(_) | Err(_) if view != self.screen.view => self.next_at = Instant::now(),
            Ok(sample) => {
                self.before = self.now.replace(sample);
                self.lost_at = None;
                self.screen.lost = None;
                self.show();
            }
            Err(failure) => {
                self.lost_at.get_or_insert_with(Instant::now);
                self.screen.lost = Some((failure.to_string(), 0.0));
            }
        }
    }

    /// Makes what is shown anew.
    fn show(&mut self) {
        let Screen { view, sort, is_reversed, .. } = self.screen;
        if let Some(now) = &self.now {
            self.screen.shown = Some(shown(now, self.before.as_ref(), view, sort, is_reversed));
        }
        self.screen.first = self.screen.first.min(self.screen.row_count().saturating_sub(1));
    }

    /// Does what a key means. Returns whether that is the end.
    fn is_end(&mut self, key: KeyEvent) -> bool {
        let screen = &mut self.screen;
        match key.code {
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => return true,
            KeyCode::Char('q') | KeyCode::Esc => return true,
            KeyCode::Char(' ') => screen.is_paused = !screen.is_paused,
            KeyCode::Char('v') => screen.is_reversed = !screen.is_reversed,
            KeyCode::Char('+') => {
                screen.interval =
                    INTERVALS.into_iter().find(|&one| one > screen.interval).unwrap_or(screen.interval);
            }
            KeyCode::Char('-') => {
                let shorter = INTERVALS.into_iter().rev().find(|&one| one < screen.interval);
                screen.interval = shorter.unwrap_or(screen.interval);
                self.next_at = self.next_at.min(Instant::now() + Duration::from_secs_f64(screen.interval));
            }
            KeyCode::Down => screen.first += 1,
            KeyCode::Up => screen.first = screen.first.saturating_sub(1),
            KeyCode::PageDown => screen.first += 10,
            KeyCode::PageUp => screen.first = screen.first.saturating_sub(10),
            KeyCode::Home => screen.first = 0,
            KeyCode::Char(pressed) => {
                if let Some(view) = View::ALL.into_iter().find(|view| view.key() == pressed) {
                    screen.view = view;
                    screen.first = 0;
                    self.next_at = Instant::now();
                }
                if let Some(sort) = Sort::ALL.into_iter().find(|sort| sort.key() == pressed) {
                    screen.sort = Some(sort);
                }
            }
            _ => {}
        }
        self.show();
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live() -> Live {
        let [before, now] = model::tests::samples();
        Live {
            screen: Screen::new(View::Sessions, None, 1.0),
            now: Some(now),
            before: Some(before),
            lost_at: None,
            next_at: Instant::now(),
            is_asking: false,
        }
    }

    fn press(live: &mut Live, keys: &str) -> bool {
        keys.chars().any(|key| live.is_end(KeyCode::Char(key).into()))
    }

    #[test]
    fn no_key_means_two_things() {
        let mut keys: Vec<char> = "qv+- ".chars().collect();
        keys.extend(View::ALL.map(View::key));
        keys.extend(Sort::ALL.map(Sort::key));
        let all = keys.len();
        keys.sort_unstable();
        keys.dedup();
        assert_eq!(keys.len(), all);
    }

    #[test]
    fn keys_choose_the_table_the_order_and_the_interval() {
        let mut live = live();
        assert!(!press(&mut live, "wnv++"));
        let screen = &live.screen;
        assert_eq!((screen.view, screen.sort, screen.is_reversed), (View::Workers, Some(Sort::Name), true));
        assert_eq!(screen.interval, 5.0);
        assert!(!press(&mut live, "------"));
        assert_eq!(live.screen.interval, INTERVALS[0]);
        live.is_end(KeyCode::PageDown.into());
        assert_eq!(live.screen.first, 0, "there is one worker");
        assert!(press(&mut live, "q"));
        assert!(live.is_end(KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL)));
    }

    #[test]
    fn a_lost_server_is_noted_until_it_answers() {
        let mut live = live();
        live.answered(View::Sessions, Err(Failure::new("It has ended.")));
        assert_eq!(live.screen.lost.as_ref().unwrap().0, "It has ended.");
        let [_, sample] = model::tests::samples();
        live.answered(View::Sessions, Ok(sample));
        assert!(live.screen.lost.is_none() && live.lost_at.is_none());
    }

    #[test]
    fn intervals_have_limits() {
        assert_eq!(interval("0.2"), Ok(0.2));
        for text in ["0", "-1", "nan", "61", "x"] {
            assert!(interval(text).is_err(), "{text}");
        }
    }
}
