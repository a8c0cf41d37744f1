//! The C API, in the order of `include/libraio.h`, which says what each function promises. Nothing is decided
//! here: pointers are checked and turned into the types of the safe API, results into return values and
//! errno.
//!
//! What C holds a pointer to (`raio_context_t`, `raio_mr_t`) is a [`Shell`]: a few bytes that are never
//! unmapped, with a mark that is cleared when the thing in it ends. A call on something destroyed thus finds
//! a cleared mark and is EINVAL. No panic crosses into C: every function catches it and fails with EIO.
//!
//! Who may touch what: a context and what hangs on it (registrations, lent buffers) belong to one thread at a
//! time, as the header says. Descriptors are looked up in a table with a lock, see descriptor.rs.

#![allow(non_camel_case_types)]

use std::cell::UnsafeCell;
use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CStr, CString, OsStr, c_char, c_int, c_long, c_uint, c_ulong, c_ulonglong, c_void};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use raio_transport::address::Scheme;
use raio_transport::memory::{Buffer, Buffers, Foreign, Region, process};

use crate::context::{Completion, Context, Operation, Stats};
use crate::descriptor;
use crate::error::Error;
use crate::file::File;
use crate::session::{Options, Session};

const ABI_VERSION: c_uint = 1;
const IOV_MAX: u64 = 1_024;

const CMD_PREAD: c_int = 0;
const CMD_PWRITE: c_int = 1;
const CMD_PREADV: c_int = 2;
const CMD_PWRITEV: c_int = 3;
const CMD_FSYNC: c_int = 4;
const CMD_DISCARD: c_int = 5;
const CMD_WRITE_ZEROES: c_int = 6;
const CMD_ALLOCATE: c_int = 7;

const IOCB_EVENTFD: c_uint = 1 << 0;
const IOCB_DATASYNC: c_uint = 1 << 1;
const IOCB_KEEP_SIZE: c_uint = 1 << 2;

const RES2_RETRYABLE: c_ulong = 0x100;

const OPT_CRC: c_uint = 1 << 0;
const OPT_NO_SPIN: c_uint = 1 << 1;

/// `struct raio_iocb_common`
#[repr(C)]
pub struct raio_iocb_common {
    buf: *mut c_void,
    nbytes: c_ulonglong,
    offset: i64,
    mr: *mut raio_mr,
    flags: c_uint,
    resfd: c_uint,
}

/// `struct raio_iocb`
#[repr(C)]
pub struct raio_iocb {
    data: *mut c_void,
    key: c_uint,
    raio_fildes: c_int,
    raio_lio_opcode: c_int,
    pad: c_int,
    c: raio_iocb_common,
}

/// `struct raio_event`
#[repr(C)]
pub struct raio_event {
    data: *mut c_void,
    obj: *mut raio_iocb,
    handle: c_ulonglong,
    res: c_ulong,
    res2: c_ulong,
}

/// `struct raio_options`
#[repr(C)]
#[derive(Clone, Copy)]
pub struct raio_options {
    size: c_uint,
    flags: c_uint,
    queue_depth: c_uint,
    connect_timeout_ms: c_uint,
    request_timeout_ms: c_uint,
    spin_us: c_uint,
    reserved_0: c_uint,
    call_timeout_ms: c_uint,
    reserved: [c_uint; 8],
}

/// `struct raio_stats`
#[repr(C)]
pub struct raio_stats {
    size: c_ulonglong,
    submitted: c_ulonglong,
    completed: c_ulonglong,
    failed: c_ulonglong,
    bytes_read: c_ulonglong,
    bytes_written: c_ulonglong,
    bounced_bytes: c_ulonglong,
    sends: c_ulonglong,
    receives: c_ulonglong,
    sleeps: c_ulonglong,
    reconnects: c_ulonglong,
    in_flight: c_ulonglong,
    queue_depth: c_ulonglong,
    io_bytes_max: c_ulonglong,
}

const _: () = {
    assert!(size_of::<raio_iocb>() == 64 && std::mem::offset_of!(raio_iocb, c) == 24);
    assert!(
        size_of::<raio_event>() == 40 && size_of::<raio_options>() == 64 && size_of::<raio_stats>() == 112
    );
};

// Shells
// -----------------------------------------------------------------------------------------------------------

/// What C has a pointer to. Never unmapped; `mark` says whether there is something in it.
#[repr(C)]
pub struct Shell<T> {
    mark: AtomicUsize,
    content: UnsafeCell<Option<T>>,
}

/// `struct raio_context`
pub type raio_context = Shell<Box<State>>;
/// `struct raio_mr`
pub type raio_mr = Shell<Registration>;

/// Shells that may be used again, the oldest first. None is until this many wait: a stale pointer should find
/// an empty shell.
const SHELLS_WAITING: usize = 1024;

static CONTEXTS: Mutex<VecDeque<usize>> = Mutex::new(VecDeque::new());
static MRS: Mutex<VecDeque<usize>> = Mutex::new(VecDeque::new());

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<T> Shell<T> {
    /// The mark of a shell at this address that has something in it.
    fn mark_of(pointer: *mut Self) -> usize {
        pointer.addr() ^ 0x0172_6169_6f21_9d3b ^ size_of::<T>()
    }

    /// Puts something into a shell.
    fn put(pool: &Mutex<VecDeque<usize>>, content: T) -> *mut Self {
        let mut pool = lock(pool);
        let reused = if pool.len() > SHELLS_WAITING { pool.pop_front() } else { None };
        drop(pool);
        let pointer = match reused {
            Some(address) => std::ptr::with_exposed_provenance_mut::<Self>(address),
            None => {
                let shell = Self { mark: AtomicUsize::new(0), content: UnsafeCell::new(None) };
                let pointer = Box::into_raw(Box::new(shell));
                pointer.expose_provenance();
                pointer
            }
        };
        // SAFETY: the pointer is of a shell that was leaked on purpose, and as it is neither marked nor in
        // the pool any more, nobody else reaches its content.
        unsafe {
            *(*pointer).content.get() = Some(content);
            (*pointer).mark.store(Self::mark_of(pointer), Ordering::Release);
        }
        pointer
    }

    /// Whether this is a shell with something in it.
    ///
    /// # Safety
    /// `pointer` is null, or points at readable memory of a shell's size. (Any such memory will do: that is
    /// what the mark is for.)
    unsafe fn is_live(pointer: *mut Self) -> bool {
        !pointer.is_null()
            && pointer.is_aligned()
            // SAFETY: the caller vouches that the memory is readable; an integer may have any bits.
            && unsafe { (*pointer).mark.load(Ordering::Acquire) } == Self::mark_of(pointer)
    }

    /// What is in the shell, if it is one.
    ///
    /// # Safety
    /// As [`Shell::is_live`]; and no other reference to the content is in use while this one is: the header
    /// gives a context, and what belongs to it, to one thread at a time.
    unsafe fn get<'a>(pointer: *mut Self) -> Option<&'a mut T> {
        // SAFETY: the caller's contract is the same.
        if !unsafe { Self::is_live(pointer) } {
            return None;
        }
        // SAFETY: the mark says that this is a live shell of ours; the caller vouches for exclusive use.
        unsafe { (*(*pointer).content.get()).as_mut() }
    }

    /// Empties a shell and gives it back.
    ///
    /// # Safety
    /// As [`Shell::get`].
    unsafe fn take(pool: &Mutex<VecDeque<usize>>, pointer: *mut Self) -> Option<T> {
        // SAFETY: the caller's contract is the same.
        if !unsafe { Self::is_live(pointer) } {
            return None;
        }
        // SAFETY: as in `get`; clearing the mark first makes later calls see an empty shell.
        let content = unsafe {
            (*pointer).mark.store(0, Ordering::Release);
            (*(*pointer).content.get()).take()
        };
        lock(pool).push_back(pointer.expose_provenance());
        content
    }
}

