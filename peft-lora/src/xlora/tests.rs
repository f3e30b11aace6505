#![allow(clippy::unwrap_used)]

use candle_core::{DType, Device, Var};
use peft_core::kernels::testing::{close, randn};
use peft_core::kernels::{self, FrozenWeight};
use peft_core::{AdapterSet, Mode, Role, Route, StepRng};

use super::classifier::{Shape, Weighing};
use super::*;

const TOKENS: usize = 5;
const SOFTMAX: Weighing = Weighing { softmax: Some(1.0), top_k: None, softmax_of_top: false };

fn classifier(depth: usize, layers: Option<usize>, weighing: Weighing) -> Arc<Classifier> {
    let shape = Shape { hidden: 6, depth, width: 4, dropout: 0.0, experts: 3, layers };
    let made = Classifier::new(shape, weighing, 1, &Device::Cpu).unwrap();
    for (i, p) in made.parameters().enumerate() {
        p.set(&randn(40 + i as u64, p.value().shape(), 0.7).unwrap()).unwrap();
    }
    Arc::new(made)
}

fn module(classifier: Arc<Classifier>, trains_experts: bool) -> XLoraLinear {
    let parameter = |seed: u64, shape: &[usize]| {
        Parameter::new(format!("p{seed}"), &randn(seed, shape, 0.5).unwrap(), Role::Plain).unwrap()
    };
    // Expert 1 does not stand at this layer.
    let experts = [(0, 2, 1.5), (2, 3, -0.5)].map(|(number, r, scale)| Expert {
        number,
        a: parameter(10 + number as u64, &[r, 7]),
        b: parameter(20 + number as u64, &[8, r]),
        scale,
        dropout: 0.0,
    });
    XLoraLinear { experts: experts.into(), classifier, layer: 1, trains_experts }
}

/// PEFT's weights, row by row.
fn reference_weights(logits: &[f32], weighing: Weighing) -> Vec<f32> {
    let softmax = |x: &[f32], there: &[bool]| -> Vec<f32> {
        let e: Vec<f32> = x.iter().zip(there).map(|(x, there)| if *there { x.exp() } else { 0.0 }).collect();
        let sum: f32 = e.iter().sum();
        e.iter().map(|e| if sum == 0.0 { 0.0 } else { e / sum }).collect()
    };
    let mut s = logits.to_vec();
    if let Some(t) = weighing.softmax {
        s = softmax(&s.iter().map(|x| x / t as f32).collect::<Vec<_>>(), &[true; 3]);
    }
    if let Some(k) = weighing.top_k {
        let rank = |x: f32| s.iter().filter(|other| **other > x).count();
        s = s.iter().map(|&x| if rank(x) < k { x } else { 0.0 }).collect();
    }
    if weighing.softmax_of_top {
        let there: Vec<bool> = s.iter().map(|x| *x != 0.0).collect();
        s = softmax(&s, &there);
    }
    s
}

fn linear(x: &Tensor, [weight, bias]: [&Tensor; 2]) -> Tensor {
    x.matmul(&weight.t().unwrap()).unwrap().broadcast_add(bias).unwrap()
}

#[test]
fn weights_are_pefts() {
    let set = AdapterSet::empty();
    let ctx = Ctx::eval(&set, &Route::Base);
    let first = randn(3, (TOKENS, 6), 1.0).unwrap();
    for depth in [1, 2, 3] {
        for layers in [None, Some(2)] {
            for softmax in [None, Some(1.0), Some(0.3)] {
                for (top_k, softmax_of_top) in
                    [(None, false), (None, true), (Some(2), false), (Some(2), true), (Some(1), true)]
                {
                    let weighing = Weighing { softmax, top_k, softmax_of_top };
                    let classifier = classifier(depth, layers, weighing);
                    let values: Vec<Tensor> = classifier.parameters().map(Parameter::value).collect();
                    let mut x = first.clone();
                    for (i, layer) in values.chunks(2).enumerate() {
                        x = linear(&x, [&layer[0], &layer[1]]);
                        x = if i + 1 < depth { x.relu().unwrap() } else { x };
                    }
                    let logits = if layers.is_some() { x.narrow(1, 3, 3).unwrap() } else { x };
                    let want: Vec<f32> = logits
                        .to_vec2::<f32>()
                        .unwrap()
                        .iter()
                        .flat_map(|row| reference_weights(row, weighing))
                        .collect();
                    let want = Tensor::from_vec(want, (TOKENS, 3), &Device::Cpu).unwrap();
                    let got = classifier.weights(&first, 1, &ctx).unwrap();
                    close(&format!("{depth} {layers:?} {weighing:?}"), &got, &want, 1e-5).unwrap();
                }
            }
        }
    }
}

