//! Compacter's projections (Mahabadi et al. 2021, arXiv:2106.04647, "parameterized hypercomplex multiplication"): a weight is a
//! sum of `n` Kronecker products `Σᵢ Aᵢ ⊗ Wᵢ`. The small rules `A` (`phm_rule`) and the matrices `W` may be shared by all
//! adapters of a model, and either may be a product of two thin factors. Keys, names and starts are those of `PHMLayer` and
//! `init_shared_parameters` in `adapters/methods/modeling.py`, 1.3, but that the distribution of `W` is the one that
//! `hypercomplex_nonlinearity` names: AdapterHub draws from `glorot-normal` whatever it says.

use candle_core::{DType, Device, Tensor};
use peft_core::kernels::Stream;
use peft_core::{ConfigKeys, Ctx, Error, Parameter, Result, Role, parameter_name};

/// What parameters that all adapters share are called under.
pub(crate) const SHARED: &str = "shared_parameters";
/// The stream's site of shared parameters, which is none of the model's.
const SHARED_SITE: u32 = u32::MAX;
/// How many tensors a projection may draw.
const DRAWS: u32 = 4;
/// More than any of these counts is a mistake, and would be allocated.
const MAX_COUNT: usize = 1 << 12;

/// What values start from.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Draw {
    Normal(f32),
    Uniform(f32),
    /// Variance `2 / (rows + columns)` (Glorot & Bengio 2010).
    GlorotNormal,
    GlorotUniform,
}

/// The settings of these projections.
#[derive(Debug, Clone)]
pub(crate) struct PhmConfig {
    /// `n`: how many products, and the size of a rule.
    dim: usize,
    /// Inner size of the factors of `W`; none where it is whole.
    rank: Option<usize>,
    pub(crate) shares_weight: bool,
    shares_rule: bool,
    factored_rule: bool,
    pub(crate) bias: bool,
    weight_start: Draw,
    rule_start: Draw,
}

/// Which of the two projections of an adapter; its number is that of its random numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    Down = 0,
    Up = 1,
}

/// `[n, rows, columns]`, whole or as a product over a small inner size.
#[derive(Debug, Clone)]
enum Factor {
    Whole(Parameter),
    Product(Parameter, Parameter),
}

impl Factor {
    fn get(&self, ctx: &Ctx<'_>) -> Result<Tensor> {
        match self {
            Self::Whole(whole) => Ok(whole.get(ctx)),
            Self::Product(left, right) => Ok(left.get(ctx).matmul(&right.get(ctx))?),
        }
    }

    fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let (first, second) = match self {
            Self::Whole(whole) => (whole, None),
            Self::Product(left, right) => (left, Some(right)),
        };
        std::iter::once(first).chain(second)
    }
}

/// What all adapters of a model share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    rule: Option<Factor>,
    /// `W` of the way down and of the way up.
    weights: Option<[Factor; 2]>,
}

impl Shared {
    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        self.weights.iter().flatten().chain(&self.rule).flat_map(Factor::parameters)
    }
}

/// A weight `[out, in]` as a sum of Kronecker products.
#[derive(Debug)]
pub(crate) struct Phm {
    /// `[n, n, n]`: product, row (of the input), column (of the output).
    rule: Factor,
    /// `[n, in / n, out / n]`.
    weight: Factor,
    /// Whether rule and weight are shared, and so listed elsewhere.
    shared: [bool; 2],
}

impl Phm {
    /// The weight, `[out, in]`.
    pub(crate) fn weight(&self, ctx: &Ctx<'_>) -> Result<Tensor> {
        let (rule, weight) = (self.rule.get(ctx)?, self.weight.get(ctx)?);
        let (n, inputs, outputs) = weight.dims3()?;
        // With products last in one and first in the other, the sum of all products is one matrix product.
        let rule = rule.permute((2, 1, 0))?.reshape((n * n, n))?;
        let weight = weight.transpose(1, 2)?.reshape((n, outputs * inputs))?;
        let blocks = rule.matmul(&weight)?.reshape((n, n, outputs, inputs))?;
        Ok(blocks.transpose(1, 2)?.reshape((n * outputs, n * inputs))?)
    }

