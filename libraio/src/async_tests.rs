//! Operations as futures, with tokio and with an executor of one line.

use std::future::Future;
use std::os::fd::AsFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::Duration;

use raio_transport::handshake::Policy;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::task::JoinSet;

use crate::fake_server::FakeServer;
use crate::test_buffers::{bytes, pattern, room};
use crate::{
    AsyncContext, Buffer, Buffers, File, Operation, Options, Progress, PutOptions, Scheme, Session,
    SubmitOptions,
};

fn start(options: &Options) -> (FakeServer, Session, Arc<File>, AsyncContext) {
    let policy = Policy { queue_depth: 4, data_bytes_max: 64 << 10, ..Policy::default() };
    let server = FakeServer::start(policy);
    server.file("/e/data", pattern(1 << 20));
    let session = Session::connect_to(Scheme::Tcp, server.address, options).unwrap();
    let file = Arc::new(session.open("/e/data", libc::O_RDWR, 0).unwrap());
    let context = AsyncContext::new(session.context(8).unwrap()).unwrap();
    (server, session, file, context)
}

fn tokio() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap()
}

/// Polls a future once.
fn step<F: Future>(future: Pin<&mut F>) -> Poll<F::Output> {
    future.poll(&mut TaskContext::from_waker(Waker::noop()))
}

/// Waits for a future, and for nothing else.
fn block_on<F: Future>(context: &AsyncContext, future: F) -> F::Output {
    let mut future = pin!(future);
    loop {
        if let Poll::Ready(output) = step(future.as_mut()) {
            return output;
        }
        let left = Timespec { tv_sec: 10, tv_nsec: 0 };
        let ready = poll(&mut [PollFd::new(&context.as_fd(), PollFlags::IN)], Some(&left));
        assert_eq!(ready, Ok(1), "it is not woken");
        let _ = context.run_once();
    }
}

#[test]
fn tasks_of_tokio_share_a_context_that_is_smaller_than_their_number() {
    let (server, _session, file, context) = start(&Options::default());
    tokio().block_on(async {
        let driver = context.clone();
        let driver = tokio::spawn(async move {
            #[expect(
                deprecated,
                reason = "the other constructor is unsafe, and this context keeps its descriptor"
            )]
            let readiness = AsyncFd::with_interest(driver.clone(), Interest::READABLE)?;
            loop {
                let mut ready = readiness.readable().await?;
                if driver.run_once()? == Progress::Drained {
                    ready.clear_ready();
                }
            }
            #[expect(unreachable_code, reason = "it has a type")]
            Ok::<(), std::io::Error>(())
        });
        let expected: Arc<[u8]> = pattern(1 << 20).into();
        let mut tasks = JoinSet::new();
        for n in 0..200 {
            let (context, file, expected) = (context.clone(), Arc::clone(&file), Arc::clone(&expected));
            tasks.spawn(async move {
                for round in 0..5 {
                    let (offset, len) = (n * 3000 + round, 100 + n as usize * 500);
                    let (read, buffers) = context.read(&file, offset, room(len)).await;
                    assert_eq!(read, Ok(len as u64));
                    assert_eq!(bytes(&buffers), expected[offset as usize..][..len]);
                }
            });
        }
        let done = tasks.join_all();
        done.await;
        let (written, buffers) =
            context.write(&file, 5, Buffers::One(Buffer::Owned((*b"hello").into()))).await;
        assert_eq!((written, &bytes(&buffers)[..]), (Ok(5), &b"hello"[..]));
        assert_eq!(context.fsync(&file, true).await, Ok(()));
        driver.abort();
    });
    assert_eq!(&server.contents("/e/data")[5..10], b"hello");
}

#[test]
fn an_operation_whose_future_is_dropped_runs_to_its_end_with_its_buffers() {
    let (server, _session, file, context) = start(&Options::default());
    server.hold(true);
    {
        let buffers = Buffers::One(Buffer::Owned((*b"dropped").into()));
        let mut write = pin!(context.write(&file, 0, buffers));
        assert!(step(write.as_mut()).is_pending());
        let lent = Operation::ReadLent { offset: 0, length: 100 };
        let mut read = pin!(context.submit(&file, lent, SubmitOptions::default()));
        assert!(step(read.as_mut()).is_pending());
    }
    server.hold(false);
    // Its completion comes before this one's.
    let (read, buffers) = block_on(&context, context.read(&file, 0, room(7)));
    assert_eq!((read, &bytes(&buffers)[..]), (Ok(7), &b"dropped"[..]));
    assert_eq!(server.writes(), 1);
    assert_eq!(context.operations_left(), 0);
}

