//! The search for the way to an address: the device, then the route. rdma_cm reports both by events.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::cm::{EventChannel, Id};
use crate::connecting::{Awaited, Connecting};
use crate::tuning::RDMA_RESOLVE_TIME;

/// How much longer than the kernel's own time its answer may take to arrive.
const ANSWER_TIME: Duration = Duration::from_millis(100);

/// An identifier that looks for the way to an address.
#[derive(Debug)]
pub(super) struct Resolution {
    events: Arc<EventChannel>,
    source: Option<SocketAddr>,
    address: SocketAddr,
    deadline: Instant,
    /// None before the first step, and when it is over.
    search: Option<Search>,
}

/// One try.
#[derive(Debug)]
struct Search {
    id: Id,
    has_address: bool,
    /// Milliseconds that each half may take.
    ms: i32,
    began: Instant,
    until: Instant,
}

impl Resolution {
    /// From `source` if that is given, by `deadline`. The identifier's events arrive at `events`, at which
    /// there are none of others. The first step begins.
    pub fn new(
        events: &Arc<EventChannel>,
        source: Option<SocketAddr>,
        address: SocketAddr,
        deadline: Instant,
    ) -> Self {
        Self { events: Arc::clone(events), source, address, deadline, search: None }
    }

    fn begin(&self, now: Instant) -> io::Result<Search> {
        let id = Id::new(&self.events)?;
        let until = self.deadline.min(now + RDMA_RESOLVE_TIME);
        let ms = until.saturating_duration_since(now).as_millis().max(1) as i32;
        id.resolve_address(self.source, self.address, ms)?;
        Ok(Search { id, has_address: false, ms, began: now, until: until + ANSWER_TIME })
    }

    fn go_on(&mut self, now: Instant) -> io::Result<Option<Id>> {
        loop {
            let mut search = match self.search.take() {
                Some(search) => search,
                None => self.begin(now)?,
            };
            match search.take_event(&self.events, now) {
                Ok(Progress::Waits) => {
                    self.search = Some(search);
                    return Ok(None);
                }
                Ok(Progress::HasAddress) => {
                    search.has_address = true;
                    search.id.resolve_route(search.ms)?;
                    self.search = Some(search);
                }
                Ok(Progress::Done) => return Ok(Some(search.id)),
                // The kernel may miss that a neighbour has answered, and looks again only when its time is
                // over.
                Err(error)
                    if error.raw_os_error() == Some(libc::ETIMEDOUT)
                        && now < self.deadline
                        && now > search.began => {}
                Err(error) => return Err(error),
            }
        }
    }
}

enum Progress {
    Waits,
    HasAddress,
    Done,
}

impl Search {
    fn take_event(&self, events: &Arc<EventChannel>, now: Instant) -> io::Result<Progress> {
        match events.next() {
            Some(event) => {
                event.resolved()?;
                Ok(if self.has_address { Progress::Done } else { Progress::HasAddress })
            }
            None if now >= self.until => Err(io::Error::from_raw_os_error(libc::ETIMEDOUT)),
            None => Ok(Progress::Waits),
        }
    }
}

impl Connecting for Resolution {
    type Outcome = io::Result<Id>;

    fn step(&mut self, now: Instant) -> Option<Self::Outcome> {
        self.go_on(now).transpose()
    }

    fn awaited(&mut self) -> Vec<Awaited<'_>> {
        vec![Awaited::input(self.events.fd())]
    }

    fn step_by(&self) -> Instant {
        self.search.as_ref().map_or(self.deadline, |search| search.until)
    }
}
