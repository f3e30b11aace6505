use candle_core::{Device, Tensor};
use peft_cuda::rows::{self, Heads};
use peft_cuda_emulation::{Buffer, Order};
use peft_kernels::{RotaryLayout, RotaryPlan};

use super::harness::*;

#[test]
fn rotary() {
    for (tokens, heads, dim, half) in [(1usize, 1usize, 2usize, 1usize), (5, 3, 10, 3), (33, 4, 16, 8), (7, 2, 64, 16)]
    {
        for layout in [RotaryLayout::Half, RotaryLayout::Interleaved] {
            for element in ELEMENTS {
                let angles = randn(2, (tokens + 3, half), 3.0);
                let (cos, sin) = (angles.cos().unwrap(), angles.sin().unwrap());
                let positions: Vec<u32> = (3..tokens as u32 + 3).collect();
                let plan = RotaryPlan::new(&cos, &sin, &positions, dim, layout).unwrap();
                let (x, dy) = (randn(1, (tokens, heads * dim), 1.0), randn(4, (tokens, heads * dim), 1.0));
                let (want, grads) =
                    reference(&[rounded(&x, element)], &rounded(&dy, element), |a| peft_kernels::rotary(&a[0], &plan));
                let part = |t: &Tensor| upload(&t.narrow(0, 3, tokens).unwrap(), peft_cuda::Element::F32);
                let (mut cos, mut sin) = (part(&cos), part(&sin));
                let angles = (cos.address(), sin.address());
                let shape = Heads { tokens, heads, dim, half, interleaved: layout == RotaryLayout::Interleaved };
                for (x, want, back) in [(&x, &want, false), (&dy, &grads[0], true)] {
                    let (mut x, mut y) = (upload(x, element), room(tokens * heads * dim, element));
                    launch(&rows::rotary(shape, x.operand(element), angles, y.address(), back), Order::Forwards);
                    close(
                        &format!("{layout:?} {element:?} {dim} back {back}"),
                        &download(&y, element),
                        want,
                        limit(element),
                    );
                }
            }
        }
    }
}

#[test]
fn argmax_is_the_cpus() {
    for width in [1usize, 5, 700, 1500] {
        for element in ELEMENTS {
            let mut x = randn(1, (6, width), 1.0).to_vec2::<f32>().unwrap();
            x[1].fill(f32::NEG_INFINITY);
            x[2][width / 2] = f32::NAN;
            x[3][width - 1] = 9.0;
            x[3][width / 3] = 9.0;
            let x = Tensor::new(x, &Device::Cpu).unwrap();
            let want = peft_kernels::argmax_rows(&x.to_dtype(dtype(element)).unwrap()).unwrap();
            let (mut x, mut out) = (upload(&x, element), Buffer::poisoned(6 * 4));
            launch(&rows::argmax(x.operand(element), out.address(), 6, width), Order::Backwards);
            let got: Vec<Option<u32>> = out.ints().into_iter().map(|i| (i != u32::MAX).then_some(i)).collect();
            assert_eq!(got, want, "{element:?} {width}");
        }
    }
}

#[test]
fn embedding_rows_add_up() {
    let (vocab, width, ids) = (11usize, 37usize, [4u32, 0, 4, 10, 4]);
    for element in ELEMENTS {
        let (table, dy) = (randn(1, (vocab, width), 1.0), randn(2, (ids.len(), width), 1.0));
        let (_, grads) = reference(&[rounded(&table, element)], &rounded(&dy, element), |a| {
            a[0].index_select(&Tensor::new(&ids, &Device::Cpu)?, 0)
        });
        let (mut rows_, mut starts, mut tokens) =
            (Buffer::of_ints(&[0, 4, 10]), Buffer::of_ints(&[0, 1, 4, 5]), Buffer::of_ints(&[1, 0, 2, 4, 3]));
        let lists = [rows_.address(), starts.address(), tokens.address()];
        let (mut dy, mut out) = (upload(&dy, element), upload(&table.zeros_like().unwrap(), element));
        launch(&rows::embedding_backward(dy.operand(element), lists, out.address(), 3, width), Order::Forwards);
        close("table", &download(&out, element), &grads[0], limit(element));
    }
}