/// What is behind a `raio_context_t`.
pub struct State {
    /// None once the session was stopped.
    context: Option<Context>,
    /// The counters at that time.
    stats: Stats,
    /// Its session's descriptor.
    session: c_int,
    files: Files,
    loans: Loans,
    /// Its registrations, and perhaps some that have ended.
    mrs: Vec<*mut raio_mr>,
    /// Emptied, for the next vectored operations.
    vectors: Vec<Vec<Buffer>>,
    /// The process that it is of: see [`process`].
    process: u64,
    probe: Probe,
    eventfds: Eventfds,
    failures: Failures,
}

/// What the last events say, by their iocbs' addresses, in their order.
#[derive(Default)]
struct Failures {
    texts: Vec<(usize, CString)>,
    /// Where the last search ended: the next is likely to be for the one behind it.
    at: usize,
}

impl Failures {
    fn clear(&mut self) {
        self.texts.clear();
        self.at = 0;
    }

    fn add(&mut self, obj: *mut raio_iocb, text: &str) {
        let text = text.bytes().filter(|&byte| byte != 0).collect::<Vec<_>>();
        self.texts.push((obj.addr(), CString::new(text).unwrap_or_default()));
    }

    /// Takes an iocb's event as an earlier one: its text stays valid, but is not found any more.
    fn supersede(&mut self, obj: *mut raio_iocb) {
        self.texts.iter_mut().filter(|(known, _)| *known == obj.addr()).for_each(|(known, _)| *known = 0);
    }

    fn find(&mut self, obj: usize) -> Option<&CStr> {
        let len = self.texts.len();
        self.at = (self.at..len).chain(0..self.at.min(len)).find(|&at| self.texts[at].0 == obj)?;
        let text = &self.texts[self.at].1;
        self.at += 1;
        Some(text)
    }
}

/// Finds out whether memory that is to be written to a file can be read at all, before anything is promised
/// to a server: by having the kernel copy one byte of each page, for a whole batch in one call.
///
/// The bytes go into a pipe. (Into a file, were it in memory, RLIMIT_FSIZE would bound them with SIGXFSZ;
/// process_vm_readv(2) takes ten times as long and is forbidden in many sandboxes.)
#[derive(Default)]
struct Probe {
    /// Its ends to read and to write. None before the first probe, or if there is none to be had: then
    /// nothing is probed.
    pipe: Option<Option<(OwnedFd, OwnedFd)>>,
    bytes: Vec<libc::iovec>,
    /// Where the bytes of each iocb end, by its place in the batch.
    ends: Vec<(usize, usize)>,
    /// Places of the iocbs whose memory cannot be read.
    unreadable: Vec<usize>,
}

/// A pipe of one page, the ends of which never wait.
fn small_pipe() -> Option<(OwnedFd, OwnedFd)> {
    use rustix::pipe::{PipeFlags, fcntl_setpipe_size, pipe_with};
    let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).ok()?;
    let _ = fcntl_setpipe_size(&write, Probe::PAGE);
    Some((read, write))
}

impl Probe {
    const PAGE: usize = 4096;

    /// Checks the writes of a batch.
    ///
    /// # Safety
    /// As [`raio_submit`]'s.
    unsafe fn check_writes(
        &mut self,
        ctx: *mut raio_context,
        ios: *mut *mut raio_iocb,
        count: usize,
        most: u64,
    ) {
        self.bytes.clear();
        self.ends.clear();
        self.unreadable.clear();
        for n in 0..count {
            // SAFETY: the caller vouches for the pointers.
            let iocb = unsafe { *ios.add(n) };
            if iocb.is_null() || !iocb.is_aligned() {
                return self.check_bytes();
            }
            // SAFETY: the caller vouches for the iocb.
            let (opcode, c) = unsafe { ((*iocb).raio_lio_opcode, &(*iocb).c) };
            if !matches!(opcode, CMD_PWRITE | CMD_PWRITEV) {
                continue;
            }
            // Memory of raio_alloc() is ours, and stays while it is used.
            // SAFETY: the pointer is one of raio_reg_mr() or readable memory.
            let is_ours = unsafe { Shell::get(c.mr) }.is_some_and(|mr| mr.context == ctx && mr.is_allocated);
            match opcode {
                CMD_PWRITE if !is_ours && c.nbytes <= most => self.add(c.buf.addr(), c.nbytes as usize),
                CMD_PWRITEV if !is_ours && c.nbytes <= IOV_MAX && !c.buf.is_null() => {
                    for n in 0..c.nbytes as usize {
                        // SAFETY: the caller vouches for `nbytes` iovecs.
                        let iov = unsafe { c.buf.cast::<libc::iovec>().add(n).read_unaligned() };
                        if iov.iov_len as u64 <= most {
                            self.add(iov.iov_base.addr(), iov.iov_len);
                        }
                    }
                }
                _ => continue,
            }
            self.ends.push((self.bytes.len(), n));
        }
        self.check_bytes();
    }

    /// One byte of each page of this memory. (A null pointer is found out later, and is another error.)
    fn add(&mut self, address: usize, len: usize) {
        let Some(end) = address.checked_add(len) else { return };
        let mut at = address;
        while at != 0 && at < end {
            self.bytes.push(libc::iovec { iov_base: std::ptr::with_exposed_provenance_mut(at), iov_len: 1 });
            at = (at / Self::PAGE + 1) * Self::PAGE;
        }
    }

    /// Has the kernel copy the bytes: all of them, and if that fails those of one iocb after the other.
    fn check_bytes(&mut self) {
        if self.bytes.is_empty() || self.can_copy(0, self.bytes.len()) {
            return;
        }
        let mut start = 0;
        for at in 0..self.ends.len() {
            let (end, place) = self.ends[at];
            if !self.can_copy(start, end) {
                self.unreadable.push(place);
            }
            start = end;
        }
    }

    /// Whether the kernel can copy these bytes; also if that cannot be found out.
    fn can_copy(&mut self, start: usize, end: usize) -> bool {
        let Some((read, write)) = self.pipe.get_or_insert_with(small_pipe) else { return true };
        for some in self.bytes[start..end].chunks(IOV_MAX as usize) {
            // Less than PIPE_BUF goes in whole or not at all.
            while let Err(error) = write_bytes(write, some) {
                match error {
                    libc::EFAULT => return false,
                    libc::EAGAIN if rustix::io::read(&*read, &mut [0; Self::PAGE]).is_ok() => {}
                    _ => return true,
                }
            }
        }
        true
    }
}

/// writev(2), or the errno of its failure. Not by libc's function: a sanitizer would take it for the
/// program's own use of that memory.
fn write_bytes(pipe: &OwnedFd, bytes: &[libc::iovec]) -> Result<(), c_int> {
    // SAFETY: the kernel reads through these pointers, and finds out by itself where it cannot.
    let written = unsafe { libc::syscall(libc::SYS_writev, pipe.as_raw_fd(), bytes.as_ptr(), bytes.len()) };
    if written >= 0 { Ok(()) } else { Err(std::io::Error::last_os_error().raw_os_error().unwrap_or(0)) }
}

