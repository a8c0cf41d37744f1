//! A message of the log, and how each format shows it.
//!
//! Names of clients and files are quoted in messages, and may be anything: in no format does one of them look
//! like another message or field, or steer a terminal.

use std::fmt::{self, Write};

use jiff::Timestamp;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;
use tracing::field::{Field, Visit};
use tracing::{Event, Level};

use crate::journald::Datagram;
use crate::tuning::log::{FIELD_BYTES_MAX, MESSAGE_BYTES_MAX};

/// The target of messages that people see as they are: answers to the command line.
pub const PLAIN: &str = "plain";

/// What was logged.
#[derive(Debug)]
pub struct Entry {
    time: Timestamp,
    level: Level,
    /// What kind of message it is: docs/MESSAGES.md lists them. None: it is for developers.
    id: Option<&'static str>,
    is_plain: bool,
    message: String,
    fields: Vec<(&'static str, Value)>,
}

/// How people see it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Look {
    /// The time of the day is enough: somebody watches.
    pub is_short: bool,
    /// The terminal has colours.
    pub has_colour: bool,
}

impl Entry {
    /// A message without fields that people see as it is.
    pub fn plain(level: Level, id: &'static str, message: &str) -> Self {
        let message = cut(message, MESSAGE_BYTES_MAX);
        Self { time: Timestamp::now(), level, id: Some(id), is_plain: true, message, fields: Vec::new() }
    }

    /// What an event says.
    pub fn of(event: &Event<'_>) -> Self {
        let metadata = event.metadata();
        let mut entry = Self {
            time: Timestamp::now(),
            level: *metadata.level(),
            // tracing names those that have no name "event FILE:LINE".
            id: Some(metadata.name()).filter(|name| !name.contains(' ')),
            is_plain: metadata.target() == PLAIN,
            message: String::new(),
            fields: Vec::new(),
        };
        event.record(&mut entry);
        entry
    }

    /// For people: a line with the newline.
    pub fn human(&self, look: Look) -> String {
        if self.is_plain {
            return format!("raio_server: {}\n", one_line(&self.message));
        }
        let [dim, colour, plain] = match look.has_colour {
            true => ["\x1b[2m", colour(self.level), "\x1b[0m"],
            false => [""; 3],
        };
        let time = if look.is_short { self.time.strftime("%H:%M:%SZ") } else { self.time.strftime(RFC_3339) };
        let mut line = format!("{dim}{time}{plain} {colour}{:>5}{plain} ", self.level.as_str());
        self.write_text(&mut line, dim, plain);
        line.push('\n');
        line
    }

    /// For a standard error that goes to the journal: the priority in front, and no time.
    pub fn prefixed(&self) -> String {
        let mut line = format!("<{}>", priority(self.level));
        self.write_text(&mut line, "", "");
        line.push('\n');
        line
    }

    /// For programs: an object in a line.
    pub fn json(&self) -> String {
        let mut line = String::new();
        // Numbers and texts can always be written.
        for char in serde_json::to_string(self).unwrap_or_default().chars() {
            if is_odd(char) {
                // Not ASCII, so it is within a string.
                for unit in char.encode_utf16(&mut [0; 2]) {
                    let _ = write!(line, "\\u{unit:04x}");
                }
            } else {
                line.push(char);
            }
        }
        line.push('\n');
        line
    }

    /// For journald: the text that people see, and all fields by themselves.
    pub fn journald(&self) -> Vec<u8> {
        let mut text = String::new();
        self.write_text(&mut text, "", "");
        let mut datagram = Datagram::new(priority(self.level));
        datagram.push("MESSAGE", text.as_bytes());
        if let Some(id) = self.id {
            datagram.push("MESSAGE_ID", message_id(id).as_bytes());
            datagram.push("RAIO_ID", id.as_bytes());
        }
        for (name, value) in &self.fields {
            let name = format!("RAIO_{}", name.to_uppercase().replace('.', "_"));
            match value {
                Value::String(text) => datagram.push(&name, text.as_bytes()),
                value => datagram.push(&name, value.to_string().as_bytes()),
            }
        }
        datagram.0
    }

