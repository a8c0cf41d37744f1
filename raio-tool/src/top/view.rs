//! How it looks: on a terminal, and as plain text.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Modifier, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::model::{Sort, Summary, Table, View, age, number, throughput, time};
use crate::output;

/// Columns of text that is longer are cut.
const TEXT_COLUMNS_MAX: usize = 40;
/// Of what is stalled, on a terminal.
const STALLED_LINES_MAX: usize = 3;

/// What is on the screen.
#[derive(Debug)]
pub struct Screen {
    /// Of the latest sample; None: there was none.
    pub shown: Option<(Summary, Table)>,
    pub view: View,
    /// None: what the view is looked at for.
    pub sort: Option<Sort>,
    pub is_reversed: bool,
    pub is_paused: bool,
    pub interval: f64,
    /// Why the server cannot be asked, and since when, in seconds.
    pub lost: Option<(String, f64)>,
    /// The first row that is shown.
    pub first: usize,
    pub exact: bool,
    pub has_colours: bool,
}

/// The lines about the whole server.
pub fn header(summary: &Summary, exact: bool) -> Vec<String> {
    let rate = |value: Option<f64>| value.map_or_else(|| "-".into(), number);
    let bytes = |value: Option<f64>| value.map_or_else(|| "-".into(), |rate| throughput(rate, exact));
    let us = |value: Option<f64>| value.map_or_else(|| "-".into(), time);
    let Summary { phase, sessions, connections, open_files, in_flight, version, backend, .. } = summary;
    let up = age(summary.uptime_seconds);
    let lines = [
        format!("{phase} for {up}, raio_server {version}, {backend}"),
        format!(
            "{sessions} sessions, {connections} connections, {open_files} open files, {in_flight} in flight, \
             {} errors/s",
            rate(summary.errors_per_second)
        ),
        format!(
            "read  {:>6}/s {:>12}  p50 {:>8}  p99 {:>8}",
            rate(summary.reads_per_second),
            bytes(summary.read_bytes_per_second),
            us(summary.read_p50_us),
            us(summary.read_p99_us)
        ),
        format!(
            "write {:>6}/s {:>12}  p50 {:>8}  p99 {:>8}",
            rate(summary.writes_per_second),
            bytes(summary.written_bytes_per_second),
            us(summary.write_p50_us),
            us(summary.write_p99_us)
        ),
    ];
    lines.map(|line| output::visible(line.as_bytes())).into()
}

/// The lines of a table that is so wide at most: titles, and rows with whether something is wrong. Columns
/// for which there is no room are left out, the last ones first.
fn lines(table: &Table, columns_max: usize, exact: bool) -> (String, Vec<(String, bool)>) {
    let titles = table.titles();
    let rows: Vec<Vec<String>> = table
        .rows
        .iter()
        .map(|row| row.cells.iter().map(|cell| cut(&cell.text(exact), TEXT_COLUMNS_MAX)).collect())
        .collect();
    let is_text: Vec<bool> = match table.rows.first() {
        Some(row) => row.cells.iter().map(super::model::Cell::is_text).collect(),
        None => vec![true; titles.len()],
    };
    let is_last = |at: usize| at + 1 == titles.len();
    let width = |at: usize| {
        let longest = rows.iter().map(|row| row[at].chars().count()).max().unwrap_or(0);
        longest.max(titles[at].len())
    };
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let mut shown = titles.len();
    let needed = |shown: usize| widths[..shown].iter().sum::<usize>() + 2 * shown.saturating_sub(1);
    while shown > 1 && needed(shown) > columns_max {
        shown -= 1;
    }
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut line = String::new();
        for (at, cell) in cells.take(shown).enumerate() {
            let width = widths[at];
            line += &if is_text[at] { format!("{cell:<width$}") } else { format!("{cell:>width$}") };
            if !is_last(at) {
                line += "  ";
            }
        }
        cut(line.trim_end(), columns_max)
    };
    let head = line(&mut titles.iter().copied());
    let rows = rows.iter().zip(&table.rows);
    let rows = rows.map(|(cells, row)| (line(&mut cells.iter().map(String::as_str)), row.is_bad)).collect();
    (head, rows)
}

