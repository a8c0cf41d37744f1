//! Ctrl-C: it ends the program with exit code 130, at once, or after a command has left its work in a state
//! from which it can go on.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::SIGINT;
use signal_hook::flag;

use crate::failure::{Failure, Kind};

/// Whether the user has pressed Ctrl-C. Cheap to clone; any thread may look at it.
#[derive(Clone, Debug, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// Has the first Ctrl-C set a flag, which the command looks at, and the second one end the program.
    /// Otherwise the first one ends it.
    pub fn install(is_graceful: bool) -> io::Result<Self> {
        let ends = Arc::new(AtomicBool::new(!is_graceful));
        let pressed = Arc::new(AtomicBool::new(false));
        // The order matters: only a flag that was set before ends the program.
        flag::register_conditional_shutdown(SIGINT, Kind::Interrupted as i32, Arc::clone(&ends))?;
        flag::register(SIGINT, ends)?;
        flag::register(SIGINT, Arc::clone(&pressed))?;
        Ok(Self(pressed))
    }

    /// Fails once it was pressed.
    pub fn check(&self) -> Result<(), Failure> {
        if self.0.load(Ordering::Relaxed) {
            return Err(Failure::of(Kind::Interrupted, "Interrupted."));
        }
        Ok(())
    }
}
