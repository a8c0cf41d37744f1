//! One operation, from its submission to its end.

use std::time::{Duration, Instant};

use raio::{Completion, Context, Error, File, Operation};

use crate::PATIENCE;

/// Has an operation carried out on a file, in a context in which nothing else is under way. The error says
/// why it was not begun, or why the session has failed.
pub fn carry_out(context: &mut Context, file: &File, operation: Operation) -> Result<Completion, Error> {
    context.submit(file, operation, 0).map_err(|rejected| rejected.error)?;
    completion(context)
}

/// The next completion of a context in which something is under way. The error says why the session has
/// failed.
pub fn completion(context: &mut Context) -> Result<Completion, Error> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        assert!(Instant::now() < deadline, "the operation does not end");
        context.wait(1, 1, Some(Duration::from_millis(100)))?;
        if let Some(completion) = context.next() {
            return Ok(completion);
        }
    }
}
