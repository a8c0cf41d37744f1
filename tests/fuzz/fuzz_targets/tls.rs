//! TLS with a hostile peer: bytes instead of a handshake, a handshake that was changed on the way or inside
//! its seal, and records that were forged, changed, repeated, left out or exchanged after a good one.
//!
//! However that ends, it ends. Nobody is let in without a key, nothing is opened that was not sealed, and
//! what was sealed and not touched is opened whole.

#![no_main]

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock, Mutex};
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use raio_fuzz::{Input, tls};
use raio_transport::connecting::Connecting;
use raio_transport::handshake::{Identity, Offer, Policy};
use raio_transport::keys::SecretKey;
use raio_transport::memory::{Arena, Buffer, Buffers};
use raio_transport::message::{
    Parsed, RemoteRegion, RequestHeader, ResponseHeader, SessionId, Welcome, parse_handshake,
};
use raio_transport::reactor::{Config, Event, Reactor, Wait};
use raio_transport::tcp::{Accepting, TcpClient, TcpDial, TcpServer};
use raio_transport::tls::{ClientTls, ServerTls};
use raio_transport::transport::{
    AcceptedStream, Body, Bulk, ClientTransport, Handover, RequestKey, Response, SendOptions, ServerEvent,
    ServerTransport,
};
use raio_transport::{Error, Status};
use ring::aead::{AES_128_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::hkdf::{HKDF_SHA256, KeyType, Prk};
use rustls::{
    CipherSuite, ClientConfig, ClientConnection, Connection, KeyLog, ServerConfig, ServerConnection,
};

static CLIENT_KEY: LazyLock<SecretKey> = LazyLock::new(SecretKey::generate);
static SERVER_KEY: LazyLock<SecretKey> = LazyLock::new(SecretKey::generate);
static CLIENT: LazyLock<ClientTls> =
    LazyLock::new(|| ClientTls::new(&CLIENT_KEY, &[SERVER_KEY.public()]).with_records_per_key(3));
static SERVER: LazyLock<ServerTls> =
    LazyLock::new(|| ServerTls::new(&SERVER_KEY, |key| *key == CLIENT_KEY.public()).with_records_per_key(3));
static POLICY: LazyLock<Arc<Policy>> = LazyLock::new(|| {
    Arc::new(Policy { queue_depth: 32, data_bytes_max: 64 << 10, server: [2; 16], ..Policy::default() })
});

/// Data of the requests that a client sends, and room of those that it waits for.
const LENGTHS: [usize; 8] = [0, 1, 24, 20_000, 0, 5000, 300, 17_000];

fuzz_target!(|input: &[u8]| {
    let mut input = Input(input);
    match input.byte() % 6 {
        tls::BYTES_TO_SERVER => bytes_to_server(&mut input),
        tls::BYTES_TO_CLIENT => bytes_to_client(&mut input),
        tls::HANDSHAKE_TO_SERVER => handshake_to_server(&mut input),
        tls::HANDSHAKE_TO_CLIENT => handshake_to_client(&mut input),
        tls::RECORDS_TO_SERVER => WORKER.with_borrow_mut(|worker| worker.records_to_server(&mut input)),
        _ => records_to_client(&mut input),
    }
});

// The peer
// ----------------------------------------------------------------------------------------------------------

/// What rustls derives.
#[derive(Debug, Default)]
struct Secrets(Mutex<HashMap<String, Vec<u8>>>);

impl KeyLog for Secrets {
    fn log(&self, label: &str, _: &[u8], secret: &[u8]) {
        self.0.lock().unwrap().insert(label.into(), secret.into());
    }
}

/// The other side, with a key that is accepted. rustls shakes hands and opens what comes; what is sealed
/// after that, or once more, is sealed here.
struct Peer {
    rustls: Connection,
    secrets: Arc<Secrets>,
    side: &'static str,
    /// What has been opened.
    heard: Vec<u8>,
}

impl Peer {
    fn client() -> Self {
        let secrets = Arc::new(Secrets::default());
        let mut config = ClientConfig::clone(&CLIENT.config());
        config.key_log = secrets.clone();
        let rustls = ClientConnection::new(Arc::new(config), "raio".try_into().unwrap()).unwrap();
        Self { rustls: rustls.into(), secrets, side: "CLIENT", heard: Vec::new() }
    }

    fn server() -> Self {
        let secrets = Arc::new(Secrets::default());
        let mut config = ServerConfig::clone(&SERVER.config());
        config.key_log = secrets.clone();
        let rustls = ServerConnection::new(Arc::new(config)).unwrap();
        Self { rustls: rustls.into(), secrets, side: "SERVER", heard: Vec::new() }
    }

    /// What it sends next of its handshake.
    fn flight(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        while self.rustls.wants_write() {
            self.rustls.write_tls(&mut bytes).unwrap();
        }
        bytes
    }

    /// Takes in what the tested side sends.
    fn hear(&mut self, mut bytes: &[u8]) -> Result<(), rustls::Error> {
        while !bytes.is_empty() {
            if self.rustls.read_tls(&mut bytes).unwrap() == 0 {
                return Ok(());
            }
            let state = self.rustls.process_new_packets()?;
            let begin = self.heard.len();
            self.heard.resize(begin + state.plaintext_bytes_to_read(), 0);
            self.rustls.reader().read_exact(&mut self.heard[begin..]).unwrap();
        }
        Ok(())
    }

    /// The key for what it sends: in the handshake, or after it.
    fn key(&self, secret: &str) -> Key {
        assert_eq!(
            self.rustls.negotiated_cipher_suite().map(|suite| suite.suite()),
            Some(CipherSuite::TLS13_AES_128_GCM_SHA256)
        );
        Key::new(self.secrets.0.lock().unwrap()[&format!("{}_{secret}", self.side)].clone())
    }
}

const DURING: &str = "HANDSHAKE_TRAFFIC_SECRET";
const AFTER: &str = "TRAFFIC_SECRET_0";

/// The key of a direction.
struct Key {
    secret: Vec<u8>,
    key: LessSafeKey,
    iv: [u8; NONCE_LEN],
    records: u64,
}

struct Len(usize);

impl KeyType for Len {
    fn len(&self) -> usize {
        self.0
    }
}

/// HKDF-Expand-Label (RFC 8446, section 7.1) without a context.
fn expand(secret: &[u8], label: &str, len: usize) -> Vec<u8> {
    let label = format!("tls13 {label}");
    let info = [&(len as u16).to_be_bytes()[..], &[label.len() as u8], label.as_bytes(), &[0]];
    let mut out = vec![0; len];
    Prk::new_less_safe(HKDF_SHA256, secret).expand(&info, Len(len)).unwrap().fill(&mut out).unwrap();
    out
}

impl Key {
    fn new(secret: Vec<u8>) -> Self {
        let key = UnboundKey::new(&AES_128_GCM, &expand(&secret, "key", 16)).unwrap();
        let iv = expand(&secret, "iv", NONCE_LEN).try_into().unwrap();
        Self { secret, key: LessSafeKey::new(key), iv, records: 0 }
    }

    /// The one that follows it.
    fn next(&self) -> Self {
        Self::new(expand(&self.secret, "traffic upd", 32))
    }

    fn nonce(&mut self) -> Nonce {
        let mut nonce = self.iv;
        for (byte, number) in nonce[NONCE_LEN - 8..].iter_mut().zip(self.records.to_be_bytes()) {
            *byte ^= number;
        }
        self.records += 1;
        Nonce::assume_unique_for_key(nonce)
    }

    /// A record of this type and data, with some zeros behind it.
    fn seal(&mut self, kind: u8, data: &[u8], zeros: usize) -> Vec<u8> {
        let mut inner = [data, &[kind], &vec![0; zeros]].concat();
        let [high, low] = ((inner.len() + 16) as u16).to_be_bytes();
        let header = [DATA, 3, 3, high, low];
        let nonce = self.nonce();
        self.key.seal_in_place_append_tag(nonce, Aad::from(header), &mut inner).unwrap();
        [&header[..], &inner].concat()
    }

    /// The data in a record that rustls has sealed, and its type.
    fn open(&mut self, record: &[u8]) -> (u8, Vec<u8>) {
        let (header, sealed) = record.split_at(HEADER_BYTES);
        let mut sealed = sealed.to_vec();
        let nonce = self.nonce();
        let inner = self.key.open_in_place(nonce, Aad::from(header), &mut sealed).unwrap();
        let end = inner.iter().rposition(|&byte| byte != 0).unwrap();
        (inner[end], inner[..end].to_vec())
    }
}

const HEADER_BYTES: usize = 5;
const ALERT: u8 = 21;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;
const DATA_BYTES_MAX: usize = 16 << 10;
const UPDATES_MAX: usize = 16;

// What both have
// ----------------------------------------------------------------------------------------------------------

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    (ours, theirs)
}

