//! Operations on paths, and those on files that answer more than a number, in a context.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use raio_transport::handshake::Policy;
use raio_transport::protocol::{Command, OperationGroup};

use crate::fake_server::{FakeServer, collect, until};
use crate::test_buffers::room;
use crate::{
    Answer, Attributes, Buffer, Buffers, Completion, Context, File, Operation, OperationCrc, Options,
    PathOperation, PutOptions, ReadDir, Scheme, Session, SubmitOptions,
};

const IO_MAX: u32 = 64 << 10;

fn start() -> (FakeServer, Session, Context) {
    let policy = Policy { queue_depth: 4, data_bytes_max: IO_MAX, ..Policy::default() };
    let server = FakeServer::start(policy);
    server.file("/e/data", (0..1000).map(|n| n as u8).collect());
    let session = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
    let context = session.context(8).unwrap();
    (server, session, context)
}

fn filled(bytes: &[u8]) -> Buffers {
    Buffers::One(Buffer::Owned(bytes.into()))
}

fn path(path: &str) -> PathBuf {
    path.into()
}

fn open(at: &str) -> PathOperation {
    PathOperation::Open { path: path(at), flags: libc::O_RDWR, mode: 0 }
}

fn stat(at: &str) -> PathOperation {
    PathOperation::Stat { path: path(at), nofollow: false }
}

fn get(at: &str, len: usize) -> PathOperation {
    PathOperation::Get { path: path(at), buffers: room(len) }
}

fn put(at: &str, bytes: &[u8]) -> PathOperation {
    PathOperation::Put { path: path(at), buffers: filled(bytes), options: PutOptions::default() }
}

fn unlink(at: &str) -> PathOperation {
    PathOperation::Unlink { path: path(at) }
}

fn submit(context: &mut Context, operation: PathOperation, token: u64) -> crate::Ticket {
    context.submit_path(operation, SubmitOptions::default(), token).unwrap()
}

/// Does one operation.
fn run(context: &mut Context, operation: PathOperation) -> Completion {
    submit(context, operation, 7);
    collect(context, 1).remove(0)
}

fn run_on(context: &mut Context, file: &File, operation: Operation) -> Completion {
    context.submit(file, operation, 8).unwrap();
    collect(context, 1).remove(0)
}

fn file_of(completion: Completion) -> File {
    match (completion.result, completion.answer.map(|answer| *answer)) {
        (Ok(0), Some(Answer::File(file))) => file,
        other => panic!("{other:?}"),
    }
}

fn size_of_answer(completion: &Completion) -> u64 {
    match completion.answer.as_deref() {
        Some(Answer::Status(status)) => status.size.get(),
        other => panic!("{other:?} of {:?}", completion.result),
    }
}

fn bytes(completion: &Completion) -> Vec<u8> {
    let len = *completion.result.as_ref().unwrap() as usize;
    completion.buffers.as_ref().unwrap().slices(0..len).flatten().copied().collect()
}

fn errno(completion: &Completion) -> i32 {
    completion.result.as_ref().unwrap_err().errno()
}

