//! A lying server: what it answers to libraio's C calls.
//!
//! However it lies, each call returns, each iocb ends once with a result that it can have or is still in
//! flight while the connection lives, and the texts are texts.

#![no_main]

use std::ffi::{CStr, c_int, c_long, c_void};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::ptr::{null, null_mut};
use std::sync::{LazyLock, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use libfuzzer_sys::fuzz_target;
use raio::ffi;
use raio_transport::handshake::Policy;
use raio_transport::message::{self, Message, Parsed};
use raio_transport::protocol::{Command, FileStatus, OPERATION_FEATURES, RequestOutcome};
use zerocopy::IntoBytes;

const IOCBS: usize = 8;
const BYTES: usize = 3000;
const O_RDWR: c_int = 2;
const ENOTCONN: c_long = 107;
/// The place of `in_flight` in `struct raio_stats`, which is words, and how many there are.
const STATS_IN_FLIGHT: usize = 11;
const STATS_WORDS: usize = 14;

/// What each answer takes from the input: what to do, then what to say.
const STEP: usize = 8;

static INPUT: Mutex<Vec<u8>> = Mutex::new(Vec::new());

static SERVER: LazyLock<SocketAddr> = LazyLock::new(|| {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        while let Ok((stream, _)) = listener.accept() {
            let input = INPUT.lock().unwrap().clone();
            thread::spawn(move || lie(stream, &input));
        }
    });
    address
});

/// Serves one connection.
fn lie(mut stream: TcpStream, input: &[u8]) -> Option<()> {
    let _ = stream.set_nodelay(true);
    let mut inbox = Vec::new();
    let fill = |stream: &mut TcpStream, inbox: &mut Vec<u8>| {
        let mut bytes = [0; 16384];
        let n = stream.read(&mut bytes).ok().filter(|&n| n > 0)?;
        inbox.extend_from_slice(&bytes[..n]);
        Some(())
    };
    let policy = Policy::default();
    let features = policy.features | OPERATION_FEATURES;
    let policy = Policy { features, queue_depth: 4, data_bytes_max: 8192, ..policy };
    let grant = loop {
        if let Parsed::Item((peer, welcome), taken) = policy.welcome(&inbox).ok()? {
            inbox.drain(..taken);
            stream.write_all(&welcome).ok()?;
            break peer.grant;
        }
        fill(&mut stream, &mut inbox)?;
    };
    let mut steps = input.chunks_exact(STEP);
    loop {
        let (id, body, end) = match message::parse(&inbox, &grant.limits()).ok()? {
            Parsed::Item(Message::Request(request, body), taken) => {
                (request.id, body.to_vec(), taken + request.data_len as usize)
            }
            Parsed::Item(Message::Ping(id), taken) => {
                inbox.drain(..taken);
                let mut pong = Vec::new();
                message::encode_pong(id, 0, false, &mut pong);
                stream.write_all(&pong).ok()?;
                continue;
            }
            Parsed::Item(..) => return None,
            Parsed::Need(_) => {
                fill(&mut stream, &mut inbox)?;
                continue;
            }
        };
        while inbox.len() < end {
            fill(&mut stream, &mut inbox)?;
        }
        inbox.drain(..end);
        let &[act, errno, class, credits, result, data, text, rest] = steps.next()? else { return None };
        let status = || FileStatus::default().as_bytes().to_vec();
        let (honest, honest_tail) = match Command::decode(&body) {
            Ok(Command::Read { length, .. } | Command::Write { length, .. }) => (length.into(), Vec::new()),
            Ok(Command::Open { .. }) => (7, status()),
            Ok(Command::Stat(_)) => (0, status()),
            Ok(Command::Reopen { file, .. }) => (file.0.into(), status()),
            Ok(Command::Outcome { ids }) => {
                let never: Vec<_> = ids.iter().map(|id| RequestOutcome::never(id.get())).collect();
                (ids.len() as u64, never.as_bytes().to_vec())
            }
            _ => (0, Vec::new()),
        };
        let is_read = matches!(Command::decode(&body), Ok(Command::Read { .. }));
        // Written by hand: what may not be encoded may be sent.
        let mut header = [0; message::HEADER_BYTES];
        let mut tail = honest_tail;
        header[0] = 2;
        header[8..16].copy_from_slice(&id.to_le_bytes());
        header[20..22].copy_from_slice(&1u16.to_le_bytes());
        let (mut said, mut len) = (honest, if is_read { honest as u32 } else { 0 });
        if act & 1 != 0 {
            header[16] = errno;
            header[17] = act >> 4;
            header[18] = class % 6;
            header[1] = rest & 1;
        }
        if act & 2 != 0 {
            header[20] = credits % 4;
        }
        if act & 4 != 0 {
            said = if result < 128 { result.into() } else { u64::from(result) << 56 | honest };
            len = u32::from(data) * 16;
        }
        if act & 8 != 0 {
            tail = vec![text; usize::from(rest) / 8 * 8];
            header[8] ^= rest >> 7;
        }
        header[2..4].copy_from_slice(&(tail.len() as u16).to_le_bytes());
        header[4..8].copy_from_slice(&len.to_le_bytes());
        header[24..32].copy_from_slice(&said.to_le_bytes());
        stream.write_all(&header).ok()?;
        stream.write_all(&tail).ok()?;
        stream.write_all(&vec![data; len as usize]).ok()?;
    }
}

