//! Rotary position embedding tables.
//!
//! Inverse frequencies and attention factors are those of transformers `modeling_rope_utils.py`, in the same f32
//! arithmetic: default, linear (kaiokendev), dynamic NTK, YaRN (<https://arxiv.org/abs/2309.00071>), the Llama 3.1
//! scaling, and LongRoPE (<https://arxiv.org/abs/2402.13753>).

use std::sync::{Mutex, PoisonError};

use candle_core::{Device, Tensor};
use serde_json::{Map, Value, json};

use crate::config::RopeConfig;

/// How rotary frequencies are stretched for contexts longer than those of pretraining; `rope_type` in `config.json`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Every frequency is divided by `factor`.
    Linear {
        /// By how much positions are compressed.
        factor: f64,
    },
    /// NTK-aware: the base grows with the length once it exceeds `max_position_embeddings`.
    Dynamic {
        /// By how much the base grows.
        factor: f64,
        /// Length up to which nothing changes.
        max_position_embeddings: usize,
    },
    /// Frequencies blended between interpolation and extrapolation.
    Yarn(Yarn),
    /// Low frequencies divided, high ones kept, a smooth blend between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are high frequencies.
        high_freq_factor: f64,
        /// Context of pretraining.
        original_max_position_embeddings: usize,
    },
    /// One divisor a frequency, another set for long sequences.
    LongRope(LongRope),
}

/// Parameters of YaRN.
#[derive(Debug, Clone, PartialEq)]
pub struct Yarn {
    /// By how much the context grows.
    pub factor: f64,
    /// Context of pretraining.
    pub original_max_position_embeddings: usize,
    /// Multiplier of cos and sin; derived from the others if absent.
    pub attention_factor: Option<f64>,
    /// Rotations over the context above which a dimension only extrapolates.
    pub beta_fast: f64,
    /// Rotations over the context below which a dimension only interpolates.
    pub beta_slow: f64,
    /// Weight of `ln(factor)` in the numerator of the derived attention factor.
    pub mscale: Option<f64>,
    /// Weight of `ln(factor)` in its denominator.
    pub mscale_all_dim: Option<f64>,
    /// Whether the blend's bounds are rounded to whole dimensions.
    pub truncate: bool,
}

/// Parameters of LongRoPE.
#[derive(Debug, Clone, PartialEq)]
pub struct LongRope {
    /// Divisors of the frequencies up to the original context, one for each of `rotary_dim / 2`.
    pub short_factor: Vec<f64>,
    /// Divisors beyond it.
    pub long_factor: Vec<f64>,
    /// By how much the context grows.
    pub factor: f64,
    /// Multiplier of cos and sin; derived from `factor` if absent.
    pub attention_factor: Option<f64>,
    /// Context of pretraining.
    pub original_max_position_embeddings: usize,
}

