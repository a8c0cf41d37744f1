//! Connections that take the place of broken ones while a file system hangs: nothing of the old one can
//! happen any more once the new one has been told what became of it.

use std::fs::File;
use std::io::Read;
use std::time::{Duration, Instant};

use raio_e2e::{FuseCall, FuseFs, FuseOptions, LoopDevice, PATIENCE, Server, needs_root};
use raio_transport::handshake::{ChannelOffer, Offer};
use raio_transport::memory::{Buffer, Buffers};
use raio_transport::message::SessionId;
use raio_transport::protocol::{Command, FileHandle, OPEN_READ, OPEN_WRITE, RequestOutcome};
use raio_transport::tcp::TcpClient;
use raio_transport::transport::{Bulk, ClientTransport, Reply, SendOptions};
use zerocopy::little_endian::U32;

const BLOCK: usize = 4096;
const READ_WRITE: u32 = OPEN_READ | OPEN_WRITE;

/// A connection of a channel.
struct Member {
    client: TcpClient,
    replies: Vec<Reply>,
}

fn offer(session: u8, number: u32, epoch: u64) -> Offer {
    let linger = Duration::from_secs(90);
    let channel = Some(ChannelOffer { number, epoch, linger });
    Offer { session: SessionId([session; 16]), channel, ..Offer::new("test") }
}

impl Member {
    fn connect(server: &Server, offer: &Offer) -> Self {
        let client = TcpClient::connect(server.address(), offer, Instant::now() + PATIENCE);
        Self { client: client.expect("the server grants a connection"), replies: Vec::new() }
    }

    /// Sends a command. Returns its id.
    fn send(&mut self, command: &Command<'_>, bulk: Bulk) -> u32 {
        let mut body = Vec::new();
        command.encode(&mut body);
        let id = self.client.send(0, &body, bulk, SendOptions::PLAIN).expect("a credit is left");
        self.client.flush();
        id.0 as u32
    }

    fn write(&mut self, file: FileHandle, letter: u8) -> u32 {
        let buffer = Buffers::One(Buffer::Owned(vec![letter; BLOCK].into()));
        self.send(&Command::Write { file, offset: 0, length: BLOCK as u32 }, Bulk::Out(buffer))
    }

    /// Its next reply, if one comes until then.
    fn reply_until(&mut self, deadline: Instant) -> Option<Reply> {
        while self.replies.is_empty() && Instant::now() < deadline {
            self.client.wait(Some(deadline)).expect("it can wait");
            self.client.receive(&mut self.replies);
            assert!(self.client.failure().is_none(), "{:?}", self.client.failure());
        }
        (!self.replies.is_empty()).then(|| self.replies.remove(0))
    }

    fn reply(&mut self) -> Reply {
        self.reply_until(Instant::now() + PATIENCE).expect("an answer comes")
    }

    fn open(&mut self, path: &str, flags: u32) -> FileHandle {
        let command = Command::Open { flags, mode: 0o600, path: path.as_bytes() };
        self.send(&command, Bulk::None);
        let reply = self.reply();
        assert!(reply.status.is_ok(), "{:?}", reply.status);
        FileHandle(reply.result as u32)
    }

    fn ask(&mut self, ids: &[u32]) {
        let ids: Vec<_> = ids.iter().map(|&id| U32::new(id)).collect();
        self.send(&Command::Outcome { ids: &ids }, Bulk::None);
    }

    /// The bytes written by each request that was asked for; None if it was not executed.
    fn told(&mut self) -> Vec<Option<u64>> {
        let reply = self.reply();
        assert!(reply.status.is_ok(), "{:?}", reply.status);
        let outcomes = RequestOutcome::decode(&reply.body).expect("outcomes");
        let written = |outcome: &RequestOutcome| {
            let (status, result) = outcome.answer().expect("it makes sense")?;
            assert!(status.is_ok(), "{status:?}");
            Some(result)
        };
        outcomes.iter().map(written).collect()
    }
}

