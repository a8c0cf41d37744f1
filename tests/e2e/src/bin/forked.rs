//! `forked URL PATH`: forks with I/O in flight. The child tries each call on its parent's session, file and
//! context, and drops them; the parent goes on afterwards. Fails if one of the child's calls does anything
//! but fail, or the parent's I/O does not end well.

use std::time::Duration;

use raio::{Buffer, Buffers, Context, File, Operation, Options, Region, Session, Ticket};

const IN_FLIGHT: u64 = 8;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, path] = &arguments[..] else { return Err("usage: forked URL PATH".into()) };
    let session = Session::connect(url, &Options::default())?;
    let file = session.open(path, libc::O_RDWR, 0)?;
    let mut context = session.context(2 * IN_FLIGHT as usize)?;
    let mut last = None;
    for n in 0..IN_FLIGHT {
        last = Some(context.submit(&file, read(n), n).map_err(|rejected| rejected.error)?);
        // Half of them stay queued: the child must not send them.
        if n == IN_FLIGHT / 2 {
            context.flush();
        }
    }
    // SAFETY: this process has one thread.
    match unsafe { libc::fork() } {
        -1 => return Err(std::io::Error::last_os_error().into()),
        0 => {
            child(session, file, context, last.ok_or("no ticket")?);
            return Ok(());
        }
        _ => {}
    }
    let (_, status) = rustix::process::wait(rustix::process::WaitOptions::empty())?.ok_or("no child")?;
    if status.exit_status() != Some(0) {
        return Err(format!("the child has ended with {status:?}").into());
    }
    let mut ended = 0;
    while ended < IN_FLIGHT {
        context.wait(1, usize::MAX, Some(Duration::from_secs(20)))?;
        let completion = context.next().ok_or("nothing has come")?;
        assert_eq!(completion.result, Ok(4096));
        ended += 1;
    }
    assert!(file.status()?.size.get() > 0);
    file.close()?;
    context.close();
    Ok(())
}

fn read(n: u64) -> Operation {
    Operation::Read { offset: n * 4096, buffers: Buffers::One(Buffer::Owned(vec![0; 4096].into())) }
}

fn child(session: Session, file: File, mut context: Context, ticket: Ticket) {
    let mut memory = vec![0u8; 4096];
    // SAFETY: the memory outlives the context, which goes first.
    let region = unsafe { Region::new(memory.as_mut_ptr(), memory.len()) }.expect("a region");
    context.flush();
    assert_eq!(context.submit(&file, read(0), 0).unwrap_err().error.errno(), libc::EINVAL);
    assert_eq!(context.wait(1, 1, Some(Duration::from_secs(20))).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(context.cancel(ticket).unwrap_err().errno(), libc::EINVAL);
    assert_eq!(context.poll_fd().unwrap_err().errno(), libc::EINVAL);
    assert_eq!(context.register(&region).unwrap_err().errno(), libc::EINVAL);
    context.unregister(&region);
    assert_eq!(session.open("/e/file", libc::O_RDONLY, 0).unwrap_err().errno(), libc::EBADF);
    assert_eq!(session.context(1).unwrap_err().errno(), libc::EBADF);
    assert_eq!(file.status().unwrap_err().errno(), libc::EBADF);
    assert_eq!(file.close().unwrap_err().errno(), libc::EBADF);
    session.stop();
    context.close();
    drop((file, session));
}
