//! How A and B start.

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::suggest::did_you_mean;
use peft_core::{Error, FrozenLinear, Result};
use serde_json::Value;

use crate::linalg::{self, Svd};

const KEY: &str = "init_lora_weights";

/// The values of `init_lora_weights`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Init {
    /// A Kaiming-uniform with a = √5, B zero: the adapter starts as the identity.
    Default,
    /// A and B both random, so that the adapter starts as something else than the identity.
    Random,
    /// A normal with variance 1/r², B zero.
    Gaussian,
    /// A and B random in orthogonal subspaces of the rank, so that `BA = 0` with neither zero (even ranks only).
    Orthogonal,
    /// The leading singular vectors of the weight (Meng et al., "PiSSA", 2024), which are taken out of the base.
    Pissa {
        /// `pissa_niter_[n]`: a randomised decomposition with n iterations in place of the full one.
        iterations: Option<usize>,
    },
    /// The first columns of the weight's QR factorisation (Büyükakyüz, "OLoRA", 2024), which are taken out of the base.
    Olora,
    /// The leading principal components of the layer's inputs, B zero: see [`crate::eva`], which has the data. Layers that
    /// it did not look at start by default.
    Eva,
}

const NAMES: &[&str] = &["true", "false", "gaussian", "orthogonal", "pissa", "pissa_niter_16", "olora", "eva"];

/// PEFT's initialisations that are not built here: what they need, whether they change the base, and what to use.
const ABSENT: &[(&str, &str, bool)] = &[
    ("mica", "trains A alone; use \"orthogonal\" or true", false),
    (
        "corda",
        "needs covariances of the training data; use \"eva\", or \"pissa_niter_16\", which starts from the weights",
        true,
    ),
    ("lora_ga", "needs gradients of the training data; use \"pissa_niter_16\", which starts from the weights", true),
    (
        "loftq",
        "quantises the base while it starts; use true or \"pissa_niter_16\" on a base that is quantised (GGUF)",
        true,
    ),
];

/// A and B of one site.
#[derive(Debug, Clone)]
pub struct Start {
    /// `[r, in]`.
    pub a: Tensor,
    /// `[out, r]`.
    pub b: Tensor,
}

impl Init {
    /// Reads `init_lora_weights` of a recipe; absent means the default.
    ///
    /// # Errors
    /// An unknown name, with the nearest known; one of PEFT's that is not built here, with what to use instead.
    pub fn parse(value: Option<&Value>) -> Result<Self> {
        let name = match value {
            None | Some(Value::Bool(true)) => return Ok(Self::Default),
            Some(Value::Bool(false)) => return Ok(Self::Random),
            Some(Value::String(s)) => s.to_lowercase(),
            Some(v) => return Err(Error::config(KEY, format!("{v} is neither true, false nor a name"))),
        };
        match name.as_str() {
            "gaussian" => return Ok(Self::Gaussian),
            "orthogonal" => return Ok(Self::Orthogonal),
            "olora" => return Ok(Self::Olora),
            "eva" => return Ok(Self::Eva),
            "pissa" => return Ok(Self::Pissa { iterations: None }),
            _ => {}
        }
        if let Some(n) = name.strip_prefix("pissa_niter_") {
            let iterations = n.parse().ok().filter(|n| (0..=1000).contains(n));
            let iterations = iterations.ok_or_else(|| {
                Error::config(KEY, format!("`{name}` has no count up to 1000; such as \"pissa_niter_16\""))
            })?;
            return Ok(Self::Pissa { iterations: Some(iterations) });
        }
        if let Some((_, why, _)) = ABSENT.iter().find(|(n, ..)| *n == name) {
            return Err(Error::config(
                KEY,
                format!("`{name}` is not built here: it {why}; known: {}", NAMES.join(", ")),
            ));
        }
        let near = did_you_mean(&name, NAMES.iter().copied());
        Err(Error::config(KEY, format!("`{name}` is not a known initialisation{near}; known: {}", NAMES.join(", "))))
    }

    /// Reads `init_lora_weights` of an adapter's own config. Initialisations that only chose A and B need not be known,
    /// since the file holds both; those that changed the base must be.
    ///
    /// # Errors
    /// An unknown name, or one whose adapters do not fit the original base; the message says how to convert them.
    pub fn of_file(value: Option<&Value>) -> Result<Self> {
        let name = value.and_then(Value::as_str).map(str::to_lowercase);
        let absent = ABSENT.iter().find(|(n, ..)| name.as_ref().is_some_and(|name| name == n));
        match absent {
            None => Self::parse(value),
            Some((_, _, false)) => Ok(Self::Default),
            Some((name, _, true)) => Err(Error::config(
                KEY,
                format!(
                    "`{name}` changed the base model that this adapter was trained on; convert it with PEFT: \
                     save_pretrained(…, path_initial_model_for_weight_conversion=…), or merge it there"
                ),
            )),
        }
    }

