//! A FUSE file system of one directory, in memory, whose calls hang or fail when told to.
//!
//! It speaks the kernel's protocol (`linux/fuse.h`, 7.31) by itself: the crate `fuser` always asks for
//! ASYNC_READ, and what becomes of a server on file systems without it is one of the things to test.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use crate::device::needs_root;
use crate::server::PATIENCE;

/// What the kernel asks of a file system: the numbers are FUSE's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum FuseCall {
    /// Find a name in the directory. Names are never cached.
    Lookup = 1,
    /// stat. Attributes are never cached.
    Getattr = 3,
    /// truncate and chmod.
    Setattr = 4,
    /// unlink.
    Unlink = 10,
    /// Open a file that exists.
    Open = 14,
    /// Read, as far as the page cache does not answer.
    Read = 15,
    /// Write: there is no write-back cache, each write arrives.
    Write = 16,
    /// statfs.
    Statfs = 17,
    /// The last descriptor of an open file is gone. Nobody waits for it.
    Release = 18,
    /// fsync and fdatasync.
    Fsync = 20,
    /// close of a descriptor, which waits for it and reports its error.
    Flush = 25,
    /// Create a file and open it.
    Create = 35,
    /// fallocate, for plain allocation only: a mode other than 0 is EOPNOTSUPP.
    Fallocate = 43,
}

/// How a file system announces itself to the kernel.
#[derive(Clone, Copy, Debug)]
pub struct FuseOptions {
    /// Whether the kernel may read asynchronously. Without it, io_uring reads inline.
    pub async_read: bool,
    /// FOPEN_DIRECT_IO: no page cache, whatever open(2) said.
    pub direct_io: bool,
}

impl Default for FuseOptions {
    /// As most FUSE file systems are: ASYNC_READ, with the page cache.
    fn default() -> Self {
        Self { async_read: true, direct_io: false }
    }
}

#[derive(Clone, Copy)]
enum Behaviour {
    Hangs,
    Fails(i32),
}

struct Inode {
    name: String,
    mode: u32,
    content: Vec<u8>,
}

#[derive(Default)]
struct State {
    behaviours: HashMap<u32, Behaviour>,
    /// The offset, in each file, of a byte that cannot be read, and why.
    bad: Option<(u64, i32)>,
    calls: HashMap<u32, u64>,
    /// Requests that hang, whole.
    hanging: Vec<Vec<u8>>,
    /// By node id. An unlinked file has no name.
    inodes: BTreeMap<u64, Inode>,
    next: u64,
}

struct Shared {
    device: File,
    options: FuseOptions,
    state: Mutex<State>,
}

