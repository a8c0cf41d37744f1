//! The contract: what every transport promises, as one suite that runs over each of them: in-process, TCP
//! over io_uring, with spinning and without, TCP over epoll, TLS, TLS in the server's kernel where that has
//! it, Unix sockets, RDMA by rdma_cm and RDMA that began as TCP where there is a device. A test is written
//! once, with [`contract!`], and appears nine times.
//!
//! [`harness`] is a real server (a reactor, a transport and a small handler of opaque commands, in a thread)
//! and [`raw`] a peer that can misbehave. The server's handler asserts that credits are never exceeded, in
//! every test.

/// Writes down a test of the contract, and runs it over every transport.
macro_rules! contract {
    ($($(#[$attribute:meta])* fn $name:ident($transport:ident) $body:block)*) => {
        $(
            $(#[$attribute])*
            fn $name($transport: crate::harness::Transport) $body

            mod $name {
                #[test]
                fn pair() {
                    super::$name(crate::harness::Transport::Loopback);
                }

                #[test]
                fn tcp_over_io_uring() {
                    if crate::harness::has_io_uring() {
                        super::$name(crate::harness::Transport::TcpUring);
                    }
                }

                #[test]
                fn tcp_spinning() {
                    if crate::harness::has_io_uring() {
                        super::$name(crate::harness::Transport::TcpSpinning);
                    }
                }

                #[test]
                fn tcp_over_epoll() {
                    super::$name(crate::harness::Transport::TcpEpoll);
                }

                #[test]
                fn tls() {
                    if crate::harness::has_io_uring() {
                        super::$name(crate::harness::Transport::Tls);
                    }
                }

                #[test]
                fn kernel_tls() {
                    if crate::harness::has_kernel_tls() {
                        super::$name(crate::harness::Transport::KernelTls);
                    }
                }

                #[test]
                fn unix() {
                    if crate::harness::has_io_uring() {
                        super::$name(crate::harness::Transport::Unix);
                    }
                }

                #[test]
                fn rdma() {
                    if crate::harness::has_rdma() {
                        super::$name(crate::harness::Transport::Rdma);
                    }
                }

                #[test]
                fn rdma_after_tcp() {
                    if crate::harness::has_rdma() {
                        super::$name(crate::harness::Transport::RdmaAfterTcp);
                    }
                }
            }
        )*
    };
}

mod credits;
mod dial;
mod handshake;
mod harness;
mod hostile_client;
mod hostile_server;
mod keepalive;
mod ktls;
mod ordinary;
mod push;
#[path = "../random/mod.rs"]
mod random;
mod raw;
mod rdma;
mod rdma_end;
mod slow;
mod tls;
mod tls_peer;
mod tls_scan;
mod unreachable;
mod upgrade;
mod vanishing;