    /// Whether B starts at zero, so that A's first gradient is exactly zero.
    #[must_use]
    pub fn starts_at_zero(self) -> bool {
        matches!(self, Self::Default | Self::Gaussian | Self::Eva)
    }

    /// Whether the product of the first A and B is taken out of the base, so that training starts from its weights.
    #[must_use]
    pub fn subtracts(self) -> bool {
        matches!(self, Self::Pissa { .. } | Self::Olora)
    }

    /// A and B for a layer, from a stream of its own. `scale` is what their product will be multiplied with.
    ///
    /// # Errors
    /// When the rank does not suit the initialisation, or a tensor cannot be made.
    pub fn start(self, layer: &FrozenLinear, r: usize, scale: f64, stream: Stream, device: &Device) -> Result<Start> {
        let (out, inp) = (layer.weight().out_features(), layer.weight().in_features());
        let tensor = |data, shape: (usize, usize)| Tensor::from_vec(data, shape, device);
        // Kaiming-uniform with a = √5 is uniform in ±1/√fan_in.
        let uniform = |rows: usize, cols: usize, stream: Stream| {
            let bound = 1.0 / (cols as f32).sqrt();
            tensor(stream.uniform_vec(rows * cols, -bound, bound), (rows, cols))
        };
        let next = |n: u32| Stream { step: stream.step.wrapping_add(n), ..stream };
        let zero_b = || Tensor::zeros((out, r), DType::F32, device);
        match self {
            Self::Default | Self::Eva => Ok(Start { a: uniform(r, inp, stream)?, b: zero_b()? }),
            Self::Random => Ok(Start { a: uniform(r, inp, stream)?, b: uniform(out, r, next(1))? }),
            Self::Gaussian => {
                Ok(Start { a: tensor(stream.normal_vec(r * inp, 1.0 / r as f32), (r, inp))?, b: zero_b()? })
            }
            Self::Orthogonal => orthogonal(out, inp, r, [stream, next(1), next(2)]),
            Self::Pissa { .. } | Self::Olora if r > out.min(inp) => Err(Error::config(
                KEY,
                format!(
                    "takes at most {} directions from a weight of [{out}, {inp}], not r = {r}; lower r, or give this layer \
                     a smaller rank in rank_pattern",
                    out.min(inp)
                ),
            )),
            Self::Pissa { iterations } => {
                if scale.is_nan() || scale <= 0.0 {
                    return Err(Error::config(
                        "lora_alpha",
                        "must be above zero for pissa, which divides by the scale",
                    ));
                }
                let svd = match iterations {
                    Some(n) => linalg::randomised_svd(layer.weight(), r, linalg::OVERSAMPLING, n, stream)?,
                    None => linalg::svd(&layer.weight().to_dense(DType::F32)?, r)?,
                };
                pissa(&svd, scale)
            }
            Self::Olora => olora(layer, r),
        }
    }
}

impl Init {
    /// A `[experts · r, in]` and B `[out, r · experts]` for the experts of a mixture.
    ///
    /// # Errors
    /// When the start is made of the weight of one layer.
    pub fn start_experts(
        self,
        [experts, inp, out]: [usize; 3],
        r: usize,
        stream: Stream,
        device: &Device,
    ) -> Result<Start> {
        let rows = experts.checked_mul(r).ok_or_else(|| Error::config("r", format!("{r} is too large")))?;
        let tensor = |data, shape: (usize, usize)| Tensor::from_vec(data, shape, device);
        let uniform = |rows: usize, cols: usize, stream: Stream| {
            let bound = 1.0 / (cols as f32).sqrt();
            tensor(stream.uniform_vec(rows * cols, -bound, bound), (rows, cols))
        };
        let zero_b = || Tensor::zeros((out, rows), DType::F32, device);
        match self {
            Self::Default | Self::Eva => Ok(Start { a: uniform(rows, inp, stream)?, b: zero_b()? }),
            Self::Random => {
                let next = Stream { step: stream.step.wrapping_add(1), ..stream };
                Ok(Start { a: uniform(rows, inp, stream)?, b: uniform(out, rows, next)? })
            }
            Self::Gaussian => {
                let a = tensor(stream.normal_vec(rows * inp, 1.0 / r as f32), (rows, inp))?;
                Ok(Start { a, b: zero_b()? })
            }
            Self::Orthogonal | Self::Pissa { .. } | Self::Olora => Err(Error::config(
                KEY,
                "starts from one layer, and target_parameters adapts the weights of all experts: use true, false or \"gaussian\"",
            )),
        }
    }
}