/// A mounted file system. When this is dropped, whatever hangs ends with an error and the file system is
/// unmounted, also beneath a server that has files open.
///
/// A process that is killed (SIGKILL) while a call of its hangs is let go with EINTR, so that it can be
/// waited for.
pub struct FuseFs {
    shared: Arc<Shared>,
    directory: tempfile::TempDir,
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

const ROOT: u64 = 1;
const HEADER_BYTES: usize = 40;
const REQUEST_BYTES_MAX: usize = (128 << 10) + 4096;

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

fn longs(longs: &[u64]) -> Vec<u8> {
    longs.iter().flat_map(|long| long.to_ne_bytes()).collect()
}

fn name(body: &[u8]) -> String {
    let end = body.iter().position(|&byte| byte == 0).unwrap_or(body.len());
    String::from_utf8_lossy(&body[..end]).into_owned()
}

impl FuseFs {
    /// Mounts one that has these files. Where that is impossible, says that `what` is skipped.
    pub fn mount(what: &str, options: FuseOptions, files: &[(&str, &[u8])]) -> Option<Self> {
        if !needs_root(what) {
            return None;
        }
        if !Path::new("/dev/fuse").exists() {
            let _ = Command::new("modprobe").arg("fuse").status();
        }
        let device = match File::options().read(true).write(true).open("/dev/fuse") {
            Ok(device) => device,
            Err(error) => {
                eprintln!("SKIPPED: {what} needs FUSE, and /dev/fuse: {error}. Load the kernel module fuse.");
                return None;
            }
        };
        let directory = tempfile::tempdir().expect("a mount point");
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
        let data = std::ffi::CString::new(data).expect("no zero in it");
        mount("raio-e2e", directory.path(), "fuse", MountFlags::NOSUID | MountFlags::NODEV, Some(&*data))
            .expect("a FUSE mount");
        let mut state = State { next: ROOT + 1, ..State::default() };
        for (name, content) in files {
            let inode = Inode { name: (*name).to_owned(), mode: 0o644, content: content.to_vec() };
            state.inodes.insert(state.next, inode);
            state.next += 1;
        }
        let shared = Arc::new(Shared { device, options, state: Mutex::new(state) });
        let stop = eventfd(0, EventfdFlags::CLOEXEC).expect("an eventfd");
        let until = stop.try_clone().expect("an eventfd");
        let thread = std::thread::spawn({
            let shared = shared.clone();
            move || shared.serve(&until)
        });
        Some(Self { shared, directory, stop, thread: Some(thread) })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Where a file of it is.
    pub fn file(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// From now on these calls are not answered.
    pub fn hang(&self, call: FuseCall) {
        self.shared.state().behaviours.insert(call as u32, Behaviour::Hangs);
    }

    /// From now on these calls fail.
    pub fn fail(&self, call: FuseCall, errno: i32) {
        self.shared.state().behaviours.insert(call as u32, Behaviour::Fails(errno));
    }

    /// From now on the byte at this offset of each file cannot be read, like a bad sector: reads that include
    /// it fail.
    pub fn fail_reads_at(&self, offset: u64, errno: i32) {
        self.shared.state().bad = Some((offset, errno));
    }

    /// From now on these calls do what they should, those that hang too.
    pub fn mend(&self, call: FuseCall) {
        let mut state = self.shared.state();
        state.behaviours.remove(&(call as u32));
        let (mended, hanging) = std::mem::take(&mut state.hanging)
            .into_iter()
            .partition(|request| word(request, 4) == call as u32);
        state.hanging = hanging;
        for request in mended {
            self.shared.answer(&mut state, &request);
        }
    }

    /// How many of these calls there were, those that hang included.
    pub fn calls(&self, call: FuseCall) -> u64 {
        self.shared.state().calls.get(&(call as u32)).copied().unwrap_or(0)
    }

    /// How many of these calls hang now.
    pub fn hanging(&self, call: FuseCall) -> usize {
        self.shared.state().hanging.iter().filter(|request| word(request, 4) == call as u32).count()
    }

    /// Waits until so many of these calls hang.
    pub fn wait_for_hanging(&self, call: FuseCall, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.hanging(call) < count {
            assert!(Instant::now() < deadline, "{} of {count} {call:?} hang", self.hanging(call));
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

impl Drop for FuseFs {
    fn drop(&mut self) {
        // The first ends every call there is, for a process that is about to become another program may hold
        // a copy of the connection and wait for an answer on it; the second takes the mount down though it
        // may be busy.
        let _ = unmount(self.path(), UnmountFlags::FORCE);
        let _ = unmount(self.path(), UnmountFlags::DETACH);
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        // The device is closed with `shared`, whereupon the kernel ends what still hangs with ECONNABORTED.
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn serve(&self, stop: &OwnedFd) {
        let mut buffer = vec![0; REQUEST_BYTES_MAX];
        loop {
            let mut fds = [PollFd::new(&self.device, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
            // Now and then, to let go of who was killed.
            let tick = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
            let news = poll(&mut fds, Some(&tick));
            if !fds[1].revents().is_empty() {
                return;
            }
            self.let_go_of_killed();
            if !matches!(news, Ok(n) if n > 0) {
                continue;
            }
            match (&self.device).read(&mut buffer) {
                Ok(n) => self.take(&buffer[..n]),
                // ENODEV: unmounted. All else is a request that was withdrawn.
                Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return,
                Err(_) => {}
            }
        }
    }

    fn take(&self, request: &[u8]) {
        let call = word(request, 4);
        let mut state = self.state();
        *state.calls.entry(call).or_default() += 1;
        match state.behaviours.get(&call) {
            Some(Behaviour::Hangs) => state.hanging.push(request.to_vec()),
            Some(&Behaviour::Fails(errno)) => self.reply(request, Err(errno)),
            None => self.answer(&mut state, request),
        }
    }

    /// The kernel has who waits for an answer wait on even when killed.
    fn let_go_of_killed(&self) {
        let is_killed = |request: &Vec<u8>| {
            let status = std::fs::read_to_string(format!("/proc/{}/status", word(request, 32)));
            status.is_ok_and(|status| {
                status
                    .lines()
                    .filter_map(|line| line.strip_prefix("SigPnd:").or(line.strip_prefix("ShdPnd:")))
                    .filter_map(|set| u64::from_str_radix(set.trim(), 16).ok())
                    .any(|set| set & 1 << (libc::SIGKILL - 1) != 0)
            })
        };
        let mut state = self.state();
        let (killed, hanging): (Vec<_>, Vec<_>) =
            std::mem::take(&mut state.hanging).into_iter().partition(is_killed);
        state.hanging = hanging;
        for request in killed {
            self.reply(&request, Err(libc::EINTR));
        }
    }

    fn reply(&self, request: &[u8], result: Result<Vec<u8>, i32>) {
        let (error, body) = match result {
            Ok(body) => (0, body),
            Err(errno) => (errno.wrapping_neg(), Vec::new()),
        };
        let mut reply = words(&[16 + body.len() as u32, error as u32]);
        reply.extend_from_slice(&request[8..16]);
        reply.extend(body);
        // ENOENT: nobody waits for it any more.
        let _: io::Result<usize> = (&self.device).write(&reply);
    }

    fn answer(&self, state: &mut State, request: &[u8]) {
        // FORGET, BATCH_FORGET and INTERRUPT want no answer.
        if ![2, 42, 36].contains(&word(request, 4)) {
            self.reply(request, self.execute(state, request));
        }
    }

    fn execute(&self, state: &mut State, request: &[u8]) -> Result<Vec<u8>, i32> {
        let (call, node, body) = (word(request, 4), long(request, 16), &request[HEADER_BYTES..]);
        match call {
            // INIT. BIG_WRITES, and 64 requests in the background. Whatever else is newer than 7.31 is left
            // at 0.
            26 => {
                let flags = 1 << 5 | u32::from(self.options.async_read);
                let mut reply = words(&[7, 31, word(body, 8), flags, 48 << 16 | 64, 128 << 10, 1]);
                reply.resize(64, 0);
                Ok(reply)
            }
            // OPENDIR, RELEASEDIR, DESTROY
            27 => Ok(longs(&[0, 0])),
            29 | 38 => Ok(Vec::new()),
            // READDIR
            28 => Ok(state.entries(long(body, 8) as usize, word(body, 16) as usize)),
            _ if call == FuseCall::Lookup as u32 => {
                let node = state.find(&name(body)).ok_or(libc::ENOENT)?;
                state.entry(node)
            }
            _ if call == FuseCall::Getattr as u32 => state.attributes_reply(node),
            _ if call == FuseCall::Setattr as u32 => {
                let valid = word(body, 0);
                let inode = state.inodes.get_mut(&node).ok_or(libc::EPERM)?;
                if valid & 1 != 0 {
                    inode.mode = word(body, 68) & 0o7777;
                }
                if valid & 8 != 0 {
                    inode.content.resize(long(body, 16) as usize, 0);
                }
                state.attributes_reply(node)
            }
            _ if call == FuseCall::Unlink as u32 => {
                let node = state.find(&name(body)).ok_or(libc::ENOENT)?;
                state.inode(node)?.name.clear();
                Ok(Vec::new())
            }
            _ if call == FuseCall::Open as u32 => Ok(self.opened(node)),
            _ if call == FuseCall::Create as u32 => {
                let node = state.next;
                state.next += 1;
                let mode = word(body, 4) & !word(body, 8) & 0o7777;
                state.inodes.insert(node, Inode { name: name(&body[16..]), mode, content: Vec::new() });
                let mut reply = state.entry(node)?;
                reply.extend(self.opened(node));
                Ok(reply)
            }
            _ if call == FuseCall::Read as u32 => {
                let content = &state.inode(node)?.content;
                let from = content.len().min(long(body, 8) as usize);
                let to = content.len().min(from + word(body, 16) as usize);
                match state.bad {
                    Some((bad, errno)) if (from..to).contains(&(bad as usize)) => Err(errno),
                    _ => Ok(state.inode(node)?.content[from..to].to_vec()),
                }
            }
            _ if call == FuseCall::Write as u32 => {
                let (from, len, data) = (long(body, 8) as usize, word(body, 16), &body[40..]);
                let content = &mut state.inode(node)?.content;
                content.resize(content.len().max(from + data.len()), 0);
                content[from..from + data.len()].copy_from_slice(data);
                Ok(words(&[len, 0]))
            }
            _ if call == FuseCall::Statfs as u32 => {
                let mut reply = longs(&[1 << 20, 1 << 20, 1 << 20, 1 << 20, 1 << 20]);
                reply.extend(words(&[4096, 255, 4096]));
                reply.resize(80, 0);
                Ok(reply)
            }
            _ if call == FuseCall::Fallocate as u32 => {
                if word(body, 24) != 0 {
                    return Err(libc::EOPNOTSUPP);
                }
                let end = (long(body, 8) + long(body, 16)) as usize;
                let content = &mut state.inode(node)?.content;
                content.resize(content.len().max(end), 0);
                Ok(Vec::new())
            }
            _ if [FuseCall::Release, FuseCall::Fsync, FuseCall::Flush]
                .map(|call| call as u32)
                .contains(&call) =>
            {
                Ok(Vec::new())
            }
            _ => Err(libc::ENOSYS),
        }
    }

    fn opened(&self, node: u64) -> Vec<u8> {
        let mut reply = longs(&[node]);
        reply.extend(words(&[u32::from(self.options.direct_io), 0]));
        reply
    }
}

impl State {
    fn find(&self, name: &str) -> Option<u64> {
        self.inodes.iter().find(|(_, inode)| inode.name == name).map(|(&node, _)| node)
    }

    fn inode(&mut self, node: u64) -> Result<&mut Inode, i32> {
        self.inodes.get_mut(&node).ok_or(libc::EISDIR)
    }

    /// `struct fuse_attr`.
    fn attributes(&self, node: u64) -> Result<Vec<u8>, i32> {
        let (mode, size) = match self.inodes.get(&node) {
            _ if node == ROOT => (libc::S_IFDIR | 0o755, 0),
            Some(inode) => (libc::S_IFREG | inode.mode, inode.content.len() as u64),
            None => return Err(libc::ENOENT),
        };
        let mut bytes = longs(&[node, size, size.div_ceil(512), 0, 0, 0]);
        bytes.extend(words(&[0, 0, 0, mode, 1, 0, 0, 0, 4096, 0]));
        Ok(bytes)
    }

    /// `struct fuse_attr_out`, valid for no time.
    fn attributes_reply(&self, node: u64) -> Result<Vec<u8>, i32> {
        let mut reply = longs(&[0, 0]);
        reply.extend(self.attributes(node)?);
        Ok(reply)
    }

    /// `struct fuse_entry_out`, valid for no time.
    fn entry(&self, node: u64) -> Result<Vec<u8>, i32> {
        let mut reply = longs(&[node, 0, 0, 0, 0]);
        reply.extend(self.attributes(node)?);
        Ok(reply)
    }

    /// `struct fuse_dirent`s, from an index on.
    fn entries(&self, from: usize, bytes_max: usize) -> Vec<u8> {
        let mut reply = Vec::new();
        let named = self.inodes.iter().filter(|(_, inode)| !inode.name.is_empty());
        for (index, (&node, inode)) in named.enumerate().skip(from) {
            let mut entry = longs(&[node, index as u64 + 1]);
            entry.extend(words(&[inode.name.len() as u32, u32::from(libc::DT_REG)]));
            entry.extend(inode.name.as_bytes());
            entry.resize(entry.len().next_multiple_of(8), 0);
            if reply.len() + entry.len() > bytes_max {
                break;
            }
            reply.extend(entry);
        }
        reply
    }
}
