//! What only RDMA has: work requests that are counted, memory that is reached from afar, rdma_cm's own
//! messages.

use std::time::Duration;

use raio_transport::error::{Error, Violation};
use raio_transport::handshake::{Offer, Policy};
use raio_transport::loopback::Access;
use raio_transport::memory::{Arena, Buffer, Buffers, Region};
use raio_transport::message::{self, BODY_BYTES_MAX, HEADER_BYTES, RemoteRegion};
use raio_transport::rdma;
use raio_transport::transport::{Bulk, CloseReason, SendOptions, ServerCounters};

use crate::harness::{
    Client, Op, Server, Transport, bytes_of, command, data, has_rdma, pattern, rdma_source, room, serve_plain,
};
use crate::raw::Raw;
use crate::rdma_end;

/// A server, if there is a device.
fn server() -> Option<Server> {
    has_rdma().then(|| serve_plain(Transport::Rdma))
}

/// What the server has counted once it has answered so many requests of RDMA clients.
fn counted(server: &Server, responses: u64) -> ServerCounters {
    server
        .until("the responses to be counted", |seen| (seen.rdma.responses >= responses).then_some(seen.rdma))
}

fn slots(arena: &mut Arena, len: usize) -> Buffers {
    Buffers::One(Buffer::Slot(arena.alloc(len).unwrap(), len))
}

#[test]
fn a_read_into_registered_memory_takes_one_work_request_and_no_copy() {
    let Some(server) = server() else { return };
    let mut client = server.client();
    let mut arena = Arena::new(4 << 20, 256 << 10).unwrap();
    client.transport.register_arena(&arena.memory()).unwrap();
    let mut asked = 0;
    for len in [1, 4096, 100_000, 256 << 10] {
        for seed in 0..8 {
            client.send(seed, &command(Op::Get, seed), Bulk::In(slots(&mut arena, len)));
        }
        asked += 8;
        for _ in 0..8 {
            let reply = client.next();
            assert!(reply.status.is_ok() && bytes_of(&reply.bulk) == pattern(reply.tag, len), "{len} bytes");
        }
    }
    let counters = counted(&server, asked);
    assert_eq!((counters.responses, counters.writes, counters.reads), (asked, asked, 0));
    // A WRITE with the response in its immediate data for each, and the welcome.
    assert_eq!(counters.work_requests, asked + 1);
    assert!(counters.doorbells <= asked + 1, "{counters:?}");
    assert_eq!(counters.copied_bytes, 0);
    assert_eq!(client.transport.counters().bounced_bytes, 0);
}

#[test]
fn requests_sent_together_and_their_answers_share_a_send_each() {
    let Some(server) = server() else { return };
    let mut client = server.client();
    for seed in 0..8 {
        client.send(seed, &command(Op::Echo, seed), Bulk::None);
    }
    for seed in 0..8 {
        let reply = client.next();
        assert_eq!((reply.tag, &reply.body[..]), (seed, &command(Op::Echo, seed)[..]));
    }
    let counters = counted(&server, 8);
    // The welcome, and the answers.
    assert_eq!((counters.responses, counters.work_requests), (8, 2));
    assert_eq!(client.transport.counters().sends, 1);
}

#[test]
fn inline_data_of_requests_in_one_send_stays_apart() {
    let Some(server) = server() else { return };
    let mut client = server.client();
    for seed in 0..12 {
        client.send(seed, &command(Op::Put, seed), data(pattern(seed, 100 * seed as usize + 1)));
    }
    for _ in 0..12 {
        let reply = client.next();
        assert_eq!(reply.result, 100 * reply.tag + 1, "the data arrived wrong");
    }
}

#[test]
fn a_large_write_from_registered_memory_is_fetched_and_not_copied() {
    let Some(server) = server() else { return };
    let mut client = server.client();
    let mut arena = Arena::new(8 << 20, 256 << 10).unwrap();
    client.transport.register_arena(&arena.memory()).unwrap();
    for seed in 0..16 {
        let Buffers::One(mut buffer) = slots(&mut arena, 200_000) else { unreachable!() };
        buffer.bytes_mut().copy_from_slice(&pattern(seed, 200_000));
        client.send(seed, &command(Op::Put, seed), Bulk::Out(Buffers::One(buffer)));
    }
    for _ in 0..16 {
        let reply = client.next();
        assert!(reply.status.is_ok());
        assert_eq!(reply.result, 200_000, "the data arrived wrong");
    }
    let counters = counted(&server, 16);
    assert_eq!((counters.reads, counters.writes, counters.copied_bytes), (16, 0, 0));
    assert_eq!(client.transport.counters().bounced_bytes, 0);
}

