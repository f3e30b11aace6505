//! LoRA in other programs' files, read as PEFT would have it: mlx-lm, torchtune and kohya (sd-scripts, LyCORIS), told by what is in
//! the folder; and PEFT's own on experts, which had layers of their own before transformers 5 (`experts.rs`).
//!
//! | program | config | tensors | scale |
//! |---|---|---|---|
//! | mlx-lm | `adapter_config.json` with `lora_parameters` | `….lora_a: [in, r]`, `….lora_b: [r, out]`, DoRA's `….m: [out]` | `scale` as it is |
//! | torchtune | `adapter_config.json` with `r` and `lora_alpha` | `layers.0.attn.q_proj.lora_a.weight`, …, `….magnitude` | `lora_alpha / r` |
//! | kohya | none | `lora_te_layers_0_self_attn_q_proj.lora_down.weight`, `….lora_up.weight`, `….alpha` | `alpha / r` of each layer |

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{Device, Tensor};
use peft_core::suggest::did_you_mean;
use peft_core::{
    AdapterConfig, AdapterFolder, BaseModel, Context, Error, Result, SafetensorsFile, check_finite, parameter_name,
    read_keys,
};
use serde_json::{Map, Value, json};

mod experts;
mod kohya;
mod mlx;
mod torchtune;

const CONFIG: &str = "adapter_config.json";

/// Whose files a folder holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// mlx-lm's.
    Mlx,
    /// torchtune's own, before it converts them to PEFT's.
    Torchtune,
    /// kohya's sd-scripts'.
    Kohya,
    /// PEFT's of experts, before transformers 5.
    Experts,
}

impl Layout {
    /// The layout of a folder, `None` where it is of none of these programs.
    ///
    /// # Errors
    /// A config or a weights' file that cannot be read.
    pub fn of(dir: &Path) -> Result<Option<Self>> {
        if !dir.is_dir() {
            return Ok(None);
        }
        if dir.join(CONFIG).is_file() {
            let keys = read_keys(dir)?;
            if !keys.contains_key("peft_type")
                && ["lora_parameters", "fine_tune_type"].iter().any(|k| keys.contains_key(*k))
            {
                return Ok(Some(Self::Mlx));
            }
            // torchtune writes the same keys as PEFT; an adapter of PEFT's has its tensors under its own prefix.
            let of_lora = keys.get("peft_type").is_none_or(|v| v == "LORA") && keys.contains_key("r");
            if !of_lora {
                return Ok(None);
            }
        }
        let Some(path) = only_weights(dir)? else { return Ok(None) };
        let file = SafetensorsFile::open(&path)?;
        let found = |is: fn(&str) -> bool| file.names().any(is);
        Ok(if found(torchtune::is_own) {
            Some(Self::Torchtune)
        } else if found(kohya::is_own) {
            Some(Self::Kohya)
        } else if found(experts::is_own) {
            Some(Self::Experts)
        } else {
            None
        })
    }

    /// Opens a folder of this layout under PEFT's names.
    ///
    /// # Errors
    /// A missing file, a setting that PEFT has nothing for, a tensor that belongs to nothing, factors that do not fit; torchtune's
    /// and kohya's files say too little without a `base`.
    pub fn open(self, dir: &Path, base: Option<&dyn BaseModel>) -> Result<AdapterFolder> {
        match self {
            Self::Mlx => mlx::open(dir),
            Self::Torchtune => torchtune::open(dir, base),
            Self::Kohya => kohya::open(dir, base),
            Self::Experts => experts::open(dir),
        }
    }
}

/// The one file of weights in a folder.
fn only_weights(dir: &Path) -> Result<Option<PathBuf>> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(dir).map_err(|e| Error::io(dir, e))? {
        let path = entry.map_err(|e| Error::io(dir, e))?.path();
        if path.extension().is_some_and(|e| e.eq_ignore_ascii_case("safetensors")) && path.is_file() {
            found.insert(path);
        }
    }
    Ok(if found.len() == 1 { found.pop_first() } else { None })
}

/// The factors of one layer as PEFT has them.
#[derive(Debug, Default)]
struct Factors {
    /// `[r, in]`.
    a: Option<Tensor>,
    /// `[out, r]`.
    b: Option<Tensor>,
    /// DoRA's, `[out]`.
    magnitude: Option<Tensor>,
    /// What the scale is made of: `alpha / r`; one where the file says none.
    alpha: Option<f64>,
}

/// A file's layers, by their paths in the base model.
struct Layers<'a> {
    file: &'a SafetensorsFile,
    layers: BTreeMap<String, Factors>,
}

impl<'a> Layers<'a> {
    fn new(file: &'a SafetensorsFile) -> Self {
        Self { file, layers: BTreeMap::new() }
    }

