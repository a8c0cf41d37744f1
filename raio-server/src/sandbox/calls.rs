//! Which system calls there are: a seccomp filter. What is not listed fails with EPERM, and the kernel's
//! audit log says so.
//!
//! Calls of the data path are listed without conditions: the kernel knows from the start that they are
//! allowed, and does not run the filter for them.

use std::collections::BTreeMap;

use anyhow::Context;
use rustix::ioctl::{Opcode, opcode};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};

const ALLOWED: &[libc::c_long] = &[
    // Files.
    #[cfg(target_arch = "x86_64")]
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_close,
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv2,
    libc::SYS_lseek,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_copy_file_range,
    libc::SYS_flock,
    libc::SYS_fcntl,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_statfs,
    libc::SYS_fstatfs,
    libc::SYS_readlinkat,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_readlink,
    libc::SYS_name_to_handle_at,
    // What is new, to the owner that its client has.
    libc::SYS_fchown,
    libc::SYS_fchownat,
    // Exports that are added while the server runs: whether its user may have them, and memory.
    libc::SYS_faccessat2,
    libc::SYS_memfd_create,
    // Names and attributes: of exports, and of the state directory.
    libc::SYS_getdents64,
    #[cfg(not(target_arch = "riscv64"))]
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlinkat,
    libc::SYS_mkdirat,
    libc::SYS_linkat,
    libc::SYS_symlinkat,
    libc::SYS_fchmodat,
    libc::SYS_utimensat,
    libc::SYS_getxattr,
    libc::SYS_listxattr,
    libc::SYS_setxattr,
    libc::SYS_removexattr,
    // Sockets that there are, and those that they accept.
    libc::SYS_accept4,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_shutdown,
    // The reactor.
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_epoll_wait,
    libc::SYS_eventfd2,
    libc::SYS_ppoll,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_poll,
    // Clocks, memory, threads, and what the process asks of itself.
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_clock_nanosleep,
    libc::SYS_nanosleep,
    libc::SYS_gettimeofday,
    libc::SYS_brk,
    libc::SYS_mremap,
    libc::SYS_munmap,
    libc::SYS_madvise,
    libc::SYS_membarrier,
    libc::SYS_futex,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_setaffinity,
    libc::SYS_getcpu,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    libc::SYS_restart_syscall,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_capget,
    libc::SYS_uname,
    libc::SYS_sysinfo,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // See `filter`.
    libc::SYS_clone3,
    // A test puts a filter of its own on each worker: `worker::filter`.
    #[cfg(debug_assertions)]
    libc::SYS_seccomp,
];

/// `struct fsuuid2`.
type FsUuid = [u8; 17];
/// `struct ib_uverbs_ioctl_hdr`.
type VerbsHeader = [u64; 3];

/// FIOCLEX, FIONBIO, BLKSSZGET, FS_IOC_GETFSUUID and RDMA_VERBS_IOCTL.
const IOCTLS: [Opcode; 5] = [
    libc::FIOCLEX as Opcode,
    libc::FIONBIO as Opcode,
    opcode::none(0x12, 104),
    opcode::read::<FsUuid>(0x15, 0),
    opcode::read_write::<VerbsHeader>(0x1b, 1),
];

const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET;

/// Argument number `argument` is this, where these bits count.
fn masked(argument: u8, mask: u64, value: u64) -> anyhow::Result<SeccompRule> {
    let op = SeccompCmpOp::MaskedEq(mask);
    Ok(SeccompRule::new(vec![SeccompCondition::new(argument, SeccompCmpArgLen::Qword, op, value)?])?)
}

/// A 32-bit argument is this.
fn is(argument: u8, value: u32) -> anyhow::Result<SeccompRule> {
    let condition =
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, u64::from(value))?;
    Ok(SeccompRule::new(vec![condition])?)
}

