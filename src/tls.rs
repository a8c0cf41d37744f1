//! TLS 1.3 (RFC 8446) with raw public keys (RFC 7250): both sides prove who they are, and what they send
//! after that can be neither read nor changed on the way.
//!
//! rustls does the handshake (`handshake`), of which nothing is remembered: no tickets, no early data. It
//! then gives its secrets away. The records are sealed and opened here (`records`), in place: rustls would
//! copy them once more. A server may leave them to the kernel instead (`kernel`).

use std::fmt;
use std::sync::{Arc, OnceLock};

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{AlwaysResolvesClientRawPublicKeys, Resumption};
use rustls::crypto::{CryptoProvider, ring, verify_tls13_signature_with_raw_key};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{AlwaysResolvesServerRawPublicKeys, NoServerSessionStorage};
use rustls::sign::CertifiedKey;
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error as TlsError,
    ServerConfig, SignatureScheme, version,
};

use crate::environment::variable;
use crate::keys::{PublicKey, SecretKey};
use crate::tuning::TLS_RECORDS_PER_KEY as RECORDS_PER_KEY;

mod handshake;
pub(crate) mod kernel;
pub(crate) mod records;

pub(crate) use handshake::{CERTIFICATE_UNKNOWN, Handshake, not_known_there};

/// What is spoken inside (RFC 7301): the protocol with its version.
const ALPN: &[u8] = b"raio/2";

/// How a client's connections are secured: by its key, and the keys that its server may have.
#[derive(Clone)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    records_per_key: u64,
}

/// How a server's connections are secured: by its key, and the clients' keys that it accepts.
#[derive(Clone)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    records_per_key: u64,
    is_in_kernel: bool,
}

impl ClientTls {
    /// The client has this key, and connects to servers that have one of those.
    pub fn new(key: &SecretKey, servers: &[PublicKey]) -> Self {
        let servers = servers.to_vec();
        Self::with_verifier(key, Verifier::new(move |key| servers.contains(key)))
    }

    /// The client has this key, and connects to whatever server there is, to learn its key: for somebody who
    /// is asked next whether that is to be trusted. Nothing that such a server says or is told is secret.
    pub fn learning(key: &SecretKey) -> (Self, ProvenKey) {
        let verifier = Verifier::new(|_| true);
        let proven = verifier.proven.clone();
        (Self::with_verifier(key, verifier), proven)
    }

    fn with_verifier(key: &SecretKey, verifier: Verifier) -> Self {
        let provider = Arc::clone(&verifier.provider);
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&version::TLS13])
            .expect("its suites are those of TLS 1.3")
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_cert_resolver(Arc::new(AlwaysResolvesClientRawPublicKeys::new(certified(key))));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.enable_sni = false;
        config.resumption = Resumption::disabled();
        config.enable_secret_extraction = true;
        Self { config: Arc::new(config), records_per_key: records_per_key() }
    }
}

impl ServerTls {
    /// The server has this key, and takes clients for whose keys `accepts` returns true. It is asked in every
    /// handshake, by the thread that does it.
    pub fn new(key: &SecretKey, accepts: impl Fn(&PublicKey) -> bool + Send + Sync + 'static) -> Self {
        let verifier = Verifier::new(accepts);
        let mut config = ServerConfig::builder_with_provider(Arc::clone(&verifier.provider))
            .with_protocol_versions(&[&version::TLS13])
            .expect("its suites are those of TLS 1.3")
            .with_client_cert_verifier(Arc::new(verifier))
            .with_cert_resolver(Arc::new(AlwaysResolvesServerRawPublicKeys::new(certified(key))));
        config.alpn_protocols = vec![ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.enable_secret_extraction = true;
        Self { config: Arc::new(config), records_per_key: records_per_key(), is_in_kernel: false }
    }

    /// The same, but the kernel seals and opens the records: see [`crate::tcp::no_kernel_tls`].
    pub fn in_kernel(mut self) -> Self {
        self.is_in_kernel = true;
        self
    }

    pub(crate) fn is_in_kernel(&self) -> bool {
        self.is_in_kernel
    }
}

/// Records that a key seals. Tests of whole programs may say fewer, in builds with debug assertions.
fn records_per_key() -> u64 {
    let fewer = || variable("RAIO_TEST_RECORDS_PER_KEY")?.to_str()?.parse().ok();
    cfg!(debug_assertions).then(fewer).flatten().unwrap_or(RECORDS_PER_KEY)
}

#[cfg(any(test, feature = "test-peers"))]
impl ClientTls {
    /// The same with other keys after this many records, for tests.
    pub fn with_records_per_key(mut self, records: u64) -> Self {
        self.records_per_key = records;
        self
    }