/// What the tested side has sent.
fn sent(stream: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let mut bytes = [0; 16 << 10];
    while let Ok(n @ 1..) = stream.read(&mut bytes) {
        all.extend_from_slice(&bytes[..n]);
    }
    all
}

/// Cut as a byte of the input says.
fn pieces(size: u8, bytes: &[u8]) -> std::slice::Chunks<'_, u8> {
    bytes.chunks(if size == 0 { bytes.len().max(1) } else { usize::from(size) * 23 })
}

fn accepting(stream: UnixStream) -> Accepting {
    let stream = AcceptedStream::new(OwnedFd::from(stream));
    Accepting::new(stream, &SERVER, Arc::clone(&POLICY), deadline()).unwrap()
}

fn offer() -> Offer {
    Offer { features: 0, session: SessionId([1; 16]), tls: Some(CLIENT.clone()), ..Offer::new("fuzz") }
}

fn dial(stream: UnixStream) -> TcpDial {
    TcpDial::over(TcpStream::from(OwnedFd::from(stream)), &offer(), deadline())
}

/// Nothing here waits for it.
fn deadline() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Takes steps until there is an outcome, or nothing more to do.
fn step<C: Connecting>(connecting: &mut C, outcome: &mut Option<C::Outcome>) {
    if outcome.is_none() {
        *outcome = connecting.step(Instant::now());
    }
}

