//! The handshake: what came goes in, what is to be sent comes out. It ends with the secrets for the records.

use std::fmt;
use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, UnbufferedStatus};
use rustls::{AlertDescription, CertificateError, Error as TlsError, ExtractedSecrets, OtherError};

use super::kernel::{CryptoInfo, KernelKeys, KernelRecords};
use super::records::{HEADER_BYTES, Rekey, TlsRecords, record_len};
use super::{ALPN, ClientTls, ServerTls};
use crate::error::{Error, Status};
use crate::keys::PublicKey;

/// The alert for a key that is not accepted.
pub(crate) const CERTIFICATE_UNKNOWN: u8 = 46;

/// A peer's key is not one of those that are accepted.
#[derive(Debug, thiserror::Error)]
#[error("key {0} is not accepted")]
struct NotAccepted(PublicKey);

/// Why a handshake fails if a peer has this key.
pub(super) fn not_accepted(key: PublicKey) -> TlsError {
    CertificateError::Other(OtherError(Arc::new(NotAccepted(key)))).into()
}

/// The handshake of one connection.
#[derive(Debug)]
pub(crate) struct Handshake {
    side: Side,
    records_per_key: u64,
    /// What has been received, and not taken in: whole records and the front of one.
    incoming: Vec<u8>,
    /// How much of that the handshake has seen. It wants to see the front of a message again.
    seen: usize,
    outgoing: Vec<u8>,
    sent: usize,
}

enum Side {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

impl fmt::Debug for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if matches!(self, Self::Client(_)) { "Client" } else { "Server" })
    }
}

/// How far the handshake has come.
enum Step {
    /// There is more to do.
    Again,
    /// It needs another record.
    Blocked,
    Done,
}

impl Handshake {
    pub fn client(tls: &ClientTls) -> Result<Self, Error> {
        // No name is sent or looked at: the server is known by its key.
        let name = ServerName::try_from("raio").expect("it is a name");
        let side = UnbufferedClientConnection::new(Arc::clone(&tls.config), name).map_err(local)?;
        Ok(Self::new(Side::Client(Box::new(side)), tls.records_per_key))
    }

    pub fn server(tls: &ServerTls) -> Result<Self, Error> {
        let side = UnbufferedServerConnection::new(Arc::clone(&tls.config)).map_err(local)?;
        Ok(Self::new(Side::Server(Box::new(side)), tls.records_per_key))
    }

    fn new(side: Side, records_per_key: u64) -> Self {
        Self { side, records_per_key, incoming: Vec::new(), seen: 0, outgoing: Vec::new(), sent: 0 }
    }

    /// What is to be sent.
    pub fn unsent(&self) -> &[u8] {
        &self.outgoing[self.sent..]
    }

    /// `n` bytes of that have been sent.
    pub fn on_sent(&mut self, n: usize) {
        self.sent += n;
    }

    /// Takes in what was received. Returns whether the handshake is over; also then there may be something to
    /// send. After an error, too: an alert for the peer.
    pub fn advance(&mut self, received: &[u8]) -> Result<bool, Error> {
        self.incoming.extend_from_slice(received);
        loop {
            match self.step() {
                Ok(Step::Again) => {}
                Ok(Step::Done) => return Ok(true),
                // One record at a time, for the first one after the handshake is not for rustls.
                Ok(Step::Blocked) => match record_len(&self.incoming[self.seen..]) {
                    Ok(Some(len)) => self.seen += len,
                    Ok(None) => return Ok(false),
                    Err(violation) => return Err(violation.into()),
                },
                Err(error) => {
                    // It has left an alert behind; after that there is no more to ask for.
                    let _ = self.step();
                    return Err(self.failure(&error));
                }
            }
        }
    }

    fn step(&mut self) -> Result<Step, TlsError> {
        let incoming = &mut self.incoming[..self.seen];
        let (taken, step) = match &mut self.side {
            Side::Client(side) => go_on(side.process_tls_records(incoming), &mut self.outgoing),
            Side::Server(side) => go_on(side.process_tls_records(incoming), &mut self.outgoing),
        };
        self.incoming.drain(..taken);
        self.seen -= taken;
        step
    }

    /// An error in our words.
    fn failure(&self, error: &TlsError) -> Error {
        let is_client = matches!(self.side, Side::Client(_));
        match error {
            TlsError::InvalidCertificate(CertificateError::Other(OtherError(why))) => {
                let Some(NotAccepted(key)) = why.downcast_ref() else { return failed(error) };
                let text = if is_client {
                    format!(
                        "The server's key is {key}, and not one that is trusted here; ask its administrator, \
                         and then use `raio key trust`"
                    )
                } else {
                    format!("The client's key is {key}, and not one that is accepted")
                };
                rejected(text)
            }
            TlsError::AlertReceived(AlertDescription::CertificateUnknown) if is_client => not_known_there(),
            error => failed(error),
        }
    }

