//! A peer whose host cannot be reached any more, and one that only takes nothing. TCP alone: other transports
//! have no say in it.

use std::io::Read;
use std::time::{Duration, Instant};

use raio_transport::handshake::{Offer, Policy};
use raio_transport::transport::CloseReason;
use socket2::{SockFilter, SockRef};

use crate::harness::{Op, Server, Transport, command, pattern, serve};
use crate::raw::{Got, Raw};

const TIMEOUT: Duration = Duration::from_millis(300);
/// The kernel tries 15 times, from 0.2 s to 1 s apart, which is as often as it can be told to.
const KERNEL_TIMEOUT: Duration = Duration::from_secs(11);
const REQUESTS: u64 = 16;
/// For each request: all of them are far more than there is room for in the sockets.
const BYTES: usize = 200_000;
/// The same for a narrow stream.
const NARROW_BYTES: usize = 10_000;

/// Runs a test over all kinds of TCP at once: they mostly wait.
fn each(test: impl Fn(Transport) + Sync) {
    std::thread::scope(|scope| {
        for transport in Transport::TCP {
            let test = &test;
            scope.spawn(move || test(transport));
        }
    });
}

fn serve_impatiently(transport: Transport) -> Server {
    let policy = Policy { data_bytes_max: 256 << 10, unreachable_timeout: TIMEOUT, ..Policy::default() };
    serve(transport, policy)
}

fn connect(server: &Server) -> Raw {
    Raw::open_client(server, &Offer::new("full")).0
}

/// Has a client ask for so much and take nothing, so that its window is zero.
fn fill(server: &Server, raw: &mut Raw, bytes: usize) {
    for id in 0..REQUESTS {
        raw.request_in(id, &command(Op::Get, id), bytes as u32);
    }
    server.until("the requests", |seen| (seen.requests == REQUESTS).then_some(()));
    std::thread::sleep(TIMEOUT / 2);
}

/// From now on the client's socket sees nothing that arrives for it, so its kernel acknowledges nothing and
/// answers nothing.
fn cut_off(raw: &mut Raw) {
    // BPF_RET | BPF_K: takes no byte of any packet.
    let nothing = SockFilter::new(6, 0, 0, 0);
    SockRef::from(&*raw.stream()).attach_filter(&[nothing]).expect("a filter");
}

/// Waits until the server gives the client up, which the kernel would do as well, but later.
fn is_given_up(server: &Server, mut raw: Raw) {
    let begin = Instant::now();
    assert_eq!(server.closed(0), CloseReason::Unreachable);
    assert!(begin.elapsed() < KERNEL_TIMEOUT, "after {:?}", begin.elapsed());
    server.until_empty(0);
    server.serves_others();
    // So that its end does not stay in the kernel.
    SockRef::from(&*raw.stream()).detach_filter().expect("a filter");
}

/// The server keeps the client for many times the timeout, and then it gets every byte.
fn is_kept(server: &Server, mut raw: Raw, bytes: usize) {
    let until = Instant::now() + 12 * TIMEOUT;
    while Instant::now() < until {
        server.serves_others();
        server.each_seen(|seen| assert!(seen.closed.is_empty(), "{:?}", seen.reasons()));
        std::thread::sleep(TIMEOUT / 10);
    }
    for _ in 0..REQUESTS {
        let Got::Response(response, _, data) = raw.next() else { panic!("no response") };
        assert!(data == pattern(response.id, bytes), "the response to {}", response.id);
    }
}

#[test]
fn a_peer_that_acknowledges_no_response_is_given_up() {
    each(|transport| {
        let server = serve_impatiently(transport);
        let mut raw = connect(&server);
        fill(&server, &mut raw, BYTES);
        cut_off(&mut raw);
        // What it takes now is the last that is heard of it: there is room again, and the server sends.
        raw.stream().set_nonblocking(true).expect("a socket");
        while raw.stream().read(&mut [0; 4096]).is_ok() {}
        is_given_up(&server, raw);
    });
}

#[test]
fn a_peer_that_takes_nothing_and_then_answers_no_window_probe_is_given_up() {
    each(|transport| {
        let server = serve_impatiently(transport);
        let mut raw = connect(&server);
        fill(&server, &mut raw, BYTES);
        cut_off(&mut raw);
        is_given_up(&server, raw);
    });
}

#[test]
fn a_peer_that_takes_nothing_but_answers_window_probes_is_kept() {
    each(|transport| {
        let server = serve_impatiently(transport);
        let mut raw = connect(&server);
        fill(&server, &mut raw, BYTES);
        is_kept(&server, raw, BYTES);
    });
}

/// Of what has been sent to it, it has no room for a part. That is unacknowledged, and is sent again in the
/// place of window probes.
#[test]
fn a_peer_that_drops_what_it_has_no_room_for_but_answers_is_kept() {
    each(|transport| {
        let server = serve_impatiently(transport);
        let (mut raw, _) = Raw::open_narrow_client(&server, &Offer::new("narrow"));
        fill(&server, &mut raw, NARROW_BYTES);
        is_kept(&server, raw, NARROW_BYTES);
    });
}
