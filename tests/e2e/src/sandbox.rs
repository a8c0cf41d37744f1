//! Programs that are rejected some system calls, as container runtimes and `SystemCallFilter=` do.

use std::path::Path;
use std::process::Command;

use crate::server::binary;

/// A command that runs `program` with a seccomp filter: each of these system calls (`libc::SYS_...`) returns
/// this errno. Add the program's arguments to it.
pub fn sandboxed(program: &Path, denied: &[(libc::c_long, i32)]) -> Command {
    let rules: Vec<String> = denied.iter().map(|(call, errno)| format!("{call}={errno}")).collect();
    let mut command = Command::new(binary("sandboxed"));
    command.arg(rules.join(",")).arg(program);
    command
}
