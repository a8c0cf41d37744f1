//! A client by hand: it speaks docs/PROTOCOL.md over a plain socket, and does only what it is told.

use std::io::{self, Read, Write};
use std::net::TcpStream;

use raio_transport::address::{Address, Endpoint};
use raio_transport::handshake::Offer;
use raio_transport::message::{
    self, HANDSHAKE_BYTES, Limits, Message, Parsed, RemoteRegion, RequestHeader, ResponseHeader,
};
use raio_transport::protocol::{Command, FileHandle, FileStatus};

/// The length of a message's header.
pub(crate) const HEADER_BYTES: usize = 40;
const LIMITS: Limits = Limits { crc: false, request_crc: false, data_bytes_max: u32::MAX, pong_time: false };

/// A client with one session, one connection and one open file.
pub struct Raw {
    /// The connection.
    pub stream: TcpStream,
    /// How many bytes the file has.
    pub file_bytes: u64,
    /// Its status when it was opened.
    pub status: FileStatus,
    /// Its handle.
    pub file: FileHandle,
}

fn wrong(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Raw {
    /// Connects, shakes hands and opens the file. `flags` are those of the protocol.
    pub fn open(url: &str, path: &str, flags: u32) -> io::Result<Self> {
        let address: Address = url.parse().map_err(|error| wrong(format!("{error}")))?;
        let addresses = address.resolve().map_err(|error| wrong(format!("{error}")))?;
        let addresses: Vec<_> = addresses.iter().filter_map(Endpoint::ip).collect();
        Self::open_on(TcpStream::connect(&addresses[..])?, &Offer::new("raw"), path, flags)
    }

    /// The same on a connection of the caller's, in the session of `offer`.
    pub fn open_on(stream: TcpStream, offer: &Offer, path: &str, flags: u32) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        let mut raw = Self { stream, file_bytes: 0, status: FileStatus::default(), file: FileHandle(0) };
        raw.stream.write_all(&offer.hello())?;
        let mut welcome = vec![0; HANDSHAKE_BYTES];
        raw.stream.read_exact(&mut welcome)?;
        while let Parsed::Need(n) = offer.grant(&welcome).map_err(|error| wrong(format!("{error}")))? {
            let have = welcome.len();
            welcome.resize(n, 0);
            raw.stream.read_exact(&mut welcome[have..])?;
        }
        raw.enter(&Command::Open { flags, mode: 0o600, path: path.as_bytes() })?;
        Ok(raw)
    }

    /// Opens or reopens a file, which takes the place of the one that this had.
    pub fn enter(&mut self, command: &Command<'_>) -> io::Result<()> {
        let (result, body) = self.call(command)?;
        self.status = FileStatus::decode(&body).map_err(|error| wrong(format!("{error}")))?;
        (self.file, self.file_bytes) = (FileHandle(result as u32), self.status.size.get());
        Ok(())
    }

    /// Sends a command without data, and waits for its answer. Returns its result and body; a command that
    /// the server answers with a failure is an error with that errno, whose text goes to standard error.
    pub fn call(&mut self, command: &Command<'_>) -> io::Result<(u64, Vec<u8>)> {
        self.send(0, command, 0)?;
        let (response, body) = self.response()?;
        if !response.status.is_ok() {
            eprintln!("raw: {}", message::text(&body));
            return Err(io::Error::from_raw_os_error(response.status.errno));
        }
        Ok((response.result, body))
    }

    /// Flushes the file. Returns its verifier.
    pub fn fsync(&mut self) -> io::Result<u64> {
        let file = self.file;
        self.call(&Command::Fsync { file, data_only: false }).map(|(verifier, _)| verifier)
    }

    fn send(&mut self, id: u64, command: &Command<'_>, data_len: u32) -> io::Result<()> {
        self.stream.write_all(&request(id, command, data_len))
    }

    /// Asks for a part of the file.
    pub fn send_read(&mut self, id: u64, offset: u64, length: u32) -> io::Result<()> {
        self.send(id, &Command::Read { file: self.file, offset, length }, 0)
    }

    /// Says that so many bytes come, to be written. They are the caller's to send.
    pub fn send_write_header(&mut self, id: u64, offset: u64, length: u32) -> io::Result<()> {
        self.send(id, &Command::Write { file: self.file, offset, length }, length)
    }

    /// Has what was written made durable.
    pub fn send_fsync(&mut self, id: u64) -> io::Result<()> {
        self.send(id, &Command::Fsync { file: self.file, data_only: false }, 0)
    }

    /// Receives the next message, which is an answer, up to its data: those are the caller's to receive.
    pub fn response(&mut self) -> io::Result<(ResponseHeader, Vec<u8>)> {
        let mut bytes = vec![0; HEADER_BYTES];
        self.stream.read_exact(&mut bytes)?;
        loop {
            match message::parse(&bytes, &LIMITS).map_err(|error| wrong(format!("{error}")))? {
                Parsed::Need(n) => {
                    let have = bytes.len();
                    bytes.resize(n, 0);
                    self.stream.read_exact(&mut bytes[have..])?;
                }
                Parsed::Item(Message::Response(response, body), _) => return Ok((response, body.to_vec())),
                // The server lives.
                Parsed::Item(Message::Pong(message::UNASKED_PONG, _), _) => {
                    self.stream.read_exact(&mut bytes)?;
                }
                Parsed::Item(other, _) => return Err(wrong(format!("{other:?} is no answer"))),
            }
        }
    }
}

/// A request, as it goes on the wire.
pub fn request(id: u64, command: &Command<'_>, data_len: u32) -> Vec<u8> {
    let region = match command {
        &Command::Read { length: len, .. } => RemoteRegion::In { address: 0, key: 0, len },
        _ => RemoteRegion::None,
    };
    let mut body = Vec::new();
    command.encode(&mut body);
    let mut bytes = Vec::new();
    RequestHeader { id, body_len: 0, data_len, region, has_crc: false, data_crc: 0 }
        .encode(&body, false, &mut bytes);
    bytes
}

/// The number of bytes of data that an answer to a read brings, which follow it.
pub(crate) fn data_len(bytes: &[u8], id: u64) -> io::Result<usize> {
    match message::parse(bytes, &LIMITS).map_err(|error| wrong(format!("{error}")))? {
        Parsed::Item(Message::Response(response, _), HEADER_BYTES)
            if response.id == id && response.status.is_ok() =>
        {
            Ok(response.data_len as usize)
        }
        other => Err(wrong(format!("{other:?} does not answer read {id}"))),
    }
}
