//! stub
/// x
pub struct Reactor;
/// x
#[derive(Debug)]
pub struct Event;
