//! Who is at the other end of a Unix socket: what the kernel noted when that end was connected (unix(7)).

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::io::Errno;
use rustix::net::sockopt;

/// The user of a process, as this process's user namespace has its numbers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The effective user ID.
    pub uid: u32,
    /// The effective group ID.
    pub gid: u32,
    /// The supplementary group IDs.
    pub groups: Vec<u32>,
}

impl Credentials {
    /// Of the process that connected the other end of this Unix socket. An error if it is another kind of
    /// socket.
    pub fn of_peer(socket: impl AsFd) -> io::Result<Self> {
        let peer = sockopt::socket_peercred(&socket)?;
        Ok(Self { uid: peer.uid.as_raw(), gid: peer.gid.as_raw(), groups: groups_of_peer(&socket)? })
    }
}

/// SO_PEERGROUPS, which neither rustix nor socket2 has.
fn groups_of_peer(socket: impl AsFd) -> io::Result<Vec<u32>> {
    let fd = socket.as_fd().as_raw_fd();
    let mut groups = vec![0_u32; 32];
    loop {
        let mut len = size_of_val(&*groups) as libc::socklen_t;
        // SAFETY: the kernel writes at most `len` bytes, which `groups` has, and then says in `len` how many
        // there are.
        let result = unsafe {
            libc::getsockopt(
                fd,
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut len,
            )
        };
        let error = io::Error::last_os_error();
        let count = len as usize / size_of::<u32>();
        match result {
            0 => {
                groups.truncate(count);
                return Ok(groups);
            }
            // There are more. They do not change any more.
            _ if error.raw_os_error() == Some(Errno::RANGE.raw_os_error()) && count > groups.len() => {
                groups.resize(count, 0);
            }
            _ => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use rustix::process::{getegid, geteuid, getgroups};

    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let groups = getgroups().unwrap().into_iter().map(|group| group.as_raw()).collect();
        let expected = Credentials { uid: geteuid().as_raw(), gid: getegid().as_raw(), groups };
        assert_eq!(Credentials::of_peer(&one).unwrap(), expected);
    }

    #[test]
    fn a_tcp_socket_has_no_credentials() {
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
        assert!(Credentials::of_peer(&listener).is_err());
    }
}