/// Waits until this many files are open at the server.
fn assert_open(server: &FakeServer, session: &Session, n: usize) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.open() != n {
        assert!(Instant::now() < deadline, "{} files are open, and not {n}", server.open());
        // Closes that were not waited for are sent with the next call at the latest.
        let _ = session.metadata("/e/data");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn each_operation_brings_what_it_asks_for() {
    let (server, session, mut context) = start();
    let file = file_of(run(&mut context, open("/e/data")));
    assert_eq!(
        bytes(&run_on(&mut context, &file, Operation::Read { offset: 5, buffers: room(3) })),
        [5, 6, 7]
    );
    assert_eq!(size_of_answer(&run_on(&mut context, &file, Operation::Stat)), 1000);
    assert_eq!(run_on(&mut context, &file, Operation::Truncate { size: 900 }).result, Ok(0));
    assert_eq!(size_of_answer(&run(&mut context, stat("/e/data"))), 900);
    let extents = run_on(&mut context, &file, Operation::Extents { offset: 100, length: 5000 });
    match extents.answer.as_deref() {
        Some(Answer::Extents { extents, end: 5100 }) => assert_eq!(extents, &[(100, 800)]),
        other => panic!("{other:?}"),
    }
    let got = run(&mut context, get("/e/data", 2000));
    assert_eq!((got.token, size_of_answer(&got)), (7, 900));
    assert_eq!(bytes(&got), server.contents("/e/data"));
    assert_eq!(run(&mut context, put("/e/new", b"new")).result, Ok(3));
    assert_eq!(server.contents("/e/new"), b"new");
    let no_replace = false;
    let rename = PathOperation::Rename { from: path("/e/new"), to: path("/e/old"), no_replace };
    assert_eq!(run(&mut context, rename).result, Ok(0));
    let link = run(&mut context, PathOperation::Readlink { path: path("/e/old") });
    assert!(matches!(link.answer.as_deref(), Some(Answer::Link(target)) if *target == path("new")));
    let room = run(&mut context, PathOperation::Statfs { path: path("/e") });
    assert!(
        matches!(room.answer.as_deref(), Some(Answer::FileSystem(status)) if status.blocks.get() == 1000)
    );
    let name = || "user.contents".into();
    let buffers = filled(b"value");
    let set = PathOperation::SetXattr { path: path("/e/old"), name: name(), buffers, exclusive: false };
    let set = run(&mut context, set);
    assert_eq!((set.result, set.buffers.unwrap().len()), (Ok(0), 5));
    let got = run(&mut context, PathOperation::GetXattr { path: path("/e/old"), name: name() });
    assert!(matches!(got.answer.as_deref(), Some(Answer::Xattr(value)) if value == b"value"), "{got:?}");
    let listed = run(&mut context, PathOperation::ListXattr { path: path("/e/old") });
    match listed.answer.as_deref() {
        Some(Answer::XattrNames(names)) => assert_eq!(names, &["user.contents", "/e/old"]),
        other => panic!("{other:?}"),
    }
    let get_missing = run(&mut context, PathOperation::GetXattr { path: path("/e/none"), name: name() });
    assert_eq!((errno(&get_missing), get_missing.buffers.is_none()), (libc::ENOENT, true));
    assert_eq!(run(&mut context, unlink("/e/old")).result, Ok(0));
    let missing = run(&mut context, unlink("/e/old"));
    assert_eq!((errno(&missing), missing.answer.is_none()), (libc::ENOENT, true));
    assert_eq!(
        errno(&run(&mut context, PathOperation::Mkdir { path: path("/e/d"), mode: 0o755 })),
        libc::EPERM
    );
    assert_eq!(run_on(&mut context, &file, Operation::Close).result, Ok(0));
    assert_open(&server, &session, 0);
    let rejected = context.submit(&file, Operation::Stat, 0).unwrap_err();
    assert_eq!(rejected.error.errno(), libc::EBADF);
    assert_eq!(context.stats().in_flight, 0);
}

#[test]
fn a_file_is_closed_when_the_operations_on_it_have_ended() {
    let (server, session, mut context) = start();
    let file = file_of(run(&mut context, open("/e/data")));
    server.hold(true);
    context.submit(&file, Operation::Read { offset: 0, buffers: room(10) }, 0).unwrap();
    context.flush();
    let closed = run_on(&mut context, &file, Operation::Close);
    assert_eq!((closed.token, closed.result), (8, Ok(0)), "it does not wait for the read");
    assert_eq!(server.open(), 1);
    server.hold(false);
    assert_eq!(bytes(&collect(&mut context, 1)[0]).len(), 10);
    assert_open(&server, &session, 0);
}

#[test]
fn a_close_whose_connection_breaks_is_made_once() {
    for executed in [false, true] {
        let (server, session, mut context) = start();
        let file = file_of(run(&mut context, open("/e/data")));
        server.cut_at(0, executed);
        assert_eq!(run_on(&mut context, &file, Operation::Close).result, Ok(0));
        assert_eq!((context.stats().reconnects, server.open()), (1, 0));
        let file = session.open("/e/data", libc::O_RDONLY, 0).unwrap();
        server.cut_at(0, executed);
        file.close().unwrap();
        assert_eq!((server.is_to_cut(), server.open()), (false, 0));
    }
}

#[test]
fn a_close_that_is_cancelled_closes_nevertheless() {
    let (server, session, mut context) = start();
    let file = file_of(run(&mut context, open("/e/data")));
    server.mute(true);
    // They have all the credits.
    for token in 0..4 {
        submit(&mut context, stat("/e/data"), token);
    }
    let close = context.submit(&file, Operation::Close, 9).unwrap();
    assert_eq!(errno(&context.cancel(close).unwrap()), libc::ECANCELED);
    server.mute(false);
    collect(&mut context, 4);
    assert_open(&server, &session, 0);
}

#[test]
fn a_close_that_is_not_answered_when_its_context_ends_is_made_by_another_connection() {
    let (server, session, mut context) = start();
    let file = file_of(run(&mut context, open("/e/data")));
    server.mute(true);
    context.submit(&file, Operation::Close, 0).unwrap();
    context.flush();
    drop(context);
    until("its connection does not end", || server.goaways() > 0);
    server.mute(false);
    assert_open(&server, &session, 0);
}

#[test]
fn a_close_that_a_context_sends_is_not_taken_for_the_operation_before() {
    let (server, session, mut context) = start();
    let file = file_of(run(&mut context, open("/e/data")));
    let ticket = submit(&mut context, stat("/e/data"), 77);
    collect(&mut context, 1);
    server.mute(true);
    // As when another thread has the control connection.
    let close = Command::Close(file.begin_close().unwrap());
    session.shared().pending_closes().push(close);
    context.wait(0, 8, None).unwrap();
    assert!(session.shared().pending_closes().is_empty() && context.has_abandoned());
    assert_eq!(context.ticket(ticket.index(), 77), None);
    assert_eq!(context.cancel(ticket).unwrap_err().errno(), libc::EINVAL);
    server.mute(false);
    assert_open(&server, &session, 0);
}

#[test]
fn an_operation_that_has_timed_out_is_known_until_it_is_collected() {
    let (server, _session, mut context) = start();
    server.mute(true);
    let options = SubmitOptions { timeout: Some(Duration::from_millis(10)), ..SubmitOptions::default() };
    let ticket = context.submit_path(stat("/e/data"), options, 5).unwrap();
    context.flush();
    while context.wait(1, 1, Some(Duration::from_secs(1))).unwrap() == 0 {}
    assert_eq!(context.ticket(ticket.index(), 5), Some(ticket));
    assert_eq!(context.cancel(ticket).unwrap_err().errno(), libc::EAGAIN, "too late");
    assert_eq!(errno(&context.next().unwrap()), libc::ETIMEDOUT);
    assert_eq!(context.ticket(ticket.index(), 5), None);
    server.mute(false);
    assert_eq!(size_of_answer(&run(&mut context, stat("/e/data"))), 1000);
}

fn list() -> PathOperation {
    PathOperation::List { path: path("/e") }
}

fn entries_of(completion: Completion) -> ReadDir {
    match (completion.result, completion.answer.map(|answer| *answer)) {
        (Ok(0), Some(Answer::Entries(entries))) => entries,
        other => panic!("{other:?}"),
    }
}

/// Waits until the server has no listing.
fn assert_no_listing(server: &FakeServer, session: &Session) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while server.listings() > 0 {
        assert!(Instant::now() < deadline, "{} listings are left", server.listings());
        let _ = session.metadata("/e/data");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn wherever_the_connection_breaks_each_entry_of_a_list_comes_once() {
    for (page, executed) in (0..10).flat_map(|page| [(page, false), (page, true)]) {
        let (server, session, mut context) = start();
        server.cut_at(page, executed);
        let mut entries = entries_of(run(&mut context, list()));
        while !entries.is_complete() {
            let before = entries.buffered();
            entries = entries_of(run(&mut context, PathOperation::ListNext { entries }));
            assert_eq!(entries.buffered(), before + 1);
        }
        entries = entries_of(run(&mut context, PathOperation::ListNext { entries }));
        assert!(!server.is_to_cut());
        let names: Vec<_> = entries.map(|entry| entry.unwrap().name.into_string().unwrap()).collect();
        assert_eq!(names, ["1", "2", "3", "4", "5", "6", "7", "8", "9", "10"]);
        // That of a list whose answer was lost is not known, and ends with the session.
        if (page, executed) != (0, true) {
            assert_no_listing(&server, &session);
        }
    }
}

#[test]
fn a_list_that_is_given_up_is_ended_at_the_server() {
    let (server, session, mut context) = start();
    drop(run(&mut context, list()));
    assert_no_listing(&server, &session);
    let entries = entries_of(run(&mut context, list()));
    server.mute(true);
    let options = SubmitOptions { timeout: Some(Duration::from_millis(10)), ..SubmitOptions::default() };
    context.submit_path(list(), options, 0).unwrap();
    context.submit_path(PathOperation::ListNext { entries }, options, 1).unwrap();
    for late in collect(&mut context, 2) {
        assert_eq!((errno(&late), late.buffers.is_none()), (libc::ETIMEDOUT, true));
    }
    assert_eq!(server.listings(), 1);
    server.mute(false);
    assert_eq!(size_of_answer(&run(&mut context, stat("/e/data"))), 1000);
    assert_no_listing(&server, &session);
    // One that was begun before the server was restarted cannot go on, with the next page or the call.
    let first = entries_of(run(&mut context, list()));
    let mut second = entries_of(run(&mut context, list()));
    server.restart(7);
    assert_eq!(errno(&run(&mut context, PathOperation::ListNext { entries: first })), libc::ESTALE);
    assert!(second.next().unwrap().is_ok());
    assert_eq!(second.next().unwrap().unwrap_err().errno(), libc::ESTALE);
    assert!(second.next().is_none());
    // It goes on in its own session.
    let other = Session::connect_to(Scheme::Tcp, server.address, &Options::default()).unwrap();
    let entries = other.read_dir("/e").unwrap();
    let options = SubmitOptions::default();
    let rejected = context.submit_path(PathOperation::ListNext { entries }, options, 0).unwrap_err();
    assert_eq!(rejected.error.errno(), libc::EBADF);
    let PathOperation::ListNext { entries } = rejected.operation else { panic!("it was a list") };
    assert_eq!(entries.count(), 10);
    assert_no_listing(&server, &session);
    submit(&mut context, list(), 0);
    context.close();
    assert_no_listing(&server, &session);
}

#[test]
fn what_is_not_taken_comes_back_with_its_buffers() {
    let (_server, _session, mut context) = start();
    let options = SubmitOptions::default();
    for (operation, errno) in [
        (put("", b"abc"), libc::ENOENT),
        (put(&"n".repeat(5000), b"abc"), libc::ENAMETOOLONG),
        (put("/e/with\0zero", b"abc"), libc::EINVAL),
    ] {
        let rejected = context.submit_path(operation, options, 0).unwrap_err();
        assert_eq!(rejected.error.errno(), errno);
        let PathOperation::Put { buffers, .. } = rejected.operation else { panic!("it was a put") };
        assert_eq!(buffers.len(), 3);
    }
    let too_large = context.submit_path(put("/e/large", &vec![0; IO_MAX as usize + 1]), options, 0);
    assert_eq!(too_large.unwrap_err().error.errno(), libc::EFBIG);
    let append = PathOperation::Open { path: path("/e/data"), flags: libc::O_APPEND, mode: 0 };
    assert_eq!(context.submit_path(append, options, 0).unwrap_err().error.errno(), libc::EINVAL);
    for token in 0..8 {
        submit(&mut context, stat("/e/data"), token);
    }
    assert_eq!(context.submit_path(stat("/e/data"), options, 0).unwrap_err().error.errno(), libc::EAGAIN);
    assert!(collect(&mut context, 8).iter().all(|completion| size_of_answer(completion) == 1000));
}

#[test]
fn a_get_with_more_room_than_a_request_may_have_uses_a_part_of_it() {
    let (server, _session, mut context) = start();
    let large: Vec<u8> = (0..200_000).map(|n| (n / 7) as u8).collect();
    server.file("/e/large", large.clone());
    let got = run(&mut context, get("/e/large", 200_000));
    assert_eq!((got.result.clone(), size_of_answer(&got)), (Ok(IO_MAX.into()), 200_000));
    assert_eq!(got.buffers.as_ref().unwrap().len(), 200_000);
    assert_eq!(bytes(&got), large[..IO_MAX as usize]);
    let missing = run(&mut context, get("/e/missing", 200_000));
    assert_eq!((errno(&missing), missing.buffers.unwrap().len()), (libc::ENOENT, 200_000));
    let empty = run(&mut context, get("/e/large", 0));
    assert_eq!((empty.result.clone(), size_of_answer(&empty)), (Ok(0), 200_000));
    server.file("/e/empty", Vec::new());
    assert_eq!(run(&mut context, get("/e/empty", 10)).result, Ok(0));
    assert_eq!(run(&mut context, put("/e/empty", b"")).result, Ok(0));
}

#[test]
fn checksums_of_single_operations_protect_gets_and_puts() {
    let (server, _session, mut context) = start();
    let with = |crc| SubmitOptions { crc, ..SubmitOptions::default() };
    context.submit_path(put("/e/sum", b"abc"), with(OperationCrc::Computed), 0).unwrap();
    assert_eq!(collect(&mut context, 1)[0].result, Ok(3));
    context.submit_path(get("/e/sum", 10), with(OperationCrc::Computed), 0).unwrap();
    let got = collect(&mut context, 1).remove(0);
    assert_eq!((bytes(&got), got.crc), (b"abc".to_vec(), Some(raio_transport::message::data_crc(b"abc"))));
    context.submit_path(put("/e/sum", b"abd"), with(OperationCrc::Given(1)), 0).unwrap();
    assert_eq!(errno(&collect(&mut context, 1)[0]), libc::EILSEQ);
    assert_eq!(server.contents("/e/sum"), b"abc");
}

#[test]
fn an_open_whose_answer_is_lost_asks_for_the_status() {
    let (server, session, mut context) = start();
    server.cut_at(0, true);
    let file = file_of(run(&mut context, open("/e/data")));
    assert_eq!(context.stats().reconnects, 1);
    assert_eq!(server.open(), 1);
    assert_eq!(
        run_on(&mut context, &file, Operation::Write { offset: 0, buffers: filled(b"x") }).result,
        Ok(1)
    );
    assert_eq!(run_on(&mut context, &file, Operation::Fsync { data_only: false }).result, Ok(0));
    // It is among the files that are opened again.
    server.restart(5);
    assert_eq!(size_of_answer(&run_on(&mut context, &file, Operation::Stat)), 1000);
    drop(file);
    assert_open(&server, &session, 0);
}

#[test]
fn an_open_that_was_not_executed_is_sent_again() {
    let (server, _session, mut context) = start();
    server.cut_at(0, false);
    let file = file_of(run(&mut context, open("/e/data")));
    assert_eq!((context.stats().resent, server.open()), (1, 1));
    drop(file);
}

#[test]
fn a_file_that_is_opened_while_another_channel_begins_is_known_to_it() {
    let (server, session, mut context) = start();
    server.mute(true);
    submit(&mut context, open("/e/data"), 0);
    context.flush();
    let mut other = session.context(2).unwrap();
    server.mute(false);
    let file = file_of(collect(&mut context, 1).remove(0));
    assert_eq!(size_of_answer(&run_on(&mut other, &file, Operation::Stat)), 1000);
}

#[test]
fn after_a_restart_what_changes_names_is_unknown_and_what_asks_is_sent_again() {
    let (server, session, mut context) = start();
    run(&mut context, stat("/e/data"));
    server.mute(true);
    let create = PathOperation::Open { path: path("/e/data"), flags: libc::O_RDWR | libc::O_TRUNC, mode: 0 };
    submit(&mut context, create, 0);
    submit(&mut context, put("/e/new", b"new"), 1);
    submit(&mut context, stat("/e/data"), 2);
    submit(&mut context, get("/e/data", 10), 3);
    submit(&mut context, unlink("/e/data"), 4);
    context.flush();
    context.wait(1, 1, Some(Duration::from_millis(20))).unwrap();
    server.restart(9);
    server.mute(false);
    let all = collect(&mut context, 5);
    for completion in &all[..2] {
        let error = completion.result.as_ref().unwrap_err();
        assert_eq!((error.errno(), error.is_unknown), (libc::ECONNRESET, true));
    }
    assert_eq!(all[1].buffers.as_ref().unwrap().len(), 3);
    assert_eq!([size_of_answer(&all[2]), size_of_answer(&all[3])], [1000; 2]);
    assert_eq!(all[4].result, Ok(0), "it was not sent before");
    assert_eq!(server.find("/e/data"), None);
    server.file("/e/data", Vec::new());
    assert_open(&server, &session, 0);
}

#[test]
fn a_get_and_a_put_that_are_too_large_for_a_restarted_server_fail_with_their_buffers() {
    let (server, _session, mut context) = start();
    server.file("/e/large", vec![1; 50_000]);
    server.mute(true);
    // Those behind the credits are queued here.
    for token in 0..3 {
        submit(&mut context, get("/e/large", 50_000), token);
    }
    submit(&mut context, stat("/e/large"), 3);
    submit(&mut context, put("/e/new", &[2; 40_000]), 4);
    submit(&mut context, get("/e/large", 100), 5);
    context.flush();
    context.wait(1, 1, Some(Duration::from_millis(20))).unwrap();
    server.set_io_max(8 << 10);
    server.restart(3);
    server.mute(false);
    let all = collect(&mut context, 6);
    for (at, len) in [(0, 50_000), (1, 50_000), (2, 50_000), (4, 40_000)] {
        assert_eq!(errno(&all[at]), libc::EMSGSIZE);
        assert_eq!(all[at].buffers.as_ref().unwrap().len(), len);
    }
    assert_eq!((size_of_answer(&all[3]), bytes(&all[5])), (50_000, vec![1; 100]));
    assert_eq!(server.find("/e/new"), None);
    assert_eq!(context.stats().in_flight, 0);
}

#[test]
fn a_server_without_the_group_says_so_before_and_after_a_reconnect() {
    let (server, _session, mut context) = start();
    let file = file_of(run(&mut context, open("/e/data")));
    server.mute(true);
    for token in 0..6 {
        submit(&mut context, stat("/e/data"), token);
    }
    context.flush();
    context.wait(1, 1, Some(Duration::from_millis(20))).unwrap();
    server.forget(OperationGroup::Names.feature());
    server.restart(2);
    server.mute(false);
    assert_eq!(collect(&mut context, 6).iter().map(errno).collect::<Vec<_>>(), [libc::EOPNOTSUPP; 6]);
    let put = run(&mut context, put("/e/new", b"new"));
    assert_eq!((errno(&put), put.buffers.unwrap().len()), (libc::EOPNOTSUPP, 3));
    assert_eq!(errno(&run_on(&mut context, &file, Operation::Truncate { size: 1 })), libc::EOPNOTSUPP);
    assert_eq!(
        errno(&run_on(&mut context, &file, Operation::Extents { offset: 0, length: 1 })),
        libc::EOPNOTSUPP
    );
    // These are older.
    assert_eq!(size_of_answer(&run_on(&mut context, &file, Operation::Stat)), 1000);
    let other = file_of(run(&mut context, open("/e/data")));
    assert_eq!(run_on(&mut context, &other, Operation::Close).result, Ok(0));
}

#[test]
fn what_an_open_has_opened_that_was_given_up_is_closed() {
    let (server, session, mut context) = start();
    server.mute(true);
    let options = SubmitOptions { timeout: Some(Duration::from_millis(10)), ..SubmitOptions::default() };
    context.submit_path(open("/e/data"), options, 0).unwrap();
    context.submit_path(put("/e/late", b"late"), options, 1).unwrap();
    context.submit_path(get("/e/data", 100_000), options, 2).unwrap();
    let late = collect(&mut context, 3);
    let failures: Vec<_> =
        late.iter().map(|one| (errno(one), one.result.as_ref().unwrap_err().is_unknown)).collect();
    assert_eq!(failures, [(libc::ETIMEDOUT, true), (libc::ETIMEDOUT, true), (libc::ETIMEDOUT, false)]);
    assert_eq!(late[1].buffers.as_ref().unwrap().len(), 4);
    assert_eq!(late[2].buffers.as_ref().unwrap().len(), 100_000);
    assert_eq!(server.open(), 0);
    server.mute(false);
    // The server has opened it when it answers this.
    assert_eq!(size_of_answer(&run(&mut context, stat("/e/data"))), 1000);
    assert!(!context.has_abandoned());
    assert_open(&server, &session, 0);
    assert_eq!(server.contents("/e/late"), b"late", "it may yet be done");
}

#[test]
fn a_file_that_is_not_collected_is_closed_with_its_context() {
    let (server, session, mut context) = start();
    for token in 0..3 {
        submit(&mut context, open("/e/data"), token);
    }
    context.flush();
    context.close();
    assert_open(&server, &session, 0);
}

#[test]
fn operations_on_paths_are_cancelled_where_they_wait() {
    let (server, session, mut context) = start();
    server.mute(true);
    let tickets: Vec<_> =
        (0..6).map(|token| submit(&mut context, put(&format!("/e/{token}"), b"x"), token)).collect();
    context.flush();
    let queued = context.cancel(tickets[5]).unwrap();
    assert_eq!((queued.token, errno(&queued), queued.buffers.unwrap().len()), (5, libc::ECANCELED, 1));
    server.mute(false);
    assert!(collect(&mut context, 5).iter().all(|completion| completion.result == Ok(1)));
    assert_eq!(server.find("/e/5"), None);
    server.hold(true);
    let sent = submit(&mut context, unlink("/e/0"), 0);
    context.flush();
    assert_eq!(errno(&context.cancel(sent).unwrap()), libc::ECANCELED);
    server.hold(false);
    assert_eq!(server.find("/e/0"), Some(b"x".to_vec()));
    let attributes = Attributes { mode: Some(0o600), ..Attributes::default() };
    let set = PathOperation::SetAttributes { path: path("/e/0"), attributes };
    assert!(run(&mut context, set).result.is_err(), "this server does not have it");
    assert_open(&server, &session, 0);
}

/// What there may be at each path: after what is unknown it is one of two.
type Model = HashMap<usize, Vec<Option<Vec<u8>>>>;

proptest! {
    #![proptest_config(ProptestConfig { cases: 16, ..ProptestConfig::default() })]
    #[test]
    fn whatever_breaks_each_name_has_what_its_operations_have_said(
        breaks in prop::bool::weighted(0.7),
        steps in prop::collection::vec((0..12_u8, 0..4_usize, any::<u8>(), any::<bool>()), 40..80),
    ) {
        let (server, session, mut context) = start();
        let name = |at: usize| format!("/e/name{at}");
        let mut model: Model = (0..4).map(|at| (at, vec![None])).collect();
        // By the name: what is under way there.
        let mut busy: HashMap<usize, (u8, Vec<u8>)> = HashMap::new();
        let mut files: Vec<File> = Vec::new();
        let end = |completion: Completion,
                   model: &mut Model,
                   busy: &mut HashMap<usize, _>,
                   files: &mut Vec<File>| {
            let at = completion.token as usize;
            let (kind, value): (u8, Vec<u8>) = busy.remove(&at).expect("each ends once");
            let there = model.get_mut(&at).expect("it is one of four");
            let changed = match kind {
                0 => Some(Some(value)),
                1 => Some(None),
                _ => None,
            };
            match &completion.result {
                Err(error) if error.errno() == libc::ENOENT => {
                    assert!(there.contains(&None), "{there:?}");
                    there.retain(Option::is_none);
                }
                Err(error) if error.is_unknown => {
                    assert_eq!(error.errno(), libc::ECONNRESET);
                    there.extend(changed);
                }
                Err(error) => assert_eq!(error.errno(), libc::ECANCELED, "{error}"),
                Ok(_) => {
                    match (&changed, kind) {
                        (Some(changed), _) => {
                            // What was unlinked was there.
                            assert!(changed.is_some() || there.iter().any(Option::is_some));
                            *there = vec![changed.clone()];
                        }
                        (None, 2) => there.retain(|value| value.as_ref() == Some(&bytes(&completion))),
                        (None, 3) => {
                            let size = size_of_answer(&completion);
                            let has_size = |value: &Vec<u8>| value.len() as u64 == size;
                            there.retain(|value| value.as_ref().is_some_and(has_size));
                        }
                        _ => there.retain(Option::is_some),
                    }
                    assert!(!there.is_empty(), "what {kind} has found cannot be there");
                }
            }
            if let Some(answer) = completion.answer
                && let Answer::File(file) = *answer
            {
                files.push(file);
            }
        };
        for (step, at, byte, flag) in steps {
            let operation = match step {
                0 | 1 => Some((0, put(&name(at), &vec![byte; usize::from(byte)]))),
                2 => Some((1, unlink(&name(at)))),
                3 => Some((2, get(&name(at), 1000))),
                4 => Some((3, stat(&name(at)))),
                5 => Some((4, open(&name(at)))),
                _ => None,
            };
            match (step, operation) {
                (_, Some((kind, operation))) if !busy.contains_key(&at) => {
                    let ticket = submit(&mut context, operation, at as u64);
                    busy.insert(at, (kind, vec![byte; usize::from(byte)]));
                    if flag {
                        context.flush();
                    }
                    if byte % 8 == 0 && let Ok(completion) = context.cancel(ticket) {
                        end(completion, &mut model, &mut busy, &mut files);
                    }
                }
                (6, _) if breaks => server.cut_at(usize::from(byte % 4), flag),
                (7, _) if breaks && flag => server.restart(byte.into()),
                (8, _) if flag => drop(files.pop()),
                (8, _) => {
                    if let Some(file) = files.pop() {
                        context.submit(&file, Operation::Close, 100).unwrap();
                        let mut is_closed = false;
                        while !is_closed {
                            for completion in collect(&mut context, 1) {
                                if completion.token == 100 {
                                    is_closed = completion.result == Ok(0);
                                } else {
                                    end(completion, &mut model, &mut busy, &mut files);
                                }
                            }
                        }
                    }
                }
                _ => {
                    context.wait(1, 8, Some(Duration::from_millis(u64::from(byte) % 20))).unwrap();
                    while let Some(completion) = context.next() {
                        end(completion, &mut model, &mut busy, &mut files);
                    }
                }
            }
        }
        let left = busy.len();
        for completion in collect(&mut context, left) {
            end(completion, &mut model, &mut busy, &mut files);
        }
        for (at, there) in &model {
            prop_assert!(there.contains(&server.find(&name(*at))), "{at}: {there:?}");
        }
        drop(files);
        context.close();
        assert_open(&server, &session, 0);
    }
}
