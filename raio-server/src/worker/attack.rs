//! For tests: what a worker could do that is no longer the server's own, by system calls and through its
//! ring. It is not in a server that anybody uses: builds have it only with a feature that the tests turn on,
//! and with debug assertions.

use std::io;

use super::Worker;
use crate::log;

/// With this in its environment, a server attacks.
const VARIABLE: &str = "RAIO_TEST_ATTACK";

/// The errno of a call, 0 if it succeeded.
fn errno(result: libc::c_long) -> i32 {
    if result >= 0 { 0 } else { io::Error::last_os_error().raw_os_error().unwrap_or(-1) }
}

impl Worker {
    /// Tries each attack, if a test asks for it, and prints the name and the errno of each.
    pub fn attack(&mut self) {
        if std::env::var_os(VARIABLE).is_none() {
            return;
        }
        for (name, errno) in self.reactor.attempt_through_ring() {
            log::print(&format!("attack through the ring: {name} {errno}"));
        }
        for (name, errno) in by_calls() {
            log::print(&format!("attack by a call: {name} {errno}"));
        }
    }
}

/// Calls that do no harm where they succeed.
fn by_calls() -> Vec<(&'static str, i32)> {
    let mut rings = [0u64; 15];
    let null = std::ptr::null::<libc::c_void>();
    let open = |path: &std::ffi::CStr, flags: libc::c_int| {
        // SAFETY: the path is a string. A descriptor that comes of it is leaked, for a test.
        errno(unsafe { libc::openat(libc::AT_FDCWD, path.as_ptr(), flags) }.into())
    };
    let call = |number: libc::c_long, arguments: [usize; 4]| {
        let [a, b, c, d] = arguments;
        // SAFETY: pointers among the arguments are null, or to what outlives the call and is large enough.
        errno(unsafe { libc::syscall(number, a, b, c, d) })
    };
    let stream = [libc::AF_INET as usize, libc::SOCK_STREAM as usize, 0, 0];
    let no_program = c"/no/such/program".as_ptr() as usize;
    let page = 4096;
    vec![
        ("open /etc/shadow", open(c"/etc/shadow", libc::O_RDONLY)),
        ("open /proc/self/mem", open(c"/proc/self/mem", libc::O_RDWR)),
        ("create /tmp/raio-attack", open(c"/tmp", libc::O_TMPFILE | libc::O_RDWR)),
        ("execve", call(libc::SYS_execve, [no_program, 0, 0, 0])),
        ("ptrace", call(libc::SYS_ptrace, [libc::PTRACE_PEEKDATA as usize, 0, 0, 0])),
        ("socket", call(libc::SYS_socket, stream)),
        // To nowhere, on what is no socket.
        ("connect", call(libc::SYS_connect, [0, null as usize, 0, 0])),
        ("io_uring_setup", call(libc::SYS_io_uring_setup, [1, rings.as_mut_ptr() as usize, 0, 0])),
        ("mount", call(libc::SYS_mount, [0, 0, 0, 0])),
        ("setuid", call(libc::SYS_setuid, [0, 0, 0, 0])),
        ("unshare", call(libc::SYS_unshare, [0, 0, 0, 0])),
        ("kill", call(libc::SYS_kill, [std::process::id() as usize, 0, 0, 0])),
        ("bpf", call(libc::SYS_bpf, [usize::MAX >> 40, 0, 0, 0])),
        // Of no namespace, and a process that ends at once.
        ("clone3", call(libc::SYS_clone3, [0, 0, 0, 0])),
        ("mprotect to execute", {
            let memory = vec![0u8; 2 * page];
            let aligned = (memory.as_ptr() as usize).next_multiple_of(page);
            let (rw, x) = (libc::PROT_READ | libc::PROT_WRITE, libc::PROT_EXEC);
            let answer = call(libc::SYS_mprotect, [aligned, page, (rw | x) as usize, 0]);
            call(libc::SYS_mprotect, [aligned, page, rw as usize, 0]);
            answer
        }),
    ]
}
