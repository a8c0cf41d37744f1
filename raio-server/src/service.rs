//! The service manager that has started the server, such as systemd: what it passes, and what it is told.
//!
//! The protocols are those of sd_notify(3), sd_watchdog_enabled(3) and sd_listen_fds(3), by the environment:
//!
//! | variable | what it is |
//! |---|---|
//! | `NOTIFY_SOCKET` | a datagram socket, for lines such as `READY=1` |
//! | `WATCHDOG_USEC`, `WATCHDOG_PID` | within this time `WATCHDOG=1` must come, or the service is killed |
//! | `LISTEN_FDS`, `LISTEN_PID`, `LISTEN_FDNAMES` | listening sockets: how many, from descriptor 3 on |
//!
//! The variables stay: the server starts no other program.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use raio_transport::environment::passed_descriptor;
use raio_transport::tcp;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, connect, send, socket_with,
};
use rustix::time::{ClockId, clock_gettime};

use crate::config::HANDED_OVER_MAX;
use crate::hand_over::GivenSocket;
use crate::tuning::service::{EXTEND_EVERY, EXTEND_TIMEOUT, STATUS_EVERY, UNSENT_MAX};

/// The first descriptor that is passed.
const FIRST_DESCRIPTOR: i32 = 3;

/// The service manager. Nothing here waits for it.
#[derive(Debug, Default)]
pub struct Service {
    /// None: there is no manager, or it does not want to hear anything.
    socket: Option<OwnedFd>,
    /// It wants to, but there is nothing at this address.
    unreached: Option<String>,
    /// The manager wants a sign of life within this time.
    watchdog: Option<Duration>,
    /// What must not get lost, for which the socket had no room.
    unsent: VecDeque<String>,
    is_ending: bool,
    /// The status that was sent last.
    status: String,
    /// When it was told last that the start takes longer.
    extended: Option<Instant>,
    sockets: Vec<GivenSocket>,
}

impl Service {
    /// The manager that the environment names. The error is about sockets that it passes.
    pub fn find() -> anyhow::Result<Self> {
        Self::find_by(std::process::id(), |name| std::env::var_os(name).filter(|value| !value.is_empty()))
    }

    fn find_by(pid: u32, variable: impl Fn(&str) -> Option<OsString>) -> anyhow::Result<Self> {
        let number = |name| variable(name)?.to_str()?.parse::<u64>().ok();
        let is_ours = |name| number(name) == Some(u64::from(pid));
        let watchdog = number("WATCHDOG_USEC").map(Duration::from_micros).filter(|time| !time.is_zero());
        // Without an id it is for every process of the service.
        let watchdog = watchdog.filter(|_| variable("WATCHDOG_PID").is_none() || is_ours("WATCHDOG_PID"));
        let mut unreached = None;
        let socket = variable("NOTIFY_SOCKET").and_then(|address| {
            let socket = reach(&address);
            socket.map_err(|error| unreached = Some(format!("{} ({error})", address.display()))).ok()
        });
        let sockets = match number("LISTEN_FDS").filter(|_| is_ours("LISTEN_PID")) {
            Some(count) => take_sockets(count, &variable("LISTEN_FDNAMES").unwrap_or_default())?,
            None => Vec::new(),
        };
        Ok(Self { socket, unreached, watchdog, sockets, ..Self::default() })
    }

    /// Logs why it is not told anything, if it wants to be.
    pub fn say_unreached(&self) {
        if let Some(address) = &self.unreached {
            tracing::warn!(
                name: "manager-unreachable",
                "The service manager cannot be told that the server is ready: NOTIFY_SOCKET is {address}. \
                 With Type=exec in the unit it does not wait for that."
            );
        }
    }

    /// The listening sockets that it has passed.
    pub fn sockets(&self) -> &[GivenSocket] {
        &self.sockets
    }

    /// The same, to be kept: once.
    pub fn take_sockets(&mut self) -> Vec<GivenSocket> {
        std::mem::take(&mut self.sockets)
    }

    /// How often [`Service::report`] is to be called. None: never.
    pub fn interval(&self) -> Option<Duration> {
        self.socket.as_ref()?;
        Some(self.watchdog.map_or(STATUS_EVERY, |time| STATUS_EVERY.min(time / 2)))
    }

    /// The server serves, for the first time or with its new configuration.
    pub fn ready(&mut self) {
        self.tell_unless_ending("READY=1".to_owned());
    }

    /// The server has taken the place of the one that was the service's main process.
    pub fn succeed(&mut self) {
        let watchdog = self.watchdog.map_or(0, |time| time.as_micros());
        self.tell(format!("MAINPID={}\nWATCHDOG_USEC={watchdog}", std::process::id()));
    }

    /// The server reads its configuration again. [`Service::ready`] is to follow.
    pub fn reloading(&mut self) {
        let now = clock_gettime(ClockId::Monotonic);
        let now_us = now.tv_sec as u64 * 1_000_000 + now.tv_nsec as u64 / 1000;
        self.tell_unless_ending(format!("RELOADING=1\nMONOTONIC_USEC={now_us}"));
    }

