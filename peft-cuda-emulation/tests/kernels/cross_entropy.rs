use candle_core::{Device, Tensor};
use peft_cuda::Element;
use peft_cuda::cross_entropy::Chunk;
use peft_cuda_emulation::{Buffer, Order};
use peft_kernels::{CeRows, cross_entropy_rows};

use super::harness::*;

const SHAPES: [(usize, usize); 7] = [(1, 1), (3, 2), (5, 7), (2, 40), (7, 33), (2, 4096), (3, 5001)];

fn targets(rows: usize, vocab: usize) -> Vec<u32> {
    (0..rows).map(|row| (row * 7919 + 3) as u32 % vocab as u32).collect()
}

struct Got {
    nll: Vec<f64>,
    hits: Vec<u32>,
    grad: Vec<f64>,
    totals: Vec<f64>,
}

/// Runs both kernels on a chunk.
fn kernels(
    (x, element): (&Tensor, Element),
    targets: &[u32],
    weights: Option<&[f32]>,
    (scale, cap): (Option<f32>, Option<f32>),
    order: Order,
) -> Got {
    let (rows, vocab) = x.dims2().unwrap();
    let (mut logits, mut ids) = (upload(x, element), Buffer::of_ints(targets));
    let mut weights = weights.map(Buffer::of_floats);
    let (mut nll, mut hits) = (Buffer::poisoned(rows * 4), Buffer::poisoned(rows * 4));
    let before = [1.5f64, 2.5, 3.0];
    let mut totals = Buffer::of_bytes(&before.map(f64::to_ne_bytes).concat());
    let weights = weights.as_mut().map_or(0, Buffer::address);
    let chunk = Chunk { logits: logits.operand(element), rows, vocab, targets: ids.address(), weights };
    launch(&chunk.losses(nll.address(), hits.address(), scale, cap), order);
    launch(&chunk.totals(nll.address(), hits.address(), totals.address()), order);
    assert!(nll.is_intact() && hits.is_intact() && totals.is_intact());
    let totals = totals.bytes().as_chunks().0.iter().zip(before).map(|(b, was)| f64::from_ne_bytes(*b) - was).collect();
    Got { nll: download(&nll, Element::F32), hits: hits.ints(), grad: download(&logits, element), totals }
}

/// Row by row, since the reference counts hits of all rows together.
fn want(x: &Tensor, targets: &[u32], scale: f64, cap: Option<f64>) -> Vec<CeRows> {
    let row = |(i, t): (usize, &u32)| cross_entropy_rows(&x.narrow(0, i, 1).unwrap(), &[*t], scale, cap, true).unwrap();
    targets.iter().enumerate().map(row).collect()
}

#[test]
fn losses_gradients_hits_and_totals() {
    for (i, (rows, vocab)) in SHAPES.into_iter().enumerate() {
        for element in ELEMENTS {
            for cap in [None, Some(3.0f32)] {
                let x = randn(i as u64, (rows, vocab), 4.0);
                let x = if cap.is_none() { (x + 20.0).unwrap() } else { x };
                let ids = targets(rows, vocab);
                let some: Vec<f32> = (0..rows).map(|r| r as f32 * 0.75).collect();
                for weights in [None, Some(some.as_slice())] {
                    let want = want(&rounded(&x, element), &ids, 0.5, cap.map(f64::from));
                    let weight = |r: usize| weights.map_or(1.0, |w| f64::from(w[r]));
                    let grad = |(r, row): (usize, &CeRows)| {
                        values(row.grad.as_ref().unwrap()).into_iter().map(move |g| g * weight(r)).collect::<Vec<_>>()
                    };
                    let want_grad: Vec<f64> = want.iter().enumerate().flat_map(grad).collect();
                    let want_nll: Vec<f64> = want.iter().map(|row| f64::from(row.nll[0])).collect();
                    let want_hits: Vec<u32> = want.iter().map(|row| row.hits as u32).collect();
                    for order in Order::ALL {
                        let what = format!("{element:?} {rows}×{vocab} cap {cap:?} {order:?}");
                        let got = kernels((&x, element), &ids, weights, (Some(0.5), cap), order);
                        close(&format!("{what} nll"), &got.nll, &want_nll, 3e-6);
                        assert_eq!(got.hits, want_hits, "{what}");
                        close(&format!("{what} gradient"), &got.grad, &want_grad, limit(element));
                        let weighted = want_nll.iter().enumerate().map(|(r, v)| v * weight(r)).sum();
                        let hits = want_hits.iter().map(|h| f64::from(*h)).sum();
                        close(&what, &got.totals, &[weighted, want_nll.iter().sum(), hits], 3e-6);
                        let read = kernels((&x, element), &ids, weights, (None, cap), order);
                        assert_eq!((read.nll, read.hits), (got.nll, got.hits));
                        assert_eq!(read.grad, values(&rounded(&x, element)), "logits that were only to be read");
                    }
                }
            }
        }
    }
}

#[test]
fn ties_masked_logits_and_rows_that_are_lost() {
    for vocab in [3000usize, 2049] {
        for element in ELEMENTS {
            let mut x = vec![vec![f32::NEG_INFINITY; vocab]; 7];
            for row in &mut x[..3] {
                row[vocab - 1] = -200.0;
                row[100] = -200.0;
            }
            x[3].fill(0.5);
            x[4].fill(0.0);
            x[4][1500] = f32::NAN;
            x[5].fill(0.0);
            x[5][1500] = f32::INFINITY;
            let ids = [100, vocab as u32 - 1, 5, 0, 1, 1, 1];
            let x = Tensor::new(x, &Device::Cpu).unwrap();
            for order in Order::ALL {
                let got = kernels((&x, element), &ids, None, (Some(1.0), None), order);
                let ln = |v: f64| v.ln();
                for (row, want) in [ln(2.0), ln(2.0), f64::INFINITY, ln(vocab as f64)].into_iter().enumerate() {
                    assert!(got.nll[row] == want || (got.nll[row] - want).abs() < 1e-6, "{row}: {}", got.nll[row]);
                }
                assert_eq!(got.hits[..4], [1, 0, 0, 1], "the first of equals is the largest");
                let rows: Vec<&[f64]> = got.grad.chunks(vocab).collect();
                assert_eq!((rows[0][100], rows[0][vocab - 1], rows[0][0]), (-0.5, 0.5, 0.0));
                for (row, grad) in rows.iter().enumerate().skip(4) {
                    assert!(got.nll[row].is_nan(), "{row}");
                    assert!(grad.iter().all(|g| g.is_nan()), "{row}");
                }
            }
        }
    }
}
