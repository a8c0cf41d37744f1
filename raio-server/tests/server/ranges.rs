//! Copies and checksums within the server, and locks.

use raio_transport::handshake::Offer;
use raio_transport::protocol::{
    Command, FLAG_BLAKE3, FLAG_CRC32C, FLAG_LOCK_EXCLUSIVE, FLAG_LOCK_SHARED, FileHandle, OPEN_DIRECT,
    OPEN_DSYNC, OPEN_READ, OPEN_WRITE,
};
use raio_transport::transport::{Bulk, RequestId};

use crate::common::*;

fn bytes(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at % 251 + 1) as u8).collect()
}

fn copy(
    (source, offset): (FileHandle, u64),
    (destination, destination_offset): (FileHandle, u64),
    length: u64,
) -> Command<'static> {
    Command::Copy { source, offset, length, destination, destination_offset }
}

#[test]
fn a_range_is_copied_between_files_exports_and_kinds_of_storage() {
    each(|variant| {
        let server = Server::start(variant, &["--export", "m=mem:32M,rw", "--export", "n=null:1G"]);
        let mut client = server.client();
        // More than two pieces, the last of them not a whole one.
        let contents = bytes((17 << 20) + 1234);
        std::fs::write(server.path("a"), &contents).unwrap();
        let length = contents.len() as u64;
        let a = client.open("/d/a", OPEN_READ).unwrap();
        for (path, flags) in
            [("/d/b", NEW), ("/d/c", NEW | OPEN_DIRECT), ("/d/d", NEW | OPEN_DSYNC), ("/m", RW)]
        {
            let file = client.open(path, flags).unwrap();
            assert_eq!(client.do_it(&copy((a, 0), (file, 0), length)), Ok(length), "{path}");
            let found = client.read(file, (16 << 20) - 5, 1 << 20).unwrap();
            assert!(found == contents[(16 << 20) - 5..][..1 << 20], "{path}");
            if path != "/m" {
                assert!(std::fs::read(server.path(&path[3..])).unwrap() == contents, "{path}");
            }
            // Back, from where it is not aligned, and to where it is not.
            let back = client.open("/d/back", NEW).unwrap();
            assert_eq!(client.do_it(&copy((file, 7), (back, 3), 10_000)), Ok(10_000), "{path}");
            assert!(client.read(back, 3, 10_000).unwrap() == contents[7..10_007], "{path}");
            client.close(back).unwrap();
            std::fs::remove_file(server.path("back")).unwrap();
        }
        let b = client.open("/d/b", RW).unwrap();
        assert_eq!(client.do_it(&copy((a, length - 10), (b, 0), 100)), Ok(10), "the end of the source");
        assert_eq!(client.do_it(&copy((a, length), (b, 0), 100)), Ok(0), "behind its end");
        assert_eq!(client.do_it(&copy((b, 0), (b, 1 << 20), 1 << 20)), Ok(1 << 20), "within a file");
        for (what, command, errno) in [
            ("ranges that overlap", copy((b, 0), (b, 100), 101), libc::EINVAL),
            ("a source that is not open", copy((FileHandle(77), 0), (b, 0), 1), libc::EBADF),
            ("a destination that is not open", copy((b, 0), (FileHandle(77), 0), 1), libc::EBADF),
            ("a destination open for reading", copy((b, 0), (a, 0), 1), libc::EBADF),
            ("a range beyond every file", copy((b, 1), (b, 0), u64::MAX), libc::EINVAL),
            ("a place beyond every file", copy((a, 0), (b, i64::MAX as u64), 1), libc::EINVAL),
        ] {
            assert_eq!(client.do_it(&command), Err(errno), "{what}");
        }
        let write_only = client.open("/d/b", OPEN_WRITE).unwrap();
        assert_eq!(client.do_it(&copy((write_only, 0), (b, 1 << 20), 1)), Err(libc::EBADF));
        let memory = client.open("/m", RW).unwrap();
        assert_eq!(client.do_it(&copy((a, 0), (memory, (32 << 20) - 1), 2)), Err(libc::ENOSPC));
        let null = client.open("/n", RW).unwrap();
        for command in [copy((a, 0), (null, 0), 1), copy((null, 0), (b, 0), 1)] {
            assert_eq!(client.do_it(&command), Err(libc::EOPNOTSUPP));
        }
        assert_eq!(client.do_it(&copy((a, 5), (b, 5), 0)), Ok(0), "nothing");
    });
}

