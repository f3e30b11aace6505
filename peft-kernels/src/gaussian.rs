//! Normal random numbers that are added to a tensor in place and never stored: what moves parameters in forward-only training.
//!
//! The numbers are those of a [`Stream`], an element's being a function of its place, made by Box and Muller's transform in `f32`
//! out of sums and products alone: the same bits on every processor and any number of threads, so that a run can be made again
//! from its seed elsewhere. ([`Stream::normal_vec`] goes through the system's `f64` logarithm, whose last bit may differ.)

use candle_core::{CpuStorage, DType, Device, InplaceOp1, Layout, Result, Tensor, Var, bail};
use rayon::prelude::*;

use crate::philox::{MULTIPLIERS, Stream, WEYL};
use crate::simd;

/// Philox blocks that are made side by side.
const LANES: usize = 32;
/// Numbers that these give.
const GROUP: usize = 4 * LANES;
/// Elements a thread takes at a time; a whole number of groups.
const CHUNK: usize = 64 * GROUP;

/// `x ← keep · x + scale · z` in place, with the standard normal numbers `z` of `stream`.
///
/// # Errors
/// When `x` is not `f32`, or not contiguous on a CPU.
pub fn add_normals(x: &Var, keep: f32, scale: f32, stream: Stream) -> Result<()> {
    if x.dtype() != DType::F32 {
        bail!("add_normals: adds to f32, not {:?}", x.dtype());
    }
    if x.device().is_cpu() {
        return x.inplace_op1(&AddNormals { keep, scale, stream });
    }
    let mut z = vec![0f32; x.elem_count()];
    normals(stream, 0, &mut z);
    let z = Tensor::from_vec(z, x.shape(), &Device::Cpu)?.to_device(x.device())?;
    x.set(&((x.as_detached_tensor() * f64::from(keep))? + (z * f64::from(scale))?)?)
}

struct AddNormals {
    keep: f32,
    scale: f32,
    stream: Stream,
}

impl InplaceOp1 for AddNormals {
    fn name(&self) -> &'static str {
        "add_normals"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(data), Some((start, end))) = (storage, layout.contiguous_offsets()) else {
            bail!("add_normals: takes a contiguous f32 tensor")
        };
        let Some(data) = data.get_mut(start..end) else { bail!("add_normals: the layout reaches past the storage") };
        data.par_chunks_mut(CHUNK).enumerate().for_each(|(i, chunk)| self.add(i * CHUNK, chunk));
        Ok(())
    }
}

impl AddNormals {
    /// Adds to the elements from `first` on, which is the beginning of a group.
    fn add(&self, first: usize, x: &mut [f32]) {
        simd::run(
            #[inline(always)]
            || {
                for (i, x) in x.chunks_mut(GROUP).enumerate() {
                    let z = group(self.stream, first / GROUP + i);
                    for (x, z) in x.iter_mut().zip(&z) {
                        *x = self.keep * *x + self.scale * z;
                    }
                }
            },
        );
    }
}

/// The numbers of the elements from `first` on, which is the beginning of a group.
fn normals(stream: Stream, first: usize, z: &mut [f32]) {
    for (i, z) in z.chunks_mut(GROUP).enumerate() {
        let made = group(stream, first / GROUP + i);
        z.iter_mut().zip(&made).for_each(|(z, made)| *z = *made);
    }
}

/// The numbers of elements `GROUP·index..GROUP·(index + 1)`: two of each two words of the stream.
#[inline(always)]
fn group(stream: Stream, index: usize) -> [f32; GROUP] {
    let words = blocks(stream, (index * LANES) as u64);
    let mut made = [[0f32; LANES]; 4];
    for i in 0..LANES {
        (made[0][i], made[1][i]) = pair(words[0][i], words[1][i]);
        (made[2][i], made[3][i]) = pair(words[2][i], words[3][i]);
    }
    let mut z = [0f32; GROUP];
    for (i, z) in z.chunks_exact_mut(4).enumerate() {
        for (z, made) in z.iter_mut().zip(&made) {
            *z = made[i];
        }
    }
    z
}

/// [`Stream::block`] of `LANES` neighbours: word `w` of block `first + i` at `[w][i]`.
#[inline(always)]
fn blocks(stream: Stream, first: u64) -> [[u32; LANES]; 4] {
    let [mut c0, mut c1] = [[0u32; LANES]; 2];
    for i in 0..LANES {
        let block = first.wrapping_add(i as u64);
        (c0[i], c1[i]) = (block as u32, (block >> 32) as u32);
    }
    let (mut c2, mut c3) = ([stream.step; LANES], [stream.site; LANES]);
    let [mut k0, mut k1] = [stream.seed as u32, (stream.seed >> 32) as u32];
    for _ in 0..10 {
        for i in 0..LANES {
            let p0 = u64::from(MULTIPLIERS[0]) * u64::from(c0[i]);
            let p1 = u64::from(MULTIPLIERS[1]) * u64::from(c2[i]);
            (c0[i], c1[i]) = ((p1 >> 32) as u32 ^ c1[i] ^ k0, p1 as u32);
            (c2[i], c3[i]) = ((p0 >> 32) as u32 ^ c3[i] ^ k1, p0 as u32);
        }
        (k0, k1) = (k0.wrapping_add(WEYL[0]), k1.wrapping_add(WEYL[1]));
    }
    [c0, c1, c2, c3]
}