#[test]
fn a_row_without_a_weight_has_none() {
    let classifier = classifier(1, None, Weighing { softmax: None, top_k: None, softmax_of_top: true });
    classifier.parameters().for_each(|p| p.set(&p.value().zeros_like().unwrap()).unwrap());
    let set = AdapterSet::empty();
    let first = randn(3, (2, 6), 1.0).unwrap();
    let weights = classifier.weights(&first, 0, &Ctx::eval(&set, &Route::Base)).unwrap();
    assert_eq!(weights.to_vec2::<f32>().unwrap(), [[0.0; 3]; 2]);
}

/// Values and gradients of a layer, in training with dropout too, against candle's operations in PEFT's order.
#[test]
fn a_layer_and_its_gradients_equal_a_reference() {
    let (weight, bias) = (randn(1, (8, 7), 0.5).unwrap(), randn(2, 8, 0.5).unwrap());
    let base =
        FrozenLinear::new(SiteId(4), "layer", FrozenWeight::dense(&weight).unwrap(), Some(bias.clone())).unwrap();
    let first = randn(3, (TOKENS, 6), 1.0).unwrap();
    let x = Var::from_tensor(&randn(5, (TOKENS, 7), 1.0).unwrap()).unwrap();
    let dy = randn(6, (TOKENS, 8), 1.0).unwrap();
    let set = AdapterSet::empty();
    for (trains_experts, p, layers) in [(false, 0.0, None), (true, 0.0, Some(2)), (true, 0.4, None)] {
        let classifier = classifier(2, layers, SOFTMAX);
        let mut module = module(classifier.clone(), trains_experts);
        module.experts.iter_mut().for_each(|expert| expert.dropout = p);
        let rng = StepRng { seed: 11, step: 2, run: 0 };
        let mode = Mode::Train { track: true };
        let ctx = Ctx { mode, rng, first: Some(&first), ..Ctx::eval(&set, &Route::Base) };
        let (y, record) = kernels::record(|| module.forward(&base, x.as_tensor(), &ctx)).unwrap();
        let found: std::collections::HashMap<_, _> = record.backward(&dy).unwrap().into_iter().collect();

        let vars: Vec<&Tensor> = classifier.parameters().map(|p| p.var().as_tensor()).collect();
        let hidden = linear(&first, [vars[0], vars[1]]).relu().unwrap();
        let logits = linear(&hidden, [vars[2], vars[3]]);
        let logits = if layers.is_some() { logits.narrow(1, 3, 3).unwrap() } else { logits };
        let e = logits.exp().unwrap();
        let weights = e.broadcast_div(&e.sum_keepdim(1).unwrap()).unwrap();
        let mut want = linear(x.as_tensor(), [&weight, &bias]);
        for expert in &module.experts {
            let weighed = x.broadcast_mul(&weights.narrow(1, expert.number, 1).unwrap()).unwrap();
            let site = SiteId(4 + SITES_APART * (expert.number as u32 + 1));
            let weighed = match ctx.dropout(site, p) {
                Some(d) => kernels::dropout(&weighed, d.p, d.stream).unwrap(),
                None => weighed,
            };
            let narrow = weighed.matmul(&expert.a.var().t().unwrap()).unwrap();
            let share = narrow.matmul(&expert.b.var().t().unwrap()).unwrap();
            want = (want + (share * f64::from(expert.scale)).unwrap()).unwrap();
        }
        close("y", &y, &want, 1e-5).unwrap();
        let expected = (&want * &dy).unwrap().sum_all().unwrap().backward().unwrap();
        let experts = module.experts.iter().flat_map(|e| [e.a.var().as_tensor(), e.b.var().as_tensor()]);
        for of_expert in experts {
            assert_eq!(found.contains_key(&of_expert.id()), trains_experts);
            if let Some(gradient) = found.get(&of_expert.id()) {
                close("an expert", gradient, expected.get(of_expert).unwrap(), 1e-4).unwrap();
            }
        }
        for tensor in vars.into_iter().chain([x.as_tensor()]) {
            close("gradient", &found[&tensor.id()], expected.get(tensor).unwrap(), 1e-4).unwrap();
        }
    }
}

#[test]
fn a_pass_without_a_first_one_is_refused() {
    let base =
        FrozenLinear::new(SiteId(0), "q_proj", FrozenWeight::dense(&randn(1, (8, 7), 0.5).unwrap()).unwrap(), None);
    let set = AdapterSet::empty();
    let x = Tensor::zeros((2, 7), DType::F32, &Device::Cpu).unwrap();
    let module = module(classifier(1, None, SOFTMAX), false);
    let e = module.forward(&base.unwrap(), &x, &Ctx::eval(&set, &Route::Base)).unwrap_err().to_string();
    assert!(e.contains("q_proj") && e.contains("first pass"), "{e}");
}