#[test]
fn what_is_not_registered_is_copied_once_and_counted() {
    let Some(server) = server() else { return };
    let mut client = server.client();
    client.send(1, &command(Op::Get, 1), room(10_000));
    assert_eq!(bytes_of(&client.next().bulk), pattern(1, 10_000));
    assert_eq!(client.transport.counters().bounced_bytes, 10_000);
    client.send(2, &command(Op::Put, 2), data(pattern(2, 100_000)));
    assert_eq!(client.next().result, 100_000);
    assert_eq!(client.transport.counters().bounced_bytes, 110_000);
}

#[test]
fn memory_that_was_not_laid_open_closes_the_connection_that_named_it() {
    let Some(server) = server() else { return };
    let mut bystander = server.bystander();
    let page = 4096;
    // What the request says, and what there is: how it is exposed, and by how much it is missed.
    for (n, (what, op, allow, offset, len)) in [
        ("no memory to fetch from", Op::Put, None, 0, 100),
        ("memory to be written only", Op::Put, Some(Access::Write), 0, 100),
        ("too little memory to fetch from", Op::Put, Some(Access::Read), 0, page + 1),
        ("an address before the memory", Op::Put, Some(Access::Read), u64::MAX, 100),
        ("no memory to place data in", Op::Get, None, 0, 100),
        ("memory to be read only", Op::Get, Some(Access::Read), 0, 100),
        ("too little memory to place data in", Op::Get, Some(Access::Write), 1, page),
        ("an address far beyond the memory", Op::Get, Some(Access::Write), 1 << 40, 100),
    ]
    .into_iter()
    .enumerate()
    {
        let (mut raw, _) = Raw::open_client(&server, &Offer::new(what));
        let (address, key) = allow.map_or((0x10_0000, 0x99_9999), |allow| {
            let (address, key) = raw.rdma().expose(allow, page as usize).unwrap();
            (address.wrapping_add(offset), key)
        });
        let region = if op == Op::Put {
            RemoteRegion::Out { address, key, len }
        } else {
            RemoteRegion::In { address, key, len }
        };
        let request = message::RequestHeader { region, ..message::RequestHeader::of_command(1) };
        let mut bytes = Vec::new();
        request.encode(&command(op, 0), false, &mut bytes);
        raw.send(&bytes);
        assert_eq!(server.closed(n), CloseReason::Violation(Violation::Field), "{what}");
        bystander.works();
    }
    server.until_empty(1);
}

/// A client with an arena that it has registered, and a server by hand: over both ways to a queue pair.
fn clients_of_a_hostile_server() -> Option<impl Iterator<Item = (Client, Arena, Raw)>> {
    let devices = if has_rdma() { rdma::devices().unwrap_or_default() } else { Vec::new() };
    if !devices.iter().any(|device| device.has_windows) {
        eprintln!("SKIPPED: no RDMA device has memory windows");
        return None;
    }
    Some([Transport::Rdma, Transport::RdmaAfterTcp].into_iter().map(|transport| {
        let (mut client, raw) = Raw::server(transport, &Policy::default(), 0);
        let arena = Arena::new(1 << 20, 256 << 10).unwrap();
        client.transport.register_arena(&arena.memory()).unwrap();
        (client, arena, raw)
    }))
}

/// Has the client ask for data. Returns the request.
fn asked_for(client: &mut Client, raw: &mut Raw, bulk: Bulk) -> message::RequestHeader {
    client.send(1, &command(Op::Get, 1), bulk);
    client.transport.flush();
    raw.next_request()
}

/// The address and key of a request's memory.
fn place_of(request: &message::RequestHeader) -> (u64, u32) {
    match request.region {
        RemoteRegion::In { address, key, .. } | RemoteRegion::Out { address, key, .. } => (address, key),
        RemoteRegion::None => panic!("it has no memory"),
    }
}

