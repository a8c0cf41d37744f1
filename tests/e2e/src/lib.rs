//! What the end-to-end tests share: a real `raio_server` in a process of its own, clients of all kinds, loop
//! devices, file systems that hang, hosts with a cable between them, sandboxes, the RDMA wire.
//!
//! Everything is stopped and taken down when its value is dropped, so that a failed test leaves nothing
//! behind.

mod cable;
mod crowd;
mod device;
mod flood;
mod fuse;
mod held;
mod herd;
#[path = "../../history/mod.rs"]
mod history;
mod keyed;
mod ktls;
mod letters;
mod names;
mod operation;
mod proxy;
#[path = "../../random/mod.rs"]
mod random;
mod raw;
mod sandbox;
mod server;
mod site;
mod wire;

pub use cable::{Cable, End};
pub use crowd::Crowd;
pub use device::{Frozen, LoopDevice, Mounted, needs_root};
pub use flood::{Flood, Hostile};
pub use fuse::{FuseCall, FuseFs, FuseOptions};
pub use held::HeldThread;
pub use herd::{Demand, Herd, Restless};
pub use history::cells::{
    CELL_BYTES, CellPlace, CellValue, FILE_CELLS, FILES, INITIAL, decode_cell, encode_cell, monotonic_ns,
};
pub use history::{
    CellRead, CellWrite, CrashImage, FOREVER, Fault, FileSync, History, HistoryCounts, LogLine, Outcome,
    SESSION_GIVEN_UP, Violation, WRITES_LOST,
};
pub use keyed::KeyedServer;
pub use ktls::no_kernel_tls;
pub use letters::{LETTER_BYTES, LETTERS, Letters};
pub use names::change_names;
pub use operation::{carry_out, completion};
pub use proxy::{Direction, Ending, Proxy, Treatment};
pub use random::{Random, seed};
pub use raw::{Raw, request as raw_request};
pub use sandbox::sandboxed;
pub use server::{
    PATIENCE, Server, await_http, await_log, await_no_connection, binary, copy_program, cpu_time, is_at_rest,
    load_command,
};
pub use site::{Client, Site, pin};
pub use wire::{
    Cut, LISTEN, NUMBERS_BYTES, Replug, Shaped, Silenced, TCP, needs_wire, numbers, replug, resources,
    resources_return_to,
};

/// The number in this variable of the environment, or this one.
pub fn number(variable: &str, default: usize) -> usize {
    std::env::var(variable)
        .map_or(default, |text| text.parse().unwrap_or_else(|_| panic!("{variable} is a number")))
}