#[test]
fn a_range_is_copied_where_copy_file_range_is_missing() {
    for errno in [libc::ENOSYS, libc::EOPNOTSUPP, libc::EXDEV, libc::EINVAL] {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let export = format!("d={},rw", directory.path().display());
        let arguments = ["--listen", "tcp://127.0.0.1:0", "--export", &export, "--sandbox=off"];
        let process = without(libc::SYS_copy_file_range, errno, &arguments);
        let server = Server::spawn(process, directory);
        let mut client = server.client();
        let contents = bytes((9 << 20) + 1);
        std::fs::write(server.path("a"), &contents).unwrap();
        let (a, b) =
            (client.open("/d/a", OPEN_READ).unwrap(), client.open("/d/b", NEW | OPEN_DIRECT).unwrap());
        let length = contents.len() as u64;
        assert_eq!(client.do_it(&copy((a, 1), (b, 1), length)), Ok(length - 1));
        assert!(std::fs::read(server.path("b")).unwrap()[1..] == contents[1..], "{errno}");
    }
}

#[test]
fn the_checksum_of_a_range_is_that_of_its_bytes() {
    each(|variant| {
        let server = Server::start(variant, &["--export", "m=mem:32M,rw", "--export", "n=null:1G"]);
        let mut client = server.client();
        let contents = bytes((9 << 20) + 77);
        std::fs::write(server.path("a"), &contents).unwrap();
        let memory = client.open("/m", RW).unwrap();
        let plain = client.open("/d/a", OPEN_READ).unwrap();
        let direct = client.open("/d/a", OPEN_READ | OPEN_DIRECT).unwrap();
        let length = contents.len() as u64;
        assert_eq!(client.do_it(&copy((plain, 0), (memory, 0), length)), Ok(length));
        for file in [plain, direct, memory] {
            for (offset, length) in [(0, length), (1, 100), (5, 8 << 20), (0, 0), (length, 0)] {
                let part = &contents[offset as usize..][..length as usize];
                let crc32c = raio_transport::message::data_crc(part).to_le_bytes();
                let blake3 = blake3::hash(part);
                for (checksum, expected) in
                    [(FLAG_CRC32C, [crc32c, [0; 4]].concat()), (FLAG_BLAKE3, blake3.as_bytes().to_vec())]
                {
                    let reply =
                        client.call(&Command::Checksum { file, offset, length, checksum }, Bulk::None);
                    assert!(reply.status.is_ok(), "{:?}", reply.status);
                    assert_eq!((reply.result, &reply.body[..]), (length, &expected[..]), "{offset} {length}");
                }
            }
        }
        let to_end =
            Command::Checksum { file: plain, offset: 9 << 20, length: 1 << 40, checksum: FLAG_BLAKE3 };
        let reply = client.call(&to_end, Bulk::None);
        assert_eq!((reply.result, &reply.body[..]), (77, &blake3::hash(&contents[9 << 20..]).as_bytes()[..]));
        let write_only = client.open("/d/a", OPEN_WRITE).unwrap();
        let null = client.open("/n", OPEN_READ).unwrap();
        for (file, checksum, errno) in [
            (plain, 0, libc::EINVAL),
            (plain, FLAG_BLAKE3 | FLAG_CRC32C, libc::EINVAL),
            (write_only, FLAG_BLAKE3, libc::EBADF),
            (FileHandle(77), FLAG_BLAKE3, libc::EBADF),
            (null, FLAG_BLAKE3, libc::EOPNOTSUPP),
        ] {
            let result = client.do_it(&Command::Checksum { file, offset: 0, length: 1, checksum });
            assert_eq!(result, Err(errno));
        }
    });
}

#[test]
fn what_is_copied_and_read_for_checksums_is_in_the_statistics() {
    let mut server = Server::start(Variant::Uring, &["--export", "m=mem:1M,rw"]);
    let mut client = server.client();
    std::fs::write(server.path("a"), bytes(100_000)).unwrap();
    let (a, memory) = (client.open("/d/a", OPEN_READ).unwrap(), client.open("/m", OPEN_WRITE).unwrap());
    client.do_it(&copy((a, 0), (memory, 0), 60_000)).unwrap();
    client.do_it(&Command::Checksum { file: a, offset: 0, length: 1000, checksum: FLAG_CRC32C }).unwrap();
    client.do_it(&Command::Lock { file: a, lock: FLAG_LOCK_SHARED }).unwrap();
    let stats = server.stats();
    for (name, expected) in [("copy", 1), ("checksum", 1), ("lock", 1)] {
        assert_eq!(stats.get(name), expected, "{name}");
    }
    assert_eq!(stats.get("read_bytes"), 61_000);
    assert_eq!(stats.get("written_bytes"), 60_000);
}

