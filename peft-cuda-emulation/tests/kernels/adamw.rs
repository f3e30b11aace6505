use candle_core::{Device, Tensor};
use peft_cuda::Element;
use peft_cuda::adamw::{self, Memory, Step, Tables};
use peft_cuda_emulation::{Buffer, Order};
use serde_json::Value;

use super::harness::*;

/// A list of tensors in emulated memory.
struct Group {
    params: Vec<(Buffer, Element)>,
    moments: Vec<[Buffer; 2]>,
    steps: Vec<Buffer>,
    lr_scale: Vec<f64>,
    weight_decay: Vec<f64>,
    order: Order,
}

impl Group {
    fn new(params: &[(Tensor, Element)], lr_scale: &[f64], weight_decay: &[f64], order: Order) -> Self {
        let zeros = |t: &Tensor| Buffer::of_floats(&vec![0f32; t.elem_count()]);
        Self {
            params: params.iter().map(|(t, e)| (upload(t, *e), *e)).collect(),
            moments: params.iter().map(|(t, _)| [zeros(t), zeros(t)]).collect(),
            steps: params.iter().map(|_| Buffer::of_ints(&[0])).collect(),
            lr_scale: lr_scale.to_vec(),
            weight_decay: weight_decay.to_vec(),
            order,
        }
    }

    /// A step of the tensors that have a gradient; the status.
    fn step(&mut self, grads: &[Option<(Tensor, Element)>], step: Step) -> [f64; 3] {
        let mut uploaded: Vec<_> = grads.iter().map(|g| g.as_ref().map(|(t, e)| (upload(t, *e), *e))).collect();
        let mut tensors = Vec::new();
        let mut ids = Vec::new();
        for (i, grad) in uploaded.iter_mut().enumerate() {
            let Some((grad, element)) = grad else { continue };
            let (param, of_param) = &mut self.params[i];
            let len = param.bytes().len() / of_param.size();
            let [m, v] = &mut self.moments[i];
            tensors.push(adamw::Tensor {
                param: param.operand(*of_param),
                grad: grad.operand(*element),
                m: m.address(),
                v: v.address(),
                len,
                lr_scale: self.lr_scale[i],
                weight_decay: self.weight_decay[i],
            });
            ids.push(i);
        }
        let tables = Tables::new(&tensors);
        let words = |w: &[u64]| Buffer::of_bytes(&w.iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>());
        let (mut entries, mut chunks) = (words(&tables.entries), words(&tables.chunks));
        let mut steps = Buffer::of_ints(&ids.iter().map(|i| self.steps[*i].ints()[0]).collect::<Vec<_>>());
        let mut partial = Buffer::poisoned(tables.chunks.len() * 8);
        let mut rates = Buffer::poisoned(tables.tensors() * 12);
        let mut status = Buffer::poisoned(24);
        let memory = Memory {
            entries: entries.address(),
            chunks: chunks.address(),
            steps: steps.address(),
            partial: partial.address(),
            rates: rates.address(),
            status: status.address(),
        };
        step.launches(&tables, memory).iter().for_each(|l| launch(l, self.order));
        for buffer in [&entries, &chunks, &steps, &partial, &rates, &status] {
            assert!(buffer.is_intact());
        }
        for (i, step) in ids.iter().zip(steps.ints()) {
            self.steps[*i] = Buffer::of_ints(&[step]);
        }
        let status: Vec<f64> = status.bytes().as_chunks().0.iter().map(|b| f64::from_ne_bytes(*b)).collect();
        [status[0], status[1], status[2]]
    }

    fn values(&self, i: usize) -> Vec<f64> {
        download(&self.params[i].0, self.params[i].1)
    }
}

const STEP: Step = Step { lr: 1e-2, beta1: 0.9, beta2: 0.999, eps: 1e-8, max_norm: 0.0 };