    /// Message, fields and id, with what dims the latter.
    fn write_text(&self, line: &mut String, dim: &str, plain: &str) {
        line.push_str(&one_line(&self.message));
        for (name, value) in &self.fields {
            let _ = match value {
                Value::String(text) if needs_quotes(text) => {
                    write!(line, " {dim}{name}={plain}{}", one_line(&format!("{text:?}")))
                }
                Value::String(text) => write!(line, " {dim}{name}={plain}{text}"),
                value => write!(line, " {dim}{name}={plain}{value}"),
            };
        }
        if let Some(id) = self.id.filter(|_| !self.is_plain) {
            let _ = write!(line, " {dim}[{id}]{plain}");
        }
    }

    fn push(&mut self, field: &Field, value: Value) {
        self.fields.push((field.name(), value));
    }
}

const RFC_3339: &str = "%Y-%m-%dT%H:%M:%S.%6fZ";

impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("time", &self.time.strftime(RFC_3339).to_string())?;
        map.serialize_entry("level", &self.level.as_str().to_lowercase())?;
        if let Some(id) = self.id {
            map.serialize_entry("id", id)?;
        }
        map.serialize_entry("message", &self.message)?;
        for (name, value) in &self.fields {
            map.serialize_entry(name, value)?;
        }
        map.end()
    }
}

impl Visit for Entry {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let text = format!("{value:?}");
        if field.name() == "message" {
            self.message = cut(&text, MESSAGE_BYTES_MAX);
        } else {
            self.push(field, Value::String(cut(&text, FIELD_BYTES_MAX)));
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            self.message = cut(value, MESSAGE_BYTES_MAX);
        } else {
            self.push(field, Value::String(cut(value, FIELD_BYTES_MAX)));
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.push(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.push(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.push(field, value.into());
    }
}

/// The priorities of syslog(3).
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

fn colour(level: Level) -> &'static str {
    match level {
        Level::ERROR => "\x1b[31m",
        Level::WARN => "\x1b[33m",
        Level::INFO => "\x1b[32m",
        Level::DEBUG | Level::TRACE => "\x1b[34m",
    }
}

/// What journald calls a kind of message: 128 bits that nobody else uses, and that stay the same. By them it
/// finds the explanation in systemd/raio.catalog.
fn message_id(id: &str) -> String {
    let hash = blake3::hash(format!("raio_server message {id}").as_bytes());
    hash.to_hex()[..32].to_owned()
}

/// Beside the control characters: line and paragraph separators, and what turns the direction of text.
fn is_odd(char: char) -> bool {
    let is_unseen = matches!(
        char,
        '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}'
    );
    char.is_control() || is_unseen
}

fn needs_quotes(text: &str) -> bool {
    text.is_empty() || text.chars().any(|char| char.is_whitespace() || is_odd(char) || "\"=\\".contains(char))
}

/// A text in which nothing steers a terminal or looks like another line.
fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for char in text.chars() {
        if is_odd(char) {
            line.extend(char.escape_default());
        } else {
            line.push(char);
        }
    }
    line
}