/// What is behind a `raio_mr_t`.
pub struct Registration {
    context: *mut raio_context,
    region: Region,
    /// It is memory of raio_alloc().
    is_allocated: bool,
}

/// Files by descriptor, as looked up before, while nothing has been closed since.
#[derive(Default)]
struct Files {
    epoch: u64,
    known: HashMap<c_int, Arc<File>>,
    last: Option<(c_int, Arc<File>)>,
}

impl Files {
    /// The file `fd` of the session `session`.
    fn get(&mut self, fd: c_int, session: c_int) -> Result<&File, Error> {
        let epoch = descriptor::epoch();
        if self.epoch != epoch {
            self.known.clear();
            self.last = None;
            self.epoch = epoch;
        }
        if self.last.as_ref().is_none_or(|(last, _)| *last != fd) {
            let file = match self.known.get(&fd) {
                Some(file) => Arc::clone(file),
                None => {
                    let (file, owner) = descriptor::file(fd)?;
                    if owner != session {
                        return Err(Error::call(
                            libc::EBADF,
                            format!(
                                "Descriptor {fd} is a file of another session. Use that session's contexts."
                            ),
                        ));
                    }
                    self.known.insert(fd, Arc::clone(&file));
                    file
                }
            };
            self.last = Some((fd, file));
        }
        match &self.last {
            Some((_, file)) => Ok(file),
            None => unreachable!("set above"),
        }
    }
}

/// Lent buffers that C has, by handle: generation and index.
#[derive(Default)]
struct Loans {
    entries: Vec<(u32, Option<Buffers>)>,
    free: Vec<u32>,
}

impl Loans {
    fn add(&mut self, buffers: Buffers) -> c_ulonglong {
        let index = self.free.pop().unwrap_or_else(|| {
            self.entries.push((1, None));
            self.entries.len() as u32 - 1
        });
        let (generation, entry) = &mut self.entries[index as usize];
        *entry = Some(buffers);
        c_ulonglong::from(*generation) << 32 | c_ulonglong::from(index)
    }

    fn take(&mut self, handle: c_ulonglong) -> Option<Buffers> {
        let index = handle as u32;
        let (generation, entry) = self.entries.get_mut(index as usize)?;
        if c_ulonglong::from(*generation) != handle >> 32 {
            return None;
        }
        let buffers = entry.take()?;
        // Never 0, so that no handle is.
        *generation = generation.checked_add(1).unwrap_or(1);
        self.free.push(index);
        Some(buffers)
    }
}

// Errors
// -----------------------------------------------------------------------------------------------------------

/// Room for a text, with the zero at its end.
const MESSAGE_BYTES: usize = 1024;

thread_local! {
    // Without a destructor: it is there as long as its thread.
    static MESSAGE: UnsafeCell<[u8; MESSAGE_BYTES]> = const { UnsafeCell::new([0; MESSAGE_BYTES]) };
}

fn set_message(text: &str) {
    let mut end = text.len().min(MESSAGE_BYTES - 1);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    MESSAGE.with(|message| {
        // SAFETY: only this thread has it, and no reference to it outlives a line of this file.
        let message = unsafe { &mut *message.get() };
        message[..end].copy_from_slice(&text.as_bytes()[..end]);
        message[end] = 0;
    });
}

/// Runs a call. Gives its result, or the errno of its failure.
fn run<T>(body: impl FnOnce() -> Result<T, Error>) -> Result<T, c_int> {
    set_message("");
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => {
            set_message(&error.text);
            Err(error.errno())
        }
        Err(_) => {
            set_message("The library failed in a way that it should not. Please report this.");
            Err(libc::EIO)
        }
    }
}

fn fail<T>(errno: c_int, value: T) -> T {
    // SAFETY: the location is this thread's errno.
    unsafe { *libc::__errno_location() = errno };
    value
}

/// For functions that return -1 and set errno.
fn int(body: impl FnOnce() -> Result<c_int, Error>) -> c_int {
    run(body).unwrap_or_else(|errno| fail(errno, -1))
}

/// For functions that return the negated errno.
fn long(body: impl FnOnce() -> Result<c_long, Error>) -> c_long {
    run(body).unwrap_or_else(|errno| -c_long::from(errno))
}

fn invalid(text: impl Into<String>) -> Error {
    Error::call(libc::EINVAL, text)
}

fn no_context() -> Error {
    invalid("That is no context. Use one of raio_setup() that was not destroyed.")
}

fn inherited() -> Error {
    invalid("The context is one of the parent process. A child makes its own, in a session of its own.")
}

fn dead() -> Error {
    Error {
        status: raio_transport::Status::transport(libc::ENOTCONN),
        text: "The context's session was stopped. Destroy the context.".into(),
    }
}

/// What is behind a context.
///
/// # Safety
/// As [`Shell::get`].
unsafe fn state<'a>(ctx: *mut raio_context) -> Result<&'a mut State, Error> {
    // SAFETY: the caller's contract is the same.
    let state = unsafe { Shell::get(ctx) }.map(|state| &mut **state).ok_or_else(no_context)?;
    if state.process == process() { Ok(state) } else { Err(inherited()) }
}

/// A C string as bytes.
///
/// # Safety
/// `text` is null or a C string that outlives the result.
unsafe fn c_str<'a>(text: *const c_char, what: &str) -> Result<&'a [u8], Error> {
    if text.is_null() {
        return Err(invalid(format!("The {what} is NULL. Give one.")));
    }
    // SAFETY: not null, and a C string as the caller vouches.
    Ok(unsafe { CStr::from_ptr(text) }.to_bytes())
}

// Sessions
// ---------------------------------------------------------------------------------------------------------

/// See libraio.h.
///
/// # Safety
/// `transport` is null or a C string; `addr` is null or points at `addrlen` bytes (as far as that is a length
/// an address can have).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_start(
    transport: *const c_char,
    addr: *const libc::sockaddr,
    addrlen: libc::socklen_t,
) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the string.
        let transport = unsafe { c_str(transport, "transport") }?;
        if addr.is_null() {
            return Err(invalid("The address is NULL. Give one."));
        }
        let scheme = match transport {
            b"tcp" => Scheme::Tcp,
            b"rdma" => Scheme::Rdma,
            _ => {
                return Err(Error::call(
                    libc::EPROTONOSUPPORT,
                    format!(
                        "There is no transport {:?}. Use \"tcp\" or \"rdma\".",
                        String::from_utf8_lossy(transport)
                    ),
                ));
            }
        };
        // SAFETY: the caller vouches for `addrlen` bytes, and `socket_address` reads no more.
        let address = unsafe { socket_address(addr, addrlen as usize) }?;
        Ok(descriptor::add_session(Session::connect_to(scheme, address, &Options::default())?))
    })
}

