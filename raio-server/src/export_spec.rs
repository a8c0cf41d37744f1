//! Exports as the configuration names them: `--export NAME=PATH[,ro|,rw][,direct]`, or a table
//! `[export.NAME]` of the file.
//!
//! What follows the first comma of the short form are options, so a path that holds a comma needs a table.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{Deserializer, Error, MapAccess, SeqAccess, Visitor};

use crate::size::Size;
use crate::throttle::Rates;

/// An export as the configuration names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportSpec {
    /// The first component of clients' paths.
    pub name: String,
    /// What is served.
    pub source: Source,
    /// Clients may write.
    pub is_writable: bool,
    /// Files are opened with O_DIRECT, whatever the client asks for.
    pub is_direct: bool,
    /// Nothing is served while the path is not a mount point.
    pub must_be_mountpoint: bool,
    /// Block device nodes beneath the directory are served too.
    pub has_devices: bool,
    /// Clients may make the file longer: of an export of one regular file.
    pub may_grow: bool,
    /// Clients may make no file longer than this many bytes: of a directory.
    pub file_bytes_max: Option<u64>,
    /// File systems that are mounted beneath the directory are served too.
    pub crosses_mounts: bool,
    /// What all clients may have of it together.
    pub rates: Rates,
}

/// What an export serves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// A directory, a regular file or a block device.
    Path(PathBuf),
    /// Zeros, this many bytes; what is written is lost.
    Null(u64),
    /// Memory, this many bytes.
    Memory(u64),
}

impl ExportSpec {
    fn new(name: String, source: Source) -> Self {
        Self {
            name,
            source,
            is_writable: false,
            is_direct: false,
            must_be_mountpoint: false,
            has_devices: false,
            may_grow: false,
            file_bytes_max: None,
            crosses_mounts: false,
            rates: Rates::NONE,
        }
    }
}

fn check_name(name: &str) -> Result<(), String> {
    let is_wrong = name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0']);
    if is_wrong {
        return Err(format!("{name:?} cannot name an export, for clients open /NAME. Choose a plain word."));
    }
    Ok(())
}

/// The size of a source that has one.
fn size_of(size: Size) -> Result<u64, String> {
    if size.0 == 0 {
        return Err("The size is 0. Give the number of bytes that clients see, such as 1G.".into());
    }
    Ok(size.0)
}

// The short form
// -------------------------------------------------------------------------------------------------------

/// If `path` ends like an option that was not put behind a comma: what it should have been.
fn misplaced_option(path: &str) -> Option<String> {
    let (at, separator) = path.char_indices().rfind(|(_, c)| !c.is_ascii_alphanumeric())?;
    let (front, option) = (&path[..at], path[at + separator.len_utf8()..].to_ascii_lowercase());
    ([' ', '\t', ':', ';', '+'].contains(&separator) && ["ro", "rw", "direct"].contains(&&*option))
        .then(|| format!("{},{option}", front.trim_end()))
}

impl FromStr for ExportSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORM: &str = "Write NAME=PATH[,ro|,rw][,direct], NAME=null:SIZE or NAME=mem:SIZE[,rw].";
        let Some((name, rest)) = text.split_once('=') else {
            return Err(format!("There is no `=` between a name and a path. {FORM}"));
        };
        check_name(name)?;
        let mut parts = rest.split(',');
        let source = parts.next().unwrap_or_default();
        let size = |text: &str| size_of(text.parse::<Size>()?);
        let mut spec = Self::new(
            name.to_owned(),
            if let Some(text) = source.strip_prefix("null:") {
                Source::Null(size(text)?)
            } else if let Some(text) = source.strip_prefix("mem:") {
                Source::Memory(size(text)?)
            } else if source.is_empty() {
                return Err(format!("There is no path. {FORM}"));
            } else {
                Source::Path(source.into())
            },
        );
        if let Some(meant) = misplaced_option(source) {
            return Err(format!(
                "Options follow a comma: write {name}={meant}. If the path ends like that, name it in an \
                 [export.{name}] \
                 table of the configuration file."
            ));
        }
        let mut is_read_only = false;
        for option in parts {
            match option {
                "ro" => is_read_only = true,
                "rw" => spec.is_writable = true,
                "direct" => spec.is_direct = true,
                _ => {
                    let lower = option.trim().to_ascii_lowercase();
                    let remedy = match lower.as_str() {
                        "ro" | "rw" | "direct" => format!("Write `,{lower}`."),
                        "mountpoint" | "devices" | "grow" | "cross-mounts" => format!(
                            "Write `{lower} = true` in an [export.{name}] table of the configuration file."
                        ),
                        _ => format!(
                            "The options are ro, rw and direct. There are more, and paths with commas, in \
                             [export.{name}] tables \
                             of the configuration file."
                        ),
                    };
                    return Err(format!("There is no option {option:?}. {remedy}"));
                }
            }
        }
        if is_read_only && spec.is_writable {
            return Err("An export is either ro or rw. Give one of them.".into());
        }
        spec.checked()
    }
}

impl ExportSpec {
    /// Rejects what makes no sense together.
    fn checked(self) -> Result<Self, String> {
        let for_paths = [
            ("direct", self.is_direct),
            ("mountpoint", self.must_be_mountpoint),
            ("devices", self.has_devices),
            ("grow", self.may_grow),
            ("max-file-size", self.file_bytes_max.is_some()),
            ("cross-mounts", self.crosses_mounts),
        ];
        if !matches!(self.source, Source::Path(_))
            && let Some((option, _)) = for_paths.iter().find(|(_, is_given)| *is_given)
        {
            return Err(format!(
                "`{option}` means nothing for memory, which has no file system. Leave it out."
            ));
        }
        Ok(self)
    }
}