impl RopeScaling {
    /// Refuses parameters that would make infinite or undefined frequencies; the error is the key and the reason.
    pub(crate) fn check(&self, rotary_dim: usize) -> Result<(), (&'static str, String)> {
        let positive = |key: &'static str, value: f64| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err((key, format!("{value} is not a positive number")))
            }
        };
        let original = |length: usize| match length {
            0 | 1 => Err(("original_max_position_embeddings", format!("{length} is not a context length"))),
            _ => Ok(()),
        };
        match self {
            Self::Default => Ok(()),
            Self::Linear { factor } => positive("factor", *factor),
            Self::Dynamic { factor, .. } => {
                positive("factor", *factor)?;
                if rotary_dim <= 2 {
                    return Err(("head_dim", "dynamic rope scaling needs more than 2 rotated dimensions".into()));
                }
                Ok(())
            }
            Self::Yarn(yarn) => {
                original(yarn.original_max_position_embeddings)?;
                positive("factor", yarn.factor)?;
                positive("beta_fast", yarn.beta_fast)?;
                positive("beta_slow", yarn.beta_slow)?;
                yarn.attention_factor.map_or(Ok(()), |factor| positive("attention_factor", factor))
            }
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                original(*original_max_position_embeddings)?;
                positive("factor", *factor)?;
                positive("low_freq_factor", *low_freq_factor)?;
                positive("high_freq_factor", *high_freq_factor)?;
                if high_freq_factor <= low_freq_factor {
                    let reason = format!("{high_freq_factor} must be larger than low_freq_factor = {low_freq_factor}");
                    return Err(("high_freq_factor", reason));
                }
                Ok(())
            }
            Self::LongRope(long) => {
                original(long.original_max_position_embeddings)?;
                positive("factor", long.factor)?;
                for (key, factors) in [("short_factor", &long.short_factor), ("long_factor", &long.long_factor)] {
                    if factors.len() != rotary_dim / 2 {
                        return Err((key, format!("{} numbers for {} frequencies", factors.len(), rotary_dim / 2)));
                    }
                    factors.iter().try_for_each(|factor| positive(key, *factor))?;
                }
                long.attention_factor.map_or(Ok(()), |factor| positive("attention_factor", factor))
            }
        }
    }

    /// The object that transformers expects under `rope_scaling`, or `None` for the default.
    pub(crate) fn to_hf_json(&self) -> Option<Map<String, Value>> {
        let value = match self {
            Self::Default => return None,
            Self::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
            Self::Dynamic { factor, .. } => json!({ "rope_type": "dynamic", "factor": factor }),
            Self::Yarn(yarn) => json!({
                "rope_type": "yarn",
                "factor": yarn.factor,
                "original_max_position_embeddings": yarn.original_max_position_embeddings,
                "attention_factor": yarn.attention_factor,
                "beta_fast": yarn.beta_fast,
                "beta_slow": yarn.beta_slow,
                "mscale": yarn.mscale,
                "mscale_all_dim": yarn.mscale_all_dim,
                "truncate": yarn.truncate,
            }),
            Self::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings,
            }),
            Self::LongRope(long) => json!({
                "rope_type": "longrope",
                "short_factor": long.short_factor,
                "long_factor": long.long_factor,
                "factor": long.factor,
                "attention_factor": long.attention_factor,
                "original_max_position_embeddings": long.original_max_position_embeddings,
            }),
        };
        match value {
            Value::Object(map) => Some(map.into_iter().filter(|(_, value)| !value.is_null()).collect()),
            _ => None,
        }
    }

    /// The length that frequencies depend on when the longest sequence has `length` positions; 0 where they do not
    /// depend on it.
    fn regime(&self, length: usize) -> usize {
        match self {
            Self::Dynamic { max_position_embeddings, .. } if length > *max_position_embeddings => length,
            Self::LongRope(long) if length > long.original_max_position_embeddings => usize::MAX,
            _ => 0,
        }
    }
}

/// `theta^(2i / rotary_dim)` for each frequency, in f32 as transformers computes it.
fn wavelengths(theta: f64, rotary_dim: usize) -> Vec<f32> {
    let theta = theta as f32;
    (0..rotary_dim).step_by(2).map(|i| theta.powf(i as f32 / rotary_dim as f32)).collect()
}

/// Inverse frequencies (`rotary_dim / 2` of them) and the factor on cos and sin, for sequences of up to `length`
/// positions. transformers: `ROPE_INIT_FUNCTIONS[rope_type](config, seq_len=length)`.
pub fn inverse_frequencies(scaling: &RopeScaling, theta: f64, rotary_dim: usize, length: usize) -> (Vec<f32>, f32) {
    let plain = |theta: f64| wavelengths(theta, rotary_dim).into_iter().map(|wave| 1.0 / wave);
    match scaling {
        RopeScaling::Default => (plain(theta).collect(), 1.0),
        RopeScaling::Linear { factor } => (plain(theta).map(|freq| freq / *factor as f32).collect(), 1.0),
        RopeScaling::Dynamic { factor, max_position_embeddings } => {
            let most = *max_position_embeddings as f64;
            let length = most.max(length as f64);
            let dim = rotary_dim as f64;
            let theta = theta * (factor * length / most - (factor - 1.0)).powf(dim / (dim - 2.0));
            (plain(theta).collect(), 1.0)
        }
        RopeScaling::Yarn(yarn) => yarn.inverse_frequencies(theta, rotary_dim),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let original = *original_max_position_embeddings as f64;
            let (low_wavelength, high_wavelength) =
                ((original / low_freq_factor) as f32, (original / high_freq_factor) as f32);
            let factor = *factor as f32;
            let blend = |freq: f32| {
                let wavelength = 2.0 * std::f64::consts::PI as f32 / freq;
                if wavelength > low_wavelength {
                    freq / factor
                } else if wavelength < high_wavelength {
                    freq
                } else {
                    let smooth = (original as f32 / wavelength - *low_freq_factor as f32)
                        / (high_freq_factor - low_freq_factor) as f32;
                    (1.0 - smooth) * freq / factor + smooth * freq
                }
            };
            (plain(theta).map(blend).collect(), 1.0)
        }
        RopeScaling::LongRope(long) => {
            let factors =
                if length > long.original_max_position_embeddings { &long.long_factor } else { &long.short_factor };
            let attention_factor = long.attention_factor.unwrap_or_else(|| {
                if long.factor <= 1.0 {
                    1.0
                } else {
                    (1.0 + long.factor.ln() / (long.original_max_position_embeddings as f64).ln()).sqrt()
                }
            });
            let waves = wavelengths(theta, rotary_dim);
            let frequencies = waves.iter().zip(factors).map(|(wave, factor)| 1.0 / (*factor as f32 * wave)).collect();
            (frequencies, attention_factor as f32)
        }
    }
}