#[test]
fn a_future_that_was_ready_and_is_dropped_leaves_nothing() {
    let (_server, _session, file, context) = start(&Options::default());
    for _ in 0..20 {
        let lent = Operation::ReadLent { offset: 0, length: 100 };
        let mut read = pin!(context.submit(&file, lent, SubmitOptions::default()));
        assert!(step(read.as_mut()).is_pending());
        let left = Timespec { tv_sec: 10, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&context.as_fd(), PollFlags::IN)], Some(&left)), Ok(1));
        context.run_once().unwrap();
    }
    assert_eq!(context.operations_left(), 0);
    let (read, _) = block_on(&context, context.read(&file, 0, room(7)));
    assert_eq!(read, Ok(7));
}

#[test]
fn an_operation_that_is_rejected_is_ready_at_once_with_its_buffers() {
    let (_server, _session, file, context) = start(&Options::default());
    file.close().unwrap();
    let mut read = pin!(context.read(&file, 0, room(7)));
    let Poll::Ready((result, buffers)) = step(read.as_mut()) else { panic!() };
    assert_eq!((result.unwrap_err().errno(), buffers.len()), (libc::EBADF, 7));
}

#[test]
fn an_operation_has_its_timeout_also_as_a_future() {
    let (server, _session, file, context) = start(&Options::default());
    server.mute(true);
    let options = SubmitOptions { timeout: Some(Duration::from_millis(50)), ..SubmitOptions::default() };
    let read = context.submit(&file, Operation::Read { offset: 0, buffers: room(10) }, options);
    let completion = block_on(&context, read).unwrap();
    assert_eq!(completion.result.unwrap_err().errno(), libc::ETIMEDOUT);
}

#[test]
fn when_the_connection_ends_for_good_every_future_is_ready() {
    let (server, _session, file, context) =
        start(&Options { reconnect: Duration::ZERO, ..Options::default() });
    server.hold(true);
    let mut reads: Vec<_> = (0..12).map(|_| Box::pin(context.read(&file, 0, room(7)))).collect();
    for read in &mut reads {
        assert!(step(read.as_mut()).is_pending());
    }
    server.die();
    for read in reads {
        let (result, buffers) = block_on(&context, read);
        assert!(result.is_err());
        assert_eq!(buffers.len(), 7);
    }
    assert_eq!(context.run_once().unwrap_err().errno(), libc::ENOTCONN);
}

#[test]
fn files_are_opened_got_put_and_closed_by_futures() {
    let (server, session, file, context) = start(&Options::default());
    let status = block_on(&context, context.metadata("/e/data")).unwrap();
    assert_eq!(status.size.get(), 1 << 20);
    let opened = block_on(&context, context.open("/e/data", libc::O_RDONLY, 0)).unwrap();
    let (read, buffers) = block_on(&context, context.read(&opened, 100, room(50)));
    assert_eq!((read, bytes(&buffers)), (Ok(50), pattern(1 << 20)[100..150].to_vec()));
    assert_eq!(server.open(), 2);
    block_on(&context, context.close(&opened)).unwrap();
    assert_eq!(server.open(), 1);
    let new = Buffers::One(Buffer::Owned(b"new".as_slice().into()));
    block_on(&context, context.put("/e/new", new, PutOptions::default())).unwrap();
    let (got, buffers) = block_on(&context, context.get("/e/new", room(10)));
    let (count, status) = got.unwrap();
    assert_eq!((count, status.size.get(), &bytes(&buffers.unwrap())[..4]), (3, 3, &b"new\0"[..]));
    let missing = block_on(&context, context.open("/e/missing", libc::O_RDONLY, 0)).unwrap_err();
    assert_eq!(missing.errno(), libc::ENOENT);
    let entries = block_on(&context, context.read_dir("/e")).unwrap();
    assert_eq!(entries.len(), 10);
    let (rejected, buffers) = block_on(&context, context.get("", room(10)));
    assert_eq!((rejected.unwrap_err().errno(), buffers.unwrap().len()), (libc::ENOENT, 10));
    // One that was forgotten closes what it opens.
    let mut forgotten = Box::pin(context.open("/e/data", libc::O_RDONLY, 0));
    assert!(step(forgotten.as_mut()).is_pending());
    drop(forgotten);
    block_on(&context, context.metadata("/e/data")).unwrap();
    session.metadata("/e/data").unwrap();
    assert_eq!((server.open(), context.operations_left()), (1, 0));
    drop(file);
}