/// The data of a request or of its response.
fn data(id: usize, len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 7 + at / 251 + id * 37) as u8).collect()
}

// Bytes, and handshakes
// ----------------------------------------------------------------------------------------------------------

fn bytes_to_server(input: &mut Input<'_>) {
    let size = input.byte();
    let (mut ours, theirs) = pair();
    let mut accepting = accepting(theirs);
    let mut outcome = None;
    for piece in pieces(size, input.0) {
        let _ = ours.write_all(piece);
        step(&mut accepting, &mut outcome);
        sent(&mut ours);
    }
    ours.shutdown(Shutdown::Write).unwrap();
    step(&mut accepting, &mut outcome);
    assert!(outcome.expect("it ends with the stream").is_err(), "it has let somebody in without a key");
}

fn bytes_to_client(input: &mut Input<'_>) {
    let size = input.byte();
    let (mut ours, theirs) = pair();
    let mut dial = dial(theirs);
    let mut outcome = None;
    step(&mut dial, &mut outcome);
    for piece in pieces(size, input.0) {
        let _ = ours.write_all(piece);
        step(&mut dial, &mut outcome);
        sent(&mut ours);
    }
    ours.shutdown(Shutdown::Write).unwrap();
    step(&mut dial, &mut outcome);
    assert!(outcome.expect("it ends with the stream").is_err(), "it trusts a server without a key");
}

