//! Files: open, read, write, stat, flush, discard, zero, close.

use std::os::unix::fs::{FileExt, MetadataExt};
use std::process::Command as Process;
use std::time::Duration;

use raio_transport::handshake::Offer;
use raio_transport::message;
use raio_transport::protocol::{
    Command, OPEN_DIRECT, OPEN_DSYNC, OPEN_EXCLUSIVE, OPEN_READ, OPEN_SYNC, OPEN_TRUNCATE, OPEN_WRITE,
};
use raio_transport::transport::{Bulk, ClientTransport, SendOptions};

use crate::common::{Client, NEW, RW, Server, buffers, data, each};
use crate::random::Random;

#[test]
fn small_reads_are_right_whether_the_page_cache_has_them_or_not() {
    const LEN: u64 = 4 << 20;
    each(|variant| {
        let server = Server::start(variant, &[]);
        let mut random = Random::new();
        let bytes: Vec<u8> = (0..LEN / 8).flat_map(|_| random.below(u64::MAX).to_le_bytes()).collect();
        std::fs::write(server.path("small"), &bytes).unwrap();
        let local = std::fs::File::open(server.path("small")).unwrap();
        local.sync_all().unwrap();
        for features in [0, message::FEATURE_CRC] {
            let mut offer = Offer::new("small");
            offer.features = features;
            let mut client = Client::connect(server.address, &offer);
            let file = client.open("/d/small", OPEN_READ).unwrap();
            for round in 0..50 {
                if round % 2 == 1 {
                    // A part, so that some reads find only their beginning.
                    let offset = random.below(LEN);
                    rustix::fs::fadvise(&local, offset, None, rustix::fs::Advice::DontNeed).unwrap();
                }
                let reads: Vec<_> = (0..16)
                    .map(|_| (random.below(LEN + 4096), 1 + random.below(20 << 10) as usize))
                    .map(|(offset, len)| (client.send_read(file, offset, len), offset, len))
                    .collect();
                for (tag, offset, len) in reads {
                    let reply = client.wait(tag);
                    let (offset, end) = (offset.min(LEN) as usize, (offset + len as u64).min(LEN) as usize);
                    assert!(
                        data(&reply) == bytes[offset..end.max(offset)],
                        "{offset} and {len} bytes: not what is in the file"
                    );
                }
            }
        }
    });
}

#[test]
fn large_reads_of_a_cached_file_are_right_though_the_client_is_slow() {
    const LEN: usize = 24 << 20;
    each(|variant| {
        let server = Server::start(variant, &[]);
        let mut random = Random::new();
        let bytes: Vec<u8> = (0..LEN / 8).flat_map(|_| random.below(u64::MAX).to_le_bytes()).collect();
        std::fs::write(server.path("large"), &bytes).unwrap();
        for features in [0, message::FEATURE_CRC] {
            let mut offer = Offer::new("large");
            offer.features = features;
            let mut client = Client::connect(server.address, &offer);
            let file = client.open("/d/large", OPEN_READ).unwrap();
            // More than sockets hold, so that the server waits for room in the middle of an answer.
            let reads: Vec<_> = (0..LEN >> 20)
                .map(|i| (i << 20, if i % 4 == 3 { 128 << 10 } else { 1 << 20 }))
                .map(|(offset, len)| (client.send_read(file, offset as u64, len), offset, len))
                .collect();
            std::thread::sleep(Duration::from_millis(100));
            for (tag, offset, len) in reads {
                let reply = client.wait(tag);
                assert!(data(&reply) == bytes[offset..offset + len], "{offset}: not what is in the file");
            }
            assert!(client.read(file, LEN as u64 - 4096, 1 << 20).unwrap() == bytes[LEN - 4096..]);
            assert!(client.read(file, LEN as u64 - 300_001, 1 << 20).unwrap() == bytes[LEN - 300_001..]);
            assert!(client.read(file, 1, 1 << 20).unwrap() == bytes[1..1 + (1 << 20)]);
        }
    });
}