/// The front of a text: as much of it as takes about this many bytes in any format.
fn cut(text: &str, bytes_max: usize) -> String {
    let mut taken = 0;
    for (at, char) in text.char_indices() {
        taken += if is_odd(char) { "\\u{2028}".len() } else { char.len_utf8() };
        if taken > bytes_max {
            return format!("{}...", &text[..at]);
        }
    }
    text.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(message: &str, fields: &[(&'static str, Value)]) -> Entry {
        Entry {
            time: "2026-11-30T15:04:05.25Z".parse().unwrap(),
            level: Level::INFO,
            id: Some("session-began"),
            is_plain: false,
            message: message.to_owned(),
            fields: fields.to_vec(),
        }
    }

    #[test]
    fn each_format_has_all_that_is_known() {
        let entry = entry(
            "A session has begun.",
            &[("peer", "127.0.0.1:7".into()), ("name", "my fio".into()), ("worker", 3.into())],
        );
        let fields = "peer=127.0.0.1:7 name=\"my fio\" worker=3 [session-began]";
        assert_eq!(
            entry.human(Look::default()),
            format!("2026-11-30T15:04:05.250000Z  INFO A session has begun. {fields}\n")
        );
        assert_eq!(
            entry.human(Look { is_short: true, has_colour: false }),
            format!("15:04:05Z  INFO A session has begun. {fields}\n")
        );
        assert_eq!(entry.prefixed(), format!("<6>A session has begun. {fields}\n"));
        assert_eq!(
            entry.json(),
            "{\"time\":\"2026-11-30T15:04:05.250000Z\",\"level\":\"info\",\"id\":\"session-began\",\
             \"message\":\"A session has begun.\",\"peer\":\"127.0.0.1:7\",\"name\":\"my fio\",\
             \"worker\":3}\n"
        );
        let id = message_id("session-began");
        assert_eq!(
            String::from_utf8(entry.journald()).unwrap(),
            format!(
                "PRIORITY=6\nSYSLOG_IDENTIFIER=raio_server\nMESSAGE=A session has begun. {fields}\n\
                 MESSAGE_ID={id}\nRAIO_ID=session-began\nRAIO_PEER=127.0.0.1:7\nRAIO_NAME=my fio\n\
                 RAIO_WORKER=3\n"
            )
        );
        assert!(id.len() == 32 && id.chars().all(|c| c.is_ascii_hexdigit()), "{id}");
        let catalog = include_str!("../../../systemd/raio.catalog");
        assert!(catalog.contains(&format!("-- {id}\nSubject: session-began\n")), "another id");
    }

    #[test]
    fn colours_are_around_what_is_logged_and_not_in_it() {
        let line =
            entry("\u{1b}[31mred", &[("name", "x".into())]).human(Look { is_short: true, has_colour: true });
        assert_eq!(
            line,
            "\u{1b}[2m15:04:05Z\u{1b}[0m \u{1b}[32m INFO\u{1b}[0m \\u{1b}[31mred \u{1b}[2mname=\u{1b}[0mx \
             \u{1b}[2m[session-began]\u{1b}[0m\n"
        );
    }

    #[test]
    fn nothing_in_an_entry_steers_a_terminal_or_makes_another_line_or_field() {
        let evil = "a\nb\r\u{1b}[2J\u{9b}\u{202e}c\t\" x=1\\";
        let entry = entry(evil, &[("name", evil.into())]);
        let escaped = "a\\nb\\r\\u{1b}[2J\\u{9b}\\u{202e}c\\t";
        let text = format!("{escaped}\" x=1\\ name=\"{escaped}\\\" x=1\\\\\" [session-began]\n");
        assert_eq!(entry.prefixed(), format!("<6>{text}"));
        assert!(entry.human(Look::default()).ends_with(&format!(" INFO {text}")));
        let json = entry.json();
        assert!(json.trim_end().chars().all(|char| !is_odd(char)), "{json:?}");
        let object: Value = serde_json::from_str(&json).unwrap();
        assert_eq!((object["message"].as_str(), object["name"].as_str()), (Some(evil), Some(evil)));
        // Its length is in front of it, so that it is one field, which has all that it had.
        let journald = entry.journald();
        let field =
            [b"\nRAIO_NAME\n", &(evil.len() as u64).to_le_bytes()[..], evil.as_bytes(), b"\n"].concat();
        assert!(journald.ends_with(&field), "{}", String::from_utf8_lossy(&journald));
        let plain = Entry::plain(Level::ERROR, "failed", "a\nb");
        assert_eq!(plain.human(Look { is_short: true, has_colour: true }), "raio_server: a\\nb\n");
        assert_eq!(plain.prefixed(), "<3>a\\nb\n");
    }

    #[test]
    fn what_is_long_is_cut_in_every_format() {
        let long = "\u{2028}x".repeat(100_000);
        let fields = [("a", cut(&long, FIELD_BYTES_MAX).into()), ("b", cut(&long, FIELD_BYTES_MAX).into())];
        let entry = entry(&cut(&long, MESSAGE_BYTES_MAX), &fields);
        let lens = [entry.human(Look::default()).len(), entry.json().len(), entry.journald().len()];
        let most = MESSAGE_BYTES_MAX + 2 * FIELD_BYTES_MAX;
        // journald has fields twice: in the text, and by themselves.
        assert!(lens.iter().all(|&len| len > 1000 && len < most * 2), "{lens:?}");
        assert!(lens[0] < most + 200, "{lens:?}");
        assert_eq!(cut("äöü", 4), "äö...");
        assert_eq!(cut("äöü", 6), "äöü");
    }
}