#[test]
fn a_server_reaches_the_memory_of_a_request_only_until_it_has_answered() {
    let Some(clients) = clients_of_a_hostile_server() else { return };
    for (mut client, mut arena, mut raw) in clients {
        let request = asked_for(&mut client, &mut raw, Bulk::In(slots(&mut arena, 4096)));
        raw.respond(&request, &pattern(1, 4096));
        let reply = client.next();
        // The device executes what invalidates the key soon after it was posted.
        std::thread::sleep(Duration::from_millis(200));
        assert!(!raw.rdma().place(request.region, &[0xee; 4096]), "it can be written to again");
        assert_eq!(bytes_of(&reply.bulk), pattern(1, 4096));
        drop(raw);
        client.until_failed();
        assert_eq!(bytes_of(&reply.bulk), pattern(1, 4096));
    }
}

#[test]
fn a_server_reaches_a_region_of_the_program_only_until_it_has_answered() {
    let Some(clients) = clients_of_a_hostile_server() else { return };
    for (mut client, _, mut raw) in clients {
        let mut bytes = vec![0; 64 << 10].into_boxed_slice();
        // SAFETY: what lies in it is dropped before it.
        let region = unsafe { Region::new(bytes.as_mut_ptr(), bytes.len()) }.unwrap();
        client.transport.register_region(&region).unwrap();
        // SAFETY: nobody else looks at these bytes as long as the buffer is there.
        let buffer = unsafe { region.buffer(bytes[4096..].as_mut_ptr(), 8192) }.unwrap();
        let request = asked_for(&mut client, &mut raw, Bulk::In(Buffers::One(buffer)));
        raw.respond(&request, &pattern(1, 8192));
        drop(client.next());
        // Which waits until the server does not reach it any more.
        client.transport.unregister_region(&region);
        assert!(!raw.rdma().place(request.region, &[0xee; 8192]), "it can be written to again");
        drop(raw);
        client.until_failed();
        assert_eq!(bytes[4096..][..8192], pattern(1, 8192));
        assert!(bytes[..4096].iter().chain(&bytes[12288..]).all(|&byte| byte == 0));
    }
}

#[test]
fn a_key_allows_the_direction_of_its_request_alone() {
    let Some(clients) = clients_of_a_hostile_server() else { return };
    for (mut client, mut arena, mut raw) in clients {
        let request = asked_for(&mut client, &mut raw, Bulk::In(slots(&mut arena, 4096)));
        let (address, key) = place_of(&request);
        assert_eq!(raw.rdma().fetch(address, key, 4096), None, "room for data can be read");
        drop(raw);
        client.until_failed();
    }
    let Some(clients) = clients_of_a_hostile_server() else { return };
    for (mut client, mut arena, mut raw) in clients {
        let Buffers::One(mut buffer) = slots(&mut arena, 100_000) else { unreachable!() };
        buffer.bytes_mut().copy_from_slice(&pattern(1, 100_000));
        client.send(1, &command(Op::Put, 1), Bulk::Out(Buffers::One(buffer)));
        client.transport.flush();
        let (address, key) = place_of(&raw.next_request());
        assert_eq!(raw.rdma().fetch(address, key, 100_000), Some(pattern(1, 100_000)));
        let there = RemoteRegion::In { address, key, len: 4096 };
        assert!(!raw.rdma().place(there, &[0xee; 4096]), "data can be written to");
        drop(raw);
        let replies = client.until_failed();
        assert_eq!(bytes_of(&replies[0].bulk), pattern(1, 100_000));
    }
}

