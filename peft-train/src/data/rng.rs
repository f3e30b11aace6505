//! Deterministic order, the same on every platform and in every version: splitmix64 (Steele, Lea and Flood, OOPSLA 2014).

/// Counter-based generator keyed by a few numbers (seed, epoch, purpose).
#[derive(Clone, Debug)]
pub(crate) struct Rng(u64);

fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

impl Rng {
    /// A stream of its own for every key.
    pub(crate) fn new(key: &[u64]) -> Self {
        let mut state = 0;
        for &part in key {
            state = mix(state ^ mix(part.wrapping_add(GOLDEN))).wrapping_add(GOLDEN);
        }
        Self(state)
    }

    pub(crate) fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(GOLDEN);
        mix(self.0)
    }

    /// Uniform in `0..n` without bias (Lemire 2019); 0 for `n == 0`.
    pub(crate) fn below(&mut self, n: u64) -> u64 {
        let threshold = n.wrapping_neg().checked_rem(n).unwrap_or(0);
        loop {
            let wide = u128::from(self.next_u64()) * u128::from(n);
            if n == 0 || (wide as u64) >= threshold {
                return (wide >> 64) as u64;
            }
        }
    }

    /// Uniform in `[0, 1)`.
    pub(crate) fn share(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Fisher–Yates.
    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            let j = self.below(i as u64 + 1) as usize;
            items.swap(i, j);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_never_changes() {
        // First outputs of splitmix64 from state 0, as published with the reference implementation.
        let mut reference = Rng(0);
        assert_eq!(reference.next_u64(), 0xe220_a839_7b1d_cdaf);
        assert_eq!(reference.next_u64(), 0x6e78_9e6a_a1b9_65f4);
        let mut items: Vec<u32> = (0..10).collect();
        Rng::new(&[7, 0, 1]).shuffle(&mut items);
        let mut sorted = items.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        assert_ne!(items, sorted);
    }

    #[test]
    fn below_is_uniform_and_keys_differ() {
        let mut rng = Rng::new(&[1]);
        let mut counts = [0u32; 3];
        for _ in 0..30_000 {
            counts[rng.below(3) as usize] += 1;
        }
        assert!(counts.iter().all(|c| (9_600..10_400).contains(c)), "{counts:?}");
        assert_ne!(Rng::new(&[0, 1]).next_u64(), Rng::new(&[1, 0]).next_u64());
        assert_ne!(Rng::new(&[0]).next_u64(), Rng::new(&[0, 0]).next_u64());
    }
}
