//! Write verifiers: numbers by which clients learn that writes may have been lost which were acknowledged and
//! not yet followed by an fsync.
//!
//! An export has a random number, which changes when the storage says that it has lost writes. What clients
//! get is that number mixed with what the storage of a file is: the boot, the mount, the device
//! ([`crate::file_identity::Facts::storage`]). So a reboot, a remount and another disk change a verifier
//! without anybody having to notice. The number is kept in the state directory, so that a restart of the
//! process alone does not change it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Context, anyhow};
use raio_transport::random::{self, mix, successor};
use raio_transport::sync::lock;

use crate::state_directory::StateDirectory;

const HEADING: &str = "raio write verifier, version 1";

/// The number of an export.
#[derive(Debug)]
pub struct Verifier {
    value: AtomicU64,
    kept: Mutex<Option<Kept>>,
}

/// Where it is kept, and what is there.
#[derive(Debug)]
struct Kept {
    directory: Arc<StateDirectory>,
    name: String,
    /// For people.
    about: String,
    boot: String,
    value: Option<u64>,
}

/// The verifier of one file.
#[derive(Clone, Debug)]
pub struct FileVerifier {
    export: Arc<Verifier>,
    storage: u64,
}

impl Default for Verifier {
    /// A random one, which is kept nowhere.
    fn default() -> Self {
        Self { value: AtomicU64::new(random::number()), kept: Mutex::new(None) }
    }
}

impl Verifier {
    /// Takes on the number that a file of the state directory has, or writes it there. No other process may
    /// use the file. `about` tells people what it is of.
    pub fn keep(
        &self,
        directory: &Arc<StateDirectory>,
        name: &str,
        about: &str,
        boot: &str,
    ) -> anyhow::Result<()> {
        let value = match directory.read(name)? {
            Some(text) => Some(parse(&text).with_context(|| {
                let path = directory.path(name);
                format!(
                    "{} is no file of a write verifier as this version writes it. Remove it: the next fsync \
                     of each client that has written will fail once",
                    path.display()
                )
            })?),
            None => None,
        };
        // Writes of before the boot are another matter: see `of`.
        if let Some((_, value)) = value {
            self.value.store(value, Ordering::SeqCst);
        }
        *lock(&self.kept) = Some(Kept {
            directory: Arc::clone(directory),
            name: name.to_owned(),
            about: about.to_owned(),
            boot: boot.to_owned(),
            value: value.filter(|(of_boot, _)| of_boot == boot).map(|(_, value)| value),
        });
        if let Err(error) = self.save() {
            // What is there, if anything, is of before: the next process may not take it on.
            self.replace();
            *lock(&self.kept) = None;
            tracing::warn!(
                name: "verifier-not-kept",
                "{error:#}, so after a restart the next fsync of each client that has written fails once."
            );
        }
        Ok(())
    }

    /// Removes files of verifiers that no export of this machine can have any more, because they are of
    /// another boot. What is no such file stays.
    pub fn remove_old(directory: &StateDirectory, boot: &str) -> anyhow::Result<()> {
        for name in directory.names(PREFIX)? {
            let text = directory.read(&name).ok().flatten();
            if text.and_then(|text| parse(&text).ok()).is_some_and(|(of_boot, _)| of_boot != boot) {
                directory.remove(&name)?;
            }
        }
        Ok(())
    }

    /// The storage of the export has lost writes, or may have. Another number is in force when this returns,
    /// and no process that begins later has the old one. May wait for the state directory.
    pub fn writes_were_lost(&self) {
        self.replace();
        if let Err(error) = self.save() {
            tracing::error!(
                name: "lost-writes-not-noted",
                "{error:#}. Writes were lost, and a server that is started later may not know. Make room, or \
                 remove the file."
            );
        }
    }

    /// Puts another number in force, in this process. [`Verifier::save`] is to follow.
    fn replace(&self) {
        let _ = self.value.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |value| Some(successor(value)));
    }

    /// Writes the number to where it is kept, if that has another one.
    fn save(&self) -> anyhow::Result<()> {
        let mut kept = lock(&self.kept);
        let Some(Kept { directory, name, about, boot, value: saved }) = &mut *kept else { return Ok(()) };
        let value = self.value.load(Ordering::SeqCst);
        if *saved == Some(value) {
            return Ok(());
        }
        // A process that is killed from here on leaves no number at all, rather than the old one.
        if saved.take().is_some() {
            directory.remove(name)?;
        }
        directory.replace(name, &format!("{HEADING}\nboot {boot}\nof {about}\nvalue {value:016x}\n"))?;
        *saved = Some(value);
        Ok(())
    }
}

/// What the names of all files of verifiers begin with.
pub const PREFIX: &str = "verifier.";

