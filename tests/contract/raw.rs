//! A peer by hand: it says exactly what a test wants it to say, on either side.

use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use raio_transport::error::{Class, Status};
use raio_transport::handshake::{Grant, Offer, Policy};
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message::{
    self, HANDSHAKE_BYTES, HandshakeOption, Limits, Message, Parsed, QueuePairAddress, RemoteRegion, Welcome,
};
use raio_transport::transport::ClientTransport;
use raio_transport::{loopback, mux, rdma, tcp};

use crate::harness::{Client, PATIENCE, Server, Transport, rdma_listener, rdma_source, tcp_pair_by_rdma};
use crate::rdma_end::{self, End};
use crate::tls_peer;

/// A peer's end of a connection.
pub struct Raw {
    wire: Wire,
    pub limits: Limits,
    /// What came together with the last message.
    rest: Vec<u8>,
}

enum Wire {
    /// And what has been read of it.
    Tcp(TcpStream, Vec<u8>),
    Loopback(loopback::LoopbackEnd),
    Rdma(Box<dyn End>),
    /// The queue pair, and the TCP connection that it was exchanged over.
    RdmaAfterTcp(Box<dyn End>, TcpStream),
}

/// What came.
#[derive(Debug, PartialEq)]
pub enum Got {
    Request(message::RequestHeader, Vec<u8>, Vec<u8>),
    /// With the data, on TCP.
    Response(message::ResponseHeader, Vec<u8>, Vec<u8>),
    Ping(u64),
    Pong(u64),
    Goaway(Status, String),
    OneWay(Vec<u8>, bool),
    Receipt(message::Receipt),
    QueuePair(Result<QueuePairAddress, (Status, String)>),
    /// The other side is gone.
    End,
}

/// A rejection, or a grant's fixed part, with the options.
pub struct Answer {
    pub welcome: Welcome,
    /// Kind, flags and value of each.
    pub options: Vec<(u16, u16, Vec<u8>)>,
}

impl Raw {
    fn new(wire: Wire) -> Self {
        if let Wire::Tcp(stream, _) = &wire {
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            stream.set_write_timeout(Some(PATIENCE)).unwrap();
        }
        Self {
            wire,
            limits: Limits { crc: false, request_crc: false, data_bytes_max: u32::MAX, pong_time: false },
            rest: Vec::new(),
        }
    }

    /// A peer over a stream, which has not said anything.
    pub fn over_stream(stream: TcpStream) -> Self {
        Self::new(Wire::Tcp(stream, Vec::new()))
    }

    /// A client that has not said anything.
    pub fn client(server: &Server) -> Self {
        match server.transport {
            Transport::Loopback => Self::new(Wire::Loopback(server.link())),
            Transport::Rdma => {
                let end = rdma_end::connect(server.rdma_address(), rdma_source(), None).unwrap();
                Self::new(Wire::Rdma(end))
            }
            _ => Self::new(Wire::Tcp(server.stream(), Vec::new())),
        }
    }

    /// A client that has shaken hands.
    pub fn open_client(server: &Server, offer: &Offer) -> (Self, Grant) {
        if server.transport != Transport::RdmaAfterTcp {
            return Self::client(server).open(offer);
        }
        let offer = Offer { queue_pair: true, ..offer.clone() };
        let (mut raw, grant) = Self::client(server).open(&offer);
        let (end, ours) = raw.unjoined();
        raw.send_queue_pair(&ours);
        let theirs = raw.next_queue_pair();
        raw.join(end, &ours, &theirs);
        raw.set_receives(grant.messages_max() + 8);
        (raw, grant)
    }

    /// A queue pair by the stream's address, and what to say of it.
    pub fn unjoined(&mut self) -> (Box<dyn End>, QueuePairAddress) {
        rdma_end::unjoined(self.stream().local_addr().unwrap().ip()).unwrap()
    }

    /// Tells the other side.
    pub fn send_queue_pair(&mut self, ours: &QueuePairAddress) {
        let mut bytes = Vec::new();
        message::encode_queue_pair(Ok(ours), self.limits.crc, &mut bytes);
        self.send(&bytes);
    }

    /// What the other side tells.
    pub fn next_queue_pair(&mut self) -> QueuePairAddress {
        match self.next() {
            Got::QueuePair(Ok(theirs)) => theirs,
            other => panic!("{other:?} is no queue pair"),
        }
    }