/// Some changes of these bytes. Whether there are any.
fn change(input: &mut Input<'_>, bytes: &mut Vec<u8>) -> bool {
    let before = bytes.clone();
    for _ in 0..input.byte() % 4 {
        let how = input.byte();
        let at = usize::from(u16::from_be_bytes([input.byte(), input.byte()])) % (bytes.len() + 1);
        let n = usize::from(input.byte());
        match how % 5 {
            0 => {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = n as u8;
                }
            }
            1 => {
                bytes.drain(at..bytes.len().min(at + n));
            }
            2 => {
                let new = input.bytes(n);
                bytes.splice(at..at, new);
            }
            3 => {
                let again = bytes[at..bytes.len().min(at + n)].to_vec();
                bytes.splice(at..at, again);
            }
            _ => bytes.truncate(at),
        }
    }
    *bytes != before
}

/// A flight of the handshake as the input changes it: as it travels, or what is sealed in it. Whether the
/// tested side must not accept that, and whether it must.
fn changed(input: &mut Input<'_>, peer: &mut Peer, is_inside: bool) -> (Vec<u8>, bool, bool) {
    let mut flight = peer.flight();
    if !is_inside {
        // Some bytes mean nothing: a record's version, what is in change_cipher_spec.
        let is_changed = change(input, &mut flight);
        return (flight, false, !is_changed);
    }
    let (mut clear, mut inner) = (Vec::new(), Vec::new());
    let mut key = peer.key(DURING);
    let mut rest = &flight[..];
    while let &[kind, _, _, high, low, ..] = rest {
        let (record, after) = rest.split_at(HEADER_BYTES + usize::from(u16::from_be_bytes([high, low])));
        rest = after;
        if kind == DATA {
            let (kind, data) = key.open(record);
            assert_eq!(kind, HANDSHAKE);
            inner.extend(data);
        } else {
            clear.extend_from_slice(record);
        }
    }
    let size = usize::from(input.byte()) * 7 + 20;
    let before = inner.clone();
    let is_changed = change(input, &mut inner);
    let mut key = peer.key(DURING);
    clear.extend(inner.chunks(size).flat_map(|piece| key.seal(HANDSHAKE, piece, size % 3)));
    // What is behind the last message is opened by the next key, or not at all.
    (clear, !inner.starts_with(&before), !is_changed)
}

fn handshake_to_server(input: &mut Input<'_>) {
    let (size, is_inside) = (input.byte(), input.byte() % 2 == 1);
    let mut peer = Peer::client();
    let (mut ours, theirs) = pair();
    let mut accepting = accepting(theirs);
    let mut outcome = None;
    let (mut never, mut always) = (false, true);
    for flight in 0..2 {
        let (bytes, must_not, must) = if flight == 0 && is_inside {
            (peer.flight(), false, true)
        } else if is_inside && peer.rustls.is_handshaking() {
            break;
        } else {
            changed(input, &mut peer, is_inside)
        };
        (never, always) = (never || must_not, always && must);
        for piece in pieces(size, &bytes) {
            let _ = ours.write_all(piece);
            step(&mut accepting, &mut outcome);
        }
        let _ = peer.hear(&sent(&mut ours));
    }
    ours.shutdown(Shutdown::Write).unwrap();
    step(&mut accepting, &mut outcome);
    match outcome.expect("it ends with the stream") {
        Ok(stream) => {
            assert!(!never, "it accepts a handshake that was changed");
            assert_eq!(*stream.identity(), Identity::Key(CLIENT_KEY.public()));
        }
        Err(error) => assert!(!always, "{error}"),
    }
}

fn handshake_to_client(input: &mut Input<'_>) {
    let (size, is_inside) = (input.byte(), input.byte() % 2 == 1);
    let mut peer = Peer::server();
    let (mut ours, theirs) = pair();
    let mut dial = dial(theirs);
    let mut outcome = None;
    step(&mut dial, &mut outcome);
    peer.hear(&sent(&mut ours)).expect("a hello");
    let (bytes, never, always) = changed(input, &mut peer, is_inside);
    for piece in pieces(size, &bytes) {
        let _ = ours.write_all(piece);
        step(&mut dial, &mut outcome);
    }
    let _ = peer.hear(&sent(&mut ours));
    ours.shutdown(Shutdown::Write).unwrap();
    step(&mut dial, &mut outcome);
    let error = outcome.expect("it ends with the stream").map(drop).expect_err("nobody has welcomed it");
    let hello = offer().hello();
    assert!(peer.heard.is_empty() || peer.heard == hello, "it says something else than its hello");
    assert!(!never || peer.heard.is_empty(), "it accepts a handshake that was changed");
    assert!(!always || peer.heard == hello, "{error}");
}