impl Yarn {
    fn inverse_frequencies(&self, theta: f64, rotary_dim: usize) -> (Vec<f32>, f32) {
        let mscale = |weight: f64| if self.factor <= 1.0 { 1.0 } else { 0.1 * weight * self.factor.ln() + 1.0 };
        let attention_factor = self.attention_factor.unwrap_or_else(|| match (self.mscale, self.mscale_all_dim) {
            (Some(above), Some(below)) if above != 0.0 && below != 0.0 => mscale(above) / mscale(below),
            _ => mscale(1.0),
        });
        // The dimension that makes `rotations` turns over the original context.
        let dimension = |rotations: f64| {
            let turns = self.original_max_position_embeddings as f64 / (rotations * 2.0 * std::f64::consts::PI);
            rotary_dim as f64 * turns.ln() / (2.0 * theta.ln())
        };
        let (mut low, mut high) = (dimension(self.beta_fast), dimension(self.beta_slow));
        if self.truncate {
            (low, high) = (low.floor(), high.ceil());
        }
        let low = low.max(0.0);
        let mut high = high.min(rotary_dim as f64 - 1.0);
        if low == high {
            high += 0.001;
        }
        let frequencies = wavelengths(theta, rotary_dim)
            .into_iter()
            .enumerate()
            .map(|(i, wave)| {
                let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                let extrapolated = 1.0 - ramp;
                1.0 / (self.factor as f32 * wave) * (1.0 - extrapolated) + 1.0 / wave * extrapolated
            })
            .collect();
        (frequencies, attention_factor as f32)
    }
}

/// Cosines and sines of a run of positions starting at 0; cheap to clone.
#[derive(Debug, Clone)]
pub struct RopeTensors {
    /// `[positions, rotary_dim / 2]`, f32, multiplied by the attention factor.
    pub cos: Tensor,
    /// `[positions, rotary_dim / 2]`, f32, multiplied by the attention factor.
    pub sin: Tensor,
}

/// The rotary table of a model: cos and sin for as many positions as were needed so far.
///
/// A model made for 131,072 positions would need 64 MB at once; training on 512 needs 256 kB. The table therefore
/// grows, in powers of two, to what [`RopeTable::up_to`] is asked for.
#[derive(Debug)]
pub struct RopeTable {
    theta: f64,
    scaling: RopeScaling,
    rotary_dim: usize,
    device: Device,
    /// The rows so far and the regime that their frequencies belong to.
    current: Mutex<(usize, RopeTensors)>,
}

impl RopeTable {
    /// Rows that the smallest table has.
    const SMALLEST: usize = 256;

    /// A table of at least `positions` rows on `device`, for heads of `head_dim`.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn new(config: &RopeConfig, head_dim: usize, positions: usize, device: &Device) -> candle_core::Result<Self> {
        let (theta, scaling, rotary_dim) = (config.theta, config.scaling.clone(), config.rotary_dim(head_dim));
        let rows = rows_for(positions);
        let tensors = tensors(&scaling, theta, rotary_dim, positions, rows, device)?;
        let current = Mutex::new((scaling.regime(positions), tensors));
        Ok(Self { theta, scaling, rotary_dim, device: device.clone(), current })
    }

    /// The table for a batch whose longest sequence has `length` positions: at least `length` rows.
    ///
    /// Dynamic NTK and LongRoPE change all frequencies with the length, and then the rows are those that transformers
    /// uses in a forward pass whose largest position is `length − 1`.
    ///
    /// # Errors
    /// The device is out of memory.
    pub fn up_to(&self, length: usize) -> candle_core::Result<RopeTensors> {
        let regime = self.scaling.regime(length);
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        if current.0 != regime || current.1.cos.dim(0)? < length {
            let rows = rows_for(length);
            *current = (regime, tensors(&self.scaling, self.theta, self.rotary_dim, length, rows, &self.device)?);
        }
        Ok(current.1.clone())
    }

    /// What [`RopeTable::up_to`] makes frequencies depend on: passes whose longest sequences have the same regime turn a
    /// position the same way.
    pub fn regime(&self, length: usize) -> usize {
        self.scaling.regime(length)
    }

    /// Rotated dimensions of a head.
    pub fn rotary_dim(&self) -> usize {
        self.rotary_dim
    }
}

fn rows_for(positions: usize) -> usize {
    positions.max(RopeTable::SMALLEST).checked_next_power_of_two().unwrap_or(positions)
}

