//! Keys: each side of a connection is known by its Ed25519 key, as with SSH. There are no certificates.

use std::fmt;
use std::fs::{Metadata, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::str::FromStr;

use base64ct::{Base64, Base64Unpadded, Encoding};
use ring::digest::{self, Context, SHA256};
use ring::rand::{SecureRandom, SystemRandom};
use ring::signature::{Ed25519KeyPair, KeyPair};
use zeroize::Zeroizing;

use crate::error::Error;

/// The longest key file that is read.
const FILE_BYTES_MAX: usize = 4 << 10;

/// How many bytes a key has, a public and a secret one.
const KEY_BYTES: usize = 32;

/// In front of the bytes of a public key as a SubjectPublicKeyInfo (RFC 8410).
const SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 3, 0x21, 0];

/// In front of the bytes of a secret key in PKCS #8 (RFC 8410).
const PKCS8_PREFIX: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];

const PEM_BEGIN: &str = "-----BEGIN PRIVATE KEY-----";
const PEM_END: &str = "-----END PRIVATE KEY-----";

/// In front of a public key in text.
const TEXT_PREFIX: &str = "ed25519:";

/// A public key: the name of one who has the secret key. As text, `ed25519:` and 43 characters of base64.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PublicKey([u8; KEY_BYTES]);

impl PublicKey {
    pub(crate) fn as_bytes(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    /// The key in a SubjectPublicKeyInfo, as a raw public key travels (RFC 7250). None if that is of another
    /// kind.
    pub(crate) fn from_spki(spki: &[u8]) -> Option<Self> {
        let bytes = spki.strip_prefix(&SPKI_PREFIX)?;
        bytes.try_into().ok().map(Self)
    }
}

/// An id that depends on its owner, too (SHA-256, truncated): no other owner makes the same of any id.
pub(crate) fn bind_id(owner: &[u8], id: &[u8; 16]) -> [u8; 16] {
    let mut hash = Context::new(&SHA256);
    hash.update(owner);
    hash.update(id);
    let hash = hash.finish();
    *hash.as_ref().first_chunk().expect("a hash has 32 bytes")
}

/// What tells one secret from another in a log, and tells nothing else of it: the first 4 bytes of its
/// SHA-256, in hexadecimal.
pub fn fingerprint(secret: &[u8]) -> String {
    fingerprint_of(secret, 4)
}

/// The same of more bytes: what tells one from any other.
pub fn fingerprint_of(secret: &[u8], bytes: usize) -> String {
    let hash = digest::digest(&SHA256, secret);
    hash.as_ref()[..bytes].iter().map(|byte| format!("{byte:02x}")).collect()
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{TEXT_PREFIX}{}", Base64Unpadded::encode_string(&self.0))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for PublicKey {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let base64 = text.strip_prefix(TEXT_PREFIX).ok_or("it does not begin with ed25519:")?;
        let mut bytes = [0; KEY_BYTES];
        match Base64Unpadded::decode(base64, &mut bytes) {
            Ok(decoded) if decoded.len() == KEY_BYTES => Ok(Self(bytes)),
            _ => Err("after ed25519: it has something other than 43 characters of base64"),
        }
    }
}

/// A secret key. Its memory is overwritten when it is dropped.
pub struct SecretKey {
    seed: Zeroizing<[u8; KEY_BYTES]>,
    public: PublicKey,
}

impl SecretKey {
    /// A new key. The kernel's random numbers are needed; without them this panics.
    pub fn generate() -> Self {
        let mut seed = Zeroizing::new([0; KEY_BYTES]);
        SystemRandom::new().fill(&mut *seed).expect("the kernel has random numbers");
        Self::from_seed(seed)
    }

    fn from_seed(seed: Zeroizing<[u8; KEY_BYTES]>) -> Self {
        let pair = Ed25519KeyPair::from_seed_unchecked(&*seed).expect("any 32 bytes are a key");
        let public = pair.public_key().as_ref().try_into().expect("a public key has 32 bytes");
        Self { seed, public: PublicKey(public) }
    }

    /// The public key of this one.
    pub fn public(&self) -> PublicKey {
        self.public
    }

