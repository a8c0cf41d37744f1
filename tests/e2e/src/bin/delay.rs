//! `delay ADDRESS MILLISECONDS`: a TCP proxy on loopback for a server. All that it passes takes this long, in
//! either direction. Prints its address, and runs until it is killed.

use std::error::Error;
use std::net::SocketAddr;
use std::time::Duration;

use raio_e2e::{Proxy, Treatment};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [server, milliseconds] = &arguments[..] else {
        return Err("usage: delay ADDRESS MILLISECONDS".into());
    };
    let delay = Duration::from_secs_f64(milliseconds.parse::<f64>()? / 1e3);
    let proxy = Proxy::start(server.parse::<SocketAddr>()?);
    proxy.treat(Treatment { delay, ..Treatment::default() });
    println!("{}", proxy.address());
    loop {
        std::thread::park();
    }
}
