//! Credits and limits. That the server is never given more than it granted is asserted in the harness as
//! well, in every test.

use raio_transport::error::Violation;
use raio_transport::handshake::{Offer, Policy};
use raio_transport::message::{self, RemoteRegion};
use raio_transport::transport::{Bulk, CloseReason, NotSent, SendOptions};

use crate::harness::{Op, bytes_of, command, data, pattern, room, serve, serve_plain};
use crate::raw::{Got, Raw};

const PLAIN: SendOptions = SendOptions::PLAIN;

fn small() -> Policy {
    Policy { queue_depth: 4, data_bytes_max: 64 << 10, ..Policy::default() }
}

contract! {
    fn a_client_cannot_spend_more_credits_than_it_has(transport) {
        let server = serve(transport, small());
        let mut client = server.client();
        assert_eq!(client.transport.credits(), 4);
        for tag in 0..4 {
            client.send(tag, &command(Op::Hold, 0), Bulk::None);
            client.transport.flush();
        }
        for _ in 0..10 {
            let NotSent(bulk) =
                client.transport.send(9, &command(Op::Put, 0), data(pattern(0, 100)), PLAIN).unwrap_err();
            assert_eq!(bytes_of(&bulk), pattern(0, 100), "the buffers come back");
        }
        assert_eq!((client.transport.credits(), client.transport.outstanding()), (0, 4));
        // One is kept for control messages.
        client.transport.send(5, &command(Op::Release, 0), Bulk::None, SendOptions::CONTROL).unwrap();
        assert!(client.transport.send(6, &command(Op::Echo, 0), Bulk::None, SendOptions::CONTROL).is_err());
        let tags: Vec<_> = (0..5).map(|_| client.next().tag).collect();
        assert_eq!(tags, [3, 2, 1, 0, 5]);
        assert_eq!(client.transport.credits(), 4);
        server.each_seen(|seen| assert_eq!(seen.unanswered_max, 5));
        client.works();
    }

    fn a_client_that_exceeds_its_credits_is_closed(transport) {
        let server = serve(transport, small());
        let mut bystander = server.bystander();
        let (mut raw, grant) = Raw::open_client(&server, &Offer::new("greedy"));
        for id in 0..u64::from(grant.credits()) {
            assert!(raw.request(id, &command(Op::Hold, 0), &[]));
        }
        bystander.works();
        server.each_seen(|seen| assert!(seen.closed.is_empty()));
        raw.request(100, &command(Op::Hold, 0), &[]);
        assert_eq!(server.closed(0), CloseReason::Violation(Violation::Credits));
        let (status, text) = raw.goaway().expect("it is told why");
        assert_eq!(status.errno, libc::EPROTO);
        assert!(text.contains("more requests"), "{text}");
        server.each_seen(|seen| assert_eq!(seen.unanswered_max, 5));
        bystander.works();
        server.until_empty(1);
    }

    fn credits_come_back_with_each_response(transport) {
        let server = serve(transport, small());
        let (mut raw, grant) = Raw::open_client(&server, &Offer::new("exact"));
        let credits = u64::from(grant.credits());
        for round in 0..50 {
            for id in 0..credits {
                raw.request(round * credits + id, &command(Op::Echo, 0), &[]);
            }
            for _ in 0..credits {
                let Got::Response(response, ..) = raw.next() else { panic!("no response") };
                assert_eq!(response.credits, 1);
            }
        }
        server.each_seen(|seen| assert!(seen.closed.is_empty()));
    }

    fn a_request_for_more_data_than_granted_is_a_violation(transport) {
        let server = serve(transport, small());
        for (n, data_len, region) in [
            (0, (64 << 10) + 1, RemoteRegion::None),
            (1, u32::MAX, RemoteRegion::None),
            (2, 0, RemoteRegion::In { address: 0, key: 0, len: (64 << 10) + 1 }),
            (3, 0, RemoteRegion::In { address: 0, key: 0, len: u32::MAX }),
            (4, 0, RemoteRegion::Out { address: 0, key: 0, len: (64 << 10) + 1 }),
        ] {
            let (mut raw, _) = Raw::open_client(&server, &Offer::new("large"));
            let mut bytes = Vec::new();
            let (id, body_len, has_crc, data_crc) = (1, 0, false, 0);
            let request = message::RequestHeader { id, body_len, data_len, region, has_crc, data_crc };
            request.encode(&command(Op::Put, 0), false, &mut bytes);
            raw.send(&bytes);
            assert_eq!(server.closed(n), CloseReason::Violation(Violation::Length), "{data_len} {region:?}");
        }
        server.serves_others();
        server.until_empty(0);
    }

    fn a_client_that_is_asked_to_send_more_than_granted_says_so_by_a_panic(transport) {
        let server = serve(transport, small());
        let mut client = server.client();
        for bulk in [data(vec![0; (64 << 10) + 1]), room((64 << 10) + 1)] {
            let send = std::panic::AssertUnwindSafe(|| client.transport.send(0, &[], bulk, PLAIN).is_ok());
            let panic = std::panic::catch_unwind(send).unwrap_err();
            assert_eq!(panic.downcast_ref::<&str>(), Some(&"a request exceeds the grant"));
        }
    }

    fn an_id_that_is_in_use_is_a_violation(transport) {
        let server = serve_plain(transport);
        let (mut raw, _) = Raw::open_client(&server, &Offer::new("twice"));
        raw.request(7, &command(Op::Hold, 0), &[]);
        raw.request(7, &command(Op::Hold, 0), &[]);
        assert_eq!(server.closed(0), CloseReason::Violation(Violation::RequestId));
        server.serves_others();
    }
}