    /// In PKCS #8.
    pub(crate) fn pkcs8(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new([&PKCS8_PREFIX[..], &self.seed[..]].concat())
    }

    /// Reads a key file. It must be this user's or root's, and nobody else may read it.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let cannot = |source: io::Error| Error::io(format!("Cannot read the key {}", path.display()), source);
        let wrong = |why: String| {
            let source = io::Error::from_raw_os_error(libc::EACCES);
            Error::io(format!("The key {} is not used: {why}", path.display()), source)
        };
        // A FIFO is not waited for.
        let mut options = OpenOptions::new();
        let file = options.read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
        let file = file.map_err(cannot)?;
        let metadata = file.metadata().map_err(cannot)?;
        if !metadata.is_file() {
            return Err(wrong("it is no regular file".into()));
        }
        check_owner(&metadata).map_err(wrong)?;
        if metadata.mode() & 0o077 != 0 {
            let mode = metadata.mode() & 0o777;
            return Err(wrong(format!("others may access it (mode {mode:03o}); use `chmod 600`")));
        }
        let mut text = Zeroizing::new(String::with_capacity(FILE_BYTES_MAX));
        file.take(FILE_BYTES_MAX as u64).read_to_string(&mut text).map_err(cannot)?;
        Self::from_pem(&text).map_err(|why| {
            let source = io::Error::from_raw_os_error(libc::EINVAL);
            Error::io(format!("The key {} is not used: {why}", path.display()), source)
        })
    }

    /// Makes a new key, and a file with it that only this user may read. If there is a file of that name
    /// already, nothing is done.
    pub fn create(path: &Path) -> Result<Self, Error> {
        let cannot = |source| Error::io(format!("Cannot make the key {}", path.display()), source);
        let key = Self::generate();
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create_new(true).mode(0o600).open(path).map_err(cannot)?;
        let written = file.write_all(key.to_pem().as_bytes()).and_then(|()| file.sync_all());
        written.map_err(|source| {
            let _ = std::fs::remove_file(path);
            cannot(source)
        })?;
        Ok(key)
    }

    /// The text of a key file, PKCS #8 in PEM: `openssl genpkey -algorithm ed25519` makes the same.
    pub fn to_pem(&self) -> Zeroizing<String> {
        let base64 = Zeroizing::new(Base64::encode_string(&self.pkcs8()));
        Zeroizing::new(format!("{PEM_BEGIN}\n{}\n{PEM_END}\n", *base64))
    }

    /// The key in the text of a key file. The error says what is wrong with it, without a part of it.
    pub fn from_pem(text: &str) -> Result<Self, &'static str> {
        let base64 = text.trim().strip_prefix(PEM_BEGIN).and_then(|rest| rest.strip_suffix(PEM_END));
        let base64 = base64.ok_or("it is no private key in PEM")?;
        let mut der = Zeroizing::new([0; PKCS8_PREFIX.len() + KEY_BYTES]);
        let der = Base64::decode(base64.trim(), &mut *der).map_err(|_| "it is no Ed25519 key")?;
        let seed = der.strip_prefix(&PKCS8_PREFIX).ok_or("it is no Ed25519 key")?;
        let seed: [u8; KEY_BYTES] = seed.try_into().map_err(|_| "it is no Ed25519 key")?;
        Ok(Self::from_seed(Zeroizing::new(seed)))
    }
}