#[test]
fn a_file_is_created_written_flushed_read_back_and_closed() {
    each(|variant| {
        let server = Server::start(variant, &[]);
        let mut client = server.client();
        let (file, status) = client.open_as("/d/new", NEW | OPEN_EXCLUSIVE, 0o600).unwrap();
        assert_eq!(
            (status.size.get(), status.mode.get(), status.direct_align.get()),
            (0, libc::S_IFREG | 0o600, 1)
        );
        let bytes: Vec<u8> = (0..300_000u32).map(|i| (i % 251) as u8).collect();
        assert_eq!(client.write(file, 5, &bytes), Ok(300_000));
        client.fsync(file, false).unwrap();
        client.fsync(file, true).unwrap();
        assert_eq!(client.read(file, 0, 300_005).unwrap(), [&[0; 5][..], &bytes].concat());
        let local = std::fs::metadata(server.path("new")).unwrap();
        let status = client.status(file).unwrap();
        assert_eq!(status.size.get(), 300_005);
        assert_eq!(
            (status.inode.get(), status.device.get(), status.uid.get()),
            (local.ino(), local.dev(), local.uid())
        );
        assert_eq!(status.modified_ns.get(), local.mtime() * 1_000_000_000 + local.mtime_nsec());
        assert_eq!(std::fs::read(server.path("new")).unwrap()[5..], bytes);
        assert_eq!(client.close(file), Ok(0));
        assert_eq!(client.read(file, 0, 1), Err(libc::EBADF));
        assert_eq!(client.close(file), Err(libc::EBADF));
        assert_eq!(client.open("/d/new", NEW | OPEN_EXCLUSIVE), Err(libc::EEXIST));
        let file = client.open("/d/new", OPEN_WRITE | OPEN_TRUNCATE | OPEN_SYNC).unwrap();
        assert_eq!(client.status(file).unwrap().size.get(), 0);
        assert_eq!(client.read(file, 0, 1), Err(libc::EBADF), "it is open for writing only");
        assert_eq!(client.write(file, 0, b"x"), Ok(1));
        let file = client.open("/d/new", OPEN_READ | OPEN_DSYNC).unwrap();
        assert_eq!(client.write(file, 0, b"x"), Err(libc::EBADF), "it is open for reading only");
        assert_eq!(client.do_it(&Command::Discard { file, offset: 0, length: 1 }), Err(libc::EBADF));
        assert_eq!(client.read(file, 0, 1).unwrap(), b"x");
    });
}

#[test]
fn a_read_is_short_only_at_the_end_of_the_file() {
    each(|variant| {
        let server = Server::start(variant, &[]);
        std::fs::write(server.path("f"), [7; 10_000]).unwrap();
        let mut client = server.client();
        let file = client.open("/d/f", OPEN_READ).unwrap();
        assert_eq!(client.read(file, 9_000, 4096).unwrap(), [7; 1000]);
        assert_eq!(client.read(file, 10_000, 4096).unwrap(), [0; 0]);
        assert_eq!(client.read(file, 1 << 60, 4096).unwrap(), [0; 0]);
        assert_eq!(client.read(file, 0, 0).unwrap(), [0; 0]);
        std::fs::OpenOptions::new().write(true).open(server.path("f")).unwrap().set_len(20_000).unwrap();
        assert_eq!(client.status(file).unwrap().size.get(), 20_000, "a status is fresh");
        assert_eq!(client.read(file, 9_999, 2).unwrap(), [7, 0]);
    });
}

