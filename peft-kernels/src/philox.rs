//! Philox4x32-10, a counter-based random generator.
//!
//! A value is a function of (key, counter): no state, so that a mask can be recomputed in the backward pass instead of
//! stored, and so that thread count, device and order of evaluation do not change it.
//! Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

pub(crate) const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
pub(crate) const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// The ten-round Philox4x32 bijection: four random words for a 128-bit counter under a 64-bit key.
#[must_use]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    let mut c = counter;
    let mut k = key;
    for _ in 0..10 {
        let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c[0]);
        let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c[2]);
        c = [(p1 >> 32) as u32 ^ c[1] ^ k[0], p1 as u32, (p0 >> 32) as u32 ^ c[3] ^ k[1], p0 as u32];
        k = [k[0].wrapping_add(WEYL[0]), k[1].wrapping_add(WEYL[1])];
    }
    c
}

/// A stream of random numbers addressed by element: which run (`seed`), which optimiser step, which site.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stream {
    /// The run's seed.
    pub seed: u64,
    /// The optimiser step, or 0 for initialisation.
    pub step: u32,
    /// What draws: a site's id, or a purpose of the caller's own.
    pub site: u32,
}

impl Stream {
    /// The four words at block `block` (elements `4·block..4·block + 4`).
    #[must_use]
    pub fn block(&self, block: u64) -> [u32; 4] {
        philox4x32(
            [block as u32, (block >> 32) as u32, self.step, self.site],
            [self.seed as u32, (self.seed >> 32) as u32],
        )
    }

    /// The word of one element.
    #[must_use]
    pub fn word(&self, element: u64) -> u32 {
        self.block(element / 4)[(element % 4) as usize]
    }

    /// Uniform in `[0, 1)`, with 24 bits.
    #[must_use]
    pub fn uniform(&self, element: u64) -> f32 {
        unit(self.word(element))
    }

    /// `n` values uniform in `[low, high)`.
    #[must_use]
    pub fn uniform_vec(&self, n: usize, low: f32, high: f32) -> Vec<f32> {
        self.words(n).map(|w| low + (high - low) * unit(w)).collect()
    }

    /// `n` values from the normal distribution with mean 0 (Box–Muller, two values from two words).
    #[must_use]
    pub fn normal_vec(&self, n: usize, std: f32) -> Vec<f32> {
        let words: Vec<u32> = self.words(n.next_multiple_of(2)).collect();
        let mut out: Vec<f32> = words
            .chunks_exact(2)
            .flat_map(|w| {
                // 1 − u is in (0, 1], so that the logarithm is finite.
                let radius = (-2.0 * f64::from(1.0 - unit(w[0])).ln()).sqrt();
                let angle = std::f64::consts::TAU * f64::from(unit(w[1]));
                [(radius * angle.cos()) as f32 * std, (radius * angle.sin()) as f32 * std]
            })
            .collect();
        out.truncate(n);
        out
    }

    fn words(&self, n: usize) -> impl Iterator<Item = u32> + '_ {
        (0..n.div_ceil(4) as u64).flat_map(|b| self.block(b)).take(n)
    }
}

fn unit(word: u32) -> f32 {
    (word >> 8) as f32 * (1.0 / (1u32 << 24) as f32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        // kat_vectors of the Random123 distribution.
        assert_eq!(philox4x32([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(philox4x32([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
    }

    #[test]
    fn moments_and_addressing() {
        let s = Stream { seed: 7, step: 3, site: 11 };
        let u = s.uniform_vec(40_001, -1.0, 3.0);
        assert_eq!(u.len(), 40_001);
        assert!((u.iter().sum::<f32>() / u.len() as f32 - 1.0).abs() < 0.02);
        assert_eq!(u[4321], -1.0 + 4.0 * s.uniform(4321));
        let n = s.normal_vec(40_001, 2.0);
        let var = n.iter().map(|x| x * x).sum::<f32>() / n.len() as f32;
        assert!((var - 4.0).abs() < 0.1, "{var}");
        assert_ne!(s.word(0), Stream { step: 4, ..s }.word(0));
    }
}