    /// The server ends.
    pub fn stopping(&mut self) {
        self.tell("STOPPING=1".to_owned());
        self.is_ending = true;
    }

    /// Another process takes the place of this one, which ends. What that one says of the watchdog holds;
    /// until then there is none.
    pub fn hand_over(&mut self, successor: u32) {
        self.tell(format!("MAINPID={successor}\nWATCHDOG_USEC=0"));
        // Nothing more is to be heard of this process.
        self.watchdog = None;
        if self.unsent.is_empty() {
            self.socket = None;
        }
    }

    /// The server cannot start yet: its manager is to wait for longer.
    pub fn wait(&mut self, why: &str) {
        if self.extended.is_some_and(|at| at.elapsed() < EXTEND_EVERY) {
            return;
        }
        self.extended = Some(Instant::now());
        self.say(&format!("Waiting: {why}"), &format!("EXTEND_TIMEOUT_USEC={}", EXTEND_TIMEOUT.as_micros()));
    }

    /// The main loop goes on. The status is a line for people, and sent if it is another one than before.
    pub fn report(&mut self, status: &str) {
        self.send_rest();
        self.say(status, if self.watchdog.is_some() { "WATCHDOG=1" } else { "" });
    }

    /// Sends a status if it is new, and a line. If there is no room for them, the next ones do.
    fn say(&mut self, status: &str, line: &str) {
        let mut text = line.to_owned();
        let is_new = self.status != status;
        if is_new {
            // A name with a line feed is not to begin a line of its own.
            let status = status.replace(char::is_control, " ");
            text = format!("STATUS={status}\n{text}");
        }
        if !text.is_empty() && self.send(&text) && is_new {
            status.clone_into(&mut self.status);
        }
    }

    /// The manager does not hear of a reload behind the end.
    fn tell_unless_ending(&mut self, text: String) {
        if !self.is_ending {
            self.tell(text);
        }
    }

    /// Sends what must not get lost.
    fn tell(&mut self, text: String) {
        if self.unsent.len() < UNSENT_MAX {
            self.unsent.push_back(text);
        }
        self.send_rest();
    }

    fn send_rest(&mut self) {
        while let Some(text) = self.unsent.front()
            && self.send(text)
        {
            self.unsent.pop_front();
        }
    }

    /// Sends a message. False: the manager is busy.
    fn send(&self, text: &str) -> bool {
        let Some(socket) = &self.socket else { return true };
        let sent = send(socket, text.as_bytes(), SendFlags::DONTWAIT | SendFlags::NOSIGNAL);
        // A manager that has gone does not come back on this socket.
        !matches!(sent, Err(rustix::io::Errno::AGAIN | rustix::io::Errno::NOBUFS | rustix::io::Errno::INTR))
    }
}

/// A socket that is connected to the one at an address of `NOTIFY_SOCKET`.
fn reach(address: &OsStr) -> io::Result<OwnedFd> {
    let address = match address.as_bytes() {
        [b'@', name @ ..] => SocketAddrUnix::new_abstract_name(name)?,
        path @ [b'/', ..] => SocketAddrUnix::new(path)?,
        _ => {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it is neither a path nor the name of an abstract socket",
            ));
        }
    };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::DGRAM, flags, None)?;
    connect(&socket, &address)?;
    Ok(socket)
}