#[test]
fn random_reads_and_writes_at_depth_agree_with_a_local_copy() {
    each(|variant| {
        let mut random = Random::new();
        // So little memory that requests wait for a slot.
        let mut server = Server::start(variant, &["--workers", "1", "--memory", "4M", "--queue-depth", "32"]);
        let mut client = server.client();
        let file = client.open("/d/f", NEW).unwrap();
        let size = 4 << 20;
        let mut model = vec![0u8; size];
        std::fs::OpenOptions::new().write(true).open(server.path("f")).unwrap().set_len(size as u64).unwrap();
        for round in 0..20u8 {
            // Requests in flight together have no order, so they do not overlap.
            let mut tags = Vec::new();
            let mut at = 0;
            while tags.len() < 32 {
                at += random.below(4096) as usize;
                let len_max = if random.below(4) == 0 { 1 << 20 } else { 9000 };
                let len = 1 + random.below(len_max) as usize;
                if at + len > size {
                    break;
                }
                if random.below(2) == 0 {
                    let bytes: Vec<u8> = (0..len).map(|i| round ^ (i * 31 + at) as u8).collect();
                    tags.push((client.send_write(file, at as u64, &bytes), None));
                    model[at..at + len].copy_from_slice(&bytes);
                } else {
                    tags.push((client.send_read(file, at as u64, len), Some(at..at + len)));
                }
                at += len;
            }
            for (tag, range) in tags {
                let reply = client.wait(tag);
                assert!(reply.status.is_ok(), "{reply:?}");
                if let Some(range) = range {
                    assert!(crate::common::data(&reply) == model[range.clone()], "{range:?} differs");
                }
            }
        }
        assert!(std::fs::read(server.path("f")).unwrap() == model, "the server's file differs");
        drop(client);
        server.stats_until("idle", |stats| stats.is_idle());
    });
}