/// Reads a `struct sockaddr`.
///
/// # Safety
/// `addr` points at `len` readable bytes, or `len` is not one that an address can have.
unsafe fn socket_address(addr: *const libc::sockaddr, len: usize) -> Result<SocketAddr, Error> {
    let wrong = || invalid(format!("{len} is not the length of an address of that family."));
    if len < size_of::<libc::sa_family_t>() || len > size_of::<libc::sockaddr_storage>() {
        return Err(wrong());
    }
    // SAFETY: the family is the first field, and there are enough bytes for it.
    let family = unsafe { addr.cast::<libc::sa_family_t>().read_unaligned() };
    match c_int::from(family) {
        libc::AF_INET if len >= size_of::<libc::sockaddr_in>() => {
            // SAFETY: there are enough bytes for one, and its fields are integers.
            let v4 = unsafe { addr.cast::<libc::sockaddr_in>().read_unaligned() };
            let ip = Ipv4Addr::from(u32::from_be(v4.sin_addr.s_addr));
            Ok(SocketAddrV4::new(ip, u16::from_be(v4.sin_port)).into())
        }
        libc::AF_INET6 if len >= size_of::<libc::sockaddr_in6>() => {
            // SAFETY: as above.
            let v6 = unsafe { addr.cast::<libc::sockaddr_in6>().read_unaligned() };
            let ip = Ipv6Addr::from(v6.sin6_addr.s6_addr);
            Ok(SocketAddrV6::new(ip, u16::from_be(v6.sin6_port), v6.sin6_flowinfo, v6.sin6_scope_id).into())
        }
        libc::AF_INET | libc::AF_INET6 => Err(wrong()),
        other => Err(Error::call(
            libc::EAFNOSUPPORT,
            format!("Address family {other} is not supported. Use AF_INET or AF_INET6."),
        )),
    }
}

/// See libraio.h.
///
/// # Safety
/// `url` is null or a C string; `options` is null or points at as many bytes as its first field says.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_connect(url: *const c_char, options: *const raio_options) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the string.
        let url = unsafe { c_str(url, "URL") }?;
        let url = std::str::from_utf8(url)
            .map_err(|_| invalid("The URL is not UTF-8. Write it like raio://HOST:PORT."))?;
        let options = if options.is_null() {
            Options::default()
        } else {
            // SAFETY: the caller vouches for as many bytes as the first field says.
            unsafe { read_options(options) }?
        };
        let session = Session::connect(url, &options)?;
        set_message(session.why_tcp().unwrap_or_default());
        Ok(descriptor::add_session(session))
    })
}

/// Reads `struct raio_options`.
///
/// # Safety
/// `options` points at as many readable bytes as its first field says, at least four.
unsafe fn read_options(options: *const raio_options) -> Result<Options, Error> {
    // Beyond a page it is garbage rather than a newer header.
    const SIZE_MAX: usize = 4096;
    // SAFETY: the size is the first field.
    let size = unsafe { options.cast::<c_uint>().read_unaligned() } as usize;
    if !(size_of::<raio_options>()..=SIZE_MAX).contains(&size) {
        return Err(invalid("raio_options.size is wrong. Set it to sizeof(struct raio_options)."));
    }
    // SAFETY: there are at least as many bytes, and all its fields are integers.
    let known = unsafe { options.read_unaligned() };
    let tail = size_of::<raio_options>()..size;
    // SAFETY: the caller vouches for `size` bytes.
    let newer = tail.map(|at| unsafe { options.cast::<u8>().add(at).read() }).any(|byte| byte != 0);
    if newer
        || known.reserved_0 != 0
        || known.reserved.iter().any(|&word| word != 0)
        || known.flags & !(OPT_CRC | OPT_NO_SPIN) != 0
    {
        return Err(invalid(
            "raio_options has something set that this library does not know. Zero it first, and set only what \
             this version's header has.",
        ));
    }
    let defaults = Options::default();
    let ms = |value: c_uint| (value != 0).then(|| Duration::from_millis(value.into()));
    Ok(Options {
        queue_depth: known.queue_depth,
        connect_timeout: ms(known.connect_timeout_ms).unwrap_or(defaults.connect_timeout),
        call_timeout: ms(known.call_timeout_ms).unwrap_or(defaults.call_timeout),
        request_timeout: ms(known.request_timeout_ms),
        spin: match (known.flags & OPT_NO_SPIN != 0, known.spin_us) {
            (true, _) => Duration::ZERO,
            (false, 0) => defaults.spin,
            (false, us) => Duration::from_micros(us.into()),
        },
        crc: known.flags & OPT_CRC != 0,
    })
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_stop(fd: c_int) -> c_int {
    int(|| {
        let (_session, contexts) = descriptor::remove_session(fd)?;
        for address in contexts {
            // SAFETY: the table has addresses of our shells alone; the header forbids that another thread
            // uses them meanwhile.
            if let Ok(state) = unsafe { state(std::ptr::with_exposed_provenance_mut(address)) } {
                state.stats = state.context.as_ref().map_or(state.stats, Context::stats);
                state.context = None;
                state.files = Files::default();
            }
        }
        Ok(0)
    })
}

// Files
// ------------------------------------------------------------------------------------------------------------

/// See libraio.h.
///
/// # Safety
/// `pathname` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_open(fd: c_int, pathname: *const c_char, flags: c_int) -> c_int {
    // SAFETY: the caller's contract is the same.
    unsafe { raio_open_mode(fd, pathname, flags, 0o644) }
}

/// See libraio.h.
///
/// # Safety
/// `pathname` is null or a C string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_open_mode(
    fd: c_int,
    pathname: *const c_char,
    flags: c_int,
    mode: libc::mode_t,
) -> c_int {
    int(|| {
        let session = descriptor::session(fd)?;
        // SAFETY: the caller vouches for the string.
        let path = unsafe { c_str(pathname, "path") }?;
        let path = Path::new(OsStr::from_bytes(path));
        descriptor::add_file(fd, session.open(path, flags, mode)?)
    })
}

/// See libraio.h.
///
/// # Safety
/// `buf` is null or points at a `struct stat64` that may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_fstat(fd: c_int, buf: *mut libc::stat64) -> c_int {
    int(|| {
        let (file, _) = descriptor::file(fd)?;
        if buf.is_null() {
            return Err(invalid("The place for the status is NULL. Give one."));
        }
        let status = file.status()?;
        // SAFETY: a `stat64` is integers, for which zero is a value.
        let mut stat: libc::stat64 = unsafe { std::mem::zeroed() };
        stat.st_dev = status.device.get();
        stat.st_ino = status.inode.get();
        stat.st_mode = status.mode.get();
        stat.st_nlink = status.links.get().into();
        stat.st_uid = status.uid.get();
        stat.st_gid = status.gid.get();
        stat.st_rdev = status.rdevice.get();
        stat.st_size = status.size.get() as i64;
        stat.st_blksize = status.block_bytes.get().into();
        stat.st_blocks = status.blocks.get() as i64;
        let seconds = |ns: i64| (ns.div_euclid(1_000_000_000), ns.rem_euclid(1_000_000_000));
        (stat.st_atime, stat.st_atime_nsec) = seconds(status.accessed_ns.get());
        (stat.st_mtime, stat.st_mtime_nsec) = seconds(status.modified_ns.get());
        (stat.st_ctime, stat.st_ctime_nsec) = seconds(status.changed_ns.get());
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe { buf.write_unaligned(stat) };
        Ok(0)
    })
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_close(fd: c_int) -> c_int {
    int(|| descriptor::remove_file(fd)?.close().map(|()| 0))
}

// Contexts
// ---------------------------------------------------------------------------------------------------------

