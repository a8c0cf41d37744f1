//! What one side of TLS does for 128 KiB of data, with the library and in the records that the record layer
//! uses: copying and sealing what is sent, opening and copying what was received. Prints one line of JSON
//! with the median of each, in microseconds. `scripts/bench --secure` compares what TLS costs with it.

use std::time::Instant;

use ring::aead::{AES_128_GCM, Aad, LessSafeKey, Nonce, UnboundKey};

const DATA_BYTES: usize = 128 << 10;
const RECORD_BYTES: usize = 16 << 10;
const ROUNDS: usize = 2000;

/// The median of what a number of rounds take, in microseconds.
fn median_us(rounds: usize, mut round: impl FnMut()) -> f64 {
    let mut times: Vec<_> = (0..rounds)
        .map(|_| {
            let begin = Instant::now();
            round();
            begin.elapsed()
        })
        .collect();
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e6
}

fn main() {
    // As a test, once.
    let rounds = if std::env::args().any(|argument| argument == "--bench") { ROUNDS } else { 1 };
    let key = LessSafeKey::new(UnboundKey::new(&AES_128_GCM, &[7; 16]).expect("a key has 16 bytes"));
    let nonce = || Nonce::assume_unique_for_key([0; 12]);
    let data = vec![1_u8; DATA_BYTES];
    let mut sealed: [Vec<u8>; DATA_BYTES / RECORD_BYTES] = Default::default();
    let seal_us = median_us(rounds, || {
        for (record, data) in sealed.iter_mut().zip(data.chunks_exact(RECORD_BYTES)) {
            record.clear();
            record.extend_from_slice(data);
            key.seal_in_place_append_tag(nonce(), Aad::empty(), record).expect("a record is short");
        }
    });
    let mut opened = vec![0; DATA_BYTES];
    let mut received = sealed.clone();
    let mut open_us = Vec::new();
    for _ in 0..rounds {
        for (received, sealed) in received.iter_mut().zip(&sealed) {
            received.copy_from_slice(sealed);
        }
        open_us.push(median_us(1, || {
            for (record, to) in received.iter_mut().zip(opened.chunks_exact_mut(RECORD_BYTES)) {
                let data = key.open_in_place(nonce(), Aad::empty(), record).expect("it was sealed so");
                to.copy_from_slice(data);
            }
        }));
    }
    open_us.sort_by(f64::total_cmp);
    assert_eq!(opened, data);
    println!("{{\"seal_us\": {seal_us:.3}, \"open_us\": {:.3}}}", open_us[open_us.len() / 2]);
}
