//! Two hosts and a cable between them that can be pulled out.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::device::{needs_root, run};

/// An end of a [`Cable`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// 10.78.0.1
    A,
    /// 10.78.0.2
    B,
}

/// Two network namespaces with an address each, joined by way of a third one that stands for the cable. All
/// are removed when this is dropped. Other tests have cables of their own, with the same addresses.
pub struct Cable {
    id: String,
}

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Runs ip(8) in a network namespace.
fn ip(namespace: &str, arguments: &str) {
    let arguments: Vec<_> = arguments.split(' ').collect();
    run("ip", &[&["-n", namespace], &arguments[..]].concat());
}

fn link_address(end: End) -> &'static str {
    match end {
        End::A => "02:00:00:00:78:01",
        End::B => "02:00:00:00:78:02",
    }
}

impl Cable {
    /// One that is plugged in. Where there can be none, says that `what` is skipped.
    pub fn new(what: &str) -> Option<Self> {
        if !needs_root(what) {
            return None;
        }
        let id = format!("raio-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let this = Self { id };
        let middle = this.middle();
        run("ip", &["netns", "add", &middle]);
        ip(&middle, "link add cable type bridge");
        ip(&middle, "link set cable up");
        for (end, other) in [(End::A, End::B), (End::B, End::A)] {
            let host = this.host(end);
            run("ip", &["netns", "add", &host]);
            let peer = format!("name eth0 address {} netns {host}", link_address(end));
            ip(&middle, &format!("link add {end:?} type veth peer {peer}"));
            ip(&middle, &format!("link set {end:?} master cable up"));
            ip(&host, &format!("address add {}/24 dev eth0", this.address(end)));
            ip(&host, "link set eth0 up");
            ip(&host, "link set lo up");
            // A host that had to ask for the other's link address would keep what is sent while the cable is
            // pulled for as long as it asks, three seconds, and send it when the cable is plugged in again,
            // also for a program that has ended. What is sent here is lost.
            let (address, link_address) = (this.address(other), link_address(other));
            ip(&host, &format!("neighbour add {address} lladdr {link_address} dev eth0 nud permanent"));
        }
        Some(this)
    }

    fn middle(&self) -> String {
        format!("{}-cable", self.id)
    }

    fn host(&self, end: End) -> String {
        format!("{}-{end:?}", self.id)
    }

    /// The address of the host at this end.
    pub fn address(&self, end: End) -> &'static str {
        match end {
            End::A => "10.78.0.1",
            End::B => "10.78.0.2",
        }
    }

    /// A command that runs a program on the host at this end. Add the program's arguments to it.
    pub fn command(&self, end: End, program: impl AsRef<OsStr>) -> Command {
        // It sees mounts of its own, as a service does that is kept apart: other ids of them at each start.
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.host(end)]).arg(program);
        command
    }

    /// Does something on the host at this end, in a thread of its own. Sockets that it makes stay there.
    pub fn on<T: Send>(&self, end: End, act: impl FnOnce() -> T + Send) -> T {
        let namespace =
            File::open(Path::new("/run/netns").join(self.host(end))).expect("a network namespace");
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let network = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), network).expect("root may move");
                act()
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Changes the address of the host at end B, as a new DHCP lease or another network does.
    pub fn renumber(&self) {
        let host = self.host(End::B);
        ip(&host, "address flush dev eth0");
        ip(&host, "address add 10.78.0.3/24 dev eth0");
    }

    /// Pulls it out: both hosts lose the carrier, and keep addresses, routes and connections.
    pub fn pull(&self) {
        self.set("down");
    }

    /// Plugs it in again.
    pub fn plug(&self) {
        self.set("up");
    }

    fn set(&self, state: &str) {
        for port in ["A", "B"] {
            ip(&self.middle(), &format!("link set {port} {state}"));
        }
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        for namespace in [self.middle(), self.host(End::A), self.host(End::B)] {
            let _ = Command::new("ip").args(["netns", "delete", &namespace]).status();
        }
    }
}
