//! What both engines promise, over real files. Each test runs over the ring (where the kernel has one) and
//! over threads.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use raio_transport::memory::{Arena, Slot};
use raio_transport::reactor::{Config, Wait};
use rustix::fs::{Mode, OFlags};

use super::*;
use crate::limits::{Account, Caps, FilePermit, Limits, Room};

struct Bench {
    name: &'static str,
    reactor: Reactor,
    engine: Box<dyn Engine>,
    arena: Arena,
    lanes: Lanes,
    client: Arc<Client>,
}

/// The ring; threads beside a ring; threads where there is no ring.
fn each(test: impl Fn(&mut Bench)) {
    for (name, epoll, threads) in
        [("uring", false, false), ("threads", false, true), ("threads, epoll", true, true)]
    {
        let mut reactor = Reactor::new(&Config { epoll, ..Config::default() }).unwrap();
        if !threads && !reactor.has_ring() {
            eprintln!("SKIPPED over io_uring: {}", reactor.fallback_reason().unwrap());
            continue;
        }
        let arena = Arena::new(4 << 20, 1 << 20).unwrap();
        reactor.register_arena(&arena).unwrap();
        let engine: Box<dyn Engine> =
            if threads { Box::new(Threads::new(&reactor)) } else { Box::new(Uring::new(&reactor)) };
        let (lanes, client) = (Lanes::new(Pool::start().unwrap()), Client::new(None));
        test(&mut Bench { name, reactor, engine, arena, lanes, client });
    }
}

fn permit() -> FilePermit {
    let room = Room { descriptors: 10, files: 10, bytes: 1 << 20, workers: 1 };
    let limits = Limits::new(room, Caps::default(), Caps::default());
    limits.open(&Account::default(), &None).unwrap()
}

impl Bench {
    fn open(&mut self, path: &Path, flags: OFlags) -> Arc<Descriptor> {
        let fd = rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_bits_retain(0o644)).unwrap();
        let kind = rustix::fs::fstatfs(&fd).unwrap().f_type;
        Descriptor::new(fd, Some(kind), self.lanes.clone(), Arc::default())
    }

    fn slot(&mut self, bytes: &[u8]) -> Slot {
        let mut slot = self.arena.alloc(bytes.len()).unwrap();
        slot.bytes_mut()[..bytes.len()].copy_from_slice(bytes);
        slot
    }

    fn next(&mut self) -> Completion {
        let deadline = Instant::now() + Duration::from_secs(10);
        let mut events = Vec::new();
        self.engine.flush();
        loop {
            if let Some(completion) = self.engine.next() {
                return completion;
            }
            assert!(Instant::now() < deadline, "{}: no completion came", self.name);
            self.reactor.run_once(Wait::Block, &mut events).unwrap();
            for event in events.drain(..) {
                self.engine.handle(event);
            }
        }
    }

    fn run(&mut self, file: &Arc<Descriptor>, operation: Operation) -> Completion {
        self.engine.submit(&mut self.reactor, 77, &Arc::downgrade(&self.client), file, operation);
        let completion = self.next();
        assert_eq!(completion.key, 77);
        completion
    }

    fn write(&mut self, file: &Arc<Descriptor>, bytes: &[u8], offset: u64) -> Result<u32, i32> {
        let source = SlotRange { slot: self.slot(bytes), start: 0, len: bytes.len() };
        let completion = self.run(file, Operation::Write { source, offset });
        assert!(matches!(completion.outcome, Outcome::Slot(_)), "{}: the slot is lost", self.name);
        completion.result
    }

    /// Reads up to the end of the range or of the file: one operation may bring less, as of what is in the
    /// page cache only in part.
    fn read(
        &mut self,
        file: &Arc<Descriptor>,
        start: usize,
        len: usize,
        offset: u64,
    ) -> Result<Vec<u8>, i32> {
        let mut slot = self.slot(&vec![0xee; start + len]);
        let mut done = 0;
        loop {
            let target = SlotRange { slot, start: start + done, len: len - done };
            let completion = self.run(file, Operation::Read { target, offset: offset + done as u64 });
            let Outcome::Slot(range) = completion.outcome else { panic!("{}: the slot is lost", self.name) };
            slot = range.slot;
            let n = completion.result? as usize;
            done += n;
            if n == 0 || done == len {
                break;
            }
        }
        assert!(slot.bytes()[..start].iter().all(|&b| b == 0xee), "{}: it read before the range", self.name);
        Ok(slot.bytes()[start..start + done].to_vec())
    }
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_file() {
    each(|bench| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        let file = bench.open(&path, OFlags::RDWR | OFlags::CREATE);
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
        assert_eq!(bench.write(&file, &bytes, 10), Ok(100_000));
        assert_eq!(bench.read(&file, 100, 1000, 5_010), Ok(bytes[5_000..6_000].to_vec()));
        assert_eq!(
            bench.read(&file, 0, 1000, 99_510).unwrap().len(),
            500,
            "a read is short at the end of the file"
        );
        assert_eq!(bench.read(&file, 0, 1000, 100_010), Ok(vec![]));
        let mut local = vec![0; 100_000];
        std::fs::File::open(&path).unwrap().read_exact_at(&mut local, 10).unwrap();
        assert!(local == bytes, "{}: the file holds something else", bench.name);
    });
}