    /// Moves to the queue pair.
    pub fn join(&mut self, mut end: Box<dyn End>, ours: &QueuePairAddress, theirs: &QueuePairAddress) {
        end.join(ours, theirs).unwrap();
        let stream = self.stream().try_clone().unwrap();
        stream.set_nonblocking(true).unwrap();
        self.wire = Wire::RdmaAfterTcp(end, stream);
    }

    /// The same, over a stream with small buffers.
    pub fn open_narrow_client(server: &Server, offer: &Offer) -> (Self, Grant) {
        Self::new(Wire::Tcp(server.narrow_stream(), Vec::new())).open(offer)
    }

    fn open(self, offer: &Offer) -> (Self, Grant) {
        let mut raw = self;
        raw.send(&offer.hello());
        let bytes = raw.handshake_bytes().expect("a welcome comes");
        let Parsed::Item(grant, _) = offer.grant(&bytes).unwrap() else { panic!("half a welcome") };
        (raw.limits.crc, raw.limits.request_crc) = (grant.limits().crc, grant.limits().request_crc);
        raw.set_receives(grant.messages_max() + 8);
        (raw, grant)
    }

    fn set_receives(&mut self, receives: usize) {
        match &mut self.wire {
            Wire::Tcp(..) => {}
            Wire::Loopback(end) => end.set_receives(receives),
            Wire::Rdma(end) | Wire::RdmaAfterTcp(end, _) => end.set_receives(receives).unwrap(),
        }
    }

    /// A server by hand, and the client that talks to it.
    pub fn server(transport: Transport, policy: &Policy, features: u64) -> (Client, Self) {
        Self::busy_server(transport, policy, features, Duration::ZERO)
    }

    /// The same, with a server that does nothing for a while before it answers over its queue pair.
    pub fn busy_server(
        transport: Transport,
        policy: &Policy,
        features: u64,
        busy: Duration,
    ) -> (Client, Self) {
        Self::server_for(transport, policy, Offer { features, ..Offer::new("test") }, busy)
    }

    /// The same, for a client that offers this.
    pub fn server_for(transport: Transport, policy: &Policy, offer: Offer, busy: Duration) -> (Client, Self) {
        let (client, mut raw) = Self::server_before_handshake(transport, offer);
        let hello = raw.handshake_bytes().expect("a hello comes");
        let policy = Policy { queue_pair: transport == Transport::RdmaAfterTcp, ..policy.clone() };
        let Parsed::Item((peer, welcome), _) = policy.welcome(&hello).unwrap() else {
            panic!("half a hello")
        };
        raw.set_receives(1024);
        raw.send(&welcome);
        raw.limits = peer.grant.limits();
        if peer.grant.queue_pair {
            let theirs = raw.next_queue_pair();
            let (end, ours) = raw.unjoined();
            let ours = QueuePairAddress { psn: theirs.peer_psn, peer_psn: theirs.psn, reads: 0, ..ours };
            let stream = raw.stream().try_clone().unwrap();
            raw.join(end, &ours, &theirs);
            raw.set_receives(1024);
            let mut over_tcp = Self::over_stream(stream);
            over_tcp.limits = raw.limits;
            over_tcp.stream().set_nonblocking(false).unwrap();
            over_tcp.send_queue_pair(&ours);
            over_tcp.stream().set_nonblocking(true).unwrap();
            let Got::Ping(ping) = raw.next() else { panic!("the client does not try the queue pair") };
            let mut pong = Vec::new();
            message::encode_pong(ping, 0, raw.limits.crc, &mut pong);
            std::thread::sleep(busy);
            raw.send(&pong);
        }
        (Client::over(client.join().unwrap().unwrap()), raw)
    }

    /// A server by hand, and the thread in which a client is about to shake hands with it.
    #[expect(clippy::type_complexity, reason = "a thread's result")]
    pub fn server_before_handshake(
        transport: Transport,
        offer: Offer,
    ) -> (std::thread::JoinHandle<Result<Box<dyn ClientTransport>, raio_transport::Error>>, Self) {
        Self::server_with_deadline(transport, offer, PATIENCE)
    }