// Records
// ----------------------------------------------------------------------------------------------------------

/// Records, as the input has them made.
struct Stream {
    bytes: Vec<u8>,
    /// How much of the plaintext is sealed in front of what is not to be opened.
    opens: usize,
    /// There is something that is not to be opened.
    is_broken: bool,
}

impl Stream {
    fn new(key: Key, plain: &[u8], input: &mut Input<'_>) -> Self {
        let mut this = Self { bytes: Vec::new(), opens: 0, is_broken: false };
        let mut key = key;
        let (mut taken, mut updates) = (0, 0);
        let mut late = Vec::new();
        while !input.0.is_empty() {
            let what = input.byte();
            let (mut ends, mut is_sealed) = (false, true);
            let record = match what & 15 {
                kind @ 0..=4 => {
                    let wanted = [1, 40, 300, 5000, DATA_BYTES_MAX][usize::from(kind)];
                    let piece = &plain[taken..plain.len().min(taken + wanted)];
                    taken += piece.len();
                    updates = 0;
                    key.seal(DATA, piece, 0)
                }
                5 => {
                    let piece = &plain[taken..plain.len().min(taken + 9)];
                    taken += piece.len();
                    updates = 0;
                    key.seal(DATA, piece, usize::from(input.byte()))
                }
                6 => {
                    updates = 0;
                    key.seal(DATA, &[], 0)
                }
                kind @ 7..=8 => {
                    let record = key.seal(HANDSHAKE, &[24, 0, 0, 1, kind - 7], 0);
                    key = key.next();
                    updates += 1;
                    ends = updates > UPDATES_MAX;
                    record
                }
                9 => {
                    ends = true;
                    let len = usize::from(input.byte() % 4);
                    key.seal(ALERT, &input.bytes(len), 0)
                }
                10 => {
                    ends = true;
                    let kind = [20, HANDSHAKE, 24, 255][input.index(4)];
                    let len = usize::from(input.byte());
                    let message = input.bytes(len);
                    // That would be an update, without the next key.
                    let front = if message.len() == 5 { 4 } else { message.len() };
                    key.seal(kind, &message[..front], 0)
                }
                11 => {
                    (ends, is_sealed) = (true, false);
                    let front = [[20, ALERT, HANDSHAKE, DATA][input.index(4)], 3, 3, 0];
                    let len = input.byte();
                    [&front[..], &[len], &input.bytes(len.into())].concat()
                }
                12 => {
                    let len = input.byte();
                    let bytes = input.bytes(len.into());
                    (ends, is_sealed) = (!bytes.is_empty(), false);
                    bytes
                }
                13 => {
                    ends = true;
                    key.seal(DATA, &vec![b'x'; DATA_BYTES_MAX + 1 + usize::from(input.byte()) * 2], 0)
                }
                14 => {
                    ends = true;
                    key.seal(0, &[], usize::from(input.byte()))
                }
                _ => {
                    ends = true;
                    key.seal(ALERT, &[1, 0], 0)
                }
            };
            let mut record = record;
            let mut is_whole = true;
            let mut follows = std::mem::take(&mut late);
            match what >> 4 {
                8 | 9 => {
                    // Left out.
                    record.clear();
                    is_whole = false;
                }
                10 if follows.is_empty() => {
                    // Behind the next one.
                    late = std::mem::take(&mut record);
                    is_whole = false;
                }
                11 => follows.extend_from_slice(&record),
                12 | 13 => {
                    let at = usize::from(u16::from_be_bytes([input.byte(), input.byte()]));
                    let at = at % record.len().max(1);
                    if let Some(byte) = record.get_mut(at) {
                        *byte ^= 1 << (what >> 4 & 7);
                        is_whole = false;
                    }
                }
                14 => {
                    let end = usize::from(input.byte()).min(record.len());
                    is_whole = end == record.len();
                    record.truncate(end);
                }
                _ => {}
            }
            // Who leaves out what was not sealed has done nothing.
            let is_nothing = record.is_empty() && !is_sealed;
            this.extend(&record, is_nothing || !ends && is_whole, taken);
            if !follows.is_empty() {
                this.extend(&follows, false, taken);
            }
        }
        // What is left, so that an input which breaks nothing has all of it opened.
        for piece in plain[taken..].chunks(DATA_BYTES_MAX) {
            let record = key.seal(DATA, piece, 0);
            taken += piece.len();
            this.extend(&record, true, taken);
        }
        this
    }