/// The boot in which a verifier was written, and the verifier.
fn parse(text: &str) -> anyhow::Result<(String, u64)> {
    let mut lines = text.lines();
    let wrong = |line: u32, what: &str| anyhow!("line {line} is not {what}");
    if lines.next() != Some(HEADING) {
        return Err(wrong(1, &format!("{HEADING:?}")));
    }
    let mut line = |number, key: &str| {
        lines
            .next()
            .and_then(|line| line.strip_prefix(key)?.strip_prefix(' '))
            .ok_or_else(|| wrong(number, &format!("{key:?} and a value")))
    };
    let (boot, _, value) = (line(2, "boot")?, line(3, "of")?, line(4, "value")?);
    let is_hex = value.len() == 16 && value.bytes().all(|byte| byte.is_ascii_hexdigit());
    let value = u64::from_str_radix(value, 16).ok().filter(|_| is_hex);
    let value = value.ok_or_else(|| wrong(4, "\"value\" and 16 hexadecimal digits"))?;
    if lines.next().is_some() {
        return Err(wrong(5, "the end"));
    }
    Ok((boot.to_owned(), value))
}

impl FileVerifier {
    /// Of a file of the export that has this verifier, on this storage.
    pub fn new(export: Arc<Verifier>, storage: u64) -> Self {
        Self { export, storage }
    }

    /// As clients see it. Never 0.
    pub fn get(&self) -> u64 {
        match mix(self.export.value.load(Ordering::SeqCst) ^ mix(self.storage)) {
            0 => 1,
            verifier => verifier,
        }
    }
}

impl Default for FileVerifier {
    /// Of a file that is kept nowhere.
    fn default() -> Self {
        Self::new(Arc::default(), 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NAME: &str = "verifier.1";

    fn kept(directory: &Arc<StateDirectory>, boot: &str) -> Arc<Verifier> {
        let verifier = Arc::new(Verifier::default());
        verifier.keep(directory, NAME, "export a", boot).unwrap();
        verifier
    }

    fn of(verifier: &Arc<Verifier>, storage: u64) -> u64 {
        FileVerifier::new(Arc::clone(verifier), storage).get()
    }

    fn directory() -> (tempfile::TempDir, Arc<StateDirectory>) {
        let directory = tempfile::tempdir().unwrap();
        let state = StateDirectory::open(directory.path()).unwrap();
        (directory, Arc::new(state))
    }

    #[test]
    fn a_verifier_stays_in_the_next_process_and_not_on_other_storage() {
        let (_path, directory) = directory();
        let first = kept(&directory, "boot");
        let next = kept(&directory, "boot");
        assert_eq!(of(&first, 1), of(&next, 1));
        assert_ne!(of(&next, 1), of(&next, 2));
        assert_ne!(of(&first, 1), of(&Arc::default(), 1), "two are not the same by chance");
    }

    #[test]
    fn lost_writes_change_it_for_this_process_and_all_later_ones() {
        let (_path, directory) = directory();
        let verifier = kept(&directory, "boot");
        let mut seen = vec![of(&verifier, 1)];
        for _ in 0..10 {
            verifier.writes_were_lost();
            let now = of(&verifier, 1);
            assert!(!seen.contains(&now));
            assert_eq!(of(&kept(&directory, "boot"), 1), now);
            seen.push(now);
        }
    }

    #[test]
    fn a_process_that_dies_while_it_saves_leaves_none() {
        let (_path, directory) = directory();
        let verifier = kept(&directory, "boot");
        let before = of(&verifier, 1);
        // What stands in the way of the new one.
        std::fs::create_dir(directory.path("verifier.1.new")).unwrap();
        verifier.writes_were_lost();
        assert_eq!(directory.read(NAME).unwrap(), None);
        std::fs::remove_dir(directory.path("verifier.1.new")).unwrap();
        assert_ne!(of(&kept(&directory, "boot"), 1), before);
    }

    #[test]
    fn files_of_other_boots_are_removed() {
        let (_path, directory) = directory();
        kept(&directory, "old");
        Verifier::remove_old(&directory, "old").unwrap();
        assert!(directory.read(NAME).unwrap().is_some());
        directory.replace("verifier.2", "something else").unwrap();
        Verifier::remove_old(&directory, "new").unwrap();
        assert_eq!(directory.read(NAME).unwrap(), None);
        assert!(directory.read("verifier.2").unwrap().is_some());
    }

    #[test]
    fn what_is_no_verifier_is_an_error_that_says_where() {
        let right = format!("{HEADING}\nboot b\nof x\nvalue 0123456789abcdef\n");
        assert_eq!(parse(&right).unwrap(), ("b".to_owned(), 0x0123_4567_89ab_cdef));
        for (from, to, line) in [
            ("version 1", "version 2", 1),
            ("boot b", "boo", 2),
            ("of x\n", "", 3),
            ("value 0", "value ", 4),
            ("value 0", "value +", 4),
            ("cdef\n", "cdef\nmore\n", 5),
        ] {
            let error = parse(&right.replace(from, to)).unwrap_err().to_string();
            assert!(error.starts_with(&format!("line {line} ")), "{to}: {error}");
        }
        assert!(parse("").is_err());
        let (_path, directory) = directory();
        directory.replace(NAME, "nonsense").unwrap();
        let error = Verifier::default().keep(&directory, NAME, "a", "b").unwrap_err();
        assert!(format!("{error:#}").contains("verifier.1"), "{error:#}");
    }
}
