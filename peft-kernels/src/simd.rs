//! Loops compiled for the widest vectors that the processor has, and the elementary functions used in them.
//!
//! The build targets baseline x86-64, so [`run`] compiles a closure again with AVX2 and AVX-512 enabled and picks at run
//! time. Nothing here contracts `a * b + c` to one rounding and reductions add in a fixed order of lanes, so results
//! are the same bits at every level.

/// Runs `f`, compiled for the best instruction set at hand. Mark the closure and what it calls `#[inline(always)]`:
/// only code that is inlined here is compiled with the wider vectors.
#[inline(always)]
pub(crate) fn run<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    {
        let v3 =
            is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("bmi2");
        if v3
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vl")
        {
            #[allow(unsafe_code)]
            // SAFETY: every feature that `v4` enables was found on this processor just above.
            return unsafe { v4(f) };
        }
        if v3 {
            #[allow(unsafe_code)]
            // SAFETY: every feature that `v3` enables was found on this processor just above.
            return unsafe { self::v3(f) };
        }
    }
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi2")]
fn v4<R>(f: impl FnOnce() -> R) -> R {
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,bmi2")]
fn v3<R>(f: impl FnOnce() -> R) -> R {
    f()
}

/// Asks for a cache line, into the second-level cache. Other processors are left to their own foresight.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        #[allow(unsafe_code)]
        // SAFETY: the instruction is in every x86-64 and reads nothing; an address without memory is ignored.
        unsafe {
            _mm_prefetch::<_MM_HINT_T1>(at.cast());
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Partial sums that a reduction keeps side by side.
const LANES: usize = 32;

#[inline(always)]
fn tree(mut acc: [f32; LANES], join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut half = LANES / 2;
    while half > 0 {
        for i in 0..half {
            acc[i] = join(acc[i], acc[i + half]);
        }
        half /= 2;
    }
    acc[0]
}

/// `Σ f(a)`.
#[inline(always)]
pub(crate) fn sum1(a: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut acc = [0f32; LANES];
    let (chunks, tail) = a.as_chunks::<LANES>();
    for c in chunks {
        for i in 0..LANES {
            acc[i] += f(c[i]);
        }
    }
    for (s, &v) in acc.iter_mut().zip(tail) {
        *s += f(v);
    }
    tree(acc, |x, y| x + y)
}

/// `Σ f(a, b)` over slices of one length.
#[inline(always)]
pub(crate) fn sum2(a: &[f32], b: &[f32], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut acc = [0f32; LANES];
    let (a, at) = a.as_chunks::<LANES>();
    let (b, bt) = b.as_chunks::<LANES>();
    for (a, b) in a.iter().zip(b) {
        for i in 0..LANES {
            acc[i] += f(a[i], b[i]);
        }
    }
    for ((s, &a), &b) in acc.iter_mut().zip(at).zip(bt) {
        *s += f(a, b);
    }
    tree(acc, |x, y| x + y)
}

/// `Σ f(a, b, c)` over slices of one length.
#[inline(always)]
pub(crate) fn sum3(a: &[f32], b: &[f32], c: &[f32], f: impl Fn(f32, f32, f32) -> f32) -> f32 {
    let mut acc = [0f32; LANES];
    let (a, at) = a.as_chunks::<LANES>();
    let (b, bt) = b.as_chunks::<LANES>();
    let (c, ct) = c.as_chunks::<LANES>();
    for ((a, b), c) in a.iter().zip(b).zip(c) {
        for i in 0..LANES {
            acc[i] += f(a[i], b[i], c[i]);
        }
    }
    for (((s, &a), &b), &c) in acc.iter_mut().zip(at).zip(bt).zip(ct) {
        *s += f(a, b, c);
    }
    tree(acc, |x, y| x + y)
}

/// The largest element, NaN left out; −∞ for none.
#[inline(always)]
pub(crate) fn max(a: &[f32]) -> f32 {
    let mut acc = [f32::NEG_INFINITY; LANES];
    let larger = |m: f32, v: f32| if v > m { v } else { m };
    let (chunks, tail) = a.as_chunks::<LANES>();
    for c in chunks {
        for i in 0..LANES {
            acc[i] = larger(acc[i], c[i]);
        }
    }
    for (m, &v) in acc.iter_mut().zip(tail) {
        *m = larger(*m, v);
    }
    tree(acc, larger)
}

/// `x = n·ln 2 + r` with `|r| ≤ ln 2 / 2`: returns `n` and `eʳ − 1`. A NaN stays in the second value.
#[inline(always)]
fn reduce(x: f32) -> (i32, f32) {
    // Adding 1.5·2²³ rounds to an integer and leaves it in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in a part of nine bits, so that n times it is exact, and the rest.
    const LN2_HIGH: f32 = 355.0 / 512.0;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = (x - n * LN2_HIGH) - n * LN2_LOW;
    // (eʳ − 1 − r)/r², minimax on the interval, fitted for this file (relative error of eʳ: 3.1e-9).
    let q = 0.499_999_94 + r * (0.166_665_2 + r * (0.041_668_4 + r * (0.008_368_852 + r * 0.001_381_432)));
    ((shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32), r + r * r * q)
}

/// 2ⁿ for `n` of a normal number.
#[inline(always)]
fn pow2(n: i32) -> f32 {
    f32::from_bits((n.wrapping_add(127) as u32) << 23)
}

/// eˣ to about 1.5 units in the last place, with overflow to infinity and gradual underflow.
#[inline(always)]
pub(crate) fn exp(x: f32) -> f32 {
    // Comparisons written so that NaN passes through.
    let x = if x < -104.0 { -104.0 } else { x };
    let x = if x > 89.0 { 89.0 } else { x };
    let (n, p) = reduce(x);
    let half = n >> 1;
    (1.0 + p) * pow2(half) * pow2(n.wrapping_sub(half))
}

/// `1 / (1 + e⁻ˣ)`.
#[inline(always)]
pub(crate) fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// tanh, accurate relative to its value near zero as well.
#[inline(always)]
pub(crate) fn tanh(x: f32) -> f32 {
    let y = -2.0 * x.abs();
    let y = if y < -40.0 { -40.0 } else { y };
    let (n, p) = reduce(y);
    let s = pow2(n);
    let m = s * p + (s - 1.0);
    (-m / (m + 2.0)).copysign(x)
}

/// The standard normal distribution at `x`: Φ(x), relatively accurate in the lower tail too, and its density.
#[inline(always)]
pub(crate) fn normal(x: f32) -> (f32, f32) {
    const INV_SQRT_2PI: f32 = 0.398_942_3;
    let e = exp(-0.5 * x * x);
    // erfc(z)·exp(z²) as a polynomial in t = 1/(1 + z/2), fitted for this file (relative error 4.4e-8 on 0 ≤ z ≤ 11).
    let t = 1.0 / (1.0 + (0.5 * std::f32::consts::FRAC_1_SQRT_2) * x.abs());
    let p = 0.280_442_47 + t * (-0.489_269_67 + t * (0.285_571_4 + t * -0.059_272_54));
    let p = 0.282_085_03 + t * (0.282_399_6 + t * (0.242_927_36 + t * (0.203_383_18 + t * (-0.028_266_853 + t * p))));
    let tail = 0.5 * e * t * p;
    (if x < 0.0 { tail } else { 1.0 - tail }, e * INV_SQRT_2PI)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn grid(low: f32, high: f32) -> Vec<f32> {
        let n = 400_000;
        (0..=n).map(|i| low + (high - low) * (i as f32 / n as f32)).collect()
    }

    /// The largest |f − g| / (|g| + floor) over a grid.
    fn error(xs: &[f32], floor: f64, f: impl Fn(f32) -> f32, g: impl Fn(f64) -> f64) -> f64 {
        let mut fast = xs.to_vec();
        run(
            #[inline(always)]
            || fast.iter_mut().for_each(|x| *x = f(*x)),
        );
        xs.iter()
            .zip(&fast)
            .map(|(&x, &y)| {
                let want = g(f64::from(x));
                (f64::from(y) - want).abs() / (want.abs() + floor)
            })
            .fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })
    }

    /// Φ by the series in the middle and the continued fraction in the tail.
    fn phi(x: f64) -> f64 {
        let density = (-0.5 * x * x).exp() / (std::f64::consts::TAU).sqrt();
        if x.abs() < 3.0 {
            let (mut term, mut sum, mut k) = (x, x, 1.0);
            while term.abs() > 1e-18 {
                k += 2.0;
                term *= x * x / k;
                sum += term;
            }
            return 0.5 + density * sum;
        }
        let a = x.abs();
        let tail = density / (1..200).rev().fold(a, |f, k| a + f64::from(k) / f);
        if x < 0.0 { tail } else { 1.0 - tail }
    }

    #[test]
    fn elementary_functions_against_f64() {
        assert!(error(&grid(-87.0, 88.7), 0.0, exp, f64::exp) < 2e-7);
        assert!(error(&grid(-1.0, 1.0), 0.0, exp, f64::exp) < 1.8e-7);
        assert!(error(&grid(-80.0, 80.0), 0.0, sigmoid, |x| 1.0 / (1.0 + (-x).exp())) < 3e-7);
        assert!(error(&grid(-12.0, 12.0), 1e-30, tanh, f64::tanh) < 3e-7);
        assert!(error(&grid(-1e-3, 1e-3), 1e-30, tanh, f64::tanh) < 3e-7);
        assert!(error(&grid(-13.0, 9.0), 1.0, |x| normal(x).0, phi) < 3e-7);
        // The lower tail keeps relative accuracy, up to what rounding x²/2 costs.
        assert!(error(&grid(-5.0, 0.0), 0.0, |x| normal(x).0, phi) < 1e-6);
        let density = |x: f64| (-0.5 * x * x).exp() / std::f64::consts::TAU.sqrt();
        assert!(error(&grid(-9.0, 9.0), 1.0, |x| normal(x).1, density) < 1e-7);
        assert!(error(&grid(-5.0, 5.0), 0.0, |x| normal(x).1, density) < 1e-6);
    }

    #[test]
    fn limits_and_nan() {
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(f32::INFINITY), f32::INFINITY);
        assert_eq!(exp(0.0), 1.0);
        assert!(exp(-100.0) > 0.0 && exp(-100.0) < 1e-43);
        assert_eq!((tanh(f32::INFINITY), tanh(f32::NEG_INFINITY), tanh(0.0)), (1.0, -1.0, 0.0));
        assert!(tanh(-0.0).is_sign_negative());
        assert_eq!((sigmoid(f32::INFINITY), sigmoid(f32::NEG_INFINITY)), (1.0, 0.0));
        assert_eq!((normal(f32::INFINITY).0, normal(f32::NEG_INFINITY).0), (1.0, 0.0));
        for f in [exp, sigmoid, tanh, |x| normal(x).0] {
            assert!(f(f32::NAN).is_nan());
        }
    }

    #[test]
    fn reductions_at_all_lengths() {
        for n in 0..200usize {
            let a: Vec<f32> = (0..n).map(|i| (i % 7) as f32).collect();
            let b: Vec<f32> = (0..n).map(|i| (i % 5) as f32).collect();
            let want: f32 = a.iter().sum();
            assert_eq!(sum1(&a, |x| x), want);
            assert_eq!(sum2(&a, &b, |x, y| x * y), a.iter().zip(&b).map(|(x, y)| x * y).sum::<f32>());
            assert_eq!(sum3(&a, &b, &a, |x, y, z| x + y - z), b.iter().sum::<f32>());
            assert_eq!(max(&a), a.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        }
    }

    #[inline(always)]
    fn bits(xs: &[f32]) -> Vec<u32> {
        let mut v = xs.to_vec();
        for x in &mut v {
            *x = tanh(*x) + normal(*x).0 + exp(*x);
        }
        v.push(sum1(xs, sigmoid));
        v.iter().map(|x| x.to_bits()).collect()
    }

    #[test]
    fn every_instruction_set_gives_the_same_bits() {
        let xs: Vec<f32> = (0..1000).map(|i| (i as f32 - 500.0) * 0.037).collect();
        let wide = run(
            #[inline(always)]
            || bits(&xs),
        );
        assert_eq!(wide, bits(&xs));
    }
}