/// `struct raio_iocb`, to be filled in.
#[repr(C)]
struct Iocb {
    data: *mut c_void,
    key: u32,
    fildes: c_int,
    opcode: c_int,
    pad: c_int,
    buf: *mut c_void,
    nbytes: u64,
    offset: i64,
    mr: *mut c_void,
    flags: u32,
    resfd: u32,
}

/// `struct raio_event`
#[derive(Clone, Copy)]
#[repr(C)]
struct Event {
    data: *mut c_void,
    obj: *mut Iocb,
    handle: u64,
    res: c_long,
    res2: u64,
}

fn is_text(text: *const std::ffi::c_char) {
    // SAFETY: the library's texts are C strings.
    let text = unsafe { CStr::from_ptr(text) }.to_str().expect("it is UTF-8");
    assert!(text.len() < 1024 && !text.chars().any(char::is_control), "{text:?}");
}

fuzz_target!(|input: &[u8]| {
    *INPUT.lock().unwrap() = input.to_vec();
    let url = format!("raio+tcp://{}\0", *SERVER);
    // size, flags, queue depth, connect, request, spin, reconnect, call
    let mut options = [0u32; 16];
    (options[0], options[3], options[4], options[5], options[7]) = (64, 2000, 300, 1, 50);
    // 0: a minute, which nobody waits for here.
    options[6] = if input.len() % 2 == 0 { 0 } else { 100 };
    let began = Instant::now();
    // SAFETY: all pointers are of live memory of the kind that the header asks for, which outlives the
    // context.
    unsafe {
        let fd = ffi::raio_connect(url.as_ptr().cast(), options.as_ptr().cast());
        if fd != -1 {
            session(fd);
            assert_eq!(ffi::raio_stop(fd), 0);
        }
        is_text(ffi::raio_errmsg());
    }
    assert!(began.elapsed() < Duration::from_secs(5), "a call has waited too long");
});

/// # Safety
/// `fd` is a session.
unsafe fn session(fd: c_int) {
    let mut memory = [[0u8; BYTES]; IOCBS];
    let mut stat = [0u64; 32];
    let mut ctx = null_mut();
    // SAFETY: see above.
    unsafe {
        let file = ffi::raio_open(fd, c"/e/f".as_ptr(), O_RDWR);
        is_text(ffi::raio_errmsg());
        ffi::raio_fstat(fd, stat.as_mut_ptr().cast());
        is_text(ffi::raio_errmsg());
        if file != 0 || ffi::raio_setup(fd, IOCBS as c_int, &mut ctx) != 0 {
            return;
        }
        let mut iocbs: Vec<Iocb> = memory
            .iter_mut()
            .enumerate()
            .map(|(n, buf)| Iocb {
                data: null_mut(),
                key: 0,
                fildes: fd,
                // Read, write, fsync, discard; every other read is into lent memory.
                opcode: [0, 1, 0, 4, 0, 5, 1, 6][n],
                pad: 0,
                buf: if n == 2 { null_mut() } else { buf.as_mut_ptr().cast() },
                nbytes: if matches!(n, 3) { 0 } else { BYTES as u64 },
                offset: 0,
                mr: null_mut(),
                flags: 0,
                resfd: 0,
            })
            .collect();
        let mut pointers: Vec<*mut Iocb> = iocbs.iter_mut().map(|iocb| &raw mut *iocb).collect();
        let taken = ffi::raio_submit(ctx, IOCBS as c_long, pointers.as_mut_ptr().cast());
        let mut cancelled = Event { data: null_mut(), obj: null_mut(), handle: 0, res: 0, res2: 0 };
        let mut ended = [false; IOCBS];
        let count = |ended: &[bool]| ended.iter().filter(|&&ended| ended).count() as c_long;
        if ffi::raio_cancel(ctx, pointers[7].cast(), (&raw mut cancelled).cast()) == 0 {
            ended[7] = true;
        }
        is_text(ffi::raio_errmsg());
        let mut events = [cancelled; IOCBS];
        let timeout = [0i64, 20_000_000];
        while count(&ended) < taken {
            let n = ffi::raio_getevents(
                ctx,
                1,
                IOCBS as c_long,
                events.as_mut_ptr().cast(),
                timeout.as_ptr().cast_mut().cast(),
            );
            is_text(ffi::raio_errmsg());
            assert!((-4095..=taken.max(0)).contains(&n), "{n} events");
            assert_ne!(n, -ENOTCONN, "an iocb has not ended, though the connection has");
            if n <= 0 {
                break;
            }
            for event in &events[..n as usize] {
                let at = pointers.iter().position(|&iocb| iocb == event.obj).expect("an iocb of ours");
                assert!(!std::mem::replace(&mut ended[at], true), "it has ended twice");
                assert!((-4095..=BYTES as c_long).contains(&event.res), "{}", event.res);
                is_text(ffi::raio_event_errmsg(ctx, std::ptr::from_ref(event).cast()));
            }
            ffi::raio_release(ctx, n, events.as_mut_ptr().cast());
        }
        // Those that have not ended are in flight, not lost.
        let mut stats = [0u64; STATS_WORDS];
        assert_eq!(ffi::raio_get_stats(ctx, stats.as_mut_ptr().cast(), size_of_val(&stats)), 0);
        let left = taken.max(0) - count(&ended);
        assert_eq!(stats[STATS_IN_FLIGHT], left as u64, "an iocb was lost");
        ffi::raio_event_errmsg(ctx, null());
        ffi::raio_close(fd);
        assert_eq!(ffi::raio_destroy(ctx), 0);
    }
}