    /// Appends what opens, or what does not. The plaintext is sealed up to `taken`.
    fn extend(&mut self, bytes: &[u8], opens: bool, taken: usize) {
        self.bytes.extend_from_slice(bytes);
        self.is_broken |= !opens;
        if !self.is_broken {
            self.opens = taken;
        }
    }
}

/// What a client says: its hello, and requests. Where each of them ends.
fn client_says() -> (Vec<u8>, Vec<usize>) {
    let mut bytes = offer().hello();
    let mut ends = vec![bytes.len()];
    for (id, len) in LENGTHS.into_iter().enumerate() {
        let region = RemoteRegion::None;
        let data_len = len as u32;
        RequestHeader { id: id as u64, body_len: 0, data_len, region, has_crc: false, data_crc: 0 }.encode(
            &[id as u8; 24],
            false,
            &mut bytes,
        );
        bytes.extend(data(id, len));
        ends.push(bytes.len());
    }
    (bytes, ends)
}

thread_local! {
    static WORKER: RefCell<Worker> = RefCell::new(Worker::new());
}

/// A server after the handshake. It is made once: what an input leaves behind, the next one finds.
struct Worker {
    reactor: Reactor,
    transport: TcpServer,
    arena: Arena,
    events: Vec<Event>,
    is_open: bool,
    is_closed: bool,
    /// Requests whose data has not come, and how many have come whole.
    unanswered: HashSet<RequestKey>,
    complete: usize,
}

impl Worker {
    fn new() -> Self {
        let config = Config {
            epoll: true,
            spin: Duration::ZERO,
            received_count: 4,
            received_bytes: 4096,
            ..Config::default()
        };
        Self {
            reactor: Reactor::new(&config).unwrap(),
            transport: TcpServer::new(1, Arc::clone(&POLICY)),
            arena: Arena::new(4 << 20, 64 << 10).unwrap(),
            events: Vec::new(),
            is_open: false,
            is_closed: false,
            unanswered: HashSet::new(),
            complete: 0,
        }
    }