fn tensors(
    scaling: &RopeScaling,
    theta: f64,
    rotary_dim: usize,
    length: usize,
    rows: usize,
    device: &Device,
) -> candle_core::Result<RopeTensors> {
    let (frequencies, attention_factor) = inverse_frequencies(scaling, theta, rotary_dim, length);
    let half = frequencies.len();
    let size = rows
        .checked_mul(half)
        .filter(|size| *size <= 1 << 32)
        .ok_or_else(|| candle_core::Error::Msg(format!("a rotary table of {rows} positions is too large")).bt())?;
    let (mut cos, mut sin) = (Vec::with_capacity(size), Vec::with_capacity(size));
    for position in 0..rows {
        for frequency in &frequencies {
            let (s, c) = (position as f32 * frequency).sin_cos();
            cos.push(c * attention_factor);
            sin.push(s * attention_factor);
        }
    }
    Ok(RopeTensors {
        cos: Tensor::from_vec(cos, (rows, half), device)?,
        sin: Tensor::from_vec(sin, (rows, half), device)?,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use std::path::Path;

    use super::*;
    use crate::config::DecoderConfig;

    /// transformers' own numbers; `fixtures/make_rope.py` wrote them.
    fn fixture() -> Vec<Value> {
        serde_json::from_str(include_str!("../fixtures/rope.json")).unwrap()
    }

    fn config_of(case: &Value) -> DecoderConfig {
        DecoderConfig::from_hf_map(case["config"].as_object().unwrap().clone(), Path::new("config.json")).unwrap()
    }

    fn table_of(config: &DecoderConfig, positions: usize) -> RopeTable {
        RopeTable::new(config.rope().unwrap(), config.head_dim, positions, &Device::Cpu).unwrap()
    }

    fn floats(value: &Value) -> Vec<f32> {
        value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
    }

    #[test]
    fn frequencies_equal_those_of_transformers() {
        for case in fixture() {
            let config = config_of(&case);
            let length = case["seq_len"].as_u64().unwrap_or(0) as usize;
            let rope = config.rope().unwrap();
            let (frequencies, attention_factor) =
                inverse_frequencies(&rope.scaling, rope.theta, rope.rotary_dim(config.head_dim), length);
            let expected = floats(&case["inv_freq"]);
            assert_eq!(frequencies.len(), expected.len(), "{}", case["name"]);
            for (i, (ours, theirs)) in frequencies.iter().zip(&expected).enumerate() {
                assert!(
                    (ours - theirs).abs() <= 4e-7 * theirs.abs(),
                    "{} frequency {i}: {ours} and {theirs}",
                    case["name"]
                );
            }
            let theirs = case["attention_factor"].as_f64().unwrap() as f32;
            assert!((attention_factor - theirs).abs() < 1e-6, "{}: {attention_factor} and {theirs}", case["name"]);
        }
    }

    #[test]
    fn rows_equal_those_of_the_rotary_module() {
        for case in fixture() {
            let config = config_of(&case);
            let length = case["seq_len"].as_u64().unwrap_or(64) as usize;
            // Asked for less first, so that the table has to grow and, where frequencies depend on length, to change.
            let table = table_of(&config, 3);
            let tensors = table.up_to(length).unwrap();
            assert!(tensors.cos.dim(0).unwrap() >= length);
            for row in case["rows"].as_array().unwrap() {
                let position = row["position"].as_u64().unwrap() as usize;
                for (tensor, key) in [(&tensors.cos, "cos"), (&tensors.sin, "sin")] {
                    let ours: Vec<f32> = tensor.get(position).unwrap().to_vec1().unwrap();
                    for (ours, theirs) in ours.iter().zip(floats(&row[key])) {
                        // One unit in the last place of a frequency, times the position.
                        let tolerance = 1e-6 + 1.3e-7 * position as f32;
                        assert!(
                            (ours - theirs).abs() <= tolerance,
                            "{} {key}[{position}]: {ours} and {theirs}",
                            case["name"]
                        );
                    }
                }
            }
            // Back to the short regime, as transformers resets it.
            let short = table.up_to(3).unwrap();
            let fresh = table_of(&config, 3).up_to(3).unwrap();
            assert_eq!(
                short.cos.get(2).unwrap().to_vec1::<f32>().unwrap(),
                fresh.cos.get(2).unwrap().to_vec1::<f32>().unwrap()
            );
        }
    }

    #[test]
    fn a_table_starts_small() {
        let mut case = fixture().remove(0);
        case["config"]["max_position_embeddings"] = json!(1_000_000);
        let table = table_of(&config_of(&case), 10);
        assert_eq!(table.up_to(10).unwrap().cos.dim(0).unwrap(), 256);
        assert_eq!(table.up_to(257).unwrap().cos.dim(0).unwrap(), 512);
    }
}
