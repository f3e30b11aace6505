#![allow(clippy::unwrap_used)]

use candle_core::Device;
use peft_core::kernels::testing::{close, randn};
use peft_core::{AdapterSet, Role, Route, SiteId};

use super::*;
use crate::bottleneck::testing::{HIDDEN, bottleneck};
use crate::bottleneck::{Placement, Projection, Residual, Scaling, Weight};

const ON_STREAM: Placement = Placement::Sequential { on_stream: true, residual: Residual::Output };

type Row = Vec<f32>;

fn members(placements: &[Placement]) -> Vec<Member> {
    let one = |(i, placement): (usize, &Placement)| Member {
        adapter: bottleneck(100 * i as u64, *placement, Scaling::Fixed(0.7), [false, false], false),
        trained: i % 2 == 1,
    };
    placements.iter().enumerate().map(one).collect()
}

fn linear(seed: u64, bias: bool) -> Projection {
    let parameter = |seed: u64, shape: &[usize]| {
        Parameter::new(format!("p{seed}"), &randn(seed, shape, 0.6).unwrap(), Role::Plain).unwrap()
    };
    Projection {
        weight: Weight::Dense(parameter(seed, &[HIDDEN, HIDDEN])),
        bias: bias.then(|| parameter(seed + 1, &[HIDDEN])),
    }
}

fn apply(p: Option<&Projection>, x: &[f32]) -> Row {
    let Some(p) = p else { return x.to_vec() };
    let all = p.parameters();
    let weight = all[0].value().to_vec2::<f32>().unwrap();
    let bias = all.get(1).map_or(vec![0.0; weight.len()], |b| b.value().to_vec1().unwrap());
    weight.iter().zip(bias).map(|(row, b)| b + row.iter().zip(x).map(|(a, b)| a * b).sum::<f32>()).collect()
}

fn add(a: &[f32], b: &[f32]) -> Row {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

fn times(a: &[f32], s: f32) -> Row {
    a.iter().map(|a| a * s).collect()
}

/// `0.7 · up(relu(down(x)))`.
fn made(member: &Member, x: &[f32]) -> Row {
    let down = apply(Some(&member.adapter.down), x);
    times(&apply(Some(&member.adapter.up), &down.into_iter().map(|x| x.max(0.0)).collect::<Row>()), 0.7)
}

/// Element by element, over what the adapters make.
fn attended(attention: &Attention, query: &[f32], made: &[Row], residual: &[f32]) -> Row {
    let made: Vec<Row> =
        made.iter().map(|u| if attention.residual_before { add(u, residual) } else { u.clone() }).collect();
    let query = apply(attention.query.as_ref(), query);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f32>();
    let scores: Vec<f32> = made.iter().map(|u| dot(&query, &apply(attention.key.as_ref(), u)).exp()).collect();
    let total: f32 = scores.iter().sum();
    let mut out = vec![0.0; HIDDEN];
    for (u, score) in made.iter().zip(&scores) {
        let value = if attention.value_before_softmax { apply(attention.value.as_ref(), u) } else { u.clone() };
        out = add(&out, &times(&value, score / total));
    }
    let out = if attention.value_before_softmax { out } else { apply(attention.value.as_ref(), &out) };
    if attention.residual_before { out } else { add(&out, residual) }
}

/// Holds a composition to what `reference` makes of a row of the sublayer's output and one of the stream, the stream behind it.
fn check(name: &str, composed: &Composed, reference: impl Fn(&[f32], &[f32]) -> Row) {
    let (h, stream) = (randn(7, (4, HIDDEN), 1.0).unwrap(), randn(8, (4, HIDDEN), 1.0).unwrap());
    let rows = |t: &Tensor| t.to_vec2::<f32>().unwrap();
    let want: Row = rows(&h).iter().zip(rows(&stream)).flat_map(|(h, s)| reference(h, &s)).collect();
    let want = Tensor::from_vec(want, (4, HIDDEN), &Device::Cpu).unwrap();
    let set = AdapterSet::empty();
    let ctx = Ctx::eval(&set, &Route::Base);
    let join = Join { output: &h, residual: &stream, norm: None };
    close(name, &composed.join(&join, &ctx).unwrap(), &want, 2e-5).unwrap();
}

fn attention(flags: usize) -> Attention {
    let flag = |bit: usize| flags >> bit & 1 == 1;
    Attention {
        site: SiteId(0),
        query: flag(0).then(|| linear(50, true)),
        key: Some(linear(60, true)),
        value: flag(1).then(|| linear(70, false)),
        query_before_norm: flag(2),
        residual_before: flag(3),
        value_before_softmax: flag(4),
        dropout: 0.0,
    }
}

#[test]
fn a_fusion_is_adapterhubs() {
    for flags in 0..32 {
        let fuse = Node::Fuse(vec![Node::One(0), Node::One(1), Node::One(2)]);
        let composed = Composed { members: members(&[ON_STREAM; 3]), node: fuse, attention: Some(attention(flags)) };
        check(&format!("flags {flags:b}"), &composed, |h, stream| {
            let read = add(h, stream);
            let all: Vec<Row> = composed.members.iter().map(|m| made(m, &read)).collect();
            let attention = composed.attention.as_ref().unwrap();
            let query = if attention.query_before_norm { h } else { &read };
            add(&attended(attention, query, &all, h), stream)
        });
    }
}

#[test]
fn a_fusion_of_a_stack_goes_through_both_placements() {
    let plain = Placement::Sequential { on_stream: false, residual: Residual::Input };
    let fuse = Node::Fuse(vec![Node::Stack(vec![Node::One(0), Node::One(1)]), Node::One(2)]);
    let composed =
        Composed { members: members(&[ON_STREAM, plain, ON_STREAM]), node: fuse, attention: Some(attention(0b10011)) };
    check("fusion", &composed, |h, stream| {
        let [a, b, c] = [0, 1, 2].map(|i| &composed.members[i]);
        let read = add(h, stream);
        // The stack enters by its own first adapter, behind the placement of the last.
        let first = add(&made(a, &add(&read, stream)), &read);
        let all = [made(b, &first), made(c, &read)];
        add(&attended(composed.attention.as_ref().unwrap(), &read, &all, h), stream)
    });
}

#[test]
fn a_stack_goes_from_one_to_the_next() {
    let plain = Placement::Sequential { on_stream: false, residual: Residual::Input };
    let composed = Composed {
        members: members(&[ON_STREAM, plain]),
        node: Node::Stack(vec![Node::One(0), Node::One(1)]),
        attention: None,
    };
    check("stack", &composed, |h, stream| {
        let first = add(&made(&composed.members[0], &add(h, stream)), h);
        add(&add(&made(&composed.members[1], &first), &first), stream)
    });
    assert_eq!(composed.parameters().len(), 4, "those of the one that is trained");
}

#[test]
fn a_mean_weighs_outputs() {
    for placement in [ON_STREAM, Placement::Parallel] {
        let mean = Node::Average(vec![(0.75, Node::One(0)), (0.25, Node::One(1))]);
        let composed = Composed { members: members(&[placement; 2]), node: mean, attention: None };
        check(&format!("{placement:?}"), &composed, |h, stream| {
            let read = if placement == Placement::Parallel { stream.to_vec() } else { add(h, stream) };
            let [a, b] = [0, 1].map(|i| made(&composed.members[i], &read));
            add(&add(&add(&times(&a, 0.75), &times(&b, 0.25)), h), stream)
        });
    }
}
