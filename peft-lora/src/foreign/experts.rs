//! LoRA on experts as PEFT wrote it before transformers 5, where each expert had layers of its own:
//! `….block_sparse_moe.experts.3.w1.lora_A.weight`. Now the experts of a layer are one parameter for gate and up, and one for down, and so are
//! their factors (`PeftConcatenate` in PEFT's `utils/transformers_weight_conversion.py`): A one below the other, B in blocks.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use peft_core::adapter_keys::KEY_PREFIX;
use peft_core::{AdapterConfig, AdapterFolder, Error, Result, SafetensorsFile, check_finite};
use serde_json::Value;

use crate::config::LoraConfig;

/// What layers of an expert were called, and which part each is.
const PARTS: [(&str, Part); 6] = [
    ("w1", Part::Gate),
    ("w3", Part::Up),
    ("w2", Part::Down),
    ("gate_proj", Part::Gate),
    ("up_proj", Part::Up),
    ("down_proj", Part::Down),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Gate,
    Up,
    Down,
}

/// A tensor of one expert.
struct Own<'a> {
    /// The module that holds all experts, under its name of today.
    container: String,
    expert: usize,
    part: Part,
    /// `lora_A.weight` or `lora_B.weight`, or what is not read.
    suffix: &'a str,
}

fn parse(key: &str) -> Option<Own<'_>> {
    let (before, behind) = key.split_once(".experts.")?;
    let (expert, behind) = behind.split_once('.')?;
    let (name, suffix) = behind.split_once('.')?;
    let (_, part) = PARTS.iter().find(|(known, _)| *known == name)?;
    let container = format!("{}.experts", renamed(before));
    Some(Own { container, expert: expert.parse().ok()?, part: *part, suffix })
}

/// Mixtral's module had another name.
fn renamed(key: &str) -> String {
    key.replace(".block_sparse_moe", ".mlp")
}

pub(super) fn is_own(key: &str) -> bool {
    key.starts_with(KEY_PREFIX) && parse(key).is_some_and(|own| own.suffix.starts_with("lora_"))
}

/// The factors of the experts of one module.
#[derive(Default)]
struct Experts(BTreeMap<(usize, Part), [Option<Tensor>; 2]>);

pub(super) fn open(dir: &Path) -> Result<AdapterFolder> {
    let files = AdapterFolder::open(dir)?;
    let path = files.weights().path().to_owned();
    let config = LoraConfig::from_adapter_config(files.config().map())?;
    for (key, given) in [
        ("rank_pattern", config.targets.rank_pattern.is_empty()),
        ("alpha_pattern", config.targets.alpha_pattern.is_empty()),
    ] {
        if !given {
            let message = "may speak of layers of experts, which are no longer layers: convert the adapter with the \
                           version of PEFT that wrote it, or train without";
            return Err(Error::config(key, message));
        }
    }
    let (mut tensors, mut modules, mut router) = (BTreeMap::new(), BTreeMap::<String, Experts>::new(), false);
    for key in files.keys() {
        let tensor = files.tensor(key, &Device::Cpu)?;
        check_finite(key, &tensor)?;
        let Some(own) = parse(key) else {
            router |= key.ends_with(".gate.lora_A.weight");
            tensors.insert(renamed(key), tensor);
            continue;
        };
        let at = match own.suffix {
            "lora_A.weight" => 0,
            "lora_B.weight" => 1,
            _ => {
                let message = format!("holds `{key}`: of experts, plain factors of a LoRA are read");
                return Err(Error::file(&path, message));
            }
        };
        let pair = modules.entry(own.container).or_default().0.entry((own.expert, own.part)).or_default();
        if let Some(place) = pair.get_mut(at) {
            *place = Some(tensor.to_dtype(DType::F32)?);
        }
    }
    let mut found = [false; 2];
    for (container, experts) in &modules {
        let has = |part: Part| experts.0.keys().any(|(_, own)| *own == part);
        let (fused, down) = (has(Part::Gate) || has(Part::Up), has(Part::Down));
        found = [found[0] || fused, found[1] || down];
        // PEFT nests the wrapper of the first parameter inside that of the second.
        let inner = if down { format!("{container}.base_layer") } else { container.clone() };
        let gate_up: &[Part] = &[Part::Gate, Part::Up];
        for (is, at, parts) in [(fused, inner, gate_up), (down, container.clone(), &[Part::Down])] {
            if !is {
                continue;
            }
            let [a, b] = experts.packed(parts).map_err(|e| Error::file(&path, format!("`{container}`: {e}")))?;
            // Twice the rank would otherwise scale by √2 more.
            let b = if parts.len() == 2 && config.use_rslora { (b * std::f64::consts::FRAC_1_SQRT_2)? } else { b };
            tensors.insert(format!("{at}.lora_A.weight"), a);
            tensors.insert(format!("{at}.lora_B.weight"), b);
        }
    }
    let config = config_of(&config, files.config(), found, router)?;
    Ok(AdapterFolder::converted(dir, config, Arc::new(SafetensorsFile::open(&path)?), tensors))
}

