use peft_cuda::norm::Norm;
use peft_cuda::rows::{Factor, column_sums, partial_rows};
use peft_cuda::{Element, Operand};
use peft_cuda_emulation::Order;

use super::harness::*;

const SHAPES: [(usize, usize); 7] = [(1, 1), (3, 7), (5, 32), (9, 96), (3, 1025), (2, 1536), (67, 48)];

fn weights(x: Element) -> Vec<Element> {
    if x == Element::F32 { vec![x] } else { vec![x, Element::F32] }
}

fn check(centred: bool, offset: f32) {
    for (i, (rows, width)) in SHAPES.into_iter().enumerate() {
        if centred && width == 1 {
            continue;
        }
        for element in ELEMENTS {
            for weight in weights(element) {
                let seed = i as u64;
                let (x, w, b) =
                    (randn(seed, (rows, width), 1.5), randn(50 + seed, width, 0.7), randn(60 + seed, width, 0.7));
                let dy = randn(70 + seed, (rows, width), 1.0);
                let inputs = [rounded(&x, element), rounded(&w, weight), rounded(&b, weight)];
                let wide_dy = rounded(&dy, element);
                let inputs = if centred { &inputs[..] } else { &inputs[..2] };
                let (want, gradients) = reference(inputs, &wide_dy, |a| match a {
                    [x, w, b] => peft_kernels::layer_norm(x, w, Some(b), 1e-5),
                    _ => peft_kernels::rms_norm(&a[0], &a[1], 1e-5, offset),
                });
                for order in Order::ALL {
                    let what =
                        format!("centred {centred} offset {offset} {element:?} {weight:?} {rows}×{width} {order:?}");
                    let norm = Norm { centred, rows, width, eps: 1e-5, offset };
                    let (mut x, mut w, mut b, mut dy) =
                        (upload(&x, element), upload(&w, weight), upload(&b, weight), upload(&dy, element));
                    let (mut y, mut dx) = (room(rows * width, element), room(rows * width, element));
                    let (mut means, mut rstds) = (room(rows, Element::F32), room(rows, Element::F32));
                    let (x, w) = (x.operand(element), w.operand(weight));
                    let bias = if centred { b.address() } else { 0 };
                    let rounds = !centred && offset == 0.0;
                    launch(&norm.forward(x, w, bias, y.address(), rounds), order);
                    close(&what, &download(&y, element), &want, 2.0 * limit(element));

                    let dy_at = dy.address();
                    launch(&norm.backward(x, w, dy_at, dx.address(), means.address(), rstds.address()), order);
                    // A row of one element is ±1 whatever it was: its gradient is what eps leaves of a cancellation.
                    if width > 1 {
                        close(&format!("{what} dx"), &download(&dx, element), &gradients[0], 2.0 * limit(element));
                    }

                    let factor = Factor { x: x.address, means: means.address(), rstds: rstds.address() };
                    let grad = Operand { address: dy_at, element };
                    let mut partial = room(partial_rows(rows) * width, Element::F32);
                    let mut dw = room(width, weight);
                    for l in column_sums(grad, factor, partial.address(), dw.operand(weight), (rows, width)) {
                        launch(&l, order);
                    }
                    close(&format!("{what} dw"), &download(&dw, weight), &gradients[1], 2.0 * limit(weight).max(1e-5));
                    if centred {
                        let mut db = room(width, weight);
                        for l in
                            column_sums(grad, Factor::default(), partial.address(), db.operand(weight), (rows, width))
                        {
                            launch(&l, order);
                        }
                        close(&format!("{what} db"), &download(&db, weight), &gradients[2], 2.0 * limit(weight));
                    }
                }
            }
        }
    }
}

#[test]
fn rms_norm() {
    check(false, 0.0);
    check(false, 1.0);
}

#[test]
fn layer_norm() {
    check(true, 0.0);
}

/// What the comparison is worth: another epsilon, and a row too few.
#[test]
fn planted_mistakes_are_seen() {
    let (rows, width) = (3, 40);
    let x = randn(1, (rows, width), 0.02);
    let w = randn(2, width, 1.0);
    let want =
        values(&peft_kernels::rms_norm(&rounded(&x, Element::F32), &rounded(&w, Element::F32), 1e-5, 0.0).unwrap());
    let run = |norm: Norm| {
        let (mut x, mut w, mut y) =
            (upload(&x, Element::F32), upload(&w, Element::F32), room(rows * width, Element::F32));
        launch(&norm.forward(x.operand(Element::F32), w.operand(Element::F32), 0, y.address(), true), Order::Forwards);
        error(&download(&y, Element::F32), &want)
    };
    let right = Norm { centred: false, rows, width, eps: 1e-5, offset: 0.0 };
    assert!(run(right) < limit(Element::F32));
    assert!(run(Norm { eps: 1.1e-5, ..right }) > 1e-4);
    assert!(run(Norm { rows: rows - 1, ..right }).is_infinite(), "what nothing wrote is NaN");
}