/// See libraio.h.
///
/// # Safety
/// `ctxp` is null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_setup(fd: c_int, maxevents: c_int, ctxp: *mut *mut raio_context) -> c_int {
    int(|| {
        if ctxp.is_null() {
            return Err(invalid("The place for the context is NULL. Give one."));
        }
        // SAFETY: not null, and the caller vouches for the rest.
        let before = unsafe { ctxp.read_unaligned() };
        // It may be anything: only a pointer that was given out is looked through.
        if lock(&LIVE).contains(&before.addr()) {
            // SAFETY: it is one of our shells, and `process` never changes in a context.
            if unsafe { state(before) }.is_ok() {
                return Err(invalid(
                    "The place for the context holds one that was not destroyed. Destroy that first, or give another place.",
                ));
            }
        }
        // SAFETY: as above.
        unsafe { ctxp.write(null_mut()) };
        let (session, session_fd) = descriptor::session_of(fd)?;
        let context = session.context(usize::try_from(maxevents).unwrap_or(0))?;
        let ctx = Shell::put(
            &CONTEXTS,
            Box::new(State {
                context: Some(context),
                stats: Stats::default(),
                session: session_fd,
                files: Files::default(),
                loans: Loans::default(),
                mrs: Vec::new(),
                vectors: Vec::new(),
                process: process(),
                probe: Probe::default(),
                eventfds: Eventfds::default(),
                failures: Failures::default(),
            }),
        );
        if let Err(error) = descriptor::add_context(session_fd, ctx.addr()) {
            // The session was stopped meanwhile.
            // SAFETY: nobody else has the pointer yet.
            drop(unsafe { Shell::take(&CONTEXTS, ctx) });
            return Err(error);
        }
        lock(&LIVE).insert(ctx.addr());
        // SAFETY: as above.
        unsafe { ctxp.write(ctx) };
        Ok(0)
    })
}

/// Contexts that were given out and not destroyed.
static LIVE: LazyLock<Mutex<HashSet<usize>>> = LazyLock::new(Mutex::default);

/// The eventfds of iocbs in flight, each held open under a number of the library's: what has the program's
/// number when the iocb ends may be something else.
#[derive(Default)]
struct Eventfds {
    /// One for each of the program's numbers. The iocbs hold them.
    held: Vec<HeldEventfd>,
    /// Counts the batches submitted: within one, a number is looked at once.
    batch: u64,
}

struct HeldEventfd {
    number: c_int,
    eventfd: Weak<OwnedFd>,
    /// The batch in which it was last seen to have this number.
    batch: u64,
}

impl Eventfds {
    /// The eventfd that has this number now.
    fn hold(&mut self, number: c_uint) -> Result<Arc<OwnedFd>, Error> {
        let fd = c_int::try_from(number).map_err(|_| {
            invalid("The iocb's eventfd is negative. Give raio_set_eventfd() one of eventfd(2).")
        })?;
        if let Some(held) = self.held.iter_mut().find(|held| held.number == fd)
            && let Some(eventfd) = held.eventfd.upgrade()
            && (held.batch == self.batch || is_same_file(fd, eventfd.as_raw_fd()))
        {
            held.batch = self.batch;
            return Ok(eventfd);
        }
        let eventfd = Arc::new(duplicate_eventfd(fd)?);
        self.held.retain(|held| held.number != fd && held.eventfd.strong_count() > 0);
        self.held.push(HeldEventfd { number: fd, eventfd: Arc::downgrade(&eventfd), batch: self.batch });
        Ok(eventfd)
    }
}

/// Whether two descriptors of this process are of one open file. False also where kcmp(2) is not there, or
/// forbidden.
fn is_same_file(one: c_int, other: c_int) -> bool {
    const KCMP_FILE: c_int = 0;
    let me = std::process::id();
    // SAFETY: kcmp(2) takes numbers alone; one that is not open is an error.
    unsafe { libc::syscall(libc::SYS_kcmp, me, me, KCMP_FILE, c_long::from(one), c_long::from(other)) == 0 }
}

fn duplicate_eventfd(fd: c_int) -> Result<OwnedFd, Error> {
    // SAFETY: not negative; a number that is not open is an error of fcntl(2), and nothing is kept of the
    // borrow.
    let eventfd =
        rustix::io::fcntl_dupfd_cloexec(unsafe { BorrowedFd::borrow_raw(fd) }, 0).map_err(|errno| {
            let text = format!(
                "The iocb's eventfd {fd} cannot be used ({errno}). Give one of eventfd(2) that is open."
            );
            Error::call(errno.raw_os_error(), text)
        })?;
    if is_eventfd(&eventfd) {
        Ok(eventfd)
    } else {
        Err(invalid(format!("The iocb's eventfd {fd} is something else. Give one of eventfd(2).")))
    }
}

fn is_eventfd(fd: &OwnedFd) -> bool {
    match rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new()) {
        Ok(target) => target.as_bytes() == b"anon_inode:[eventfd]",
        // Without /proc: it has no file type, as little else does, and nothing else of that kind takes eight
        // bytes.
        Err(_) => rustix::fs::fstat(fd).is_ok_and(|stat| stat.st_mode & libc::S_IFMT == 0),
    }
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_destroy(ctx: *mut raio_context) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        unsafe { state(ctx) }?;
        // SAFETY: as above.
        let mut state = unsafe { Shell::take(&CONTEXTS, ctx) }.ok_or_else(no_context)?;
        lock(&LIVE).remove(&ctx.addr());
        descriptor::remove_context(state.session, ctx.addr());
        if let Some(context) = state.context.take() {
            context.close();
        }
        let mut allocations = lock(&ALLOCATIONS);
        for &mr in &state.mrs {
            // SAFETY: `mrs` has pointers of our own shells, and what they hold for this context is this
            // thread's.
            if unsafe { Shell::get(mr) }.is_some_and(|registration| registration.context == ctx) {
                // SAFETY: as above.
                let registration = unsafe { Shell::take(&MRS, mr) };
                if registration.is_some_and(|registration| registration.is_allocated) {
                    allocations.values_mut().filter(|a| a.mr == mr.addr()).for_each(|a| a.mr = 0);
                }
            }
        }
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `ios` is null or points at `nr` pointers, each null or of an
/// iocb whose memory is as the header demands.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_submit(ctx: *mut raio_context, nr: c_long, ios: *mut *mut raio_iocb) -> c_long {
    long(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if nr < 0 {
            return Err(invalid("The number of iocbs is negative. Give 0 or more."));
        }
        if nr == 0 {
            return Ok(0);
        }
        if ios.is_null() {
            return Err(invalid("The array of iocbs is NULL. Give one."));
        }
        if let Some(context) = &state.context {
            let count = usize::try_from(nr).unwrap_or(0).min(context.room());
            // SAFETY: the caller vouches for `nr` pointers and what they point at.
            unsafe { state.probe.check_writes(ctx, ios, count, context.io_bytes_max() as u64) };
        }
        state.eventfds.batch += 1;
        let mut taken = 0;
        let mut rejected = None;
        while taken < nr {
            // SAFETY: the caller vouches for `nr` pointers and what they point at.
            let submitted = unsafe { submit(ctx, state, *ios.add(taken as usize), taken as usize) };
            if let Err(error) = submitted {
                rejected = Some(error);
                break;
            }
            taken += 1;
        }
        if taken > 0 {
            if let Some(context) = &mut state.context {
                context.flush();
            }
            return Ok(taken);
        }
        rejected.map_or(Ok(0), Err)
    })
}

