//! The requests of a connection that are in flight: they have arrived and are not yet answered.

/// Requests in flight, by the client's id. There are at most as many as the connection has credits, and ids
/// that lie side by side are compared faster than a hash is made. Their order means nothing.
#[derive(Debug)]
pub(crate) struct InFlight<R> {
    ids: Vec<u64>,
    requests: Vec<R>,
}

impl<R> Default for InFlight<R> {
    fn default() -> Self {
        Self { ids: Vec::new(), requests: Vec::new() }
    }
}

impl<R> InFlight<R> {
    pub fn len(&self) -> usize {
        self.ids.len()
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }

    /// Where a request is, until the next change.
    pub fn position(&self, id: u64) -> Option<usize> {
        self.ids.iter().position(|&other| other == id)
    }

    /// The request at a [`InFlight::position`].
    pub fn at(&self, position: usize) -> &R {
        &self.requests[position]
    }

    pub fn contains(&self, id: u64) -> bool {
        self.position(id).is_some()
    }

    /// Adds a request whose id is not in flight.
    pub fn insert(&mut self, id: u64, request: R) {
        self.ids.push(id);
        self.requests.push(request);
    }

    pub fn get(&self, id: u64) -> Option<&R> {
        self.requests.get(self.position(id)?)
    }

    pub fn get_mut(&mut self, id: u64) -> Option<&mut R> {
        let position = self.position(id)?;
        self.requests.get_mut(position)
    }

    /// Removes the request at this position.
    pub fn remove_at(&mut self, position: usize) -> R {
        self.ids.swap_remove(position);
        self.requests.swap_remove(position)
    }

    pub fn remove(&mut self, id: u64) -> Option<R> {
        self.position(id).map(|position| self.remove_at(position))
    }

    pub fn clear(&mut self) {
        self.ids.clear();
        self.requests.clear();
    }

    /// Takes the memory for so many at once.
    pub fn reserve(&mut self, count: usize) {
        self.ids.reserve(count);
        self.requests.reserve(count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_found_and_removed_by_their_ids_in_any_order() {
        let mut in_flight = InFlight::default();
        for id in [7, 1, 9] {
            in_flight.insert(id, id * 10);
        }
        assert!(in_flight.contains(1) && !in_flight.contains(2));
        assert_eq!(in_flight.remove(1), Some(10));
        assert_eq!(in_flight.remove(1), None);
        *in_flight.get_mut(9).unwrap() += 1;
        assert_eq!((in_flight.get(9), in_flight.get(1), in_flight.len()), (Some(&91), None, 2));
        in_flight.clear();
        assert!(in_flight.is_empty() && in_flight.get(7).is_none());
    }
}