/// PEFT's `orthogonal_init`: the rows of a random orthogonal `[r, r]` are dealt out to A and B in turn.
fn orthogonal(out: usize, inp: usize, r: usize, [q, a, b]: [Stream; 3]) -> Result<Start> {
    if !r.is_multiple_of(2) {
        return Err(Error::config(KEY, format!("orthogonal needs an even rank, not {r}")));
    }
    let normal =
        |stream: Stream, rows, cols| Tensor::from_vec(stream.normal_vec(rows * cols, 1.0), (rows, cols), &Device::Cpu);
    let basis = linalg::orthonormal_rows(&normal(q, r, r)?)?.reshape((r / 2, 2, r))?;
    let share = |i: usize| basis.narrow(1, i, 1)?.reshape((r / 2, r))?.contiguous();
    let a = (share(0)?.t()?.matmul(&normal(a, r / 2, inp)?)? / 10.0)?;
    let b = (normal(b, out, r / 2)?.matmul(&share(1)?)? / 10.0)?;
    Ok(Start { a, b })
}

/// `s·BA = Σ sᵢ·uᵢ·vᵢᵀ` with the singular values split evenly.
fn pissa(svd: &Svd, scale: f64) -> Result<Start> {
    let roots: Vec<f32> = svd.s.iter().map(|s| (s.max(0.0) / scale).sqrt() as f32).collect();
    let n = roots.len();
    let roots = Tensor::from_vec(roots, (n, 1), &Device::Cpu)?;
    let b = svd.u.broadcast_mul(&roots)?.t()?.contiguous()?;
    Ok(Start { a: svd.v.broadcast_mul(&roots)?, b })
}