/// Submits one iocb, the one at this place in its batch.
///
/// # Safety
/// `iocb` is null or points at an iocb whose memory is as the header demands.
unsafe fn submit(
    ctx: *mut raio_context,
    state: &mut State,
    iocb: *mut raio_iocb,
    place: usize,
) -> Result<(), Error> {
    let context = state.context.as_mut().ok_or_else(dead)?;
    if iocb.is_null() || !iocb.is_aligned() {
        return Err(invalid("An iocb is NULL or not aligned. Give iocbs that raio_prep_*() has prepared."));
    }
    if context.is_full() {
        return Err(Error::call(
            libc::EAGAIN,
            "The context is full. Collect events first, or give raio_setup() a larger maxevents.",
        ));
    }
    // SAFETY: not null, aligned, and the caller vouches that it is an iocb that nobody changes meanwhile.
    let io = unsafe { &mut *iocb };
    // SAFETY: the caller vouches for the iocb's memory.
    let operation = unsafe { operation(ctx, context.io_bytes_max() as u64, &mut state.vectors, io) }?;
    let file = state.files.get(io.raio_fildes, state.session)?;
    let eventfd = if io.c.flags & IOCB_EVENTFD != 0 { Some(state.eventfds.hold(io.c.resfd)?) } else { None };
    let token = iocb.expose_provenance() as u64;
    let submitted = if state.probe.unreadable.contains(&place) {
        context.submit_failed(file, operation, token, unreadable())
    } else {
        context.submit(file, operation, token)
    };
    let ticket = submitted.map_err(|rejected| rejected.error)?;
    io.key = ticket.index();
    if let Some(eventfd) = eventfd {
        context.notify(ticket, eventfd);
    }
    Ok(())
}

fn unreadable() -> Error {
    Error::call(
        libc::EFAULT,
        "The memory to be written cannot be read. Give memory that is mapped for reading.",
    )
}

/// What an iocb asks for.
///
/// # Safety
/// The iocb's memory is as the header demands.
unsafe fn operation(
    ctx: *mut raio_context,
    io_bytes_max: u64,
    vectors: &mut Vec<Vec<Buffer>>,
    io: &raio_iocb,
) -> Result<Operation, Error> {
    let c = &io.c;
    if c.flags & !(IOCB_EVENTFD | IOCB_DATASYNC | IOCB_KEEP_SIZE) != 0
        || (c.flags & IOCB_DATASYNC != 0 && io.raio_lio_opcode != CMD_FSYNC)
        || (c.flags & IOCB_KEEP_SIZE != 0 && io.raio_lio_opcode != CMD_ALLOCATE)
    {
        return Err(invalid(format!("The iocb has flags ({:#x}) without meaning. Clear them.", c.flags)));
    }
    let offset = u64::try_from(c.offset)
        .map_err(|_| invalid("The iocb's offset is negative. Give one from the file's start."))?;
    Ok(match io.raio_lio_opcode {
        CMD_PREAD if c.buf.is_null() => {
            if c.nbytes > io_bytes_max {
                return Err(too_long(c.nbytes, io_bytes_max));
            }
            Operation::ReadLent { offset, length: c.nbytes as usize }
        }
        CMD_PREAD | CMD_PWRITE => {
            // SAFETY: the caller vouches for the memory: it is the library's until the event is collected.
            let buffer = unsafe { buffer(ctx, c.mr, c.buf, c.nbytes, io_bytes_max) }?;
            let buffers = Buffers::One(buffer);
            if io.raio_lio_opcode == CMD_PREAD {
                Operation::Read { offset, buffers }
            } else {
                Operation::Write { offset, buffers }
            }
        }
        CMD_PREADV | CMD_PWRITEV => {
            if c.nbytes > IOV_MAX || (c.buf.is_null() && c.nbytes > 0) {
                return Err(invalid("The iovecs are NULL or more than 1,024. Split the operation."));
            }
            let mut pieces = vectors.pop().unwrap_or_default();
            let mut left = io_bytes_max;
            for n in 0..c.nbytes as usize {
                // SAFETY: the caller vouches for `nbytes` iovecs.
                let iov = unsafe { c.buf.cast::<libc::iovec>().add(n).read_unaligned() };
                if iov.iov_len > 0 {
                    // SAFETY: the caller vouches for the memory behind each.
                    pieces.push(unsafe { buffer(ctx, c.mr, iov.iov_base, iov.iov_len as u64, left) }?);
                    left -= iov.iov_len as u64;
                }
            }
            let buffers = Buffers::Many(pieces);
            if io.raio_lio_opcode == CMD_PREADV {
                Operation::Read { offset, buffers }
            } else {
                Operation::Write { offset, buffers }
            }
        }
        CMD_FSYNC => Operation::Fsync { data_only: c.flags & IOCB_DATASYNC != 0 },
        CMD_DISCARD => Operation::Discard { offset, length: c.nbytes },
        CMD_WRITE_ZEROES => Operation::WriteZeroes { offset, length: c.nbytes },
        CMD_ALLOCATE => {
            Operation::Allocate { offset, length: c.nbytes, keep_size: c.flags & IOCB_KEEP_SIZE != 0 }
        }
        other => {
            return Err(invalid(format!("There is no operation {other}. Use one of enum raio_iocb_cmd.")));
        }
    })
}

fn too_long(len: u64, most: u64) -> Error {
    invalid(format!(
        "{len} bytes are more than one iocb may have left ({most}). Split it, or start raio_server with a larger \
         --io-max."
    ))
}

/// Memory of the caller's, checked against the registration that it is said to lie in.
///
/// # Safety
/// `[address, address + len)` is memory that nobody else accesses until the buffer is gone, or is null.
unsafe fn buffer(
    ctx: *mut raio_context,
    mr: *mut raio_mr,
    address: *mut c_void,
    len: u64,
    most: u64,
) -> Result<Buffer, Error> {
    if len > most {
        return Err(too_long(len, most));
    }
    let (address, len) = (address.cast::<u8>(), len as usize);
    if mr.is_null() {
        // SAFETY: the caller vouches for the memory.
        return match unsafe { Foreign::new(address, len) } {
            Some(foreign) => Ok(Buffer::Foreign(foreign)),
            None if len == 0 => Ok(Buffer::Owned(Box::default())),
            None => Err(invalid("The buffer is NULL. Give one.")),
        };
    }
    // SAFETY: the pointer is one of raio_reg_mr() or readable memory; registrations of this context are this
    // thread's.
    let registration = unsafe { Shell::get(mr) }.filter(|registration| registration.context == ctx);
    let registration = registration.ok_or_else(|| {
        invalid("The iocb's mr is no registration of this context. Use one of it, or NULL.")
    })?;
    // SAFETY: the caller vouches for the memory.
    unsafe { registration.region.buffer(address, len) }
        .ok_or_else(|| invalid("The buffer does not lie within its mr. Register all of it, or use mr NULL."))
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `events` is null or has room for `nr`; `timeout` is null or
/// may be read.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_getevents(
    ctx: *mut raio_context,
    min_nr: c_long,
    nr: c_long,
    events: *mut raio_event,
    timeout: *mut libc::timespec,
) -> c_long {
    long(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        let (Ok(min), Ok(max)) = (usize::try_from(min_nr), usize::try_from(nr)) else {
            return Err(invalid("min_nr or nr is negative. Give 0 or more."));
        };
        if min > max || (events.is_null() && max > 0) {
            return Err(invalid("min_nr is more than nr, or the events are NULL. Give room for nr events."));
        }
        let timeout = if timeout.is_null() {
            None
        } else {
            // SAFETY: not null, and the caller vouches for the rest.
            let timeout = unsafe { timeout.read_unaligned() };
            match (u64::try_from(timeout.tv_sec), u32::try_from(timeout.tv_nsec)) {
                (Ok(s), Ok(ns)) if ns < 1_000_000_000 => Some(Duration::new(s, ns)),
                _ => return Err(invalid("The timeout is negative, or has a second or more in tv_nsec.")),
            }
        };
        let context = state.context.as_mut().ok_or_else(dead)?;
        if max == 0 {
            return Ok(0);
        }
        state.failures.clear();
        context.wait(min, max, timeout)?;
        let mut n = 0;
        while n < max {
            let Some(completion) = context.next() else { break };
            if let Err(error) = &completion.result {
                set_message(&error.text);
            }
            // SAFETY: there is room for `nr` events.
            unsafe {
                events.add(n).write(event(
                    completion,
                    &mut state.loans,
                    &mut state.vectors,
                    &mut state.failures,
                ));
            }
            n += 1;
        }
        context.sync_poller();
        Ok(n as c_long)
    })
}