#[test]
fn what_the_kernel_refuses_is_that_errno() {
    each(|bench| {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("file");
        std::fs::write(&path, "x").unwrap();
        let file = bench.open(&path, OFlags::RDONLY);
        assert_eq!(bench.write(&file, b"y", 0), Err(libc::EBADF));
        let file = bench.open(&path, OFlags::WRONLY);
        assert_eq!(bench.read(&file, 0, 1, 0), Err(libc::EBADF));
    });
}

#[test]
fn files_are_asked_flushed_and_closed() {
    each(|bench| {
        let directory = tempfile::tempdir().unwrap();
        let file = bench.open(&directory.path().join("new"), OFlags::RDWR | OFlags::CREATE);
        assert_eq!(bench.write(&file, &[1; 5000], 0), Ok(5000));
        let Outcome::Stat(info) = bench.run(&file, Operation::Stat).outcome else { panic!("no status") };
        assert_eq!((info.status.size.get(), info.status.mode.get()), (5000, libc::S_IFREG | 0o644));
        assert!(info.status.modified_ns.get() > 1_600_000_000_000_000_000);
        assert_eq!(info.status.links.get(), 1);
        assert_eq!(bench.run(&file, Operation::Fsync { data_only: false }).result, Ok(0));
        assert_eq!(bench.run(&file, Operation::Fsync { data_only: true }).result, Ok(0));
        file.close(Closing::new(bench.engine.completions().completer(5), permit()));
        drop(file);
        let completion = bench.next();
        assert_eq!((completion.key, completion.result), (5, Ok(0)));
    });
}

#[test]
fn calls_return_what_they_come_to() {
    each(|bench| {
        let lane = bench.lanes.control;
        bench.engine.call(6, &Arc::downgrade(&bench.client), lane, Box::new(|| Box::new("no")));
        let completion = bench.next();
        let Outcome::Returned(returned) = completion.outcome else { panic!("{completion:?}") };
        assert_eq!((completion.key, returned.downcast_ref()), (6, Some(&"no")));
    });
}

#[test]
fn a_call_that_panics_has_failed_and_its_lane_is_as_wide_as_before() {
    each(|bench| {
        let (client, lane) = (Arc::downgrade(&bench.client), bench.lanes.control);
        for key in 0..2 * CONTROL_WIDTH as u64 {
            bench.engine.call(key, &client, lane, Box::new(|| panic!("a test says that this is a bug")));
            let completion = bench.next();
            assert_eq!((completion.key, completion.result), (key, Err(libc::EIO)));
        }
        bench.engine.call(77, &client, lane, Box::new(|| Box::new(())));
        assert_eq!(bench.next().result, Ok(0));
    });
}

#[test]
fn what_there_is_no_thread_for_ends_with_eagain_and_gives_its_slot_back() {
    each(|bench| {
        let directory = tempfile::tempdir().unwrap();
        let file = bench.open(&directory.path().join("file"), OFlags::RDWR | OFlags::CREATE);
        let source = SlotRange { slot: bench.slot(&[1; 4096]), start: 0, len: 4096 };
        let write = Operation::Write { source, offset: 0 };
        let task = job::Task::on(8, &Arc::downgrade(&bench.client), &file, write);
        bench.engine.completions().expect_one();
        let job = Job::new(bench.engine.completions().sender(), vec![task]);
        assert!(pool::Job::reject(job).is_none());
        let completion = bench.next();
        assert_eq!((completion.key, completion.result), (8, Err(libc::EAGAIN)));
        assert!(matches!(completion.outcome, Outcome::Slot(_)), "the slot is lost");
    });
}

