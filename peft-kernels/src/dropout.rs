//! Dropout whose mask is a function of (seed, step, site, element): recomputed in the backward pass instead of stored,
//! and the same on any device and number of threads.
//!
//! Source: Srivastava et al., "Dropout", 2014, with the survivors scaled up in training as is usual.

use candle_core::{DType, Device, Result, Shape, Tensor};
use rayon::prelude::*;

use crate::cpu::{PARALLEL_ELEMENTS, View, threads};
use crate::diff_op::{DiffOp, apply};
use crate::philox::Stream;
use crate::simd;
use crate::tape::Keeps;

/// Zeroes each element of `x` with probability `p` and multiplies the others by `1 / (1 − p)`.
///
/// Element `i` (row-major) stays when word `i` of `stream` is at least `p·2³²`. A NaN stays a NaN under either. With
/// `p = 0` the result is `x` itself.
///
/// # Errors
/// When `p` is not in `[0, 1)`.
pub fn dropout(x: &Tensor, p: f32, stream: Stream) -> Result<Tensor> {
    match Mask::new(p, stream)? {
        Some(mask) => apply(mask, &[x]),
        None => Ok(x.clone()),
    }
}

/// [`dropout`] in place on the elements of a whole tensor, over the thread pool.
pub(crate) fn apply_in_place(x: &mut [f32], p: f32, stream: Stream) -> Result<()> {
    if let Some(mask) = Mask::new(p, stream)? {
        mask.for_chunks(x, |_, _| {});
    }
    Ok(())
}

/// Elements whose words are drawn side by side: 16 counters of four words.
const GROUP: usize = 64;
/// Elements a task takes; a multiple of [`GROUP`].
const CHUNK: usize = 8 * 1024;

#[derive(Debug, Clone, Copy)]
struct Mask {
    stream: Stream,
    threshold: u32,
    scale: f32,
}

impl Mask {
    fn new(p: f32, stream: Stream) -> Result<Option<Self>> {
        if !(0.0..1.0).contains(&p) {
            candle_core::bail!("dropout: the probability must be at least 0 and below 1, not {p}");
        }
        let threshold = (f64::from(p) * 4_294_967_296.0) as u32;
        Ok((p > 0.0).then_some(Self { stream, threshold, scale: 1.0 / (1.0 - p) }))
    }

    /// Fills each chunk with `fill(first_element, chunk)` and drops from it while it is in cache.
    fn for_chunks(&self, x: &mut [f32], fill: impl Fn(usize, &mut [f32]) + Sync + Send) {
        let chunk = |(i, x): (usize, &mut [f32])| {
            fill(i * CHUNK, x);
            simd::run(
                #[inline(always)]
                || self.drop_from(x, (i * CHUNK) as u64),
            );
        };
        if threads() == 1 || x.len() < PARALLEL_ELEMENTS {
            x.chunks_mut(CHUNK).enumerate().for_each(chunk);
        } else {
            x.par_chunks_mut(CHUNK).enumerate().for_each(chunk);
        }
    }

    /// Drops from `x`, whose first element is element `first` of the stream, a multiple of four.
    #[inline(always)]
    fn drop_from(&self, x: &mut [f32], first: u64) {
        let (groups, tail) = x.as_chunks_mut::<GROUP>();
        let mut block = first / 4;
        for group in groups {
            let words = words(&self.stream, block);
            for i in 0..GROUP {
                group[i] *= self.factor(words[i]);
            }
            block += (GROUP / 4) as u64;
        }
        for (v, word) in tail.iter_mut().zip(words(&self.stream, block)) {
            *v *= self.factor(word);
        }
    }

    #[inline(always)]
    fn factor(&self, word: u32) -> f32 {
        if word >= self.threshold { self.scale } else { 0.0 }
    }

    /// As the CUDA kernel takes it.
    #[cfg(feature = "cuda")]
    fn of_kernel(&self) -> peft_cuda::pointwise::Mask {
        let Self { stream: Stream { seed, step, site }, threshold, scale } = *self;
        peft_cuda::pointwise::Mask { seed, step, site, threshold, scale }
    }

    /// The factors as a tensor, for devices without a kernel.
    fn tensor(&self, shape: &Shape, dtype: DType, device: &Device) -> Result<Tensor> {
        let mut factors = vec![1f32; shape.elem_count()];
        self.for_chunks(&mut factors, |_, _| {});
        Tensor::from_vec(factors, shape, &Device::Cpu)?.to_device(device)?.to_dtype(dtype)
    }
}

/// The words of elements `4·block..4·block + 64`.
// The index is a lane of all four words at once.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn words(stream: &Stream, block: u64) -> [u32; GROUP] {
    const N: usize = GROUP / 4;
    let mut c = [[0u64; N]; 4];
    for i in 0..N {
        let b = block.wrapping_add(i as u64);
        c[0][i] = b;
        c[1][i] = b >> 32;
    }
    c[2] = [u64::from(stream.step); N];
    c[3] = [u64::from(stream.site); N];
    philox_lanes(&mut c, [stream.seed as u32, (stream.seed >> 32) as u32]);
    let mut out = [0u32; GROUP];
    for i in 0..N {
        for j in 0..4 {
            out[4 * i + j] = c[j][i] as u32;
        }
    }
    out
}