/// The event of a completion. The iocb is the caller's again.
fn event(
    completion: Completion,
    loans: &mut Loans,
    vectors: &mut Vec<Vec<Buffer>>,
    failures: &mut Failures,
) -> raio_event {
    let obj = std::ptr::with_exposed_provenance_mut::<raio_iocb>(completion.token as usize);
    let mut handle = 0;
    match completion.buffers {
        Some(mut buffers) if completion.is_lent => {
            let lent =
                buffers.pieces_mut().first_mut().map_or(null_mut(), |piece| piece.bytes_mut().as_mut_ptr());
            handle = loans.add(buffers);
            // SAFETY: the token is the address of an iocb, which is the library's until its event is
            // collected: now.
            unsafe { (*obj).c.buf = lent.cast() };
        }
        Some(Buffers::Many(mut pieces)) => {
            pieces.clear();
            vectors.push(pieces);
        }
        _ => {}
    }
    let (res, res2) = match &completion.result {
        Ok(n) => (*n as c_ulong, 0),
        Err(error) => {
            failures.add(obj, &error.text);
            let retryable = if error.status.retryable { RES2_RETRYABLE } else { 0 };
            (-c_long::from(error.errno()) as c_ulong, error.status.class as c_ulong | retryable)
        }
    };
    // SAFETY: as above.
    let data = unsafe { (*obj).data };
    raio_event { data, obj, handle, res, res2 }
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `events` is null or points at `nr` events.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_release(ctx: *mut raio_context, nr: c_long, events: *mut raio_event) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        let count =
            usize::try_from(nr).map_err(|_| invalid("The number of events is negative. Give 0 or more."))?;
        if events.is_null() && count > 0 {
            return Err(invalid("The events are NULL. Give those of raio_getevents()."));
        }
        let mut unknown = 0;
        for n in 0..count {
            // SAFETY: the caller vouches for `nr` events.
            let handle = unsafe { (*events.add(n)).handle };
            match state.loans.take(handle) {
                Some(buffers) => {
                    if let Some(context) = &mut state.context {
                        context.release(buffers);
                    }
                }
                None => unknown += usize::from(handle != 0),
            }
        }
        if unknown > 0 {
            return Err(invalid(format!(
                "{unknown} of the events have handles that are not lent out. Release each event once."
            )));
        }
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `iocb` is null or points at one; `evt` is null or may be
/// written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_cancel(
    ctx: *mut raio_context,
    iocb: *mut raio_iocb,
    evt: *mut raio_event,
) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if iocb.is_null() || evt.is_null() {
            return Err(invalid("The iocb or the place for its event is NULL. Give both."));
        }
        let context = state.context.as_mut().ok_or_else(dead)?;
        // SAFETY: not null, and the caller vouches for the rest.
        let key = unsafe { (*iocb).key };
        let ticket = context
            .ticket(key, iocb.expose_provenance() as u64)
            .ok_or_else(|| invalid("That iocb is not in flight in this context."))?;
        let completion = context.cancel(ticket)?;
        // It may have failed before, and been submitted again.
        state.failures.supersede(iocb);
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe {
            evt.write(event(completion, &mut state.loans, &mut state.vectors, &mut state.failures));
        }
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_poll_fd(ctx: *mut raio_context) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        let context = state.context.as_mut().ok_or_else(dead)?;
        context.poll_fd().map(|fd| fd.as_raw_fd())
    })
}

// Memory
// -----------------------------------------------------------------------------------------------------------

/// Memory of raio_alloc(), by its address.
struct Allocation {
    len: usize,
    /// The address of its registration; 0 once its context is gone.
    mr: usize,
    /// The process that it is mapped in: a child does not inherit it.
    process: u64,
}

static ALLOCATIONS: LazyLock<Mutex<HashMap<usize, Allocation>>> = LazyLock::new(Mutex::default);

/// Registers memory on a context.
fn register(
    ctx: *mut raio_context,
    state: &mut State,
    region: Region,
    is_allocated: bool,
) -> Result<*mut raio_mr, Error> {
    if let Some(context) = &mut state.context {
        context.register(&region)?;
    }
    let mr = Shell::put(&MRS, Registration { context: ctx, region, is_allocated });
    state.mrs.push(mr);
    Ok(mr)
}

/// Ends a registration on the context that it is of.
fn unregister(state: &mut State, registration: &Registration) {
    if let Some(context) = &mut state.context {
        context.unregister(&registration.region);
    }
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `mr` is null or may be written; the memory stays mapped while
/// it is registered.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_reg_mr(
    ctx: *mut raio_context,
    buf: *mut c_void,
    len: usize,
    mr: *mut *mut raio_mr,
) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if mr.is_null() {
            return Err(invalid("The place for the registration is NULL. Give one."));
        }
        // SAFETY: the caller vouches that the memory stays mapped until raio_dereg_mr() or raio_destroy().
        let region = unsafe { Region::new(buf.cast(), len) }.ok_or_else(|| {
            invalid(
                "That memory cannot be registered: it is NULL, empty, or wraps around. Give mapped memory.",
            )
        })?;
        let registered = register(ctx, state, region, false)?;
        // SAFETY: not null, and the caller vouches for the rest.
        unsafe { mr.write(registered) };
        Ok(0)
    })
}

/// See libraio.h.
///
/// # Safety
/// `ctx` and `mr` are null or point at readable memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_dereg_mr(ctx: *mut raio_context, mr: *mut raio_mr) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointers, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        // SAFETY: as above; a registration of this context is this thread's.
        let registration = unsafe { Shell::get(mr) }
            .filter(|registration| registration.context == ctx && !registration.is_allocated)
            .ok_or_else(|| {
                invalid("That is no registration of this context by raio_reg_mr(). (raio_free() ends the others.)")
            })?;
        if registration.region.in_use() {
            return Err(busy());
        }
        unregister(state, registration);
        state.mrs.retain(|&other| other != mr);
        // SAFETY: as above.
        drop(unsafe { Shell::take(&MRS, mr) });
        Ok(0)
    })
}