    /// The same, with the time that the client allows.
    #[expect(clippy::type_complexity, reason = "a thread's result")]
    pub fn server_with_deadline(
        transport: Transport,
        offer: Offer,
        time: Duration,
    ) -> (std::thread::JoinHandle<Result<Box<dyn ClientTransport>, raio_transport::Error>>, Self) {
        let deadline = Instant::now() + time;
        match transport {
            Transport::Loopback => {
                let (ours, theirs) = loopback::LoopbackEnd::pair().unwrap();
                let thread = std::thread::spawn(move || {
                    loopback::LoopbackClient::from_end(theirs, &offer, deadline)
                        .map(|client| Box::new(client) as _)
                });
                (thread, Self::new(Wire::Loopback(ours)))
            }
            Transport::Rdma => {
                let listener = rdma_listener();
                let address = listener.address();
                let thread =
                    std::thread::spawn(move || rdma::connect(address, rdma_source(), &offer, deadline));
                let incoming = loop {
                    match listener.accept() {
                        Some(incoming) => break incoming,
                        None => std::thread::sleep(Duration::from_millis(1)),
                    }
                    assert!(Instant::now() < deadline + PATIENCE, "the client does not connect");
                };
                (thread, Self::new(Wire::Rdma(rdma_end::accept(incoming).unwrap())))
            }
            Transport::RdmaAfterTcp => {
                let (theirs, ours) = tcp_pair_by_rdma();
                ours.set_nonblocking(false).unwrap();
                let thread = std::thread::spawn(move || {
                    let offer = Offer { queue_pair: true, ..offer };
                    let stream = tcp::TcpClient::from_stream(theirs, &offer, deadline)?;
                    if !stream.grant().queue_pair {
                        return Ok(Box::new(stream) as _);
                    }
                    mux::upgrade(stream, deadline).map_err(|(_, error)| error)
                });
                (thread, Self::new(Wire::Tcp(ours, Vec::new())))
            }
            _ => {
                let (theirs, mut ours) = transport.stream_pair();
                ours.set_nonblocking(false).unwrap();
                // A Unix socket has no such option.
                let _ = ours.set_nodelay(true);
                let mut offer = offer;
                if transport.has_tls() {
                    offer.tls = Some(transport.client_tls());
                    ours = tls_peer::unsealed(ours, tls_peer::server());
                }
                let thread = std::thread::spawn(move || {
                    tcp::TcpClient::from_stream(theirs, &offer, deadline).map(|client| Box::new(client) as _)
                });
                (thread, Self::new(Wire::Tcp(ours, Vec::new())))
            }
        }
    }

    /// The stream, to misbehave below the level of messages.
    pub fn stream(&mut self) -> &mut TcpStream {
        match &mut self.wire {
            Wire::Tcp(stream, _) | Wire::RdmaAfterTcp(_, stream) => stream,
            Wire::Loopback(_) | Wire::Rdma(_) => panic!("it has no stream"),
        }
    }

    /// The link, to misbehave with memory.
    pub fn end(&self) -> &loopback::LoopbackEnd {
        match &self.wire {
            Wire::Loopback(end) => end,
            _ => panic!("it is no link"),
        }
    }

    /// The queue pair, to misbehave with memory.
    pub fn rdma(&mut self) -> &mut dyn End {
        match &mut self.wire {
            Wire::Rdma(end) | Wire::RdmaAfterTcp(end, _) => &mut **end,
            Wire::Tcp(..) | Wire::Loopback(_) => panic!("it has no queue pair"),
        }
    }

    /// Places data in the client's memory, where the transport has such a thing.
    pub fn place(&mut self, region: RemoteRegion, data: &[u8]) {
        match &mut self.wire {
            Wire::Tcp(..) => panic!("TCP places nothing"),
            Wire::Loopback(end) => assert!(end.place(region, data)),
            Wire::Rdma(end) | Wire::RdmaAfterTcp(end, _) => assert!(end.place(region, data)),
        }
    }

    /// Sends a whole message. False if the other side does not take it (any more).
    pub fn send(&mut self, message: &[u8]) -> bool {
        match &mut self.wire {
            Wire::Tcp(stream, _) => stream.write_all(message).is_ok(),
            Wire::Rdma(end) | Wire::RdmaAfterTcp(end, _) => end.send(message),
            Wire::Loopback(end) => {
                let mut message = message.to_vec();
                let deadline = Instant::now() + PATIENCE;
                while Instant::now() < deadline {
                    message = match end.send(message) {
                        Ok(()) => return true,
                        Err(loopback::Rejected::Gone) => return false,
                        Err(loopback::Rejected::Full(message)) => message,
                    };
                    std::thread::sleep(Duration::from_millis(1));
                }
                false
            }
        }
    }