/// What may be called, and with what, by the process with this id.
fn rules(pid: u32) -> anyhow::Result<BTreeMap<libc::c_long, Vec<SeccompRule>>> {
    let mut rules: BTreeMap<_, _> = ALLOWED.iter().map(|&call| (call, Vec::new())).collect();
    let no_code = || masked(2, libc::PROT_EXEC as u64, 0);
    rules.insert(libc::SYS_mmap, vec![no_code()?]);
    rules.insert(libc::SYS_mprotect, vec![no_code()?]);
    let ioctls = IOCTLS.iter().map(|&opcode| is(1, opcode)).collect::<anyhow::Result<_>>()?;
    rules.insert(libc::SYS_ioctl, ioctls);
    // Threads, and no processes.
    let thread = libc::CLONE_THREAD as u64;
    rules.insert(libc::SYS_clone, vec![masked(0, thread | NAMESPACES as u64, thread)?]);
    // Their names.
    let mut prctls = vec![is(0, libc::PR_SET_NAME as u32)?];
    if cfg!(debug_assertions) {
        prctls.push(is(0, libc::PR_SET_NO_NEW_PRIVS as u32)?);
    }
    rules.insert(libc::SYS_prctl, prctls);
    // abort(3).
    rules.insert(libc::SYS_tgkill, vec![is(0, pid)?]);
    // To ask for a limit, and not to set it.
    rules.insert(libc::SYS_prlimit64, vec![masked(2, u64::MAX, 0)?]);
    Ok(rules)
}

/// Puts the filter on all threads of this process. Returns how many calls it allows.
pub fn filter() -> anyhow::Result<usize> {
    let compile = |rules, otherwise, action| -> anyhow::Result<BpfProgram> {
        let arch = std::env::consts::ARCH.try_into().context("its author knows no such processor")?;
        Ok(SeccompFilter::new(rules, otherwise, action, arch)?.try_into()?)
    };
    // The filter cannot see what clone3(2) is to make, so there is none: the C library uses clone(2) then.
    let no_clone3 = compile(
        [(libc::SYS_clone3, Vec::new())].into(),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS as u32),
    )?;
    let rules = rules(std::process::id())?;
    let count = rules.len() - 1;
    let server = compile(rules, SeccompAction::Errno(libc::EPERM as u32), SeccompAction::Allow)?;
    apply(&no_clone3, 0)?;
    apply(&server, libc::SECCOMP_FILTER_FLAG_LOG)?;
    Ok(count)
}

/// Puts a filter on all threads. There must be no new privileges.
fn apply(program: &BpfProgram, flags: libc::c_ulong) -> anyhow::Result<()> {
    let program = libc::sock_fprog {
        len: u16::try_from(program.len())?,
        filter: program.as_ptr().cast::<libc::sock_filter>().cast_mut(),
    };
    // SAFETY: the program has this number of instructions, and the kernel copies them and changes nothing.
    // seccompiler's instructions have the layout of the kernel's, as the assertion below says.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            flags | libc::SECCOMP_FILTER_FLAG_TSYNC,
            &raw const program,
        )
    };
    match result {
        0 => Ok(()),
        -1 => Err(std::io::Error::last_os_error().into()),
        thread => anyhow::bail!("thread {thread} has a filter of its own"),
    }
}

const _: () = assert!(size_of::<seccompiler::sock_filter>() == size_of::<libc::sock_filter>());

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_allowed_that_makes_processes_sockets_rings_or_mounts() {
        let rules = rules(1).unwrap();
        for call in [
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_io_uring_setup,
            libc::SYS_mount,
            libc::SYS_setuid,
            libc::SYS_unshare,
            libc::SYS_kill,
            libc::SYS_bpf,
            libc::SYS_open_by_handle_at,
            libc::SYS_process_vm_readv,
            libc::SYS_truncate,
            libc::SYS_mknodat,
            libc::SYS_fchmod,
        ] {
            assert!(!rules.contains_key(&call), "{call}");
        }
        for call in [libc::SYS_clone, libc::SYS_mmap, libc::SYS_ioctl, libc::SYS_prlimit64] {
            assert!(!rules[&call].is_empty(), "{call} has conditions");
        }
    }

    #[test]
    fn calls_of_the_data_path_have_no_conditions() {
        let rules = rules(1).unwrap();
        for call in [
            libc::SYS_io_uring_enter,
            libc::SYS_preadv2,
            libc::SYS_sendmsg,
            libc::SYS_recvfrom,
            libc::SYS_ppoll,
            libc::SYS_futex,
            libc::SYS_write,
        ] {
            assert!(rules[&call].is_empty(), "{call}");
        }
    }

    #[test]
    fn ioctls_are_those_of_the_kernels_headers() {
        assert_eq!(IOCTLS, [0x5451, 0x5421, 0x1268, 0x8011_1500, 0xc018_1b01]);
    }
}
