//! Many small clients in one thread: each has a session, a connection and one read of 4 KiB in flight, and
//! checks what it reads.

use std::io::{self, ErrorKind, Read};
use std::time::{Duration, Instant};

use raio_transport::protocol::OPEN_READ;
use rustix::buffer::spare_capacity;
use rustix::event::epoll;

use crate::raw::{HEADER_BYTES, Raw, data_len};

const READ_BYTES: usize = 4096;

/// The clients. One that loses its connection, or gets a wrong byte, is an error.
pub struct Crowd {
    epoll: std::os::fd::OwnedFd,
    members: Vec<Member>,
    /// What the file has in it: 64-bit words that are their own number.
    content: Vec<u8>,
    /// How long each answer took to come, since [`Crowd::forget`].
    pub latencies: Vec<Duration>,
}

struct Member {
    raw: Raw,
    answers: u64,
    random: u64,
    offset: u64,
    sent: Instant,
    answer: Box<[u8; HEADER_BYTES + READ_BYTES]>,
    filled: usize,
}

impl Member {
    fn ask(&mut self) -> io::Result<()> {
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let blocks = self.raw.file_bytes / READ_BYTES as u64;
        self.offset = (self.random >> 20) % blocks * READ_BYTES as u64;
        self.filled = 0;
        self.sent = Instant::now();
        self.raw.send_read(self.answers, self.offset, READ_BYTES as u32)
    }

    /// Takes in what has arrived. Whether the answer is complete; it is checked then.
    fn hear(&mut self, content: &[u8]) -> io::Result<bool> {
        match self.raw.stream.read(&mut self.answer[self.filled..]) {
            Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
            Ok(n) => self.filled += n,
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
            Err(error) => return Err(error),
        }
        if self.filled < self.answer.len() {
            return Ok(false);
        }
        let (header, data) = self.answer.split_at(HEADER_BYTES);
        let at = self.offset as usize;
        if data_len(header, self.answers)? != data.len() || data != &content[at..at + data.len()] {
            return Err(io::Error::new(ErrorKind::InvalidData, format!("wrong data at {at}")));
        }
        self.answers += 1;
        Ok(true)
    }
}

impl Crowd {
    /// So many clients of a file.
    pub fn connect(url: &str, path: &str, clients: usize) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let mut members = Vec::new();
        for n in 0..clients as u64 {
            let raw = Raw::open(url, path, OPEN_READ)?;
            raw.stream.set_nonblocking(true)?;
            epoll::add(&epoll, &raw.stream, epoll::EventData::new_u64(n), epoll::EventFlags::IN)?;
            let answer = Box::new([0; HEADER_BYTES + READ_BYTES]);
            members.push(Member {
                raw,
                answers: 0,
                random: n,
                offset: 0,
                sent: Instant::now(),
                answer,
                filled: 0,
            });
        }
        let words = members.first().map_or(0, |member| member.raw.file_bytes / 8);
        let content = (0..words).flat_map(u64::to_le_bytes).collect();
        Ok(Self { epoll, members, content, latencies: Vec::new() })
    }

    /// Has each client ask again as soon as it is answered, until `is_over`, which is asked after each look
    /// at the network. Then waits for the answers that are due.
    pub fn run(&mut self, mut is_over: impl FnMut() -> bool) -> io::Result<()> {
        for member in &mut self.members {
            member.ask()?;
        }
        let mut asking = self.members.len();
        let mut events = Vec::with_capacity(asking);
        let mut is_ending = false;
        while asking > 0 {
            events.clear();
            match epoll::wait(&self.epoll, spare_capacity(&mut events), None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
            is_ending = is_ending || is_over();
            for event in &events {
                let member = &mut self.members[event.data.u64() as usize];
                if !member.hear(&self.content)? {
                    continue;
                }
                self.latencies.push(member.sent.elapsed());
                if is_ending {
                    asking -= 1;
                } else {
                    member.ask()?;
                }
            }
        }
        Ok(())
    }

    /// How many answers each has had, since [`Crowd::forget`] or the beginning.
    pub fn answers(&self) -> Vec<u64> {
        self.members.iter().map(|member| member.answers).collect()
    }

    /// Forgets what was counted.
    pub fn forget(&mut self) {
        self.latencies.clear();
        for member in &mut self.members {
            member.answers = 0;
        }
    }
}