    /// The parameters that no other projection reads.
    pub(crate) fn parameters(&self) -> impl Iterator<Item = &Parameter> {
        let [rule, weight] = self.shared;
        let own = |factor, shared: bool| (!shared).then_some(factor).into_iter().flat_map(Factor::parameters);
        own(&self.weight, weight).chain(own(&self.rule, rule))
    }

    pub(crate) fn dtype(&self) -> DType {
        self.weight.parameters().next().map_or(DType::F32, Parameter::dtype)
    }
}

/// Where the parameters of a factor are made: their names' beginning, and the numbers that they start from.
struct At<'a> {
    path: &'a str,
    stream: Stream,
    device: &'a Device,
}

impl PhmConfig {
    /// The settings, where `phm_layer` asks for them.
    ///
    /// # Errors
    /// A value that is wrong or cannot be honoured; the message names the key.
    pub(crate) fn read(keys: ConfigKeys<'_>) -> Result<Option<Self>> {
        if !keys.flag("phm_layer", false)? {
            return Ok(None);
        }
        let count = |key: &str, default: usize| match keys.count(key, MAX_COUNT)?.unwrap_or(default) {
            0 => Err(Error::config(key, "is 0")),
            n => Ok(n),
        };
        let range = keys.number("phm_init_range", 1e-4)?;
        if !(range.is_finite() && range > 0.0) {
            return Err(Error::config("phm_init_range", format!("{range} is not a number above 0")));
        }
        let range = range as f32;
        if !keys.flag("learn_phm", true)? {
            return Err(Error::config(
                "learn_phm",
                "false is not supported, and AdapterHub's package trains the rule too",
            ));
        }
        match keys.text("init_weights")?.unwrap_or("bert") {
            "bert" => {}
            other => {
                let message = format!("`{other}` is for dense projections; phm_layer = true goes with \"bert\"");
                return Err(Error::config("init_weights", message));
            }
        }
        let shares_rule = keys.flag("shared_phm_rule", true)?;
        Ok(Some(Self {
            dim: count("phm_dim", 4)?,
            rank: keys.flag("factorized_phm_W", true)?.then(|| count("phm_rank", 1)).transpose()?,
            shares_weight: keys.flag("shared_W_phm", false)?,
            shares_rule,
            factored_rule: keys.flag("factorized_phm_rule", false)?,
            bias: keys.flag("phm_bias", true)?,
            weight_start: match keys.text("hypercomplex_nonlinearity")?.unwrap_or("glorot-uniform") {
                "glorot-normal" => Draw::GlorotNormal,
                "glorot-uniform" => Draw::GlorotUniform,
                "normal" => Draw::Normal(range),
                other => {
                    let message = format!("`{other}` is not one of glorot-uniform, glorot-normal, normal");
                    return Err(Error::config("hypercomplex_nonlinearity", message));
                }
            },
            rule_start: match (keys.text("phm_c_init")?.unwrap_or("normal"), shares_rule) {
                ("normal", true) => Draw::Normal(range),
                ("uniform", true) => Draw::Uniform(1.0),
                ("normal", false) => Draw::Normal(0.01),
                ("uniform", false) => Draw::Uniform(0.01),
                (other, _) => {
                    return Err(Error::config("phm_c_init", format!("`{other}` is not one of normal, uniform")));
                }
            },
        }))
    }

    /// Makes what all adapters between `hidden` and `width` features share.
    ///
    /// # Errors
    /// Sizes that `phm_dim` does not divide.
    pub(crate) fn shared(&self, hidden: usize, width: usize, seed: u64, device: &Device) -> Result<Shared> {
        let at = |step| At { path: SHARED, stream: Stream { seed, step, site: SHARED_SITE }, device };
        Ok(Shared {
            rule: if self.shares_rule { Some(self.rule(&at(0))?) } else { None },
            weights: match self.shares_weight {
                true => Some([
                    self.factor(&at(2), "W_down", self.parts(hidden, width)?, self.rank, self.weight_start)?,
                    self.factor(&at(4), "W_up", self.parts(width, hidden)?, self.rank, self.weight_start)?,
                ]),
                false => None,
            },
        })
    }

