//! What the end-to-end tests share: a real `raio_server` in a process of its own, loop devices, the RDMA wire.
//!
//! Everything is stopped and taken down when its value is dropped, so that a failed test leaves nothing behind.

mod device;
mod server;
mod wire;

pub use device::{LoopDevice, Mounted, needs_root};
pub use server::{PATIENCE, Server, binary, cpu_time, is_at_rest};
pub use wire::{Cut, LISTEN, Shaped, needs_wire, resources, resources_return_to};
