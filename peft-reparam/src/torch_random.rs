//! torch's generator on a CPU, for what PEFT draws again from a seed where its files do not hold it.
//!
//! The generator is MT19937 (Matsumoto & Nishimura 1998) started from the low 32 bits of the seed; a permutation is one
//! shuffle of Fisher and Yates with remainders, and a uniform number takes the low 24 bits (PyTorch's
//! `aten/src/ATen/core/MT19937RNGEngine.h`, `TransformationHelper.h`, and `randperm` on a CPU).

use std::collections::HashMap;

use half::bf16;

const SIZE: usize = 624;
/// How far ahead the word lies that a word is mixed with.
const AHEAD: usize = 397;
/// From this length on torch shuffles another way, with 64 bits a draw.
const LONG: u64 = (u32::MAX / 20) as u64;

/// The stream of a `torch.Generator().manual_seed(seed)`.
#[derive(Debug, Clone)]
pub(crate) struct TorchRandom {
    state: [u32; SIZE],
    next: usize,
}

impl TorchRandom {
    pub(crate) fn new(seed: i64) -> Self {
        let mut state = [0; SIZE];
        // The low 32 bits, also of a negative seed.
        let mut word = seed as u32;
        for (i, place) in (0..).zip(&mut state) {
            if i > 0 {
                word = 1_812_433_253_u32.wrapping_mul(word ^ (word >> 30)).wrapping_add(i);
            }
            *place = word;
        }
        Self { state, next: SIZE }
    }

    /// The next 32 bits.
    pub(crate) fn word(&mut self) -> u32 {
        if self.next >= SIZE {
            for i in 0..SIZE {
                let (high, low) = (self.state[i] & 0x8000_0000, self.state[(i + 1) % SIZE] & 0x7fff_ffff);
                let twist = if low & 1 == 1 { 0x9908_b0df } else { 0 };
                self.state[i] = self.state[(i + AHEAD) % SIZE] ^ ((high | low) >> 1) ^ twist;
            }
            self.next = 0;
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn long_word(&mut self) -> u64 {
        let high = u64::from(self.word());
        (high << 32) | u64::from(self.word())
    }

    /// `torch.randperm(n)[:k]`, without a list of all `n`.
    pub(crate) fn permutation(&mut self, n: u64, k: usize) -> Vec<u64> {
        let mut head: Vec<u64> = Vec::new();
        if n < LONG {
            // What was put elsewhere by a swap; all other places hold their own number.
            let mut moved = HashMap::new();
            for i in (0..n).take(k) {
                let from = if i + 1 < n { i + u64::from(self.word()) % (n - i) } else { i };
                let here = moved.get(&i).copied().unwrap_or(i);
                head.push(moved.insert(from, here).unwrap_or(from));
            }
            return head;
        }
        for i in 0..n {
            let to = self.long_word() % (i + 1);
            if head.len() < k {
                head.push(i);
            }
            // Each number changes places with one in front, of which only the first k matter.
            if let Some(place) = usize::try_from(to).ok().filter(|to| *to < head.len()) {
                let last = usize::try_from(i).ok().filter(|i| *i < head.len());
                match last {
                    Some(last) => head.swap(place, last),
                    None => head[place] = i,
                }
            }
        }
        head
    }

    /// `n` numbers of a tensor's `uniform_(low, high)`.
    pub(crate) fn uniform(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        (0..n).map(|_| (self.word() & 0x00ff_ffff) as f32 / 16_777_216.0 * (high - low) + low).collect()
    }

    /// `n` numbers of a `bf16` tensor's `uniform_(low, high)`: what is rounded up to `high` starts again from `low`.
    pub(crate) fn uniform_bf16(&mut self, n: usize, low: f32, high: f32) -> Vec<f32> {
        let (first, beyond) = (bf16::from_f32(low).to_f32(), bf16::from_f32(high).to_f32());
        let rounded = |x: f32| match bf16::from_f32(x).to_f32() {
            x if x >= beyond => first,
            x => x,
        };
        self.uniform(n, low, high).into_iter().map(rounded).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k]` of torch 2.15 on a CPU.
    #[test]
    fn permutations_are_torchs() {
        for (seed, n, head) in [
            (777, 48 * 48, vec![1895, 2184, 627, 1613, 879, 1125, 93, 2139]),
            (777, 144 * 48, vec![6503, 132, 1653, 752, 2819, 5902]),
            (0, 7, vec![4, 0, 5, 3, 2, 6, 1]),
            (-3, 1000, vec![651, 459, 637, 619, 119]),
            ((1 << 40) + 5, 576 * 576, vec![260_963, 109_465, 10_241, 316_635, 30_138, 260_207]),
        ] {
            assert_eq!(TorchRandom::new(seed).permutation(n, head.len()), head, "seed {seed}, {n}");
        }
        let mut all = TorchRandom::new(11).permutation(1000, 1000);
        all.sort_unstable();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
        assert_eq!(TorchRandom::new(11).permutation(3, 9).len(), 3);
    }

    /// As above. Some seconds: every number of a long permutation is drawn.
    #[test]
    #[ignore = "slow"]
    fn long_permutations_are_torchs() {
        let head = [150_358_698, 199_533_091, 83_306_822, 145_970_095, 40_813_261, 111_338_416];
        assert_eq!(TorchRandom::new(777).permutation(230_000_000, 6), head);
    }

    /// `torch.rand(4)`, then `torch.empty(4).uniform_(-0.3, 0.3)`, of a generator seeded with 5.
    #[test]
    fn uniform_numbers_are_torchs() {
        let mut random = TorchRandom::new(5);
        let unit = [0.830_251_9, 0.126_110_91, 0.907_469_7, 0.819_927_04];
        assert!(random.uniform(4, 0.0, 1.0).iter().zip(unit).all(|(a, b)| (a - b).abs() < 6e-8));
        let wide = [0.252_062_08, -0.230_012_88, -0.201_365_1, 0.142_751_63];
        assert!(random.uniform(4, -0.3, 0.3).iter().zip(wide).all(|(a, b)| (a - b).abs() < 3e-8));
    }

    /// `torch.empty(n, dtype=torch.bfloat16).uniform_(-1/√48, 1/√48)` of a generator seeded with 7: the 384 numbers, of which
    /// one would round to the bound, add up to this.
    #[test]
    fn uniform_numbers_in_bf16_are_torchs() {
        let bound = 1.0 / 48f32.sqrt();
        let numbers = TorchRandom::new(7).uniform_bf16(384, -bound, bound);
        assert_eq!(numbers[..4], [0.010_070_801, -0.086_914_06, 0.045_898_438, 0.045_410_156]);
        assert!((numbers.iter().map(|x| f64::from(*x)).sum::<f64>() + 1.276_605_606_079_101_6).abs() < 1e-9);
    }
}