    fn records_to_server(&mut self, input: &mut Input<'_>) {
        let size = input.byte();
        let mut peer = Peer::client();
        let (mut ours, theirs) = pair();
        let mut accepting = accepting(theirs);
        let mut outcome = None;
        ours.write_all(&peer.flight()).unwrap();
        step(&mut accepting, &mut outcome);
        peer.hear(&sent(&mut ours)).expect("the server's flight");
        let last = peer.flight();
        let (plain, ends) = client_says();
        let stream = Stream::new(peer.key(AFTER), &plain, input);

        (self.is_open, self.is_closed, self.complete) = (false, false, 0);
        self.unanswered.clear();
        let mut heard = Ok(());
        let mut is_adopted = false;
        // The first records may come with the end of the handshake.
        for piece in pieces(size, &[&last[..], &stream.bytes].concat()) {
            let mut left = piece;
            for _ in 0..1000 {
                match ours.write(left) {
                    Ok(n) => left = &left[n..],
                    Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                    Err(_) => left = &[],
                }
                if !is_adopted {
                    step(&mut accepting, &mut outcome);
                    if let Some(outcome) = outcome.take() {
                        let accepted = outcome.expect("the handshake is good");
                        self.transport.adopt(&mut self.reactor, accepted);
                        is_adopted = true;
                    }
                }
                self.run_once();
                heard = heard.and_then(|()| peer.hear(&sent(&mut ours)));
                if left.is_empty() {
                    break;
                }
            }
        }
        assert!(is_adopted, "the handshake was whole");
        for _ in 0..100 {
            if self.is_closed || !stream.is_broken && self.complete == LENGTHS.len() {
                break;
            }
            self.run_once();
            heard = heard.and_then(|()| peer.hear(&sent(&mut ours)));
        }
        let _ = ours.shutdown(Shutdown::Write);
        for _ in 0..1000 {
            if self.is_closed && self.transport.connections() == 0 {
                break;
            }
            self.run_once();
            heard = heard.and_then(|()| peer.hear(&sent(&mut ours)));
        }
        assert!(self.is_closed && self.transport.connections() == 0, "the connection has not ended");
        assert_eq!((self.reactor.in_flight(), self.arena.used_bytes()), (0, 0), "something is left");
        let sealed = ends.iter().filter(|&&end| end <= stream.opens).count();
        let opened = usize::from(self.is_open) + self.complete;
        assert!(opened <= sealed, "{opened} messages were opened of {sealed}");
        if !stream.is_broken {
            assert_eq!(opened, 1 + LENGTHS.len(), "what was sealed is not opened");
            heard.expect("it seals what it says");
            let welcome = parse_handshake::<Welcome>(&peer.heard);
            assert!(matches!(welcome, Ok(Parsed::Item(..))), "it has not welcomed the client");
        }
    }

    fn run_once(&mut self) {
        self.transport.run_once(&mut self.reactor, Wait::Poll, &mut self.events).unwrap();
        while let Some(event) = self.transport.next_event() {
            match event {
                ServerEvent::Opened(..) => self.is_open = true,
                ServerEvent::Closed(..) => self.is_closed = true,
                ServerEvent::Moved(..) => unreachable!("there is one transport"),
                ServerEvent::Request(request) => {
                    let id = request.key.id as usize;
                    assert_eq!(id, self.complete + self.unanswered.len(), "requests come in order");
                    self.unanswered.insert(request.key);
                    assert!(*request.body == [id as u8; 24] && request.data_len as usize == LENGTHS[id]);
                    if request.data_len == 0 {
                        self.answer(request.key);
                        continue;
                    }
                    let slot = self.arena.alloc(LENGTHS[id]).expect("there is room for all of them");
                    self.transport.fetch(&mut self.reactor, request.key, slot, 0);
                }
                ServerEvent::Fetched(key, range) => {
                    let id = key.id as usize;
                    assert!(*range.bytes() == data(id, LENGTHS[id]), "what came is not what was sealed");
                    drop(range);
                    self.answer(key);
                }
                ServerEvent::Damaged(..) => unreachable!("nobody has asked for checksums"),
                ServerEvent::OneWay(..)
                | ServerEvent::Receipt(..)
                | ServerEvent::Refused(_)
                | ServerEvent::Answered(..) => unreachable!("nobody has offered any"),
            }
        }
        while let Some(handover) = self.transport.next_handover() {
            self.is_closed |= matches!(handover, Handover::Ended { .. });
        }
        self.transport.flush(&mut self.reactor);
    }

    fn answer(&mut self, key: RequestKey) {
        assert!(self.unanswered.remove(&key), "a request comes once");
        self.complete += 1;
        let response = Response { status: Status::OK, result: 0, body: Body::from(&[][..]), data: None };
        self.transport.respond(&mut self.reactor, key, response);
    }
}

