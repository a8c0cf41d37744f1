//! Signals and file watches: descriptors whose readiness the reactor reports ([`super::Op::Readable`]) and
//! that are then read here.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;

use rustix::fs::inotify;

use super::{File, Op, Reactor, Token};

fn signal_set(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initialises the set; sigaddset only changes it, and rejects numbers that are no
    // signal.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        set.assume_init()
    }
}

/// Blocks signals in this thread and those it will start, so that only [`Signals`] gets them. Call it before
/// starting threads.
pub fn block_signals(signals: &[i32]) -> io::Result<()> {
    let set = signal_set(signals);
    // SAFETY: `set` is initialised; a null old set is allowed.
    match unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Signals as events. They must be blocked in every thread: [`block_signals`].
#[derive(Debug)]
pub struct Signals {
    file: File,
    token: Token,
}

impl Signals {
    /// Reports these signals as readiness events with this token.
    pub fn new(reactor: &mut Reactor, signals: &[i32], token: Token) -> io::Result<Self> {
        let set = signal_set(signals);
        // SAFETY: `set` is initialised, and -1 asks for a new descriptor.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_NONBLOCK | libc::SFD_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and nobody else's.
        let file = reactor.file(unsafe { OwnedFd::from_raw_fd(fd) });
        reactor.submit(token, Op::Readable { file: file.clone() });
        Ok(Self { file, token })
    }

    /// The signals that have come, after the event; watches for the next ones.
    pub fn read(&mut self, reactor: &mut Reactor) -> Vec<i32> {
        let mut signals = Vec::new();
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        while let Ok(n) = rustix::io::read(&self.file, &mut info)
            && n == info.len()
        {
            // `ssi_signo` is the first field.
            signals.push(i32::from_ne_bytes([info[0], info[1], info[2], info[3]]));
        }
        reactor.submit(self.token, Op::Readable { file: self.file.clone() });
        signals
    }
}

/// Changes of files and directories as events.
#[derive(Debug)]
pub struct FileWatch {
    file: File,
    token: Token,
}

impl FileWatch {
    /// Reports changes as readiness events with this token.
    pub fn new(reactor: &mut Reactor, token: Token) -> io::Result<Self> {
        let fd = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC)?;
        let file = reactor.file(fd);
        reactor.submit(token, Op::Readable { file: file.clone() });
        Ok(Self { file, token })
    }

    /// Watches a file or directory for being written, moved, created in or deleted. Returns the number that
    /// names it in [`FileWatch::read`].
    pub fn add(&self, path: &Path) -> io::Result<i32> {
        let path = CString::new(path.as_os_str().as_encoded_bytes())?;
        let mask = libc::IN_CLOSE_WRITE
            | libc::IN_MODIFY
            | libc::IN_CREATE
            | libc::IN_DELETE
            | libc::IN_DELETE_SELF
            | libc::IN_MOVED_TO
            | libc::IN_MOVED_FROM
            | libc::IN_MOVE_SELF;
        // SAFETY: the descriptor is an inotify of ours, and the path is a terminated string that the call
        // only reads.
        let watch = unsafe { libc::inotify_add_watch(self.file.as_raw_fd(), path.as_ptr(), mask) };
        if watch < 0 { Err(io::Error::last_os_error()) } else { Ok(watch) }
    }

    /// What has changed, after the event: the number of the watch, and the name within a watched directory.
    /// Watches on.
    pub fn read(&mut self, reactor: &mut Reactor) -> Vec<(i32, Option<String>)> {
        let mut changes = Vec::new();
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.file, &mut buffer);
        while let Ok(event) = reader.next() {
            changes.push((event.wd(), event.file_name().map(|name| name.to_string_lossy().into_owned())));
        }
        reactor.submit(self.token, Op::Readable { file: self.file.clone() });
        changes
    }
}