/// `philox4x32` on many counters at once; `c[word][lane]`, in 64 bits of which the upper half is ignored: that is what
/// the processor's widening multiplication takes, so that no word moves between lanes.
#[allow(clippy::needless_range_loop)]
#[inline(always)]
fn philox_lanes<const N: usize>(c: &mut [[u64; N]; 4], mut key: [u32; 2]) {
    const LOW: u64 = 0xffff_ffff;
    for _ in 0..10 {
        for i in 0..N {
            let p0 = 0xD251_1F53 * (c[0][i] & LOW);
            let p1 = 0xCD9E_8D57 * (c[2][i] & LOW);
            c[0][i] = (p1 >> 32) ^ c[1][i] ^ u64::from(key[0]);
            c[1][i] = p1;
            c[2][i] = (p0 >> 32) ^ c[3][i] ^ u64::from(key[1]);
            c[3][i] = p0;
        }
        key = [key[0].wrapping_add(0x9E37_79B9), key[1].wrapping_add(0xBB67_AE85)];
    }
}

impl DiffOp for Mask {
    const NAME: &'static str = "dropout";
    const KEEPS: Keeps = Keeps::Nothing;
    const CHEAP: bool = true;

    fn cpu(&self, args: &[View<'_>]) -> Result<(Vec<f32>, Shape)> {
        let x = args[0].data;
        let mut out = vec![0f32; x.len()];
        self.for_chunks(&mut out, |first, chunk| chunk.copy_from_slice(&x[first..first + chunk.len()]));
        Ok((out, args[0].shape.clone()))
    }

    fn neutral(&self, args: &[Tensor]) -> Result<Tensor> {
        let x = &args[0];
        x.mul(&self.tensor(x.shape(), x.dtype(), x.device())?)
    }

    #[cfg(feature = "cuda")]
    fn cuda(&self, args: &[crate::cuda::View<'_>]) -> Result<Option<crate::cuda::Made>> {
        crate::cuda::pointwise::dropout(self.of_kernel(), args)
    }

    fn backward(&self, _: &[Tensor], _: &Tensor, grad: &Tensor, needs: &[bool]) -> Result<Vec<Option<Tensor>>> {
        if !needs[0] {
            return Ok(vec![None]);
        }
        Ok(vec![Some(apply(*self, &[grad])?)])
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::philox::philox4x32;
    use crate::test_support::{Check, SHAPES};
    use crate::testing::randn;

    const STREAM: Stream = Stream { seed: 0x1234_5678_9abc_def0, step: 7, site: 3 };

    #[test]
    fn lanes_are_the_stream() {
        for block in [0, 1, 1000, u64::from(u32::MAX) - 5, u64::MAX - 3] {
            for (i, word) in words(&STREAM, block).into_iter().enumerate() {
                assert_eq!(word, STREAM.block(block.wrapping_add(i as u64 / 4))[i % 4]);
            }
        }
        let mut c = [[1, 2], [3, 4], [5, 6], [7, 8]];
        philox_lanes(&mut c, [9, 10]);
        assert_eq!(c.map(|word| word[1] as u32), philox4x32([2, 4, 6, 8], [9, 10]));
    }

    #[test]
    fn mask_follows_the_words_at_any_length() {
        for n in [1, 3, 63, 64, 65, 8191, 8192, 8193, 70_001] {
            let x = randn(n as u64, n, 1.0).unwrap();
            let y = dropout(&x, 0.3, STREAM).unwrap().to_vec1::<f32>().unwrap();
            for (i, (x, y)) in x.to_vec1::<f32>().unwrap().into_iter().zip(y).enumerate() {
                let kept = f64::from(STREAM.word(i as u64)) >= f64::from(0.3f32) * 4_294_967_296.0;
                assert_eq!(y, if kept { x * (1.0 / (1.0 - 0.3f32)) } else { x * 0.0 }, "element {i} of {n}");
            }
        }
    }

    #[test]
    fn forms_agree_forward_and_backward() {
        for (i, shape) in SHAPES.into_iter().enumerate() {
            let x = randn(i as u64, shape, 1.0).unwrap();
            Check::new("dropout").run(&[x], |a| dropout(&a[0], 0.25, STREAM)).unwrap();
        }
    }

    #[test]
    fn rate_and_mean() {
        let x = Tensor::ones(200_000, DType::F32, &Device::Cpu).unwrap();
        let y = dropout(&x, 0.1, STREAM).unwrap().to_vec1::<f32>().unwrap();
        let zeros = y.iter().filter(|v| **v == 0.0).count() as f64 / 2e5;
        assert!((zeros - 0.1).abs() < 0.003, "{zeros}");
        let next = dropout(&x, 0.1, Stream { step: 8, ..STREAM }).unwrap().to_vec1::<f32>().unwrap();
        assert_ne!(y, next);
    }

    #[test]
    fn probabilities() {
        let x = randn(1, 5, 1.0).unwrap();
        assert_eq!(dropout(&x, 0.0, STREAM).unwrap().id(), x.id());
        for p in [1.0, -0.1, f32::NAN, f32::INFINITY] {
            assert!(dropout(&x, p, STREAM).unwrap_err().to_string().contains("probability"));
        }
    }
}
