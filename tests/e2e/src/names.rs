//! A client that changes names in a directory of its own, and knows what must be there: each change was made
//! once if it has succeeded, and not at all if it has failed.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use raio::{Error, PutOptions, Session};

use crate::random::Random;

/// The pause between two changes.
const PAUSE: Duration = Duration::from_millis(5);

/// Names in a directory, and what they are: a file with these bytes, or a directory.
type Names = BTreeMap<String, Option<Vec<u8>>>;

/// Changes names beneath `directory`, which is not there yet, until `is_over`, or until the session is given
/// up or a call to the server takes too long.
///
/// # Panics
///
/// If the server has anything else than what it has acknowledged.
pub fn change_names(session: &Session, directory: &str, random: &mut Random, is_over: &AtomicBool) {
    if session.create_dir(directory, 0o755).is_err() {
        return;
    }
    let mut names = Names::new();
    let mut next = 0;
    while !is_over.load(Ordering::Relaxed) {
        let new = format!("name{next}");
        next += 1;
        let old = names.keys().nth(random.index(names.len().max(1))).cloned();
        let is_file = |name: &String| names[name].is_some();
        let path = |name: &str| format!("{directory}/{name}");
        let (result, changed) = match (random.below(4), old) {
            (0, Some(old)) => {
                let held = names[&old].clone();
                let renamed = session.rename_no_replace(path(&old), path(&new));
                (renamed, vec![(old, None), (new, Some(held))])
            }
            (1, Some(old)) if is_file(&old) => (session.remove_file(path(&old)), vec![(old, None)]),
            (1, Some(old)) => (session.remove_dir(path(&old)), vec![(old, None)]),
            (2, _) => (session.create_dir(path(&new), 0o755), vec![(new, Some(None))]),
            _ => {
                let bytes = vec![next as u8; random.index(3000)];
                let options = PutOptions { exclusive: true, fsync: next % 8 == 0, ..PutOptions::default() };
                (session.put(path(&new), &bytes, &options), vec![(new, Some(Some(bytes)))])
            }
        };
        let mut after = names.clone();
        for (name, held) in changed {
            match held {
                Some(held) => after.insert(name, held),
                None => after.remove(&name),
            };
        }
        match result {
            Ok(()) => names = after,
            Err(error) if may_come_later(&error) => return,
            Err(error) => {
                assert!(
                    error.is_unknown
                        || !matches!(error.errno(), libc::EEXIST | libc::ENOENT | libc::ENOTEMPTY),
                    "what was to be changed is not as it was: {error:?}"
                );
                // One of the two it is.
                match look(session, directory) {
                    Some(found) if error.is_unknown && found == after => names = after,
                    Some(found) => assert_eq!(found, names, "{error:?}"),
                    None => return,
                }
            }
        }
        if random.below(8) == 0 {
            match look(session, directory) {
                Some(found) => assert_eq!(found, names),
                None => return,
            }
        }
        std::thread::sleep(PAUSE);
    }
}

/// Whether what has failed may still be done.
fn may_come_later(error: &Error) -> bool {
    matches!(error.errno(), libc::ETIMEDOUT | libc::ENOTCONN)
}

/// What is in the directory; None if that cannot be told.
fn look(session: &Session, directory: &str) -> Option<Names> {
    // A server that was restarted does not know a list that it has not begun.
    for _ in 0..10 {
        let Ok(entries) = session.read_dir(directory) else { continue };
        let entries = entries.map(|entry| {
            let entry = entry?;
            let name = entry.name.clone().into_string().expect("it was made so");
            let held = match entry.is_dir() {
                true => None,
                false => Some(session.get(format!("{directory}/{name}"), 4000)?.0),
            };
            Ok((name, held))
        });
        if let Ok(names) = entries.collect::<Result<Names, Error>>() {
            return Some(names);
        }
    }
    None
}
