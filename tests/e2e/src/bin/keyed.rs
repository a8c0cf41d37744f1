//! `keyed URL PATH`: a client with the key of its environment. It connects, works with a file, and says so.
//! At the next line of its standard input it ends its session, says so, and stays until its input ends.

use raio::{Operation, Options, Session};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, path] = &arguments[..] else { return Err("usage: keyed URL PATH".into()) };
    let mut lines = std::io::stdin().lines();
    work(url, path, || lines.next().transpose().map(drop))?;
    println!("over");
    lines.next();
    Ok(())
}

fn work(
    url: &str,
    path: &str,
    wait: impl FnOnce() -> std::io::Result<()>,
) -> Result<(), Box<dyn std::error::Error>> {
    let session = Session::connect(url, &Options::default())?;
    let file = session.open(path, libc::O_RDONLY, 0)?;
    let mut context = session.context(4)?;
    context.submit(&file, Operation::Fsync { data_only: true }, 0).map_err(|rejected| rejected.error)?;
    while context.wait(1, 1, None)? == 0 {}
    context.next().ok_or("no completion")?.result?;
    println!("connected");
    wait()?;
    Ok(())
}