#[test]
fn holes_and_zeros_read_as_zeros() {
    each(|bench| {
        // Not in a tmpfs, which cannot zero a range.
        let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let file = bench.open(&directory.path().join("file"), OFlags::RDWR | OFlags::CREATE);
        assert_eq!(bench.write(&file, &[7; 16384], 0), Ok(16384));
        match bench.run(&file, Operation::Discard { offset: 4096, length: 4096 }).result {
            Err(libc::EOPNOTSUPP) => return eprintln!("SKIPPED: the file system here cannot punch holes"),
            result => assert_eq!(result, Ok(0)),
        }
        assert_eq!(bench.read(&file, 0, 4096, 4096), Ok(vec![0; 4096]));
        let zero = Operation::WriteZeroes { offset: 10_000, length: 10_000 };
        assert!(matches!(bench.run(&file, zero).outcome, Outcome::Cleared(10_000)));
        assert_eq!(bench.read(&file, 0, 20_001, 9_999).unwrap(), [&[7][..], &[0; 10_000]].concat());
        let Outcome::Stat(info) = bench.run(&file, Operation::Stat).outcome else { panic!("no status") };
        assert_eq!(info.status.size.get(), 20_000, "the file became longer");
    });
}

#[test]
fn many_operations_at_once_each_end_once() {
    each(|bench| {
        let directory = tempfile::tempdir().unwrap();
        let file = bench.open(&directory.path().join("file"), OFlags::RDWR | OFlags::CREATE);
        for key in 0..200u64 {
            let source = SlotRange { slot: bench.slot(&[key as u8; 512]), start: 0, len: 512 };
            bench.engine.submit(
                &mut bench.reactor,
                key,
                &Arc::downgrade(&bench.client),
                &file,
                Operation::Write { source, offset: key * 512 },
            );
        }
        let mut keys: Vec<_> = (0..200).map(|_| bench.next()).map(|c| (c.key, c.result)).collect();
        keys.sort_unstable();
        assert_eq!(keys, (0..200).map(|key| (key, Ok(512))).collect::<Vec<_>>());
        assert!(bench.engine.next().is_none());
        assert_eq!(bench.arena.used_bytes(), 0, "{}: a slot is lost", bench.name);
    });
}

#[test]
fn what_is_cancelled_ends_once_and_gives_its_slot_back() {
    each(|bench| {
        let directory = tempfile::tempdir().unwrap();
        let file = bench.open(&directory.path().join("file"), OFlags::RDWR | OFlags::CREATE);
        for key in 0..100u64 {
            let source = SlotRange { slot: bench.slot(&[1; 4096]), start: 0, len: 4096 };
            let id = bench.engine.submit(
                &mut bench.reactor,
                key,
                &Arc::downgrade(&bench.client),
                &file,
                Operation::Write { source, offset: key * 4096 },
            );
            bench.engine.cancel(&mut bench.reactor, key, id.expect("it has not ended"));
        }
        for _ in 0..100 {
            let completion = bench.next();
            assert!(matches!(completion.result, Ok(4096) | Err(libc::ECANCELED)), "{completion:?}");
            assert!(matches!(completion.outcome, Outcome::Slot(_)), "{completion:?}");
        }
        assert_eq!(bench.arena.used_bytes(), 0);
    });
}

#[test]
fn reads_that_would_change_the_time_of_access_are_not_made_by_workers() {
    let directory = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, "x").unwrap();
    let lanes = Lanes::new(Pool::start().unwrap());
    let open = || {
        let fd = rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let kind = rustix::fs::fstatfs(&fd).unwrap().f_type;
        Descriptor::new(fd, Some(kind), lanes.clone(), Arc::default())
    };
    let own = open();
    if !own.is_asynchronous {
        return eprintln!("SKIPPED: the file system here is not one whose reads are asynchronous");
    }
    assert!(rustix::fs::fcntl_getfl(&own).unwrap().contains(OFlags::NOATIME));
    assert!(own.cached_reads.is_some());
    let mounted = rustix::fs::fstatvfs(&own).unwrap().f_flag;
    if !rustix::process::geteuid().is_root() || mounted.contains(rustix::fs::StatVfsMountFlags::NOATIME) {
        return eprintln!(
            "SKIPPED: a file of another user needs root, and a file system that keeps times of access"
        );
    }
    let foreign = std::thread::scope(|scope| {
        let opened = scope.spawn(|| {
            let nobody = rustix::process::Uid::from_raw(65534);
            // Of this thread alone.
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            open()
        });
        opened.join().unwrap()
    });
    assert!(!foreign.is_asynchronous && foreign.cached_reads.is_none());
}
