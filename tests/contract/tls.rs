//! What TLS promises besides the contract: who may connect, and what those hear who may not.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Instant;

use raio_transport::Error;
use raio_transport::connecting::Connecting;
use raio_transport::handshake::{Identity, Offer};
use raio_transport::keys::SecretKey;
use raio_transport::tcp::{Accepting, TcpClient};
use raio_transport::tls::{ClientTls, ServerTls};
use raio_transport::transport::AcceptedStream;
use rustls::pki_types::PrivateKeyDer;
use rustls::pki_types::pem::PemObject;
use rustls::server::AlwaysResolvesServerRawPublicKeys;
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ClientConnection, ServerConfig, ServerConnection};

use crate::harness::{Op, PATIENCE, Transport, command, serve_plain, tcp_pair};
use crate::raw::{Got, Raw};
use crate::tls_peer::{self, CLIENT_KEY, SERVER_KEY, accept, server_tls, unsealed};

type Accepted = JoinHandle<Result<Identity, Error>>;

/// A client that connects with this to a server with that, and what both say.
fn connect(client: Option<ClientTls>, server: ServerTls) -> (Result<TcpClient, Error>, Accepted) {
    let (ours, theirs) = tcp_pair();
    let accepted =
        std::thread::spawn(move || accept(theirs, &server).map(|stream| stream.identity().clone()));
    let offer = Offer { tls: client, ..Offer::new("test") };
    (TcpClient::from_stream(ours, &offer, Instant::now() + PATIENCE), accepted)
}

#[test]
fn a_server_knows_its_clients_by_their_keys() {
    let server = serve_plain(Transport::Tls);
    let mut client = server.client();
    client.works();
    let identity = server.until("a client", |seen| Some(seen.opened.first()?.1.identity.clone()));
    assert_eq!(identity, Identity::Key(CLIENT_KEY.public()));
}

#[test]
fn a_server_with_another_key_is_not_trusted_and_the_error_has_its_key() {
    let another = SecretKey::generate();
    let client = ClientTls::new(&CLIENT_KEY, &[another.public()]);
    let (connected, accepted) = connect(Some(client), server_tls());
    let error = connected.unwrap_err();
    assert_eq!(error.errno(), libc::EKEYREJECTED);
    assert!(error.to_string().contains(&SERVER_KEY.public().to_string()), "{error}");
    assert!(accepted.join().unwrap().is_err());
}

#[test]
fn a_client_whose_key_is_not_accepted_is_told_so_and_the_server_knows_the_key() {
    let stranger = SecretKey::generate();
    let client = ClientTls::new(&stranger, &[SERVER_KEY.public()]);
    let (connected, accepted) = connect(Some(client), server_tls());
    let error = connected.unwrap_err();
    assert_eq!(error.errno(), libc::EKEYREJECTED, "{error}");
    assert!(error.to_string().contains("does not accept this client's key"), "{error}");
    let error = accepted.join().unwrap().unwrap_err();
    assert_eq!(error.errno(), libc::EKEYREJECTED);
    assert!(error.to_string().contains(&stranger.public().to_string()), "{error}");
}

#[test]
fn a_client_that_learns_a_servers_key_has_it_proven_whether_it_is_known_there_or_not() {
    for key in [&*CLIENT_KEY, &SecretKey::generate()] {
        let (client, proven) = ClientTls::learning(key);
        assert_eq!(proven.get(), None);
        let (ours, theirs) = tcp_pair();
        // A connection that was accepted ends at once.
        let is_accepted = std::thread::spawn(move || accept(theirs, &server_tls()).is_ok());
        let offer = Offer { tls: Some(client), ..Offer::new("test") };
        assert!(TcpClient::from_stream(ours, &offer, Instant::now() + PATIENCE).is_err());
        assert_eq!(is_accepted.join().unwrap(), key.public() == CLIENT_KEY.public());
        assert_eq!(proven.get(), Some(SERVER_KEY.public()));
    }
}

#[test]
fn a_key_that_is_shown_without_a_proof_is_not_learnt() {
    // The server shows another one's key, and signs with its own.
    let signing = |key: &SecretKey| {
        let key = PrivateKeyDer::from_pem_slice(key.to_pem().as_bytes()).unwrap();
        rustls::crypto::ring::sign::any_supported_type(&key).unwrap()
    };
    let shown = signing(&SecretKey::generate()).public_key().unwrap().to_vec();
    let certified = CertifiedKey::new(vec![shown.into()], signing(&SERVER_KEY));
    let mut config = ServerConfig::clone(&server_tls().config());
    config.cert_resolver = Arc::new(AlwaysResolvesServerRawPublicKeys::new(Arc::new(certified)));
    let connection = ServerConnection::new(Arc::new(config)).unwrap();
    let (ours, theirs) = tcp_pair();
    let _clear = unsealed(theirs, connection.into());
    let (client, proven) = ClientTls::learning(&CLIENT_KEY);
    let offer = Offer { tls: Some(client), ..Offer::new("test") };
    let error = TcpClient::from_stream(ours, &offer, Instant::now() + PATIENCE).unwrap_err();
    assert_eq!(error.errno(), libc::EPROTO, "{error}");
    assert_eq!(proven.get(), None);
}