impl Experts {
    /// A and B of all experts, of one part or of several in one parameter: `[E · n·r, in]` and `[n·out, n·r · E]`.
    fn packed(&self, parts: &[Part]) -> Result<[Tensor; 2]> {
        let count = self.0.keys().map(|(expert, _)| expert + 1).max().unwrap_or(0);
        if count > self.0.len() {
            return Err(Error::msg(format!("expert {} is there, and not all before it", count - 1)));
        }
        let (mut all_a, mut all_b) = (Vec::with_capacity(count), Vec::with_capacity(count));
        for expert in 0..count {
            let own = parts.iter().map(|part| match self.0.get(&(expert, *part)) {
                Some([Some(a), Some(b)]) => Ok((a, b)),
                _ => Err(Error::msg(format!("a factor of expert {expert} is missing"))),
            });
            let own = own.collect::<Result<Vec<_>>>()?;
            all_a.push(Tensor::cat(&own.iter().map(|(a, _)| *a).collect::<Vec<_>>(), 0)?);
            let ranks = own.iter().map(|(_, b)| Ok(b.dim(1)?)).collect::<Result<Vec<_>>>()?;
            let total: usize = ranks.iter().sum();
            let mut blocks = Vec::with_capacity(own.len());
            let mut left = 0;
            for ((_, b), rank) in own.iter().zip(ranks) {
                blocks.push(b.pad_with_zeros(1, left, total - left - rank)?);
                left += rank;
            }
            all_b.push(Tensor::cat(&blocks, 0)?);
        }
        // The experts of a direction one after another.
        let b = Tensor::stack(&all_b, 2)?;
        let (out, rank, experts) = b.dims3()?;
        Ok([Tensor::cat(&all_a, 0)?.contiguous()?, b.reshape((out, rank * experts))?.contiguous()?])
    }
}

/// The config of today, which names the parameters that the file has factors of.
fn config_of(
    lora: &LoraConfig,
    config: &AdapterConfig,
    [fused, down]: [bool; 2],
    router: bool,
) -> Result<AdapterConfig> {
    let mut keys = config.map().clone();
    if fused {
        lora.widen(2, &mut keys);
    }
    let names = [("down_proj", down), ("gate.weight", router), ("gate_up_proj", fused)];
    let names: Vec<&str> = names.into_iter().filter(|(_, is)| *is).map(|(name, _)| name).collect();
    keys.insert("target_parameters".into(), names.into());
    if let Some(Value::Array(targets)) = keys.get_mut("target_modules") {
        let old = PARTS.iter().map(|(name, _)| *name).chain(["gate"]).collect::<Vec<_>>();
        targets.retain(|target| !target.as_str().is_some_and(|t| old.contains(&t.rsplit('.').next().unwrap_or(t))));
    }
    AdapterConfig::new(keys)
}