#[test]
fn a_cancelled_copy_says_how_much_is_done() {
    each(|variant| {
        let server = Server::start(variant, &[]);
        let mut client = server.client();
        let length = 16u64 << 30;
        std::fs::File::create(server.path("a")).unwrap().set_len(length).unwrap();
        let (a, b) = (client.open("/d/a", OPEN_READ).unwrap(), client.open("/d/b", NEW).unwrap());
        let checksum = Command::Checksum { file: a, offset: 0, length, checksum: FLAG_BLAKE3 };
        let (tag, RequestId(id)) = client.send(&checksum, Bulk::None);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(client.do_it(&Command::Cancel { id }), Ok(0));
        assert_eq!(client.wait(tag).status.errno, libc::ECANCELED);
        let (tag, RequestId(id)) = client.send(&copy((a, 0), (b, 0), length), Bulk::None);
        // Until it has begun.
        let copied = || std::fs::metadata(server.path("b")).unwrap().len();
        until(|| "the copy does not begin".into(), || copied() > 0);
        let cancel = client.do_it(&Command::Cancel { id });
        let reply = client.wait(tag);
        assert!(reply.status.is_ok() && cancel == Err(libc::EALREADY), "{:?} {cancel:?}", reply.status);
        assert!((1..length).contains(&reply.result), "{}", reply.result);
        assert_eq!(copied(), reply.result);
    });
}

#[test]
fn a_lock_is_that_of_one_open_file_until_it_is_closed() {
    each(|variant| {
        let server = Server::start(variant, &["--export", "m=mem:1M,rw"]);
        let (mut one, mut other) = (server.client(), server.client());
        let file = one.open("/d/f", NEW).unwrap();
        let [theirs, too] = [(); 2].map(|()| other.open("/d/f", RW).unwrap());
        let lock = |file, lock| Command::Lock { file, lock };
        let local = std::fs::File::open(server.path("f")).unwrap();
        assert_eq!(one.do_it(&lock(file, FLAG_LOCK_SHARED)), Ok(0));
        assert_eq!(other.do_it(&lock(theirs, FLAG_LOCK_SHARED)), Ok(0));
        assert_eq!(other.do_it(&lock(too, FLAG_LOCK_EXCLUSIVE)), Err(libc::EAGAIN));
        let reply = other.call(&lock(too, FLAG_LOCK_EXCLUSIVE), Bulk::None);
        assert!(reply.status.retryable, "{:?}", reply.status);
        assert!(local.try_lock().is_err(), "it is one for programs of the host, too");
        assert_eq!(other.do_it(&lock(theirs, 0)), Ok(0));
        assert_eq!(one.do_it(&lock(file, FLAG_LOCK_EXCLUSIVE)), Ok(0), "the only one may have it alone");
        assert_eq!(one.do_it(&lock(file, FLAG_LOCK_EXCLUSIVE)), Ok(0), "taking it twice is taking it");
        assert_eq!(other.do_it(&lock(theirs, FLAG_LOCK_SHARED)), Err(libc::EAGAIN));
        one.close(file).unwrap();
        assert_eq!(other.do_it(&lock(theirs, FLAG_LOCK_EXCLUSIVE)), Ok(0), "it was given up with its file");
        assert_eq!(other.do_it(&lock(too, FLAG_LOCK_SHARED)), Err(libc::EAGAIN), "in the same session");
        drop(other);
        // The session ends a while after the connection.
        until(|| "the lock outlives its session".into(), || local.try_lock().is_ok());
        let file = one.open("/d/f", RW).unwrap();
        assert_eq!(one.do_it(&lock(file, FLAG_LOCK_SHARED)), Err(libc::EAGAIN), "a program has it");
        let read_only = one.open("/d/f", OPEN_READ).unwrap();
        assert_eq!(one.do_it(&lock(read_only, FLAG_LOCK_EXCLUSIVE)), Err(libc::EBADF));
        assert_eq!(one.do_it(&lock(file, FLAG_LOCK_EXCLUSIVE | FLAG_LOCK_SHARED)), Err(libc::EINVAL));
        let memory = one.open("/m", RW).unwrap();
        assert_eq!(one.do_it(&lock(memory, FLAG_LOCK_SHARED)), Err(libc::EOPNOTSUPP));
    });
}

#[test]
fn a_file_of_the_next_session_has_not_the_handle_of_one_whose_lock_was_lost() {
    let mut server = Server::start(Variant::Uring, &[]);
    let offer = Offer::new("test");
    let mut seen = Vec::new();
    for _ in 0..3 {
        let mut client = Client::connect(server.address, &offer);
        let file = client.open("/d/f", NEW).unwrap();
        assert_eq!(client.do_it(&Command::Lock { file, lock: FLAG_LOCK_EXCLUSIVE }), Ok(0));
        assert!(!seen.contains(&file), "{file:?} and {seen:?}");
        // A close of the earlier file does not close this one.
        for &lost in &seen {
            assert_eq!(client.close(lost), Err(libc::EBADF));
        }
        seen.push(file);
        drop(client);
        server.stats_until("the session ends", Stats::is_idle);
    }
}