#[test]
fn a_server_does_not_reach_what_lies_beside_the_memory_of_a_request() {
    let Some(clients) = clients_of_a_hostile_server() else { return };
    drop(clients);
    if rdma::devices().unwrap().iter().any(|device| device.name.starts_with("rxe")) {
        eprintln!("SKIPPED: Soft-RoCE checks the bounds of registrations, not those of windows");
        return;
    }
    for (offset, len) in [(-1, 1), (4096, 1), (0, 4097)] {
        for (mut client, mut arena, mut raw) in clients_of_a_hostile_server().into_iter().flatten() {
            let mut pieces: Vec<_> = (0..3).map(|_| Buffer::Slot(arena.alloc(4096).unwrap(), 4096)).collect();
            let middle = Bulk::In(Buffers::One(pieces.remove(1)));
            let request = asked_for(&mut client, &mut raw, middle);
            let (address, key) = place_of(&request);
            let there = RemoteRegion::In { address: address.wrapping_add_signed(offset), key, len };
            assert!(!raw.rdma().place(there, &vec![0xee; len as usize]), "{len} bytes at {offset}");
            drop(raw);
            client.until_failed();
            assert!(pieces.iter().all(|piece| piece.bytes().iter().all(|&byte| byte == 0)));
        }
    }
}

#[test]
fn windows_serve_one_request_after_the_other() {
    let Some(server) = server() else { return };
    let mut client = server.client();
    let mut arena = Arena::new(4 << 20, 256 << 10).unwrap();
    client.transport.register_arena(&arena.memory()).unwrap();
    // A key has one byte that changes: it comes round.
    for round in 0..300 {
        for seed in 0..4 {
            client.send(seed, &command(Op::Get, seed), Bulk::In(slots(&mut arena, 5000)));
        }
        // What is taken back before it is sent leaves nothing behind.
        let options = SendOptions::PLAIN;
        let unsent = client.transport.send(9, &command(Op::Get, 9), room(5000), options).unwrap();
        assert!(client.transport.dequeue(unsent).is_some());
        client.send(4, &command(Op::Put, round), data(pattern(round, 50_000)));
        for _ in 0..5 {
            let reply = client.next();
            match reply.tag {
                4 => assert_eq!(reply.result, 50_000, "the data arrived wrong"),
                tag => assert!(reply.status.is_ok() && bytes_of(&reply.bulk) == pattern(tag, 5000)),
            }
        }
    }
}

#[test]
fn a_message_longer_than_a_receive_closes_its_connection() {
    let Some(server) = server() else { return };
    let mut bystander = server.bystander();
    let (mut raw, grant) = Raw::open_client(&server, &Offer::new("long"));
    let most = HEADER_BYTES + BODY_BYTES_MAX + grant.inline_bytes_max as usize;
    raw.send(&vec![1; most + 1000]);
    assert_eq!(server.closed(0), CloseReason::Violation(Violation::Length));
    bystander.works();
}

#[test]
fn inline_data_beyond_what_was_granted_closes_the_connection() {
    let Some(server) = server() else { return };
    let (mut raw, grant) = Raw::open_client(&server, &Offer::new("large"));
    raw.request(1, &command(Op::Put, 0), &vec![0; grant.inline_bytes_max as usize + 1]);
    assert_eq!(server.closed(0), CloseReason::Violation(Violation::Length));
    server.serves_others();
}

#[test]
fn private_data_that_is_not_raios_is_turned_away_with_the_reason() {
    let Some(server) = server() else { return };
    let old = [&message::MAGIC[..], &[9, 0, 9, 0, 0, 0, 0, 0]].concat();
    for (private_data, said) in [
        (&b"GET / HTTP/1.1\r\n"[..], "does not speak raio"),
        (&[0xff; 56], "does not speak raio"),
        // InfiniBand fills it up with zeros.
        (&message::MAGIC[..], "no protocol version in common"),
        (&old, "no protocol version in common"),
    ] {
        match rdma_end::connect(server.rdma_address(), rdma_source(), Some(private_data)) {
            Err(Error::Rejected { text, .. }) => assert!(text.contains(said), "{text}"),
            other => panic!("{:?}", other.err()),
        }
    }
    server.serves_others();
}

#[test]
fn both_sides_know_the_port_by_which_a_trace_names_the_connection() {
    let Some(server) = server() else { return };
    let clients: Vec<_> = (0..3).map(|_| server.client()).collect();
    let ours: Vec<_> = clients.iter().map(|client| client.transport.local_port()).collect();
    let theirs: Vec<_> = server.rdma_clients().iter().map(|client| Some(client.port())).collect();
    assert_eq!(ours, theirs);
    assert!(ours.iter().all(Option::is_some) && ours[0] != ours[1] && ours[1] != ours[2], "{ours:?}");
}