/// At most so many characters.
fn cut(text: &str, most: usize) -> String {
    if text.chars().count() <= most {
        return text.to_owned();
    }
    let mut text: String = text.chars().take(most.saturating_sub(1)).collect();
    if most > 0 {
        text.push('~');
    }
    text
}

/// Everything as plain text, for pipes.
pub fn plain(summary: &Summary, table: &Table, exact: bool) -> String {
    let mut all = header(summary, exact);
    all.extend(summary.stalled.iter().map(|why| format!("stalled: {why}")));
    all.push(String::new());
    let (head, rows) = lines(table, usize::MAX, exact);
    all.push(head);
    all.extend(rows.into_iter().map(|(row, _)| row));
    all.join("\n") + "\n"
}

impl Screen {
    /// One of which nothing is shown yet.
    pub fn new(view: View, sort: Option<Sort>, interval: f64) -> Self {
        Self {
            shown: None,
            view,
            sort,
            is_reversed: false,
            is_paused: false,
            interval,
            lost: None,
            first: 0,
            exact: false,
            has_colours: false,
        }
    }

    /// How many rows of the table there are.
    pub fn row_count(&self) -> usize {
        self.shown.as_ref().map_or(0, |(_, table)| table.rows.len())
    }

    fn style(&self, style: Style) -> Style {
        if self.has_colours { style } else { Style { fg: None, bg: None, ..style } }
    }

    /// Draws it. On a terminal that is too small what is below is not seen.
    pub fn draw(&self, frame: &mut Frame<'_>) {
        let top = self.top_lines(frame.area().width.into());
        let areas = Layout::vertical([
            Constraint::Length(top.len() as u16),
            Constraint::Min(0),
            Constraint::Length(1),
        ]);
        let [head, body, foot] = areas.areas(frame.area());
        frame.render_widget(Paragraph::new(top), head);
        frame.render_widget(Paragraph::new(self.table_lines(body)), body);
        let keys = Sort::ALL.map(|sort| format!("{} {}", sort.key(), sort.title())).join("  ");
        let pause = if self.is_paused { "space go on" } else { "space pause" };
        let keys = format!("q quit  {pause}  +/- every {} s  sort: {keys}  v reverse", self.interval);
        frame.render_widget(Paragraph::new(keys).dim(), foot);
    }