// The long form
// --------------------------------------------------------------------------------------------------------

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Table {
    path: Option<PathBuf>,
    null: Option<Size>,
    memory: Option<Size>,
    access: Option<Access>,
    #[serde(default)]
    direct: bool,
    #[serde(default)]
    mountpoint: bool,
    #[serde(default)]
    devices: bool,
    #[serde(default)]
    grow: bool,
    max_file_size: Option<Size>,
    #[serde(default)]
    cross_mounts: bool,
    iops: Option<u64>,
    bandwidth: Option<Size>,
    burst: Option<f64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Access {
    Ro,
    Rw,
}

/// An export whose name is yet to come.
#[derive(Deserialize)]
#[serde(try_from = "Table")]
struct Nameless(ExportSpec);

impl TryFrom<Table> for Nameless {
    type Error = String;

    fn try_from(table: Table) -> Result<Self, String> {
        let source = match (table.path, table.null, table.memory) {
            (Some(path), None, None) if path.as_os_str().is_empty() => {
                return Err("`path` is empty. Name a directory, a regular file or a block device.".into());
            }
            (Some(path), None, None) => Source::Path(path),
            (None, Some(size), None) => Source::Null(size_of(size)?),
            (None, None, Some(size)) => Source::Memory(size_of(size)?),
            _ => {
                return Err(
                    "An export has one source. Give one of `path = \"/PATH\"`, `null = \"SIZE\"` and \
                            `memory = \"SIZE\"`."
                        .into(),
                );
            }
        };
        let spec = ExportSpec {
            is_writable: table.access == Some(Access::Rw),
            is_direct: table.direct,
            must_be_mountpoint: table.mountpoint,
            has_devices: table.devices,
            may_grow: table.grow,
            file_bytes_max: table.max_file_size.map(|size| size.0),
            crosses_mounts: table.cross_mounts,
            rates: Rates::new(table.iops, table.bandwidth, table.burst)?,
            ..ExportSpec::new(String::new(), source)
        };
        spec.checked().map(Self)
    }
}

/// A table's name.
#[derive(Deserialize)]
#[serde(try_from = "String")]
struct Name(String);

impl TryFrom<String> for Name {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        check_name(&name).map(|()| Self(name))
    }
}

/// What the file says under `export`: tables, or a list of texts in the short form.
pub fn from_file<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<ExportSpec>, D::Error> {
    deserializer.deserialize_any(FromFile)
}

struct FromFile;

impl<'de> Visitor<'de> for FromFile {
    type Value = Vec<ExportSpec>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("tables [export.NAME], or a list of \"NAME=PATH[,ro|,rw][,direct]\"")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut specs = Vec::new();
        while let Some(Name(name)) = map.next_key()? {
            let Nameless(spec) = map.next_value()?;
            specs.push(ExportSpec { name, ..spec });
        }
        Ok(specs)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut specs = Vec::new();
        while let Some(text) = list.next_element::<String>()? {
            specs.push(text.parse().map_err(|error| A::Error::custom(format!("{text}: {error}")))?);
        }
        Ok(specs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(text: &str) -> ExportSpec {
        ExportSpec::new("a".into(), Source::Path(text.into()))
    }

    #[test]
    fn the_short_form_parses() {
        let spec = |text: &str| text.parse::<ExportSpec>().unwrap();
        assert_eq!(spec("a=/x"), path("/x"));
        assert_eq!(spec("a=/x,ro"), path("/x"));
        assert_eq!(spec("a=/x,rw"), ExportSpec { is_writable: true, ..path("/x") });
        assert_eq!(
            spec("a=/x=y,direct,rw"),
            ExportSpec { is_writable: true, is_direct: true, ..path("/x=y") }
        );
        assert_eq!(spec("n=null:1G").source, Source::Null(1 << 30));
        assert_eq!(spec("m=mem:64k,rw").source, Source::Memory(64 << 10));
        for right in ["a=/x y", "a=/my/rw", "a=/x-rw", "a=/x.ro", "a=/Müller", "a=/ärw"] {
            assert_eq!(spec(right).source, Source::Path(right[2..].into()));
        }
    }

    #[test]
    fn each_mistake_in_the_short_form_names_the_right_form() {
        for (text, needle) in [
            ("", "NAME=PATH"),
            ("a", "NAME=PATH"),
            ("/x rw", "NAME=PATH"),
            ("=/x", "cannot name an export"),
            ("a/b=/x", "cannot name an export"),
            ("..=/x", "cannot name an export"),
            ("a=", "There is no path"),
            ("a=,rw", "There is no path"),
            ("a=null:", "not a size"),
            ("a=mem:0", "The size is 0"),
            ("a=mem:1M,direct", "`direct` means nothing"),
            ("a=/x,RW", "\"RW\". Write `,rw`"),
            ("a=/x, rw", "\" rw\". Write `,rw`"),
            ("a=/x,sync", "\"sync\". The options are ro, rw and direct"),
            ("a=/x,", "\"\". The options are"),
            ("a=/x,grow", "`grow = true` in an [export.a] table"),
            ("a=/x rw", "write a=/x,rw"),
            ("a=/x:RW", "write a=/x,rw"),
            ("a=null:1M ro", "not a size"),
            ("a=/x,ro,rw", "either ro or rw"),
        ] {
            let error = text.parse::<ExportSpec>().unwrap_err();
            assert!(error.contains(needle) && error.ends_with('.'), "{text}: {error}");
        }
    }
}