    fn of(&mut self, path: &str) -> &mut Factors {
        self.layers.entry(path.to_owned()).or_default()
    }

    /// A tensor of the file with so many dimensions, finite.
    fn tensor(&self, name: &str, rank: usize) -> Result<Tensor> {
        let tensor = self.file.tensor(name, &Device::Cpu)?;
        if tensor.rank() != rank {
            let message = format!(
                "holds `{name}` of shape {:?}, where a LoRA of linear layers has {rank} dimensions",
                tensor.dims()
            );
            return Err(Error::file(self.file.path(), message));
        }
        check_finite(name, &tensor).with_context(|| self.file.path().display().to_string())?;
        Ok(tensor)
    }

    /// Puts a tensor where none was yet.
    fn put(&self, place: Option<&Tensor>, name: &str) -> Result<()> {
        match place {
            None => Ok(()),
            Some(_) => Err(Error::file(
                self.file.path(),
                format!("holds a second tensor for the layer of `{name}`; remove one"),
            )),
        }
    }

    /// What belongs to nothing.
    fn stranger(&self, name: &str, what: &str, near: &str) -> Error {
        Error::file(self.file.path(), format!("holds `{name}`, which {what}{near}"))
    }

    /// The folder as PEFT would have it. `alpha` makes the scale of a layer of rank r that has none of its own.
    fn folder(
        self,
        dir: &Path,
        file: Arc<SafetensorsFile>,
        alpha: impl Fn(usize) -> f64,
        more: Map<String, Value>,
    ) -> Result<AdapterFolder> {
        let at = |message: String| Error::file(file.path(), message);
        let (mut tensors, mut ranks, mut with_magnitude) = (BTreeMap::new(), Vec::new(), 0usize);
        for (path, factors) in self.layers {
            let (Some(a), Some(b)) = (factors.a, factors.b) else {
                return Err(at(format!("holds one of the two factors of `{path}`")));
            };
            let r = a.dim(0)?;
            if r == 0 || b.dim(1)? != r {
                let message = format!("holds factors of `{path}` that do not fit: A {:?}, B {:?}", a.dims(), b.dims());
                return Err(at(message));
            }
            let alpha = factors.alpha.unwrap_or_else(|| alpha(r));
            if !alpha.is_finite() {
                return Err(at(format!("has a scale for `{path}` that is no number")));
            }
            let keys = match path.ends_with("embed_tokens") {
                true => ["lora_embedding_A", "lora_embedding_B"],
                false => ["lora_A.weight", "lora_B.weight"],
            };
            for (key, tensor) in keys.into_iter().zip([a, b]) {
                tensors.insert(parameter_name(&path, key), tensor.contiguous()?);
            }
            if let Some(magnitude) = factors.magnitude {
                with_magnitude += 1;
                tensors.insert(parameter_name(&path, "lora_magnitude_vector"), magnitude.contiguous()?);
            }
            ranks.push((path, r, alpha));
        }
        let Some((_, r, alpha)) = ranks.first().cloned() else {
            return Err(at("holds no adapter of any layer".into()));
        };
        if with_magnitude != 0 && with_magnitude != ranks.len() {
            return Err(at("has DoRA's magnitudes for some layers and not for others, which PEFT cannot say".into()));
        }
        let differing = |differs: &dyn Fn(usize, f64) -> Option<Value>| -> Map<String, Value> {
            ranks.iter().filter_map(|(path, r, alpha)| Some((path.replace('.', r"\."), differs(*r, *alpha)?))).collect()
        };
        let number = |n: f64| if n.fract() == 0.0 && n.abs() < 1e15 { json!(n as i64) } else { json!(n) };
        let mut config = json!({
            "peft_type": "LORA", "r": r, "lora_alpha": number(alpha), "use_dora": with_magnitude > 0,
            "rank_pattern": differing(&|own, _| (own != r).then(|| own.into())),
            "alpha_pattern": differing(&|_, own| (own != alpha).then(|| number(own))),
            "target_modules": ranks.iter().map(|(path, ..)| path.clone()).collect::<Vec<_>>()
        });
        if let Value::Object(config) = &mut config {
            config.extend(more);
        }
        let config = config.as_object().cloned().unwrap_or_default();
        Ok(AdapterFolder::converted(dir, AdapterConfig::new(config)?, file, tensors))
    }
}

/// The site of a base that has this path, or what is near it.
fn near_sites(base: Option<&dyn BaseModel>, path: &str) -> String {
    base.map_or(String::new(), |base| did_you_mean(path, base.sites().iter().map(|site| site.path.as_str())))
}

/// The error of a layout that says too little without a base.
fn needs_base(dir: &Path, why: &str) -> Error {
    Error::file(dir, format!("{why}: name the base with --model"))
}