#[test]
fn any_of_several_server_keys_is_trusted() {
    let next = SecretKey::generate();
    let keys = [SERVER_KEY.public(), next.public()];
    for server in [&*SERVER_KEY, &next] {
        let (_, accepted) =
            connect(Some(ClientTls::new(&CLIENT_KEY, &keys)), ServerTls::new(server, |_| true));
        assert_eq!(accepted.join().unwrap().unwrap(), Identity::Key(CLIENT_KEY.public()));
    }
}

#[test]
fn a_client_in_the_clear_is_told_that_it_needs_a_key() {
    let (connected, accepted) = connect(None, server_tls());
    let error = connected.unwrap_err();
    assert_eq!(error.errno(), libc::ENOKEY, "{error}");
    assert!(error.to_string().contains("raio key new"), "{error}");
    assert_eq!(accepted.join().unwrap().unwrap_err().errno(), libc::ENOKEY);
}

#[test]
fn a_client_with_tls_does_not_speak_to_a_server_without() {
    let server = serve_plain(Transport::TcpUring);
    let offer = Offer { tls: Some(tls_peer::client_tls()), ..Offer::new("test") };
    let error = TcpClient::from_stream(server.stream(), &offer, Instant::now() + PATIENCE).unwrap_err();
    assert!(matches!(error.errno(), libc::EPROTO | libc::ECONNRESET), "{error}");
    server.until("a close", |seen| (seen.reasons() == ["magic"]).then_some(()));
    server.serves_others();
}

/// A client by rustls that does not do one of the things that it should.
fn connect_by_rustls(change: impl FnOnce(&mut ClientConfig)) -> Result<AcceptedStream, Error> {
    let mut config = ClientConfig::clone(&tls_peer::client_tls().config());
    change(&mut config);
    let connection = ClientConnection::new(Arc::new(config), "raio".try_into().unwrap()).unwrap();
    let (ours, theirs) = tcp_pair();
    let _clear = unsealed(ours, connection.into());
    accept(theirs, &server_tls())
}

#[test]
fn a_client_must_show_a_key_and_say_that_it_speaks_raio() {
    assert!(connect_by_rustls(|_| ()).is_ok());
    let errors = [
        connect_by_rustls(|config| config.alpn_protocols.clear()),
        connect_by_rustls(|config| config.alpn_protocols = vec![b"http/1.1".to_vec()]),
        connect_by_rustls(|config| config.client_auth_cert_resolver = Arc::new(NoKey)),
    ];
    for outcome in errors {
        let error = outcome.unwrap_err();
        assert_eq!(error.errno(), libc::EPROTO, "{error}");
    }
}

#[derive(Debug)]
struct NoKey;

impl rustls::client::ResolvesClientCert for NoKey {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn only_raw_public_keys(&self) -> bool {
        true
    }

    fn has_certs(&self) -> bool {
        false
    }
}

#[test]
fn a_handshake_that_does_not_go_on_ends_by_its_deadline() {
    let (ours, theirs) = tcp_pair();
    theirs.set_nonblocking(true).unwrap();
    let deadline = Instant::now() + std::time::Duration::from_millis(50);
    let policy = Arc::default();
    let tls = server_tls();
    let theirs = AcceptedStream::new(std::os::fd::OwnedFd::from(theirs));
    let mut accepting = Accepting::new(theirs, &tls, policy, deadline).unwrap();
    assert!(accepting.step(deadline - std::time::Duration::from_millis(1)).is_none());
    assert_eq!(accepting.step_by(), deadline);
    assert_eq!(accepting.step(deadline).unwrap().unwrap_err().errno(), libc::ETIMEDOUT);
    drop(ours);
}

#[test]
fn much_that_comes_with_the_handshake_is_taken_in() {
    takes_in_what_comes_with_the_handshake(Transport::Tls);
}

pub fn takes_in_what_comes_with_the_handshake(transport: Transport) {
    // The hello, and requests behind it, sealed with the end of the handshake.
    let server = serve_plain(transport);
    let mut raw = Raw::client(&server);
    let mut bytes = Offer::new("test").hello();
    for id in 1..9 {
        let request = raio_transport::message::RequestHeader {
            id,
            body_len: 0,
            data_len: 0,
            region: raio_transport::message::RemoteRegion::None,
            has_crc: false,
            data_crc: 0,
        };
        request.encode(&command(Op::Echo, id), false, &mut bytes);
    }
    assert!(raw.send(&bytes));
    raw.handshake_bytes().expect("a welcome comes");
    for id in 1..9 {
        let Got::Response(header, ..) = raw.next() else { panic!("no response") };
        assert_eq!(header.id, id);
    }
}
