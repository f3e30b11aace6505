//! Throughput as a share of what the machine can do, both measured in the same run.
//!
//! An operation that computes says its floating-point operations (`Throughput::Elements`, a multiply-add is two) and is held
//! against a large square product by the gemm crate on all threads. One that moves memory says the bytes that it has to read and
//! write at least (`Throughput::Bytes`) and is held against a copy of as many by all threads, which reads half of them and writes
//! half. Arguments that fit into a cache are there for both.

pub(crate) mod passes;

use std::collections::HashMap;
use std::hint::black_box;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use criterion::measurement::{Measurement, ValueFormatter, WallTime};
use criterion::{Criterion, Throughput};
use rayon::prelude::*;

/// Rows and columns of the product that stands for the GEMM peak: 3 matrices of 16 MB.
const SQUARE: usize = 2048;
/// How often a bound is tried; the fastest counts.
const TRIES: usize = 12;

/// Wall time whose throughputs are in per cent of a bound.
pub(crate) struct Bound {
    shares: Shares,
}

struct Shares {
    flop_per_ns: f64,
    /// Nanoseconds of a copy, by its bytes.
    copies: Mutex<HashMap<u64, f64>>,
}

/// Criterion with a measurement against bounds, configured by the command line.
pub(crate) fn criterion() -> Criterion<Bound> {
    let (a, b) = (vec![1f32; SQUARE * SQUARE], vec![1f32; SQUARE * SQUARE]);
    let mut out = vec![0f32; SQUARE * SQUARE];
    let flop = 2.0 * (SQUARE as f64).powi(3);
    let flop_per_ns = flop / fastest(|| square_product(&a, &b, black_box(&mut out)));
    println!("GEMM peak: {flop_per_ns:.0} GFLOP/s ({SQUARE} cubed, {} threads)", rayon::current_num_threads());
    Criterion::default()
        .with_measurement(Bound { shares: Shares { flop_per_ns, copies: Mutex::default() } })
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .configure_from_args()
}

/// Nanoseconds of the fastest of some runs of `f`.
fn fastest(mut f: impl FnMut()) -> f64 {
    let mut time = || {
        let started = Instant::now();
        f();
        started.elapsed().as_nanos() as f64
    };
    (0..TRIES).map(|_| time()).fold(f64::INFINITY, f64::min)
}

/// Nanoseconds of a copy that reads and writes `bytes` together.
fn copy_time(bytes: u64) -> f64 {
    let n = (bytes / 8).max(1) as usize;
    let (from, mut to) = (vec![1f32; n], vec![0f32; n]);
    let block = n.div_ceil(4 * rayon::current_num_threads());
    fastest(|| {
        to.par_chunks_mut(block).zip(from.par_chunks(block)).for_each(|(to, from)| to.copy_from_slice(from));
        black_box(&mut to);
    })
}

#[allow(unsafe_code)]
fn square_product(a: &[f32], b: &[f32], out: &mut [f32]) {
    const N: isize = SQUARE as isize;
    assert!([a.len(), b.len(), out.len()].iter().all(|&n| n == SQUARE * SQUARE));
    let parallelism = gemm::Parallelism::Rayon(0);
    let (out, a, b) = (out.as_mut_ptr(), a.as_ptr(), b.as_ptr());
    // SAFETY: the slices hold three row-major matrices of SQUARE by SQUARE, as was just checked, and `out` is borrowed alone.
    unsafe {
        gemm::gemm(
            SQUARE,
            SQUARE,
            SQUARE,
            out,
            1,
            N,
            false,
            a,
            1,
            N,
            b,
            1,
            N,
            0f32,
            1f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}

impl ValueFormatter for Shares {
    fn scale_values(&self, typical: f64, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_values(typical, values)
    }

    fn scale_throughputs(&self, typical: f64, throughput: &Throughput, values: &mut [f64]) -> &'static str {
        let (bound, unit) = match throughput {
            Throughput::Elements(flop) => (*flop as f64 / self.flop_per_ns, "% of GEMM peak"),
            Throughput::Bytes(bytes) => {
                let mut copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner);
                (*copies.entry(*bytes).or_insert_with(|| copy_time(*bytes)), "% of a copy")
            }
            other => return WallTime.formatter().scale_throughputs(typical, other, values),
        };
        values.iter_mut().for_each(|ns| *ns = 100.0 * bound / *ns);
        unit
    }

    fn scale_for_machines(&self, values: &mut [f64]) -> &'static str {
        WallTime.formatter().scale_for_machines(values)
    }
}

impl Measurement for Bound {
    type Intermediate = Instant;
    type Value = Duration;

    fn start(&self) -> Instant {
        WallTime.start()
    }

    fn end(&self, started: Instant) -> Duration {
        WallTime.end(started)
    }

    fn add(&self, a: &Duration, b: &Duration) -> Duration {
        WallTime.add(a, b)
    }

    fn zero(&self) -> Duration {
        WallTime.zero()
    }

    fn to_f64(&self, value: &Duration) -> f64 {
        WallTime.to_f64(value)
    }

    fn formatter(&self) -> &dyn ValueFormatter {
        &self.shares
    }
}