    /// How many bytes the next record lacks, or first its header.
    pub fn wanted(&self) -> usize {
        match self.incoming[self.seen..] {
            [_, _, _, high, low, ..] => {
                let len = HEADER_BYTES + usize::from(u16::from_be_bytes([high, low]));
                len - (self.incoming.len() - self.seen)
            }
            ref front => HEADER_BYTES - front.len(),
        }
    }

    /// The layer for the records that follow, with those that have come already: after the handshake.
    pub fn into_records(self) -> Result<(TlsRecords, Vec<u8>), Error> {
        let (peer, secrets, rekey) = self.side.finish()?;
        let unsent = self.outgoing[self.sent..].to_vec();
        let records = TlsRecords::new(peer, secrets, rekey, self.records_per_key, unsent);
        Ok((records, self.incoming))
    }

    /// Who the peer is, and what the kernel needs to seal and open the records that follow: after a handshake
    /// of which no more was received than it needed.
    pub fn into_kernel_keys(self) -> Result<(PublicKey, KernelKeys), Error> {
        // The peer cannot have ended the handshake before it had all of it.
        if !self.incoming.is_empty() || self.sent < self.outgoing.len() {
            return Err(local(TlsError::General("there is something left of the handshake".into())));
        }
        let (peer, ExtractedSecrets { tx, rx }, _) = self.side.finish()?;
        let records = KernelRecords::new(self.records_per_key);
        Ok((peer, KernelKeys { sending: CryptoInfo::new(tx), receiving: CryptoInfo::new(rx), records }))
    }
}

impl Side {
    /// Who the peer is, and the secrets: after the handshake.
    fn finish(self) -> Result<(PublicKey, ExtractedSecrets, Rekey), Error> {
        let common: &rustls::CommonState = match &self {
            Self::Client(side) => side,
            Self::Server(side) => side,
        };
        if common.alpn_protocol() != Some(ALPN) {
            return Err(failed(&TlsError::General("the peer does not say that it speaks raio".into())));
        }
        let key = |certificates: &[CertificateDer<'_>]| PublicKey::from_spki(certificates.first()?);
        let peer = common.peer_certificates().and_then(key);
        let peer = peer.ok_or_else(|| failed(&TlsError::NoCertificatesPresented))?;
        let (secrets, rekey) = match self {
            Self::Client(side) => {
                side.dangerous_into_kernel_connection().map(|(secrets, rest)| (secrets, Rekey::Client(rest)))
            }
            Self::Server(side) => {
                side.dangerous_into_kernel_connection().map(|(secrets, rest)| (secrets, Rekey::Server(rest)))
            }
        }
        .map_err(local)?;
        Ok((peer, secrets, rekey))
    }
}

/// Does what the handshake asks for. Returns how much it has taken of what it was shown.
fn go_on<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Vec<u8>,
) -> (usize, Result<Step, TlsError>) {
    let step = status.state.and_then(|state| match state {
        ConnectionState::EncodeTlsData(mut record) => {
            let start = outgoing.len();
            if let Err(EncodeError::InsufficientSize(needed)) = record.encode(&mut []) {
                outgoing.resize(start + needed.required_size, 0);
                record
                    .encode(&mut outgoing[start..])
                    .map_err(|error| TlsError::General(error.to_string()))?;
            }
            Ok(Step::Again)
        }
        // All is sent in order, so it may be taken for sent.
        ConnectionState::TransmitTlsData(records) => {
            records.done();
            Ok(Step::Again)
        }
        ConnectionState::BlockedHandshake => Ok(Step::Blocked),
        ConnectionState::WriteTraffic(_) => Ok(Step::Done),
        _ => Err(TlsError::General("there is data before the end of the handshake".into())),
    });
    (status.discard, step)
}

/// Why there is no connection with one whose key is not known.
fn rejected(text: String) -> Error {
    Error::Rejected { status: Status::policy(libc::EKEYREJECTED), text }
}

/// Why a server ends a handshake, or what follows on it, with an alert of that name.
pub(crate) fn not_known_there() -> Error {
    let text = "It does not accept this client's key; have its administrator add what `raio key show` prints";
    rejected(text.into())
}

fn failed(error: &TlsError) -> Error {
    Error::io(format!("The TLS handshake failed ({error})"), rustix::io::Errno::PROTO)
}

/// Why a handshake fails though the peer has done nothing wrong.
fn local(error: TlsError) -> Error {
    Error::io(format!("Cannot use TLS ({error})"), rustix::io::Errno::IO)
}