/// The first r columns of Q and rows of R of `W = QR`. They need no more than W's first r columns: those span Q's, and
/// `R = QᵀW`.
fn olora(layer: &FrozenLinear, r: usize) -> Result<Start> {
    let weight = layer.weight();
    let first = Tensor::eye(r, DType::F32, &weight.device())?;
    let first = first.pad_with_zeros(1, 0, weight.in_features() - r)?;
    let q = linalg::orthonormal_rows(&weight.matmul_t(&first)?)?;
    let a = weight.matmul(&q.to_device(&weight.device())?)?;
    Ok(Start { a, b: q.t()?.contiguous()? })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use peft_core::SiteId;
    use peft_core::kernels::FrozenWeight;
    use peft_core::kernels::testing::{close, randn};

    const STREAM: Stream = Stream { seed: 5, step: 0, site: 9 };

    fn layer(out: usize, inp: usize) -> FrozenLinear {
        let weight = FrozenWeight::dense(&randn(4, (out, inp), 0.1).unwrap()).unwrap();
        FrozenLinear::new(SiteId(9), "layer", weight, None).unwrap()
    }

    fn start(init: Init, out: usize, inp: usize, r: usize) -> Start {
        let start = init.start(&layer(out, inp), r, 0.5, STREAM, &Device::Cpu).unwrap();
        assert_eq!((start.a.dims(), start.b.dims()), ([r, inp].as_slice(), [out, r].as_slice()));
        start
    }

    fn flat(t: &Tensor) -> Vec<f32> {
        t.flatten_all().unwrap().to_vec1().unwrap()
    }

    fn std(values: &[f32]) -> f32 {
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        (values.iter().map(|x| (x - mean).powi(2)).sum::<f32>() / values.len() as f32).sqrt()
    }

    /// What PEFT's `test_initialization.py` holds its own to: shapes of the distributions on a 1000 × 1000 layer.
    #[test]
    fn statistics() {
        let (n, r) = (1000, 20);
        let bound = 1.0 / (n as f32).sqrt();
        for init in [Init::Default, Init::Random] {
            let a = flat(&start(init, n, n, r).a);
            assert!(a.iter().all(|x| x.abs() <= bound));
            assert!((std(&a) - bound / 3f32.sqrt()).abs() < 0.01 * bound);
            // Uniform: a quarter of the mass in each quarter of the range.
            let low = a.iter().filter(|&&x| x < -bound / 2.0).count() as f32 / a.len() as f32;
            assert!((low - 0.25).abs() < 0.02, "{low}");
        }
        assert!(flat(&start(Init::Default, n, n, r).b).iter().all(|&x| x == 0.0));
        let b = flat(&start(Init::Random, n, n, r).b);
        assert!((std(&b) - 1.0 / (3.0 * r as f32).sqrt()).abs() < 0.01);
        let gaussian = start(Init::Gaussian, n, n, r);
        let a = flat(&gaussian.a);
        assert!((std(&a) * r as f32 - 1.0).abs() < 0.02);
        let within = a.iter().filter(|x| x.abs() < 1.0 / r as f32).count() as f32 / a.len() as f32;
        assert!((within - 0.6827).abs() < 0.02, "{within}");
        assert!(flat(&gaussian.b).iter().all(|&x| x == 0.0));
    }

    #[test]
    fn starts_differ_by_seed_and_site_and_repeat() {
        let a = |seed, site| {
            let stream = Stream { seed, step: 0, site };
            flat(&Init::Default.start(&layer(8, 8), 4, 1.0, stream, &Device::Cpu).unwrap().a)
        };
        assert_eq!(a(1, 1), a(1, 1));
        assert_ne!(a(1, 1), a(2, 1));
        assert_ne!(a(1, 1), a(1, 2));
    }

    #[test]
    fn orthogonal_has_no_product() {
        let s = start(Init::Orthogonal, 30, 50, 6);
        assert!(std(&flat(&s.a)) > 0.03 && std(&flat(&s.b)) > 0.03);
        close("BA", &s.b.matmul(&s.a).unwrap(), &Tensor::zeros((30, 50), DType::F32, &Device::Cpu).unwrap(), 1e-6)
            .unwrap();
        let e = Init::Orthogonal.start(&layer(4, 4), 3, 1.0, STREAM, &Device::Cpu).unwrap_err().to_string();
        assert!(e.contains("even"), "{e}");
    }

    /// The best approximation of rank r leaves the sum of the other squared singular values.
    #[test]
    fn pissa_takes_the_leading_part() {
        for (out, inp) in [(24, 40), (40, 24)] {
            let dense = layer(out, inp).weight().to_dense(DType::F32).unwrap();
            let all = linalg::svd(&dense, 24).unwrap().s;
            let rest: f64 = all[5..].iter().map(|s| s * s).sum();
            for iterations in [None, Some(16)] {
                let s = start(Init::Pissa { iterations }, out, inp, 5);
                let residual = (&dense - (s.b.matmul(&s.a).unwrap() * 0.5).unwrap()).unwrap();
                let left = f64::from(residual.sqr().unwrap().sum_all().unwrap().to_scalar::<f32>().unwrap());
                let tolerance = if iterations.is_some() { 1e-2 } else { 1e-4 };
                assert!((left / rest - 1.0).abs() < tolerance, "{left} {rest}");
            }
        }
    }

    #[test]
    fn olora_is_a_qr() {
        for (out, inp) in [(24, 40), (40, 24)] {
            let dense = layer(out, inp).weight().to_dense(DType::F32).unwrap();
            let s = start(Init::Olora, out, inp, 5);
            let gram = s.b.t().unwrap().matmul(&s.b).unwrap();
            close("QᵀQ", &gram, &Tensor::eye(5, DType::F32, &Device::Cpu).unwrap(), 1e-5).unwrap();
            // The first r columns of W are in QR's, and R is upper triangular.
            let product = s.b.matmul(&s.a).unwrap().narrow(1, 0, 5).unwrap();
            close("W", &product, &dense.narrow(1, 0, 5).unwrap(), 1e-5).unwrap();
            for i in 0..5 {
                for j in 0..i {
                    let x = s.a.get(i).unwrap().get(j).unwrap().to_scalar::<f32>().unwrap();
                    assert!(x.abs() < 1e-6, "R[{i}, {j}] = {x}");
                }
            }
        }
        let e = Init::Olora.start(&layer(4, 9), 5, 1.0, STREAM, &Device::Cpu).unwrap_err().to_string();
        assert!(e.contains("at most 4"), "{e}");
        let e =
            Init::Pissa { iterations: None }.start(&layer(4, 9), 2, 0.0, STREAM, &Device::Cpu).unwrap_err().to_string();
        assert!(e.contains("lora_alpha"), "{e}");
    }
}