/// What a server says: its welcome, and responses behind that. Where each response ends.
fn server_says() -> (Vec<u8>, Vec<u8>, Vec<usize>) {
    let Ok(Parsed::Item((_, welcome), _)) = POLICY.welcome(&offer().hello()) else { unreachable!() };
    let (mut bytes, mut ends) = (Vec::new(), Vec::new());
    for (id, len) in LENGTHS.into_iter().enumerate() {
        let response = ResponseHeader {
            id: id as u64,
            body_len: 0,
            data_len: len as u32,
            status: Status::OK,
            credits: 1,
            result: len as u64,
            has_crc: false,
            data_crc: 0,
        };
        response.encode(&[], false, &mut bytes);
        bytes.extend(data(id, len));
        ends.push(bytes.len());
    }
    (welcome, bytes, ends)
}

fn records_to_client(input: &mut Input<'_>) {
    let (size, from_the_welcome_on) = (input.byte(), input.byte() % 2 == 1);
    let mut peer = Peer::server();
    let (mut ours, theirs) = pair();
    let mut dial = dial(theirs);
    let mut outcome: Option<Result<TcpClient, Error>> = None;
    step(&mut dial, &mut outcome);
    peer.hear(&sent(&mut ours)).expect("a hello");
    let flight = peer.flight();
    let (welcome, responses, ends) = server_says();
    let mut key = peer.key(AFTER);
    if from_the_welcome_on {
        let stream = Stream::new(key, &welcome, input);
        for piece in pieces(size, &[flight, stream.bytes].concat()) {
            let _ = ours.write_all(piece);
            step(&mut dial, &mut outcome);
        }
        let _ = ours.shutdown(Shutdown::Write);
        step(&mut dial, &mut outcome);
        match outcome.expect("it ends with the stream") {
            Ok(_) => assert_eq!(stream.opens, welcome.len(), "the welcome was not sealed"),
            Err(error) => assert!(stream.is_broken, "{error}"),
        }
        return;
    }
    ours.write_all(&[flight, key.seal(DATA, &welcome, 0)].concat()).unwrap();
    step(&mut dial, &mut outcome);
    let mut client = outcome.expect("it is welcome").expect("it is welcome");
    for (id, len) in LENGTHS.into_iter().enumerate() {
        let bulk = Bulk::In(Buffers::One(Buffer::Owned(vec![0; len].into())));
        assert!(client.send(id as u64, &[4; 24], bulk, SendOptions::PLAIN).is_ok());
    }
    client.flush();
    let mut heard = peer.hear(&sent(&mut ours));
    let stream = Stream::new(key, &responses, input);
    let mut replies = Vec::new();
    for piece in pieces(size, &stream.bytes) {
        let _ = ours.write_all(piece);
        client.receive(&mut replies);
        heard = heard.and_then(|()| peer.hear(&sent(&mut ours)));
    }
    for _ in 0..100 {
        if replies.len() == LENGTHS.len() {
            break;
        }
        client.receive(&mut replies);
    }
    heard = heard.and_then(|()| peer.hear(&sent(&mut ours)));
    let _ = ours.shutdown(Shutdown::Write);
    for _ in 0..1000 {
        if client.failure().is_some() {
            break;
        }
        client.receive(&mut replies);
    }
    client.receive(&mut replies);
    assert!(client.failure().is_some(), "the end of the stream does not end the connection");
    assert_eq!((client.outstanding(), replies.len()), (0, LENGTHS.len()), "each request ends once");
    let sealed = ends.iter().filter(|&&end| end <= stream.opens).count();
    for reply in &replies {
        let id = reply.tag as usize;
        if !reply.status.is_ok() {
            assert!(stream.is_broken, "what was sealed is not opened: {:?}", client.failure());
            continue;
        }
        assert!(id < sealed, "a response was opened that was not sealed");
        let Bulk::In(Buffers::One(Buffer::Owned(bytes))) = &reply.bulk else {
            panic!("the buffers have not come back");
        };
        assert!(reply.data_len == LENGTHS[id] && bytes[..] == data(id, LENGTHS[id])[..]);
    }
    if !stream.is_broken {
        heard.expect("it seals what it says");
    }
}
