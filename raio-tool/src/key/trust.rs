//! `raio key trust`: learns a server's key, has the user decide, and pins the server to it.

use std::io::{BufRead, IsTerminal, Write};
use std::time::Instant;

use clap::Args;
use raio_transport::Error;
use raio_transport::address::{Address, Scheme};
use raio_transport::handshake::Offer;
use raio_transport::key_directory::KeyDirectory;
use raio_transport::keys::{PublicKey, SecretKey};
use raio_transport::tcp::TcpClient;
use raio_transport::tls::ClientTls;

use crate::failure::{Failure, sentence};
use crate::tuning::CONNECT_TIMEOUT;

#[derive(Args, Debug)]
pub struct Options {
    /// The server: raio://HOST, raio://HOST:PORT or raio+tcp://HOST:PORT
    url: String,
    /// Do not ask
    #[arg(long, conflicts_with = "key")]
    yes: bool,
    /// Do not ask, and trust the server only if this is its key
    #[arg(long, value_name = "KEY")]
    key: Option<PublicKey>,
    /// Trust this key alone from now on, though others are trusted for this server
    #[arg(long)]
    replace: bool,
}

/// What is to be done once the server's key is known.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    /// The key is trusted already.
    Nothing,
    /// The user decides.
    Ask,
    Pin,
}

/// Why the key is not trusted.
#[derive(Debug, PartialEq, Eq)]
enum Rejection {
    /// The user has said that it is another one.
    Unexpected,
    /// Another one is trusted.
    Changed,
}

impl Options {
    /// What to do with a server that has `found`, and has had to have one of `trusted` so far.
    fn decide(&self, trusted: &[PublicKey], found: PublicKey) -> Result<Step, Rejection> {
        if self.key.is_some_and(|key| key != found) {
            return Err(Rejection::Unexpected);
        }
        if trusted.contains(&found) {
            return Ok(Step::Nothing);
        }
        if !trusted.is_empty() && !self.replace {
            return Err(Rejection::Changed);
        }
        Ok(if self.yes || self.key.is_some() { Step::Pin } else { Step::Ask })
    }

    /// The server's address with its host and port, if it makes sense.
    fn server(&self) -> Result<(Address, (String, u16)), Failure> {
        let address: Address = self.url.parse().map_err(|error: Error| Failure::usage(sentence(&error)))?;
        if address.scheme() == Scheme::Rdma {
            return Err(Failure::usage(format!(
                "{} asks for RDMA, by which no key is shown. Write raio://HOST:PORT.",
                self.url
            )));
        }
        match address.host() {
            Some((_, 0)) => Err(Failure::usage(format!(
                "{} names port 0. Give the port that raio_server printed.",
                self.url
            ))),
            Some((host, port)) => {
                let host = host.to_owned();
                Ok((address, (host, port)))
            }
            None => Err(Failure::usage(format!(
                "{} is a Unix socket, which needs no key: the kernel says who is there.",
                self.url
            ))),
        }
    }
}

/// Has this client trust a server.
pub fn run(directory: &KeyDirectory, options: &Options) -> Result<(), Failure> {
    let (address, (host, port)) = options.server()?;
    if !options.yes && options.key.is_none() && !std::io::stdin().is_terminal() {
        return Err(Failure::usage(
            "There is no terminal to ask at. Give the key that the server must have with --key, or --yes to \
             trust the one that it shows.",
        ));
    }
    let trusted = match directory.path().try_exists() {
        Ok(false) => Vec::new(),
        _ => directory.trusted(&host, port)?,
    };
    let own = match directory.key() {
        Ok(key) => Some(key),
        Err(error) if error.errno() == libc::ENOKEY => None,
        Err(error) => return Err(error.into()),
    };
    let Contact { found, rejects_us } = contact(&address, own.as_ref())?;
    eprintln!("The server at {} has the key {found}.", shown(&address));
    match options.decide(&trusted, found) {
        Ok(Step::Nothing) => eprintln!("It is trusted already."),
        Ok(step) => {
            if !trusted.is_empty() {
                warn(&trusted);
            }
            if step == Step::Ask && !ask()? {
                return Err(Failure::new("Nothing was changed."));
            }
            directory.pin(&host, port, found)?;
            eprintln!("It is trusted from now on: {}.", directory.servers_file().display());
        }
        Err(Rejection::Unexpected) => {
            return Err(Failure::new("That is not the key which --key says. Nothing was changed."));
        }
        Err(Rejection::Changed) => {
            warn(&trusted);
            return Err(Failure::new(
                "Nothing was changed. Ask the server's administrator. Only if it has been given a new key, \
                 use --replace.",
            ));
        }
    }
    match own {
        None => eprintln!("This client has no key yet. Make one with `raio key new`."),
        Some(own) if rejects_us => eprintln!(
            "The server does not accept this client's key yet. Have its administrator add {}.",
            own.public()
        ),
        Some(_) => {}
    }
    Ok(())
}