    /// Sends whole messages without data, each alone, as far as they are taken.
    pub fn send_each(&mut self, mut messages: &[u8]) {
        let limits = self.limits;
        while let Some((_, len)) = got(messages, &limits) {
            self.send(&messages[..len]);
            messages = &messages[len..];
            if messages.is_empty() {
                break;
            }
        }
    }

    /// A request with data inline.
    pub fn request(&mut self, id: u64, body: &[u8], data: &[u8]) -> bool {
        let data_crc = if self.limits.crc { message::data_crc(data) } else { 0 };
        let data_len = data.len() as u32;
        let request = message::RequestHeader {
            id,
            body_len: 0,
            data_len,
            region: RemoteRegion::None,
            has_crc: false,
            data_crc,
        };
        let mut bytes = Vec::new();
        request.encode(body, self.limits.crc, &mut bytes);
        bytes.extend_from_slice(data);
        self.send(&bytes)
    }

    /// A request with room for data. Where it is placed the memory is really there.
    pub fn request_in(&mut self, id: u64, body: &[u8], len: u32) -> bool {
        let (address, key) = match &mut self.wire {
            Wire::Tcp(..) => (0, 0),
            Wire::Rdma(end) | Wire::RdmaAfterTcp(end, _) => {
                end.expose(loopback::Access::Write, len.max(1) as usize).unwrap()
            }
            Wire::Loopback(end) => {
                let buffers = Buffers::One(Buffer::Owned(vec![0; len as usize].into()));
                (0, end.expose(loopback::Access::Write, buffers))
            }
        };
        let region = RemoteRegion::In { address, key, len };
        let request =
            message::RequestHeader { id, body_len: 0, data_len: 0, region, has_crc: false, data_crc: 0 };
        let mut bytes = Vec::new();
        request.encode(body, self.limits.crc, &mut bytes);
        self.send(&bytes)
    }

    /// The answer to a request whose data is wherever this transport wants it.
    pub fn respond(&mut self, request: &message::RequestHeader, data: &[u8]) {
        let has_crc = self.limits.crc || request.has_crc;
        let data_crc = if has_crc { message::data_crc(data) } else { 0 };
        self.respond_with(request, data, data_crc);
    }

    /// The same, with this checksum of the data.
    pub fn respond_with(&mut self, request: &message::RequestHeader, data: &[u8], data_crc: u32) {
        let mut bytes = Vec::new();
        let mut response = answer_to(request.id);
        response.data_len = data.len() as u32;
        response.result = data.len() as u64;
        (response.has_crc, response.data_crc) = (request.has_crc, data_crc);
        response.encode(&[], self.limits.crc, &mut bytes);
        match self.wire {
            Wire::Tcp(..) => bytes.extend_from_slice(data),
            _ => self.place(request.region, data),
        }
        self.send(&bytes);
    }

    /// The next handshake message; None if the other side ends instead.
    pub fn handshake_bytes(&mut self) -> Option<Vec<u8>> {
        match &mut self.wire {
            Wire::Loopback(_) | Wire::Rdma(_) | Wire::RdmaAfterTcp(..) => self.whole_message(),
            Wire::Tcp(stream, _) => {
                let mut bytes = vec![0; HANDSHAKE_BYTES];
                stream.read_exact(&mut bytes).ok()?;
                let options = u32::from_le_bytes(bytes[12..16].try_into().unwrap()) as usize;
                bytes.resize(HANDSHAKE_BYTES + options, 0);
                stream.read_exact(&mut bytes[HANDSHAKE_BYTES..]).ok()?;
                Some(bytes)
            }
        }
    }

    /// The server's answer to a hello.
    pub fn answer(&mut self) -> Option<Answer> {
        let bytes = self.handshake_bytes()?;
        let Parsed::Item((welcome, options), _) = message::parse_handshake::<Welcome>(&bytes).unwrap() else {
            panic!("half a welcome")
        };
        let options = message::parse_options(options)
            .map(|option| {
                let HandshakeOption { kind, flags, value } = option.unwrap();
                (kind, flags, value.to_vec())
            })
            .collect();
        Some(Answer { welcome, options })
    }