/// The fixture of `peft-train`, which torch 2 computed.
#[test]
fn twenty_steps_of_torch() {
    let json: Value =
        serde_json::from_str(include_str!("../../../peft-train/tests/fixtures/torch_optim.json")).unwrap();
    let shapes: Vec<Vec<usize>> = serde_json::from_value(json["shapes"].clone()).unwrap();
    let tensor = |i: usize, v: &Value| {
        let values: Vec<f32> = v.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect();
        Tensor::from_vec(values, shapes[i].as_slice(), &Device::Cpu).unwrap()
    };
    let cases = json["adamw"].as_array().unwrap();
    assert_eq!(cases.len(), 4);
    for (case, order) in cases.iter().flat_map(|c| Order::ALL.map(|o| (c, o))) {
        let number = |name: &str| case[name].as_f64().unwrap();
        // A bf16 value may land on the other side of one rounding.
        let (element, tolerance) = if case["dtype"] == "bf16" { (Element::Bf16, 8e-3) } else { (Element::F32, 3e-7) };
        let params: Vec<_> = (0..shapes.len()).map(|i| (tensor(i, &json["start"][i]), element)).collect();
        let n = params.len();
        let mut group = Group::new(&params, &vec![1.0; n], &vec![number("weight_decay"); n], order);
        let mut compared = 0;
        for t in 0..20 {
            let gradient = |i: usize| {
                let g = &json["grads"][t][i];
                (!g.is_null()).then(|| (tensor(i, g), element))
            };
            let lr = number("lr") * (1.0 - t as f64 / 40.0);
            let step = Step { lr, beta1: number("beta1"), beta2: number("beta2"), eps: number("eps"), max_norm: 0.0 };
            let status = group.step(&(0..n).map(gradient).collect::<Vec<_>>(), step);
            assert_eq!(status[1..], [1.0, 0.0]);
            for want in case["want"].as_array().unwrap().iter().filter(|w| w["step"] == t) {
                for i in 0..n {
                    let want = values(&tensor(i, &want["params"][i]));
                    let off = group.values(i).iter().zip(want).map(|(g, w)| (g - w).abs()).fold(0.0, f64::max);
                    assert!(off <= tolerance, "step {t} parameter {i}: differs by {off:e}");
                    compared += 1;
                }
            }
        }
        assert!(compared >= n);
    }
}

