//! What a stream's connection is to send, and what of that its peer has not taken.

use crate::memory::Arena;
use crate::message;
use crate::reactor::SendBatch;
use crate::records::Records;
use crate::transport::Response;
use crate::tuning::{SMALL_RESPONSE_HEAP, SPARE_BATCH_BYTES, SPARE_BATCHES};

/// Batches kept for reuse, boxed because the kernel points at a batch while it sends it.
#[derive(Debug, Default)]
#[expect(clippy::vec_box, reason = "they move between here and the ring in their boxes")]
pub(crate) struct SpareBatches(Vec<Box<SendBatch>>);

impl SpareBatches {
    fn take(&mut self) -> Box<SendBatch> {
        self.0.pop().unwrap_or_default()
    }

    fn put(&mut self, batch: Box<SendBatch>) {
        if self.0.len() < SPARE_BATCHES && batch.capacity() <= SPARE_BATCH_BYTES {
            self.0.push(batch);
        }
    }
}

/// Answers gather in a batch; one batch at a time is being sent. A layer that seals copies a part of it, and
/// gives the slots of that back: the copies count as heap.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    /// What no send has taken up, ...
    next: Option<Box<SendBatch>>,
    /// ... the bytes of its slots, how many answers it is, and the heap that it takes.
    next_bytes: usize,
    next_count: usize,
    next_heap: usize,
    /// What was taken up, and is not sealed yet: goes before `next`. Only where the record layer seals.
    plain: Option<Box<SendBatch>>,
    /// Heap of what is sealed and not sent.
    sealed_heap: usize,
    /// What the last send left over: goes before all else.
    rest: Option<Box<SendBatch>>,
    is_sending: bool,
    /// Heap of the batch that is being sent, or is left over.
    sent_heap: usize,
    /// What was filled into that: about as much will be into the next.
    filled_before: usize,
    /// Bytes of the slots in all that is not sent: in `next`, in `rest`, and in the kernel.
    unsent_bytes: usize,
}

impl Outbox {
    fn next(&mut self, spare: &mut SpareBatches) -> &mut SendBatch {
        self.next.get_or_insert_with(|| spare.take())
    }

    /// Appends what `write` appends to the vector: a welcome, a goaway.
    pub fn push_bytes(&mut self, spare: &mut SpareBatches, write: impl FnOnce(&mut Vec<u8>)) {
        self.next(spare).push_bytes(write);
    }

    /// Appends a pong that the peer has asked for, as `write` does. One that asks without ever reading is
    /// stopped as one that does not take its answers.
    pub fn push_pong(&mut self, spare: &mut SpareBatches, write: impl FnOnce(&mut Vec<u8>)) {
        self.next_count += 1;
        self.next_heap += SMALL_RESPONSE_HEAP;
        self.push_bytes(spare, write);
    }

    /// Appends an unsolicited message.
    pub fn push_unsolicited(&mut self, spare: &mut SpareBatches, message: &[u8]) {
        self.next_count += 1;
        self.next_heap += SMALL_RESPONSE_HEAP + message.len();
        self.push_bytes(spare, |out| out.extend_from_slice(message));
    }

    /// Appends a response.
    /// `crc`: all messages have checksums; `has_crc`: this one has.
    pub fn push_response(
        &mut self,
        spare: &mut SpareBatches,
        id: u64,
        response: Response,
        crc: bool,
        has_crc: bool,
    ) {
        self.next_heap += SMALL_RESPONSE_HEAP + 2 * response.body.len();
        let data_len = response.data.as_ref().map_or(0, |range| range.len);
        let data_crc = match &response.data {
            Some(range) if crc || has_crc => message::data_crc(range.bytes()),
            _ => 0,
        };
        let header = message::ResponseHeader {
            id,
            body_len: 0,
            data_len: data_len as u32,
            status: response.status,
            credits: 1,
            result: response.result,
            has_crc,
            data_crc,
        };
        let batch = self.next(spare);
        batch.push_bytes(|out| header.encode(&response.body, crc, out));
        let slot_len = response.data.as_ref().map_or(0, |range| range.slot.len());
        if let Some(range) = response.data {
            batch.push_slot(range);
        }
        self.count(slot_len);
    }

    /// Appends what `fill` writes, in a slot with what was filled before. None: nothing has been done.
    pub fn push_filled(
        &mut self,
        spare: &mut SpareBatches,
        len: usize,
        arena: &mut Arena,
        fill: impl FnOnce(&mut [u8]) -> bool,
    ) -> Option<()> {
        let expected = self.filled_before;
        let Some(slot_len) = self.next(spare).push_filled(len, expected, arena, fill) else {
            // An empty batch is nothing to send.
            if let Some(batch) = self.next.take_if(|batch| batch.is_empty()) {
                spare.put(batch);
            }
            return None;
        };
        self.count(slot_len);
        Some(())
    }

    /// A response has been appended, with so much more memory.
    fn count(&mut self, slot_len: usize) {
        self.unsent_bytes += slot_len;
        self.next_bytes += slot_len;
        self.next_count += 1;
    }

    /// Forgets what no send has taken up.
    pub fn discard_next(&mut self) {
        self.next = None;
    }