    fn whole_message(&mut self) -> Option<Vec<u8>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (gone, message) = match &mut self.wire {
                Wire::Loopback(end) => (end.has_lost_peer(), end.receive()),
                Wire::Rdma(end) => (end.has_lost_peer(), end.receive()),
                Wire::RdmaAfterTcp(end, stream) => {
                    // What it carries, a goaway, comes by the queue pair too.
                    let over = match stream.read(&mut [0; 4096]) {
                        Ok(n) => n == 0,
                        Err(error) => error.kind() != ErrorKind::WouldBlock,
                    };
                    if over {
                        std::thread::sleep(Duration::from_millis(200));
                    }
                    (end.has_lost_peer() || over, end.receive())
                }
                Wire::Tcp(..) => unreachable!("a stream has no messages"),
            };
            if message.is_some() {
                return message;
            }
            if gone {
                return None;
            }
            assert!(Instant::now() < deadline, "no message came");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// The next message.
    pub fn next(&mut self) -> Got {
        let limits = self.limits;
        match &mut self.wire {
            Wire::Loopback(_) | Wire::Rdma(_) | Wire::RdmaAfterTcp(..) => {
                if self.rest.is_empty() {
                    let Some(bytes) = self.whole_message() else { return Got::End };
                    self.rest = bytes;
                }
                let Some((got, taken)) = got(&self.rest, &limits) else { panic!("half a message came") };
                // A response's data has been placed.
                let len = if let Got::Request(..) = got { inline_len(&got) } else { 0 };
                let data: Vec<u8> = self.rest.drain(..taken + len).skip(taken).collect();
                with_data(got, &data)
            }
            Wire::Tcp(stream, inbox) => loop {
                if let Some((got, taken)) = got(inbox, &limits) {
                    let end = taken + inline_len(&got);
                    if inbox.len() >= end {
                        let data = inbox[taken..end].to_vec();
                        inbox.drain(..end);
                        return with_data(got, &data);
                    }
                }
                let mut bytes = [0; 1 << 16];
                match stream.read(&mut bytes) {
                    Ok(0) => return Got::End,
                    Ok(n) => inbox.extend_from_slice(&bytes[..n]),
                    Err(error) if error.kind() == ErrorKind::ConnectionReset => return Got::End,
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    Err(error) => panic!("no message came: {error}"),
                }
            },
        }
    }

    /// The next request.
    pub fn next_request(&mut self) -> message::RequestHeader {
        match self.next() {
            Got::Request(request, ..) => request,
            other => panic!("{other:?} is no request"),
        }
    }

    /// Reads on until the connection ends, and gives the goaway, if one came.
    pub fn goaway(&mut self) -> Option<(Status, String)> {
        let mut goaway = None;
        loop {
            match self.next() {
                Got::Goaway(status, text) => goaway = Some((status, text)),
                Got::End => return goaway,
                _ => {}
            }
        }
    }
}

/// A good response without data.
pub fn answer_to(id: u64) -> message::ResponseHeader {
    message::ResponseHeader {
        id,
        body_len: 0,
        data_len: 0,
        status: Status { errno: 0, class: Class::None, retryable: false },
        credits: 1,
        result: 0,
        has_crc: false,
        data_crc: 0,
    }
}

fn got(bytes: &[u8], limits: &Limits) -> Option<(Got, usize)> {
    let Parsed::Item(message, taken) = message::parse(bytes, limits).unwrap() else { return None };
    let got = match message {
        Message::Request(request, body) => Got::Request(request, body.to_vec(), Vec::new()),
        Message::Response(response, body) => Got::Response(response, body.to_vec(), Vec::new()),
        Message::Ping(id) => Got::Ping(id),
        Message::Pong(id, _) => Got::Pong(id),
        Message::Goaway(status, text) => Got::Goaway(status, message::text(text)),
        Message::OneWay(message, wants_receipt) => Got::OneWay(message.to_vec(), wants_receipt),
        Message::Receipt(receipt) => Got::Receipt(receipt),
        Message::QueuePair(what) => {
            Got::QueuePair(what.map_err(|(status, text)| (status, message::text(text))))
        }
    };
    Some((got, taken))
}

/// Data that follows, on a stream.
fn inline_len(got: &Got) -> usize {
    match got {
        Got::Request(request, ..) => request.data_len as usize,
        Got::Response(response, ..) => response.data_len as usize,
        _ => 0,
    }
}

fn with_data(mut got: Got, bytes: &[u8]) -> Got {
    if let Got::Request(.., data) | Got::Response(.., data) = &mut got {
        data.extend_from_slice(bytes);
    }
    got
}
