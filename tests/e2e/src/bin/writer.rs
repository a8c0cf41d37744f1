//! `writer URL PATH LETTER`: opens a file, and says so. At each line of its standard input it begins to write
//! every block of it full of this letter, says so, and does not wait. It is there to be stopped and killed.

use std::time::Duration;

use raio::Options;
use raio_e2e::{Letters, PATIENCE};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, path, letter] = &arguments[..] else { return Err("usage: writer URL PATH LETTER".into()) };
    let letter = letter.bytes().next().ok_or("no letter")?;
    let options = Options {
        request_timeout: Some(Duration::from_secs(1)),
        connect_timeout: PATIENCE,
        ..Options::default()
    };
    let mut letters = Letters::connect(url, &[path], &options)?;
    println!("open");
    for line in std::io::stdin().lines() {
        line?;
        letters.begin(0, letter)?;
        println!("begun");
    }
    Ok(())
}
