//! For tests: a seccomp filter for workers' threads, so that a system call that may wait for a disk or a file
//! system ends the server.
//!
//! It exists in builds with debug assertions only, and is on if `RAIO_TEST_WORKER_FILTER` is set in the
//! environment. What a worker may call is listed here; a call that is missing kills the process with SIGSYS,
//! and `strace -f` (or the kernel's log) says which it was.
//!
//! A filter sees numbers, and neither what a descriptor is nor how long a call takes: close(2) of a file,
//! preadv2(2) without flags, and whatever io_uring_enter(2) does pass it. Tests with file systems that hang
//! therefore look at where the threads wait as well.

use anyhow::Context;
use raio_transport::rdma;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

const ALLOWED: &[libc::c_long] = &[
    // Sockets, which are non-blocking. Closing one does not wait; files are closed by the pool
    // (`engine::Descriptor`).
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_shutdown,
    libc::SYS_close,
    // The reactor.
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    // Clocks, memory, other threads, and the end of this one.
    libc::SYS_clock_gettime,
    libc::SYS_sched_yield,
    libc::SYS_futex,
    libc::SYS_membarrier,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    libc::SYS_rt_sigprocmask,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
];

/// Puts the filter on the calling thread, if a test asks for it. There is none for RDMA, whose library makes
/// calls of its own.
pub fn install() -> anyhow::Result<()> {
    if std::env::var_os("RAIO_TEST_WORKER_FILTER").is_none() || rdma::unavailable().is_none() {
        return Ok(());
    }
    let is = |argument: u8, value: i32| {
        let value = u64::from(value as u32);
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value)
    };
    let only = |argument: u8, value: i32| SeccompRule::new(vec![is(argument, value)?]);
    let has_timeout = SeccompCondition::new(2, SeccompCmpArgLen::Qword, SeccompCmpOp::Ne, 0)?;
    let mut rules = vec![
        // The reactor's eventfd, which takes and gives 8 bytes; and what a panic says.
        (libc::SYS_read, vec![only(2, 8)?]),
        (libc::SYS_write, vec![only(2, 8)?, only(0, libc::STDERR_FILENO)?]),
        // Whether a socket has ended.
        (libc::SYS_ppoll, vec![SeccompRule::new(vec![has_timeout])?]),
        #[cfg(target_arch = "x86_64")]
        (libc::SYS_poll, vec![only(2, 0)?]),
        // What is in the page cache, or else nothing; and files in memory, which know no RWF_NOWAIT.
        (libc::SYS_preadv2, vec![only(5, libc::RWF_NOWAIT)?, only(5, 0)?]),
        // What is cached ([`crate::cached`]); a filter does not see that openat2(2) is told so.
        (libc::SYS_openat2, Vec::new()),
        (libc::SYS_statx, vec![only(2, libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC)?]),
        // Of files whose inodes are in memory.
        (libc::SYS_name_to_handle_at, Vec::new()),
        // The standard library sees to it that a descriptor that it closes is open. No file that a worker
        // opens has flags whose change waits.
        (libc::SYS_fcntl, vec![only(1, libc::F_GETFD)?, only(1, libc::F_SETFL)?]),
    ];
    rules.extend(ALLOWED.iter().map(|&call| (call, Vec::new())));
    // glibc reads /proc/sys/vm/overcommit_memory before it gives back a thread's heap, and does without if it
    // cannot: so it may ask, and gets an error, as would anybody else who opens a file for reading.
    let asks = || {
        let conditions = vec![is(0, libc::AT_FDCWD)?, is(2, libc::O_RDONLY | libc::O_CLOEXEC)?];
        anyhow::Ok((libc::SYS_openat, vec![SeccompRule::new(conditions)?]))
    };
    rules.push(asks()?);
    apply(vec![asks()?], SeccompAction::Allow, SeccompAction::Errno(libc::EACCES as u32))?;
    apply(rules, SeccompAction::KillProcess, SeccompAction::Allow)
}

fn apply(
    rules: Vec<(libc::c_long, Vec<SeccompRule>)>,
    other_calls: SeccompAction,
    these_calls: SeccompAction,
) -> anyhow::Result<()> {
    let rules = rules.into_iter().collect();
    let filter = SeccompFilter::new(rules, other_calls, these_calls, std::env::consts::ARCH.try_into()?)?;
    let program: BpfProgram = filter.try_into()?;
    seccompiler::apply_filter(&program).context("Cannot filter a worker's system calls")
}
