//! raio_server: exports directories, files and block devices to raio clients.

#![deny(unsafe_code)]

fn main() -> std::process::ExitCode {
    raio_server::main()
}