    /// What rustls needs to do it alone, for tests.
    pub fn config(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.config)
    }
}

#[cfg(any(test, feature = "test-peers"))]
impl ServerTls {
    /// The same with other keys after this many records, for tests.
    pub fn with_records_per_key(mut self, records: u64) -> Self {
        self.records_per_key = records;
        self
    }

    /// What rustls needs to do it alone, for tests.
    pub fn config(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.config)
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").finish_non_exhaustive()
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").finish_non_exhaustive()
    }
}

/// X25519, AES-128-GCM or else ChaCha20-Poly1305, Ed25519.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = ring::default_provider();
    provider.cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    provider.kx_groups = vec![ring::kx_group::X25519];
    Arc::new(provider)
}

fn certified(key: &SecretKey) -> Arc<CertifiedKey> {
    let pkcs8 = key.pkcs8();
    let key =
        ring::sign::any_eddsa_type(&PrivatePkcs8KeyDer::from(&pkcs8[..])).expect("it is an Ed25519 key");
    let public = key.public_key().expect("it has a public key");
    Arc::new(CertifiedKey::new(vec![CertificateDer::from(public.to_vec())], key))
}

/// The key that a peer has proven to have, once it has: of several the first.
#[derive(Clone, Debug, Default)]
pub struct ProvenKey(Arc<OnceLock<PublicKey>>);

impl ProvenKey {
    /// The key. It is there also if the peer has ended the handshake after its proof.
    pub fn get(&self) -> Option<PublicKey> {
        self.0.get().copied()
    }
}

/// Takes a peer for who it is if it has proven to have a key that is accepted.
struct Verifier {
    accepts: Box<dyn Fn(&PublicKey) -> bool + Send + Sync>,
    provider: Arc<CryptoProvider>,
    proven: ProvenKey,
}

impl Verifier {
    fn new(accepts: impl Fn(&PublicKey) -> bool + Send + Sync + 'static) -> Self {
        Self { accepts: Box::new(accepts), provider: provider(), proven: ProvenKey::default() }
    }

    fn check(&self, key: &CertificateDer<'_>) -> Result<(), TlsError> {
        let key = PublicKey::from_spki(key).ok_or(CertificateError::BadEncoding)?;
        if (self.accepts)(&key) { Ok(()) } else { Err(handshake::not_accepted(key)) }
    }

    fn check_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        let spki = SubjectPublicKeyInfoDer::from(&key[..]);
        let algorithms = &self.provider.signature_verification_algorithms;
        let is_valid = verify_tls13_signature_with_raw_key(message, &spki, signature, algorithms)?;
        if let Some(key) = PublicKey::from_spki(key) {
            let _ = self.proven.0.set(key);
        }
        Ok(is_valid)
    }
}

/// TLS 1.2 is not spoken, so nothing asks for this.
fn no_tls12() -> Result<HandshakeSignatureValid, TlsError> {
    Err(TlsError::General("TLS 1.2 is not supported".into()))
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").finish_non_exhaustive()
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, TlsError> {
        self.check(key).map(|()| ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.check_signature(message, key, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        key: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, TlsError> {
        self.check(key).map(|()| ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        key: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, TlsError> {
        self.check_signature(message, key, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ED25519]
    }

    fn requires_raw_public_keys(&self) -> bool {
        true
    }
}

#[cfg(test)]
pub(crate) mod tests;