#[test]
fn direct_io_reads_any_range_and_refuses_unaligned_writes_with_a_sentence() {
    each(|variant| {
        let server = Server::start(variant, &[]);
        let mut client = server.client();
        let bytes: Vec<u8> = (0..100_001u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(server.path("f"), &bytes).unwrap();
        let (file, status) = match client.open_as("/d/f", RW | OPEN_DIRECT, 0) {
            Err(libc::EINVAL) => {
                return eprintln!("SKIPPED: the file system of the target directory has no O_DIRECT");
            }
            file => file.unwrap(),
        };
        let align = u64::from(status.direct_align.get());
        assert!(align >= 512, "{align}");
        let mut random = Random::new();
        for _ in 0..100 {
            let (offset, len) = (random.below(110_000), 1 + random.below(70_000) as usize);
            let from = (offset as usize).min(bytes.len());
            let expected = &bytes[from..(from + len).min(bytes.len())];
            assert!(client.read(file, offset, len).unwrap() == expected, "{len} bytes at {offset} differ");
        }
        let block = vec![9; align as usize];
        assert_eq!(client.write(file, align, &block), Ok(align));
        assert_eq!(client.read(file, align - 1, 3).unwrap(), [bytes[align as usize - 1], 9, 9]);
        for (offset, len) in [(1, align), (0, 1), (align, align - 1)] {
            let length = len as u32;
            let bulk = Bulk::Out(buffers(&block[..len as usize]));
            let reply = client.call(&Command::Write { file, offset, length }, bulk);
            assert_eq!(reply.status.errno, libc::EINVAL);
            let text = message::text(&reply.body);
            assert!(text.contains(&format!("multiples of {align} bytes")), "{text}");
        }
    });
}

#[test]
fn an_export_can_force_direct_io() {
    each(|variant| {
        let other = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let export = format!("x={},direct", other.path().display());
        let server = Server::start(variant, &["--export", &export]);
        std::fs::write(other.path().join("f"), [5; 5000]).unwrap();
        let mut client = server.client();
        let (file, status) = match client.open_as("/x/f", OPEN_READ, 0) {
            Err(libc::EINVAL) => {
                return eprintln!("SKIPPED: the file system of the target directory has no O_DIRECT");
            }
            file => file.unwrap(),
        };
        assert!(status.direct_align.get() >= 512);
        assert_eq!(client.read(file, 4999, 10).unwrap(), [5]);
        assert_eq!(client.open("/x/f", OPEN_WRITE), Err(libc::EROFS));
    });
}

#[test]
fn discarded_and_zeroed_ranges_read_as_zeros() {
    each(|variant| {
        let server = Server::start(variant, &["--export", "m=mem:1M,rw"]);
        let mut client = server.client();
        for path in ["/d/f", "/m"] {
            let file = client.open(path, NEW).unwrap();
            let filling = vec![1; 1 << 20];
            assert_eq!(client.write(file, 0, &filling), Ok(1 << 20));
            match client.do_it(&Command::Discard { file, offset: 4096, length: 8192 }) {
                Err(libc::EOPNOTSUPP) => {
                    eprintln!("SKIPPED for {path}: no holes there");
                    continue;
                }
                outcome => assert_eq!(outcome, Ok(0)),
            }
            assert_eq!(client.do_it(&Command::WriteZeroes { file, offset: 20_001, length: 9_999 }), Ok(0));
            let mut expected = filling;
            expected[4096..12288].fill(0);
            expected[20_001..30_000].fill(0);
            assert!(client.read(file, 0, 1 << 20).unwrap() == expected, "{path} differs");
            assert_eq!(client.status(file).unwrap().size.get(), 1 << 20);
            // Of any length, whatever --io-max is.
            assert_eq!(client.do_it(&Command::Discard { file, offset: 0, length: 1 << 40 }), Ok(0));
            assert!(client.read(file, 0, 1 << 20).unwrap() == vec![0; 1 << 20]);
            assert_eq!(client.status(file).unwrap().size.get(), 1 << 20, "a discard changes no size");
            assert_eq!(client.do_it(&Command::Discard { file, offset: 0, length: 0 }), Ok(0));
        }
        let file = client.open("/m", OPEN_WRITE).unwrap();
        assert_eq!(
            client.do_it(&Command::WriteZeroes { file, offset: 1, length: 1 << 20 }),
            Err(libc::ENOSPC)
        );
        let file = client.open("/d/f", OPEN_WRITE).unwrap();
        match client.do_it(&Command::WriteZeroes { file, offset: 1, length: 1 << 20 }) {
            Err(libc::EOPNOTSUPP) => {
                eprintln!("SKIPPED: zeros beyond the end of the file; this file system cannot")
            }
            outcome => {
                assert_eq!(outcome, Ok(0));
                assert_eq!(
                    client.status(file).unwrap().size.get(),
                    (1 << 20) + 1,
                    "writing zeros extends a file"
                );
            }
        }
    });
}

#[test]
fn an_allocated_range_has_storage_and_no_byte_of_it_changes() {
    each(|variant| {
        let server = Server::start(variant, &["--export", "m=mem:1M,rw"]);
        let mut client = server.client();
        let file = client.open("/d/f", NEW).unwrap();
        let bytes: Vec<u8> = (0..10_000).map(|at| (at % 251 + 1) as u8).collect();
        assert_eq!(client.write(file, 0, &bytes), Ok(10_000));
        let mut allocate = |offset, length, keep_size| {
            let result = client.do_it(&Command::Allocate { file, offset, length, keep_size });
            let status = client.status(file).unwrap();
            (result, status.size.get(), status.blocks.get() * 512)
        };
        let (result, size, storage) = allocate(0, 1 << 20, true);
        if result == Err(libc::EOPNOTSUPP) {
            return eprintln!("SKIPPED: the file system here cannot reserve storage");
        }
        assert_eq!((result, size), (Ok(0), 10_000), "the size is kept");
        assert!(storage >= 1 << 20, "{storage}");
        // In one piece, in several, and where the file is long enough.
        let large = 150 << 20;
        for (length, expected) in [(20_000, 20_000), (large, large), (30_000, large)] {
            let (result, size, storage) = allocate(1, length - 1, false);
            assert_eq!((result, size), (Ok(0), expected), "{length}");
            assert!(storage >= length - 4096, "{length}: {storage}");
        }
        let found = client.read(file, 0, 1 << 20).unwrap();
        assert!(found[..10_000] == bytes && found[10_000..].iter().all(|&byte| byte == 0));
        assert_eq!(
            allocate_in(&mut client, "/m", OPEN_WRITE),
            Err(libc::ENOSPC),
            "a file that does not grow"
        );
        assert_eq!(allocate_in(&mut client, "/d/f", OPEN_READ), Err(libc::EBADF), "a file open for reading");
    });
}

/// Allocates beyond the first MiB.
fn allocate_in(client: &mut Client, path: &str, flags: u32) -> Result<u64, i32> {
    let file = client.open(path, flags)?;
    client.do_it(&Command::Allocate { file, offset: 1, length: 1 << 20, keep_size: false })
}

#[test]
fn ranges_beyond_what_a_file_can_have_are_refused() {
    each(|variant| {
        let server = Server::start(variant, &["--export", "n=null:1G"]);
        let mut client = server.client();
        for path in ["/d/f", "/n"] {
            let file = client.open(path, NEW).unwrap();
            for offset in [u64::MAX, i64::MAX as u64, 1 << 63, u64::MAX - 4095] {
                assert_eq!(client.read(file, offset, 4096), Err(libc::EINVAL), "{offset}");
                assert_eq!(client.write(file, offset, &[0; 4096]), Err(libc::EINVAL), "{offset}");
                for command in [
                    Command::Discard { file, offset, length: 4096 },
                    Command::WriteZeroes { file, offset, length: 4096 },
                    Command::Allocate { file, offset, length: 4096, keep_size: true },
                ] {
                    assert_eq!(client.do_it(&command), Err(libc::EINVAL), "{offset}");
                }
            }
            assert_eq!(
                client.do_it(&Command::Discard { file, offset: 1, length: u64::MAX }),
                Err(libc::EINVAL)
            );
            assert_eq!(client.do_it(&Command::Stat(file)), Ok(0), "the connection goes on");
        }
    });
}

#[test]
fn null_and_memory_exports_behave_like_files_of_a_fixed_size() {
    each(|variant| {
        let server = Server::start(
            variant,
            &["--export", "n=null:10000", "--export", "m=mem:10000,rw", "--export", "r=mem:1k"],
        );
        let mut client = server.client();
        for path in ["/n", "/m"] {
            let file = client.open(path, RW | OPEN_DIRECT | OPEN_TRUNCATE).unwrap();
            assert_eq!(client.status(file).unwrap().size.get(), 10_000);
            assert_eq!(client.read(file, 9_999, 100).unwrap(), [0]);
            assert_eq!(client.read(file, 10_000, 100).unwrap(), [0; 0]);
            assert_eq!(client.write(file, 100, &[1; 50]), Ok(50));
            assert_eq!(client.read(file, 149, 2).unwrap(), if path == "/m" { [1, 0] } else { [0, 0] });
            assert_eq!(client.write(file, 9_999, &[1; 2]), Err(libc::ENOSPC));
            client.fsync(file, false).unwrap();
            assert_eq!(client.close(file), Ok(0));
        }
        let file = client.open("/m", OPEN_READ).unwrap();
        assert_eq!(client.read(file, 100, 1).unwrap(), [1], "memory outlives its opens");
        assert_eq!(client.write(file, 0, &[1]), Err(libc::EBADF));
        assert_eq!(client.open("/r", OPEN_WRITE), Err(libc::EROFS));
        assert_eq!(client.open("/n/x", OPEN_READ), Err(libc::ENOTDIR));
    });
}

#[test]
fn a_file_export_is_opened_by_its_name_alone() {
    each(|variant| {
        let other = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = other.path().join("file");
        std::fs::write(&path, b"hello").unwrap();
        let exports = [format!("f={}", path.display()), format!("w={},rw", path.display())];
        let server = Server::start(variant, &["--export", &exports[0], "--export", &exports[1]]);
        let mut client = server.client();
        let file = client.open("/f", OPEN_READ).unwrap();
        assert_eq!(client.read(file, 0, 100).unwrap(), b"hello");
        assert_eq!(client.open("/f", RW), Err(libc::EROFS));
        assert_eq!(client.open("/f/", OPEN_READ), Err(libc::ENOTDIR));
        assert_eq!(client.open("/f/file", OPEN_READ), Err(libc::ENOTDIR));
        let file = client.open("/w", OPEN_WRITE | OPEN_TRUNCATE).unwrap();
        assert_eq!(client.write(file, 0, b"you"), Ok(3));
        assert_eq!(std::fs::read(&path).unwrap(), b"you");
    });
}

/// Detaches the loop device when it is dropped.
struct LoopDevice(String);

impl LoopDevice {
    fn new(backing: &std::path::Path) -> Result<Self, String> {
        let output = Process::new("losetup").args(["--find", "--show"]).arg(backing).output();
        let output = output.map_err(|error| error.to_string())?;
        if output.status.success() {
            Ok(Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
        } else {
            Err(String::from_utf8_lossy(&output.stderr).trim().to_owned())
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Process::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_served_with_its_capacity() {
    let other = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let backing = other.path().join("backing");
    std::fs::write(&backing, vec![3; 8 << 20]).unwrap();
    let device = match LoopDevice::new(&backing) {
        Ok(device) => device,
        Err(error) => return eprintln!("SKIPPED: no loop device to be had here: {error}"),
    };
    each(|variant| {
        let export = format!("b={},rw", device.0);
        let server = Server::start(variant, &["--export", &export]);
        let mut client = server.client();
        for flags in [0, OPEN_DIRECT] {
            let (file, status) = client.open_as("/b", RW | flags, 0).unwrap();
            assert_eq!((status.size.get(), status.mode.get() & libc::S_IFMT), (8 << 20, libc::S_IFBLK));
            assert_eq!(client.status(file).unwrap().size.get(), 8 << 20);
            assert_eq!(client.write(file, 4096, &[8; 4096]), Ok(4096));
            assert_eq!(client.read(file, 4095, 3).unwrap(), [3, 8, 8]);
            assert_eq!(client.read(file, (8 << 20) - 10, 100).unwrap(), [3; 10]);
            assert_eq!(client.do_it(&Command::WriteZeroes { file, offset: 4096, length: 4096 }), Ok(0));
            assert_eq!(client.read(file, 4096, 4096).unwrap(), [0; 4096]);
            assert_eq!(client.do_it(&Command::Discard { file, offset: 8192, length: 4096 }), Ok(0));
            assert_eq!(client.read(file, 8192, 4096).unwrap(), [0; 4096]);
            client.fsync(file, true).unwrap();
            assert_eq!(client.write(file, 4096, &[3; 8192]), Ok(8192));
        }
    });
}

#[test]
fn handles_belong_to_the_session_and_work_on_all_its_connections() {
    each(|variant| {
        let server = Server::start(variant, &["--workers", "3"]);
        std::fs::write(server.path("f"), b"hello").unwrap();
        let offer = Offer::new("several connections");
        let mut clients: Vec<_> = (0..6).map(|_| Client::connect(server.address, &offer)).collect();
        let file = clients[0].open("/d/f", OPEN_READ).unwrap();
        for client in &mut clients {
            assert_eq!(client.read(file, 0, 5).unwrap(), b"hello");
        }
        assert_eq!(server.client().read(file, 0, 5), Err(libc::EBADF), "another session's handle");
        assert_eq!(clients[5].close(file), Ok(0));
        for client in &mut clients {
            assert_eq!(client.read(file, 0, 5), Err(libc::EBADF), "it was closed, if by another connection");
        }
        let file = clients[0].open("/d/f", OPEN_READ).unwrap();
        drop(clients.remove(0));
        assert_eq!(
            clients[0].read(file, 0, 5).unwrap(),
            b"hello",
            "the session goes on without its first connection"
        );
    });
}

#[test]
fn a_command_whose_length_contradicts_its_data_ends_that_connection_only() {
    each(|variant| {
        let mut server = Server::start(variant, &[]);
        let mut good = server.client();
        let file = good.open("/d/f", NEW).unwrap();
        for (command, bulk) in [
            (Command::Read { file, offset: 0, length: 100 }, Bulk::In(buffers(&[0; 50]))),
            (Command::Read { file, offset: 0, length: 100 }, Bulk::None),
            (Command::Write { file, offset: 0, length: 100 }, Bulk::Out(buffers(&[0; 101]))),
            (Command::Write { file, offset: 0, length: 100 }, Bulk::None),
            (Command::Stat(file), Bulk::In(buffers(&[0; 8]))),
        ] {
            let mut bad = server.client();
            let reply = bad.call(&command, bulk);
            assert!(!reply.status.is_ok() && bad.transport.failure().is_some(), "{command:?}: {reply:?}");
            assert_eq!(good.do_it(&Command::Stat(file)), Ok(0));
        }
        let mut bad = server.client();
        bad.transport.send(1, &[0xff; 24], Bulk::None, SendOptions::PLAIN).unwrap();
        assert!(!bad.wait(1).status.is_ok());
        assert_eq!(good.do_it(&Command::Stat(file)), Ok(0));
        let stats = server.stats_until("closed", |stats| stats.get("connections") == 1);
        assert_eq!((stats.get("length"), stats.get("field")), (5, 1), "{}", stats.0);
    });
}

#[test]
fn a_cancel_is_answered_after_its_request_and_says_the_same() {
    each(|variant| {
        let mut server =
            Server::start(variant, &["--workers", "1", "--memory", "4M", "--export", "m=mem:64M"]);
        let mut client = server.client();
        let file = client.open("/m", OPEN_READ).unwrap();
        assert_eq!(client.do_it(&Command::Cancel { id: 12345 }), Err(libc::ENOENT));
        // Two of them fill the memory, the rest wait for it.
        let reads: Vec<_> = (0..30)
            .map(|i| {
                let command = Command::Read { file, offset: i << 20, length: 1 << 20 };
                client.send(&command, Bulk::In(buffers(&vec![1; 1 << 20])))
            })
            .collect();
        let cancels: Vec<_> = reads
            .iter()
            .rev()
            .map(|(_, id)| client.send(&Command::Cancel { id: id.0 }, Bulk::None).0)
            .collect();
        let mut cancelled = 0;
        for ((read, _), cancel) in reads.into_iter().rev().zip(cancels) {
            let (read, cancel) = (client.wait(read), client.wait(cancel));
            match (read.status.errno, cancel.status.errno) {
                (libc::ECANCELED, 0) => cancelled += 1,
                (0, libc::EALREADY | libc::ENOENT) => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(cancelled > 0, "{}", server.stats().0);
        assert_eq!(client.read(file, 0, 10).unwrap(), [0; 10]);
        drop(client);
        server.stats_until("idle", |stats| stats.is_idle());
    });
}

#[test]
fn a_write_that_finds_no_space_says_so() {
    each(|variant| {
        let mut server = Server::start(variant, &[]);
        let mut client = server.client();
        // A limit on file sizes stands in for a full disk.
        let pid = rustix::process::Pid::from_child(&server.child);
        let limit = rustix::process::Rlimit { current: Some(8192), maximum: Some(8192) };
        rustix::process::prlimit(Some(pid), rustix::process::Resource::Fsize, limit).unwrap();
        let file = client.open("/d/f", NEW).unwrap();
        assert_eq!(client.write(file, 0, &[1; 4096]), Ok(4096));
        assert_eq!(client.write(file, 8192, &[1; 4096]), Err(libc::EFBIG));
        assert_eq!(client.write(file, 4096, &[1; 8192]), Ok(4096), "what was written counts");
        assert_eq!(client.write(file, 8192, &[1; 4096]), Err(libc::EFBIG), "the rest says why");
        assert_eq!(server.child.try_wait().unwrap(), None, "the server lives on");
        let mut local = [0; 2];
        std::fs::File::open(server.path("f")).unwrap().read_exact_at(&mut local, 4095).unwrap();
        assert_eq!(local, [1, 1]);
    });
}