    fn top_lines(&self, columns: usize) -> Vec<Line<'static>> {
        let bad = self.style(Style::new().red()).add_modifier(Modifier::BOLD);
        let mut lines = Vec::new();
        match &self.lost {
            Some((why, seconds)) => {
                let text = format!("No connection for {}, trying again. {why}", age(*seconds));
                lines.push(Line::styled(text, bad));
            }
            None if self.is_paused => lines.push(Line::styled("Paused", Modifier::BOLD)),
            None => lines.push(Line::raw("")),
        }
        let Some((summary, _)) = &self.shown else {
            lines.push(Line::raw("Waiting for the server"));
            return lines;
        };
        lines.extend(header(summary, self.exact).into_iter().map(Line::raw));
        let stalled = &summary.stalled;
        for why in stalled.iter().take(STALLED_LINES_MAX) {
            lines.push(Line::styled(cut(&format!("STALLED: {why}"), columns), bad));
        }
        if let Some(more) = stalled.len().checked_sub(STALLED_LINES_MAX).filter(|&more| more > 0) {
            lines.push(Line::styled(format!("STALLED: and {more} more"), bad));
        }
        lines.push(Line::raw(""));
        let tabs = View::ALL.into_iter().flat_map(|view| {
            let style =
                if view == self.view { Style::new().add_modifier(Modifier::REVERSED) } else { Style::new() };
            [Span::styled(format!(" {} {} ", view.key(), view.title()), style), Span::raw(" ")]
        });
        lines.push(Line::from_iter(tabs));
        lines
    }

    fn table_lines(&self, area: Rect) -> Vec<Line<'static>> {
        let Some((_, table)) = &self.shown else { return Vec::new() };
        let (head, rows) = lines(table, area.width.into(), self.exact);
        if rows.is_empty() {
            return vec![Line::raw(format!("no {}", table.view.title()))];
        }
        let bad = self.style(Style::new().red()).add_modifier(Modifier::BOLD);
        let room = usize::from(area.height).saturating_sub(1);
        let title = Line::styled(head, Modifier::UNDERLINED);
        let rows = rows.into_iter().skip(self.first).take(room);
        let rows = rows.map(|(row, is_bad)| if is_bad { Line::styled(row, bad) } else { Line::raw(row) });
        std::iter::once(title).chain(rows).collect()
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::model::Pair;
    use super::super::model::tests::samples;
    use super::*;

    fn screen(view: View) -> Screen {
        let [before, now] = samples();
        let pair = Pair::new(&now, Some(&before));
        let shown = Some((pair.summary(), pair.table(view)));
        Screen { shown, has_colours: true, ..Screen::new(view, None, 1.0) }
    }

    /// What is on a terminal of this size, a line each.
    fn drawn(screen: &Screen, columns: u16, lines: u16) -> Vec<String> {
        let mut terminal = Terminal::new(TestBackend::new(columns, lines)).unwrap();
        terminal.draw(|frame| screen.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer();
        let line =
            |y| (0..columns).map(|x| buffer[(x, y)].symbol()).collect::<String>().trim_end().to_owned();
        (0..lines).map(line).collect()
    }

    #[test]
    fn the_whole_server_is_above_and_the_table_below() {
        let lines = drawn(&screen(View::Sessions), 100, 20);
        let text = lines.join("\n");
        assert!(text.contains("serving for 1m 41s, raio_server 0.2.0, uring"), "{text}");
        assert!(text.contains("read    1000/s    3.9 MiB/s  p50   200 us  p99   200 us"), "{text}");
        assert!(text.contains("STALLED: lane data/sync for 48s"), "{text}");
        assert!(text.contains(" s sessions   e exports   w workers   d disks   l slow requests"), "{text}");
        let row = lines.iter().find(|line| line.starts_with("quick")).expect("a session");
        assert!(row.contains("1000  3.9 MiB/s") && row.contains("rdma x 2"), "{text}");
        assert!(lines[19].starts_with("q quit  space pause"), "{text}");
    }

    #[test]
    fn a_narrow_terminal_has_the_first_columns_and_a_tiny_one_whatever_fits() {
        let text = drawn(&screen(View::Sessions), 40, 16).join("\n");
        assert!(text.contains("session     req/s       read  written\n"), "{text}");
        assert!(!text.contains("latency"), "{text}");
        for view in View::ALL {
            for (columns, lines) in [(1, 1), (2, 2), (5, 3), (10, 8), (300, 2)] {
                assert_eq!(drawn(&screen(view), columns, lines).len(), usize::from(lines));
            }
        }
    }

    #[test]
    fn a_server_that_is_gone_is_said_to_be_and_the_last_numbers_stay() {
        let mut screen = screen(View::Workers);
        screen.lost = Some(("It has ended.".into(), 61.0));
        let text = drawn(&screen, 80, 20).join("\n");
        assert!(text.contains("No connection for 1m 01s, trying again. It has ended."), "{text}");
        assert!(text.contains("stuck 2.3 s"), "{text}");
        screen.shown = None;
        assert!(drawn(&screen, 80, 20).join("\n").contains("Waiting for the server"));
    }

    #[test]
    fn plain_text_has_every_column_and_no_escapes() {
        let Screen { shown: Some((summary, table)), .. } = screen(View::Sessions) else { unreachable!() };
        let text = plain(&summary, &table, true);
        assert!(text.contains("4096000/s") && text.contains("peer") && !text.contains('\x1b'), "{text}");
        assert_eq!(text.lines().filter(|line| line.starts_with("stalled: ")).count(), 1);
    }

    #[test]
    fn long_names_are_cut() {
        assert_eq!([cut("abc", 3), cut("abcd", 3), cut("ä", 0)], ["abc", "ab~", ""]);
    }
}