    /// The weight from `inputs` to `outputs` features of the layer at `path`.
    ///
    /// # Errors
    /// Sizes that `phm_dim` does not divide.
    pub(crate) fn projection(
        &self,
        (path, stream, device): (&str, Stream, &Device),
        way: Way,
        [inputs, outputs]: [usize; 2],
        shared: &Shared,
    ) -> Result<Phm> {
        let at = |step| At { path, stream: Stream { step: stream.step * DRAWS + step, ..stream }, device };
        let parts = self.parts(inputs, outputs)?;
        let weight = match &shared.weights {
            Some([down, up]) => if way == Way::Down { down } else { up }.clone(),
            None => self.factor(&at(2), "W", parts, self.rank, self.weight_start)?,
        };
        let rule = match &shared.rule {
            Some(rule) => rule.clone(),
            None => self.rule(&at(0))?,
        };
        Ok(Phm { rule, weight, shared: [self.shares_rule, self.shares_weight] })
    }

    fn rule(&self, at: &At<'_>) -> Result<Factor> {
        self.factor(at, "phm_rule", [self.dim; 2], self.factored_rule.then_some(1), self.rule_start)
    }

    fn parts(&self, inputs: usize, outputs: usize) -> Result<[usize; 2]> {
        match [inputs, outputs].into_iter().find(|features| features % self.dim != 0) {
            None => Ok([inputs / self.dim, outputs / self.dim]),
            Some(features) => {
                let message = format!(
                    "{} does not divide the {features} features at one side of a projection; change it or reduction_factor",
                    self.dim
                );
                Err(Error::config("phm_dim", message))
            }
        }
    }

    fn factor(
        &self,
        at: &At<'_>,
        name: &str,
        [rows, columns]: [usize; 2],
        inner: Option<usize>,
        draw: Draw,
    ) -> Result<Factor> {
        let make = |name: &str, rows: usize, columns: usize, step: u32| {
            let stream = Stream { step: at.stream.step + step, ..at.stream };
            let values = draw.values(self.dim * rows * columns, rows + columns, stream);
            let value = Tensor::from_vec(values, (self.dim, rows, columns), &Device::Cpu)?.to_device(at.device)?;
            Parameter::new(parameter_name(at.path, name), &value, Role::Plain)
        };
        Ok(match inner {
            None => Factor::Whole(make(name, rows, columns, 0)?),
            Some(inner) => Factor::Product(
                make(&format!("{name}_left"), rows, inner, 0)?,
                make(&format!("{name}_right"), inner, columns, 1)?,
            ),
        })
    }
}