/// What the first contact with a server has shown.
struct Contact {
    /// The key that it has proven to have.
    found: PublicKey,
    /// It does not accept the client's key.
    rejects_us: bool,
}

/// Connects as somebody with this key, or with one that nobody knows.
fn contact(address: &Address, own: Option<&SecretKey>) -> Result<Contact, Failure> {
    let nobody = SecretKey::generate();
    let mut last = None;
    for found in address.resolve()? {
        let (tls, proven) = ClientTls::learning(own.unwrap_or(&nobody));
        let offer = Offer { tls: Some(tls), ..Offer::new(format!("raio[{}]", std::process::id())) };
        let connected = TcpClient::connect(found, &offer, Instant::now() + CONNECT_TIMEOUT);
        if let Some(found) = proven.get() {
            let rejects_us = connected.is_err_and(|error| error.errno() == libc::EKEYREJECTED);
            return Ok(Contact { found, rejects_us });
        }
        last = connected.err();
    }
    let why = last.map_or_else(String::new, |error| format!(": {}", sentence(&error)));
    Err(Failure::new(format!(
        "{} has shown no key{why} If it answers without one, it was started without --keys.",
        shown(address)
    )))
}

fn shown(address: &Address) -> String {
    let url = address.to_string();
    url.split_once("://").map_or(url.clone(), |(_, rest)| rest.to_owned())
}

fn warn(trusted: &[PublicKey]) {
    let trusted: Vec<_> = trusted.iter().map(PublicKey::to_string).collect();
    eprintln!(
        "WARNING: THIS IS NOT THE KEY THAT THIS SERVER HAS HAD.\n\
         Trusted so far: {}.\n\
         Either the server was given another key, or somebody on the way there pretends to be it.",
        trusted.join(", ")
    );
}

/// Asks at the terminal.
fn ask() -> Result<bool, Failure> {
    eprint!("Is that what its administrator says? Trust it? [y/N] ");
    let failed = |error: std::io::Error| Failure::new(format!("Cannot read the answer: {error}."));
    std::io::stderr().flush().map_err(failed)?;
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).map_err(failed)?;
    Ok(is_yes(&line))
}

fn is_yes(line: &str) -> bool {
    matches!(line.trim().to_ascii_lowercase().as_str(), "y" | "yes")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Options {
        Options { url: "raio://h".into(), yes: false, key: None, replace: false }
    }

    #[test]
    fn what_is_done_depends_on_what_is_trusted_and_what_the_user_says() {
        let [old, new] = [(); 2].map(|()| SecretKey::generate().public());
        let yes = Options { yes: true, ..options() };
        let replace = Options { replace: true, ..options() };
        let key = |key| Options { key: Some(key), ..options() };
        for (options, trusted, found, expected) in [
            (&options(), vec![], new, Ok(Step::Ask)),
            (&yes, vec![], new, Ok(Step::Pin)),
            (&key(new), vec![], new, Ok(Step::Pin)),
            (&key(old), vec![], new, Err(Rejection::Unexpected)),
            (&key(old), vec![new], new, Err(Rejection::Unexpected)),
            (&options(), vec![old, new], new, Ok(Step::Nothing)),
            (&replace, vec![new], new, Ok(Step::Nothing)),
            (&options(), vec![old], new, Err(Rejection::Changed)),
            (&yes, vec![old], new, Err(Rejection::Changed)),
            (&key(new), vec![old], new, Err(Rejection::Changed)),
            (&replace, vec![old], new, Ok(Step::Ask)),
            (&Options { yes: true, replace: true, ..options() }, vec![old], new, Ok(Step::Pin)),
        ] {
            assert_eq!(options.decide(&trusted, found), expected, "{options:?}");
        }
    }

    #[test]
    fn only_a_yes_is_a_yes() {
        assert!(["y\n", "Y", " yes \n", "YES\n"].into_iter().all(is_yes));
        assert!(!["", "\n", "n\n", "ye\n", "yy\n", "ed25519:y\n"].into_iter().any(is_yes));
    }

    #[test]
    fn servers_that_show_no_key_are_refused_before_anything_is_sent() {
        for (url, why) in [
            ("h", "has no scheme"),
            ("raio+rdma://h", "asks for RDMA"),
            ("raio://h:0", "names port 0"),
            ("unix:///x", "needs no key"),
        ] {
            let failure = Options { url: url.into(), ..options() }.server().unwrap_err();
            assert!(failure.to_string().contains(why), "{url}: {failure}");
            assert_eq!(failure.exit_code(), std::process::ExitCode::from(2), "{url}");
        }
        let (address, _) = Options { url: "raio://[::1]".into(), ..options() }.server().unwrap();
        assert_eq!(shown(&address), "[::1]:7240");
    }
}
