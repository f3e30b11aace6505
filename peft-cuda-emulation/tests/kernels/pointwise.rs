use peft_cuda::Element;
use peft_cuda::pointwise::{self, Act, Beside, Mask};
use peft_cuda_emulation::Order;
use peft_kernels::{Activation, Stream};

use super::harness::*;

const ACTS: [(Act, Activation); 8] = [
    (Act::Silu, Activation::Silu),
    (Act::Gelu, Activation::Gelu),
    (Act::GeluTanh, Activation::GeluTanh),
    (Act::QuickGelu, Activation::QuickGelu),
    (Act::Relu, Activation::Relu),
    (Act::ReluSquared, Activation::ReluSquared),
    (Act::Sigmoid, Activation::Sigmoid),
    (Act::Tanh, Activation::Tanh),
];

#[test]
fn activations_and_gates() {
    for n in [1usize, 7, 64, 1003, 2050] {
        for (act, reference_act) in ACTS {
            for element in ELEMENTS {
                let (x, u, dy) = (randn(1, n, 2.0), randn(2, n, 1.0), randn(3, n, 1.0));
                let (wx, wu, wdy) = (rounded(&x, element), rounded(&u, element), rounded(&dy, element));
                let one =
                    reference(std::slice::from_ref(&wx), &wdy, |a| peft_kernels::activation(&a[0], reference_act));
                let two = reference(&[wx, wu], &wdy, |a| peft_kernels::gated_activation(&a[0], &a[1], reference_act));
                let what = format!("{act:?} {element:?} {n}");
                let (mut x, mut u, mut dy) = (upload(&x, element), upload(&u, element), upload(&dy, element));
                let (x, u, dy) = (x.operand(element), u.address(), dy.address());
                let result = |make: &dyn Fn(u64) -> peft_cuda::Launch| {
                    let mut out = room(n, element);
                    launch(&make(out.address()), Order::Forwards);
                    download(&out, element)
                };
                let limit = limit(element);
                close(&what, &result(&|out| pointwise::activation(act, x, 0, out, n)), &one.0, limit);
                close(
                    &format!("{what} d"),
                    &result(&|out| pointwise::activation(act, x, dy, out, n)),
                    &one.1[0],
                    limit,
                );
                close(
                    &format!("{what} gated"),
                    &result(&|out| pointwise::gated_forward(act, x, u, out, n)),
                    &two.0,
                    limit,
                );
                let (mut dg, mut du) = (room(n, element), room(n, element));
                launch(&pointwise::gated_backward(act, x, u, dy, (dg.address(), du.address()), n), Order::Backwards);
                close(&format!("{what} dg"), &download(&dg, element), &two.1[0], limit);
                close(&format!("{what} du"), &download(&du, element), &two.1[1], limit);
            }
        }
    }
}

#[test]
fn dropout_is_the_mask_of_the_cpu() {
    let stream = Stream { seed: 0x1234_5678_9abc_def0, step: 7, site: 3 };
    for n in [1usize, 5, 64, 4099] {
        for element in ELEMENTS {
            let (p, x) = (0.3f32, randn(1, n, 1.0));
            let wide = rounded(&x, element).to_dtype(dtype(element)).unwrap();
            let want = values(&peft_kernels::dropout(&wide, p, stream).unwrap());
            let mask = Mask {
                seed: stream.seed,
                step: stream.step,
                site: stream.site,
                threshold: (f64::from(p) * 4_294_967_296.0) as u32,
                scale: 1.0 / (1.0 - p),
            };
            let (mut x, mut y) = (upload(&x, element), room(n, element));
            launch(&pointwise::dropout(mask, x.operand(element), y.address(), n), Order::Forwards);
            assert_eq!(download(&y, element), want, "{element:?} {n}");
            let (other, mut y) = (Mask { step: 8, ..mask }, room(n, element));
            launch(&pointwise::dropout(other, x.operand(element), y.address(), n), Order::Forwards);
            assert!(n < 64 || download(&y, element) != want, "another step, the same mask");
        }
    }
}

#[test]
fn vectors_beside_rows_and_sums() {
    for (rows, width) in [(1usize, 1usize), (3, 5), (7, 64), (65, 40)] {
        for element in ELEMENTS {
            for v_element in if element == Element::F32 { vec![element] } else { vec![element, Element::F32] } {
                let (x, v) = (randn(1, (rows, width), 1.0), randn(2, width, 1.0));
                let (wx, wv) = (rounded(&x, element), rounded(&rounded(&v, v_element), element));
                for (how, want) in [(Beside::Add, wx.broadcast_add(&wv)), (Beside::Multiply, wx.broadcast_mul(&wv))] {
                    let (mut x, mut v, mut y) =
                        (upload(&x, element), upload(&v, v_element), room(rows * width, element));
                    let l = pointwise::beside(how, x.operand(element), v.operand(v_element), y.address(), rows, width);
                    launch(&l, Order::Forwards);
                    close(
                        &format!("{how:?} {element:?}"),
                        &download(&y, element),
                        &values(&want.unwrap()),
                        limit(element),
                    );
                }
            }
            let (a, b) = (randn(3, rows * width, 1.0), randn(4, rows * width, 1.0));
            let want = values(&(rounded(&a, element) + rounded(&b, element)).unwrap());
            let (mut a, mut b) = (upload(&a, element), upload(&b, element));
            launch(&pointwise::add_in_place(a.operand(element), b.address(), rows * width), Order::Forwards);
            close("sum", &download(&a, element), &want, limit(element));
        }
    }
}