/// Checks that a file of keys belongs to this user or to root. The error says why it is not used.
pub(crate) fn check_owner(metadata: &Metadata) -> Result<(), String> {
    let (owner, user) = (metadata.uid(), rustix::process::geteuid().as_raw());
    if owner != user && owner != 0 {
        return Err(format!("it belongs to user {owner}, and not to this one, {user}"));
    }
    Ok(())
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKey").field("public", &self.public).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of RFC 8032, section 7.1, test 1.
    const SEED: [u8; 32] = [
        0x9d, 0x61, 0xb1, 0x9d, 0xef, 0xfd, 0x5a, 0x60, 0xba, 0x84, 0x4a, 0xf4, 0x92, 0xec, 0x2c, 0xc4, 0x44,
        0x49, 0xc5, 0x69, 0x7b, 0x32, 0x69, 0x19, 0x70, 0x3b, 0xac, 0x03, 0x1c, 0xae, 0x7f, 0x60,
    ];
    const PUBLIC: [u8; 32] = [
        0xd7, 0x5a, 0x98, 0x01, 0x82, 0xb1, 0x0a, 0xb7, 0xd5, 0x4b, 0xfe, 0xd3, 0xc9, 0x64, 0x07, 0x3a, 0x0e,
        0xe1, 0x72, 0xf3, 0xda, 0xa6, 0x23, 0x25, 0xaf, 0x02, 0x1a, 0x68, 0xf7, 0x07, 0x51, 0x1a,
    ];

    #[test]
    fn keys_are_those_of_the_rfc_and_of_openssl() {
        let key = SecretKey::from_seed(Zeroizing::new(SEED));
        assert_eq!(key.public(), PublicKey(PUBLIC));
        // `openssl pkey -in FILE -pubout -outform DER` of this text ends with the bytes of PUBLIC.
        let pem = "-----BEGIN PRIVATE KEY-----\n\
            MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n\
            -----END PRIVATE KEY-----\n";
        assert_eq!(*key.to_pem(), pem);
        assert_eq!(SecretKey::from_pem(pem).unwrap().public(), key.public());
    }

    #[test]
    fn texts_of_public_keys_are_read_back_and_others_are_refused() {
        let key = SecretKey::generate().public();
        let text = key.to_string();
        assert_eq!((text.len(), text.parse()), (TEXT_PREFIX.len() + 43, Ok(key)));
        let unlike = ["", "ed25519:", "rsa:AAAA", &text[1..], &text[..text.len() - 1], &format!("{text}A")];
        for unlike in unlike {
            assert!(unlike.parse::<PublicKey>().is_err(), "{unlike}");
        }
        // The last character has two bits that mean nothing: only one way to write a key is right.
        let last = if text.ends_with('B') { "C" } else { "B" };
        assert!(format!("{}{last}", &text[..text.len() - 1]).parse::<PublicKey>().is_err());
    }

    #[test]
    fn key_files_that_are_none_are_refused_without_a_word_of_what_is_in_them() {
        let pem = SecretKey::generate().to_pem();
        let base64 = pem.lines().nth(1).unwrap();
        for text in [
            "",
            base64,
            &pem[..pem.len() - 30],
            &pem.replace("PRIVATE", "EC PRIVATE"),
            &pem.replace(base64, &base64[4..]),
            &pem.replace(base64, &format!("{base64}AAAA")),
            &pem.replace(base64, &base64.replacen('M', "N", 1)),
        ] {
            let why = SecretKey::from_pem(text).unwrap_err();
            assert!(!why.contains(&base64[40..]), "{why}");
        }
    }

    #[test]
    fn key_files_are_made_for_one_user_and_refused_if_others_can_read_them() {
        let name = format!("raio-key-{}-{}", std::process::id(), crate::random::number());
        let path = std::env::temp_dir().join(name);
        let key = SecretKey::create(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o7777, 0o600);
        assert_eq!(SecretKey::load(&path).unwrap().public(), key.public());
        assert_eq!(SecretKey::create(&path).unwrap_err().errno(), libc::EEXIST);
        assert_eq!(SecretKey::load(&path).unwrap().public(), key.public());
        for mode in [0o640, 0o604, 0o610, 0o602] {
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode)).unwrap();
            let error = SecretKey::load(&path).unwrap_err();
            assert_eq!(error.errno(), libc::EACCES);
            assert!(error.to_string().contains("chmod 600"), "{error}");
        }
        std::fs::remove_file(&path).unwrap();
        assert_eq!(SecretKey::load(&path).unwrap_err().errno(), libc::ENOENT);
        assert_eq!(SecretKey::load(&std::env::temp_dir()).unwrap_err().errno(), libc::EACCES);
    }

    #[test]
    fn a_secret_key_does_not_show_itself() {
        let key = SecretKey::generate();
        let shown = format!("{key:?}");
        assert!(shown.contains(&key.public().to_string()), "{shown}");
        let seed = format!("{:?}", *key.seed);
        assert!(!shown.contains(seed.trim_matches(['[', ']'])), "{shown}");
    }
}