impl Draw {
    /// `n` values of matrices with `fans` rows and columns together.
    fn values(self, n: usize, fans: usize, stream: Stream) -> Vec<f32> {
        let glorot = |of: f32| (of / fans as f32).sqrt();
        match self {
            Self::Normal(std) => stream.normal_vec(n, std),
            Self::Uniform(bound) => stream.uniform_vec(n, -bound, bound),
            Self::GlorotNormal => stream.normal_vec(n, glorot(2.0)),
            Self::GlorotUniform => stream.uniform_vec(n, -glorot(6.0), glorot(6.0)),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use peft_core::kernels::testing::{close, randn};
    use peft_core::{AdapterSet, Route};
    use serde_json::{Value, json};

    use super::*;

    fn config(changes: Value) -> Result<PhmConfig> {
        let mut keys = json!({"phm_layer": true, "phm_dim": 3});
        keys.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        PhmConfig::read(ConfigKeys(keys.as_object().unwrap())).map(Option::unwrap)
    }

    fn weight(config: &PhmConfig, sizes: [usize; 2]) -> (Phm, Tensor) {
        let shared = config.shared(sizes[0], sizes[1], 5, &Device::Cpu).unwrap();
        let at = ("layer", Stream { seed: 5, step: 0, site: 2 }, &Device::Cpu);
        let phm = config.projection(at, Way::Down, sizes, &shared).unwrap();
        for (seed, parameter) in phm.rule.parameters().chain(phm.weight.parameters()).enumerate() {
            parameter.set(&randn(seed as u64, parameter.value().shape(), 1.0).unwrap()).unwrap();
        }
        let set = AdapterSet::empty();
        let made = phm.weight(&Ctx::eval(&set, &Route::Base)).unwrap();
        (phm, made)
    }

    /// `Aᵢ[a, b] · Wᵢ[p, q]` at input `(a, p)` and output `(b, q)`.
    #[test]
    fn a_weight_is_a_sum_of_kronecker_products() {
        for changes in [
            json!({"factorized_phm_W": false, "shared_phm_rule": false}),
            json!({"phm_rank": 2, "factorized_phm_rule": true}),
            json!({"shared_W_phm": true}),
        ] {
            let (phm, made) = weight(&config(changes).unwrap(), [12, 6]);
            let set = AdapterSet::empty();
            let ctx = Ctx::eval(&set, &Route::Base);
            let [rule, weight] = [&phm.rule, &phm.weight].map(|f| f.get(&ctx).unwrap().to_vec3::<f32>().unwrap());
            let entry = |output: usize, input: usize| {
                let [(b, q), (a, p)] = [(output / 2, output % 2), (input / 4, input % 4)];
                (0..3).map(|i| rule[i][a][b] * weight[i][p][q]).sum::<f32>()
            };
            let want: Vec<f32> = (0..6).flat_map(|o| (0..12).map(move |i| (o, i))).map(|(o, i)| entry(o, i)).collect();
            close("weight", &made, &Tensor::from_vec(want, (6, 12), &Device::Cpu).unwrap(), 1e-5).unwrap();
        }
    }

    #[test]
    fn what_is_shared_is_listed_once() {
        let names = |changes: Value| {
            let config = config(changes).unwrap();
            let (phm, _) = weight(&config, [12, 6]);
            let shared = config.shared(12, 6, 5, &Device::Cpu).unwrap();
            let of = |p: &Parameter| p.name().rsplit_once("base_model.model.").unwrap().1.to_owned();
            (phm.parameters().map(of).collect::<Vec<_>>(), shared.parameters().map(of).collect::<Vec<_>>())
        };
        let (own, shared) = names(json!({}));
        assert_eq!(
            (own, shared),
            (vec!["layer.W_left".into(), "layer.W_right".into()], vec!["shared_parameters.phm_rule".into()])
        );
        let (own, shared) = names(json!({"shared_W_phm": true, "shared_phm_rule": false}));
        assert_eq!(own, ["layer.phm_rule"]);
        assert_eq!(shared.len(), 4);
    }

    #[test]
    fn wrong_values_name_the_key() {
        for (changes, key) in [
            (json!({"phm_dim": 0}), "phm_dim"),
            (json!({"phm_rank": 0}), "phm_rank"),
            (json!({"phm_c_init": "zeros"}), "phm_c_init"),
            (json!({"phm_init_range": -1.0}), "phm_init_range"),
            (json!({"hypercomplex_nonlinearity": "phm"}), "hypercomplex_nonlinearity"),
            (json!({"learn_phm": false}), "learn_phm"),
            (json!({"init_weights": "houlsby"}), "init_weights"),
        ] {
            assert!(config(changes).unwrap_err().to_string().contains(key), "{key}");
        }
        let wrong = config(json!({})).unwrap().shared(12, 6, 0, &Device::Cpu).and_then(|shared| {
            let at = ("layer", Stream { seed: 0, step: 0, site: 0 }, &Device::Cpu);
            config(json!({}))?.projection(at, Way::Up, [4, 12], &shared).map(drop)
        });
        assert!(wrong.unwrap_err().to_string().contains("phm_dim"));
    }
}
