//! This client's key: `raio key new`, `raio key show`.

use std::io::Write;

use raio_transport::key_directory::KeyDirectory;
use raio_transport::keys::{PublicKey, SecretKey};

use crate::failure::Failure;

/// Makes the key, and prints its public key.
pub fn make(directory: &KeyDirectory) -> Result<(), Failure> {
    directory.create()?;
    let path = directory.key_file();
    let key = SecretKey::create(&path).map_err(|error| match error.errno() {
        libc::EEXIST => Failure::new(format!(
            "There is a key already, {}. `raio key show` prints its public key. For another one, move that \
             file away first.",
            path.display()
        )),
        _ => error.into(),
    })?;
    print(key.public())?;
    eprintln!(
        "raio: The secret key is {}. Have the administrators of servers add the public key.",
        path.display()
    );
    Ok(())
}

/// Prints the public key.
pub fn show(directory: &KeyDirectory) -> Result<(), Failure> {
    print(directory.key()?.public())
}

fn print(key: PublicKey) -> Result<(), Failure> {
    let mut stdout = std::io::stdout();
    let printed = writeln!(stdout, "{key}").and_then(|()| stdout.flush());
    printed.map_err(|error| Failure::new(format!("Cannot print the public key {key}: {error}.")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_made_once() {
        let parent = tempfile::tempdir().unwrap();
        let directory = KeyDirectory::new(parent.path().join("config/raio"));
        let missing = show(&directory).unwrap_err().to_string();
        assert!(missing.contains("raio key new"), "{missing}");
        make(&directory).unwrap();
        let key = directory.key().unwrap().public();
        show(&directory).unwrap();
        let again = make(&directory).unwrap_err().to_string();
        assert!(again.contains("There is a key already"), "{again}");
        assert_eq!(directory.key().unwrap().public(), key);
    }
}
