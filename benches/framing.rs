//! What the framing of messages takes, with checksums and without. The handshake is left out: it is once for
//! each connection.

use divan::counter::ItemsCount;
use divan::{Bencher, black_box};
use raio_transport::Status;
use raio_transport::message::{Limits, Message, Parsed, RemoteRegion, RequestHeader, ResponseHeader, parse};
use raio_transport::protocol::{Command, FileHandle};

const READ_BYTES: u32 = 4096;
/// Responses that one receive often brings at queue depth 32.
const BATCH: usize = 32;

#[derive(Clone, Copy, Debug)]
enum Crc {
    Off,
    On,
}

impl Crc {
    fn is_on(self) -> bool {
        matches!(self, Self::On)
    }

    fn limits(self) -> Limits {
        Limits { crc: self.is_on(), request_crc: false, data_bytes_max: 1 << 20, pong_time: false }
    }
}

fn main() {
    divan::main();
}

fn response(id: u64) -> ResponseHeader {
    ResponseHeader {
        id,
        body_len: 0,
        data_len: READ_BYTES,
        status: Status::OK,
        credits: 1,
        result: READ_BYTES.into(),
        has_crc: false,
        data_crc: 0,
    }
}

fn parse_one<'a>(bytes: &'a [u8], limits: &Limits) -> (Message<'a>, usize) {
    match parse(bytes, limits) {
        Ok(Parsed::Item(message, len)) => (message, len),
        other => panic!("{other:?}"),
    }
}

/// Per request: a read of 4 KiB is encoded by the client and parsed by the server, header and command.
#[divan::bench(args = [Crc::Off, Crc::On], sample_size = 1000)]
fn request(bencher: Bencher, crc: Crc) {
    let region = RemoteRegion::In { address: 0, key: 0, len: READ_BYTES };
    let header = RequestHeader { id: 7, body_len: 0, data_len: 0, region, has_crc: false, data_crc: 0 };
    let command = Command::Read { file: FileHandle(1), offset: 1 << 20, length: READ_BYTES };
    let (mut body, mut wire) = (Vec::new(), Vec::new());
    bencher.bench_local(|| {
        body.clear();
        wire.clear();
        black_box(command).encode(&mut body);
        black_box(header).encode(&body, crc.is_on(), &mut wire);
        let (Message::Request(header, body), _) = parse_one(black_box(&wire), &crc.limits()) else {
            panic!("no request");
        };
        let command = Command::decode(body).expect("it was encoded here");
        black_box((header, command));
    });
}

/// Per request: the response to a read is encoded by the server and parsed by the client, without its data.
#[divan::bench(name = "response", args = [Crc::Off, Crc::On], sample_size = 1000)]
fn one_response(bencher: Bencher, crc: Crc) {
    let mut wire = Vec::new();
    bencher.bench_local(|| {
        wire.clear();
        black_box(response(7)).encode(&[], crc.is_on(), &mut wire);
        black_box(parse_one(black_box(&wire), &crc.limits()));
    });
}

/// Per batch: a client parses the 32 responses that one receive has brought, without their data.
#[divan::bench(args = [Crc::Off, Crc::On], sample_size = 1000)]
fn responses(bencher: Bencher, crc: Crc) {
    let mut wire = Vec::new();
    (0..BATCH as u64).for_each(|id| response(id).encode(&[], crc.is_on(), &mut wire));
    bencher.counter(ItemsCount::new(BATCH)).bench_local(|| {
        let mut rest = black_box(&wire[..]);
        while !rest.is_empty() {
            let (message, len) = parse_one(rest, &crc.limits());
            black_box(message);
            rest = &rest[len..];
        }
    });
}
