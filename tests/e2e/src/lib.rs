//! What the end-to-end tests share: a real `raio_server` in a process of its own, and loop devices.
//!
//! Everything is stopped and taken down when its value is dropped, so that a failed test leaves nothing behind.

mod device;
mod server;

pub use device::{LoopDevice, Mounted, needs_root};
pub use server::{Server, binary};