/// Takes this number of descriptors. `names` are those of LISTEN_FDNAMES, for messages.
fn take_sockets(count: u64, names: &OsStr) -> anyhow::Result<Vec<GivenSocket>> {
    ensure!(
        count <= HANDED_OVER_MAX as u64,
        "The service manager passes {count} sockets (LISTEN_FDS), more than {HANDED_OVER_MAX}. Listen on \
         fewer addresses in the .socket units of this service."
    );
    let names = names.to_string_lossy();
    let mut names = names.split(':').filter(|name| !name.is_empty());
    let take = |number| {
        let name = names.next().map_or(format!("descriptor {number}"), |name| format!("{name:?}"));
        let cannot = || format!("The service manager passes {name}, which cannot be taken");
        let socket = passed_descriptor(number).with_context(cannot)?;
        let Some((endpoint, given)) = GivenSocket::of_manager(socket) else {
            bail!(
                "The service manager passes {name}, which is no listening stream socket. In the .socket \
                 units of this service write ListenStream=, and Accept=no."
            )
        };
        tcp::adopt(&given.socket, &endpoint).with_context(cannot)?;
        Ok(given)
    };
    (FIRST_DESCRIPTOR..).take(count as usize).map(take).collect()
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram};

    use super::*;

    fn service(variables: &[(&str, &str)]) -> Service {
        let variable = |name: &str| {
            variables.iter().find(|(there, _)| *there == name).map(|(_, value)| OsString::from(value))
        };
        Service::find_by(7, variable).expect("no sockets are passed")
    }

    /// A manager that listens, and its address.
    fn manager(directory: &tempfile::TempDir) -> (UnixDatagram, String) {
        let path = directory.path().join("notify");
        let manager = UnixDatagram::bind(&path).unwrap();
        manager.set_nonblocking(true).unwrap();
        (manager, path.to_str().unwrap().to_owned())
    }

    fn heard(manager: &UnixDatagram) -> Option<String> {
        let mut buffer = [0; 1024];
        let count = manager.recv(&mut buffer).ok()?;
        Some(String::from_utf8(buffer[..count].to_vec()).unwrap())
    }

    #[test]
    fn a_server_that_was_started_by_nobody_says_nothing() {
        let mut service = service(&[("WATCHDOG_USEC", "1000")]);
        assert_eq!(service.interval(), None);
        service.ready();
        service.report("Serving");
        assert!(service.unsent.is_empty() && service.sockets().is_empty());
    }

    #[test]
    fn the_manager_hears_each_step_and_a_status_only_when_it_is_new() {
        let directory = tempfile::tempdir().unwrap();
        let (manager, address) = manager(&directory);
        let mut service = service(&[("NOTIFY_SOCKET", &address)]);
        assert_eq!(service.interval(), Some(STATUS_EVERY));
        service.wait("process 1 completes the requests in flight");
        service.wait("process 1 completes the requests in flight");
        let text = heard(&manager).unwrap();
        assert!(text.starts_with("STATUS=Waiting: process 1") && text.contains("\nEXTEND_TIMEOUT_USEC="));
        service.ready();
        assert_eq!(heard(&manager).unwrap(), "READY=1");
        service.report("Serving a\nMAINPID=1");
        assert_eq!(heard(&manager).unwrap(), "STATUS=Serving a MAINPID=1\n");
        service.report("Serving a\nMAINPID=1");
        service.reloading();
        let text = heard(&manager).unwrap();
        assert!(text.starts_with("RELOADING=1\nMONOTONIC_USEC="), "{text}");
        service.stopping();
        assert_eq!(heard(&manager).unwrap(), "STOPPING=1");
        service.ready();
        assert_eq!(heard(&manager), None);
    }

    #[test]
    fn the_watchdog_is_this_processes_or_every_ones() {
        let directory = tempfile::tempdir().unwrap();
        let (manager, address) = manager(&directory);
        let with = |pid: &[(&str, &str)]| {
            let all = [&[("NOTIFY_SOCKET", address.as_str()), ("WATCHDOG_USEC", "100000")], pid].concat();
            service(&all)
        };
        assert_eq!(with(&[("WATCHDOG_PID", "8")]).interval(), Some(STATUS_EVERY));
        assert_eq!(with(&[("WATCHDOG_PID", "7")]).interval(), Some(Duration::from_millis(50)));
        let mut service = with(&[]);
        service.report("Serving");
        assert_eq!(heard(&manager).unwrap(), "STATUS=Serving\nWATCHDOG=1");
        service.report("Serving");
        assert_eq!(heard(&manager).unwrap(), "WATCHDOG=1");
        service.hand_over(9);
        assert_eq!(heard(&manager).unwrap(), "MAINPID=9\nWATCHDOG_USEC=0");
        service.report("Draining");
        service.stopping();
        assert_eq!(heard(&manager), None);
    }

    #[test]
    fn a_manager_that_is_busy_hears_later_what_must_not_get_lost() {
        let directory = tempfile::tempdir().unwrap();
        let (manager, address) = manager(&directory);
        let mut service = service(&[("NOTIFY_SOCKET", &address)]);
        // Until the manager's queue is full.
        while service.send("X=1") {}
        service.ready();
        service.report("Serving");
        while heard(&manager).is_some_and(|text| text == "X=1") {}
        service.report("Serving");
        assert_eq!(heard(&manager).unwrap(), "READY=1");
        assert_eq!(heard(&manager).unwrap(), "STATUS=Serving\n");
    }

    #[test]
    fn abstract_addresses_are_reached_and_other_ones_are_not() {
        let name = format!("raio-service-test-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let manager = UnixDatagram::bind_addr(&address).unwrap();
        service(&[("NOTIFY_SOCKET", &format!("@{name}"))]).ready();
        assert_eq!(heard(&manager).unwrap(), "READY=1");
        for address in ["vsock:2:1", "relative", "/no/such/socket"] {
            assert_eq!(service(&[("NOTIFY_SOCKET", address)]).interval(), None, "{address}");
        }
    }

    #[test]
    fn sockets_of_another_process_are_not_taken_and_too_many_are_an_error() {
        assert!(service(&[("LISTEN_FDS", "1"), ("LISTEN_PID", "8")]).sockets().is_empty());
        let error = take_sockets(253, OsStr::new("")).unwrap_err().to_string();
        assert!(error.contains("253 sockets"), "{error}");
    }
}