/// A write hangs, and its client comes back; another client writes to the same block. Both wait for the old
/// write, and what each has written last is what is there.
fn nothing_of_the_old_connection_lands_later<'a>(
    server: &mut Server,
    (path, flags): (&str, u32),
    content: impl Fn() -> Vec<u8>,
    hang: impl FnOnce() -> Box<dyn FnOnce() + 'a>,
    is_hanging: impl Fn(&mut Server),
) {
    let mut old = Member::connect(server, &offer(1, 1, 1));
    let file = old.open(path, flags);
    let mut other = Member::connect(server, &offer(2, 1, 1));
    let of_other = other.open(path, flags);
    let mend = hang();
    let written = old.write(file, b'o');
    is_hanging(server);
    drop(old);
    server.statistics_when(|now| now["connections"] == 1);
    server.statistics_when(|now| now["channels"]["orphaned_requests"] == 1);

    other.write(of_other, b'x');
    let mut new = Member::connect(server, &offer(1, 1, 2));
    new.ask(&[written, written + 1]);
    let a_while = Instant::now() + Duration::from_millis(300);
    for waiting in [&mut new, &mut other] {
        assert!(waiting.reply_until(a_while).is_none(), "it does not wait");
    }
    mend();
    assert_eq!(new.told(), [Some(BLOCK as u64), None]);
    assert!(other.reply().status.is_ok());
    assert!(content() == [b'x'; BLOCK], "the old write came later");
    new.write(file, b'N');
    assert!(new.reply().status.is_ok());
    assert!(content() == [b'N'; BLOCK]);
    let now = server.statistics_when(|now| now["channels"]["orphaned_requests"] == 0);
    assert_eq!((&now["channels"]["resumed"], &now["waits"]["orphans"]), (&1.into(), &1.into()), "{now}");
}

#[test]
fn who_comes_back_waits_for_a_write_that_hangs_in_a_lane() {
    for backend in ["uring", "threads"] {
        for workers in ["1", "2"] {
            let files: [(&str, &[u8]); 1] = [("file", &[b'.'; BLOCK])];
            let Some(fuse) = FuseFs::mount("channels", FuseOptions::default(), &files) else { return };
            let export = format!("d={},rw", fuse.path().display());
            let mut server = Server::start_with(&[&export], &["--backend", backend, "--workers", workers]);
            let hang = || {
                fuse.hang(FuseCall::Write);
                Box::new(|| fuse.mend(FuseCall::Write)) as Box<dyn FnOnce() + '_>
            };
            nothing_of_the_old_connection_lands_later(
                &mut server,
                ("/d/file", READ_WRITE),
                || std::fs::read(fuse.file("file")).expect("a file"),
                hang,
                |_| fuse.wait_for_hanging(FuseCall::Write, 1),
            );
        }
    }
}

#[test]
fn who_comes_back_waits_for_a_write_that_hangs_in_the_ring() {
    if !needs_root("channels over a frozen file system") {
        return;
    }
    // A device whose disk is a file of a file system that freezes.
    let mounted = LoopDevice::new(64 << 20).mount("ext4");
    let image = mounted.path().join("image");
    std::fs::write(&image, vec![0; 1 << 20]).expect("an image");
    let device = LoopDevice::over(&image);
    let export = format!("disk={},rw,direct", device.path().display());
    let mut server = Server::start_with(&[&export], &["--workers", "2"]);
    let content = || {
        let mut bytes = vec![0; BLOCK];
        let mut file = File::open(device.path()).expect("the device");
        file.read_exact(&mut bytes).expect("a block");
        bytes
    };
    nothing_of_the_old_connection_lands_later(
        &mut server,
        ("/disk", READ_WRITE),
        content,
        || {
            let frozen = mounted.freeze();
            Box::new(move || drop(frozen))
        },
        |server| _ = server.statistics_when(|now| now["in_flight"]["executing"] == 1),
    );
}
