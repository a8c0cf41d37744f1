//! `sandboxed CALL=ERRNO,... PROGRAM ARGUMENT...`: becomes this program, with a seccomp filter that answers
//! these system calls (numbers) with these errnos.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt;
use std::process::Command;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, apply_filter};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let (Some(rules), Some(program)) = (arguments.next(), arguments.next()) else {
        return Err("usage: sandboxed CALL=ERRNO,... PROGRAM ARGUMENT...".into());
    };
    let mut calls_by_errno: BTreeMap<u32, BTreeMap<i64, Vec<_>>> = BTreeMap::new();
    for rule in rules.split(',') {
        let (call, errno) = rule.split_once('=').ok_or("a rule is CALL=ERRNO")?;
        calls_by_errno.entry(errno.parse()?).or_default().insert(call.parse()?, Vec::new());
    }
    // A filter knows one errno; filters add up.
    for (errno, calls) in calls_by_errno {
        let filter = SeccompFilter::new(
            calls,
            SeccompAction::Allow,
            SeccompAction::Errno(errno),
            std::env::consts::ARCH.try_into()?,
        )?;
        let filter: BpfProgram = filter.try_into()?;
        apply_filter(&filter)?;
    }
    Err(Command::new(program).args(arguments).exec().into())
}
