//! O_DIRECT requests and the devices that they are for.
//!
//! Each file has a [`DispatchLimiter`], which says how many of its requests its device gets at a time. Here
//! is what a worker knows of all of them: how many devices have, and which have reported.

use std::rc::Rc;

use raio_transport::memory::Slot;

use crate::request::WorkerFile;
use crate::tuning::device::SUBMIT_BATCH;

#[cfg(doc)]
use crate::device_queue::DispatchLimiter;

/// See the module documentation.
#[derive(Debug, Default)]
pub struct DeviceQueues {
    /// Requests that devices have.
    in_flight: usize,
    /// Files whose devices have reported, and have not yet got more.
    reported: Vec<Rc<WorkerFile>>,
}

impl DeviceQueues {
    /// Takes in a request with its memory, which comes back if the request is to begin now. If not it is held
    /// until [`DeviceQueues::begin_next`] or [`DeviceQueues::take_back`].
    pub fn admit(&mut self, file: &WorkerFile, request: usize, slot: Slot) -> Option<Slot> {
        let slot = file.device_queue.borrow_mut().admit(request, slot)?;
        self.in_flight += 1;
        Some(slot)
    }

    /// Whether what has begun is to go to the kernel now: the device starts on it while the kernel takes in
    /// the others.
    pub fn should_submit(&self, file: &WorkerFile) -> bool {
        self.in_flight.is_multiple_of(SUBMIT_BATCH) && file.device_queue.borrow().coalesces_completions()
    }

    /// A request that had begun has ended.
    pub fn ended(&mut self, file: &Rc<WorkerFile>) {
        self.in_flight -= 1;
        if file.device_queue.borrow_mut().ended() {
            self.reported.push(Rc::clone(file));
        }
    }

    /// The next file whose device has reported, all that has ended at the time taken in, and is to get
    /// [`DeviceQueues::due`].
    pub fn next_reported(&mut self) -> Option<Rc<WorkerFile>> {
        let file = self.reported.pop()?;
        file.device_queue.borrow_mut().on_batch_complete();
        Some(file)
    }

    /// The next request that this file's device is to get.
    pub fn due(&self, file: &WorkerFile) -> Option<usize> {
        file.device_queue.borrow().due()
    }

    /// Takes out [`DeviceQueues::due`], which is to begin now.
    pub fn begin_next(&mut self, file: &WorkerFile) -> Option<(usize, Slot)> {
        let next = file.device_queue.borrow_mut().next()?;
        self.in_flight += 1;
        Some(next)
    }

    /// Takes out a request that is held. Returns its memory; None if it is not.
    pub fn take_back(&self, file: &WorkerFile, request: usize) -> Option<Slot> {
        file.device_queue.borrow_mut().take_back(request)
    }

    /// Requests that devices have: so many may end later than one.
    pub fn in_flight(&self) -> usize {
        self.in_flight
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use raio_transport::memory::Arena;
    use raio_transport::protocol::FileHandle;

    use super::*;
    use crate::session::{Access, OpenFile};
    use crate::volume::Null;

    const DEPTH: usize = 32;

    fn file(handle: u32) -> Rc<WorkerFile> {
        let open = OpenFile::of_volume(Null::new(0), Access { read: true, write: true });
        Rc::new(WorkerFile::new(FileHandle(handle), Arc::new(open)))
    }

    /// Requests for a file. Returns how many of them begin.
    fn admit(queues: &mut DeviceQueues, arena: &mut Arena, file: &WorkerFile, requests: usize) -> usize {
        let mut slots = (0..requests).map(|_| arena.alloc(512).unwrap());
        (0..requests).filter(|&request| queues.admit(file, request, slots.next().unwrap()).is_some()).count()
    }

    #[test]
    fn a_device_that_reports_everything_at_once_gets_what_was_held_back_and_no_other_does() {
        let mut arena = Arena::new(1 << 20, 4096).unwrap();
        let mut queues = DeviceQueues::default();
        let (late, other) = (file(1), file(2));
        assert_eq!(admit(&mut queues, &mut arena, &late, DEPTH), DEPTH);
        assert_eq!(admit(&mut queues, &mut arena, &other, 1), 1);
        assert!(!queues.should_submit(&late), "nothing is known of it yet");
        (0..DEPTH).for_each(|_| queues.ended(&late));
        assert!(Rc::ptr_eq(&queues.next_reported().unwrap(), &late));
        assert!(queues.next_reported().is_none(), "once for each report");
        assert_eq!((queues.due(&late), queues.in_flight()), (None, 1));

        let begun = admit(&mut queues, &mut arena, &late, DEPTH);
        assert!(begun < DEPTH && queues.in_flight() == begun + 1);
        assert_eq!(queues.should_submit(&late), (begun + 1).is_multiple_of(SUBMIT_BATCH));
        assert_eq!(queues.due(&late), None, "not before it reports");
        (0..begun).for_each(|_| queues.ended(&late));
        let reported = queues.next_reported().unwrap();
        let mut next = Vec::new();
        while let Some(due) = queues.due(&reported) {
            let (request, _slot) = queues.begin_next(&reported).unwrap();
            assert_eq!(request, due);
            next.push(request);
        }
        assert_eq!(next, (begun..DEPTH).collect::<Vec<_>>());
        assert_eq!(queues.in_flight(), DEPTH - begun + 1);
    }

    #[test]
    fn a_request_that_is_held_back_can_be_taken_back_and_counts_for_nothing() {
        let mut arena = Arena::new(1 << 20, 4096).unwrap();
        let mut queues = DeviceQueues::default();
        let file = file(1);
        admit(&mut queues, &mut arena, &file, DEPTH);
        (0..DEPTH).for_each(|_| queues.ended(&file));
        queues.next_reported();
        let begun = admit(&mut queues, &mut arena, &file, DEPTH);
        assert!(queues.take_back(&file, begun - 1).is_none(), "its device has it");
        for request in begun..DEPTH {
            assert!(queues.take_back(&file, request).is_some());
        }
        (0..begun).for_each(|_| queues.ended(&file));
        queues.next_reported();
        assert_eq!((queues.due(&file), queues.in_flight(), arena.used_bytes()), (None, 0, 0));
    }
}
