//! A hostile server: its whole stream against a client with requests outstanding.
//!
//! However it ends, each request ends once, and its buffers come back with it.

#![no_main]

use std::io::Write;
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use raio_fuzz::{Mode, handshake_len, mend_handshake, mend_messages};
use raio_transport::handshake::{Offer, Policy, PushWindows};
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message::{FEATURE_CRC, Parsed, SessionId};
use raio_transport::transport::{Bulk, ClientEvent, ClientTransport, OneWay, SendOptions};
use raio_transport::{Status, tcp};

/// Room of the requests, cut into pieces or not; None: no room, some data to send.
const ROOMS: [Option<&[usize]>; 6] =
    [Some(&[64]), Some(&[4096]), None, Some(&[100, 0, 3000, 7]), Some(&[40_000]), Some(&[0])];

fuzz_target!(|input: &[u8]| {
    let Some((&mode, bytes)) = input.split_first() else { return };
    let mode = Mode(mode);
    let mut bytes = bytes.to_vec();
    let features = if mode.has(Mode::CRC) { FEATURE_CRC } else { 0 };
    let push = PushWindows { to_server: 4, to_client: 4, requests: 2 };
    let offer = Offer { features, session: SessionId([1; 16]), push, ..Offer::new("fuzz") };
    let begins = if mode.has(Mode::HANDSHAKE) {
        if !mode.has(Mode::RAW) {
            mend_handshake(&mut bytes);
        }
        handshake_len(&bytes)
    } else {
        let policy = Policy { queue_depth: 16, server: [2; 16], push, ..Policy::default() };
        let Ok(Parsed::Item((_, welcome), _)) = policy.welcome(&offer.hello()) else { unreachable!() };
        let begins = welcome.len();
        bytes.splice(0..0, welcome);
        begins
    };
    if mode.has(Mode::CRC) && !mode.has(Mode::RAW) {
        mend_messages(&mut bytes[begins..]);
    }
    session(mode, &offer, &bytes[..begins], &bytes[begins..]);
});

fn session(mode: Mode, offer: &Offer, welcome: &[u8], bytes: &[u8]) {
    let (mut server, client) = UnixStream::pair().unwrap();
    server.set_nonblocking(true).unwrap();
    let _ = server.write_all(welcome);
    // Nobody will send the rest of half a welcome.
    let deadline = Instant::now() + Duration::from_millis(2);
    let client = tcp::TcpClient::from_stream(TcpStream::from(OwnedFd::from(client)), offer, deadline);
    let Ok(mut client) = client else { return };

    // Its ids are 0, 1, 2, ..., so that an input can name them.
    let mut sent = Vec::new();
    for (tag, room) in ROOMS.iter().enumerate() {
        let piece = |len: &usize| Buffer::Owned(vec![0; *len].into());
        let bulk = match room {
            Some(lens) => Bulk::In(Buffers::Many(lens.iter().map(piece).collect())),
            None => Bulk::Out(Buffers::One(piece(&500))),
        };
        let fits = bulk.len_in() <= client.grant().data_bytes_max as usize;
        if fits && client.send(tag as u64, &[4; 24], bulk, SendOptions::PLAIN).is_ok() {
            sent.push(tag as u64);
        }
    }
    client.flush();
    let mut replies = Vec::new();
    for piece in mode.pieces(bytes) {
        // More than the socket takes is as good as cut short.
        let _ = server.write_all(piece);
        client.receive(&mut replies);
        events(&mut client);
    }
    let _ = server.shutdown(Shutdown::Write);
    let end = Instant::now() + Duration::from_secs(5);
    while client.failure().is_none() {
        assert!(Instant::now() < end, "the end of the stream does not end the connection");
        client.receive(&mut replies);
        events(&mut client);
    }
    client.receive(&mut replies);
    assert_eq!(client.outstanding(), 0);
    let mut ended: Vec<_> = replies.iter().map(|reply| reply.tag).collect();
    ended.sort_unstable();
    assert_eq!(ended, sent, "each request ends once");
    for reply in &replies {
        let room = ROOMS[reply.tag as usize].map(|lens| lens.iter().sum());
        match &reply.bulk {
            Bulk::In(buffers) => {
                assert_eq!((Some(buffers.len()), reply.data_len <= buffers.len()), (room, true))
            }
            Bulk::Out(buffers) => assert_eq!((buffers.len(), room), (500, None)),
            Bulk::None => panic!("the buffers have not come back"),
        }
    }
}

/// Takes what the server has sent unsolicited. The first byte says what becomes of it.
fn events(client: &mut tcp::TcpClient) {
    while let Some(event) = client.next_event() {
        match event {
            ClientEvent::OneWay(message) => match message.first().copied().unwrap_or(0) % 4 {
                0 => {}
                1 => {
                    client.refuse();
                    assert!(client.next_event().is_none_or(|event| !matches!(event, ClientEvent::OneWay(_))));
                    return;
                }
                2 => {
                    let _ = client.send_one_way(OneWay { message: &message, tag: 1, wants_receipt: true });
                }
                _ => client.release(),
            },
            ClientEvent::Request(id, body) => {
                if body.first().is_none_or(|first| first % 2 == 0) {
                    client.answer(id, Status::OK, 1, &body);
                }
            }
            ClientEvent::Receipt(tag) => assert_eq!(tag, 1),
            ClientEvent::Refused => {
                let more = OneWay { message: b"more", tag: 2, wants_receipt: false };
                assert!(client.send_one_way(more).is_err(), "it is refused");
            }
        }
    }
    client.flush();
}