fn busy() -> Error {
    Error::call(libc::EBUSY, "I/O in flight uses that memory. Collect its events first.")
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `mr` is null or may be written.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_alloc(
    ctx: *mut raio_context,
    len: usize,
    mr: *mut *mut raio_mr,
) -> *mut c_void {
    run(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if len == 0 {
            return Err(invalid("The length is 0. Ask for at least one byte."));
        }
        let (memory, mapped) = map(len)?;
        // SAFETY: the mapping stays until raio_free(), which rejects while the region is in use.
        let Some(region) = (unsafe { Region::new(memory.cast(), len) }) else {
            unreachable!("a mapping is neither null nor empty, and does not wrap around")
        };
        let registered = match register(ctx, state, region, true) {
            Ok(registered) => registered,
            Err(error) => {
                // SAFETY: exactly the mapping just made, which nobody knows.
                unsafe { libc::munmap(memory, mapped) };
                return Err(error);
            }
        };
        lock(&ALLOCATIONS).insert(
            memory.addr(),
            Allocation { len: mapped, mr: registered.expose_provenance(), process: process() },
        );
        if !mr.is_null() {
            // SAFETY: not null, and the caller vouches for the rest.
            unsafe { mr.write(registered) };
        }
        Ok(memory)
    })
    .unwrap_or_else(|errno| fail(errno, null_mut()))
}

/// Maps at least `len` zeroed bytes, on huge pages if some are set aside. Gives the address and the length
/// mapped.
fn map(len: usize) -> Result<(*mut c_void, usize), Error> {
    const HUGE: usize = 2 << 20;
    let failed = || {
        Error::call(libc::ENOMEM, format!("There is no memory for {len} bytes. Ask for less, or free some."))
    };
    let plain = (len.checked_next_multiple_of(4096).ok_or_else(failed)?, 0);
    let huge = len.checked_next_multiple_of(HUGE).filter(|_| len >= HUGE).map(|len| (len, libc::MAP_HUGETLB));
    for (mapped, flags) in huge.into_iter().chain([plain]) {
        if mapped > isize::MAX as usize {
            return Err(failed());
        }
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choosing touches no existing
        // memory.
        let memory = unsafe {
            libc::mmap(
                null_mut(),
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags,
                -1,
                0,
            )
        };
        if memory != libc::MAP_FAILED {
            // A child must not share pages that hardware may write to. Huge pages, if not had above, are a
            // favour. Faulting the pages in now keeps the first I/O on each buffer from paying for it, up to
            // 100 ms for 32 MiB in a virtual machine.
            for advice in [libc::MADV_DONTFORK, libc::MADV_HUGEPAGE, libc::MADV_POPULATE_WRITE] {
                // SAFETY: the range is exactly our own mapping, and no advice changes its contents in this
                // process.
                unsafe { libc::madvise(memory, mapped, advice) };
            }
            return Ok((memory, mapped));
        }
    }
    Err(failed())
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `buf` is not used any more, and no raw I/O without `mr` is in
/// flight on it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_free(ctx: *mut raio_context, buf: *mut c_void) -> c_int {
    int(|| {
        let mut allocations = lock(&ALLOCATIONS);
        let mapped_here = allocations.get(&buf.addr()).filter(|allocation| allocation.process == process());
        let allocation = mapped_here.ok_or_else(|| {
            invalid("That memory is not from raio_alloc(), or was freed. Give what raio_alloc() gave.")
        })?;
        let mr = std::ptr::with_exposed_provenance_mut::<raio_mr>(allocation.mr);
        // SAFETY: null or one of our shells; only `Region::in_use`, which is atomic, is looked at.
        if unsafe { Shell::get(mr) }.is_some_and(|registration| registration.region.in_use()) {
            return Err(busy());
        }
        // SAFETY: the caller vouches for the pointer. The context may be gone, or another: then its list of
        // registrations keeps one that has ended, and its device the pages, which does no harm.
        if let Ok(state) = unsafe { state(ctx) } {
            // SAFETY: null or one of our shells, and nothing in flight uses it.
            if let Some(registration) = unsafe { Shell::get(mr) } {
                unregister(state, registration);
            }
            state.mrs.retain(|&other| other != mr);
        }
        // SAFETY: null or one of our shells, and nothing in flight uses it.
        drop(unsafe { Shell::take(&MRS, mr) });
        let len = allocation.len;
        allocations.remove(&buf.addr());
        // SAFETY: exactly the mapping made by `map`, taken out of the table once; the caller vouches that it
        // is not used any more.
        unsafe { libc::munmap(buf, len) };
        Ok(0)
    })
}

// Information
// ------------------------------------------------------------------------------------------------------

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `stats` is null or has room for `size` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_get_stats(
    ctx: *mut raio_context,
    stats: *mut raio_stats,
    size: usize,
) -> c_int {
    int(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if stats.is_null() || size < size_of::<c_ulonglong>() {
            return Err(invalid(
                "The place for the counters is NULL or has no room. Give a struct raio_stats.",
            ));
        }
        let size = size.min(size_of::<raio_stats>());
        let s = state.context.as_ref().map_or(state.stats, Context::stats);
        let filled = raio_stats {
            size: size as c_ulonglong,
            submitted: s.submitted,
            completed: s.completed,
            failed: s.failed,
            bytes_read: s.bytes_read,
            bytes_written: s.bytes_written,
            bounced_bytes: s.bounced_bytes,
            sends: s.sends,
            receives: s.receives,
            sleeps: s.sleeps,
            reconnects: 0,
            in_flight: s.in_flight,
            queue_depth: s.queue_depth,
            io_bytes_max: s.io_bytes_max,
        };
        // SAFETY: `size` bytes are within `filled`, and the caller vouches for as many at `stats`.
        unsafe { std::ptr::copy_nonoverlapping((&raw const filled).cast::<u8>(), stats.cast::<u8>(), size) };
        Ok(0)
    })
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_errmsg() -> *const c_char {
    MESSAGE.with(|message| message.get().cast::<c_char>().cast_const())
}

/// See libraio.h.
///
/// # Safety
/// `ctx` is null or points at readable memory; `event` is null or points at one.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn raio_event_errmsg(
    ctx: *mut raio_context,
    event: *const raio_event,
) -> *const c_char {
    run(|| {
        // SAFETY: the caller vouches for the pointer, and for being the only one to use the context.
        let state = unsafe { state(ctx) }?;
        if event.is_null() {
            return Err(invalid("The event is NULL. Give one of the last raio_getevents() or raio_cancel()."));
        }
        // SAFETY: not null, and the caller vouches for the rest.
        let (obj, res) = unsafe { ((*event).obj.addr(), (*event).res as c_long) };
        if res >= 0 {
            return Ok(c"".as_ptr());
        }
        let text = state.failures.find(obj).ok_or_else(|| {
            invalid("That event is not of the context's last raio_getevents() or raio_cancel(). Ask before the next.")
        })?;
        Ok(text.as_ptr())
    })
    .unwrap_or_else(|errno| fail(errno, c"".as_ptr()))
}

/// See libraio.h.
#[unsafe(no_mangle)]
pub extern "C" fn raio_abi_version() -> c_uint {
    ABI_VERSION
}