    /// Forgets everything.
    pub fn discard(&mut self) {
        self.next = None;
        self.plain = None;
        self.rest = None;
    }

    /// The next batch to send, if there is something and nothing is being sent. [`Outbox::on_sent`] follows.
    /// Where the record layer seals, it is at most `seal_max` bytes of data, and with `is_last` nothing comes
    /// behind what there is now.
    pub fn poll_send(
        &mut self,
        spare: &mut SpareBatches,
        records: &mut Records,
        seal_max: usize,
        is_last: bool,
    ) -> Option<Box<SendBatch>> {
        if self.is_sending {
            return None;
        }
        let batch = match self.rest.take() {
            Some(rest) => rest,
            None if records.is_clear() => self.take_up()?,
            None => self.seal(spare, records, seal_max, is_last)?,
        };
        self.is_sending = true;
        Some(batch)
    }

    fn take_up(&mut self) -> Option<Box<SendBatch>> {
        self.next_bytes = 0;
        self.next_count = 0;
        self.sent_heap = std::mem::take(&mut self.next_heap);
        let next = self.next.take();
        self.filled_before = next.as_ref().map_or(0, |next| next.filled());
        next
    }

    /// Seals as much as is sent at a time.
    fn seal(
        &mut self,
        spare: &mut SpareBatches,
        records: &mut Records,
        bytes_max: usize,
        is_last: bool,
    ) -> Option<Box<SendBatch>> {
        let mut plain = match self.plain.take() {
            Some(plain) => plain,
            None => self.take_up()?,
        };
        let mut sealed = spare.take();
        records.seal_batch(&mut plain, &mut sealed, bytes_max, is_last && self.next.is_none());
        self.sealed_heap = sealed.capacity();
        if plain.is_empty() {
            spare.put(plain);
        } else {
            self.plain = Some(plain);
        }
        Some(sealed)
    }

    /// A send has ended; what is in the batch has not been sent. Returns whether all of it was.
    pub fn on_sent(&mut self, spare: &mut SpareBatches, batch: Box<SendBatch>) -> bool {
        self.is_sending = false;
        if !batch.is_empty() {
            self.rest = Some(batch);
            return false;
        }
        self.sealed_heap = 0;
        if self.plain.is_some() {
            spare.put(batch);
            return false;
        }
        self.unsent_bytes = self.next_bytes;
        self.sent_heap = 0;
        spare.put(batch);
        true
    }

    /// A send has ended, and so has the connection.
    pub fn on_send_failed(&mut self) {
        self.is_sending = false;
    }

    pub fn is_sending(&self) -> bool {
        self.is_sending
    }

    /// Whether there is something that no send has taken up.
    pub fn has_unsent(&self) -> bool {
        self.next.is_some() || self.plain.is_some() || self.rest.is_some()
    }

    /// Whether there are answers beyond what is being sent.
    pub fn has_next(&self) -> bool {
        self.next.is_some()
    }

    /// Whether more than this waits for the next send, be one under way or not: what is received until that
    /// begins is answered behind it, too. A send that took only a part has made no room.
    pub fn is_behind(&self, bytes_max: usize, count_max: usize) -> bool {
        self.next_bytes > bytes_max || self.next_count > count_max
    }

    pub fn unsent_bytes(&self) -> usize {
        self.unsent_bytes
    }

    /// Heap that all this takes.
    pub fn heap(&self) -> usize {
        self.next_heap + self.sent_heap + self.sealed_heap
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;
    use crate::memory::SlotRange;
    use crate::tls::tests::pair;
    use crate::transport::Body;

    #[test]
    fn what_is_sealed_is_counted_until_it_is_sent_and_no_more_is_sealed_than_may_be() {
        const DATA: usize = 300_000;
        const MAX: usize = 64 << 10;
        let (mut client, server) = pair(u64::MAX);
        let mut records = Records::Tls(Box::new(server));
        let mut arena = Arena::new(1 << 20, 512 << 10).unwrap();
        let (mut outbox, mut spare) = (Outbox::default(), SpareBatches::default());
        let slot = arena.alloc(DATA).unwrap();
        let data = Some(SlotRange { slot, start: 0, len: DATA });
        let response = Response { status: Status::OK, result: 7, body: Body::default(), data };
        outbox.push_response(&mut spare, 1, response, false, false);
        let (mut opened, mut sends) = (0, 0);
        let mut is_done = false;
        while !is_done {
            let mut batch = outbox.poll_send(&mut spare, &mut records, MAX, true).expect("there is more");
            sends += 1;
            assert!(batch.len() <= MAX + 200, "{} bytes", batch.len());
            assert!((batch.len()..2 * MAX + 1_000).contains(&outbox.heap()), "{}", outbox.heap());
            let mut sealed = batch.take_all();
            opened += client.open_away(&mut sealed).map(|(first, rest)| first.len() + rest.len()).unwrap();
            is_done = outbox.on_sent(&mut spare, batch);
        }
        assert_eq!((sends, opened, outbox.heap()), (5, DATA + message::HEADER_BYTES, 0));
        assert!(outbox.poll_send(&mut spare, &mut records, MAX, true).is_none());
        assert_eq!(arena.used_bytes(), 0);
    }
}
