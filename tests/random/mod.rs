//! Random numbers for the tests that proptest does not suit. The seed is printed; `RAIO_TEST_SEED` replays
//! it.

// Each test program that has this module uses a part of it.
#![allow(dead_code)]

/// The seed of this run: `RAIO_TEST_SEED`, or one from the clock.
pub fn seed() -> u64 {
    let seed = match std::env::var("RAIO_TEST_SEED") {
        Ok(seed) => seed.parse().expect("RAIO_TEST_SEED is a number"),
        Err(_) => {
            let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            now.expect("a clock after 1970").as_nanos() as u32
        }
        .into(),
    };
    println!("replay with RAIO_TEST_SEED={seed}");
    seed
}

/// A generator (SplitMix64).
pub struct Random(u64);

impl Random {
    /// With the seed of this run.
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(seed())
    }

    /// With this one.
    pub fn with_seed(seed: u64) -> Self {
        Self(seed)
    }

    /// Less than `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ z >> 31) % end
    }

    /// An index less than `len`.
    pub fn index(&mut self, len: usize) -> usize {
        self.below(len as u64) as usize
    }
}