/// Two normal numbers of two random words (Box and Muller 1958).
#[inline(always)]
fn pair(a: u32, b: u32) -> (f32, f32) {
    const UNIT: f32 = 1.0 / (1u32 << 24) as f32;
    // In (0, 1], so that the logarithm is finite.
    let u = ((a >> 8) + 1) as i32 as f32 * UNIT;
    let radius = (-2.0 * ln(u)).sqrt();
    let (sin, cos) = turn((b >> 8) as i32 as f32 * UNIT);
    (radius * cos, radius * sin)
}

/// Natural logarithm of a positive normal number: `e·ln 2 + 2·artanh((m − 1)/(m + 1))`, with `m` around 1.
#[inline(always)]
fn ln(x: f32) -> f32 {
    let bits = x.to_bits();
    let exponent = (bits.wrapping_sub(std::f32::consts::FRAC_1_SQRT_2.to_bits()) as i32) >> 23;
    let m = f32::from_bits(bits.wrapping_sub((exponent << 23) as u32));
    let s = (m - 1.0) / (m + 1.0);
    let q = s * s;
    let series = 1.0 + q * (1.0 / 3.0 + q * (1.0 / 5.0 + q * (1.0 / 7.0 + q * (1.0 / 9.0))));
    exponent as f32 * std::f32::consts::LN_2 + 2.0 * s * series
}

/// Sine and cosine of `u` whole turns, `u` in `[0, 1]`: Taylor's series within an eighth of a turn of the nearest quarter.
#[inline(always)]
fn turn(u: f32) -> (f32, f32) {
    let quarters = 4.0 * u;
    let n = (quarters + 0.5) as i32;
    let r = (quarters - n as f32) * std::f32::consts::FRAC_PI_2;
    let q = r * r;
    let sin = r * (1.0 - q / 6.0 * (1.0 - q / 20.0 * (1.0 - q / 42.0 * (1.0 - q / 72.0))));
    let cos = 1.0 - q / 2.0 * (1.0 - q / 12.0 * (1.0 - q / 30.0 * (1.0 - q / 56.0)));
    let (s, c) = if n & 1 == 0 { (sin, cos) } else { (cos, -sin) };
    if n & 2 == 0 { (s, c) } else { (-s, -c) }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::test_support::on_threads;

    const STREAM: Stream = Stream { seed: 0x1234_5678_9abc, step: 7, site: 3 };

    /// The transform by the book, in `f64`, of the words that [`Stream::word`] gives.
    fn reference(element: u64) -> f64 {
        let (first, odd) = (element / 2 * 2, element % 2 == 1);
        let unit = |w: u32| f64::from(w >> 8) / f64::from(1u32 << 24);
        let u = unit(STREAM.word(first)) + 1.0 / f64::from(1u32 << 24);
        let angle = std::f64::consts::TAU * unit(STREAM.word(first + 1));
        (-2.0 * u.ln()).sqrt() * if odd { angle.sin() } else { angle.cos() }
    }

    fn moved(n: usize, keep: f32, scale: f32) -> Vec<f32> {
        let x = Var::from_vec((0..n).map(|i| i as f32 * 0.01).collect(), n, &Device::Cpu).unwrap();
        add_normals(&x, keep, scale, STREAM).unwrap();
        x.to_vec1().unwrap()
    }

    #[test]
    fn numbers_are_those_of_the_stream() {
        for n in [0, 1, 3, 127, 128, 129, 2 * CHUNK + 77] {
            for (i, got) in moved(n, 0.5, 2.0).into_iter().enumerate() {
                let want = 0.5 * f64::from(i as f32 * 0.01) + 2.0 * reference(i as u64);
                assert!((f64::from(got) - want).abs() < 4e-6 * want.abs().max(1.0), "{i} of {n}: {got} {want}");
            }
        }
    }

    #[test]
    fn they_are_normal() {
        let mut z = vec![0f32; 1 << 20];
        normals(STREAM, 0, &mut z);
        let moment = |k: i32| z.iter().map(|z| f64::from(*z).powi(k)).sum::<f64>() / z.len() as f64;
        for (k, want, within) in [(1, 0.0, 4e-3), (2, 1.0, 6e-3), (3, 0.0, 0.02), (4, 3.0, 0.05)] {
            assert!((moment(k) - want).abs() < within, "moment {k}: {}", moment(k));
        }
        // Φ(1) − Φ(−1) and the tails beyond 3.
        let share = |f: &dyn Fn(f32) -> bool| z.iter().filter(|z| f(**z)).count() as f64 / z.len() as f64;
        assert!((share(&|z| z.abs() < 1.0) - 0.682_69).abs() < 2e-3);
        assert!((share(&|z| z.abs() > 3.0) - 0.002_7).abs() < 3e-4);
        let neighbours = z.windows(2).map(|w| f64::from(w[0] * w[1])).sum::<f64>() / z.len() as f64;
        assert!(neighbours.abs() < 4e-3, "{neighbours}");
    }

    #[test]
    fn neither_threads_nor_instruction_sets_change_a_bit() {
        let n = 3 * CHUNK + 5;
        let bits = |v: Vec<f32>| v.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let one = on_threads(1, || bits(moved(n, 1.0, 1e-3)));
        assert_eq!(one, on_threads(2, || bits(moved(n, 1.0, 1e-3))));
        let mut z = vec![0f32; n];
        normals(STREAM, 0, &mut z);
        let baseline = z.iter().enumerate().map(|(i, z)| i as f32 * 0.01 + 1e-3 * z).collect();
        assert_eq!(one, bits(baseline));
    }

    #[test]
    fn other_types_are_refused() {
        let x = Var::zeros(4, DType::BF16, &Device::Cpu).unwrap();
        assert!(add_normals(&x, 1.0, 1.0, STREAM).unwrap_err().to_string().contains("BF16"));
    }
}