/// The rule in `f64`, with steps, rates and decays of their own.
#[test]
fn many_tensors_of_all_types_clipped() {
    // The second one is three chunks.
    let kinds = [
        (7usize, Element::F32, Element::F32),
        (2 * 16_384 + 5, Element::F32, Element::F32),
        (1030, Element::Bf16, Element::Bf16),
        (1029, Element::Bf16, Element::F32),
        (1031, Element::F16, Element::F16),
        (1028, Element::F16, Element::F32),
        (0, Element::F32, Element::F32),
    ];
    let scales = [1.0, 16.0, 1.0, 2.0, 0.5, 1.0, 1.0];
    let decays = [0.0, 0.1, 0.01, 0.1, 0.0, 0.3, 0.1];
    let params: Vec<(Tensor, Element)> =
        kinds.iter().enumerate().map(|(i, (n, e, _))| (randn(i as u64, *n, 1.0), *e)).collect();
    for max_norm in [0.0, 1.5, 1e6] {
        let mut groups = Order::ALL.map(|order| Group::new(&params, &scales, &decays, order));
        let start = params.iter().map(|(t, e)| values(&rounded(t, *e)));
        let mut want: Vec<_> = start.map(|p| (p.clone(), vec![0f64; p.len()], vec![0f64; p.len()], 0)).collect();
        for t in 0..3u64 {
            // The third tensor has no gradient in the second step.
            let grads: Vec<_> = kinds
                .iter()
                .enumerate()
                .map(|(i, (n, _, g))| (t != 1 || i != 2).then(|| (randn(100 * (t + 1) + i as u64, *n, 0.5), *g)))
                .collect();
            let wide: Vec<_> = grads.iter().map(|g| g.as_ref().map(|(t, e)| values(&rounded(t, *e)))).collect();
            let norm = wide.iter().flatten().flatten().map(|g| g * g).sum::<f64>().sqrt();
            let coef = if max_norm > 0.0 { (max_norm / (norm + 1e-6)).min(1.0) } else { 1.0 };
            let got = groups.each_mut().map(|group| group.step(&grads, Step { max_norm, ..STEP }));
            assert_eq!(got[0], got[1], "the order of blocks shows");
            assert!((got[0][0] / norm - 1.0).abs() < 1e-12 && (got[0][1] / coef - 1.0).abs() < 1e-12, "{got:?}");
            assert_eq!(got[0][2], 0.0);
            for (i, g) in wide.iter().enumerate() {
                let Some(g) = g else { continue };
                let (p, m, v, step) = &mut want[i];
                *step += 1;
                let lr = STEP.lr * scales[i];
                for (j, g) in g.iter().map(|g| g * coef).enumerate() {
                    m[j] += (1.0 - STEP.beta1) * (g - m[j]);
                    v[j] = STEP.beta2 * v[j] + (1.0 - STEP.beta2) * g * g;
                    let bias = [1.0 - STEP.beta1.powi(*step), 1.0 - STEP.beta2.powi(*step)];
                    p[j] = p[j] * (1.0 - lr * decays[i]) - lr / bias[0] * m[j] / ((v[j] / bias[1]).sqrt() + STEP.eps);
                }
            }
        }
        for (i, (p, m, v, _)) in want.iter().enumerate() {
            let element = params[i].1;
            for group in &groups {
                // Parameters are rounded at each of three steps.
                close(&format!("parameter {i}"), &group.values(i), p, 2.0 * limit(element));
                for (moment, want) in group.moments[i].iter().zip([m, v]) {
                    close(&format!("moment {i}"), &download(moment, Element::F32), want, 3e-6);
                }
            }
            assert_eq!(groups[0].values(i), groups[1].values(i));
        }
    }
}

#[test]
fn a_norm_that_is_not_finite_changes_nothing() {
    let start = [(randn(1, 20_000, 1.0), Element::F32), (randn(2, 9, 1.0), Element::Bf16)];
    for bad in [f32::NAN, f32::INFINITY] {
        for max_norm in [0.0, 1.0] {
            let mut group = Group::new(&start, &[1.0, 1.0], &[0.1, 0.1], Order::Forwards);
            let good = [Some((randn(3, 20_000, 1.0), Element::F32)), Some((randn(4, 9, 1.0), Element::Bf16))];
            group.step(&good, Step { max_norm, ..STEP });
            let state = |g: &Group| {
                let bytes = |b: &Buffer| b.bytes().to_vec();
                let moments = g.moments.iter().flatten().map(bytes);
                g.params
                    .iter()
                    .map(|(b, _)| bytes(b))
                    .chain(moments)
                    .chain(g.steps.iter().map(bytes))
                    .collect::<Vec<_>>()
            };
            let before = state(&group);
            let mut g = vec![0.1f32; 20_000];
            g[19_999] = bad;
            let grads = [Some((Tensor::new(g, &Device::Cpu).unwrap(), Element::F32)), good[1].clone()];
            let status = group.step(&grads, Step { max_norm, ..STEP });
            assert_eq!((status[0].is_nan(), status[0].is_finite()), (bad.is_nan(), false));
            assert_eq!(status[1..], [1.0, 1.0]);
            assert!(state(&group) == before, "{bad} with max_norm {max_norm} changed something");
            group.step(&good, Step { max_norm, ..STEP });
            assert!(state(&group) != before);
        }
    }
    // Squares beyond f32 are no overflow.
    let mut group = Group::new(&start[1..], &[1.0], &[0.0], Order::Forwards);
    let large = Tensor::new(&[1e30f32; 9], &Device::Cpu).unwrap();
    let status = group.step(&[Some((large, Element::F32))], Step { max_norm: 1.0, ..STEP });
    assert!((status[0] / 3e30 - 1.0).abs() < 1e-6 && status[2] == 0.0, "{status:?}");
}
